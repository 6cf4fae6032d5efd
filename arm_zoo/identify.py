"""Which model a checkpoint is of, read from its tensors' shapes: size, image, patches, classes, phase.

What shapes cannot tell is taken from the registered entry that fits them best: 55x55 patches of 16 pixels are those
of stride 8 at 448 pixels, which has an entry, rather than 880 pixels without overlap.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from arm_zoo.files import CheckpointError, StateDict
from arm_zoo.models._builder import ARCHITECTURES
from arm_zoo.models.arm import ARM
from arm_zoo.pretraining._registry import OBJECTIVES
from arm_zoo.weights.adapt import grid_of, refuse_foreign_head, sincos_grid
from arm_zoo.weights.tensor_names import is_official, under_our_names

# What no model comes near to: a file that says more would only fill the memory.
MAX_DEPTH = 512
_MAX_PATCHES = {"backbone": 2**14, "pretraining model": 2**12}  # the decoder's mask is the square of it


@dataclass(frozen=True)
class Variant:
    """A model that a checkpoint fits."""

    architecture: str  # the registered entry, without a tag; of a pretraining model, that of its backbone
    model_args: dict[str, Any]  # what differs from the entry
    num_classes: int = 0  # 0 without a head
    pretraining: dict[str, Any] | None = None  # arguments of the objective's class; None for a backbone
    objective: str | None = None  # a key of `OBJECTIVES`; None for a backbone
    official: bool = False  # the checkpoint has the authors' names

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the backbone's images."""
        sizes = {**_sizes_of_entries()[self.architecture], **self.model_args}
        return (sizes["in_chans"], *to_2tuple(sizes["img_size"]))

    def backbone(self, **kwargs: Any) -> Any:
        """The backbone, untrained."""
        return timm.create_model(self.architecture, **{"num_classes": self.num_classes, **self.model_args, **kwargs})

    def create(self, **kwargs: Any) -> Any:
        """The model, untrained: the pretraining model of a pretraining checkpoint, else the backbone."""
        if self.objective is None or self.pretraining is None:
            return self.backbone(**kwargs)
        return OBJECTIVES[self.objective].model_class(**{**self.pretraining, **kwargs})

    def load(self, state_dict: Mapping[str, torch.Tensor]) -> Any:
        """The model in evaluation mode with the weights, which are compared before memory is taken for the model."""
        row = ARCHITECTURES[self.architecture] if self.objective is None else OBJECTIVES[self.objective]
        adapted = row.adapt(dict(state_dict), self.create(device="meta"), False)
        model = self.create()
        model.load_state_dict(adapted)
        return model.eval()


def find_variant(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Variant:
    """The model that a checkpoint is of, under official or our names.

    `config` has arguments that shapes cannot tell, where somebody knows them: of the backbone, or of the pretraining
    model for its checkpoint.
    """
    source = under_our_names(state_dict)
    numberless = {re.sub(r"\.\d+\.", ".*.", name) for name in source}
    find = next((find for keys, find in _FINDERS.items() if numberless.issuperset(keys)), None)
    if find is None:
        some = ", ".join(sorted(source)[:8]) or "nothing"
        raise CheckpointError(
            "this is no ARM checkpoint: expected patch_embed.proj.weight, pos_embed and blocks.N.mixer.A_log "
            f"(official: layers.N.mixer.A_log) in their shapes; found {some}{', ...' if len(source) > 8 else ''}"
        )
    try:
        variant = find(source, dict(config or {}))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"no model has these sizes: {error}") from error
    return replace(variant, official=is_official(state_dict))


def _vim(source: StateDict, config: dict[str, Any]) -> Variant:
    raise CheckpointError("this is a Vim checkpoint (mixers without MLPs), which cannot be converted yet")


def _sizes(source: StateDict, kind: str) -> tuple[dict[str, Any], int]:
    """What a backbone of ARM and a pretraining model have in common: arguments by name, and the number of patches."""
    depth = len({name.split(".")[1] for name in source if name.startswith("blocks.") and name.count(".") > 1})
    states = next(value for name, value in source.items() if name.endswith(".mixer.A_log"))
    patches, table = source["patch_embed.proj.weight"], source["pos_embed"]
    if (states.ndim, patches.ndim, table.ndim) != (3, 4, 3):
        shapes = f"{tuple(states.shape)}, {tuple(patches.shape)} and {tuple(table.shape)}"
        raise CheckpointError(
            f"this is no ARM checkpoint: A_log, patch_embed.proj.weight and pos_embed have the shapes {shapes}"
        )
    if depth > MAX_DEPTH:
        raise CheckpointError(f"no ARM has {depth} blocks; at most {MAX_DEPTH} are taken")
    count, most = table.shape[1] - (kind == "backbone"), _MAX_PATCHES[kind]  # a backbone has a class token
    if not 1 <= count <= most:
        raise CheckpointError(f"a {kind} with {count} patches; from 1 to {most} are taken")
    sizes = {"embed_dim": table.shape[2], "depth": depth, "d_state": states.shape[2]}
    return {**sizes, "patch_size": _one_or_two(patches.shape[2:]), "in_chans": patches.shape[1]}, count


def _one_or_two(size: Any) -> int | tuple[int, int]:
    height, width = size
    return int(height) if height == width else (int(height), int(width))


def _arm(source: StateDict, config: dict[str, Any]) -> Variant:
    sizes, patches = _sizes(source, "backbone")
    ranked = _by_likeness(sizes, patches)
    known = {key: config[key] for key in ("img_size", "patch_stride") if config.get(key) is not None}
    alike = [entry for entry in ranked if (entry["patches"], entry["patch_size"]) == (patches, sizes["patch_size"])]
    if known or not alike:
        geometry = {"patch_stride": sizes["patch_size"], **known}
        if "img_size" not in known:
            geometry["img_size"] = _side(patches, geometry["patch_stride"])
    else:
        geometry = {key: alike[0][key] for key in ("img_size", "patch_stride")}
    _check_grid(geometry["img_size"], sizes["patch_size"], geometry["patch_stride"], patches)
    arguments = _different({**sizes, **geometry}, ranked[0])
    if config.get("global_pool") == "token":
        arguments["global_pool"] = "token"
    refuse_foreign_head(source)
    return Variant(ranked[0]["name"], arguments, len(source.get("head.weight", ())))


def _side(patches: int, patch_size: int | tuple[int, int]) -> int | tuple[int, int]:
    """Image size of a square grid without overlap."""
    side = math.isqrt(patches)
    if side * side != patches:
        problem = f"{patches} patches are no square grid, and nothing says how many rows they have"
        raise CheckpointError(f"{problem}; put the config.json of the training beside the file")
    return _one_or_two([side * each for each in to_2tuple(patch_size)])


def _check_grid(img_size: Any, patch_size: Any, patch_stride: Any, patches: int) -> None:
    rows, columns = grid_of(img_size, patch_size, patch_stride)
    if rows * columns != patches:
        said = f"the config.json says img_size {img_size}, which are {rows}x{columns} patches"
        raise CheckpointError(
            f"{said}, but the position embeddings are for {patches}; the two files do not belong together"
        )


def _arm_pretraining(source: StateDict, config: dict[str, Any]) -> Variant:
    sizes, patches = _sizes(source, "pretraining model")
    decoder_blocks = {name.split(".")[1] for name in source if name.startswith("decoder_blocks.")}
    if not 0 < len(decoder_blocks) <= MAX_DEPTH:
        raise CheckpointError(f"no decoder has {len(decoder_blocks)} blocks; from 1 to {MAX_DEPTH} are taken")
    patch, grid = to_2tuple(sizes["patch_size"]), sincos_grid(source["pos_embed"])
    mask = source.get("mask")  # which the official model saves; it leaves one cluster out
    side = 4 if mask is None else math.isqrt(max(patches - len(mask), 0))
    arguments = {
        "img_size": _one_or_two((grid[0] * patch[0], grid[1] * patch[1])) if grid else _side(patches, patch),
        "cluster_size": _one_or_two((side * patch[0], side * patch[1])),
        **sizes,
        "decoder_dim": source["query_token"].shape[-1],
        "decoder_depth": len(decoder_blocks),
    }
    arguments |= {key: config[key] for key in ("img_size", "cluster_size") if config.get(key) is not None}
    _check_grid(arguments["img_size"], patch, patch, patches)
    entry = _by_likeness(sizes, None)[0]
    return Variant(entry["name"], _different(sizes, entry), pretraining=arguments, objective="autoregressive")


@cache
def _sizes_of_entries() -> dict[str, dict[str, Any]]:
    """Sizes of ARM's entries, by the names of its arguments."""
    entries = {}
    for name, architecture in ARCHITECTURES.items():
        if architecture.model_class is ARM:
            sizes = architecture.sizes(name)
            sizes["patch_stride"] = sizes["patch_stride"] or sizes["patch_size"]
            sizes["img_size"] = _one_or_two(sizes["img_size"])
            patches = math.prod(grid_of(sizes["img_size"], sizes["patch_size"], sizes["patch_stride"]))
            entries[name] = {**sizes, "name": name, "patches": patches}
    return entries


def _by_likeness(sizes: dict[str, Any], patches: int | None) -> list[dict[str, Any]]:
    """The registered models, those first that the checkpoint fits best."""

    def unlike(entry: dict[str, Any]) -> tuple[Any, ...]:
        differs = [entry[key] != sizes[key] for key in ("patch_size", "embed_dim", "depth", "d_state")]
        width = abs(math.log(entry["embed_dim"] / max(sizes["embed_dim"], 1)))
        grid = patches is not None and entry["patches"] != patches
        return (*differs, grid, width, math.prod(to_2tuple(entry["img_size"])), entry["name"])

    return sorted(_sizes_of_entries().values(), key=unlike)


def _different(arguments: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value != entry[key]}


_ARM_KEYS = ("patch_embed.proj.weight", "pos_embed", "blocks.*.mixer.A_log", "blocks.*.mlp.fc1.weight")
# Names of tensors (* for a number) that all checkpoints of a kind have -> what reads their shapes; the first counts.
_FINDERS: dict[tuple[str, ...], Callable[[StateDict, dict[str, Any]], Variant]] = {
    ("blocks.*.mixer.conv1d_b.weight",): _vim,
    (*_ARM_KEYS, "query_token", "decoder_blocks.*.norm_query.weight"): _arm_pretraining,
    _ARM_KEYS: _arm,
    ("blocks.*.mixer.A_log",): _vim,
}


def describe(variant: Variant, model: nn.Module) -> str:
    """One line for people: what was found."""
    count = sum(parameter.numel() for parameter in model.parameters())
    height, width = cast(Any, model.patch_embed).img_size
    phase = "pretraining model" if variant.pretraining else "backbone"
    head = f", {variant.num_classes} classes" if variant.num_classes else ""
    return f"{variant.architecture} ({phase}, {count / 1e6:.1f} M parameters, {height}x{width} pixels{head})"
