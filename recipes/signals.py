"""Requests to stop: the signals that schedulers send, and Ctrl-C."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on later
# Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(SystemExit):
    """Raised when a run has written its checkpoint because it was asked to stop; ends the program with its code."""


class StopWaiting(BaseException):
    """Raised if a process is asked to stop while it waits for images; not an `Exception`, as damaged images raise."""


class StopRequest:
    """Whether this process was asked to stop; `name` is the name of the signal, or None."""

    name: str | None = None
    ends_waiting = False  # of the class: signals are the whole process's

    def listen(self) -> "StopRequest":
        """Take note of SIGTERM and SIGUSR1 from now on; return this object. Only the main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def ignore(self) -> None:
        """Ignore both signals from now on, as the program is about to end.

        When one process has ended, launchers send SIGTERM to those that are still ending. Python removes its handlers
        before it ends, so the signal would kill such a process, and its exit code would be lost.
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
    """Raise `StopWaiting` in the block when a request to stop comes."""
    StopRequest.ends_waiting = threading.current_thread() is threading.main_thread()  # which alone gets signals
    try:
        yield
    finally:
        StopRequest.ends_waiting = False


def interrupted(message: str) -> NoReturn:
    """End the program as Ctrl-C does, with 130, and one line."""
    print(message, file=sys.stderr)
    sys.exit(130)
