"""The `numba` backend: the forward scan of float32 sequences on the CPU as one compiled loop, by Numba's JIT.

The states of a block of channels stay in the first-level cache. Everything else is the `torch` backend's.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.ops.cpu.chunked import causal_conv, causal_conv_backward, selective_scan_backward
from arm_zoo.ops.layout import CHUNK, ScanInputs, empty_states, inner

__all__ = ["causal_conv", "causal_conv_backward", "selective_scan", "selective_scan_backward"]

_LEAST, _MOST = 128, 512  # channels of a block: of few states more, as short loops cost more than what they do
_STATES = 2048  # of a block, which with their rates, 16 KB, stay in the first-level cache
_CONTRACT = {"contract"}  # products may be fused into sums; nothing is reordered, NaN and infinity keep their meaning

# numbers in float32, or Numba would compute in float64
_LOG2E = np.float32(math.log2(math.e))
_ZERO, _ONE = np.float32(0), np.float32(1)
_LOWEST, _HIGHEST = np.float32(-125), np.float32(127)  # beyond, 2 to the x is taken for 2e-38 and 2e38
_ROUND = np.float32(1.5 * 2**23)  # a float32 plus this has the nearest whole number in its lowest bits
# least relative error fits: of degree 5 to 2 to the r on -1/2..1/2, exact at 0 since errors there would add up, and
# of degree 9 to log1p(y) / y on 0..1
_E1, _E2, _E3, _E4, _E5 = np.float32([0.6931470037, 0.2402224243, 0.0555073358, 0.0096715130, 0.0013264727])
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8, _L9 = np.float32(
    [1.0, -0.4999990165, 0.3332996368, -0.2495413273, 0.1967593133,
     -0.1530556977, 0.1060362174, -0.0569591597, 0.0198512636, -0.0032439809]
)  # fmt: skip


@intrinsic
def _times_power_of_two(context, p, rounded):
    """p times 2 to the whole number in the lowest bits of `rounded`, by adding it to the exponent of p."""

    def codegen(context, builder, signature, arguments):
        integer = ir.IntType(32)
        p, rounded = (builder.bitcast(argument, integer) for argument in arguments)
        exponent = builder.shl(rounded, ir.Constant(integer, 23))
        return builder.bitcast(builder.add(p, exponent), ir.FloatType())

    return types.float32(types.float32, types.float32), codegen


@njit(fastmath=_CONTRACT, inline="always")
def _exp2(x):
    """2 to the x, within 2e-7, of any x but NaN; NumPy's own keeps the loop around it from becoming a vector loop."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    rounded = x + _ROUND
    r = x - (rounded - _ROUND)
    p = ((((_E5 * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _ONE
    return _times_power_of_two(p, rounded)


@njit(fastmath=_CONTRACT, inline="always")
def _softplus(x):
    y = _exp2(-abs(x) * _LOG2E)
    p = ((((_L9 * y + _L8) * y + _L7) * y + _L6) * y + _L5) * y + _L4
    p = (((p * y + _L3) * y + _L2) * y + _L1) * y + _L0
    return (_ZERO if x < _ZERO else x) + y * p  # NaN comes through the first summand


@njit(nogil=True, fastmath=_CONTRACT, error_model="numpy")
def _scan_blocks(
    first, last, width, u, u_steps, delta, delta_steps, A, B, B_steps, C, C_steps, D, bias, softplus, rows, order,
    share, y, saved,
):  # fmt: skip
    """Blocks first to last - 1 of (image, channels); u, delta, B, C are flat, with distances between (K, B, L).

    Step t of direction k reads their row rows[k, t], and writes that of the token order[k, t].
    """
    directions, d_state, channels = A.shape
    length = y.shape[1]
    blocks = (channels + width - 1) // width
    state, rates = np.empty((d_state, width), np.float32), np.empty((d_state, width), np.float32)
    poison = np.empty(width, np.float32)  # NaN where a rate is NaN, which _exp2 does not pass on, else 0
    offset, skip = np.empty(width, np.float32), np.empty(width, np.float32)
    size, into, out = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for block in range(first, last):
        b, start = block // blocks, block % blocks * width
        count = min(width, channels - start)
        for k in range(directions):
            poison[:] = _ZERO
            offset[:count], skip[:count] = bias[k, start : start + count], D[k, start : start + count]
            for s in range(d_state):
                for d in range(count):
                    state[s, d] = _ZERO
                    rates[s, d] = A[k, s, start + d]
                    poison[d] = rates[s, d] if np.isnan(rates[s, d]) else poison[d]
            for t in range(length):
                if saved.shape[2] and t % CHUNK == 0:
                    for s in range(d_state):
                        for d in range(count):
                            saved[k, b, t // CHUNK, s, start + d] = state[s, d]
                row = rows[k, t]
                u_row = k * u_steps[0] + b * u_steps[1] + row * u_steps[2] + start
                delta_row = k * delta_steps[0] + b * delta_steps[1] + row * delta_steps[2] + start
                for d in range(count):
                    size[d] = delta[delta_row + d] + offset[d]
                if softplus:
                    for d in range(count):
                        size[d] = _softplus(size[d])
                for d in range(count):
                    into[d] = size[d] * u[u_row + d]
                    out[d] = skip[d] * u[u_row + d] + poison[d]
                B_row = k * B_steps[0] + b * B_steps[1] + row * B_steps[2]
                C_row = k * C_steps[0] + b * C_steps[1] + row * C_steps[2]
                for s in range(d_state):
                    B_t, C_t = B[B_row + s], C[C_row + s]
                    for d in range(count):
                        new = _exp2(size[d] * rates[s, d]) * state[s, d] + into[d] * B_t
                        state[s, d] = new
                        out[d] += new * C_t
                token = y[b, order[k, t], start : start + count]
                for d in range(count):
                    token[d] += out[d] * share


def _memory(sequence: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """A tensor's memory from its first element on, flat, and the distances of its rows; states or channels adjoin."""
    sequence = inner(sequence.detach())
    size = sequence.untyped_storage().nbytes() // sequence.element_size() - sequence.storage_offset()
    return sequence.as_strided((size,), (1,)).numpy(), sequence.stride()[:3]


def _copy(tensor: Tensor) -> np.ndarray:
    """A copy of a weight or a table, as sharding resizes the memory of weights, which a NumPy view would forbid."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).numpy()


def selective_scan(scan: ScanInputs, save_states: bool, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `arm_zoo.ops.selective_scan`: its output, gated only where no states are saved, and the saved states."""
    u, *others = scan.with_whole_steps()[:6]
    delta, A, B, C, D = (t.to(u.dtype) for t in others)
    directions, batch, length, channels = scan.shape
    delta_bias, order = scan.delta_bias, scan.order
    y = u.new_zeros(batch, length, channels)
    saved = empty_states(u, A, u.dtype, save=save_states)
    if y.numel() == 0:
        return y, saved
    bias = torch.zeros_like(D) if delta_bias is None else delta_bias.to(u.dtype)
    steps = torch.arange(length).expand(directions, -1)
    if order is not None and (order.min() < 0 or order.max() >= length):  # code would write outside the output
        raise IndexError(
            f"selective_scan: order must number {length} tokens from 0 on, got {order.min()} to {order.max()}"
        )
    arguments = (
        *_memory(u.expand(scan.shape)), *_memory(delta), (A.detach() * _LOG2E).transpose(1, 2).contiguous().numpy(),
        *_memory(B), *_memory(C), _copy(D), _copy(bias), scan.delta_softplus,
        *(_copy(steps if table is None else table) for table in (scan.rows, order)), np.float32(scan.share),
        y.numpy(), saved.numpy(),
    )  # fmt: skip
    threads = torch.get_num_threads()
    width = _LEAST if batch < threads else min(max(_STATES // A.shape[-1], _LEAST), _MOST)
    blocks = batch * math.ceil(channels / width)
    threads = min(threads, blocks)
    bounds = [blocks * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_scan_blocks, *part, width, *arguments) for part in itertools.pairwise(bounds)]:
            done.result()
    return y if gate is None else y * F.silu(gate), saved
