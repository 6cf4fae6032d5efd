"""How many images per second the training loader gives by itself, to compare with what the GPU takes.

python -m recipes.loader_speed data.source=FOLDER data.random_crop=[0.2,1] data.flip=0.5 image_size=224 data.workers=8

A run's own metrics.jsonl says which fraction of its time went by waiting for images (`data_wait`).
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from recipes.command_line import read_config
from recipes.config import ONE_OR_MORE, WHOLE, BatchPlan, Config, DataConfig, TrainConfig
from recipes.data.loader import TrainLoader
from recipes.data.sources import open_source
from recipes.errors import reporting_mistakes
from recipes.parsing import limited


@dataclass(frozen=True)
class LoaderConfig(Config):
    """What the command takes as `key=value`."""

    data: DataConfig = field(default_factory=DataConfig)
    image_size: int = limited(224, ONE_OR_MORE)
    batch: int = limited(256, ("an even number, 2 or more", lambda x: x > 1 and x % 2 == 0))
    batches: int = limited(40, ONE_OR_MORE)  # timed, after as many as the workers have begun when the first one comes
    seed: int = limited(0, WHOLE)


def loader_speed(config: LoaderConfig) -> float:
    """Images per second of one process with `data.workers` workers; nothing else runs."""
    source = open_source(config.data, labels_needed=False)
    batch = min(config.batch, max(2, (source.train.size or config.batch) // 2 * 2))  # of few images, all of them
    training = TrainConfig(data=config.data, seed=config.seed, global_batch=batch, epochs=1_000_000)
    size = (config.image_size, config.image_size)
    loader = TrainLoader(source, training, BatchPlan(batch, 1), size, 0, 1, torch.device("cpu"))
    batches = (step for epoch in range(training.epochs) for step in loader.epoch(epoch))
    for _ in range(1 + 3 * config.data.workers):  # two that each has ready and one in its hands
        next(batches)
    started = time.perf_counter()
    for _ in range(config.batches):
        next(batches)
    return config.batches * batch / (time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> None:
    does = "Speed of the training loader alone. Run it from the repository's root."
    parser = argparse.ArgumentParser(prog="python -m recipes.loader_speed", description=does)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.source=..., image_size=224, ...")
    config = read_config(parser, LoaderConfig, None, parser.parse_args(argv).overrides)
    with reporting_mistakes(parser.prog):
        speed = loader_speed(config)
    processes = config.data.workers or 1
    print(f"{speed:,.0f} img/s at {config.image_size} px: {processes} x {speed / processes:,.0f}")


if __name__ == "__main__":
    main()
