"""Reading weight files and writing them atomically, with their sha256 and config.json."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

StateDict = dict[str, torch.Tensor]

WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"  # as timm.models.save_for_hf writes unless it is asked for safetensors
CONFIG = "config.json"
HELD_OUT = "validation.txt"  # beside weights, if their run held images out of those that it was given: lists these


class CheckpointError(RuntimeError):
    """Weights that cannot be found or read, or do not fit the model."""


class DownloadError(CheckpointError):
    """Weights that could not be fetched; `__cause__` is the client's error, if this package did not refuse them."""


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """An empty folder to write into; when the block ends, its files replace those of the same names in `folder`.

    `folder` is made if it is missing. Each file is replaced atomically: it is flushed to the disk before it gets its
    name, and the names are on the disk when the block is left. If the block raises, nothing changes. The set of files
    is not atomic: a process that is killed while they get their names leaves new files beside old ones. Folders of
    files are moved too, whole; no folder of their name may be there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = tempfile.TemporaryDirectory(prefix=".partial-", dir=folder)
    except OSError as error:
        error.filename = str(folder)  # which people know, not the folder within
        raise
    with partial as beside:
        try:
            yield Path(beside)
            paths = sorted(Path(beside).iterdir())
            for path in paths:
                if (folder / path.name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, "A folder has this name already", str(folder / path.name))
                flush(path)
        except OSError as error:
            if error.errno is not None and error.filename is None:  # as on a full disk
                names = sorted(path.name for path in Path(beside).iterdir() if path.is_file())
                error.filename = str(folder / ", ".join(names))
            elif isinstance(error.filename, str) and Path(error.filename).is_relative_to(beside):
                error.filename = str(folder / Path(error.filename).relative_to(beside))
            raise
        for path in paths:
            os.replace(path, folder / path.name)
    flush(folder)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # there folders cannot be opened
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


def is_plain_tensor(value: torch.Tensor) -> bool:
    """Whether it holds dense numbers in memory, as safetensors can save them; most subclasses of Tensor do not."""
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return type(value) in (torch.Tensor, nn.Parameter) and plain


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, for weights whose file is not known."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_in(folder: str | Path) -> Path:
    """The file with the weights in a folder: model.safetensors, or pytorch_model.bin where that is all there is."""
    for file in (Path(folder, WEIGHTS), Path(folder, PICKLED_WEIGHTS)):
        if file.is_file():
            return file
    both = f"neither {WEIGHTS} nor {PICKLED_WEIGHTS} in {folder}"
    expected = _advice_on_run(Path(folder)) or f"a folder of weights holds one of the two beside {CONFIG}"
    raise FileNotFoundError(f"{both}; {expected}")


def recipe_of(settings: Mapping[str, Any]) -> str:
    """The name of the recipe that has these settings, by their names as in `recipes.config`."""
    if "head" in settings:
        return "segment"
    if "pretrained" in settings:
        return "finetune"
    return "dvae" if settings.get("model") == "dvae" else "pretrain"


def _advice_on_run(folder: Path) -> str | None:
    """Of a run of the recipes: where a pretraining has its models, or how a run goes on that has none; else None."""
    if (folder / "pretraining_model").exists():
        return f"its run has written {folder / 'pretraining_model'}, and {folder / 'backbone'} for use in timm"
    states = sorted(folder.glob("checkpoints/step-*/state.json"))
    if not states or (folder / WEIGHTS).exists():
        return None
    try:
        state = json.loads(states[-1].read_text(encoding="utf-8"))
        config, done = state["config"], state["position"]["epoch"]
        recipe, epochs = recipe_of(config), config["epochs"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    far = f"its run has not finished: {states[-1].parent.relative_to(folder)} has {done} of {epochs} epochs"
    again = f"python -m recipes.{recipe} --config {shlex.quote(str(folder / 'config.yaml'))}"
    return f"{far}. To go on with it, type {again}"


def described_by_folder(file: Path) -> bool:
    """Whether the config.json beside a file describes it, so that the two are a folder of weights."""
    named = file.name in (WEIGHTS, PICKLED_WEIGHTS) and (file.parent / CONFIG).is_file()
    return named and weights_in(file.parent) == file


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of config.json in a folder of weights."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        expected = _advice_on_run(Path(folder)) or f"a folder of weights holds {WEIGHTS} and {CONFIG}"
        raise FileNotFoundError(f"no {CONFIG} in {folder}; {expected}")
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
    """Write model.safetensors, with `metadata` in its header, and config.json, each whole; see `replacing_files`.

    Tensors that are not plain numbers are refused. Tensors that share memory are written separately.
    """
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or not is_plain_tensor(value):
            kind = "tensor without values (device meta)" if getattr(value, "is_meta", False) else type(value).__name__
            raise CheckpointError(
                f"cannot save the model: {name} is a {kind}, and {WEIGHTS} holds plain tensors only; save a model "
                "before it is quantised and quantise it again after loading (or write the quantised one with "
                "torch.save(model.state_dict(), FILE)); gather the tensors of a sharded one first, with full_tensor()"
            )
    with replacing_files(folder) as beside:
        save_tensors(in_own_memory(tensors), beside / WEIGHTS, {"format": "pt", **metadata})
        # sort the metadata, whose order safetensors randomises, so that equal weights give equal files
        with open(beside / WEIGHTS, "r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def in_own_memory(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """The tensors on the CPU, copied where they share memory with each other or are part of a larger storage."""
    alone: StateDict = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        alone[name] = tensor.clone() if storage.data_ptr() in storages or storage.nbytes() > tensor.nbytes else tensor
        storages.add(storage.data_ptr())
    return alone


def save_tensors(tensors: Mapping[str, torch.Tensor], file: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file with the umask's permissions; `save_file` alone lets only its owner read it."""
    file = Path(file)
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata=dict(metadata))
    except SafetensorError as error:  # which tells the system's error in its text only
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        raise
    file.chmod(mode)
