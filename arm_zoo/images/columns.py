"""Finds the columns of a data set that hold image and class, by their declarations in the library `datasets`.

A dot leads into a column of mappings, as in `json.label`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import ClassLabel

from arm_zoo.images.decode import MAX_PIXELS
from arm_zoo.images.errors import SourceError
from arm_zoo.messages import listed

LABEL_NAMES = ("label", "labels", "cls", "class", "target", "json.label", "wnid")  # where none is a ClassLabel
STRINGS = ("string", "large_string")
IMAGE_NAMES = ("image", "img")
_IMAGES = ("PIL.Image.Image", "binary", "large_binary")


@dataclass(frozen=True)
class Choices:
    """What a user says about a source that does not tell it itself."""

    image_column: str | None = None  # None: the only column of images. For tars, the ending of image files
    label_column: str | None = None  # None: the only column of classes. For tars, an ending or JSON's field
    num_classes: int | None = None  # None: as many as the source has
    max_pixels: int = MAX_PIXELS  # larger images are not decoded
    by_name: bool = False  # with several candidates, prefer the usual names, then the first, as ImageNet's sets do
    in_training: bool = True  # choices are typed as keys of the recipes, not as options of `eval`

    def typed(self, key: str, value: str = "NAME") -> str:
        """How the user types a choice, for messages."""
        return f"data.{key}={value}" if self.in_training else f"--{key.replace('_', '-')} {value}"


class Columns(NamedTuple):
    """The names of the columns of image, class and name."""

    image: str
    label: str | None
    name: str | None = None


def find_columns(features: Mapping[str, Any] | None, choices: Choices, where: str, labels_needed: bool) -> Columns:
    """The columns that the user chooses, or the only ones that can be meant; else raises `SourceError`."""
    if features is None:
        raise SourceError(f"{where} does not tell its columns; leave out data.streaming")
    images = [name for name, feature in features.items() if _holds_images(feature)]
    if choices.by_name:
        images = [*(name for name in IMAGE_NAMES if name in features), *images][:1]
    image = _choose("image_column", choices, images, list(features), where)
    if not (_holds_images(features[image]) or getattr(features[image], "dtype", None) in STRINGS):
        held = f"the column {image!r} of {where} holds {features[image]}"
        raise SourceError(f"{held}; allowed: images, their bytes, or their paths")
    if not labels_needed:
        return Columns(image, None)
    paths = {path: feature for path, feature in leaves(features).items() if path.partition(".")[0] != image}
    declared = [path for path, feature in paths.items() if isinstance(feature, ClassLabel)]
    named = [name for name in LABEL_NAMES if name in paths]
    likely = [*named, *declared][:1] if choices.by_name else declared or named[:1]
    return Columns(image, _choose("label_column", choices, likely, list(paths), where))


def _choose(key: str, choices: Choices, likely: Sequence[str], columns: Sequence[str], where: str) -> str:
    """The column that is wanted, else the only likely one."""
    wanted: str | None = getattr(choices, key)
    if wanted is not None and wanted not in columns:
        raise SourceError(f"{choices.typed(key, wanted)} is no column of {where}; allowed: {listed(columns, 20)}")
    if wanted is not None or len(likely) == 1:
        return likely[0] if wanted is None else wanted
    problem = f"could be any of {listed(likely)}" if likely else f"is none of {listed(columns, 20)}"
    problem = problem if columns else "is missing"
    raise SourceError(f"the {key.replace('_', ' ')} of {where} {problem}; say which with {choices.typed(key)}")


def _holds_images(feature: Any) -> bool:
    """Whether a column is declared to hold images, or bytes, perhaps with a path, that may be images."""
    return "bytes" in feature if isinstance(feature, Mapping) else getattr(feature, "dtype", None) in _IMAGES


def leaves(features: Mapping[str, Any]) -> dict[str, Any]:
    """The declared types of columns, and of the fields in columns of mappings, by dotted path."""
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
