"""The labelled images of a source, for training and scoring: a table in a fixed order, read by index.

Images stay encoded as they were until they are needed. Folders and uncompressed tars are read in place; parquet files,
compressed tars and downloads are unpacked once into the cache of `datasets`.
"""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias
from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from arm_zoo.images.columns import Choices, Columns, find_columns, leaves, values_at
from arm_zoo.images.decode import MAX_PIXELS, UndecodableImage, decode_image
from arm_zoo.images.errors import SourceError
from arm_zoo.images.hub import quiet_in_logs
from arm_zoo.images.labels import Labels, read_labels
from arm_zoo.images.listing import class_folders, contents, images_in, left_out, natural_order
from arm_zoo.images.locate import Located
from arm_zoo.images.shards import READING_THREADS, open_index
from arm_zoo.images.tars import Member
from arm_zoo.messages import printable

Data: TypeAlias = datasets.Dataset | datasets.IterableDataset
Labelled = tuple[Image.Image, int, str]  # image, class index (-1: labels not asked for), name


class Encoded(NamedTuple):
    """An image as it is stored."""

    data: bytes | str | Member | None  # the file's bytes, its path, or its place in a tar; None: the row has no image
    label: int  # class index; -1: not asked for
    name: str  # for messages
    max_pixels: int = MAX_PIXELS  # larger images are not decoded

    def open(self) -> IO[bytes]:
        """The file, opened; raises `OSError` or `UndecodableImage` if that fails."""
        if self.data is None:
            raise UndecodableImage(self.name, "there is no image in this row")
        if not isinstance(self.data, str):
            return BytesIO(self.data.read() if isinstance(self.data, Member) else self.data)
        if not os.path.isfile(self.data) and os.path.exists(self.data):  # reading a pipe may never end
            raise OSError(f"{printable(self.data)} is no regular file")
        return open(self.data, "rb")

    def read(self) -> bytes:
        """The file's bytes; raises `UndecodableImage` if they cannot be read."""
        try:
            with self.open() as file:
                return file.read()
        except OSError as error:
            raise UndecodableImage(self.name, f"{type(error).__name__}: {error}") from None

    def decode(self, mode: str) -> Labelled:
        """The image in PIL's `mode`, its class and name; raises `UndecodableImage`."""
        return decode_image(self.read(), self.name, mode, self.max_pixels), self.label, self.name


@dataclass(frozen=True)
class Reading:
    """How rows become images."""

    name: str  # of the split, for the names of its images
    columns: Columns
    classes: Mapping[Any, int] | None  # what the label column holds -> class index; None: labels are not asked for
    mode: str = "RGB"  # PIL's mode of the images, or "L"
    max_pixels: int = MAX_PIXELS

    def encoded(self, image: Any, raw: Any, name: str) -> Encoded:
        """One row, not decoded: `image` is its bytes, its path, or a mapping that holds one of them."""
        if not isinstance(image, Mapping):
            image = {"bytes": None, "path": image} if isinstance(image, str) else {"bytes": image}
        data, path = image["bytes"], image.get("path")
        if image.get("offset") is not None and data is None:
            data = Member(Path(os.fsdecode(path)), image["offset"], image["size"])
        elif "offset" not in image and path:
            name = printable(path) if data is None else f"{name} ({printable(path)})"
            data = os.fsdecode(path) if data is None else data
        label = -1
        if self.classes is not None:
            if raw not in self.classes:
                raise SourceError(f"{name} has the label {raw!r}; allowed: one of the {len(self.classes)} classes")
            label = self.classes[raw]
        return Encoded(data, label, name, self.max_pixels)


class ImageTable(Sequence[Labelled]):
    """A split that can be read at random; `split[i]` is (image, class index, name)."""

    def __init__(self, rows: datasets.Dataset, reading: Reading, numbers: Sequence[int] | None = None) -> None:
        self._rows = rows.with_format("arrow")
        self._numbers = range(len(rows)) if numbers is None else numbers  # in the whole split, to be looked up
        self._reading = reading
        self.mode, self.size = reading.mode, len(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self.stored(index).decode(self.mode)

    def stored(self, index: int) -> Encoded:
        """One row, not decoded."""
        return self.encoded([index])[0]

    def select(self, indices: Sequence[int]) -> "ImageTable":
        """Some images of the split, in this order."""
        return ImageTable(self._rows.select(indices), self._reading, [self._numbers[index] for index in indices])

    def classes_and_names(self) -> tuple[list[Any], list[str]]:
        """Of all rows, the values of the label column (None: not asked for) and the images' files, keys or numbers."""
        table = self._rows[:]
        columns = self._reading.columns
        image: pa.ChunkedArray = values_at(table, columns.image)
        key = None if columns.name is None else values_at(table, columns.name)
        classes = [None] * len(self) if columns.label is None else values_at(table, columns.label).to_pylist()
        if key is None and pa.types.is_struct(image.type) and pc.struct_field(image, "bytes").null_count == len(self):
            key = pc.struct_field(image, "path")
        names = zip([None] * len(self) if key is None else key.to_pylist(), self._numbers, strict=True)
        return classes, [f"row {number}" if name is None else os.fsdecode(name) for name, number in names]

    def encoded(self, indices: Sequence[int]) -> list[Encoded]:
        """Some rows, not decoded."""
        table = self._rows[list(indices)]
        nothing = [None] * len(indices)
        columns = (values_at(table, path).to_pylist() if path else nothing for path in self._reading.columns)
        found = []
        for index, image, raw, key in zip(indices, *columns, strict=True):
            row = f"{self._reading.name}, row {self._numbers[index]}"
            name = row if key is None else f"{printable(image['path'])}/{printable(key)}"
            found.append(self._reading.encoded(image, raw, name))
        return found


@dataclass(frozen=True)
class OpenedSplit:
    """A split whose columns are known."""

    name: str  # for messages
    located: Located  # the source that it is of
    files: Sequence[str]  # of images, their folder; none of the Hub
    choices: Choices
    data: Data  # rows, not declared, or a stream of them; of tars the index
    features: Mapping[str, Any]  # what the columns are declared to be
    columns: Columns
    values: pa.ChunkedArray | None  # what the label column holds, if asked for; None for streams of the Hub
    in_sequence: bool = False  # it is to be read as a stream
    by_folder: bool = False  # classes are the folders of tars, in which files that are no images are passed over
    note: str = ""  # on files that are left out

    def labels(self) -> Labels:
        """The classes that the label column holds; raises `SourceError` if it holds none."""
        column = str(self.columns.label)
        return read_labels(leaves(self.features)[column], self.values, column, self.choices.num_classes, self.name)

    def reading(self, classes: Mapping[Any, int] | None) -> Reading:
        """How its rows become images; `classes` maps values of the label column to class indices."""
        return Reading(self.name, self.columns, classes, max_pixels=self.choices.max_pixels)


def open_split(
    located: Located,
    split: str,
    choices: Choices,
    labels_needed: bool = True,
    in_sequence: bool = False,
    hub: Data | None = None,
    one_class: bool = False,
) -> OpenedSplit:
    """Open one split of a source.

    Args:
        located: the source.
        split: train, val or test, or "" if the source is a single split.
        choices: what the user says about it.
        labels_needed: whether images have classes.
        in_sequence: whether it is read as a stream.
        hub: the split's data, if it came from the Hub.
        one_class: images directly in the split's folder form one class, named as the folder.
    """
    name, files = f"{located.name} [{split}]" if split else located.name, located.splits.get(split, [])
    note, by_folder = "", False
    columns = Columns("image", "label" if labels_needed else None)
    if located.kind == "tars":
        data, by_folder, note = open_index(files, name, choices, labels_needed, in_sequence)
        features, columns = data.features, columns._replace(name="key")
    elif located.kind == "images":
        [folder] = files
        data, features, note = _load_folder(folder, labels_needed, located.note, one_class)
    else:
        data = _load_parquet(located, split, in_sequence) if hub is None else hub
        features = data.features
        columns = find_columns(features, choices, name, labels_needed)
    values = None
    if isinstance(data, datasets.Dataset):
        if not len(data):
            raise SourceError(f"{name} holds no images; name a source that has some")
        tops = {path: path if path in features else path.partition(".")[0] for path in columns if path}
        # Columns as they are stored: with their declaration goes the decoding of images. `datasets` also copies it at
        # every step, and the names of thousands of classes take longer than all else.
        plain = data.data.select(sorted(set(tops.values()))).replace_schema_metadata(None)
        data = datasets.Dataset(plain, indices_table=data._indices, fingerprint=uuid4().hex)
        if columns.label is not None:
            table = data.select_columns([tops[columns.label]]).with_format("arrow")[:]
            values = values_at(table, columns.label)
    elif columns.label is not None and files:
        with ThreadPool(READING_THREADS) as pool:  # without reading the other columns
            read = partial(pq.read_table, columns=[columns.label], partitioning=None)
            values = values_at(pa.concat_tables(pool.map(read, files)), columns.label)
    return OpenedSplit(name, located, files, choices, data, features, columns, values, in_sequence, by_folder, note)


def _load_parquet(located: Located, split: str, in_sequence: bool) -> Data:
    """One split of parquet files; unpacked into the cache of `datasets`, or as a stream."""
    quiet_in_logs()
    files, name = list(map(glob.escape, located.splits[split])), split or "train"
    try:
        return datasets.load_dataset("parquet", data_files={name: files}, split=name, streaming=in_sequence)
    except Exception as error:  # whatever a reader makes of a damaged file
        cause: BaseException = error
        while cause.__cause__ is not None:  # which `datasets` wraps in general words
            cause = cause.__cause__
        said = f"cannot read {located.name!r} as parquet: {type(cause).__name__}: {cause}"
        raise SourceError(f"{said}; fetch or write the files again") from error


def _load_folder(folder: str, labels_needed: bool, located_note: str, one_class: bool) -> tuple[Data, Any, str]:
    """The paths and classes in a folder of images, the declared columns, and a note on files left out.

    Each subfolder is a class, in natural order. The reader of `datasets` for this guesses splits from any word in the
    path, silently drops labels where folders differ in depth, and copies the list of files into its cache.
    """
    below = os.path.join(folder, "")
    if not labels_needed:
        images, others = contents(folder)
        data = _table_of_paths(images)
        return data, data.features, left_out(path.removeprefix(below) for path in others)
    classes, others = class_folders(folder)
    loose = natural_order(images_in(folder))
    if loose and one_class and not any(classes.values()):
        classes = {os.path.basename(os.path.abspath(folder)): loose}
    elif loose:
        where = "beside its class folders" if classes else "but no class folders"
        note = f" ({located_note})" if located_note else ""
        raise SourceError(f"{folder!r} holds images such as {loose[0]!r} {where}; allowed: FOLDER/CLASS/IMAGE{note}")
    labels = pa.array([label for label, paths in enumerate(classes.values()) for _ in paths], pa.int64())
    data = _table_of_paths(list(chain.from_iterable(classes.values())), label=labels)
    features = {**data.features, "label": datasets.ClassLabel(names=list(classes))}
    return data, features, left_out(path.removeprefix(below) for path in others)


def _table_of_paths(paths: Sequence[str], **columns: pa.Array) -> datasets.Dataset:
    """Image files as a data set of their paths, which are bytes, since not every name of a file is text."""
    files = [pa.nulls(len(paths), pa.binary()), pa.array(map(os.fsencode, paths), pa.binary())]
    table = pa.table({"image": pa.StructArray.from_arrays(files, names=["bytes", "path"]), **columns})
    # Without a fingerprint of its own, datasets would pickle the table to compute one.
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=uuid4().hex)
