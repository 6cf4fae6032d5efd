"""The `triton` backend: convolution and scan as GPU kernels, compiled by Triton on first use.

One program scans one direction of one picture for a block of channels, a single warp with two channels a thread. The
d_state states of a channel live in registers as separate vectors over channels, so that the sum over states needs no
exchange between threads, and B_t and C_t are scalars loaded once for all channels of the block. Sequences are read in
scan order, step by step; the order tables are read where tokens are gathered: by the convolution, by the merge of
the directions and by the backward scan, which takes the merged gradient. All sums are made in a fixed order.
"""

import torch
import triton
import triton.language as tl

from arm_zoo.kernels import gate_backward, sigmoid
from arm_zoo.scan.reference import inner, project

__all__ = [
    "CHUNK",
    "causal_conv",
    "causal_conv_backward",
    "check_length",
    "gate_backward",
    "merge",
    "selective_scan",
    "selective_scan_backward",
    "sequences_for",
    "state_dtype",
    "sum_up",
]

CHUNK = 16  # steps between saved states, which then weigh d_state / 16 of one activation
_GROUP = 2  # steps whose states the backward scan holds in registers
_LOG2E = tl.constexpr(1.4426950408889634)
_BLOCK_STEPS = 1024  # of a table of orders
_BLOCK_TIME = 16
_BLOCK_CHANNELS = 128
_MOST_SEQUENCES = 65_535  # of one launch: the limit of a grid's second and third axis
_REGISTERS = {} if torch.version.hip else {"maxnreg": 168}  # of the backward scan; Triton for AMD has no such option


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to float32 rounding, also where it is tiny: log1p(y) = y p(y) for y = exp(-|x|) in 0..1.

    The polynomial p is the least relative error fit of degree 9 (5e-9); a quotient would cost a special function.
    """
    y = tl.exp2(-tl.abs(x) * _LOG2E)
    p = -0.0032439809
    p = p * y + 0.0198512636
    p = p * y - 0.0569591597
    p = p * y + 0.1060362174
    p = p * y - 0.1530556977
    p = p * y + 0.1967593133
    p = p * y - 0.2495413273
    p = p * y + 0.3332996368
    p = p * y - 0.4999990165
    p = p * y + 1.0
    return tl.maximum(x, 0.0) + y * p


@triton.jit
def _load_tokens(x, order, k, first, d, length, x_time, channel, HAS_ORDER: tl.constexpr, COUNT: tl.constexpr):
    """Rows of x (one picture) at COUNT steps of direction k, zero outside the sequence, in float32."""
    rows = ()
    for i in tl.static_range(COUNT):
        inside = (first + i >= 0) & (first + i < length)
        token = tl.maximum(tl.minimum(first + i, length - 1), 0).to(tl.int64)
        if HAS_ORDER:
            token = tl.load(order + k * length + token)
        rows = rows + (tl.load(x + token * x_time + d, mask=channel & inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _picture_by_picture(program, batch):
    """Direction, picture and number k * batch + b of a sequence; all directions of a picture follow each other.

    They read the same tokens, which are then still in the L2 cache.
    """
    directions = tl.num_programs(2) // batch
    k, b = (program % directions).to(tl.int64), (program // directions).to(tl.int64)
    return k, b, k * batch + b


@triton.jit
def _last(rows, COUNT: tl.constexpr):
    """The last COUNT entries of a tuple."""
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
    x, weight, bias, order, out, batch, length, channels, x_batch, x_time,
    HAS_ORDER: tl.constexpr, TAPS: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SEGMENT steps of one sequence, GROUP at a time; the rows that the next group needs again stay in registers."""
    k, b, sequence = _picture_by_picture(tl.program_id(2), batch)
    start = tl.program_id(0) * SEGMENT
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = d < channels
    x += b * x_batch
    out += sequence * length * channels
    taps = _load_taps(weight, k, d, channels, channel, TAPS)
    offset = tl.load(bias + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    rows = _load_tokens(x, order, k, start - (TAPS - 1), d, length, x_time, channel, HAS_ORDER, TAPS - 1)
    for t in range(start, start + SEGMENT, GROUP):
        rows = rows + _load_tokens(x, order, k, t, d, length, x_time, channel, HAS_ORDER, GROUP)
        for i in tl.static_range(GROUP):
            before = offset
            for j in tl.static_range(TAPS):
                before += taps[j] * rows[i + j]
            y = (before * sigmoid(before)).to(out.dtype.element_ty)
            tl.store(out + (t + i) * channels + d, y, mask=channel & (t + i < length))
        rows = _last(rows, TAPS - 1)


@triton.jit
def _conv_backward_kernel(
    grad, x, weight, bias, order, grad_x, partial, batch, length, channels, x_batch, x_time,
    g_direction, g_batch, g_time, to_direction, to_batch, to_time,
    HAS_ORDER: tl.constexpr, TAPS: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One direction's gradient of x in scan order, and a segment's share of the gradients of weight and bias.

    The gradient of x at a step needs the gradients before SiLU of that step and the TAPS - 1 after it, so the
    segment is left that much later than it began.
    """
    k, b, sequence = _picture_by_picture(tl.program_id(2), batch)
    start = tl.program_id(0) * SEGMENT
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    channel = d < channels
    x += b * x_batch
    grad += k * g_direction + b * g_batch
    grad_x += k * to_direction + b * to_batch
    taps = _load_taps(weight, k, d, channels, channel, TAPS)
    offset = tl.load(bias + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    zero = tl.zeros([BLOCK_D], tl.float32)
    rows = _load_tokens(x, order, k, start - (TAPS - 1), d, length, x_time, channel, HAS_ORDER, TAPS - 1)
    gradients = ()
    sums = (zero,)
    for _ in tl.static_range(TAPS - 1):
        gradients = gradients + (zero,)
    for _ in tl.static_range(TAPS):
        sums = sums + (zero,)
    for t in range(start, start + SEGMENT + TAPS - 1, GROUP):
        rows = rows + _load_tokens(x, order, k, t, d, length, x_time, channel, HAS_ORDER, GROUP)
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
            mask = channel & (step >= start) & (step < start + SEGMENT) & (step < length)
            tl.store(grad_x + step * to_time + d, fed.to(grad_x.dtype.element_ty), mask=mask)
            g = tl.where(t + i < start + SEGMENT, g, 0.0)  # the steps after the segment are the next one's
            new = ()
            for j in tl.static_range(TAPS):
                new = new + (sums[j] + g * rows[i + j],)
            sums = new + (sums[TAPS] + g,)
        rows = _last(rows, TAPS - 1)
        gradients = _last(gradients, TAPS - 1)
    partial += (tl.program_id(0) * tl.num_programs(2) + sequence) * (TAPS + 1) * channels
    for j in tl.static_range(TAPS + 1):
        tl.store(partial + j * channels + d, sums[j], mask=channel)


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
    """Sum over the directions times `share`, every token gathering its steps, perhaps kept, then perhaps the gate."""
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


@triton.jit
def _load_step(
    u, delta, B, C, t, d, s, length, u_time, delta_time, BC_time, channel, state_exists
):  # fmt: skip
    """u_t and the raw step size of the block's channels, B_t and C_t; past the end those of the last step."""
    t = tl.minimum(t, length - 1)
    return (
        tl.load(u + t * u_time + d, mask=channel, other=0.0),
        tl.load(delta + t * delta_time + d, mask=channel, other=0.0),
        tl.load(B + t * BC_time + s, mask=state_exists, other=0.0),
        tl.load(C + t * BC_time + s, mask=state_exists, other=0.0),
    )


@triton.jit
def _step_size(delta_t, offset, SOFTPLUS: tl.constexpr):
    """Final and raw step size."""
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
    u, delta, A, B, C, D, bias, y, states, batch, length, channels, d_state,
    u_direction, u_batch, u_time, delta_direction, delta_batch, delta_time, BC_direction, BC_batch, BC_time,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SAVE: tl.constexpr,
    STATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One sequence, step by step; everything that a step reads is loaded one step ahead."""
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
    y += sequence * length * channels
    chunks = tl.cdiv(length, CHUNK)
    states += sequence * chunks * d_state * channels
    skip = tl.load(D + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + k * channels + d, mask=channel, other=0.0).to(tl.float32)
    rates = tl.load(A + k * d_state * channels + tile, mask=both, other=0.0) * _LOG2E
    state = tl.zeros([STATES, BLOCK_D], tl.float32)
    u_n, delta_n, B_n, C_n = _load_step(
        u, delta, B, C, 0, d, s, length, u_time, delta_time, BC_time, channel, state_exists
    )  # fmt: skip
    for chunk in range(chunks):
        if SAVE:
            tl.store(states + chunk * d_state * channels + tile, state.to(states.dtype.element_ty), mask=both)
        for t in range(chunk * CHUNK, tl.minimum(length, chunk * CHUNK + CHUNK)):
            u_t, delta_t, B_t, C_t = u_n, delta_n, B_n, C_n
            u_n, delta_n, B_n, C_n = _load_step(
                u, delta, B, C, t + 1, d, s, length, u_time, delta_time, BC_time, channel, state_exists
            )  # fmt: skip
            size, _raw = _step_size(delta_t, offset, SOFTPLUS)
            state = _advance(state, rates, B_t, u_t, size)
            y_t = tl.sum(state * C_t.to(tl.float32)[:, None], axis=0) + skip * u_t.to(tl.float32)
            tl.store(y + t * channels + d, y_t.to(y.dtype.element_ty), mask=channel)


@triton.jit
def _reverse_step(
    grad_u, grad_delta, grad_BC, u_t, size, raw, y_t, B_t, C_t, skip, rates, before, carry,
    grad_rates, grad_skip, grad_offset, row, states_row, d, s, channels, d_state, write, channel, state_exists,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Gradients at a step, from the state before it and the gradient (`carry`) that later steps send to its state."""
    decay = tl.exp2(size[None, :] * rates)
    decayed = decay * before
    g = carry + C_t[:, None] * y_t[None, :]
    input_t = (size * u_t)[None, :]
    write_states = state_exists & write
    to_B = tl.sum(g * input_t, axis=1)
    tl.store(grad_BC + states_row + s, to_B.to(grad_BC.dtype.element_ty), mask=write_states)
    after = decayed + B_t[:, None] * input_t
    to_C = tl.sum(after * y_t[None, :], axis=1)
    tl.store(grad_BC + states_row + d_state + s, to_C.to(grad_BC.dtype.element_ty), mask=write_states)
    from_input = tl.sum(g * B_t[:, None], axis=0)  # over the states, with g the gradient of the state
    exponent = g * decayed  # gradient of size * rate
    g_size = from_input * u_t + tl.sum(exponent * rates, axis=0) / _LOG2E
    if SOFTPLUS:
        g_size *= sigmoid(raw)
    tl.store(grad_u + row + d, (from_input * size + y_t * skip).to(grad_u.dtype.element_ty), mask=channel & write)
    tl.store(grad_delta + row + d, g_size.to(grad_delta.dtype.element_ty), mask=channel & write)
    grad_rates += exponent * size[None, :]
    return g * decay, grad_rates, grad_skip + y_t * u_t, grad_offset + tl.where(write, g_size, 0.0)


@triton.jit
def _load_gradient(grad, order, k, t, d, length, channels, channel, HAS_ORDER: tl.constexpr):
    """The output's gradient at a step of direction k, zero past the end."""
    token = tl.minimum(t, length - 1)
    if HAS_ORDER:
        token = tl.load(order + k * length + token)
    return tl.load(grad + token * channels + d, mask=channel & (t < length), other=0.0).to(tl.float32)


@triton.jit
def _scan_backward_kernel(
    u, delta, A, B, C, D, bias, grad, order, states, scratch, grad_u, grad_delta, grad_BC, grad_A, grad_D, grad_bias,
    batch, length, channels, d_state,
    u_direction, u_batch, u_time, delta_direction, delta_batch, delta_time, BC_direction, BC_batch, BC_time,
    HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, SOFTPLUS: tl.constexpr,
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
    rates = tl.load(A + k * d_state * channels + tile, mask=both, other=0.0) * _LOG2E
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
                u_t, delta_t, B_t, _C = _load_step(
                    u, delta, B, C, start + (group - 1) * GROUP + i, d, s, length, u_time, delta_time, BC_time,
                    channel, state_exists,
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
                u_t, delta_t, B_t, C_t = _load_step(
                    u, delta, B, C, t + i, d, s, length, u_time, delta_time, BC_time, channel, state_exists
                )  # fmt: skip
                y_t = _load_gradient(grad, order, k, t + i, d, length, channels, channel, HAS_ORDER)
                steps = steps + ((u_t, delta_t, y_t, B_t, C_t),)
            for i in tl.static_range(GROUP - 1):
                size, _raw = _step_size(steps[i][1], offset, SOFTPLUS)
                before = before + (_advance(before[i], rates, steps[i][3], steps[i][0], size),)
            for i in tl.static_range(GROUP - 1, -1, -1):
                exists = t + i < length
                size, raw = _step_size(steps[i][1], offset, SOFTPLUS)
                # a step past the end has size 0 and no gradient: it leaves everything as it is and writes nothing
                size = tl.where(exists, size, 0.0)
                carry, grad_rates, grad_skip, grad_offset = _reverse_step(
                    grad_u, grad_delta, grad_BC, steps[i][0].to(tl.float32), size, raw, steps[i][2],
                    steps[i][3].to(tl.float32), steps[i][4].to(tl.float32), skip, rates, before[i], carry,
                    grad_rates, grad_skip, grad_offset, (t + i) * channels, (t + i) * 2 * d_state,
                    d, s, channels, d_state, exists, channel, state_exists, SOFTPLUS,
                )  # fmt: skip
        tl.debug_barrier()
    tl.store(grad_A + sequence * d_state * channels + tile, grad_rates, mask=both)
    tl.store(grad_D + sequence * channels + d, grad_skip, mask=channel)
    tl.store(grad_bias + sequence * channels + d, grad_offset, mask=channel)


def _inverse(order: torch.Tensor | None) -> torch.Tensor | None:
    """(K, L) table of the step at which a direction visits a token."""
    if order is None:
        return None
    directions, length = order.shape
    inverse = torch.empty_like(order)
    _inverse_kernel[triton.cdiv(length, _BLOCK_STEPS), directions](order, inverse, length, BLOCK_T=_BLOCK_STEPS)
    return inverse


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of saved states and of shares of sums: float32, or bfloat16 for inputs of 16 bits.

    Those errors are of the size of the inputs' own; float16's range is too small for sums.
    """
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _scan_channels(states: int, tile: int) -> int:
    """Channels of a scan program, which is one warp, for a tile of so many states times channels."""
    return min(max(tile // states, 32), 128)


def merge(
    sequences: torch.Tensor,
    order: torch.Tensor | None,
    share: float,
    gate: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """(K, B, L, D) in scan order -> (B, L, D) in token order: the directions' sum times `share` and SiLU(gate).

    In `out`, if there is one; what it is before the gate is written to `kept`.
    """
    directions, batch, length, channels = sequences.shape
    if directions == 1 and order is None and gate is None and out is None and kept is None:
        return sequences[0]
    gate = None if gate is None else inner(gate)
    gate_strides = (0, 0) if gate is None else gate.stride()[:2]
    out = sequences.new_empty(batch, length, channels) if out is None else out
    grid = triton.cdiv(length, _BLOCK_TIME), triton.cdiv(channels, _BLOCK_CHANNELS), batch
    _merge_kernel[grid](
        sequences, _inverse(order), gate, out, kept, batch, length, channels, *gate_strides, *out.stride()[:2], share,
        DIRECTIONS=directions, HAS_ORDER=order is not None, HAS_GATE=gate is not None, KEEP=kept is not None,
        BLOCK_T=_BLOCK_TIME, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    return out


def sequences_for(
    u: torch.Tensor, order: torch.Tensor | None, kept: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory (K, B, L, D) for what the scans give, and where `merge` keeps their mean: nowhere if it lies there."""
    if kept is not None and len(u) == 1 and order is None:
        return kept[None], None
    return u.new_empty(u.shape), kept


def _rows(B: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B and C with states side by side in memory and equal strides otherwise; copies only if they differ."""
    B, C = inner(B), inner(C)
    return (B, C) if B.stride() == C.stride() else (B.contiguous(), C.contiguous())


def check_length(length: int, channels: int) -> None:
    """Raises ValueError for sequences too long for offsets of 32 bits.

    Those are not only into the sequence: the states that are saved of 64 have up to four times as many numbers, and
    gradients of B and C lie 128 numbers a step apart.
    """
    if length * max(4 * channels, 128) >= 2**31:
        raise ValueError(
            f"the GPU kernels take sequences of less than 2**29 numbers and 2**24 steps, got {length:,} steps of "
            f"{channels:,} channels; use set_scan_backend('torch')"
        )


def _check_number(directions: int, batch: int) -> None:
    if directions * batch > _MOST_SEQUENCES:
        raise ValueError(
            f"the GPU kernels take up to {_MOST_SEQUENCES:,} sequences at a time, got {directions * batch:,} "
            f"({directions} directions of {batch:,} pictures); use smaller batches, or set_scan_backend('torch')"
        )


def causal_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """See `arm_zoo.scan.causal_conv`."""
    directions, channels, taps = weight.shape
    batch, length, _ = x.shape
    check_length(length, channels)
    _check_number(directions, batch)
    x = inner(x)
    out = x.new_empty(directions, batch, length, channels)
    segment = 32
    grid = triton.cdiv(length, segment), triton.cdiv(channels, _BLOCK_CHANNELS), directions * batch
    _conv_kernel[grid](
        x, weight.contiguous(), bias.contiguous(), order, out, batch, length, channels, x.stride(0), x.stride(1),
        HAS_ORDER=order is not None, TAPS=taps, SEGMENT=segment, GROUP=8, BLOCK_D=_BLOCK_CHANNELS, num_warps=1,
    )  # fmt: skip
    return out


def causal_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    order: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (in `out`, if there is one), weight and bias, given that of the output (K, B, L, D)."""
    directions, channels, taps = weight.shape
    batch, length, _ = x.shape
    x, grad, weight, bias = inner(x), inner(grad), weight.contiguous(), bias.contiguous()
    merged = out is not None and directions == 1 and order is None  # nothing is left to do after the kernel
    sequences = out[None] if merged else x.new_empty(directions, batch, length, channels)
    segment = max(64 - (taps - 1), 16)
    segments = triton.cdiv(length, segment)
    partial = x.new_empty(segments, directions, batch, taps + 1, channels, dtype=torch.float32)
    _conv_backward_kernel[segments, triton.cdiv(channels, _BLOCK_CHANNELS), directions * batch](
        grad, x, weight, bias, order, sequences, partial, batch, length, channels, x.stride(0), x.stride(1),
        *grad.stride()[:3], *sequences.stride()[:3],
        HAS_ORDER=order is not None, TAPS=taps, SEGMENT=segment, GROUP=4, BLOCK_D=_BLOCK_CHANNELS, num_warps=1,
    )  # fmt: skip
    partial = partial.sum((0, 2))  # (K, taps + 1, D)
    grad_weight = partial[:, :taps].transpose(1, 2).to(weight.dtype).contiguous()
    grad_x = sequences[0] if merged else merge(sequences, order, 1.0, out=out)
    return grad_x, grad_weight, partial[:, taps].to(bias.dtype, copy=True)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_weight: torch.Tensor | None,
    delta_softplus: bool,
    order: torch.Tensor | None,
    save_states: bool,
    gate: torch.Tensor | None,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `arm_zoo.scan.selective_scan`: its output and the saved states; what a gate multiplies goes to `kept`."""
    delta = project(delta, delta_weight)
    directions, batch, length, channels = u.shape
    check_length(length, channels)
    _check_number(directions, batch)
    u, delta = inner(u), inner(delta)
    bias = None if delta_bias is None else delta_bias.contiguous()
    d_state = A.shape[-1]
    sequences, kept = sequences_for(u, order, kept)
    chunks = triton.cdiv(length, CHUNK) if save_states else 0
    states = u.new_empty(directions, batch, chunks, d_state, channels, dtype=state_dtype(u.dtype))
    B, C = _rows(B, C)
    padded = triton.next_power_of_2(d_state)
    block = _scan_channels(padded, 2048)
    _scan_kernel[triton.cdiv(channels, block), directions * batch](
        u, delta, A.float().transpose(1, 2).contiguous(), B, C, D.contiguous(), bias, sequences, states,
        batch, length, channels, d_state, *u.stride()[:3], *delta.stride()[:3], *B.stride()[:3],
        HAS_BIAS=bias is not None, SOFTPLUS=delta_softplus, SAVE=save_states,
        STATES=padded, CHUNK=CHUNK, BLOCK_D=block, num_warps=1,
    )  # fmt: skip
    return merge(sequences, order, 1 / directions, gate, kept=kept), states


def selective_scan_backward(
    grad: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    order: torch.Tensor | None,
    saved: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias, given that of the output (B, L, D) and the saved states."""
    directions, batch, length, channels = u.shape
    u, delta = inner(u), inner(delta)
    grad = (grad / directions).contiguous()
    bias = None if delta_bias is None else delta_bias.contiguous()
    d_state = A.shape[-1]
    B, C = _rows(B, C)
    padded = triton.next_power_of_2(d_state)
    block = _scan_channels(padded, 512)  # small, and few registers: 12 warps a multiprocessor hide more latency than 8
    blocks, sequences = triton.cdiv(channels, block), directions * batch
    grad_u, grad_delta = (t.new_empty(t.shape) for t in (u, delta))
    shares = A.new_empty(blocks, directions, batch, length, 2 * d_state, dtype=state_dtype(u.dtype))
    scratch = A.new_empty(sequences * blocks * (CHUNK // _GROUP) * padded * block, dtype=torch.float32)
    grad_A = scratch.new_empty(directions, batch, d_state, channels)
    grad_D, grad_bias = (scratch.new_empty(directions, batch, channels) for _ in range(2))
    _scan_backward_kernel[blocks, sequences](
        u, delta, A.float().transpose(1, 2).contiguous(), B, C, D.contiguous(), bias, grad, order, saved,
        scratch, grad_u, grad_delta, shares, grad_A, grad_D, grad_bias, batch, length, channels, d_state,
        *u.stride()[:3], *delta.stride()[:3], *B.stride()[:3],
        HAS_BIAS=bias is not None, HAS_ORDER=order is not None, SOFTPLUS=delta_softplus,
        STATES=padded, CHUNK=CHUNK, GROUP=_GROUP, BLOCK_D=block, num_warps=1, **_REGISTERS,
    )  # fmt: skip
    return grad_u, grad_delta, *sum_up(grad_A, grad_D, grad_bias, shares, B, C)


def sum_up(
    grad_A: torch.Tensor,
    grad_D: torch.Tensor,
    grad_bias: torch.Tensor,
    shares: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of A, B, C, D and delta_bias from what the backward scan's programs left, in a fixed order.

    Args:
        grad_A: every picture's, (K, B, S, D).
        grad_D: every picture's, (K, B, D), like grad_bias.
        shares: every block of channels' part in the gradients of B and C, side by side, (blocks, K, B, L, 2 S).
    """
    grad_B, grad_C = shares.sum(0, dtype=torch.float32).chunk(2, dim=-1)
    return (
        grad_A.sum(1).transpose(1, 2).contiguous(),
        grad_B.to(B.dtype, copy=True),  # not two views of one tensor
        grad_C.to(C.dtype, copy=True),
        grad_D.sum(1),
        grad_bias.sum(1),
    )
