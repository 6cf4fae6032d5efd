"""The merge of the directions, from scan order to token order, with the gate."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import ScanInputs, inner
from arm_zoo.ops.triton.common import BLOCK_CHANNELS, sigmoid

_BLOCK_STEPS = 1024  # of a table of orders
_BLOCK_TIME = 16


@triton.jit
def _inverse_kernel(order, inverse, length, BLOCK_T: tl.constexpr):
    """The step at which a direction visits a token, from the token that it visits at a step."""
    step = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(1) * length
    token = tl.load(order + row + step, mask=step < length, other=0)
    tl.store(inverse + row + token, step.to(tl.int64), mask=step < length)


@triton.jit
def _merge_kernel(
    sequences, inverse, gate, out, kept, batch, length, channels, gate_batch, gate_time, out_batch, out_time, share,
    DIRECTIONS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_GATE: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (token < length)[:, None] & (d < channels)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
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
    if HAS_GATE:
        gate += b * gate_batch
        z = tl.load(gate + token[:, None] * gate_time + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total *= z * sigmoid(z)
    out += b * out_batch + token[:, None] * out_time + d[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)


def _inverse(order: Tensor) -> Tensor:
    directions, length = order.shape
    inverse = torch.empty_like(order)
    _inverse_kernel[triton.cdiv(length, _BLOCK_STEPS), directions](order, inverse, length, BLOCK_T=_BLOCK_STEPS)
    return inverse


def merge(
    sequences: Tensor, order: Tensor | None, share: float,
    gate: Tensor | None = None, out: Tensor | None = None, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(K, B, L, D) in scan order -> (B, L, D) in token order: the sum times `share`, to `kept`, and SiLU(gate)."""
    directions, batch, length, channels = sequences.shape
    if directions == 1 and order is None and gate is None and out is None and kept is None:
        return sequences[0]
    gate = None if gate is None else inner(gate)
    gate_strides = (0, 0) if gate is None else gate.stride()[:2]
    inverse = None if order is None else _inverse(order)
    out = sequences.new_empty(batch, length, channels) if out is None else out
    grid = triton.cdiv(length, _BLOCK_TIME), triton.cdiv(channels, BLOCK_CHANNELS), batch
    _merge_kernel[grid](
        sequences, inverse, gate, out, kept, batch, length, channels, *gate_strides, *out.stride()[:2], share,
        DIRECTIONS=directions, HAS_ORDER=order is not None, HAS_GATE=gate is not None, KEEP=kept is not None,
        BLOCK_T=_BLOCK_TIME, BLOCK_D=BLOCK_CHANNELS,
    )  # fmt: skip
    return out


def sequences_for(scan: ScanInputs, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Memory (K, B, L, D) for what the scans give, and where `merge` keeps their sum: nowhere if it lies there."""
    if kept is not None and len(scan.A) == 1 and scan.order_of_outputs is None:
        return kept[None], None
    return scan.u.new_empty(scan.shape), kept
