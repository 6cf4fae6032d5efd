"""Labelled images as the sources give them: names, labels as they are there, and how each image is read."""

import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
from PIL import Image
from timm.data import get_img_extensions

from arm_zoo.images.decode import decode_image
from arm_zoo.images.listing import IMAGE_ENDINGS, is_image, natural_order, printable

Reader = Callable[[int], IO[bytes]]
NamedBy = Literal["folders", "declaration", "words"]
TIMMS_ENDINGS = tuple(sorted({*get_img_extensions(as_set=True), ".webp"}))


@dataclass(frozen=True)
class Reading:
    """Which files of a source are images, and how they are decoded.

    Attributes:
        name: goes into fingerprints, so that rows of another reading are not taken for finished; empty for timm's.
        endings: of image files, in small letters.
        is_image: whether a file is an image, by its name.
        decode: an open image file, its name for errors, and Pillow's mode -> the image.
    """

    name: str
    endings: Sequence[str]
    is_image: Callable[[str], bool]
    decode: Callable[[IO[bytes], str, str], Image.Image]

    @property
    def is_timms(self) -> bool:
        """Whether this is how ImageNet's sets are read."""
        return not self.name


def _is_image_of_timm(path: str) -> bool:
    name = posixpath.basename(path)
    return name.lower().endswith(TIMMS_ENDINGS) and not name.startswith(".")


def _decode_as_timm(file: IO[bytes], name: str, mode: str) -> Image.Image:
    """To the last bit what timm.data.ImageDataset reads; Pillow's faster draft mode would change pixels."""
    return Image.open(file).convert(mode)


AS_TIMM = Reading("", TIMMS_ENDINGS, _is_image_of_timm, _decode_as_timm)


@dataclass(frozen=True)
class _DecodeAsTraining:
    max_pixels: int

    def __call__(self, file: IO[bytes], name: str, mode: str) -> Image.Image:
        return decode_image(file.read(), name, mode, self.max_pixels)


def as_training(max_pixels: int) -> Reading:
    """Images up to this size as the recipes read them."""
    name = f"read as in training, up to {max_pixels} pixels"
    return Reading(name, IMAGE_ENDINGS, is_image, _DecodeAsTraining(max_pixels))


@dataclass(frozen=True)
class Listing:
    """Labelled images in an order that does not depend on how the disk lists them.

    Attributes:
        location: what the user called it.
        files: '/'-separated path of each image inside the source, '' where the source has no file names.
        labels: (N,) indices into `class_names`, or the numbers that the source has where it names no classes.
        class_names: names of the classes; None where labels are bare numbers.
        named_by: where the names come from: folders, a declaration (ClassLabel) whose order is the classes' own, or
            the labels themselves, words whose order means nothing.
        read: opens the image of an index.
        sizes: (N,) bytes of each image.
        reading: how the files become images.
        notes: what was left out, for the rows' marks.
    """

    location: str
    files: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...] | None
    named_by: NamedBy
    read: Reader
    sizes: np.ndarray
    reading: Reading
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        """A name for messages."""
        return printable(self.files[index]) or f"image {index}"

    def decode(self, index: int, mode: str) -> Image.Image:
        """The image of an index in Pillow's mode; whatever the decoder raises where it is damaged."""
        with self.read(index) as file:
            return self.reading.decode(file, self.describe(index), mode)


def indexed(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Each different name once, in natural order, and (N,) indices of the names among them."""
    class_names = tuple(natural_order(set(names)))
    index = {name: i for i, name in enumerate(class_names)}
    return class_names, np.array([index[name] for name in names], dtype=np.int64)


def labels_of_text(location: str, texts: Sequence[str]) -> tuple[tuple[str, ...] | None, np.ndarray]:
    """Class names and (N,) labels written as text: None and the numbers where all are numbers, else as `indexed`."""
    if all(re.fullmatch("-?[0-9]+", text) for text in texts):
        return None, numbers(location, [int(text) for text in texts])
    return indexed(texts)


def numbers(location: str, values: Sequence[int]) -> np.ndarray:
    """(N,) labels.

    Raises:
        ValueError: for numbers that are too large for any class.
    """
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"{location}: {max(values, key=abs)} is no label") from error
