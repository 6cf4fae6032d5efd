"""How messages write names, numbers of things and paths."""

import os
from collections.abc import Sequence


def printable(path: str | bytes) -> str:
    """A path for messages and tables, which take text only: bytes that are not UTF-8 are written as in `caf\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def listed(names: Sequence[object], most: int = 5) -> str:
    """The names, or the first of them and how many more there are; "none" without any."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more or "none"


def plural(count: int, what: str) -> str:
    """A number of things, as in `1 row` and `2 rows`."""
    return f"{count} {what}{'' if count == 1 else 's'}"
