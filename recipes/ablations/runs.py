"""The runs of a table: a row with a seed each, carried out by the ordinary commands in processes of their own."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from arm_zoo.command_line import show
from recipes.ablations import FOLDER
from recipes.ablations.tables import Row, Table, file_and_overrides
from recipes.errors import RunError
from recipes.parsing import ConfigError, flatten, missing
from recipes.signals import StopRequest
from recipes.training.ema import FIGURES, winner
from recipes.training.resume import CURVES, OPERATION

CHECKOUT = FOLDER.parent.parent
PAUSE = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    top1: float  # in percent
    gpu_hours: float  # of the run's share of a GPU, by the clock


@dataclass(frozen=True)
class Run:
    """One seed of a row, in a folder whose name follows from the settings: equal rows of several tables share it."""

    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What tells this run from all others that compute something else."""
        return self.folder.name

    def output_dir(self, phase: str) -> Path:
        """The output folder of a phase."""
        return self.folder / phase

    def has_ended(self, phase: str) -> bool:
        """Whether a phase has run to its end."""
        return (self.output_dir(phase) / CURVES).is_file()

    def next_phase(self) -> str | None:
        """The first phase that has not ended; None if all have."""
        return next((phase for phase in self.row.phases if not self.has_ended(phase)), None)

    def arguments(self, phase: str) -> list[str]:
        """The arguments of the recipe for a phase; the phases before it have ended."""
        config, overrides = file_and_overrides(phase, self.row.phases, self.folder)
        return ["--config", str(config), *overrides, f"seed={self.seed}", f"output_dir={self.output_dir(phase)}"]

    def history(self, phase: str) -> list[dict[str, float]]:
        """The figures of each epoch that a phase has done so far; RunError if their file is damaged."""
        file = self.output_dir(phase) / "metrics.jsonl"
        try:
            return [dict(json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []
        except (TypeError, ValueError):
            raise self._damaged(file) from None

    def outcome(self, runs_per_gpu: int) -> Outcome:
        """The result, once all phases have ended; RunError if their figures are damaged."""
        try:
            ends = [self.history(phase)[-1] for phase in self.row.phases]
            seconds = sum(end["seconds"] * end["processes"] for end in ends)
            return Outcome(ends[-1][FIGURES[winner(ends[-1])]], seconds / 3600 / runs_per_gpu)
        except (IndexError, KeyError):
            raise self._damaged(self.folder / "*" / "metrics.jsonl") from None

    def _damaged(self, file: Path) -> RunError:
        return RunError(f"{file} is damaged; delete {self.folder}, and the same command trains this run anew")


def runs_of(table: Table, seeds: Sequence[int], output: Path) -> list[Run]:
    """Every row with the first seed, then with the next one: a table that is stopped early lacks seeds, not rows."""
    return [Run(row, seed, output / "runs" / digest(row, seed)) for seed in seeds for row in table.rows]


def digest(row: Row, seed: int) -> str:
    """A name for what a run computes, whatever its row is called and however it is carried out.

    It follows from the settings that differ from their defaults, so that settings added later leave it as it is.
    """
    computed = {}
    for phase, config in row.configs.items():
        defaults = dict(flatten(dataclasses.asdict(type(config)())))
        settings = {key: value for key, value in flatten(dataclasses.asdict(config)) if key not in OPERATION}
        computed[phase] = {key: value for key, value in settings.items() if value != defaults.get(key)}
    return hashlib.sha256(json.dumps([computed, seed], sort_keys=True).encode()).hexdigest()[:12]


def check(tables: Iterable[Table], output: Path) -> None:
    """Raise ConfigError for whatever the first phase of a row needs and this machine does not have."""
    problems: dict[str, str] = {}
    for row in (row for table in tables for row in table.rows):
        config = dataclasses.replace(next(iter(row.configs.values())), output_dir=str(output))
        problems |= missing(config) | config.unready()
    if problems:
        raise ConfigError(problems)


class Scheduler:
    """Carries out runs side by side, one at a time in each slot."""

    def __init__(self, slots: Sequence[str], stop: StopRequest, on_end: Callable[[Run], None]) -> None:
        """`slots` are values of CUDA_VISIBLE_DEVICES, "" for the CPU; `on_end` is called with each run that ends."""
        self._slots, self._stop, self._on_end = slots, stop, on_end
        self._running: dict[int, tuple[Run, str, subprocess.Popen[bytes]]] = {}  # by the number of the slot
        self.failed: list[tuple[Run, Path]] = []  # with the log that says why

    def carry_out(self, runs: Sequence[Run]) -> None:
        """Carry out the runs until asked to stop; a run that fails is left, and the others go on."""
        waiting = deque({run.folder: run for run in runs}.values())
        try:
            while (self._running or waiting) and self._stop.name is None:
                for slot in range(len(self._slots)):
                    if waiting and slot not in self._running:
                        self._start(waiting.popleft(), slot)
                for slot in [*self._running]:
                    if (run := self._poll(slot)) is not None:
                        waiting.appendleft(run)
                time.sleep(PAUSE)
        finally:
            for _, _, process in self._running.values():
                process.terminate()  # once: a launcher that is asked again no longer waits for its processes
            for _, _, process in self._running.values():
                process.wait()

    def _start(self, run: Run, slot: int) -> None:
        """Start the next phase of a run."""
        group, phase = self._slots[slot], run.next_phase()
        if phase is None:  # an earlier command was killed before it could record the run
            self._on_end(run)
            return
        gpus = group.count(",") + 1
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        command = [sys.executable, *launcher, "-m", f"recipes.{phase}", *run.arguments(phase)]
        # paths are those of the folder in which the command was typed, which need not be the checkout
        imports = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": imports} | ({"CUDA_VISIBLE_DEVICES": group} if group else {})
        run.folder.mkdir(parents=True, exist_ok=True)
        with log_of(run, phase).open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._running[slot] = (run, phase, process)
        show(f"{run.row.name}, seed {run.seed}: {phase}{f' on GPU {group}' if group else ''}")

    def _poll(self, slot: int) -> Run | None:
        """Look whether the phase in a slot has ended; a run that succeeded and has another phase is given back."""
        run, phase, process = self._running[slot]
        if process.poll() is None:
            return None
        del self._running[slot]
        following = run.next_phase()
        if process.returncode == 0 and following is None:
            self._on_end(run)
        elif process.returncode == 0 and following != phase:
            return run
        elif self._stop.name is None:
            self.failed.append((run, log_of(run, phase)))
            show(f"{run.row.name}, seed {run.seed}: {phase} failed, see {log_of(run, phase)}")
        return None


def log_of(run: Run, phase: str) -> Path:
    """What a phase prints goes to this file."""
    return run.folder / f"{phase}.log"


def gpu_groups(per_run: int) -> list[str]:
    """The GPUs that this process sees, `per_run` in each group; one group "" for the CPU where there are none."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = seen.split(",")[:count] if seen else [str(number) for number in range(count)]
    if per_run > max(1, len(gpus)):
        raise RunError(f"--gpus-per-run is {per_run}, but there are {len(gpus)} GPUs; allowed: up to as many, or 1")
    return [",".join(gpus[start : start + per_run]) for start in range(0, len(gpus) - per_run + 1, per_run)] or [""]


def slots_of(groups: Sequence[str], runs_per_gpu: int) -> list[str]:
    """Each group `runs_per_gpu` times, shifted by one in each round, so that slow rows meet less often on one GPU."""
    rounds = range(runs_per_gpu)
    return [groups[(number + turn) % len(groups)] for turn in rounds for number in range(len(groups))]
