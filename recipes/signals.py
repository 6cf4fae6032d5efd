"""Being asked to stop: what schedulers send, and how all processes stop together, also where one of them fails."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from torch import distributed

from .errors import RunError

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ENDED, STOPPED, FAILED = range(3)  # ways out of a block, the worst one last


class Stopped(SystemExit):
    """Raised when a run has written its checkpoint because it was asked to stop; ends the program with 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopWaiting(BaseException):
    """Raised where a process is asked to stop while it waits for images, which may never come.

    It is no ``Exception``, so that nothing on its way takes it for a damaged image.
    """


class StopRequest:
    """Whether this process was asked to stop; ``name`` is the signal's, or None."""

    name: str | None = None
    ends_waiting = False  # of the class: signals are the whole process's

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
        if StopRequest.ends_waiting:
            StopRequest.ends_waiting = False
            raise StopWaiting


@contextmanager
def stop_ends_waiting() -> Iterator[None]:
    """Let a request to stop that comes in the block end it by ``StopWaiting``."""
    StopRequest.ends_waiting = threading.current_thread() is threading.main_thread()  # which alone gets signals
    try:
        yield
    finally:
        StopRequest.ends_waiting = False


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
            StopWaiting: On all, if one was asked to stop while it waited in the block, and none failed.
        """
        outcome = ENDED
        problem: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is: it is raised again
            outcome, problem = FAILED, error
        except StopWaiting:
            outcome = STOPPED
        worst = self.largest(outcome)
        if worst == FAILED:
            raise problem or RunError("stopped, as another process cannot go on; its message says why")
        if worst == STOPPED:
            raise StopWaiting
