"""Splits that are read in sequence, shard by shard: parquet files, tars, and data sets of the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from arm_zoo.images.columns import Choices, Columns
from arm_zoo.images.listing import printable
from arm_zoo.images.shards import READING_THREADS, Index, image_of, is_meant
from arm_zoo.images.tables import Encoded, Labelled, OpenedSplit, Reading
from arm_zoo.images.tars import read_samples


class Rows(Protocol):
    """What a stream reads, in shards."""

    @property
    def num_shards(self) -> int:
        """Files, as a rule."""

    def shard(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        """Image, label and name of each row of one shard from `first_row` on."""


@dataclass(frozen=True)
class DatasetRows:
    """A stream of the library `datasets`, images not decoded.

    Its own shuffling is not used: its order differs from one release to the next, and a run must be able to go on
    after an upgrade.
    """

    data: datasets.IterableDataset
    columns: Columns
    name: str

    @property
    def num_shards(self) -> int:
        return self.data.num_shards

    def shard(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        """Those before `first_row` are read and left out."""
        rows = enumerate(self.data.shard(self.num_shards, number))
        for row, example in islice(rows, first_row, None):
            name = f"{self.name}, shard {number}, row {row}"
            if "__key__" in example:  # WebDataset's name of the row
                name = f"{example['__url__']}/{example['__key__']}"
            label = None if self.columns.label is None else _value(example, self.columns.label)
            yield _value(example, self.columns.image), label, name


def _value(example: Mapping[str, Any], column: str) -> Any:
    if column in example:
        return example[column]
    name, _, key = column.partition(".")
    return example[name][key]


@dataclass(frozen=True)
class TarRows:
    """Samples of tars in sequence, a shard for each tar.

    Args:
        files: the tars.
        sizes: samples in each.
        labels: of all samples, as in the index; None if they were not asked for.
        choices: which files of a sample are its image.
        by_folder: whether samples without an image are passed over.
    """

    files: Sequence[str]
    sizes: Sequence[int]
    labels: pa.ChunkedArray | None
    choices: Choices
    by_folder: bool

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def shard(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        """Those before `first_row` are passed over."""
        file, start = self.files[number], sum(self.sizes[:number])
        samples = read_samples(
            Path(file),
            lambda ending: is_meant(ending, self.choices),
            (lambda sample: image_of(sample, file, self.choices) is not None) if self.by_folder else None,
            first_row,
        )
        for row, sample in enumerate(samples, start + first_row):
            image = image_of(sample, file, self.choices)
            label = None if self.labels is None else self.labels[row].as_py()
            yield sample.contents.get(image or ""), label, printable(f"{file}/{sample.key}")


class ImageStream:
    """A split that is read in sequence; iterating gives (image, class index, name) in stored order.

    Args:
        rows: images, labels and names.
        reading: how they become images.
        size: images in it, or None if nobody tells.
        shard_sizes: images in each of its shards (files, as a rule), if these can be counted.
    """

    def __init__(
        self, rows: Rows, reading: Reading, size: int | None, shard_sizes: Sequence[int] | None = None
    ) -> None:
        self._rows, self._reading = rows, reading
        self.size, self.shard_sizes, self.mode = size, shard_sizes, reading.mode
        self.num_shards = rows.num_shards

    def __iter__(self) -> Iterator[Labelled]:
        return (encoded.decode(self.mode) for encoded in self.encoded())

    def encoded(self) -> Iterator[Encoded]:
        """All rows, not decoded."""
        return chain.from_iterable(map(self.shard, range(self.num_shards)))

    def shard(self, number: int, first_row: int = 0) -> Iterator[Encoded]:
        """The rows of one shard from `first_row` on, not decoded."""
        return (self._reading.encoded(*row) for row in self._rows.shard(number, first_row))


def stream_of(split: OpenedSplit, classes: Mapping[Any, int] | None) -> ImageStream:
    """A split that was opened to be read in sequence.

    Args:
        split: tars, or a stream of `datasets`.
        classes: what its label column holds -> class index; None: labels are not asked for.
    """
    reading = split.reading(classes)
    if isinstance(split.data, datasets.Dataset):  # the index of tars
        sizes = Index(split.data).sizes(split.files)
        tars = TarRows(split.files, sizes, split.values, split.choices, split.by_folder)
        return ImageStream(tars, reading, len(split.data), sizes)
    data = split.data.cast_column(split.columns.image, datasets.Image(decode=False))
    rows = DatasetRows(data, split.columns, split.name)
    if not split.files:
        told, name = data.info.splits or {}, str(data.split)
        return ImageStream(rows, reading, told[name].num_examples if name in told else None)
    with ThreadPool(READING_THREADS) as pool:  # of parquet files the last bytes tell
        sizes = pool.map(lambda file: pq.read_metadata(file).num_rows, split.files)
    return ImageStream(rows, reading, sum(sizes), sizes if len(sizes) == rows.num_shards else None)
