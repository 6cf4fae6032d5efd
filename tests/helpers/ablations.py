"""Rows of table 5, a table alone, and what a run leaves that has ended."""

from collections.abc import Sequence

from recipes.ablations.runs import Run
from recipes.ablations.tables import Table, read_tables
from recipes.config import to_yaml

TWO = ["row-first, forward", "random"]


def read_table(number: int, preset: str, overrides: Sequence[str] = (), rows: Sequence[str] = ()) -> Table:
    """One table, as `read_tables` reads several."""
    [table] = read_tables([number], preset, overrides, rows)
    return table


def finish(run: Run, top1: float, seconds: float = 1800.0) -> None:
    """Leave what a run leaves that has ended."""
    for phase, config in run.row.configs.items():
        run.output_dir(phase).mkdir(parents=True)
        row = f'{{"epoch": 1, "seconds": {seconds}, "processes": 2, "images_per_second": 100.0, "top1": {top1}}}\n'
        (run.output_dir(phase) / "metrics.jsonl").write_text(row)
        (run.output_dir(phase) / "config.yaml").write_text(to_yaml(config))
        (run.output_dir(phase) / "curves.png").write_bytes(b"")
