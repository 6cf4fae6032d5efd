"""Image files of every kind as RGB or grey, the way a viewer shows them; damaged ones are an error with a name.

Training, `custom` scoring and `predict` decode here, so that a model sees the same pixels in all three. Only
ImageNet's own test sets are read by timm's rule instead, a plain conversion, which published scores are based on.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from arm_zoo.images.jpeg import read_header

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte in RGB
_WHITE_16_BIT = 65535


class UndecodableImage(ValueError):
    """An image file that is damaged, cut off, no image at all, or larger than the limit."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(name, cause)  # both, so that the error can be pickled on its way out of a worker
        self.name, self.cause = name, cause

    def __str__(self) -> str:
        return f"{self.name} cannot be decoded: {self.cause}"


def decode_image(encoded: bytes | str, name: str, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image, its bytes or its path: upright, in 8 bits per channel, transparent parts on white.

    `mode` is "RGB", or "L" for grey. Images that are too large are refused before memory is taken for them.
    """
    try:
        with _limited_to(max_pixels), Image.open(encoded if isinstance(encoded, str) else BytesIO(encoded)) as file:
            file.load()
            return _convert(ImageOps.exif_transpose(file) if _is_turned(file) else file, mode)
    except UnidentifiedImageError:  # its text has an address in memory, so it would never be the same twice
        raise UndecodableImage(name, "no image in any format that is known") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        cause = f"it has more than the {max_pixels:,} pixels that are allowed (max_pixels)"
        raise UndecodableImage(name, cause) from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise UndecodableImage(name, f"{type(error).__name__}: {error}") from None


def decode_tensor(encoded: bytes, name: str, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Tensor:
    """As `decode_image`, but a tensor (C, H, W), uint8; torchcodec decodes plain JPEGs if it is installed."""
    header, decode_jpeg = read_header(encoded), jpeg_decoder()
    if decode_jpeg and header and header.height * header.width <= max_pixels:
        with suppress(RuntimeError):  # damaged: Pillow says whether it can be shown, and names the cause
            if mode == "RGB" or header.components == 1:  # of colours Pillow makes another grey than the file's luma
                return decode_jpeg(encoded, mode=mode if mode == "RGB" else "GRAY")
    return pil_to_tensor(decode_image(encoded, name, mode, max_pixels))


@cache
def jpeg_decoder() -> Callable[..., Any] | None:
    """torchcodec's decoder, which is faster than Pillow's; None if it is not installed or does not fit this torch."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):
        return None
    return decode_jpeg


@contextmanager
def _limited_to(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse larger images, and keep it silent about odd metadata of images that are fine."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data of a loaded image say that it is not upright; damaged ones say nothing, as to a viewer."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # in PNG files it may stand behind the pixels
    except Exception:  # Pillow raises all sorts
        return False


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Any of Pillow's modes as `mode`, where its own conversion would clip 16 bits or uncover what is transparent."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow also holds in 32-bit integers
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > _WHITE_16_BIT:
            raise ValueError(f"pixels from {values.min()} to {values.max()}; allowed: up to 16 bits")
        return Image.fromarray(np.round(values * (255 / _WHITE_16_BIT)).astype(np.uint8)).convert(mode)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white is unknown; allowed: integers of up to 16 bits")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image if image.mode == mode else image.convert(mode)
