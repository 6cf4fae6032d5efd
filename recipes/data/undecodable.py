"""Images that cannot be decoded: each is named once, and too many of them stop the run."""

import logging
from collections.abc import Iterable

from arm_zoo.images.errors import SourceError
from recipes.errors import RunError

log = logging.getLogger(__name__)
FRACTION, IMAGES = 0.001, 3  # the default of `data.max_undecodable`: the larger of the two


def name_once(lines: Iterable[str], named: set[str]) -> None:
    """Log the damaged images that are not in `named` yet, and add them to it."""
    for line in sorted(set(lines) - named):
        log.warning("skipped: %s", line)
        named.add(line)


def check_undecodable(undecodable: int, images: int, purpose: str, limit: float | None) -> None:
    """Raise if none of the images can be decoded, or if too large a fraction cannot.

    `purpose` is a word for messages, such as "training". The limit None stands for 0.001, but at least 3 images, so
    that one damaged image does not stop a run on a few dozen.
    """
    if undecodable >= images:
        raise RunError(f"none of the {images} {purpose} images can be decoded; the log names them")
    allowed = max(FRACTION * images, IMAGES) if limit is None else limit * images
    if undecodable > allowed:
        default = f"the default of {FRACTION:g}, or {IMAGES} images,"
        told = default if limit is None else f"data.max_undecodable={limit:g}"
        problem = f"{undecodable} of {images} {purpose} images cannot be decoded, which is more than {told} allows"
        way_out = "A larger fraction, as in data.max_undecodable=0.5, tolerates more"
        raise SourceError(f"{problem}; the log names them. {way_out}")
