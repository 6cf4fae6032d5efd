"""Runs that are stopped, killed, damaged or moved to other processes, and what they end with."""

import dataclasses
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import load_file

import arm_zoo
from arm_zoo.images.tables import ImageTable
from recipes import command_line, objectives
from recipes import finetune as finetuning
from recipes.config import FinetuneConfig, PretrainConfig, load_config
from recipes.data import batches as data
from recipes.data.sampling import batch_plan, training_order
from recipes.data.sources import open_source
from recipes.errors import RunError
from recipes.objectives import AUTOREGRESSIVE, TRAINING, Trained
from recipes.pretrain import pretrain
from recipes.signals import EXIT_CODE, SIGNALS, Stopped, StopRequest
from recipes.training import checkpoint, engine
from recipes.training.checkpoint import CheckpointFolder, DamagedCheckpoint, check, free_name, read_state
from recipes.training.resume import AlreadyFinished, Start, changed_settings, compare, compare_classes, compare_steps
from tests import ROOT
from tests.helpers.images import needs_torchcodec, write_folder

CONFIG = ROOT / "recipes" / "configs" / "pretrain_digits.yaml"
FINETUNE = CONFIG.with_name("finetune_digits.yaml")
EPOCHS, BATCH, STEPS = 3, 256, 5
ON_GPU = ("device=auto", "data.decode=gpu", "data.workers=2")
TINY = [f"epochs={EPOCHS}", f"global_batch={BATCH}", "model_args.embed_dim=16", "model_args.depth=1",
        "model_args.d_state=2", "model_args.decoder_depth=1", "tracker=none"]  # fmt: skip


def settings(folder: Path, *overrides: str) -> list[str]:
    return [*TINY, f"output_dir={folder}", *overrides]


def run(folder: Path, *overrides: str, resume: str = "auto") -> Trained:
    config = load_config(PretrainConfig, CONFIG, settings(folder, *overrides))
    return pretrain(config, resume=resume, stop=StopRequest().listen())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def final_bits(folder: Path) -> bytes:
    return (folder / "pretraining_model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def set_loss(monkeypatch: pytest.MonkeyPatch, loss: engine.LossFunction) -> None:
    """Let pretraining use another loss."""
    changed = dataclasses.replace(AUTOREGRESSIVE, loss=lambda config, source: loss)
    monkeypatch.setitem(TRAINING, "autoregressive", changed)


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Callable[[], None]]]:
    """Things to do in the middle of an optimizer step, by the number of the step in this process."""
    actions: dict[int, Callable[[], None]] = {}
    count = iter(range(1, 10**6))
    original = AUTOREGRESSIVE.loss(PretrainConfig(), None)

    def loss(model: Any, batch: Any) -> Any:
        actions.get(next(count), lambda: None)()
        return original(model, batch)

    set_loss(monkeypatch, loss)
    yield actions


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# --------------------------------------------------------------------------------------------------- files and folders


def folder_of(path: Path, keep_last: int = 2, keep_every: int | None = None) -> CheckpointFolder:
    return CheckpointFolder(path, keep_last, keep_every, Console(stderr=True))


def save(checkpoints: CheckpointFolder, step: int) -> Path:
    checkpoints.save(step, STEPS, {"model": {"weight": torch.full((3,), step)}}, {"step": step})
    return checkpoints.folder / f"step-{step:08d}"


def test_newest_and_every_nth_epoch_are_kept(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path, keep_last=2, keep_every=2)
    for step in range(1, 26):
        save(checkpoints, step)
    kept = [int(path.name.removeprefix("step-")) for path in checkpoints.all()]
    assert kept == [10, 20, 24, 25]  # epochs 2 and 4 end at 10 and 20
    assert json.loads((checkpoints.all()[-1] / "state.json").read_text()) == {"step": 25}
    assert load_file(checkpoints.all()[0] / "model.safetensors")["weight"].tolist() == [10, 10, 10]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "one bit": lambda folder: flip(folder / "model.safetensors"),
    "cut": lambda folder: os.truncate(folder / "model.safetensors", 10),
    "missing": lambda folder: (folder / "state.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 30),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = folder_of(tmp_path)
    good, bad = save(checkpoints, 1), save(checkpoints, 2)
    check(bad)
    DAMAGES[damage](bad)
    with pytest.raises(DamagedCheckpoint):
        check(bad)
    assert checkpoints.newest_intact() == good
    assert f"{bad} is damaged" in capsys.readouterr().err
    assert checkpoints.newest_intact() == good and not capsys.readouterr().err  # set aside, so named once
    assert (tmp_path / "damaged-step-00000002").is_dir()


def test_what_a_kill_leaves_behind_is_cleaned_up(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path)
    first, second = save(checkpoints, 1), save(checkpoints, 2)
    shutil.copytree(second, tmp_path / ".partial-step-00000003")
    second.rename(tmp_path / ".old-step-00000002")  # killed between the two renames of a replacement
    shutil.copytree(first, tmp_path / ".old-step-00000001")  # killed after them
    assert checkpoints.newest_intact() == second
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]
    assert free_name(tmp_path / "new") == tmp_path / "new" and free_name(first).name == f"{first.name}-1"


def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    checkpoints = folder_of(tmp_path)
    good = save(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))  # Python ignores the signal, so that writing raises
    try:
        with pytest.raises(RunError, match=r"step-00000002 could not be written: .*The last good one is .*00000001"):
            save(checkpoints, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(good)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = folder_of(tmp_path, keep_last=1)
    old, remove = save(checkpoints, 1), shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if path == old:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        remove(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        check(save(checkpoints, 2))
    assert f"warning: cannot remove the old {old}: [Errno {errno.EBUSY}]" in capsys.readouterr().err
    assert save(checkpoints, 3) in checkpoints.all() and not old.exists()  # tried again


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "path", [(), pytest.param(ON_GPU, marks=[pytest.mark.gpu, needs_torchcodec])], ids=["cpu", "gpu"]
)
def test_stopped_twice_in_an_epoch_sees_every_image_once_and_ends_with_equal_bits(
    path: Sequence[str],
    whole: Path,
    tmp_path: Path,
    before_step: dict[int, Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, stopped = 0, tmp_path / "stopped"
    if path:
        first, whole = STEPS * EPOCHS, tmp_path / "whole"
        run(whole, *path)
    seen: list[tuple[int, list[int]]] = []  # epoch, indices of a step
    optimizer_step = engine.Trainer._optimizer_step

    def record(trainer: engine.Trainer, micro_batches: list[Any]) -> None:
        seen.extend((trainer.position.epoch, batch.indices.tolist()) for batch in micro_batches)
        optimizer_step(trainer, micro_batches)

    monkeypatch.setattr(engine.Trainer, "_optimizer_step", record)
    # steps 7 and 9 are in the middle of epoch 2, step 15 is the last of all
    signals = {7: signal.SIGTERM, 9: signal.SIGUSR1, 15: signal.SIGTERM}
    before_step.update({first + step: send(number) for step, number in signals.items()})
    for steps in signals:
        with pytest.raises(Stopped) as ended:
            run(stopped, *path)
        assert ended.value.code == EXIT_CODE == 75
        assert len(seen) == steps and names(stopped)[-1] == f"step-{steps:08d}"
    run(stopped, *path)
    for epoch in range(EPOCHS):
        counts = Counter(index for where, indices in seen for index in indices if where == epoch)
        assert len(counts) == STEPS * BATCH and set(counts.values()) == {1}
    assert final_bits(stopped) == final_bits(whole)
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (stopped, whole)]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert [row["epoch"] for row in rows[0]] == [1, 2, 3]
    assert [row.get("images_per_second", 0) > 0 for row in rows[0]] == [True, True, False]
    assert not {"images_per_second", "data_wait"} & rows[0][-1].keys()  # after step 15 nothing was left to train on


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_stopped_while_it_waits_for_images_loses_nothing(
    batch: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may never come, as from a disk that does not answer."""
    load, count = data.AugmentedImages.batch, iter(range(1, 10**6))

    def asked_to_stop(images: data.AugmentedImages, keys: Any) -> data.Loaded:
        if next(count) == batch:
            send(signal.SIGTERM)()
            pytest.fail("the run waits on")
        return load(images, keys)

    monkeypatch.setattr(data.AugmentedImages, "batch", asked_to_stop)
    with pytest.raises(Stopped):
        run(tmp_path)
    written = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert written == ([] if batch == 1 else ["step-00000005", "step-00000007"])
    run(tmp_path)
    assert final_bits(tmp_path) == final_bits(whole)


def test_damaged_images_of_before_are_counted_after_a_resume(
    tmp_path: Path, before_step: dict[int, Callable[[], None]]
) -> None:
    images = write_folder(tmp_path / "images" / "train", {"cat": 24}).parent
    damaged = images / "train" / "cat" / "5.jpg"
    good = damaged.read_bytes()
    damaged.write_bytes(b"gone")
    colour = ["model_args.in_chans=3", "global_batch=24", "data.workers=0", "device=cpu", f"data.source={images}"]
    before_step.update({2: send(signal.SIGTERM)})
    with pytest.raises(Stopped):
        run(tmp_path / "run", *colour, "data.max_undecodable=0.1")
    damaged.write_bytes(good)  # it is not found a second time
    run(tmp_path / "run", *colour, "data.max_undecodable=0.1")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["undecodable"] for row in rows] == [1] * EPOCHS
    moved = shutil.copytree(images, tmp_path / "moved")  # other images: what the first ones were does not count
    run(tmp_path / "run", *colour[:-1], f"data.source={moved}", "data.max_undecodable=0", f"epochs={EPOCHS + 1}")
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["undecodable"] == 0


def test_signal_before_the_first_step_and_after_the_last_end_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data may take minutes to be found, and torchrun signals those that are still leaving when the first has left."""
    opened = objectives.open_source
    monkeypatch.setattr(
        objectives, "open_source", lambda *args, **named: (send(signal.SIGTERM)(), opened(*args, **named))[1]
    )
    monkeypatch.setattr(PartialState, "destroy_process_group", staticmethod(send(signal.SIGTERM)))
    with pytest.raises(SystemExit) as stopped:
        command_line.main("pretrain", ["--config", str(CONFIG), *settings(tmp_path)])
    assert stopped.value.code == EXIT_CODE
    assert names(tmp_path) == ["step-00000001"]
    # Python takes its own handlers away before a process is gone, this one stays
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)


def test_finished_run_says_so(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = final_bits(whole)
    with pytest.raises(AlreadyFinished) as finished:
        command_line.main("pretrain", ["--config", str(CONFIG), *settings(whole)])
    assert finished.value.code == 0
    assert f"{whole} is finished: 3 epochs are done" in " ".join(capsys.readouterr().err.split())
    assert final_bits(whole) == before


def copy_of(whole: Path, folder: Path) -> Path:
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    shutil.rmtree(max((folder / "checkpoints").glob("step-*")))
    return folder


def test_resuming_as_another_run_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_of(whole, tmp_path)
    before = names(tmp_path)
    other = {"model_args.embed_dim=32": "model_args.embed_dim was 16, is 32", "seed=1": "seed was 0, is 1",
             "global_batch=128": "global_batch was 256, is 128"}  # fmt: skip
    for override, message in other.items():
        with pytest.raises(SystemExit) as refused:
            command_line.main("pretrain", ["--config", str(CONFIG), *settings(tmp_path, override)])
        assert message in str(refused.value.code) and "--resume none" in str(refused.value.code)
    newest = tmp_path / "checkpoints" / before[-1]
    with pytest.raises(SystemExit) as refused:
        command_line.main("finetune", ["--config", str(FINETUNE), f"output_dir={tmp_path}", "--resume", str(newest)])
    assert f"{newest} was written by recipes.pretrain, not by recipes.finetune" in str(refused.value.code)
    for where in ("nowhere", str(tmp_path)):
        with pytest.raises(SystemExit) as refused:
            command_line.main("pretrain", ["--config", str(CONFIG), *settings(tmp_path), "--resume", where])
        assert f"--resume is {where!r}, which is no checkpoint; allowed: auto, none" in str(refused.value.code)
    flip(newest / "optimizer.safetensors")
    with pytest.raises(SystemExit) as refused:
        command_line.main("pretrain", ["--config", str(CONFIG), *settings(tmp_path), "--resume", str(newest)])
    assert "is damaged: optimizer.safetensors is not as it was written" in str(refused.value.code)
    assert names(tmp_path) == before
    run(tmp_path, "base_lr=1e-3")  # the one before the damaged one, another rate
    printed = " ".join(capsys.readouterr().err.split())
    assert "using the one before" in printed
    assert "warning: going on with other settings: base_lr was 0.004, is 0.001" in printed


def test_a_checkpoint_that_names_no_objective_is_of_the_first_one(whole: Path) -> None:
    checkpoint = whole / "checkpoints" / names(whole)[-1]
    before = Start(checkpoint, read_state(checkpoint))
    assert before.state["config"].pop("objective") == "autoregressive"
    config = load_config(PretrainConfig, CONFIG, settings(whole))
    assert changed_settings(before, config) == {}
    with pytest.raises(RunError, match="objective was autoregressive, is another"):
        compare(before, dataclasses.replace(config, objective="another"), Console(stderr=True))


def test_going_on_with_other_classes_is_refused(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for split in ("train", "val"):
        write_folder(images / split, {"cat": 4, "dog": 4})

    def train(source: Path, *overrides: str, resume: str = "auto") -> None:
        colour = ["model_args.in_chans=3", "global_batch=8", "warmup_epochs=0", f"data.source={source}"]
        tiny = [setting for setting in settings(tmp_path / "run") if "decoder" not in setting]
        finetuning.finetune(load_config(FinetuneConfig, FINETUNE, [*tiny, *colour, *overrides]), resume=resume)

    train(images, "epochs=1")
    other = shutil.copytree(images, tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "cat").rename(other / split / "bird")
    newest = tmp_path / "run" / "checkpoints" / "step-00000001"
    message = f"{newest} was trained on other classes .* no longer there: 'cat'; new: 'bird'. Allowed: .*--resume none"
    for resume in ("auto", str(newest)):
        with pytest.raises(RunError, match=message):
            train(other, "epochs=2", resume=resume)
    train(shutil.copytree(images, tmp_path / "copy"), "epochs=2")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["label_names"] == ["cat", "dog"]


def test_classes_are_compared_by_name_and_place() -> None:
    start = Start(Path("step-00000001"), {"class_names": ["a", "A", *map(str, range(10))]})
    compare_classes(start, ("a", "A", *map(str, range(10))))
    compare_classes(Start(start.checkpoint, {}), ("x", "y"))  # of before names were kept
    with pytest.raises(RunError, match="the same classes in another order: class 0 was 'a', is 'A'"):
        compare_classes(start, ("A", "a", *map(str, range(10))))
    with pytest.raises(RunError, match="12 classes before, 2 now; no longer there: '0', '1', '2' and 7 more"):
        compare_classes(start, ("a", "A"))


def test_another_number_of_training_images_is_refused() -> None:
    start = Start(Path("step-00000015"), {"steps_per_epoch": 5})
    compare_steps(start, 5)
    for steps in (4, 6):
        advice = r"the same data\.source and data\.labels"
        with pytest.raises(RunError, match=rf"5 steps per epoch, this run {steps}: .* {advice}"):
            compare_steps(start, steps)


@pytest.mark.parametrize("before, now", [(0.99, None), (None, 0.99)])
def test_an_average_neither_begins_nor_ends_in_the_middle_of_a_run(before: float | None, now: float | None) -> None:
    """Its decay may change, which is told."""
    written, console = dataclasses.asdict(FinetuneConfig(ema_decay=before)), Console(file=io.StringIO())
    start = Start(Path("step-00000015"), {"config": written, "position": {"step": 0}})
    with pytest.raises(RunError, match=f"is of another run: ema_decay was {before}, is {now}"):
        compare(start, FinetuneConfig(ema_decay=now), console)
    if before is not None:
        compare(start, FinetuneConfig(ema_decay=0.9), console)
        assert "ema_decay was 0.99, is 0.9" in console.file.getvalue()  # type: ignore[attr-defined]


def test_order_of_images_may_change_between_epochs_only(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["data.shuffle_buffer=8", "data.streaming=true"]
    newest = max((whole / "checkpoints").glob("step-*"))
    between = Start(newest, read_state(newest))
    within = Start(between.checkpoint, {**between.state, "position": {**between.state["position"], "step": 2}})
    config = load_config(PretrainConfig, CONFIG, settings(whole, *other))
    compare(between, config, Console(stderr=True))
    warning = " ".join(capsys.readouterr().err.split())
    changes = "data.streaming was False, is True; data.shuffle_buffer was 4096, is 8"
    assert warning.startswith("warning: going on with other settings") and "data.streaming was False" in warning
    with pytest.raises(RunError, match=f"{between.checkpoint} is in the middle of an epoch.*{changes}.*--resume none"):
        compare(within, config, Console(stderr=True))
    compare(within, load_config(PretrainConfig, CONFIG, settings(whole, "base_lr=1e-3")), Console(stderr=True))


def test_start_removes_what_a_killed_one_was_writing_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    copy_of(whole, tmp_path)
    partial = tempfile.mkdtemp(prefix=".partial-", dir=tmp_path).rpartition("/")[2]
    own = [tmp_path / name / partial for name in (".", "pretraining_model", "backbone")]
    foreign = [tmp_path / name / partial for name in ("second_run", "second_run/backbone")]
    foreign += [tmp_path / ".partial-notes", tmp_path / "backbone" / "mine"]
    for folder in (*own, *foreign):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors.tmp").write_text("half")
    run(tmp_path)
    assert not any(folder.exists() for folder in own) and all(folder.is_dir() for folder in foreign)
    own[0].mkdir()  # killed when all was written
    with pytest.raises(AlreadyFinished):
        run(tmp_path)
    assert not own[0].exists()


@pytest.mark.slow
def test_starting_over_and_going_back(whole: Path, tmp_path: Path) -> None:
    copy_of(whole, tmp_path)
    first, second = names(tmp_path)
    run(tmp_path, resume=str(tmp_path / "checkpoints" / first))
    assert [path.name for path in (tmp_path / "checkpoints-before").iterdir()] == [second]
    assert final_bits(tmp_path) == final_bits(whole)
    run(tmp_path, resume="none")
    assert len(list((tmp_path / "checkpoints-before-1").iterdir())) == 3
    assert final_bits(tmp_path) == final_bits(whole)


def test_checkpoints_that_cannot_be_read_are_a_problem_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/checkpoints")

    monkeypatch.setattr("recipes.training.resume.choose", unreadable)
    with pytest.raises(PermissionError, match=r"Permission denied: 'runs/checkpoints'"):
        run(tmp_path)


def test_full_disk_in_a_run_loses_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoint.save_tensors
    writes = iter(range(1, 100))

    def full(*arguments: Any) -> None:
        if next(writes) == 4:  # the second file of the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(*arguments)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(RunError, match=r"No space left on device.*The last good one is .*step-00000005; make room"):
        run(tmp_path)
    assert names(tmp_path) == ["step-00000005"]
    run(tmp_path)
    assert final_bits(tmp_path) == final_bits(whole)


def test_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, count = AUTOREGRESSIVE.loss(PretrainConfig(), None), iter(range(1, 100))
    factors = (float("nan") if number == 8 else 1 for number in count)
    set_loss(monkeypatch, lambda model, batch: original(model, batch) * next(factors))
    with pytest.raises(SystemExit) as stopped:
        command_line.main("pretrain", ["--config", str(CONFIG), *settings(tmp_path, "checkpoint_steps=3")])
    message = str(stopped.value.code)
    assert "the loss of step 8 (epoch 2) is not finite" in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000006'}. Try a smaller" in message
    assert names(tmp_path)[-1] == "step-00000006"
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoints_come_by_steps_minutes_and_epochs(tmp_path: Path) -> None:
    run(tmp_path / "steps", "checkpoint_steps=2", "checkpoint_epochs=3", "keep_last=99")
    assert names(tmp_path / "steps") == [f"step-{step:08d}" for step in (2, 4, 6, 8, 10, 12, 14, 15)]
    run(tmp_path / "minutes", "checkpoint_minutes=1e-9", "checkpoint_epochs=3", "keep_last=99")
    assert names(tmp_path / "minutes") == [f"step-{step:08d}" for step in range(1, 16)]


# ------------------------------------------------------------------------------------------------------- earlier runs


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretraining, ended after an epoch, and finetuning from it, stopped in its second one, both by commit e24c1e0."""
    folder = shutil.copytree(ROOT / "tests" / "golden" / "run_e24c1e0", tmp_path / "runs")
    monkeypatch.chdir(folder)
    assert load_config(PretrainConfig, folder / "pretrain" / "config.yaml").model == "arm_pico"
    for name, classes in (("pretrain/pretraining_model", None), ("pretrain/backbone", 0), ("finetune", 10)):
        saved = load_file(folder / name / "model.safetensors")
        model = arm_zoo.from_pretrained(folder / name)
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
        assert getattr(model, "num_classes", None) == classes
    result = finetuning.finetune(load_config(FinetuneConfig, folder / "finetune" / "config.yaml"))
    # what that version got from there, whose images were shifted, turned and zoomed by other random numbers
    first, second = result.history
    assert (first["loss"], first["top1"]) == pytest.approx((2.3045879, 10.0), abs=1e-4)
    assert second["loss"] == pytest.approx(2.2967564, abs=1e-3)
    assert names(folder / "finetune") == ["step-00000010"] and result.top1 == pytest.approx(13.6111, abs=0.6)


# ------------------------------------------------------------------------------------------------------- two processes


@contextmanager
def on_two_processes(arguments: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Pretraining by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARM_ZOO_SCAN": "torch"}
    with subprocess.Popen(
        [*command, "-m", "recipes.pretrain", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.slow
def test_one_two_and_one_processes_train_the_same(tmp_path: Path, before_step: dict[int, Callable[[], None]]) -> None:
    """From one process to two and back, in the middle of epochs; the two are sharded and only one gets the signal."""
    longer = ["epochs=8", "max_batch_per_device=64"]
    before_step[26] = send(signal.SIGTERM)  # with four forward passes per step: in step 7
    folder = tmp_path / "changing"
    with pytest.raises(Stopped):
        run(folder, *longer)
    assert names(folder)[-1] == "step-00000007"
    expected = run(tmp_path / "one", *longer)
    arguments = ["--config", str(CONFIG), *settings(folder, *longer), "device=cpu", "checkpoint_steps=1", "fsdp=true"]
    with on_two_processes(arguments) as process:
        while names(folder)[-1] < "step-00000013" and process.poll() is None:
            time.sleep(0.01)
        workers = [child for child in psutil.Process(process.pid).children() if "recipes.pretrain" in child.cmdline()]
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGUSR1)
        _, printed = process.communicate(timeout=300)
    assert process.returncode != 0 and printed.count("exitcode  : 75") == 2, printed
    result = run(folder, *longer)
    losses = [[row["loss"] for row in history] for history in (result.history, expected.history)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [row["lr"] for row in result.history] == [row["lr"] for row in expected.history]
    weights = [dict(each.model.named_parameters()) for each in (result, expected)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])


def test_two_processes_have_the_loss_curve_of_one(whole: Path, tmp_path: Path) -> None:
    with on_two_processes(["--config", str(CONFIG), *settings(tmp_path), "device=cpu"]) as process:
        _, printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (tmp_path, whole)]
    assert [{row["processes"] for row in run_rows} for run_rows in rows] == [{2}, {1}]
    losses = [[row["loss"] for row in run_rows] for run_rows in rows]
    assert len(losses[0]) == EPOCHS and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damaged", "limit", "messages"),
    [
        ((0, 1), 0.05, {"2 of 24 training images cannot be decoded": 2}),  # none sees too many, together they do
        ((1,), 0.0, {"1 of 24 training images cannot be decoded": 1, "another process cannot go on": 1}),
    ],
    ids=["shared", "one"],
)
def test_two_processes_stop_together_for_damaged_images(
    damaged: tuple[int, ...],
    limit: float,
    messages: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = write_folder(tmp_path / "images" / "train", {"cat": 24}).parent
    colour = ["model_args.in_chans=3", "global_batch=24", "data.workers=0", "device=cpu", f"data.source={images}"]
    arguments = [*settings(tmp_path / "run", *colour), f"data.max_undecodable={limit}"]
    config = load_config(PretrainConfig, CONFIG, arguments)
    split = open_source(config.data, labels_needed=False).train
    assert isinstance(split, ImageTable)
    own = [[key.place for key in next(iter(training_order(split, config, batch_plan(24, 2), n, 2)))] for n in range(2)]
    first = own[0][0]  # and one of the other process that does not take the first one's place
    chosen = (first, next(index for index in own[1] if (index - first) % 24 not in (1, 23)))
    for process in damaged:
        Path(split.encoded([chosen[process]])[0].name).write_bytes(b"gone")
    with on_two_processes(["--config", str(CONFIG), *arguments]) as process_pair:
        _, printed = process_pair.communicate(timeout=300)
    assert process_pair.returncode != 0 and "recipes/command_line.py" not in printed, printed  # torchrun has its own
    assert {message: printed.count(message) for message in messages} == messages, printed
