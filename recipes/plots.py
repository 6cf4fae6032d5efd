"""The two pictures of a run: its curves, and what the pretraining model predicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws to files: no display is needed
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from arm_zoo import ARMPretrain
from arm_zoo.files import replacing_files

from .data import Batch, eval_loader
from .engine import Metrics
from .errors import RunError
from .sources import PictureTable, Source

COLOURS = ("#0b6fa4", "#d1495b", "#66a182", "#edae49")  # distinct also for colour-blind readers


def plot_curves(file: Path, pretraining: Sequence[Metrics], supervised: Mapping[str, Sequence[Metrics]]) -> None:
    """Draw the pretraining loss and, for each supervised run, held-out top-1 over its epochs.

    Args:
        file: PNG to write.
        pretraining: One row per epoch with ``epoch`` and ``loss``.
        supervised: Name of a run -> its rows; those with ``top1`` are drawn.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] for row in pretraining], [row["loss"] for row in pretraining], color=COLOURS[2], lw=2)
    _label(left, "Pretraining, without labels", "loss (squared error of normalised patches)")
    for colour, (name, history) in zip(COLOURS, supervised.items(), strict=False):
        scored = [row for row in history if "top1" in row]
        line = f"{name}: {scored[-1]['top1']:.1f}%"
        right.plot([row["epoch"] for row in scored], [row["top1"] for row in scored], color=colour, lw=2, label=line)
    _label(right, "Training with labels", "top-1 on held-out pictures (%)")
    right.legend(loc="lower right", title="after the last epoch")
    _save(figure, file)


def plot_run(file: Path, history: Sequence[Metrics]) -> None:
    """Draw the curves of one run: loss, learning rate, and held-out top-1 where there is one.

    Args:
        file: PNG to write.
        history: One row per epoch, as in ``metrics.jsonl``.
    """
    titles = {"loss": "training loss", "lr": "learning rate", "top1": "top-1 on held-out pictures (%)"}
    curves = {key: title for key, title in titles.items() if any(key in row for row in history)}
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        lines = {key: "model", f"{key}_ema": "moving average"}
        for colour, (name, label) in zip(COLOURS, lines.items(), strict=False):
            rows = [row for row in history if name in row]
            if rows:
                axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], color=colour, lw=2, label=label)
        if any(f"{key}_ema" in row for row in history):
            axes.legend()
        _label(axes, title, "")
    _save(figure, file)


def draw_predictions(
    file: Path, model: ARMPretrain, source: Source, inputs: Mapping[str, Any], seed: int, count: int = 8
) -> None:
    """Let a pretraining model continue a few pictures, held-out ones if there are any.

    Args:
        file: PNG to write.
        model: On the CPU.
        source: Where the pictures come from.
        inputs: How they are prepared; see ``export.input_config``.
        seed: They are drawn blindly from it.
        count: How many.

    Raises:
        RunError: If none of them can be decoded.
    """
    split, kind = (source.train, "training") if source.test is None else (source.test, "held-out")
    if isinstance(split, PictureTable):
        batch = prepared_pictures(split, drawn_blindly(len(split), count, seed), inputs)
    else:  # a stream has no places to choose from
        batch = next(iter(eval_loader(split, inputs, count)))
    if len(batch.classes) == 0:
        raise RunError(f"none of the {kind} pictures drawn for {file} can be decoded; the log names them")
    with torch.inference_mode():
        predicted = model.eval().reconstruct(batch.pictures)
    shown = [_as_images(pictures, source) for pictures in (batch.pictures, predicted)]
    names = [source.class_names[label] if source.class_names else "" for label in batch.classes.tolist()]
    plot_predictions(file, *shown, model.config["cluster_size"], names, f"{kind} pictures")


def drawn_blindly(length: int, count: int, seed: int) -> list[int]:
    """Indices of a few pictures."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def prepared_pictures(split: PictureTable, indices: list[int], inputs: Mapping[str, Any]) -> Batch:
    """Pictures of a split as a model takes them."""
    return next(iter(eval_loader(split.select(indices), inputs, len(indices))))


def _as_images(pictures: Tensor, source: Source) -> NDArray:
    """Normalised (N, C, H, W) -> values in 0..1, (N, H, W) where there is one channel, else (N, H, W, C)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))
    images = (pictures * std + mean).movedim(1, -1).numpy()
    return images[..., 0] if images.shape[-1] == 1 else images


def plot_predictions(
    file: Path,
    images: NDArray,
    predictions: NDArray,
    cluster_size: int,
    names: Sequence[str],
    kind: str,
) -> None:
    """Draw pictures, the clusters to predict, and the predicted ones below each other.

    Args:
        file: PNG to write.
        images: (N, H, W) grey or (N, H, W, 3), values in 0..1.
        predictions: The same shape.
        cluster_size: Side of a cluster in pixels; the first one is given, not predicted.
        names: A title for each picture.
        kind: What pictures these are.
    """
    rows = {"picture": (images, False), "target": (images, True), "predicted": (predictions, True)}
    figure = Figure(figsize=(1.3 * len(images) + 0.8, 4.6), layout="constrained")
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for axes_row, (label, (pictures, hide_first)) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label, fontsize=12)
        for axes, picture in zip(axes_row, pictures, strict=True):
            _show(axes, picture, cluster_size, hide_first)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=12)
    figure.suptitle(f"{kind.capitalize()}: each cluster of pixels is predicted from those before it (hatched: given)")
    _save(figure, file)


def _show(axes: Axes, picture: NDArray, cluster_size: int, hide_first: bool) -> None:
    height, width = picture.shape[:2]
    axes.imshow(picture.clip(0, 1), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in range(cluster_size, max(height, width), cluster_size):
        axes.axhline(edge, color=COLOURS[3], lw=1)
        axes.axvline(edge, color=COLOURS[3], lw=1)
    if hide_first:
        axes.add_patch(Rectangle((0, 0), cluster_size, cluster_size, facecolor="0.85", edgecolor="0.5", hatch="///"))


def _label(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing_files(file.parent) as beside:
        figure.savefig(beside / file.name, dpi=140)
