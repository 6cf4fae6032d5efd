"""One process at a time that writes to a folder."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.errors import RunError


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be, in the block; RunError if one is in it already.

    The system ends the lock with the process, whatever kills that; processes that it forked do not hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            ways = "wait for it, end it (`fuser` with the file tells its number), or name another output folder"
            raise RunError(f"another process is at work in {folder} (it holds {file.name}); {ways}") from None
        except OSError as error:
            if error.errno != errno.ENOLCK:  # on a disk without locks nothing tells of other processes
                raise
        yield
