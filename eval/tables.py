"""Tables of measurements, CSV or JSON: their columns, what these hold, and how rows are read, added and shown."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from arm_zoo.command_line import shown_by
from arm_zoo.files import write_text
from arm_zoo.tables import FIGURE, Limit, Row, csv_text, one_of
from arm_zoo.tables import read as read_table
from eval.scoring.sets import SETS, SUBSETS

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


KIND = one_of("measured", "reported")
LIMITS = dict.fromkeys(  # of columns of any table
    (
        *("n", "top1", "top5", "top1_low", "top1_high", "low", "high", "miou", "params_m", "img_per_s", "peak_mib"),
        *("knn", "few_shot", "logistic", "linear", "attentive", "throughput_a5000_img_s", *CLEAN),
        *(spec.paper_column for spec in SETS.values() if spec.paper_column),
    ),
    FIGURE.or_empty(),
)
RENAMED = {"marks": "warnings", "pictures": "images"}  # name of a column in older files -> its name now


def key(row: Mapping[str, Any], columns: Sequence[str] = KEY) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in columns)


def read(
    path: Path, columns: Sequence[str] = COLUMNS, needed: Mapping[str, Limit] = MappingProxyType({})
) -> list[Row]:
    """Read all rows as `arm_zoo.tables.read` does, but none if there is no file; LIMITS hold but for `needed` cells.

    The file may be older than a set, and so lack columns of CLEAN, which are empty then.
    """
    if not path.exists():
        return []
    newer = dict.fromkeys((column for column in columns if column in CLEAN), "")
    rows = read_table(path, [column for column in columns if column not in newer], {**LIMITS, **needed}, RENAMED)
    return [newer | row for row in rows]


def model_and_backend(row: Mapping[str, str]) -> str:
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
            text = csv_text(table, columns)
        write_text(path, text.encode(errors="backslashreplace").decode())  # names of files need not be UTF-8
    return table[len(old) :]


@contextmanager
def added(path: Path | None, rows: Iterable[Row], columns: Sequence[str]) -> Iterator[None]:
    """Add rows to a table, if there is a path, at the end of a block that prints them, even if it cannot."""
    try:
        yield
    finally:
        if path is not None:
            append(path, rows, columns)


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


def text_table(
    title: str, texts: Sequence[str], figures: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None
) -> Table:
    """A table for people: columns of text, which fold in a narrow terminal, then columns of figures."""
    shown = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    for head in texts:
        shown.add_column(head, overflow="fold")
    for head in figures:
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def show_table(table: Table, *below: str, width: int | None = None) -> None:
    """Print a table, and lines below it."""
    console = Console(width=width, markup=False, emoji=False)
    with shown_by(console):
        console.print(table, *below)
