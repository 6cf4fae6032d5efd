"""The `mamba_ssm` backend: the CUDA extensions of mamba-ssm and causal-conv1d, for comparison with the other kernels.

They take (batch, channels, length), so sequences are copied; the directions become groups of channels of one call. The
backward pass scans once more. The packages take multiples of 8 channels only, and their gradients differ from run to
run. Sequences of one step are refused, as the packages compute them wrongly.
"""

from typing import Any

import selective_scan_cuda
import torch
from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.ops.layout import ScanInputs, Tensors, empty_states, in_order, state_dtype


def _channels_first(sequences: Tensor) -> Tensor:
    """(K, B, L, D) -> (B, K * D, L)."""
    return sequences.permute(1, 0, 3, 2).flatten(1, 2).contiguous()


def _channels_last(sequences: Tensor, directions: int) -> Tensor:
    """(B, K * D, L) -> (K, B, L, D)."""
    return sequences.unflatten(1, (directions, -1)).permute(1, 0, 3, 2).contiguous()


def _to_sequences(tokens: Tensor, order: Tensor | None, directions: int) -> Tensor:
    """(B, L, D) in token order -> (K, B, L, D) in every direction's order."""
    return in_order(tokens[None], order).expand(directions, *tokens.shape)


def _to_tokens(sequences: Tensor, order: Tensor | None) -> Tensor:
    """The sum over the directions of (K, B, L, D), as (B, L, D) in token order."""
    return in_order(sequences, None if order is None else order.argsort(dim=-1)).sum(0)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """See `arm_zoo.ops.causal_conv`."""
    sequences = _channels_first(_to_sequences(x, order, len(weight)))
    out = causal_conv1d_fwd_function(sequences, weight.flatten(0, 1), bias.flatten(), None, None, None, True)
    return _channels_last(out, len(weight))


def causal_conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensors:
    """Gradients of x, weight and bias, given that of the output (K, B, L, D)."""
    sequences = _channels_first(_to_sequences(x, order, len(weight)))
    grad_sequences, grad_weight, grad_bias, _ = causal_conv1d_bwd_function(
        sequences, weight.flatten(0, 1), bias.flatten(), _channels_first(grad), None, None, None, None, False, True
    )
    grad_x = _to_tokens(_channels_last(grad_sequences, len(weight)), order)
    return grad_x, grad_weight.view_as(weight).to(weight.dtype), grad_bias.view_as(bias).to(bias.dtype)


def _arguments(scan: ScanInputs) -> list[Any]:
    """The arguments of the extension from u to the gate, which is left out."""
    u, delta, A, B, C, D, delta_bias, *_ = scan
    B, C = (t.to(u.dtype).permute(1, 0, 3, 2).contiguous() for t in (B, C))  # (B, K, S, L)
    bias = None if delta_bias is None else delta_bias.flatten().float()
    rates, skip = A.flatten(0, 1).float(), D.flatten().float()
    return [_channels_first(u), _channels_first(delta.to(u.dtype)), rates, B, C, skip, None, bias]


def selective_scan(scan: ScanInputs, save_states: bool, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `arm_zoo.ops.selective_scan`: its output, gated only where no states are saved, and no saved states."""
    u, (directions, _, length, _) = scan.u, scan.u.shape
    if length == 1:
        raise ValueError("mamba-ssm computes sequences of one step wrongly; use set_scan_backend('auto')")
    out, *_ = selective_scan_cuda.fwd(*_arguments(scan.with_whole_steps()), scan.delta_softplus)
    y = _to_tokens(_channels_last(out, directions).float(), scan.order).mul(scan.share).to(u.dtype)
    nothing = empty_states(u, scan.A, state_dtype(u.dtype), save=False)
    return y if gate is None else y * F.silu(gate), nothing


def selective_scan_backward(grad: Tensor, scan: ScanInputs, saved: Tensor) -> Tensors:
    """Gradients of u, whole delta, A, B, C, D and delta_bias, given that of the output (B, L, D)."""
    directions, D = len(scan.u), scan.D
    arguments = _arguments(scan)
    _, states, *_ = selective_scan_cuda.fwd(*arguments, scan.delta_softplus)
    grad_y = _channels_first(_to_sequences(grad * scan.share, scan.order, directions))
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, *_ = selective_scan_cuda.bwd(
        *arguments, grad_y, states, None, None, scan.delta_softplus, False
    )
    grad_u, grad_delta = (_channels_last(t, directions) for t in (grad_u, grad_delta))
    grad_B, grad_C = (t.permute(1, 0, 3, 2).contiguous() for t in (grad_B, grad_C))
    grad_bias = torch.zeros_like(D) if grad_bias is None else grad_bias.view_as(D)
    return grad_u, grad_delta, grad_A.view_as(scan.A), grad_B, grad_C, grad_D.view_as(D), grad_bias
