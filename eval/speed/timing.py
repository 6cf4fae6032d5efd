"""Measuring speeds: by the clock of the CPU, or by events in a GPU's queue of kernels."""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.progress import track

from eval.scoring.models import versions
from eval.tables import Row

# Steps in one reading: on a GPU they overlap with their launches, as they do in real work.
STEPS_PER_READING = {"cpu": 1, "cuda": 10}


@contextmanager
def timed(device: str | torch.device) -> Iterator[Callable[[], float]]:
    """Time a block and the kernels that it launches; yields a function that waits for them and returns the seconds."""
    if torch.device(device).type == "cuda":
        stream = torch.cuda.current_stream(device)
        first = stream.record_event(torch.cuda.Event(enable_timing=True))
        last = torch.cuda.Event(enable_timing=True)

        def seconds() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1000

        yield seconds
        stream.record_event(last)
    else:
        clock = [time.perf_counter()]
        yield lambda: clock[1] - clock[0]
        clock.append(time.perf_counter())


def time_in_turn(steps: Sequence[Callable[[], object]], device: str, repeats: int) -> list[list[float]]:
    """Readings of each step in seconds, taken A B A B so that a slow spell of the machine hits every model."""
    count = STEPS_PER_READING[device]
    readings: list[list[float]] = [[] for _ in steps]
    # No refresh thread, which would run beside the models.
    for _ in track(range(repeats), "timing in turn", console=Console(stderr=True), auto_refresh=False):
        for step, own in zip(steps, readings, strict=True):
            with timed(device) as seconds:
                for _ in range(count):
                    step()
            own.append(seconds() / count)
    return readings


def circumstances(device: str) -> Row:
    """The columns of a row of speeds that describe the machine and the versions."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {"device": name, **versions(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
