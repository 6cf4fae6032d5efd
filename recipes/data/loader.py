"""Images as batches for training and scoring: augmentation, an order that seed and epoch decide, and the loaders.

The order of an epoch is a function of (seed, epoch), the augmentation of an image one of (seed, epoch, index). So the
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
from arm_zoo.images.listing import SourceError
from arm_zoo.images.tables import Encoded, ImageTable
from recipes.config import BatchPlan, DataConfig, TrainConfig
from recipes.data import transforms
from recipes.data.sampling import Key, ScoringOrder, training_order
from recipes.data.sources import Source, Split
from recipes.data.undecodable import check_undecodable, name_once
from recipes.data.workers import WorkerLoader

DAMAGED_IN_A_ROW = 100  # more than chance: a disk is gone, or the files are no images
CPU = torch.device("cpu")


class Batch(NamedTuple):
    """Images of one forward pass.

    Between processes they travel in 8 bits where nothing changes them after the transform: a quarter of the memory,
    and the GPU normalises for nothing. In training another image stands in the place of one that cannot be decoded, in
    scoring it is left out.
    """

    images: Tensor  # (N, C, H, W), float32, normalised
    classes: Tensor  # (N,), class indices
    indices: Tensor  # (N,), places of the images in their split (for streams: in the epoch's order)
    undecodable: list[str]  # a line for every image that could not be decoded, with its name and the reason

    def ready(self, device: torch.device, normalise: transforms.Normalisation) -> "Batch":
        """The batch on a device, normalised; copies from pinned memory do not wait."""
        images, classes = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.classes))
        return self._replace(images=normalise(images) if images.dtype == torch.uint8 else images, classes=classes)


class Images:
    """One split as batches of images in 8 bits."""

    def __init__(self, split: Split, transform: transforms.Transform) -> None:
        self._split, self._transform = split, transform

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Decode a batch; what cannot be decoded is left out."""
        images, classes, indices, undecodable = [], [], [], []
        for key, encoded in zip(keys, self._stored(keys), strict=True):
            try:
                image, label, _ = encoded.decode(self._split.mode)
            except UndecodableImage as error:
                undecodable.append(str(error))
                continue
            images.append(self._transform(image))
            classes.append(label)
            indices.append(key.place)
        batch = torch.stack(images) if images else torch.empty(0)
        return Batch(batch, torch.tensor(classes).long(), torch.tensor(indices).long(), undecodable)

    def _stored(self, keys: Sequence[Key]) -> Sequence[Encoded]:
        if isinstance(self._split, ImageTable):
            return self._split.encoded([key.place for key in keys])
        return [key.encoded for key in keys if key.encoded is not None]


class AugmentedImages(Images):
    """The same with augmentation, for training; in place of an image that cannot be decoded comes the next one.

    The augmentation of an image is a function of seed, epoch and index: not of the order, the batch or the worker.
    """

    def __init__(self, source: Source, config: DataConfig, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(source.train, transforms.training_transform(config, image_size, source.mean))
        self._normalise = transforms.Normalisation(source.mean, source.std, CPU)
        self._seed = seed
        self._affine = config if config.max_shift or config.max_rotation or config.max_zoom else None
        self._erase_probability = config.erase
        self._erase = RandomErasing(probability=1, mode="pixel", device="cpu")

    def batch(self, keys: Sequence[Key]) -> Batch:
        images, classes, draws, erased = [], [], [], []
        undecodable: list[str] = []
        with transforms.global_generators_restored():
            stored = self._stored(keys)
            for position, key in enumerate(keys):
                image, label = self._decoded(stored, position, key, undecodable)
                transforms.seed_global_generators(self._seed, key.epoch, transforms.AUGMENTATION, key.place)
                images.append(self._transform(image))
                classes.append(label)
                draws.append([random.uniform(-1, 1) for _ in range(4)])
                erased.append(random.random() < self._erase_probability)
            batch = torch.stack(images)
            if self._affine is not None:
                batch = transforms.warp(batch.float().div_(255), torch.tensor(draws), self._affine)
            if self._affine is not None or self._erase_probability:
                batch = self._normalise(batch)
            for key, erasable in compress(zip(keys, batch, strict=True), erased):
                transforms.seed_global_generators(self._seed, key.epoch, transforms.ERASING, key.place)
                self._erase(erasable)  # in place
        return Batch(batch, torch.tensor(classes), torch.tensor([key.place for key in keys]), undecodable)

    def _decoded(
        self, stored: Sequence[Encoded], position: int, key: Key, undecodable: list[str]
    ) -> tuple[Image.Image, int]:
        """The image, or the next one that can be decoded: of the split, or of the batch if it is a stream."""
        table = self._split if isinstance(self._split, ImageTable) else None
        for ahead in range(min(len(stored if table is None else table), DAMAGED_IN_A_ROW)):
            if table is None or ahead == 0:
                encoded = stored[(position + ahead) % len(stored)]
            else:
                encoded = table.stored((key.place + ahead) % len(table))
            try:
                image, label, _ = encoded.decode(self._split.mode)
                return image, label
            except UndecodableImage as error:
                undecodable.append(str(error))
        raise SourceError(f"no image among many in a row can be decoded; the last one: {undecodable[-1]}")


class TrainLoader:
    """This process's part of each global batch of the training images, augmented as `config.data` says.

    The workers go on with the next epoch's images at the end of one, so that an epoch starts without waiting.
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
        self.images = AugmentedImages(source, config.data, image_size, config.seed)
        self._loader = WorkerLoader(self.images.batch, self._order, config.data.workers, device.type == "cuda")
        self._plan, self._config, self._device = plan, config, device
        self._normalise = transforms.Normalisation(source.mean, source.std, device)
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None
        self.undecodable: set[str] = set()  # a line for each damaged image; the trainer adds the other processes'
        self.seconds_waited = 0.0  # in which training stood still for want of images

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of an epoch, from `first_step` on.

        It stops if this process alone knows of more damaged images than `data.max_undecodable` tolerates.
        """
        if self._next != (epoch, first_step):
            self._order.start = (epoch, first_step)
            self._batches = iter(self._loader)
        for step in range(first_step, self.steps_per_epoch):
            started = time.perf_counter()
            batches = [next(self._batches) for _ in range(self._plan.accumulation)]
            self.seconds_waited += time.perf_counter() - started
            name_once((line for batch in batches for line in batch.undecodable), self.undecodable)
            self.check_undecodable()
            self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield [batch.ready(self._device, self._normalise) for batch in batches]

    def check_undecodable(self) -> None:
        """Raise `SourceError` if more training images are damaged than `data.max_undecodable` tolerates."""
        check_undecodable(len(self.undecodable), self._order.size, "training", self._config.data.max_undecodable)


class EvalLoader:
    """Each image of a split exactly once over all processes, with a model's own evaluation transform.

    The transform is that of `timm.data.resolve_model_data_config(model)`, with the mean and std of the training. What
    cannot be decoded is left out and logged once; every pass counts it again in its batches.
    """

    def __init__(
        self,
        split: Split,
        data_config: Mapping[str, Any],
        batch_size: int,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        device: torch.device = CPU,
    ) -> None:
        images = Images(split, transforms.scoring_transform(data_config))
        order = ScoringOrder(split, batch_size, process, processes)
        self._loader = WorkerLoader(images.batch, order, workers, device.type == "cuda")
        self._device = device
        self._normalise = transforms.Normalisation(data_config["mean"], data_config["std"], device)
        self._named: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            name_once(batch.undecodable, self._named)
            yield batch.ready(self._device, self._normalise)
