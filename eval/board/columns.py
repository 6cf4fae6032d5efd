"""The columns of the leaderboard's tables.

To add a column of accuracies, add a field to `Entry` of `eval.board.entries` and a line to `board`; to add a column of
speeds, add a row to SPEEDS.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from eval.board.entries import PAPER_SPEED, Entry, compilation
from eval.scoring.sets import SETS, SUBSETS

TITLES = {name: spec.title for name, spec in SETS.items() if spec.title}  # of the columns of sets
TEXT_COLUMNS = (
    *("model", "figures", "notes", "mode", "dtype", "compiled", "scans", "device"),
    *("note", "direction", "target", "paradigm", "data set"),
)

Figure = tuple[float | None, int]  # value and decimals, as many as the paper has for what it reports


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def board(entries: Sequence[Entry]) -> list[dict[str, Figure]]:
    """For each entry, title -> figure; columns without any figure are left out."""
    rows: list[dict[str, Figure]] = [
        {
            "params (M)": (entry.params_m, 1 if entry.measured else 0),
            **{TITLES[name]: (entry.top1.get(name), 2 if entry.measured else 1) for name in TITLES},
            **{f"clean {name.upper()}": (entry.clean.get(name), 2) for name in SUBSETS},
            "A5000 img/s": (entry.speeds.get(PAPER_SPEED), 0),
        }
        for entry in entries
    ]
    kept = {title for row in rows for title, (value, _) in row.items() if value is not None}
    return [{title: figure for title, figure in row.items() if title in kept} for row in rows]


def accuracy_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The rows of a Markdown table of accuracies; the page has the same columns."""
    return [
        {
            "model": entry.model,
            "figures": f"**{entry.kind}**" if entry.measured else f"*{entry.kind}*",
            "size": entry.img_size,
            **{title: shown(*figure) for title, figure in figures.items()},
            "notes": "; ".join([entry.source, *entry.notes] if entry.measured or entry.peer else entry.notes),
        }
        for entry, figures in zip(entries, board(entries), strict=True)
    ]


SPEEDS: Mapping[str, Callable[[Mapping[str, str]], str]] = {  # title -> text, of a row of `python -m eval.throughput`
    "model": itemgetter("model"), "mode": itemgetter("mode"), "size": itemgetter("img_size"),
    "batch": itemgetter("batch_size"), "dtype": itemgetter("dtype"), "compiled": compilation,
    "scans": lambda row: row.get("scan_backend") or "-",
    "images/s": lambda row: shown(float(row["img_per_s"]), 1),
    "peak MiB": lambda row: shown(float(row["peak_mib"]) if row.get("peak_mib") else None, 0),
    "device": itemgetter("device"),
}  # fmt: skip
