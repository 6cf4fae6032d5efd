"""GPU kernels by Triton for what lies around the scans: gates, a SwiGLU's first half, residual sums with norms."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from arm_zoo.scan.reference import aligned, inner

__all__ = ["add_norm", "add_norm_backward", "gate", "gate_backward", "gated_product", "sigmoid"]

_LOG2E = tl.constexpr(1.4426950408889634)
_BLOCK_ROWS, _BLOCK_CHANNELS = 16, 256  # of the gate's kernels
_PROGRAMS = 8  # a multiprocessor, of the norm's backward pass: each leaves a sum of the gradients of weight and bias
_ROWS, _CHANNELS, _INNER = 128, 128, 64  # of a tile: of the result, twice as many channels of the product, of the sum
_GROUP = 16  # tiles of rows that take turns with the same channels, so that the weight stays in L2


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


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


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., N) -> (rows, N) with channels side by side; a copy only where strides leave no other way."""
    return inner(tensor).flatten(0, -2)


def gate(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * value of tensors (..., N), computed in float32; the result has the type of `value`."""
    gates, values = _as_rows(gate), _as_rows(value)
    out = values.new_empty(values.shape)
    rows, channels = values.shape
    grid = triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(channels, _BLOCK_CHANNELS)
    _gate_kernel[grid](
        gates, values, out, rows, channels, gates.stride(0), values.stride(0),
        ROWS=_BLOCK_ROWS, CHANNELS=_BLOCK_CHANNELS, num_warps=8,
    )  # fmt: skip
    return out.view(value.shape)


def gate_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    value: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_value: torch.Tensor,
    sums: torch.Tensor | None = None,
) -> None:
    """Write the gradients of gate and value (..., N), given that of SiLU(gate) * value.

    Args:
        grad: (..., N), like gate and value.
        grad_gate: where to write; its rows may lie in those of a wider tensor.
        grad_value: like grad_gate.
        sums: (2 N) in float32, where to write the gradients' sums over all rows.
    """
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


def _processors(x: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; the interpreter's is one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def gated_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * value of (gate, value) = x weight^T + bias: (..., D), (2 N, D), (2 N) -> (..., N).

    What fc1 makes is not written to memory and read again, which takes almost half as long as its product. One program
    a multiprocessor goes from tile to tile; the tensor memory accelerator of Hopper GPUs reads and writes them.
    All of one type; sums, SiLU and product in float32. Rows must have multiples of 16 bytes.
    """
    tokens, weight = aligned(x.flatten(0, -2)), aligned(weight)
    (rows, inner), channels = tokens.shape, len(weight) // 2
    out = tokens.new_empty(rows, channels)
    programs = min(_processors(x), triton.cdiv(rows, _ROWS) * triton.cdiv(channels, _CHANNELS))
    _gated_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(tokens, [_ROWS, _INNER]),
        TensorDescriptor.from_tensor(weight, [_CHANNELS, _INNER]),
        bias.contiguous(), TensorDescriptor.from_tensor(out, [_ROWS, _CHANNELS]), rows, channels, inner,
        ROWS=_ROWS, CHANNELS=_CHANNELS, INNER=_INNER, GROUP=_GROUP, PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out.view(*x.shape[:-1], channels)


@triton.jit
def _add_norm_kernel(
    x, branch, scale, weight, bias, total, normed, moments, length, channels, eps,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    here, channel = row * channels + d, d < channels
    added = tl.load(branch + here, mask=channel, other=0.0).to(tl.float32)
    if HAS_SCALE:
        added *= tl.load(scale + row // length).to(tl.float32)
    # the norm is of the sum as it is kept
    kept = (tl.load(x + here, mask=channel, other=0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + here, kept, mask=channel)
    mean = tl.sum(kept.to(tl.float32)) / channels
    centred = tl.where(channel, kept.to(tl.float32) - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / channels + eps)
    tl.store(moments + 2 * row, mean)
    tl.store(moments + 2 * row + 1, inverse)
    w = tl.load(weight + d, mask=channel, other=0.0).to(tl.float32)
    y = centred * inverse * w + tl.load(bias + d, mask=channel, other=0.0).to(tl.float32)
    tl.store(normed + here, y.to(normed.dtype.element_ty), mask=channel)


@triton.jit
def _add_norm_backward_kernel(
    grad_total, grad_normed, total, moments, scale, weight, grad_x, grad_branch, partial, rows, length, channels,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
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
        through += inverse * (g - tl.sum(g) / channels - y * (tl.sum(g * y) / channels))
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
    x: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + scale * branch in the type of x, its layer norm in `dtype`, and what the backward pass needs of each row.

    Args:
        x: (B, L, D).
        branch: like x, of any type.
        scale: (B), or None for 1.
        weight: (D).
        bias: (D).
        eps: added to the variance.
        dtype: of the norm.

    Returns:
        (B, L, D), (B, L, D), and (B, L, 2) mean and one over the deviation. All is computed in float32.
    """
    x, branch, scale = x.contiguous(), branch.contiguous(), None if scale is None else scale.contiguous()
    batch, length, channels = x.shape
    total, normed = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
    moments = x.new_empty(batch, length, 2, dtype=torch.float32)
    _add_norm_kernel[(batch * length,)](
        x, branch, scale, weight.contiguous(), bias.contiguous(), total, normed, moments, length, channels, eps,
        HAS_SCALE=scale is not None, **_row(channels),
    )  # fmt: skip
    return total, normed, moments


def add_norm_backward(
    grad_total: torch.Tensor,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    moments: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of branch in `dtype`, of weight and of bias; `total` and `moments` are from `add_norm`."""
    grad_total, grad_normed, total = grad_total.contiguous(), grad_normed.contiguous(), total.contiguous()
    batch, length, channels = total.shape
    grad_x, grad_branch = total.new_empty(total.shape), total.new_empty(total.shape, dtype=dtype)
    programs = min(_PROGRAMS * _processors(total), batch * length)
    partial = total.new_empty(programs, 2, channels, dtype=torch.float32)
    _add_norm_backward_kernel[(programs,)](
        grad_total, grad_normed, total, moments, None if scale is None else scale.contiguous(), weight.contiguous(),
        grad_x, grad_branch, partial, batch * length, length, channels,
        HAS_SCALE=scale is not None, **_row(channels),
    )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_branch, grad_weight.to(weight.dtype, copy=True), grad_bias.to(weight.dtype, copy=True)
