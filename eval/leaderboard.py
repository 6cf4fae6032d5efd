"""Make the leaderboard: LEADERBOARD.md, leaderboard.html, and the tables in README.md and recipes/RESULTS.md.

Run from the repository root: `python -m eval.leaderboard`. Measured figures come from the CSV files of `python -m
eval`, `python -m eval.throughput` and `python -m recipes.probe`. Reported figures come from eval/board: the paper's
tables, and what the authors of other models report (peers.csv, and anchors.csv for frozen features). No row mixes
measured with reported accuracies, but the chart may show a reported accuracy at the measured speed of the same
architecture.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from arm_zoo import loading
from arm_zoo.command_line import show
from arm_zoo.files import write_text
from eval.board.chart import frozen_chart, speed_chart
from eval.board.columns import SPEEDS, TEXT_COLUMNS, TITLES, accuracy_rows, board, shown
from eval.board.curves import curves
from eval.board.entries import Entry, paper_table, read_entries, read_speeds
from eval.board.frozen import frozen_rows, read_frozen, titles_of
from eval.command_line import guarded
from eval.tables import RESULTS

HERE = Path(__file__).resolve().parent  # has the templates of the files, page.md and page.html


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table; the first column and TEXT_COLUMNS are text, all others are figures."""
    titles = list(rows[0])
    rule = ["---" if title in (titles[0], *TEXT_COLUMNS) else "---:" for title in titles]
    lines = [titles, rule, *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def readme_table(entries: Sequence[Entry]) -> str:
    """Rows measured in fp32 on canonical sets, and what the paper reports of the weights of our entries."""
    ours = {name for name in loading.entries() if "." in name}
    rows = []
    for entry, figures in zip(entries, board(entries), strict=True):
        if entry.dtype == "fp32" and not entry.notes if entry.measured else entry.architecture in ours:
            kind = "**measured**" if entry.measured else "*reported by the paper*"
            of_sets = {title: shown(*figures[title]) for title in TITLES.values() if title in figures}
            rows.append({"entry": f"`{entry.architecture}`", "figures": kind, "size": entry.img_size, **of_sets})
    return f"{state_of(entries)}\n\n{markdown_table(rows)}"


def state_of(entries: Sequence[Entry]) -> str:
    if count := len({entry.model for entry in entries if entry.measured}):
        return f"Measured by this project: {count} {'model' if count == 1 else 'models'}."
    return "No ImageNet accuracy has been measured by this project yet: every accuracy here is *reported* by others."


def ablation(paper: Path, name: str) -> list[dict[str, str]]:
    rows = paper_table(paper, name)
    return [{title: text or "-" for title, text in row.items() if title not in ("kind", "source")} for row in rows]


def between_marks(file: Path, name: str, text: str) -> str:
    """A file's content with `text` between two marks; ValueError unless it has both marks once, in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = file.read_text(encoding="utf-8")
    whole, count = re.subn(f"(?s)(?<={begin}\n).*?(?=\n{end})", lambda _: text, old)
    if count != 1:
        raise ValueError(f"{file} needs the lines {begin} and {end} once each, in this order; the table goes between")
    return whole


def make(
    measured: Path, throughput: Path, paper: Path, peers: Path, frozen: Path, anchors: Path, folder: Path
) -> dict[str, str]:
    """Make the text of each file in `folder`, by name; ValueError if a file there lacks the marks of its table."""
    speeds = read_speeds(throughput)
    entries, frozen_entries = read_entries(measured, speeds, paper, peers), read_frozen(frozen, anchors)
    rows = accuracy_rows(entries)
    sets = {name: title for name, title in TITLES.items() if title in rows[0]}
    values = {
        "entries": entries,
        "rows": rows,
        "accuracies": accuracy_rows([entry for entry in entries if not entry.peer]),
        "peers": accuracy_rows([entry for entry in entries if entry.peer]),
        "frozen": frozen_entries,
        "frozen_titles": titles_of(frozen_entries),
        "frozen_measured": frozen_rows([entry for entry in frozen_entries if entry.kind == "measured"]),
        "frozen_reported": frozen_rows([entry for entry in frozen_entries if entry.kind == "reported"]),
        "speeds": [{title: text(row) for title, text in SPEEDS.items()} for row in speeds],
        "speed_titles": SPEEDS,
        "text_columns": TEXT_COLUMNS,
        "state": state_of(entries),
        "titles": TITLES,
        "data": {"entries": list(map(asdict, entries)), "sets": sets, "curves": curves(speeds)},
        "table": markdown_table,
        "ablation": partial(ablation, paper),
        "chart": speed_chart(speeds),
        "frozen_chart": frozen_chart(frozen_entries),
    }
    environment = Environment(
        loader=FileSystemLoader(HERE / "board"), autoescape=select_autoescape(("html", "svg")),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the page shows sets in the order of sets.csv
    results = environment.get_template("frozen.md").render(values, up="../").rstrip()
    charts = {"speed.svg": "chart.svg"} | ({"frozen.svg": "frozen.svg"} if values["frozen_measured"] else {})
    return {
        "LEADERBOARD.md": environment.get_template("page.md").render(values, up=""),
        "README.md": between_marks(folder / "README.md", "leaderboard", readme_table(entries)),
        "recipes/RESULTS.md": between_marks(folder / "recipes" / "RESULTS.md", "frozen", results),
        "leaderboard.html": environment.get_template("page.html").render(values),
        **{f"eval/{name}": environment.get_template(template).render(values) for name, template in charts.items()},
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.leaderboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., object] = partial(parser.add_argument, type=Path)
    add("--results", default=RESULTS, metavar="FILE", help="output of python -m eval (%(default)s)")
    throughput = HERE / "throughput.csv"
    add("--throughput", default=throughput, metavar="FILE", help="output of python -m eval.throughput (%(default)s)")
    add("--paper", default=HERE / "board" / "paper", metavar="FOLDER", help="the paper's tables (%(default)s)")
    add("--peers", default=HERE / "board" / "peers.csv", metavar="FILE", help="reported by others (%(default)s)")
    add(
        "--frozen", default=HERE / "frozen.csv", metavar="FILE", help="output of python -m recipes.probe (%(default)s)"
    )
    anchors = HERE / "board" / "anchors.csv"
    add("--anchors", default=anchors, metavar="FILE", help="frozen features, reported by others (%(default)s)")
    folder = "where to write the files; it has README.md and recipes/RESULTS.md already (%(default)s)"
    add("--folder", default=HERE.parent, help=folder)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not current")
    return parser


def run(args: argparse.Namespace) -> int:
    parser = make_parser()  # a default file may be missing: nothing has been measured yet
    for option in ("results", "throughput", "frozen"):
        if not (path := getattr(args, option)).exists() and path != parser.get_default(option):
            raise ValueError(f"--{option}: no file {str(path)!r}")
    tables = (args.results, args.throughput, args.paper, args.peers, args.frozen, args.anchors)
    files = make(*tables, args.folder)
    for name, text in files.items():
        path = args.folder / name
        if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            raise ValueError(f"{name} is not current; run python -m eval.leaderboard")
        if not args.check:
            write_text(path, text)
            show(str(path))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
