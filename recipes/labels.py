"""Which columns of a data set hold picture and class, and what the classes are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from timm.utils import natural_key

from .config import DataConfig
from .locate import Data, SourceError

LABEL_NAMES = ("label", "labels", "cls", "class", "target", "json.label")


class Columns(NamedTuple):
    """The columns of picture and class; a dot leads into a column of mappings, as in WebDataset's ``json.label``."""

    image: str
    label: str | None


@dataclass(frozen=True)
class Labels:
    """The classes of one split.

    Args:
        names: In index order.
        raw: What the label column holds for each class, in index order.
        declared: The data set itself lists its classes; otherwise they were gathered from its rows.
        numbered: The classes have numbers, but no names.
    """

    names: tuple[str, ...]
    raw: tuple[Any, ...]
    declared: bool
    numbered: bool

    def indices(self, names: tuple[str, ...]) -> Mapping[Any, int]:
        """What the column holds -> index in ``names``."""
        if self.numbered:
            return {raw: raw for raw in self.raw}
        return {raw: names.index(name) for raw, name in zip(self.raw, self.names, strict=True)}


def find_columns(data: Data, config: DataConfig, where: str, labels_needed: bool) -> Columns:
    """The columns that the configuration names, or the only ones that can be meant.

    Raises:
        SourceError: If a column is missing or several could be meant.
    """
    features = data.features
    if features is None:
        raise SourceError(f"{where} does not tell its columns; leave out data.streaming")
    pictures = [name for name, feature in features.items() if holds_pictures(feature)]
    image = choose("image_column", config.image_column, pictures, list(features), where)
    if not labels_needed:
        return Columns(image, None)
    paths = {path: feature for path, feature in leaves(features) if path.partition(".")[0] != image}
    likely = [path for path, feature in paths.items() if isinstance(feature, datasets.ClassLabel)]
    likely = likely or [name for name in LABEL_NAMES if name in paths][:1]
    return Columns(image, choose("label_column", config.label_column, likely, list(paths), where))


def holds_pictures(feature: Any) -> bool:
    """An image column, or one of bytes, perhaps with a path, where nobody declared what it is."""
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    )


def leaves(features: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Columns, and fields of columns of mappings, with their dotted paths."""
    found = []
    for name, feature in features.items():
        inside = feature.items() if isinstance(feature, Mapping) else ()
        found += [(f"{name}.{key}", value) for key, value in inside] or [(name, feature)]
    return found


def choose(key: str, wanted: str | None, likely: list[str], columns: list[str], where: str) -> str:
    """The column that is wanted, else the only likely one."""
    if wanted is not None:
        if wanted not in columns:
            raise SourceError(f"data.{key} is {wanted!r}; allowed: a column of {where}: {', '.join(columns)}")
        return wanted
    if len(likely) == 1:
        return likely[0]
    problem = f"could be any of {', '.join(likely)}" if likely else f"is none of {', '.join(columns)}"
    thing = key.replace("_", " ")
    raise SourceError(f"the {thing} of {where} {problem}; say which with data.{key}=NAME")


def feature_at(features: Mapping[str, Any], path: str) -> Any:
    """The feature of a column or of a field in it."""
    return dict(leaves(features))[path]


def values_at(table: pa.Table, path: str) -> pa.ChunkedArray:
    """A column of an Arrow table, or a field in it."""
    if path in table.column_names:
        return table.column(path)
    name, _, key = path.partition(".")
    return pc.struct_field(table.column(name), key)


def read_labels(data: Data, column: str, config: DataConfig, where: str) -> Labels:
    """The classes of a split, from its declaration or from all its rows.

    Raises:
        SourceError: If the column holds no classes, or their number is not to be known or not ``data.num_classes``.
    """
    feature = feature_at(data.features, column)
    if isinstance(feature, datasets.ClassLabel):
        labels = Labels(tuple(feature.names), tuple(range(len(feature.names))), declared=True, numbered=False)
    elif feature.dtype in ("string", "large_string"):
        names = sorted(distinct(data, column, where), key=natural_key)
        labels = Labels(tuple(names), tuple(names), declared=False, numbered=False)
    elif "int" in str(feature.dtype):
        count = config.num_classes
        if not isinstance(data, datasets.IterableDataset) or count is None:
            numbers = distinct(data, column, where)
            count = max(numbers) + 1 if count is None else count
            if min(numbers) < 0 or max(numbers) >= count:
                raise SourceError(
                    f"labels of {where} run from {min(numbers)} to {max(numbers)}; allowed: 0 to {count - 1}"
                )
        labels = Labels(tuple(map(str, range(count))), tuple(range(count)), declared=False, numbered=True)
    else:
        raise SourceError(
            f"the column {column!r} of {where} holds {feature}; allowed: class labels, integers, strings"
        )
    if config.num_classes not in (None, len(labels.names)):
        raise SourceError(f"{where} has {len(labels.names)} classes, but data.num_classes is {config.num_classes}")
    return labels


def distinct(data: Data, column: str, where: str) -> list[Any]:
    """What stands in a column, each value once."""
    if isinstance(data, datasets.IterableDataset):
        raise SourceError(
            f"the stream {where} does not tell its classes; allowed: data.num_classes=N with integer labels, a column "
            "of ClassLabel, or no data.streaming"
        )
    top = column if column in data.column_names else column.partition(".")[0]
    table = data.select_columns([top]).with_format("arrow")[:]
    values = pc.unique(values_at(table, column)).to_pylist()
    if None in values:
        raise SourceError(f"some labels of {where} are missing; every picture needs one")
    return values


def match_labels(train: Labels, other: Labels, where: str) -> None:
    """Check that a validation split has the classes of the training split.

    Raises:
        SourceError: With what differs.
    """
    count, found = len(train.names), len(other.names)
    if train.numbered or other.numbered:
        if found > count or (found < count and other.declared):
            raise SourceError(
                f"{where} has {found} classes, the training pictures have {count}; allowed: the same ones"
            )
        return
    unknown = [name for name in other.names if name not in set(train.names)]
    missing = [name for name in train.names if name not in set(other.names)] if other.declared else []
    if unknown or missing:
        only = f"only there: {unknown[0]}" if unknown else f"not there: {missing[0]}"
        raise SourceError(
            f"{where} has {found} classes, the training pictures have {count} ({only}); allowed: the same ones"
        )
