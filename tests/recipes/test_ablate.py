"""The command that runs a table of the paper: its options, and a miniature of a table on the digits."""

import csv
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from recipes.ablate import main
from recipes.ablations.report import read_outcomes, record
from recipes.ablations.runs import Outcome, Run, Scheduler, runs_of
from recipes.signals import EXIT_CODE
from tests import ROOT
from tests.helpers.ablations import TWO, finish, read_table

TINY = ["epochs=1", "warmup_epochs=0", "global_batch=256", "model_args.embed_dim=16", "model_args.depth=1"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["5"], "data.source is missing"),
        (["5", "data.source=nowhere"], "there is no 'nowhere'"),
        (["5", "epochs"], "'epochs' is no table and no override; allowed: 4, 5, 6, 7, 8, or key=value as in"),
        (["5", "--gpus-per-run", "0"], "--gpus-per-run is 0; allowed: a whole number, 1 or more"),
        (["5", "--runs-per-gpu", "0"], "--runs-per-gpu is 0; allowed: a whole number, 1 or more"),
        (["5", "--list", "--into", "RESULTS.md"], "--into: not allowed with argument --list"),
        (["5", "--row", "spiral"], "no row of table 5 is called 'spiral' in preset small"),
        (["5", "3"], "'3' is no table and no override; allowed: 4, 5, 6, 7, 8, or"),
        (["data.source=nowhere"], "no table is given; allowed: one or more of"),
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
    usage, code = capsys.readouterr().err, refused.value.code
    assert message in (usage or str(code)) and (code == 2) == usage.startswith("usage: ")
    assert not (tmp_path / "out").exists()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from recipes.ablate import main; assert 'torch' not in sys.modules; main(['--help'])"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_list_tells_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours from a speed that is given, or was measured by any run; what has ended takes none."""
    command = ["5", "--preset", "digits", "--output", str(tmp_path), "--list", "--seeds", "0,1", "--row", TWO[0]]
    main([*command, "epochs=1000"])
    told = capsys.readouterr().out
    assert told.count("| to do | unknown |") == 4 and "0.0 hours in all, without those unknown" in told
    main([*command, "epochs=1000", "--speed", "pretrain=100", "--speed", "finetune=50"])
    told = capsys.readouterr().out
    hours = 1000 * 1437 / 100 / 3600
    assert f"| 5 | {TWO[0]} | 1 | pretrain | 1000 | to do | {hours:.2f} |" in told
    assert f"| 5 | {TWO[0]} | 0 | finetune | 1000 | to do | {2 * hours:.2f} |" in told
    assert f"{6 * hours:.1f} hours in all\n" in told
    runs = runs_of(read_table(5, "digits", ["epochs=1000"], [TWO[0]]), [0, 1], tmp_path)
    finish(runs[0], 90)  # at 100 images per second on two GPUs
    main([*command, "epochs=1000"])
    told = capsys.readouterr().out
    assert f"| 5 | {TWO[0]} | 0 | finetune | 1000 | finished | 0.00 |" in told
    assert f"| 5 | {TWO[0]} | 1 | pretrain | 1000 | to do | {2 * hours:.2f} |" in told
    assert not (tmp_path / "table5").exists()


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
    monkeypatch.setattr(Scheduler, "carry_out", lambda scheduler, left: worked.extend(left))
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


def test_several_tables_run_their_common_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All seeds of the first table, then those of the next; an override of a phase needs a row of any table."""
    command = ["7", "5", "--preset", "digits", "--output", str(tmp_path)]
    main([*command, "--list", "--seeds", "0", "dvae.epochs=3"])  # of which only table 7 has one
    told = capsys.readouterr().out
    assert told.index("| 7 | tokens of a dVAE | 0 | dvae |") < told.index("| 5 | random | 0 | pretrain |")
    assert "| 7 | normalised pixels | 0 | pretrain | 3 | to do |" in told
    assert "| 5 | row-first, forward | 0 | pretrain | 3 | as above |" in told

    def carry_out(scheduler: Scheduler, left: Sequence[Run]) -> None:
        for run in {run.folder: run for run in left}.values():
            finish(run, 90.5)
            scheduler._on_end(run)

    monkeypatch.setattr(Scheduler, "carry_out", carry_out)
    main([*command, "--seeds", "0", "--row", "normalised pixels", "--row", TWO[0]])
    assert capsys.readouterr().out.count("top-1 90.50%") == 1
    for number, name in ((7, "normalised pixels"), (5, TWO[0])):
        [row] = csv.DictReader((tmp_path / f"table{number}" / "results.csv").read_text().splitlines())
        assert (row["row"], row["scores"]) == (name, "90.5")
    main([*command, "--seeds", "0", "--row", "pixels"])
    assert "table5" not in capsys.readouterr().out  # has no such row


@pytest.mark.parametrize("figures", ["", '{"epoch": 1, "seco', "[1]", '{"epoch": 1}', "\0"])
def test_damaged_figures_of_a_run_are_named(figures: str, tmp_path: Path) -> None:
    [run] = runs_of(read_table(5, "digits", rows=TWO[1:]), [0], tmp_path)
    finish(run, 90)
    (run.output_dir("finetune") / "metrics.jsonl").write_text(figures)
    with pytest.raises(SystemExit, match=rf"metrics.jsonl is damaged; delete {run.folder}, and the same command"):
        main(["5", "--preset", "digits", "--output", str(tmp_path), "--row", TWO[1], "--seeds", "0"])


@pytest.mark.parametrize(
    ("figures", "config"),
    [
        ('"processes": 1', ""),
        ('"processes": 1', "model: ["),
        ('"epoch": 1', "model: arm_pico"),
        ('"processes": 1', None),
    ],
)
def test_a_speed_that_cannot_be_read_is_told(figures: str, config: str | None, tmp_path: Path) -> None:
    [run] = runs_of(read_table(5, "digits", rows=TWO[1:]), [0], tmp_path)
    folder = run.output_dir("pretrain")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(f'{{"images_per_second": 3, {figures}}}')
    if config is not None:
        (folder / "config.yaml").write_text(config)
    command = ["5", "--preset", "digits", "--output", str(tmp_path), "--row", TWO[1], "--seeds", "0", "--list"]
    with pytest.raises(SystemExit, match=rf"the speed of {folder} cannot be read: .*, as in --speed pretrain=IMAGES"):
        main(command)
    main([*command, "--speed", "pretrain=100"])


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
    document.write_bytes(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"RESULTS\.md is no Markdown file, which is text in UTF-8: "):
        main(command)
    document.write_text(f"{heading}\n\nfigures of other settings\n")
    with pytest.raises(SystemExit, match=r"has no run of .* with these settings; type those with which"):
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
