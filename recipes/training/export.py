"""The export of a run's weights: folders with `model.safetensors` and `config.json`."""

import inspect
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

from arm_zoo.files import WEIGHTS, save_model
from arm_zoo.models import ARCHITECTURES
from recipes.config import TrainConfig
from recipes.data.source import Source
from recipes.errors import RunError

EXPORT, BACKBONE = "pretraining_model", "backbone"
InputConfig = dict[str, Any]  # timm's names: input_size, mean, std, interpolation, crop_pct, crop_mode
# Keys of an entry's configuration that describe the entry's own weights; the address is left out by the model itself.
OF_THE_ENTRYS_WEIGHTS = ("tag", "license", "origin_url", "description", "notes")


def input_config(model: Any, config: TrainConfig, source: Source) -> InputConfig:
    """How images are prepared for scoring: as the entry says, at the model's size, with the source's statistics."""
    if model.in_chans != source.channels:
        raise RunError(
            f"the model takes {model.in_chans} channels, the images have {source.channels}; "
            f"allowed: model_args.in_chans={source.channels}"
        )
    own = {"input_size": model.input_size(), "mean": source.mean, "std": source.std}
    if not (config.labels_needed or hasattr(model, "patch_embed")):  # a dVAE, which has no entry
        return {**resolve_data_config(pretrained_cfg={"interpolation": "bicubic"}), **own}
    cfg: Any = timm.get_pretrained_cfg(config.model if config.labels_needed else backbone_entry(config, model))
    return {**resolve_data_config(pretrained_cfg=cfg.to_dict()), **own}


def backbone_entry(config: TrainConfig, model: Any) -> str:
    """The timm entry for a pretraining model: of its patch and image size, else one of its width and depth."""
    exact = f"{config.model}_patch{model.patch_embed.patch_size[0]}_{model.patch_embed.img_size[0]}"
    entries = [exact, f"{config.model}_patch16_224", *timm.list_models(f"{config.model}_patch*")]
    return next(entry for entry in entries if timm.is_model(entry))


def save_timm_model(model: Any, folder: Path, inputs: InputConfig, **labels: list[str]) -> None:
    """Write what `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    config = model.hub_config()
    cfg = {key: value for key, value in config["pretrained_cfg"].items() if key not in OF_THE_ENTRYS_WEIGHTS}
    save_model(folder, model.state_dict(), {**config, **labels, "pretrained_cfg": cfg | inputs})


def save_pretraining(model: Any, config: TrainConfig, inputs: InputConfig, **facts: Any) -> None:
    """Write `pretraining_model/`, and `backbone/`, which is its encoder as a timm model without a head.

    If pretraining has no class token, the backbone gets a new one, drawn from `config.seed`. `facts` about the
    training go to the config.json of `pretraining_model/`.
    """
    whole, backbone = (Path(config.output_dir) / name for name in (EXPORT, BACKBONE))
    statistics = {key: inputs[key] for key in ("input_size", "mean", "std")}
    save_model(whole, model.state_dict(), {**model.hub_config(), **facts, "pretrained_cfg": statistics})
    entry, overlay = backbone_entry(config, model), {"file": str(whole / WEIGHTS), "input_size": inputs["input_size"]}
    taken = inspect.signature(ARCHITECTURES[entry].model_class).parameters
    arguments: dict[str, Any] = {name: value for name, value in model.config.items() if name in taken}
    torch.manual_seed(config.seed)
    encoder = timm.create_model(entry, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **arguments)
    save_timm_model(encoder, backbone, inputs)
