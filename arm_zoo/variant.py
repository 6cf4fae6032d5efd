"""Which model a checkpoint is of, read from its tensors' shapes: size, picture, patches, classes, phase.

What shapes cannot tell is taken from the registered entry that fits them best: 55x55 patches of 16 pixels are those
of stride 8 at 448 pixels, which has an entry, rather than 880 pixels without overlap.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, list_models
from torch import nn

from arm_zoo.arm import ARM
from arm_zoo.files import CheckpointError, StateDict
from arm_zoo.pretrain import ARMPretrain
from arm_zoo.weights import (
    adapt_state_dict,
    foreign_head,
    is_official,
    refusal_of_head,
    sincos_grid,
    under_our_names,
)

__all__ = ["MAX_DEPTH", "Variant", "find_variant"]

# What no model of the family comes near to: a file that says more would only fill the memory.
MAX_DEPTH = 512
_MAX_PATCHES = {"backbone": 2**14, "pretraining model": 2**12}  # the decoder's mask is the square of it


@dataclass(frozen=True)
class Variant:
    """A model that a checkpoint fits.

    Attributes:
        architecture: the registered entry, without a tag; of a pretraining model, that of its backbone.
        model_args: what differs from the entry.
        num_classes: 0 without a head.
        pretraining: arguments of `ARMPretrain`, or None for a backbone.
        official: whether the checkpoint has the authors' names.
    """

    architecture: str
    model_args: dict[str, Any]
    num_classes: int
    pretraining: dict[str, Any] | None
    official: bool

    def backbone(self, **kwargs: Any) -> ARM:
        """The backbone, untrained."""
        return cast(
            ARM, timm.create_model(self.architecture, num_classes=self.num_classes, **{**self.model_args, **kwargs})
        )

    def create(self, **kwargs: Any) -> ARM | ARMPretrain:
        """The model, untrained: the pretraining model of a pretraining checkpoint, else the backbone."""
        return self.backbone(**kwargs) if self.pretraining is None else ARMPretrain(**{**self.pretraining, **kwargs})

    def load(self, state_dict: Mapping[str, torch.Tensor]) -> ARM | ARMPretrain:
        """The model with the checkpoint's weights; names and shapes are compared before memory is taken for it.

        Raises:
            CheckpointError: if names or shapes differ; the message lists both sides.
        """
        adapted = adapt_state_dict(state_dict, self.create(device="meta"), timm_adapts=False)
        model = self.create()
        model.load_state_dict(adapted)
        return model.eval()


def find_variant(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Variant:
    """The model that a checkpoint is of.

    Args:
        state_dict: official or our names.
        config: arguments that shapes cannot tell, where somebody knows them: of `ARM`, or of `ARMPretrain` for a
            pretraining checkpoint.

    Raises:
        CheckpointError: if it is no ARM checkpoint, or of a size that none has.
    """
    source = under_our_names(state_dict)
    sizes = _sizes(source)
    official = is_official(state_dict)
    try:
        if any(name.startswith(("encoder_to_decoder.", "decoder_", "query_token")) for name in source):
            return _pretraining_variant(source, sizes, dict(config or {}), official)
        return _backbone_variant(source, sizes, dict(config or {}), official)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"no ARM has these sizes: {error}") from error


def _sizes(source: StateDict) -> dict[str, Any]:
    """What a backbone and a pretraining model have in common: arguments by name."""
    blocks = {name.split(".")[1] for name in source if name.startswith("blocks.") and name.count(".") > 1}
    states = next((value for name, value in source.items() if name.endswith(".mixer.A_log")), None)
    patches, table = source.get("patch_embed.proj.weight"), source.get("pos_embed")
    if any(name.startswith("blocks.") and "conv1d_b." in name for name in source) or (
        states is not None and not any(".mlp." in name for name in source)
    ):
        raise CheckpointError("this is a Vim checkpoint (mixers without MLPs), which cannot be converted yet")
    if states is None or patches is None or table is None or (states.ndim, patches.ndim, table.ndim) != (3, 4, 3):
        some = ", ".join(sorted(source)[:8]) or "nothing"
        raise CheckpointError(
            "this is no ARM checkpoint: expected patch_embed.proj.weight, pos_embed and blocks.N.mixer.A_log "
            f"(official: layers.N.mixer.A_log) in their shapes; found {some}{', ...' if len(source) > 8 else ''}"
        )
    if len(blocks) > MAX_DEPTH:
        raise CheckpointError(f"no ARM has {len(blocks)} blocks; at most {MAX_DEPTH} are taken")
    return {
        "embed_dim": table.shape[2],
        "depth": len(blocks),
        "d_state": states.shape[2],
        "patch_size": _one_or_two(patches.shape[2:]),
        "in_chans": patches.shape[1],
    }


def _one_or_two(size: Any) -> int | tuple[int, int]:
    height, width = size
    return int(height) if height == width else (int(height), int(width))


def _check_patches(patches: int, kind: str) -> None:
    if not 1 <= patches <= _MAX_PATCHES[kind]:
        raise CheckpointError(f"a {kind} with {patches} patches; from 1 to {_MAX_PATCHES[kind]} are taken")


def _backbone_variant(source: StateDict, sizes: dict[str, Any], config: dict[str, Any], official: bool) -> Variant:
    patches = source["pos_embed"].shape[1] - 1
    _check_patches(patches, "backbone")
    known = {key: config[key] for key in ("img_size", "patch_stride") if config.get(key) is not None}
    alike = [entry for entry in _by_likeness(sizes, patches) if _fits(entry, sizes, patches)]
    if known:
        geometry = {"patch_stride": sizes["patch_size"], **known}
    elif alike:
        geometry = {key: alike[0][key] for key in ("img_size", "patch_stride")}
    else:
        geometry = {"img_size": _side(patches, sizes["patch_size"]), "patch_stride": sizes["patch_size"]}
    if "img_size" not in geometry:
        geometry["img_size"] = _side(patches, geometry["patch_stride"])
    _check_grid(geometry["img_size"], sizes["patch_size"], geometry["patch_stride"], patches)
    entry = _by_likeness(sizes, patches)[0]
    arguments = _different({**sizes, **geometry}, entry)
    if config.get("global_pool") == "token":
        arguments["global_pool"] = "token"
    if foreign := foreign_head(source):
        raise CheckpointError(refusal_of_head(foreign))
    head = source.get("head.weight")
    classes = 0 if head is None else len(head)
    return Variant(entry["name"], arguments, classes, None, official)


def _side(patches: int, patch_size: int | tuple[int, int]) -> int | tuple[int, int]:
    """Picture size of a square grid without overlap."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(
            f"{patches} patches are no square grid, and nothing says how many rows they have; put the config.json "
            "of the training beside the file"
        )
    height, width = to_2tuple(patch_size)
    return _one_or_two((side * height, side * width))


def _check_grid(img_size: Any, patch_size: Any, patch_stride: Any, patches: int) -> None:
    grid = [
        (side - patch) // stride + 1
        for side, patch, stride in zip(
            to_2tuple(img_size), to_2tuple(patch_size), to_2tuple(patch_stride), strict=True
        )
    ]
    if math.prod(grid) != patches:
        raise CheckpointError(
            f"the config.json says img_size {img_size}, which are {grid[0]}x{grid[1]} patches, but the position "
            f"embeddings are for {patches}; the two files do not belong together"
        )


def _pretraining_variant(source: StateDict, sizes: dict[str, Any], config: dict[str, Any], official: bool) -> Variant:
    table, query = source["pos_embed"], source.get("query_token")
    decoder_blocks = {name.split(".")[1] for name in source if name.startswith("decoder_blocks.")}
    if query is None or not 0 < len(decoder_blocks) <= MAX_DEPTH:
        raise CheckpointError("a pretraining checkpoint without the decoder's query_token (ar_token) or its blocks")
    patches, patch = table.shape[1], to_2tuple(sizes["patch_size"])
    _check_patches(patches, "pretraining model")
    grid = sincos_grid(table)
    arguments = {
        "img_size": (
            _side(patches, sizes["patch_size"])
            if grid is None
            else _one_or_two((grid[0] * patch[0], grid[1] * patch[1]))
        ),
        "cluster_size": _cluster_size(source.get("mask"), patches, patch),
        **sizes,
        "decoder_dim": query.shape[-1],
        "decoder_depth": len(decoder_blocks),
    }
    arguments |= {key: config[key] for key in ("img_size", "cluster_size") if config.get(key) is not None}
    _check_grid(arguments["img_size"], sizes["patch_size"], sizes["patch_size"], patches)
    entry = _by_likeness(sizes, None)[0]
    return Variant(entry["name"], _different(sizes, entry), 0, arguments, official)


def _cluster_size(mask: torch.Tensor | None, patches: int, patch: tuple[int, int]) -> int | tuple[int, int]:
    """Clusters of the mask that the official model saves, which leaves one cluster out; else of 4x4 patches."""
    side = 4 if mask is None else math.isqrt(max(patches - len(mask), 0))
    return _one_or_two((side * patch[0], side * patch[1]))


@cache
def _entries() -> list[dict[str, Any]]:
    """Sizes of the registered models, by the names of `ARM`'s arguments."""
    entries = []
    for name in list_models(module="arm"):
        if get_arch_pretrained_cfgs(name):  # short names have none of their own
            model = cast(ARM, timm.create_model(name, device="meta"))
            embed = model.patch_embed
            entries.append(
                {
                    "name": name,
                    "embed_dim": model.embed_dim,
                    "depth": len(model.blocks),
                    "d_state": model.state_dict()["blocks.0.mixer.A_log"].shape[2],
                    "patch_size": _one_or_two(embed.patch_size),
                    "in_chans": model.in_chans,
                    "img_size": _one_or_two(embed.img_size),
                    "patch_stride": _one_or_two(embed.patch_stride),
                    "patches": embed.num_patches,
                }
            )
    return entries


def _by_likeness(sizes: dict[str, Any], patches: int | None) -> list[dict[str, Any]]:
    """The registered models, those first that the checkpoint fits best."""

    def unlike(entry: dict[str, Any]) -> tuple[Any, ...]:
        differs = [entry[key] != sizes[key] for key in ("patch_size", "embed_dim", "depth", "d_state")]
        width = abs(math.log(entry["embed_dim"] / max(sizes["embed_dim"], 1)))
        grid = patches is not None and entry["patches"] != patches
        return (*differs, grid, width, math.prod(to_2tuple(entry["img_size"])), entry["name"])

    return sorted(_entries(), key=unlike)


def _fits(entry: dict[str, Any], sizes: dict[str, Any], patches: int) -> bool:
    return bool(entry["patches"] == patches and entry["patch_size"] == sizes["patch_size"])


def _different(arguments: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value != entry[key]}


def describe(variant: Variant, model: nn.Module) -> str:
    """One line for people: what was found."""
    count = sum(parameter.numel() for parameter in model.parameters())
    embed: Any = model.patch_embed
    height, width = embed.img_size
    phase = "pretraining model" if variant.pretraining else "backbone"
    head = f", {variant.num_classes} classes" if variant.num_classes else ""
    return f"{variant.architecture} ({phase}, {count / 1e6:.1f} M parameters, {height}x{width} pixels{head})"
