"""The first half of a SwiGLU as one GPU kernel: the product with both halves of fc1, then SiLU and gate.

What fc1 makes is not written to memory and read again, which takes almost half as long as its product. One program a
multiprocessor goes from tile to tile; the tensor memory accelerator of Hopper GPUs reads and writes them.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from arm_zoo.scan.reference import aligned

__all__ = ["gated_product"]

_ROWS, _CHANNELS, _INNER = 128, 128, 64  # of a tile: of the result, twice as many channels of the product, of the sum
_GROUP = 16  # tiles of rows that take turns with the same channels, so that the weight stays in L2


@triton.jit
def _gated_product_kernel(
    x, weight, bias, out, rows, channels, inner,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    tall, wide = tl.cdiv(rows, ROWS), tl.cdiv(channels, CHANNELS)
    for tile in range(tl.program_id(0), tall * wide, PROGRAMS):
        first = tile // (GROUP * wide) * GROUP
        height = min(tall - first, GROUP)
        row = (first + tile % (GROUP * wide) % height) * ROWS
        channel = tile % (GROUP * wide) // height * CHANNELS
        gate = tl.zeros([ROWS, CHANNELS], tl.float32)
        value = tl.zeros([ROWS, CHANNELS], tl.float32)
        for k in range(0, inner, INNER):
            tokens = x.load([row, k])
            gate = tl.dot(tokens, weight.load([channel, k]).T, gate)
            value = tl.dot(tokens, weight.load([channels + channel, k]).T, value)
        d = channel + tl.arange(0, CHANNELS)
        gate += tl.load(bias + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
        value += tl.load(bias + channels + d, mask=d < channels, other=0.0).to(tl.float32)[None, :]
        y = gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * value
        out.store([row, channel], y.to(out.dtype))


def gated_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * value of (gate, value) = x weight^T + bias: (..., D), (2 N, D), (2 N) -> (..., N).

    All of one type; sums, SiLU and product in float32. Rows must have multiples of 16 bytes.
    """
    tokens, weight = aligned(x.flatten(0, -2)), aligned(weight)
    (rows, inner), channels = tokens.shape, len(weight) // 2
    out = tokens.new_empty(rows, channels)
    tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(channels, _CHANNELS)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(processors, tiles)
    _gated_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(tokens, [_ROWS, _INNER]),
        TensorDescriptor.from_tensor(weight, [_CHANNELS, _INNER]),
        bias.contiguous(), TensorDescriptor.from_tensor(out, [_ROWS, _CHANNELS]), rows, channels, inner,
        ROWS=_ROWS, CHANNELS=_CHANNELS, INNER=_INNER, GROUP=_GROUP, PROGRAMS=programs, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out.view(*x.shape[:-1], channels)
