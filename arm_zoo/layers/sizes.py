"""Sizes of models: checks and rounding."""

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

import torch
from timm.layers import to_2tuple

Device = torch.device | str | None
Pair = tuple[int, int]
Size = int | Pair  # a square's side, or (height, width)


_IN_PAIRS = {"img_size", "patch_size", "patch_stride", "cluster_size"}  # sizes that have a height and a width


def check_positive(model: str, sizes: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Refuse sizes that are no whole numbers, or below 1; those that are `optional` may be None."""
    for name, size in sizes.items():
        if size is None and name in optional:
            continue
        sides = to_2tuple(size) if name in _IN_PAIRS else (size, size)
        if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
            words = "a whole number, or (height, width)" if name in _IN_PAIRS else "a whole number"
            raise ValueError(f"{model}: {name} must be {words}, got {size!r}")
        if min(sides) < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {size}")


def one_or_two(size: Any) -> int | Pair:
    """A pair as one number where both are the same."""
    height, width = map(int, size)
    return height if height == width else (height, width)


def nearest_multiple(size: int, unit: int) -> int:
    """The multiple of `unit` nearest to `size`, at least one unit."""
    return max(1, (2 * size + unit) // (2 * unit)) * unit
