"""Residual sum and its norm in one pass: layer norm, or RMSNorm where there is no bias."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import Tensors
from arm_zoo.ops.triton.common import processors

_PROGRAMS = 8  # a multiprocessor, of the backward pass: each leaves a sum of the gradients of weight and bias


@triton.jit
def _add_norm_kernel(
    x, branch, scale, weight, bias, total, normed, moments, length, channels, eps,
    HAS_SCALE: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    here, channel = row * channels + d, d < channels
    added = tl.load(branch + here, mask=channel, other=0.0).to(tl.float32)
    if HAS_SCALE:
        added *= tl.load(scale + row // length).to(tl.float32)
    # the norm is of the sum as it is kept
    kept = (tl.load(x + here, mask=channel, other=0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + here, kept, mask=channel)
    rest, mean = kept.to(tl.float32), 0.0
    if CENTRED:
        mean = tl.sum(rest) / channels
        rest = tl.where(channel, rest - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(rest * rest) / channels + eps)
    tl.store(moments + 2 * row, mean)
    tl.store(moments + 2 * row + 1, inverse)
    y = rest * inverse * tl.load(weight + d, mask=channel, other=0.0).to(tl.float32)
    if CENTRED:
        y += tl.load(bias + d, mask=channel, other=0.0).to(tl.float32)
    tl.store(normed + here, y.to(normed.dtype.element_ty), mask=channel)


@triton.jit
def _add_norm_backward_kernel(
    grad_total, grad_normed, total, moments, scale, weight, grad_x, grad_branch, partial, rows, length, channels,
    HAS_SCALE: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows in turn with the other programs, and the sums of their shares in the gradients of weight and bias."""
    d = tl.arange(0, BLOCK)
    channel = d < channels
    w = tl.load(weight + d, mask=channel, other=0.0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        here = row * channels + d
        outer = tl.load(grad_normed + here, mask=channel, other=0.0).to(tl.float32)
        kept = tl.load(total + here, mask=channel, other=0.0).to(tl.float32)
        through = tl.load(grad_total + here, mask=channel, other=0.0).to(tl.float32)
        mean, inverse = tl.load(moments + 2 * row), tl.load(moments + 2 * row + 1)
        y = tl.where(channel, (kept - mean) * inverse, 0.0)
        weight_sum += outer * y
        bias_sum += outer
        g = outer * w
        along = tl.sum(g * y) / channels
        if CENTRED:
            g -= tl.sum(g) / channels
        through += inverse * (g - y * along)
        tl.store(grad_x + here, through.to(grad_x.dtype.element_ty), mask=channel)
        if HAS_SCALE:
            through *= tl.load(scale + row // length).to(tl.float32)
        tl.store(grad_branch + here, through.to(grad_branch.dtype.element_ty), mask=channel)
    partial += tl.program_id(0) * 2 * channels + d
    tl.store(partial, weight_sum, mask=channel)
    tl.store(partial + channels, bias_sum, mask=channel)


def _row(channels: int) -> dict[str, int]:
    """How a program takes a row: whole, by few warps, which need not wait for each other long."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": max(1, min(block // 1024, 8))}


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> Tensors:  # fmt: skip
    """x + scale (B) * branch (B, L, D), its norm in `dtype`, and every row's mean and 1 / deviation (B, L, 2).

    Without a bias it is RMSNorm: the mean counts as 0.
    """
    x, branch, scale = x.contiguous(), branch.contiguous(), None if scale is None else scale.contiguous()
    batch, length, channels = x.shape
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
    moments = x.new_empty(batch, length, 2, dtype=torch.float32)
    _add_norm_kernel[(batch * length,)](
        x, branch, scale, weight.contiguous(), None if bias is None else bias.contiguous(),
        total, normed, moments, length, channels, eps,
        HAS_SCALE=scale is not None, CENTRED=bias is not None, **_row(channels),
    )  # fmt: skip
    return total, normed, moments


def add_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, moments: Tensor,
    scale: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
) -> Tensors:  # fmt: skip
    """Gradients of x, of branch in `dtype`, of weight and of bias (also if there is none); see `add_norm`."""
    grad_total, grad_normed, total = grad_total.contiguous(), grad_normed.contiguous(), total.contiguous()
    batch, length, channels = total.shape
    grad_x, grad_branch = total.new_empty(total.shape), total.new_empty(total.shape, dtype=dtype)
    programs = min(_PROGRAMS * processors(total), batch * length)
    partial = total.new_empty(programs, 2, channels, dtype=torch.float32)
    _add_norm_backward_kernel[(programs,)](
        grad_total, grad_normed, total, moments, None if scale is None else scale.contiguous(), weight.contiguous(),
        grad_x, grad_branch, partial, batch * length, length, channels,
        HAS_SCALE=scale is not None, CENTRED=bias is not None, **_row(channels),
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(weight.dtype, copy=True)
