"""SwiGLU's gated product by the package quack-kernels, whose CuTe kernels for Hopper GPUs are faster than Triton's."""

from quack.gemm_interface import gemm_act
from torch import Tensor

from arm_zoo.ops.layout import aligned


def gated_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `gated_product` of `arm_zoo.ops.triton.gates`.

    The kernel takes rows of gates and values in turn, so weight and bias are brought into that order first, which
    takes a sixteenth of the time at full batches.
    """
    weight, bias = (t.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for t in (weight, bias))
    tokens = aligned(x.flatten(0, -2))
    _, out = gemm_act(tokens, weight.T, bias=bias, activation="swiglu", store_preact=False, tuned=False)
    return out.view(*x.shape[:-1], -1)
