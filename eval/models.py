"""Models to be scored, with the weights that the user named: never with weights drawn at random."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data import resolve_data_config
from timm.models import get_arch_pretrained_cfgs, is_model_pretrained, resolve_pretrained_cfg, split_model_name_tag
from torch import nn

import arm_zoo
from arm_zoo.files import PICKLED_WEIGHTS, WEIGHTS, described_by_folder, read_config, sha256_of, weights_in
from arm_zoo.loading import label_names
from arm_zoo.weights import CheckpointError, read_checkpoint

SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Candidate:
    """A model ready to be scored, and what its rows say about it."""

    name: str
    model: nn.Module
    data_config: dict[str, Any]
    num_classes: int
    label_names: tuple[str, ...]
    weights: str
    weights_sha256: str


def parse_weights(entries: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """The words of `--weights` -> weights by model: one for a single model, MODEL=FILE for several."""
    if len(models) == 1 and len(entries) == 1 and entries[0].partition("=")[0] != models[0]:
        return {models[0]: entries[0]}
    out: dict[str, str] = {}
    for entry in entries:
        model, separator, weights = entry.partition("=")
        if not separator or model not in models or not weights or model in out:
            raise ValueError(
                f"--weights {entry}: with several models each is MODEL=FILE, once for a model, MODEL one of "
                f"{', '.join(models)}"
            )
        out[model] = weights
    return out


def check(models: Sequence[str], weights: Mapping[str, str]) -> None:
    """Raises ValueError for names and files that are not there, before anything is loaded."""
    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    for name in models:
        if name.startswith(SOURCES):
            if name in weights:
                raise ValueError(f"{name} names its weights itself; leave out --weights {weights[name]}")
            continue
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known))
            hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has them all"
            raise ValueError(f"unknown model {name!r}; {hint}")
        if name in weights:
            if not weights[name].startswith(SOURCES) and not Path(weights[name]).exists():
                raise ValueError(f"--weights: no file or folder {weights[name]!r}")
        elif not is_model_pretrained(name):
            raise ValueError(
                f"the weights of {name} are not hosted yet: give them with --weights FILE (.safetensors or .pth), "
                "a folder with config.json, or hf-hub:OWNER/NAME"
            )
    if len(set(models)) < len(models):
        raise ValueError("--models names a model twice")


def load(name: str, weights: str | None, train_size: bool = False) -> Candidate:
    """The model in evaluation mode on the CPU, and its preprocessing by the rule of timm's validation script.

    Args:
        name: in timm's registry, or a source of its own such as 'hf-hub:OWNER/NAME'.
        weights: a file, a folder, a source such as 'hf-hub:OWNER/NAME', or None for the hosted ones.
        train_size: leave the test size and crop of the model's configuration out.

    Raises:
        ValueError: if the weights are not to be had, damaged, another model's or without a classifier.
    """
    try:
        model, file, described = _create(name, weights)
    except ValueError:
        raise
    except Exception as error:  # from files, timm and the Hub come classes of all sorts
        lines = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load {name} with {weights or 'its hosted weights'}: {lines}") from error
    config = resolve_data_config({}, model=model, use_test_size=not train_size)
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:  # not one of timm's, which all say
        num_classes = model(torch.zeros(1, *config["input_size"])).shape[1]
    if not num_classes:
        raise ValueError(f"{name} with {described} has no classifier head: finetune it first")
    return Candidate(
        name=name,
        model=model.eval(),
        data_config=config,
        num_classes=num_classes,
        label_names=label_names(_cfg(model), num_classes),
        weights=described,
        weights_sha256=_sha256_of_tensors(model) if file is None else sha256_of(file),
    )


def _cfg(model: nn.Module) -> Mapping[str, Any]:
    """The configuration that timm's models have."""
    return getattr(model, "pretrained_cfg", {})


def _create(name: str, weights: str | None) -> tuple[nn.Module, Path | None, str]:
    """Model, the file that its weights are in where it is known, and how a row calls them."""
    if weights is None:
        model = timm.create_model(name, pretrained=True)
        return model, _hosted_file(_cfg(model)), _hosted_name(_cfg(model))
    if weights.startswith(SOURCES):
        model = timm.create_model(weights, pretrained=True)
        _same_architecture(name, _cfg(model).get("architecture"), weights)
        described = weights if weights.startswith("hf") else _hosted_name(_cfg(model))
        return model, _hosted_file(_cfg(model)), described
    path = Path(weights)
    if path.is_dir() or described_by_folder(path):
        folder = path if path.is_dir() else path.parent
        _same_architecture(name, read_config(folder).get("architecture"), str(folder))
        return timm.create_model(f"local-dir:{folder}", pretrained=True), _file_in(folder), path.resolve().name
    return _create_from_file(name, path), path, path.name


def _create_from_file(name: str, path: Path) -> nn.Module:
    """The classifier has as many classes as the file says, so that timm neither drops nor draws it."""
    cfg = resolve_pretrained_cfg(_architecture(name))
    state_dict = read_checkpoint(path)
    if cfg.classifier is None:  # registered without a configuration, so that timm would not load anything
        model = timm.create_model(name)
        model.load_state_dict(state_dict)
        return model
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else cfg.classifier[0]
    head = state_dict.get(f"{classifier}.weight")
    if head is None:
        raise CheckpointError(f"{path} has no classifier ({classifier}.weight): finetune it first")
    overlay = {"file": str(path), "num_classes": len(head), "hf_hub_id": None, "url": ""}
    return timm.create_model(
        name, pretrained=True, num_classes=len(head) - (cfg.label_offset or 0), pretrained_cfg_overlay=overlay
    )


def _architecture(name: str) -> str:
    """The name without its tag; short names of ours have no configuration of their own."""
    base: str = split_model_name_tag(name)[0]
    if get_arch_pretrained_cfgs(base) or not base.startswith("arm_"):
        return base
    return str(_cfg(timm.create_model(base, device="meta"))["architecture"])


def _same_architecture(name: str, found: str | None, where: str) -> None:
    wanted = _architecture(name)
    if found != wanted:
        raise ValueError(f"the weights in {where} are of {found or 'no timm model'}, not of {wanted}")


def _hosted_name(cfg: Mapping[str, Any]) -> str:
    """What others can make sense of: of files here the name only, not where they lie."""
    hosted = None if cfg.get("source") == "local-dir" else cfg.get("hf_hub_id") or cfg.get("url")
    return str(hosted or Path(cfg.get("file") or "").resolve().name)


def _hosted_file(cfg: Mapping[str, Any]) -> Path | None:
    """The downloaded file, where Hugging Face's or torch's cache still has it; that of a local folder likewise."""
    if cfg.get("source") == "local-dir" or cfg.get("file"):
        return _file_in(Path(cfg["file"]))
    if cfg.get("hf_hub_id"):
        repo, _, revision = str(cfg["hf_hub_id"]).partition("@")
        for filename in (cfg.get("hf_hub_filename"), WEIGHTS, PICKLED_WEIGHTS):
            cached = filename and try_to_load_from_cache(repo, filename, revision=revision or None)
            if isinstance(cached, str):
                return Path(cached)
    file = Path(torch.hub.get_dir(), "checkpoints", str(cfg.get("url", "")).rpartition("/")[2])
    return file if file.is_file() else None


def _file_in(path: Path) -> Path | None:
    """The file itself, or the one of a folder; None where timm takes a file of another name there."""
    try:
        return weights_in(path) if path.is_dir() else path
    except FileNotFoundError:
        return None


def _sha256_of_tensors(model: nn.Module) -> str:
    """Of what was loaded, for where timm does not say from which file: rows tell weights apart by it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers."""
    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "arm_zoo": arm_zoo.__version__,
    }
