"""Images that cannot be decoded: name each once, and stop a run that has too many of them."""

import logging
from collections.abc import Iterable

from .errors import RunError
from .locate import SourceError

log = logging.getLogger(__name__)
SHARE, IMAGES = 0.001, 3  # that are put up with where ``data.max_undecodable`` says nothing: the larger of the two


def name_once(lines: Iterable[str], named: set[str]) -> None:
    """Log the damaged pictures that are not yet among the named, and add them."""
    for line in sorted(set(lines) - named):
        log.warning("skipped: %s", line)
        named.add(line)


def check_undecodable(undecodable: int, pictures: int, purpose: str, limit: float | None) -> None:
    """Stop if too many pictures cannot be decoded.

    Args:
        undecodable: How many cannot; the log has named them.
        pictures: How many there are.
        purpose: What they are for, such as "training".
        limit: The share that is put up with, ``data.max_undecodable``; None: 0.001, but at least 3 images, so that a
            damaged one does not stop a run on a few dozen.

    Raises:
        RunError: If there is no picture that can be decoded.
        SourceError: If more than that cannot.
    """
    if undecodable >= pictures:
        raise RunError(f"none of the {pictures} {purpose} pictures can be decoded; the log names them")
    allowed = max(SHARE * pictures, IMAGES) if limit is None else limit * pictures
    if undecodable > allowed:
        told = f"the default of {SHARE:g}, or {IMAGES} images," if limit is None else f"data.max_undecodable={limit:g}"
        raise SourceError(
            f"{undecodable} of {pictures} {purpose} pictures cannot be decoded, which is more than {told} allows; the "
            "log names them. A larger share, as in data.max_undecodable=0.5, puts up with more"
        )
