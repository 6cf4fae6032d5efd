"""Where the time of scoring goes: pictures per second of the loader alone, of the model alone, and of both."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import PartialState
from rich.box import SIMPLE_HEAD
from rich.table import Table

from eval.listing import Listing
from eval.metrics import rank
from eval.models import Candidate
from eval.scoring import Forward, Settings, cut, load_batches


@dataclass(frozen=True)
class Speed:
    """Pictures per second over `pictures` pictures; starting the loader's processes is part of the time."""

    model: str
    location: str
    pictures: int
    loader: float
    forward: float
    both: float


@contextmanager
def _clock(device: torch.device) -> Iterator[list[float]]:
    """Appends the seconds of the block to the list, work that a GPU still has to do included."""
    seconds: list[float] = []
    begin = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - begin)


def measure(candidate: Candidate, listing: Listing, settings: Settings, state: PartialState) -> Speed:
    """Three passes over the pictures; for the model alone they lie in memory as one batch, taken again and again."""
    batches = cut(len(listing), settings)
    pin = state.device.type == "cuda"
    forward = Forward(candidate, state.device, settings.dtype)
    example = None
    with _clock(state.device) as loader:
        for _, pictures, _ in load_batches(listing, candidate.data_config, batches, settings.workers, pin):
            example = pictures if example is None else example
    if example is None:
        raise ValueError(f"no picture of {listing.location} can be decoded")
    example = example.to(state.device)
    rank(forward(example))  # the first call is slower than the others
    with _clock(state.device) as model:
        for batch in batches:
            rank(forward(example[: len(batch)]))
    with _clock(state.device) as both:
        for _, pictures, _ in load_batches(listing, candidate.data_config, batches, settings.workers, pin):
            if pictures is not None:
                rank(forward(pictures))
    count = sum(map(len, batches))
    return Speed(candidate.name, listing.location, count, count / loader[0], count / model[0], count / both[0])


def as_table(speeds: Sequence[Speed], settings: Settings) -> Table:
    table = Table(
        title=f"images per second, batch {settings.batch_size}, {settings.dtype}, {settings.workers} workers",
        box=SIMPLE_HEAD,
    )
    for title in ("model", "pictures at"):
        table.add_column(title, overflow="fold")
    for title in ("pictures", "loader alone", "model alone", "both"):
        table.add_column(title, justify="right")
    for speed in speeds:
        figures = (f"{value:,.1f}" for value in (speed.loader, speed.forward, speed.both))
        table.add_row(speed.model, speed.location, f"{speed.pictures:,}", *figures)
    return table
