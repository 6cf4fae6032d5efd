"""Splits that are read in sequence, shard by shard: parquet files, tars, and data sets of the Hub."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from arm_zoo.images.shards import READING_THREADS, image_of, is_meant, sizes_of_shards
from arm_zoo.images.tables import Encoded, Labelled, OpenedSplit
from arm_zoo.images.tars import Sample, read_samples
from arm_zoo.messages import printable


class ImageStream(ABC):
    """A split that is read in sequence; iterating gives (image, class index, name) in stored order."""

    size: int | None  # number of images, None if it is not known
    shard_sizes: Sequence[int] | None = None  # images in each of its shards (files, as a rule), if they can be counted
    num_shards: int

    def __init__(self, split: OpenedSplit, classes: Mapping[Any, int] | None) -> None:
        self._split, self._reading = split, split.reading(classes)
        self.mode = self._reading.mode

    def __iter__(self) -> Iterator[Labelled]:
        return (encoded.decode(self.mode) for encoded in self.encoded())

    def encoded(self) -> Iterator[Encoded]:
        """All rows, not decoded."""
        return chain.from_iterable(map(self.shard, range(self.num_shards)))

    def shard(self, number: int, first_row: int = 0) -> Iterator[Encoded]:
        """The rows of one shard from `first_row` on, not decoded."""
        return (self._reading.encoded(*row) for row in self._rows(number, first_row))

    @abstractmethod
    def _rows(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        """The image, label and name of each of these rows."""


class DatasetStream(ImageStream):
    """A stream of the library `datasets`, whose own shuffling is not used: it differs from one release to the next."""

    def __init__(self, split: OpenedSplit, classes: Mapping[Any, int] | None) -> None:
        super().__init__(split, classes)
        self._data = split.data.cast_column(split.columns.image, datasets.Image(decode=False))
        self.num_shards = self._data.num_shards
        if split.files:
            with ThreadPool(READING_THREADS) as pool:  # of parquet files the last bytes tell
                sizes = pool.map(lambda file: int(pq.read_metadata(file).num_rows), split.files)
            self.size, self.shard_sizes = sum(sizes), sizes if len(sizes) == self.num_shards else None
        else:
            told, name = self._data.info.splits or {}, str(self._data.split)
            self.size = told[name].num_examples if name in told else None

    def _rows(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        image, label, _ = self._split.columns
        for row, example in islice(enumerate(self._data.shard(self.num_shards, number)), first_row, None):
            name = f"{self._split.name}, shard {number}, row {row}"
            if "__key__" in example:  # WebDataset's name of the row
                name = f"{example['__url__']}/{example['__key__']}"
            yield _value(example, image), None if label is None else _value(example, label), name


def _value(example: Mapping[str, Any], column: str) -> Any:
    if column in example:
        return example[column]
    name, _, key = column.partition(".")
    return example[name][key]


class TarStream(ImageStream):
    """Samples of tars, a shard for each tar."""

    def __init__(self, split: OpenedSplit, classes: Mapping[Any, int] | None) -> None:
        super().__init__(split, classes)
        self.shard_sizes = sizes_of_shards(split.data, split.files)
        self.size, self.num_shards = len(split.data), len(split.files)

    def _rows(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        file, choices, labels = self._split.files[number], self._split.choices, self._split.values
        start = sum((self.shard_sizes or ())[:number])

        def is_counted(sample: Sample) -> bool:
            return not self._split.by_folder or image_of(sample, file, choices) is not None

        samples = read_samples(Path(file), lambda ending: is_meant(ending, choices), is_counted, first_row)
        for row, sample in enumerate(samples, start + first_row):
            image = image_of(sample, file, choices)
            label = None if labels is None else labels[row].as_py()
            yield sample.contents.get(image or ""), label, printable(f"{file}/{sample.key}")
