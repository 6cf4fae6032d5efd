"""How parameters get their first values."""

import torch
from torch import Tensor, nn

from arm_zoo.ops.fused import is_plain


def zero_bias(layer: nn.Linear | nn.Conv2d) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter of the same shape, of which this process may hold a part (FSDP2 and its like)."""
    values = values.to(parameter.dtype)
    if not is_plain(parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import

        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(values)
