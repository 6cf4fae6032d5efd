"""The figures: curves of a run, scores with intervals, and what a pretraining model predicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws to files: no display is needed
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from arm_zoo.files import replacing_files
from arm_zoo.images.tables import ImageTable
from recipes.data.batches import Batch
from recipes.data.loader import EvalLoader
from recipes.data.source import Source
from recipes.errors import RunError
from recipes.training.checkpoint import Metrics
from recipes.training.ema import FIGURES

IMAGES_DRAWN = 8
COLOURS = ("#0b6fa4", "#d1495b", "#66a182", "#edae49")  # distinct also for colour-blind readers
Curves = Mapping[str, tuple[Sequence[Metrics], str]]  # label -> rows of figures by epoch, and which figure to draw
LOSS, TOP1 = "training loss", "top-1 on validation images (%)"


def plot_run(file: Path, history: Sequence[Metrics]) -> None:
    """Draw loss, learning rate and, where there is one, top-1 of a run; `history` is `metrics.jsonl`."""
    scores = zip(("model", "moving average"), FIGURES.values(), strict=True)
    found = {label: (history, key) for label, key in scores if any(key in row for row in history)}
    panels: dict[str, Curves] = {LOSS: {"": (history, "loss")}, "learning rate": {"": (history, "lr")}}
    plot_curves(file, panels | ({TOP1: found} if found else {}))


def plot_curves(file: Path, panels: Mapping[str, Curves]) -> None:
    """Draw curves over epochs into a PNG file, with a panel for each title."""
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for colour, (label, (history, key)) in zip(COLOURS, curves.items(), strict=False):
            rows = [row for row in history if key in row]
            axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], color=colour, lw=2, label=label)
        if len(curves) > 1:
            axes.legend()
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def plot_intervals(
    file: Path, title: str, rows: Sequence[str], scores: Mapping[str, Sequence[tuple[float | None, float | None]]]
) -> None:
    """Draw scores (mean, half width of the interval) of each row into a PNG file, with a panel for each source.

    What has no interval, such as a single run, gets a hollow mark, as it would look exact beside the others.
    """
    figure = Figure(figsize=(4 + 3.5 * len(scores), 1.4 + 0.4 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for axes, colour, (source, found) in zip(panels, COLOURS, scores.items(), strict=False):
        for place, (mean, half) in enumerate(found):
            if mean is not None:
                inside = "white" if half is None else colour
                axes.errorbar(mean, place, xerr=half, fmt="o", color=colour, markerfacecolor=inside, capsize=4)
        axes.set(title=source, xlabel="top-1 (%)", ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\nmeans with 95% intervals; hollow: one run, no interval")
    _save(figure, file)


def plot_bars(file: Path, title: str, scores: Mapping[str, Sequence[float]]) -> None:
    """Draw the mean of each row's scores as a bar and each score as a dot, into a PNG file; the colours take turns."""
    figure = Figure(figsize=(9, 1.4 + 0.5 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for place, found in enumerate(scores.values()):
        mean, colour = sum(found) / len(found), COLOURS[place % 2]
        axes.barh(place, mean, color=colour, alpha=0.6)
        axes.plot(found, [place] * len(found), "o", color=colour, markeredgecolor="white")
        axes.text(0.01 * mean, place, f" {mean:.1f}%", va="center", weight="bold")
    axes.set(title=title, xlabel="top-1 (%); a dot is one seed")
    axes.set_yticks(range(len(scores)), scores)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def draw_predictions(
    file: Path,
    model: Any,
    source: Source,
    inputs: Mapping[str, Any],
    seed: int,
    unit: tuple[int, int],
    said: str,
) -> None:
    """Draw images, from the validation split if there is one, beside what the model predicts.

    The images are chosen at random from the seed and prepared as `export.input_config` says. The model, whose
    `reconstruct` predicts, is on the CPU. It predicts in units of `unit` rows and columns of pixels; those that its
    `shown` names, from which the prediction starts, are hatched. `said` is the explanation above the figure.
    """
    split, kind = (source.train, "training") if source.test is None else (source.test, "validation")
    if isinstance(split, ImageTable):
        _, batch = drawn_blindly(split, IMAGES_DRAWN, seed, inputs)
    else:  # from a stream only the first images can be taken
        batch = next(iter(EvalLoader(split, inputs, IMAGES_DRAWN)))
    if len(batch.classes) == 0:
        raise RunError(f"none of the {kind} images drawn for {file} can be decoded; the log names them")
    with torch.inference_mode():
        both = batch.images, model.eval().reconstruct(batch.images)
        images, predicted = (source.in_unit_range(pixels).movedim(1, -1).numpy() for pixels in both)
    (count, height, width, _), (rows, columns) = images.shape, unit
    figure = Figure(figsize=(1.3 * count + 0.8, 4.6), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    rows_shown = {"image": images, "target": images, "predicted": predicted}
    numbers = model.shown(batch.images).tolist()
    for axes_row, (label, shown) in zip(grid, rows_shown.items(), strict=True):
        axes_row[0].set_ylabel(label, fontsize=12)
        for axes, image, hatched in zip(axes_row, shown, numbers, strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
            axes.hlines(range(rows, height, rows), 0, width, color=COLOURS[3], lw=1)
            axes.vlines(range(columns, width, columns), 0, height, color=COLOURS[3], lw=1)
            for number in hatched if label != "image" else ():
                row, column = divmod(number, width // columns)
                place = (column * columns, row * rows)
                axes.add_patch(Rectangle(place, columns, rows, facecolor="0.85", edgecolor="0.5", hatch="///"))
    for axes, label in zip(grid[0], batch.classes.tolist(), strict=True):
        axes.set_title(source.class_names[label] if source.class_names else "", fontsize=12)
    figure.suptitle(f"{kind.capitalize()} images: {said}")
    _save(figure, file)


def drawn_blindly(split: ImageTable, count: int, seed: int, inputs: Mapping[str, Any]) -> tuple[list[int], Batch]:
    """The indices of `count` images chosen at random, and these images as a model takes them."""
    indices = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return indices, next(iter(EvalLoader(split.select(indices), inputs, count)))


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing_files(file.parent) as beside:
        figure.savefig(beside / file.name, dpi=140)
