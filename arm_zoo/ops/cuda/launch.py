"""The `cuda` backend: Triton's convolution and merge, with the scans in CUDA C++, which cuda.core compiles."""

import ctypes
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch
from torch import Tensor

from arm_zoo.ops.layout import CHUNK, Norm, ScanInputs, Tensors, aligned, empty_states, inner, state_dtype
from arm_zoo.ops.triton import causal_conv, causal_conv_backward, gate_backward
from arm_zoo.ops.triton import scan as triton_scan
from arm_zoo.ops.triton.common import check_length, order_step
from arm_zoo.ops.triton.merge import merge, sequences_for, stores_by_token

__all__ = ["causal_conv", "causal_conv_backward", "gate_backward", "selective_scan", "selective_scan_backward"]

_SOURCES = Path(__file__).parent
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHANNELS = 64  # of a block: one warp in the forward scan (or twice as many), two in the backward scan
_WARPS_OF_WIDE_LANES = 12  # a multiprocessor: fewer would wait for each other's memory
_SCHEDULERS = 4  # of a multiprocessor: each issues the instructions of its warps
# lanes that share a pair of channels -> nanoseconds of a warp's step, alone on a scheduler and among many (one H200)
_STEP = {1: (346, 201), 2: (265, 140), 4: (175, 83)}
_PARTS_OF_A_BLOCK = 4  # of a sequence whose step sizes are whole; else as many as there would be images
_STATES = (1, 2, 4, 8, 16)  # other numbers, and sequences of different types, take Triton's kernels
_STRIDES = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)  # of directions, images and steps


class _Stream:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


# Steps of training ask for the same few launches over and over, and torch keeps its streams for good.
@functools.cache
def _stream(device: int, handle: int) -> Any:
    return Device(device).create_stream(_Stream(handle))


_config = functools.cache(LaunchConfig)


@functools.cache
def _kernel(device: int, pass_name: str, **macros: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    files = [_SOURCES / name for name in ("instructions.cuh", "common.cuh", f"{pass_name}.cu")]
    defines = [f"#define {name} {value}" for name, value in macros.items()]
    code = "\n".join([*defines, *(file.read_text(encoding="utf-8") for file in files)])
    options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
    return Program(code, "c++", options).compile("cubin").get_kernel(f"scan_{pass_name}")


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    """The GPU's multiprocessors, and the blocks of a cluster, which came with compute capability 9.0."""
    major, _ = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_properties(device).multi_processor_count, 8 if major >= 9 else 1


@functools.cache
def forward_split(warps: int, length: int, d_state: int, team: int, processors: int, cluster: int) -> tuple[int, int]:
    """How the forward scan fills a GPU: lanes that share a pair of channels, and parts of the length.

    Without either there would be `warps` warps. A part is one warp; a block has `team` parts, and a sequence up to
    `cluster` blocks. The split of least predicted time is taken: the number of chunks that a warp walks, times
    the time of a step alone on a scheduler, or of one step of all its warps together, whichever is longer.
    """
    chunks = -(-length // CHUNK)

    def time(split: tuple[int, int]) -> float:
        lanes, parts = split
        alone, among_many = _STEP[lanes]
        # parts walk twice, the first time without outputs; to start and to meet takes them another chunk
        walked = chunks if parts == 1 else 1.8 * -(-chunks // parts) + 1
        return walked * max(alone, among_many * -(-warps * lanes * parts // (_SCHEDULERS * processors)))

    all_lanes = [lanes for lanes in _STEP if 4 * lanes <= max(d_state, 4)]  # each has a quad of states
    all_parts = [1, *(parts for parts in (4, 8, 16, 32) if team <= parts <= min(team * cluster, chunks))]
    return min(itertools.product(all_lanes, all_parts), key=time)


def backward_split(blocks: int, length: int, d_state: int, processors: int, cluster: int) -> int:
    """The number of parts of the length, each a block, in the backward scan; without parts it has `blocks` blocks."""
    resident = (12 if d_state == 1 else 6) * processors
    most = min(cluster, -(-length // CHUNK), resident // blocks)
    return max((parts for parts in (2, 4, 8) if parts <= most), default=1)


def _fits(scan: ScanInputs, *others: Tensor) -> bool:
    """Whether the CUDA kernels take this number of states and these types, which must all be one."""
    sequences = (scan.delta, scan.B, scan.C, *others)
    return scan.A.shape[-1] in _STATES and all(t.dtype == scan.u.dtype for t in sequences) and scan.u.numel() > 0


def _are_aligned(group: int, channels: int, *sequences: Tensor) -> bool:
    """Whether all sequences are aligned so that `group` adjacent channels (or states) can be read at once."""
    strides = [stride for sequence in sequences for stride in sequence.stride()[:-1]]
    aligned = all(sequence.data_ptr() % (group * sequence.element_size()) == 0 for sequence in sequences)
    return aligned and not any(size % group for size in (channels, *strides))


def _pairs_of_lanes(scan: ScanInputs, rank: int) -> int:
    """Pairs of channels for a lane of the forward kernel: two if there is a single state and enough warps are left."""
    directions, batch, _, channels = scan.shape
    fits = scan.A.shape[-1] == 1 and 0 < rank <= 48 and _are_aligned(4, channels, scan.u)  # 48 KB of shared memory
    if not fits:
        return 1
    processors, _ = _limits(scan.u.device.index)
    return 2 if directions * batch * channels >= 2 * _CHANNELS * _WARPS_OF_WIDE_LANES * processors else 1


def _rows(sequences: Tensor) -> Tensor:
    """The tensor, copied if the steps of a sequence are not contiguous."""
    return sequences if sequences.stride()[-2:] == (sequences.shape[-1], 1) else sequences.contiguous()


def _projection(delta: Tensor, weight: Tensor | None, dtype: torch.dtype) -> dict[str, int]:
    """The forward kernel's macros for step sizes of low rank, RANK 0 where they must be whole."""
    rank, size = delta.shape[-1], delta.element_size()
    # two lanes copy a row, in the largest pieces that keep everything aligned
    numbers = (rank * size // 2, delta.data_ptr(), *(stride * size for stride in delta.stride()[:-1]))
    piece = next((piece for piece in (16, 8, 4) if not any(number % piece for number in numbers)), 0)
    fits = dtype != torch.float32 and delta.dtype == dtype and delta.stride(-1) == 1 and rank <= 128
    if weight is None or not fits or not piece:
        return {"RANK": 0, "TEAM": 1}
    return {"RANK": rank, "PIECE": piece, "TEAM": 4 if rank <= 64 else 2}  # what fits 48 KB of shared memory


def _parameter(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor as the kernels read it, in the sequences' type or float32 and aligned; copied if need be."""
    return None if tensor is None else aligned(tensor if tensor.dtype == dtype else tensor.float())


def _launch(
    pass_name: str, scan: ScanInputs, others: tuple[Tensor | None, ...], images: int, width: int, threads: int,
    **macros: int,
) -> None:  # fmt: skip
    """Start a kernel on the current stream; a block has `threads` threads for `width` channels of `images` images."""
    u, delta, A, B, C, D, delta_bias, *_ = scan
    u = u.expand(scan.shape)
    directions, batch, length, channels = scan.shape
    macros |= {"HAS_ORDER": int(scan.order is not None), "TOKENS": int(scan.rows is not None)}
    macros |= {"PER_IMAGE": int(order_step(scan.order) > 0)}
    macros |= {"DTYPE": _DTYPES[u.dtype], "S": A.shape[-1], "CHUNK": CHUNK, "CHANNELS": channels}
    macros |= {"HAS_BIAS": int(delta_bias is not None), "SOFTPLUS": int(scan.delta_softplus)}
    parameters = {name: _parameter(t, u.dtype) for name, t in (("A", A), ("D", D), ("BIAS", delta_bias))}
    macros |= {f"{name}_IS_T": int(t is not None and t.dtype == u.dtype) for name, t in parameters.items()}
    kernel = _kernel(u.device.index, pass_name, LOG_RATES=int(scan.log_rates), **macros)
    tensors = (u, delta, parameters["A"], B, C, parameters["D"], parameters["BIAS"], *others)
    Device(u.device.index).set_current()  # autograd's threads begin without one
    launch(
        _stream(u.device.index, torch.cuda.current_stream(u.device).cuda_stream),
        _config(grid=-(-channels // width) * directions * -(-batch // images) * macros["CLUSTER"], block=threads),
        kernel,
        *(ctypes.c_int64(0 if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int32(size) for size in (directions, batch, length)),
        *(ctypes.c_int64(stride) for stride in u.stride()[:2]),
        *(number(stride) for t in (delta, B, C) for number, stride in zip(_STRIDES, t.stride()[:3], strict=True)),
    )


def selective_scan(
    scan: ScanInputs, save_states: bool, gate: Tensor | None, kept: Tensor | None = None, norm: Norm | None = None
) -> Tensors:
    """See `arm_zoo.ops.selective_scan`: its output and the saved states; `kept` gets the output before the gate."""
    directions, batch, length, channels = scan.shape
    macros = _projection(scan.delta, scan.delta_weight, scan.u.dtype)
    if not macros["RANK"]:
        scan = scan.with_whole_steps()
    if not _fits(scan):
        return triton_scan.selective_scan(scan, save_states, gate, kept, norm)
    check_length(length, channels)
    u, weight = _rows(scan.u), scan.delta_weight
    delta, weight = (_rows(scan.delta), None) if weight is None else (scan.delta, aligned(weight.to(u.dtype)))
    y, kept = sequences_for(scan, kept)
    states = empty_states(u, scan.A, state_dtype(u.dtype, half=True), save=save_states)
    scan = scan._replace(u=u, delta=delta, B=inner(scan.B), C=inner(scan.C))
    in_pairs = _are_aligned(2, channels, u, *([] if macros["RANK"] else [delta]))
    pairs = _pairs_of_lanes(scan, macros["RANK"])
    warps = directions * batch * -(-channels // (_CHANNELS * pairs))
    team = macros["TEAM"] if macros["RANK"] else _PARTS_OF_A_BLOCK
    limits = _limits(u.device.index)
    # two pairs are for sequences that fill the GPU as they are
    lanes, parts = (1, 1) if pairs == 2 else forward_split(warps, length, scan.A.shape[-1], team, *limits)
    team = team if parts > 1 else macros["TEAM"]
    to_tokens = scan.A.shape[-1] > 1 and stores_by_token(scan)  # of one state the rows of y are always those of u
    at_once = next(number for number in (4, 2, 1) if _are_aligned(number, scan.A.shape[-1], scan.B, scan.C))
    macros |= {"TO_TOKENS": int(to_tokens), "VEC": int(in_pairs), "PAIRS": pairs, "SAVE": int(save_states)}
    macros |= {"BC_AT_ONCE": at_once}
    macros |= {"LANES": lanes, "TEAM": team, "PARTS": parts, "CLUSTER": max(parts // team, 1)}
    order = scan.order if to_tokens else scan.rows  # that the kernel asks
    others = weight, order, y, states
    images = team if parts == 1 else 1
    steps = scan._replace(order=order)
    _launch("forward", steps, others, images, _CHANNELS * pairs // lanes, 32 * team, **macros)
    return merge(y, None if to_tokens else scan.order_of_outputs, scan.share, gate, kept=kept, norm=norm), states


def selective_scan_backward(grad: Tensor, scan: ScanInputs, saved: Tensor) -> Tensors:
    """Gradients of u, whole delta, A, B, C, D and delta_bias, given the output's (B, L, D) and the saved states."""
    if not _fits(scan, grad):
        return triton_scan.selective_scan_backward(grad, scan, saved)
    scan = scan._replace(u=_rows(scan.u), delta=_rows(scan.delta), B=inner(scan.B), C=inner(scan.C))
    directions, batch, length, channels = scan.shape
    blocks = -(-channels // _CHANNELS)
    parts = backward_split(directions * batch * blocks, length, scan.A.shape[-1], *_limits(scan.u.device.index))
    gradients = triton_scan.empty_gradients(scan, blocks, parts)
    others = grad.contiguous(), scan.order, saved, *gradients
    _launch("backward", scan, others, 1, _CHANNELS, _CHANNELS, MEAN=int(scan.mean), PARTS=parts, CLUSTER=parts)
    return triton_scan.sum_up(scan, gradients)
