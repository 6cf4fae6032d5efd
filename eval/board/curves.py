"""The leaderboard's curves: how the time and the memory of an image change with its size and with the batch."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from eval.board.columns import shown
from eval.board.entries import circumstances
from eval.tables import model_and_backend

Row = Mapping[str, str]


def point(row: Row, at: int) -> dict[str, Any]:
    """A point of a line: its place on the axis, milliseconds and MiB per image (None if not taken), and its text."""
    batch_size, speed = int(row["batch_size"]), float(row["img_per_s"])
    mib = float(row["peak_mib"]) / batch_size if row.get("peak_mib") else None
    what = f"{row['img_size']} pixels, batch {batch_size}: {shown(1000 / speed, 3)} ms per image, "
    what += f"{shown(speed, 1)} images per second"
    memory = f", {shown(mib, 1)} MiB per image" if mib is not None else ""
    return {"at": at, "ms": 1000 / speed, "mib": mib, "text": what + memory, "date": row.get("date", "")[:10]}


def curves(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What the page draws: for each way of running and each axis the models that were timed at two places or more.

    Args:
        rows: of `python -m eval.throughput`; of one place the newest counts, by image size of the largest batch.
    """
    places: dict[tuple[str, str], dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in sorted(rows, key=lambda row: int(row["batch_size"])):
        way = f"{row['mode']}, {circumstances(row)}"
        name = model_and_backend(row)
        places[way, "image size in pixels"][name][int(row["img_size"])] = row
        places[way, f"batch size at {row['img_size']} pixels"][name][int(row["batch_size"])] = row
    panels = []
    for (way, axis), models in places.items():
        lines = [
            {"name": name, "points": [point(row, at) for at, row in sorted(timed.items())]}
            for name, timed in models.items()
            if len(timed) > 1
        ]
        if lines:
            panels.append({"way": way, "axis": axis, "lines": lines})
    return panels
