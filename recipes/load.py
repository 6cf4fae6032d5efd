"""Folders, parquet files and data sets of the Hub as data sets of the library ``datasets``, pictures not decoded."""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from multiprocessing.pool import ThreadPool
from typing import Any, TypeAlias
from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from arm_zoo.images.columns import values_at
from arm_zoo.images.listing import class_folders, images_below, images_in, natural_order, split_of

from .locate import Located, SourceError

Data: TypeAlias = datasets.Dataset | datasets.IterableDataset
IMAGE_FIELDS = {"bytes": pa.binary(), "path": pa.binary()}  # of a picture file; its path need not be text
READING_THREADS = 16  # they wait for the disk


def load_parquet(located: Located, split: str, streaming: bool) -> Data:
    """One split of parquet files; unpacked into the cache of ``datasets``, or as a stream."""
    files = list(map(glob.escape, located.splits[split]))
    try:
        return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    except Exception as error:  # whatever a reader makes of a damaged file
        raise SourceError(f"cannot read {located.name!r} as parquet: {_error_text(error)}") from error


def _error_text(error: BaseException) -> str:
    """What went wrong in the first place: ``datasets`` wraps it in general words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def count_rows(files: Sequence[str]) -> list[int]:
    """Rows of each parquet file, which its last bytes tell."""
    with ThreadPool(READING_THREADS) as pool:
        return pool.map(lambda file: pq.read_metadata(file).num_rows, files)


def read_column(files: Sequence[str], path: str) -> pa.ChunkedArray:
    """One column of parquet files, or a field in it, without reading the others."""
    with ThreadPool(READING_THREADS) as pool:
        tables = pool.map(lambda file: pq.read_table(file, columns=[path], partitioning=None), files)
    return values_at(pa.concat_tables(tables), path)


def plain(data: datasets.Dataset, columns: Iterable[str]) -> datasets.Dataset:
    """Some columns without their declaration, as they are stored: with it goes the decoding of pictures.

    ``datasets`` copies declarations at every step, and the names of thousands of classes take longer than all else.
    """
    table = data.data.select(sorted(columns)).replace_schema_metadata(None)
    return datasets.Dataset(table, indices_table=data._indices, fingerprint=uuid4().hex)


def column_of(data: datasets.Dataset, path: str) -> pa.ChunkedArray:
    """The same of a data set that can be read at random."""
    top = path if path in data.column_names else path.partition(".")[0]
    return values_at(data.select_columns([top]).with_format("arrow")[:], path)


def load_folder(located: Located, split: str, labels_needed: bool) -> tuple[datasets.Dataset, Mapping[str, Any]]:
    """Paths and classes of a folder of pictures, a class for each subfolder in natural order; and what columns are.

    ``datasets`` has a reader of its own for this, which guesses splits from any word in the path, leaves labels out in
    silence where folders differ in depth, and copies the list of files into its cache.

    Raises:
        SourceError: If pictures lie outside class folders, or a class folder's name cannot be one.
    """
    [folder] = located.splits[split]
    if not labels_needed:
        data = _table_of_paths(natural_order(images_below(folder)))
        return data, data.features
    loose = next(images_in(folder), None)
    try:
        classes = class_folders(folder)
    except ValueError as error:
        raise SourceError(str(error)) from None
    if loose is not None:
        where = "beside its class folders" if classes else "but no class folders"
        note = f" ({located.note})" if located.note else ""
        raise SourceError(f"{folder!r} holds pictures such as {loose!r} {where}; allowed: FOLDER/CLASS/PICTURE{note}")
    labels = pa.array([label for label, paths in enumerate(classes.values()) for _ in paths], pa.int64())
    data = _table_of_paths(list(chain.from_iterable(classes.values())), label=labels)
    return data, {**data.features, "label": datasets.ClassLabel(names=list(classes))}


def _table_of_paths(paths: Sequence[str], **columns: pa.Array) -> datasets.Dataset:
    """Picture files as a data set that holds their paths only: as bytes, since not every name is text."""
    files = [pa.nulls(len(paths), pa.binary()), pa.array(map(os.fsencode, paths), pa.binary())]
    table = pa.table({"image": pa.StructArray.from_arrays(files, names=list(IMAGE_FIELDS)), **columns})
    # A fingerprint of one's own: to find one, datasets would pickle the table.
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=uuid4().hex)


def load_from_hub(name: str, streaming: bool) -> dict[str, Data]:
    """All splits of a data set on the Hub, or of its copy in the cache."""
    try:
        loaded = datasets.load_dataset(name, streaming=streaming)
    except Exception as error:  # network, permissions, names, several configurations: the Hub's words say which
        raise SourceError(hub_problem(name, error)) from error
    splits: dict[str, Data] = {}
    for split, data in loaded.items():
        word = split_of(str(split))
        if word is not None:
            splits.setdefault(word, data)
    if not splits:
        raise SourceError(
            f"hf://{name} has the splits {', '.join(map(str, loaded))}; none is called train, val or test"
        )
    return splits


def hub_problem(name: str, error: Exception) -> str:
    """Why a data set did not come from the Hub, and what to do."""
    if datasets.config.HF_HUB_OFFLINE:
        return (
            f"there is no file or folder {name!r} here, and the Hub is switched off (HF_HUB_OFFLINE=1) while "
            f"hf://{name} is not in the cache; unset HF_HUB_OFFLINE, load it once where there is a network, "
            "or name files that are here"
        )
    return (
        f"there is no file or folder {name!r} here, and hf://{name} did not come from the Hub: "
        f"{type(error).__name__}: {error}"
    )
