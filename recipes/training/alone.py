"""One process at a time that writes to a folder."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.errors import RunError

if sys.platform != "win32":
    import fcntl


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be, in the block; RunError if one is in it already.

    The system releases the lock when the process ends, whatever ends it, and does not pass it on to forked processes.
    Windows has no such lock: there nothing keeps a second process out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            ways = "wait for it, end it (`fuser` with the file tells its number), or name another output folder"
            raise RunError(f"another process is at work in {folder} (it holds {file.name}); {ways}") from None
        except OSError as error:
            if error.errno != errno.ENOLCK:  # some network disks have no locks: nothing tells of other processes there
                raise
        yield
