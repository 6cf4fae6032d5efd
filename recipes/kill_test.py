"""Kill a run at random moments, go on each time, and compare the result with an uninterrupted run, bit by bit.

python -m recipes.kill_test --kills 20 --config recipes/configs/pretrain_digits.yaml epochs=3
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from recipes import command_line
from recipes.errors import RunError, reporting_mistakes

AIMED = 3  # every so many kills, one waits until a checkpoint is being written
PATIENCE = 600.0  # seconds that one process may take


class KillTest:
    """Runs of one command, in processes forked from a server that has everything imported already."""

    def __init__(self, recipe: str, arguments: Sequence[str], folder: Path, seed: int) -> None:
        """Take the recipe's arguments without `output_dir`, a folder for the runs, and the seed of the moments."""
        self._recipe, self._arguments, self._folder = recipe, list(arguments), folder
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        # the last two are imported by a run when it has started
        self._context.set_forkserver_preload([f"recipes.{recipe}", "sklearn.datasets", "sklearn.model_selection"])

    def run(self, kills: int) -> int:
        """Kill `kills` times, over as many runs as that takes; gives the number that hit a checkpoint's writing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = self._folder / "whole"
        server = self._context.Process(target=print)  # starts the server, whose start must not count as the run's
        server.start()
        self._finish(server)
        started = time.monotonic()
        self._finish(self._start(whole))
        duration = time.monotonic() - started
        killed = hits = runs = 0
        while killed < kills:
            runs += 1
            folder = self._folder / f"killed-{runs}"
            while killed < kills:
                delay = self._random.uniform(0, duration / 2)
                if self._kill(self._start(folder), folder, delay, aimed=killed % AIMED == 0):
                    break
                killed += 1
                hits += being_written(folder)
            self._finish(self._start(folder))
            self._compare(whole, folder)
            print(f"{killed} of {kills} kills, {hits} of them inside a checkpoint's writing; run {runs}: equal bits")
        return hits

    def _start(self, folder: Path) -> BaseProcess:
        arguments = (self._recipe, [*self._arguments, f"output_dir={folder}"], folder.with_suffix(".log"))
        process = self._context.Process(target=_train, args=arguments)
        process.start()
        return process

    def _finish(self, process: BaseProcess) -> None:
        process.join(PATIENCE)
        if (code := process.exitcode) != 0:
            end(process)
            raise RunError(f"a process of {self._folder} ended with {code}; see the logs in there")

    def _kill(self, process: BaseProcess, folder: Path, delay: float, aimed: bool) -> bool:
        """Send SIGKILL after a delay, or later when a checkpoint is being written; True if the run ended first."""
        process.join(delay)
        while aimed and process.is_alive() and not being_written(folder):
            time.sleep(0.0005)
        if not process.is_alive():
            self._finish(process)
            return True
        end(process)
        return False

    def _compare(self, whole: Path, other: Path) -> None:
        expected, found = (max((folder / "checkpoints").glob("step-*")) for folder in (whole, other))
        if expected.name != found.name:
            raise RunError(f"{other} ended at {found.name}, not at {expected.name}")
        for file in expected.glob("*.safetensors"):
            if file.read_bytes() != (found / file.name).read_bytes():
                raise RunError(f"{found / file.name} has other bits than {file}")


def end(process: BaseProcess) -> None:
    """Kill a run and its workers, which may outlive it."""
    process.kill()
    process.join()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]  # None only before its start


def being_written(folder: Path) -> bool:
    """Whether a run in `folder` is writing a checkpoint, or was when it was killed."""
    return any((folder / "checkpoints").glob(".partial-*"))


def _train(recipe: str, arguments: list[str], log: Path) -> None:
    os.setsid()  # a process group with its workers, which are forked from a server and would not notice its end
    with log.open("a") as stream:
        sys.stdout = sys.stderr = stream
        command_line.main(recipe, arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line; all arguments that it does not know go to the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.kill_test",
        usage="%(prog)s [options] --config FILE [key=value ...]",
        description="Kill a training run at random moments and check what it ends with.",
        epilog="All further words, as in --config FILE key=value, are handed on to the recipe.",
    )
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (%(default)s)")
    parser.add_argument("--recipe", choices=command_line.RECIPES, default="pretrain", help="what to run (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/kill_test"), help="empty folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (%(default)s)")
    arguments, command = parser.parse_known_args(argv)
    if arguments.kills < 1:
        parser.error(f"--kills is {arguments.kills}; allowed: a whole number, 1 or more")
    command_line.read_command(arguments.recipe, [*command, f"output_dir={arguments.output}"])  # ends where it is wrong
    with reporting_mistakes(parser.prog):
        if arguments.output.exists() and any(arguments.output.iterdir()):
            raise RunError(f"--output {arguments.output} is not empty; delete it or name another folder")
        KillTest(arguments.recipe, command, arguments.output, arguments.seed).run(arguments.kills)


if __name__ == "__main__":
    main()
