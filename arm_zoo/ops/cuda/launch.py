"""The `cuda` backend: Triton's convolution and merge, with the scans in CUDA C++, which cuda.core compiles."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch
from torch import Tensor

from arm_zoo.ops.layout import CHUNK, Norm, ScanInputs, Tensors, aligned, empty_states, inner, state_dtype
from arm_zoo.ops.triton import causal_conv, causal_conv_backward, gate_backward
from arm_zoo.ops.triton import scan as triton_scan
from arm_zoo.ops.triton.common import check_length, order_step
from arm_zoo.ops.triton.merge import merge, sequences_for

__all__ = ["causal_conv", "causal_conv_backward", "gate_backward", "selective_scan", "selective_scan_backward"]

_SOURCES = Path(__file__).parent
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHANNELS = 64  # of a block: one warp in the forward scan (or twice as many), two in the backward scan
_WARPS_OF_WIDE_LANES = 12  # a multiprocessor: fewer would wait for each other's memory
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
    files = [_SOURCES / "common.cuh", _SOURCES / f"{pass_name}.cu"]
    defines = [f"#define {name} {value}" for name, value in macros.items()]
    code = "\n".join([*defines, *(file.read_text(encoding="utf-8") for file in files)])
    options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
    return Program(code, "c++", options).compile("cubin").get_kernel(f"scan_{pass_name}")


def _fits(scan: ScanInputs, *others: Tensor) -> bool:
    """Whether the CUDA kernels take these: some numbers of states, and one type."""
    sequences = (scan.delta, scan.B, scan.C, *others)
    return scan.A.shape[-1] in _STATES and all(t.dtype == scan.u.dtype for t in sequences) and scan.u.numel() > 0


def _are_aligned(group: int, channels: int, *sequences: Tensor) -> bool:
    """Whether so many adjacent channels can be read at once."""
    strides = [stride for sequence in sequences for stride in sequence.stride()[:-1]]
    aligned = all(sequence.data_ptr() % (group * sequence.element_size()) == 0 for sequence in sequences)
    return aligned and not any(size % group for size in (channels, *strides))


def _pairs_of_lanes(scan: ScanInputs, rank: int) -> int:
    """Pairs of channels that a lane of the forward kernel takes: two of a single state, if enough warps are left."""
    directions, batch, _, channels = scan.shape
    fits = scan.A.shape[-1] == 1 and 0 < rank <= 48 and _are_aligned(4, channels, scan.u)  # 48 KB of shared memory
    if not fits:
        return 1
    processors = torch.cuda.get_device_properties(scan.u.device).multi_processor_count
    return 2 if directions * batch * channels >= 2 * _CHANNELS * _WARPS_OF_WIDE_LANES * processors else 1


def _rows(sequences: Tensor) -> Tensor:
    """The tensor itself if the steps of each sequence adjoin in memory, else a copy where they do."""
    return sequences if sequences.stride()[-2:] == (sequences.shape[-1], 1) else sequences.contiguous()


def _projection(delta: Tensor, weight: Tensor | None, dtype: torch.dtype) -> dict[str, int]:
    """The forward kernel's macros for step sizes of low rank, RANK 0 where they must be whole."""
    rank, size = delta.shape[-1], delta.element_size()
    # two lanes copy a row, in the largest pieces that keep everything aligned
    numbers = (rank * size // 2, delta.data_ptr(), *(stride * size for stride in delta.stride()[:-1]))
    piece = next((piece for piece in (16, 8, 4) if not any(number % piece for number in numbers)), 0)
    fits = dtype != torch.float32 and delta.dtype == dtype and delta.stride(-1) == 1 and rank <= 128
    if weight is None or not fits or not piece:
        return {"RANK": 0, "IMAGES": 1}
    return {"RANK": rank, "PIECE": piece, "IMAGES": 4 if rank <= 64 else 2}  # what fits 48 KB of shared memory


def _launch(
    pass_name: str, scan: ScanInputs, others: tuple[Tensor | None, ...], images: int, width: int, threads: int,
    **macros: int,
) -> None:  # fmt: skip
    """Start a kernel on the current stream: a block of so many threads takes `width` channels of so many images."""
    u, delta, A, B, C, D, delta_bias, *_ = scan
    u = u.expand(scan.shape)
    directions, batch, length, channels = scan.shape
    macros |= {"HAS_ORDER": int(scan.order is not None), "TOKENS": int(scan.rows is not None)}
    macros |= {"PER_IMAGE": int(order_step(scan.order) > 0)}
    macros |= {"DTYPE": _DTYPES[u.dtype], "S": A.shape[-1], "CHUNK": CHUNK, "CHANNELS": channels}
    macros |= {"HAS_BIAS": int(delta_bias is not None), "SOFTPLUS": int(scan.delta_softplus)}
    kernel = _kernel(u.device.index, pass_name, **macros)
    rates, skip = aligned(A.float().transpose(1, 2)), aligned(D.float())
    bias = None if delta_bias is None else aligned(delta_bias.float())
    tensors = (u, delta, rates, B, C, skip, bias, *others)
    Device(u.device.index).set_current()  # autograd's threads begin without one
    launch(
        _stream(u.device.index, torch.cuda.current_stream(u.device).cuda_stream),
        _config(grid=-(-channels // width) * directions * -(-batch // images), block=threads),
        kernel,
        *(ctypes.c_int64(0 if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int32(size) for size in (directions, batch, length)),
        *(ctypes.c_int64(stride) for stride in u.stride()[:2]),
        *(number(stride) for t in (delta, B, C) for number, stride in zip(_STRIDES, t.stride()[:3], strict=True)),
    )


def selective_scan(
    scan: ScanInputs, save_states: bool, gate: Tensor | None, kept: Tensor | None = None, norm: Norm | None = None
) -> Tensors:
    """See `arm_zoo.ops.selective_scan`: its output and the saved states; what a gate multiplies goes to `kept`."""
    length, channels = scan.shape[2:]
    projection = _projection(scan.delta, scan.delta_weight, scan.u.dtype)
    if not projection["RANK"]:
        scan = scan.with_whole_steps()
    if not _fits(scan):
        return triton_scan.selective_scan(scan, save_states, gate, kept, norm)
    check_length(length, channels)
    u, weight = _rows(scan.u), scan.delta_weight
    delta, weight = (_rows(scan.delta), None) if weight is None else (scan.delta, aligned(weight.to(u.dtype)))
    y, kept = sequences_for(scan, kept)
    states = empty_states(u, scan.A, state_dtype(u.dtype, half=True), save=save_states)
    scan = scan._replace(u=u, delta=delta, B=inner(scan.B), C=inner(scan.C))
    in_pairs = _are_aligned(2, channels, u, *([] if projection["RANK"] else [delta]))
    pairs = _pairs_of_lanes(scan, projection["RANK"])
    projection |= {"VEC": int(in_pairs), "PAIRS": pairs, "SAVE": int(save_states)}
    others = weight, scan.rows, y, states
    steps = scan._replace(order=scan.rows)  # the kernel asks it for rows alone
    images = projection["IMAGES"]
    _launch("forward", steps, others, images, _CHANNELS * pairs, 32 * images, **projection)
    return merge(y, scan.order_of_outputs, scan.share, gate, kept=kept, norm=norm), states


def selective_scan_backward(grad: Tensor, scan: ScanInputs, saved: Tensor) -> Tensors:
    """Gradients of u, whole delta, A, B, C, D and delta_bias, given the output's (B, L, D) and the saved states."""
    if not _fits(scan, grad):
        return triton_scan.selective_scan_backward(grad, scan, saved)
    scan = scan._replace(u=_rows(scan.u), delta=_rows(scan.delta), B=inner(scan.B), C=inner(scan.C))
    gradients = triton_scan.empty_gradients(scan, -(-scan.u.shape[-1] // _CHANNELS))
    others = grad.contiguous(), scan.order, saved, *gradients
    _launch("backward", scan, others, 1, _CHANNELS, _CHANNELS, MEAN=int(scan.mean))
    return triton_scan.sum_up(scan, gradients)
