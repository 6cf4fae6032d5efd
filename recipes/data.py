"""Pictures as batches for training and scoring: variation, an order that seed and epoch decide, and the loaders.

The order of an epoch is a function of (seed, epoch), the variation of a picture one of (seed, epoch, index). So the
position (epoch, step) is all that a resumed run has to know about its data, for any number of workers.
"""

import logging
import random
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress, islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import BatchPlan, DataConfig, TrainConfig
from .locate import SourceError
from .pictures import UndecodablePicture
from .sources import Encoded, PictureTable, Source, Split
from .transforms import (
    Transform,
    global_generators_restored,
    scoring_transform,
    seed_global_generators,
    seed_of,
    seeded_generator,
    training_transform,
    warp,
)

ORDER, VARIATION, ERASING = range(3)  # purposes of random streams
CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Pictures of one forward pass.

    Args:
        pictures: (N, C, H, W), float32, normalised.
        classes: (N,), class indices.
        indices: (N,), places of the pictures in their split (for streams: in the epoch's order).
        undecodable: A line for every picture that could not be decoded, with its name and the reason. In training
            another picture stands in its place, in scoring it is left out.
    """

    pictures: Tensor
    classes: Tensor
    indices: Tensor
    undecodable: list[str]

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; copies from pinned memory do not wait."""
        pictures, classes = (tensor.to(device, non_blocking=True) for tensor in (self.pictures, self.classes))
        return self._replace(pictures=pictures, classes=classes)


class Key(NamedTuple):
    """What a worker gets told of a picture: where it stands, and for streams the picture itself."""

    epoch: int
    index: int
    encoded: Encoded | None = None


class Pictures(Dataset[Batch]):
    """One split as batches of normalised pictures: ``dataset.__getitems__(keys)``."""

    def __init__(self, split: Split, transform: Transform, mean: Sequence[float], std: Sequence[float]) -> None:
        self._split, self._transform = split, transform
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Decode a batch; what cannot be decoded is left out."""
        pictures, classes, indices, undecodable = [], [], [], []
        for key, encoded in zip(keys, self._stored(keys), strict=True):
            try:
                image, label, _ = encoded.decode(self._split.mode)
            except UndecodablePicture as error:
                undecodable.append(str(error))
                continue
            pictures.append(self._transform(image))
            classes.append(label)
            indices.append(key.index)
        batch = self._normalised(self._scaled(pictures)) if pictures else torch.empty(0)
        return Batch(batch, torch.tensor(classes).long(), torch.tensor(indices).long(), undecodable)

    def _stored(self, keys: Sequence[Key]) -> Sequence[Encoded]:
        if isinstance(self._split, PictureTable):
            return self._split.encoded([key.index for key in keys])
        return [key.encoded for key in keys if key.encoded is not None]

    @staticmethod
    def _scaled(pictures: Sequence[Tensor]) -> Tensor:
        """One tensor (N, C, H, W) with values in 0..1."""
        return torch.stack(list(pictures)).float().div_(255)

    def _normalised(self, batch: Tensor) -> Tensor:
        return batch.sub_(self._mean).div_(self._std)


class VariedPictures(Pictures):
    """The same with random variation, for training; in place of a picture that cannot be decoded comes the next one.

    The variation of a picture is a function of seed, epoch and index: not of the order, the batch or the worker.
    """

    def __init__(self, source: Source, config: DataConfig, image_size: tuple[int, int], seed: int) -> None:
        transform = training_transform(config, image_size, source.mean)
        super().__init__(source.train, transform, source.mean, source.std)
        self._seed = seed
        self._affine = config if config.max_shift or config.max_rotation or config.max_zoom else None
        self._erase_probability = config.erase
        self._erase = RandomErasing(probability=1, mode="pixel", device="cpu")

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Decode and vary a batch."""
        pictures, classes, draws, erased, undecodable = [], [], [], [], []
        with global_generators_restored():
            stored = self._stored(keys)
            for position, key in enumerate(keys):
                image, label = self._decoded(stored, position, key, undecodable)
                seed_global_generators(self._seed, key.epoch, key.index, VARIATION)
                pictures.append(self._transform(image))
                classes.append(label)
                draws.append([random.uniform(-1, 1) for _ in range(4)])
                erased.append(random.random() < self._erase_probability)
            batch = self._scaled(pictures)
            if self._affine is not None:
                batch = warp(batch, torch.tensor(draws), self._affine)
            batch = self._normalised(batch)
            for key, picture in compress(zip(keys, batch, strict=True), erased):
                seed_global_generators(self._seed, key.epoch, key.index, ERASING)
                self._erase(picture)  # in place
        return Batch(batch, torch.tensor(classes), torch.tensor([key.index for key in keys]), undecodable)

    def _decoded(
        self, stored: Sequence[Encoded], position: int, key: Key, undecodable: list[str]
    ) -> tuple[Image.Image, int]:
        """The picture, or the next one that can be decoded: of the split, or of the batch if it is a stream."""
        encoded = stored[position]
        length = len(self._split) if isinstance(self._split, PictureTable) else len(stored)
        for ahead in range(1, length + 1):
            try:
                image, label, _ = encoded.decode(self._split.mode)
                return image, label
            except UndecodablePicture as error:
                undecodable.append(str(error))
            if isinstance(self._split, PictureTable):
                [encoded] = self._split.encoded([(key.index + ahead) % length])
            else:
                encoded = stored[(position + ahead) % length]
        raise SourceError(f"none of {length} pictures can be decoded; the last one: {undecodable[-1]}")


def mixed(stream: Iterable[Encoded], buffer_size: int, generator: random.Random) -> Iterator[Encoded]:
    """The stream in an order that is random within about ``buffer_size`` places."""
    buffer: list[Encoded] = []
    for encoded in stream:
        if len(buffer) < buffer_size:
            buffer.append(encoded)
            continue
        place = generator.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = encoded
    generator.shuffle(buffer)
    yield from buffer


class TrainingOrder(Sampler[list[Key]]):
    """Keys of this process's micro-batches from ``start`` = (epoch, step) to the end of training.

    A global batch is the same for any number of processes and accumulation steps, and its pictures i and B - 1 - i
    always stand at mirrored places of one micro-batch: mixup, which mixes a micro-batch with its reverse, then mixes
    the same pictures. An incomplete last batch is left out.

    Every process reads the whole of a stream and keeps its own pictures: slower than a table where there are many
    processes, but each picture comes exactly once per epoch whatever the number of files, processes and workers.
    """

    def __init__(self, split: Split, config: TrainConfig, plan: BatchPlan, process: int, processes: int) -> None:
        size = len(split) if isinstance(split, PictureTable) else split.size
        if size is None:
            raise SourceError("the training stream does not tell its size; type data.train_size=PICTURES")
        if config.global_batch > size:
            raise SourceError(f"global_batch is {config.global_batch}; allowed: up to the {size} training pictures")
        if config.global_batch != processes * plan.accumulation * plan.per_device or plan.per_device % 2:
            raise ValueError(f"{plan} on {processes} processes is no global batch of {config.global_batch} in pairs")
        self._split, self._config, self._plan, self._process = split, config, plan, process
        self.size = size
        self.steps_per_epoch = size // config.global_batch
        self.start = (0, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, max(self._config.epochs, first_epoch + 1)):
            for batch in self._global_batches(epoch, first_step if epoch == first_epoch else 0):
                yield from self._dealt(batch)

    def _dealt(self, batch: list[Key]) -> Iterator[list[Key]]:
        half = self._plan.per_device // 2
        for number in range(self._plan.accumulation):
            first = (self._process * self._plan.accumulation + number) * half
            end = len(batch) - first
            yield batch[first : first + half] + batch[end - half : end]

    def _global_batches(self, epoch: int, first_step: int) -> Iterator[list[Key]]:
        size = self._config.global_batch
        keys = self._keys(epoch)
        skipped = sum(1 for _ in islice(keys, first_step * size))
        for step in range(skipped // size, self.steps_per_epoch):
            batch = list(islice(keys, size))
            if len(batch) < size:
                read = step * size + len(batch)
                raise SourceError(
                    f"data.train_size is {self.size}, but the training stream ended after {read} pictures"
                )
            yield batch

    def _keys(self, epoch: int) -> Iterator[Key]:
        if isinstance(self._split, PictureTable):
            order = torch.randperm(self.size, generator=seeded_generator(self._config.seed, epoch, ORDER))
            return (Key(epoch, index) for index in order.tolist())
        generator = random.Random(seed_of(self._config.seed, epoch, ORDER))
        shards = generator.sample(range(self._split.num_shards), self._split.num_shards)
        stream = mixed(self._split.encoded(shards), self._config.data.shuffle_buffer, generator)
        return (Key(epoch, index, encoded) for index, encoded in enumerate(stream))


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
        self._order = TrainingOrder(source.train, config, plan, process, processes)
        self.steps_per_epoch = self._order.steps_per_epoch
        pictures = VariedPictures(source, config.data, image_size, config.seed)
        self._loader = batch_loader(pictures, self._order, config.data.workers, device)
        self._plan, self._config, self._processes, self._device = plan, config, processes, device
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None
        self._seen = 0
        self.undecodable: set[str] = set()
        self.seconds_waited = 0.0  # in which training stood still for want of pictures

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of an epoch, from ``first_step`` on.

        Raises:
            SourceError: If more pictures cannot be decoded than ``data.max_undecodable`` puts up with.
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
            yield [batch.to(self._device) for batch in batches]

    def _check(self, batches: Sequence[Batch]) -> None:
        """Log each damaged picture once; stop if there are too many among the pictures seen so far."""
        self._seen += sum(len(batch.indices) for batch in batches)
        new = {line for batch in batches for line in batch.undecodable} - self.undecodable
        for line in sorted(new):
            log.warning("skipped: %s", line)
        self.undecodable |= new
        # Each process first sees a share of the pictures, and more of them with every epoch.
        seen = min(max(self._seen, self._order.size // self._processes), self._order.size)
        if new and len(self.undecodable) > self._config.data.max_undecodable * seen:
            raise SourceError(
                f"{len(self.undecodable)} of {seen} training pictures cannot be decoded, which is more than "
                f"data.max_undecodable={self._config.data.max_undecodable:g} allows; the last one: {sorted(new)[-1]}"
            )


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


class ScoringOrder(Sampler[list[Key]]):
    """Keys of this process's pictures: every picture once over all processes, none twice."""

    def __init__(self, split: Split, batch_size: int, process: int, processes: int) -> None:
        self._split, self._batch_size = split, batch_size
        self._process, self._processes = process, processes

    def __iter__(self) -> Iterator[list[Key]]:
        keys = islice(self._keys(), self._process, None, self._processes)
        while batch := list(islice(keys, self._batch_size)):
            yield batch

    def _keys(self) -> Iterator[Key]:
        if isinstance(self._split, PictureTable):
            return (Key(0, index) for index in range(len(self._split)))
        return (Key(0, index, encoded) for index, encoded in enumerate(self._split.encoded()))


class EvalLoader:
    """Pictures to score, with a model's own evaluation transform; can be iterated again and again."""

    def __init__(self, loader: "DataLoader[Batch]", device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            yield batch.to(self._device)


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
    pictures = Pictures(split, scoring_transform(data_config), data_config["mean"], data_config["std"])
    order = ScoringOrder(split, batch_size, process_index, num_processes)
    return EvalLoader(batch_loader(pictures, order, workers, device), device)


def batch_loader(
    pictures: Pictures, order: Sampler[list[Key]], workers: int, device: torch.device
) -> "DataLoader[Batch]":
    """torch's loader over whole batches; pinned where they go to a GPU."""
    return DataLoader(
        pictures,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=unchanged,
        generator=torch.Generator(),  # its own: else every pass draws from the global one
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
    )


def unchanged(batch: Batch) -> Batch:
    """The dataset makes whole batches itself."""
    return batch


def leave_signals_to_parent(worker: int) -> None:
    """Schedulers and Ctrl-C signal every process; the training process decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
