"""Models to score, with the weights that the user named, never with random weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from timm.data import resolve_data_config
from timm.models import is_model_pretrained
from torch import nn

import arm_zoo
from arm_zoo.files import HELD_OUT, sha256_of, sha256_of_tensors
from arm_zoo.loading import entries, entry_of, label_names, timm_entries, unknown_model
from arm_zoo.pretraining import PretrainingModel
from arm_zoo.weights.find import whereabouts

SOURCES = ("hf-hub:", "hf_hub:", "hf://", "local-dir:")


@dataclass(frozen=True)
class Candidate:
    """A model that is ready to be scored, and what its rows say about it."""

    name: str
    model: nn.Module
    data_config: dict[str, Any]
    num_classes: int
    label_names: tuple[str, ...]
    weights: str
    weights_sha256: str
    held_out: tuple[str, ...] = ()  # the images that its run held out of training, as HELD_OUT lists them


def parse_weights(words: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """Read `--weights`: FILE for a single model, MODEL=FILE for several; gives the weights of each model."""
    if len(models) == 1 and len(words) == 1 and words[0].partition("=")[0] != models[0]:
        return {models[0]: words[0]}
    out: dict[str, str] = {}
    for word in words:
        model, separator, weights = word.partition("=")
        if not separator or model not in models or not weights or model in out:
            each = f"type MODEL=FILE once for each model, with MODEL one of {', '.join(models)}"
            raise ValueError(f"--weights {word}: with several models, {each}")
        out[model] = weights
    return out


def check(models: Sequence[str], weights: Mapping[str, str]) -> None:
    """Raise ValueError for unknown names and missing files, before anything is loaded."""
    known, ours = timm_entries(), entries()
    for name in models:
        given = weights.get(name, "")
        hosted = whereabouts(entry_of(name)) != "not hosted" if name in ours else is_model_pretrained(name)
        if name.startswith(SOURCES) or (name not in known and Path(name).is_dir()):
            if name in weights:
                raise ValueError(f"{name} comes with its weights; leave out --weights {weights[name]}")
        elif name not in known:
            raise unknown_model(name, known)
        elif name not in weights and not hosted:
            raise ValueError(
                f"the weights of {name} are not hosted yet: give them with --weights FILE (.safetensors or .pth), a "
                "folder with config.json, hf-hub:OWNER/NAME or hf://OWNER/NAME/FILE"
            )
        elif given and not given.startswith(SOURCES) and not Path(given).expanduser().exists():
            raise ValueError(f"--weights: no file or folder {given!r}")
    if len(set(models)) < len(models):
        raise ValueError("--models names a model twice")


def load(name: str, weights: str | None, train_size: bool = False) -> Candidate:
    """The model in evaluation mode on the CPU, and its preprocessing by the rule of timm's validation script.

    `weights` are a file, a folder, a source such as 'hf-hub:OWNER/NAME' (which `name` may be too), or None for those
    of the entry. Raises ValueError if they are missing, damaged, another model's or without a classifier.
    """
    try:
        model, file, source, _ = arm_zoo.loading.load(name, weights)
    except ValueError:
        raise
    except Exception as error:  # the errors of files, timm and the Hub have no common class
        lines = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load {name} with {weights or 'its hosted weights'}: {lines}") from error
    if isinstance(model, PretrainingModel):
        raise ValueError(f"{name} with {source} is a pretraining model, which has no classifier: finetune it first")
    config = resolve_data_config({}, model=model, use_test_size=not train_size)
    if (channels := config["input_size"][0]) not in (1, 3):
        raise ValueError(f"{name} takes images of {channels} channels; allowed: models of 1 or 3, as images have")
    num_classes = getattr(model, "num_classes", None)
    if num_classes is None:  # not one of timm's models, which all have it
        num_classes = model(torch.zeros(1, *config["input_size"])).shape[1]
    if not num_classes:
        raise ValueError(f"{name} with {source} has no classifier head: finetune it first")
    names = label_names(getattr(model, "pretrained_cfg", {}), num_classes)
    checksum = sha256_of_tensors(model.state_dict()) if file is None else sha256_of(file)
    listed = None if file is None else file.parent / HELD_OUT
    held_out = listed.read_text(encoding="utf-8").splitlines() if listed is not None and listed.is_file() else ()
    return Candidate(name, model.eval(), config, num_classes, names, source, checksum, tuple(held_out))


def versions() -> dict[str, str]:
    """Versions of the packages that decide the figures, under the names of their columns."""
    packages = {"torch": torch, "timm": timm, "pillow": PIL, "arm_zoo": arm_zoo}
    return {name: package.__version__ for name, package in packages.items()}
