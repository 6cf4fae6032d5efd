"""The Mamba mixer: one input projection, K directional scans, one output projection (paper, section 3.3)."""

import math
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from arm_zoo.layers.init import fill, step_bias
from arm_zoo.layers.sizes import Device
from arm_zoo.ops import mamba_inner
from arm_zoo.ops.fused import run_linear

torch.fx.wrap("mamba_inner")  # it asks for shapes, types and devices, which are not known while a model is traced


@register_notrace_module
class MambaMixer(nn.Module):
    """Mamba token mixer over K = 1, 2 or 4 directions, which share both projections; other parameters are stacked."""

    def __init__(
        self,
        dim: int,
        directions: int = 4,  # ARM: 1 in pretraining, 4 in finetuning; Vim: 2
        expand: float = 1.0,  # inner width as a multiple of `dim`; ARM: 1, Vim: 2
        d_state: int = 16,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)  # from the model's width, not the inner one
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(directions, inner, 4, **dd))  # 4 taps of the convolution
        self.conv_bias = nn.Parameter(torch.empty(directions, inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(directions, self.dt_rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(directions, inner, self.dt_rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(directions, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(directions, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(directions, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what `Linear` does not: convolution, step sizes, decays and skips."""
        for weight in (self.conv_weight, self.conv_bias, self.x_proj_weight, self.dt_proj_weight):
            fan_in = (self.conv_weight if weight is self.conv_bias else weight).shape[-1]
            nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
        # only the first direction starts with small step sizes, 0.001 to 0.1, as in the official code
        bias = torch.zeros(self.dt_proj_bias.shape, dtype=torch.float32, device=self.dt_proj_bias.device)
        bias[0] = step_bias(bias[0].shape, bias.device)
        fill(self.dt_proj_bias, bias)
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
        fill(self.A_log, states.log().expand(self.A_log.shape))
        nn.init.ones_(self.D)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are one-dimensional per direction, and therefore not decayed although stacked."""
        return {"conv_bias", "dt_proj_bias", "D"}

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        """Mix tokens (batch, length, dim) along the directions of the (K, length) order table."""
        xz = self.in_proj(x) if torch.jit.is_scripting() else run_linear(self.in_proj, x)
        y = mamba_inner(
            xz, self.conv_weight, self.conv_bias, self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias,
            self.A_log, self.D, order, True,
        )  # fmt: skip
        return self.out_proj(y) if torch.jit.is_scripting() else run_linear(self.out_proj, y)
