"""The scan and its backward pass.

One program, a single warp with two channels a thread, scans one direction of one image. States live in registers as
separate vectors over channels, whose sum needs no exchange between threads. All sums are made in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import CHUNK, Norm, ScanInputs, Tensors, empty_states, inner, state_dtype
from arm_zoo.ops.triton.common import LOG2E, check_length, check_number, order_step, sigmoid
from arm_zoo.ops.triton.merge import merge, sequences_for, stores_by_token

_GROUP = 2  # steps whose states the backward scan holds in registers
_REGISTERS = {} if torch.version.hip else {"maxnreg": 168}  # of the backward scan; Triton for AMD has no such option


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to float32 rounding: log1p(y) = y p(y), with p a least relative error fit of degree 9 (5e-9)."""
    y = tl.exp2(-tl.abs(x) * LOG2E)
    p = (((-0.0032439809 * y + 0.0198512636) * y - 0.0569591597) * y + 0.1060362174) * y - 0.1530556977
    p = ((((p * y + 0.1967593133) * y - 0.2495413273) * y + 0.3332996368) * y - 0.4999990165) * y + 1.0
    return tl.maximum(x, 0.0) + y * p


@triton.jit
def _load_rates(A, k, d, s, channels, d_state, exists, LOG_RATES: tl.constexpr):
    """The rates of a (states, channels) tile to base 2, from A (K, channels, states) or the logarithms of -A."""
    rates = tl.load(A + (k * channels + d[None, :]) * d_state + s[:, None], mask=exists, other=0.0).to(tl.float32)
    if LOG_RATES:
        rates = -tl.exp(rates)
    return rates * LOG2E


@triton.jit
def _load_step(
    u, delta, B, C, order, t, d, s, length, u_time, delta_time, BC_time, channel, state_exists, TOKENS: tl.constexpr
):
    """The step's row in memory, and of it u_t and the raw step size of the block's channels, B_t and C_t.

    Past the end those of the last step. TOKENS: the rows are tokens, which this direction visits in this order.
    """
    row = tl.minimum(t, length - 1)
    if TOKENS:
        row = tl.load(order + row).to(tl.int32)
    return (
        row,
        tl.load(u + row * u_time + d, mask=channel, other=0.0),
        tl.load(delta + row * delta_time + d, mask=channel, other=0.0),
        tl.load(B + row * BC_time + s, mask=state_exists, other=0.0),
        tl.load(C + row * BC_time + s, mask=state_exists, other=0.0),
    )


@triton.jit
def _step_size(delta_t, offset, SOFTPLUS: tl.constexpr):
    raw = delta_t.to(tl.float32) + offset
    size = raw
    if SOFTPLUS:
        size = _softplus(raw)
    return size, raw


@triton.jit
def _advance(state, rates, B_t, u_t, size):
    """One step of the recurrence on a (states, channels) tile."""
    return tl.exp2(size[None, :] * rates) * state + B_t.to(tl.float32)[:, None] * (size * u_t.to(tl.float32))[None, :]


@triton.jit
def _scan_kernel(
    u, delta, A, B, C, D, bias, order, y, states, batch, length, channels, d_state,
    u_direction, u_batch, u_time, delta_direction, delta_batch, delta_time, BC_direction, BC_batch, BC_time,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, TO_TOKENS: tl.constexpr, SOFTPLUS: tl.constexpr,
    SAVE: tl.constexpr, LOG_RATES: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One sequence, step by step; everything that a step reads is loaded one step ahead. TO_TOKENS: y has tokens."""
    sequence = tl.program_id(1).to(tl.int64)  # k * batch + b
    k, b = sequence // batch, sequence % batch
    d, s = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, STATES)
    channel, state_exists = d < channels, s < d_state
    both = state_exists[:, None] & channel[None, :]
    tile = s[:, None] * channels + d[None, :]
    u += k * u_direction + b * u_batch
    delta += k * delta_direction + b * delta_batch
    B += k * BC_direction + b * BC_batch
    C += k * BC_direction + b * BC_batch
    if TOKENS or TO_TOKENS:
        order += k * length
    y += sequence * length * channels
    chunks = tl.cdiv(length, CHUNK)
    states += sequence * chunks * d_state * channels
    skip = tl.load(D + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    rates = _load_rates(A, k, d, s, channels, d_state, both, LOG_RATES)
    state = tl.zeros([STATES, BLOCK_D], tl.float32)
    row_n, u_n, delta_n, B_n, C_n = _load_step(
        u, delta, B, C, order, 0, d, s, length, u_time, delta_time, BC_time, channel, state_exists, TOKENS
    )  # fmt: skip
    for chunk in range(chunks):
        if SAVE:
            tl.store(states + chunk * d_state * channels + tile, state.to(states.dtype.element_ty), mask=both)
        for t in range(chunk * CHUNK, tl.minimum(length, chunk * CHUNK + CHUNK)):
            row, u_t, delta_t, B_t, C_t = row_n, u_n, delta_n, B_n, C_n
            row_n, u_n, delta_n, B_n, C_n = _load_step(
                u, delta, B, C, order, t + 1, d, s, length, u_time, delta_time, BC_time, channel, state_exists, TOKENS
            )  # fmt: skip
            size, _raw = _step_size(delta_t, offset, SOFTPLUS)
            state = _advance(state, rates, B_t, u_t, size)
            y_t = tl.sum(state * C_t.to(tl.float32)[:, None], axis=0) + skip * u_t.to(tl.float32)
            if TO_TOKENS:
                row = tl.load(order + t).to(tl.int32)
            tl.store(y + row * channels + d, y_t.to(y.dtype.element_ty), mask=channel)


@triton.jit
def _scan_backward_kernel(
    u, delta, A, B, C, D, bias, grad, order, states, scratch, grad_u, grad_delta, grad_BC, grad_A, grad_D, grad_bias,
    batch, length, channels, d_state,
    u_direction, u_batch, u_time, delta_direction, delta_batch, delta_time, BC_direction, BC_batch, BC_time,
    order_batch,
    HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, TOKENS: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk from the end: the states before every GROUP of steps into scratch, then the steps in reverse."""
    block, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)  # sequence = k * batch + b
    k, b = sequence // batch, sequence % batch
    d, s = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, STATES)
    channel, state_exists = d < channels, s < d_state
    both = state_exists[:, None] & channel[None, :]
    tile = s[:, None] * channels + d[None, :]
    u += k * u_direction + b * u_batch
    delta += k * delta_direction + b * delta_batch
    B += k * BC_direction + b * BC_batch
    C += k * BC_direction + b * BC_batch
    if HAS_ORDER:
        order += b * order_batch + k * length
    grad += b * length * channels
    grad_u += sequence * length * channels
    grad_delta += sequence * length * channels
    chunks = tl.cdiv(length, CHUNK)
    states += sequence * chunks * d_state * channels
    # every block of channels has its share of the gradients of B and C: (blocks, K * batch, length, 2 * d_state)
    grad_BC += (block * tl.num_programs(1) + sequence) * length * 2 * d_state
    scratch += (sequence * tl.num_programs(0) + block) * (CHUNK // GROUP) * STATES * BLOCK_D
    scratch += s[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    skip = tl.load(D + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    rates = _load_rates(A, k, d, s, channels, d_state, both, False)
    carry = tl.zeros([STATES, BLOCK_D], tl.float32)
    grad_rates = tl.zeros([STATES, BLOCK_D], tl.float32)
    grad_skip = tl.zeros([BLOCK_D], tl.float32)
    grad_offset = tl.zeros([BLOCK_D], tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * CHUNK
        groups = tl.cdiv(tl.minimum(length - start, CHUNK), GROUP)
        state = tl.load(states + chunk * d_state * channels + tile, mask=both, other=0.0).to(tl.float32)
        tl.store(scratch, state)
        for group in range(1, groups):
            for i in tl.static_range(GROUP):
                _row, u_t, delta_t, B_t, _C = _load_step(
                    u, delta, B, C, order, start + (group - 1) * GROUP + i, d, s, length, u_time, delta_time, BC_time,
                    channel, state_exists, TOKENS,
                )  # fmt: skip
                size, _raw = _step_size(delta_t, offset, SOFTPLUS)
                state = _advance(state, rates, B_t, u_t, size)
            tl.store(scratch + group * STATES * BLOCK_D, state)
        tl.debug_barrier()  # what one thread stored in scratch another may load, and store anew in the next chunk
        for back_group in range(groups):
            group = groups - 1 - back_group
            t = start + group * GROUP
            before = (tl.load(scratch + group * STATES * BLOCK_D),)
            steps = ()
            for i in tl.static_range(GROUP):
                row, u_t, delta_t, B_t, C_t = _load_step(
                    u, delta, B, C, order, t + i, d, s, length, u_time, delta_time, BC_time, channel, state_exists,
                    TOKENS,
                )  # fmt: skip
                token = row
                if HAS_ORDER and not TOKENS:
                    token = tl.load(order + row)
                y_t = tl.load(grad + token * channels + d, mask=channel & (t + i < length), other=0.0).to(tl.float32)
                steps = steps + ((u_t, delta_t, y_t, B_t, C_t, row),)
            for i in tl.static_range(GROUP - 1):
                size, _raw = _step_size(steps[i][1], offset, SOFTPLUS)
                before = before + (_advance(before[i], rates, steps[i][3], steps[i][0], size),)
            for i in tl.static_range(GROUP - 1, -1, -1):
                u_t, B_t, C_t = steps[i][0].to(tl.float32), steps[i][3].to(tl.float32), steps[i][4].to(tl.float32)
                exists, y_t, row = t + i < length, steps[i][2], t + i
                if TOKENS:
                    row = steps[i][5]
                size, raw = _step_size(steps[i][1], offset, SOFTPLUS)
                # a step past the end has size 0 and no gradient: it leaves everything as it is and writes nothing
                size = tl.where(exists, size, 0.0)
                decay = tl.exp2(size[None, :] * rates)
                decayed = decay * before[i]
                g = carry + C_t[:, None] * y_t[None, :]  # of the state, with what later steps send to it
                input_t = (size * u_t)[None, :]
                after = decayed + B_t[:, None] * input_t
                to_B, to_C = tl.sum(g * input_t, axis=1), tl.sum(after * y_t[None, :], axis=1)
                here = grad_BC + row * 2 * d_state + s
                tl.store(here, to_B.to(grad_BC.dtype.element_ty), mask=state_exists & exists)
                tl.store(here + d_state, to_C.to(grad_BC.dtype.element_ty), mask=state_exists & exists)
                from_input = tl.sum(g * B_t[:, None], axis=0)
                exponent = g * decayed  # gradient of size * rate
                g_size = from_input * u_t + tl.sum(exponent * rates, axis=0) / LOG2E
                if SOFTPLUS:
                    g_size *= sigmoid(raw)
                g_u, here = from_input * size + y_t * skip, row * channels + d
                tl.store(grad_u + here, g_u.to(grad_u.dtype.element_ty), mask=channel & exists)
                tl.store(grad_delta + here, g_size.to(grad_delta.dtype.element_ty), mask=channel & exists)
                grad_rates += exponent * size[None, :]
                grad_skip += y_t * u_t
                grad_offset += tl.where(exists, g_size, 0.0)
                carry = g * decay
        tl.debug_barrier()
    tl.store(grad_A + sequence * d_state * channels + tile, grad_rates, mask=both)
    tl.store(grad_D + sequence * channels + d, grad_skip, mask=channel)
    tl.store(grad_bias + sequence * channels + d, grad_offset, mask=channel)


def _arguments(scan: ScanInputs, tile: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], dict[str, int]]:
    """The tensors as the kernels read them, their strides, and a program's states times channels, about a tile's."""
    u, delta, B, C = (inner(t) for t in (scan.u, scan.delta, scan.B, scan.C))
    u = u.expand(scan.shape)
    if B.stride() != C.stride():
        B, C = B.contiguous(), C.contiguous()
    bias = scan.delta_bias
    tensors = u, delta, scan.A.contiguous(), B, C, scan.D.contiguous(), None if bias is None else bias.contiguous()
    states = triton.next_power_of_2(scan.A.shape[-1])
    sizes = {"STATES": states, "CHUNK": CHUNK, "BLOCK_D": min(max(tile // states, 32), 128)}
    return tensors, (*u.stride()[:3], *delta.stride()[:3], *B.stride()[:3]), sizes


def selective_scan(
    scan: ScanInputs, save_states: bool, gate: Tensor | None, kept: Tensor | None = None, norm: Norm | None = None
) -> Tensors:
    """See `arm_zoo.ops.selective_scan`: its output and the saved states; what a gate multiplies goes to `kept`."""
    scan = scan.with_whole_steps()
    directions, batch, length, channels = scan.shape
    check_length(length, channels)
    check_number(directions, batch)
    tensors, strides, sizes = _arguments(scan, 2048)
    sequences, kept = sequences_for(scan, kept)
    to_tokens = stores_by_token(scan)
    states = empty_states(scan.u, scan.A, state_dtype(scan.u.dtype, half=True), save=save_states)
    _scan_kernel[triton.cdiv(channels, sizes["BLOCK_D"]), directions * batch](
        *tensors, scan.order, sequences, states, batch, length, channels, scan.A.shape[-1], *strides,
        HAS_BIAS=scan.delta_bias is not None, TOKENS=scan.rows is not None, TO_TOKENS=to_tokens,
        SOFTPLUS=scan.delta_softplus, SAVE=save_states, LOG_RATES=scan.log_rates, **sizes, num_warps=1,
    )  # fmt: skip
    order = None if to_tokens else scan.order_of_outputs
    return merge(sequences, order, scan.share, gate, kept=kept, norm=norm), states


def selective_scan_backward(grad: Tensor, scan: ScanInputs, saved: Tensor) -> Tensors:
    """Gradients of u, whole delta, A, B, C, D and delta_bias, given the output's (B, L, D) and the saved states."""
    directions, batch, length, channels = scan.shape
    # a small tile, and few registers: 12 warps a multiprocessor hide more latency than 8
    tensors, strides, sizes = _arguments(scan, 512)
    blocks, sequences = triton.cdiv(channels, sizes["BLOCK_D"]), directions * batch
    gradients = empty_gradients(scan, blocks)
    scratch = sequences * blocks * (CHUNK // _GROUP) * sizes["STATES"] * sizes["BLOCK_D"]
    _scan_backward_kernel[blocks, sequences](
        *tensors, (grad * scan.share).contiguous(), scan.order, saved,
        saved.new_empty(scratch, dtype=torch.float32), *gradients, batch, length, channels, scan.A.shape[-1], *strides,
        order_step(scan.order),
        HAS_BIAS=scan.delta_bias is not None, HAS_ORDER=scan.order is not None, TOKENS=scan.rows is not None,
        SOFTPLUS=scan.delta_softplus, GROUP=_GROUP, **sizes, num_warps=1, **_REGISTERS,
    )  # fmt: skip
    return sum_up(scan, gradients)


def empty_gradients(scan: ScanInputs, blocks: int, parts: int = 1) -> Tensors:
    """What a backward scan writes: gradients of u and delta, every block's of B and C, every part's of the others."""
    (directions, batch, length, channels), d_state = scan.shape, scan.A.shape[-1]
    grad_u, grad_delta = (t.new_empty(scan.shape) for t in (scan.u, scan.delta))
    dtype = state_dtype(scan.u.dtype, half=True)
    grad_BC = scan.A.new_empty(blocks, directions, batch, length, 2 * d_state, dtype=dtype)
    grad_A = scan.A.new_empty(directions, batch * parts, d_state, channels, dtype=torch.float32)
    others = (grad_A.new_empty(directions, batch * parts, channels) for _ in range(2))  # of D and delta_bias
    return grad_u, grad_delta, grad_BC, grad_A, *others


def sum_up(scan: ScanInputs, gradients: Tensors) -> Tensors:
    """Gradients of u, delta, A, B, C, D and delta_bias from those of `empty_gradients`, added in a fixed order."""
    grad_u, grad_delta, grad_BC, grad_A, grad_D, grad_bias = gradients
    grad_B, grad_C = grad_BC.sum(0, dtype=torch.float32).chunk(2, dim=-1)
    grad_B, grad_C = grad_B.to(scan.B.dtype, copy=True), grad_C.to(scan.C.dtype, copy=True)  # not views of one tensor
    grad_A = grad_A.sum(1).transpose(1, 2).contiguous()
    grad_u = grad_u if scan.u.ndim == 4 else grad_u.sum(0)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D.sum(1), grad_bias.sum(1)
