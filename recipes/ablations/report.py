"""What is left to run of a table, what has ended, and the table of results."""

import dataclasses
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arm_zoo.files import write_text
from arm_zoo.tables import FIGURE, Row, csv_text, read
from recipes.ablations.runs import Outcome, Run
from recipes.ablations.tables import Table
from recipes.cost import UNREADABLE, Measured, from_run, with_kind
from recipes.errors import RunError
from recipes.probing.few_shot import half_width
from recipes.training.plots import plot_intervals

RUNS = "runs.csv"  # in the output folder: a line for each run, of any table, that has ended
NUMBERS = tuple(field.name for field in dataclasses.fields(Outcome))
LINE = ("run", "row", "seed", *NUMBERS)
PLOT = "figure.png"

Outcomes = Mapping[str, Outcome]  # by the runs' names


def recorded(output: Path) -> list[Row]:
    """The lines of `runs.csv`, one for each run that has ended; RunError if one is damaged."""
    try:
        return read(output / RUNS, LINE, dict.fromkeys(NUMBERS, FIGURE)) if (output / RUNS).is_file() else []
    except ValueError as error:
        raise RunError(f"{error}; delete damaged lines") from error


def read_outcomes(output: Path) -> dict[str, Outcome]:
    """The results of all runs that `runs.csv` has a line for; RunError if two lines of a run differ."""
    outcomes = dict[str, Outcome]()
    for line in recorded(output):
        outcome = Outcome(*(float(line[name]) for name in NUMBERS))
        if outcomes.setdefault(line["run"], outcome) != outcome:
            raise RunError(f"{output / RUNS} has two results of run {line['run']}; delete the line of one of them")
    return outcomes


def record(run: Run, outcome: Outcome, output: Path) -> None:
    """Add a run that has ended to `runs.csv`."""
    line = {"run": run.name, "row": run.row.name, "seed": run.seed, **dataclasses.asdict(outcome)}
    write_text(output / RUNS, csv_text([*recorded(output), line], line))


def results(table: Table, runs: Sequence[Run], outcomes: Outcomes) -> list[dict[str, Any]]:
    """The figures of each row of the table, over the seeds that have ended."""
    found = []
    for row in table.rows:
        ended = [run for run in runs if run.row == row and run.name in outcomes]
        scores = [outcomes[run.name].top1 for run in ended]
        found.append(
            {
                "row": row.name,
                "top1": statistics.fmean(scores) if scores else None,
                "interval95": half_width(torch.tensor(scores, dtype=torch.float64)) if len(scores) > 1 else None,
                "scores": " ".join(map(str, scores)),
                "seeds": " ".join(str(run.seed) for run in ended),
                "gpu_hours": statistics.fmean(outcomes[run.name].gpu_hours for run in ended) if ended else None,
                "paper_top1": row.reported.get("top1"),
                "paper_hours": row.reported.get("hours"),
            }
        )
    return found


def write_results(table: Table, runs: Sequence[Run], outcomes: Outcomes, folder: Path) -> list[str]:
    """Write `results.csv`, `table.md` and `figure.png` of the runs that have ended; give the lines of the table."""
    rows = results(table, runs, outcomes)
    lines = [*markdown(rows)]
    write_text(folder / "results.csv", csv_text(rows, rows[0]))
    write_text(folder / "table.md", "\n".join([f"# {table.title}, preset {table.preset}", "", *lines]) + "\n")
    scored = {
        f"measured here: {table.data_set}, preset {table.preset}": [(row["top1"], row["interval95"]) for row in rows],
        "reported by the paper: ImageNet-1k": [(row["paper_top1"], None) for row in rows],
    }
    plot_intervals(folder / PLOT, table.title, [row["row"] for row in rows], scored)
    return lines


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a table of results; the intervals are Student's, of the mean over seeds."""
    yield "| row | top-1 (%) | 95% interval | seeds | GPU-hours of a run | paper: top-1 (%) | hours on 8 A5000 |"
    yield "|---|---|---|---|---|---|---|"
    formats = {"top1": ".2f", "interval95": ".2f", "gpu_hours": ".3g", "paper_top1": ".1f", "paper_hours": "g"}
    for row in rows:
        top1, half, hours, paper, paper_hours = (
            "-" if row[key] is None else format(row[key], form) for key, form in formats.items()
        )
        interval = half if half == "-" else f"± {half}"
        seeds = len(row["seeds"].split())
        yield f"| {row['row']} | {top1} | {interval} | {seeds} | {hours} | {paper} | {paper_hours} |"


def replace_section(document: Path, heading: str, lines: Sequence[str]) -> None:
    """Replace what a Markdown file has between a heading, which must be there, and the next heading."""
    section = "\n".join([heading, "", *lines, "", ""])
    try:
        text = document.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"{document} is no Markdown file, which is text in UTF-8: {error}; name one") from None
    whole, count = re.subn(rf"(?ms)^{re.escape(heading)}$.*?(?=^#|\Z)", lambda _: section, text, count=1)
    if not count:
        raise RunError(
            f"{document} has no line {heading!r}, under which the table goes; write it where that should be"
        )
    write_text(document, whole.rstrip("\n") + "\n")


def plan(
    tables: Sequence[Table],
    runs: Sequence[Run],
    outcomes: Outcomes,
    speeds: Mapping[str, float | None],
    gpus: int,
    at_once: int,
) -> Iterator[str]:
    """Lines of a Markdown table of what is left to run of tables, and for how many hours; equal runs count once.

    `speeds` are images per second of one GPU, by phase; without one, the speed is that of a run that has begun.
    """
    yield "| table | row | seed | phase | epochs | state | hours |"
    yield "|---|---|---|---|---|---|---|"
    images = {table.number: table.images for table in tables}
    known, unknown, listed = list[float](), False, set[Path]()
    for run in runs:
        for phase, config in run.row.configs.items():
            done, shown = len(run.history(phase)), "0.00"
            if run.output_dir(phase) in listed:
                state = "as above"
            elif run.name in outcomes or run.has_ended(phase):
                state = "finished"
            else:
                state = f"{done} epochs done" if done else "to do"
                speed = speeds.get(phase) or measured_speed(runs, run, phase)
                if speed is None:
                    unknown, shown = True, "unknown"
                else:
                    measured = Measured(run.row.name, speed)
                    known.append(measured.hours(config.epochs - done, gpus, 1.0, images[run.row.table]))
                    shown = f"{known[-1]:.2f}"
            listed.add(run.output_dir(phase))
            yield f"| {run.row.table} | {run.row.name} | {run.seed} | {phase} | {config.epochs} | {state} | {shown} |"
    yield ""
    total = sum(known)
    side_by_side = f", {total / at_once:,.1f} with {at_once} side by side" if at_once > 1 else ""
    yield f"{total:,.1f} hours in all{side_by_side}{', without those unknown' if unknown else ''}"
    if unknown:
        yield "to know them, type the speed of one GPU: --speed pretrain=IMAGES_PER_SECOND --speed finetune=..."


def measured_speed(runs: Sequence[Run], run: Run, phase: str) -> float | None:
    """Images per second of one GPU in a phase of this run; if that has not begun, of its row, else of any run."""
    for other in (run, *(other for other in runs if other.row == run.row), *runs):
        if any("images_per_second" in row for row in other.history(phase)):
            try:
                found = from_run(other.output_dir(phase), phase)
            except UNREADABLE as error:
                problem = f"the speed of {other.output_dir(phase)} cannot be read: {with_kind(error)}"
                raise RunError(f"{problem}; type another, as in --speed {phase}=IMAGES_PER_SECOND") from None
            return found.images_per_second / found.gpus
    return None
