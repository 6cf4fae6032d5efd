"""Files of weights: read without running anything in them, and written whole or not at all."""

import argparse
import hashlib
import json
import os
import pickle
import pickletools
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict
from torch import nn

__all__ = [
    "CONFIG",
    "PICKLED_WEIGHTS",
    "WEIGHTS",
    "CheckpointError",
    "described_by_folder",
    "flush",
    "is_safetensors",
    "read_checkpoint",
    "read_config",
    "read_shapes",
    "remove_leftovers",
    "replacing_files",
    "save_model",
    "save_tensors",
    "sha256_of",
    "weights_in",
    "write_text",
]

StateDict = dict[str, torch.Tensor]
Choice = Literal["ema", "model"]

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"  # what timm.models.save_for_hf writes unless it is asked for safetensors
CONFIG = "config.json"
_PLACES: dict[Choice, tuple[str, ...]] = {  # where checkpoints of a training keep their weights
    "ema": ("model_ema", "state_dict_ema"),
    "model": ("model", "state_dict"),
}


class CheckpointError(RuntimeError):
    """Weights that cannot be had or read, or whose tensors are not those of the model."""


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder to write files into; if the block ends well, they replace those of `folder`.

    Every file is whole: it is flushed to the disk before it gets its name, and the names before the block is left.
    Files of `folder` with other names stay. If the block raises, nothing changes.

    Args:
        folder: made if it is not there.

    Raises:
        OSError: with the files' names, if they cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as beside:
        try:
            yield Path(beside)
            files = sorted(Path(beside).iterdir())
            for file in files:
                flush(file)
        except OSError as error:
            if error.filename is None:  # as on a full disk
                error.filename = str(folder / ", ".join(sorted(file.name for file in Path(beside).iterdir())))
            raise
        for file in files:
            os.replace(file, folder / file.name)
    if os.name == "posix":  # elsewhere folders cannot be opened
        flush(folder)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Replace one text file (UTF-8) whole; see `replacing_files`."""
    path = Path(path)
    with replacing_files(path.parent) as beside:
        (beside / path.name).write_text(text, encoding="utf-8", newline="")


def remove_leftovers(folder: str | Path) -> None:
    """Remove what `replacing_files` was writing to a folder when its process was killed."""
    for partial in Path(folder).glob(f".partial-{'[a-z0-9_]' * 8}"):  # as tempfile names folders
        shutil.rmtree(partial, ignore_errors=True)


def is_safetensors(path: str | Path) -> bool:
    """By its name; every other file is taken for a pickle."""
    return Path(path).suffix.lower() == ".safetensors"


def read_checkpoint(path: str | Path, weights: Choice | None = None) -> StateDict:
    """Tensors by name in a .safetensors file or a .pth; no code in it is run, and no more read than the file holds.

    Args:
        path: the file. From a .pth, `argparse.Namespace` is the only object taken beside tensors and plain values.
        weights: of a training's checkpoint, the averaged weights ("ema") or the trained ones ("model"); None takes
            the averaged ones where there are any.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged, of another format, needs code to be run, or lacks what `weights` asks for.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with _explained(path):
        contents = load_file(path) if is_safetensors(path) else _read_pickle(path)
    return _tensors(_choose(contents, weights, path), path)


def read_shapes(path: str | Path) -> StateDict:
    """Tensors of a file by name, on the meta device: of a .safetensors file only the header is read.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = Path(path)
    if not is_safetensors(path):
        return {name: tensor.to("meta") for name, tensor in read_checkpoint(path).items()}
    with _explained(path), safe_open(path, "pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    cleaned: StateDict = clean_state_dict(shapes)
    return cleaned


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Make one clear error of whatever a damaged file raises while it is read."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # from damaged files PyTorch raises all sorts: KeyError, OSError, RuntimeError, ...
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        wanted = [] if is_safetensors(path) else _refused_globals(path)
        if isinstance(error, pickle.UnpicklingError):
            reason = "no pickle that torch reads"  # torch's own words advise to load it unsafely
        if wanted:
            reason = f"it asks to run {', '.join(wanted)}"
        advice = "nothing in it was run: have its tensors saved alone" if wanted else _advice(path)
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason}; {advice}") from error


def _read_pickle(path: Path) -> Any:
    zipped = _starts_with(path, b"PK\x03\x04")
    if zipped:
        _check_archive(path)
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protocols and formats, which the errors tell better
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _check_archive(path: Path) -> None:
    """Refuse archives that unpack to more than they are, and those with a flipped bit: PyTorch looks for neither."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packed or sum(member.file_size for member in members) > path.stat().st_size:
            raise zipfile.BadZipFile("its parts are compressed, which PyTorch never does, or overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _refused_globals(path: Path) -> list[str]:
    """Names of the functions and classes that a pickle wants and does not get; reading them runs nothing."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip archive, or a damaged one
        allowed = ("torch", "collections.OrderedDict", "argparse.Namespace")
        wanted = {name for name in _globals_of_pickle(path) if not name.startswith(allowed)}
    return sorted(wanted)


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
    pickled = start[:2] == b"PK" or start[:1] == b"\x80"
    named_safetensors = is_safetensors(path)
    if pickled and named_safetensors:
        return "it is a pickle, not safetensors: rename it to .pth if you trust it"
    if start[8:] == b"{" and not named_safetensors:
        return "it looks like safetensors: rename it to .safetensors"
    return "the file is damaged, cut short or no checkpoint: fetch it again"


def _choose(contents: Any, weights: Choice | None, path: Path) -> Mapping[str, Any]:
    """The entry with the weights, where a checkpoint also holds a training's state; else all of it."""
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
    return chosen


def _tensors(state_dict: Mapping[Any, Any], path: Path) -> StateDict:
    """The dict as plain tensors, none larger than its storage; of wrappers' prefixes freed."""
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} is no state dict: {str(name)[:80]!r} is a {type(value).__name__}, not a tensor; "
                "expected tensors by name, alone or under 'model' or 'model_ema'"
            )
        if not _is_plain(value) or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name!r} is no plain dense tensor, or larger than its data in the file")
    cleaned: StateDict = clean_state_dict({name: value.detach() for name, value in state_dict.items()})
    return cleaned


def _is_plain(value: torch.Tensor) -> bool:
    """Whether it is dense numbers in memory, as safetensors holds them; subclasses mostly are not."""
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return type(value) in (torch.Tensor, nn.Parameter) and plain


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def weights_in(folder: str | Path) -> Path:
    """The file with the weights in a folder: model.safetensors, or pytorch_model.bin where that is all there is.

    Raises:
        FileNotFoundError: if there is neither.
    """
    files = [Path(folder) / name for name in (WEIGHTS, PICKLED_WEIGHTS)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"neither {WEIGHTS} nor {PICKLED_WEIGHTS} in {folder}; a folder of weights holds one of the two beside "
            f"{CONFIG}"
        )
    return found


def described_by_folder(file: Path) -> bool:
    """Whether the file is the one that the config.json beside it describes, rather than one that stands alone."""
    named = file.name in (WEIGHTS, PICKLED_WEIGHTS) and (file.parent / CONFIG).is_file()
    return named and weights_in(file.parent) == file


def read_config(folder: str | Path) -> dict[str, Any]:
    """What config.json in a folder of weights says.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is damaged.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}; a folder of weights holds {WEIGHTS} and {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; write it anew or fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not the settings of a model by name")
    return config


def save_model(
    folder: str | Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], **metadata: str
) -> None:
    """Write model.safetensors and config.json to `folder`, both or neither; see `replacing_files`.

    Args:
        folder: made if it is not there; other files in it stay.
        tensors: by name; no two share memory in the file.
        config: what JSON can hold.
        metadata: facts for the header of model.safetensors.

    Raises:
        CheckpointError: if a tensor is not plain numbers; nothing is written then.
    """
    _check_plain(tensors)
    alone: StateDict = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        alone[name] = tensor.clone() if storage.data_ptr() in storages or storage.nbytes() > tensor.nbytes else tensor
        storages.add(storage.data_ptr())
    with replacing_files(folder) as beside:
        save_tensors(alone, beside / WEIGHTS, {"format": "pt", **metadata})
        _sort_metadata(beside / WEIGHTS)
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_plain(tensors: Mapping[str, Any]) -> None:
    """Refuse what quantised layers have in place of a weight, and what has no values here (meta, sharded)."""
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or not _is_plain(value):
            kind = "tensor without values (device meta)" if getattr(value, "is_meta", False) else type(value).__name__
            raise CheckpointError(
                f"cannot save the model: {name} is a {kind}, and {WEIGHTS} holds plain tensors only; save a model "
                "before it is quantised and quantise it again after loading (or write the quantised one with "
                "torch.save(model.state_dict(), FILE)); gather the tensors of a sharded one first, with full_tensor()"
            )


def save_tensors(tensors: Mapping[str, torch.Tensor], file: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file that may be read by whom the umask lets: safetensors lets nobody else read its own.

    Raises:
        OSError: if the disk is full or cannot be written to.
    """
    file = Path(file)
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata=dict(metadata))
    except SafetensorError as error:  # has the system's error in its words only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
    file.chmod(mode)


def _sort_metadata(file: Path) -> None:
    """Give the facts in the header one order, so that equal weights are equal files: safetensors shuffles them."""
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        opened.seek(8)
        opened.write(text.ljust(size))
