"""The depth-wise 3x3 convolution of a map of tokens, channels last, with SiLU, and its backward pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import Tensors
from arm_zoo.ops.triton.common import check_length, check_number, sigmoid

# A program takes 7 columns, as the usual maps have multiples of them: 56, 28, 14, 7.
_TILE = {"SEGMENT": 28, "COLUMNS": 7, "BLOCK_D": 64, "UNROLL": 2, "num_warps": 1}


@triton.jit
def _place(strips, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Image, first row, first column, channels and which of them exist: strips side by side share columns."""
    first_row = tl.program_id(0) // strips * SEGMENT
    first_column = tl.program_id(0) % strips * COLUMNS
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.program_id(2).to(tl.int64), first_row, first_column, d, d < CHANNELS


@triton.jit
def _load_columns(x, row, first, d, height, width, channel, CHANNELS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT columns of one row of a map, zero outside of it, in float32."""
    columns = ()
    inside = channel & (row >= 0) & (row < height)
    x += (row * width + first) * CHANNELS + d
    for j in tl.static_range(COUNT):
        mask = inside & (first + j >= 0) & (first + j < width)
        columns = columns + (tl.load(x + j * CHANNELS, mask=mask, other=0.0).to(tl.float32),)
    return columns


@triton.jit
def _load_taps(weight, d, channel, CHANNELS: tl.constexpr):
    """The nine factors of every channel, row by row."""
    taps = ()
    for i in tl.static_range(9):
        taps = taps + (tl.load(weight + i * CHANNELS + d, mask=channel, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _add_row(sums, columns, taps, ROW: tl.constexpr):
    """What a row of the map, one column wider to both sides, adds by the taps of one row to the sums of outputs."""
    added = ()
    for j in tl.static_range(len(sums)):
        total = sums[j]
        for i in tl.static_range(3):
            total += taps[3 * ROW + i] * columns[j + i]
        added = added + (total,)
    return added


@triton.jit
def _conv2d_silu_kernel(
    x, weight, grad, out, height, width, strips,
    HAS_GRAD: tl.constexpr, CHANNELS: tl.constexpr,
    SEGMENT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """SEGMENT rows of COLUMNS columns: SiLU of the convolution, or the gradient of what SiLU takes, given its own."""
    b, start, first, d, channel = _place(strips, CHANNELS, SEGMENT, COLUMNS, BLOCK_D)
    image = b * height * width * CHANNELS
    x += image
    out += image
    if HAS_GRAD:
        grad += image
    taps = _load_taps(weight, d, channel, CHANNELS)
    zero = ()
    for _ in tl.static_range(COLUMNS):
        zero = zero + (tl.zeros([BLOCK_D], tl.float32),)
    above = _load_columns(x, start - 1, first - 1, d, height, width, channel, CHANNELS, COLUMNS + 2)
    here = _load_columns(x, start, first - 1, d, height, width, channel, CHANNELS, COLUMNS + 2)
    sums = _add_row(zero, above, taps, 0)
    for row in tl.range(start, min(start + SEGMENT, height), loop_unroll_factor=UNROLL):
        below = _load_columns(x, row + 1, first - 1, d, height, width, channel, CHANNELS, COLUMNS + 2)
        if HAS_GRAD:
            outer = _load_columns(grad, row, first, d, height, width, channel, CHANNELS, COLUMNS)
        place = out + (row * width + first) * CHANNELS + d
        sums = _add_row(_add_row(sums, here, taps, 1), below, taps, 2)
        for j in tl.static_range(COLUMNS):
            slope = sigmoid(sums[j])
            y = sums[j] * slope
            if HAS_GRAD:
                y = outer[j] * (slope + y * (1.0 - slope))
            tl.store(place + j * CHANNELS, y.to(out.dtype.element_ty), mask=channel & (first + j < width))
        sums = _add_row(zero, here, taps, 0)
        here = below


@triton.jit
def _conv2d_backward_kernel(
    grad, x, weight, grad_x, partial, height, width, strips,
    CHANNELS: tl.constexpr,
    SEGMENT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and the share of SEGMENT rows of COLUMNS columns in that of the taps, before SiLU's."""
    b, start, first, d, channel = _place(strips, CHANNELS, SEGMENT, COLUMNS, BLOCK_D)
    image = b * height * width * CHANNELS
    grad += image
    x += image
    grad_x += image
    taps = _load_taps(weight, d, channel, CHANNELS)
    shares = ()
    for _ in tl.static_range(9):
        shares = shares + (tl.zeros([BLOCK_D], tl.float32),)
    above = _load_columns(grad, start - 1, first - 1, d, height, width, channel, CHANNELS, COLUMNS + 2)
    here = _load_columns(grad, start, first - 1, d, height, width, channel, CHANNELS, COLUMNS + 2)
    for row in tl.range(start, min(start + SEGMENT, height), loop_unroll_factor=UNROLL):
        below = _load_columns(grad, row + 1, first - 1, d, height, width, channel, CHANNELS, COLUMNS + 2)
        tokens = _load_columns(x, row, first, d, height, width, channel, CHANNELS, COLUMNS)
        place = grad_x + (row * width + first) * CHANNELS + d
        window = below + here + above  # a tap above its token feeds the output below it
        for j in tl.static_range(COLUMNS):
            fed = tl.zeros([BLOCK_D], tl.float32)
            more = ()
            for i in tl.static_range(9):
                g = window[i // 3 * (COLUMNS + 2) + j + 2 - i % 3]
                fed += taps[i] * g
                more = more + (shares[i] + tokens[j] * g,)
            shares = more
            tl.store(place + j * CHANNELS, fed.to(grad_x.dtype.element_ty), mask=channel & (first + j < width))
        above = here
        here = below
    partial += (b * tl.num_programs(0) + tl.program_id(0)) * 9 * CHANNELS
    for i in tl.static_range(9):
        tl.store(partial + i * CHANNELS + d, shares[i], mask=channel)


def _programs(x: Tensor, tile: dict[str, int]) -> int:
    """Programs that share a map (B, H, W, C) and a block of channels."""
    return triton.cdiv(x.shape[1], tile["SEGMENT"]) * triton.cdiv(x.shape[2], tile["COLUMNS"])


def _launch(kernel: Any, x: Tensor, tensors: tuple[Tensor | None, ...], tile: dict[str, int], **flags: bool) -> None:
    batch, height, width, channels = x.shape
    grid = _programs(x, tile), triton.cdiv(channels, tile["BLOCK_D"]), batch
    kernel[grid](*tensors, height, width, triton.cdiv(width, tile["COLUMNS"]), CHANNELS=channels, **flags, **tile)


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C): what the channels of a program need lies side by side."""
    return weight.flatten(1).t().contiguous()


def conv2d_silu(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the depth-wise convolution, padded by zeros: (B, H, W, C), (C, 1, 3, 3) -> (B, H, W, C)."""
    batch, height, width, channels = x.shape
    check_length(height * width, channels)
    check_number(1, batch)
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(_conv2d_silu_kernel, x, (x, _taps(weight), None, out), _TILE, HAS_GRAD=False)
    return out


def conv2d_silu_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensors:
    """Gradients of x and weight; what comes out of the convolution is made anew, not kept."""
    grad, x, taps = grad.contiguous(), x.contiguous(), _taps(weight)
    before, grad_x = torch.empty_like(x), torch.empty_like(x)  # gradients before SiLU and before the convolution
    _launch(_conv2d_silu_kernel, x, (x, taps, grad, before), _TILE, HAS_GRAD=True)
    partial = x.new_empty(len(x) * _programs(x, _TILE), *taps.shape, dtype=torch.float32)
    _launch(_conv2d_backward_kernel, x, (before, x, taps, grad_x, partial), _TILE)
    return grad_x, partial.sum(0).t().reshape(weight.shape).to(weight.dtype).contiguous()
