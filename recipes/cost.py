"""What pretraining on ImageNet-1k would take, from a speed that was measured: hours and GPU-hours, beside the paper's.

python -m recipes.cost --run runs/pretrain_base --gpus 8 --efficiency 0.9
python -m recipes.cost --throughput eval/throughput.csv   # of python -m eval.throughput --mode pretrain --output FILE
python -m recipes.cost --images-per-second 1500
"""

import argparse
import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

IMAGENET_TRAIN_IMAGES = 1_281_167
EPOCHS = (300, 800, 1600)
HEADINGS = ("model", "GPUs", "epochs", "hours", "GPU-hours", "speed")
# Section 4.4: 300 epochs of ARM-B on 8 A5000.
PAPER = ("ARM-B", "8 A5000", "300", "34.0", "272", "*reported by the paper*")


@dataclass(frozen=True)
class Measured:
    """A speed that was measured.

    Args:
        model: What was trained.
        images_per_second: Of all its GPUs together.
        gpus: How many they were.
        device: What they were, where that is known.
    """

    model: str
    images_per_second: float
    gpus: int = 1
    device: str = ""

    def hours(self, epochs: int, gpus: int, efficiency: float, images: int = IMAGENET_TRAIN_IMAGES) -> float:
        """Time for so many epochs.

        Args:
            epochs: Passes over the data.
            gpus: GPUs to train on.
            efficiency: Their speed divided by that of as many separate ones; not applied to the number measured.
            images: Pictures per epoch.
        """
        kept = 1.0 if gpus == self.gpus else efficiency
        return epochs * images / (self.images_per_second * gpus / self.gpus * kept) / 3600


def from_run(folder: Path) -> Measured:
    """The median speed of a run's epochs on the GPUs it had last.

    The first one of them, which compiles and warms up, is left out if there are others.

    Raises:
        ValueError: If the run has not measured it.
    """
    file = folder / "metrics.jsonl"
    if not file.exists():
        raise ValueError(f"there is no {file}; allowed: the output_dir of a pretraining run")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if {"images_per_second", "processes"} <= row.keys()]
    if not rows:
        raise ValueError(
            f"{file} holds no images_per_second with the number of processes; allowed: the output_dir of a "
            "pretraining run, or --images-per-second SPEED --measured-gpus N"
        )
    gpus = rows[-1]["processes"]  # one for each
    speeds = [row["images_per_second"] for row in rows if row["processes"] == gpus]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return Measured(config["model"], statistics.median(speeds[1:] or speeds), gpus)


def from_throughput(file: Path) -> list[Measured]:
    """The newest row of each model and device that ``eval.throughput --mode pretrain --output FILE`` wrote.

    Raises:
        ValueError: If there are none.
    """
    text = file.read_text(encoding="utf-8")
    read_csv = file.suffix == ".csv"
    rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines())) if read_csv else json.loads(text)
    measured = [
        Measured(row["model"], float(row["img_per_s"]), device=row.get("device", ""))
        for row in rows
        if row.get("mode") == "pretrain"
    ]
    if not measured:
        raise ValueError(f"{file} has no rows of pretraining; measure with --mode pretrain")
    return list({(one.model, one.device): one for one in measured}.values())


def table(measured: Sequence[Measured], settings: argparse.Namespace) -> Iterator[str]:
    """Lines of a Markdown table; the last row is the paper's."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield f"|{'---|' * len(HEADINGS)}"
    for one in measured:
        for gpus in settings.gpus:
            speed = f"{one.images_per_second:,.0f} img/s measured on {one.gpus} {one.device}".rstrip()
            if gpus != one.gpus:
                speed += f", {settings.efficiency:.0%} scaling efficiency assumed"
            for epochs in settings.epochs:
                hours = one.hours(epochs, gpus, settings.efficiency, settings.images)
                row = (one.model, str(gpus), str(epochs), f"{hours:,.1f}", f"{hours * gpus:,.0f}", speed)
                yield f"| {' | '.join(row)} |"
    yield f"| {' | '.join(PAPER)} |"


def above_zero(text: str) -> float:
    """A number above 0, for argparse."""
    if float(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return float(text)


def one_or_more(text: str) -> int:
    """A whole number, 1 or more, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.cost", description="Hours and GPU-hours of pretraining, from a measured speed."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run", type=Path, metavar="FOLDER", help="output_dir of a pretraining run")
    where.add_argument("--throughput", type=Path, metavar="FILE", help="of eval.throughput --mode pretrain --output")
    where.add_argument("--images-per-second", type=above_zero, metavar="SPEED", help="any other measurement")
    parser.add_argument("--model", metavar="NAME", help="to show for --images-per-second (model)")
    parser.add_argument("--measured-gpus", type=one_or_more, metavar="N", help="that gave --images-per-second (1)")
    parser.add_argument("--gpus", type=one_or_more, nargs="+", default=[1, 8], help="to compute for (1 8)")
    parser.add_argument(
        "--efficiency", type=above_zero, default=0.9, help="speed of N GPUs by N times that of one (%(default)s)"
    )
    parser.add_argument("--epochs", type=one_or_more, nargs="+", default=list(EPOCHS), help="(300 800 1600)")
    parser.add_argument(
        "--images", type=one_or_more, default=IMAGENET_TRAIN_IMAGES, help="per epoch (%(default)s: ImageNet-1k)"
    )
    settings = parser.parse_args(argv)
    if settings.images_per_second is None and (settings.model or settings.measured_gpus):
        parser.error("--model and --measured-gpus go with --images-per-second; runs and measured files tell both")
    try:
        if settings.run is not None:
            measured = [from_run(settings.run)]
        elif settings.throughput is not None:
            measured = from_throughput(settings.throughput)
        else:
            gpus = settings.measured_gpus or 1
            measured = [Measured(settings.model or "model", settings.images_per_second, gpus)]
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("\n".join(table(measured, settings)))


if __name__ == "__main__":
    main()
