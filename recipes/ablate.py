"""The paper's tables 4 to 8, one command each: every row pretrained, finetuned and scored, for every seed.

python -m recipes.ablate 5 data.source=FOLDER
python -m recipes.ablate 4 --preset digits --list
python -m recipes.ablate 8 --preset paper --gpus-per-run 8 data.source=IMAGENET

The rows and presets stand in recipes/ablations. Each run is the ordinary commands in processes of their own, as many
runs side by side as there are GPUs, or several on each. Started anew, this command goes on: finished runs are kept,
for which their line in `runs.csv` is enough, and others resumed.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from arm_zoo.files import WEIGHTS, write_text
from recipes.command_line import RECIPES, interrupted
from recipes.config import SEED, TrainConfig, load_config
from recipes.cost import Measured, from_run
from recipes.errors import RunError, reporting_mistakes
from recipes.parsing import ConfigError, flatten, missing
from recipes.probing.few_shot import half_width
from recipes.signals import EXIT_CODE, StopRequest
from recipes.training.alone import alone_in
from recipes.training.ema import FIGURES, winner
from recipes.training.export import EXPORT
from recipes.training.plots import plot_intervals
from recipes.training.resume import CURVES, OPERATION

CHECKOUT = Path(__file__).parent.parent
ABLATIONS, CONFIGS = CHECKOUT / "recipes" / "ablations", CHECKOUT / "recipes" / "configs"
PHASES = ("dvae", "pretrain", "finetune")  # in this order; every row has the last one
HANDED_ON = {"dvae": ("dvae", WEIGHTS), "pretrain": ("pretrained", EXPORT)}  # to the next: the key, what of the folder
PAUSE = 0.2  # seconds between two looks at the processes
RUNS = "runs.csv"  # of the output folder: a line for each run of any table that has ended
FIGURE = "figure.png"

Settings = dict[str, Any]  # by dotted key; `config` is the file's name


@dataclass(frozen=True)
class Row:
    """A row of a table: what is run for it, by phase, and what the paper reports."""

    name: str
    phases: Mapping[str, Settings]
    configs: Mapping[str, TrainConfig]  # that the settings come to
    reported: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """What a table comes to in a preset."""

    title: str
    rows: Sequence[Row]
    seeds: Sequence[int]
    images: int  # of an epoch


@dataclass(frozen=True)
class Outcome:
    """What a run has come to."""

    top1: float  # in percent
    gpu_hours: float  # by the clock of the run, of its share of a GPU


Outcomes = Mapping[str, Outcome]  # by the runs' names


@dataclass(frozen=True)
class Run:
    """One seed of a row, in a folder whose name follows from the settings: equal rows of several tables share it."""

    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What tells it from all runs that compute something else."""
        return self.folder.name

    def place(self, phase: str) -> Path:
        """The output folder of a phase."""
        return self.folder / phase

    def next_phase(self) -> str | None:
        """The first one that has not ended."""
        return next((phase for phase in self.row.phases if not (self.place(phase) / CURVES).is_file()), None)

    def command(self, phase: str) -> list[str]:
        """The recipe's words behind its name, for a phase whose forerunners have ended."""
        config, overrides = words(phase, self.row.phases, self.folder)
        return ["--config", str(config), *overrides, f"seed={self.seed}", f"output_dir={self.place(phase)}"]

    def history(self, phase: str) -> list[dict[str, float]]:
        """The figures of its epochs so far; RunError if their file is damaged."""
        file = self.place(phase) / "metrics.jsonl"
        try:
            return [dict(json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []
        except (TypeError, ValueError):
            raise self._damaged(file) from None

    def outcome(self, runs_per_gpu: int) -> Outcome:
        """Of a run that has ended; RunError if its figures are damaged."""
        try:
            ends = [self.history(phase)[-1] for phase in self.row.phases]
            seconds = sum(end["seconds"] * end["processes"] for end in ends)
            return Outcome(ends[-1][FIGURES[winner(ends[-1])]], seconds / 3600 / runs_per_gpu)
        except (IndexError, KeyError):
            raise self._damaged(self.folder / "*" / "metrics.jsonl") from None

    def _damaged(self, file: Path) -> RunError:
        return RunError(f"{file} is damaged; delete {self.folder}, and the same command trains this run anew")


def words(phase: str, phases: Mapping[str, Settings], folder: Path = Path()) -> tuple[Path, list[str]]:
    """A phase's configuration file and typed overrides; the phase before it has left its weights in `folder`.

    ConfigError for settings that each run of a table gets.
    """
    order = [*phases]
    before = order[order.index(phase) - 1] if phase != order[0] else None
    given: Settings = {"pretrained": None} if phase == "finetune" else {}
    if before is not None:
        key, name = HANDED_ON[before]
        given = {key: str(folder / before / name)}
    if taken := sorted(phases[phase].keys() & {"seed", "output_dir", *given}):
        says = "{} is set for each run; leave it out (--seeds and --output say which seeds, and where)"
        raise ConfigError({key: says.format(key) for key in taken})
    settings = phases[phase] | given
    typed = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return CONFIGS / typed.pop("config"), [f"{key}={value}" for key, value in typed.items()]


def read_table(number: int, preset: str, overrides: Sequence[str] = (), rows: Sequence[str] = ()) -> Table:
    """A table in a preset, with overrides as `key=value` for all phases, or `PHASE.key=value`.

    RunError for unknown rows and phases that none has, ConfigError for all rows at once whose settings are wrong.
    """
    read = yaml.safe_load((ABLATIONS / f"table{number}.yaml").read_text(encoding="utf-8"))
    shared = yaml.safe_load((ABLATIONS / "presets.yaml").read_text(encoding="utf-8"))[preset]
    like = shared.pop("rows", preset)  # of another preset, for what a row does not say for this one
    read_rows = [{**row, preset: row.get(preset, row.get(like, {}))} for row in read["rows"]]
    found = [row for row in read_rows if row[preset] is not None]
    if unknown := set(rows) - {row["name"] for row in found}:
        names = ", ".join(repr(row["name"]) for row in found)
        raise RunError(f"table {number} has no row {min(unknown)!r} in preset {preset}; allowed: {names}")
    configured = cache(lambda phase, file, *typed: load_config(RECIPES[phase][0], file, typed, to_run=False))
    made, problems = [], {}
    for row in (row for row in found if not rows or row["name"] in rows):
        phases, configs = phases_of(row, preset, shared, overrides), dict[str, TrainConfig]()
        for phase in phases:
            try:
                file, typed = words(phase, phases)
                configs[phase] = configured(phase, file, *typed)  # built once where rows share it
            except ConfigError as error:
                told = "; ".join(error.problems.values())
                problems[f"{row['name']}, {phase}"] = f"row {row['name']!r}, {phase}: {told}"
        made.append(Row(row["name"], phases, configs, row.get("reported", {})))
    if problems:
        raise ConfigError(problems)
    named = {override.partition(".")[0] for override in overrides} & {*PHASES}
    if idle := named - {phase for row in made for phase in row.phases}:
        raise RunError(f"none of these rows of table {number} has the phase {min(idle)}; leave out what is said of it")
    return Table(read["title"], made, shared["seeds"], shared["images"])


def phases_of(row: Mapping[str, Any], preset: str, shared: Settings, overrides: Sequence[str]) -> dict[str, Settings]:
    """The settings of a row by phase: those of the preset, the row, the row in this preset, and the overrides."""
    own: Mapping[str, Any] = row[preset]
    present = {"dvae": "dvae" in own, "pretrain": row.get("pretrain", {}) is not None, "finetune": True}
    phases = {
        phase: {**shared[phase], **row.get(phase, {}), **own.get(phase, {})} for phase in PHASES if present[phase]
    }
    for override in overrides:
        key, _, value = override.partition("=")
        phase, _, rest = key.partition(".")
        targets = [phase] if rest and phase in PHASES else [*phases]
        for target in targets:
            if target in phases:
                phases[target][rest if rest and phase in PHASES else key] = value
    return phases


def runs_of(table: Table, seeds: Sequence[int], output: Path) -> list[Run]:
    """Every row with the first seed, then with the next one: stopped early, a table has fewer seeds of each row."""
    return [Run(row, seed, output / "runs" / digest(row, seed)) for seed in seeds for row in table.rows]


def digest(row: Row, seed: int) -> str:
    """A name for what a run computes, whatever its row is called and however it is carried out.

    It follows from the settings that differ from their defaults, so that new ones leave it as it is.
    """
    computed = {}
    for phase, config in row.configs.items():
        defaults = dict(flatten(dataclasses.asdict(type(config)())))
        settings = {key: value for key, value in flatten(dataclasses.asdict(config)) if key not in OPERATION}
        computed[phase] = {key: value for key, value in settings.items() if value != defaults.get(key)}
    return hashlib.sha256(json.dumps([computed, seed], sort_keys=True).encode()).hexdigest()[:12]


def check(table: Table, output: Path) -> None:
    """Refuse what no run can do without: the first phase of each row names what it lacks on this machine."""
    problems: dict[str, str] = {}
    for row in table.rows:
        config = dataclasses.replace(next(iter(row.configs.values())), output_dir=str(output))
        problems |= missing(config) | config.unready()
    if problems:
        raise ConfigError(problems)


class Bench:
    """Runs side by side, one at a time in each place."""

    def __init__(self, places: Sequence[str], stop: StopRequest, told: Callable[[Run], None]) -> None:
        """`places` are values of CUDA_VISIBLE_DEVICES, "" for the CPU; `told` is called whenever a run has ended."""
        self._places, self._stop, self._told = places, stop, told
        self._running: dict[int, tuple[Run, str, subprocess.Popen[bytes]]] = {}  # by the number of the place
        self.failed: list[tuple[Run, Path]] = []  # with the log that says why

    def work(self, runs: Sequence[Run]) -> None:
        """Carry out the runs, until asked to stop; those that fail are left, and the others go on."""
        waiting = deque({run.folder: run for run in runs}.values())
        try:
            while (self._running or waiting) and self._stop.name is None:
                for number in range(len(self._places)):
                    if waiting and number not in self._running:
                        self._start(waiting.popleft(), number)
                for number in [*self._running]:
                    if (run := self._look(number)) is not None:
                        waiting.appendleft(run)
                time.sleep(PAUSE)
        finally:
            for _, _, process in self._running.values():
                process.terminate()  # once: a launcher that is asked again no longer waits for its processes
            for _, _, process in self._running.values():
                process.wait()

    def _start(self, run: Run, number: int) -> None:
        group, phase = self._places[number], run.next_phase()
        if phase is None:  # an earlier command was killed before it could tell
            self._told(run)
            return
        gpus = group.count(",") + 1
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        command = [sys.executable, *launcher, "-m", f"recipes.{phase}", *run.command(phase)]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": group} if group else {})
        run.folder.mkdir(parents=True, exist_ok=True)
        with self._log(run, phase).open("ab") as log:
            process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._running[number] = (run, phase, process)
        say(f"{run.row.name}, seed {run.seed}: {phase}{f' on GPU {group}' if group else ''}")

    def _look(self, number: int) -> Run | None:
        """A run whose phase has just ended well, if it has another one."""
        run, phase, process = self._running[number]
        if process.poll() is None:
            return None
        del self._running[number]
        following = run.next_phase()
        if process.returncode == 0 and following is None:
            self._told(run)
        elif process.returncode == 0 and following != phase:
            return run
        elif self._stop.name is None:
            self.failed.append((run, self._log(run, phase)))
            say(f"{run.row.name}, seed {run.seed}: {phase} failed, see {self._log(run, phase)}")
        return None

    def _log(self, run: Run, phase: str) -> Path:
        return run.folder / f"{phase}.log"


def say(text: str) -> None:
    print(text, flush=True)


def device_groups(per_run: int) -> list[str]:
    """The GPUs that this process sees, so many together; one group for the CPU where there are none."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = seen.split(",")[:count] if seen else [str(number) for number in range(count)]
    if per_run > max(1, len(gpus)):
        raise RunError(f"--gpus-per-run is {per_run}, but there are {len(gpus)} GPUs; allowed: up to as many, or 1")
    return [",".join(gpus[start : start + per_run]) for start in range(0, len(gpus) - per_run + 1, per_run)] or [""]


def places(groups: Sequence[str], runs_per_gpu: int) -> list[str]:
    """Each group so many times, one further on in each round: rows that take long meet less often on one."""
    rounds = range(runs_per_gpu)
    return [groups[(number + turn) % len(groups)] for turn in rounds for number in range(len(groups))]


def recorded(output: Path) -> list[dict[str, str]]:
    """The lines of `runs.csv`, one for each run that has ended."""
    file = output / RUNS
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []


def read_outcomes(output: Path) -> dict[str, Outcome]:
    """Of all runs that have ended, as far as `runs.csv` tells."""
    try:
        return {line["run"]: outcome_of(line) for line in recorded(output)}
    except (KeyError, TypeError, ValueError):
        allowed = "run,row,seed,top1,gpu_hours, and below it lines of which the last two are numbers"
        raise RunError(f"{output / RUNS} is damaged; allowed: {allowed}; take out what is not") from None


def outcome_of(line: Mapping[str, str]) -> Outcome:
    """What a line of `runs.csv` tells; KeyError, TypeError or ValueError if it is damaged."""
    outcome = Outcome(float(line["top1"]), float(line["gpu_hours"]))
    if None in line or not math.isfinite(outcome.top1 + outcome.gpu_hours):  # None has what is beyond the heading
        raise ValueError(line)
    return outcome


def record(run: Run, outcome: Outcome, output: Path) -> None:
    """Add a run that has ended to `runs.csv`."""
    line = {"run": run.name, "row": run.row.name, "seed": run.seed, **dataclasses.asdict(outcome)}
    write_text(output / RUNS, as_csv([*recorded(output), line]))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A heading, which is the keys of the first row, and a line for each row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def results(table: Table, runs: Sequence[Run], outcomes: Outcomes) -> list[dict[str, Any]]:
    """A row of figures for each row of the table, of the seeds that have ended."""
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


def write_results(table: Table, runs: Sequence[Run], outcomes: Outcomes, folder: Path) -> None:
    """Write `results.csv`, `table.md` and `figure.png` of what there is so far."""
    rows = results(table, runs, outcomes)
    write_text(folder / "results.csv", as_csv(rows))
    write_text(folder / "table.md", "\n".join([f"# {table.title}", "", *markdown(rows)]) + "\n")
    scored = {"here": [(row["top1"], row["interval95"]) for row in rows]}
    scored["the paper, ImageNet-1k"] = [(row["paper_top1"], None) for row in rows]
    plot_intervals(folder / FIGURE, table.title, [row["row"] for row in rows], scored)


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of a table of results; the intervals are Student's, of the mean over seeds."""
    yield "| row | top-1 (%) | 95% interval | seeds | GPU-hours of a run | paper: top-1 (%) | hours on 8 A5000 |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        figures = [
            ("top1", ".2f"),
            ("interval95", ".2f"),
            ("gpu_hours", ".2f"),
            ("paper_top1", ".1f"),
            ("paper_hours", "g"),
        ]
        top1, half, hours, paper, paper_hours = (
            "-" if row[key] is None else format(row[key], form) for key, form in figures
        )
        interval = half if half == "-" else f"± {half}"
        seeds = len(row["seeds"].split())
        yield f"| {row['row']} | {top1} | {interval} | {seeds} | {hours} | {paper} | {paper_hours} |"


def put_into(document: Path, heading: str, lines: Sequence[str]) -> None:
    """Put lines into a Markdown file, in place of what is between a heading, which must be there, and the next one."""
    section, text = "\n".join([heading, "", *lines, "", ""]), document.read_text(encoding="utf-8")
    whole, count = re.subn(rf"(?ms)^{re.escape(heading)}$.*?(?=^#|\Z)", lambda _: section, text, count=1)
    if not count:
        raise RunError(
            f"{document} has no line {heading!r}, under which the table goes; write it where that should be"
        )
    write_text(document, whole.rstrip("\n") + "\n")


def plan(
    table: Table,
    runs: Sequence[Run],
    outcomes: Outcomes,
    speeds: Mapping[str, float | None],
    gpus: int,
    at_once: int,
) -> Iterator[str]:
    """Lines of a Markdown table of what is left to run, and for how long, each run once."""
    yield "| row | seed | phase | epochs | state | hours |"
    yield "|---|---|---|---|---|---|"
    total = 0.0
    unknown, listed = False, set[Path]()
    for run in runs:
        for phase, config in run.row.configs.items():
            epochs, done = config.epochs, len(run.history(phase))
            ended = run.name in outcomes or (run.place(phase) / CURVES).is_file()
            state = "finished" if ended else f"{done} epochs done" if done else "to do"
            shared = run.place(phase) in listed
            listed.add(run.place(phase))
            speed = speeds.get(phase) or measured(runs, run, phase)
            hours = None
            if speed is not None and not ended:
                hours = Measured(run.row.name, speed).hours(epochs - done, gpus, 1.0, table.images)
            state, hours = ("as above", 0.0) if shared else (state, 0.0 if ended else hours)
            total, unknown = total + (hours or 0.0), unknown or hours is None
            shown = "unknown" if hours is None else f"{hours:.2f}"
            yield f"| {run.row.name} | {run.seed} | {phase} | {epochs} | {state} | {shown} |"
    yield ""
    side_by_side = f", {total / at_once:,.1f} with {at_once} side by side" if at_once > 1 else ""
    yield f"{total:,.1f} hours in all{side_by_side}{', without those unknown' if unknown else ''}"
    if unknown:
        yield "a speed of one GPU tells them: --speed pretrain=IMAGES_PER_SECOND --speed finetune=..."


def measured(runs: Sequence[Run], run: Run, phase: str) -> float | None:
    """Images per second of one GPU in a phase: of this run if it has begun, else of another one."""
    for other in (run, *(other for other in runs if other.row == run.row), *runs):
        if any("images_per_second" in row for row in other.history(phase)):
            found = from_run(other.place(phase))
            return found.images_per_second / found.gpus
    return None


def read_seeds(text: str) -> list[int]:
    """Seeds between commas, each once."""
    allowed, holds = SEED
    try:
        seeds = [*dict.fromkeys(int(seed) for seed in text.split(","))]
    except ValueError:
        seeds = []
    if not seeds or not all(map(holds, seeds)):
        raise argparse.ArgumentTypeError(f"expected {allowed}, or several as in 0,1,2, got {text!r}")
    return seeds


def read_speed(text: str) -> tuple[str, float]:
    """`PHASE=SPEED`."""
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
        description="Run a table of the paper: every row and seed, resumed at any point.",
    )
    presets = list(yaml.safe_load((ABLATIONS / "presets.yaml").read_text(encoding="utf-8")))
    numbers = sorted(int(file.stem.removeprefix("table")) for file in ABLATIONS.glob("table*.yaml"))
    parser.add_argument("table", type=int, choices=numbers, help="of the paper")
    parser.add_argument("--preset", choices=presets, default="small", help="models and images (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder (runs/ablations/PRESET); one command at a time in it")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="this one alone; may be repeated")
    parser.add_argument("--seeds", type=read_seeds, metavar="0,1,2", help="instead of the preset's")
    parser.add_argument("--gpus-per-run", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--runs-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="for models so small that one leaves it idle (%(default)s)",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="run nothing: write the table of the runs that have ended, and put it into this Markdown file, under the "
        "line `### TITLE, preset PRESET`",
    )
    instead.add_argument("--list", action="store_true", help="show what would run, and for how long, and end")
    parser.add_argument(
        "--speed",
        action="append",
        type=read_speed,
        default=[],
        metavar="PHASE=SPEED",
        help="images per second of a run on one GPU, or on its share of one, for --list; may be repeated",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of all phases, or of one as in finetune.epochs=50"
    )
    settings = parser.parse_intermixed_args(argv)
    for option in ("gpus_per_run", "runs_per_gpu"):
        if (number := getattr(settings, option)) < 1:
            parser.error(f"--{option.replace('_', '-')} is {number}; allowed: a whole number, 1 or more")
    if wrong := [override for override in settings.overrides if "=" not in override]:
        parser.error(f"{wrong[0]!r} is no override; type key=value, as in data.source=FOLDER")
    with reporting_mistakes(parser.prog):
        try:
            ablate(settings)
        except KeyboardInterrupt:
            interrupted(f"{parser.prog}: interrupted; the same command goes on")


def ablate(settings: argparse.Namespace) -> None:
    """Run or list a table as the command line says."""
    table = read_table(settings.table, settings.preset, settings.overrides, settings.row)
    output = (settings.output or Path("runs", "ablations", settings.preset)).absolute()
    runs, outcomes = runs_of(table, settings.seeds or table.seeds, output), read_outcomes(output)
    if settings.list:
        at_once = max(1, torch.cuda.device_count() // settings.gpus_per_run) * settings.runs_per_gpu
        say("\n".join(plan(table, runs, outcomes, dict(settings.speed), settings.gpus_per_run, at_once)))
        return
    folder = output / f"table{settings.table}"
    if settings.into is not None:
        if not any(run.name in outcomes for run in runs):  # the document may have figures of others
            problem = f"{output / RUNS} has none of the {len(runs)} runs of {table.title} with these settings"
            raise RunError(f"{problem}; type those with which they were trained, data.source too")
        write_results(table, runs, outcomes, folder)
        figure = f"![{table.title}]({os.path.relpath(folder / FIGURE, settings.into.parent)})"
        lines = [*markdown(results(table, runs, outcomes)), "", figure]
        put_into(settings.into, f"### {table.title}, preset {settings.preset}", lines)
        say(f"wrote {folder} and the table in {settings.into}")
        return

    def told(run: Run) -> None:
        outcome = outcomes[run.name] = run.outcome(settings.runs_per_gpu)
        record(run, outcome, output)
        write_results(table, runs, outcomes, folder)
        say(f"{run.row.name}, seed {run.seed}: top-1 {outcome.top1:.2f}%")

    stop = StopRequest().listen()
    bench = Bench(places(device_groups(settings.gpus_per_run), settings.runs_per_gpu), stop, told)
    if left := [run for run in runs if run.name not in outcomes]:
        check(table, output)
    with alone_in(output):
        bench.work(left)
        write_results(table, runs, outcomes, folder)
    say(f"wrote {folder}")
    if stop.name is not None:
        say(f"{stop.name}: stopped; the same command goes on")
        sys.exit(EXIT_CODE)
    if bench.failed:
        logs = ", ".join(str(log) for _, log in bench.failed)
        raise RunError(
            f"{len(bench.failed)} of {len(runs)} runs failed; see {logs}. The same command tries them again"
        )


if __name__ == "__main__":
    main()
