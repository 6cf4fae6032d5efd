"""What the command lines that score share: options, processes, and messages for what the user can mend."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from accelerate import PartialState

from arm_zoo.images.columns import Choices
from arm_zoo.images.decode import MAX_PIXELS
from eval import sets
from eval.own import AS_USUAL
from eval.results import Row
from eval.rows import Request
from eval.scoring import DTYPES, Settings
from eval.sets import CUSTOM, REAL, SETS

SETS_HELP = (
    f"NAME of {', '.join(SETS)}, and real beside in1k; PATH a folder, tar or parquet file, a pattern or folder of "
    "these, or a Hub dataset OWNER/NAME[@REVISION][:SPLIT]; NAME=PATH again adds files"
)
PATIENCE = timedelta(hours=12)  # how long a process waits for slower ones


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected points between 0 and 100, got {text!r}")
    return value


def usable_device(text: str) -> torch.device:
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise argparse.ArgumentTypeError("device 'meta' holds no numbers; expected cpu, cuda, ...")
    return device


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Those of all programs that score."""
    add = parser.add_argument
    add("--sets", nargs="+", required=True, metavar="NAME=PATH", help=SETS_HELP)
    for what in ("image", "label"):
        add(f"--{what}-column", metavar="NAME", help=f"of custom's {what}s, in parquet files, tars or a Hub dataset")
    add("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N", help="of an image of custom (%(default)s)")
    add(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; with several processes each takes a GPU of its own (default: %(default)s)",
    )
    add("--batch-size", type=positive, default=64, help="of each process (default: %(default)s)")
    add("--dtype", choices=list(DTYPES), default="fp32", help="bf16 and fp16: fp32 weights under autocast")
    add("--limit", type=positive, metavar="N", help="score N pictures across each set only; the rows are marked")
    add("--train-size", action="store_true", help="leave out the test size and crop of the model's configuration")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    add("--workers", type=whole, default=share, help="processes that decode pictures, beside each (%(default)s)")


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(args.batch_size, args.workers, args.dtype, args.limit)


def parse_sets(words: Sequence[str]) -> tuple[dict[str, list[str]], bool]:
    """`in1k=PATH v2=PATH real` -> locations by set, a set given twice has several files; and whether ReaL is asked."""
    locations: dict[str, list[str]] = {}
    real = False
    for word in words:
        name, _, location = word.partition("=")
        if word == REAL:
            real = True
        elif name == REAL:
            raise ValueError(f"--sets {word}: real takes no path, its pictures are in1k's: --sets in1k=PATH real")
        elif name not in SETS or not location:
            raise ValueError(f"--sets {word}: allowed are real and NAME=PATH with NAME one of {', '.join(SETS)}")
        else:
            locations.setdefault(name, []).append(location)
    if real and "in1k" not in locations:
        raise ValueError("--sets real scores the pictures of in1k by other labels; add in1k=PATH")
    return locations, real


def choices_of(args: argparse.Namespace) -> Choices:
    return Choices(args.image_column, args.label_column, max_pixels=args.max_pixels, in_training=False)


def open_requests(locations: dict[str, list[str]], real: bool, choices: Choices) -> list[Request]:
    """All sets, in1k first because its clean pictures go into the rows of A and R; labels are tried once."""
    if choices != AS_USUAL and CUSTOM not in locations:
        raise ValueError(
            f"--image-column, --label-column and --max-pixels are for --sets {CUSTOM}=PATH, which is not asked for"
        )
    requests = [
        Request(name, sets.open_set(name, locations[name], choices), real and name == "in1k")
        for name in SETS
        if name in locations
    ]
    for request in requests:
        if request.name != CUSTOM:
            labelled = sets.label(request.name, request.listing)
            if request.real:
                sets.real_label_sets(labelled)
    return requests


def start_processes(device: torch.device) -> PartialState:
    """This process's part of the job.

    Raises:
        ValueError: if the launcher started more processes than take part.
    """
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched but {state.num_processes} would take part on --device {device}; "
            "launch them with torchrun or accelerate, on cpu or cuda"
        )
    if launched == 1 and state.device.type == device.type:
        state.device = device
    return state


def warn(row: Row) -> None:
    """Say on stderr what is not canonical about a row."""
    if row["marks"]:
        print(f"warning: {row['model']}, {row['set']}: {row['marks']}", file=sys.stderr)


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The exit code of a run. What the user can mend is one line on stderr, by one process."""
    try:
        return run(args)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"error: the GPU's memory is full, use a smaller --batch-size: {str(error).splitlines()[0]}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped; python -m eval --resume goes on from here", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
