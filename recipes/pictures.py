"""Picture files of every kind as RGB, the way a viewer shows them; what cannot be decoded is an error with a name."""

import logging
import warnings
from collections.abc import Iterable
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import RunError
from .locate import SourceError

WHITE_16_BIT = 65535
log = logging.getLogger(__name__)


class UndecodablePicture(ValueError):
    """A picture file that is damaged, cut off, no picture at all, or too large to be meant.

    Args:
        name: The file, or the file and row that it stands in.
        cause: What is wrong with it.
    """

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(name, cause)  # both, so that the error can be pickled on its way out of a worker
        self.name, self.cause = name, cause

    def __str__(self) -> str:
        return f"{self.name} cannot be decoded: {self.cause}"


def decode_picture(encoded: bytes | str, name: str, mode: str = "RGB") -> Image.Image:
    """Decode a picture: upright, in 8 bits per channel, transparent parts on white.

    Args:
        encoded: The file's bytes, or its path.
        name: For the error.
        mode: ``"RGB"`` or ``"L"`` (grey).

    Raises:
        UndecodablePicture: Whatever the decoder says, and for pictures above PIL's limit of pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL complains about odd EXIF data and such on pictures that are fine
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(encoded if isinstance(encoded, str) else BytesIO(encoded)) as image:
                image.load()
                # After loading: in PNG files the orientation may stand behind the pixels.
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    image = ImageOps.exif_transpose(image)
                return convert(image, mode)
    except UnidentifiedImageError:  # its text has an address in memory, so it would never be the same twice
        raise UndecodablePicture(name, "no picture in any format that is known") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise UndecodablePicture(name, f"{type(error).__name__}: {error}") from None


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Any of PIL's modes as ``mode``, where PIL's own conversion would clip 16 bits or uncover what is transparent."""
    if image.mode == mode:
        return image if "transparency" not in image.info else on_white(image.convert("RGBA")).convert(mode)
    if image.mode.startswith("I"):
        return from_16_bit(image).convert(mode)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is unknown")
    if image.has_transparency_data:
        return on_white(image.convert("RGBA")).convert(mode)
    return image.convert(mode)


def from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, which PIL also holds in 32-bit integers, as 8-bit grey."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > WHITE_16_BIT:
        raise ValueError(f"pixels from {values.min()} to {values.max()}; allowed: up to 16 bits")
    return Image.fromarray(np.round(values * (255 / WHITE_16_BIT)).astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """RGBA on a white ground."""
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image).convert("RGB")


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
