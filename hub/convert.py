"""Converting a checkpoint of the official code, the recipes or timm to a folder that anyone can load in one line."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg

import arm_zoo
from arm_zoo import files
from arm_zoo.files import CONFIG, WEIGHTS, CheckpointError, sha256_of
from arm_zoo.heads.models import HEADED
from arm_zoo.identify import Variant, describe, find_variant
from arm_zoo.loading import objective_of
from arm_zoo.pretraining import PretrainingModel
from arm_zoo.weights.hosted import TABLE, bundled_entries
from arm_zoo.weights.reading import Choice, is_safetensors, read_checkpoint
from hub.card import write_card
from hub.folders import CARD, GOLDEN, UsageError, check_destination, read_header

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CROPPED_UP_TO = 224  # pixels: up to this size, the official evaluation crops the middle of the images
Test = tuple[Callable[[Any], bool], str]


def convert(
    file: Path,
    out: Path,
    weights: Choice | None = None,
    dtype: str = "fp32",
    license: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write model.safetensors, config.json, golden.safetensors and README.md to `out`, all or nothing.

    A config.json beside the file says what shapes cannot: names of classes, preprocessing, a grid that is not square.
    For a file that comes with the package, its entry names the classes. If a folder is replaced, what people wrote
    into its card stays. Gives lines that say what was found and how to load it.
    """
    file = files.weights_in(file) if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}; name a .pth, a .safetensors or the folder of a run")
    check_destination(out, overwrite)
    if out.exists() and file.resolve().parent == out.resolve():
        raise UsageError(f"{file} lies in {out}, which would be replaced; name another folder")
    state_dict = read_checkpoint(file, weights)
    config = files.read_config(file.parent) if (file.parent / CONFIG).exists() else _told_by_entry(file)
    if config.get("architecture") in [*HEADED]:  # a list: the name may be whatever JSON has
        loaded = f"as it is: timm.create_model('local-dir:{file.parent}', pretrained=True)"
        raise UsageError(f"{file} has a {config['architecture']}, which needs no conversion; load its folder {loaded}")
    before = read_header(file) if is_safetensors(file) else {}
    objective = objective_of(config, file, state_dict) if "pretraining_model" in config else None
    variant = find_variant(state_dict, _arguments(config), objective)
    model = variant.load(_rounded(state_dict, DTYPES[dtype]))
    facts = {
        "architecture": variant.architecture,
        "source_sha256": sha256_of(file),
        "source_names": "official" if variant.official else before.get("source_names", "arm-zoo"),
        "library": "arm-zoo",
        "library_version": arm_zoo.__version__,
        "license": license or before.get("license", "unknown"),
        "dtype": dtype,
    }
    hub_config = _hub_config(model, variant, _preprocessing(config), facts)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *model.input_size(), generator=generator)
    state = model.state_dict().items()
    tensors = {name: value.to(DTYPES[dtype]) if value.is_floating_point() else value for name, value in state}
    new = not out.exists()
    try:
        with files.replacing_files(out) as folder:
            files.save_model(folder, tensors, hub_config, **facts)
            golden = {"input": image, **answers(model, image)}
            files.save_tensors(golden, folder / GOLDEN, {"model_sha256": sha256_of(folder / WEIGHTS)})
            write_card(folder, old=out / CARD)
    except BaseException:
        if new:
            shutil.rmtree(out, ignore_errors=True)
        raise
    files.remove_leftovers(out)
    found = f"{describe(variant, model)}, {dtype}; sha256 {sha256_of(out / WEIGHTS)}"
    return [found, f'load it: timm.create_model("local-dir:{out}", pretrained=True)']


def _told_by_entry(file: Path) -> dict[str, Any]:
    """The class names of a classifier that comes with the package, or of a copy of its file; nothing for others."""
    sha256 = sha256_of(file)
    entry = next((name for name in bundled_entries() if TABLE[name].sha256 == sha256), None)
    cfg: Any = get_pretrained_cfg(entry) if entry else None
    return {"label_names": list(cfg.label_names)} if cfg and cfg.label_names else {}


def _rounded(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in float32, rounded to the type of the file; counters stay whole numbers."""
    rounded = {}
    for name, value in state_dict.items():
        if name.endswith(".num_batches_tracked"):  # of a batch norm
            rounded[name] = value
            continue
        if not value.is_floating_point():
            raise CheckpointError(f"{name} has type {value.dtype}; expected floating point numbers")
        rounded[name] = value.to(dtype).float()
        if name != "mask" and not rounded[name].isfinite().all():  # the mask of the official pretraining is infinite
            cause = "is not finite: the training had diverged" if not value.isfinite().all() else f"overflows {dtype}"
            raise CheckpointError(f"{name} {cause}; take another checkpoint or another --dtype")
    return rounded


@torch.inference_mode()
def answers(model: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """A model's answers to an image (1, C, H, W), for golden.safetensors: `features` and `logits` of a backbone."""
    with arm_zoo.scan_backend("torch"):
        if isinstance(model, PretrainingModel):
            results = model.answers(image)
        else:
            features = model.forward_head(model.forward_features(image), pre_logits=True)
            head = model.get_classifier()
            results = {"features": features} | ({"logits": head(features)} if model.num_classes else {})
    return {name: value.contiguous().clone() for name, value in results.items()}


def _list_of(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(each) in kinds for each in value)


def _are_pixels(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return _list_of(sides, int) and all(0 < side < 2**16 for side in sides)


# The values that are read from a config.json beside the weights: name -> test of a value, what is expected.
_ARGUMENTS: dict[str, Test] = dict.fromkeys(("img_size", "patch_stride"), (_are_pixels, "pixels, one number or two"))
_POOLINGS = arm_zoo.ARM.global_pools  # the most that a family has; another one refuses those that it lacks
_POOLING: dict[str, Test] = {
    "global_pool": (lambda value: value in _POOLINGS, f"{', '.join(filter(None, _POOLINGS))} or nothing")
}
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
_PREPROCESSING: dict[str, Test] = {
    "mean": (lambda value: _list_of(value, int, float), "a list of numbers"),
    "std": (lambda value: _list_of(value, int, float) and 0 not in value, "a list of numbers other than 0"),
    "crop_pct": (lambda value: type(value) in (int, float) and 0 < value <= 1, "a number above 0, at most 1"),
    "crop_mode": (lambda value: value in ("center", "squash", "border"), "center, squash or border"),
    "interpolation": (lambda value: value in _INTERPOLATIONS, ", ".join(_INTERPOLATIONS)),
    "label_names": (lambda value: _list_of(value, str), "a list of names"),
}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments in a config.json of the recipes or of timm; a pretraining model's were checked before."""
    given = config.get("pretraining_model") or _checked(config.get("model_args", {}), "model_args", _ARGUMENTS)
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return sizes | _checked(config, "first level", _POOLING)


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, by a config.json, and the names of classes, which may stand beside that table."""
    found = _checked(config.get("pretrained_cfg", {}), "pretrained_cfg", _PREPROCESSING)
    return found | _checked(config, "first level", {"label_names": _PREPROCESSING["label_names"]})


def _checked(table: Any, name: str, tests: Mapping[str, Test]) -> dict[str, Any]:
    """The values in a table of a config.json, called `name`, that have tests."""
    if not isinstance(table, dict):
        raise CheckpointError(f"{CONFIG}: {name} is a {type(table).__name__}, not a table")
    found = {key: table[key] for key in tests if table.get(key) is not None}
    for key, value in found.items():
        holds, expected = tests[key]
        if not holds(value):
            raise CheckpointError(f"{CONFIG}: {key} is {value!r}; expected {expected}")
    return found


def _hub_config(model: Any, variant: Variant, preprocessing: dict[str, Any], facts: dict[str, str]) -> dict[str, Any]:
    """config.json in timm's form for the Hub; a pretraining model's is its backbone's, plus its own arguments."""
    backbone = variant.backbone(device="meta")
    cfg = backbone.pretrained_cfg
    for key in ("tag", "origin_url"):
        cfg.pop(key, None)
    cfg |= {"license": facts["license"], **preprocessing}
    if facts["source_names"] == "official":
        cfg["origin_url"] = backbone.official_names.origin_url
    if variant.official:
        cfg["crop_pct"] = 0.875 if max(backbone.input_size()[1:]) <= CROPPED_UP_TO else 1.0
    if len(cfg["mean"]) not in (1, backbone.in_chans) or len(cfg["std"]) not in (1, backbone.in_chans):
        raise CheckpointError(
            f"mean {cfg['mean']} and std {cfg['std']} are not for {backbone.in_chans} channels; put a config.json "
            "with the pretrained_cfg of the training beside model.safetensors"
        )
    config = backbone.hub_config()
    return {**config, **model.hub_config()} if isinstance(model, PretrainingModel) else config
