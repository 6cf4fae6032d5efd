"""Folders of converted weights: their files, and the checks of a folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from arm_zoo.files import CONFIG, WEIGHTS, CheckpointError, read_config, save_model, save_tensors, sha256_of

GOLDEN = "golden.safetensors"
CARD = "README.md"
FILES = (WEIGHTS, CONFIG, GOLDEN, CARD)
TOLERANCE = 1e-4  # of the largest value: float32 differs between machines and programs


class UsageError(ValueError):
    """What a person asked for cannot be done; the message says what to type instead."""


def check_complete(folder: Path, names: Sequence[str] = FILES) -> None:
    """Raise UsageError unless the folder has these files of a conversion."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; write it: python -m hub convert FILE {folder}")
    if missing := ", ".join(name for name in names if not (folder / name).is_file()):
        source = folder if (folder / WEIGHTS).is_file() else "FILE"  # such as the folder of a run
        raise UsageError(f"{folder} lacks {missing}; write a new folder: python -m hub convert {source} OUT")


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raise UsageError unless the folder is new, empty, or, with `overwrite`, one that a conversion wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder to write to")
    names = (path.name for path in folder.iterdir())
    there = sorted(name for name in names if not name.startswith(".partial-"))  # which a killed conversion leaves
    if foreign := [name for name in there if name not in FILES]:
        raise UsageError(f"{folder} holds other files ({', '.join(foreign[:4])}); name a new folder")
    if there and not overwrite:
        raise UsageError(f"{folder} has a model already; name a new folder, or replace it with --overwrite")


def read_header(file: Path) -> dict[str, str]:
    """The facts in the header of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except Exception as error:  # safetensors' own errors, OSError
        raise CheckpointError(f"cannot read {file}: {error}; convert it anew or fetch it again") from error


def set_license(folder: Path, license: str) -> None:
    """Write a licence into the header of a folder's weights and its config.json; the golden answers stay valid."""
    config, header = read_config(folder), read_header(folder / WEIGHTS)
    config["pretrained_cfg"]["license"] = license
    save_model(folder, load_file(folder / WEIGHTS), config, **{**header, "license": license})
    golden = {**read_header(folder / GOLDEN), "model_sha256": sha256_of(folder / WEIGHTS)}
    save_tensors(load_file(folder / GOLDEN), folder / GOLDEN, golden)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a fraction of the largest expected value; infinite for other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
