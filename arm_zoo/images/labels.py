"""The classes of labelled images: their names, their order, and which labels are invalid."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from arm_zoo.images.columns import STRINGS
from arm_zoo.images.errors import SourceError
from arm_zoo.images.listing import class_name, natural_order
from arm_zoo.messages import listed, plural

MOST_CLASSES = 1_000_000  # of labels that are integers; larger ones are something else, such as identifiers


@dataclass(frozen=True)
class Labels:
    """The classes of one split."""

    names: tuple[str, ...]  # in index order; numbers in writing if the classes have no names
    raw: Mapping[Any, str]  # what the label column holds -> the class's name
    rows: Mapping[str, int] | None  # name -> images of the class; None for streams that do not tell in advance
    numbered: bool  # the classes have numbers, but no names

    def indices(self, names: Sequence[str]) -> Mapping[Any, int]:
        """What the column holds -> index in `names`, for the classes that are among them."""
        place = {name: index for index, name in enumerate(names)}
        return {raw: place[name] for raw, name in self.raw.items() if name in place}

    def renamed(self, names: Sequence[str]) -> "Labels":
        """The same classes, which had numbers only, with as many of these names as there are."""
        new = dict(zip(self.names, [*names, *self.names[len(names) :]], strict=False))
        rows = None if self.rows is None else {new[name]: count for name, count in self.rows.items()}
        return Labels(tuple(new.values()), {raw: new[name] for raw, name in self.raw.items()}, rows, numbered=False)

    def without_images(self, names: Iterable[str]) -> list[str]:
        """Those of the classes that have no image here, as far as that is known."""
        return [] if self.rows is None else [name for name in names if not self.rows.get(name)]


def read_labels(feature: Any, values: pa.ChunkedArray | None, column: str, count: int | None, where: str) -> Labels:
    """The classes of a split, called `where`, from the declaration of its label column and from its values.

    `values` is None for a stream that tells them row by row, `count` the number of classes, if that is given.
    """
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    declared, by_name = isinstance(feature, datasets.ClassLabel), dtype in STRINGS
    if not (declared or by_name or "int" in dtype):
        allowed = "class labels, integers, strings"
        raise SourceError(f"the column {column!r} of {where} holds {feature}; allowed: {allowed}")
    if values is None and not declared and (by_name or count is None):
        allowed = "data.num_classes=N with integer labels, a column of ClassLabel, or no data.streaming"
        raise SourceError(f"the stream {where} does not tell its classes; allowed: {allowed}")
    found = None if values is None else counted(values)
    if declared:
        raw = {number: class_name(name) for number, name in enumerate(feature.names)}
        first = {name: number for number, name in reversed(raw.items())}
        for number, name in raw.items():
            if first[name] != number:
                said = f"{where} has two classes that are called {name!r}, {first[name]} and {number}"
                raise SourceError(f"{said}; rename one of them")
    elif by_name:
        raw = {label: class_name(label) for label in found or () if label}
    else:
        highest: int = max((label for label in found or () if label is not None), default=-1)
        if count is None and highest >= MOST_CLASSES:
            allowed = f"whole numbers below {MOST_CLASSES:,}"
            hint = "If these are no classes, name another label column; if they are, write them as strings"
            raise SourceError(f"{where} has the label {highest}; allowed: {allowed}. {hint}")
        raw = {number: str(number) for number in range(highest + 1 if count is None else count)}
    rows = None if found is None else _rows_of_classes(found, raw, by_name, where)
    names = natural_order(set(raw.values())) if by_name else raw.values()
    if count not in (None, len(names)):
        said = f"{where} has {len(names)} classes, but data.num_classes is {count}"
        raise SourceError(f"{said}; set it to {len(names)}, or leave it out")
    return Labels(tuple(names), raw, rows, numbered=not declared and not by_name)


def counted(values: pa.ChunkedArray) -> dict[Any, int]:
    """Each value in a column -> how often it occurs."""
    return {found["values"]: found["counts"] for found in pc.value_counts(values).to_pylist()}


def _rows_of_classes(found: Mapping[Any, int], raw: Mapping[Any, str], by_name: bool, where: str) -> dict[str, int]:
    """Class -> number of its rows; SourceError, which counts them, for labels that are no class."""
    if wrong := {label: rows for label, rows in found.items() if label not in raw}:
        shown = {"none" if label is None else repr(label): plural(rows, "row") for label, rows in wrong.items()}
        values = [f"{label} in {rows}" for label, rows in shown.items()]
        allowed = "a name in each row" if by_name else f"0 to {len(raw) - 1}" if raw else "0 and above"
        hidden = {-1, None} & wrong.keys()
        hint = " (-1 or none marks hidden labels on the Hub: take another split)" if hidden else ""
        raise SourceError(
            f"{sum(wrong.values())} of the {sum(found.values())} labels of {where} are none of its classes: "
            f"{listed(values)}; allowed: {allowed}{hint}"
        )
    rows = dict.fromkeys((raw[label] for label in found), 0)
    for label, number in found.items():
        rows[raw[label]] += number
    return rows
