"""Tables that programs write and people may edit, CSV or JSON; this module needs the standard library only."""

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

Row = dict[str, Any]
Line = tuple[str, list[Any]]  # where a row is in its file, and its cells


@dataclass(frozen=True)
class Limit:
    """What the cells of a column may hold: in words, and as a test of their text, which may raise ValueError."""

    allowed: str
    holds: Callable[[str], bool]

    def allows(self, cell: Any) -> bool:
        try:
            return self.holds("" if cell is None else str(cell))
        except ValueError:
            return False

    def or_empty(self) -> "Limit":
        return Limit(f"{self.allowed}, or an empty cell", lambda text: not text or self.holds(text))


FIGURE = Limit("a number of 0 or more", lambda text: 0 <= float(text) < math.inf)
ABOVE_ZERO = Limit("a number above 0", lambda text: 0 < float(text) < math.inf)
NONE = Limit("0", lambda text: float(text) == 0)
COUNT = Limit("a whole number of 1 or more", lambda text: int(text) >= 1)


def one_of(*words: str) -> Limit:
    return Limit(" or ".join(words), words.__contains__)


def read(
    path: Path,
    columns: Collection[str] = (),
    limits: Mapping[str, Limit] = MappingProxyType({}),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> list[Row]:
    """Read all rows of a .csv file, as text, or of a .json file; an empty file has none.

    The table may have more columns than `columns`, and older names of columns, which `renamed` maps to their names
    now. ValueError if it lacks a column or names one twice, if a row has a cell too many or too few, or if one holds
    what its column's limit does not allow; rows without images may hold anything.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins with a byte order mark
        heading, lines = (_json_lines if path.suffix == ".json" else _csv_lines)(text)
        names = _once([renamed.get(name, name) for name in heading or columns])
    except (ValueError, RecursionError) as error:
        no_table = f"{path} cannot be read as a table in UTF-8: {error}"
        raise ValueError(f"{no_table}; mend it or name another file") from error
    if missing := [column for column in columns if column not in names]:
        lacks = f"it lacks the columns {', '.join(missing[:5])}"
        raise ValueError(f"{path} is another table: {lacks}; mend it or name another file")
    rows = []
    for place, cells in lines:
        if len(cells) != len(names):
            raise ValueError(f"{path}, {place}: it has {len(cells)} cells; allowed: {len(names)}, one for each column")
        row = dict(zip(names, cells, strict=True))
        for column, cell in row.items() if has_images(row) else ():
            if column in limits and not limits[column].allows(cell):
                came = "empty" if cell in ("", None) else repr(cell)
                raise ValueError(f"{path}, {place}: {column} is {came}; allowed: {limits[column].allowed}")
        rows.append(row)
    return rows


def has_images(row: Mapping[str, Any]) -> bool:
    """Whether a row of figures has any; where no image was scored its n, their number, is 0 in any spelling."""
    return not NONE.allows(row.get("n"))


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """The text of a .csv file with these columns of the rows."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _csv_lines(text: str) -> tuple[list[str], list[Line]]:
    """The names of the columns, and the lines below them that hold anything."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        lines = [(f"line {reader.line_num}", cells) for cells in reader if "".join(cells).strip()]
    except csv.Error as error:  # the only one that a text can cause
        too_long = f"by line {reader.line_num}, a cell has more than {csv.field_size_limit():,} characters"
        raise ValueError(f"{too_long}, as one whose quotation mark is not closed") from error
    return lines[0][1] if lines else [], lines[1:]


def _json_lines(text: str) -> tuple[list[str], list[Line]]:
    """The names of the columns, which all rows have, and the rows."""
    rows = json.loads(text.strip() or "[]", object_pairs_hook=_json_object)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its JSON is no list of rows, each an object")
    heading = list(rows[0]) if rows else []
    if other := next((number for number, row in enumerate(rows, 1) if row.keys() != rows[0].keys()), None):
        raise ValueError(f"row {other} has other columns than row 1")
    return heading, [(f"row {number}", [row[name] for name in heading]) for number, row in enumerate(rows, 1)]


def _json_object(pairs: list[tuple[str, Any]]) -> Row:
    _once([name for name, _ in pairs])
    return dict(pairs)


def _once(names: list[str]) -> list[str]:
    """The names; ValueError if one is there twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"it names a column twice: {', '.join(map(repr, twice))}")
    return names
