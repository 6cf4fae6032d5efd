"""The `cuda` backend: Triton's kernels, with the backward scan in CUDA C++, which takes three fifths of the time.

NVIDIA's package cuda.core compiles `backward.cu` on first use through the NVRTC library that torch brings.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

from arm_zoo.scan import triton
from arm_zoo.scan.triton import CHUNK, causal_conv, causal_conv_backward, selective_scan

__all__ = ["CHUNK", "causal_conv", "causal_conv_backward", "selective_scan", "selective_scan_backward"]

_SOURCE = Path(__file__).with_name("backward.cu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHANNELS = 64  # of a program
_STATES = (4, 8, 16)  # other numbers, and sequences of different types, take Triton's kernel


class _Stream:
    """torch's current stream, as cuda.core takes streams of others."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@functools.cache
def _kernel(device: int, **macros: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    code = "".join(f"#define {name} {value}\n" for name, value in macros.items()) + _SOURCE.read_text(encoding="utf-8")
    options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
    return Program(code, "c++", options).compile("cubin").get_kernel("scan_backward")


def _pairs_are_aligned(channels: int, *sequences: torch.Tensor) -> bool:
    """Whether two adjacent channels can be read at once everywhere."""
    strides = [stride for sequence in sequences for stride in sequence.stride()[:-1]]
    aligned = all(sequence.data_ptr() % (2 * sequence.element_size()) == 0 for sequence in sequences)
    return aligned and not any(size % 2 for size in (channels, *strides))


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
    of_one_type = all(t.dtype == u.dtype for t in (grad, delta, B, C))
    if d_state not in _STATES or not of_one_type or not u.numel():
        inputs = (u, delta, A, B, C, D, delta_bias, delta_softplus, order, saved)
        return triton.selective_scan_backward(grad, *inputs)
    u, delta, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (u, delta, B, C))
    grad = (grad / directions).contiguous()
    kernel = _kernel(
        u.device.index,
        DTYPE=_DTYPES[u.dtype],
        S=d_state,
        CHUNK=CHUNK,
        VEC=int(_pairs_are_aligned(channels, u, delta, grad)),
        HAS_BIAS=int(delta_bias is not None),
        HAS_ORDER=int(order is not None),
        SOFTPLUS=int(delta_softplus),
    )
    blocks = -(-channels // _CHANNELS)
    grad_u, grad_delta = (t.new_empty(t.shape) for t in (u, delta))
    # every block of channels has its share of the gradients of B and C, summed in a fixed order afterwards
    shares = saved.new_empty(blocks, directions, batch, length, 2 * d_state)
    grad_A = saved.new_empty(directions, batch, d_state, channels)
    grad_D, grad_bias = (saved.new_empty(directions, batch, channels) for _ in range(2))
    rates = A.float().transpose(1, 2).contiguous()
    skip = D.float().contiguous()
    bias = None if delta_bias is None else delta_bias.float().contiguous()
    order = None if order is None else order.contiguous()
    tensors = (u, delta, rates, B, C, skip, bias, grad, order, saved,
               grad_u, grad_delta, shares, grad_A, grad_D, grad_bias)  # fmt: skip
    device = Device(u.device.index)
    device.set_current()
    launch(
        device.create_stream(_Stream()),
        LaunchConfig(grid=blocks * directions * batch, block=32),
        kernel,
        *(ctypes.c_int64(0 if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int32(size) for size in (directions, batch, length, channels, blocks)),
        *(ctypes.c_int64(stride) for tensor in (u, delta, B, C) for stride in tensor.stride()[:3]),
    )
    grad_B, grad_C = (t.to(B.dtype, copy=True) for t in shares.sum(0).chunk(2, dim=-1))
    grad_A = grad_A.sum(1).transpose(1, 2).to(A.dtype).contiguous()
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D.sum(1).to(D.dtype), grad_bias.sum(1).to(D.dtype)
