"""The orders of patches of which an image keeps only some."""

from collections.abc import Sequence

import pytest
import torch

from arm_zoo.layers.order import scan_order, visible_order
from arm_zoo.models.arm import DIRECTIONS


def by_hand(kept: Sequence[int], height: int, width: int, name: str, cls_index: int | None) -> list[int]:
    """Places of the kept patches, sorted by row or column, then the class token put in, then perhaps turned round."""
    steps = {patch: patch if name.startswith("row") else patch % width * height + patch // width for patch in kept}
    order = sorted(range(len(kept)), key=lambda place: steps[kept[place]])
    if cls_index is not None:
        order = [place + (place >= cls_index) for place in order]
        order.insert(cls_index, cls_index)
    return order[::-1] if name.endswith("_reversed") else order


@pytest.mark.parametrize("cls_index", [None, 0, 2, 5])
def test_every_image_has_its_own(cls_index: int | None) -> None:
    kept = torch.rand(6, 12).argsort(dim=1)[:, :5].sort(dim=1).values
    tables = visible_order(kept, 3, 4, DIRECTIONS, cls_index)
    assert tables.shape == (6, 4, 5 + (cls_index is not None)) and tables.dtype == torch.long
    for numbers, table in zip(kept.tolist(), tables.tolist(), strict=True):
        assert table == [by_hand(numbers, 3, 4, name, cls_index) for name in DIRECTIONS]
    assert len(tables[:, 2].unique(dim=0)) > 1


@pytest.mark.parametrize("cls_index", [None, 0, 6, 12])
def test_all_patches_have_the_order_of_the_grid(cls_index: int | None) -> None:
    table = visible_order(torch.arange(12)[None], 4, 3, DIRECTIONS, cls_index)
    assert torch.equal(table[0], scan_order(4, 3, DIRECTIONS, cls_index))


def test_a_single_patch() -> None:
    assert visible_order(torch.tensor([[7], [0]]), 3, 4, DIRECTIONS).tolist() == [[[0]] * 4] * 2
