"""Being asked to stop: what schedulers send, and how all processes stop together, also where one of them fails."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from torch import distributed

from .errors import RunError

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """Raised when a run has written its checkpoint because it was asked to stop; ends the program with 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopRequest:
    """Whether this process was asked to stop; ``name`` is the signal's, or None."""

    name: str | None = None

    def listen(self) -> "StopRequest":
        """Note SIGTERM and SIGUSR1 from now on, and give this object; only a program's main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def ignore(self) -> None:
        """Neither note nor obey them from now on: the program is at its end.

        As soon as one process has left, launchers send SIGTERM to those that are still leaving. Python takes handlers
        away before it is gone, so that one would end with the signal instead of its exit code.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


class Agreement:
    """Lets all processes go by what any of them has or finds; every process must make the same calls.

    It runs on the CPU (gloo), so that no process waits for what its GPU still has to do.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self._group is None:
            return number
        numbers = torch.tensor(number)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, self._group)
        return int(numbers.item())

    def union(self, lines: set[str]) -> set[str]:
        """All processes' lines."""
        if self._group is None:
            return lines
        gathered: list[set[str]] = [set() for _ in range(distributed.get_world_size(self._group))]
        distributed.all_gather_object(gathered, lines, self._group)
        return set().union(*gathered)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a block that fails on one process end all of them, so that none waits for another in vain.

        There must be nothing in the block that waits for other processes.

        Raises:
            RunError: Where the block itself did not fail.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is: it is raised again
            problem = error
        if self.largest(int(problem is not None)):
            raise problem or RunError("stopped, as another process cannot go on; its message says why")
