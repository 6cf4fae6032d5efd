"""From what ``data.source`` says to the files of each split. Nothing is read, and nothing heavy is imported."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from .braces import expand_braces
from .listing import SPLIT_OF_WORD, TAR_ENDINGS, has_images, images_in, is_image, natural_order, split_of, subfolders

Kind = Literal["pictures", "parquet", "tars", "hub"]
FILES: dict[Kind, tuple[str, ...]] = {"parquet": (".parquet",), "tars": TAR_ENDINGS}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
ALLOWED = (
    "a folder of pictures in class subfolders (perhaps below train/ and val/), parquet files or WebDataset tars "
    "(a folder, file, glob or brace list), hf://owner/name, or digits"
)


class SourceError(ValueError):
    """A source that is missing, empty, unclear, or does not fit its use."""


@dataclass(frozen=True)
class Located:
    """What a source turned out to be.

    Args:
        name: The source as it was written.
        kind: How it is read.
        splits: ``train``, ``val`` and ``test``, those that there are -> files, or one folder of pictures.
        note: What was taken for splits or classes, where it could be meant otherwise; else "".
    """

    name: str
    kind: Kind
    splits: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""

    @property
    def has_validation(self) -> bool:
        """Whether there is a split to score on, as far as is known before a data set of the Hub is opened."""
        return bool({"val", "test"} & self.splits.keys())


def locate(name: str, one_split: bool = False) -> Located:
    """Find out what a source is, without reading pictures.

    Args:
        name: As ``data.source`` or ``data.validation`` says.
        one_split: Another source is named for the other split, so that subfolders called like splits may be classes.

    Raises:
        SourceError: If it is not there, empty, or could be read in two ways.
    """
    name = os.path.expanduser(name)  # the shell leaves the ~ of key=~/folder alone
    if name.startswith("hf://"):
        hub_id = name.removeprefix("hf://").removeprefix("datasets/")
        if not HUB_ID.fullmatch(hub_id):
            raise SourceError(f"{name!r} is no data set on the Hub; allowed: hf://owner/name")
        return Located(hub_id, "hub")
    if os.path.isdir(name):
        return locate_folder(name, one_split)
    if os.path.isfile(name):
        return located_files(name, [name])
    if any(sign in name for sign in "*?[{"):
        matches = {pattern: glob.glob(pattern, recursive=True) for pattern in expand_braces(name)}
        missing = [pattern for pattern, files in matches.items() if not files]
        if missing:
            raise SourceError(f"no file matches {missing[0]!r} (source {name!r}); allowed: {ALLOWED}")
        return located_files(name, list(chain.from_iterable(matches.values())))
    if HUB_ID.fullmatch(name) and not os.path.isdir(os.path.dirname(name)):  # else it is a misspelt folder
        return Located(name, "hub")
    raise SourceError(f"there is no {name!r}; allowed: {ALLOWED}")


def locate_folder(folder: str, one_split: bool) -> Located:
    """A folder holds pictures, or parquet files, or tars; two kinds at once are refused."""
    found: dict[Kind, list[str]] = {}
    inside = list(files_near(folder))
    for kind, endings in FILES.items():
        if files := [file for file in inside if file.lower().endswith(endings)]:
            found[kind] = files
    if has_images(folder):
        found["pictures"] = []
    if len(found) > 1:
        [ending, *_] = FILES[next(iter(found))]
        raise SourceError(f"{folder!r} holds {' and '.join(found)}; name the files, as in '{folder}/*{ending}'")
    if not found:
        problem = "holds no pictures, parquet files or tars" if any(os.scandir(folder)) else "is empty"
        raise SourceError(f"{folder!r} {problem}; allowed: {ALLOWED}")
    [(kind, files)] = found.items()
    return picture_splits(folder, one_split) if kind == "pictures" else located_files(folder, files)


def files_near(folder: str) -> Iterator[str]:
    """Files in a folder and in its subfolders, those of pictures left out: they may hold a million."""
    yield from (entry.path for entry in os.scandir(folder) if entry.is_file())
    for below in subfolders(folder):
        for entry in os.scandir(below):
            if is_image(entry.name):
                break
            if entry.is_file():
                yield entry.path


def located_files(name: str, files: list[str]) -> Located:
    """Parquet files or tars, sorted into splits by the words in their names; a single split needs no word."""
    kinds: dict[str, Kind | None] = {
        file: next((kind for kind, endings in FILES.items() if file.lower().endswith(endings)), None) for file in files
    }
    unknown = [file for file, kind in kinds.items() if kind is None]
    if unknown:
        raise SourceError(f"cannot read {unknown[0]!r} (source {name!r}); allowed: {ALLOWED}")
    if len(set(kinds.values())) > 1:
        raise SourceError(f"{name!r} names parquet files and tars; allowed: one kind at a time")
    splits: dict[str, list[str]] = {}
    unnamed: list[str] = []
    root = name if os.path.isdir(name) else os.path.commonpath(map(os.path.dirname, files))
    for file in natural_order(set(files)):
        split = split_of(os.path.relpath(file, root))
        (unnamed if split is None else splits.setdefault(split, [])).append(file)
    if unnamed and splits:
        raise SourceError(
            f"which split is {unnamed[0]!r} of? Other files of {name!r} are of {', '.join(splits)}; allowed: file "
            "names that all carry one of the words train, val, test, or none at all"
        )
    [kind] = set(kinds.values())
    return Located(name, kind, splits or {"train": unnamed})  # type: ignore[arg-type]


def picture_splits(folder: str, one_split: bool) -> Located:
    """``train/``, ``val/`` and ``test/``, or the folder as one split, whose subfolders are then its classes.

    A subfolder called like a split may be a class. Where another source is named for the other split, it is one if
    there are other classes beside it, or if the pictures lie in it itself and not in class folders below it.
    """
    inside = [os.path.basename(path) for path in subfolders(folder) if has_images(path)]
    like_splits = [name for name in inside if name.lower() in SPLIT_OF_WORD]
    if not like_splits:
        return Located(folder, "pictures", {"train": [folder]})
    others = [name for name in inside if name not in like_splits]
    flat = all(any(images_in(os.path.join(folder, name))) for name in like_splits)
    if one_split and (others or flat):
        note = (
            f"data.validation is set, so {folder!r} is one split, and its folders {', '.join(like_splits)} are classes"
        )
        return Located(folder, "pictures", {"train": [folder]}, note)
    splits = {SPLIT_OF_WORD[name.lower()]: [os.path.join(folder, name)] for name in like_splits}
    way_out = f"if these are classes, set data.validation, and all of {folder!r} is one split"
    if others or len(splits) < len(like_splits):
        beside = f" beside {', '.join(others[:3])}" if others else ""
        raise SourceError(
            f"{folder!r} holds {', '.join(like_splits)}{beside}: splits or classes? If these are "
            f"splits, name the training split's own folder, with data.validation for the other; {way_out}"
        )
    taken = ", ".join(f"{os.path.basename(path)} is the {split} split" for split, [path] in splits.items())
    return Located(folder, "pictures", splits, f"{folder!r}: {taken}; {way_out}" if flat else "")
