"""The scores of frozen features: rows of `python -m recipes.probe`, and apart from them, what other authors report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arm_zoo.tables import COUNT, FIGURE
from eval import tables
from eval.board.columns import shown

COLUMNS = (  # of the table that `python -m recipes.probe output=FILE.csv` adds its rows to
    *("model", "weights", "weights_sha256", "data_set", "images_train", "images_test"),
    *("protocol", "features", "settings", "top1", "low", "high"),
)
NUMBERS = {**dict.fromkeys(("images_train", "images_test"), COUNT), **dict.fromkeys(("top1", "low", "high"), FIGURE)}
ANCHOR_COLUMNS = ("model", "data_set", "knn", "linear", "note", "kind", "source")
FIGURES = {  # title of a column -> the protocol of its rows, and one of their settings
    "k-NN": ("knn", "neighbours=20"),
    "1 label": ("few_shot", "labels=1"),
    "5 labels": ("few_shot", "labels=5"),
    "10 labels": ("few_shot", "labels=10"),
    "logistic": ("logistic", ""),
    "linear": ("linear", ""),
    "attentive": ("attentive", ""),
}


@dataclass
class FrozenEntry:
    """One line of the table: top-1 in percent by title, with the ends of the 95% interval where it was measured."""

    model: str  # and its weights, where they were measured
    kind: str  # measured or reported
    data_set: str
    figures: dict[str, str] = field(default_factory=dict)
    intervals: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def title_of(row: Mapping[str, str]) -> str | None:
    """The column of a measured row; None for rows without one, such as k-NN with other numbers of neighbours."""
    settings = ["", *row["settings"].split(", ")]
    return next((title for title, (name, has) in FIGURES.items() if row["protocol"] == name and has in settings), None)


def measured_entries(rows: Iterable[Mapping[str, str]]) -> list[FrozenEntry]:
    """One entry for each model, weights and images; in each column the newest row counts."""
    entries: dict[tuple[str, ...], FrozenEntry] = {}
    for row in rows:
        if (title := title_of(row)) is None:
            continue
        key = tables.key(row, ("model", "weights_sha256", "data_set", "images_train", "images_test"))
        images = f"{int(row['images_train']):,} images to train on, {int(row['images_test']):,} scored"
        notes = [f"sha256 {row['weights_sha256'][:8]}", images]
        new = FrozenEntry(name_of(row), "measured", row["data_set"], notes=notes)
        entry = entries.setdefault(key, new)
        entry.figures[title] = shown(float(row["top1"]), 2)
        entry.intervals[title] = f"{shown(float(row['low']), 2)} to {shown(float(row['high']), 2)}"
        if title == "linear":
            entry.notes[2:] = [f"linear on {row['features']}"]
    return list(entries.values())


def name_of(row: Mapping[str, str]) -> str:
    """An entry if the weights are named after one, as in MODEL.TAG.safetensors; else the model and the weights."""
    weights = row["weights"].removesuffix(".safetensors")
    return weights if weights.partition(".")[0] == row["model"] else f"{row['model']} ({weights})"


def reported_entries(anchors: Path) -> list[FrozenEntry]:
    """The rows that the authors of other models report."""
    entries = []
    for row in tables.read(anchors.resolve(strict=True), ANCHOR_COLUMNS, {"kind": tables.KIND}):
        figures = {title: row[protocol] for title, (protocol, _) in FIGURES.items() if row.get(protocol)}
        notes = list(filter(None, [row["source"], row["note"]]))
        entries.append(FrozenEntry(row["model"], row["kind"], row["data_set"], figures, notes=notes))
    return entries


def read_frozen(measured: Path, anchors: Path) -> list[FrozenEntry]:
    """Measured entries, then reported ones; for each data set, the best linear classifier comes first."""
    entries = [*measured_entries(tables.read(measured, COLUMNS, NUMBERS)), *reported_entries(anchors)]
    best = {id(entry): -float(entry.figures.get("linear", 0)) for entry in entries}
    return sorted(entries, key=lambda entry: (entry.kind, entry.data_set, best[id(entry)]))


def titles_of(entries: Sequence[FrozenEntry]) -> list[str]:
    """The titles of the columns that have any figures."""
    return [title for title in FIGURES if any(title in entry.figures for entry in entries)]


def frozen_rows(entries: Sequence[FrozenEntry]) -> list[dict[str, str]]:
    """The rows of a Markdown table."""
    return [
        {
            "model": entry.model,
            "figures": f"**{entry.kind}**" if entry.kind == "measured" else f"*{entry.kind}*",
            "data set": entry.data_set,
            **{title: with_interval(entry, title) for title in titles_of(entries)},
            "notes": "; ".join(entry.notes),
        }
        for entry in entries
    ]


def with_interval(entry: FrozenEntry, title: str) -> str:
    figure = entry.figures.get(title, "-")
    return f"{figure} ({entry.intervals[title]})" if title in entry.intervals else figure
