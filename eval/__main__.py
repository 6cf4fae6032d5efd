"""Scores timm models, ours or not, on the ImageNet test sets, and appends one row for each model and set to a CSV.

Run from the repository root, for example
`python -m eval --models arm_base_patch16_224 --weights arm_base.safetensors --sets in1k=imagenet real a=imagenet-a`;
with several processes `torchrun --nproc_per_node 2 -m eval ... --device cpu` or `accelerate launch -m eval ...`.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval import models, results, sets, speed
from eval.results import Row
from eval.rows import Request, Scorer
from eval.scoring import DTYPES, Settings
from eval.sets import CUSTOM, REAL, SETS

WIDTH = 120  # characters of the tables
PATIENCE = timedelta(hours=12)  # how long a process waits for slower ones


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


def open_requests(locations: dict[str, list[str]], real: bool) -> list[Request]:
    """All sets, in1k first because its clean pictures go into the rows of A and R; labels are tried once."""
    requests = [
        Request(name, sets.open_set(name, locations[name]), real and name == "in1k")
        for name in SETS
        if name in locations
    ]
    for request in requests:
        if request.name != CUSTOM:
            labelled = sets.label(request.name, request.listing)
            if request.real:
                sets.real_label_sets(labelled)
    return requests


def as_table(rows: Sequence[Row]) -> Table:
    """The rows for people; the CSV has more."""
    table = Table(box=SIMPLE_HEAD)
    for title in ("model", "set"):
        table.add_column(title, overflow="fold")
    for title in ("n", "top-1", "95%", "top-5", "clean 200", "ECE", "img/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        figures = {k: float(row[k]) for k in ("top1", "top1_low", "top1_high", "top5", "ece", "img_per_s")}
        clean = row.get(f"clean200_{row['set']}_top1") or ""
        table.add_row(
            *(str(row["model"]), f"{row['set']}{' *' if row['marks'] else ''}", str(row["n"])),
            *(f"{figures['top1']:.2f}", f"{figures['top1_low']:.2f} - {figures['top1_high']:.2f}"),
            *(f"{figures['top5']:.2f}", f"{float(clean):.2f}" if clean else "-"),
            *("-" if math.isnan(figures["ece"]) else f"{figures['ece']:.2f}", f"{figures['img_per_s']:.1f}"),
        )
    if any(row["marks"] for row in rows):
        table.caption = "* not the canonical set: see the warnings and the column marks"
    return table


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    return 0 if text == "0" else positive(text)


def usable_device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from error


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    """Those that `eval.verify` has, too."""
    add = parser.add_argument
    add("--sets", nargs="+", required=True, metavar="NAME=PATH", help=f"of {', '.join(SETS)}; and real, with in1k")
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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=[], metavar="NAME", help="timm names, ours or not; hf-hub: and local-dir: too")
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="FILE",
        help="file, folder or hf-hub:OWNER/NAME; MODEL=FILE for several models; without: the hosted weights",
    )
    add_scoring_options(parser)
    add("--output", type=Path, default=Path("results.csv"), metavar="FILE", help="CSV that rows are appended to")
    add("--resume", action="store_true", help="go on within the set at which a run died, by OUTPUT.partial")
    add("--recompute", action="store_true", help="score again what the CSV has already, and append it anew")
    add("--speed", action="store_true", help="score nothing: time the loader alone, the model alone, and both")
    add("--show-mapping", action="store_true", help="print which class index three pictures of each set get, first")
    return parser


def run(args: argparse.Namespace) -> None:
    weights = models.parse_weights(args.weights, args.models) if args.weights else {}
    if not args.models and not args.show_mapping:
        raise ValueError("nothing to score: name models with --models")
    models.check(args.models, weights)
    if args.output.suffix != ".csv" or not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output must be a .csv file in a folder that exists, got {str(args.output)!r}")
    results.read(args.output)
    locations, real = parse_sets(args.sets)
    state = start_processes(args.device)
    requests = open_requests(locations, real)
    if args.show_mapping and state.is_main_process:
        for request in requests:
            if request.name != CUSTOM:
                print("\n".join(sets.mapping(sets.label(request.name, request.listing))))
    settings = Settings(args.batch_size, args.workers, args.dtype, args.limit)
    scorer = Scorer(args.output, settings, state, args.resume, args.recompute)
    candidates = (models.load(name, weights.get(name), args.train_size) for name in args.models)
    if args.speed:
        if state.num_processes > 1:
            raise ValueError("--speed measures one process; start it without a launcher")
        speeds = [speed.measure(one, request.listing, settings, state) for one in candidates for request in requests]
        Console(width=WIDTH).print(speed.as_table(speeds, settings))
        return
    rows = []
    for candidate in candidates:
        for row, fresh in scorer.rows(candidate, requests):
            rows.append(row)
            if state.is_main_process:
                report(row, fresh, args.output)
    if rows and state.is_main_process:
        Console(width=WIDTH).print(as_table(rows))


def report(row: Row, fresh: bool, output: Path) -> None:
    """Warnings about a row, and whether it was there already."""
    if not fresh:
        print(f"{row['model']}, {row['set']}: finished in {output}; --recompute scores it again", file=sys.stderr)
    if row["marks"]:
        print(f"warning: {row['model']}, {row['set']}: {row['marks']}", file=sys.stderr)


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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. What the user can mend is one line on stderr, by one process."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
