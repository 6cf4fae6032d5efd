"""Columns of tables of images, as the library `datasets` declares them; a dot leads into a column of mappings."""

from collections.abc import Mapping
from typing import Any

__all__ = ["LABEL_NAMES", "holds_images", "leaves", "values_at"]

LABEL_NAMES = (
    "label",
    "labels",
    "cls",
    "class",
    "target",
    "json.label",
)  # where none is declared to hold classes
_IMAGES = ("PIL.Image.Image", "binary", "large_binary")


def holds_images(feature: Any) -> bool:
    """Whether a column is declared to hold images, or bytes, perhaps with a path, that may be images."""
    return "bytes" in feature if isinstance(feature, Mapping) else getattr(feature, "dtype", None) in _IMAGES


def leaves(features: Mapping[str, Any]) -> dict[str, Any]:
    """What columns, and fields of columns of mappings, are declared to be, by their dotted paths."""
    found: dict[str, Any] = {}
    for name, feature in features.items():
        inside = feature if isinstance(feature, Mapping) else {}
        found |= {f"{name}.{key}": value for key, value in inside.items()} or {name: feature}
    return found


def values_at(table: Any, path: str) -> Any:
    """A column of an Arrow table, or a field in it: a `pyarrow.ChunkedArray`."""
    if path in table.column_names:
        return table.column(path)
    name, _, key = path.partition(".")
    column = table.column(name)
    return column.flatten()[column.type.get_field_index(key)]
