"""Tar files read at random places: release tarballs, compressed or not, and WebDataset shards."""

import atexit
import io
import json
import os
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from arm_zoo.images.listing import printable

__all__ = [
    "FromTar",
    "Member",
    "Sample",
    "is_compressed",
    "read_members",
    "read_samples",
    "read_shards",
    "sidecar",
    "split_key",
]

_UNREADABLE = (tarfile.TarError, EOFError, OSError, zlib.error)


@dataclass(frozen=True)
class Member:
    """Where the bytes of a file lie in an uncompressed tar."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class FromTar:
    members: Sequence[Member]

    def __call__(self, index: int) -> IO[bytes]:
        return io.BytesIO(self.members[index].read())


class _Header(tarfile.TarInfo):
    """A header that has to be there: Python's own takes a tar that is cut before or inside one for a whole tar.

    A whole tar ends with a block of zeros, most have two.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            start: int = archive.offset
            is_closing = isinstance(error, tarfile.EOFHeaderError)  # type: ignore[attr-defined]  # unknown to mypy
            if is_closing or start == 0:  # Python itself refuses what does not begin as a tar
                raise
            raise tarfile.ReadError(
                f"unexpected end of data after {start} bytes: expected a file or the closing zeros, found: {error}"
            ) from error


def read_members(path: Path) -> dict[str, Member]:
    """Files of a tar by name.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return dict(_members(path))
    except _UNREADABLE as error:
        raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    return f"cannot read the tar {path}: {(str(error) or type(error).__name__).splitlines()[0]}"


def _members(path: Path) -> Iterator[tuple[str, Member]]:
    tar = _uncompressed(path)
    with tarfile.open(tar, "r:", tarinfo=_Header) as archive:
        for info in archive:
            if info.isfile():
                yield posixpath.normpath(info.name), Member(tar, info.offset_data, info.size)


def _uncompressed(path: Path) -> Path:
    """The tar itself, or its contents in a temporary file: a compressed one cannot be read at random places."""
    if not is_compressed(path):
        return path
    handle, name = tempfile.mkstemp(suffix=".tar")
    atexit.register(Path(name).unlink, missing_ok=True)
    with os.fdopen(handle, "wb") as out, tarfile.open(path, "r:*") as archive:
        stream: Any = archive.fileobj
        stream.seek(0)
        shutil.copyfileobj(stream, out)
    return Path(name)


def is_compressed(path: Path) -> bool:
    """Whether a tar has to be read from its start.

    Raises:
        OSError: if it cannot be opened.
    """
    try:
        tarfile.open(path, "r:").close()
    except tarfile.ReadError:
        return True
    return False


def split_key(file: str) -> tuple[str, str]:
    """WebDataset's key of a file and its ending, which begins after the first dot: a/b.seg.png -> a/b and seg.png."""
    folder, name = posixpath.split(file)
    stem, _, ending = name.partition(".")
    return posixpath.join(folder, stem), ending


class Sample(NamedTuple):
    """Neighbouring files of a WebDataset shard that have one key.

    Args:
        key: as of `split_key`.
        files: ending, in small letters -> where the file lies in the tar, uncompressed.
        contents: the bytes of those files that were asked for.
    """

    key: str
    files: dict[str, Member]
    contents: dict[str, bytes]


def read_samples(path: Path, is_read: Callable[[str], bool], first: int = 0) -> Iterator[Sample]:
    """The samples of a WebDataset shard from number `first` on, in stored order; compressed ones, too.

    Folders, hidden files and names without a dot belong to no sample.

    Args:
        path: the tar.
        is_read: called with a file's ending, as in `Sample.files`; whether its bytes are wanted.
        first: samples before it are passed over without being read.

    Raises:
        ValueError: if the tar is damaged, or holds a file twice in one sample.
    """
    number, sample = -1, None
    try:
        with tarfile.open(path, tarinfo=_Header) as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                key, ending = split_key(posixpath.normpath(info.name))
                if not (info.isfile() and posixpath.basename(key) and ending):
                    continue
                ending = ending.lower()
                if sample is None or sample.key != key:
                    if sample is not None and number >= first:
                        yield sample
                    number, sample = number + 1, Sample(key, {}, {})
                if ending in sample.files:
                    raise ValueError(f"{path} holds {printable(f'{key}.{ending}')} twice")
                sample.files[ending] = Member(path, info.offset_data, info.size)
                if number >= first and is_read(ending):
                    sample.contents[ending] = archive.extractfile(info).read()  # type: ignore[union-attr]
    except _UNREADABLE as error:
        raise ValueError(_unreadable(path, error)) from error
    if sample is not None and number >= first:
        yield sample


def sidecar(file: str, members: Mapping[str, Member]) -> str | None:
    """WebDataset keeps the label of KEY.jpg in KEY.cls (or .class, .json) beside it."""
    key, _ = split_key(file)
    return next((key + suffix for suffix in (".cls", ".class", ".json") if key + suffix in members), None)


def read_shards(
    shards: Mapping[Path, Mapping[str, Member]], is_meant: Callable[[str], bool]
) -> tuple[list[str], list[str], list[Member]]:
    """Names, labels as text, and places of the images of WebDataset shards, whose keys are unique within a shard.

    Args:
        shards: files of each tar.
        is_meant: whether a file's name is that of an image.

    Raises:
        ValueError: if an image has no label, or one that cannot be read.
    """
    files, labels, places = [], [], []
    for shard, members in sorted(shards.items()):
        for file in sorted(filter(is_meant, members)):
            name = sidecar(file, members)
            if name is None:
                raise ValueError(f"{shard}: {file} has neither a .cls nor a .json with its label beside it")
            files.append(f"{shard.name}/{file}")
            labels.append(_label_of(f"{shard}: {name}", members[name].read()))
            places.append(members[file])
    return files, labels, places


def _label_of(name: str, contents: bytes) -> str:
    try:
        text = contents.decode().strip()
        facts = json.loads(text) if name.endswith(".json") else {"label": text}
    except ValueError as error:  # of the encoding or of JSON
        raise ValueError(f"{name} holds no label: {error}") from error
    if not isinstance(facts, dict) or "label" not in facts:
        found = f"only {', '.join(sorted(facts))}" if isinstance(facts, dict) else f"it is {str(facts)[:40]}"
        raise ValueError(f'{name} has no "label", {found}')
    label = facts["label"]
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise ValueError(f"{name} holds the label {label!r}; allowed: a whole number or a name")
    return str(label)
