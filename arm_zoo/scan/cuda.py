"""The `cuda` backend: Triton's convolution and merge, with the scans in CUDA C++.

NVIDIA's package cuda.core compiles `forward.cu` and `backward.cu` on first use through the NVRTC library that torch
brings.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

from arm_zoo.scan import triton
from arm_zoo.scan.reference import aligned, inner, project
from arm_zoo.scan.triton import (
    CHUNK,
    causal_conv,
    causal_conv_backward,
    check_length,
    gate_backward,
    merge,
    sequences_for,
    state_dtype,
    sum_up,
)

__all__ = [
    "CHUNK",
    "causal_conv",
    "causal_conv_backward",
    "gate_backward",
    "selective_scan",
    "selective_scan_backward",
    "state_dtype",
]

_SOURCES = Path(__file__).parent
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHANNELS = 64  # of a block: one warp in the forward scan, two in the backward scan
_STATES = (4, 8, 16)  # other numbers, and sequences of different types, take Triton's kernels
_STRIDES = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)  # of directions, pictures and steps


class _Stream:
    """A stream of torch, as cuda.core takes streams of others."""

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


def _fits(d_state: int, u: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the CUDA kernels take these: some numbers of states, and one type."""
    return d_state in _STATES and all(t.dtype == u.dtype for t in others) and u.numel() > 0


def _pairs_are_aligned(channels: int, *sequences: torch.Tensor) -> bool:
    """Whether two adjacent channels can be read at once everywhere."""
    strides = [stride for sequence in sequences for stride in sequence.stride()[:-1]]
    aligned = all(sequence.data_ptr() % (2 * sequence.element_size()) == 0 for sequence in sequences)
    return aligned and not any(size % 2 for size in (channels, *strides))


def _rows(sequences: torch.Tensor) -> torch.Tensor:
    """The tensor itself if the steps of each sequence adjoin in memory, else a copy where they do."""
    return sequences if sequences.stride()[2:] == (sequences.shape[-1], 1) else sequences.contiguous()


def _projection(delta: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> dict[str, int]:
    """The forward kernel's macros for step sizes of low rank, RANK 0 where they must be whole."""
    rank, size = delta.shape[-1], delta.element_size()
    # two lanes copy a row, in the largest pieces that keep everything aligned
    numbers = (rank * size // 2, delta.data_ptr(), *(stride * size for stride in delta.stride()[:-1]))
    piece = next((piece for piece in (16, 8, 4) if not any(number % piece for number in numbers)), 0)
    fits = dtype != torch.float32 and delta.dtype == dtype and delta.stride(-1) == 1 and rank <= 128
    if weight is None or not fits or not piece:
        return {"RANK": 0, "PICTURES": 1}
    return {"RANK": rank, "PIECE": piece, "PICTURES": 4 if rank <= 64 else 2}  # what fits 48 KB of shared memory


def _launch(
    pass_name: str,
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    A: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None,
    others: tuple[torch.Tensor | None, ...],
    pictures: int,
    threads: int,
    **macros: int,
) -> None:
    """Start a kernel on the current stream: `sequences` are u, delta, B and C with channels or states side by side.

    A block of so many threads takes so many pictures, _CHANNELS of their channels.
    """
    u, delta, B, C = sequences
    directions, batch, length, channels = u.shape
    kernel = _kernel(
        u.device.index,
        pass_name,
        DTYPE=_DTYPES[u.dtype],
        S=A.shape[-1],
        CHUNK=CHUNK,
        CHANNELS=channels,
        HAS_BIAS=int(delta_bias is not None),
        **macros,
    )
    rates, skip = aligned(A.float().transpose(1, 2)), aligned(D.float())
    bias = None if delta_bias is None else aligned(delta_bias.float())
    tensors = (u, delta, rates, B, C, skip, bias, *others)
    Device(u.device.index).set_current()  # autograd's threads begin without one
    launch(
        _stream(u.device.index, torch.cuda.current_stream(u.device).cuda_stream),
        _config(grid=-(-channels // _CHANNELS) * directions * -(-batch // pictures), block=threads),
        kernel,
        *(ctypes.c_int64(0 if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int32(size) for size in (directions, batch, length)),
        *(ctypes.c_int64(stride) for stride in u.stride()[:2]),
        *(number(stride) for t in (delta, B, C) for number, stride in zip(_STRIDES, t.stride()[:3], strict=True)),
    )


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
    directions, batch, length, channels = u.shape
    d_state = A.shape[-1]
    projection = _projection(delta, delta_weight, u.dtype)
    if not projection["RANK"]:
        delta, delta_weight = project(delta, delta_weight), None
    if not _fits(d_state, u, delta, B, C):
        inputs = (u, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, order)
        return triton.selective_scan(*inputs, save_states, gate, kept)
    check_length(length, channels)
    u = _rows(u)
    delta, weight = (_rows(delta), None) if delta_weight is None else (delta, aligned(delta_weight.to(u.dtype)))
    B, C = inner(B), inner(C)
    y, kept = sequences_for(u, order, kept)
    chunks = -(-length // CHUNK) if save_states else 0
    states = u.new_empty(directions, batch, chunks, d_state, channels, dtype=state_dtype(u.dtype))
    _launch(
        "forward",
        (u, delta, B, C),
        A,
        D,
        delta_bias,
        (weight, y, states),
        projection["PICTURES"],
        32 * projection["PICTURES"],
        VEC=int(_pairs_are_aligned(channels, u, *([] if projection["RANK"] else [delta]))),
        SOFTPLUS=int(delta_softplus),
        SAVE=int(save_states),
        **projection,
    )
    return merge(y, order, 1 / directions, gate, kept=kept), states


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
    d_state = A.shape[-1]
    if not _fits(d_state, u, delta, B, C, grad):
        inputs = (u, delta, A, B, C, D, delta_bias, delta_softplus, order, saved)
        return triton.selective_scan_backward(grad, *inputs)
    u, delta = _rows(u), _rows(delta)
    B, C = inner(B), inner(C)
    grad = grad.contiguous()
    grad_u, grad_delta = (t.new_empty(t.shape) for t in (u, delta))
    blocks = -(-channels // _CHANNELS)
    shares = A.new_empty(blocks, directions, batch, length, 2 * d_state, dtype=state_dtype(u.dtype))
    grad_A = A.new_empty(directions, batch, d_state, channels, dtype=torch.float32)
    grad_D, grad_bias = (grad_A.new_empty(directions, batch, channels) for _ in range(2))
    _launch(
        "backward",
        (u, delta, B, C),
        A,
        D,
        delta_bias,
        (grad, order, saved, grad_u, grad_delta, shares, grad_A, grad_D, grad_bias),
        1,
        _CHANNELS,
        SOFTPLUS=int(delta_softplus),
        HAS_ORDER=int(order is not None),
    )
    return grad_u, grad_delta, *sum_up(grad_A, grad_D, grad_bias, shares, B, C)
