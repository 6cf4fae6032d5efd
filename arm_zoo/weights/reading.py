"""Reads checkpoints of any program without running any code in them."""

import argparse
import json
import os
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict

from arm_zoo.files import CheckpointError, StateDict, is_plain_tensor
from arm_zoo.messages import listed

Choice = Literal["ema", "model"]

_PLACES: dict[Choice, tuple[str, ...]] = {  # the keys under which checkpoints of a training keep their weights
    "ema": ("model_ema", "state_dict_ema"),
    "model": ("model", "state_dict"),
}
_ROOTS = ("base_encoder.", "patch_embed.")  # with which some name of each of our models starts
_MOST_READ = 2**28  # bytes read of a file without its numbers: far more than any header, or directory and pickle


class _Inert:
    """Stands in for a class whose code must not run: its objects become an `OrderedDict` with the pickled attributes.

    torch's reader allows attributes on no other kind of dict.
    """

    def __new__(cls) -> Any:
        return OrderedDict()


_INERT = (
    "yacs.config.CfgNode",  # the settings in VMamba's checkpoints
    "dall_e.encoder.Encoder",  # this and all below: the dVAE's encoder, which OpenAI published as a pickled module
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.linear.Identity",
)
# What a pickle may contain beside tensors and plain values: classes whose creation has no effect.
_HARMLESS: list[Any] = [argparse.Namespace, *((_Inert, name) for name in _INERT)]


class Contents(NamedTuple):
    """What a checkpoint holds, as far as that can be told without reading its numbers."""

    tensors: StateDict  # the weights, on the meta device
    beside: list[str]  # the keys of everything else in it, such as "optimizer"
    arguments: dict[str, Any]  # of the program that trained them, where it saved those
    bytes_read: int  # how many bytes of the file were read to learn this


def quoted(names: Iterable[object]) -> str:
    """The first few names in a file, for messages: long ones are cut, and control characters escaped."""
    return listed([repr(name)[:80] for name in names], 8)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is a .safetensors, by its name; all others are taken for pickles."""
    return Path(path).suffix.lower() == ".safetensors"


def read_checkpoint(path: str | Path, weights: Choice | None = None, unwrap: bool = True) -> StateDict:
    """The tensors by name in a .safetensors or .pth file; no code in it is run, nor more unpacked than it has bytes.

    Args:
        path: the file. Beside tensors and plain values, a .pth may only contain `argparse.Namespace`, the settings of
            yacs, and the modules of OpenAI's dVAE; the last two become dicts.
        weights: which weights to take from a training's checkpoint, the averaged ones ("ema") or the trained ones
            ("model"); None takes the averaged ones if there are any.
        unwrap: whether to take off a prefix that all names share, see `unwrapped`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with open(path, "rb") as file:
        try:
            contents = load_file(path) if is_safetensors(path) else _read_pickle(file, path)
        except Exception as error:  # from damaged files PyTorch raises all sorts: KeyError, OSError, RuntimeError, ...
            raise _unreadable(file, path, error) from error
    return weights_of(contents, weights, path, unwrap)


def read_contents(file: BinaryIO, name: str, weights: Choice | None = None) -> Contents:
    """What a file holds, without its numbers: from the header of a .safetensors, the directory and pickle of a .pth.

    Only a few parts of `file` are read, so it may lie on a server. A .pth of torch before 1.6 is refused, as it is one
    pickle with all the numbers in it. `weights` is as in `read_checkpoint`.
    """
    path, metered = Path(name), _Metered(file, name)
    try:
        contents = _read_header(metered) if is_safetensors(path) else _read_pickle_alone(metered)
    except Exception as error:  # as above
        if metered.failure is not None:
            raise metered.failure from None  # the network failed, not the file
        raise _unreadable(metered, path, error) from error
    if is_safetensors(path):
        return Contents(unwrapped(contents), [], {}, metered.bytes_read)
    tensors = {key: value.to("meta") for key, value in weights_of(contents, weights, path).items()}
    beside = [str(key) for key in contents if _is_beside(key, contents[key])]
    saved = contents.get("args", contents.get("config")) if beside else None
    arguments = vars(saved) if isinstance(saved, argparse.Namespace) else saved
    return Contents(tensors, beside, arguments if isinstance(arguments, dict) else {}, metered.bytes_read)


class _Metered:
    """A file that counts the bytes read, refuses more than `_MOST_READ`, and keeps the error of a failed read."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self.bytes_read = file, name, 0
        self.seek, self.tell = file.seek, file.tell
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        wanted = size if size >= 0 else _size(self) - self.tell()
        self.bytes_read += wanted
        try:
            if self.bytes_read > _MOST_READ:
                raise CheckpointError(f"{self._name}: its header or directory is larger than {_MOST_READ:,} bytes")
            found = self._file.read(wanted)
            if len(found) > wanted:  # PyTorch's reader would write past its memory
                raise CheckpointError(f"{self._name}: {len(found):,} bytes came where {wanted:,} were asked for")
            return found
        except Exception as error:
            self.failure = error
            raise

    def seekable(self) -> bool:
        return True


def _size(file: Any) -> int:
    """The bytes of an open file."""
    before = file.tell()
    size: int = file.seek(0, os.SEEK_END)
    file.seek(before)
    return size


def _read_header(file: Any) -> StateDict:
    """The tensors, without values, that a .safetensors file's header tells: eight bytes of length, then JSON."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: torch.empty(entry["shape"], device="meta") for name, entry in header.items()}


def _is_beside(key: Any, value: Any) -> bool:
    """Whether an entry of a training's checkpoint is anything but weights."""
    return not isinstance(value, torch.Tensor) and all(key not in places for places in _PLACES.values())


def _unreadable(file: Any, path: Path, error: Exception) -> CheckpointError:
    """One clear error for whatever error a damaged or hostile file caused."""
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    wanted = [] if is_safetensors(path) else _refused_globals(file)
    if isinstance(error, pickle.UnpicklingError):
        reason = "no pickle that torch reads"  # torch's own words advise to load it unsafely
    if wanted:
        reason = f"it asks to run {quoted(wanted)}"
    advice = "nothing in it was run: have its tensors saved alone" if wanted else _advice(file, path)
    return CheckpointError(f"cannot read the checkpoint {path}: {reason}; {advice}")


def _read_pickle_alone(file: Any) -> Any:
    """A .pth without its numbers: its tensors have the right shapes but arbitrary values.

    torch reserves address space for the values, but never touches its pages.
    """
    with zipfile.ZipFile(file) as archive:
        _check_archive(archive, _size(file))
    file.seek(0)
    with torch.serialization.skip_data():
        return _load(file)


def _read_pickle(file: BinaryIO, path: Path) -> Any:
    zipped = file.read(4) == b"PK\x03\x04"
    if zipped:  # PyTorch would unpack any amount of data from it, and not notice a flipped bit
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive, path.stat().st_size)
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged!r} is wrong")
    return _load(path, mmap=zipped)


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive of `size` bytes that is larger once it is unpacked."""
    members = archive.infolist()
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > size:
        raise zipfile.BadZipFile("its parts are compressed, which PyTorch never does, or overlap")


def _load(file: Any, mmap: bool = False) -> Any:
    with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols and formats: the errors say it better
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    return dict(_tensors_of_module(contents)) if "_modules" in getattr(contents, "__dict__", {}) else contents


def _tensors_of_module(module: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters, by dotted name, of a module that was pickled whole; `_Inert` stands in for it and its parts."""
    for name, tensor in vars(module)["_parameters"].items():
        yield f"{prefix}{name}", tensor
    for name, part in vars(module)["_modules"].items():
        yield from _tensors_of_module(part, f"{prefix}{name}.")


def _refused_globals(file: Any) -> list[str]:
    """Names of the functions and classes that a pickle asks for and must not have; finding them runs nothing."""
    file.seek(0)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)))
    except Exception:  # not a zip archive, or a damaged one
        allowed = ("torch", "collections.OrderedDict", "argparse.Namespace", *_INERT)
        return sorted(name for name in _globals_of_pickle(file) if not name.startswith(allowed))


def _globals_of_pickle(file: Any) -> set[str]:
    """Names of functions and classes in a .pth that is no zip archive but several pickles followed by data."""
    file.seek(0)
    found: set[str] = set()
    strings, memo = ["", ""], [""]  # the two pushed last; all memoized ones, which later code refers to by number
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


def _advice(file: Any, path: Path) -> str:
    """What to do about an unreadable file, by how it starts and is named."""
    file.seek(0)
    start = file.read(9)
    if start.startswith((b"PK", b"\x80")) and is_safetensors(path):
        return "it is a pickle, not safetensors: rename it to .pth if you trust it"
    if start[8:] == b"{" and not is_safetensors(path):
        return "it looks like safetensors: rename it to .safetensors"
    return "the file is damaged, cut short or no checkpoint: fetch it again"


def weights_of(
    contents: Any, weights: Choice | None = None, path: object = "the checkpoint", unwrap: bool = True
) -> StateDict:
    """The state dict in a checkpoint, which may hold a training's state too, without the prefixes of wrappers.

    `weights` and `unwrap` are as in `read_checkpoint`, `path` is for messages. CheckpointError if there is no dict of
    plain tensors.
    """
    if not isinstance(contents, Mapping):
        said = f"{path} holds no tensors by name but a {type(contents).__name__}"
        raise CheckpointError(f"{said}; save a state dict: torch.save(model.state_dict(), FILE)")
    places = {choice: [name for name in names if contents.get(name) is not None] for choice, names in _PLACES.items()}
    if weights == "ema" and not places["ema"]:
        held = quoted(contents)
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
    tensors = {name: value.detach() for name, value in chosen.items()}
    return unwrapped(tensors) if unwrap else clean_state_dict(tensors)


def unwrapped(tensors: StateDict) -> StateDict:
    """The tensors without the prefixes that timm removes, and without one that all names share.

    A training module that keeps its model as `net`, as one of PyTorch Lightning may, gives all names the prefix
    `net.`. What stands before a root is such a prefix; some name of each of our models starts with one.
    """
    tensors = clean_state_dict(tensors)
    for root in _ROOTS:
        for prefix, found, _ in (name.partition(root) for name in tensors):
            if found and all(name.startswith(prefix) for name in tensors):
                return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
