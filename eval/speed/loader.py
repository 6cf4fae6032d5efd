"""Where the time of scoring goes: images per second of the loader alone, of the model alone, and of both."""

from collections.abc import Sequence

from accelerate import PartialState
from rich.table import Table

from eval.scoring.listing import Listing
from eval.scoring.metrics import rank
from eval.scoring.models import Candidate
from eval.scoring.predict import Forward, Settings, cut, load_batches
from eval.speed.timing import timed
from eval.tables import text_table


def measure(candidate: Candidate, listing: Listing, settings: Settings, state: PartialState) -> list[str]:
    """Time three passes over the images: a row of the table. The start of the loader's processes counts."""
    batches = cut(len(listing), settings)
    pin, config = state.device.type == "cuda", candidate.data_config
    forward = Forward(candidate, state.device, settings.dtype)
    example = None
    with timed(state.device) as loader:
        for _, images, _ in load_batches(listing, config, batches, settings.workers, pin):
            example = images if example is None else example
    if example is None:
        raise ValueError(f"no image of {listing.location} can be decoded")
    example = example.to(state.device)
    rank(forward(example))  # the first call is slower than the others
    with timed(state.device) as model:
        for batch in batches:
            rank(forward(example[: len(batch)]))
    with timed(state.device) as both:
        for _, images, _ in load_batches(listing, config, batches, settings.workers, pin):
            if images is not None:
                rank(forward(images))
    count = sum(map(len, batches))
    speeds = (f"{count / seconds():,.1f}" for seconds in (loader, model, both))
    return [candidate.name, listing.location, f"{count:,}", *speeds]


def as_table(rows: Sequence[Sequence[str]], settings: Settings) -> Table:
    title = f"images per second, batch {settings.batch_size}, {settings.dtype}, {settings.workers} workers"
    return text_table(title, ["model", "images at"], ["images", "loader alone", "model alone", "both"], rows)
