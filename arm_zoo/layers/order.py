"""Token orders as index tables: which token a scan visits at each step (paper, section 3.2.2 and figure 4)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arm_zoo.layers.sizes import Device

# Name -> function from the indices of patches as they lie, (height, width), to these indices in visiting order. A new
# order is one more row; a name followed by `_reversed` means the way back.
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "row": lambda grid: grid.flatten(),
    "column": lambda grid: grid.t().flatten(),
}


def scan_order(
    height: int, width: int, names: Sequence[str], cls_index: int | None = None, device: Device = None
) -> Tensor:
    """Visiting orders of a `height` x `width` patch grid, one direction for each name: `row`, `row_reversed`, ...

    Tokens are numbered in storage order: patches row by row, with one class token at `cls_index` if it is given. Every
    direction keeps it at that position counted from its own start or, if reversed, its end, as the official code does
    when it takes the token out, transposes the patches and puts it back. Entry [k, t] of the int64 table
    (directions, length) is the token that direction k visits at step t.
    """
    patches, bases = height * width, [name.removesuffix("_reversed") for name in names]
    if unknown := [name for name, base in zip(names, bases, strict=True) if base not in ORDERS]:
        raise ValueError(f"no scan order {unknown[0]!r}; there are {', '.join(ORDERS)}, and each with '_reversed'")
    if cls_index is not None and not 0 <= cls_index <= patches:
        raise ValueError(f"cls_index must lie in 0..{patches} for a {height}x{width} grid, got {cls_index}")
    tokens = torch.arange(patches, device=device)
    if cls_index is not None:
        tokens, cls_token = tokens + (tokens >= cls_index), tokens.new_full((1,), cls_index)
    orders = {base: ORDERS[base](tokens.view(height, width)) for base in dict.fromkeys(bases)}
    if cls_index is not None:
        orders = {base: torch.cat([way[:cls_index], cls_token, way[cls_index:]]) for base, way in orders.items()}
    return torch.stack([orders[b] if b == name else orders[b].flip(0) for name, b in zip(names, bases, strict=True)])


def visible_order(kept: Tensor, height: int, width: int, names: Sequence[str], cls_index: int | None = None) -> Tensor:
    """Visiting orders as of `scan_order` for images of which only some patches are visible, other ones in each image.

    `kept` (B, K) has the indices of the visible patches, ascending. Their tokens are stored in this order, with a
    class token at `cls_index` if it is given. Entry [b, k, t] of the int64 table (B, directions, length) is the token
    of image b that direction k visits at step t.
    """
    bases = [name.removesuffix("_reversed") for name in names]
    whole = scan_order(height, width, bases, device=kept.device)
    steps = whole.argsort(dim=1)  # the step at which each patch comes
    order = steps[:, kept].argsort(dim=-1)  # (directions, B, K)
    if cls_index is not None:
        order, cls_token = order + (order >= cls_index), order.new_full((*order.shape[:2], 1), cls_index)
        order = torch.cat([order[..., :cls_index], cls_token, order[..., cls_index:]], dim=-1)
    ways = zip(order, names, bases, strict=True)
    return torch.stack([way if name == base else way.flip(-1) for way, name, base in ways], dim=1)


def cluster_order(
    height: int, width: int, cluster_height: int, cluster_width: int, name: str = "row", device: Device = None
) -> Tensor:
    """Patches of a `height` x `width` grid regrouped into clusters, in the order `name` of `scan_order`.

    The patches inside a cluster always go row by row. Every cluster is a contiguous run of tokens: predicting the next
    one is a shift by one run, and causality between clusters follows from the causal scan. The int64 table
    (height * width,) has numbers of patches.
    """
    if height % cluster_height or width % cluster_width:
        said = f"clusters of {cluster_height}x{cluster_width} patches do not tile a {height}x{width} grid"
        raise ValueError(f"{said}; its sides must be multiples of theirs")
    rows, columns = height // cluster_height, width // cluster_width
    grid = torch.arange(height * width, device=device).reshape(rows, cluster_height, columns, cluster_width)
    clusters = grid.transpose(1, 2).flatten(2).flatten(0, 1)
    return clusters[scan_order(rows, columns, [name], device=device)[0]].flatten()


def sorted_clusters(order: Tensor, keys: Tensor) -> Tensor:
    """The clusters of a cluster order (length,) sorted by keys (B, clusters) of each image, (B, length)."""
    return order.view(keys.shape[1], -1)[keys.argsort(dim=1)].flatten(1)


def in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, N, dim) in the order (T,), or in each image's own order (B, T); B = 1 serves all images."""
    if order.ndim == 1:
        return tokens[:, order]
    return torch.take_along_dim(tokens, order[..., None], dim=1)
