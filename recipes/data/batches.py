"""Batches of a split, as far as the processes that load images make them; the rest happens on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from arm_zoo.images.decode import UndecodableImage, decode_tensor
from arm_zoo.images.jpeg import read_baseline_header
from arm_zoo.images.tables import Encoded, ImageTable
from recipes.data.config import DataConfig
from recipes.data.draws import Box, Drawing, Draws
from recipes.data.kept import DAMAGED_IN_A_ROW, DecodedSplit, StoredBlock, none_in_a_row
from recipes.data.sampling import Key
from recipes.data.source import Source, Split
from recipes.data.transforms import Normalisation, ScoringTransform, Transform, Window, cropped


class Batch(NamedTuple):
    """Images of one forward pass.

    Between processes, images travel in 8 bits, which takes a quarter of the memory, and the GPU normalises them. In
    training, another image takes the place of one that cannot be decoded; in scoring, such an image is left out.
    """

    images: Tensor  # (N, C, H, W), float32, normalised
    classes: Tensor  # (N,), class indices
    indices: Tensor  # (N,), places of the images in their split (for streams: in the epoch's order)
    undecodable: list[str]  # a line for every image that could not be decoded, with its name and the reason
    seeds: Tensor = torch.empty(0, dtype=torch.long)  # (N,), for the random draws of an objective; none in scoring

    def ready(self, device: torch.device, normalise: Normalisation) -> "Batch":
        """Copy the batch to a device and normalise it; copies from pinned memory do not block."""
        images, classes = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.classes))
        return self._replace(images=normalise(images), classes=classes)


@dataclass(frozen=True)
class Files:
    """The N image files of a batch. Those with boxes are to be decoded on the GPU, the others are decoded already."""

    stored: StoredBlock
    boxes: list[Box | None]  # the parts to crop from the decoded images: N for the first views, then for the others

    def encoded(self) -> list[Encoded]:
        """The images as they are stored."""
        return [self.stored.encoded(row) for row in range(len(self.stored))]


@dataclass(frozen=True)
class Loaded:
    """A batch of N training images as a worker leaves it; `recipes.data.finishing` does the rest.

    V views of each image make V * N crops: the first views of all images, then the second ones.
    """

    images: Tensor  # (M, C, H, W), uint8, cropped and resized: all V * N, or only what the GPU does not decode
    classes: Tensor  # (N,)
    indices: Tensor  # (N,)
    undecodable: list[str]
    draws: Draws  # of V * N crops
    files: Files | None  # None: all are decoded, flipped and changed, or the GPU keeps all images
    boxes: Tensor | None = None  # (V * N, 4), the parts to crop from the images at `indices` that the GPU keeps

    def left_encoded(self) -> list[Tensor]:
        """The files to be decoded on the GPU, in the order of the first views."""
        if self.files is None:
            return []
        boxes = self.files.boxes[: len(self.files.stored)]
        return [self.files.stored[row] for row, box in enumerate(boxes) if box is not None]


@dataclass(frozen=True)
class LoadedToScore:
    """A batch of N images to score on as a worker leaves it; `recipes.data.finishing` does the rest."""

    images: Tensor  # (M, C, H, W), uint8, transformed: those that the GPU does not decode
    classes: Tensor  # (N,)
    indices: Tensor  # (N,)
    undecodable: list[str]
    files: StoredBlock  # the N - M others, in colour
    windows: list[Window | None]  # N: what the GPU makes of each file; None: an image of `images`

    def left_encoded(self) -> list[Tensor]:
        """The files to be decoded on the GPU."""
        return [self.files[row] for row in range(len(self.files))]


class Images:
    """Makes batches of a split to score on, in 8 bits."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self._split, self._transform = split, transform

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Decode a batch; images that cannot be decoded are left out."""
        images, classes, indices, undecodable = [], [], [], list[str]()
        for key, encoded in zip(keys, stored(self._split, keys), strict=True):
            image = transformed(encoded, self._split.mode, self._transform, undecodable)
            if image is not None:
                images.append(image)
                classes.append(encoded.label)
                indices.append(key.place)
        batch = torch.stack(images) if images else torch.empty(0, len(self._split.mode), 1, 1)  # "RGB" or "L"
        return Batch(batch, torch.tensor(classes).long(), torch.tensor(indices).long(), undecodable)


class EncodedImagesToScore:
    """Makes batches to score on for a GPU that decodes JPEG files; others are decoded and transformed here.

    Files of fewer than `least` pixels are others.
    """

    def __init__(self, split: Split, transform: ScoringTransform, least: int = 0) -> None:
        self._split, self._transform, self._least = split, transform, least

    def batch(self, keys: Sequence[Key]) -> LoadedToScore:
        """Read the files of a batch, and decode those that the GPU cannot; what nobody can decode is left out."""
        images, windows, classes, indices, undecodable = [], list[Window | None](), [], [], list[str]()
        rows, contents = list[Encoded](), list[bytes]()
        for key, encoded in zip(keys, stored(self._split, keys), strict=True):
            content = read(encoded)
            size = size_for_gpu(content, encoded, self._split.mode, self._least)
            if size is not None:
                rows.append(encoded)
                contents.append(content)
                windows.append(self._transform.window(*size))
            else:
                read_already = encoded._replace(data=content or encoded.data)
                image = transformed(read_already, self._split.mode, self._transform, undecodable)
                if image is None:
                    continue
                images.append(image)
                windows.append(None)
            classes.append(encoded.label)
            indices.append(key.place)
        small = torch.stack(images) if images else torch.empty(0, len(self._split.mode), 1, 1, dtype=torch.uint8)
        numbers = torch.tensor(classes).long(), torch.tensor(indices).long()
        return LoadedToScore(small, *numbers, undecodable, StoredBlock.of(rows, contents), windows)


class AugmentedImages:
    """Makes batches of views of training images, cropped, flipped and changed as the draws of `drawing` say."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        image_size: tuple[int, int],
        seed: int,
        drawing: type[Drawing] = Drawing,
    ) -> None:
        self.split = source.train
        self.kept: DecodedSplit | None = None  # the same split decoded, if it is in memory
        self._shape = (source.channels, *image_size)
        self.drawing = drawing(config, image_size, source.mean, seed)

    def batch(self, keys: Sequence[Key]) -> Loaded:
        """Decode a batch; the next image takes the place of one that cannot be decoded."""
        draws, undecodable = self._draw(keys), list[str]()
        images = torch.empty(len(draws.flips), *self._shape, dtype=torch.uint8)
        classes = torch.empty(len(keys), dtype=torch.long)
        for row, (image, label) in enumerate(self._opened(keys, undecodable)):
            classes[row] = label
            for place in range(row, len(images), len(keys)):
                crop = self._cropped(image, draws, place)
                images[place] = self._changed(crop.flip(-1) if draws.flips[place] else crop, draws, place)
        return Loaded(images, classes, places(keys), undecodable, draws, None)

    def _opened(self, keys: Sequence[Key], undecodable: list[str]) -> Iterator[tuple[Tensor, int]]:
        """The image and class of each key, as `decoded` gives them."""
        if self.kept is None:
            encoded = stored(self.split, keys)
            yield from (self.decoded(encoded, row, key.place, undecodable) for row, key in enumerate(keys))
            return
        for key in keys:
            undecodable += self.kept.undecodable.get(key.place, ())
            yield self.kept.image(key.place), int(self.kept.labels[key.place])

    def decoded(self, batch: Sequence[Encoded], row: int, place: int, undecodable: list[str]) -> tuple[Tensor, int]:
        """The image and class in a row of the batch, or those of the next image that can be decoded.

        The next image is that of the split, or in a stream that of the batch. Each image that cannot be decoded adds a
        line to `undecodable`.
        """
        table = self.split if isinstance(self.split, ImageTable) else None
        for ahead in range(min(len(batch if table is None else table), DAMAGED_IN_A_ROW)):
            if table is None or ahead == 0:
                encoded = batch[(row + ahead) % len(batch)]
            else:
                encoded = table.stored((place + ahead) % len(table))
            try:
                return decoded(encoded, self.split.mode), encoded.label
            except UndecodableImage as error:
                undecodable.append(str(error))
        raise none_in_a_row(undecodable[-1])

    def _draw(self, keys: Sequence[Key]) -> Draws:
        return self.drawing(keys[0].epoch, [key.place for key in keys])

    def _cropped(self, image: Tensor, draws: Draws, place: int) -> Tensor:
        box = self.drawing.box(draws.crops[place], *image.shape[1:])
        return cropped(image, box, self._shape[1:], self.drawing.interpolation)

    def _changed(self, image: Tensor, draws: Draws, place: int) -> Tensor:
        """Apply to a crop what Pillow does: RandAugment, or the changes of two views."""
        if self.drawing.changes is None or len(draws.changes[place]) == 0:
            return image
        return pil_to_tensor(self.drawing.changes.apply_to_image(to_pil_image(image), draws.changes[place]))


class EncodedImages(AugmentedImages):
    """Makes batches for a GPU that decodes JPEG files; all other files are decoded, cropped and resized here."""

    def batch(self, keys: Sequence[Key]) -> Loaded:
        """Read the files of a batch, and decode those that the GPU cannot."""
        encoded, draws, undecodable = stored(self.split, keys), self._draw(keys), list[str]()
        contents = [read(row) for row in encoded]
        rows = [row._replace(data=data or row.data) for row, data in zip(encoded, contents, strict=True)]
        crops, classes, boxes = dict[int, Tensor](), list[int](), dict[int, Box]()
        for row, key in enumerate(keys):
            size, label = size_for_gpu(contents[row], rows[row], self.split.mode), rows[row].label
            views = range(row, len(draws.crops), len(keys))
            if size is None:
                image, label = self.decoded(rows, row, key.place, undecodable)
                crops |= {place: self._cropped(image, draws, place) for place in views}
            else:
                boxes |= {place: self.drawing.box(draws.crops[place], *size) for place in views}
            classes.append(label)
        ordered = [crops[place] for place in sorted(crops)]
        small = torch.stack(ordered) if ordered else torch.empty(0, *self._shape, dtype=torch.uint8)
        files = Files(StoredBlock.of(encoded, contents), list(map(boxes.get, range(len(draws.crops)))))
        return Loaded(small, torch.tensor(classes), places(keys), undecodable, draws, files)


class KeptImages(AugmentedImages):
    """Makes batches of training images that the GPU keeps decoded."""

    kept: DecodedSplit  # without pixels; set before the first batch

    def batch(self, keys: Sequence[Key]) -> Loaded:
        """Draw the augmentation of a batch."""
        draws, indices = self._draw(keys), places(keys)
        sizes = self.kept.sizes[indices].repeat(self.drawing.views, 1).numpy().astype(np.int64)
        boxes = torch.from_numpy(self.drawing.boxes(draws.crops, sizes))
        undecodable = [line for key in keys for line in self.kept.undecodable.get(key.place, ())]
        none = torch.empty(0, *self._shape, dtype=torch.uint8)
        return Loaded(none, self.kept.labels[indices], indices, undecodable, draws, None, boxes)


def stored(split: Split, keys: Sequence[Key]) -> list[Encoded]:
    """The images of a batch as they are stored."""
    if isinstance(split, ImageTable):
        return split.encoded([key.place for key in keys])
    return [key.encoded for key in keys if key.encoded is not None]


def decoded(encoded: Encoded, mode: str) -> Tensor:
    """Decode an image: (C, H, W), uint8; raises `UndecodableImage`."""
    return decode_tensor(encoded.read(), encoded.name, mode, encoded.max_pixels)


def transformed(encoded: Encoded, mode: str, transform: Transform, undecodable: list[str]) -> Tensor | None:
    """An image to score on; if it cannot be decoded, none, but a line in `undecodable`."""
    try:
        return transform(decoded(encoded, mode))
    except UndecodableImage as error:
        undecodable.append(str(error))
        return None


def size_for_gpu(content: bytes, encoded: Encoded, mode: str, least: int = 0) -> tuple[int, int] | None:
    """Height and width of a JPEG file of `least` pixels or more that the GPU can decode; None for all other files."""
    header = read_baseline_header(content) if mode == "RGB" else None
    if header is None or not least <= header.height * header.width <= encoded.max_pixels:
        return None
    return header.height, header.width


def read(encoded: Encoded) -> bytes:
    """The bytes of a file, or no bytes if it cannot be read: decoding it will then report why."""
    try:
        return encoded.read()
    except UndecodableImage:
        return b""


def places(keys: Sequence[Key]) -> Tensor:
    return torch.tensor([key.place for key in keys])
