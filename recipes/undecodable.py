"""Images that cannot be decoded: name each once, and stop a run that has too many of them."""

import logging
from collections.abc import Iterable

from .errors import RunError
from .locate import SourceError

log = logging.getLogger(__name__)


def name_once(lines: Iterable[str], named: set[str]) -> None:
    """Log the damaged pictures that are not yet among the named, and add them."""
    for line in sorted(set(lines) - named):
        log.warning("skipped: %s", line)
        named.add(line)


def check_undecodable(undecodable: int, pictures: int, purpose: str, limit: float) -> None:
    """Stop if too many pictures cannot be decoded.

    Args:
        undecodable: How many cannot; the log has named them.
        pictures: How many there are.
        purpose: What they are for, such as "training".
        limit: The share that is put up with, ``data.max_undecodable``.

    Raises:
        RunError: If there is no picture that can be decoded.
        SourceError: If more than the share cannot.
    """
    if undecodable >= pictures:
        raise RunError(f"none of the {pictures} {purpose} pictures can be decoded; the log names them")
    if undecodable > limit * pictures:
        raise SourceError(
            f"{undecodable} of {pictures} {purpose} pictures cannot be decoded, which is more than "
            f"data.max_undecodable={limit:g} allows; the log names them"
        )
