"""Finds out from the shapes of its tensors which model a checkpoint is of.

Where shapes allow several models, the registered entry that fits best decides. For example, 55x55 patches of 16 pixels
are taken for images of 448 pixels with stride 8, which have an entry, and not for 880 pixels without overlap.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.layers import to_2tuple

from arm_zoo.base import ZooModel
from arm_zoo.files import CheckpointError
from arm_zoo.layers.sizes import one_or_two
from arm_zoo.messages import listed
from arm_zoo.models._builder import ARCHITECTURES
from arm_zoo.pretraining._registry import OBJECTIVES, PretrainingModel
from arm_zoo.weights.adapt import grid_of
from arm_zoo.weights.tensor_names import under_our_names

# Far above any real model: a damaged file that claims more could exhaust the memory.
MAX_DEPTH = 512


@dataclass(frozen=True)
class Variant:
    """A model that a checkpoint fits."""

    architecture: str  # the registered entry without a tag; for a pretraining model that of its backbone
    model_args: dict[str, Any]  # the arguments that differ from the entry's
    num_classes: int = 0  # 0 without a head
    pretraining: dict[str, Any] | None = None  # arguments of the objective's class; None for a backbone
    objective: str | None = None  # a key of `OBJECTIVES`; None for a backbone
    official: bool = False  # whether the checkpoint has the authors' names

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the backbone's images."""
        sizes = {**ARCHITECTURES[self.architecture].sizes(self.architecture), **self.model_args}
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
        """The model with these weights, in evaluation mode; refused before it takes memory if they do not fit."""
        model = self.create(device="meta")
        adapted = model.adapt(state_dict, model, timm_adapts=False)
        model = self.create()
        model.load_state_dict(adapted)
        return model.eval()


def find_variant(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, objective: str | None = None
) -> Variant:
    """The model that a checkpoint, under official or our names, is of.

    Args:
        state_dict: the checkpoint.
        config: known arguments of the model, backbone or pretraining model, for what shapes cannot tell.
        objective: the objective, where models of several objectives have the same tensors.

    Raises:
        CheckpointError: if no model has such tensors.
    """
    backbones = dict.fromkeys(architecture.model_class for architecture in ARCHITECTURES.values())
    classes: dict[Any, str | None] = {**backbones, **{row.model_class: name for name, row in OBJECTIVES.items()}}
    found = [each for each in classes if each.official_names.covers(each.keys, state_dict)]
    if not found:
        wanted = " or ".join(each.__name__ for each in backbones)
        keys = ", or ".join(", ".join(each.keys) for each in backbones)
        allowed = "perhaps under the authors' names, or after one prefix that all names share"
        some = f"found {listed(sorted(state_dict), 8)}"
        raise CheckpointError(f"this is no {wanted} checkpoint: expected {keys} ({allowed}); {some}")
    model_class = max(found, key=lambda each: (objective is not None and classes[each] == objective, len(each.keys)))
    names, known = model_class.official_names, {k: value for k, value in (config or {}).items() if value is not None}
    try:
        arguments, patches = model_class.read_shapes(under_our_names(state_dict, names))
        _check_limits(arguments, patches, issubclass(model_class, PretrainingModel))
        find = _pretraining if issubclass(model_class, PretrainingModel) else _backbone
        variant = find(model_class, arguments, patches, known)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"no model has these sizes: {error}") from error
    return replace(variant, objective=classes[model_class], official=names.are_in(state_dict))


def _check_limits(arguments: dict[str, Any], patches: int | None, pretraining: bool) -> None:
    # fewer patches for pretraining models: a mask has the square of their number
    kind, most = ("pretraining model", 2**12) if pretraining else ("backbone", 2**14)
    for key, value in arguments.items():
        blocks = sum(value) if key == "depths" else value
        if key.endswith(("depth", "depths")) and not 1 <= blocks <= MAX_DEPTH:
            raise CheckpointError(f"a {kind} with {key} {value}; from 1 to {MAX_DEPTH} are taken")
    if patches is not None and not 1 <= patches <= most:
        raise CheckpointError(f"a {kind} with {patches} patches; from 1 to {most} are taken")


def _pretraining(model_class: Any, arguments: dict[str, Any], patches: int | None, known: dict[str, Any]) -> Variant:
    entries = _sizes_of_entries(model_class.backbone_named(arguments.get("backbone")))
    sizes = {key: value for key, value in arguments.items() if key in entries[0] and key != "img_size"}
    entry = _by_likeness(entries, sizes, None)[0]
    arguments |= {key: known[key] for key in inspect.signature(model_class).parameters if key in known}
    if patches is not None:
        patch = arguments["patch_size"]
        arguments = {"img_size": arguments.get("img_size") or _side(patches, patch), **arguments}
        _check_grid(arguments["img_size"], patch, patch, patches)
    return Variant(entry["name"], _different(sizes, entry), pretraining=arguments)


def _backbone(model_class: Any, arguments: dict[str, Any], patches: int | None, known: dict[str, Any]) -> Variant:
    classes = arguments.pop("num_classes")
    ranked = _by_likeness(_sizes_of_entries(model_class), arguments, patches)
    geometry: dict[str, Any] = {key: known[key] for key in ("img_size", "patch_stride") if key in known}
    if patches is not None:
        patch = arguments["patch_size"]
        alike = [entry for entry in ranked if (entry["patches"], entry["patch_size"]) == (patches, patch)]
        if alike and not geometry:
            geometry = {key: alike[0][key] for key in ("img_size", "patch_stride")}
        geometry = {"patch_stride": patch, **geometry}
        if "img_size" not in geometry:
            geometry["img_size"] = _side(patches, geometry["patch_stride"])
        _check_grid(geometry["img_size"], patch, geometry["patch_stride"], patches)
    told = {**geometry, **({"global_pool": known["global_pool"]} if "global_pool" in known else {})}
    return Variant(ranked[0]["name"], _different({**arguments, **told}, ranked[0]), classes)


def _side(patches: int, patch_size: int | tuple[int, int]) -> int | tuple[int, int]:
    """The image size for this number of patches, if they are a square grid without overlap."""
    side = math.isqrt(patches)
    if side * side != patches:
        problem = f"{patches} patches are no square grid, and nothing says how many rows they have"
        raise CheckpointError(f"{problem}; put the config.json of the training beside the file")
    return one_or_two([side * each for each in to_2tuple(patch_size)])


def _check_grid(img_size: Any, patch_size: Any, patch_stride: Any, patches: int) -> None:
    rows, columns = grid_of(img_size, patch_size, patch_stride)
    if rows * columns != patches:
        said = f"the config.json says img_size {img_size}, which are {rows}x{columns} patches"
        raise CheckpointError(
            f"{said}, but the position embeddings are for {patches}; the two files do not belong together"
        )


def _sizes_of_entries(model_class: Any) -> list[dict[str, Any]]:
    """The arguments of each entry of a family, with its name and, if the family has patches, their number."""
    entries = []
    for name, architecture in ARCHITECTURES.items():
        if architecture.model_class is model_class:
            sizes = architecture.sizes(name)
            sizes |= {"name": name, "img_size": one_or_two(sizes["img_size"])}
            if "patch_size" in sizes:
                sizes["patch_stride"] = sizes.get("patch_stride") or sizes["patch_size"]
                sizes["patches"] = math.prod(grid_of(sizes["img_size"], sizes["patch_size"], sizes["patch_stride"]))
            entries.append(sizes)
    return entries


def _by_likeness(entries: list[dict[str, Any]], sizes: dict[str, Any], patches: int | None) -> list[dict[str, Any]]:
    """The entries, best fit first: by patch size, then by the other sizes in turn, then by the number of patches."""
    order = sorted(sizes.keys() - {"in_chans"}, key=lambda key: (key != "patch_size", [*sizes].index(key)))

    def unlike(entry: dict[str, Any]) -> tuple[Any, ...]:
        differs = [entry[key] != sizes[key] for key in order]
        width = abs(math.log(entry["embed_dim"] / max(sizes["embed_dim"], 1)))
        grid = patches is not None and entry["patches"] != patches
        return (*differs, grid, width, math.prod(to_2tuple(entry["img_size"])), entry["name"])

    return sorted(entries, key=unlike)


def _different(arguments: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The arguments whose values are not the entry's."""
    return {key: value for key, value in arguments.items() if value != entry[key]}


def describe(variant: Variant, model: ZooModel) -> str:
    """One line that tells people which model was found."""
    count = sum(parameter.numel() for parameter in model.parameters())
    _, height, width = model.input_size()
    phase = "pretraining model" if variant.pretraining else "backbone"
    head = f", {variant.num_classes} classes" if variant.num_classes else ""
    return f"{variant.architecture} ({phase}, {count / 1e6:.1f} M parameters, {height}x{width} pixels{head})"
