"""Images of the user's own, found and read as the recipes find and read what they train on and validate with.

A run's held-out top-1 and the row of `--sets custom=...` on the same images then agree: endings, classes and pixels
are those of `arm_zoo.images`, and of several splits the one is scored that the recipes validate with.
"""

import glob
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arm_zoo.images.decode import MAX_PIXELS
from arm_zoo.images.listing import (
    SPLIT_OF_WORD,
    TAR_ENDINGS,
    class_folders,
    files_below,
    has_images,
    images_in,
    is_image,
    natural_order,
    printable,
    split_of,
    subfolders,
)
from arm_zoo.images.tars import FromTar, read_members, split_key
from eval.listing import Listing, Reading, as_training, indexed
from eval.sources import (
    FromDisk,
    Shards,
    are_shards,
    are_tars,
    find,
    joined,
    not_empty,
    open_shards,
    size_of,
)
from eval.tables import Columns, open_hub, open_parquet

SPLITS = ("val", "test", "train")  # the first of these that is there is scored
NAMED = 3  # files in a note


class Choices(NamedTuple):
    """What the recipes' `data.image_column`, `data.label_column` and `data.max_pixels` say."""

    columns: Columns = Columns()
    max_pixels: int = MAX_PIXELS


AS_USUAL = Choices()


def open_own(locations: Sequence[str], choices: Choices = AS_USUAL) -> Listing:
    """The labelled images at one location, or in several tars or parquet files.

    Args:
        locations: as in `eval.sources.open_source`.
        choices: columns where names and types do not tell, and the largest image that is decoded.

    Raises:
        ValueError: for what is not there, not readable, unclear or without images.
    """
    location, found = find(locations)
    reading, columns = as_training(choices.max_pixels), choices.columns
    if not found:
        return not_empty(open_hub(location, reading, columns))
    paths: list[Path] = []
    notes: list[str] = []
    for item, expanded in found.items():
        folder = expanded[0] if len(found) == len(expanded) == 1 and expanded[0].is_dir() else None
        files = expanded if folder is None else _tables_near(folder)
        if folder is not None and not files:
            _refuse(columns, location)
            return not_empty(_open_folder(location, folder, reading))
        # a file that the user names by itself is meant, whatever its split
        chosen, note = _of_one_split(files) if folder is not None or glob.has_magic(item) else (files, [])
        paths += chosen
        notes += note
    if are_tars(location, paths):
        _refuse(columns, location)
        listing = _open_tars(location, {path: read_members(path) for path in paths}, reading)
    else:
        listing = open_parquet(location, paths, reading, columns)
    return not_empty(replace(listing, notes=(*notes, *listing.notes)))


def _refuse(columns: Columns, location: str) -> None:
    if columns != Columns():
        raise ValueError(
            f"--image-column and --label-column are for parquet files and Hub data sets; {location} is neither"
        )


def _tables_near(folder: Path) -> list[Path]:
    """Tars and parquet files of a folder and of its subfolders; empty for a folder of images.

    Raises:
        ValueError: if there are such files beside images.
    """
    endings = (*TAR_ENDINGS, ".parquet")
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(endings) and path.is_file())
    if not has_images(str(folder)):
        return files + sorted(path for path in folder.glob("*/*") if path.name.lower().endswith(endings))
    if files:
        raise ValueError(f"{folder} holds images and {files[0].name}; name the files, as in {files[0]}")
    return []


def _of_one_split(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files of the split to score, told by their names, and a note if others are left out.

    Raises:
        ValueError: if some names tell a split and others none.
    """
    root = os.path.commonpath([file.parent for file in files])
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in files:
        split = split_of(os.path.relpath(file, root))
        (unnamed if split is None else splits.setdefault(split, [])).append(file)
    if unnamed and splits:
        raise ValueError(
            f"which split is {unnamed[0]} of? Others beside it are of {' and '.join(splits)}; "
            f"name the files to score, as in {unnamed[0]}"
        )
    return (unnamed, []) if unnamed else _to_score(splits)


def _to_score(splits: Mapping[str, list[Path]]) -> tuple[list[Path], list[str]]:
    """What the recipes take of a source that is named for validation, and a note on what that leaves out."""
    chosen = next(split for split in SPLITS if split in splits)
    others = [split for split in SPLITS if split in splits and split != chosen]
    if others:
        return splits[chosen], [f"only the split {chosen} is scored, {' and '.join(others)} left out"]
    return splits[chosen], ["the split train is scored, as there is no other"] if chosen == "train" else []


def _open_folder(location: str, folder: Path, reading: Reading) -> Listing:
    """A class for each folder at the top, whatever lies below it; images alone are of the class named by theirs."""
    root, notes = _folder_to_score(folder)
    loose = natural_order(images_in(str(root)))
    classes = class_folders(str(root))
    if loose and any(classes.values()):
        raise ValueError(f"{location} holds {printable(loose[0])} beside class folders; each image needs a class")
    own = os.path.basename(os.path.abspath(root))
    if loose:
        classes = {own: loose}
    places = [place for inside in classes.values() for place in inside]
    below = os.path.join(root, "")
    files = [f"{own}/{place.removeprefix(below)}".replace(os.sep, "/") for place in places]
    labels = np.repeat(np.arange(len(classes)), [len(inside) for inside in classes.values()])
    others = (file.removeprefix(below) for file in files_below(str(root)) if not is_image(file))
    sizes = np.array([size_of(place) for place in places])
    notes = [*notes, *_left_out(file for file in others if loose or os.sep in file)]
    read = FromDisk(places)
    return Listing(location, files, labels, tuple(classes), "folders", read, sizes, reading, tuple(notes))


def _folder_to_score(folder: Path) -> tuple[Path, list[str]]:
    """The folder of the split to score and a note; the folder itself where what is inside are classes.

    A split holds class folders; a folder that is called like a split but has images directly inside is a class.

    Raises:
        ValueError: if several folders are of the split to score.
    """
    splits: dict[str, list[Path]] = {}
    if any(entry.name.lower() in SPLIT_OF_WORD for entry in os.scandir(folder)):
        for path in map(Path, subfolders(str(folder))):
            if has_images(str(path)):
                is_class = any(images_in(str(path)))
                splits.setdefault("" if is_class else SPLIT_OF_WORD.get(path.name.lower(), ""), []).append(path)
    if not splits or "" in splits:
        return folder, []
    chosen, notes = _to_score(splits)
    if len(chosen) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in chosen)}; name the one to score")
    return chosen[0], notes


def _left_out(files: Iterable[str]) -> list[str]:
    """A note on files that are no images, which names the first of them."""
    names = sorted(map(printable, files))
    more = ", ..." if len(names) > NAMED else ""
    return [f"files left out as no images ({len(names)}): {', '.join(names[:NAMED])}{more}"] if names else []


def _open_tars(location: str, shards: Shards, reading: Reading) -> Listing:
    """WebDataset shards, or tars of a tree."""
    if are_shards(shards, reading):
        without = (file for members in shards.values() for file in _without_image(members))
        return replace(open_shards(location, shards, reading), notes=tuple(_left_out(without)))
    tree = joined(location, shards)
    files = natural_order(filter(is_image, tree))
    places = [tree[file] for file in files]
    class_names, labels = indexed(_top_folders(location, files))
    sizes = np.array([place.size for place in places])
    notes = tuple(_left_out(file for file in tree if "/" in file and not is_image(file)))
    return Listing(location, files, labels, class_names, "folders", FromTar(places), sizes, reading, notes)


def _without_image(members: Iterable[str]) -> Iterator[str]:
    """Files of a shard whose key has no image."""
    keys = {split_key(file)[0] for file in members if is_image(file)}
    return (file for file in members if split_key(file)[0] not in keys)


def _top_folders(location: str, files: Sequence[str]) -> list[str]:
    """The class of each image of a tree in tars: the folder at the top, below what all images have in common.

    Raises:
        ValueError: if there are images without a folder, or folders of splits.
    """
    root = posixpath.commonpath([posixpath.dirname(file) for file in files]) if files else ""
    paths = [file.removeprefix(root).strip("/").split("/") for file in files]
    if root and all(len(path) == 1 for path in paths):
        return [posixpath.basename(root)] * len(files)
    if loose := [file for file, path in zip(files, paths, strict=True) if len(path) == 1]:
        raise ValueError(
            f"{location} holds {printable(loose[0])} outside of any class folder; each image needs a class"
        )
    tops = {path[0] for path in paths}
    if tops <= SPLIT_OF_WORD.keys() and all(len(path) > 2 for path in paths):
        raise ValueError(
            f"{location} holds the splits {', '.join(sorted(tops))}; unpack it and name the folder of one"
        )
    return [path[0] for path in paths]
