"""What a source string means: the files of each split. Nothing is read, and nothing heavy is imported."""

import glob
import os
import re
from dataclasses import dataclass, field
from typing import Literal

from arm_zoo.images.braces import expand_braces
from arm_zoo.images.errors import SourceError
from arm_zoo.images.listing import entries_of, images_below, images_in, natural_order, subfolders

Kind = Literal["images", "parquet", "tars", "hub"]
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
FILES: dict[Kind, tuple[str, ...]] = {"parquet": (".parquet",), "tars": TAR_ENDINGS}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # ORG/NAME of models and of data sets
SCORED = ("val", "test", "train")  # of a source that is named for validation, the first of these that is there
ALLOWED = (
    "a folder of images in class subfolders (perhaps below train/ and val/), parquet files or WebDataset tars "
    "(a folder, file, glob or brace list), hf://owner/name, or in training digits"
)


@dataclass(frozen=True)
class Located:
    """What a source turned out to be."""

    name: str  # as it was written
    kind: Kind
    splits: dict[str, list[str]] = field(default_factory=dict)  # train, val, test -> files, or one folder of images
    note: str = ""  # what was taken for splits or classes, where it could be meant otherwise
    whole: bool = False  # nothing says which split its only one is

    @property
    def has_validation(self) -> bool:
        """Whether there is a split to score on, as far as is known before a data set of the Hub is opened."""
        return bool({"val", "test"} & self.splits.keys())


def split_of(path: str) -> str | None:
    """The split whose word stands last in a relative path: train of `data/train-00000-of-00002.parquet`."""
    words = [word for word in re.split(r"[^a-z]+", path.lower()) if word in SPLIT_OF_WORD]
    return SPLIT_OF_WORD[words[-1]] if words else None


def locate(name: str, one_split: bool = False) -> Located:
    """Find out what a source is.

    `one_split` says that it is named for one split, so that subfolders called like splits may be its classes.
    """
    name = os.path.expanduser(name)  # the shell leaves the ~ of key=~/folder alone
    if name.startswith("hf://"):
        hub_id = name.removeprefix("hf://").removeprefix("datasets/")
        if not HUB_ID.fullmatch(hub_id):
            raise SourceError(f"{name!r} is no data set on the Hub; allowed: hf://owner/name")
        return Located(hub_id, "hub")
    if os.path.isdir(name):
        return _located_folder(name, one_split)
    if os.path.isfile(name):
        return _located_files(name, [name])
    if any(sign in name for sign in "*?[{"):
        files: list[str] = []
        for pattern in expand_braces(name):
            if not (found := glob.glob(pattern, recursive=True)):
                raise SourceError(f"no file matches {pattern!r} (source {name!r}); allowed: {ALLOWED}")
            files += found
        return _located_files(name, files)
    if HUB_ID.fullmatch(name) and not os.path.isdir(os.path.dirname(name)):  # else it is a misspelt folder
        return Located(name, "hub")
    raise SourceError(f"there is no {name!r}; allowed: {ALLOWED}")


def _located_folder(folder: str, one_split: bool) -> Located:
    """A folder holds images, or parquet files, or tars; two kinds at once are refused."""
    places = (folder, *(path for path in subfolders(folder) if not any(images_in(path))))  # images may be a million
    inside = [entry.path for place in places for entry in entries_of(place) if entry.is_file()]
    found = {kind: [file for file in inside if file.lower().endswith(endings)] for kind, endings in FILES.items()}
    kinds = [kind for kind, files in found.items() if files] + (["images"] if any(images_below(folder)) else [])
    if len(kinds) > 1:
        [ending, *_] = FILES[kinds[0]]
        raise SourceError(f"{folder!r} holds {' and '.join(kinds)}; name the files, as in '{folder}/*{ending}'")
    if not kinds:
        problem = "holds no images, parquet files or tars" if any(entries_of(folder)) else "is empty"
        raise SourceError(f"{folder!r} {problem}; allowed: {ALLOWED}")
    return _image_splits(folder, one_split) if kinds == ["images"] else _located_files(folder, found[kinds[0]])


def _located_files(name: str, files: list[str]) -> Located:
    """Parquet files or tars, sorted into splits by the words in their names; a single split needs no word."""
    kinds: set[Kind] = set()
    splits: dict[str, list[str]] = {}
    root = name if os.path.isdir(name) else os.path.commonpath(map(os.path.dirname, files))
    for file in natural_order(set(files)):
        kind = next((kind for kind, endings in FILES.items() if file.lower().endswith(endings)), None)
        if kind is None:
            raise SourceError(f"cannot read {file!r} (source {name!r}); allowed: {ALLOWED}")
        kinds.add(kind)
        splits.setdefault(split_of(os.path.relpath(file, root)) or "", []).append(file)
    if len(kinds) > 1:
        raise SourceError(f"{name!r} names parquet files and tars; allowed: one kind at a time")
    unnamed = splits.pop("", [])
    if unnamed and splits:
        question = f"which split is {unnamed[0]!r} of? Other files of {name!r} are of {', '.join(splits)}"
        allowed = "file names that all carry one of the words train, val, test, or none at all"
        raise SourceError(f"{question}; allowed: {allowed}")
    return Located(name, kinds.pop(), splits or {"train": unnamed}, whole=not splits)


def _image_splits(folder: str, one_split: bool) -> Located:
    """`train/`, `val/` and `test/`, or the folder as one split, whose subfolders are then its classes.

    A subfolder called like a split may be a class. In a folder that is named for one split, it is one if there are
    other classes beside it, or if the images lie in it itself and not in class folders below it.
    """
    inside = [os.path.basename(path) for path in subfolders(folder) if any(images_below(path))]
    like_splits = [name for name in inside if name.lower() in SPLIT_OF_WORD]
    others = [name for name in inside if name not in like_splits]
    flat = all(any(images_in(os.path.join(folder, name))) for name in like_splits)
    if not like_splits or (one_split and (others or flat)):
        note = f"{folder!r} is named for one split, so its folders {', '.join(like_splits)} are classes"
        return Located(folder, "images", {"train": [folder]}, note if like_splits else "", whole=True)
    splits = {SPLIT_OF_WORD[name.lower()]: [os.path.join(folder, name)] for name in like_splits}
    way_out = f"if these are classes, set data.validation, and all of {folder!r} is one split"
    if others or len(splits) < len(like_splits):
        beside = f" beside {', '.join(others[:3])}" if others else ""
        more = "" if one_split else f", with data.validation for the other; {way_out}"
        question = f"{folder!r} holds {', '.join(like_splits)}{beside}: splits or classes?"
        raise SourceError(f"{question} If these are splits, name the folder of one{more}")
    taken = ", ".join(f"{os.path.basename(path)} is the {split} split" for split, [path] in splits.items())
    return Located(folder, "images", splits, f"{folder!r}: {taken}; {way_out}" if flat else "")
