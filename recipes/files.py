"""Files that are either whole or not there: written beside their place, then renamed into it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import RunError


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write files into; if the block ends well they replace those of ``folder``.

    Files of ``folder`` with other names stay. Nothing changes if the block raises.

    Raises:
        RunError: If they cannot be written, as on a full disk, where the system's words often name no file.
    """
    names = "files"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as beside:
            try:
                yield Path(beside)
            finally:
                names = ", ".join(sorted(file.name for file in Path(beside).iterdir())) or names
            for file in sorted(Path(beside).iterdir()):
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise RunError(f"could not write {names} to {folder}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Replace one text file (UTF-8)."""
    with replacing_files(path.parent) as beside:
        (beside / path.name).write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Remove what ``replacing_files`` was writing to a folder when its process was killed."""
    for partial in folder.glob(f".partial-{'[a-z0-9_]' * 8}"):  # as tempfile names folders
        shutil.rmtree(partial, ignore_errors=True)


def why_not_writable(folder: Path) -> str | None:
    """The reason why a folder, which need not exist yet, cannot be written to; None if it can."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    try:
        # asking for a file tells the truth where permission bits do not, as for root and on read-only disks
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        return f"{nearest} cannot be written to ({error.strerror})"
    return None
