"""Tables of the paper: what their rows come to, what is left to run, and a miniature of one on the digits."""

import csv
import math
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats

from recipes import ablate
from recipes.ablate import (
    ABLATIONS,
    PHASES,
    Bench,
    Outcome,
    Run,
    main,
    markdown,
    read_outcomes,
    read_table,
    record,
    results,
    runs_of,
    write_results,
)
from recipes.config import FinetuneConfig, PretrainConfig
from recipes.errors import RunError
from recipes.parsing import ConfigError
from recipes.signals import EXIT_CODE, StopRequest
from tests import ROOT

NUMBERS = range(4, 9)
TINY = ["epochs=1", "warmup_epochs=0", "global_batch=256", "model_args.embed_dim=16", "model_args.depth=1"]
TWO = ["row-first, forward", "random"]


as_shipped = cache(read_table)  # reading one builds all its models


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("preset", ["paper", "small", "digits"])
def test_every_row_can_be_built(number: int, preset: str) -> None:
    """And no two rows of a table are the same run."""
    table = as_shipped(number, preset)
    runs = runs_of(table, [0], Path("runs"))
    assert len(runs) == len({run.folder for run in runs}) >= 3
    assert all([*row.phases] == [phase for phase in PHASES if phase in row.phases] for row in table.rows)
    assert all("finetune" in row.phases for row in table.rows)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_papers_figures_are_the_papers(number: int, repo: Path) -> None:
    files = [*(repo.parent / "shared" / "spec" / "tables").glob(f"table{number}_*.csv")]
    if not files:
        pytest.skip("the paper's tables are not there")
    expected = list(csv.DictReader(files[0].read_text().splitlines()))
    rows = [
        row["reported"]
        for row in yaml.safe_load((ABLATIONS / f"table{number}.yaml").read_text())["rows"]
        if "reported" in row
    ]
    same = expected[:4] + expected[4:5] + expected[6:] if number == 6 else expected  # 4 x 512 is there twice
    assert sorted(row["top1"] for row in rows) == sorted(float(row["top1"]) for row in same)
    if number == 8:
        assert [row["hours"] for row in rows] == [float(row["training_cost_h_8xA5000"]) for row in expected]


def test_settings_of_the_paper() -> None:
    """Of the preset, the row and the row in the preset; a switch of each table is what its rows differ in."""
    rows = {row.name: row for number in (4, 5, 6, 7) for row in as_shipped(number, "paper").rows}

    def of(name: str, *keys: str) -> Any:
        config: Any = rows[name].configs["pretrain"]
        return tuple(config.model_args.get(key) for key in keys)

    default: Any = rows["row-first, forward"].configs["pretrain"]
    assert isinstance(default, PretrainConfig) and (default.epochs, default.global_batch) == (300, 2048)
    assert of("1/6 (32 px of 192)", "img_size", "patch_size", "cluster_size") == (192, 16, 32)
    assert of("one pixel", "img_size", "patch_size", "cluster_size", "target") == (12, 1, 1, "pixel")
    assert of("column-first, backward", "prediction_order") == ("column_reversed",)
    assert of("depth 8", "decoder_depth") == (8,) and of("width 384", "decoder_dim") == (384,)
    tokens: Any = rows["tokens of a dVAE"].configs["pretrain"]
    assert tokens.dvae == "https://cdn.openai.com/dall-e/encoder.pkl" and "dvae" not in rows["tokens of a dVAE"].phases
    supervised: Any = rows["supervised"].configs["finetune"]
    assert [*rows["supervised"].configs] == ["finetune"] and isinstance(supervised, FinetuneConfig)
    assert (supervised.pretrained, supervised.epochs) == (None, 300)


@pytest.mark.parametrize("number, preset", [(4, "short"), (8, "cifar10-short")])
def test_short_presets_are_the_long_ones_in_fewer_epochs(number: int, preset: str) -> None:
    """Row by row; supervised training alone is again twice as long as finetuning."""
    short = as_shipped(number, preset)
    long = as_shipped(number, {"short": "small", "cifar10-short": "cifar10"}[preset])
    assert [row.name for row in short.rows] == [row.name for row in long.rows]
    for row, other in zip(short.rows, long.rows, strict=True):
        epochs = {phase: settings["epochs"] for phase, settings in row.phases.items()}
        assert epochs == ({"pretrain": 32, "finetune": 12} if "pretrain" in epochs else {"finetune": 24})
        assert row.phases == {phase: {**other.phases[phase], "epochs": epochs[phase]} for phase in row.phases}


def test_equal_rows_of_several_tables_are_one_run() -> None:
    """Whatever they are called and however their settings are written; not what computes something else."""
    runs = {
        run.row.name: run.folder
        for number in (4, 5, 6, 7)
        for run in runs_of(as_shipped(number, "paper"), [0], Path())
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
    words = {phase: run.command(phase) for phase in PHASES}
    assert f"dvae={run.folder / 'dvae' / 'model.safetensors'}" in words["pretrain"]
    assert f"pretrained={run.folder / 'pretrain' / 'pretraining_model'}" in words["finetune"]
    assert "epochs=7" in words["finetune"] and "epochs=7" not in words["pretrain"]
    assert all({"data.max_zoom=0", f"output_dir={run.folder / phase}"} <= {*words[phase]} for phase in PHASES)
    assert all("seed=3" in words[phase] for phase in PHASES)


def test_wrong_rows_and_settings_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"table 5 has no row 'spiral' in preset small; allowed: 'row-first, forward'"):
        read_table(5, "small", rows=["spiral"])
    with pytest.raises(RunError, match="none of these rows of table 5 has the phase dvae; leave out what"):
        read_table(5, "digits", ["dvae.epochs=3"], ["random"])
    with pytest.raises(ConfigError) as refused:
        read_table(6, "small", ["pretrain.epochs=0"])
    assert len(refused.value.problems) == 6
    for override in ("seed=9", "pretrain.output_dir=elsewhere", "finetune.pretrained=elsewhere"):
        key = override.partition("=")[0].rpartition(".")[2]
        with pytest.raises(ConfigError, match=f"row 'random', .*: {key} is set for each run; leave it out"):
            read_table(5, "digits", [override], ["random"])
    monkeypatch.setattr("arm_zoo.pretraining._registry.OBJECTIVES", {"autoregressive": None})
    with pytest.raises(ConfigError, match=r"row 'MambaMLP, MAE', pretrain: .*unknown objective 'mae'; choose one of"):
        read_table(8, "digits", rows=["MambaMLP, MAE"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["5"], "data.source is missing"),
        (["5", "data.source=nowhere"], "there is no 'nowhere'"),
        (["5", "epochs"], "'epochs' is no override; type key=value"),
        (["5", "--gpus-per-run", "0"], "--gpus-per-run is 0; allowed: a whole number, 1 or more"),
        (["5", "--runs-per-gpu", "0"], "--runs-per-gpu is 0; allowed: a whole number, 1 or more"),
        (["5", "--list", "--into", "RESULTS.md"], "--into: not allowed with argument --list"),
        (["3"], "invalid choice: 3"),
        (["5", "--list", "--speed", "fast"], "expected one of dvae, pretrain, finetune, and a number above 0, as in"),
        (["5", "--list", "--speed", "pretrain=inf"], "got 'pretrain=inf'"),
        (["5", "--list", "--seeds", "0,a"], "--seeds: expected a whole number from 0 to 4294967295, or several as in"),
        (["5", "--list", "--seeds=0,-1"], "got '0,-1'"),
        (["5", "--list", "--seeds", "4294967296"], "got '4294967296'"),
    ],
    ids=str,
)
def test_bad_input_ends_in_a_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err + str(refused.value.code)
    assert not (tmp_path / "out").exists()


def finish(run: Run, top1: float, seconds: float = 1800.0) -> None:
    """Leave what a run leaves that has ended."""
    for phase in run.row.phases:
        run.place(phase).mkdir(parents=True)
        row = f'{{"epoch": 1, "seconds": {seconds}, "processes": 2, "images_per_second": 100.0, "top1": {top1}}}\n'
        (run.place(phase) / "metrics.jsonl").write_text(row)
        (run.place(phase) / "config.yaml").write_text("model: arm_pico\n")
        (run.place(phase) / "curves.png").write_bytes(b"")


def test_the_list_tells_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours from a speed that is given, or was measured by any run; what has ended takes none."""
    command = ["5", "--preset", "digits", "--output", str(tmp_path), "--list", "--seeds", "0,1", "--row", TWO[0]]
    main([*command, "epochs=1000"])
    told = capsys.readouterr().out
    assert told.count("| to do | unknown |") == 4 and "0.0 hours in all, without those unknown" in told
    main([*command, "epochs=1000", "--speed", "pretrain=100", "--speed", "finetune=50"])
    told = capsys.readouterr().out
    hours = 1000 * 1437 / 100 / 3600
    assert f"| {TWO[0]} | 1 | pretrain | 1000 | to do | {hours:.2f} |" in told
    assert f"| {TWO[0]} | 0 | finetune | 1000 | to do | {2 * hours:.2f} |" in told
    assert f"{6 * hours:.1f} hours in all\n" in told
    runs = runs_of(read_table(5, "digits", ["epochs=1000"], [TWO[0]]), [0, 1], tmp_path)
    finish(runs[0], 90)  # at 100 images per second on two GPUs
    main([*command, "epochs=1000"])
    told = capsys.readouterr().out
    assert f"| {TWO[0]} | 0 | finetune | 1000 | finished | 0.00 |" in told
    assert f"| {TWO[0]} | 1 | pretrain | 1000 | to do | {2 * hours:.2f} |" in told
    assert not (tmp_path / "table5").exists()


def test_intervals_are_students(tmp_path: Path) -> None:
    """Against scipy, and by hand: 4.303 standard errors of three scores, 12.706 of two."""
    table = read_table(5, "digits", rows=TWO)
    runs = runs_of(table, [0, 1, 2], tmp_path)
    scores, outcomes = [90.0, 92.0, 91.0], dict[str, Outcome]()
    for run, score in zip(runs[::2], scores, strict=True):  # every other one: a seed's rows follow each other
        finish(run, score)
        outcomes[run.name] = run.outcome(runs_per_gpu=1)
    first, second = results(table, runs, outcomes)
    low, high = stats.t.interval(0.95, 2, loc=91, scale=stats.sem(scores))
    assert first["top1"] == 91 and first["interval95"] == pytest.approx((high - low) / 2)
    assert first["interval95"] == pytest.approx(4.303 * 1 / math.sqrt(3), rel=1e-3)
    assert first["gpu_hours"] == 2 * 2 * 0.5  # two phases of half an hour on two GPUs
    assert second["top1"] is None and second["interval95"] is None
    finish(runs[3], 80.0)
    outcomes[runs[3].name] = runs[3].outcome(runs_per_gpu=4)
    rows = results(table, runs, outcomes)
    assert rows[1]["top1"] == 80 and rows[1]["interval95"] is None
    lines = [*markdown(rows)]
    assert lines[2] == "| row-first, forward | 91.00 | ± 2.48 | 3 | 2.00 | 82.5 | - |"
    assert lines[3] == "| random | 80.00 | - | 1 | 0.50 | 81.5 | - |"
    write_results(table, runs, outcomes, tmp_path / "table5")
    [row, _] = csv.DictReader((tmp_path / "table5" / "results.csv").read_text().splitlines())
    assert (row["row"], row["scores"], row["seeds"]) == ("row-first, forward", "90.0 92.0 91.0", "0 1 2")
    assert (tmp_path / "table5" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_is_enough_of_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where folders and checkpoints are gone, as on another machine: such runs are not run again, others are begun."""
    table = read_table(5, "digits", rows=TWO)
    runs = runs_of(table, [0, 1], tmp_path / "out")
    for number, run in enumerate(runs[:3]):
        record(run, Outcome(top1=90 + number / 3, gpu_hours=0.25), tmp_path / "out")
    assert read_outcomes(tmp_path / "out")[runs[1].name] == Outcome(90 + 1 / 3, 0.25)
    worked: list[Run] = []
    monkeypatch.setattr(Bench, "work", lambda bench, left: worked.extend(left))
    command = ["5", "--preset", "digits", "--output", str(tmp_path / "out"), "--row", TWO[0], "--row", TWO[1]]
    main(command)
    assert worked == runs[3:]
    main([*command, "--list"])
    assert capsys.readouterr().out.count("finished") == 2 * 3
    main([*command, "finetune.epochs=7"])
    assert len(worked) == 1 + 4  # other settings, other runs
    main(command)
    [_, random] = csv.DictReader((tmp_path / "out" / "table5" / "results.csv").read_text().splitlines())
    assert (random["row"], float(random["top1"]), random["seeds"]) == ("random", 90 + 1 / 3, "0")


@pytest.mark.parametrize(
    "line", ["ab,random,0,90", "ab,random,0,,", "<<<<<<< HEAD", "ab,random,0,nan,1", "ab,random,0,90,1,7"]
)
def test_a_damaged_record_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(f"run,row,seed,top1,gpu_hours\n{line}\n")
    with pytest.raises(RunError, match=r"runs\.csv is damaged; allowed: run,row,seed,top1,gpu_hours"):
        read_outcomes(tmp_path)


@pytest.mark.parametrize("figures", ["", '{"epoch": 1, "seco', "[1]", '{"epoch": 1}', "\0"])
def test_damaged_figures_of_a_run_are_named(figures: str, tmp_path: Path) -> None:
    [run] = runs_of(read_table(5, "digits", rows=TWO[1:]), [0], tmp_path)
    finish(run, 90)
    (run.place("finetune") / "metrics.jsonl").write_text(figures)
    with pytest.raises(SystemExit, match=rf"metrics.jsonl is damaged; delete {run.folder}, and the same command"):
        main(["5", "--preset", "digits", "--output", str(tmp_path), "--row", TWO[1], "--seeds", "0"])


def test_a_table_goes_into_a_document_under_its_heading(tmp_path: Path) -> None:
    """And nothing else there changes, however often, or is run."""
    heading = "### Prediction orders (paper, table 5), preset digits"
    document = tmp_path / "page" / "RESULTS.md"
    document.parent.mkdir()
    runs = runs_of(read_table(5, "digits", rows=TWO), [0], tmp_path / "out")
    record(runs[0], Outcome(top1=50, gpu_hours=0), tmp_path / "out")
    command = ["5", "--preset", "digits", "--output", str(tmp_path / "out"), "--row", TWO[0], "--into", str(document)]
    document.write_text("# Page\n")
    with pytest.raises(SystemExit, match=f"has no line '{re.escape(heading)}', under which the table goes"):
        main(command)
    document.write_text(f"{heading}\n\nfigures of other settings\n")
    with pytest.raises(SystemExit, match=r"has none of the 2 runs of .* with these settings; type those with which"):
        main([*command, "finetune.epochs=7"])
    assert document.read_text().endswith("figures of other settings\n")
    document.write_text(heading)  # all there is
    main(command)
    assert document.read_text().startswith(f"{heading}\n\n| row |")
    document.write_text(f"# Page\n\nBefore.\n\n{heading}\n\nold\n\n## After\n\nText.\n")
    for _ in range(2):
        main(command)
        before, text = document.read_text().split(f"{heading}\n\n")
        table, after = text.split("\n\n## After\n")
        assert before == "# Page\n\nBefore.\n\n" and after == "\nText.\n"
        assert "| row-first, forward | 50.00 | - | 1 |" in table and "old" not in table
        assert table.endswith("![Prediction orders (paper, table 5)](../out/table5/figure.png)")
    assert (document.parent / "../out/table5/figure.png").is_file() and not runs[1].folder.exists()


def test_the_page_of_results_has_a_place_for_each_table(repo: Path) -> None:
    page = (repo / "recipes" / "RESULTS.md").read_text().splitlines()
    for number in NUMBERS:
        title = yaml.safe_load((ABLATIONS / f"table{number}.yaml").read_text())["title"]
        assert page.count(f"### {title}, preset short") == 1


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ablate.device_groups(1) == ["0", "1", "2", "3"]
    assert ablate.device_groups(2) == ["0,1", "2,3"] and ablate.device_groups(3) == ["0,1,2"]
    assert ablate.places(["0", "1", "2"], 2) == ["0", "1", "2", "1", "2", "0"]
    assert ablate.places(["0,1"], 3) == ["0,1"] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,GPU-ab,7")
    assert ablate.device_groups(2) == ["5,2", "GPU-ab,7"]
    with pytest.raises(RunError, match="--gpus-per-run is 5, but there are 4 GPUs; allowed: up to as many, or 1"):
        ablate.device_groups(5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ablate.device_groups(1) == [""]
    with pytest.raises(RunError, match="--gpus-per-run is 2, but there are 0 GPUs"):
        ablate.device_groups(2)


STAND_IN = """
import os, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv if "=" in word)
place = Path(words["output_dir"])
place.mkdir(parents=True, exist_ok=True)
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
    for phase in PHASES:
        (tmp_path / "recipes" / f"{phase}.py").write_text(STAND_IN)
    monkeypatch.setattr(ablate, "CHECKOUT", tmp_path)
    monkeypatch.setattr(ablate, "PAUSE", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runs = runs_of(read_table(5, "digits", rows=TWO), [0, 1], tmp_path / "out")
    ended: list[Run] = []
    bench = Bench(["0", "1", "0", "1"], StopRequest(), ended.append)
    bench.work(runs)
    assert {run.seed for run in ended} == {0} and {run.seed for run, _ in bench.failed} == {1}
    assert all("a failure" in log.read_text() for _, log in bench.failed)
    assert "seed 1: pretrain failed, see" in capsys.readouterr().out
    assert {gpu for file in tmp_path.rglob("started") for gpu in file.read_text().splitlines()} == {"0", "1"}
    for _ in PHASES[1:]:  # seed 1 fails once in each phase
        bench = Bench(["0"], StopRequest(), ended.append)
        bench.work([run for run in runs if run not in ended])
    assert not bench.failed and len(ended) == 4
    assert all(len(file.read_text().splitlines()) <= 2 for file in tmp_path.rglob("started"))


@pytest.mark.slow
def test_a_table_of_the_digits_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    """By the ordinary commands: stopped in the middle of a run, finished by the same command, then nothing is left."""
    command = [sys.executable, "-m", "recipes.ablate", "5", "--preset", "digits", "--output", str(tmp_path)]
    command += ["--row", TWO[1], "--seeds", "0,1", *TINY, "pretrain.checkpoint_steps=1", "epochs=6"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate()
    assert process.returncode == EXIT_CODE and "SIGTERM: stopped; the same command goes on" in told
    assert not list(tmp_path.rglob("curves.png"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    [log] = [file for file in tmp_path.rglob("pretrain.log") if "going on from" in file.read_text()]
    assert len(re.findall(r"top-1 [\d.]+%", done.stdout)) == 2 and log.is_file()
    [row] = csv.DictReader((tmp_path / "table5" / "results.csv").read_text().splitlines())
    assert len(row["scores"].split()) == 2
    assert float(row["top1"]) > 10 and float(row["interval95"]) >= 0 and float(row["gpu_hours"]) > 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.jsonl")}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout == f"wrote {tmp_path / 'table5'}\n"
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("metrics.jsonl")} == before
