"""Pictures for training and scoring: sources, random variation, and an order that seed and epoch decide."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .config import BatchPlan, DataConfig, TrainConfig
from .sources import Pictures, Source

Sample = tuple[Tensor, Tensor]  # picture (C, H, W) and class index ()


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


class Batch(NamedTuple):
    """Pictures of one forward pass, normalised: (N, C, H, W), (N,), (N,)."""

    pictures: Tensor
    classes: Tensor
    indices: Tensor
    undecodable: list[str]


class TrainLoader:
    """Micro-batches of one process."""

    def __init__(self, dataset: PictureDataset, config: TrainConfig, plan: BatchPlan, process: int) -> None:
        self._dataset, self._config, self._plan, self._process = dataset, config, plan, process
        self.steps_per_epoch = len(dataset) // config.global_batch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """One list of micro-batches per optimizer step."""
        order = torch.randperm(len(self._dataset), generator=seeded_generator(self._config.seed, epoch, 1)).tolist()
        self._dataset.set_epoch(epoch)
        size, half = self._config.global_batch, self._plan.per_device // 2
        for step in range(first_step, self.steps_per_epoch):
            whole = order[step * size : (step + 1) * size]
            batches = []
            for number in range(self._plan.accumulation):
                first = (self._process * self._plan.accumulation + number) * half
                indices = whole[first : first + half] + whole[size - first - half : size - first]
                images, labels = zip(*self._dataset.__getitems__(indices), strict=True)
                batches.append(Batch(torch.stack(images), torch.stack(labels), torch.tensor(indices), []))
            yield batches


def train_loader(
    source: Source,
    config: TrainConfig,
    plan: BatchPlan,
    image_size: tuple[int, int],
    process_index: int,
    num_processes: int,
    device: torch.device,
) -> TrainLoader:
    """This process's share of each global batch of the training split, varied as ``config.data`` says."""
    return TrainLoader(PictureDataset(source, source.train, config.data, config.seed), config, plan, process_index)


def eval_loader(
    split: Any, data_config: dict[str, Any], batch_size: int, process_index: int, num_processes: int
) -> Iterator[Batch]:
    """Every picture once over all processes."""
    mean, std = (torch.tensor(data_config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    for start in range(process_index * batch_size, len(split), num_processes * batch_size):
        indices = list(range(start, min(start + batch_size, len(split))))
        images, labels, _ = zip(*(split[i] for i in indices), strict=True)
        yield Batch((torch.stack(images) - mean) / std, torch.tensor(labels), torch.tensor(indices), [])
