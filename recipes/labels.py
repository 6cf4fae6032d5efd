"""Which columns of a data set hold picture and class, and what the classes are."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from arm_zoo.images.columns import LABEL_NAMES, holds_images, leaves
from arm_zoo.images.listing import class_name, listed, natural_order

from .config import DataConfig
from .locate import SourceError

STRINGS = ("string", "large_string")
MOST_CLASSES = 1_000_000  # of labels that are integers; larger ones are something else, such as identifiers


class Columns(NamedTuple):
    """The columns of picture, class and name; a dot leads into a column of mappings, as in ``json.label``."""

    image: str
    label: str | None
    name: str | None = None


@dataclass(frozen=True)
class Labels:
    """The classes of one split.

    Args:
        names: In index order; numbers in writing if the classes have no names.
        raw: What the label column holds -> the class's name.
        rows: Name -> how many pictures are of the class; None for streams that do not tell before they are read.
        numbered: The classes have numbers, but no names.
    """

    names: tuple[str, ...]
    raw: Mapping[Any, str]
    rows: Mapping[str, int] | None
    numbered: bool

    def indices(self, names: Sequence[str]) -> Mapping[Any, int]:
        """What the column holds -> index in ``names``, for the classes that are among them."""
        place = {name: index for index, name in enumerate(names)}
        return {raw: place[name] for raw, name in self.raw.items() if name in place}

    def renamed(self, names: Sequence[str]) -> "Labels":
        """Numbered classes with these names, as far as they go."""
        new = dict(zip(self.names, [*names, *self.names[len(names) :]], strict=False))
        rows = None if self.rows is None else {new[name]: count for name, count in self.rows.items()}
        return Labels(tuple(new.values()), {raw: new[name] for raw, name in self.raw.items()}, rows, numbered=False)

    def without_pictures(self, names: Iterable[str]) -> list[str]:
        """Those of the classes that have no picture here, as far as that is known."""
        return [] if self.rows is None else [name for name in names if not self.rows.get(name)]


def find_columns(features: Mapping[str, Any] | None, config: DataConfig, where: str, labels_needed: bool) -> Columns:
    """The columns that the configuration names, or the only ones that can be meant.

    Raises:
        SourceError: If a column is missing or several could be meant.
    """
    if features is None:
        raise SourceError(f"{where} does not tell its columns; leave out data.streaming")
    pictures = [name for name, feature in features.items() if holds_images(feature)]
    image = choose("image_column", config.image_column, pictures, list(features), where)
    if not (holds_images(features[image]) or getattr(features[image], "dtype", None) in STRINGS):
        raise SourceError(
            f"the column {image!r} of {where} holds {features[image]}; allowed: images, their bytes, or their paths"
        )
    if not labels_needed:
        return Columns(image, None)
    paths = {path: feature for path, feature in leaves(features).items() if path.partition(".")[0] != image}
    likely = [path for path, feature in paths.items() if isinstance(feature, datasets.ClassLabel)]
    likely = likely or [name for name in LABEL_NAMES if name in paths][:1]
    return Columns(image, choose("label_column", config.label_column, likely, list(paths), where))


def choose(key: str, wanted: str | None, likely: list[str], columns: list[str], where: str) -> str:
    """The column that is wanted, else the only likely one."""
    if wanted is not None:
        if wanted not in columns:
            raise SourceError(f"data.{key} is {wanted!r}; allowed: a column of {where}: {listed(columns, 20)}")
        return wanted
    if len(likely) == 1:
        return likely[0]
    problem = f"could be any of {listed(likely)}" if likely else f"is none of {listed(columns, 20)}"
    thing = key.replace("_", " ")
    raise SourceError(f"the {thing} of {where} {problem}; say which with data.{key}=NAME")


def read_labels(feature: Any, values: pa.ChunkedArray | None, column: str, config: DataConfig, where: str) -> Labels:
    """The classes of a split, from the declaration of its label column and from all that stands in it.

    Args:
        feature: The declaration.
        values: What stands in it, a value for each row; None for a stream that tells it row by row.
        column: Its name.
        config: ``data.num_classes``.
        where: The split's name.

    Raises:
        SourceError: If the column holds no classes, if labels are none of them, or if their number is not to be known
            or not ``data.num_classes``.
    """
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    count = config.num_classes
    if isinstance(feature, datasets.ClassLabel):
        found = None if values is None else counted(values)
        labels = _declared(feature.names, found, where)
    elif dtype in STRINGS:
        labels = _named(counted(_known(values, where)), where)
    elif "int" in dtype:
        found = None if values is None and count is not None else counted(_known(values, where))
        labels = _numbered(found, count, where)
    else:
        raise SourceError(
            f"the column {column!r} of {where} holds {feature}; allowed: class labels, integers, strings"
        )
    if count not in (None, len(labels.names)):
        raise SourceError(f"{where} has {len(labels.names)} classes, but data.num_classes is {count}")
    return labels


def _known(values: pa.ChunkedArray | None, where: str) -> pa.ChunkedArray:
    if values is None:
        raise SourceError(
            f"the stream {where} does not tell its classes; allowed: data.num_classes=N with integer labels, a column "
            "of ClassLabel, or no data.streaming"
        )
    return values


def counted(values: pa.ChunkedArray) -> dict[Any, int]:
    """What stands in a column -> how often."""
    counts = pc.value_counts(values)
    return dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))


def _declared(declared: Sequence[str], found: Mapping[Any, int] | None, where: str) -> Labels:
    """The classes of a ClassLabel column."""
    raw = {number: class_name(name) for number, name in enumerate(declared)}
    numbers: dict[str, int] = {}
    for number, name in raw.items():
        if numbers.setdefault(name, number) != number:
            raise SourceError(f"{where} has two classes that are called {name!r}, {numbers[name]} and {number}")
    if found is not None:
        _refuse({label: rows for label, rows in found.items() if label not in raw}, found, len(raw), where)
    return Labels(tuple(numbers), raw, _rows_of_classes(raw, found), numbered=False)


def _named(found: Mapping[Any, int], where: str) -> Labels:
    """The classes of a column of strings."""
    wrong = {label: rows for label, rows in found.items() if not label}
    _refuse(wrong, found, None, where)
    raw = {label: class_name(label) for label in found}
    return Labels(tuple(natural_order(set(raw.values()))), raw, _rows_of_classes(raw, found), numbered=False)


def _numbered(found: Mapping[Any, int] | None, count: int | None, where: str) -> Labels:
    """The classes of a column of integers: as many as ``data.num_classes``, else up to the largest one."""
    if count is None:
        count = max((label for label in found or () if label is not None), default=-1) + 1
        if count > MOST_CLASSES:
            raise SourceError(
                f"{where} has the label {count - 1}; allowed: whole numbers below {MOST_CLASSES:,}. If these are no "
                "classes, data.label_column=NAME names another column; if they are, write them as strings"
            )
    raw = {number: str(number) for number in range(count)}
    if found is not None:
        _refuse({label: rows for label, rows in found.items() if label not in raw}, found, count, where)
    return Labels(tuple(raw.values()), raw, _rows_of_classes(raw, found), numbered=True)


def _rows_of_classes(raw: Mapping[Any, str], found: Mapping[Any, int] | None) -> dict[str, int] | None:
    if found is None:
        return None
    rows: Counter[str] = Counter()
    for label, count in found.items():
        rows[raw[label]] += count
    return dict(rows)


def _refuse(wrong: Mapping[Any, int], found: Mapping[Any, int], count: int | None, where: str) -> None:
    """Refuse labels that are no class, with the number of their rows."""
    if not wrong:
        return
    values = [f"{'none' if label is None else repr(label)} in {of_rows(rows)}" for label, rows in wrong.items()]
    allowed = "a name in each row" if count is None else f"0 to {count - 1}" if count else "0 and above"
    hidden = " (-1 or none marks hidden labels on the Hub: take another split)" if {-1, None} & wrong.keys() else ""
    raise SourceError(
        f"{sum(wrong.values())} of the {sum(found.values())} labels of {where} are none of its classes: "
        f"{listed(values)}; allowed: {allowed}{hidden}"
    )


def of_rows(count: int) -> str:
    """As in ``1 row``."""
    return f"{count} row{'' if count == 1 else 's'}"


class Matched(NamedTuple):
    """The classes of two splits.

    Args:
        names: In index order.
        train: What the training split's label column holds -> class index.
        test: The same for the other split.
        without_test: Classes that have no picture in the other split, as far as that is known.
    """

    names: tuple[str, ...]
    train: Mapping[Any, int]
    test: Mapping[Any, int]
    without_test: list[str]


def match_labels(train: Labels, test: Labels, where: str) -> Matched:
    """Find the classes of a validation split among those of the training split.

    Names are compared. Numbers stand for the names in their order, unless all names are numbers themselves.

    Args:
        train: Of the training pictures.
        test: Of the other split, which may lack pictures of some classes.
        where: The other split's name.

    Raises:
        SourceError: If it has classes that the training split does not have.
    """
    if train.numbered and not (test.numbered or _all_numbers(test.names)):
        if len(test.names) != len(train.names):
            raise SourceError(
                f"{where} has {len(test.names)} classes, the training pictures have {len(train.names)} without names; "
                "allowed: as many, since names are given to numbers in their order"
            )
        train = train.renamed(test.names)
    elif test.numbered and not (train.numbered or _all_numbers(train.names)):
        test = test.renamed(train.names)
    known = set(train.names)
    unknown = [name for name in (test.names if test.rows is None else test.rows) if name not in known]
    if unknown:
        pictures = "" if test.rows is None else f", in {of_rows(sum(test.rows[name] for name in unknown))}"
        raise SourceError(
            f"{where} has {len(test.names)} classes, the training pictures have {len(train.names)} (only there: "
            f"{listed(unknown)}{pictures}); allowed: classes of the training pictures"
        )
    return Matched(
        train.names, train.indices(train.names), test.indices(train.names), test.without_pictures(train.names)
    )


def _all_numbers(names: Iterable[str]) -> bool:
    return all(re.fullmatch("0|[1-9][0-9]*", name) for name in names)
