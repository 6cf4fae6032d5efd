"""The feed-forward parts of blocks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.layers.sizes import Device
from arm_zoo.ops.fused import (
    gate_halves,
    gated_linear,
    gated_transposed,
    gates_in_kernel,
    gates_transposed,
    is_plain,
    is_plain_layer,
    run_linear,
)

_ALIGNMENT = 64  # of the hidden width on CUDA: the matrix products' tiles


class SwiGLU(nn.Module):
    """fc2(SiLU(gate) * value), with gate and value the two halves of fc1 (paper, section 3.3)."""

    def __init__(self, dim: int, hidden: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            gate, value = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * value)
        if is_plain(x) and x.is_cuda and is_plain_layer(self.fc1, nn.Linear) and self.fc1.bias is not None:
            if is_plain_layer(self.fc2, nn.Linear) and self.fc2.in_features % _ALIGNMENT:
                return self._forward_padded(x, -self.fc2.in_features % _ALIGNMENT)
            if gates_in_kernel(x, self.fc1.weight, self.fc1.bias):
                return self.fc2(gated_linear(x, self.fc1.weight, self.fc1.bias))
        if gates_transposed(self.fc1, x) and is_plain_layer(self.fc2, nn.Linear):
            hidden = gated_transposed(x, self.fc1.weight, self.fc1.bias)
            return F.linear(hidden.t(), self.fc2.weight, self.fc2.bias).view(*x.shape[:-1], -1)
        return run_linear(self.fc2, gate_halves(run_linear(self.fc1, x)))

    def _forward_padded(self, x: Tensor, missing: int) -> Tensor:
        """The same with hidden channels of zeros added, as 2730, ARM-L's number, makes matrix products slow."""
        halves = (2, self.fc2.in_features)
        weight = F.pad(self.fc1.weight.unflatten(0, halves), (0, 0, 0, missing)).flatten(0, 1)
        bias = F.pad(self.fc1.bias.unflatten(0, halves), (0, missing)).flatten()
        if gates_in_kernel(x, weight, bias):
            hidden = gated_linear(x, weight, bias)
        else:
            gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        return F.linear(hidden, F.pad(self.fc2.weight, (0, missing)), self.fc2.bias)


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), with the exact GELU."""

    def __init__(self, dim: int, hidden: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.fc2(F.gelu(self.fc1(x)))
        return run_linear(self.fc2, F.gelu(run_linear(self.fc1, x)))
