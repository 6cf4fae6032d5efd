"""Pictures as batches for training and scoring: variation, an order that seed and epoch decide, and the loaders.

The order of an epoch is a function of (seed, epoch), the variation of a picture one of (seed, epoch, index). So the
position (epoch, step) is all that a resumed run has to know about its data, for any number of workers.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from arm_zoo.images.decode import UndecodableImage

from .config import BatchPlan, DataConfig, TrainConfig
from .locate import SourceError
from .order import Key, ScoringOrder, training_order
from .sources import Encoded, PictureTable, Source, Split
from .transforms import (
    ERASING,
    VARIATION,
    Normalisation,
    Transform,
    global_generators_restored,
    scoring_transform,
    seed_global_generators,
    training_transform,
    warp,
)
from .undecodable import check_undecodable, name_once
from .workers import WorkerLoader

DAMAGED_IN_A_ROW = 100  # more than chance: a disk is gone, or the files are no pictures
CPU = torch.device("cpu")


class Batch(NamedTuple):
    """Pictures of one forward pass.

    Args:
        pictures: (N, C, H, W), float32, normalised. Between processes they travel in 8 bits where nothing varies them
            after the transform: a quarter of the memory, and the GPU normalises for nothing.
        classes: (N,), class indices.
        indices: (N,), places of the pictures in their split (for streams: in the epoch's order).
        undecodable: A line for every picture that could not be decoded, with its name and the reason. In training
            another picture stands in its place, in scoring it is left out.
    """

    pictures: Tensor
    classes: Tensor
    indices: Tensor
    undecodable: list[str]

    def ready(self, device: torch.device, normalise: Normalisation) -> "Batch":
        """The batch on a device, normalised; copies from pinned memory do not wait."""
        pictures, classes = (tensor.to(device, non_blocking=True) for tensor in (self.pictures, self.classes))
        return self._replace(
            pictures=normalise(pictures) if pictures.dtype == torch.uint8 else pictures, classes=classes
        )


class Pictures:
    """One split as batches of pictures in 8 bits."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self._split, self._transform = split, transform

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Decode a batch; what cannot be decoded is left out."""
        pictures, classes, indices, undecodable = [], [], [], []
        for key, encoded in zip(keys, self._stored(keys), strict=True):
            try:
                image, label, _ = encoded.decode(self._split.mode)
            except UndecodableImage as error:
                undecodable.append(str(error))
                continue
            pictures.append(self._transform(image))
            classes.append(label)
            indices.append(key.index)
        batch = torch.stack(pictures) if pictures else torch.empty(0)
        return Batch(batch, torch.tensor(classes).long(), torch.tensor(indices).long(), undecodable)

    def _stored(self, keys: Sequence[Key]) -> Sequence[Encoded]:
        if isinstance(self._split, PictureTable):
            return self._split.encoded([key.index for key in keys])
        return [key.encoded for key in keys if key.encoded is not None]


class VariedPictures(Pictures):
    """The same with random variation, for training; in place of a picture that cannot be decoded comes the next one.

    The variation of a picture is a function of seed, epoch and index: not of the order, the batch or the worker.
    """

    def __init__(self, source: Source, config: DataConfig, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(source.train, training_transform(config, image_size, source.mean))
        self._normalise = Normalisation(source.mean, source.std, CPU)
        self._seed = seed
        self._affine = config if config.max_shift or config.max_rotation or config.max_zoom else None
        self._erase_probability = config.erase
        self._erase = RandomErasing(probability=1, mode="pixel", device="cpu")

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Decode and vary a batch."""
        pictures, classes, draws, erased = [], [], [], []
        undecodable: list[str] = []
        with global_generators_restored():
            stored = self._stored(keys)
            for position, key in enumerate(keys):
                image, label = self._decoded(stored, position, key, undecodable)
                seed_global_generators(self._seed, key.epoch, VARIATION, key.index)
                pictures.append(self._transform(image))
                classes.append(label)
                draws.append([random.uniform(-1, 1) for _ in range(4)])
                erased.append(random.random() < self._erase_probability)
            batch = torch.stack(pictures)
            if self._affine is not None:
                batch = warp(batch.float().div_(255), torch.tensor(draws), self._affine)
            if self._affine is not None or self._erase_probability:
                batch = self._normalise(batch)
            for key, picture in compress(zip(keys, batch, strict=True), erased):
                seed_global_generators(self._seed, key.epoch, ERASING, key.index)
                self._erase(picture)  # in place
        return Batch(batch, torch.tensor(classes), torch.tensor([key.index for key in keys]), undecodable)

    def _decoded(
        self, stored: Sequence[Encoded], position: int, key: Key, undecodable: list[str]
    ) -> tuple[Image.Image, int]:
        """The picture, or the next one that can be decoded: of the split, or of the batch if it is a stream.

        Raises:
            SourceError: After too many that cannot.
        """
        encoded = stored[position]
        length = len(self._split) if isinstance(self._split, PictureTable) else len(stored)
        for ahead in range(1, min(length, DAMAGED_IN_A_ROW) + 1):
            try:
                image, label, _ = encoded.decode(self._split.mode)
                return image, label
            except UndecodableImage as error:
                undecodable.append(str(error))
            if isinstance(self._split, PictureTable):
                [encoded] = self._split.encoded([(key.index + ahead) % length])
            else:
                encoded = stored[(position + ahead) % length]
        raise SourceError(f"no picture among many in a row can be decoded; the last one: {undecodable[-1]}")


class TrainLoader:
    """This process's share of each global batch of the training pictures, varied as ``config.data`` says.

    The workers go on with the next epoch's pictures at the end of one, so that an epoch starts without waiting.

    Args:
        source: Its training split is read.
        config: Seed, global batch, epochs and data settings.
        plan: Pictures per micro-batch and micro-batches per step.
        image_size: Height and width of the pictures.
        process: Number of this process.
        processes: Number of all.
        device: Where the batches go.
    """

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        plan: BatchPlan,
        image_size: tuple[int, int],
        process: int,
        processes: int,
        device: torch.device,
    ) -> None:
        self._order = training_order(source.train, config, plan, process, processes)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.class_names = source.class_names
        self.pictures = VariedPictures(source, config.data, image_size, config.seed)
        self._loader = WorkerLoader(self.pictures.batch, self._order, config.data.workers, device.type == "cuda")
        self._plan, self._config, self._device = plan, config, device
        self._normalise = Normalisation(source.mean, source.std, device)
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None
        self.undecodable: set[str] = set()  # a line for each damaged picture; the trainer adds the other processes'
        self.seconds_waited = 0.0  # in which training stood still for want of pictures

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of an epoch, from ``first_step`` on.

        Raises:
            SourceError: If this process alone knows of more damaged pictures than ``data.max_undecodable`` allows.
        """
        if self._next != (epoch, first_step):
            self._order.start = (epoch, first_step)
            self._batches = iter(self._loader)
        for step in range(first_step, self.steps_per_epoch):
            started = time.perf_counter()
            batches = [next(self._batches) for _ in range(self._plan.accumulation)]
            self.seconds_waited += time.perf_counter() - started
            self._check(batches)
            self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield [batch.ready(self._device, self._normalise) for batch in batches]

    def _check(self, batches: Sequence[Batch]) -> None:
        name_once((line for batch in batches for line in batch.undecodable), self.undecodable)
        self.check_undecodable()

    def check_undecodable(self) -> None:
        """Stop if there are too many among the training pictures.

        Raises:
            SourceError: If they are more than ``data.max_undecodable`` puts up with.
        """
        check_undecodable(len(self.undecodable), self._order.size, "training", self._config.data.max_undecodable)


def train_loader(
    source: Source,
    config: TrainConfig,
    plan: BatchPlan,
    image_size: tuple[int, int],
    process_index: int,
    num_processes: int,
    device: torch.device,
) -> TrainLoader:
    """The loader of one of several processes; see ``TrainLoader``."""
    return TrainLoader(source, config, plan, image_size, process_index, num_processes, device)


class EvalLoader:
    """Pictures to score, with a model's own evaluation transform; can be iterated again and again.

    What cannot be decoded is logged once; every pass counts it again in its batches.
    """

    def __init__(self, loader: WorkerLoader[Key, Batch], device: torch.device, normalise: Normalisation) -> None:
        self._loader, self._device, self._normalise = loader, device, normalise
        self._named: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            name_once(batch.undecodable, self._named)
            yield batch.ready(self._device, self._normalise)


def eval_loader(
    split: Split,
    data_config: Mapping[str, Any],
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    workers: int = 0,
    device: torch.device = CPU,
) -> EvalLoader:
    """Each picture of a split exactly once over all processes; what cannot be decoded is left out and named.

    Args:
        split: Of a source.
        data_config: ``timm.data.resolve_model_data_config(model)``, with the mean and std of the training.
        batch_size: Pictures per batch; the last one may be smaller.
        process_index: Number of this process.
        num_processes: Number of all.
        workers: Processes that decode; 0: none but this one.
        device: Where the batches go.
    """
    pictures = Pictures(split, scoring_transform(data_config))
    order = ScoringOrder(split, batch_size, process_index, num_processes)
    normalise = Normalisation(data_config["mean"], data_config["std"], device)
    loader = WorkerLoader(pictures.batch, order, workers, device.type == "cuda")
    return EvalLoader(loader, device, normalise)
