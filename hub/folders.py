"""Folders of weights: written whole or not at all, and what is in one."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open

from arm_zoo.files import CONFIG, WEIGHTS, CheckpointError

GOLDEN = "golden.safetensors"
CARD = "README.md"
FILES = (WEIGHTS, CONFIG, GOLDEN, CARD)


class UsageError(ValueError):
    """What a person asked for cannot be done; the message says what to ask instead."""


def check_complete(folder: Path, names: Sequence[str] = FILES) -> None:
    """Raise UsageError unless the folder has these files of a conversion."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; write it: python -m hub convert FILE {folder}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        source = folder if (folder / WEIGHTS).is_file() else "FILE"  # such as the folder of a run
        raise UsageError(
            f"{folder} lacks {', '.join(missing)}; write a new folder: python -m hub convert {source} OUT"
        )


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raise UsageError unless the folder is new, empty, or, with `overwrite`, one that a conversion wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder to write to")
    there = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in there if name not in FILES]
    if foreign:
        raise UsageError(f"{folder} holds other files ({', '.join(foreign[:4])}); name a new folder")
    if there and not overwrite:
        raise UsageError(f"{folder} has a model already; name a new folder, or replace it with --overwrite")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into, which takes the place of `folder` if the block ends well."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        new, old = Path(beside) / "new", Path(beside) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """Give a path to write to; if the block ends well, what lies there takes the place of `file`, with companions."""
    file = file.absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as beside:
        yield Path(beside) / file.name
        for written in Path(beside).iterdir():
            os.replace(written, file.parent / written.name)


def read_header(file: Path) -> dict[str, str]:
    """The facts in the header of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except Exception as error:  # safetensors' own errors, OSError
        raise CheckpointError(f"cannot read {file}: {error}; convert it anew or fetch it again") from error
