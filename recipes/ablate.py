"""The paper's tables 4 to 8, one command each: every row pretrained, finetuned and scored, for every seed.

python -m recipes.ablate 5 data.source=FOLDER
python -m recipes.ablate 8 5 4 7 6 data.source=FOLDER
python -m recipes.ablate 4 --preset digits --list
python -m recipes.ablate 8 --preset paper --gpus-per-run 8 data.source=IMAGENET

The rows and presets are the YAML files in recipes/ablations. Each run is the ordinary commands in processes of their
own, with as many runs side by side as there are GPUs, or several on each; those of the next table begin as soon as
there is room. The same command goes on where it was stopped: a run that has ended, for which a line in `runs.csv` is
enough, is kept, and any other is resumed.
"""

import argparse
import math
import os
import sys
from collections.abc import Container, Sequence
from pathlib import Path

import yaml

from recipes.ablations import FOLDER, PHASES
from recipes.parsing import SEED
from recipes.signals import EXIT_CODE, StopRequest, interrupted

TABLES = sorted(file.stem.removeprefix("table") for file in FOLDER.glob("table*.yaml"))


def read_given(text: str) -> int | str:
    """Read the number of a table, or leave `key=value` as it is."""
    if "=" in text:
        return text
    if text in TABLES:
        return int(text)
    allowed = f"{', '.join(TABLES)}, or key=value as in data.source=FOLDER"
    raise argparse.ArgumentTypeError(f"{text!r} is no table and no override; allowed: {allowed}")


def read_seeds(text: str) -> list[int]:
    """Read seeds separated by commas; each counts once."""
    allowed, holds = SEED
    try:
        seeds = [*dict.fromkeys(int(seed) for seed in text.split(","))]
    except ValueError:
        seeds = []
    if not seeds or not all(map(holds, seeds)):
        raise argparse.ArgumentTypeError(f"expected {allowed}, or several as in 0,1,2, got {text!r}")
    return seeds


def read_speed(text: str) -> tuple[str, float]:
    """Read `PHASE=SPEED`."""
    phase, _, speed = text.partition("=")
    try:
        if phase in PHASES and 0 < float(speed) < math.inf:
            return phase, float(speed)
    except ValueError:
        pass
    allowed = f"one of {', '.join(PHASES)}, and a number above 0, as in pretrain=20000"
    raise argparse.ArgumentTypeError(f"expected {allowed}, got {text!r}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.ablate",
        description="Run tables of the paper: every row and seed, resumed at any point.",
    )
    presets = list(yaml.safe_load((FOLDER / "presets.yaml").read_text(encoding="utf-8")))
    parser.add_argument("--preset", choices=presets, default="small", help="models and images (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder, for one command at a time (runs/ablations/PRESET)")
    parser.add_argument(
        "--row", action="append", default=[], metavar="NAME", help="run only the row of this name; may be repeated"
    )
    parser.add_argument("--seeds", type=read_seeds, metavar="0,1,2", help="seeds to run, instead of the preset's")
    parser.add_argument("--gpus-per-run", type=int, default=1, metavar="N", help="GPUs of a run (%(default)s)")
    parser.add_argument(
        "--runs-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="runs that share a GPU, for small models (%(default)s)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="run nothing, but put the tables of the runs that have ended into this Markdown file, each under its "
        "line `### TITLE, preset PRESET`",
    )
    instead.add_argument("--list", action="store_true", help="show what is left to run, and for how long, then end")
    parser.add_argument(
        "--speed",
        action="append",
        type=read_speed,
        default=[],
        metavar="PHASE=SPEED",
        help="images per second of a run on one GPU, or on its share of one, for --list; may be repeated",
    )
    parser.add_argument(
        "given",
        nargs="+",
        type=read_given,
        metavar="TABLE | key=value",
        help="tables by their numbers in the paper; settings of all phases, or of one as in finetune.epochs=50",
    )
    settings = parser.parse_intermixed_args(argv)
    settings.overrides = [given for given in settings.given if isinstance(given, str)]
    settings.tables = [*dict.fromkeys(given for given in settings.given if isinstance(given, int))]
    if not settings.tables:
        parser.error(f"no table is given; allowed: one or more of {', '.join(TABLES)}")
    for option in ("gpus_per_run", "runs_per_gpu"):
        if (number := getattr(settings, option)) < 1:
            parser.error(f"--{option.replace('_', '-')} is {number}; allowed: a whole number, 1 or more")
    try:
        from recipes.errors import reporting_mistakes  # imports torch, which takes seconds

        with reporting_mistakes(parser.prog):
            ablate(settings)
    except KeyboardInterrupt:
        interrupted(f"{parser.prog}: interrupted; the same command goes on")


def ablate(settings: argparse.Namespace) -> None:
    """Run tables, list what is left of them, or put their results into a document, as the command line says."""
    import torch

    from arm_zoo.command_line import show
    from recipes.ablations import report, runs
    from recipes.ablations.tables import Table, read_tables
    from recipes.errors import RunError
    from recipes.training.alone import alone_in

    tables = read_tables(settings.tables, settings.preset, settings.overrides, settings.row)
    output = (settings.output or Path("runs", "ablations", settings.preset)).absolute()
    all_runs = [run for table in tables for run in runs.runs_of(table, settings.seeds or table.seeds, output)]
    outcomes = report.read_outcomes(output)

    def has(table: Table, names: Container[str]) -> bool:
        return any(run.row in table.rows and run.name in names for run in all_runs)

    def folder_of(table: Table) -> Path:
        return output / f"table{table.number}"

    if settings.list:
        at_once = max(1, torch.cuda.device_count() // settings.gpus_per_run) * settings.runs_per_gpu
        speeds = dict(settings.speed)
        show("\n".join(report.plan(tables, all_runs, outcomes, speeds, settings.gpus_per_run, at_once)))
        return
    if settings.into is not None:
        for table in tables:
            if not has(table, outcomes):  # the document may have the figures of other settings
                problem = f"{output / report.RUNS} has no run of {table.title} with these settings"
                raise RunError(f"{problem}; type those with which they were trained, data.source too")
        for table in tables:
            lines = report.write_results(table, all_runs, outcomes, folder_of(table))
            figure = f"![{table.title}]({os.path.relpath(folder_of(table) / report.PLOT, settings.into.parent)})"
            report.replace_section(settings.into, f"### {table.title}, preset {settings.preset}", [*lines, "", figure])
            show(f"wrote {folder_of(table)} and the table in {settings.into}")
        return

    def on_end(run: runs.Run) -> None:
        outcome = outcomes[run.name] = run.outcome(settings.runs_per_gpu)
        report.record(run, outcome, output)
        for table in tables:
            if has(table, {run.name}):
                report.write_results(table, all_runs, outcomes, folder_of(table))
        show(f"{run.row.name}, seed {run.seed}: top-1 {outcome.top1:.2f}%")

    stop = StopRequest().listen()
    slots = runs.slots_of(runs.gpu_groups(settings.gpus_per_run), settings.runs_per_gpu)
    scheduler = runs.Scheduler(slots, stop, on_end)
    if left := [run for run in all_runs if run.name not in outcomes]:
        runs.check(tables, output)
    with alone_in(output):
        scheduler.carry_out(left)
        for table in tables:
            report.write_results(table, all_runs, outcomes, folder_of(table))
            show(f"wrote {folder_of(table)}")
    if stop.name is not None:
        show(f"{stop.name}: stopped; the same command goes on")
        sys.exit(EXIT_CODE)
    if scheduler.failed:
        logs = ", ".join(str(log) for _, log in scheduler.failed)
        raise RunError(
            f"{len(scheduler.failed)} of {len(all_runs)} runs failed; see {logs}. The same command tries them again"
        )


if __name__ == "__main__":
    main()
