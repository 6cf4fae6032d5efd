"""Files of measured times: rows of a CSV or JSON that the runs of one program add to."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from eval.results import write_csv, write_whole

Row = dict[str, Any]


def check_output(path: Path | None, columns: Sequence[str]) -> None:
    """Raises ValueError for a file to which rows of these columns could not be added in the end."""
    if path is None:
        return
    if path.suffix not in (".csv", ".json") or not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--output must be a .csv or .json file in a folder that exists, got {str(path)!r}")
    _read(path, columns)


def append(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Add these columns of rows to a file, or begin it: it is written beside itself and renamed; other runs wait."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = [*_read(path, columns), *({column: row[column] for column in columns} for row in rows)]
        if path.suffix == ".csv":
            write_csv(path, columns, rows)
        else:
            write_whole(path, json.dumps(rows, indent=2) + "\n")


def _read(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file, none if it is not there or empty.

    Raises:
        ValueError: if it is of another kind or has other columns.
    """
    text = path.read_text(encoding="utf-8-sig").strip() if path.exists() else ""  # tables of Excel begin with a mark
    if not text:
        return []
    try:
        if path.suffix == ".csv":
            head, *cells = csv.reader(io.StringIO(text, newline=""))
            rows: list[Row] = [dict(zip(head, row, strict=True)) for row in cells]
        else:
            rows = json.loads(text)
            head = list(rows[0].keys()) if rows != [] else list(columns)
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error):
        raise ValueError(f"--output: {path} is there and holds no table; name another file") from None
    if different := sorted(set(columns) ^ set(head)):
        few = ", ".join(different[:5])
        raise ValueError(f"--output: {path} is there, and differs in the columns {few}; name another file")
    return rows
