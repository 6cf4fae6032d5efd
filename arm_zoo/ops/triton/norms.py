"""Residual sum and its norm in one pass: layer norm, or RMSNorm where there is no bias."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import Tensors
from arm_zoo.ops.triton.common import processors

_TILE = 1024  # numbers of a warp, which then reads enough at a time
_PROGRAMS = 8  # a multiprocessor, of the backward pass: each leaves a sum of the gradients of weight and bias


@triton.jit
def normalise(x, weight, bias, d, channels, eps, CENTRED: tl.constexpr):
    """Layer norm of rows (rows, channels), or RMSNorm, with their means and 1 / deviations (rows, 1); d: channels."""
    channel, mean = d < channels, tl.zeros([x.shape[0], 1], tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1, keep_dims=True) / channels
        x = tl.where(channel[None, :], x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / channels + eps)
    y = x * inverse * tl.load(weight + d, mask=channel, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        y += tl.load(bias + d, mask=channel, other=0.0).to(tl.float32)[None, :]
    return y, mean, inverse


@triton.jit
def _add_norm_kernel(
    x, branch, scale, weight, bias, total, normed, moments, rows, length, channels, eps,
    HAS_SCALE: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, d = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)
    here, mask = row * channels + d[None, :], (row < rows) & (d < channels)[None, :]
    added = tl.load(branch + here, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        added *= tl.load(scale + row // length, mask=row < rows, other=0.0).to(tl.float32)
    # the norm is of the sum as it is kept
    kept = (tl.load(x + here, mask=mask, other=0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + here, kept, mask=mask)
    y, mean, inverse = normalise(kept.to(tl.float32), weight, bias, d, channels, eps, CENTRED)
    tl.store(moments + 2 * row, mean, mask=row < rows)
    tl.store(moments + 2 * row + 1, inverse, mask=row < rows)
    tl.store(normed + here, y.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_backward_kernel(
    grad_total, grad_normed, total, moments, scale, weight, grad_x, grad_branch, partial, rows, length, channels,
    HAS_SCALE: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows in turn with the other programs, and the sums of their shares in the gradients of weight and bias."""
    d = tl.arange(0, BLOCK)
    channel = d < channels
    w = tl.load(weight + d, mask=channel, other=0.0).to(tl.float32)[None, :]
    weight_sum, bias_sum = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        here, mask = row * channels + d[None, :], (row < rows) & channel[None, :]
        outer = tl.load(grad_normed + here, mask=mask, other=0.0).to(tl.float32)
        kept = tl.load(total + here, mask=mask, other=0.0).to(tl.float32)
        through = tl.load(grad_total + here, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(moments + 2 * row, mask=row < rows, other=0.0)
        inverse = tl.load(moments + 2 * row + 1, mask=row < rows, other=0.0)
        y = tl.where(channel[None, :], (kept - mean) * inverse, 0.0)
        weight_sum += outer * y
        bias_sum += outer
        g = outer * w
        along = tl.sum(g * y, axis=1, keep_dims=True) / channels
        if CENTRED:
            g -= tl.sum(g, axis=1, keep_dims=True) / channels
        through += inverse * (g - y * along)
        tl.store(grad_x + here, through.to(grad_x.dtype.element_ty), mask=mask)
        if HAS_SCALE:
            through *= tl.load(scale + row // length, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(grad_branch + here, through.to(grad_branch.dtype.element_ty), mask=mask)
    partial += tl.program_id(0) * 2 * channels + d
    tl.store(partial, tl.sum(weight_sum, axis=0), mask=channel)
    tl.store(partial + channels, tl.sum(bias_sum, axis=0), mask=channel)


def whole_rows(channels: int) -> dict[str, int]:
    """How a program takes rows: whole, narrow ones together, by few warps, which need not wait for each other long."""
    block = triton.next_power_of_2(channels)
    return {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": max(1, min(block // _TILE, 8))}


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor | None,
    eps: float, dtype: torch.dtype,
) -> Tensors:  # fmt: skip
    """x + scale (B) * branch (B, ..., D), its norm in `dtype`, and every row's mean and 1 / deviation (B, ..., 2).

    Without a bias it is RMSNorm: the mean counts as 0.
    """
    x, branch, scale = x.contiguous(), branch.contiguous(), None if scale is None else scale.contiguous()
    channels, length = x.shape[-1], math.prod(x.shape[1:-1])
    rows, tile = len(x) * length, whole_rows(channels)
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
    moments = x.new_empty(*x.shape[:-1], 2, dtype=torch.float32)
    _add_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, branch, scale, weight.contiguous(), None if bias is None else bias.contiguous(),
        total, normed, moments, rows, length, channels, eps,
        HAS_SCALE=scale is not None, CENTRED=bias is not None, **tile,
    )  # fmt: skip
    return total, normed, moments


def add_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, moments: Tensor,
    scale: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
) -> Tensors:  # fmt: skip
    """Gradients of x, of branch in `dtype`, and of weight and bias (2, D), also if there is none; see `add_norm`."""
    grad_total, grad_normed, total = grad_total.contiguous(), grad_normed.contiguous(), total.contiguous()
    channels, length = total.shape[-1], math.prod(total.shape[1:-1])
    rows, tile = len(total) * length, whole_rows(channels)
    grad_x, grad_branch = total.new_empty(total.shape), total.new_empty(total.shape, dtype=dtype)
    programs = min(_PROGRAMS * processors(total), triton.cdiv(rows, tile["ROWS"]))
    partial = total.new_empty(programs, 2, channels, dtype=torch.float32)
    _add_norm_backward_kernel[(programs,)](
        grad_total, grad_normed, total, moments, None if scale is None else scale.contiguous(), weight.contiguous(),
        grad_x, grad_branch, partial, rows, length, channels,
        HAS_SCALE=scale is not None, CENTRED=bias is not None, **tile,
    )  # fmt: skip
    return grad_x, grad_branch, partial.sum(0).to(weight.dtype)
