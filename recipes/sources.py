"""Where pictures come from: one syntax for folders, parquet files, WebDataset tars, the Hub and the built-in digits.

``data.source`` and ``data.validation`` (which may also be a fraction of the training images) are one of

- ``FOLDER`` of pictures: one subfolder for each class, perhaps below ``train/`` and ``val/`` (ImageNet's layout),
- ``FOLDER``, file or glob of parquet files (``train*.parquet``, ``val*.parquet`` or ``test*.parquet``),
- ``FOLDER``, file, glob or brace list (``shard-{000..146}.tar``) of WebDataset tars,
- ``hf://owner/name``, or ``owner/name`` where no such path exists: a data set on the Hub,
- ``digits``: scikit-learn's 1,797 handwritten digits, 8x8 grey.

Pictures stay encoded as they were until they are needed. Map-style splits unpack parquet files, tars and downloads
once into the cache of ``datasets`` and are then read at random; a stream (``data.streaming=true``) reads in sequence.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from arm_zoo.images.decode import decode_image

from .config import DataConfig
from .labels import Columns, Labels, find_columns, match_labels, read_labels, values_at
from .locate import Data, Located, SourceError, count_rows, load_splits, locate
from .splits import split_rows, validation_fraction

Labelled = tuple[Image.Image, int, str]  # picture, class index (-1: labels not asked for), name
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_TEST_IMAGES = 360
SPLIT_SEED = 0  # fixed: a run's seed must not move pictures between training and test


class Encoded(NamedTuple):
    """A picture as it is stored: the file's bytes or its path, the class index (-1: not asked for), and a name."""

    data: bytes | str
    label: int
    name: str

    def decode(self, mode: str) -> Labelled:
        """The picture in PIL's ``mode``, its class and name; raises ``UndecodableImage``."""
        return decode_image(self.data, self.name, mode), self.label, self.name


@dataclass(frozen=True)
class Reading:
    """How rows become pictures.

    Args:
        name: Of the split, for the names of its pictures.
        columns: Of picture and class.
        classes: What the class column holds -> class index; None: labels are not asked for.
        mode: PIL's mode of the pictures, ``"RGB"`` or ``"L"``.
    """

    name: str
    columns: Columns
    classes: Mapping[Any, int] | None
    mode: str

    def encoded(self, picture: Any, raw: Any, row: int) -> Encoded:
        """One row, not decoded."""
        if not isinstance(picture, Mapping):
            picture = {"bytes": picture}
        data, path = picture["bytes"], picture.get("path")
        name = f"{self.name}, row {row} ({path})" if path else f"{self.name}, row {row}"
        if data is None:
            data, name = path or b"", path or name
        return Encoded(data, -1 if self.classes is None else self._class_of(raw, name), name)

    def _class_of(self, raw: Any, name: str) -> int:
        if self.classes is None or raw not in self.classes:
            raise SourceError(f"{name} has the label {raw!r}; allowed: one of the {len(self.classes or ())} classes")
        return self.classes[raw]


class PictureTable(Sequence[Labelled]):
    """A split that can be read at random; ``split[i]`` is (picture, class index, name)."""

    def __init__(self, data: datasets.Dataset, reading: Reading) -> None:
        tops = {column.partition(".")[0] if column not in data.column_names else column for column in _read(reading)}
        self._rows = data.select_columns(sorted(tops)).with_format("arrow")
        self._numbers: Sequence[int] = range(len(data))  # of the rows in the whole split, which a person can look up
        self._reading = reading
        self.mode = reading.mode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self.encoded([index])[0].decode(self.mode)

    def select(self, indices: Sequence[int]) -> "PictureTable":
        """Some pictures of the split, in this order."""
        chosen = PictureTable.__new__(PictureTable)
        chosen._rows, chosen._reading, chosen.mode = self._rows.select(indices), self._reading, self.mode
        chosen._numbers = [self._numbers[index] for index in indices]
        return chosen

    def classes_and_names(self) -> tuple[list[Any], list[str]]:
        """Row by row, what stands in the label column (None: not asked for), and the image's file or its row."""
        table = self._rows[:]
        images, *labels = (values_at(table, column) for column in _read(self._reading))
        classes = labels[0].to_pylist() if labels else [None] * len(self)
        if pa.types.is_struct(images.type) and pc.struct_field(images, "bytes").null_count == len(self):
            return classes, pc.struct_field(images, "path").to_pylist()
        return classes, [f"row {number}" for number in self._numbers]

    def encoded(self, indices: Sequence[int]) -> list[Encoded]:
        """Some rows, not decoded."""
        table = self._rows[list(indices)]
        pictures, *labels = (values_at(table, column).to_pylist() for column in _read(self._reading))
        raw = labels[0] if labels else [None] * len(pictures)
        numbers = [self._numbers[index] for index in indices]
        return [self._reading.encoded(*row) for row in zip(pictures, raw, numbers, strict=True)]


class PictureStream:
    """A split that is read in sequence; iterating gives (picture, class index, name) in stored order.

    Args:
        data: Of the library ``datasets``, pictures not decoded. Its own shuffling is not used: its order differs from
            one release to the next, and a run must be able to go on after an upgrade.
        reading: How its rows become pictures.
        size: Pictures in it, or None if nobody tells.
        shard_sizes: Pictures in each of its shards (files, as a rule), if these can be counted.
    """

    def __init__(
        self,
        data: datasets.IterableDataset,
        reading: Reading,
        size: int | None,
        shard_sizes: Sequence[int] | None = None,
    ) -> None:
        self._data, self._reading = data, reading
        self.size, self.shard_sizes, self.mode = size, shard_sizes, reading.mode
        self.num_shards: int = data.num_shards

    def __iter__(self) -> Iterator[Labelled]:
        return (encoded.decode(self.mode) for encoded in self.encoded())

    def encoded(self) -> Iterator[Encoded]:
        """All rows, not decoded."""
        return chain.from_iterable(map(self.shard, range(self.num_shards)))

    def shard(self, number: int, first_row: int = 0) -> Iterator[Encoded]:
        """The rows of one shard from ``first_row`` on, not decoded; those before are read and left out."""
        rows = enumerate(self._data.shard(self.num_shards, number))
        for row, example in islice(rows, first_row, None):
            picture, *labels = (_value(example, column) for column in _read(self._reading))
            encoded = self._reading.encoded(picture, labels[0] if labels else None, row)
            if "__key__" in example:  # WebDataset's name of the row
                name = f"{example['__url__']}/{example['__key__']}"
            else:
                name = encoded.name.replace(", row", f", shard {number}, row")
            yield encoded._replace(name=name)


def _read(reading: Reading) -> list[str]:
    return [column for column in reading.columns if column is not None]


def _value(example: Mapping[str, Any], column: str) -> Any:
    if column in example:
        return example[column]
    name, _, key = column.partition(".")
    return example[name][key]


Split: TypeAlias = PictureTable | PictureStream


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        train: Pictures to train on.
        test: Pictures to score on; None where labels are not asked for and there are none.
        class_names: In index order; empty if labels were not asked for.
        mean: Of each channel, values in 0..1, for normalisation.
        std: Likewise.
        held_out: The fraction of the training images that ``test`` was made of; None if it is a split of its own.
    """

    train: Split
    test: Split | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    held_out: float | None = None

    @property
    def channels(self) -> int:
        """3, or 1 for grey pictures."""
        return len(self.mean)


def open_source(config: DataConfig, labels_needed: bool = True) -> Source:
    """Open what ``data.source`` and ``data.validation`` name.

    Args:
        config: Names, and what the data sets do not tell themselves.
        labels_needed: False for training without labels: every class index is then -1.

    Raises:
        SourceError: If a source is missing, empty or unclear, or if the two do not have the same classes.
    """
    if config.source == "digits":
        if config.validation is not None or config.streaming:
            raise SourceError(
                "the digits are small and have their own validation pictures; leave out data.validation "
                "and data.streaming"
            )
        if config.num_classes not in (None, len(DIGIT_NAMES)):
            raise SourceError(
                f"the digits have {len(DIGIT_NAMES)} classes, but data.num_classes is {config.num_classes}"
            )
        return open_digits(labels_needed)
    train, test = _open_splits(config, labels_needed)
    fraction = validation_fraction(config.validation, test is not None, labels_needed)
    if fraction is not None:
        labels = train.labels(config) if labels_needed else None
        images = train.read(None if labels is None else labels.indices(labels.names))
        return _hold_out(images, fraction, () if labels is None else labels.names, train.name)
    if not labels_needed:
        return Source(train.read(None), None if test is None else test.read(None), ())
    labels, test_labels = train.labels(config), test.labels(config)
    match_labels(labels, test_labels, test.name)
    named = labels if test_labels.numbered else test_labels  # numbers may have names in the other split
    names = named.names if labels.numbered else labels.names
    return Source(train.read(labels.indices(names)), test.read(test_labels.indices(names)), names)


def _hold_out(images: Split, fraction: float, class_names: tuple[str, ...], name: str) -> Source:
    """Training images as two splits; see ``recipes.splits``."""
    if isinstance(images, PictureStream):
        raise SourceError(
            f"{name} has no validation images beside it, and of a stream none can be held out; name some with "
            "data.validation=SOURCE, or leave out data.streaming"
        )
    kept, held_out = split_rows(*images.classes_and_names(), fraction)
    if not held_out:
        raise SourceError(
            f"no images of {name} can be held out for validation, as no class has two; add images, or name others "
            "with data.validation=SOURCE"
        )
    return Source(images.select(kept), images.select(held_out), class_names, held_out=fraction)


@dataclass(frozen=True)
class OpenedSplit:
    """A split of the library ``datasets`` whose columns are known; the sizes are those of ``PictureStream``."""

    name: str
    data: Data
    columns: Columns
    size: int | None
    shard_sizes: list[int] | None

    def labels(self, config: DataConfig) -> Labels:
        """The classes that the label column holds."""
        return read_labels(self.data, str(self.columns.label), config, self.name)

    def read(self, classes: Mapping[Any, int] | None) -> Split:
        """The pictures, with the class index of what stands in the label column."""
        reading = Reading(self.name, self.columns, classes, "RGB")
        data = self.data.cast_column(self.columns.image, datasets.Image(decode=False))
        if isinstance(data, datasets.IterableDataset):
            return PictureStream(data, reading, self.size, self.shard_sizes)
        return PictureTable(data, reading)


def _open_splits(config: DataConfig, labels_needed: bool) -> tuple[OpenedSplit, OpenedSplit | None]:
    """The training split and, if there is one, the validation split."""
    source = locate(config.source)
    splits = load_splits(source, config.streaming, labels_needed)
    chosen = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
    if chosen not in splits:
        raise SourceError(f"{config.source!r} has the splits {', '.join(splits)}, but no training split")
    train = _opened(source, chosen, splits[chosen], config, labels_needed)
    if isinstance(config.validation, float):
        return train, None
    if config.validation is not None:
        source = locate(config.validation)
        splits = load_splits(source, config.streaming and source.kind != "pictures", labels_needed)
        chosen = next(name for name in ("val", "test", "train") if name in splits)
    else:
        chosen = next((name for name in ("val", "test") if name in splits and name != chosen), "")
    test = _opened(source, chosen, splits[chosen], config, labels_needed) if chosen else None
    return train, test


def _opened(source: Located, split: str, data: Data, config: DataConfig, labels_needed: bool) -> OpenedSplit:
    name = f"{source.name} [{split}]"
    columns = find_columns(data, config, name, labels_needed)
    size, shard_sizes = _sizes(source, split, data)
    if split == "train" and config.train_size not in (None, size):
        if size is not None:
            raise SourceError(f"{name} has {size} pictures, but data.train_size is {config.train_size}; leave it out")
        size = config.train_size
    if size == 0:
        raise SourceError(f"{name} holds no pictures")
    return OpenedSplit(name, data, columns, size, shard_sizes)


def _sizes(source: Located, split: str, data: Data) -> tuple[int | None, list[int] | None]:
    """Pictures in a split and in each of a stream's shards, as far as that is known."""
    if isinstance(data, datasets.Dataset):
        return len(data), None
    if source.kind == "hub":
        told = data.info.splits or {}
        name = str(data.split)
        return (told[name].num_examples if name in told else None), None
    counted = count_rows(source.splits[split])
    return sum(counted), counted if len(counted) == data.num_shards else None


@functools.cache
def open_digits(labels_needed: bool = True) -> Source:
    """1,797 handwritten digits, 8x8 grey: 1,437 to train, 360 held out, each class in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as counts 0..16
    train, test = train_test_split(
        np.arange(len(pictures)), test_size=DIGITS_TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )
    classes = {number: number for number in range(len(DIGIT_NAMES))} if labels_needed else None

    def split(name: str, rows: NDArray[np.int64]) -> PictureTable:
        data = datasets.Dataset.from_dict(
            {"image": [{"bytes": png(pictures[row]), "path": None} for row in rows], "label": digits.target[rows]},
            features=datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")}),
        )
        return PictureTable(data, Reading(f"digits [{name}]", Columns("image", "label"), classes, "L"))

    return Source(
        train=split("train", train),
        test=split("test", test),
        class_names=DIGIT_NAMES if labels_needed else (),
        mean=(float(pictures[train].mean() / 255),),
        std=(float(pictures[train].std(ddof=1) / 255),),
    )


def png(picture: NDArray[np.uint8]) -> bytes:
    """A grey picture (H, W) as a PNG file."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
