"""Scores timm models, ours or not, on the ImageNet test sets, and appends one row for each model and set to a CSV.

Run from the repository root, for example
`python -m eval --models arm_base_patch16_224 --weights arm_base.safetensors --sets in1k=imagenet real a=imagenet-a`;
with several processes `torchrun --nproc_per_node 2 -m eval ... --device cpu` or `accelerate launch -m eval ...`.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval import models, results, sets, speed
from eval.options import (
    add_scoring_options,
    choices_of,
    guarded,
    open_requests,
    parse_sets,
    settings_of,
    start_processes,
    warn,
)
from eval.results import Row
from eval.rows import Scorer
from eval.sets import CUSTOM

WIDTH = 120  # characters of the tables


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


def run(args: argparse.Namespace) -> int:
    weights = models.parse_weights(args.weights, args.models) if args.weights else {}
    if not args.models and not args.show_mapping:
        raise ValueError("nothing to score: name models with --models")
    models.check(args.models, weights)
    if args.output.suffix != ".csv" or not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output must be a .csv file in a folder that exists, got {str(args.output)!r}")
    results.read(args.output)
    locations, real = parse_sets(args.sets)
    state = start_processes(args.device)
    requests = open_requests(locations, real, choices_of(args))
    if args.show_mapping and state.is_main_process:
        for request in requests:
            if request.name == CUSTOM:
                print("custom: no mapping of its own; each model's label_names say which class has which index")
            else:
                labelled = sets.label(request.name, request.listing)
                lines = [*sets.mapping(labelled), *(sets.real_mapping(labelled) if request.real else [])]
                print("\n".join(lines))
    settings = settings_of(args)
    scorer = Scorer(args.output, settings, state, args.resume, args.recompute)
    candidates = (models.load(name, weights.get(name), args.train_size) for name in args.models)
    if args.speed:
        if state.num_processes > 1:
            raise ValueError("--speed measures one process; start it without a launcher")
        speeds = [speed.measure(one, request.listing, settings, state) for one in candidates for request in requests]
        Console(width=WIDTH, markup=False, emoji=False).print(speed.as_table(speeds, settings))
        return 0
    rows = []
    for candidate in candidates:
        for row, fresh in scorer.rows(candidate, requests):
            rows.append(row)
            if state.is_main_process:
                if not fresh:
                    print(
                        f"{row['model']}, {row['set']}: finished before; --recompute scores it again", file=sys.stderr
                    )
                warn(row)
    if rows and state.is_main_process:
        Console(width=WIDTH, markup=False, emoji=False).print(as_table(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
