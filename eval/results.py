"""The table of scores: one CSV row for each model and set, appended whole or not at all."""

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from eval.sets import SUBSETS

Row = dict[str, Any]

# A row that equals another in these is the same measurement: of the same model, on the same pictures, seen alike.
WAY = ("model", "weights_sha256", "img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "dtype")
KEY = (*WAY, "set", "listing_sha256", "limit")
COLUMNS = (
    *("model", "set", "n", "top1", "top5", "top1_low", "top1_high", "ece"),
    *("clean200_a_n", "clean200_a_top1", "clean200_a_top5", "clean200_r_n", "clean200_r_top1", "clean200_r_top5"),
    *("warnings", "params_m", "images", "classes", "undecodable", "limit"),
    *("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "dtype"),
    *("weights", "weights_sha256", "listing_sha256"),
    *("device", "processes", "batch_size", "seconds", "img_per_s", "torch", "timm", "pillow", "arm_zoo", "date"),
)


def key(row: Mapping[str, Any], columns: Sequence[str] = KEY) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in columns)


def read(path: Path) -> list[dict[str, str]]:
    """All rows as text; none where there is no file.

    Raises:
        ValueError: if the file is of another kind or has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} is no table of python -m eval, it lacks {', '.join(missing[:5])}; name another --output"
            )
        return list(reader)


def append(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Add rows: the file is written anew beside itself and renamed, under a lock that other runs wait for.

    Columns that people have added stay.

    Returns:
        the new rows as they were written: those of A and R with what the table knows of their clean pictures.
    """
    with FileLock(path.with_name(f".{path.name}.lock")):
        old = read(path)
        table = with_clean_columns([*old, *rows])
        added = [column for column in (old[0] if old else ()) if column not in COLUMNS]
        write_csv(path, [*COLUMNS, *added], table)
    return table[len(old) :]


def with_clean_columns(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of A and R with what in1k's newest row of the same measurement says of their 200 classes.

    Whichever of the sets was scored first, and in whichever run: later rows complete earlier ones.
    """
    same = (*WAY, "limit")
    clean = {key(row, same): row for row in rows if row.get("set") == "in1k"}
    out = []
    for row in rows:
        if row.get("set") in SUBSETS and (found := clean.get(key(row, same))):
            row = row | {c: found.get(c, "") for c in COLUMNS if c.startswith(f"clean200_{row['set']}_")}
        out.append(row)
    return out


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace a file by a table of these columns of the rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Replace a file by one that was written whole beside it."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)  # mkstemp's own mode is for secrets
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
