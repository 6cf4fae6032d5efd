"""Sizes and rates of models: checks and rounding."""

from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from timm.layers import to_2tuple

Device = torch.device | str | None
Pair = tuple[int, int]
Size = int | Pair  # a square's side, or (height, width)
_PAIRS = ("img_size", "patch_size", "patch_stride", "cluster_size")  # the sizes that may be a pair


def check_whole(model: str, sizes: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Refuse sizes that are no whole number, nor a pair of them where that is allowed; `optional` ones may be None."""
    for name, size in sizes.items():
        if size is None and name in optional:
            continue
        is_pair = name in _PAIRS and isinstance(size, Iterable) and not isinstance(size, str)
        numbers = tuple(size) if is_pair else (size, size)
        if len(numbers) != 2 or not all(isinstance(number, Integral) for number in numbers):
            pair = " or two, (height, width)" if name in _PAIRS else ""
            raise TypeError(f"{model}: {name} must be a whole number{pair}, got {size!r}")


def check_positive(model: str, sizes: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Refuse sizes that are not whole or below 1, alone or in a pair; `optional` ones may be None."""
    check_whole(model, sizes, optional)
    for name, size in sizes.items():
        if size is not None and min(to_2tuple(size)) < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {size}")


def check_rates(model: str, rates: Mapping[str, Any]) -> None:
    """Refuse rates of dropout and stochastic depth that are no numbers between 0 and 1."""
    for name, rate in rates.items():
        if not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
            raise ValueError(f"{model}: {name} must be a number between 0 and 1, got {rate!r}")


def one_or_two(size: Any) -> int | Pair:
    """A pair as one number where both are the same."""
    height, width = map(int, size)
    return height if height == width else (height, width)


def nearest_multiple(size: int, unit: int) -> int:
    """The multiple of `unit` nearest to `size`, at least one unit."""
    return max(1, (2 * size + unit) // (2 * unit)) * unit
