"""What a run leaves behind: folders with ``model.safetensors`` and ``config.json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

import arm_zoo
from arm_zoo.arm import ARM
from arm_zoo.files import replacing_files, save_model

from .config import TrainConfig
from .errors import RunError
from .sources import Source

InputConfig = dict[str, Any]  # timm's names: input_size, mean, std, interpolation, crop_pct, crop_mode
# What an entry says of its own weights, which those of a run are not; where they lie is left out by the model itself.
OF_THE_ENTRYS_WEIGHTS = ("tag", "license", "origin_url", "description", "notes")


def input_config(entry: str, source: Source, channels: int, image_size: tuple[int, int]) -> InputConfig:
    """How pictures are prepared for scoring: the entry's way, at this size, with the source's statistics.

    Raises:
        RunError: If the source's pictures have another number of channels.
    """
    if channels != source.channels:
        raise RunError(
            f"the model takes {channels} channels, the pictures have {source.channels}; "
            f"allowed: model_args.in_chans={source.channels}"
        )
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(entry).to_dict())
    return {**config, "input_size": (channels, *image_size), "mean": source.mean, "std": source.std}


def save_classifier(model: ARM, folder: Path, inputs: InputConfig, class_names: Sequence[str]) -> None:
    """Write what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""
    _save(model, folder, inputs, label_names=list(class_names))


def save_pretraining_model(model: arm_zoo.ARMPretrain, folder: Path, inputs: InputConfig) -> None:
    """Write encoder and decoder, with the inputs' statistics beside the model's arguments."""
    statistics = {key: inputs[key] for key in ("input_size", "mean", "std")}
    with replacing_files(folder) as beside:
        save_model(beside, model.state_dict(), {"pretraining_model": model.config, "pretrained_cfg": statistics})


def save_backbone(pretraining_model: Path, entry: str, folder: Path, inputs: InputConfig, seed: int) -> None:
    """Write the encoder of a saved pretraining model as a timm model: four scans, no head.

    Its class token is new, as pretraining has none: drawn from ``seed``.
    """
    arguments = json.loads((pretraining_model / "config.json").read_text(encoding="utf-8"))["pretraining_model"]
    names = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "d_state")
    torch.manual_seed(seed)
    model = timm.create_model(
        entry,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(pretraining_model / "model.safetensors")},
        num_classes=0,
        **{name: arguments[name] for name in names},
    )
    _save(model, folder, inputs)


def backbone_entry(config: TrainConfig, model: arm_zoo.ARMPretrain) -> str:
    """The timm entry of a pretraining model: that of its patch and image size, else one of its width and depth."""
    exact = f"{config.model}_patch{model.patch_size[0]}_{model.patch_embed.img_size[0]}"
    entries = [exact, f"{config.model}_patch16_224", *timm.list_models(f"{config.model}_patch*")]
    return next(entry for entry in entries if timm.is_model(entry))


def _save(model: ARM, folder: Path, inputs: InputConfig, **labels: list[str]) -> None:
    config = model.hub_config()
    cfg = {key: value for key, value in config["pretrained_cfg"].items() if key not in OF_THE_ENTRYS_WEIGHTS}
    with replacing_files(folder) as beside:
        save_model(beside, model.state_dict(), {**config, **labels, "pretrained_cfg": cfg | inputs})
