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

__all__ = ["CHUNK", "causal_conv", "causal_conv_backward", "selective_scan", "selective_scan_backward"]

CHUNK = 16  # steps between saved states, which then weigh d_state / 16 of one activation in float32
_LOG2E = tl.constexpr(1.4426950408889634)
_BLOCK_TIME = 16
_BLOCK_CHANNELS = 128


@triton.jit
def _softplus(x):
    y = tl.exp2(-tl.abs(x) * _LOG2E)
    # log1p(y) that keeps its precision for small y: the rounding of 1 + y cancels in the quotient
    one = 1.0 + y
    log1p = tl.where(one == 1.0, y, tl.log(one) * (y / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def _conv_tap(x, order, k, step, d, length, channels, x_time, HAS_ORDER: tl.constexpr):
    """Rows of x (one picture) at the tokens of direction k's steps, zero outside the sequence, in float32."""
    inside = (step >= 0) & (step < length)
    token = step
    if HAS_ORDER:
        token = tl.load(order + k * length + step, mask=inside, other=0)
    mask = inside[:, None] & (d < channels)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * x_time + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _conv_kernel(
    x, weight, bias, order, out, batch, length, channels, x_batch, x_time,
    HAS_ORDER: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(2).to(tl.int64)  # k * batch + b
    k = sequence // batch
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += (sequence % batch) * x_batch
    before = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    before += tl.load(bias + k * channels + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(TAPS):
        w = tl.load(weight + (k * channels + d) * TAPS + j, mask=d < channels, other=0.0).to(tl.float32)
        before += w[None, :] * _conv_tap(x, order, k, t - (TAPS - 1) + j, d, length, channels, x_time, HAS_ORDER)
    out += sequence * length * channels + t[:, None] * channels + d[None, :]
    mask = (t < length)[:, None] & (d < channels)[None, :]
    tl.store(out, (before * _sigmoid(before)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _conv_backward_kernel(
    grad, x, weight, bias, order, grad_before, partial, batch, length, channels, x_batch, x_time,
    g_direction, g_batch, g_time,
    HAS_ORDER: tl.constexpr, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient before SiLU, and one sequence's share of the gradients of weight and bias."""
    sequence = tl.program_id(1).to(tl.int64)  # k * batch + b
    k = sequence // batch
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    x += (sequence % batch) * x_batch
    grad += k * g_direction + (sequence % batch) * g_batch
    grad_before += sequence * length * channels
    offset = tl.load(bias + k * channels + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = ()
    for _ in tl.static_range(TAPS + 1):
        sums = sums + (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),)
    for start in range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        before = tl.zeros([BLOCK_T, BLOCK_D], tl.float32) + offset
        for j in tl.static_range(TAPS):
            w = tl.load(weight + (k * channels + d) * TAPS + j, mask=inside, other=0.0).to(tl.float32)
            before += w[None, :] * _conv_tap(x, order, k, t - (TAPS - 1) + j, d, length, channels, x_time, HAS_ORDER)
        mask = (t < length)[:, None] & inside[None, :]
        g = tl.load(grad + t[:, None] * g_time + d[None, :], mask=mask, other=0.0).to(tl.float32)
        slope = _sigmoid(before)
        g = g * slope * (1.0 + before * (1.0 - slope))
        tl.store(grad_before + t[:, None] * channels + d[None, :], g.to(grad_before.dtype.element_ty), mask=mask)
        new = ()
        for j in tl.static_range(TAPS):
            tap = _conv_tap(x, order, k, t - (TAPS - 1) + j, d, length, channels, x_time, HAS_ORDER)
            new = new + (sums[j] + g * tap,)
        sums = new + (sums[TAPS] + g,)
    for j in tl.static_range(TAPS + 1):
        tl.store(partial + (sequence * (TAPS + 1) + j) * channels + d, tl.sum(sums[j], axis=0), mask=inside)


@triton.jit
def _conv_grad_x_kernel(
    grad_before, weight, inverse, out, batch, length, channels,
    DIRECTIONS: tl.constexpr, HAS_ORDER: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every token gathers the gradients of the steps that its own step feeds, over all directions."""
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in tl.static_range(DIRECTIONS):
        step = token
        if HAS_ORDER:
            step = tl.load(inverse + k * length + token, mask=token < length, other=length)
        rows = grad_before + (k * batch + b) * length * channels
        for j in tl.static_range(TAPS):
            w = tl.load(weight + (k * channels + d) * TAPS + j, mask=d < channels, other=0.0).to(tl.float32)
            fed = step + (TAPS - 1 - j)
            mask = (fed < length)[:, None] & (d < channels)[None, :]
            gradient = tl.load(rows + fed[:, None] * channels + d[None, :], mask=mask, other=0.0)
            total += w[None, :] * gradient.to(tl.float32)
    mask = (token < length)[:, None] & (d < channels)[None, :]
    out += b * length * channels + token[:, None] * channels + d[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _merge_kernel(
    sequences, inverse, out, batch, length, channels,
    DIRECTIONS: tl.constexpr, HAS_ORDER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean over the directions, every token gathering its steps."""
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
    out += b * length * channels + token[:, None] * channels + d[None, :]
    tl.store(out, (total / DIRECTIONS).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _load_step(u, delta, t, d, length, channels, u_time, delta_time):
    """u_t and the raw step size, zero past the end."""
    mask = (d < channels) & (t + tl.zeros_like(d) < length)
    return tl.load(u + t * u_time + d, mask=mask, other=0.0), tl.load(delta + t * delta_time + d, mask=mask, other=0.0)


@triton.jit
def _load_pairs(BC, t, length, STATES: tl.constexpr):
    """(B_t, C_t) of every state: two float32 in one scalar load of 64 bits."""
    row = BC + tl.minimum(t, length - 1) * STATES
    pairs = ()
    for s in tl.static_range(STATES):
        pairs = pairs + (tl.load(row + s),)
    return pairs


@triton.jit
def _first(pair):
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _second(pair):
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _step_size(delta_t, offset, exists, SOFTPLUS: tl.constexpr):
    """Final and raw step size; a step past the end has size 0 and leaves the state as it is."""
    raw = delta_t.to(tl.float32) + offset
    size = raw
    if SOFTPLUS:
        size = _softplus(raw)
    return tl.where(exists, size, 0.0), raw


@triton.jit
def _advance(state, rates, pairs, u_t, size, STATES: tl.constexpr):
    """One step of the recurrence; state and rates are tuples of STATES vectors over channels."""
    new = ()
    for s in tl.static_range(STATES):
        new = new + (tl.exp2(size * rates[s]) * state[s] + _first(pairs[s]) * (size * u_t),)
    return new


@triton.jit
def _scan_kernel(
    u, delta, A, BC, D, bias, y, states, batch, length, channels,
    u_direction, u_batch, u_time, delta_direction, delta_batch, delta_time,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SAVE: tl.constexpr,
    STATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One sequence, step by step; everything that a step reads is loaded one step ahead."""
    sequence = tl.program_id(1).to(tl.int64)  # k * batch + b
    k, b = sequence // batch, sequence % batch
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    u += k * u_direction + b * u_batch
    delta += k * delta_direction + b * delta_batch
    BC += sequence * length * STATES
    y += sequence * length * channels
    chunks = tl.cdiv(length, CHUNK)
    states += sequence * chunks * STATES * channels
    skip = tl.load(D + k * channels + d, mask=inside, other=0.0).to(tl.float32)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + k * channels + d, mask=inside, other=0.0).to(tl.float32)
    rates = ()
    state = ()
    for s in tl.static_range(STATES):
        rates = rates + (tl.load(A + (k * STATES + s) * channels + d, mask=inside, other=0.0) * _LOG2E,)
        state = state + (tl.zeros([BLOCK_D], tl.float32),)
    next_u, next_delta = _load_step(u, delta, 0, d, length, channels, u_time, delta_time)
    next_pairs = _load_pairs(BC, 0, length, STATES)
    for chunk in range(chunks):
        if SAVE:
            for s in tl.static_range(STATES):
                tl.store(states + (chunk * STATES + s) * channels + d, state[s], mask=inside)
        for t in range(chunk * CHUNK, tl.minimum(length, chunk * CHUNK + CHUNK)):
            u_t, delta_t, pairs = next_u.to(tl.float32), next_delta, next_pairs
            next_u, next_delta = _load_step(u, delta, t + 1, d, length, channels, u_time, delta_time)
            next_pairs = _load_pairs(BC, t + 1, length, STATES)
            size, _ = _step_size(delta_t, offset, inside, SOFTPLUS)
            state = _advance(state, rates, pairs, u_t, size, STATES)
            y_t = skip * u_t
            for s in tl.static_range(STATES):
                y_t += state[s] * _second(pairs[s])
            tl.store(y + t * channels + d, y_t.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _load_reverse_step(
    u, delta, grad, order, k, t, d, length, channels, u_time, delta_time, HAS_ORDER: tl.constexpr
):  # fmt: skip
    """u_t, the raw step size and the output's gradient at a step, zero outside the sequence."""
    u_t, delta_t = _load_step(u, delta, t, d, length, channels, u_time, delta_time)
    token = tl.minimum(t, length - 1)
    if HAS_ORDER:
        token = tl.load(order + k * length + token)
    mask = (d < channels) & (t + tl.zeros_like(d) < length)
    return u_t, delta_t, tl.load(grad + token * channels + d, mask=mask, other=0.0)


@triton.jit
def _reverse_step(
    grad_u, grad_delta, grad_BC, u_t, delta_t, y_t, pairs, offset, skip, rates, before, carry,
    grad_rates, grad_skip, grad_offset, t, d, length, channels,
    SOFTPLUS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Gradients at step t, from the state before it and the gradient (`carry`) that later steps send to its state."""
    exists = t + tl.zeros_like(d) < length
    mask = (d < channels) & exists
    u_t, y_t = u_t.to(tl.float32), y_t.to(tl.float32)
    size, raw = _step_size(delta_t, offset, exists, SOFTPLUS)
    # a step past the end writes to the last step's place first, and that step overwrites it
    row = grad_BC + tl.minimum(t, length - 1) * (2 * STATES)
    input_t = size * u_t
    from_input = tl.zeros_like(u_t)  # sum over the states of B g, with g the gradient of the state
    from_decay = tl.zeros_like(u_t)  # sum over the states of A a g h
    new_carry = ()
    new_rates = ()
    for s in tl.static_range(STATES):
        b, c = _first(pairs[s]), _second(pairs[s])
        decay = tl.exp2(size * rates[s])
        decayed = decay * before[s]
        g = carry[s] + c * y_t
        tl.store(row + s, tl.sum(g * input_t, axis=0))
        tl.store(row + STATES + s, tl.sum((decayed + b * input_t) * y_t, axis=0))
        from_input += g * b
        exponent = g * decayed  # gradient of size * rate
        from_decay += exponent * rates[s]
        new_rates = new_rates + (grad_rates[s] + exponent * size,)
        new_carry = new_carry + (g * decay,)
    g_size = from_input * u_t + from_decay / _LOG2E
    if SOFTPLUS:
        g_size *= tl.where(raw > 20.0, 1.0, _sigmoid(raw))
    tl.store(grad_u + t * channels + d, (from_input * size + y_t * skip).to(grad_u.dtype.element_ty), mask=mask)
    tl.store(grad_delta + t * channels + d, g_size.to(grad_delta.dtype.element_ty), mask=mask)
    return new_carry, new_rates, grad_skip + y_t * u_t, grad_offset + tl.where(exists, g_size, 0.0)


@triton.jit
def _scan_backward_kernel(
    u, delta, A, BC, D, bias, grad, order, states, scratch, grad_u, grad_delta, grad_BC, grad_A, grad_D, grad_bias,
    batch, length, channels, u_direction, u_batch, u_time, delta_direction, delta_batch, delta_time,
    HAS_BIAS: tl.constexpr, HAS_ORDER: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk from the end: the states before every second step into scratch, then the steps in reverse."""
    block, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)  # sequence = k * batch + b
    k, b = sequence // batch, sequence % batch
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < channels
    u += k * u_direction + b * u_batch
    delta += k * delta_direction + b * delta_batch
    BC += sequence * length * STATES
    grad += b * length * channels
    grad_u += sequence * length * channels
    grad_delta += sequence * length * channels
    chunks = tl.cdiv(length, CHUNK)
    states += sequence * chunks * STATES * channels
    # every block of channels has its share of the gradients of B and C: (blocks, K * batch, length, 2 * STATES)
    grad_BC += (block * tl.num_programs(1) + sequence) * length * 2 * STATES
    scratch += (sequence * tl.num_programs(0) + block) * (CHUNK // 2) * STATES * BLOCK_D + tl.arange(0, BLOCK_D)
    skip = tl.load(D + k * channels + d, mask=inside, other=0.0).to(tl.float32)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + k * channels + d, mask=inside, other=0.0).to(tl.float32)
    rates = ()
    carry = ()
    for s in tl.static_range(STATES):
        rates = rates + (tl.load(A + (k * STATES + s) * channels + d, mask=inside, other=0.0) * _LOG2E,)
        carry = carry + (tl.zeros([BLOCK_D], tl.float32),)
    grad_rates = carry
    grad_skip = tl.zeros([BLOCK_D], tl.float32)
    grad_offset = tl.zeros([BLOCK_D], tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * CHUNK
        steps = tl.minimum(length - start, CHUNK)
        state = ()
        for s in tl.static_range(STATES):
            state = state + (tl.load(states + (chunk * STATES + s) * channels + d, mask=inside, other=0.0),)
        next_u, next_delta = _load_step(u, delta, start, d, length, channels, u_time, delta_time)
        for step in range(steps):
            if step % 2 == 0:
                for s in tl.static_range(STATES):
                    tl.store(scratch + (step // 2 * STATES + s) * BLOCK_D, state[s])
            u_t, delta_t = next_u.to(tl.float32), next_delta
            next_u, next_delta = _load_step(u, delta, start + step + 1, d, length, channels, u_time, delta_time)
            size, _ = _step_size(delta_t, offset, inside, SOFTPLUS)
            state = _advance(state, rates, _load_pairs(BC, start + step, length, STATES), u_t, size, STATES)
        for back_pair in range(tl.cdiv(steps, 2)):
            pair = tl.cdiv(steps, 2) - 1 - back_pair
            t = start + 2 * pair
            u_0, delta_0, y_0 = _load_reverse_step(
                u, delta, grad, order, k, t, d, length, channels, u_time, delta_time, HAS_ORDER
            )  # fmt: skip
            u_1, delta_1, y_1 = _load_reverse_step(
                u, delta, grad, order, k, t + 1, d, length, channels, u_time, delta_time, HAS_ORDER
            )  # fmt: skip
            before = ()
            for s in tl.static_range(STATES):
                before = before + (tl.load(scratch + (pair * STATES + s) * BLOCK_D),)
            pairs_0 = _load_pairs(BC, t, length, STATES)
            size, _ = _step_size(delta_0, offset, inside, SOFTPLUS)
            between = _advance(before, rates, pairs_0, u_0.to(tl.float32), size, STATES)
            pairs_1 = _load_pairs(BC, t + 1, length, STATES)
            carry, grad_rates, grad_skip, grad_offset = _reverse_step(
                grad_u, grad_delta, grad_BC, u_1, delta_1, y_1, pairs_1, offset, skip, rates, between, carry,
                grad_rates, grad_skip, grad_offset, t + 1, d, length, channels, SOFTPLUS, STATES,
            )  # fmt: skip
            carry, grad_rates, grad_skip, grad_offset = _reverse_step(
                grad_u, grad_delta, grad_BC, u_0, delta_0, y_0, pairs_0, offset, skip, rates, before, carry,
                grad_rates, grad_skip, grad_offset, t, d, length, channels, SOFTPLUS, STATES,
            )  # fmt: skip
    for s in tl.static_range(STATES):
        tl.store(grad_A + (sequence * STATES + s) * channels + d, grad_rates[s], mask=inside)
    tl.store(grad_D + sequence * channels + d, grad_skip, mask=inside)
    tl.store(grad_bias + sequence * channels + d, grad_offset, mask=inside)


def _pack(B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """(K, B, L, S) int64, each the float32 pair (B, C)."""
    return torch.stack([B, C], dim=-1).float().contiguous().view(torch.int64)


def _inverse(order: torch.Tensor | None) -> torch.Tensor | None:
    """(K, L) table of the step at which a direction visits a token."""
    if order is None:
        return None
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, steps)


def _inner(sequence: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its channels lie side by side in memory, else a copy where they do."""
    return sequence if sequence.stride(-1) == 1 else sequence.contiguous()


def _grid(length: int, channels: int, last: int) -> tuple[int, int, int]:
    return triton.cdiv(length, _BLOCK_TIME), triton.cdiv(channels, _BLOCK_CHANNELS), last


def _block_channels(states: int) -> int:
    """Channels of a scan program, one warp: two a thread, or one where the states would not fit the registers."""
    return 64 if states <= 16 else 32


def causal_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """See `arm_zoo.scan.causal_conv`."""
    directions, channels, taps = weight.shape
    batch, length, _ = x.shape
    x = _inner(x)
    out = x.new_empty(directions, batch, length, channels)
    _conv_kernel[_grid(length, channels, directions * batch)](
        x, weight.contiguous(), bias.contiguous(), order, out, batch, length, channels, x.stride(0), x.stride(1),
        HAS_ORDER=order is not None, TAPS=taps, BLOCK_T=_BLOCK_TIME, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    return out


def causal_conv_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, order: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias, given that of the output (K, B, L, D)."""
    directions, channels, taps = weight.shape
    batch, length, _ = x.shape
    x, grad, weight, bias = _inner(x), _inner(grad), weight.contiguous(), bias.contiguous()
    grad_before = x.new_empty(directions, batch, length, channels)
    partial = x.new_empty(directions, batch, taps + 1, channels, dtype=torch.float32)
    _conv_backward_kernel[triton.cdiv(channels, _BLOCK_CHANNELS), directions * batch](
        grad, x, weight, bias, order, grad_before, partial, batch, length, channels, x.stride(0), x.stride(1),
        *grad.stride()[:3],
        HAS_ORDER=order is not None, TAPS=taps, BLOCK_T=8, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    grad_x = x.new_empty(batch, length, channels)
    _conv_grad_x_kernel[_grid(length, channels, batch)](
        grad_before, weight, _inverse(order), grad_x, batch, length, channels,
        DIRECTIONS=directions, HAS_ORDER=order is not None, TAPS=taps, BLOCK_T=_BLOCK_TIME, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    partial = partial.sum(1)  # (K, taps + 1, D)
    return grad_x, partial[:, :taps].transpose(1, 2).to(weight.dtype, copy=True), partial[:, taps].to(bias.dtype)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    order: torch.Tensor | None,
    save_states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `arm_zoo.scan.selective_scan`, before the gate: the mean in token order, and the saved states."""
    directions, batch, length, channels = u.shape
    u, delta = _inner(u), _inner(delta)
    d_state = A.shape[-1]
    sequences = u.new_empty(directions, batch, length, channels)
    chunks = triton.cdiv(length, CHUNK) if save_states else 0
    states = u.new_empty(directions, batch, chunks, d_state, channels, dtype=torch.float32)
    block = _block_channels(d_state)
    _scan_kernel[triton.cdiv(channels, block), directions * batch](
        u, delta, A.float().transpose(1, 2).contiguous(), _pack(B, C), D.contiguous(), delta_bias, sequences, states,
        batch, length, channels, *u.stride()[:3], *delta.stride()[:3],
        HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, SAVE=save_states,
        STATES=d_state, CHUNK=CHUNK, BLOCK_D=block, num_warps=1,
    )  # fmt: skip
    y = u.new_empty(batch, length, channels)
    _merge_kernel[_grid(length, channels, batch)](
        sequences, _inverse(order), y, batch, length, channels,
        DIRECTIONS=directions, HAS_ORDER=order is not None, BLOCK_T=_BLOCK_TIME, BLOCK_D=_BLOCK_CHANNELS,
    )  # fmt: skip
    return y, states


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
    u, delta = _inner(u), _inner(delta)
    grad = (grad / directions).contiguous()
    d_state = A.shape[-1]
    block = _block_channels(d_state)
    blocks, sequences = triton.cdiv(channels, block), directions * batch
    grad_u, grad_delta = (t.new_empty(t.shape) for t in (u, delta))
    shares = saved.new_empty(blocks, directions, batch, length, 2 * d_state)
    scratch = saved.new_empty(sequences * blocks * (CHUNK // 2) * d_state * block)
    grad_A = saved.new_empty(directions, batch, d_state, channels)
    grad_D, grad_bias = (saved.new_empty(directions, batch, channels) for _ in range(2))
    _scan_backward_kernel[blocks, sequences](
        u, delta, A.float().transpose(1, 2).contiguous(), _pack(B, C), D.contiguous(), delta_bias, grad, order, saved,
        scratch, grad_u, grad_delta, shares, grad_A, grad_D, grad_bias, batch, length, channels,
        *u.stride()[:3], *delta.stride()[:3],
        HAS_BIAS=delta_bias is not None, HAS_ORDER=order is not None, SOFTPLUS=delta_softplus,
        STATES=d_state, CHUNK=CHUNK, BLOCK_D=block, num_warps=1,
    )  # fmt: skip
    grad_B, grad_C = (t.to(B.dtype, copy=True) for t in shares.sum(0).chunk(2, dim=-1))
    grad_A = grad_A.sum(1).transpose(1, 2).to(A.dtype).contiguous()
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D.sum(1).to(D.dtype), grad_bias.sum(1).to(D.dtype)
