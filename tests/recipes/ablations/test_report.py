"""The table of results: means and intervals over seeds, and the record of the runs that have ended."""

import csv
import math
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from scipy import stats

from recipes.ablations import FOLDER
from recipes.ablations.report import markdown, read_outcomes, results, write_results
from recipes.ablations.runs import Outcome, runs_of
from recipes.errors import RunError
from recipes.training import plots
from tests.helpers.ablations import TWO, finish, read_table


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
    assert lines[2] == "| row-first, forward | 91.00 | ± 2.48 | 3 | 2 | 82.5 | - |"
    assert lines[3] == "| random | 80.00 | - | 1 | 0.5 | 81.5 | - |"
    write_results(table, runs, outcomes, tmp_path / "table5")
    [row, _] = csv.DictReader((tmp_path / "table5" / "results.csv").read_text().splitlines())
    assert (row["row"], row["scores"], row["seeds"]) == ("row-first, forward", "90.0 92.0 91.0", "0 1 2")
    assert (tmp_path / "table5" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_and_tables_say_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees one alone reads on which images, by which preset, and which figures are the paper's."""
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure))
    table = read_table(5, "cifar10-short", ["data.source=images/cifar10"], TWO)
    write_results(table, runs_of(table, [0], tmp_path), {}, tmp_path)
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["measured here: cifar10, preset cifar10-short", "reported by the paper: ImageNet-1k"]
    assert (tmp_path / "table.md").read_text().startswith("# Prediction orders (paper, table 5), preset cifar10-short")


def test_a_single_run_is_drawn_hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: drawn.append(figure))
    scores = {"here": [(9, 1), (8, None), (None, None)]}
    plots.plot_intervals(tmp_path / "a.png", "title", ["three seeds", "one", "none"], scores)
    [axes] = drawn[0].axes
    inside = [bars.lines[0].get_markerfacecolor() for bars in axes.containers]
    assert inside[1] == "white" != inside[0] and len(inside) == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("ab,random,0,90", "it has 4 cells; allowed: 5, one for each column"),
        ("ab,random,0,90,1,7", "it has 6 cells; allowed: 5, one for each column"),
        ("<<<<<<< HEAD", "it has 1 cells; allowed: 5, one for each column"),
        ("ab,random,0,90,", "gpu_hours is empty; allowed: a number of 0 or more"),
        ("ab,random,0,nan,1", "top1 is 'nan'; allowed: a number of 0 or more"),
    ],
)
def test_a_damaged_record_is_named(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(f"run,row,seed,top1,gpu_hours\n{line}\n")
    with pytest.raises(RunError, match=rf"runs\.csv, line 2: {problem}; delete damaged lines"):
        read_outcomes(tmp_path)


def test_two_results_of_a_run_are_told(tmp_path: Path) -> None:
    """As after copies of two machines were joined; the same line twice does no harm."""
    lines = ["run,row,seed,top1,gpu_hours", "ab,random,0,90,1", "ab,random,0,90,1"]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    assert read_outcomes(tmp_path) == {"ab": Outcome(top1=90, gpu_hours=1)}
    (tmp_path / "runs.csv").write_text("\n".join([*lines, "ab,random,0,91,1"]))
    with pytest.raises(RunError, match=r"runs\.csv has two results of run ab; delete the line of one of them"):
        read_outcomes(tmp_path)


def test_the_page_of_results_has_a_place_for_each_table(repo: Path) -> None:
    page = (repo / "recipes" / "RESULTS.md").read_text().splitlines()
    for number in range(4, 9):
        title = yaml.safe_load((FOLDER / f"table{number}.yaml").read_text())["title"]
        assert page.count(f"### {title}, preset short") == 1
