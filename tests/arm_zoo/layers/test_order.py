"""The orders in which scans visit tokens, by hand and as the authors': of whole grids, clusters and kept patches."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from arm_zoo.layers import order
from arm_zoo.layers.order import cluster_order, scan_order, visible_order
from arm_zoo.models import arm
from arm_zoo.models.arm import DIRECTIONS


@pytest.mark.parametrize(
    "cls_index, row, column",
    [
        (None, [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5]),
        (0, [0, 1, 2, 3, 4, 5, 6], [0, 1, 4, 2, 5, 3, 6]),
        (3, [0, 1, 2, 3, 4, 5, 6], [0, 4, 1, 3, 5, 2, 6]),  # patches 0, 3, 1, class token 3, patches 4, 2, 5
        (6, [0, 1, 2, 3, 4, 5, 6], [0, 3, 1, 4, 2, 5, 6]),
    ],
)
def test_orders_of_a_2x3_grid(cls_index: int | None, row: list[int], column: list[int]) -> None:
    expected = [row, row[::-1], column, column[::-1]]
    assert scan_order(2, 3, DIRECTIONS, cls_index).tolist() == expected
    assert scan_order(2, 3, DIRECTIONS[:2], cls_index).tolist() == expected[:2]
    assert scan_order(2, 3, DIRECTIONS[:1], cls_index).tolist() == expected[:1]


@pytest.mark.parametrize("height, width, column", [(3, 1, [0, 1, 2, 3]), (3, 2, [0, 2, 5, 3, 1, 4, 6])])
def test_column_order_of_tall_grids(height: int, width: int, column: list[int]) -> None:
    cls_index = height * width // 2
    assert scan_order(height, width, DIRECTIONS, cls_index)[2].tolist() == column


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (4, 1), (3, 5), (6, 2), (5, 5)])
@pytest.mark.parametrize("where", ["absent", "start", "middle", "end"])
def test_every_direction_visits_every_token_once(height: int, width: int, where: str) -> None:
    patches = height * width
    cls_index = {"absent": None, "start": 0, "middle": patches // 2, "end": patches}[where]
    order = scan_order(height, width, DIRECTIONS, cls_index)
    tokens = torch.arange(patches + (cls_index is not None))
    assert order.sort(dim=1).values.equal(tokens.expand(4, -1))
    if cls_index is not None:  # counted from the direction's own start, or from its own end
        assert order[0, cls_index] == order[2, cls_index] == cls_index
        assert order[1, -1 - cls_index] == order[3, -1 - cls_index] == cls_index


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 14])
def test_column_order_equals_the_official_one_with_its_wrong_class_token(side: int) -> None:
    """For odd grids the authors' mixer pulls out the centre patch instead; that is a fixed point of the transpose."""
    patches = side * side
    tokens = torch.arange(patches + 1)
    taken_out = len(tokens) // 2
    others = torch.cat([tokens[:taken_out], tokens[taken_out + 1 :]])
    others = others.reshape(side, side).t().flatten()
    official = torch.cat([others[:taken_out], tokens[taken_out, None], others[taken_out:]])
    assert scan_order(side, side, DIRECTIONS, cls_index=patches // 2)[2].equal(official)


def test_a_new_order_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def snake(grid: torch.Tensor) -> torch.Tensor:
        return torch.cat([row.flip(0) if i % 2 else row for i, row in enumerate(grid)])

    monkeypatch.setitem(order.ORDERS, "snake", snake)
    assert scan_order(2, 3, ["snake", "snake_reversed"]).tolist() == [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0]]
    assert scan_order(2, 3, ["snake", "row"], 3).tolist() == [[0, 1, 2, 3, 6, 5, 4], [0, 1, 2, 3, 4, 5, 6]]
    monkeypatch.setattr(arm.ARM, "directions", ["snake", "snake_reversed", "column"])
    model = timm.create_model("arm_pico_patch2_8")
    assert model.order.shape == (3, 17) and len(model.blocks[0].mixer.D) == 3
    assert model(torch.randn(1, 1, 8, 8)).isfinite().all()


def test_cluster_order_is_the_official_one(golden: Path) -> None:
    tables = load_file(golden / "arm_pretrain_d12" / "order_and_mask.safetensors")
    order = cluster_order(12, 12, 4, 4)
    assert order.view(9, 16).equal(tables["cluster_patch_index"])
    assert order[:-16].equal(tables["encoder_patch_index"])
    assert order[16:].equal(tables["target_patch_index"])


def test_cluster_order_of_other_shapes() -> None:
    assert cluster_order(2, 4, 2, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert cluster_order(4, 2, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert cluster_order(3, 2, 1, 1).tolist() == list(range(6))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: scan_order(2, 3, ["row", "rows"]),
            r"no scan order 'rows'; there are row, column, and each with '_reversed'",
        ),
        (lambda: scan_order(2, 3, DIRECTIONS, 7), r"cls_index must lie in 0\.\.6 for a 2x3 grid, got 7"),
        (lambda: scan_order(2, 3, DIRECTIONS, -1), r"cls_index must lie in 0\.\.6 for a 2x3 grid, got -1"),
        (lambda: cluster_order(6, 6, 4, 3), r"clusters of 4x3 patches do not tile a 6x6 grid"),
    ],
)
def test_orders_refuse(call: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------- of kept patches


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
