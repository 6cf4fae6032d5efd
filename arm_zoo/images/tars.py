"""Tar files read in place: release tarballs, compressed or not, and the samples of WebDataset shards."""

import atexit
import os
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

from arm_zoo.images.errors import SourceError
from arm_zoo.messages import printable


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


class _Header(tarfile.TarInfo):
    """A header that must not be missing: Python takes a tar that is cut before or inside a header for a whole one.

    A whole tar ends with at least one block of zeros.
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
            found = f"expected a file or the closing zeros, found: {error}"
            raise tarfile.ReadError(f"unexpected end of data after {start} bytes: {found}") from error


def read_members(path: Path) -> dict[str, Member]:
    """Files of a tar by name; raises `SourceError` if it is damaged."""
    with _damage_told(path):
        tar = _uncompressed(path)
        with tarfile.open(tar, "r:", tarinfo=_Header) as archive:
            files = (info for info in archive if info.isfile())
            return {posixpath.normpath(info.name): Member(tar, info.offset_data, info.size) for info in files}


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged tar into a SourceError."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"cannot read the tar {path}: {cause}") from error


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
    """Whether a tar has to be read from its start; raises `OSError` if it cannot be opened."""
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
    """Neighbouring files of a WebDataset shard that have one key."""

    key: str  # as of `split_key`
    files: dict[str, Member]  # ending, in small letters -> where the file lies in the tar, uncompressed
    contents: dict[str, bytes]  # of those files that were asked for


def read_samples(
    path: Path, is_read: Callable[[str], bool], is_counted: Callable[[Sample], bool] | None = None, first: int = 0
) -> Iterator[Sample]:
    """The samples of a WebDataset shard, compressed or not, from number `first` on and in stored order.

    Folders, hidden files and names without a dot belong to no sample.

    Args:
        is_read: tells by a file's ending, as in `Sample.files`, whether its bytes are read.
        is_counted: tells whether a sample counts as one; by default all do.
        first: samples before this number are skipped without reading their bytes.
    """
    number = 0  # of samples before this one

    def files(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
            key, ending = split_key(posixpath.normpath(info.name))
            if info.isfile() and posixpath.basename(key) and ending:
                yield key, ending.lower(), info

    with _damage_told(path), tarfile.open(path, tarinfo=_Header) as archive:
        for key, files_of_sample in groupby(files(archive), lambda file: file[0]):
            sample = Sample(key, {}, {})
            for _, ending, info in files_of_sample:
                if ending in sample.files:
                    raise SourceError(f"{path} holds {printable(f'{key}.{ending}')} twice; pack it with one of them")
                sample.files[ending] = Member(path, info.offset_data, info.size)
                if number >= first and is_read(ending):
                    sample.contents[ending] = archive.extractfile(info).read()  # type: ignore[union-attr]
            if is_counted is None or is_counted(sample):
                if number >= first:
                    yield sample
                number += 1
