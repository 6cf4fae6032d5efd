"""What the leaderboard has: measured rows and the paper's tables as entries of one kind, never mixed in one."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval import results
from eval.sets import REAL, SUBSETS

PAPER_SPEED = "NVIDIA A5000, reported by the paper"
SETS = ("in1k", REAL, "v2", "a", "r", "sketch")
PAPER_COLUMNS = {"in1k": "in1k", REAL: "in_real", "v2": "in_v2", "a": "in_a", "r": "in_r", "sketch": "in_sketch"}
SPEED_COLUMNS = ("model", "mode", "img_size", "batch_size", "dtype", "compile", "img_per_s", "device")


@dataclass
class Entry:
    """One line of the leaderboard: accuracies in percent by set, speeds in images per second by circumstances."""

    model: str
    kind: str  # measured or reported
    img_size: str
    params_m: float | None
    source: str
    architecture: str = ""
    dtype: str = ""  # of measured ones
    top1: dict[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None  # of in1k, 95%
    clean: dict[str, float] = field(default_factory=dict)  # clean pictures of the 200 classes of a and r
    speeds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def number(text: str | None) -> float | None:
    return float(text) if text not in (None, "") else None


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reported_entries(paper: Path) -> list[Entry]:
    """Tables 2 and 3 of the paper, joined by model at 224 pixels."""
    entries = []
    for row in read_csv(paper / "table2_imagenet.csv"):
        accuracy = number(row["top1"])
        speed = number(row["throughput_a5000_img_s"])
        entries.append(
            Entry(
                model=row["model"],
                kind=row["kind"],
                img_size=row["img_size"],
                params_m=number(row["params_m"]),
                source=row["source"],
                architecture=row["entry"],
                top1={} if accuracy is None else {"in1k": accuracy},
                speeds={} if speed is None else {PAPER_SPEED: speed},
                notes=[row["note"]] if row["note"] else [],
            )
        )
    at_224 = {entry.model: entry for entry in entries if entry.img_size == "224"}
    for row in read_csv(paper / "table3_robustness.csv"):
        entry = at_224.get(row["model"])
        if entry is None:
            entry = Entry(row["model"], row["kind"], "224", None, "")
            entries.append(entry)
        entry.top1 |= {name: float(row[column]) for name, column in PAPER_COLUMNS.items()}
        entry.source = f"{entry.source}, table 3" if entry.source else row["source"]
    return entries


def measured_entries(rows: Iterable[Mapping[str, str]]) -> list[Entry]:
    """Rows of `python -m eval` by model, weights and preprocessing; the newest of a set counts.

    Rows that are limited, have no picture, or are of sets without a column are left out.
    """
    entries: dict[tuple[str, ...], Entry] = {}
    for row in rows:
        if row["limit"] or row["set"] not in SETS or row["n"] == "0":
            continue
        key = tuple(row[name] for name in results.WAY)
        crop = f"crop {row['crop_pct']} {row['crop_mode']}, {row['interpolation']}, {row['dtype']}"
        size = row["img_size"].partition("x")
        entry = entries.setdefault(
            key,
            Entry(
                model=row["model"],
                kind="measured",
                img_size=size[0] if size[0] == size[2] else row["img_size"],
                params_m=number(row["params_m"]),
                source=f"{row['weights']} ({row['weights_sha256'][:8] or 'no checksum'}), {crop}",
                architecture=row["model"],
                dtype=row["dtype"],
            ),
        )
        entry.top1[row["set"]] = float(row["top1"])
        if row["set"] == "in1k":
            entry.interval = (float(row["top1_low"]), float(row["top1_high"]))
        for name in SUBSETS:
            if (clean := number(row[f"clean200_{name}_top1"])) is not None:
                entry.clean[name] = clean
        # a newer row of the set has its own say
        entry.notes = [note for note in entry.notes if not note.startswith(f"{row['set']}: ")]
        if row["warnings"]:
            entry.notes.append(f"{row['set']}: {row['warnings']}")
    return list(entries.values())


def read_speeds(path: Path) -> list[dict[str, str]]:
    """Rows of `python -m eval.throughput`, of a CSV or JSON file, as text.

    Raises:
        ValueError: if the file is another's.
    """
    rows = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_csv(path)
    if missing := [name for name in SPEED_COLUMNS if any(name not in row for row in rows)]:
        raise ValueError(f"{path} is not of python -m eval.throughput: it lacks {', '.join(missing)}")
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def compilation(row: Mapping[str, str]) -> str:
    """How a timed model ran: 'no' (not compiled), 'yes' or 'yes, CUDA graphs'."""
    graphs = ", CUDA graphs" if row.get("cuda_graphs") == "True" else ""  # files of older versions lack the column
    return f"yes{graphs}" if row["compile"] == "True" else "no"


def circumstances(row: Mapping[str, str]) -> str:
    ways = {"no": "", "yes": ", compiled", "yes, CUDA graphs": ", compiled, CUDA graphs"}
    return f"{row['device']}, {row['dtype']}{ways[compilation(row)]}, measured"


def add_speeds(entries: Iterable[Entry], speeds: Sequence[Mapping[str, str]]) -> None:
    """Give entries the inference speeds that were measured of their architecture at their size.

    The newest row of a backend of the scans counts, and of several backends the fastest.
    """
    for entry in entries:
        newest: dict[str, dict[str, float]] = {}
        for row in speeds:
            same = entry.architecture.partition(".")[0] == row["model"].partition(".")[0]
            if same and row["mode"] == "infer" and entry.img_size == row["img_size"]:
                newest.setdefault(circumstances(row), {})[row.get("scan_backend", "")] = float(row["img_per_s"])
        entry.speeds |= {shown: max(of_backends.values()) for shown, of_backends in newest.items()}
