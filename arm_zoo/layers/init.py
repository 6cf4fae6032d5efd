"""How parameters get their first values."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from arm_zoo.layers.sizes import Device
from arm_zoo.ops.fused import is_plain


def zero_bias(layer: nn.Linear | nn.Conv2d) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter of the same shape, which may be sharded over several processes (as by FSDP2)."""
    values = values.to(parameter.dtype)
    if not is_plain(parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import

        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(values)


def step_bias(shape: Sequence[int], device: Device = None) -> Tensor:
    """Inverse softplus, in float32, of step sizes between 0.001 and 0.1 whose logarithms are uniform, as in Mamba."""
    step = torch.empty(*shape, dtype=torch.float32, device=device).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    step.clamp_(min=1e-4)
    return step + torch.log(-torch.expm1(-step))
