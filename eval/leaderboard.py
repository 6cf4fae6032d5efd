"""Makes the leaderboard from measured rows and the paper's tables: LEADERBOARD.md, README's table, leaderboard.html.

Run from the repository root: `python -m eval.leaderboard`. Measured figures come from the CSVs of `python -m eval` and
`python -m eval.throughput`, reported ones from eval/paper. No row mixes accuracies of the two; the chart may set a
reported accuracy beside a speed that was measured of the same architecture.
"""

import argparse
import html
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from eval import results
from eval.entries import (
    PAPER_SPEED,
    SETS,
    Entry,
    add_speeds,
    compilation,
    measured_entries,
    read_csv,
    read_speeds,
    reported_entries,
)
from eval.sets import REAL

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN, END = "<!-- leaderboard:begin -->", "<!-- leaderboard:end -->"
SET_TITLES = {"in1k": "IN-1k", REAL: "ReaL", "v2": "V2", "a": "IN-A", "r": "IN-R", "sketch": "Sketch"}
ABLATIONS = {
    "table4_prediction_units": "How many units are predicted, of how many pixels",
    "table5_orders": "In which order",
    "table6_decoder": "By which decoder",
    "table7_targets": "What is predicted",
    "table8_paradigms": "Against other ways of pretraining",
}
TEXT_COLUMNS = ("notes", "note", "device", "direction", "target", "paradigm")


# tables in Markdown


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns and those of TEXT_COLUMNS are text, the others figures."""
    rule = ["---" if i < left or title in TEXT_COLUMNS else "---:" for i, title in enumerate(titles)]
    lines = [titles, rule, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def figure(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def board_columns(entries: Sequence[Entry]) -> dict[str, Callable[[Entry], tuple[float | None, int]]]:
    """Title -> value and digits of each column of figures; reported ones have the paper's digits."""

    def of_set(name: str) -> Callable[[Entry], tuple[float | None, int]]:
        return lambda entry: (entry.top1.get(name), 2 if entry.kind == "measured" else 1)

    def of_clean(name: str) -> Callable[[Entry], tuple[float | None, int]]:
        return lambda entry: (entry.clean.get(name), 2)

    return {
        "params (M)": lambda entry: (entry.params_m, 1 if entry.kind == "measured" else 0),
        **{title: of_set(name) for name, title in SET_TITLES.items()},
        **{f"clean {n.upper()}": of_clean(n) for n in ("a", "r") if any(n in entry.clean for entry in entries)},
        "A5000 img/s": lambda entry: (entry.speeds.get(PAPER_SPEED), 0),
    }


def accuracy_table(entries: Sequence[Entry]) -> str:
    columns = board_columns(entries)
    rows = [
        [
            *(entry.model, f"**{entry.kind}**" if entry.kind == "measured" else f"*{entry.kind}*", entry.img_size),
            *(figure(*column(entry)) for column in columns.values()),
            "; ".join([entry.source, *entry.notes] if entry.kind == "measured" else entry.notes),
        ]
        for entry in entries
    ]
    return markdown_table(["model", "figures", "size", *columns, "notes"], rows, left=2)


def readme_table(entries: Sequence[Entry]) -> str:
    """Rows measured in fp32 on sets that are canonical, and what the paper reports of our entries."""
    titles = ["entry", "figures", "size", *SET_TITLES.values()]
    rows = []
    for entry in entries:
        publishable = entry.dtype == "fp32" and not entry.notes
        if publishable if entry.kind == "measured" else entry.architecture.startswith("arm_"):
            digits = 2 if entry.kind == "measured" else 1
            kind = "**measured**" if entry.kind == "measured" else "*reported by the paper*"
            accuracies = [figure(entry.top1.get(name), digits) for name in SETS]
            rows.append([f"`{entry.architecture}`", kind, entry.img_size, *accuracies])
    return f"{state_of(entries)}\n\n{markdown_table(titles, rows, left=2)}"


def state_of(entries: Sequence[Entry]) -> str:
    count = len({entry.model for entry in entries if entry.kind == "measured"})
    if count:
        return f"Measured by this project: {count} {'model' if count == 1 else 'models'}."
    return (
        "No ImageNet accuracy has been measured by this project yet: every accuracy here is *reported by the paper*."
    )


def speed_texts(row: Mapping[str, str]) -> list[str]:
    """A row of the table of speeds, in both files."""
    return [
        *(row["model"], row["mode"], row["img_size"], row["batch_size"], row["dtype"]),
        *(compilation(row), row.get("scan_backend") or "-", figure(float(row["img_per_s"])), row["device"]),
    ]


def speed_table(speeds: Sequence[Mapping[str, str]]) -> str:
    if not speeds:
        return "No speed has been measured yet; `python -m eval.throughput --output eval/throughput.csv` does."
    titles = ["model", "mode", "size", "batch", "dtype", "compiled", "scans", "images/s", "device"]
    return markdown_table(titles, [speed_texts(row) for row in speeds], left=2)


def leaderboard_md(entries: Sequence[Entry], speeds: Sequence[Mapping[str, str]], paper: Path) -> str:
    parts = [
        "# Leaderboard",
        "Made by `python -m eval.leaderboard`; do not edit. The same as a page with charts: leaderboard.html.",
        f"{state_of(entries)} Rows marked **measured** come from `python -m eval` (top-1 in percent; the notes "
        "say by which weights and how); rows marked *reported* are the tables of "
        "[arXiv:2406.07537](https://arxiv.org/abs/2406.07537), which we did not measure.",
        "## Accuracy",
        accuracy_table(entries),
        "V2 is matched-frequency. A and R are scored among their 200 classes; clean A and clean R, where measured, "
        "are the validation pictures of the same classes, scored the same way. ReaL counts pictures that have labels.",
        "## Speed, measured",
        speed_table(speeds),
        "## Ablations, reported by the paper",
    ]
    for name, title in ABLATIONS.items():
        rows = read_csv(paper / f"{name}.csv")
        columns = [column for column in rows[0] if column not in ("kind", "source")]
        parts += [
            f"### {title}",
            markdown_table(columns, [[row[column] or "-" for column in columns] for row in rows]),
        ]
    return "\n\n".join(parts) + "\n"


def with_readme_table(text: str, entries: Sequence[Entry]) -> str:
    """README with its table made anew.

    Raises:
        ValueError: if the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}; the table goes between them")
    return f"{before}{BEGIN}\n{readme_table(entries)}\n{END}{after}"


# the page


def page_heads(titles: Iterable[str]) -> str:
    """Heads of a table's columns; all but the notes sort. The board comes sorted by IN-1k."""
    heads = []
    for title in titles:
        kind = ' class="figure"' if title not in ("model", "figures", "notes") else ""
        order = ' aria-sort="descending"' if title == SET_TITLES["in1k"] else ""
        content = title if title == "notes" else f'<button type="button">{html.escape(title)}</button>'
        heads.append(f'<th scope="col"{kind}{order}>{content}</th>')
    return "".join(heads)


def page_row(entry: Entry, columns: Mapping[str, Callable[[Entry], tuple[float | None, int]]]) -> str:
    """A line of the page's table, made here so that the page shows it without scripts, too."""
    name = html.escape(entry.model)
    if entry.architecture and entry.architecture != entry.model:
        name += f"<small>{html.escape(entry.architecture).replace('_', '_<wbr>')}</small>"
    cells = [
        f'<th scope="row" data-value="{html.escape(entry.model, quote=True)}">{name}</th>',
        f'<td data-value="{entry.kind}"><span class="badge">{entry.kind}</span></td>',
        f'<td class="figure" data-value="{html.escape(entry.img_size)}">{html.escape(entry.img_size)}</td>',
    ]
    for column in columns.values():
        value, digits = column(entry)
        shown = figure(value, digits)
        cells.append(f'<td class="figure" data-value="{"" if value is None else value}">{shown}</td>')
    cells.append(f'<td class="note">{html.escape("; ".join([entry.source, *entry.notes]))}</td>')
    return f'<tr class="{entry.kind}">{"".join(cells)}</tr>'


def speed_rows(speeds: Sequence[Mapping[str, str]]) -> str:
    if not speeds:
        return '<tr><td colspan="9">No speed has been measured yet: <code>python -m eval.throughput</code></td></tr>'
    lines = []
    for row in speeds:
        texts = speed_texts(row)
        values = [*texts[:-2], row["img_per_s"], row["device"]]  # what is sorted by
        cells = (
            f'<td data-value="{html.escape(value, quote=True)}">{html.escape(text)}</td>'
            for value, text in zip(values, texts, strict=True)
        )
        lines.append(f'<tr class="measured">{"".join(cells)}</tr>')
    return "\n".join(lines)


def page(entries: Sequence[Entry], speeds: Sequence[Mapping[str, str]]) -> str:
    """The whole page, from eval/page.html: it loads nothing."""
    # '<' could end the script element that the data lie in
    data = json.dumps({"entries": [asdict(entry) for entry in entries], "sets": SET_TITLES}, indent=1)
    columns = board_columns(entries)
    filled = {
        "<!--HEADS-->": page_heads(["model", "figures", "size", *columns, "notes"]),
        "<!--STATE-->": html.escape(state_of(entries).replace("*", "")),
        "<!--ROWS-->": "\n".join(page_row(entry, columns) for entry in entries),
        "<!--SPEEDS-->": speed_rows(speeds),
        '"DATA"': data.replace("<", "\\u003c"),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for placeholder, content in filled.items():
        text = text.replace(placeholder, content)
    return text


def make(measured: Path, throughput: Path, paper: Path, readme: Path) -> dict[str, str]:
    """File name at the root -> its text."""
    speeds = read_speeds(throughput) if throughput.exists() else []
    entries = [*measured_entries(results.read(measured)), *reported_entries(paper)]
    entries.sort(key=lambda entry: -entry.top1.get("in1k", -1))
    add_speeds(entries, speeds)
    return {
        "LEADERBOARD.md": leaderboard_md(entries, speeds, paper),
        "README.md": with_readme_table(readme.read_text(encoding="utf-8"), entries),
        "leaderboard.html": page(entries, speeds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.leaderboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Callable[..., object] = parser.add_argument
    add("--results", type=Path, default=HERE / "results.csv", metavar="FILE", help="of python -m eval (%(default)s)")
    add(
        "--throughput",
        type=Path,
        default=HERE / "throughput.csv",
        metavar="FILE",
        help="CSV or JSON of python -m eval.throughput (%(default)s)",
    )
    add("--paper", type=Path, default=HERE / "paper", metavar="FOLDER", help="the paper's tables (%(default)s)")
    add("--folder", type=Path, default=ROOT, help="has README.md and gets the files (%(default)s)")
    add("--check", action="store_true", help="write nothing; exit with 1 if a file is not current")
    args = parser.parse_args(argv)
    try:
        for option in ("results", "throughput"):  # a default that is not there is a project without measurements
            if not (path := getattr(args, option)).exists() and path != parser.get_default(option):
                raise ValueError(f"--{option}: no file {str(path)!r}")
        files = make(args.results, args.throughput, args.paper, args.folder / "README.md")
        for name, text in files.items():
            path = args.folder / name
            if args.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
                raise ValueError(f"{name} is not current; run python -m eval.leaderboard")
            if not args.check:
                results.write_whole(path, text)
                print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
