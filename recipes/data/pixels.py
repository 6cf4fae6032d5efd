"""Training images with a class for each pixel: scaled, cropped and flipped with their masks, as batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from arm_zoo.images.masks import IGNORED, LabelledPixels, compare_class_names, open_masks
from recipes.config import SegmentConfig
from recipes.data.batches import Batch
from recipes.data.loader import Pauses
from recipes.data.sampling import BatchPlan, Key, TableOrder
from recipes.data.transforms import AUGMENTATION, Normalisation, resized, seed_of
from recipes.data.workers import WorkerLoader


@dataclass(frozen=True)
class PixelSource:
    """A data set with masks; `mean` to `held_out` are what `recipes.training` reads from any source."""

    train: LabelledPixels
    test: LabelledPixels
    mean: tuple[float, ...]  # of each channel, values in 0..1, for normalisation
    std: tuple[float, ...]
    channels: int = 3
    held_out: None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names


def open_pixels(config: SegmentConfig) -> PixelSource:
    """Open the training images of `data.source`, and the validation images of `data.validation` or else of it too.

    Raises SourceError if their classes differ.
    """
    train = open_masks(config.data.source, "training")
    other = config.data.validation or config.data.source
    test = open_masks(str(other), "validation")
    compare_class_names(train.class_names, test.class_names, f"{config.data.source} and {other}")
    return PixelSource(train, test, *config.statistics())


class AugmentedPixels:
    """Makes batches of images (C, H, W) and labels (H, W), uint8, as functions of seed, epoch and place."""

    def __init__(
        self, split: LabelledPixels, config: SegmentConfig, size: tuple[int, int], fill: Sequence[float]
    ) -> None:
        self._split, self._config, self._size = split, config, size
        self._fill = torch.tensor([round(255 * value) for value in fill], dtype=torch.uint8)[:, None, None]

    def batch(self, keys: Sequence[Key]) -> Batch:
        """A batch of images in 8 bits and their labels, which are IGNORED where the image does not reach."""
        images, labels = zip(*(self._augmented(key) for key in keys), strict=True)
        return Batch(torch.stack(images), torch.stack(labels), torch.tensor([key.place for key in keys]), [])

    def _augmented(self, key: Key) -> tuple[Tensor, Tensor]:
        image, labels = self._split[key.place]
        labels = labels.to(torch.uint8)
        draws = random.Random(seed_of(self._config.seed, key.epoch, key.place, AUGMENTATION))
        (height, width), (window, across) = image.shape[1:], self._size
        scale = draws.uniform(*self._config.scale) * max(window / height, across / width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        image = resized(image[None], size, InterpolationMode.BILINEAR)[0]
        labels = v2.functional.resize(labels[None], size, InterpolationMode.NEAREST_EXACT)[0]
        top, left = draws.randint(0, max(0, size[0] - window)), draws.randint(0, max(0, size[1] - across))
        image, labels = (x[..., top : top + window, left : left + across] for x in (image, labels))
        whole = self._fill.expand(-1, window, across).clone()
        labelled = torch.full((window, across), IGNORED, dtype=torch.uint8)
        whole[:, : image.shape[1], : image.shape[2]], labelled[: image.shape[1], : image.shape[2]] = image, labels
        return (whole.flip(-1), labelled.flip(-1)) if draws.random() < self._config.data.flip else (whole, labelled)


class PixelLoader:
    """Gives this process its part of each global batch; the trainer uses it as a `recipes.data.loader.TrainLoader`."""

    def __init__(
        self,
        source: PixelSource,
        config: SegmentConfig,
        plan: BatchPlan,
        image_size: tuple[int, int],
        process: int,
        processes: int,
        device: torch.device,
    ) -> None:
        self._order = TableOrder(len(source.train), config, plan, process, processes)
        self.steps_per_epoch, self.class_names = self._order.steps_per_epoch, source.class_names
        self.undecodable: set[str] = set()  # always empty: a damaged image or mask ends the run
        images = AugmentedPixels(source.train, config, image_size, source.mean)
        self._loader = WorkerLoader(images.batch, self._order, config.data.workers, device.type == "cuda")
        self._plan, self._device, self._pauses = plan, device, Pauses(device)
        self._normalise = Normalisation(source.mean, source.std, device)
        self._loaded: Iterator[Batch] = iter(())
        self._next: tuple[int, int] | None = None

    @property
    def seconds_waited(self) -> float:
        """Seconds for which training has waited for images."""
        return self._pauses.seconds

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of an epoch, from `first_step` on."""
        if self._next != (epoch, first_step):
            self._order.start = (epoch, first_step)
            self._loaded = iter(self._loader)
        for step in range(first_step, self.steps_per_epoch):
            with self._pauses.measured():
                loaded = islice(self._loaded, self._plan.accumulation)
                batches = [batch.ready(self._device, self._normalise) for batch in loaded]
            self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield batches

    def look_ahead(self) -> None:
        """Do nothing: the workers are ahead by themselves."""

    def check_undecodable(self) -> None:
        """Do nothing: a damaged image has ended the run."""
