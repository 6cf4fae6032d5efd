"""WebDataset tars: an index of their samples, by which images are read where they lie.

A sample is one row: its image is the file with an image's ending, and its class is in a `.cls` or `.json` file beside
it. If no sample has either, the folders inside the tars are the classes. The index is kept in the cache of `datasets`.
Uncompressed tars are read in place; the images of compressed ones are copied into the index.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice, takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from arm_zoo.files import remove_leftovers, replacing_files
from arm_zoo.images.columns import Choices, values_at
from arm_zoo.images.errors import SourceError
from arm_zoo.images.labels import counted
from arm_zoo.images.listing import class_name, is_image, left_out
from arm_zoo.images.locate import SPLIT_OF_WORD
from arm_zoo.images.tars import Sample, is_compressed, read_samples
from arm_zoo.messages import listed, printable

READING_THREADS = 16  # they wait for the disk
TEXT_LABELS = ("cls", "class")
JSON_LABEL = "json.label"
FORMAT = 2  # of the index; raise it when the format changes: older cached indices are then ignored
ROWS_AT_ONCE = 1000
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.binary(), "offset": pa.int64(), "size": pa.int64()})
INDEX = pa.schema({"image": _IMAGE, "key": pa.binary(), "label": pa.string()})  # in JSON, an integer or a string
Index = tuple[datasets.Dataset, bool, str]  # the rows; whether folders are the classes; a note on files left out


def sizes_of_shards(rows: datasets.Dataset, files: Sequence[str]) -> list[int]:
    """Samples in each of the tars of an index."""
    found = counted(_column(rows, "image.path"))
    return [found.get(os.fsencode(os.path.abspath(file)), 0) for file in files]


def open_index(files: Sequence[str], where: str, choices: Choices, labels_needed: bool, in_sequence: bool) -> Index:
    """The index of the tars of one split, which messages call `where`; it is made if the cache does not have it.

    If rows are read `in_sequence`, the images of compressed tars are not copied.
    """
    places = list(map(os.path.abspath, files))
    copied = not in_sequence and any(is_compressed(Path(file)) for file in places)
    stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in places]
    settings = (choices.image_column, choices.label_column, labels_needed, copied)
    digest = hashlib.sha256(json.dumps((FORMAT, stamps, settings)).encode()).hexdigest()[:32]
    target = Path(datasets.config.HF_DATASETS_CACHE, "webdataset_indices", digest, "index.arrow")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the processes of a run start together
        if not target.exists():
            remove_leftovers(target.parent)
            with (
                replacing_files(target.parent) as beside,
                pa.OSFile(str(beside / target.name), "wb") as file,
                pa.ipc.new_stream(file, INDEX) as writer,
            ):
                for batch in _batches(places, choices, labels_needed, copied):
                    writer.write(batch)
    rows = datasets.Dataset.from_file(str(target))
    if len(rows) and _column(rows, "image.size").null_count == len(rows):
        wanted = f"a file with the ending {choices.image_column!r}" if choices.image_column else "an image file"
        raise SourceError(f"no sample of {where} has {wanted}; {_first_sample(files)}")
    _refuse_splits(rows, where)
    return _with_classes(rows, files, where, choices) if labels_needed else (rows.remove_columns("label"), False, "")


def _column(rows: datasets.Dataset, path: str) -> pa.Array:
    """A column of the index, or a field in it."""
    return values_at(rows.with_format("arrow")[:], path).combine_chunks()


def _batches(files: Sequence[str], choices: Choices, labels_needed: bool, copied: bool) -> Iterator[pa.RecordBatch]:
    """The index, file by file."""

    def of_file(file: str) -> Iterator[pa.RecordBatch]:
        rows = _rows(file, choices, labels_needed, copied and is_compressed(Path(file)))
        while some := list(islice(rows, ROWS_AT_ONCE)):
            yield pa.RecordBatch.from_pylist(some, INDEX)

    if copied:  # with all their bytes, so one after the other
        yield from chain.from_iterable(map(of_file, files))
        return
    with ThreadPool(READING_THREADS) as pool:
        yield from chain.from_iterable(pool.imap(lambda file: list(of_file(file)), files))


def _rows(file: str, choices: Choices, labels_needed: bool, copied: bool) -> Iterator[dict[str, Any]]:
    """The rows of the index for one tar; with `copied` they have the images' bytes."""
    column = choices.label_column
    labels = {column, column.rpartition(".")[0]} if column else {*TEXT_LABELS, JSON_LABEL.partition(".")[0]}

    def is_read(ending: str) -> bool:
        return (labels_needed and ending in labels) or (copied and is_meant(ending, choices))

    for sample in read_samples(Path(file), is_read):
        image: dict[str, Any] = {"path": os.fsencode(file)}  # what is left out is None in the index
        if ending := image_of(sample, file, choices):
            place = sample.files[ending]
            image |= {"bytes": sample.contents[ending] if copied else None, "offset": place.offset, "size": place.size}
        label = _label(sample, file, column) if labels_needed else None
        yield {"image": image, "key": os.fsencode(sample.key), "label": label}


def is_meant(ending: str, choices: Choices) -> bool:
    """Whether files with an ending are the images."""
    return ending == choices.image_column.lower() if choices.image_column else is_image(f"key.{ending}")


def image_of(sample: Sample, file: str, choices: Choices) -> str | None:
    """The ending of a sample's image, None if it has none; raises `SourceError` if it has several."""
    found = [ending for ending in sample.files if is_meant(ending, choices)]
    if len(found) > 1:
        names = [printable(f"{sample.key}.{ending}") for ending in found]
        way_out = f", or say which ending is meant, as in {choices.typed('image_column', found[0])}"
        raise SourceError(
            f"{file}: {listed(names)} have one key, {printable(sample.key)!r}, as it ends at the first dot of a name; "
            "allowed: one image for each key. Rename the files so that they have one dot each"
            f"{'' if '.' in found[0] else way_out}"
        )
    return found[0] if found else None


def _label(sample: Sample, file: str, column: str | None) -> str | None:
    """The label, an integer or a string, as JSON; None if the sample has none."""
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
            name = printable(f"{file}: {sample.key}.{ending or wanted}")
            raise SourceError(f"{name} holds no label: {error}") from error
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            name = printable(f"{file}: {sample.key}.{wanted}")
            raise SourceError(f"{name} is {label!r}; allowed as a label: an integer or a string")
        return None if label is None else json.dumps(label)
    return None


def _first_sample(files: Sequence[str]) -> str:
    """The files of the first sample, for a message."""
    for file in files:
        for sample in read_samples(Path(file), lambda ending: ending == "json"):
            names = list(sample.files)
            with suppress(KeyError, ValueError, AttributeError):  # no JSON, damaged, or no mapping
                fields = listed(list(json.loads(sample.contents["json"]).keys()))
                names[names.index("json")] = f"json ({fields})"
            return f"the first one, {printable(sample.key)!r} of {file}, has the files {listed(names)}"
    return "there are none"


def _with_classes(rows: datasets.Dataset, files: Sequence[str], where: str, choices: Choices) -> Index:
    """The index with labels as integers or as names."""
    texts, sizes = _column(rows, "label"), _column(rows, "image.size")
    by_folder = len(rows) > 0 and texts.null_count == len(rows) and choices.label_column is None
    note = ""
    if by_folder:
        if note := left_out(_column(rows, "key").filter(sizes.is_null()).to_pylist()):
            table = rows.with_format("arrow")[:].filter(sizes.is_valid())
            rows = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=uuid4().hex)
        labels = pa.array(_classes_by_folder(rows, files, where, choices), pa.string())
    elif texts.null_count:
        first = rows[texts.is_null().index(True).as_py()]
        column = choices.label_column
        wanted = choices.typed("label_column", column) if column else '.cls, or "label" in .json'
        apart = "; files with one key must stand side by side, as `tar --sort=name` leaves them"
        raise SourceError(
            f"{texts.null_count} of the {len(rows)} samples of {where} have no label ({wanted}), the first one is "
            f"{printable(first['key'])!r}{apart if sizes.null_count else ''}; {_first_sample(files)}"
        )
    else:
        coded = texts.dictionary_encode()
        values = [json.loads(text) for text in coded.dictionary.to_pylist()]
        numbers = all(isinstance(value, int) and abs(value) < 2**63 for value in values)
        named = pa.array(values if numbers else map(str, values), pa.int64() if numbers else pa.string())
        labels = pc.take(named, coded.indices)
    feature = datasets.Value(str(labels.type))
    rows = rows.remove_columns("label").add_column("label", labels, new_fingerprint=uuid4().hex, feature=feature)
    return rows, by_folder, note


def _classes_by_folder(rows: datasets.Dataset, files: Sequence[str], where: str, choices: Choices) -> list[str]:
    """The class of each sample: the first folder of its path that is not the same for all."""
    folders = _folders(rows)
    if not all(folders):
        raise SourceError(
            f'the samples of {where} have neither a .cls nor a "label" in a .json, and do not lie in class folders; '
            f"{_first_sample(files)}. Say where the label is, as in {choices.typed('label_column', 'json.species')}"
        )
    depth = min(_shared(folders), min(map(len, folders)) - 1)
    for name in {folder[depth] for folder in folders}:
        if printable(name) != name:
            raise SourceError(f"the name of the class folder {printable(name)!r} in {where} is not UTF-8; rename it")
    return [class_name(folder[depth]) for folder in folders]


def _refuse_splits(rows: datasets.Dataset, where: str) -> None:
    """Refuse tars that hold several splits in folders of their own, which would be mixed."""
    folders = set(_folders(rows))
    depth = _shared(folders) if folders else 0
    names = sorted({folder[depth] for folder in folders if len(folder) > depth})
    deeper = any(len(folder) > depth + 1 for folder in folders)
    if deeper and len(names) > 1 and all(name.lower() in SPLIT_OF_WORD for name in names):
        allowed = "tars of one split each, or name the folder that they are unpacked to"
        found = f"the tars of {where} hold the folders {listed(names)}"
        raise SourceError(f"{found}, which are splits; allowed: {allowed}")


def _folders(rows: datasets.Dataset) -> list[tuple[str, ...]]:
    """Names of the folders that each sample lies in."""
    return [tuple(os.fsdecode(key).split("/")[:-1]) for key in _column(rows, "key").to_pylist()]


def _shared(folders: Collection[tuple[str, ...]]) -> int:
    """How many folders, from the top on, are the same for all."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False))))
