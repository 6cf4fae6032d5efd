"""Gates, SiLU(gate) * value: with their gradients, and as the end of a SwiGLU's first matrix product."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from arm_zoo.ops.layout import aligned, inner
from arm_zoo.ops.triton.common import processors, sigmoid

_BLOCK_ROWS, _BLOCK_CHANNELS = 16, 256  # of the gate's kernels
_ROWS, _CHANNELS, _INNER = 128, 128, 64  # of a tile: of the result, twice as many channels of the product, of the sum
_GROUP = 16  # tiles of rows that take turns with the same channels, so that the weight stays in L2


@triton.jit
def _gate_kernel(gate, value, out, rows, channels, gate_row, value_row, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mask = (row < rows) & (d < channels)
    g = tl.load(gate + row * gate_row + d, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_row + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * channels + d, (g * sigmoid(g) * v).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_backward_kernel(
    grad, gate, value, grad_gate, grad_value, sums, rows, channels,
    grad_row, gate_row, value_row, grad_gate_row, grad_value_row,
    SUM: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Both gradients, and of each its sum over the program's BLOCKS * ROWS rows."""
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    gate_sum, value_sum = tl.zeros([ROWS, CHANNELS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    for block in range(BLOCKS):
        row = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (d < channels)[None, :]
        outer = tl.load(grad + row * grad_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(value + row * value_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
        open_share = sigmoid(g)
        to_gate = outer * v * open_share * (1.0 + g * (1.0 - open_share))
        to_value = outer * g * open_share
        here = grad_gate + row * grad_gate_row + d[None, :]
        tl.store(here, to_gate.to(grad_gate.dtype.element_ty), mask=mask)
        here = grad_value + row * grad_value_row + d[None, :]
        tl.store(here, to_value.to(grad_value.dtype.element_ty), mask=mask)
        if SUM:
            gate_sum += to_gate
            value_sum += to_value
    if SUM:
        sums += tl.program_id(0) * 2 * channels + d
        tl.store(sums, tl.sum(gate_sum, axis=0), mask=d < channels)
        tl.store(sums + channels, tl.sum(value_sum, axis=0), mask=d < channels)


def _as_rows(tensor: Tensor) -> Tensor:
    """(..., N) -> (rows, N) with channels side by side; a copy only where strides leave no other way."""
    return inner(tensor).flatten(0, -2)


def halves(halves: Tensor, bias: Tensor) -> Tensor:
    """SiLU(gate) * value (..., N) of the two halves (..., 2 N), which have the bias in them; computed in float32."""
    gates, values = _as_rows(halves).chunk(2, dim=-1)
    rows, channels = values.shape
    out = values.new_empty(rows, channels)
    grid = triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(channels, _BLOCK_CHANNELS)
    _gate_kernel[grid](
        gates, values, out, rows, channels, gates.stride(0), values.stride(0),
        ROWS=_BLOCK_ROWS, CHANNELS=_BLOCK_CHANNELS, num_warps=8,
    )  # fmt: skip
    return out.view(*halves.shape[:-1], channels)


def halves_backward(grad: Tensor, halves: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `halves` and of the bias, which is made with theirs."""
    grad_halves, sums = halves.new_empty(halves.shape), bias.new_empty(bias.shape, dtype=torch.float32)
    gate_backward(grad, *halves.chunk(2, dim=-1), *grad_halves.chunk(2, dim=-1), sums)
    return grad_halves, sums.to(bias.dtype)


def gate_backward(
    grad: Tensor, gate: Tensor, value: Tensor, grad_gate: Tensor, grad_value: Tensor, sums: Tensor | None = None
) -> None:
    """Write the gradients of gate and value (..., N), and to `sums`, (2 N) in float32, their sums over all rows."""
    tensors = tuple(_as_rows(t) for t in (grad, gate, value))
    written = tuple(t.view(-1, t.shape[-1]) for t in (grad_gate, grad_value))
    rows, channels = tensors[0].shape
    blocks, warps = (12, 4) if sums is None else (24, 8)  # the fastest for the mixer and for the MLP of ARM-B
    programs = triton.cdiv(rows, _BLOCK_ROWS * blocks)
    partial = None if sums is None else sums.new_empty(programs, len(sums))
    _gate_backward_kernel[(programs, triton.cdiv(channels, _BLOCK_CHANNELS))](
        *tensors, *written, partial, rows, channels, *(t.stride(0) for t in (*tensors, *written)),
        SUM=sums is not None, BLOCKS=blocks, ROWS=_BLOCK_ROWS, CHANNELS=_BLOCK_CHANNELS, num_warps=warps,
    )  # fmt: skip
    if sums is not None:
        torch.sum(partial, 0, out=sums)


@triton.jit
def _gated_product_kernel(
    x, weight, bias, out, rows, channels, inner,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tall, wide = tl.cdiv(rows, ROWS), tl.cdiv(channels, CHANNELS)
    for tile in range(tl.program_id(0), tall * wide, PROGRAMS):
        first = tile // (GROUP * wide) * GROUP
        height = min(tall - first, GROUP)
        row = (first + tile % (GROUP * wide) % height) * ROWS
        channel = tile % (GROUP * wide) // height * CHANNELS
        gate = tl.zeros([ROWS, CHANNELS], tl.float32)
        value = tl.zeros([ROWS, CHANNELS], tl.float32)
        for k in range(0, inner, INNER):
            tokens = x.load([row, k])
            gate = tl.dot(tokens, weight.load([channel, k]).T, gate)
            value = tl.dot(tokens, weight.load([channels + channel, k]).T, value)
        d = channel + tl.arange(0, CHANNELS)
        gate += tl.load(bias + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
        value += tl.load(bias + channels + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
        y = gate * sigmoid(gate) * value
        out.store([row, channel], y.to(out.dtype))


def gated_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(gate) * value of (gate, value) = x weight^T + bias: (..., D), (2 N, D), (2 N) -> (..., N), of one type."""
    tokens, weight = aligned(x.flatten(0, -2)), aligned(weight)
    (rows, inner), channels = tokens.shape, len(weight) // 2
    out = tokens.new_empty(rows, channels)
    programs = min(processors(x), triton.cdiv(rows, _ROWS) * triton.cdiv(channels, _CHANNELS))
    _gated_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(tokens, [_ROWS, _INNER]),
        TensorDescriptor.from_tensor(weight, [_CHANNELS, _INNER]),
        bias.contiguous(), TensorDescriptor.from_tensor(out, [_ROWS, _CHANNELS]), rows, channels, inner,
        ROWS=_ROWS, CHANNELS=_CHANNELS, INNER=_INNER, GROUP=_GROUP, PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out.view(*x.shape[:-1], channels)
