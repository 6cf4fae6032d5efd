"""Being asked to stop: what schedulers send, and how all processes agree on the step to stop after."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator
from torch import distributed

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
    """Lets all processes go by the largest number that any of them has.

    It runs on the CPU (gloo), so that no process waits for what its GPU still has to do.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers; every process must call it."""
        if self._group is None:
            return number
        numbers = torch.tensor(number)
        distributed.all_reduce(numbers, distributed.ReduceOp.MAX, self._group)
        return int(numbers.item())
