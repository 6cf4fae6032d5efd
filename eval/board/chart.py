"""Charts: the speed of one of our models against a ViT of its size, and the scores of frozen features."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.board.frozen import FrozenEntry, titles_of

COLOURS = ("#1f4e79", "#d1661c", "#3a8a4d", "#8a3a7d", "#7a7a7a")  # of a panel's models; repeated if there are more
LEFT, COLUMN, LETTER = 50, 80, 7  # pixels: widths of the axis, of a protocol and of a letter in the legend
PANEL, HEAD, PLOT = 290, 46, 210  # pixels: heights of a panel, of what is above its plot, and of that
MODEL, PEER = "arm_base_patch16_224", "vit_base_patch16_224"
WIDTH, HEIGHT, MARGIN = 700, 240, 50  # pixels of the plot and what is left around it


def speed_chart(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """What the template chart.svg draws: the device, and for each image size the two models' ratio and its place.

    Args:
        rows: rows of `python -m eval.throughput`. Compiled inference on the device of the newest row counts; for each
            size, the last run with the largest batch in which both models were timed.
    """
    timed = [row for row in rows if row["mode"] == "infer" and row["compile"] == "True"]
    device = timed[-1]["device"] if timed else ""
    alike = [row for row in timed if row["device"] == device]
    runs: dict[tuple[int, int, str], dict[str, float]] = {}
    for row in sorted(alike, key=lambda row: int(row["batch_size"])):  # a run's rows have one date
        run = (int(row["img_size"]), int(row["batch_size"]), row.get("date", ""))
        runs.setdefault(run, {})[row["model"]] = float(row["img_per_s"])
    both = {size: run for (size, *_), run in runs.items() if MODEL in run and PEER in run}
    sizes = sorted(both)
    ratios = {size: both[size][MODEL] / both[size][PEER] for size in sizes}
    top = max([1.0, *ratios.values()]) * 1.2

    def height_of(ratio: float) -> float:
        return round(MARGIN + HEIGHT * (1 - ratio / top), 1)

    def place_of(size: int) -> float:
        span = math.log2(sizes[-1] / sizes[0]) or 1
        return round(2 * MARGIN + (WIDTH - 2 * MARGIN) * math.log2(size / sizes[0]) / span, 1)

    points = [{"size": n, "ratio": ratio, "x": place_of(n), "y": height_of(ratio)} for n, ratio in ratios.items()]
    return {"device": device, "points": points, "one": height_of(1), "bottom": height_of(0)}


def frozen_chart(entries: Sequence[FrozenEntry]) -> dict[str, Any]:
    """What the template frozen.svg draws of measured entries: for each data set a panel with a dot for each figure."""
    measured = [entry for entry in entries if entry.kind == "measured"]
    places = {title: LEFT + COLUMN * (0.5 + i) for i, title in enumerate(titles_of(measured))}
    sets = dict.fromkeys(entry.data_set for entry in measured)
    own = [[entry for entry in measured if entry.data_set == data_set] for data_set in sets]
    panels = [_frozen_panel(some, places, PANEL * row) for row, some in enumerate(own)]
    right = LEFT + COLUMN * len(places)
    longest = max((len(model["name"]) for panel in panels for model in panel["models"]), default=0)
    size = {"width": right + 40 + LETTER * longest, "height": PANEL * len(panels)}
    return {**size, "left": LEFT, "right": right, "places": places, "panels": panels}


def _frozen_panel(entries: Sequence[FrozenEntry], places: Mapping[str, float], top: int) -> dict[str, Any]:
    """A panel's title, horizontal lines, and figures of each model: where they are, and where their intervals end."""
    most = 1.1 * max(1.0, *(float(figure) for entry in entries for figure in entry.figures.values()))
    step = next(step for step in (1, 5, 10, 20) if most / step < 7)

    def height_of(top1: float | str) -> float:
        return round(top + HEAD + PLOT * (1 - float(top1) / most), 1)

    models = []
    for row, entry in enumerate(entries):
        aside = 8 * (row - (len(entries) - 1) / 2)
        points = []
        for title, figure in entry.figures.items():
            low, high = map(height_of, entry.intervals[title].split(" to "))
            points.append({"x": places[title] + aside, "y": height_of(figure), "low": low, "high": high})
        colour = COLOURS[row % len(COLOURS)]
        models.append({"name": entry.model, "colour": colour, "y": top + HEAD + 20 * row, "points": points})
    lines = [{"value": value, "y": height_of(value)} for value in range(0, int(most) + 1, step)]
    return {"title": entries[0].data_set, "top": top + 26, "bottom": height_of(0), "lines": lines, "models": models}
