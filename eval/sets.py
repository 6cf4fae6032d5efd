"""The test sets: how many pictures and classes each has, what its labels mean, and what cannot be scored."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from timm.data import ImageNetInfo

from arm_zoo.images.columns import Choices
from arm_zoo.images.listing import class_name, listed
from eval.listing import Listing
from eval.metrics import imagenet_wnids, real_labels, subset_indices
from eval.own import AS_USUAL, open_own
from eval.sources import open_source

WNID = re.compile(r"n\d{8}")
VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")
REAL = "real"
REAL_PICTURES = 46_837  # of 50,000; the others have no ReaL label
CUSTOM = "custom"


@dataclass(frozen=True)
class ImageSet:
    """What is canonical about a set.

    Attributes:
        pictures, classes: their numbers; None where any number is right.
        folders: below what is given, where the release keeps the class folders.
        by_number: class folders are called 0 ... 999, not by wnid.
        subset: name of its 200 classes in `eval.metrics.subset_indices`, None for all 1000.
    """

    pictures: int | None
    classes: int | None
    folders: tuple[str, ...] = ()
    by_number: bool = False
    subset: str | None = None


def _v2(name: str) -> ImageSet:
    return ImageSet(10_000, 1000, (f"imagenetv2-{name}-format-val",), by_number=True)


SETS = {
    "in1k": ImageSet(50_000, 1000, ("val",)),
    "v2": _v2("matched-frequency"),
    "v2-threshold0.7": _v2("threshold0.7"),
    "v2-top-images": _v2("top-images"),
    "a": ImageSet(7_500, 200, ("imagenet-a",), subset="a"),
    "r": ImageSet(30_000, 200, ("imagenet-r",), subset="r"),
    "sketch": ImageSet(50_889, 1000, ("sketch",)),
    CUSTOM: ImageSet(None, None),
}
SORT_VAL = (
    "put ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into one folder and let torchvision sort them into "
    "FOLDER/val: python -c \"import torchvision; torchvision.datasets.ImageNet('FOLDER', split='val')\"; then --sets "
    "in1k=FOLDER"
)


@dataclass(frozen=True)
class LabelledSet:
    """A set ready to be scored: its pictures, (N,) class indices of the model, and what is not canonical about it."""

    name: str
    listing: Listing
    targets: np.ndarray
    marks: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(np.unique(self.targets))

    def fingerprint(self) -> str:
        """Tells sets with other files, sizes of files, labels, places in the listing or another reading apart."""
        facts = zip(self.listing.files, self.targets, self.listing.sizes, strict=True)
        lines = ["\t".join(map(str, picture)) for picture in facts]
        text = "\n".join([*filter(None, [self.listing.reading]), *lines])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()  # names need not be UTF-8


def open_set(name: str, locations: Sequence[str], choices: Choices = AS_USUAL) -> Listing:
    """The pictures of a set, labels as they are there.

    Args:
        name: of the set.
        locations: see `eval.sources.open_source`.
        choices: for a custom set, see `eval.own.open_own`.

    Raises:
        ValueError: where there are no pictures, or labels that no model can be right about.
    """
    try:
        listing = open_own(locations, choices) if name == CUSTOM else open_source(locations, SETS[name].folders)
        _refuse_another_release(name, listing)
        names = listing.class_names
        _refuse_labels(listing, None if names is None else len(names), "the source's own class names")
    except ValueError as error:
        raise ValueError(f"--sets {name}: {error}") from error
    return listing


def _refuse_another_release(name: str, listing: Listing) -> None:
    """The releases of ImageNetV2, for one, have the same classes and numbers of pictures."""
    for other, spec in SETS.items():
        for folder in spec.folders if name not in (CUSTOM, other) else ():
            if folder.startswith("imagenet") and any(f"/{folder}/" in f"/{file}" for file in listing.files):
                raise ValueError(
                    f"{listing.location} has pictures of {folder}; that is the set {other}={listing.location}"
                )


def _refuse_labels(listing: Listing, classes: int | None, what: str) -> None:
    """Labels below 0, or beyond the classes where their number is known, are named with the numbers of images.

    They must not get any further: as an index of Python's, -1 is the last class.
    """
    outside = listing.labels < 0
    if classes is not None:
        outside |= listing.labels >= classes
    if not outside.any():
        return
    values, counts = np.unique(listing.labels[outside], return_counts=True)
    shown = [f"{value} ({count})" for value, count in zip(values.tolist(), counts.tolist(), strict=True)]
    allowed = "0 or more" if classes is None else f"0 ... {classes - 1}, {what}"
    hidden = "; -1 says that a label is hidden, as in test splits on the Hub" if -1 in values else ""
    raise ValueError(
        f"{outside.sum()} of {len(listing)} images have labels that cannot be right: {listed(shown)}; "
        f"allowed: {allowed}{hidden}"
    )


def label(name: str, listing: Listing, label_names: Sequence[str] = (), num_classes: int = 1000) -> LabelledSet:
    """Class indices for the pictures of a set.

    Args:
        name: of the set.
        listing: its pictures.
        label_names: the model's names of its classes; used for a custom set only.
        num_classes: of the model; used for a custom set only.

    Raises:
        ValueError: where labels are outside the set's label space, or could mean two things.
    """
    spec = SETS[name]
    try:
        if name == CUSTOM:
            targets = _custom_targets(listing, label_names, num_classes)
        elif listing.class_names is None:
            _refuse_labels(listing, 1000, "the classes of ImageNet-1k")
            targets = _targets_of_numbers(name, listing.labels)
        else:
            targets = _targets_of_names(name, listing)
    except ValueError as error:
        raise ValueError(f"--sets {name}={listing.location}: {error}") from error
    marks = _without_images(targets, label_names, num_classes) if name == CUSTOM else _miscounted(spec, targets)
    return LabelledSet(name, listing, targets, (*marks, *listing.notes))


def _miscounted(spec: ImageSet, targets: np.ndarray) -> list[str]:
    counts = (("pictures", len(targets), spec.pictures), ("classes", len(np.unique(targets)), spec.classes))
    return [f"{found} {what} instead of {right}" for what, found, right in counts if right not in (None, found)]


def _without_images(targets: np.ndarray, label_names: Sequence[str], num_classes: int) -> list[str]:
    """Of a custom set: which of the model's classes it lacks, so that the score is of the others only."""
    lacking = np.setdiff1d(np.arange(num_classes), targets).tolist()
    names = [label_names[i] if label_names else i for i in lacking]
    return [f"{len(lacking)} of the model's {num_classes} classes have no images: {_some(names)}"] if lacking else []


def _space(spec: ImageSet) -> tuple[int, ...]:
    return tuple(range(1000)) if spec.subset is None else subset_indices(spec.subset)


def _some(names: Sequence[object], most: int = 5) -> str:
    return listed(list(map(repr, names)), most)


def _targets_of_names(name: str, listing: Listing) -> np.ndarray:
    """Folders or ClassLabel names -> class indices."""
    spec = SETS[name]
    names = listing.class_names or ()
    used = sorted({names[i] for i in np.unique(listing.labels)})
    is_tree = listing.named_by == "folders"
    described = not any(WNID.fullmatch(n) or n.isdecimal() for n in names)
    if listing.named_by == "declaration" and len(names) == 1000 and described:
        return listing.labels  # descriptions of all the classes: their positions are the indices
    if is_tree:
        _refuse_flat(spec, listing, used)
    by_number = spec.by_number or (not is_tree and all(n.isdecimal() for n in used))
    if by_number:
        wrong = [n for n in used if not (n.isdecimal() and n == str(int(n)) and int(n) < 1000)]
        if wrong:
            raise ValueError(
                f"classes must be called 0 ... 999, as in the release of ImageNet-V2; found {_some(wrong)}"
            )
        index = {n: int(n) for n in used}
        numbers = np.array([index.get(n, -1) for n in names])[listing.labels]
        return numbers if is_tree or spec.subset is None else _targets_of_numbers(name, numbers)
    wnids = imagenet_wnids()
    index = {wnids[i]: i for i in _space(spec)}
    wrong = [n for n in used if n not in index]
    if wrong:
        what = "the 1000 wnids of ImageNet-1k" if spec.subset is None else f"the 200 wnids of ImageNet-{name.upper()}"
        raise ValueError(
            f"{len(wrong)} of {len(used)} classes are not among {what}: {_some(wrong)}; "
            "each class needs a folder or label named by its wnid, such as n01440764"
        )
    return np.array([index.get(n, -1) for n in names])[listing.labels]


def _refuse_flat(spec: ImageSet, listing: Listing, used: Sequence[str]) -> None:
    if len(used) != 1 or WNID.fullmatch(used[0]) or (spec.by_number and used[0].isdecimal()):
        return
    how = SORT_VAL if VAL_FILE.search(listing.files[0]) else "each class needs a folder of its own"
    raise ValueError(f"all {len(listing)} pictures lie flat in one folder, so their classes are unknown; {how}")


def _targets_of_numbers(name: str, numbers: np.ndarray) -> np.ndarray:
    """Bare numbers -> class indices: those of the 1000, or positions among the set's 200 where that is certain."""
    subset = SETS[name].subset
    used = np.unique(numbers)
    if subset is None:
        return numbers
    indices = np.array(subset_indices(subset))
    foreign = [int(n) for n in used if n not in indices]
    if used[-1] < 200 and (len(used) == 200 or foreign):
        return indices[numbers]
    if foreign:
        raise ValueError(f"labels {_some(foreign)} are not among the 200 class indices of ImageNet-{name.upper()}")
    if used[-1] < 200:
        raise ValueError(
            f"the labels {_some([int(n) for n in used])} could be class indices 0 ... 999 or positions 0 ... 199; "
            "name the classes by wnid, as class folders or as names of a ClassLabel"
        )
    return numbers


def _custom_targets(listing: Listing, label_names: Sequence[str], num_classes: int) -> np.ndarray:
    """By name where both have names, else by position; numbers count as names where the model has only such names."""
    names = listing.class_names
    if names is None and not (label_names and all(re.fullmatch("0|[1-9][0-9]*", name) for name in label_names)):
        _refuse_labels(listing, num_classes, "the model's classes")
        return listing.labels
    if names is not None and not label_names:
        if len(names) != num_classes:
            raise ValueError(
                f"the set has {len(names)} classes and the model {num_classes} without names: which is which is "
                "unknown; give the weights as a folder whose config.json has label_names"
            )
        return listing.labels
    values, places = np.unique(listing.labels, return_inverse=True)
    used = [str(value) if names is None else names[value] for value in values]
    indices = _indices_of_names(used, np.bincount(places).tolist(), label_names)
    return np.array(indices, dtype=np.int64)[places]


def _indices_of_names(used: Sequence[str], counts: Sequence[int], label_names: Sequence[str]) -> list[int]:
    """The index of each name among the model's.

    Args:
        used: names of the classes that images are of.
        counts: images of each.
        label_names: the model's.

    Raises:
        ValueError: for names that the model does not have, or has for two classes.
    """
    indices: dict[str, list[int]] = {}
    for i, name in enumerate(label_names):
        indices.setdefault(class_name(name), []).append(i)
    found = [indices.get(class_name(name), []) for name in used]
    if unknown := [name for name, places in zip(used, found, strict=True) if not places]:
        images = sum(count for count, places in zip(counts, found, strict=True) if not places)
        raise ValueError(
            f"the model has no classes {_some(unknown)}, which {images} of {sum(counts)} images are of; it has "
            f"{_some(list(label_names))}"
        )
    for name, places in zip(used, found, strict=True):
        if len(places) > 1:
            raise ValueError(
                f"the model's classes {' and '.join(map(str, places))} are all called {name!r}, so which is meant is "
                "unknown; label these images by number (a column of whole numbers, or .cls files in a tar), or give "
                "the classes different label_names in the config.json of the weights"
            )
    return [places[0] for places in found]


def real_label_sets(labelled: LabelledSet) -> list[tuple[int, ...]]:
    """The ReaL labels of in1k's pictures, by file name.

    Raises:
        ValueError: if any picture has not the name of a validation picture, ILSVRC2012_val_00000001 ... 00050000.
    """
    found = [VAL_FILE.search(file.rpartition("/")[2]) for file in labelled.listing.files]
    numbers = [int(match[1]) if match else 0 for match in found]
    wrong = [labelled.listing.describe(i) for i, n in enumerate(numbers) if not 1 <= n <= 50_000]
    if wrong:
        raise ValueError(
            "--sets real: ReaL's labels belong to file names ILSVRC2012_val_00000001 ... ILSVRC2012_val_00050000, and "
            f"{len(wrong)} of {len(found)} pictures of in1k={labelled.listing.location} have none: {_some(wrong, 3)}; "
            "give in1k with its original file names, or leave real out"
        )
    return [real_labels()[n - 1] for n in numbers]


def _three(listing: Listing) -> Sequence[int]:
    """Indices across the listing."""
    return [int(i) for i in np.linspace(0, len(listing) - 1, min(3, len(listing)))]


def real_mapping(labelled: LabelledSet) -> list[str]:
    """As `mapping`, by ReaL's labels of in1k's pictures."""
    info, label_sets = ImageNetInfo(), real_label_sets(labelled)
    lines = []
    for i in _three(labelled.listing):
        right = [f"class {c} {info.index_to_description(c)}" for c in label_sets[i]]
        lines.append(f"{REAL}: {labelled.listing.describe(i)} -> {' or '.join(right) or 'no label, not in n'}")
    return lines


def mapping(labelled: LabelledSet) -> list[str]:
    """Lines that show, for three pictures across an ImageNet set, which class index their label became."""
    listing = labelled.listing
    info = ImageNetInfo()
    lines = []
    for i in _three(listing):
        own = listing.labels[i] if listing.class_names is None else listing.class_names[listing.labels[i]]
        target = int(labelled.targets[i])
        meaning = f"class {target} {info.index_to_description(target)}"
        lines.append(f"{labelled.name}: {listing.describe(i)}: label {own} -> {meaning}")
    return lines
