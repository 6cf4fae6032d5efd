"""A loader whose images come from several places in turn, so that one process can compare their speeds."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import psutil
import torch

from recipes.config import TrainConfig
from recipes.data.batches import Batch
from recipes.data.loader import TrainLoader
from recipes.data.source import Source

FIXED = "fixed batch"
ENDLESS = 1_000_000  # epochs
EPOCHS_OF_A_TURN = 2  # the first uses up what was loaded during the other turns, the second is measured


class Turns(TrainLoader):
    """Takes the place of a run's loader: one batch that stays in memory and the images of each way to load have turns.

    A way is given by its changes to `DataConfig`. An epoch has `batches` steps, and a turn `EPOCHS_OF_A_TURN` epochs.
    """

    def __init__(
        self, ways: Sequence[dict[str, Any]], batches: int, source: Source, config: TrainConfig, *arguments: Any
    ) -> None:
        super().__init__(source, config, *arguments)
        self._loaders = [endless(source, config, *arguments, **way) for way in ways]
        fixed = next(endless(source, config, *arguments, decode="cpu", cache="none", workers=0).epoch(0))
        self._streams = [repeat(fixed), *map(steps, self._loaders)]
        self.steps_per_epoch = batches
        self._turn = 0  # 0: the fixed batch, k: loader k - 1
        self.memory: list[dict[str, float]] = []  # at the end of each epoch

    @property
    def seconds_waited(self) -> float:
        """Seconds for which training has waited for images."""
        return sum(loader.seconds_waited for loader in self._loaders)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The steps of one epoch."""
        self._turn = epoch // EPOCHS_OF_A_TURN % len(self._streams)
        for step in range(first_step, self.steps_per_epoch):
            batches = next(self._streams[self._turn])
            if step + 1 == self.steps_per_epoch:
                self.memory.append(memory(self._device))
            yield batches

    def look_ahead(self) -> Any:
        """Begin to load the images of the next step, unless it is the fixed batch's turn."""
        if self._turn > 0:
            self._loaders[self._turn - 1].look_ahead()


def endless(source: Source, config: TrainConfig, *arguments: Any, **data: Any) -> TrainLoader:
    """A loader that never ends; `arguments` are `TrainLoader`'s, `data` keys of `DataConfig` that win."""
    return TrainLoader(source, replace(config, epochs=ENDLESS, data=replace(config.data, **data)), *arguments)


def steps(loader: TrainLoader) -> Iterator[list[Batch]]:
    """The steps of epoch after epoch."""
    return (step for epoch in count() for step in loader.epoch(epoch))


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this process without its workers, and all memory in use on its GPU (0 without one), in GiB."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return {"host_gib": psutil.Process().memory_info().rss / 2**30, "gpu_gib": (total - free) / 2**30}
