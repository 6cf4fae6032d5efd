"""Score timm models, ours or others, on the ImageNet test sets, and append a row for each model and set to a CSV file.

Run from the repository root, for example
`python -m eval --models arm_base_patch16_224 --weights arm_base.safetensors --sets in1k=imagenet real a=imagenet-a`;
with several processes `torchrun --nproc_per_node 2 -m eval ... --device cpu` or `accelerate launch -m eval ...`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from arm_zoo.command_line import show
from eval import tables
from eval.command_line import guarded
from eval.scoring import labels, models
from eval.scoring.options import open_requests, scoring_parser, settings_of, start_processes
from eval.scoring.rows import Scorer
from eval.scoring.sets import CUSTOM, SETS, SUBSETS
from eval.speed import loader as speed
from eval.tables import Row, text_table

OVERVIEW = """Score models and time them:

python -m eval --models MODEL --weights FILE --sets in1k=PATH     top-1, top-5, calibration; --help shows all options
python -m eval.verify MODEL --weights FOLDER --sets in1k=PATH     compare a fresh score with a model's card
python -m eval.segmentation --model local-dir:RUN --data FOLDER   mIoU on images with masks
python -m eval.throughput                                         images per second of inference and training
python -m eval.scan                                               the scan's kernels one by one, on a GPU
python -m eval.leaderboard                                        LEADERBOARD.md and its page, from the results

The sets, and where to get them:
"""


def as_table(rows: Sequence[Row]) -> Table:
    """The rows as a table for people; the CSV file has more columns."""
    lines = []
    for row in rows:
        names = ("top1", "top1_low", "top1_high", "top5", f"{SETS[row['set']].clean}top1", "ece")
        texts = (f"{float(row.get(name) or 'nan'):.2f}" for name in names)
        top1, low, high, *others = (text.replace("nan", "-") for text in texts)
        name = f"{row['set']} *" if row["warnings"] else row["set"]
        lines.append([row["model"], name, str(row["n"]), top1, f"{low} - {high}", *others, row["img_per_s"]])
    caption = "* not the canonical set: see the column warnings" if any(row["warnings"] for row in rows) else None
    clean = f"clean {'/'.join(dict.fromkeys(str(SETS[name].classes) for name in SUBSETS))}"
    return text_table("", ["model", "set"], ["n", "top-1", "95%", "top-5", clean, "ECE", "img/s"], lines, caption)


def make_parser() -> argparse.ArgumentParser:
    parser = scoring_parser("python -m eval", __doc__)
    add = parser.add_argument
    named = "timm's names, ours or others; a model folder; or hf-hub:, hf://, local-dir:"
    add("--models", nargs="+", default=[], metavar="NAME", help=named)
    where = (
        "file, folder, hf-hub:OWNER/NAME or hf://OWNER/NAME/FILE; MODEL=FILE for several models; default: the entry's"
    )
    add("--weights", nargs="+", default=[], metavar="FILE", help=where)
    add(
        "--output", type=Path, default=tables.RESULTS, metavar="FILE", help="CSV file to add the rows to (%(default)s)"
    )
    add("--resume", action="store_true", help="go on within the set at which a run died, from OUTPUT.partial")
    add("--recompute", action="store_true", help="score again what the CSV file has already, and append it anew")
    add("--speed", action="store_true", help="score nothing: time the loader alone, the model alone, and both")
    add("--show-mapping", action="store_true", help="first print which classes are right for three images of each set")
    return parser


def run(args: argparse.Namespace) -> int:
    weights = models.parse_weights(args.weights, args.models) if args.weights else {}
    if not args.models and not args.show_mapping:
        raise ValueError("nothing to score: name models with --models")
    models.check(args.models, weights)
    if args.output.suffix != ".csv" or not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output must be a .csv file in a folder that exists, got {str(args.output)!r}")
    tables.read(args.output)
    requests, state = open_requests(args), start_processes(args.device)
    if args.show_mapping and state.is_main_process:
        for request in requests:
            if request.name == CUSTOM:
                show("custom: no mapping of its own; each model's label_names say which class has which index")
            else:
                show("\n".join(labels.mapping(labels.label(request.name, request.listing), request.real)))
    settings = settings_of(args)
    candidates = (models.load(name, weights.get(name), args.train_size) for name in args.models)
    if args.speed:
        if state.num_processes > 1:
            raise ValueError("--speed measures one process; start it without a launcher")
        speeds = [speed.measure(one, request.listing, settings, state) for one in candidates for request in requests]
        tables.show_table(speed.as_table(speeds, settings), width=120)
        return 0
    scorer = Scorer(args.output, settings, state, args.resume, args.recompute)
    rows = [row for candidate in candidates for row in scorer.rows(candidate, requests)]
    if rows and state.is_main_process:
        tables.show_table(as_table(rows), f"in full: {args.output}", width=120)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words:
        sets = (f"  {name:16}{spec.card_name or 'images of your own':28}{spec.source}" for name, spec in SETS.items())
        show(OVERVIEW + "\n".join(map(str.rstrip, sets)))
        return 0
    return guarded(run, make_parser().parse_args(words), "stopped; python -m eval --resume goes on from here")


if __name__ == "__main__":
    sys.exit(main())
