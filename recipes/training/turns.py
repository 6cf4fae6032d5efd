"""A run whose images come from several places in turn, so that their speeds can be compared within one process."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, repeat
from typing import Any

import psutil
import torch

from recipes.config import TrainConfig
from recipes.data.loader import Batch, TrainLoader
from recipes.data.sources import Source

FIXED = "fixed batch"
ENDLESS = 1_000_000  # epochs
EPOCHS_OF_A_TURN = 2  # the first one uses up what was loaded while others had their turn, the last one counts


def endless(source: Source, config: TrainConfig, *arguments: Any, **data: Any) -> Iterator[list[Batch]]:
    """The steps of epoch after epoch; `arguments` are `TrainLoader`'s, `data` keys of `DataConfig` that win."""
    config = replace(config, epochs=ENDLESS, data=replace(config.data, **data))
    loader = TrainLoader(source, config, *arguments)
    return (step for epoch in count() for step in loader.epoch(epoch))


class Turns(TrainLoader):
    """In the place of a run's loader: in turn one batch that stays in memory, and the images of each way to decode.

    An epoch has `batches` steps, a turn `EPOCHS_OF_A_TURN` epochs.
    """

    def __init__(
        self, ways: Sequence[str], batches: int, source: Source, config: TrainConfig, *arguments: Any
    ) -> None:
        super().__init__(source, config, *arguments)
        fixed = next(endless(source, config, *arguments, decode="cpu", cache="none", workers=0))
        self._streams = [repeat(fixed), *(endless(source, config, *arguments, decode=way) for way in ways)]
        self.steps_per_epoch = batches
        self.memory: list[dict[str, float]] = []  # at the end of each epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The steps of one epoch."""
        stream = self._streams[epoch // EPOCHS_OF_A_TURN % len(self._streams)]
        for step in range(first_step, self.steps_per_epoch):
            started = time.perf_counter()
            batches = next(stream)
            self.seconds_waited += time.perf_counter() - started
            if step + 1 == self.steps_per_epoch:
                self.memory.append(memory(self._device))
            yield batches


def memory(device: torch.device) -> dict[str, float]:
    """What this process takes, without its workers, and what is taken on its GPU by whatever (0 on a CPU)."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return {"host_gib": psutil.Process().memory_info().rss / 2**30, "gpu_gib": (total - free) / 2**30}
