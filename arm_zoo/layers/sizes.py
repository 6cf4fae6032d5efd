"""Sizes of models: checks and rounding."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import to_2tuple

Device = torch.device | str | None
Pair = tuple[int, int]
Size = int | Pair  # a square's side, or (height, width)


def check_positive(model: str, sizes: Mapping[str, Any]) -> None:
    """Refuse sizes below 1, alone or in a pair; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and min(to_2tuple(size)) < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {size}")


def one_or_two(size: Any) -> int | Pair:
    """A pair as one number where both are the same."""
    height, width = map(int, size)
    return height if height == width else (height, width)


def nearest_multiple(size: int, unit: int) -> int:
    """The multiple of `unit` nearest to `size`, at least one unit."""
    return max(1, (2 * size + unit) // (2 * unit)) * unit
