"""A family that somebody might add: blocks of its own around the stock mixer, and no paper."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from arm_zoo.layers.mixer import MambaMixer
from arm_zoo.models._builder import ARCHITECTURES, entry_configs, register_family
from arm_zoo.models._sequence import SequenceBackbone

TOY = "toy_patch4_16"
DIRECTIONS = ["row", "row_reversed"]


class Sandwich(nn.Module):
    """A norm before the mixer and one after it."""

    def __init__(
        self,
        dim: int,
        directions: int,
        d_state: int,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.before, self.after = (norm_layer(dim, device=device, dtype=dtype) for _ in range(2))
        self.scan = MambaMixer(dim, directions, d_state=d_state, device=device, dtype=dtype)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        return x + self.after(self.scan(self.before(x), order))


class Toy(SequenceBackbone):
    directions = DIRECTIONS
    block_class = Sandwich
    keys = ("patch_embed.proj.weight", "pos_embed", "blocks.*.scan.A_log")


default_cfgs = entry_configs({f"{TOY}.untrained": {"num_classes": 10, "input_size": (3, 16, 16)}})
register_family(Toy, {TOY: {"patch_size": 4, "embed_dim": 16, "depth": 4, "d_state": 2}}, {})
ARCHITECTURE = ARCHITECTURES.pop(TOY)  # which the fixture `toy` puts back for tests that ask for it
