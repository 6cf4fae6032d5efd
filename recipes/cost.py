"""Hours and GPU-hours that pretraining on ImageNet-1k would take, from a measured speed, beside the paper's.

python -m recipes.cost --run runs/pretrain_base --gpus 8 --efficiency 0.9
python -m recipes.cost --real-images FILE   # written by python -m recipes.loader_speed --step pretrain ... --json FILE
python -m recipes.cost --throughput FILE    # written by python -m eval.throughput --mode pretrain --output FILE
python -m recipes.cost --images-per-second 1500

The speeds of the first two include the time in which the GPUs wait for images, those of the third do not; the table
says so. If a model was measured on several numbers of GPUs, the nearest number counts, and the scaling efficiency is
the measured one.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from arm_zoo.command_line import show
from arm_zoo.tables import ABOVE_ZERO, read
from recipes.errors import reporting_mistakes

IMAGENET_TRAIN_IMAGES = 1_281_167
HEADINGS = "| model | GPUs | epochs | hours | GPU-hours | speed |\n|---|---|---|---|---|---|"
# What reading a measurement raises: where the content is none, and for all reasons.
DAMAGED = (AttributeError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, yaml.YAMLError)
UNREADABLE = (*DAMAGED, OSError, ValueError)
ASSUMED = 0.9  # scaling efficiency where it is neither given nor measured
PAPER = "| ARM-B | 8 A5000 | 300 | 34.0 | 272 | *reported by the paper* |"  # section 4.4


@dataclass(frozen=True)
class Measured:
    """A measured speed: images per second of all GPUs together."""

    model: str
    images_per_second: float
    gpus: int = 1
    device: str = ""  # the name of the GPUs, where it is known
    what: str = ""  # what was measured, where that is known: "with real images" or "of the step alone"

    def __post_init__(self) -> None:
        if not 0 < self.images_per_second < math.inf:
            problem = f"{self.model} was measured at {self.images_per_second} images per second"
            raise ValueError(f"{problem}; allowed: a number above 0, and finite")
        if type(self.gpus) is not int or self.gpus < 1:
            raise ValueError(f"{self.model} was measured on {self.gpus!r} GPUs; allowed: a whole number, 1 or more")

    def hours(self, epochs: int, gpus: int, efficiency: float, images: int = IMAGENET_TRAIN_IMAGES) -> float:
        """Hours for so many epochs, where `efficiency` is the speed of `gpus` GPUs over that of as many separate ones.

        It counts whenever `gpus` is not the number that was measured: fewer GPUs may need less time than this says.
        """
        kept = 1.0 if gpus == self.gpus else efficiency
        return epochs * images / (self.images_per_second * gpus / self.gpus * kept) / 3600


def from_run(folder: Path, recipe: str) -> Measured:
    """The median speed of a run's epochs on its last number of GPUs; the first epoch, a warm-up, counts if alone.

    Raises ValueError if the run is of another recipe.
    """
    from arm_zoo.files import recipe_of  # imports torch, which takes seconds

    file = folder / "metrics.jsonl"
    allowed = f"allowed: the output_dir of recipes.{recipe}, or --images-per-second SPEED --measured-gpus N"
    if not file.exists():
        raise ValueError(f"there is no {file}; {allowed}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if {"images_per_second", "processes"} <= row.keys()]
    if not rows:
        raise ValueError(f"{file} holds no images_per_second with the number of processes; {allowed}")
    gpus = rows[-1]["processes"]  # one for each
    speeds = [row["images_per_second"] for row in rows if row["processes"] == gpus]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    if (wrote := recipe_of(config)) != recipe:
        raise ValueError(f"{folder} is a run of recipes.{wrote}, whose speed is another; {allowed}")
    return Measured(config["model"], statistics.median(speeds[1:] or speeds), gpus, what="with real images")


def from_real_images(file: Path) -> list[Measured]:
    """The newest row of each model, device, number of GPUs and way to load, as `recipes.loader_speed` wrote them."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["recipe"] == "pretrain" and row["images"] != "fixed batch"]
    if not rows:
        raise ValueError(f"{file} has no rows of pretraining; measure with --step pretrain")
    newest = {(row["model"], row["device"], row["processes"], row["images"]): row for row in rows}
    return [
        Measured(model, row["images_per_second"], gpus, device, f"with real images ({way})")
        for (model, device, gpus, way), row in newest.items()
    ]


def from_throughput(file: Path) -> list[Measured]:
    """The newest row of each model and device, as `eval.throughput --mode pretrain --output FILE` wrote them."""
    rows = read(file, ("mode", "model", "img_per_s"), {"img_per_s": ABOVE_ZERO})
    newest = {(row["model"], row.get("device", "")): row for row in rows if row["mode"] == "pretrain"}
    if not newest:
        raise ValueError(f"{file} has no rows of pretraining; measure with --mode pretrain")
    return [
        Measured(model, float(row["img_per_s"]), device=device, what="of the step alone")
        for (model, device), row in newest.items()
    ]


def with_kind(error: Exception) -> str:
    """The kind of an error and its message in one line, as some name a key alone and YAML's have several lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def scaling(measured: Sequence[Measured], assumed: float | None) -> tuple[float, str]:
    """Scaling efficiency, the speed of N GPUs over N times that of one, and where this figure comes from.

    It is `assumed` if that is given, else computed where `measured` has several numbers of GPUs.
    """
    fewest, most = (choose(measured, key=lambda speed: speed.gpus) for choose in (min, max))
    if assumed is None and fewest.gpus < most.gpus:
        efficiency = most.images_per_second * fewest.gpus / (fewest.images_per_second * most.gpus)
        return efficiency, f"as measured from {fewest.gpus} to {most.gpus}"
    return assumed or ASSUMED, "assumed"


def table(measured: Sequence[Measured], settings: argparse.Namespace) -> Iterator[str]:
    """Lines of a Markdown table, each from the speed on the nearest number of GPUs; the last line is the paper's."""
    yield HEADINGS
    groups: dict[tuple[str, ...], list[Measured]] = {}
    for speed in measured:
        groups.setdefault((speed.model, speed.device, speed.what), []).append(speed)
    for group in groups.values():
        efficiency, origin = scaling(group, settings.efficiency)
        for gpus in settings.gpus:
            near = min(group, key=lambda speed: abs(math.log(speed.gpus / gpus)))
            words = f"{near.images_per_second:,.0f} img/s {near.what} measured on {near.gpus} {near.device}".split()
            scaled = f", {efficiency:.0%} scaling efficiency {origin}" if gpus != near.gpus else ""
            for epochs in settings.epochs:
                hours = near.hours(epochs, gpus, efficiency, settings.images)
                figures = f"{gpus} | {epochs} | {hours:,.1f} | {hours * gpus:,.0f}"
                yield f"| {near.model} | {figures} | {' '.join(words)}{scaled} |"
    yield PAPER


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.cost", description="Hours and GPU-hours of pretraining, from a measured speed."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run", type=Path, metavar="FOLDER", help="output_dir of a pretraining run")
    where.add_argument("--real-images", type=Path, metavar="FILE", help="from recipes.loader_speed --step --json")
    where.add_argument("--throughput", type=Path, metavar="FILE", help="from eval.throughput --mode pretrain --output")
    where.add_argument("--images-per-second", type=float, metavar="SPEED", help="any other measurement")
    parser.add_argument("--model", metavar="NAME", help="name to show with --images-per-second")
    parser.add_argument("--measured-gpus", type=int, metavar="N", help="GPUs that reached --images-per-second (1)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="numbers to compute for %(default)s")
    does = "speed of N GPUs over N times that of one, used for all N but the number measured, larger or smaller"
    default = f"default: as measured where FILE has several numbers of GPUs, else {ASSUMED}"
    parser.add_argument("--efficiency", type=float, metavar="FRACTION", help=f"{does} ({default})")
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[300, 800, 1600], help="numbers to compute for %(default)s"
    )
    parser.add_argument("--images", type=int, default=IMAGENET_TRAIN_IMAGES, help="images of an epoch (%(default)s)")
    settings = parser.parse_args(argv)
    if settings.images_per_second is None and (settings.model or settings.measured_gpus):
        parser.error("--model and --measured-gpus go with --images-per-second; runs and measured files name both")
    for name, value in vars(settings).items():
        numbers = value if isinstance(value, list) else [value]
        if any(number <= 0 for number in numbers if isinstance(number, int | float)):
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if settings.efficiency is not None and not settings.efficiency < math.inf:
        parser.error(f"--efficiency is {settings.efficiency}; allowed: a number above 0, as in 0.9")
    given = settings.run or settings.real_images or settings.throughput
    damaged = f"{given} is damaged, or no run and no file of recipes.loader_speed or eval.throughput"
    try:
        if settings.run is not None:
            measured = [from_run(settings.run, "pretrain")]
        elif settings.real_images is not None:
            measured = from_real_images(settings.real_images)
        elif settings.throughput is not None:
            measured = from_throughput(settings.throughput)
        else:
            measured = [Measured(settings.model or "model", settings.images_per_second, settings.measured_gpus or 1)]
    except DAMAGED as error:
        parser.exit(1, f"{parser.prog}: {damaged}: {with_kind(error)}\n")
    except UNREADABLE as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    with reporting_mistakes(parser.prog):
        show("\n".join(table(measured, settings)))


if __name__ == "__main__":
    main()
