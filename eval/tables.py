"""Tables of measurements, CSV or JSON: the one place that reads them and appends rows."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
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
FIGURES = {  # columns of any table that hold numbers of 0 or more
    *("n", "top1", "top5", "top1_low", "top1_high", "low", "high", "knn", "linear", "miou", "params_m", "img_per_s"),
    *(spec.paper_column for spec in SETS.values() if spec.paper_column),
}
RENAMED = {"marks": "warnings", "pictures": "images"}  # name of a column in older files -> its name now


def key(row: Mapping[str, Any], columns: Sequence[str] = KEY) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in columns)


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Read all rows of a .csv file, as text, or of a .json file; none if the file is empty or does not exist.

    ValueError if the file is no table, lacks a column (except those of CLEAN), or has FIGURES that are no numbers. It
    may have more columns, and empty cells.
    """
    try:  # Excel begins with a byte order mark
        text = path.read_text(encoding="utf-8-sig").strip() if path.exists() else ""
        if path.suffix == ".json":
            head, rows = columns, json.loads(text or "[]")
        else:
            head, *lines = filter(None, csv.reader(io.StringIO(text or ",".join(columns), newline="")))
            rows = [dict(zip(head, line, strict=True)) for line in lines]
        if not isinstance(rows, list):
            raise TypeError("a table is a list of rows")
        newer = {column: "" for column in columns if column in CLEAN}  # of sets that may be newer than the file
        rows = [newer | {RENAMED.get(name, name): value for name, value in row.items()} for row in rows]
    except (ValueError, TypeError, AttributeError, csv.Error):
        raise ValueError(f"{path} exists, but is no table in UTF-8; name another file") from None
    there = {RENAMED.get(name, name) for name in head}.union(newer).intersection(*rows)
    if missing := [column for column in columns if column not in there]:
        raise ValueError(f"{path} is another table: it lacks the columns {', '.join(missing[:5])}; name another file")
    for row in (row for row in rows if str(row.get("n")) != "0"):  # those of no images have no figures
        if wrong := [column for column in FIGURES & row.keys() if not _is_figure(row[column])]:
            what = f"{min(wrong)} is {row[min(wrong)]!r} in the row of {row.get('model')}"
            raise ValueError(f"{path}: {what}; allowed: a number of 0 or more, or an empty cell")
    return rows


def _is_figure(value: Any) -> bool:
    try:
        return value in ("", None) or 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False


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
