"""WebDataset tars: an index of what they hold, by which pictures are read where they lie, or in sequence.

A sample is a row: its picture is the file with the ending of one, its class stands in ``.cls`` or in ``.json`` beside
it. Where no sample has either, the folders inside the tars are the classes. The index is kept in the cache of
``datasets``; uncompressed tars are read in place, pictures of compressed ones are copied into the index.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from arm_zoo.files import replacing_files
from arm_zoo.images.listing import SPLIT_OF_WORD, class_name, is_image, listed, printable
from arm_zoo.images.tars import Sample, is_compressed, read_samples

from .config import DataConfig
from .load import READING_THREADS, column_of
from .locate import SourceError

TEXT_LABELS = ("cls", "class")
JSON_LABEL = "json.label"
FORMAT = 2  # of the index; another number makes those in the cache count no more
ROWS_AT_ONCE = 1000
INDEX = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.binary(), "offset": pa.int64(), "size": pa.int64()}),
        "key": pa.binary(),
        "label": pa.string(),  # JSON: an integer or a string
    }
)


def open_index(files: Sequence[str], where: str, config: DataConfig, labels_needed: bool) -> datasets.Dataset:
    """The samples of tars in stored order: where the picture of each lies, its key and, if asked for, its label.

    Args:
        files: The tars of one split.
        where: The split's name.
        config: ``image_column`` and ``label_column`` are endings, or a field in JSON, as in ``json.species``;
            ``streaming``: pictures of compressed tars need no copy.
        labels_needed: Whether there has to be a label.

    Raises:
        SourceError: If a tar is damaged, or its samples have no pictures, several, or no labels.
    """
    try:
        index = datasets.Dataset.from_file(str(_index_file(list(map(os.path.abspath, files)), config, labels_needed)))
        if len(index) and column_of(index, "image.size").null_count == len(index):
            wanted = f"a file with the ending {config.image_column!r}" if config.image_column else "an image file"
            raise SourceError(f"no sample of {where} has {wanted}; {_first_sample(files)}")
        _refuse_splits(index, where)
        return _with_classes(index, files, where, config) if labels_needed else index.remove_columns("label")
    except ValueError as error:
        raise SourceError(str(error)) from error


def _index_file(files: Sequence[str], config: DataConfig, labels_needed: bool) -> Path:
    """Make the index, unless it is in the cache."""
    copied = not config.streaming and any(is_compressed(Path(file)) for file in files)
    stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    settings = (config.image_column, config.label_column, labels_needed, copied)
    digest = hashlib.sha256(json.dumps((FORMAT, stamps, settings)).encode()).hexdigest()[:32]
    target = Path(datasets.config.HF_DATASETS_CACHE) / "webdataset_indices" / f"{digest}.arrow"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the processes of a run start together
        if not target.exists():
            with (
                replacing_files(target.parent) as beside,
                pa.OSFile(str(beside / target.name), "wb") as file,
                pa.ipc.new_stream(file, INDEX) as writer,
            ):
                for batch in _batches(files, config, labels_needed, copied):
                    writer.write(batch)
    return target


def _batches(files: Sequence[str], config: DataConfig, labels_needed: bool, copied: bool) -> Iterator[pa.RecordBatch]:
    """The index, file by file."""

    def of_file(file: str) -> Iterator[pa.RecordBatch]:
        rows = _rows(file, config, labels_needed, copied and is_compressed(Path(file)))
        while some := list(islice(rows, ROWS_AT_ONCE)):
            yield pa.RecordBatch.from_pylist(some, INDEX)

    if copied:  # with all their bytes, so one after the other
        for file in files:
            yield from of_file(file)
    else:
        with ThreadPool(READING_THREADS) as pool:
            for batches in pool.imap(lambda file: list(of_file(file)), files):
                yield from batches


def _rows(file: str, config: DataConfig, labels_needed: bool, copied: bool) -> Iterator[dict[str, Any]]:
    column = config.label_column
    labels = {column, column.rpartition(".")[0]} if column else {*TEXT_LABELS, JSON_LABEL.partition(".")[0]}

    def is_read(ending: str) -> bool:
        return (labels_needed and ending in labels) or (copied and _is_meant(ending, config.image_column))

    for sample in read_samples(Path(file), is_read):
        image = image_of(sample, file, config.image_column)
        place = sample.files[image] if image else None
        yield {
            "image": {
                "bytes": sample.contents[image] if image and copied else None,
                "path": os.fsencode(file),
                "offset": place and place.offset,
                "size": place and place.size,
            },
            "key": os.fsencode(sample.key),
            "label": _label(sample, file, column) if labels_needed else None,
        }


def _is_meant(ending: str, column: str | None) -> bool:
    return ending == column.lower() if column else is_image(f"key.{ending}")


def image_of(sample: Sample, file: str, column: str | None) -> str | None:
    """The ending of a sample's picture, None if it has none.

    Raises:
        ValueError: If it has several.
    """
    found = [ending for ending in sample.files if _is_meant(ending, column)]
    if len(found) > 1:
        names = [printable(f"{sample.key}.{ending}") for ending in found]
        raise ValueError(
            f"{file}: {listed(names)} have one key, {printable(sample.key)!r}, as it ends at the first dot of a name; "
            "allowed: one image for each key. Rename the files so that they have one dot each"
            + ("" if "." in found[0] else f", or say which ending is meant, as in data.image_column={found[0]}")
        )
    return found[0] if found else None


def _label(sample: Sample, file: str, column: str | None) -> str | None:
    """The label as JSON, None if the sample has none.

    Raises:
        ValueError: If it cannot be read, or is neither an integer nor a string.
    """
    for wanted in (column,) if column else (*TEXT_LABELS, JSON_LABEL):
        ending, _, field = wanted.rpartition(".")
        try:
            if wanted in sample.contents:
                label: Any = sample.contents[wanted].decode().strip()
                label = int(label) if re.fullmatch(r"-?[0-9]+", label) else label or None
            elif ending in sample.contents:
                facts = json.loads(sample.contents[ending])
                label = facts.get(field) if isinstance(facts, dict) else None
            else:
                continue
        except ValueError as error:  # of the encoding, or of JSON
            raise ValueError(f"{file}: {printable(sample.key)}.{ending or wanted} holds no label: {error}") from error
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            raise ValueError(
                f"{file}: {printable(sample.key)}.{wanted} is {label!r}; allowed as a label: an integer or a string"
            )
        return None if label is None else json.dumps(label)
    return None


def _first_sample(files: Sequence[str]) -> str:
    """What is in it, for a message."""
    for file in files:
        for sample in read_samples(Path(file), lambda ending: ending.endswith("json")):
            facts = {}
            for ending, content in sample.contents.items():
                try:
                    facts[ending] = json.loads(content)
                except ValueError:
                    continue
            names = [
                f"{ending} ({listed(list(facts[ending]))})" if isinstance(facts.get(ending), dict) else ending
                for ending in sample.files
            ]
            return f"the first one, {printable(sample.key)!r} of {file}, has the files {listed(names)}"
    return "there are none"


def _with_classes(index: datasets.Dataset, files: Sequence[str], where: str, config: DataConfig) -> datasets.Dataset:
    """The index with labels as integers or as names."""
    texts = column_of(index, "label").combine_chunks()
    if len(index) and texts.null_count == len(index) and config.label_column is None:
        labels = pa.array(_classes_by_folder(index, files, where), pa.string())
    elif texts.null_count:
        first = index[texts.is_null().index(True).as_py()]
        wanted = f"data.label_column={config.label_column}" if config.label_column else '.cls, or "label" in .json'
        apart = "; files with one key must stand side by side, as `tar --sort=name` leaves them"
        raise SourceError(
            f"{texts.null_count} of the {len(index)} samples of {where} have no label ({wanted}), the first one is "
            f"{printable(first['key'])!r}{apart if column_of(index, 'image.size').null_count else ''}; "
            f"{_first_sample(files)}"
        )
    else:
        coded = texts.dictionary_encode()
        values = [json.loads(text) for text in coded.dictionary.to_pylist()]
        numbers = all(isinstance(value, int) and abs(value) < 2**63 for value in values)
        named = pa.array(values if numbers else list(map(str, values)), pa.int64() if numbers else pa.string())
        labels = pc.take(named, coded.indices)
    return index.remove_columns("label").add_column(
        "label", labels, new_fingerprint=uuid4().hex, feature=datasets.Value(str(labels.type))
    )


def _classes_by_folder(index: datasets.Dataset, files: Sequence[str], where: str) -> list[str]:
    """The class of each sample: the first folder of its path that is not the same for all."""
    folders = _folders(index)
    if not all(folders):
        raise SourceError(
            f'the samples of {where} have neither a .cls nor a "label" in a .json, and do not lie in class folders; '
            f"{_first_sample(files)}. Say where the label is with data.label_column, as in json.species"
        )
    depth = min(_shared(folders), min(map(len, folders)) - 1)
    for name in {folder[depth] for folder in folders}:
        if printable(name) != name:
            raise SourceError(f"the name of the class folder {printable(name)!r} in {where} is not UTF-8; rename it")
    return [class_name(folder[depth]) for folder in folders]


def _refuse_splits(index: datasets.Dataset, where: str) -> None:
    """Refuse tars that hold several splits in folders of their own, which would be mixed."""
    folders = sorted(set(map(tuple, _folders(index))))
    depth = _shared(folders) if folders else 0
    names = sorted({folder[depth] for folder in folders if len(folder) > depth})
    deeper = any(len(folder) > depth + 1 for folder in folders)
    if deeper and len(names) > 1 and all(name.lower() in SPLIT_OF_WORD for name in names):
        raise SourceError(
            f"the tars of {where} hold the folders {listed(names)}, which are splits; allowed: tars of one split "
            "each, or name the folder that they are unpacked to"
        )


def _folders(index: datasets.Dataset) -> list[list[str]]:
    """Names of the folders that each sample lies in."""
    return [os.fsdecode(key).split("/")[:-1] for key in column_of(index, "key").to_pylist()]


def _shared(folders: Sequence[Sequence[str]]) -> int:
    """How many folders, from the top on, are the same for all."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False))))


def shard_sizes(index: datasets.Dataset, files: Sequence[str]) -> list[int]:
    """Samples in each of the tars."""
    counts = pc.value_counts(column_of(index, "image.path"))
    rows = dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))
    return [rows.get(os.fsencode(os.path.abspath(file)), 0) for file in files]


@dataclass(frozen=True)
class ShardRows:
    """Samples of tars in sequence, a shard for each tar.

    Args:
        files: The tars.
        sizes: Samples in each.
        labels: Of all samples, as in the index; None if they were not asked for.
        image_column: As ``data.image_column``.
    """

    files: Sequence[str]
    sizes: Sequence[int]
    labels: pa.ChunkedArray | None
    image_column: str | None

    @property
    def num_shards(self) -> int:
        """Tars."""
        return len(self.files)

    def shard(self, number: int, first_row: int) -> Iterator[tuple[Any, Any, str]]:
        """Picture, label and name of each sample of one tar."""
        file, start = self.files[number], sum(self.sizes[:number])
        samples = read_samples(Path(file), lambda ending: _is_meant(ending, self.image_column), first_row)
        for row, sample in enumerate(samples, start + first_row):
            image = image_of(sample, file, self.image_column)
            label = None if self.labels is None else self.labels[row].as_py()
            yield sample.contents.get(image or ""), label, printable(f"{file}/{sample.key}")
