"""Checkpoints read without running anything in them, whatever program wrote them."""

import argparse
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from arm_zoo.files import CheckpointError, StateDict, is_plain_tensor

Choice = Literal["ema", "model"]

_PLACES: dict[Choice, tuple[str, ...]] = {  # where checkpoints of a training keep their weights
    "ema": ("model_ema", "state_dict_ema"),
    "model": ("model", "state_dict"),
}


def is_safetensors(path: str | Path) -> bool:
    """By its name; every other file is taken for a pickle."""
    return Path(path).suffix.lower() == ".safetensors"


def read_checkpoint(path: str | Path, weights: Choice | None = None) -> StateDict:
    """Tensors by name in a .safetensors file or a .pth; no code in it is run, and no more read than the file holds.

    Args:
        path: the file. From a .pth, `argparse.Namespace` is the only object taken beside tensors and plain values.
        weights: of a training's checkpoint, the averaged weights ("ema") or the trained ones ("model"); None takes
            the averaged ones where there are any.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        contents = load_file(path) if is_safetensors(path) else _read_pickle(path)
    except Exception as error:  # from damaged files PyTorch raises all sorts: KeyError, OSError, RuntimeError, ...
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        wanted = [] if is_safetensors(path) else _refused_globals(path)
        if isinstance(error, pickle.UnpicklingError):
            reason = "no pickle that torch reads"  # torch's own words advise to load it unsafely
        if wanted:
            reason = f"it asks to run {', '.join(wanted)}"
        advice = "nothing in it was run: have its tensors saved alone" if wanted else _advice(path)
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason}; {advice}") from error
    return weights_of(contents, weights, path)


def _read_pickle(path: Path) -> Any:
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:  # PyTorch would unpack it to more than it is, and not notice a flipped bit
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            if packed or sum(member.file_size for member in members) > path.stat().st_size:
                raise zipfile.BadZipFile("its parts are compressed, which PyTorch never does, or overlap")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protocols and formats, which the errors tell better
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _refused_globals(path: Path) -> list[str]:
    """Names of the functions and classes that a pickle wants and does not get; reading them runs nothing."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # not a zip archive, or a damaged one
        allowed = ("torch", "collections.OrderedDict", "argparse.Namespace")
        return sorted(name for name in _globals_of_pickle(path) if not name.startswith(allowed))


def _globals_of_pickle(path: Path) -> set[str]:
    """Names in a file without archive, which is a row of pickles with data behind."""
    found: set[str] = set()
    strings, memo = ["", ""], [""]  # the two pushed last; those that later parts of the pickle refer to by number
    with open(path, "rb") as file:
        try:
            while True:
                for code, argument, _ in pickletools.genops(file):
                    if code.name == "GLOBAL":
                        found.add(str(argument).replace(" ", "."))
                    elif code.name == "STACK_GLOBAL":
                        found.add(".".join(strings))
                    elif code.name == "MEMOIZE":
                        memo.append(strings[1])
                    elif code.name in ("BINGET", "LONG_BINGET"):
                        strings = [strings[1], dict(enumerate(memo)).get(int(argument or 0) + 1, "")]
                    elif isinstance(argument, str):
                        strings = [strings[1], argument]
        except Exception:  # the data, or damage: pickletools raises all sorts
            return found


def _advice(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith((b"PK", b"\x80")) and is_safetensors(path):
        return "it is a pickle, not safetensors: rename it to .pth if you trust it"
    if start[8:] == b"{" and not is_safetensors(path):
        return "it looks like safetensors: rename it to .safetensors"
    return "the file is damaged, cut short or no checkpoint: fetch it again"


def weights_of(contents: Any, weights: Choice | None = None, path: object = "the checkpoint") -> StateDict:
    """The tensors by name of a checkpoint, alone or beside a training's state, without the prefixes of wrappers.

    `weights` as of `read_checkpoint`, `path` for messages; CheckpointError for what is no state dict of plain tensors.
    """
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds no tensors by name but a {type(contents).__name__}")
    places = {choice: [name for name in names if contents.get(name) is not None] for choice, names in _PLACES.items()}
    if weights == "ema" and not places["ema"]:
        held = ", ".join(map(str, list(contents)[:8])) or "nothing"
        raise CheckpointError(f"{path} has no averaged weights (model_ema); it holds {held}: ask for weights 'model'")
    found = places["model"] if weights == "model" else places["ema"] + places["model"]
    chosen = contents[found[0]] if found else contents
    if not isinstance(chosen, Mapping):
        raise CheckpointError(f"{path} holds under {found[0]!r} no tensors by name but a {type(chosen).__name__}")
    for name, value in chosen.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            wrong = f"{str(name)[:80]!r} is a {type(value).__name__}, not a tensor"
            expected = "tensors by name, alone or under 'model' or 'model_ema'"
            raise CheckpointError(f"{path} is no state dict: {wrong}; expected {expected}")
        if not is_plain_tensor(value) or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name!r} is no plain dense tensor, or larger than its data in the file")
    return clean_state_dict({name: value.detach() for name, value in chosen.items()})
