"""How fast images are loaded, by the training loader alone or while a real step trains on them.

python -m recipes.loader_speed --make 30000 FOLDER   # JPEG files to measure with
python -m recipes.loader_speed data.source=FOLDER data.random_crop=[0.2,1] data.flip=0.5 image_size=192 data.workers=8
python -m recipes.loader_speed --step pretrain --config recipes/configs/pretrain_base.yaml data.source=FOLDER \
    global_batch=256 compile=true

With `data.decode=auto`, all ways to decode that this machine has take turns. `--step` trains as the recipe would, both
on these images and on one batch that stays in memory, in the same process with the same compiled step: the difference
in speed is what loading costs. With several GPUs, start it with `torchrun` or `accelerate launch`; speeds are those of
all processes together.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock

from arm_zoo.command_line import positive
from arm_zoo.files import write_text
from recipes.command_line import RECIPES, leave_process_group, read_config, say
from recipes.config import Config, PretrainConfig, TrainConfig
from recipes.data.batches import Batch
from recipes.data.config import DataConfig
from recipes.data.generated import SUBSAMPLINGS, write_images
from recipes.data.loader import decodes_on_gpu
from recipes.data.sampling import BatchPlan
from recipes.data.sources import open_source
from recipes.errors import reporting_mistakes
from recipes.finetune import CLASSIFICATION
from recipes.objectives import TRAINING
from recipes.parsing import ONE_OR_MORE, SEED, limited
from recipes.training.setup import train
from recipes.training.turns import EPOCHS_OF_A_TURN, FIXED, Turns, endless, memory, steps

STEPS = ("pretrain", "finetune")
HEADINGS = """
| images | img/s | of a process | of a worker | ratio | waits | GiB on the GPU | growth there, on the host |
|---|---|---|---|---|---|---|---|"""
Row = dict[str, Any]  # figures of one way in one round, with their names in `metrics.jsonl`, and those of `memory`


@dataclass(frozen=True)
class LoaderConfig(Config):
    """What the command takes as `key=value` without `--step`."""

    data: DataConfig = field(default_factory=DataConfig)
    image_size: int = limited(224, ONE_OR_MORE)
    batch: int = limited(256, ("an even number, 2 or more", lambda x: x > 1 and x % 2 == 0))  # of each process
    seed: int = limited(0, SEED)

    def conflicts(self) -> dict[str, str]:
        """The conflicts of the data's settings."""
        return self.data.conflicts()


@dataclass(frozen=True)
class Measurement:
    """The speed of one way to get images; `--json` writes one in each line."""

    images: str  # a name of `ways`, or FIXED
    rounds: list[float]  # images per second of all processes together, in each round
    images_per_second: float  # their median
    ratio: float  # to the speed of the first way, the fixed batch if there is one: the median of the rounds' ratios
    data_wait: float  # fraction of the time in which training waits for images; 1 for the loader alone
    gpu_gib: float  # the most memory in use on the first process's GPU, beyond what the step needs
    gpu_growth: float  # growth of that memory from the first to the last round, in GiB
    host_growth: float  # the same of the first process's main memory, without its workers'
    image_size: int
    batch: int  # of all processes
    processes: int  # one for each GPU
    workers: int  # of each process
    device: str
    recipe: str | None = None  # whose step trains on them; None for the loader alone
    model: str | None = None


def table(found: Sequence[Measurement]) -> Iterator[str]:
    """Lines of Markdown."""
    one = found[0]
    what = "the loader alone" if one.model is None else f"{one.recipe} of {one.model}"
    where = f"{one.processes} x {one.device} with {one.workers} workers each"
    yield f"{what} at {one.image_size} px, batch {one.batch}, {where}; {len(one.rounds)} rounds"
    yield HEADINGS
    for each in found:
        of_process = each.images_per_second / each.processes
        speeds = f"{each.images_per_second:,.0f} | {of_process:,.0f} | {of_process / (each.workers or 1):,.0f}"
        memory = f"{each.gpu_gib:.2f} | {each.gpu_growth:+.3f}, {each.host_growth:+.3f}"
        yield f"| {each.images} | {speeds} | {each.ratio:.3f} | {each.data_wait:.1%} | {memory} |"


def ways(config: DataConfig, device: torch.device) -> dict[str, dict[str, Any]]:
    """Ways to load images: name -> changes to `DataConfig`. There are several only where none was asked for."""
    if config.cache != "none":
        return {f"cache={config.cache}": {}}
    if config.decode != "auto":
        return {f"decode={config.decode}": {}}
    places = ("cpu", "gpu") if decodes_on_gpu("auto", device) else ("cpu",)
    return {f"decode={place}": {"decode": place} for place in places}


def measurements(turns: Mapping[str, Sequence[Row]], gpu_gib: float, workers: int, **same: Any) -> list[Measurement]:
    """One measurement for each way, from its row in each round; `gpu_gib` is the GPU memory that others use."""
    state = PartialState()
    device = torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else state.device.type
    same |= {"processes": state.num_processes, "workers": workers, "device": device}
    speeds = {way: [row["images_per_second"] for row in rows] for way, rows in turns.items()}
    first = next(iter(speeds.values()))
    return [
        Measurement(
            images=way,
            rounds=speeds[way],
            images_per_second=median(speeds[way]),
            ratio=median(speed / reference for speed, reference in zip(speeds[way], first, strict=True)),
            data_wait=median(row["data_wait"] for row in rows),
            gpu_gib=max(row["gpu_gib"] for row in rows) - gpu_gib,
            gpu_growth=rows[-1]["gpu_gib"] - rows[0]["gpu_gib"],
            host_growth=rows[-1]["host_gib"] - rows[0]["host_gib"],
            **same,
        )
        for way, rows in turns.items()
    ]


def loader_speed(config: LoaderConfig, rounds: int, batches: int) -> list[Measurement]:
    """Measure the loader alone: the ways to decode take turns, and nothing else runs."""
    by_class = config.data.labels_per_class is not None  # else no labels are needed
    state, source = PartialState(), open_source(config.data, by_class, config.seed)
    processes, size = state.num_processes, (config.image_size, config.image_size)
    batch = min(config.batch, max(2, (source.train.size or config.batch) // (2 * processes) * 2))  # of few, all
    training = TrainConfig(data=config.data, seed=config.seed, global_batch=batch * processes)
    where = (BatchPlan(batch, 1), size, state.process_index, processes, state.device)
    before = memory(state.device)["gpu_gib"]
    streams = {
        name: steps(endless(source, training, *where, **way)) for name, way in ways(config.data, state.device).items()
    }
    turns: dict[str, list[Row]] = {way: [] for way in streams}
    for _ in range(rounds):
        for way, stream in streams.items():
            take(stream, 1 + 3 * config.data.workers)  # two that each has ready and one in its hands
            started = time.perf_counter()
            take(stream, batches)
            speed = batches * batch / (time.perf_counter() - started)
            row = {"images_per_second": sum(gather_object([speed])), "data_wait": 1.0}
            turns[way].append(row | memory(state.device))
    same = {"image_size": config.image_size, "batch": training.global_batch}
    return measurements(turns, before, config.data.workers, **same)


def take(stream: Iterator[list[Batch]], batches: int) -> None:
    """Take so many batches, and wait until a GPU has finished them."""
    for _ in range(batches):
        next(stream)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_speed(recipe: str, config: TrainConfig, rounds: int, batches: int) -> list[Measurement]:
    """Train on a fixed batch and on the images of each way in turn; nothing of this run is kept."""
    objective = TRAINING[config.objective] if isinstance(config, PretrainConfig) else CLASSIFICATION
    objective = dataclasses.replace(objective, export=lambda trained: None, evaluation=None)
    device = PartialState(cpu=config.device == "cpu").device
    real = ways(config.data, device)
    images = [FIXED, *real]
    loaders: list[Turns] = []

    def create_loader(*arguments: Any) -> Turns:
        loaders.append(Turns(list(real.values()), batches, *arguments))
        return loaders[0]

    epochs = rounds * len(images) * EPOCHS_OF_A_TURN
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            dataclasses.replace(
                config, output_dir=folder, epochs=epochs, warmup_epochs=0, checkpoint_epochs=epochs,
                checkpoint_steps=None, checkpoint_minutes=None, tracker="none",
            ),
            objective, "loader speed", "none", None, create_loader,
        )  # fmt: skip
    rows = [row | taken for row, taken in zip(trained.history, loaders[0].memory, strict=True)]
    counted = rows[EPOCHS_OF_A_TURN - 1 :: EPOCHS_OF_A_TURN]
    turns = {way: counted[number :: len(images)] for number, way in enumerate(images)}
    same = {"image_size": trained.inputs["input_size"][-1], "batch": config.global_batch}
    same |= {"recipe": recipe, "model": config.model}
    return measurements(turns, counted[0]["gpu_gib"], config.data.workers, **same)


def main(argv: Sequence[str] | None = None) -> None:
    does = "Speed of the training loader, alone or behind a training step. Run it from the repository's root."
    parser = argparse.ArgumentParser(prog="python -m recipes.loader_speed", description=does)
    parser.add_argument("--step", choices=STEPS, help="train as this recipe does; key=value are then its settings")
    parser.add_argument("--config", type=Path, help="YAML file for --step, for example one of recipes/configs")
    parser.add_argument("--rounds", type=positive, default=3, help="turns that each way to decode has (%(default)s)")
    parser.add_argument("--batches", type=positive, default=60, help="batches timed in a turn (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a line for each measurement to this file")
    parser.add_argument("--make", nargs=2, metavar=("N", "FOLDER"), help="only write N JPEG files into a new folder")
    parser.add_argument("--subsampling", choices=SUBSAMPLINGS, help="colour subsampling for --make (4:2:0)")
    parser.add_argument("--seed", type=int, help="seed for --make (0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.source=..., image_size=224, ...")
    settings = parser.parse_intermixed_args(argv)
    if settings.config and not settings.step:
        parser.error("--config goes with --step")
    if settings.make is None and (settings.subsampling or settings.seed is not None):
        parser.error("--subsampling and --seed go with --make")
    if settings.make is not None and (settings.step or settings.json or settings.overrides):
        parser.error("--make only writes files; leave out --step, --json and key=value, and measure afterwards")
    if settings.seed is not None and settings.seed < 0:
        parser.error(f"--seed is {settings.seed}; allowed: 0 or more")
    with reporting_mistakes(parser.prog):
        if settings.make is not None:
            number, folder = settings.make
            if not number.isdecimal() or int(number) == 0:
                parser.error(f"--make {number} {folder}; allowed: a number of files, 1 or more, then a folder")
            write_images(Path(folder), int(number), settings.seed or 0, settings.subsampling or "4:2:0")
            say(f"wrote {int(number):,} JPEG files, in class folders below {folder}")
            return
        if settings.json is not None:
            settings.json.open("a").close()  # to fail now, not after minutes of measuring
        often = (settings.rounds, settings.batches)
        if settings.step is None:
            found = loader_speed(read_config(parser, LoaderConfig, None, settings.overrides), *often)
        else:
            kind, *_ = RECIPES[settings.step]
            overrides = [*settings.overrides, f"output_dir={tempfile.gettempdir()}"]  # nothing is kept
            found = step_speed(settings.step, read_config(parser, kind, settings.config, overrides), *often)
        say("\n".join(table(found)))
        if settings.json is not None and PartialState().is_main_process:
            lines = "".join(f"{json.dumps(dataclasses.asdict(each))}\n" for each in found)
            file = settings.json.resolve()
            with FileLock(file.with_name(f".{file.name}.lock")):  # others may end at the same time
                write_text(file, file.read_text(encoding="utf-8") + lines)
        leave_process_group()


if __name__ == "__main__":
    main()
