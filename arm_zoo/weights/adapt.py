"""Fits checkpoints to models: copies one scan to four, resizes position embeddings, compares names and shapes."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import is_exporting, resample_abs_pos_embed, resample_patch_embed, to_2tuple
from timm.models import get_pretrained_cfg
from torch import nn

from arm_zoo.files import CheckpointError, StateDict
from arm_zoo.messages import listed
from arm_zoo.weights.reading import weights_of
from arm_zoo.weights.tensor_names import OfficialNames, is_stacked, under_our_names

_logger = logging.getLogger(__name__)
_TABLES = {"pos_embed", "decoder_pos_embed"}
_PATCHES = "patch_embed.proj.weight"
_WHOLE = "base_encoder."  # prefix of the names of a whole backbone inside a pretraining model


def from_official(state_dict: Mapping[str, Any], model: nn.Module) -> StateDict:
    """Official checkpoint -> a dict that loads strictly into `model` (a backbone or a pretraining model).

    Args:
        state_dict: official names, alone or in a training's checkpoint (its averaged weights if it has any). A
            pretraining checkpoint becomes a four-scan backbone as in the official finetuning: every direction gets
            a copy of the pretrained one, position embeddings are resampled around a zero row for the class token, and
            what pretraining does not have (class token, final norm, head) keeps the values that `model` has now.
        model: gives the names, shapes and grid to reach.

    Raises:
        CheckpointError: if tensors are missing, left over or of another shape; the message lists both sides.
    """
    state_dict = weights_of(state_dict)
    names: OfficialNames = getattr(model, "official_names", OfficialNames())
    if not names.are_in(state_dict):
        advice = "weights of this project load with timm.create_model(..., pretrained_cfg_overlay=dict(file=...))"
        found = f"no key starts with {names.prefix!r}, found {listed([*state_dict], 8)}"
        raise CheckpointError(f"not an official checkpoint of {type(model).__name__}: {found}; {advice}")
    adapt: Any = getattr(model, "adapt", adapt_state_dict)
    return adapt(state_dict, model, timm_adapts=False)


def adapt_state_dict(state_dict: Mapping[str, torch.Tensor], model: nn.Module, timm_adapts: bool = True) -> StateDict:
    """Any checkpoint of the family (official or ours, pretraining or backbone) -> a dict for `model`.

    Repeats one direction over all, drops the pretraining decoder, fits position and patch embeddings to the
    model's grid, and checks names and shapes. Learned position embeddings are (1, rows, dim) under the name
    `pos_embed`: in a backbone a row for each patch, and if there is a `cls_token`, its row in their middle; in a
    pretraining model a row for each patch, to which a zero row for the class token is added.

    `timm_adapts` lets pass what timm's loader, running next, adapts: input channels and a head with another number
    of classes.
    """
    target = model.state_dict()
    source = under_our_names(state_dict, getattr(model, "official_names", OfficialNames()))
    for key in getattr(model, "official_extras", dict)():
        source.pop(key, None)
    if hasattr(model, "pretraining_keys"):  # as all backbones have
        source = _adapt_to_backbone(source, target, model, timm_adapts)
    else:
        fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        tables = {key for key in fixed if key.rpartition(".")[2] in _TABLES}
        for key in tables & source.keys():  # sine-cosine tables: those of the model's own grid
            if source[key].shape != target[key].shape:
                source[key] = target[key]
    _check(source, target, getattr(model, "pretrained_cfg", {}).get("first_conv") if timm_adapts else None)
    return source


def whole_backbone(source: StateDict) -> StateDict:
    """The tensors, without head, of the backbone that a pretraining model contains whole; empty if it has none."""
    found = {key.removeprefix(_WHOLE): value for key, value in source.items() if key.startswith(_WHOLE)}
    return {key: value for key, value in found.items() if not key.startswith("head.")}


def _adapt_to_backbone(source: StateDict, target: StateDict, model: Any, timm_adapts: bool) -> StateDict:
    source = whole_backbone(source) or source
    if "pos_embed" in target and "pos_embed" not in source:
        return source  # another family's: the check that follows says what is missing
    if not any(map(_is_foreign_head, target)):  # else the user has replaced the head, and the checkpoint must fit that
        if any(key.startswith("head.") for key in target):
            refuse_foreign_head(source)
        source = {key: value for key, value in source.items() if not _is_foreign_head(key)}
    table, tokens = source.get("pos_embed") if _is_resized(target, model) else None, "cls_token" in target
    grid, names = None, OfficialNames()
    if any(names.covers([key], source) and not names.covers([key], target) for key in model.pretraining_keys):
        kept = {key: value for key, value in source.items() if key in target}
        fresh = {key: value for key, value in target.items() if key.startswith(model.untrained)}
        source = {**fresh, **kept}
        if table is not None:
            grid = sincos_grid(table) or _source_grid(model, table.shape[1], timm_adapts)
            table = _join(table, table.new_zeros(1, int(tokens), table.shape[-1]))
    if table is not None:
        grid = grid or _source_grid(model, table.shape[1] - tokens, timm_adapts)
        source["pos_embed"] = resample_pos_embed(table, grid, model.patch_embed.grid_size)
    if _of_pixels(source) and not _of_pixels(target):
        side = "x".join(map(str, target[_PATCHES].shape[2:]))
        _logger.warning("the weights are of single pixels: the embedding of patches of %s pixels starts anew", side)
        source |= {key: target[key] for key in (_PATCHES, "patch_embed.proj.bias")}
    for key, value in source.items():
        if key not in target:
            continue
        if is_stacked(key) and len(value) == 1 < len(target[key]):
            source[key] = value.repeat(len(target[key]), *[1] * (value.ndim - 1))
        elif key == _PATCHES and value.shape[2:] != target[key].shape[2:]:
            source[key] = resample_patch_embed(value, list(target[key].shape[2:]))
    return source


def _is_resized(target: StateDict, model: Any) -> bool:
    """Whether a backbone's position embeddings have the rows that `adapt_state_dict` can resize."""
    if "pos_embed" not in target or not hasattr(model.patch_embed, "num_patches"):
        return False
    return target["pos_embed"].shape[1:-1] == (model.patch_embed.num_patches + ("cls_token" in target),)


def _of_pixels(tensors: StateDict) -> bool:
    """Whether every token is a single pixel; such an embedding says nothing about larger patches."""
    return _PATCHES in tensors and tensors[_PATCHES].shape[2:].numel() == 1


def _is_foreign_head(key: str) -> bool:
    """Whether a tensor is of a head that is more than one linear layer."""
    return key.startswith("head.") and key not in ("head.weight", "head.bias")


def refuse_foreign_head(source: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError for a head that is more than one linear layer."""
    if foreign := list(filter(_is_foreign_head, source)):
        raise CheckpointError(
            f"the checkpoint's head is not one linear layer but holds {listed(foreign, 8)}, as that of a linear probe "
            "with batch norm does; its encoder loads with timm.create_model(NAME, pretrained=True, num_classes=0, "
            "pretrained_cfg_overlay=dict(file=FILE)), and save_pretrained(FOLDER) keeps that for finetuning"
        )


def sincos_grid(table: torch.Tensor) -> tuple[int, int] | None:
    """The grid of sine-cosine embeddings (1, patches, dim), half of column and half of row; None for others."""
    if table.is_meta:
        return None
    column, row = table[0].chunk(2, dim=-1)
    width = int((row == row[0]).all(dim=-1).sum())
    if not width or len(row) % width:  # width is 0 where there are NaN, which equal nothing
        return None
    columns, rows = column.unflatten(0, (-1, width)), row.unflatten(0, (-1, width))
    matches = torch.equal(columns, columns[:1].expand_as(columns)) and torch.equal(rows, rows[:, :1].expand_as(rows))
    return (len(row) // width, width) if matches else None


def _source_grid(model: nn.Module, patches: int, timm_adapts: bool) -> tuple[int, int]:
    """Patch grid of a checkpoint: the one that its configuration or the caller tells, else the model's, else a square.

    The model's configuration describes the checkpoint only where timm loads it (`timm_adapts`). If only the entry's
    default contradicts the model, the file is refused, as either may be right.
    """
    arguments = getattr(model, "pretrained_model_args", {})
    patch_embed: Any = model.patch_embed
    cfg = getattr(model, "pretrained_cfg", {})
    default = get_pretrained_cfg(cfg.get("architecture", ""))
    said = default is not None and tuple(cfg.get("input_size", ())) != tuple(default.input_size)
    told = grid_of(
        arguments.get("img_size") or cfg.get("input_size", (3, 0, 0))[-2:],
        arguments.get("patch_size") or patch_embed.patch_size,
        arguments.get("patch_stride") or patch_embed.patch_stride,
    )
    side, own = math.isqrt(patches), tuple(patch_embed.grid_size)
    fitting = [grid for grid in (own, told, (side, side)) if grid[0] * grid[1] == patches]
    if timm_adapts and (said or arguments.get("img_size")):
        fitting.sort(key=lambda grid: grid != told)
    elif timm_adapts and own in fitting and told in fitting and own != told:
        raise CheckpointError(
            f"the checkpoint has position embeddings for {patches} patches: the model's {own[0]}x{own[1]}, or "
            f"{told[0]}x{told[1]} as its configuration says? For the first, say the source size with "
            "pretrained_cfg_overlay=dict(input_size=(3, H, W)); for the second, load without img_size, then call "
            "set_input_size(img_size=(H, W))"
        )
    if not fitting:
        raise CheckpointError(
            f"the checkpoint has position embeddings for {patches} patches, which is neither a square grid nor the "
            f"model's {own[0]}x{own[1]}; say the source size with pretrained_cfg_overlay=dict(input_size=(3, H, W)), "
            f"or override `adapt` of {type(model).__name__} if the rows are not those of patches"
        )
    return fitting[0]


def grid_of(img_size: Any, patch_size: Any, patch_stride: Any) -> tuple[int, int]:
    """Rows and columns of the patches of an image; every size is one number or a pair."""
    sides = zip(to_2tuple(img_size), to_2tuple(patch_size), to_2tuple(patch_stride), strict=True)
    rows, columns = ((side - patch) // stride + 1 for side, patch, stride in sides)
    return rows, columns


def _join(patches: torch.Tensor, cls_row: torch.Tensor) -> torch.Tensor:
    """Rows of patches (1, N, dim) with those of a class token (1, 0 or 1, dim) put into their middle."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], cls_row, patches[:, middle:]], dim=1)


def resample_pos_embed(pos_embed: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize position embeddings (1, old patches, dim), or (1, old patches + 1, dim) with a class token.

    The class token's row is in the middle and keeps its values. Bicubic without antialiasing in float32, as in the
    official finetuning; unchanged if the grids are equal. That is not asked in an export, where the answer for the
    example image would shut out all others.
    """
    if not is_exporting() and tuple(old_grid) == tuple(new_grid):
        return pos_embed
    patches = old_grid[0] * old_grid[1]
    tokens, middle = pos_embed.shape[1] - patches, patches // 2
    first, cls_row, second = pos_embed.split([middle, tokens, patches - middle], dim=1)
    table = torch.cat([cls_row, first, second], dim=1)
    table = resample_abs_pos_embed(table, list(new_grid), list(old_grid), num_prefix_tokens=tokens, antialias=False)
    return _join(table[:, tokens:], table[:, :tokens])


def _check(source: StateDict, target: StateDict, first_conv: str | None) -> None:
    """CheckpointError unless names and shapes agree; with `first_conv`, timm still adapts that layer and the head."""
    free = ("head.",) if first_conv else ()
    missing = [key for key in target if key not in source and not key.startswith(free)]
    unexpected = [key for key in source if key not in target and not key.startswith(free)]
    pairs = {key: (source[key].shape, target[key].shape) for key in target if key in source}
    misfits = {key: pair for key, pair in pairs.items() if not _fits(key, *pair, first_conv)}
    shapes = [f"{key} {tuple(found)} -> {tuple(wanted)}" for key, (found, wanted) in misfits.items()]
    rows = {key for key, (found, wanted) in misfits.items() if found[1:2] != wanted[1:2]} & _TABLES
    if missing or unexpected or shapes:
        raise CheckpointError(
            "the checkpoint does not fit the model (another width, depth or family?)"
            f"\n  only in the model ({len(missing)}): {listed(missing, 8)}"
            f"\n  only in the checkpoint ({len(unexpected)}): {listed(unexpected, 8)}"
            f"\n  other shapes, checkpoint -> model ({len(shapes)}): {listed(shapes, 8)}"
            + "".join(f"\n  {key} is resized only if `adapt` of the model's class does so" for key in sorted(rows))
        )


def _fits(key: str, source: torch.Size, target: torch.Size, first_conv: str | None) -> bool:
    if key == f"{first_conv}.weight":
        source, target = source[:1] + source[2:], target[:1] + target[2:]
    if first_conv and key.startswith("head."):
        source, target = source[1:], target[1:]
    return source == target
