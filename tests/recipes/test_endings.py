"""Every way out of a run: it ends within seconds, with one message and the right code, whatever its workers do."""

import gc
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil
import pytest
import timm
import torch
from accelerate import Accelerator
from timm.models import save_for_hf

import arm_zoo  # noqa: F401 - timm finds our models by it
from arm_zoo.images.errors import SourceError
from recipes.data.workers import Packed, WorkerLoader, end_workers, started
from recipes.errors import RunError
from recipes.signals import StopRequest, StopWaiting, stop_ends_waiting
from recipes.training.parallel import Collectives
from tests import ROOT

TINY = ["epochs=100000", "global_batch=256", "model_args.embed_dim=16", "model_args.depth=1", "model_args.d_state=2",
        "tracker=none", "checkpoint_steps=1", "data.workers=2"]  # fmt: skip
SECONDS = 60  # of patience: it takes 5 to notice a death, the rest is for a busy machine
KILLED = "a process that decodes images was killed by SIGKILL; the system does so when memory runs out"


# ------------------------------------------------------------------------------------------------------------- loaders


class Numbers(NamedTuple):
    values: torch.Tensor


class Unpicklable(Exception):
    def __init__(self, first: int, second: Callable[[], int]) -> None:
        super().__init__(first, second)


@pytest.fixture(params=[False, True], ids=["plain", "pinned"])
def pinned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch's thread for pinned memory stands between workers and run; without a GPU it pins nothing."""
    if request.param and not torch.accelerator.is_available():
        for name, result in (("is_available", True), ("current_device_index", 0), ("set_device_index", None)):
            monkeypatch.setattr(torch.accelerator, name, lambda *_, result=result: result)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)  # older versions name a device
    return bool(request.param)


def loader_that(act: Callable[[], object], pinned: bool = False) -> Iterator[Numbers]:
    """A worker that gives one batch and then does something."""

    def make(keys: Sequence[int]) -> Numbers:
        if keys[0] > 0:
            act()
        return Numbers(torch.tensor(keys))

    return iter(WorkerLoader(make, [[0], [1], [2], [3]], workers=1, pin=pinned))


def failing(error: Exception) -> Callable[[], NoReturn]:
    def act() -> NoReturn:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (SourceError("x.jpg has the label -1"), SourceError, "^x.jpg has the label -1$"),
        (KeyError("lost"), RunError, r"decodes images failed: KeyError: 'lost' \(.*test_endings.py, line \d+\)"),
        (Unpicklable(1, lambda: 0), RunError, "decodes images failed: Unpicklable: "),
        (MemoryError(), RunError, "decodes images failed: MemoryError"),
    ],
)
def test_errors_of_workers_come_as_one_message(
    error: Exception, kind: type[Exception], message: str, pinned: bool
) -> None:
    batches = loader_that(failing(error), pinned)
    assert next(batches).values.tolist() == [0]
    with pytest.raises(kind, match=message) as raised:
        next(batches)
    assert "Traceback" not in str(raised.value)


class Described(NamedTuple):
    values: torch.Tensor
    names: list[str]


def test_what_a_worker_sends_is_short() -> None:
    """A worker that is killed while it writes more than a pipe holds leaves the run waiting for the rest."""
    batch = Described(torch.arange(100_000), [f"image {number}" for number in range(10_000)])
    packed = Packed(batch)
    assert len(ForkingPickler.dumps(packed)) < select.PIPE_BUF
    assert torch.equal(packed.unpacked().values, batch.values) and packed.unpacked().names == batch.names


def test_workers_leave_garbage_of_the_run_alone(tmp_path: Path) -> None:
    class Garbage:
        def __init__(self) -> None:
            self.own = self

        def __del__(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Garbage()
        list(islice(loader_that(gc.collect), 3))
        assert list(tmp_path.iterdir()) == []
    finally:
        gc.enable()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


def test_full_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would lose the batch on its way, and the run would wait for it without end."""

    def full(_: torch.Tensor) -> NoReturn:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RunError, match=r"does not fit into shared memory: unable .* a smaller data.workers"):
        next(loader_that(lambda: None))


def worker_of(batches: Iterator[Numbers], before: set[BaseProcess]) -> BaseProcess:
    next(batches)
    [worker] = set(started) - before
    return worker


@pytest.mark.slow
def test_a_dead_worker_is_found_where_the_run_waits(pinned: bool) -> None:
    """Not by a signal handler at any place, in the middle of a step or of a checkpoint's writing."""
    handler = signal.getsignal(signal.SIGCHLD)
    batches = loader_that(lambda: time.sleep(600), pinned)
    worker = worker_of(batches, set(started))
    assert signal.getsignal(signal.SIGCHLD) == handler
    worker.kill()
    with pytest.raises(RunError, match=f"{KILLED}: try a smaller data.workers"):
        next(batches)


@pytest.mark.parametrize("end", ["of the program", "of the loader", "of the loader in a cycle"])
def test_workers_that_do_not_answer_are_killed_at_the_end(end: str, pinned: bool) -> None:
    batches = loader_that(lambda: time.sleep(600), pinned)
    worker = worker_of(batches, set(started))
    worker.terminate()  # as schedulers do, and Python at its end
    worker.join(0.5)
    assert worker.is_alive()
    began = time.monotonic()
    if end == "of the program":
        end_workers()
    elif end == "of the loader in a cycle":  # as an error's traceback may leave it
        cycle: list[object] = [batches]
        cycle.append(cycle)
        del cycle
    del batches
    gc.collect()
    assert worker.exitcode == -signal.SIGKILL and time.monotonic() - began < 8  # torch would wait for it for 10


def test_a_loader_whose_workers_outnumber_its_batches_ends_in_silence(
    pinned: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch tells each worker to end as its loader is freed, some by a pipe that nothing was sent through before."""
    cycle: list[object] = [WorkerLoader(lambda keys: Numbers(torch.tensor(keys)), [[0]], workers=3, pin=pinned)]
    assert [batch.values.tolist() for batch in cycle[0]] == [[0]]  # type: ignore[attr-defined]
    cycle.append(cycle)
    del cycle
    gc.collect()
    time.sleep(0.5)  # the threads that send what is left say what went wrong
    assert capfd.readouterr().err == ""


def test_being_asked_to_stop_ends_waiting_and_nothing_else() -> None:
    stop = StopRequest().listen()
    with pytest.raises(StopWaiting), Collectives(Accelerator(cpu=True)).together(), stop_ends_waiting():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("did not end")
    assert stop.name == "SIGTERM"
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.name == "SIGUSR1"


def test_signals_that_a_system_lacks_are_not_missed(repo: Path) -> None:
    """Windows has neither SIGUSR1 nor SIGCHLD."""
    script = (
        "import signal\ndel signal.SIGUSR1, signal.SIGCHLD\n"
        "from recipes.data.workers import leave_signals_to_parent, no_child_handler\n"
        "from recipes.signals import StopRequest\n"
        "StopRequest().listen().ignore()\nleave_signals_to_parent(0)\nwith no_child_handler():\n    pass\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=repo, check=True, timeout=120)


# ---------------------------------------------------------------------------------------------------------------- runs

LOST = "def fail(*_): raise KeyError('lost')\n"
Action = Callable[[psutil.Process], object]


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """In the order in which they began: those that load training images first."""
    return sorted(process.children(), key=lambda child: child.pid)


def kill(number: int) -> Action:
    return lambda process: workers_of(process)[number].kill()


def to_all(number: int) -> Action:
    """A signal to the whole process group."""
    return lambda process: os.killpg(process.pid, number)


def stop_worker(number: int) -> Action:
    """It no longer answers; then the run is asked to stop."""

    def act(process: psutil.Process) -> None:
        workers_of(process)[number].suspend()
        time.sleep(2)
        process.terminate()

    return act


@contextmanager
def begun(
    recipe: str, arguments: Sequence[str], code: str = "", launcher: Sequence[str] = ("-c",)
) -> Iterator["subprocess.Popen[str]"]:
    """A program of ``recipes``, after some code, in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARM_ZOO_SCAN": "torch"}
    of_training = f'from recipes.command_line import main\nmain("{recipe}")'
    start = "recipe.main()" if recipe == "probe" else of_training
    program = (
        f"import recipes.{recipe} as recipe, recipes.data.batches as data, recipes.training.engine as engine, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"{code}\n{start}"
    )
    with subprocess.Popen(
        [sys.executable, *launcher, program, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)


def ending(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and messages."""
    _, printed = process.communicate(timeout=SECONDS)
    return process.returncode, " ".join(printed.split())


def wait_until(ready: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 4 * SECONDS
    while not ready():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def settings(recipe: str, folder: Path) -> list[str]:
    config = ROOT / "recipes" / "configs" / f"{recipe}_digits.yaml"
    own = ["model_args.decoder_depth=1"] if recipe == "pretrain" else ["evaluate_every=1"]
    return ["--config", str(config), *TINY, *own, f"output_dir={folder}"]


def end_of_a_run(recipe: str, folder: Path, action: Action) -> tuple[int, str]:
    """Let it train for more than an epoch, do something to it, and see how it ends."""
    count = 2 if recipe == "pretrain" else 4
    with begun(recipe, settings(recipe, folder)) as process:
        wait_until(lambda: any((folder / "checkpoints").glob("step-*[6-9]")), process)
        whole = psutil.Process(process.pid)
        assert len(whole.children()) == count
        action(whole)
        return ending(process)


@pytest.mark.slow
def test_killed_worker_ends_the_run(tmp_path: Path) -> None:
    code, printed = end_of_a_run("pretrain", tmp_path, kill(0))
    assert code == 1 and printed.count(KILLED) == 1 and "Traceback" not in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        (kill(0), 1, KILLED),
        (kill(-1), 1, KILLED),  # one that loads validation images
        (to_all(signal.SIGINT), 130, "interrupted; the same command goes on from the last checkpoint"),
        (to_all(signal.SIGTERM), 75, "SIGTERM: stopped after step"),
        (to_all(signal.SIGUSR1), 75, "SIGUSR1: stopped after step"),
        (stop_worker(0), 75, "SIGTERM: stopped after step"),
        (stop_worker(-1), 75, "SIGTERM: stopped after step"),
    ],
    ids=["training", "validation", "SIGINT", "SIGTERM", "SIGUSR1", "silent", "silent validation"],
)
def test_finetuning_ends(action: Action, code: int, message: str, tmp_path: Path) -> None:
    found, printed = end_of_a_run("finetune", tmp_path, action)
    assert found == code and printed.count(message) == 1 and "Traceback" not in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["AugmentedImages", "Images"], ids=["training", "validation"])
def test_error_in_a_worker_ends_the_run(loader: str, tmp_path: Path) -> None:
    with begun("finetune", settings("finetune", tmp_path), f"{LOST}data.{loader}.batch = fail") as process:
        code, printed = ending(process)
    assert code == 1 and printed.count("decodes images failed: KeyError: 'lost'") == 1, printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_error_of_the_run_itself_ends_it_too(tmp_path: Path) -> None:
    """With its traceback, which keeps the loader alive to the program's end."""
    with begun("pretrain", settings("pretrain", tmp_path), f"{LOST}engine.Trainer._total_loss = fail") as process:
        code, printed = ending(process)
    assert code == 1 and printed.endswith("KeyError: 'lost'"), printed


@pytest.mark.slow
def test_error_in_a_worker_ends_the_probe(tmp_path: Path) -> None:
    model = timm.create_model("arm_pico_patch2_8", num_classes=0, embed_dim=16, depth=1, d_state=2)
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True, data_config={"input_size": (1, 8, 8)})
    arguments = ["--weights", str(tmp_path / "model"), "data.source=digits", "data.workers=2", "device=cpu"]
    arguments += [f"output={tmp_path / 'probe.json'}", f"cache={tmp_path / 'features'}"]
    with begun("probe", arguments, f"{LOST}data.Images.batch = fail") as run:
        code, printed = ending(run)
    assert code == 1 and printed.count("KeyError: 'lost'") == 1 and "Traceback" not in printed, printed


@pytest.mark.slow
def test_killed_worker_ends_all_processes(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable,
                "-c"]  # fmt: skip
    with begun("pretrain", settings("pretrain", tmp_path), launcher=launcher) as process:
        wait_until(lambda: any((tmp_path / "checkpoints").glob("step-*[6-9]")), process)
        runs = psutil.Process(process.pid).children()
        workers_of(runs[0])[0].kill()
        code, printed = ending(process)
    assert code == 1 and printed.count(KILLED) == 1 and printed.count("another process cannot go on") == 1, printed
    assert not psutil.wait_procs(runs, timeout=SECONDS)[1]
