"""What Numba compiles for the CPU: loops over float32 sequences, of which the innermost goes over adjacent channels.

LLVM makes vector code of the innermost loops. Numbers that they need come as arguments: constants in the code would be
read from memory at every step. A loop takes the tasks `first` to `last` - 1, which write to separate memory.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_CONTRACT = {"contract"}  # products may be fused into sums; nothing is reordered, NaN and infinity keep their meaning


_elementary = njit(fastmath=_CONTRACT, inline="always")
_inlined = njit(fastmath=_CONTRACT, error_model="numpy", forceinline=True)


def _compiled(function):
    """Compile a whole loop, and keep its machine code for later processes where a folder can be written."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": _CONTRACT}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no such folder
        return njit(**options)(function)


class Exp2(NamedTuple):
    """Least argument, a number that rounds what it is added to, and coefficients from the highest to 1."""

    lowest: np.float32
    rounding: np.float32
    coefficients: tuple[np.float32, ...]


class Functions(NamedTuple):
    """What the elementary functions are made of."""

    exp2: Exp2
    log1p: tuple[np.float32, ...]  # of log1p(y) / y, from the highest coefficient
    log2e: np.float32
    ln2: np.float32


class Rows(NamedTuple):
    """Sequences (K, B, L, N) whose last axis adjoins: their memory, flat, and the distances along the first three."""

    memory: np.ndarray
    steps: tuple[int, ...]


class Scan(NamedTuple):
    """The inputs of a scan: step t of direction k reads the rows `rows[k, t]`, and gives token `order[k, t]`.

    There is a table of either for each image, or one for all.
    """

    u: Rows
    delta: Rows
    A: np.ndarray  # (K, S, D), to the base 2
    least: np.ndarray  # (K, D): of the states' rates; NaN if one is
    most: np.ndarray
    B: Rows
    C: Rows
    D: np.ndarray  # (K, D)
    bias: np.ndarray
    rows: np.ndarray  # (1 or B, K, L)
    order: np.ndarray
    share: np.float32
    softplus: bool
    chunk: int  # steps between saved states
    functions: Functions


@intrinsic
def _times_power_of_two(context, p, rounded):
    """p times 2 to the whole number in the lowest bits of `rounded`, by adding it to the exponent of p."""

    def codegen(context, builder, signature, arguments):
        integer = ir.IntType(32)
        p, rounded = (builder.bitcast(argument, integer) for argument in arguments)
        exponent = builder.shl(rounded, ir.Constant(integer, 23))
        return builder.bitcast(builder.add(p, exponent), ir.FloatType())

    return types.float32(types.float32, types.float32), codegen


@_elementary
def _exp2(x, exp2):
    """2 to the x, within 2e-7, of x up to 127, where that below -125 counts as -125; not of NaN."""
    x = max(x, exp2.lowest)
    rounded = x + exp2.rounding
    r = x - (rounded - exp2.rounding)
    c5, c4, c3, c2, c1, c0 = exp2.coefficients
    return _times_power_of_two(((((c5 * r + c4) * r + c3) * r + c2) * r + c1) * r + c0, rounded)


@_elementary
def _exp_minus(x, functions):
    """e to the -|x|."""
    return _exp2(-abs(x) * functions.log2e, functions.exp2)


@_elementary
def _softplus(x, y, functions):
    """log(1 + e^x), given y = e^-|x|."""
    c9, c8, c7, c6, c5, c4, c3, c2, c1, c0 = functions.log1p
    p = ((((c9 * y + c8) * y + c7) * y + c6) * y + c5) * y + c4
    p = (((p * y + c3) * y + c2) * y + c1) * y + c0
    return max(x, np.float32(0)) + y * p


@_elementary
def _sigmoid(x, y):
    """1 / (1 + e^-x), given y = e^-|x|."""
    return (np.float32(1) if x >= 0 else y) / (np.float32(1) + y)


@njit(fastmath={"contract", "reassoc"})
def _add(total, term):
    """The sum, whose terms a loop may take in any order: in the lanes of a vector."""
    return total + term


@njit
def _row(sequences, k, b, row, start, count):
    """The numbers start to start + count - 1 of a row."""
    first = k * sequences.steps[0] + b * sequences.steps[1] + row * sequences.steps[2] + start
    return sequences.memory[first : first + count]


@intrinsic
def _fetch_first(context, row):
    """Have the cache fetch what lies where the row begins, while other code runs."""

    def codegen(context, builder, signature, arguments):
        memory, integer = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = ir.FunctionType(ir.VoidType(), [memory, integer, integer, integer])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [memory], prefetch)
        first = builder.bitcast(context.make_array(signature.args[0])(context, builder, arguments[0]).data, memory)
        to_read, to_all_levels, data = (ir.Constant(integer, number) for number in (0, 3, 1))
        builder.call(prefetch, [first, to_read, to_all_levels, data])
        return context.get_dummy_value()

    return types.void(row), codegen


@_inlined
def _fetch(row):
    """Have the cache fetch a row of numbers, whose order may be one that a processor does not foresee."""
    for d in range(0, len(row), _LINE):
        _fetch_first(row[d:])


@njit
def _of_image(tables, b):
    """The table of an image, or that of all."""
    return tables[b if len(tables) > 1 else 0]


_LINE = 16  # numbers that come into a cache together
WIDTH = 192  # the most channels of a block: in the first-level cache there are then 16 states with their rates


def _record(*fields):
    """Rows of channels in fixed distances: so LLVM knows that what a loop writes to one is not read from others."""
    return np.dtype([(field, np.float32, (WIDTH,)) for field in fields])


_CHANNEL = _record("skip", "bias", "least", "most", "of_skip", "of_bias")
_STEP = _record("u", "size", "into", "out")
_STATE = _record("value", "rate")
_STEP_BACK = _record("u", "size", "slope", "into", "of_y", "of_product", "of_exponent", "decay", "before")
_STATE_BACK = _record("rate", "carry", "of_rate")


@njit
def _load_channels(channel, scan, k, start, count):
    """What of a direction's weights belongs to a block's channels."""
    for d in range(count):
        channel["skip"][d] = scan.D[k, start + d]
        channel["bias"][d] = scan.bias[k, start + d]
        channel["least"][d] = scan.least[k, start + d]
        channel["most"][d] = scan.most[k, start + d]


@_inlined
def _load_step(step, channel, u, delta, softplus, functions):
    """Input, size and their product, which B brings into the states; a size that lets these grow by 2^127 is NaN."""
    highest, nan = np.float32(127), np.float32(np.nan)
    size, into, kept = step["size"], step["into"], step["u"]
    bias, least, most = channel["bias"], channel["least"], channel["most"]
    for d in range(len(u)):
        kept[d] = u[d]
    if softplus:
        for d in range(len(u)):
            x = delta[d] + bias[d]
            size[d] = _softplus(x, _exp_minus(x, functions), functions)
    else:
        for d in range(len(u)):
            size[d] = delta[d] + bias[d]
    for d in range(len(u)):
        size[d] = size[d] if (size[d] * most[d] <= highest) & (size[d] * least[d] <= highest) else nan
        into[d] = size[d] * kept[d]


@_compiled
def scan_forward(first, last, width, scan, gate, y, gated, saved):
    """Tasks are blocks of `width` channels of an image: their output y (B, L, D), that times SiLU(gate), and states.

    Without a gate `gate` is empty; with it `gated` may be the memory of y. `saved` may have no chunks.
    """
    directions, d_state, channels = scan.A.shape
    length, functions = y.shape[1], scan.functions
    blocks = (channels + width - 1) // width
    channel, step, states = np.empty(1, _CHANNEL), np.empty(1, _STEP), np.empty(d_state, _STATE)
    for task in range(first, last):
        b, start = task // blocks, task % blocks * width
        count = min(width, channels - start)
        stop = start + count
        rows, order = _of_image(scan.rows, b), _of_image(scan.order, b)
        for k in range(directions):
            _load_channels(channel[0], scan, k, start, count)
            for s in range(d_state):
                states[s]["value"][:] = 0
                states[s]["rate"][:count] = scan.A[k, s, start:stop]
            for t in range(length):
                if saved.shape[2] and t % scan.chunk == 0:
                    for s in range(d_state):
                        saved[k, b, t // scan.chunk, s, start:stop] = states[s]["value"][:count]
                row = rows[k, t]
                u, delta = _row(scan.u, k, b, row, start, count), _row(scan.delta, k, b, row, start, count)
                B, C = _row(scan.B, k, b, row, 0, d_state), _row(scan.C, k, b, row, 0, d_state)
                _load_step(step[0], channel[0], u, delta, scan.softplus, functions)
                following = rows[k, min(t + 1, length - 1)]
                _fetch(_row(scan.u, k, b, following, start, count))
                _fetch(_row(scan.delta, k, b, following, start, count))
                size, into, out, skip = step[0]["size"], step[0]["into"], step[0]["out"], channel[0]["skip"]
                for d in range(count):
                    out[d] = skip[d] * u[d]
                for s in range(d_state):
                    B_t, C_t, value, rate = B[s], C[s], states[s]["value"], states[s]["rate"]
                    for d in range(count):
                        new = _exp2(size[d] * rate[d], functions.exp2) * value[d] + into[d] * B_t
                        value[d] = new
                        out[d] += new * C_t
                token = y[b, order[k, t], start:stop]
                if k == 0:
                    for d in range(count):
                        token[d] = out[d] * scan.share
                else:
                    for d in range(count):
                        token[d] += out[d] * scan.share
        if len(gate.memory):
            for t in range(length):
                z, token, product = _row(gate, 0, b, t, start, count), y[b, t, start:stop], gated[b, t, start:stop]
                out = step[0]["out"]  # y may be the memory of the product
                for d in range(count):
                    out[d] = token[d] * z[d] * _sigmoid(z[d], _exp_minus(z[d], functions))
                for d in range(count):
                    product[d] = out[d]


@_inlined
def _remake(step, state, after, count, B_t, functions):
    """One state's decays, and its values after the step, from those before it."""
    size, into, decay, before, rate = step["size"], step["into"], step["decay"], step["before"], state["rate"]
    for d in range(count):
        decay[d] = _exp2(size[d] * rate[d], functions.exp2)
        after[d] = decay[d] * before[d] + into[d] * B_t


@_inlined
def _reverse(step, state, after, count, B_t, C_t):
    """One step back of one state: adds to the gradients of the step and of the rates, returns those of B_t and C_t."""
    size, into, decay, before, of_y = step["size"], step["into"], step["decay"], step["before"], step["of_y"]
    of_product, of_exponent = step["of_product"], step["of_exponent"]
    rate, carry, of_rate = state["rate"], state["carry"], state["of_rate"]
    of_B, of_C = np.float32(0), np.float32(0)
    for d in range(count):
        of_value = carry[d] + of_y[d] * C_t
        of_C = _add(of_C, of_y[d] * after[d])
        of_B = _add(of_B, of_value * into[d])
        of_product[d] += of_value * B_t
        carry[d] = of_value * decay[d]
        of_power = carry[d] * before[d]
        of_exponent[d] += of_power * rate[d]
        of_rate[d] += of_power * size[d]
    return of_B, of_C


@_inlined
def _load_step_back(step, channel, u, delta, of_token, softplus, share, functions):
    """What a step's way back starts with."""
    _load_step(step, channel, u, delta, softplus, functions)
    slope, bias, of_y = step["slope"], channel["bias"], step["of_y"]
    of_product, of_exponent = step["of_product"], step["of_exponent"]
    for d in range(len(u)):
        slope[d] = np.float32(1)
    if softplus:
        for d in range(len(u)):
            x = delta[d] + bias[d]
            slope[d] = _sigmoid(x, _exp_minus(x, functions))
    for d in range(len(u)):
        of_y[d] = of_token[d] * share
        of_product[d] = 0
        of_exponent[d] = 0


@_inlined
def _finish_step(step, channel, of_u, of_delta, ln2):
    """A step's gradients, when all states have been there."""
    u, size, slope, of_y = step["u"], step["size"], step["slope"], step["of_y"]
    of_product, of_exponent = step["of_product"], step["of_exponent"]
    skip, of_skip, of_bias = channel["skip"], channel["of_skip"], channel["of_bias"]
    for d in range(len(of_u)):
        of_exponent[d] = (of_product[d] * u[d] + of_exponent[d] * ln2) * slope[d]
        of_skip[d] += of_y[d] * u[d]
        of_bias[d] += of_exponent[d]
    for d in range(len(of_u)):
        of_u[d] = of_product[d] * size[d] + of_y[d] * skip[d]
    for d in range(len(of_u)):
        of_delta[d] = of_exponent[d]


@_compiled
def scan_backward(first, last, scan, grad, saved, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias):
    """Tasks are (group of images, direction, part of the channels), numbered in this order.

    grad (B, L, D) is that of y; those of u and whole delta are (K, B, L, D). Of those of A (groups, K, S, D), D and
    bias (groups, K, D), a group writes its images' share; a part that of its channels of B and C (parts, K, B, L, S).
    A state's gradient is g_t = C_t grad_t + exp(d_{t+1} A) g_{t+1}; a chunk's states are made anew, one by one.
    """
    directions, d_state, channels = scan.A.shape
    parts, _, batch, length, _ = grad_B.shape
    groups, functions, chunk = len(grad_A), scan.functions, scan.chunk
    blocks = (channels + WIDTH - 1) // WIDTH
    channel, work, states = np.empty(1, _CHANNEL), np.empty(chunk + 1, _STEP_BACK), np.empty(d_state, _STATE_BACK)
    for task in range(first, last):
        group, k, part = task // (directions * parts), task // parts % directions, task % parts
        first_block = blocks * part // parts
        for block in range(first_block, blocks * (part + 1) // parts):
            start = block * WIDTH
            count = min(WIDTH, channels - start)
            stop = start + count
            _load_channels(channel[0], scan, k, start, count)
            channel[0]["of_skip"][:] = 0
            channel[0]["of_bias"][:] = 0
            for s in range(d_state):
                states[s]["rate"][:count] = scan.A[k, s, start:stop]
                states[s]["of_rate"][:] = 0
            for b in range(batch * group // groups, batch * (group + 1) // groups):
                rows, order = _of_image(scan.rows, b), _of_image(scan.order, b)
                for s in range(d_state):
                    states[s]["carry"][:] = 0
                for begin in range((length - 1) // chunk * chunk, -1, -chunk):
                    steps = min(chunk, length - begin)
                    for t in range(steps):
                        row = rows[k, begin + t]
                        u, delta = _row(scan.u, k, b, row, start, count), _row(scan.delta, k, b, row, start, count)
                        of_token = grad[b, order[k, begin + t], start:stop]
                        following = begin + min(t + 1, steps - 1)
                        _fetch(_row(scan.u, k, b, rows[k, following], start, count))
                        _fetch(_row(scan.delta, k, b, rows[k, following], start, count))
                        _fetch(grad[b, order[k, following], start:stop])
                        _load_step_back(work[t], channel[0], u, delta, of_token, scan.softplus, scan.share, functions)
                    for s in range(d_state):
                        work[0]["before"][:count] = saved[k, b, begin // chunk, s, start:stop]
                        for t in range(steps):
                            B_t = _row(scan.B, k, b, rows[k, begin + t], s, 1)[0]
                            _remake(work[t], states[s], work[t + 1]["before"], count, B_t, functions)
                        for t in range(steps - 1, -1, -1):
                            row = rows[k, begin + t]
                            B_t, C_t = _row(scan.B, k, b, row, s, 1)[0], _row(scan.C, k, b, row, s, 1)[0]
                            of_B, of_C = _reverse(work[t], states[s], work[t + 1]["before"], count, B_t, C_t)
                            if block == first_block:
                                grad_B[part, k, b, row, s], grad_C[part, k, b, row, s] = of_B, of_C
                            else:
                                grad_B[part, k, b, row, s] += of_B
                                grad_C[part, k, b, row, s] += of_C
                    for t in range(steps):
                        row = rows[k, begin + t]
                        of_u, of_delta = grad_u[k, b, row, start:stop], grad_delta[k, b, row, start:stop]
                        _finish_step(work[t], channel[0], of_u, of_delta, functions.ln2)
            grad_D[group, k, start:stop] = channel[0]["of_skip"][:count]
            grad_bias[group, k, start:stop] = channel[0]["of_bias"][:count]
            for s in range(d_state):
                grad_A[group, k, s, start:stop] = states[s]["of_rate"][:count]


@_inlined
def _convolve(out, x, weight, bias, order, b, k, t, start, stop):
    """Step t of a convolution before its SiLU, of channels start to stop - 1."""
    taps = weight.shape[1]
    for d in range(stop - start):
        out[d] = bias[k, start + d]
    for j in range(max(taps - 1 - t, 0), taps):
        token, tap = _row(x, 0, b, order[k, t - taps + 1 + j], start, stop - start), weight[k, j, start:stop]
        for d in range(stop - start):
            out[d] += tap[d] * token[d]


@_compiled
def conv_forward(first, last, x, weight, bias, order, functions, out):
    """Tasks are blocks of an image's channels in a direction: weight (K, taps, D), bias (K, D) -> out (K, B, L, D)."""
    _, batch, length, channels = out.shape
    blocks = (channels + WIDTH - 1) // WIDTH
    for task in range(first, last):
        k, b, start = task // (batch * blocks), task // blocks % batch, task % blocks * WIDTH
        stop, steps = min(start + WIDTH, channels), _of_image(order, b)
        for t in range(length):
            step = out[k, b, t, start:stop]
            _fetch(_row(x, 0, b, steps[k, min(t + 1, length - 1)], start, stop - start))
            _convolve(step, x, weight, bias, steps, b, k, t, start, stop)
            for d in range(stop - start):
                step[d] *= _sigmoid(step[d], _exp_minus(step[d], functions))


@_compiled
def conv_backward(first, last, batch, grad, x, weight, bias, order, functions, grad_x, grad_weight, grad_bias):
    """Tasks are (group of images, block of channels): grad (K, B, L, D) to that of x (B, L, D), which is not empty.

    A group writes its images' share of those of weight (groups, K, taps, D) and bias (groups, K, D).
    """
    (groups, directions, taps, channels), length = grad_weight.shape, order.shape[2]
    blocks = (channels + WIDTH - 1) // WIDTH
    slopes = np.empty(WIDTH, np.float32)
    for task in range(first, last):
        group, start = task // blocks, task % blocks * WIDTH
        stop = min(start + WIDTH, channels)
        grad_weight[group, :, :, start:stop] = 0
        grad_bias[group, :, start:stop] = 0
        for b in range(batch * group // groups, batch * (group + 1) // groups):
            steps = _of_image(order, b)
            for t in range(length):
                _row(grad_x, 0, b, t, start, stop - start)[:] = 0
            for k in range(directions):
                of_bias = grad_bias[group, k, start:stop]
                for t in range(length):
                    of_step, slope = _row(grad, k, b, t, start, stop - start), slopes[: stop - start]
                    _convolve(slope, x, weight, bias, steps, b, k, t, start, stop)
                    for d in range(stop - start):
                        sigmoid = _sigmoid(slope[d], _exp_minus(slope[d], functions))
                        slope[d] = of_step[d] * sigmoid * (np.float32(1) + slope[d] * (np.float32(1) - sigmoid))
                        of_bias[d] += slope[d]
                    for j in range(max(taps - 1 - t, 0), taps):
                        row = steps[k, t - taps + 1 + j]
                        token, tap = _row(x, 0, b, row, start, stop - start), weight[k, j, start:stop]
                        of_token, of_tap = (
                            _row(grad_x, 0, b, row, start, stop - start),
                            grad_weight[group, k, j, start:stop],
                        )
                        for d in range(stop - start):
                            of_token[d] += slope[d] * tap[d]
                        for d in range(stop - start):
                            of_tap[d] += slope[d] * token[d]


@_compiled
def gate_forward(first, last, channels, gate, value, bias, functions, product):
    """Tasks are rows of so many channels: SiLU(gate) * value, after a bias (2, rows) was added to each."""
    for row in range(first, last):
        z, y = _row(gate, 0, 0, row, 0, channels), _row(value, 0, 0, row, 0, channels)
        gated, of_gate, of_value = product[row], bias[0, row], bias[1, row]
        for d in range(channels):
            x = z[d] + of_gate
            gated[d] = (y[d] + of_value) * x * _sigmoid(x, _exp_minus(x, functions))


@_compiled
def gate_backward(first, last, channels, grad, gate, value, functions, grad_gate, grad_value):
    """Tasks are rows of so many channels: gradients of the factors of SiLU(gate) * value."""
    for row in range(first, last):
        of_product, y = _row(grad, 0, 0, row, 0, channels), _row(value, 0, 0, row, 0, channels)
        z, of_gate = _row(gate, 0, 0, row, 0, channels), _row(grad_gate, 0, 0, row, 0, channels)
        of_value = _row(grad_value, 0, 0, row, 0, channels)
        for d in range(channels):
            of_value[d] = of_product[d] * z[d] * _sigmoid(z[d], _exp_minus(z[d], functions))
        for d in range(channels):
            sigmoid = _sigmoid(z[d], _exp_minus(z[d], functions))
            of_gate[d] = of_product[d] * y[d] * sigmoid * (np.float32(1) + z[d] * (np.float32(1) - sigmoid))
