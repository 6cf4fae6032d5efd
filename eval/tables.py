"""Tables of measurements, CSV or JSON: the one place that reads them and appends rows."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from arm_zoo.files import write_text
from eval.scoring.sets import SETS, SUBSETS

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results.csv"  # read by the leaderboard and by the model cards of hub

# Rows that agree in WAY score the same model with the same preprocessing; in KEY, also on the same images.
WAY = ("model", "weights_sha256", "img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "dtype")
KEY = (*WAY, "set", "listing_sha256", "limit")
CLEAN = tuple(SETS[name].clean + figure for name in SUBSETS for figure in ("n", "top1", "top5"))
COLUMNS = (
    *("model", "set", "n", "top1", "top5", "top1_low", "top1_high", "ece"),
    *CLEAN,
    *("warnings", "params_m", "images", "classes", "undecodable", "limit"),
    *("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "dtype"),
    *("weights", "weights_sha256", "listing_sha256"),
    *("device", "processes", "batch_size", "seconds", "img_per_s", "torch", "timm", "pillow", "arm_zoo", "date"),
)


@dataclass(frozen=True)
class Limit:
    """The numbers that the cells of a column may hold, in words, and how they are read."""

    allowed: str
    read: Callable[[str], float]
    holds: Callable[[float], bool]

    def allows(self, value: Any) -> bool:
        try:
            return self.holds(self.read(str(value)))
        except ValueError:
            return False


FIGURE = Limit("a number of 0 or more", float, lambda number: 0 <= number < math.inf)
ABOVE_ZERO = Limit("a number above 0", float, lambda number: 0 < number < math.inf)
COUNT = Limit("a whole number of 1 or more", int, lambda number: number >= 1)
FIGURES = {  # columns of any table that hold a FIGURE, or nothing
    *("n", "top1", "top5", "top1_low", "top1_high", "low", "high", "miou", "params_m", "img_per_s", "peak_mib"),
    *("knn", "few_shot", "logistic", "linear", "attentive", "throughput_a5000_img_s", *CLEAN),
    *(spec.paper_column for spec in SETS.values() if spec.paper_column),
}
RENAMED = {"marks": "warnings", "pictures": "images"}  # name of a column in older files -> its name now


def key(row: Mapping[str, Any], columns: Sequence[str] = KEY) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in columns)


def read(
    path: Path, columns: Sequence[str] = COLUMNS, needed: Mapping[str, Limit] = MappingProxyType({})
) -> list[Row]:
    """Read all rows of a .csv file, as text, or of a .json file; none if the file is empty or does not exist.

    It may have more columns, and empty cells, except where a number is `needed` in a row with images. ValueError if
    the file is no table, lacks a column (except those of CLEAN), or has a row with a cell too many, too few or wrong.
    """
    try:
        head, lines = (_json_lines if path.suffix == ".json" else _csv_lines)(path, columns)
    except (ValueError, TypeError, AttributeError, csv.Error):
        raise ValueError(f"{path} exists, but is no table in UTF-8; name another file") from None
    newer = {column: "" for column in columns if column in CLEAN}  # of sets that may be newer than the file
    there = {RENAMED.get(name, name) for name in head} | newer.keys()
    if missing := [column for column in columns if column not in there]:
        raise ValueError(f"{path} is another table: it lacks the columns {', '.join(missing[:5])}; name another file")
    rows = []
    for place, names, cells in lines:
        if len(cells) != len(names):
            raise ValueError(f"{path}, {place}: it has {len(cells)} cells; allowed: {len(names)}, one for each column")
        row = newer | {RENAMED.get(name, name): cell for name, cell in zip(names, cells, strict=True)}
        if str(row.get("n")) != "0" and (problem := next(_problems(row, needed), None)):  # no images, no figures
            raise ValueError(f"{path}, {place}: {problem}")
        rows.append(row)
    return rows


Line = tuple[str, Sequence[str], Sequence[Any]]  # where a row is in its file, the names of its columns, and its cells


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig") if path.exists() else ""  # Excel begins with a byte order mark


def _csv_lines(path: Path, columns: Sequence[str]) -> tuple[Sequence[str], list[Line]]:
    """The names of the columns, and the lines below them that hold anything."""
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    lines = [(f"line {reader.line_num}", cells) for cells in reader if "".join(cells).strip()]
    head = lines[0][1] if lines else columns
    return head, [(place, head, cells) for place, cells in lines[1:]]


def _json_lines(path: Path, columns: Sequence[str]) -> tuple[Sequence[str], list[Line]]:
    """The names that all rows have, and the rows."""
    rows = json.loads(_text(path).strip() or "[]")
    if not isinstance(rows, list):
        raise TypeError("a table is a list of rows")
    lines: list[Line] = [(f"row {number}", list(row.keys()), list(row.values())) for number, row in enumerate(rows, 1)]
    return (list(set(rows[0]).intersection(*rows)) if rows else columns), lines


def _problems(row: Row, needed: Mapping[str, Limit]) -> Iterator[str]:
    """What is wrong with each cell that is not as FIGURES and `needed` say."""
    for column, value in row.items():
        limit = needed.get(column, FIGURE if column in FIGURES else None)
        is_empty, may_be_empty = value in ("", None), column not in needed
        if limit is not None and not (may_be_empty if is_empty else limit.allows(value)):
            allowed = f"{limit.allowed}, or an empty cell" if may_be_empty else limit.allowed
            yield f"{column} is {'empty' if is_empty else repr(value)}; allowed: {allowed}"


def label(row: Mapping[str, str]) -> str:
    """The model of a row of speeds, with the backend of its scans."""
    return f"{row['model']} ({row['scan_backend']})" if row.get("scan_backend") else row["model"]


def append(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Add rows to a table, which is created if needed: the file is replaced under a lock that other runs wait for.

    Columns that people have added stay. Returns the new rows as written; see `with_clean_columns`.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        old = read(path, columns)
        table = with_clean_columns([*old, *rows])
        columns = list(dict.fromkeys([*columns, *(old[0] if old else ())]))
        if path.suffix == ".json":
            text = json.dumps([{column: row.get(column) for column in columns} for row in table], indent=2) + "\n"
        else:
            file = io.StringIO()
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
            text = file.getvalue()
        write_text(path, text.encode(errors="backslashreplace").decode())  # names of files need not be UTF-8
    return table[len(old) :]


def check_output(path: Path | None, columns: Sequence[str]) -> None:
    """Raise ValueError now if rows with these columns could not be added to the file later."""
    if path is None:
        return
    if path.suffix not in (".csv", ".json") or not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--output must be a .csv or .json file in a folder that exists, got {str(path)!r}")
    read(path, columns)


def with_clean_columns(rows: Sequence[Row]) -> list[Row]:
    """The rows; those of subsets get the figures of their classes from in1k's newest row with the same WAY and limit.

    It does not matter which set was scored first, or in which run: later rows complete earlier ones.
    """
    same = (*WAY, "limit")
    clean = {key(row, same): row for row in rows if row.get("set") == "in1k"}
    known = [clean.get(key(row, same)) if row.get("set") in SUBSETS else None for row in rows]
    return [
        row | {c: found.get(c, "") for c in CLEAN if found and c.startswith(SETS[row["set"]].clean)}
        for row, found in zip(rows, known, strict=True)
    ]
