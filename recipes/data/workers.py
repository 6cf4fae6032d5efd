"""The worker processes that decode images for a run: how they treat signals, report failures and end.

torch's own loader has four gaps that this module fills. It reports a dead worker from a signal handler, at any point
of the training; here the death is found where the run waits for images, so that several processes stop together. It
waits forever for the rest of a batch whose worker dies while sending; here a worker sends little. Its message for an
error in a worker is a traceback; here it is the error's message. And it waits forever for workers that ignore SIGTERM,
as ours have to; here they are killed when the program ends.
"""

import atexit
import gc
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar
from weakref import WeakSet, finalize

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from arm_zoo.images.errors import SourceError
from recipes.errors import RunError, with_line
from recipes.signals import SIGNALS, stop_ends_waiting

KeyT = TypeVar("KeyT")
BatchT = TypeVar("BatchT")  # a tuple or a dataclass, of tensors and other values
DYING = 1.0  # seconds that a worker may take to end after its last sign, such as a broken connection
started: WeakSet[BaseProcess] = WeakSet()  # all workers of this program


class Packed(Generic[BatchT]):
    """A batch that is in shared memory as a whole, so that little goes through the pipe to the run.

    torch would move its tensors to shared memory while sending, where an error would lose them, and write all else
    into the pipe, which might be more than a pipe holds.
    """

    def __init__(self, batch: BatchT) -> None:
        file = BytesIO()
        pickler = TensorPickler(file)
        pickler.dump(batch)
        self._tensors = [torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), *pickler.tensors]
        try:
            for tensor in self._tensors:
                tensor.share_memory_()
        except RuntimeError as error:
            ways = (
                "a smaller data.workers or max_batch_per_device, or give a container more shared memory (--shm-size)"
            )
            raise RunError(f"a batch does not fit into shared memory: {error}; try {ways}") from error

    def pin_memory(self) -> "Packed[BatchT]":
        """Pin the tensors; torch's loader calls this for a GPU."""
        self._tensors = [tensor.pin_memory() for tensor in self._tensors]
        return self

    def unpacked(self) -> BatchT:
        """The batch."""
        pickled, *tensors = self._tensors
        return TensorUnpickler(BytesIO(pickled.numpy().tobytes()), tensors).load()


class TensorPickler(pickle.Pickler):
    """Pickles everything but tensors, which it collects."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        """The number of a tensor."""
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class TensorUnpickler(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        """The tensor of this number."""
        return self._tensors[number]


class InWorker(Dataset[Any], Generic[KeyT, BatchT]):
    """Makes batches; in a worker, errors are returned, as torch would turn raised ones into tracebacks."""

    def __init__(self, make_batch: Callable[[Sequence[KeyT]], BatchT]) -> None:
        self._make_batch = make_batch

    def __getitem__(self, keys: Sequence[KeyT]) -> BatchT | Packed[BatchT] | Exception:
        """A batch; in a worker, the packed batch or the error that prevented it."""
        if get_worker_info() is None:
            return self._make_batch(keys)
        try:
            return Packed(self._make_batch(keys))
        except (RunError, SourceError) as error:
            return error
        except Exception as error:
            problem = f"a process that decodes images failed: {with_line(error)}"
            return RunError(f"{problem}; data.workers=0 shows the whole traceback")


class WorkerLoader(Generic[KeyT, BatchT]):
    """torch's loader over whole batches, which `make_batch` makes of keys; its workers stay for the next pass."""

    def __init__(
        self, make_batch: Callable[[Sequence[KeyT]], BatchT], order: Iterable[list[KeyT]], workers: int, pin: bool
    ) -> None:
        self._loader: DataLoader[Any] = DataLoader(
            InWorker(make_batch),
            batch_size=None,  # batches come whole
            sampler=order,
            num_workers=workers,
            generator=torch.Generator(),  # its own: else every pass draws from the global one
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_parent,
        )
        self._workers: set[BaseProcess] = set()
        # torch's loader is held here, so that it is freed by the count of its references, after this one. Collected as
        # garbage together with its pipes, it would tell workers to end through pipes that are closed already.
        finalize(self, end_loader, self._workers, self._loader)

    def __iter__(self) -> Iterator[BatchT]:
        """One pass; raises `RunError` if a worker dies or fails, `StopWaiting` if the process is asked to stop."""
        with self._deaths_told():
            batches = self._begin()
        while True:
            with self._deaths_told(), stop_ends_waiting():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch.unpacked() if isinstance(batch, Packed) else batch

    def _begin(self) -> Iterator[BatchT | Packed[BatchT] | Exception]:
        """Begin a pass of torch's loader; the first pass starts the workers."""
        before = set(multiprocessing.active_children())
        waiting = stop_ends_waiting() if self._workers else nullcontext()  # starting workers must not be interrupted
        try:
            with no_child_handler(), waiting, nothing_collected_by_children():
                return iter(self._loader)
        finally:
            self._workers |= set(multiprocessing.active_children()) - before
            started.update(self._workers)

    @contextmanager
    def _deaths_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            wait([worker.sentinel for worker in self._workers], DYING)
            dead = [worker for worker in self._workers if worker.exitcode is not None]
            if not dead:
                raise
            raise RunError(f"a process that decodes images {'; another '.join(map(death, dead))}") from error


def death(worker: BaseProcess) -> str:
    if (code := worker.exitcode or 0) >= 0:
        return f"ended with code {code}"
    hint = "; the system does so when memory runs out: try a smaller data.workers" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals that schedulers and Ctrl-C send to every process: the training process ends its workers."""
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers(workers: Collection[BaseProcess] = started) -> None:
    """Kill the workers of a loader that is gone, or all workers at the end, as they ignore the SIGTERM of torch."""
    alive = set(workers).intersection(multiprocessing.active_children())  # a forked copy of this process has none
    with no_child_handler():
        for worker in alive:
            worker.kill()
        for worker in alive:
            worker.join(DYING)


def end_loader(workers: Collection[BaseProcess], loader: DataLoader[Any]) -> None:
    """Kill the workers of a loader that is gone, before torch's loader would wait for them."""
    end_workers(workers)


@contextmanager
def nothing_collected_by_children() -> Iterator[None]:
    """Keep processes that are forked in the block from collecting this one's garbage, such as CUDA streams.

    Only the process that made those can free them; any other would be aborted.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def no_child_handler() -> Iterator[None]:
    """Suspend the SIGCHLD handler during the block: torch's handler raises at whatever line is running."""
    # only the main thread may set handlers, and Windows has no such signal
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
