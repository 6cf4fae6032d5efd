"""The common part of the programs that score: options and processes."""

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import PartialState

from arm_zoo.command_line import positive, usable_device
from arm_zoo.images.columns import Choices
from arm_zoo.images.decode import MAX_PIXELS
from eval.scoring import labels
from eval.scoring.custom import AS_USUAL
from eval.scoring.predict import DTYPES, Settings
from eval.scoring.rows import Request
from eval.scoring.sets import CUSTOM, REAL, SETS

NAMES = [name for name, spec in SETS.items() if not spec.images_of]
SETS_HELP = (
    f"NAME is one of {', '.join(NAMES)}; `real` may follow in1k. PATH is a folder, tar or parquet file, a pattern or "
    "folder of these, or a Hub dataset OWNER/NAME[@REVISION][:SPLIT]; a repeated NAME=PATH adds files"
)
PATIENCE = timedelta(hours=12)  # how long a process waits for slower ones


def zero_or_more(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def scoring_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all programs that score."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sets", nargs="+", required=True, metavar="NAME=PATH", help=SETS_HELP)
    for what in ("image", "label"):
        place = f"the column of custom's {what}s, in parquet files, tars or a Hub dataset"
        add(f"--{what}-column", metavar="NAME", help=place)
    pixels = "larger images of custom count as damaged (%(default)s)"
    add("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N", help=pixels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=device, help="with several processes, each takes a GPU (%(default)s)")
    add("--batch-size", type=positive, default=64, help="images per forward pass of each process (%(default)s)")
    halves = "bf16 and fp16: fp32 weights under autocast (%(default)s)"
    add("--dtype", choices=list(DTYPES), default="fp32", help=halves)
    add("--limit", type=positive, metavar="N", help="score only N images across each set; the rows get a warning")
    add("--train-size", action="store_true", help="ignore the test size and crop of the model's configuration")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    decoding = "processes that decode images for each process (%(default)s)"
    add("--workers", type=zero_or_more, default=workers, help=decoding)
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(args.batch_size, args.workers, args.dtype, args.limit)


def parse_sets(words: Sequence[str]) -> dict[str, list[str]]:
    """Read `in1k=PATH v2=PATH real`: the locations of each set, several if a set is repeated, none of `real`."""
    locations: dict[str, list[str]] = {}
    for word in words:
        name, _, location = word.partition("=")
        if name == REAL and location:
            raise ValueError(f"--sets {word}: real takes no path, as its images are in1k's: --sets in1k=PATH real")
        if word != REAL and (name not in NAMES or not location):
            raise ValueError(f"--sets {word}: allowed are real and NAME=PATH with NAME one of {', '.join(NAMES)}")
        locations.setdefault(name, []).append(location)
    if REAL in locations and "in1k" not in locations:
        raise ValueError("--sets real scores the images of in1k by other labels; add in1k=PATH")
    return locations


def open_requests(args: argparse.Namespace) -> list[Request]:
    """Open all sets, in1k first because its clean images go into the rows of A and R; check labels before models."""
    locations = parse_sets(args.sets)
    choices = Choices(args.image_column, args.label_column, max_pixels=args.max_pixels, in_training=False)
    if choices != AS_USUAL and CUSTOM not in locations:
        such = "--image-column, --label-column and --max-pixels"
        raise ValueError(f"{such} are for --sets {CUSTOM}=PATH, which is not asked for")
    requests = []
    for name in [name for name in NAMES if name in locations]:
        request = Request(name, labels.open_set(name, locations[name], choices), name == "in1k" and REAL in locations)
        if name != CUSTOM:
            labels.label(name, request.listing).answers(request.real)
        requests.append(request)
    return requests


def start_processes(device: torch.device) -> PartialState:
    """Join the launcher's processes; ValueError if it started more processes than would take part."""
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        part = f"{launched} processes were launched but {state.num_processes} would take part on --device {device}"
        raise ValueError(f"{part}; launch them with torchrun or accelerate, on cpu or cuda")
    if launched == 1 and state.device.type == device.type:
        state.device = device
    return state
