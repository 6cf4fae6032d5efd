"""Which process gets which images at which step, as a function of seed and epoch.

A global batch of B images is the same for any number of processes and accumulation steps. Its images i and B - 1 - i
always stand at mirrored places of one micro-batch, so that mixup, which mixes a micro-batch with its reverse, always
mixes the same images. An incomplete last batch of an epoch is left out.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import NamedTuple

import torch

from arm_zoo.images.errors import SourceError
from arm_zoo.images.tables import Encoded, ImageTable
from recipes.config import TrainConfig
from recipes.data.source import Split
from recipes.data.splits import too_large_a_batch
from recipes.data.streams import ImageStream
from recipes.data.transforms import LANE, ORDER, seed_of
from recipes.parsing import ConfigError

MOST_LANES = 16


class BatchPlan(NamedTuple):
    """How one process works through its part of a global batch."""

    per_device: int  # images in one forward pass
    accumulation: int  # forward passes per optimizer step


def batch_plan(global_batch: int, processes: int, max_per_device: int | None = None) -> BatchPlan:
    """Split a global batch into equal parts of at most `max_per_device` images, an even number for mixup's pairs."""
    part, unit = global_batch // processes, 2 * processes
    if global_batch % unit:
        below = global_batch // unit * unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        problem = f"global_batch {global_batch} does not split over {processes} processes into equal, even parts"
        raise ConfigError({"global_batch": f"{problem}; allowed: a multiple of {unit}, such as {nearest}"})
    accumulation = -(-part // (max_per_device or part))
    while part % (2 * accumulation):  # two images in each pass always work
        accumulation += 1
    return BatchPlan(part // accumulation, accumulation)


class Key(NamedTuple):
    """What a worker needs to know of an image: its epoch and place, and in streams the image itself."""

    epoch: int
    place: int
    encoded: Encoded | None = None


class TrainingOrder(ABC):
    """The keys of one process's micro-batches from a split of `size` images.

    Iterating gives them from `start` = (epoch, step), which may be set, to the end of training.
    """

    def __init__(self, size: int, config: TrainConfig, plan: BatchPlan, process: int, processes: int) -> None:
        if config.global_batch > size:
            raise SourceError(too_large_a_batch(config.global_batch, size))
        if config.global_batch != processes * plan.accumulation * plan.per_device or plan.per_device % 2:
            raise ValueError(f"{plan} on {processes} processes is no global batch of {config.global_batch} in pairs")
        self.size = size
        self.steps_per_epoch = size // config.global_batch
        self.start = (0, 0)
        self._config = config
        half = plan.per_device // 2
        firsts = [(process * plan.accumulation + number) * half for number in range(plan.accumulation)]
        self._pairs = [range(first, first + half) for first in firsts]  # of each micro-batch

    def __iter__(self) -> Iterator[list[Key]]:
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, max(self._config.epochs, first_epoch + 1)):
            for pairs in self._steps(epoch, first_step if epoch == first_epoch else 0):
                for part in self._pairs:
                    chosen = [pairs[number] for number in part]
                    yield [first for first, _ in chosen] + [mirrored for _, mirrored in reversed(chosen)]

    @abstractmethod
    def _steps(self, epoch: int, first_step: int) -> Iterator[dict[int, tuple[Key, Key]]]:
        """For each step, i -> the images i and B - 1 - i of the global batch, at least for this process's i."""


class TableOrder(TrainingOrder):
    """All images in a new order in every epoch."""

    def _steps(self, epoch: int, first_step: int) -> Iterator[dict[int, tuple[Key, Key]]]:
        generator = torch.Generator().manual_seed(seed_of(self._config.seed, epoch, ORDER))
        order = torch.randperm(self.size, generator=generator).tolist()
        batch = self._config.global_batch
        own = [number for part in self._pairs for number in part]
        for step in range(first_step, self.steps_per_epoch):
            first, last = step * batch, (step + 1) * batch - 1
            yield {n: (Key(epoch, order[first + n]), Key(epoch, order[last - n])) for n in own}


class StreamOrder(TrainingOrder):
    """Shards in a new order in every epoch, divided into lanes of equal length that are read side by side.

    Every lane gives the same number of pairs to each global batch, always at the same places, so a process reads only
    the lanes of its own places. If the sizes of the shards are not known (on the Hub), there is one lane, which every
    process reads. A buffer mixes the images of each lane; the buffers hold `data.shuffle_buffer` images together.
    """

    def __init__(self, split: ImageStream, config: TrainConfig, plan: BatchPlan, process: int, processes: int) -> None:
        if split.size is None:
            raise SourceError("the training stream does not tell its size; type data.train_size=IMAGES")
        super().__init__(split.size, config, plan, process, processes)
        self._split = split
        most = 1 if split.shard_sizes is None else min(MOST_LANES, split.num_shards)
        pairs = config.global_batch // 2
        self._lanes = max(count for count in range(1, most + 1) if pairs % count == 0)
        self._width = pairs // self._lanes  # pairs that a lane gives to a global batch
        self._length = self.steps_per_epoch * 2 * self._width

    def _steps(self, epoch: int, first_step: int) -> Iterator[dict[int, tuple[Key, Key]]]:
        generator = random.Random(seed_of(self._config.seed, epoch, ORDER))
        shards = generator.sample(range(self._split.num_shards), self._split.num_shards)
        own = sorted({number // self._width for part in self._pairs for number in part})
        lanes = {lane: self._lane(lane, shards, epoch) for lane in own}
        for keys in lanes.values():
            next(islice(keys, first_step * 2 * self._width, first_step * 2 * self._width), None)  # read and forgotten
        for _ in range(first_step, self.steps_per_epoch):
            yield {
                lane * self._width + number: (next(keys), next(keys))
                for lane, keys in lanes.items()
                for number in range(self._width)
            }

    def _lane(self, lane: int, shards: Sequence[int], epoch: int) -> Iterator[Key]:
        generator = random.Random(seed_of(self._config.seed, epoch, LANE, lane))
        buffer = max(1, self._config.data.shuffle_buffer // self._lanes)
        first = lane * self._length
        for place, encoded in enumerate(mixed(self._cut(first, shards), buffer, generator), first):
            yield Key(epoch, place, encoded)

    def _cut(self, start: int, shards: Sequence[int]) -> Iterator[Encoded]:
        """The images of one lane, which begins at image `start` of the shards laid end to end."""
        left = self._length
        for shard in shards:
            if self._split.shard_sizes is not None and start >= self._split.shard_sizes[shard]:
                start -= self._split.shard_sizes[shard]
                continue
            for encoded in islice(self._split.shard(shard, start), left):
                yield encoded
                left -= 1
            start = 0
            if left == 0:
                return
        expected = f"{self.size} are expected (data.train_size, or the size that the source states)"
        raise SourceError(f"the training stream ended {left} images before its end: {expected}")


def training_order(split: Split, config: TrainConfig, plan: BatchPlan, process: int, processes: int) -> TrainingOrder:
    """The training order of a table or a stream."""
    if isinstance(split, ImageTable):
        return TableOrder(len(split), config, plan, process, processes)
    return StreamOrder(split, config, plan, process, processes)


def mixed(stream: Iterable[Encoded], buffer_size: int, generator: random.Random) -> Iterator[Encoded]:
    """Mix a stream, so that its order is random within about `buffer_size` places."""
    stream = iter(stream)
    buffer = list(islice(stream, buffer_size))
    for encoded in stream:
        place = generator.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = encoded
    generator.shuffle(buffer)
    yield from buffer


class ScoringOrder:
    """The keys of one process's images in batches; over all processes, every image comes exactly once."""

    def __init__(self, split: Split, batch_size: int, process: int, processes: int) -> None:
        self._split, self._batch_size = split, batch_size
        self._process, self._processes = process, processes

    def __iter__(self) -> Iterator[list[Key]]:
        split = self._split
        stored = repeat(None, len(split)) if isinstance(split, ImageTable) else split.encoded()
        own = islice(enumerate(stored), self._process, None, self._processes)
        while batch := [Key(0, *image) for image in islice(own, self._batch_size)]:
            yield batch
