"""Pictures for training and scoring: sources, random variation, and an order that seed and epoch decide."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import DataConfig, TrainConfig

Sample = tuple[Tensor, Tensor]  # picture (C, H, W) and class index ()
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_TEST_IMAGES = 360
SPLIT_SEED = 0  # fixed: a run's seed must not move pictures between training and test


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures of one split: values in 0..1, (N, C, H, W), and class indices, (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Source:
    """A data set: its two splits, the classes in index order and the statistics for normalisation."""

    train: Pictures
    test: Pictures
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_source(name: str) -> Source:
    """Load what ``data.source`` names.

    Raises:
        ValueError: If no source has this name.
    """
    if name != "digits":
        raise ValueError(f"unknown data.source {name!r}; allowed: digits")
    return _load_digits()


def _load_digits() -> Source:
    """1,797 handwritten digits, 8x8 grey: 1,437 to train, 360 held out, each class in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # stored as counts 0..16
    labels = torch.from_numpy(digits.target).long()
    everything = np.arange(len(labels))
    train, test = train_test_split(
        everything, test_size=DIGITS_TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )
    std, mean = torch.std_mean(images[train])
    return Source(
        train=Pictures(images[train], labels[train]),
        test=Pictures(images[test], labels[test]),
        class_names=DIGIT_NAMES,
        mean=(mean.item(),),
        std=(std.item(),),
    )


def seeded_generator(*key: int) -> torch.Generator:
    """A random stream of its own for every key, for example (seed, epoch, purpose)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class PictureDataset(Dataset[Sample]):
    """Normalised pictures of one split, varied at random if ``augment`` is given.

    The variation of picture i is a function of seed, epoch and i: not of the order, the batch or the process.
    """

    def __init__(self, source: Source, split: Pictures, augment: DataConfig | None = None, seed: int = 0) -> None:
        self.labels = split.labels
        self.images = split.images
        self._mean = torch.tensor(source.mean).view(-1, 1, 1)
        self._std = torch.tensor(source.std).view(-1, 1, 1)
        self._augment = augment
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's variation of every picture."""
        generator = seeded_generator(self._seed, epoch, 0)
        self._affine = None if self._augment is None else random_affine(len(self), self._augment, generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """A whole batch at once, which is how the loader asks: one warp instead of one per picture."""
        images = self.images[indices]
        if self._affine is not None:
            grid = F.affine_grid(self._affine[indices], list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, align_corners=False)
        images = (images - self._mean) / self._std
        return list(zip(images, self.labels[indices], strict=True))


def random_affine(count: int, config: DataConfig, generator: torch.Generator) -> Tensor:
    """Random rotations, zooms and shifts as (count, 2, 3) matrices for ``affine_grid``."""
    rotation, zoom, shift_x, shift_y = torch.rand(4, count, generator=generator) * 2 - 1
    angle = rotation * math.radians(config.max_rotation)
    scale = 1 / (1 + zoom * config.max_zoom)  # 1 over: the matrix maps output places to input places
    cos, sin = scale * angle.cos(), scale * angle.sin()
    reach = 2 * config.max_shift  # affine_grid's coordinates run from -1 to 1 over the side
    rows = [torch.stack([cos, -sin, shift_x * reach], dim=-1), torch.stack([sin, cos, shift_y * reach], dim=-1)]
    return torch.stack(rows, dim=1)


class EpochBatches(Sampler[list[int]]):
    """Indices of each global batch, or this process's share of it; an incomplete last batch is left out.

    The order is a function of seed and epoch alone, so that any number of processes trains on the same batches.
    """

    def __init__(self, length: int, global_batch: int, seed: int, process: int = 0, processes: int = 1) -> None:
        if global_batch % processes:
            below = global_batch - global_batch % processes
            raise ValueError(
                f"global_batch {global_batch} does not split over {processes} processes; "
                f"allowed: a multiple, such as {below or processes} or {below + processes}"
            )
        if global_batch > length:
            raise ValueError(f"global_batch is {global_batch}; allowed: up to the {length} training pictures")
        self._length, self._global_batch, self._seed = length, global_batch, seed
        self._process, self._processes = process, processes
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length // self._global_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self._length, generator=seeded_generator(self._seed, self._epoch, 1)).tolist()
        for start in range(0, len(self) * self._global_batch, self._global_batch):
            yield order[start + self._process : start + self._global_batch : self._processes]


def train_loader(source: Source, config: TrainConfig, accelerator: Accelerator) -> DataLoader[Sample]:
    """This process's share of each global batch of the training split, varied as ``config.data`` says."""
    dataset = PictureDataset(source, source.train, config.data, config.seed)
    share = (accelerator.process_index, accelerator.num_processes)
    batches = EpochBatches(len(dataset), config.global_batch, config.seed, *share)
    return DataLoader(dataset, batch_sampler=batches)


def set_epoch(loader: DataLoader[Sample], epoch: int) -> None:
    """Choose order and variation of a training loader's next pass."""
    for part in (loader.batch_sampler, loader.dataset):
        part.set_epoch(epoch)  # type: ignore[union-attr]
