"""A checkpoint of the official code, of the recipes or of timm -> a folder that anyone loads in one line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import arm_zoo
from arm_zoo.arm import ARM
from arm_zoo.files import (
    CONFIG,
    WEIGHTS,
    CheckpointError,
    read_config,
    save_model,
    save_tensors,
    sha256_of,
    weights_in,
)
from arm_zoo.pretrain import ARMPretrain
from arm_zoo.reading import Choice, is_safetensors, read_checkpoint
from arm_zoo.variant import Variant, describe, find_variant

from .card import write_card
from .folders import CARD, GOLDEN, UsageError, check_destination, read_header, replacing_folder

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# pictures up to this size are evaluated on their middle, larger ones whole (the official evaluation)
CROPPED_UP_TO = 224
OF_AUTHORS = "https://github.com/OliverRensu/ARM"


def convert(
    file: Path,
    out: Path,
    weights: Choice | None = None,
    dtype: str = "fp32",
    license: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write model.safetensors, config.json, golden.safetensors and README.md to `out`, all or nothing.

    Args:
        file: .pth, .pth.tar or .safetensors (official code, recipes, timm's train.py and avg_checkpoints.py), or a
            folder with model.safetensors or pytorch_model.bin; a config.json beside the file says what shapes cannot
            (names of classes, preprocessing, the grid where it is no square).
        out: a new folder.
        weights: see `arm_zoo.reading.read_checkpoint`.
        dtype: of the tensors that are written, a key of DTYPES.
        license: of the weights, for the header, the configuration and the card; None: what an earlier conversion
            wrote into the file's header, else "unknown".
        overwrite: replace a folder that a conversion wrote; what people wrote into its card stays.

    Returns:
        One line that says what was found.

    Raises:
        CheckpointError: if the file is not what it should be; FileNotFoundError if there is none.
        UsageError: if `out` is taken.
    """
    file = weights_in(file) if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}; name a .pth, a .safetensors or the folder of a run")
    check_destination(out, overwrite)
    if out.exists() and file.exists() and file.resolve().parent == out.resolve():
        raise UsageError(f"{file} lies in {out}, which would be replaced; name another folder")
    state_dict = read_checkpoint(file, weights)
    config = read_config(file.parent) if (file.parent / CONFIG).exists() else {}
    before = read_header(file) if is_safetensors(file) else {}
    license = license or before.get("license", "unknown")
    variant = find_variant(state_dict, _arguments(config))
    model = variant.load(_rounded(state_dict, DTYPES[dtype]))
    facts = {
        "architecture": variant.architecture,
        "source_sha256": sha256_of(file),
        "source_names": "official" if variant.official else before.get("source_names", "arm-zoo"),
        "library": "arm-zoo",
        "library_version": arm_zoo.__version__,
        "license": license,
        "dtype": dtype,
    }
    of_authors = facts["source_names"] == "official"
    hub_config = _hub_config(model, variant, _said(config), license, of_authors)
    with replacing_folder(out) as folder:
        tensors = {name: value.to(DTYPES[dtype]) for name, value in model.state_dict().items()}
        save_model(folder, tensors, hub_config, **facts)
        save_tensors(golden(model), folder / GOLDEN, {"model_sha256": sha256_of(folder / WEIGHTS)})
        write_card(folder, old=out / CARD)
    return f"{describe(variant, model)}, {dtype}; sha256 {sha256_of(out / WEIGHTS)}"


def _rounded(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors with the values that they will have in the file, in float32."""
    rounded = {}
    for name, value in state_dict.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{name} has type {value.dtype}; expected floating point numbers")
        rounded[name] = value.to(dtype).float()
        if name != "mask" and not rounded[name].isfinite().all():  # the mask of the official pretraining is infinite
            cause = "is not finite: the training had diverged" if not value.isfinite().all() else f"overflows {dtype}"
            raise CheckpointError(f"{name} {cause}; take another checkpoint or another --dtype")
    return rounded


def golden(model: ARM | ARMPretrain) -> dict[str, torch.Tensor]:
    """A fixed picture and what the model makes of it, for `python -m hub check` and anybody else.

    Keys: `input` (1, C, H, W); of a backbone `features` (1, dim), pooled, and `logits` (1, classes) if it has a
    head; of a pretraining model `features`, the decoder's latents, and `prediction`.
    """
    height, width = model.patch_embed.img_size
    picture = torch.randn(1, model.in_chans, height, width, generator=torch.Generator().manual_seed(0))
    return {"input": picture, **answers(model, picture)}


@torch.inference_mode()
def answers(model: ARM | ARMPretrain, picture: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `golden` has beside the picture."""
    with arm_zoo.scan_backend("torch"):
        if isinstance(model, ARMPretrain):
            features = model.forward_encoder(picture)
            results = {"features": features, "prediction": model.forward_decoder(features)}
        else:
            features = model.forward_head(model.forward_features(picture), pre_logits=True)
            results = {"features": features} | ({"logits": model.head(features)} if model.num_classes else {})
    return {name: value.contiguous().clone() for name, value in results.items()}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the model in a config.json, of the recipes or of timm."""
    arguments = config.get("pretraining_model", config.get("model_args", {}))
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{CONFIG}: the model's arguments are a {type(arguments).__name__}, not a table")
    said = {
        key: arguments[key] for key in ("img_size", "patch_stride", "cluster_size") if arguments.get(key) is not None
    }
    for key, value in said.items():
        sides = value if isinstance(value, list | tuple) else [value]
        if not 1 <= len(sides) <= 2 or any(type(side) is not int or not 0 < side < 2**16 for side in sides):
            raise CheckpointError(f"{CONFIG}: {key} is {value!r}; expected pixels, one number or two")
        said[key] = tuple(sides) if len(sides) == 2 else sides[0]
    return said | ({"global_pool": "token"} if config.get("global_pool") == "token" else {})


_SAID: dict[str, Any] = {  # what a training knows beside the weights: key and its test
    "mean": lambda value: _numbers(value),
    "std": lambda value: _numbers(value) and 0 not in value,
    "crop_pct": lambda value: type(value) in (int, float) and 0 < value <= 1,
    "crop_mode": lambda value: value in ("center", "squash", "border"),
    "interpolation": lambda value: value in ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"),
}


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) in (int, float) for number in value) and len(value) > 0


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing and names of the classes in a config.json."""
    cfg = config.get("pretrained_cfg", {})
    if not isinstance(cfg, dict):
        raise CheckpointError(f"{CONFIG}: pretrained_cfg is a {type(cfg).__name__}, not a table")
    said = {key: cfg[key] for key in _SAID if key in cfg}
    for key, value in said.items():
        if not _SAID[key](value):
            raise CheckpointError(f"{CONFIG}: {key} is {value!r}, which no preprocessing can be")
    labels = config.get("label_names", cfg.get("label_names"))
    if labels is not None:
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise CheckpointError(f"{CONFIG}: label_names is no list of names")
        said["label_names"] = labels
    return said


def _hub_config(
    model: ARM | ARMPretrain, variant: Variant, said: dict[str, Any], license: str, of_authors: bool
) -> dict[str, Any]:
    """config.json in timm's Hub form; of a pretraining model that of its backbone, and its own arguments beside."""
    backbone = variant.backbone(device="meta")
    cfg = backbone.pretrained_cfg
    for key in ("tag", "origin_url"):
        cfg.pop(key, None)
    cfg |= {"license": license, **said}
    if of_authors:
        cfg["origin_url"] = OF_AUTHORS
    if variant.official:
        cfg["crop_pct"] = 0.875 if max(backbone.patch_embed.img_size) <= CROPPED_UP_TO else 1.0
    if len(cfg["mean"]) not in (1, backbone.in_chans) or len(cfg["std"]) not in (1, backbone.in_chans):
        raise CheckpointError(
            f"mean {cfg['mean']} and std {cfg['std']} are not for {backbone.in_chans} channels; put a config.json "
            "with the pretrained_cfg of the training beside model.safetensors"
        )
    config = backbone.hub_config()
    return config if isinstance(model, ARM) else {**config, **model.hub_config()}
