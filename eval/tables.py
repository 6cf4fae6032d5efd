"""Labelled images in tables: parquet files and data sets on the Hub."""

import io
import os
import posixpath
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from arm_zoo.images.columns import LABEL_NAMES, holds_images, leaves, values_at
from arm_zoo.images.listing import split_of
from eval.listing import Listing, NamedBy, Reading, indexed, labels_of_text, numbers

SPLITS = ("validation", "val", "test")  # of a source with several, the first of these that is there
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>\w+))?")
IMAGE_NAMES = ("image", "img")


class Columns(NamedTuple):
    """The columns of image and label, where the user names them; a dot leads into a column of mappings."""

    image: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class _FromDataset:
    dataset: Any
    column: str

    def __call__(self, index: int) -> IO[bytes]:
        cell = self.dataset[index][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the row has no image")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else open(cell["path"], "rb")


def open_parquet(location: str, paths: Sequence[Path], reading: Reading, columns: Columns) -> Listing:
    """The images of parquet files."""
    from datasets import Dataset

    _quiet_in_logs()
    try:
        dataset = Dataset.from_parquet([str(path) for path in paths])
    except Exception as error:  # from damaged files pyarrow and datasets raise all sorts
        raise ValueError(f"cannot read {location} as parquet: {_first_line(error)}") from error
    return _of_dataset(location, dataset, reading, columns)


def open_hub(location: str, reading: Reading, columns: Columns) -> Listing:
    """The images of one split of a data set on the Hub."""
    from datasets import load_dataset, load_dataset_builder
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise ValueError(
            f"no file or folder {location!r} here, and offline mode is on (HF_HUB_OFFLINE); download the data set "
            "where there is a network (hf download --repo-type dataset OWNER/NAME) and name its parquet files or tars"
        )
    _quiet_in_logs()
    match = HUB_ID.fullmatch(location)
    name, revision, split = match["id"], match["revision"], match["split"]  # type: ignore[index]
    try:
        files = load_dataset_builder(name, revision=revision).config.data_files
        splits = [str(found) for found in files]
        split = split or _choose_split(splits, name)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}, only {', '.join(splits)}")
        # without data_files, the files of all other splits are fetched, too
        dataset = load_dataset(name, split=split, revision=revision, data_files={split: list(files[split])})
    except ValueError:
        raise
    except Exception as error:  # offline, gated, private or not there: each has a class of its own
        raise ValueError(
            f"{location} is neither a file or folder here nor a dataset the Hub gives us: {_first_line(error)}"
        ) from error
    return _of_dataset(location, dataset, reading, columns)


def _quiet_in_logs() -> None:
    """Progress bars of `datasets` are for terminals."""
    from datasets import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def _choose_split(splits: Sequence[str], name: str) -> str:
    if len(splits) == 1:
        return splits[0]
    of_word = {split_of(split): split for split in reversed(splits)}  # by the words that training goes by
    for word in ("val", "test"):
        if word in of_word:
            return of_word[word]
    raise ValueError(f"{name} has the splits {', '.join(splits)}; name the one to score: {name}:{splits[0]}")


def _of_dataset(location: str, dataset: Any, reading: Reading, columns: Columns) -> Listing:
    """Of a `datasets.Dataset`: the column of images, undecoded, and the column of labels."""
    import pyarrow.compute as pc
    from datasets import ClassLabel, Image

    image, label = _find_columns(location, dataset.features, reading, columns)
    feature = leaves(dataset.features)[label]
    values = values_at(dataset.data, label).to_pylist()
    try:
        dataset = dataset.cast_column(image, Image(decode=False))
    except Exception as error:  # pyarrow and datasets raise all sorts
        raise ValueError(f"{location}: the column {image} holds no images: {_first_line(error)}") from error
    cells = dataset.data.column(image)
    paths = [path or "" for path in pc.struct_field(cells, "path").to_pylist()]
    # where a cache has the pictures is for this machine only
    files = [posixpath.basename(path) if os.path.isabs(path) else path for path in paths]
    sizes = pc.binary_length(pc.struct_field(cells, "bytes")).fill_null(-1).to_pylist()
    if missing := values.count(None) + values.count(""):
        raise ValueError(f"{location}: {missing} of {len(values)} rows have no {label}")
    class_names: tuple[str, ...] | None = None
    named_by: NamedBy = "words"
    if isinstance(feature, ClassLabel):
        class_names, labels, named_by = tuple(feature.names), numbers(location, values), "declaration"
    elif str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        labels = numbers(location, values)
    elif getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise ValueError(
            f"{location}: the column {label} holds {feature}; allowed: ClassLabel, whole numbers or strings"
        )
    else:  # training takes digits, too, as the names of classes
        class_names, labels = labels_of_text(location, values) if reading.is_timms else indexed(values)
    read = _FromDataset(dataset, image)
    return Listing(location, files, labels, class_names, named_by, read, np.array(sizes), reading)


def _find_columns(location: str, features: Mapping[str, Any], reading: Reading, columns: Columns) -> tuple[str, str]:
    """The columns of image and label: where a set's own names decide, else the only ones that can be meant.

    Training takes a column of any name but never one of several, so `custom` does not either.
    """
    from datasets import ClassLabel

    images = [name for name, feature in features.items() if holds_images(feature)]
    if reading.is_timms:
        images = [*(name for name in IMAGE_NAMES if name in features), *images][:1]
    image = _choose("image", columns.image, images, list(features), location)
    others = {path: feature for path, feature in leaves(features).items() if path.partition(".")[0] != image}
    named = [name for name in (*LABEL_NAMES, "wnid") if name in others]
    declared = [path for path, feature in others.items() if isinstance(feature, ClassLabel)]
    labels = [*named, *declared][:1] if reading.is_timms else declared or named[:1]
    return image, _choose("label", columns.label, labels, list(others), location)


def _choose(what: str, wanted: str | None, likely: Sequence[str], there: Sequence[str], location: str) -> str:
    if wanted is not None and wanted not in there:
        raise ValueError(f"--{what}-column {wanted}: allowed is a column of {location}: {', '.join(there)}")
    if wanted is None and len(likely) != 1:
        problem = f"could be any of {', '.join(likely)}" if likely else f"is none of {', '.join(there)}"
        raise ValueError(f"the {what} column of {location} {problem}; for custom, --{what}-column NAME says which")
    return wanted or likely[0]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
