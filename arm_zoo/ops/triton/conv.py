"""The causal convolution and its backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import Tensors, inner
from arm_zoo.ops.triton.common import BLOCK_CHANNELS, check_length, check_number, order_step, processors, sigmoid
from arm_zoo.ops.triton.merge import merge

_GROUP = 8  # steps whose tokens the forward pass asks for at once
_WARPS = 32  # of a multiprocessor, which hide each other's waiting


@triton.jit
def _load_tokens(x, order, first, d, length, x_time, channel, HAS_ORDER: tl.constexpr, COUNT: tl.constexpr):
    """Rows of x (one image) at COUNT steps of a direction's order, zero outside the sequence, in float32."""
    rows = ()
    for i in tl.static_range(COUNT):
        inside = (first + i >= 0) & (first + i < length)
        token = tl.maximum(tl.minimum(first + i, length - 1), 0).to(tl.int64)
        if HAS_ORDER:
            token = tl.load(order + token)
        rows = rows + (tl.load(x + token * x_time + d, mask=channel & inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _image_by_image(program, batch):
    """Direction, image and k * batch + b: directions of an image in turn, as they share tokens, still in L2."""
    directions = tl.num_programs(2) // batch
    k, b = (program % directions).to(tl.int64), (program // directions).to(tl.int64)
    return k, b, k * batch + b


@triton.jit
def _last(rows, COUNT: tl.constexpr):
    kept = ()
    for i in tl.static_range(COUNT):
        kept = kept + (rows[len(rows) - COUNT + i],)
    return kept


@triton.jit
def _load_taps(weight, k, d, channels, channel, TAPS: tl.constexpr):
    taps = ()
    for j in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + (k * channels + d) * TAPS + j, mask=channel, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _conv_kernel(
    x, weight, bias, order, out, batch, length, channels, x_batch, x_time, order_batch,
    HAS_ORDER: tl.constexpr, TAPS: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SEGMENT steps of one sequence, GROUP at a time; the rows that the next group needs again stay in registers."""
    k, b, sequence = _image_by_image(tl.program_id(2), batch)
    start = tl.program_id(0) * SEGMENT
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = d < channels
    x += b * x_batch
    if HAS_ORDER:
        order += b * order_batch + k * length
    out += sequence * length * channels
    taps = _load_taps(weight, k, d, channels, channel, TAPS)
    offset = tl.load(bias + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    rows = _load_tokens(x, order, start - (TAPS - 1), d, length, x_time, channel, HAS_ORDER, TAPS - 1)
    for t in range(start, start + SEGMENT, GROUP):
        rows = rows + _load_tokens(x, order, t, d, length, x_time, channel, HAS_ORDER, GROUP)
        for i in tl.static_range(GROUP):
            before = offset
            for j in tl.static_range(TAPS):
                before += taps[j] * rows[i + j]
            y = (before * sigmoid(before)).to(out.dtype.element_ty)
            tl.store(out + (t + i) * channels + d, y, mask=channel & (t + i < length))
        rows = _last(rows, TAPS - 1)


@triton.jit
def _conv_backward_kernel(
    grad, x, weight, bias, order, grad_x, partial, batch, length, channels, segment, x_batch, x_time,
    g_direction, g_batch, g_time, to_direction, to_batch, to_time, order_batch,
    HAS_ORDER: tl.constexpr, TAPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One direction's gradient of x in scan order, and a segment's share of the gradients of weight and bias."""
    k, b, sequence = _image_by_image(tl.program_id(2), batch)
    start = tl.program_id(0) * segment
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = d < channels
    x += b * x_batch
    if HAS_ORDER:
        order += b * order_batch + k * length
    grad += k * g_direction + b * g_batch
    grad_x += k * to_direction + b * to_batch
    taps = _load_taps(weight, k, d, channels, channel, TAPS)
    offset = tl.load(bias + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    zero = tl.zeros([BLOCK_D], tl.float32)
    rows = _load_tokens(x, order, start - (TAPS - 1), d, length, x_time, channel, HAS_ORDER, TAPS - 1)
    gradients, sums = (), (zero, zero)
    for _ in tl.static_range(TAPS - 1):
        gradients, sums = gradients + (zero,), sums + (zero,)
    end = tl.minimum(start + segment, length)
    # x at a step needs the gradients before SiLU of that step and the TAPS - 1 after it
    for t in range(start, end + TAPS - 1, GROUP):
        rows = rows + _load_tokens(x, order, t, d, length, x_time, channel, HAS_ORDER, GROUP)
        outer = ()
        for i in tl.static_range(GROUP):
            here = grad + (t + i) * g_time + d
            outer = outer + (tl.load(here, mask=channel & (t + i < length), other=0.0).to(tl.float32),)
        for i in tl.static_range(GROUP):
            before = offset
            for j in tl.static_range(TAPS):
                before += taps[j] * rows[i + j]
            slope = sigmoid(before)
            g = outer[i] * slope * (1.0 + before * (1.0 - slope))
            gradients = gradients + (g,)
            fed = zero  # gradient of x, TAPS - 1 steps back
            for j in tl.static_range(TAPS):
                fed += taps[TAPS - 1 - j] * gradients[i + j]
            step = t + i - (TAPS - 1)
            mask = channel & (step >= start) & (step < end)
            tl.store(grad_x + step * to_time + d, fed.to(grad_x.dtype.element_ty), mask=mask)
            g = tl.where(t + i < end, g, 0.0)  # the steps after the segment are the next one's
            new = ()
            for j in tl.static_range(TAPS):
                new = new + (sums[j] + g * rows[i + j],)
            sums = new + (sums[TAPS] + g,)
        rows = _last(rows, TAPS - 1)
        gradients = _last(gradients, TAPS - 1)
    partial += (tl.program_id(0) * tl.num_programs(2) + sequence) * (TAPS + 1) * channels
    for j in tl.static_range(TAPS + 1):
        tl.store(partial + j * channels + d, sums[j], mask=channel)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """See `arm_zoo.ops.causal_conv`."""
    directions, channels, taps = weight.shape
    batch, length, _ = x.shape
    check_length(length, channels)
    check_number(directions, batch)
    x = inner(x)
    out = x.new_empty(directions, batch, length, channels)
    sequences = triton.cdiv(channels, BLOCK_CHANNELS) * directions * batch
    # long segments load fewer rows twice, short ones leave no multiprocessor waiting
    segment = 32 if triton.cdiv(length, 32) * sequences >= _WARPS * processors(x) else _GROUP
    grid = triton.cdiv(length, segment), triton.cdiv(channels, BLOCK_CHANNELS), directions * batch
    _conv_kernel[grid](
        x, weight.contiguous(), bias.contiguous(), order, out, batch, length, channels, x.stride(0), x.stride(1),
        order_step(order),
        HAS_ORDER=order is not None, TAPS=taps, SEGMENT=segment, GROUP=_GROUP, BLOCK_D=BLOCK_CHANNELS, num_warps=1,
    )  # fmt: skip
    return out


def causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, out: Tensor | None = None
) -> Tensors:
    """Gradients of x (in `out`, if there is one), weight and bias, given that of the output (K, B, L, D)."""
    directions, channels, taps = weight.shape
    batch, length, _ = x.shape
    x, grad, weight, bias = inner(x), inner(grad), weight.contiguous(), bias.contiguous()
    merged = out is not None and directions == 1 and order is None  # nothing is left to do after the kernel
    sequences = out[None] if merged else x.new_empty(directions, batch, length, channels)
    blocks = triton.cdiv(channels, BLOCK_CHANNELS)
    # segments of about one length; long ones walk fewer steps twice and leave fewer sums, where warps are many
    enough = triton.cdiv(length, 128) * blocks * directions * batch >= _WARPS * processors(x)
    segments = triton.cdiv(length, 128 if enough else 64)
    partial = x.new_empty(segments, directions, batch, taps + 1, channels, dtype=torch.float32)
    _conv_backward_kernel[segments, blocks, directions * batch](
        grad, x, weight, bias, order, sequences, partial, batch, length, channels, triton.cdiv(length, segments),
        x.stride(0), x.stride(1), *grad.stride()[:3], *sequences.stride()[:3], order_step(order),
        HAS_ORDER=order is not None, TAPS=taps, GROUP=4, BLOCK_D=BLOCK_CHANNELS, num_warps=1,
    )  # fmt: skip
    partial = partial.sum((0, 2))  # (K, taps + 1, D)
    grad_weight = partial[:, :taps].transpose(1, 2).to(weight.dtype).contiguous()
    grad_x = sequences[0] if merged else merge(sequences, order, 1.0, out=out)
    return grad_x, grad_weight, partial[:, taps].to(bias.dtype, copy=True)
