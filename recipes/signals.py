"""Being asked to stop, by the signals that schedulers send."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """Raised when a run has written its checkpoint because it was asked to stop; ends the program with its code."""


class StopWaiting(BaseException):
    """Raised where a process is asked to stop while it waits for images; no `Exception`, which a damaged image is."""


class StopRequest:
    """Whether this process was asked to stop; `name` is the signal's, or None."""

    name: str | None = None
    ends_waiting = False  # of the class: signals are the whole process's

    def listen(self) -> "StopRequest":
        """Note SIGTERM and SIGUSR1 from now on, and give this object; only a program's main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def ignore(self) -> None:
        """Neither note nor obey them from now on: the program is at its end.

        Launchers send SIGTERM to processes that are still leaving when the first one has left. Python takes handlers
        away before it ends, so such a process would end with the signal instead of its exit code.
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
    """Let a request to stop that comes in the block end it by `StopWaiting`."""
    StopRequest.ends_waiting = threading.current_thread() is threading.main_thread()  # which alone gets signals
    try:
        yield
    finally:
        StopRequest.ends_waiting = False
