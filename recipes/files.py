"""Whether a folder can be written to."""

import tempfile
from pathlib import Path


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
