"""One pass over the images of a set: every image once, with any number of processes, for all heads at once."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from eval.scoring.listing import Listing
from eval.scoring.metrics import TOP, rank
from eval.scoring.models import Candidate
from eval.scoring.unfinished import Unfinished

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Heads = Sequence[Sequence[int] | None]  # class subsets to rank, None for all classes
Batch = tuple[list[int], torch.Tensor | None, dict[int, str]]


@dataclass(frozen=True)
class Settings:
    """The settings of a pass."""

    batch_size: int
    workers: int
    dtype: str
    limit: int | None


class Images(Dataset[tuple[int, torch.Tensor | str]]):
    """Images in 8 bits, prepared for the model except for normalisation; the reason instead if one is damaged."""

    def __init__(self, listing: Listing, data_config: dict[str, Any]) -> None:
        self.listing = listing
        self.mode = "RGB" if data_config["input_size"][0] == 3 else "L"
        self.transform = create_transform(**data_config, is_training=False, use_prefetcher=True)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | str]:
        try:
            image = self.listing.decode(index, self.mode)
        except UndecodableImage as error:
            return index, error.cause
        except Exception as error:  # Pillow's errors for damaged images have no common class
            return index, (str(error) or type(error).__name__).splitlines()[0]
        return index, self.transform(image)


def collate(samples: Sequence[tuple[int, torch.Tensor | str]]) -> Batch:
    """The indices and stacked images that could be decoded, and the reasons for those that could not."""
    good = {i: image for i, image in samples if isinstance(image, torch.Tensor)}
    bad = {i: reason for i, reason in samples if isinstance(reason, str)}
    return list(good), torch.stack(list(good.values())) if good else None, bad


def load_batches(
    listing: Listing, data_config: dict[str, Any], batches: Sequence[list[int]], workers: int, pin: bool
) -> Iterable[Batch]:
    """The images of each batch, in order."""
    images, processes = Images(listing, data_config), min(workers, len(batches))
    ahead = 4 if processes else None
    return DataLoader(
        images, batch_sampler=batches, num_workers=processes, collate_fn=collate, pin_memory=pin, prefetch_factor=ahead
    )


def forbid_tf32() -> None:
    """Keep NVIDIA GPUs from rounding inputs to TF32, as they do those of convolutions unless they are told not to.

    From version 2.9 on torch has `fp32_precision`, which wins where a program has set it for everything.
    """
    backends: Any = torch.backends
    backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        for operation in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
            operation.fp32_precision = "ieee"


class Forward:
    """A model on its device, from 8-bit images to logits; it normalises them on the device as timm's loader does."""

    def __init__(self, candidate: Candidate, device: torch.device, dtype: str) -> None:
        if dtype == "fp32":
            forbid_tf32()
        self.model, self.device, self.dtype = candidate.model.to(device), device, DTYPES[dtype]
        scales = ([255 * x for x in candidate.data_config[name]] for name in ("mean", "std"))
        self.mean, self.std = (torch.tensor(scale, device=device).view(1, -1, 1, 1) for scale in scales)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        normalised = images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(normalised)


def record_type(heads: Heads) -> np.dtype:
    """The type of one image's predictions in arrays and files."""
    ranks = [("classes", "<i4", (len(heads), TOP)), ("confidence", "<f4", (len(heads),))]
    return np.dtype([("index", "<i4"), ("undecodable", "<i4"), *ranks])


def cut(count: int, settings: Settings) -> list[list[int]]:
    """Batches of indices: of all images, or of `limit` images at equal distances, so that all classes are there."""
    limit = count if settings.limit is None else min(settings.limit, count)
    indices = [i * count // limit for i in range(limit)]
    return [indices[i : i + settings.batch_size] for i in range(0, limit, settings.batch_size)]


def predict(
    candidate: Candidate, listing: Listing, heads: Heads, settings: Settings, state: PartialState,
    unfinished: Unfinished, kept: np.ndarray,
) -> tuple[np.ndarray, dict[int, str], int, float]:  # fmt: skip
    """Run the model over the images, divided among the processes; every process gets all predictions.

    Batches are cut from the listing and then dealt out, so that their images and logits are the same for any number
    of processes. `kept` are records of an earlier run that died.

    Returns the records of all images in order, the reasons of undecodable ones, the number of records computed now,
    and the seconds that took.
    """
    batches = cut(len(listing), settings)
    done = set(kept["index"].tolist())
    todo = [batch for batch in batches if not done.issuperset(batch)]
    mine = todo[state.process_index :: state.num_processes]
    forward = Forward(candidate, state.device, settings.dtype)
    loader = load_batches(listing, candidate.data_config, mine, settings.workers, state.device.type == "cuda")
    console = Console(stderr=True)
    hidden = not state.is_main_process or not console.is_terminal
    title = escape(f"{candidate.name}, {listing.location}")
    begin = time.perf_counter()
    own, reasons = [kept[:0]], {}
    for batch in track(loader, title, total=len(mine), console=console, disable=hidden):
        own.append(_records(batch, forward, heads))
        unfinished.add(state.process_index, own[-1])
        reasons.update(batch[2])
    gathered = gather_object([(np.concatenate(own), reasons)])
    seconds = time.perf_counter() - begin
    fresh = np.concatenate([records for records, _ in gathered])
    records = np.concatenate([kept[~np.isin(kept["index"], fresh["index"])], fresh])
    records = records[np.argsort(records["index"])]
    indices = list(chain.from_iterable(batches))
    if records["index"].tolist() != indices:
        raise RuntimeError(f"{len(records)} predictions for {len(indices)} images: an image was lost or came twice")
    reasons = {i: reason for _, part in gathered for i, reason in part.items()}
    bad = records["index"][records["undecodable"] == 1].tolist()
    return records, {i: reasons.get(i, "found in the run that died") for i in bad}, len(fresh), seconds


def _records(batch: Batch, forward: Forward, heads: Heads) -> np.ndarray:
    indices, images, bad = batch
    records = np.zeros(len(indices) + len(bad), record_type(heads))
    records["index"] = [*indices, *bad]
    records["undecodable"][len(indices) :] = 1
    good = records[: len(indices)]
    if images is not None:
        logits = forward(images)
        for h, subset in enumerate(heads):
            good["classes"][:, h], good["confidence"][:, h] = rank(logits, subset)
    return records
