"""Files of measured times: rows of a CSV or JSON that the runs of one program add to."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from eval.results import write_whole

Row = dict[str, Any]


def check_output(path: Path | None, columns: Sequence[str]) -> None:
    """Raises ValueError for a file to which rows of these columns could not be added in the end."""
    if path is None:
        return
    if path.suffix not in (".csv", ".json") or not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--output must be a .csv or .json file in a folder that exists, got {str(path)!r}")
    try:
        names, _ = _read(path)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"--output: {path} is there and holds no table; name another file") from None
    if names and (different := sorted(set(names) ^ set(columns))):
        few = ", ".join(different[:5])
        raise ValueError(f"--output: {path} is there, and differs in the columns {few}; name another file")


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, or begin it: it is written anew beside itself and renamed, while other runs wait."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = [*_read(path)[1], *rows]
        if path.suffix == ".json":
            write_whole(path, json.dumps(rows, indent=2) + "\n")
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, text.getvalue())


def _read(path: Path) -> tuple[list[str], list[Row]]:
    """The columns and the rows of a file, none if it is not there or empty."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return list(reader.fieldnames or ()), list(reader)
    rows = [dict(row.items()) for row in json.loads(text or "[]")]
    return list({name for row in rows for name in row}), rows
