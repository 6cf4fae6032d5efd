"""The features of a frozen model: those that it pools itself, and those of its last blocks."""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from recipes.errors import RunError

LAST = 4  # blocks whose features are taken
PATCHES = "patches"  # the array of the last block's patches, normed
# name of features -> the array that holds them, and whether they are of all blocks or only of the last, which is first
FEATURES = {
    "pooled": ("pooled", True),
    "token": ("token", False),
    "average": ("average", False),
    "token_last4": ("token", True),
    "average_last4": ("average", True),
}


def arrays_of(model: Any) -> tuple[str, ...]:
    """The arrays that `outputs` can make of a model: its own pooling, and its blocks if timm gives access to them.

    A class token is told from other tokens before the patches, such as registers, by its attribute's name.
    """
    if not hasattr(model, "forward_intermediates"):
        return ("pooled",)
    return ("pooled", "average", PATCHES, *(["token"] if _has_token(model) else []))


def _has_token(model: Any) -> bool:
    taken = inspect.signature(model.forward_intermediates).parameters
    return getattr(model, "cls_token", None) is not None and "return_prefix_tokens" in taken


def outputs(model: Any, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """Compute arrays in one forward pass: pooled (N, D), average and token (N, up to 4 D), patches (N, P, D).

    Blocks stand side by side, the last one first; the model's last norm is applied to each if timm does that.
    """
    if set(wanted) == {"pooled"}:
        return {"pooled": model(images)}
    blocks = min(LAST, len(model.feature_info)) if {"token", "average"} & set(wanted) else 1
    prefixed = {"return_prefix_tokens": True} if _has_token(model) else {}
    last, taken = model.forward_intermediates(images, indices=blocks, norm=True, **prefixed)
    maps, prefixes = zip(*taken, strict=True) if prefixed else (taken, ())
    made = {"pooled": model.forward_head(last)} if "pooled" in wanted else {}
    if "average" in wanted:
        made["average"] = torch.cat([x.mean(dim=(2, 3)) for x in reversed(maps)], dim=1)
    if "token" in wanted:
        made["token"] = torch.cat([x[:, 0] for x in reversed(prefixes)], dim=1)
    if PATCHES in wanted:
        made[PATCHES] = maps[-1].flatten(2).transpose(1, 2)
    return made


def shapes(model: Any, input_size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of one image's row in each array; RunError for a model that does not give features."""
    parameter = next(model.parameters())
    try:
        with torch.inference_mode():
            made = outputs(model, torch.zeros(1, *input_size, device=parameter.device), arrays_of(model))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"the model gives no features of images {input_size}: {error}") from error
    if made["pooled"].ndim != 2:
        shape = tuple(made["pooled"].shape)
        raise RunError(f"the model gives {shape} for one image without its head, allowed: (1, D), pooled features")
    return {name: tuple(values.shape[1:]) for name, values in made.items()}
