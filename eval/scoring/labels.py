"""What the labels of a set mean: from a source's names or numbers of classes to class indices of the model."""

import hashlib
import json
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import timm.data
from timm.data import ImageNetInfo

from arm_zoo.images.columns import Choices
from arm_zoo.images.listing import class_name
from arm_zoo.messages import listed
from eval import tables
from eval.scoring.custom import AS_USUAL, open_own
from eval.scoring.listing import Listing
from eval.scoring.metrics import NO_CLASS
from eval.scoring.sets import CUSTOM, REAL, SETS, ImageSet
from eval.scoring.sources import open_source

CLASSES = Path(__file__).parent / "classes"
WNID = re.compile(r"n\d{8}")
VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")
SORT_VAL = (
    'put ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into one FOLDER, sort them: python -c "import '
    "torchvision; torchvision.datasets.ImageNet('FOLDER', split='val')\"; then --sets in1k=FOLDER"
)


def _list(file: str) -> str:
    if (own := CLASSES / file).exists():
        return own.read_text(encoding="utf-8")
    return (pkgutil.get_data(timm.data.__name__, f"_info/{file}") or b"").decode()


@cache
def class_list(name: str) -> Mapping[str, tuple[int, ...]]:
    """The name of each class in a set's release -> the indices of the classes of ImageNet-1k that it stands for.

    ObjectNet's are those of mappings/objectnet_to_imagenet_1k.json in its release 1.0.
    """
    file = SETS[name].class_list
    wnids = ImageNetInfo().label_names()
    if file == "numbers":
        return {str(i): (i,) for i in range(len(wnids))}
    if file.endswith(".csv"):
        rows = tables.read(CLASSES / file, ("class", "wnids"))
        groups = {row["class"]: tuple(map(wnids.index, row["wnids"].split())) for row in rows}
        if len({indices[0] for indices in groups.values()}) < len(set(groups.values())):  # the first one names a class
            raise ValueError(f"classes/{file}: classes that differ have the same first wnid; put another one first")
        return groups
    indices = map(int, _list(file).split()) if file else range(len(wnids))
    return {wnids[i]: (i,) for i in indices}


def candidates(name: str) -> Sequence[int] | None:
    """The class indices that images of a set are ranked among; None for all."""
    return [i for (i,) in class_list(name).values()] if SETS[name].is_subset else None


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """The right classes of ILSVRC2012_val_00000001 ... 00050000, from timm's list; 3,163 images have none."""
    return tuple(map(tuple, json.loads(_list("imagenet_real_labels.json"))))


@dataclass(frozen=True)
class LabelledSet:
    """A set ready to be scored."""

    name: str
    listing: Listing  # its N images
    right: np.ndarray  # (N, K) class indices of the model for each image's labels, filled up with NO_CLASS
    warnings: tuple[str, ...] = ()  # what is not canonical about it

    @property
    def targets(self) -> np.ndarray:
        """(N,) class indices of the model; the first if several are right."""
        return self.right[:, 0]

    @property
    def classes(self) -> np.ndarray:
        """The class indices that images have, in order."""
        return np.unique(self.right[self.right != NO_CLASS])

    def answers(self, real: bool) -> dict[str, np.ndarray]:
        """For the set's row, and for ReaL's if asked: (N, K) right classes of each image, filled up with NO_CLASS."""
        groups = {indices[0]: indices for indices in class_list(self.name).values()} if self.name != CUSTOM else {}
        groups[NO_CLASS] = ()
        label_sets: dict[str, Sequence[Sequence[int]]] = {
            self.name: [list(chain(*(groups.get(i, (i,)) for i in row))) for row in self.right.tolist()]
        }
        if real:
            label_sets[REAL] = real_label_sets(self.listing)
        answers = {}
        for name, sets in label_sets.items():
            answers[name] = np.full((len(sets), max([1, *map(len, sets)])), NO_CLASS)
            for row, right in zip(answers[name], sets, strict=True):
                row[: len(right)] = right
        return answers

    def fingerprint(self) -> str:
        """A SHA-256 that changes with the files, their sizes, labels and order, and with the way they are read."""
        reading = [self.listing.reading] if self.listing.reading else []
        targets = (" ".join(map(str, row)) for row in self.right.tolist())
        facts = zip(self.listing.files, targets, self.listing.sizes, strict=True)
        text = "\n".join([*reading, *("\t".join(map(str, image)) for image in facts)])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()  # names need not be UTF-8


def open_set(name: str, locations: Sequence[str], choices: Choices = AS_USUAL) -> Listing:
    """The images of a set with the labels of the source; see `open_source` and, for custom sets, `open_own`.

    Of a set with class names of its own, images of unlisted classes are left out, unless no class is listed: then all
    images stay, and `label` refuses them.
    """
    spec = SETS[name]
    try:
        listing = open_own(locations, choices) if name == CUSTOM else open_source(locations, spec.folder)
        others = [other for other in SETS.values() if name not in (CUSTOM, other.name)]
        for other in others:  # the releases of ImageNet-V2, for one, have the same classes and numbers of images
            folder, where = other.folder, listing.location
            if folder.startswith("imagenet") and any(f"/{folder}/" in f"/{file}" for file in listing.files):
                raise ValueError(f"{where} has images of {folder}; that is the set {other.name}={where}")
    except ValueError as error:
        raise ValueError(f"--sets {name}: {error}") from error
    is_known = [spec.has_own_names and known in class_list(name) for known in listing.class_names or ()]
    places = np.flatnonzero(np.isin(listing.labels, np.flatnonzero(is_known)))
    return replace(listing.select(places) if len(places) else listing, border=spec.border)


def _refuse_labels(listing: Listing, classes: int, what: str) -> None:
    """Raise ValueError for labels outside 0 ... classes - 1; as an index, -1 would be taken for the last class."""
    outside = (listing.labels < 0) | (listing.labels >= classes)
    if not outside.any():
        return
    values, counts = np.unique(listing.labels[outside], return_counts=True)
    shown = listed([f"{value} ({count})" for value, count in zip(values, counts, strict=True)])
    hidden = "; -1 says that a label is hidden, as in test splits on the Hub" if -1 in values else ""
    wrong = f"{outside.sum()} of {len(listing)} images have labels that cannot be right: {shown}"
    raise ValueError(f"{wrong}; allowed: 0 ... {classes - 1}, {what}{hidden}")


def label(name: str, listing: Listing, label_names: Sequence[str] = (), num_classes: int = 1000) -> LabelledSet:
    """The images of a set with class indices; those of custom sets are of a model with these classes.

    Raises ValueError if the labels are unclear.
    """
    try:
        if listing.label_sets is None:
            labelled = LabelledSet(name, listing, _targets(name, listing, label_names, num_classes)[:, None])
        else:
            given = listing.label_sets != NO_CLASS
            right = np.full(given.shape, NO_CLASS)
            each = replace(listing, labels=listing.label_sets[given])
            right[given] = _targets(name, each, label_names, num_classes)
            labelled = LabelledSet(name, listing, right)
    except ValueError as error:
        raise ValueError(f"--sets {name}={listing.location}: {error}") from error
    counts = (("images", len(listing), SETS[name].images), ("classes", len(labelled.classes), SETS[name].classes))
    warnings = [f"{count} {what} instead of {known}" for what, count, known in counts if known not in (None, count)]
    lacking = np.setdiff1d(np.arange(num_classes), labelled.classes).tolist()
    if name == CUSTOM and lacking:
        names = _some([label_names[i] if label_names else i for i in lacking])
        warnings.append(f"{len(lacking)} of the model's {num_classes} classes have no images: {names}")
    return replace(labelled, warnings=(*warnings, *listing.notes))


def _targets(name: str, listing: Listing, label_names: Sequence[str], num_classes: int) -> np.ndarray:
    """The class indices of the model for the labels of a listing."""
    if name == CUSTOM:
        return _custom_targets(listing, label_names, num_classes)
    if listing.class_names is None:
        _refuse_labels(listing, 1000, "the classes of ImageNet-1k")
        return _targets_of_numbers(SETS[name], listing.labels)
    return _targets_of_names(SETS[name], listing, listing.class_names)


def _some(names: Sequence[object], most: int = 5) -> str:
    return listed(list(map(repr, names)), most)


def _targets_of_names(spec: ImageSet, listing: Listing, names: Sequence[str]) -> np.ndarray:
    """From names of folders or of a ClassLabel to class indices."""
    used = sorted({names[i] for i in np.unique(listing.labels)})
    allowed = class_list(spec.name)
    coded = any(WNID.fullmatch(name) or name.isdecimal() for name in names)
    if listing.named_by == "declaration" and len(names) == 1000 and not coded:
        return listing.labels  # descriptions of all 1000 classes, in the order of the indices
    is_tree = listing.named_by == "folders"
    if is_tree and len(used) == 1 and used[0] not in allowed and not WNID.fullmatch(used[0]):
        how = SORT_VAL if VAL_FILE.search(listing.files[0]) else "each class needs a folder of its own"
        raise ValueError(f"all {len(listing)} images lie flat in one folder, so their classes are unknown; {how}")
    numbered = not is_tree and not spec.has_own_names and all(name.isdecimal() for name in used)
    if numbered:
        allowed = {str(i): (i,) for i in range(1000)}
    if wrong := [name for name in used if name not in allowed]:
        what = f"classes are not among the {len(allowed)} classes of {spec.card_name}: {_some(wrong)}"
        needed = f"each class needs a folder or label named as in the release: {_some(list(allowed), 2)}"
        raise ValueError(f"{len(wrong)} of {len(used)} {what}; {needed}")
    targets = np.array([allowed.get(name, (NO_CLASS,))[0] for name in names])[listing.labels]
    return _targets_of_numbers(spec, targets) if numbered else targets


def _targets_of_numbers(spec: ImageSet, numbers: np.ndarray) -> np.ndarray:
    """From bare numbers to class indices: numbers are indices, or positions in a subset if that is certain."""
    if spec.has_own_names:
        raise ValueError(f"numbers do not tell the classes of {spec.card_name}; name them as the release does")
    if not spec.is_subset:
        return numbers
    used, indices = np.unique(numbers), np.array(candidates(spec.name))
    foreign = np.setdiff1d(used, indices).tolist()
    if used[-1] >= len(indices) and foreign:
        raise ValueError(f"labels {_some(foreign)} are not among the {len(indices)} class indices of {spec.card_name}")
    if used[-1] >= len(indices):
        return numbers
    if len(used) < len(indices) and not foreign:
        either = f"{_some(used.tolist())} could be class indices 0 ... 999 or positions 0 ... {len(indices) - 1}"
        raise ValueError(f"labels {either}; name the classes by wnid, as class folders or as names of a ClassLabel")
    return indices[numbers]


def _custom_targets(listing: Listing, label_names: Sequence[str], num_classes: int) -> np.ndarray:
    """Match classes by name if both sides have names, else by position; numbers are names if all the model's are."""
    names = listing.class_names
    if names is None and not (label_names and all(re.fullmatch("0|[1-9][0-9]*", name) for name in label_names)):
        _refuse_labels(listing, num_classes, "the model's classes")
        return listing.labels
    if names is not None and not label_names:
        if len(names) != num_classes:
            unknown = f"the set has {len(names)} classes and the model {num_classes} without names: which is which is"
            raise ValueError(f"{unknown} unknown; give the weights as a folder whose config.json has label_names")
        return listing.labels
    indices: dict[str, list[int]] = {}
    for i, name in enumerate(label_names):
        indices.setdefault(class_name(name), []).append(i)
    values, places, counts = np.unique(listing.labels, return_inverse=True, return_counts=True)
    used = [str(value) if names is None else names[value] for value in values]
    found = [indices.get(class_name(name), []) for name in used]
    if foreign := [i for i, meant in enumerate(found) if not meant]:
        what = f"{_some([used[i] for i in foreign])}, which {counts[foreign].sum()} of {len(listing)} images are of"
        raise ValueError(f"the model has no classes {what}; it has {_some(label_names)}")
    for name, meant in zip(used, found, strict=True):
        if len(meant) > 1:
            raise ValueError(
                f"the model's classes {' and '.join(map(str, meant))} are all called {name!r}, so which is meant is "
                "unknown; label these images by number (a column of whole numbers, or .cls files in a tar), or give "
                "the classes different label_names in the config.json of the weights"
            )
    return np.array([meant[0] for meant in found], dtype=np.int64)[places]


def real_label_sets(listing: Listing) -> list[tuple[int, ...]]:
    """The ReaL labels of in1k's images, by file name; raises `ValueError` where one has no such name."""
    found = [VAL_FILE.search(file.rpartition("/")[2]) for file in listing.files]
    numbers = [int(match[1]) if match else 0 for match in found]
    if wrong := [listing.describe(i) for i, n in enumerate(numbers) if not 1 <= n <= 50_000]:
        raise ValueError(
            "--sets real: ReaL's labels belong to file names ILSVRC2012_val_00000001 ... ILSVRC2012_val_00050000, and "
            f"{len(wrong)} of {len(found)} images of in1k={listing.location} have none: {_some(wrong, 3)}; "
            "give in1k with its original file names, or leave real out"
        )
    return [real_labels()[n - 1] for n in numbers]


def mapping(labelled: LabelledSet, real: bool) -> list[str]:
    """Lines that show the right classes of three images from an ImageNet set."""
    listing, info, lines = labelled.listing, ImageNetInfo(), []
    for name, answers in labelled.answers(real).items():
        for i in map(int, np.linspace(0, len(listing) - 1, min(3, len(listing)))):
            names = listing.class_names
            own = " or ".join(str(each) if names is None else names[each] for each in listing.labels_of(i))
            said = "" if name == REAL else f"label {own} "
            right = [f"class {c} {info.index_to_description(c)}" for c in answers[i].tolist() if c != NO_CLASS]
            lines.append(f"{name}: {listing.describe(i)}: {said}-> {' or '.join(right) or 'no label, not in n'}")
    return lines
