"""Where pictures come from: one syntax for folders, parquet files, WebDataset tars, the Hub and the built-in digits.

``data.source`` and ``data.validation`` (which may also be a fraction of the training images) are one of

- ``FOLDER`` of pictures: one subfolder for each class, perhaps below ``train/`` and ``val/`` (ImageNet's layout); with
  ``data.validation`` the folder is one split, so that classes may be called like splits,
- ``FOLDER``, file or glob of parquet files (``train*.parquet``, ``val*.parquet`` or ``test*.parquet``),
- ``FOLDER``, file, glob or brace list (``shard-{000..146}.tar``) of WebDataset tars, or of tars with class folders,
- ``hf://owner/name``, or ``owner/name`` where no such path exists: a data set on the Hub,
- ``digits``: scikit-learn's 1,797 handwritten digits, 8x8 grey.

Pictures stay encoded as they were until they are needed. Map-style splits unpack parquet files, compressed tars and
downloads once into the cache of ``datasets`` and are then read at random; a stream (``data.streaming=true``) reads in
sequence.
"""

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from arm_zoo.images.columns import leaves, values_at
from arm_zoo.images.decode import MAX_PIXELS, UndecodableImage, decode_image
from arm_zoo.images.listing import listed, printable
from arm_zoo.images.tars import Member

from .config import DataConfig
from .labels import Columns, Labels, find_columns, match_labels, read_labels
from .load import Data, column_of, count_rows, load_folder, load_from_hub, load_parquet, plain, read_column
from .locate import Kind, Located, SourceError, locate
from .shards import ShardRows, open_index, shard_sizes
from .splits import classes_without_images, none_to_hold_out, split_rows, validation_fraction

log = logging.getLogger(__name__)

Labelled = tuple[Image.Image, int, str]  # picture, class index (-1: labels not asked for), name
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_TEST_IMAGES = 360
SPLIT_SEED = 0  # fixed: a run's seed must not move pictures between training and test


class Encoded(NamedTuple):
    """A picture as it is stored.

    Args:
        data: The file's bytes, its path, or its place in a tar; None where a row has no picture.
        label: The class index (-1: not asked for).
        name: For messages.
        max_pixels: Larger pictures are not decoded.
    """

    data: bytes | str | Member | None
    label: int
    name: str
    max_pixels: int = MAX_PIXELS

    def decode(self, mode: str) -> Labelled:
        """The picture in PIL's ``mode``, its class and name; raises ``UndecodableImage``."""
        if self.data is None:
            raise UndecodableImage(self.name, "there is no image in this row")
        try:
            data = self.data.read() if isinstance(self.data, Member) else self.data
        except OSError as error:
            raise UndecodableImage(self.name, f"{type(error).__name__}: {error}") from None
        return decode_image(data, self.name, mode, self.max_pixels), self.label, self.name


@dataclass(frozen=True)
class Reading:
    """How rows become pictures.

    Args:
        name: Of the split, for the names of its pictures.
        columns: Of picture, class and name.
        classes: What the class column holds -> class index; None: labels are not asked for.
        mode: PIL's mode of the pictures, ``"RGB"`` or ``"L"``.
        max_pixels: As ``data.max_pixels``.
    """

    name: str
    columns: Columns
    classes: Mapping[Any, int] | None
    mode: str
    max_pixels: int = MAX_PIXELS

    def encoded(self, picture: Any, raw: Any, name: str) -> Encoded:
        """One row, not decoded: ``picture`` is its bytes, its path, or a mapping that holds one of them."""
        if not isinstance(picture, Mapping):
            picture = {"bytes": None, "path": picture} if isinstance(picture, str) else {"bytes": picture}
        data, path = picture["bytes"], picture.get("path")
        if picture.get("offset") is not None and data is None:
            data = Member(Path(os.fsdecode(path)), picture["offset"], picture["size"])
        elif "offset" not in picture and path:
            name = printable(path) if data is None else f"{name} ({printable(path)})"
            data = os.fsdecode(path) if data is None else data
        return Encoded(data, -1 if self.classes is None else self._class_of(raw, name), name, self.max_pixels)

    def _class_of(self, raw: Any, name: str) -> int:
        if self.classes is None or raw not in self.classes:
            raise SourceError(f"{name} has the label {raw!r}; allowed: one of the {len(self.classes or ())} classes")
        return self.classes[raw]


class PictureTable(Sequence[Labelled]):
    """A split that can be read at random; ``split[i]`` is (picture, class index, name)."""

    def __init__(self, data: datasets.Dataset, reading: Reading) -> None:
        tops = {column if column in data.column_names else column.partition(".")[0] for column in _read(reading)}
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
        """Row by row, what stands in the label column (None: not asked for), and the image's file, key or row."""
        table = self._rows[:]
        image, label, key = (None if column is None else values_at(table, column) for column in self._reading.columns)
        classes = [None] * len(self) if label is None else label.to_pylist()
        if key is None and pa.types.is_struct(image.type) and pc.struct_field(image, "bytes").null_count == len(self):
            key = pc.struct_field(image, "path")
        if key is None:
            return classes, [f"row {number}" for number in self._numbers]
        names = zip(key.to_pylist(), self._numbers, strict=True)
        return classes, [f"row {number}" if name is None else os.fsdecode(name) for name, number in names]

    def encoded(self, indices: Sequence[int]) -> list[Encoded]:
        """Some rows, not decoded."""
        table = self._rows[list(indices)]
        columns = [
            [None] * len(indices) if column is None else values_at(table, column).to_pylist()
            for column in self._reading.columns
        ]
        numbers = [self._numbers[index] for index in indices]
        return [self._encoded(*row) for row in zip(*columns, numbers, strict=True)]

    def _encoded(self, picture: Any, raw: Any, key: bytes | None, row: int) -> Encoded:
        name = f"{self._reading.name}, row {row}"
        if key is not None:
            name = f"{printable(picture['path'])}/{printable(key)}"
        return self._reading.encoded(picture, raw, name)


class Rows(Protocol):
    """What a stream reads, in shards."""

    @property
    def num_shards(self) -> int:
        """Files, as a rule."""

    def shard(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        """Picture, label and name of each row of one shard from ``first_row`` on."""


@dataclass(frozen=True)
class DatasetRows:
    """A stream of the library ``datasets``, pictures not decoded.

    Its own shuffling is not used: its order differs from one release to the next, and a run must be able to go on
    after an upgrade.
    """

    data: datasets.IterableDataset
    columns: Columns
    name: str

    @property
    def num_shards(self) -> int:
        """Of the data set."""
        return self.data.num_shards  # type: ignore[no-any-return]

    def shard(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        """The rows of one shard; those before ``first_row`` are read and left out."""
        rows = enumerate(self.data.shard(self.num_shards, number))
        for row, example in islice(rows, first_row, None):
            name = f"{self.name}, shard {number}, row {row}"
            if "__key__" in example:  # WebDataset's name of the row
                name = f"{example['__url__']}/{example['__key__']}"
            label = None if self.columns.label is None else _value(example, self.columns.label)
            yield _value(example, self.columns.image), label, name


class PictureStream:
    """A split that is read in sequence; iterating gives (picture, class index, name) in stored order.

    Args:
        rows: Pictures, labels and names.
        reading: How they become pictures.
        size: Pictures in it, or None if nobody tells.
        shard_sizes: Pictures in each of its shards (files, as a rule), if these can be counted.
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
        """The rows of one shard from ``first_row`` on, not decoded."""
        return (self._reading.encoded(*row) for row in self._rows.shard(number, first_row))


def _read(reading: Reading) -> list[str]:
    return [column for column in reading.columns if column is not None]


def _value(example: Mapping[str, Any], column: str) -> Any:
    if column in example:
        return example[column]
    name, _, key = column.partition(".")
    return example[name][key]


def tell(text: str) -> None:
    """Log what was taken for granted, once and not in each of several processes."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(text)


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
    if not labels_needed:
        if fraction is not None:
            return _hold_out(train.read(None), fraction, (), train.name)
        return Source(train.read(None), None if test is None else test.read(None), ())
    labels = train.labels()
    if empty := labels.without_pictures(labels.names):
        if train.kind == "pictures":
            raise classes_without_images(train.name, empty)
        tell(f"{train.name} has no pictures for {len(empty)} of its {len(labels.names)} classes: {listed(empty)}")
    if fraction is not None:
        return _hold_out(train.read(labels.indices(labels.names)), fraction, labels.names, train.name)
    matched = match_labels(labels, test.labels(), test.name)
    if missing := matched.without_test:
        tell(
            f"{test.name} has no pictures for {len(missing)} of the {len(matched.names)} classes, which are not "
            f"scored: {listed(missing)}"
        )
    source = Source(train.read(matched.train), test.read(matched.test), matched.names)
    if isinstance(source.test, PictureStream) and test.values is None:
        next(source.test.encoded(), None)  # hidden labels are met now, not after the first epoch
    return source


def _hold_out(images: Split, fraction: float, class_names: tuple[str, ...], name: str) -> Source:
    """Training images as two splits; see ``recipes.splits``."""
    if isinstance(images, PictureStream):
        raise SourceError(
            f"{name} has no validation images beside it, and of a stream none can be held out; name some with "
            "data.validation=SOURCE, or leave out data.streaming"
        )
    kept, held_out = split_rows(*images.classes_and_names(), fraction)
    if not held_out:
        raise none_to_hold_out(name)
    return Source(images.select(kept), images.select(held_out), class_names, held_out=fraction)


@dataclass(frozen=True)
class OpenedSplit:
    """A split whose columns are known.

    Args:
        name: For messages.
        kind: Of its source.
        config: Of the data.
        data: Rows, not declared, or a stream of them; of tars the index.
        features: What the columns are declared to be.
        columns: Of picture, class and name.
        size: As in ``PictureStream``.
        shard_sizes: As in ``PictureStream``.
        values: What stands in the label column, in each row; None if not asked for, or for streams of the Hub.
        in_sequence: Tars that are read as a stream.
    """

    name: str
    kind: Kind
    config: DataConfig
    data: Data
    features: Mapping[str, Any]
    columns: Columns
    size: int | None
    shard_sizes: list[int] | None
    values: pa.ChunkedArray | None
    in_sequence: ShardRows | None = None

    def labels(self) -> Labels:
        """The classes that the label column holds."""
        column = str(self.columns.label)
        return read_labels(leaves(self.features)[column], self.values, column, self.config, self.name)

    def read(self, classes: Mapping[Any, int] | None) -> Split:
        """The pictures, with the class index of what stands in the label column."""
        reading = Reading(self.name, self.columns, classes, "RGB", self.config.max_pixels or MAX_PIXELS)
        rows: Rows | None = self.in_sequence
        if isinstance(self.data, datasets.IterableDataset):
            data = self.data.cast_column(self.columns.image, datasets.Image(decode=False))
            rows = DatasetRows(data, self.columns, self.name)
        if rows is None:
            return PictureTable(self.data, reading)
        return PictureStream(rows, reading, self.size, self.shard_sizes)


def _open_splits(config: DataConfig, labels_needed: bool) -> tuple[OpenedSplit, OpenedSplit | None]:
    """The training split and, if there is one, the validation split."""
    source = locate(config.source, one_split=config.validation is not None)
    splits = _splits(source, config.streaming)
    chosen = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
    if chosen not in splits:
        note = f" ({source.note})" if source.note else ""
        raise SourceError(f"{config.source!r} has the splits {', '.join(splits)}, but no training split{note}")
    train = _opened(source, chosen, splits[chosen], config, labels_needed)
    if source.note:
        tell(source.note)
    if isinstance(config.validation, float):
        return train, None
    if config.validation is not None:
        source = locate(config.validation, one_split=True)
        streaming = config.streaming and source.kind != "pictures"  # files can be read at random
        config = replace(config, streaming=streaming, train_size=None)
        splits = _splits(source, config.streaming)
        chosen = next(name for name in ("val", "test", "train") if name in splits)
    else:
        chosen = next((name for name in ("val", "test") if name in splits and name != chosen), "")
    test = _opened(source, chosen, splits[chosen], config, labels_needed) if chosen else None
    return train, test


def _splits(source: Located, streaming: bool) -> dict[str, Any]:
    """The splits of a source by their names: data sets of the Hub, or files that are not opened yet."""
    return load_from_hub(source.name, streaming) if source.kind == "hub" else source.splits


def _opened(source: Located, split: str, found: Any, config: DataConfig, labels_needed: bool) -> OpenedSplit:
    name = f"{source.name} [{split}]"
    if source.kind == "tars":
        data = open_index(found, name, config, labels_needed)
        features = data.features
        columns = Columns("image", "label" if labels_needed else None, "key")
    else:
        data, features = _loaded(source, split, found, config, labels_needed)
        columns = find_columns(features, config, name, labels_needed)
    size, sizes = _sizes(source, found, data)
    if isinstance(data, datasets.Dataset):
        data = plain(data, {path if path in features else path.partition(".")[0] for path in columns if path})
    if split == "train" and config.train_size not in (None, size):
        if size is not None:
            raise SourceError(f"{name} has {size} pictures, but data.train_size is {config.train_size}; leave it out")
        size = config.train_size
    if size == 0:
        raise SourceError(f"{name} holds no pictures")
    values = None
    if columns.label is not None and isinstance(data, datasets.Dataset):
        values = column_of(data, columns.label)
    elif columns.label is not None and source.kind == "parquet":
        values = read_column(found, columns.label)
    in_sequence = None
    if source.kind == "tars" and config.streaming:
        in_sequence = ShardRows(found, sizes or [], values, config.image_column)
    return OpenedSplit(name, source.kind, config, data, features, columns, size, sizes, values, in_sequence)


def _loaded(
    source: Located, split: str, found: Any, config: DataConfig, labels_needed: bool
) -> tuple[Data, Mapping[str, Any]]:
    """A split of anything but tars, and what its columns are declared to be."""
    if source.kind == "pictures":
        if config.streaming:
            raise SourceError(f"{source.name!r} is a folder of pictures, which needs no data.streaming; leave it out")
        return load_folder(source, split, labels_needed)
    data = found if source.kind == "hub" else load_parquet(source, split, config.streaming)
    return data, data.features


def _sizes(source: Located, found: Any, data: Data) -> tuple[int | None, list[int] | None]:
    """Pictures in a split, and in each of its shards, as far as that is known."""
    if source.kind == "tars":
        return len(data), shard_sizes(data, found)
    if isinstance(data, datasets.Dataset):
        return len(data), None
    if source.kind == "hub":
        told = data.info.splits or {}
        name = str(data.split)
        return (told[name].num_examples if name in told else None), None
    counted = count_rows(found)
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
