"""What several kernels use."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from arm_zoo.ops.layout import is_per_image

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_CHANNELS = 128  # of a program of the convolution and of the merge
_MOST_SEQUENCES = 65_535  # of one launch: the limit of a grid's second and third axis


@triton.jit
def sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2E))  # squared it costs two instructions, a division five
    return root * root


def order_step(order: Tensor | None) -> int:
    """The distance in memory from one image's table of orders to the next one's; 0 where one serves all."""
    return order.stride(0) if is_per_image(order) else 0


def processors(x: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; the interpreter's is one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def check_length(length: int, channels: int) -> None:
    """Raises ValueError for sequences too long for offsets of 32 bits, also into states and gradients of B and C."""
    if length * max(4 * channels, 128) >= 2**31:
        raise ValueError(
            f"the GPU kernels take sequences of less than 2**29 numbers and 2**24 steps, got {length:,} steps of "
            f"{channels:,} channels; use set_scan_backend('torch')"
        )


def check_number(directions: int, batch: int) -> None:
    if directions * batch > _MOST_SEQUENCES:
        raise ValueError(
            f"the GPU kernels take up to {_MOST_SEQUENCES:,} sequences at a time, got {directions * batch:,} "
            f"({directions} directions of {batch:,} images); use smaller batches, or set_scan_backend('torch')"
        )
