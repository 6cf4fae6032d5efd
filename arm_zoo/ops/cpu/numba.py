"""The `numba` backend: loops over float32 sequences on the CPU, compiled by Numba, in torch's number of threads."""

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.ops.cpu import loops
from arm_zoo.ops.layout import CHUNK, Norm, ScanInputs, Tensors, empty_states, inner, is_per_image

_TASKS = 64  # of a backward pass, if there are so many: the order of its sums does not depend on the threads
_LEAST = 64  # channels of a block: short loops cost more than what they do
_LOG2E = math.log2(math.e)

# least relative error fits: of degree 5 to 2 to the r on -1/2..1/2, exact at 0 since errors there would add up, and
# of degree 9 to log1p(y) / y on 0..1
_EXP2 = [0.0013264727, 0.0096715130, 0.0555073358, 0.2402224243, 0.6931470037, 1.0]
_LOG1P = [
    -0.0032439809, 0.0198512636, -0.0569591597, 0.1060362174, -0.1530556977,
    0.1967593133, -0.2495413273, 0.3332996368, -0.4999990165, 1.0,
]  # fmt: skip
_FUNCTIONS = loops.Functions(
    loops.Exp2(np.float32(-125), np.float32(1.5 * 2**23), tuple(map(np.float32, _EXP2))),
    tuple(map(np.float32, _LOG1P)),
    np.float32(_LOG2E),
    np.float32(math.log(2)),
)


def _rows(sequences: Tensor) -> loops.Rows:
    """Sequences (K, B, L, N), with fewer axes or all, as memory from the first element on, and distances of rows."""
    sequences = inner(sequences.detach())
    size = max(0, sequences.untyped_storage().nbytes() // sequences.element_size() - sequences.storage_offset())
    steps = (0, 0, *sequences.stride()[:-1])[-3:]
    return loops.Rows(sequences.as_strided((size,), (1,)).numpy(), steps)


def _copy(tensor: Tensor) -> np.ndarray:
    """A copy of a weight or a table, as sharding resizes the memory of weights, which a NumPy view would forbid."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).numpy()


def _table(operation: str, order: Tensor | None, directions: int, length: int) -> np.ndarray:
    """The table (1, K, L), or (B, K, L), of whose numbers none leads code out of the memory of the tokens."""
    if order is None:
        order = torch.arange(length).expand(directions, -1)
    table = _copy(order if is_per_image(order) else order[None])
    if table.size and (table.min() < 0 or table.max() >= length):
        raise IndexError(
            f"{operation}: order must number {length} tokens from 0 on, got {table.min()} to {table.max()}"
        )
    return table


def _loops_inputs(scan: ScanInputs) -> loops.Scan:
    u, *others = scan[:6]
    delta, A, B, C, D = (t.to(u.dtype) for t in others)
    directions, _, length, _ = scan.shape
    bias = torch.zeros_like(D) if scan.delta_bias is None else scan.delta_bias.to(u.dtype)
    rates = _copy(A.transpose(1, 2)) * np.float32(_LOG2E)
    return loops.Scan(
        _rows(u.expand(scan.shape)), _rows(delta), rates, rates.min(axis=1), rates.max(axis=1),
        _rows(B), _rows(C), _copy(D), _copy(bias),
        _table("selective_scan", scan.rows, directions, length),
        _table("selective_scan", scan.order, directions, length),
        np.float32(scan.share), scan.delta_softplus, CHUNK, _FUNCTIONS,
    )  # fmt: skip


_TEAM_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# The function by which GNU's OpenMP, and others that are compatible with it, run code in all threads of a team.
_openmp_parallel: Any = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "GOMP_parallel", None)


def _in_openmp(work: Callable[[], None], threads: int) -> None:
    """Do the work in every thread of OpenMP's team."""
    _openmp_parallel(_TEAM_MEMBER(lambda _: work()), None, ctypes.c_uint(threads), ctypes.c_uint(0))


def _in_own_threads(work: Callable[[], None], threads: int) -> None:
    """Do the work in as many threads, the calling one among them."""
    with ThreadPoolExecutor(threads - 1) as pool:
        for _ in range(threads - 1):
            pool.submit(work)
        work()


# PyTorch's operators run in OpenMP's threads, which look for more work for milliseconds after each operator, on the
# cores that other threads would want. Other threads serve where its OpenMP has no such function.
_parallel = _in_own_threads if _openmp_parallel is None else _in_openmp


def _run(loop: Callable[..., None], tasks: int, *arguments: Any) -> None:
    """Run a compiled loop's tasks in as many threads as torch takes."""
    threads = min(torch.get_num_threads(), tasks)
    if threads <= 1:
        return loop(0, tasks, *arguments)
    parts = iter([(tasks * i // threads, tasks * (i + 1) // threads) for i in range(threads)])
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for part in parts:  # of the others too, where a team is smaller than was asked for
                loop(*part, *arguments)
        except BaseException as error:  # which must not leave a thread of a team
            failed.append(error)

    _parallel(work, threads)
    if failed:
        raise failed[0]


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """See `arm_zoo.ops.causal_conv`."""
    out = x.new_empty(len(weight), *x.shape)
    blocks = math.ceil(x.shape[-1] / loops.WIDTH)
    _run(loops.conv_forward, len(weight) * len(x) * blocks, *_conv_inputs(x, weight, bias, order), out.numpy())
    return out


def causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, out: Tensor | None = None
) -> Tensors:
    """Gradients of x (in `out`, if there is one), weight and bias, given that of the output (K, B, L, D)."""
    out = x.new_empty(x.shape) if out is None else out
    (directions, channels, taps), groups = weight.shape, max(1, min(len(x), _TASKS))
    grad_weight = x.new_empty(groups, directions, taps, channels)
    grad_bias = x.new_empty(groups, directions, channels)
    _run(
        loops.conv_backward, groups * math.ceil(channels / loops.WIDTH),
        len(x), _rows(grad), *_conv_inputs(x, weight, bias, order), _rows(out), grad_weight.numpy(), grad_bias.numpy(),
    )  # fmt: skip
    grad_weight = grad_weight.sum(0).transpose(1, 2).contiguous()
    return out, grad_weight.to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


def _conv_inputs(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None) -> tuple[Any, ...]:
    weight, bias = (t.to(x.dtype) for t in (weight, bias))
    table = _table("causal_conv", order, len(weight), x.shape[1])
    return _rows(x), _copy(weight.transpose(1, 2)), _copy(bias), table, _FUNCTIONS


def gate(halves: Tensor) -> Tensor:
    """SiLU(gate) * value (..., N) of (gate, value), the two halves of rows (..., 2 * N)."""
    product = halves.new_empty(*halves.shape[:-1], halves.shape[-1] // 2)
    rows = product.view(-1, product.shape[-1])
    _gate(halves.reshape(-1, halves.shape[-1]).chunk(2, dim=-1), halves.new_zeros(2, len(rows)), rows)
    return product


def gate_transposed(halves: Tensor, bias: Tensor) -> Tensor:
    """The same (N, L) of (gate, value), the first and the last N of the rows (2 * N, L) plus their bias (2 * N)."""
    product = halves.new_empty(len(halves) // 2, halves.shape[1])
    _gate(halves.chunk(2), bias.view(2, -1), product)
    return product


def _gate(halves: Sequence[Tensor], bias: Tensor, product: Tensor) -> None:
    rows, channels = product.shape
    inputs = (_rows(half) for half in halves)
    _run(loops.gate_forward, rows, channels, *inputs, _copy(bias), _FUNCTIONS, product.numpy())


def gate_backward(grad: Tensor, gate: Tensor, value: Tensor, grad_gate: Tensor, grad_value: Tensor) -> None:
    """Write the gradients of gate and value (B, L, N), the factors of SiLU(gate) * value."""
    inputs = (_rows(t.flatten(0, 1)) for t in (grad, gate, value))
    outputs = (_rows(t.view(-1, t.shape[-1])) for t in (grad_gate, grad_value))
    rows, channels = value.shape[:2].numel(), value.shape[-1]
    _run(loops.gate_backward, rows, channels, *inputs, _FUNCTIONS, *outputs)


def selective_scan(
    scan: ScanInputs, save_states: bool, gate: Tensor | None, kept: Tensor | None = None, norm: Norm | None = None
) -> Tensors:
    """See `arm_zoo.ops.selective_scan`: its output and the saved states; what a gate multiplies goes to `kept`."""
    scan = scan.with_rates().with_whole_steps()
    u, A = scan.u, scan.A
    _, batch, _, channels = scan.shape
    y = u.new_empty(scan.shape[1:]) if kept is None else kept
    gated = y if kept is None else u.new_empty(y.shape)
    saved = empty_states(u, A, u.dtype, save=save_states)
    if y.numel() == 0:
        return gated, saved
    # few images: narrow blocks, or there would be too few for the threads
    width = min(loops.WIDTH, max(_LEAST, math.ceil(batch * channels / torch.get_num_threads() / 8) * 8))
    z = loops.Rows(np.empty(0, np.float32), (0, 0, 0)) if gate is None else _rows(gate)
    _run(
        loops.scan_forward, batch * math.ceil(channels / width),
        width, _loops_inputs(scan), z, y.numpy(), gated.numpy(), saved.numpy(),
    )  # fmt: skip
    return (gated if norm is None else F.layer_norm(gated, norm.weight.shape, *norm)), saved


def selective_scan_backward(grad: Tensor, scan: ScanInputs, saved: Tensor) -> Tensors:
    """Gradients of u, whole delta, A, B, C, D and delta_bias, given the output's (B, L, D) and the saved states."""
    directions, batch, _, channels = scan.shape
    blocks = math.ceil(channels / loops.WIDTH)
    groups = max(1, min(batch, math.ceil(_TASKS / directions)))
    parts = min(blocks, math.ceil(_TASKS / (directions * groups)))
    u, d_state = scan.u, scan.A.shape[-1]
    grad_u, grad_delta = (u.new_empty(scan.shape) for _ in range(2))
    grad_A = u.new_empty(groups, directions, d_state, channels)
    grad_B, grad_C = (u.new_empty(parts, *scan.shape[:3], d_state) for _ in range(2))
    grad_D, grad_bias = (u.new_empty(groups, directions, channels) for _ in range(2))
    gradients = grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias
    _run(
        loops.scan_backward, groups * directions * parts,
        _loops_inputs(scan), grad.contiguous().numpy(), saved.numpy(), *(t.numpy() for t in gradients),
    )  # fmt: skip
    grad_A, grad_B, grad_C, grad_D, grad_bias = (t.sum(0) for t in gradients[2:])
    grad_u = grad_u if u.ndim == 4 else grad_u.sum(0)
    return grad_u, grad_delta, grad_A.transpose(1, 2).contiguous(), grad_B, grad_C, grad_D, grad_bias
