"""The definition of correct: the short convolution and the selective scan written as plain loops."""

import torch
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.ops.layout import ScanInputs, in_order, state_dtype


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """See `arm_zoo.ops.causal_conv`; every tap is one shifted product."""
    directions, length, taps = weight.shape[0], x.shape[1], weight.shape[2]
    dtype = state_dtype(x.dtype)
    x, weight, bias, in_dtype = x.to(dtype), weight.to(dtype), bias.to(dtype), x.dtype
    sequences = in_order(x[None], order).expand(directions, *x.shape)
    out = []
    for k in range(directions):
        padded = F.pad(sequences[k], (0, 0, taps - 1, 0))  # (B, L, D) -> (B, taps - 1 + L, D)
        out.append(sum(padded[:, j : j + length] * weight[k, :, j] for j in range(taps)) + bias[k])
    return F.silu(torch.stack(out)).to(in_dtype)


def selective_scan(scan: ScanInputs) -> Tensor:
    """See `arm_zoo.ops.selective_scan`, before the gate; one step of the recurrence at a time."""
    scan = scan.with_whole_steps()
    dtype = state_dtype(scan.u.dtype)
    u, delta, A, B, C, D = (t.to(dtype) for t in (scan.u, scan.delta, scan.A, scan.B, scan.C, scan.D))
    if scan.delta_bias is not None:
        delta = delta + scan.delta_bias.to(dtype)[:, None, None]
    if scan.delta_softplus:
        delta = F.softplus(delta)
    directions, batch, length, channels = u.shape
    state = u.new_zeros(directions, batch, channels, A.shape[-1])
    steps = []
    for t in range(length):
        decay = torch.exp(delta[:, :, t, :, None] * A[:, None])
        state = decay * state + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
        steps.append((state * C[:, :, t, None]).sum(-1) + D[:, None] * u[:, :, t])
    y = torch.stack(steps, dim=2)  # (K, B, L, D) in scan order
    if scan.order is not None:
        y = in_order(y, scan.order.argsort(dim=-1))
    return (y.mean(0) if scan.mean else y.sum(0)).to(scan.u.dtype)
