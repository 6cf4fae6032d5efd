"""Files that are either whole or not there: written beside their place, then renamed into it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write files into; if the block ends well they replace those of ``folder``.

    Files of ``folder`` with other names stay. Nothing changes if the block raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as beside:
        yield Path(beside)
        for file in sorted(Path(beside).iterdir()):
            os.replace(file, folder / file.name)


def write_text(path: Path, text: str) -> None:
    """Replace one text file (UTF-8)."""
    with replacing_files(path.parent) as beside:
        (beside / path.name).write_text(text, encoding="utf-8")
