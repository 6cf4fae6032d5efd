"""Being asked to stop: what schedulers send, and how all processes agree on the step to stop after."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

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
    """Notes SIGTERM and SIGUSR1 while its block runs; ``name`` is the signal's, or None.

    Python lets only the main thread receive signals: elsewhere the block notes none.
    """

    name: str | None = None

    def __enter__(self) -> "StopRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = (
            {number: signal.signal(number, self._note) for number in SIGNALS} if in_main_thread else {}
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
