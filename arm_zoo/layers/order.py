"""Token orders as index tables: which token a scan visits at each step (paper, section 3.2.2 and figure 4)."""

import torch
from torch import Tensor

from arm_zoo.layers.sizes import Device

DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")


def scan_order(
    height: int, width: int, directions: int = 4, cls_index: int | None = None, device: Device = None
) -> Tensor:
    """Visiting orders of a `height` x `width` patch grid for the first `directions` entries of `DIRECTIONS`.

    Tokens are numbered in storage order: patches row by row, with one class token at `cls_index` if it is given. Every
    direction keeps it at that position counted from its own start (row, column) or end (the reversed ones), as the
    official code does when it takes the token out, transposes the patches and puts it back. Entry [k, t] of the int64
    table (directions, length) is the token that direction k visits at step t.
    """
    if directions not in (1, 2, 4):
        raise ValueError(f"directions must be 1, 2 or 4 (the first of {DIRECTIONS}), got {directions}")
    patches = height * width
    if cls_index is not None and not 0 <= cls_index <= patches:
        raise ValueError(f"cls_index must lie in 0..{patches} for a {height}x{width} grid, got {cls_index}")
    rows = torch.arange(patches, device=device)
    columns = rows.reshape(height, width).t().flatten()
    if cls_index is not None:
        rows, columns = (_insert_class_token(order, cls_index) for order in (rows, columns))
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)][:directions])


def _insert_class_token(patch_order: Tensor, cls_index: int) -> Tensor:
    """Renumber patches around a class token stored at `cls_index` and visit it at that same step."""
    shifted = patch_order + (patch_order >= cls_index)
    cls_token = shifted.new_full((1,), cls_index)
    return torch.cat([shifted[:cls_index], cls_token, shifted[cls_index:]])


def cluster_order(height: int, width: int, cluster_height: int, cluster_width: int, device: Device = None) -> Tensor:
    """Patches of a `height` x `width` grid regrouped into clusters, clusters and the patches inside both row by row.

    Every cluster is then a contiguous run of tokens: predicting the next one is a shift by one run, and causality
    between clusters follows from the causal scan. The int64 table (height * width,) has numbers of patches.
    """
    if height % cluster_height or width % cluster_width:
        raise ValueError(f"clusters of {cluster_height}x{cluster_width} patches do not tile a {height}x{width} grid")
    grid = torch.arange(height * width, device=device)
    grid = grid.reshape(height // cluster_height, cluster_height, width // cluster_width, cluster_width)
    return grid.transpose(1, 2).flatten()
