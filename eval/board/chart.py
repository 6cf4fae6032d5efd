"""The README's chart: how fast one of our models is, compared with a ViT of its size, at growing image sizes."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

MODEL, PEER = "arm_base_patch16_224", "vit_base_patch16_224"
WIDTH, HEIGHT, MARGIN = 700, 240, 50  # pixels of the plot and what is left around it


def speed_chart(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """What the template chart.svg draws: the device, and for each image size the two models' ratio and its place.

    Args:
        rows: of `python -m eval.throughput`; of compiled inference, those of the device that was used last count, and
            of a size the largest batch of which both models were timed in one run, and of it the last one.
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
