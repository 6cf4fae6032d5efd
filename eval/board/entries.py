"""The entries of the leaderboard: measured rows, the paper's tables and its peers, which are never mixed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from arm_zoo.tables import ABOVE_ZERO, COUNT, FIGURE, Limit, has_images
from eval import tables
from eval.scoring.sets import SETS, SUBSETS

PAPER_SPEED = "NVIDIA A5000, reported by the paper"
PEER_COLUMNS = ("model", "img_size", "params_m", "note", "entry", "kind", "source")
SPEED_COLUMNS = ("model", "mode", "img_size", "batch_size", "dtype", "compile", "img_per_s", "device")
SPEED_NUMBERS = {"img_size": COUNT, "batch_size": COUNT, "img_per_s": ABOVE_ZERO}
MEASURED_NUMBERS = {"top1": FIGURE, "params_m": FIGURE}
TABLE_2_COLUMNS = (*PEER_COLUMNS, "throughput_a5000_img_s", "top1")
TABLE_3_COLUMNS = ("model", "entry", "kind", "source")


@dataclass
class Entry:
    """One line of the leaderboard: accuracies in percent by set, speeds in images per second by circumstances."""

    model: str
    kind: str  # measured or reported
    img_size: str
    params_m: float | None
    source: str
    architecture: str = ""  # the model of this zoo or of timm whose speed is the entry's; a tag names its weights
    dtype: str = ""  # if it was measured
    peer: bool = False  # reported by the authors of another model, not by the paper
    top1: dict[str, float] = field(default_factory=dict)
    clean: dict[str, float] = field(default_factory=dict)  # by subset, on the clean images of its classes
    speeds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        return self.kind == "measured"


def paper_table(
    paper: Path, name: str, columns: Sequence[str] = (), needed: Mapping[str, Limit] = MappingProxyType({})
) -> list[dict[str, str]]:
    return tables.read((paper / f"{name}.csv").resolve(strict=True), columns, {"kind": tables.KIND, **needed})


def reported_top1(row: Mapping[str, str]) -> dict[str, float]:
    """The figures, by set, of a row in the form of the paper's table 3."""
    return {name: float(top1) for name, spec in SETS.items() if (top1 := row.get(spec.paper_column))}


def peer_entries(peers: Path) -> list[Entry]:
    """The rows that the authors of other models report."""
    rows = tables.read(peers.resolve(strict=True), PEER_COLUMNS, {"kind": tables.KIND})
    return [
        Entry(
            row["model"], row["kind"], row["img_size"], float(row["params_m"]) if row["params_m"] else None,
            row["source"], row["entry"], peer=True, top1=reported_top1(row), notes=list(filter(None, [row["note"]])),
        )
        for row in rows
    ]  # fmt: skip


def reported_entries(paper: Path) -> list[Entry]:
    """Tables 2 and 3 of the paper, joined by model at 224 pixels."""
    entries: dict[tuple[str, str], Entry] = {}  # by model and size
    for row in paper_table(paper, "table2_imagenet", TABLE_2_COLUMNS, {"params_m": FIGURE}):
        entry = Entry(row["model"], row["kind"], row["img_size"], float(row["params_m"]), row["source"], row["entry"])
        speed = row["throughput_a5000_img_s"]
        entry.top1 = {"in1k": float(row["top1"])} if row["top1"] else {}
        entry.speeds = {PAPER_SPEED: float(speed)} if speed else {}
        entry.notes = list(filter(None, [row["note"]]))
        entries[entry.model, entry.img_size] = entry
    for row in paper_table(paper, "table3_robustness", TABLE_3_COLUMNS):
        new = Entry(row["model"], row["kind"], "224", None, row["source"], row["entry"])
        entry = entries.setdefault((new.model, new.img_size), new)
        if entry is not new:
            entry.source += ", table 3"
        entry.top1 |= reported_top1(row)
    return list(entries.values())


def measured_entries(rows: Iterable[Mapping[str, str]]) -> list[Entry]:
    """Rows of `python -m eval` by model, weights and preprocessing; the newest of a set counts.

    Rows that are limited, have no image, or are of sets without a column are left out.
    """
    entries: dict[tuple[str, ...], Entry] = {}
    for row in rows:
        name = row["set"]
        if row["limit"] or not has_images(row) or name not in SETS or not SETS[name].title:
            continue
        crop = f"crop {row['crop_pct']} {row['crop_mode']}, {row['interpolation']}, {row['dtype']}"
        height, _, width = row["img_size"].partition("x")
        size = height if height == width else row["img_size"]
        source = f"{row['weights']} ({row['weights_sha256'][:8] or 'no checksum'}), {crop}"
        new = Entry(row["model"], "measured", size, float(row["params_m"]), source, row["model"], row["dtype"])
        entry = entries.setdefault(tables.key(row, tables.WAY), new)
        entry.top1[name] = float(row["top1"])
        entry.clean |= {subset: float(top1) for subset in SUBSETS if (top1 := row[f"{SETS[subset].clean}top1"])}
        # a newer row of the set has its own say
        entry.notes = [note for note in entry.notes if not note.startswith(f"{name}: ")]
        if row["warnings"]:
            entry.notes.append(f"{name}: {row['warnings']}")
    return list(entries.values())


def read_speeds(path: Path) -> list[dict[str, str]]:
    """Rows of `python -m eval.throughput`, of a CSV or JSON file, as text."""
    rows = tables.read(path, SPEED_COLUMNS, SPEED_NUMBERS)
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def compilation(row: Mapping[str, str]) -> str:
    """How a timed model ran: 'no' (not compiled), 'yes' or 'yes, CUDA graphs'."""
    graphs = ", CUDA graphs" if row.get("cuda_graphs") == "True" else ""  # files of older versions lack the column
    return f"yes{graphs}" if row["compile"] == "True" else "no"


def circumstances(row: Mapping[str, str]) -> str:
    compiled = compilation(row).replace("yes", ", compiled").removeprefix("no")
    return f"{row['device']}, {row['dtype']}{compiled}, measured"


def add_speeds(entries: Iterable[Entry], speeds: Sequence[Mapping[str, str]]) -> None:
    """Give entries the inference speeds that were measured for their architecture and size.

    For each backend of the scans the newest row counts, and of several backends the fastest.
    """
    for entry in entries:
        newest: dict[str, dict[str, float]] = {}
        for row in speeds:
            same = entry.architecture.partition(".")[0] == row["model"].partition(".")[0]
            if same and row["mode"] == "infer" and entry.img_size == row["img_size"]:
                newest.setdefault(circumstances(row), {})[row.get("scan_backend", "")] = float(row["img_per_s"])
        entry.speeds |= {shown: max(of_backends.values()) for shown, of_backends in newest.items()}


def read_entries(measured: Path, speeds: Sequence[Mapping[str, str]], paper: Path, peers: Path) -> list[Entry]:
    """All entries with their speeds, the most accurate on in1k first."""
    rows = tables.read(measured, needed=MEASURED_NUMBERS)
    entries = [*measured_entries(rows), *reported_entries(paper), *peer_entries(peers)]
    add_speeds(entries, speeds)
    return sorted(entries, key=lambda entry: -entry.top1.get("in1k", -1))
