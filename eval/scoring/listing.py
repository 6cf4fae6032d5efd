"""Labelled images in a fixed order, ready to be scored."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from arm_zoo.images.columns import leaves, values_at
from arm_zoo.images.tables import Encoded, ImageTable, OpenedSplit
from arm_zoo.messages import printable
from eval.scoring.metrics import NO_CLASS

# Where class names come from: folders, a ClassLabel, which fixes their order, or words in any order.
NamedBy = Literal["folders", "declaration", "words"]


@dataclass(frozen=True)
class Listing:
    """Labelled images in an order that does not depend on how the disk lists them."""

    location: str  # as the user wrote it
    files: list[str]  # '/'-separated path of each image inside the source, '' if the source has no file names
    labels: np.ndarray  # (N,) the first label of each image: an index into `class_names`, or the source's number
    class_names: tuple[str, ...] | None  # None if labels are bare numbers
    named_by: NamedBy
    stored: Callable[[int], Encoded]  # index -> the image as it is stored
    sizes: np.ndarray  # (N,) bytes of each image
    reading: str = ""  # how images are read if not as timm does; part of fingerprints, so that other readings differ
    notes: tuple[str, ...] = ()  # what was left out, for the rows' warnings
    places: np.ndarray | None = None  # (N,) the index of each image for `stored`; None: its own
    border: int = 0  # pixels that are cut off at each side
    label_sets: np.ndarray | None = None  # (N, K) all labels of each image, filled up with NO_CLASS; None: one each

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        """The name of an image in messages."""
        return printable(self.files[index]) or f"image {index}"

    def decode(self, index: int, mode: str) -> Image.Image:
        """Decode an image into one of Pillow's modes; a damaged image raises whatever the decoder raises.

        Without a `reading`, the pixels are those of timm.data.ImageDataset; Pillow's draft mode would change them.
        """
        encoded, border = self.stored(index if self.places is None else int(self.places[index])), self.border
        if self.reading:
            return encoded.decode(mode)[0]
        with encoded.open() as file:
            image = Image.open(file).convert(mode)
        return image.crop((border, border, image.width - border, image.height - border)) if border else image

    def select(self, places: np.ndarray) -> "Listing":
        """The images at these places, in this order; the listing must not be a selection itself."""
        files = [self.files[i] for i in places]
        sets = None if self.label_sets is None else self.label_sets[places]
        labels, sizes = self.labels[places], self.sizes[places]
        return replace(self, files=files, labels=labels, label_sets=sets, sizes=sizes, places=places)

    def labels_of(self, index: int) -> list[int]:
        """All labels of an image."""
        if self.label_sets is None:
            return [int(self.labels[index])]
        return [label for label in self.label_sets[index].tolist() if label != NO_CLASS]


def listing_of(split: OpenedSplit, reading: str, notes: Sequence[str] = ()) -> Listing:
    """The listing of a split, opened as for training; raises `SourceError` for labels that are no class.

    A label column of lists holds all labels of each image, perhaps none.
    """
    column, counts = str(split.columns.label), None
    feature = leaves(split.features)[column]
    if isinstance(feature, datasets.List | datasets.LargeList):
        counts = pc.list_value_length(split.values).fill_null(0).to_numpy()
        feature, values = feature.feature, pc.list_flatten(split.values)
        split = replace(split, features={**split.features, column: feature}, values=values)
    labels = split.labels()
    classes = labels.indices(labels.names)
    values = [] if split.values is None else split.values.to_pylist()
    indices = np.array([classes[value] for value in values], dtype=np.int64)
    class_names: tuple[str, ...] | None = None if labels.numbered else labels.names
    kind: NamedBy = "words"
    if isinstance(feature, datasets.ClassLabel):
        kind = "folders" if split.located.kind == "images" else "declaration"
    elif split.by_folder:
        kind = "folders"
    elif not reading and all(re.fullmatch("-?[0-9]{1,18}", name) for name in labels.names):  # timm's numbers as text
        class_names, indices = None, np.array(list(map(int, labels.names)), dtype=np.int64)[indices]
    sets = None
    if counts is not None:
        sets = np.full((len(counts), max(1, counts.max())), NO_CLASS)
        sets[np.arange(sets.shape[1]) < counts[:, None]] = indices
        indices = sets[:, 0]
    files, sizes = _files_and_sizes(split)
    stored = ImageTable(split.data, split.reading(None)).stored
    said = (reading, (*notes, *filter(None, [split.note])))
    return Listing(split.located.name, files, indices, class_names, kind, stored, sizes, *said, label_sets=sets)


def _files_and_sizes(split: OpenedSplit) -> tuple[list[str], np.ndarray]:
    """The path of each image inside the source, '' if it has none, and its bytes (N,), -1 if it is missing."""
    table = split.data.with_format("arrow")[:]
    image = values_at(table, split.columns.image)
    fields = image.type.names if pa.types.is_struct(image.type) else []
    paths = pc.struct_field(image, "path").to_pylist() if "path" in fields else [None] * len(image)
    names = [os.fsdecode(path or "") for path in paths]
    if split.located.kind == "images":
        [root] = split.files
        parent = os.path.join(os.path.dirname(os.path.abspath(root)), "")
        files = [os.path.abspath(name).removeprefix(parent).replace(os.sep, "/") for name in names]
        return files, np.array(list(map(size_of, names)))
    if split.columns.name is not None:
        keys = map(os.fsdecode, values_at(table, split.columns.name).to_pylist())
        files = [f"{os.path.basename(name)}/{key}" for name, key in zip(names, keys, strict=True)]
        return files, pc.struct_field(image, "size").fill_null(-1).to_numpy()
    encoded = pc.struct_field(image, "bytes") if "bytes" in fields else image
    files = [os.path.basename(name) if os.path.isabs(name) else name for name in names]  # a cache's path tells nothing
    return files, pc.binary_length(encoded).fill_null(-1).to_numpy()


def size_of(file: str) -> int:
    """The size of a file in bytes; -1 for a broken link, which counts as an undecodable image."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1
