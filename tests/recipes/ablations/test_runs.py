"""The runs of a table: which are the same, what they hand on, and how they are carried out side by side."""

import json
from pathlib import Path

import pytest
import torch

from recipes.ablations import PHASES
from recipes.ablations import runs as runs_module
from recipes.ablations.runs import Outcome, Run, Scheduler, gpu_groups, runs_of, slots_of
from recipes.errors import RunError
from recipes.signals import StopRequest
from tests.helpers.ablations import TWO, read_table


def test_equal_rows_of_several_tables_are_one_run() -> None:
    """Whatever they are called and however their settings are written; not what computes something else."""
    runs = {
        run.row.name: run.folder
        for number in (4, 5, 6, 7)
        for run in runs_of(read_table(number, "paper"), [0], Path())
    }
    assert runs["row-first, forward"] == runs["depth 4, width 512"] == runs["normalised pixels"]
    assert runs["row-first, forward"] == runs["1/3 (64 px of 192)"]
    again = read_table(5, "paper", ["data.workers=3", "compile=true", "data.flip=0.5"], TWO[:1])  # as it is
    assert runs_of(again, [0], Path())[0].folder == runs["row-first, forward"]
    for other in (["finetune.epochs=7"], ["data.source=elsewhere"]):
        assert runs_of(read_table(5, "paper", other, TWO[:1]), [0], Path())[0].folder != runs["row-first, forward"]
    assert runs_of(again, [1], Path())[0].folder != runs["row-first, forward"]


def test_phases_hand_their_weights_on() -> None:
    """And an override of one phase is for that alone."""
    table = read_table(7, "digits", ["finetune.epochs=7", "data.max_zoom=0"])
    run = runs_of(table, [3], Path("runs"))[0]
    words = {phase: run.arguments(phase) for phase in PHASES}
    assert f"dvae={run.folder / 'dvae' / 'model.safetensors'}" in words["pretrain"]
    assert f"pretrained={run.folder / 'pretrain' / 'pretraining_model'}" in words["finetune"]
    assert "epochs=7" in words["finetune"] and "epochs=7" not in words["pretrain"]
    assert all({"data.max_zoom=0", f"output_dir={run.folder / phase}"} <= {*words[phase]} for phase in PHASES)
    assert all("seed=3" in words[phase] for phase in PHASES)


def test_a_run_has_the_score_and_the_time_of_its_last_epoch(tmp_path: Path) -> None:
    [run] = runs_of(read_table(5, "digits", rows=TWO[:1]), [0], tmp_path)
    epochs = [(600.0, 90.0, 80.0), (1800.0, 70.0, 75.0)]
    for phase in run.row.phases:
        rows = [
            {"seconds": seconds, "processes": 2, "top1": top1, "top1_ema": top1_ema}
            for seconds, top1, top1_ema in epochs
        ]
        run.output_dir(phase).mkdir(parents=True)
        (run.output_dir(phase) / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    hours = len(run.row.phases) * 0.5 * 2 / 4  # half an hour on two GPUs for each phase, four runs on a GPU
    assert run.outcome(runs_per_gpu=4) == Outcome(top1=75.0, gpu_hours=hours)  # of the average, which is better then


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_groups(1) == ["0", "1", "2", "3"]
    assert gpu_groups(2) == ["0,1", "2,3"] and gpu_groups(3) == ["0,1,2"]
    assert slots_of(["0", "1", "2"], 2) == ["0", "1", "2", "1", "2", "0"]
    assert slots_of(["0,1"], 3) == ["0,1"] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,GPU-ab,7")
    assert gpu_groups(2) == ["5,2", "GPU-ab,7"]
    with pytest.raises(RunError, match="--gpus-per-run is 5, but there are 4 GPUs; allowed: up to as many, or 1"):
        gpu_groups(5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_groups(1) == [""]
    with pytest.raises(RunError, match="--gpus-per-run is 2, but there are 0 GPUs"):
        gpu_groups(2)


STAND_IN = """
import os, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv if "=" in word)
place = Path(words["output_dir"])
place.mkdir(parents=True, exist_ok=True)
assert Path(words["data.source"]).is_dir()  # where the command was typed
with (place / "started").open("a") as file:
    file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
deadline = time.monotonic() + 30
while len([*Path(__file__).parents[1].rglob("started")]) < 4:  # none goes on alone
    assert time.monotonic() < deadline
    time.sleep(0.02)
if words["seed"] == "1" and not (place / "again").exists():
    (place / "again").touch()
    sys.exit("a failure")
(place / "metrics.jsonl").write_text('{"top1": 50, "seconds": 1, "processes": 1}\\n')
(place / "curves.png").touch()
"""


def test_runs_stand_side_by_side_and_failures_do_not_stop_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two on each GPU at the same time; what failed is tried again by the next command, what ended is not."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").touch()  # else a PYTHONPATH with the real package goes before
    for phase in PHASES:
        (tmp_path / "recipes" / f"{phase}.py").write_text(STAND_IN)
    monkeypatch.setattr(runs_module, "CHECKOUT", tmp_path)
    monkeypatch.setattr(runs_module, "PAUSE", 0.02)
    (tmp_path / "elsewhere" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs = runs_of(read_table(5, "digits", ["data.source=images"], TWO), [0, 1], tmp_path / "out")
    ended: list[Run] = []
    scheduler = Scheduler(["0", "1", "0", "1"], StopRequest(), ended.append)
    scheduler.carry_out(runs)
    assert {run.seed for run in ended} == {0} and {run.seed for run, _ in scheduler.failed} == {1}
    assert all("a failure" in log.read_text() for _, log in scheduler.failed)
    assert "seed 1: pretrain failed, see" in capsys.readouterr().out
    assert {gpu for file in tmp_path.rglob("started") for gpu in file.read_text().splitlines()} == {"0", "1"}
    for _ in PHASES[1:]:  # seed 1 fails once in each phase
        scheduler = Scheduler(["0"], StopRequest(), ended.append)
        scheduler.carry_out([run for run in runs if run not in ended])
    assert not scheduler.failed and len(ended) == 4
    assert all(len(file.read_text().splitlines()) <= 2 for file in tmp_path.rglob("started"))
