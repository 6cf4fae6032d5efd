"""The features of a data set: they are extracted once, by one process or several, and kept on the disk."""

import hashlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from rich.progress import track
from torch import Tensor, nn

from arm_zoo.files import sha256_of_tensors
from arm_zoo.images.tables import Encoded, ImageTable
from arm_zoo.images.tars import Member
from recipes.data.batches import Batch
from recipes.data.finishing import taken_ahead
from recipes.data.loader import ScoringLoader
from recipes.data.sampling import Key, ScoringOrder
from recipes.data.source import Split
from recipes.data.sources import tell
from recipes.data.undecodable import check_undecodable, name_once
from recipes.errors import RunError
from recipes.probing.config import ProbeConfig
from recipes.probing.outputs import FEATURES, PATCHES, outputs, shapes
from recipes.probing.replayed import Replayed
from recipes.probing.scores import Features
from recipes.probing.store import Store

LISTED_AT_ONCE = 1000  # rows of a table


class Extracted(NamedTuple):
    """The features of one split."""

    arrays: dict[str, Tensor]  # (N, ...), in memory or on the disk, see `outputs`
    classes: Tensor  # (N,)
    rows: Tensor | None  # the images that could be decoded; None: all
    skipped: int  # number of images that could not
    width: int  # width of one block's features
    purpose: str  # a word for the split in messages

    @property
    def images(self) -> int:
        """The number of images that could be decoded."""
        return len(self.classes if self.rows is None else self.rows)

    @property
    def names(self) -> list[str]:
        """The names of the features that `of` can give."""
        return [name for name, (array, _) in FEATURES.items() if array in self.arrays]

    def of(self, name: str) -> Features:
        """Features by name, a key of FEATURES or PATCHES; RunError if some are not finite numbers."""
        array, whole = FEATURES.get(name, (name, True))
        values, classes = self.arrays[array], self.classes
        if self.rows is not None:
            values, classes = values[self.rows], classes[self.rows]
        values = values if whole else values[:, : self.width]
        if broken := sum(int((~part.flatten(1).isfinite()).any(dim=1).sum()) for part in values.split(LISTED_AT_ONCE)):
            images = f"{broken} of {len(values)} {self.purpose} images"
            raise RunError(f"the model's features of {images} are not finite numbers")
        return Features(values, classes)


def extract(extractor: "Extractor", split: Split, purpose: str) -> Extracted:
    """Extract the features of every image that can be decoded, without augmentation, unless the cache has them.

    All processes must call this. A stream, whose images cannot be listed, is read by every process and not cached.
    """
    config = extractor.config
    if not isinstance(split, ImageTable):
        arrays, classes, skipped = gathered(extractor(split, ScoringOrder(split, config.batch, 0, 1), purpose))
        images, rows_kept = len(classes) + skipped, None
    else:
        listing, classes = listed(split)
        made_of = {**extractor.identity, "listing_sha256": listing}
        store = Store(Path(config.cache), made_of, len(split), extractor.rows)
        state, missing = PartialState(), store.missing()
        batches = [range(start, min(start + config.batch, len(split))) for start in range(0, len(split), config.batch)]
        own = batches[state.process_index :: state.num_processes]
        todo = [[Key(0, place) for place in batch] for batch in own if missing[batch].any()]
        written = list[tuple[float, int]]()
        for batch, values in extractor(split, todo, purpose):
            if values:
                store.write(batch.indices, values)
            written.append((time.perf_counter(), len(batch.classes)))
        if speed := steady_speed(written):
            tell(f"features of the {purpose} images: {speed:,.0f} images a second in this process")
        state.wait_for_everyone()
        arrays, missing = store.tensors(), store.missing()
        images, skipped = len(classes), int(missing.sum())
        rows_kept = torch.from_numpy(~missing).nonzero()[:, 0] if skipped else None
    check_undecodable(skipped, images, purpose, config.data.max_undecodable)
    return Extracted(arrays, classes, rows_kept, skipped, extractor.width, purpose)


def steady_speed(written: Sequence[tuple[float, int]]) -> float | None:
    """Images per second over the second half of the batches, each (time, images); None for fewer than four batches.

    During the first half, kernels are compiled while images are loaded in advance.
    """
    if len(written) < 4:
        return None
    (start, _), *counted = written[len(written) // 2 :]
    return sum(images for _, images in counted) / (counted[-1][0] - start)


class Extractor:
    """Extracts features from the images of any split by a model."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], config: ProbeConfig, names: Sequence[str]) -> None:
        self._model, self._inputs, self.config = model, inputs, config
        self._device = next(model.parameters()).device
        self._half = self._device.type == "cuda"
        self._loader = ScoringLoader(inputs, config.data, self._device)
        found = shapes(model, inputs["input_size"])
        self.rows = {name: found[name] for name in names}  # name of each array -> shape of one image's row
        self.width = found.get(PATCHES, found["pooled"])[-1]  # width of one block's features

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the features besides the images."""
        model: Any = self._model
        return {
            "model": getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__,
            "pooling": getattr(model, "global_pool", None),
            "model_args": self.config.model_args,
            "structure_sha256": hashlib.sha256(repr(model).encode()).hexdigest(),
            "weights_sha256": sha256_of_tensors(model.state_dict()),
            "preprocessing": {name: self._inputs[name] for name in sorted(self._inputs)},
            "decoded_on": self._loader.decoded_on,
            "precision": "bf16" if self._half else "fp32",
        }

    @torch.inference_mode()
    def __call__(
        self, split: Split, order: Iterable[list[Key]], purpose: str
    ) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Give each batch, without the images that cannot be decoded, and its features in float32.

        A batch without images has no features. A GPU works on the next batch while the caller has this one.
        """
        hidden, named = not (sys.stdout.isatty() and PartialState().is_main_process), set[str]()
        total = len(order) if isinstance(order, list) else None
        title = f"features of the {purpose} images"
        batches = track(self._loader.batches(split, order), title, total, transient=True, disable=hidden)
        forward = Replayed(self._features)  # whose memory is free again at the end
        for batch, values, made in taken_ahead((batch, *self._begin(batch, forward)) for batch in batches):
            name_once(batch.undecodable, named)
            if made is not None:
                made.synchronize()
            yield batch, values

    def _begin(self, batch: Batch, forward: Replayed) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Begin to extract features into the CPU's memory; the event says when a GPU has done it."""
        if len(batch.classes) == 0:
            return {}, None
        values = {name: values.to("cpu", non_blocking=True) for name, values in forward(batch.images).items()}
        return values, torch.cuda.current_stream(self._device).record_event() if self._half else None

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            made = outputs(self._model, images, self.rows)
        return {name: values.float() for name, values in made.items()}


def gathered(batches: Iterable[tuple[Batch, dict[str, Tensor]]]) -> tuple[dict[str, Tensor], Tensor, int]:
    """The features and classes of all batches of a stream, and how many images could not be decoded."""
    arrays, classes, skipped = defaultdict[str, list[Tensor]](list), [torch.empty(0, dtype=torch.long)], 0
    for batch, values in batches:
        skipped += len(batch.undecodable)
        classes.append(batch.classes.cpu())
        for name, part in values.items():
            arrays[name].append(part.clone())  # not in the memory that is pinned for copies from a GPU
    return {name: torch.cat(parts) for name, parts in arrays.items()}, torch.cat(classes), skipped


def listed(table: ImageTable) -> tuple[str, Tensor]:
    """A SHA-256 that tells sets of images apart without decoding them, and the classes of the images, (N,).

    It covers names, classes, and the size and time of each file, or the bytes of images in parquet files and the like.
    """
    digest, classes = hashlib.sha256(), list[int]()
    for start in range(0, len(table), LISTED_AT_ONCE):
        for image in table.encoded(range(start, min(start + LISTED_AT_ONCE, len(table)))):
            digest.update(repr((image.name, image.label, image.max_pixels, mark(image))).encode())
            classes.append(image.label)
    return digest.hexdigest(), torch.tensor(classes)


def mark(image: Encoded) -> object:
    """A value that changes if an image is replaced by another one of the same name."""
    if isinstance(image.data, bytes):
        return hashlib.sha256(image.data).hexdigest()
    file = image.data.tar if isinstance(image.data, Member) else image.data
    if file is None or not os.path.exists(file):
        return None
    place = (image.data.offset, image.data.size) if isinstance(image.data, Member) else ()
    stat = os.stat(file)
    return (stat.st_size, stat.st_mtime_ns, *place)
