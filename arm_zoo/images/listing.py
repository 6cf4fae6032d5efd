"""Which files of a folder are images, what their classes are, and an order that is the same on every machine."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import filterfalse
from pathlib import Path

from arm_zoo.images.errors import SourceError
from arm_zoo.messages import listed, printable

# Each also needs a decoder: what decode_image of images/decode.py opens.
IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2",
)  # fmt: skip


def is_image(path: str) -> bool:
    """Whether a file's name is that of an image; hidden files are none."""
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted as by timm's `natural_key` (2 before 10, case ignored), names that tie there (A, a; 1, 01) by themselves.

    Without the tie-break the order would be that of the disk, another one on each machine.
    """

    def key(name: str) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", name.lower())  # digits in every second place
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], name

    return sorted(names, key=key)


def class_name(name: str) -> str:
    """The name of a class in Unicode's composed form (NFC): macOS may decompose the names of files."""
    return unicodedata.normalize("NFC", name)


def entries_of(folder: str) -> Iterator[os.DirEntry[str]]:
    """The visible entries of a folder, in no order; raises `SourceError` if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        said = f"cannot list the folder {printable(folder)!r}: {error.strerror}"
        raise SourceError(f"{said}; allow yourself to read it, or move it elsewhere") from error


def subfolders(folder: str) -> list[str]:
    """Paths of the visible folders inside, in natural order; links to a folder that they lie in are left out."""
    names = [entry.name for entry in entries_of(folder) if _is_folder(entry)]
    return [path for name in natural_order(names) if not _leads_back(path := os.path.join(folder, name))]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a regular file or a link to one; broken links count too, as reading them gives a clear error.

    Pipes and devices do not count: reading them may never end. Only links cost a look at the disk.
    """
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _leads_back(path: str) -> bool:
    """Whether a folder is a link to one of its own ancestors, which would list the same images without end."""
    return os.path.islink(path) and any(os.path.samefile(path, above) for above in Path(os.path.abspath(path)).parents)


def images_in(folder: str) -> Iterator[str]:
    """Paths of the images directly in a folder, in no order."""
    return (entry.path for entry in entries_of(folder) if is_image(entry.name) and _is_file(entry))


def files_below(folder: str) -> Iterator[str]:
    """Paths of all visible files in a folder and below it, in no order, without hidden folders and links upwards."""
    folders = [folder]
    while folders:
        for entry in entries_of(folders.pop()):
            if _is_file(entry):
                yield entry.path
            elif _is_folder(entry) and not _leads_back(entry.path):
                folders.append(entry.path)


def images_below(folder: str) -> Iterator[str]:
    """Paths of all images in a folder and below it, in no order; hidden folders are left out."""
    return filter(is_image, files_below(folder))


def contents(folder: str) -> tuple[list[str], list[str]]:
    """Paths of the visible files in a folder and below it: the images, in natural order, and those that are none."""
    files = list(files_below(folder))
    return natural_order(filter(is_image, files)), list(filterfalse(is_image, files))


def class_folders(folder: str) -> tuple[dict[str, list[str]], list[str]]:
    """The images of each class, both in natural order, and the visible files beside them that are none, by path.

    Every subfolder is a class, even one without images, whatever lies below it; `class_name` normalises its name.
    """
    images: dict[str, list[str]] = {}
    others: list[str] = []
    for path in subfolders(folder):
        name = class_name(os.path.basename(path))
        if name in images:
            raise SourceError(f"{folder!r} holds two class folders whose names are both written {name!r}; rename one")
        if printable(name) != name:
            raise SourceError(f"the name of the class folder {os.fsencode(path)!r} is not UTF-8; rename the folder")
        images[name], beside = contents(path)
        others.extend(beside)
    return images, others


def left_out(files: Iterable[str]) -> str:
    """A note on files that are no images, which names the first of them; "" if there are none."""
    names = sorted(map(printable, files))
    return f"files left out as no images ({len(names)}): {listed(names, 3)}" if names else ""
