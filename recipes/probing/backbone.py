"""The models whose features are scored, ours or timm's, and how their images are prepared."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple

from arm_zoo.files import CheckpointError, DownloadError, described_by_folder, read_config
from arm_zoo.loading import architecture_of, load, timm_entries, unknown_model
from recipes.config import NOT_BUILT, TAKEN_BY_MODELS
from recipes.errors import RunError
from recipes.probing.config import ProbeConfig


class Frozen(NamedTuple):
    """A model whose features are scored, and what is known of its weights."""

    model: Any  # an nn.Module whose attributes type checkers do not know
    inputs: dict[str, Any]  # how images are prepared, with the training's mean and std where the weights tell them
    file: Path | None  # the file that the weights were read from
    weights: str  # the name of the weights in tables


def named_by_entry(weights: Path, config: ProbeConfig) -> bool:
    """Whether `weights` are an entry; RunError if a name is unknown, or if `config.model` names other weights."""
    known = timm_entries()
    if config.model and config.model not in known:
        raise RunError(str(unknown_model(config.model, known)))
    if config.untrained and str(weights) not in known:
        problem = f"untrained is true, but --weights is {weights}; allowed: an entry, to draw its weights at random"
        raise RunError(f"{problem}: {unknown_model(str(weights), known)}")
    is_entry = config.untrained or (str(weights) in known and not weights.exists())
    if is_entry and config.model and config.model not in (str(weights), architecture_of(str(weights))):
        ways = f"type either --weights {weights} or --weights {config.model}, and leave out model="
        raise RunError(f"--weights {weights} and model={config.model} are not the same; {ways}")
    return is_entry


def not_made(weights: Path, config: ProbeConfig, error: Exception) -> str:
    """The message about an error of making the model: what was given, the reason and what is allowed."""
    given, allowed = [f"--weights {weights}"], []
    if config.model:
        given.append(f"model={config.model}")
        theirs = "as entries, folders and files of arm_zoo's models tell theirs"
        allowed.append(f"weights of {config.model}, or no model=, {theirs}")
    if config.model_args:
        given += [f"model_args.{name}={value}" for name, value in config.model_args.items()]
        allowed.append(TAKEN_BY_MODELS)
    problem = f"no model can be made of {' '.join(given)}: {type(error).__name__}: {error}"
    return f"{problem}; allowed: {'; '.join(allowed)}" if allowed else problem


def load_backbone(weights: Path, config: ProbeConfig) -> Frozen:
    """Load a model; RunError if there is none of that name, or if it does not take the arguments.

    `weights` are a `pretraining_model/`, a folder that timm's `local-dir:` takes, a file, an entry or
    "hf-hub:ORG/NAME". With `config.untrained` they are an entry, whose weights are drawn at random instead.
    """
    is_entry = named_by_entry(weights, config)
    names = (config.model, weights) if config.model and not is_entry else (weights, None)
    folder = weights.parent if described_by_folder(weights) else weights
    own = read_config(folder).get("pretraining_model") if folder.is_dir() and not is_entry else None
    torch.manual_seed(config.seed)  # a backbone made of a pretraining model may get a new class token
    size, said = {"img_size": own["img_size"]} if own else {}, dict[str, Any]()
    model: Any
    file, called = None, "untrained"
    try:
        if config.untrained:
            model = timm.create_model(str(weights), num_classes=0, **config.model_args)
        else:
            model, file, called, said = load(*names, as_backbone=True, num_classes=0, **{**size, **config.model_args})
    except NOT_BUILT as error:
        may_not_fit = config.model or config.model_args
        if isinstance(error, DownloadError if may_not_fit else CheckpointError):  # these say all themselves
            raise
        raise RunError(not_made(weights, config, error)) from error
    inputs = resolve_model_data_config(model)
    channels, *sides = inputs["input_size"]  # of timm's configuration, which the arguments below do not change
    asked = config.model_args.get("in_chans", channels), *to_2tuple(config.model_args.get("img_size", sides))
    inputs["input_size"] = asked
    if own := said.get("pretraining_model"):
        inputs |= {"input_size": (model.in_chans, *model.patch_embed.img_size), "crop_pct": 1.0}
    undescribed = weights.exists() and not is_entry and not said
    if own or undescribed or channels != asked[0]:  # else those of the configuration are right
        del inputs["mean"], inputs["std"]
    return Frozen(model, inputs, file, called)
