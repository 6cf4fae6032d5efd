"""The merge of the directions, from scan order to token order, with the norm and the gate."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import Norm, ScanInputs, inner, is_per_image
from arm_zoo.ops.triton.common import BLOCK_CHANNELS, order_step, sigmoid
from arm_zoo.ops.triton.norms import normalise, whole_rows

_BLOCK_STEPS = 1024  # of a table of orders
FEW = 2**23  # outputs of a scan: to so many, a launch less is worth more than stores side by side
_TILE = {"ROWS": 16, "BLOCK": BLOCK_CHANNELS}  # tokens and channels of a program, where there is no norm


@triton.jit
def _inverse_kernel(order, inverse, length, BLOCK_T: tl.constexpr):
    """The step at which a direction visits a token, from the token that it visits at a step."""
    step = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(1) * length
    token = tl.load(order + row + step, mask=step < length, other=0)
    tl.store(inverse + row + token, step.to(tl.int64), mask=step < length)


@triton.jit
def _merge_kernel(
    sequences, inverse, weight, bias, gate, out, kept, batch, length, channels, inverse_batch, gate_batch, gate_time,
    out_batch, out_time, share, eps,
    DIRECTIONS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_NORM: tl.constexpr, HAS_GATE: tl.constexpr,
    KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (token < length)[:, None] & (d < channels)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if HAS_ORDER:
        inverse += b * inverse_batch
    for k in tl.static_range(DIRECTIONS):
        step = token
        if HAS_ORDER:
            step = tl.load(inverse + k * length + token, mask=token < length, other=0)
        rows = sequences + (k * batch + b) * length * channels
        total += tl.load(rows + step[:, None] * channels + d[None, :], mask=mask, other=0.0).to(tl.float32)
    total *= share
    if KEEP:
        here = kept + (b * length + token[:, None]) * channels + d[None, :]
        tl.store(here, total.to(kept.dtype.element_ty), mask=mask)
    if HAS_NORM:  # a program has all channels then
        total, _mean, _inverse = normalise(total, weight, bias, d, channels, eps, True)
    if HAS_GATE:
        gate += b * gate_batch
        z = tl.load(gate + token[:, None] * gate_time + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total *= z * sigmoid(z)
    out += b * out_batch + token[:, None] * out_time + d[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)


def _inverse(order: Tensor) -> Tensor:
    length = order.shape[-1]
    inverse = torch.empty_like(order)
    grid = triton.cdiv(length, _BLOCK_STEPS), order.numel() // length
    _inverse_kernel[grid](order, inverse, length, BLOCK_T=_BLOCK_STEPS)
    return inverse


def merge(
    sequences: Tensor, order: Tensor | None, share: float,
    gate: Tensor | None = None, out: Tensor | None = None, kept: Tensor | None = None, norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """(K, B, L, D) in scan order -> (B, L, D) in token order: the sum times `share`, to `kept`, norm, SiLU(gate)."""
    directions, batch, length, channels = sequences.shape
    if directions == 1 and order is None and gate is None and out is None and kept is None and norm is None:
        return sequences[0]
    tile, weight, bias, eps = _TILE, None, None, 0.0
    if norm is not None:
        tile, weight, bias, eps = whole_rows(channels), norm.weight.contiguous(), norm.bias.contiguous(), norm.eps
    gate = None if gate is None else inner(gate)
    gate_strides = (0, 0) if gate is None else gate.stride()[:2]
    inverse = None if order is None else _inverse(order)
    out = sequences.new_empty(batch, length, channels) if out is None else out
    grid = triton.cdiv(length, tile["ROWS"]), triton.cdiv(channels, tile["BLOCK"]), batch
    _merge_kernel[grid](
        sequences, inverse, weight, bias, gate, out, kept, batch, length, channels, order_step(order), *gate_strides,
        *out.stride()[:2], share, eps,
        DIRECTIONS=directions, HAS_ORDER=order is not None, HAS_NORM=norm is not None, HAS_GATE=gate is not None,
        KEEP=kept is not None, **tile,
    )  # fmt: skip
    return out


def sequences_for(scan: ScanInputs, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Memory (K, B, L, D) for what the scans give, and where `merge` keeps their sum: nowhere if it lies there."""
    if kept is not None and len(scan.A) == 1 and scan.order_of_outputs is None:
        return kept[None], None
    return scan.u.new_empty(scan.shape), kept


def stores_by_token(scan: ScanInputs) -> bool:
    """Whether a scan stores its outputs where their tokens lie, which leaves `merge` without an order to invert."""
    order = scan.order_of_outputs
    return order is not None and not is_per_image(order) and math.prod(scan.shape) <= FEW
