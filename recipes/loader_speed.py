"""How many pictures per second the training loader gives by itself, to compare with what the GPU takes.

python -m recipes.loader_speed data.source=FOLDER data.random_crop=[0.2,1] data.flip=0.5 image_size=224 data.workers=8

A run's own metrics.jsonl says which share of its time went by waiting for pictures (``data_wait``).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from arm_zoo.images.listing import SourceError

from .config import (
    ONE_OR_MORE,
    ZERO_OR_MORE,
    BatchPlan,
    Config,
    ConfigError,
    DataConfig,
    TrainConfig,
    limited,
    load_config,
)
from .data import TrainLoader
from .errors import RunError
from .sources import open_source


@dataclass(frozen=True)
class LoaderConfig(Config):
    """What the command takes as ``key=value``."""

    data: DataConfig = field(default_factory=DataConfig)
    image_size: int = limited(224, ONE_OR_MORE)
    batch: int = limited(256, ("an even number, 2 or more", lambda x: x > 1 and x % 2 == 0))
    batches: int = limited(40, ONE_OR_MORE)  # timed, after as many as the workers have begun when the first one comes
    seed: int = limited(0, ZERO_OR_MORE)

    def unready(self) -> dict[str, str]:
        """Nothing but the source, which ``open_source`` looks at, has to be there."""
        return {}


def loader_speed(config: LoaderConfig) -> float:
    """Pictures per second of one process with ``data.workers`` workers; nothing else runs."""
    source = open_source(config.data, labels_needed=False)
    training = TrainConfig(
        model="none",
        output_dir="none",
        data=config.data,
        seed=config.seed,
        global_batch=config.batch,
        epochs=1_000_000,
    )
    size = (config.image_size, config.image_size)
    loader = TrainLoader(source, training, BatchPlan(config.batch, 1), size, 0, 1, torch.device("cpu"))
    batches = (step for epoch in range(training.epochs) for step in loader.epoch(epoch))
    for _ in range(1 + 3 * config.data.workers):  # two that each has ready and one in its hands
        next(batches)
    started = time.perf_counter()
    for _ in range(config.batches):
        next(batches)
    return config.batches * config.batch / (time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.loader_speed", description="Speed of the training loader alone. Run it from the top."
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.source=..., image_size=224, ...")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(LoaderConfig, None, arguments.overrides)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    try:
        speed = loader_speed(config)
    except (RunError, SourceError) as error:
        sys.exit(f"{parser.prog}: {error}")
    processes = config.data.workers or 1
    print(f"{speed:,.0f} img/s at {config.image_size} px: {processes} x {speed / processes:,.0f}")


if __name__ == "__main__":
    main()
