"""Holding out a fraction of the training images for validation, by a rule that gives the same images everywhere."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence

from arm_zoo.images.errors import SourceError
from arm_zoo.images.listing import images_below, subfolders
from arm_zoo.images.locate import Located
from arm_zoo.messages import listed

FRACTION = 0.2  # if labels are needed, the source has no validation split, and the configuration does not name one


def validation_fraction(asked: float | str | None, has_own: bool, labels_needed: bool) -> float | None:
    """The fraction to hold out, given by `data.validation` or needed to score; None if nothing is held out."""
    if isinstance(asked, float):
        return asked
    return FRACTION if asked is None and labels_needed and not has_own else None


def held_out(images: int, fraction: float) -> int:
    """How many images of a class are held out: at least one of two or more, and never all."""
    return 0 if images < 2 else min(max(int(fraction * images + 0.5), 1), images - 1)


def classes_without_images(name: str, classes: Sequence[str]) -> SourceError:
    return SourceError(f"class folders of {name} hold no image: {listed(classes)}; fill or remove them")


def none_to_hold_out(name: str) -> SourceError:
    problem = f"no images of {name} can be held out for validation, as no class has two"
    return SourceError(f"{problem}; add images, or name others with data.validation=SOURCE")


def split_rows(classes: Sequence[Hashable], names: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """The rows to train on and the rows held out, both in stored order.

    In each class, the images whose file names have the smallest hashes are held out. So the split depends on the file
    names alone, not on the run's seed, the machine or the folder's place, and adding images moves few others. Among
    equal file names in a class, the first rows are held out.
    """
    by_class: dict[Hashable, list[int]] = defaultdict(list)
    for row, label in enumerate(classes):
        by_class[label].append(row)
    validation: set[int] = set()
    for rows in by_class.values():
        hashes = {row: hashlib.blake2b(os.fsencode(os.path.basename(names[row]))).digest() for row in rows}
        validation.update(sorted(rows, key=lambda row: (hashes[row], row))[: held_out(len(rows), fraction)])
    return [row for row in range(len(classes)) if row not in validation], sorted(validation)


def fewer_training_images(located: Located, needed: int, fraction: float | None, labels_needed: bool) -> int | None:
    """The number of training images in a folder if that is below `needed`; None otherwise, and for other sources."""
    if located.kind != "images" or "train" not in located.splits:
        return None
    [folder] = located.splits["train"]
    total = 0
    for place in subfolders(folder) if labels_needed else [folder]:
        images = sum(1 for _ in images_below(place))
        total += images - (held_out(images, fraction) if fraction else 0)
        if total >= needed:
            return None
    return total


def too_large_a_batch(global_batch: int, images: int) -> str:
    """The problem of a step that takes more images than there are."""
    return f"global_batch is {global_batch}; allowed: up to the {images} training images"
