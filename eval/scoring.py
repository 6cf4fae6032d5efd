"""One pass over the pictures of a set: every picture once, whatever the number of processes, for all heads at once."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from arm_zoo.images.decode import UndecodableImage
from eval.listing import Listing
from eval.metrics import TOP, Ranks, rank
from eval.models import Candidate
from eval.results import Unfinished

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORED, UNDECODABLE = 0, 1

Heads = Sequence[Sequence[int] | None]
Batch = tuple[list[int], torch.Tensor | None, dict[int, str]]


@dataclass(frozen=True)
class Settings:
    """How pictures go through a model."""

    batch_size: int
    workers: int
    dtype: str
    limit: int | None


@dataclass
class Predictions:
    """What a model said of the pictures of a set, in their order."""

    indices: np.ndarray
    heads: list[Ranks]
    undecodable: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    computed: int = 0


class Pictures(Dataset[tuple[int, torch.Tensor | str]]):
    """Pictures as the model takes them but for normalisation, in 8 bits; the reason instead where one is damaged.

    ImageNet's sets are decoded as timm.data.ImageDataset does, custom ones as in training; resize and crop are the
    model's own, which the recipes validate with too.
    """

    def __init__(self, listing: Listing, data_config: dict[str, Any]) -> None:
        self.listing = listing
        self.mode = "RGB" if data_config["input_size"][0] == 3 else "L"
        self.transform = create_transform(**data_config, is_training=False, use_prefetcher=True)

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str]:
        try:
            image = self.listing.decode(index, self.mode)
        except UndecodableImage as error:
            return index, error.cause
        except Exception as error:  # from damaged pictures Pillow raises all sorts: OSError, SyntaxError, ...
            return index, (str(error) or type(error).__name__).splitlines()[0]
        return index, self.transform(image)


def collate(samples: Sequence[tuple[int, torch.Tensor | str]]) -> Batch:
    """Indices and stacked pictures of those that could be decoded; reasons for those that could not."""
    good = [(i, picture) for i, picture in samples if isinstance(picture, torch.Tensor)]
    bad = {i: reason for i, reason in samples if isinstance(reason, str)}
    return [i for i, _ in good], torch.stack([picture for _, picture in good]) if good else None, bad


def load_batches(
    listing: Listing, data_config: dict[str, Any], batches: Sequence[list[int]], workers: int, pin: bool
) -> Iterator[Batch]:
    """The pictures of each batch, in order."""
    return iter(
        DataLoader(
            Pictures(listing, data_config),
            batch_sampler=batches,
            num_workers=min(workers, len(batches)),
            collate_fn=collate,
            pin_memory=pin,
            prefetch_factor=4 if workers and batches else None,
        )
    )


class Forward:
    """A model on its device: 8-bit pictures in, logits out. Normalises as timm's loader does, on the device."""

    def __init__(self, candidate: Candidate, device: torch.device, dtype: str) -> None:
        if dtype == "fp32":  # else NVIDIA GPUs round the factors of convolutions to TF32
            torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
        self.model = candidate.model.to(device)
        self.device = device
        self.dtype = DTYPES[dtype]
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor([255 * x for x in candidate.data_config["mean"]], device=device).view(shape)
        self.std = torch.tensor([255 * x for x in candidate.data_config["std"]], device=device).view(shape)

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        images = pictures.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits: torch.Tensor = self.model(images)
        return logits


def record_type(heads: int) -> np.dtype:
    """Of one picture's predictions in arrays and files."""
    return np.dtype(
        [("index", "<i4"), ("status", "<i4"), ("classes", "<i4", (heads, TOP)), ("confidence", "<f4", (heads,))]
    )


def cut(count: int, settings: Settings) -> list[list[int]]:
    """Batches of indices: of all pictures, or of `limit` at equal distances, so that all classes have their share."""
    limit = count if settings.limit is None else min(settings.limit, count)
    indices = [i * count // limit for i in range(limit)]
    return [indices[i : i + settings.batch_size] for i in range(0, limit, settings.batch_size)]


def predict(
    candidate: Candidate,
    listing: Listing,
    heads: Heads,
    settings: Settings,
    state: PartialState,
    unfinished: Unfinished,
    kept: np.ndarray,
) -> Predictions:
    """Run the model over the pictures, shared among the processes; every process gets all predictions.

    Batches are cut from the one order of the listing and then dealt out, so that each has the same pictures
    whatever the number of processes, and so do its logits.

    Args:
        heads: class subsets to rank, None for all classes.
        kept: records of an earlier run that died, of whole batches or parts of them.
    """
    batches = cut(len(listing), settings)
    done = set(kept["index"].tolist())
    todo = [batch for batch in batches if not done.issuperset(batch)]
    mine = todo[state.process_index :: state.num_processes]
    forward = Forward(candidate, state.device, settings.dtype)
    loader = load_batches(listing, candidate.data_config, mine, settings.workers, state.device.type == "cuda")
    begin = time.perf_counter()
    own, reasons = [], {}
    for batch in _shown(loader, len(mine), state, f"{candidate.name}, {listing.location}"):
        records = _records(batch, forward, heads)
        unfinished.add(state.process_index, records)
        own.append(records)
        reasons.update(batch[2])
    gathered = gather_object([(np.concatenate([np.zeros(0, record_type(len(heads))), *own]), reasons)])
    seconds = time.perf_counter() - begin
    fresh = np.concatenate([records for records, _ in gathered])
    records = np.concatenate([kept[~np.isin(kept["index"], fresh["index"])], fresh])
    records = records[np.argsort(records["index"])]
    indices = list(chain.from_iterable(batches))
    if records["index"].tolist() != indices:
        raise RuntimeError(f"{len(records)} predictions for {len(indices)} pictures: a picture was lost or came twice")
    reasons = {i: reason for _, part in gathered for i, reason in part.items()}
    return _of_records(records, reasons, seconds, len(fresh))


def _shown(batches: Iterator[Batch], count: int, state: PartialState, title: str) -> Iterator[Batch]:
    console = Console(stderr=True)
    hidden = not state.is_main_process or not console.is_terminal
    yield from track(batches, escape(title), total=count, console=console, disable=hidden)


def _records(batch: Batch, forward: Forward, heads: Heads) -> np.ndarray:
    indices, pictures, bad = batch
    records = np.zeros(len(indices) + len(bad), record_type(len(heads)))
    records["index"] = [*indices, *bad]
    records["status"][len(indices) :] = UNDECODABLE
    if pictures is not None:
        logits = forward(pictures)
        for h, subset in enumerate(heads):
            ranks = rank(logits, subset)
            records["classes"][: len(indices), h] = ranks.classes
            records["confidence"][: len(indices), h] = ranks.confidence
    return records


def _of_records(records: np.ndarray, reasons: dict[int, str], seconds: float, computed: int) -> Predictions:
    good = records[records["status"] == SCORED]
    bad = records["index"][records["status"] == UNDECODABLE].tolist()
    heads = [Ranks(good["classes"][:, h], good["confidence"][:, h]) for h in range(records["classes"].shape[1])]
    undecodable = {i: reasons.get(i, "found in the run that died") for i in bad}
    return Predictions(good["index"], heads, undecodable, seconds, computed)
