"""The definition of correct: the short convolution and the selective scan written as plain loops."""

import torch
from torch.nn import functional as F

__all__ = ["aligned", "causal_conv_reference", "inner", "project", "selective_scan_reference"]


def causal_conv_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, order: torch.Tensor | None
) -> torch.Tensor:
    """See `arm_zoo.scan.causal_conv`; every tap is one shifted product."""
    directions, length, taps = weight.shape[0], x.shape[1], weight.shape[2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias, in_dtype = x.to(dtype), weight.to(dtype), bias.to(dtype), x.dtype
    out = []
    for k in range(directions):
        sequence = x if order is None else x[:, order[k]]
        padded = F.pad(sequence, (0, 0, taps - 1, 0))  # (B, L, D) -> (B, taps - 1 + L, D)
        out.append(sum(padded[:, j : j + length] * weight[k, :, j] for j in range(taps)) + bias[k])
    return F.silu(torch.stack(out)).to(in_dtype)


def inner(sequence: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy, with its last axis side by side and offsets of steps that fit 32 bits."""
    near = sequence.shape[-2] * sequence.stride(-2) < 2**31
    return sequence if sequence.stride(-1) == 1 and near else sequence.contiguous()


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy, side by side in memory and where several numbers can be read at once."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def project(sequences: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """(K, B, L, N) times the transpose of each direction's weight (K, M, N) -> (K, B, L, M); the same without one."""
    if weight is None:
        return sequences
    # one batched product over the directions; B * L rows merge without a copy
    product = torch.bmm(sequences.flatten(1, 2), weight.to(sequences.dtype).transpose(1, 2))
    return product.unflatten(1, sequences.shape[1:3])


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    order: torch.Tensor | None,
) -> torch.Tensor:
    """See `arm_zoo.scan.selective_scan`, before the gate; one step of the recurrence at a time.

    Returns:
        (batch, length, channels) mean over the directions in token order, in the dtype of u.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    in_dtype = u.dtype
    u, delta, A, B, C, D = (t.to(dtype) for t in (u, delta, A, B, C, D))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None, None]
    if delta_softplus:
        delta = F.softplus(delta)
    directions, batch, length, channels = u.shape
    state = u.new_zeros(directions, batch, channels, A.shape[-1])
    steps = []
    for t in range(length):
        decay = torch.exp(delta[:, :, t, :, None] * A[:, None])
        state = decay * state + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
        steps.append((state * C[:, :, t, None]).sum(-1) + D[:, None] * u[:, :, t])
    y = torch.stack(steps, dim=2)  # (K, B, L, D) in scan order
    if order is not None:
        inverse = order.argsort(dim=1)
        y = torch.stack([y[k, :, inverse[k]] for k in range(directions)])
    return y.mean(0).to(in_dtype)
