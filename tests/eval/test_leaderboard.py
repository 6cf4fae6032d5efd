"""The leaderboard: what is measured and what reported, files that are current, and the page in headless Chromium."""

import base64
import csv
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from eval import __main__ as program
from eval import leaderboard, tables
from eval.board import chart, columns, curves, entries, frozen
from hub import catalog

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")


def browser_path() -> str | None:
    """Of the variable CHROMIUM, on PATH, or among those that Playwright fetched."""
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    fetched = sorted(cache.glob("chromium*/chrome-linux*/*")) if cache.is_dir() else []
    found = [str(path) for path in fetched if path.name in ("chrome", "headless_shell")]
    return (
        os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None) or next(iter(found), None)
    )


class Page:
    """A page in headless Chromium, driven by the DevTools protocol over two pipes, which needs no package."""

    def __init__(self, browser: str, folder: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def set_up() -> None:  # Chromium reads commands from 3 and answers on 4
            os.dup2(to_browser, 30)
            os.dup2(from_browser, 31)
            os.dup2(30, 3)
            os.dup2(31, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [browser, *flags, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=set_up,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._rest, self._session, self.events = 0, b"", None, []
        [target] = [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            self._rest += os.read(self._in, 1 << 16) or b'{"error": "the browser ended"}\0'
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(
            self._out, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._read()).get("id") != self._number:
            assert "error" not in answer, answer
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, width: int, height: int, dark: bool = False) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.events.clear()
        self.send("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, script: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    browser = browser_path()
    if browser is None:
        pytest.skip("no Chromium: install one, or name it in the environment variable CHROMIUM")
    page = Page(browser, tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def measured_row(**values: Any) -> dict[str, Any]:
    row = dict.fromkeys(tables.COLUMNS, "")
    row |= {"model": "arm_base_patch16_224", "set": "in1k", "n": 50_000, "top1": "83.1234", "top5": "96.0000"}
    row |= {"top1_low": "82.7900", "top1_high": "83.4500", "weights": "w.safetensors", "weights_sha256": "ab" * 32}
    row |= {"img_size": "224x224", "crop_pct": 0.875, "crop_mode": "squash", "interpolation": "bicubic"}
    return row | {"dtype": "fp32", "params_m": "85.0"} | values


FROZEN_SCORES = (
    ("knn", "neighbours=10, temperature=0.07", 50.0),
    ("knn", "neighbours=20, temperature=0.07", 10.0),  # older than the next one
    ("knn", "neighbours=20, temperature=0.07", 51.5),
    ("few_shot", "labels=1, draws=5", 20.0),
    ("few_shot", "labels=10, draws=5", 40.0),
    ("linear", "rate=0.1, epochs=100", 61.25),
)


def frozen_row(protocol: str, settings: str, top1: float) -> dict[str, Any]:
    row = {"model": "arm_tiny", "weights": "w.safetensors", "weights_sha256": "ef" * 32, "data_set": "pets|cats"}
    row |= {"images_train": 50_000, "images_test": 10_000, "features": "token" if protocol == "linear" else "pooled"}
    return row | {"protocol": protocol, "settings": settings, "top1": top1, "low": top1 - 1, "high": top1 + 1}


@pytest.fixture
def made(tmp_path: Path, repo: Path) -> Path:
    """A folder with a leaderboard of the paper's tables and of some measured rows."""
    rows = [
        measured_row(top1="10.0000"),  # older than the next but one
        measured_row(set="a", top1="31.5000", warnings="7499 images instead of 7500"),
        measured_row(clean200_a_top1="93.2500"),
        measured_row(set="v2", top1="72.2500"),
        measured_row(set="objectnet", top1="40.0000"),  # of which the paper has no figures
        measured_row(model="limited", limit="100"),
        measured_row(model="empty", n=0, top1="nan"),
        measured_row(model="columnless", set="v2-top-images"),
        measured_row(model="<script>alert(1)</script>", top1="50.0000", weights_sha256="cd" * 32),
    ]
    tables.append(tmp_path / "results.csv", rows)
    with (tmp_path / "throughput.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, entries.SPEED_COLUMNS)
        writer.writeheader()
        speed = {
            "mode": "infer",
            "img_size": 224,
            "batch_size": 256,
            "dtype": "bf16",
            "compile": True,
            "device": "A GPU",
        }
        writer.writerow({**speed, "model": "arm_base_patch16_224", "img_per_s": 2345.67})
        writer.writerow({**speed, "model": "arm_base_patch16_224", "mode": "finetune", "img_per_s": 500})
        writer.writerow({**speed, "model": "vit_base_patch16_224", "img_per_s": 3456.7})
    tables.append(tmp_path / "frozen.csv", map(frozen_row, *zip(*FROZEN_SCORES, strict=True)), frozen.COLUMNS)
    (tmp_path / "recipes").mkdir()
    for name in ("README.md", "recipes/RESULTS.md"):
        shutil.copy(repo / name, tmp_path / name)
    options = [
        "--frozen",
        tmp_path / "frozen.csv",
        "--results",
        tmp_path / "results.csv",
        "--throughput",
        tmp_path / "throughput.csv",
        "--folder",
        tmp_path,
    ]
    assert leaderboard.main(list(map(str, options))) == 0
    return tmp_path


def test_the_repositorys_files_are_current() -> None:
    assert leaderboard.main(["--check"]) == 0


def test_papers_tables_are_whole_and_marked(repo: Path) -> None:
    for file in (repo / "eval" / "board" / "paper").glob("*.csv"):
        rows = tables.read(file, ())
        assert {row["kind"] for row in rows} == {"reported"}
        assert {row["source"] for row in rows} == {f"arXiv:2406.07537 table {file.name[5]}"}
    by_name = {(e.model, e.img_size): e for e in entries.reported_entries(repo / "eval" / "board" / "paper")}
    assert len(by_name) == 16
    base = by_name["ARM-B", "224"]
    assert base.top1 == {"in1k": 83.2, "real": 88.0, "v2": 72.3, "a": 31.9, "r": 48.9, "sketch": 37.2}
    assert base.speeds == {entries.PAPER_SPEED: 1301}
    assert by_name["Vim-H", "224"].top1 == {}


def test_measured_speeds_join_every_row_of_the_papers_tables(repo: Path) -> None:
    """By the models of this zoo and of timm that the tables name; both tables name the same one of a model."""
    paper = repo / "eval" / "board" / "paper"
    base = [
        "regnety_160",
        "deit_base_patch16_224",
        "vim_base_patch16_224",
        "vmamba_base_s2l15",
        "arm_base_patch16_224",
    ]
    others = [f"{family}_{size}_patch16_224" for family in ("vim", "arm") for size in ("large", "huge")]
    sizes = dict.fromkeys([*base, *others, "vim_small_patch16_224"], "224")
    sizes |= {f"arm_{size}_patch16_384": "384" for size in ("base", "large", "huge")}
    sizes["arm_base_patch16_stride8_448"] = "448"
    way = {"mode": "infer", "dtype": "bf16", "compile": "True", "device": "A GPU", "img_per_s": "100"}
    reported = entries.reported_entries(paper)
    entries.add_speeds(reported, [{**way, "model": model, "img_size": size} for model, size in sizes.items()])
    assert [e.model for e in reported if "A GPU, bf16, compiled, measured" not in e.speeds] == []
    named = {e.model: e.architecture for e in reported if e.img_size == "224"}
    assert {
        row["model"]: row["entry"] for row in entries.paper_table(paper, "table3_robustness")
    }.items() <= named.items()


def test_peers_are_reported_with_their_sources(repo: Path) -> None:
    peers = repo / "eval" / "board" / "peers.csv"
    assert {row["kind"] for row in tables.read(peers, entries.PEER_COLUMNS)} == {"reported"}
    rows = {entry.model: entry for entry in entries.peer_entries(peers)}
    assert len(rows) == len(tables.read(peers, ())) == 17
    for entry in rows.values():
        assert entry.peer and re.match(r"arXiv:\d{4}\.\d{5}", entry.source) and entry.top1["in1k"] > 80
    assert rows["MAE ViT-B"].top1 == {"in1k": 83.6, "a": 35.9, "r": 48.3, "sketch": 34.5}
    assert rows["NEPA ViT-L"].params_m is None


def test_frozen_features_are_measured_or_reported(made: Path, repo: Path) -> None:
    measured, _, reported = (made / "LEADERBOARD.md").read_text().partition("### Reported by their authors")
    assert "| model | figures | data set | k-NN | 1 label | 10 labels | linear | notes |" in measured
    figures = "51.50 (50.50 to 52.50) | 20.00 (19.00 to 21.00) | 40.00 (39.00 to 41.00) | 61.25 (60.25 to 62.25)"
    notes = "sha256 efefefef; 50,000 images to train on, 10,000 scored; linear on token"
    assert f"| arm_tiny (w) | **measured** | pets\\|cats | {figures} | {notes} |" in measured
    assert figures in (made / "recipes" / "RESULTS.md").read_text()
    row = frozen_row("knn", "neighbours=20", 50)
    assert frozen.name_of(row | {"weights": "arm_tiny.arm_pets.safetensors"}) == "arm_tiny.arm_pets"
    assert frozen.name_of(row | {"weights": "arm_tiny_scratch"}) == "arm_tiny (arm_tiny_scratch)"
    assert "MoCo" not in measured and "arm_tiny" not in reported.partition("## Speed")[0]
    assert "| DINOv3 ViT-L | *reported* | ImageNet-1k | 82.0 | 83.5 | arXiv:2508.10104; " in reported
    anchors = frozen.reported_entries(repo / "eval" / "board" / "anchors.csv")
    assert all(entry.kind == "reported" and re.match(r"arXiv:\d{4}\.\d{5}", entry.notes[0]) for entry in anchors)
    linear = {entry.model: entry.figures["linear"] for entry in anchors}
    mae, moco = {"B": "67.8", "L": "76.0", "H": "77.2"}, {"S": "73.2", "B": "76.7"}
    expected = {f"MAE ViT-{size}": top1 for size, top1 in mae.items()}
    expected |= {f"MoCo v3 ViT-{size}": top1 for size, top1 in moco.items()}
    assert linear == {**expected, "DINOv3 ViT-L": "83.5"}


def test_the_chart_of_frozen_features_has_a_dot_for_each_figure(made: Path) -> None:
    drawn = ElementTree.parse(made / "eval" / "frozen.svg").getroot()
    dots = [node for node in drawn.findall(".//{*}circle")]
    texts = [node.text for node in drawn.findall(".//{*}text")]
    assert len(dots) == 1 + 4 and "arm_tiny (w)" in texts and "10 labels" in texts  # one in the legend
    few, most = (float(node.get("cy", "")) for node in (dots[2], dots[4]))
    assert most < few  # the linear probe's is higher than that of one label
    [interval] = [node for node in drawn.findall(".//{*}line") if node.get("x1") == dots[1].get("cx")]
    assert float(interval.get("y1", "")) > float(dots[1].get("cy", "")) > float(interval.get("y2", ""))
    assert chart.frozen_chart([])["panels"] == []


def test_reported_frozen_features_can_be_hidden(page: Page, made: Path) -> None:
    page.open(made / "leaderboard.html", 1280, 900)
    shown = "[...document.querySelectorAll('#frozen tbody tr')].filter((row) => !row.hidden).length"
    hide = "const s = document.getElementById('anchors'); s.value = '{}'; s.dispatchEvent(new Event('input'));"
    counts = [page.run(shown)]
    for value in ("hidden", "shown"):
        page.run(f"(() => {{ {hide.format(value)} }})()")
        counts.append(page.run(shown))
    assert counts == [7, 1, 7]
    head = "[...document.querySelectorAll('#frozen thead button')].find((button) => button.textContent === 'linear')"
    page.run(f"{head}.click()")
    assert column(page, 0, "frozen")[:2] == ["DINOv3 ViT-L", "MAE ViT-H"]
    assert column(page, 0, "frozen")[-1] == "arm_tiny (w)"


def test_tables_given_beside_the_checkout_are_the_same(repo: Path) -> None:
    folder = repo.parent / "shared" / "spec" / "tables"
    if not folder.is_dir():
        pytest.skip("no tables to compare with: ../shared/spec/tables is not there")
    files = list(folder.glob("*.csv"))
    assert len(files) == len(list((repo / "eval" / "board" / "paper").glob("*.csv")))
    for file in files:
        theirs, ours = tables.read(file, ()), tables.read(repo / "eval" / "board" / "paper" / file.name, ())
        for row, own in zip(theirs, ours, strict=True):
            assert {key: own[key] for key in row if key != "note"} == {k: v for k, v in row.items() if k != "note"}


def test_measured_rows_stand_apart(made: Path) -> None:
    text = (made / "LEADERBOARD.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| arm_base_patch16_224 | **measured**")]
    [line] = lines
    assert "| 83.12 | - | 72.25 | 31.50 | - | - | 40.00 | 93.25 |" in line
    assert "a: 7499 images instead of 7500" in line
    assert all(word not in text for word in ("10.00", "limited", "empty", "columnless"))
    assert "w.safetensors (abababab), crop 0.875 squash, bicubic, fp32" in line
    assert "| ARM-B | *reported* | 224 | 85 | 83.2 | 88.0 |" in text
    assert "Measured by this project: 2 models." in text
    assert "| vit_base_patch16_224 | infer | 224 | 256 | bf16 | yes | - | 3,456.7 | - | A GPU |" in text
    of_the_paper, of_peers = text.split("## Peers, reported by their authors")
    assert "MAE ViT-B" not in of_the_paper
    assert re.search(
        r"\| MAE ViT-B \| \*reported\* \| 224 \| 86 \| 83\.6 \| 35\.9 .* arXiv:2111\.06377; README", of_peers
    )
    readme = (made / "README.md").read_text()
    assert "83.12" not in readme  # of a set that is not canonical
    assert "| **measured** | 224 | 50.00 |" in readme
    assert "MAE" not in readme.split("leaderboard:begin")[1].split("leaderboard:end")[0]
    assert "| `arm_base_patch16_224.arm_in1k_ft_in1k` | *reported by the paper* | 224 | 83.2 |" in readme


def test_without_measurements_it_says_so(tmp_path: Path, repo: Path) -> None:
    board = repo / "eval" / "board"
    files = leaderboard.make(
        tmp_path / "no.csv", tmp_path / "none.csv", board / "paper", board / "peers.csv", tmp_path / "gone.csv",
        board / "anchors.csv", repo,
    )  # fmt: skip
    assert "circle" not in files.pop("eval/speed.svg")
    assert "eval/frozen.svg" not in files
    assert "Nothing has been measured yet" in files.pop("recipes/RESULTS.md")
    for text in files.values():
        assert "No ImageNet accuracy has been measured by this project yet" in text
        assert "ObjectNet" not in text  # sets that no row has a figure of have no column
    assert "No speed has been measured yet" in files["LEADERBOARD.md"]
    assert "Nothing has been measured yet; `python -m recipes.probe" in files["LEADERBOARD.md"]
    assert '<tr class="measured">' not in files["leaderboard.html"]


def test_columns_of_text_are_added_to_both_tables(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(entries: Any) -> list[dict[str, str]]:
        return [
            {"model": row.pop("model"), "family": f"<{row['size']}>", **row} for row in columns.accuracy_rows(entries)
        ]

    monkeypatch.setattr(leaderboard, "accuracy_rows", rows)
    monkeypatch.setattr(leaderboard, "TEXT_COLUMNS", (*columns.TEXT_COLUMNS, "family"))
    options = {"results": "results.csv", "throughput": "throughput.csv", "folder": ""}
    assert leaderboard.main([word for name, file in options.items() for word in (f"--{name}", str(made / file))]) == 0
    assert "| model | family | figures | size |" in (made / "LEADERBOARD.md").read_text()
    page = (made / "leaderboard.html").read_text()
    table = page[page.index('<table id="board"') : page.index("</table>")]
    head, *lines = (re.findall(r"<t[hd](.*?)>(.*?)</t[hd]>", row, re.DOTALL) for row in table.split("<tr")[1:])
    assert "family" in head[1][1] and len(lines) > 10
    assert {len(line) for line in lines} == {len(head)}
    for line in lines:
        size = line[3][1]
        assert line[1] == (f' data-value="&lt;{size}&gt;"', f"&lt;{size}&gt;")
        assert all(("figure" in cell[0]) == ("figure" in title[0]) for cell, title in zip(line, head, strict=True))


def test_page_loads_nothing_and_escapes(made: Path) -> None:
    text = (made / "leaderboard.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not re.search(r"""(src|href)=["'](?!https://arxiv)|@import|url\(|fetch\(|import\(""", text)


def test_scoring_writes_what_the_leaderboard_and_the_cards_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(leaderboard, "make", lambda results, *others: read.append(results) or {})
    assert leaderboard.main([]) == 0
    assert read == [program.make_parser().get_default("output")] == [catalog.RESULTS]


def test_refusals(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*words: str) -> str:
        assert leaderboard.main(["--folder", str(made), *words]) == 1
        return capsys.readouterr().err

    assert "--results: no file 'gone.csv'" in refusal("--results", "gone.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "torn.csv").write_text("a,b\n1\n")
    for option in ("--results", "--throughput", "--frozen"):
        assert "other.csv is another table: it lacks the columns model, " in refusal(
            option, str(tmp_path / "other.csv")
        )
        assert "torn.csv is another table: it lacks the columns model, " in refusal(option, str(tmp_path / "torn.csv"))
    assert "no_such" in refusal("--paper", str(tmp_path / "no_such"))
    assert "no_such" in refusal("--peers", str(tmp_path / "no_such"))
    assert "other.csv is another table" in refusal("--peers", str(tmp_path / "other.csv"))
    assert "other.csv is another table" in refusal("--anchors", str(tmp_path / "other.csv"))
    assert "--frozen: no file 'gone.csv'" in refusal("--frozen", "gone.csv")
    (tmp_path / "none.csv").write_text("")  # nothing reported is a table without rows
    assert leaderboard.main(["--folder", str(made), "--anchors", str(tmp_path / "none.csv")]) == 0
    assert "LEADERBOARD.md is not current; run python -m eval.leaderboard" in refusal("--check")
    (made / "README.md").write_text("# no markers\n")
    assert "README.md needs the lines <!-- leaderboard:begin -->" in refusal()


ZERO_OR_MORE = "a number of 0 or more"
COUNT = "a whole number of 1 or more"
KINDS = "measured or reported"
# For each option, a row of its table and what the columns with numbers allow.
NUMBERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "--results": (
        measured_row(),
        {"top1": ZERO_OR_MORE, "params_m": ZERO_OR_MORE, "clean200_a_top1": f"{ZERO_OR_MORE}, or an empty cell"},
    ),
    "--frozen": (
        {column: "" for column in frozen.COLUMNS} | frozen_row("knn", "neighbours=20", 50.0),
        dict.fromkeys(("images_train", "images_test"), COUNT) | dict.fromkeys(("top1", "low", "high"), ZERO_OR_MORE),
    ),
    "--throughput": (
        dict.fromkeys(entries.SPEED_COLUMNS, "x")
        | {"img_size": 224, "batch_size": 8, "img_per_s": 9.5, "peak_mib": 7},
        dict.fromkeys(("img_size", "batch_size"), COUNT)
        | {"img_per_s": "a number above 0", "peak_mib": f"{ZERO_OR_MORE}, or an empty cell"},
    ),
    "--peers": (
        dict.fromkeys(entries.PEER_COLUMNS, "x") | {"params_m": 86, "in1k": 83, "kind": "reported"},
        dict.fromkeys(("params_m", "in1k"), f"{ZERO_OR_MORE}, or an empty cell") | {"kind": KINDS},
    ),
    "--anchors": (
        dict.fromkeys(frozen.ANCHOR_COLUMNS, "x") | {"knn": 82, "linear": 83, "logistic": 84, "kind": "reported"},
        dict.fromkeys(("knn", "linear", "logistic"), f"{ZERO_OR_MORE}, or an empty cell") | {"kind": KINDS},
    ),
}


@pytest.mark.parametrize(
    "option, column", [(option, column) for option, (_, all_) in NUMBERS.items() for column in all_]
)
def test_a_wrong_cell_is_named_by_its_file_line_and_column(
    option: str, column: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty line, and a row of empty cells as spreadsheets leave them, count as lines of the file only."""
    row, limits = NUMBERS[option]
    file = made / "edited.csv"

    def said(cell: str) -> str:
        rows = [row, row | {column: cell}]
        lines = [",".join(f'"{value}"' for value in each.values()) for each in rows]
        file.write_text("\n".join([",".join(row), "", lines[0], "," * (len(row) - 1), lines[1], ""]))
        leaderboard.main(["--folder", str(made), option, str(file)])
        return capsys.readouterr().err

    assert said(str(row[column] or 1)) == ""
    for cell in ("fast", "nan", "inf", "-1", *(("0.5",) if limits[column] == COUNT else ())):
        assert said(cell) == f"error: {file}, line 5: {column} is {cell!r}; allowed: {limits[column]}\n"
    is_needed = "empty" not in limits[column]
    assert said("") == (f"error: {file}, line 5: {column} is empty; allowed: {limits[column]}\n" if is_needed else "")


def test_a_row_with_a_cell_too_few_is_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = made / "frozen.csv"
    lines = file.read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0]
    file.write_text("\n".join(lines))
    assert leaderboard.main(["--folder", str(made), "--frozen", str(file)]) == 1
    number = len(frozen.COLUMNS)
    said = f"line 4: it has {number - 1} cells; allowed: {number}, one for each column"
    assert f"{file}, {said}" in capsys.readouterr().err


def test_a_wrong_value_in_a_json_file_is_named_by_its_row(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, _ = NUMBERS["--throughput"]
    (made / "speed.json").write_text(json.dumps([row, row | {"img_per_s": None}]))
    assert leaderboard.main(["--folder", str(made), "--throughput", str(made / "speed.json")]) == 1
    assert "speed.json, row 2: img_per_s is empty; allowed: a number above 0" in capsys.readouterr().err


def test_the_papers_tables_are_checked_alike(repo: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(repo / "eval" / "board" / "paper", made / "paper")
    file = made / "paper" / "table2_imagenet.csv"
    whole = file.read_text()
    for edited, message in (
        (whole.replace(",84,870,", ",,870,"), "line 2: params_m is empty; allowed: a number of 0 or more"),
        (whole.replace(",84,870,", ",84,fast,"), "line 2: throughput_a5000_img_s is 'fast'; allowed: a number of 0"),
        (whole.replace(",reported,", ",guessed,", 1), "line 2: kind is 'guessed'; allowed: measured or reported"),
        (whole.replace("params_m", "size"), "is another table: it lacks the columns params_m"),
    ):
        file.write_text(edited)
        assert leaderboard.main(["--folder", str(made), "--paper", str(made / "paper")]) == 1
        assert message in capsys.readouterr().err


def column(page: Page, index: int, table: str = "board") -> list[str]:
    """Texts of a column, of the rows that are shown."""
    rows = f"[...document.querySelectorAll('#{table} tbody tr')].filter((row) => !row.hidden)"
    return page.run(f"{rows}.map((row) => row.cells[{index}].firstChild.textContent)")


def click(page: Page, title: str) -> None:
    page.run(f"[...document.querySelectorAll('#board thead button')].find((b) => b.textContent === '{title}').click()")


def sorted_by(page: Page) -> dict[str, str]:
    heads = "[...document.querySelectorAll('#board thead th[aria-sort]')]"
    return dict(page.run(f"{heads}.map((th) => [th.textContent, th.ariaSort])"))


def test_sorting_by_mouse_and_keyboard(page: Page, made: Path) -> None:
    page.open(made / "leaderboard.html", 1280, 900)
    assert sorted_by(page) == {"IN-1k": "descending"}
    click(page, "IN-A")
    figures = column(page, 7)
    numbers = [float(text) for text in figures if text != "-"]
    assert numbers == sorted(numbers, reverse=True) and 31.5 in numbers
    assert figures[len(numbers) :] == ["-"] * (len(figures) - len(numbers))  # missing ones last
    click(page, "IN-A")
    numbers = [float(text) for text in column(page, 7) if text != "-"]
    assert numbers == sorted(numbers) and len(numbers) == 10
    assert column(page, 7)[-1] == "-"
    assert sorted_by(page) == {"IN-A": "ascending"}
    page.run("document.querySelector('#board thead button').focus()")
    page.press("Tab")  # from 'model' to 'figures'
    page.press("Enter", "\r")
    assert sorted_by(page) == {"figures": "ascending"}
    kinds = column(page, 1)
    assert kinds == sorted(kinds) and kinds[0] == "measured"


def test_filters_and_charts_follow(page: Page, made: Path) -> None:
    page.open(made / "leaderboard.html", 1280, 900)
    total = len(column(page, 0))
    assert page.run("document.getElementById('count').textContent") == f"{total} of {total} rows"

    def choose(name: str, value: str) -> None:
        element = f"document.getElementById('{name}')"
        page.run(f"{element}.value = '{value}'; {element}.dispatchEvent(new Event('input'))")

    choose("kind", "measured")
    assert set(column(page, 1)) == {"measured"} and len(column(page, 0)) == 2
    assert page.run("document.querySelectorAll('#bars .reported').length") == 0
    choose("kind", "")
    choose("peers", "hidden")
    assert len(column(page, 0)) == total - 17 and "MAE ViT-B" not in column(page, 0)
    assert "MAE ViT-B 224" not in page.run("document.getElementById('bars').textContent")
    choose("peers", "shown")
    choose("search", "arm-b")
    assert column(page, 0) == ["ARM-B", "ARM-B", "ARM-B"]
    choose("size", "384")
    assert len(column(page, 0)) == 1
    choose("size", "")
    choose("search", "")
    choose("speed", "A GPU, bf16, compiled, measured")
    labels = page.run("[...document.querySelectorAll('#chart g')].map((g) => g.getAttribute('aria-label'))")
    assert "arm_base_patch16_224 224: 83.1234 %, 2,345.67 images per second, accuracy measured" in labels
    assert "ARM-B 224: 83.2 %, 2,345.67 images per second, accuracy reported" in labels
    choose("speed", "NVIDIA A5000, reported by the paper")
    assert page.run("document.querySelectorAll('#chart g').length") == 14
    titles = page.run("[...document.querySelectorAll('#bars h3')].map((head) => head.textContent)")
    assert titles == ["ReaL", "V2", "IN-A", "IN-R", "Sketch", "ObjectNet"]


@pytest.mark.parametrize(
    "row, words, shown",
    [
        ({"compile": "False"}, "no", "A GPU, bf16, measured"),
        ({"compile": "True"}, "yes", "A GPU, bf16, compiled, measured"),
        ({"compile": "True", "cuda_graphs": "False"}, "yes", "A GPU, bf16, compiled, measured"),
        (
            {"compile": "True", "cuda_graphs": "True"},
            "yes, CUDA graphs",
            "A GPU, bf16, compiled, CUDA graphs, measured",
        ),
    ],
)
def test_how_a_model_was_compiled_is_told(row: dict[str, str], words: str, shown: str) -> None:
    row = {"device": "A GPU", "dtype": "bf16", **row}
    assert entries.compilation(row) == words
    assert entries.circumstances(row) == shown


def test_figures_are_right_aligned_under_their_heads(page: Page, made: Path) -> None:
    page.open(made / "leaderboard.html", 1280, 900)
    for table in ("board", "speeds"):
        cells = f"[...document.querySelectorAll('#{table} tr')].map((row) => [...row.cells]"
        sides = page.run(f"{cells}.map((cell) => getComputedStyle(cell).textAlign))")
        assert all(side == sides[0] for side in sides)
        _, *texts = page.run(f"{cells}.map((cell) => cell.textContent))")
        for side, column_texts in zip(sides[0], zip(*texts, strict=True), strict=True):
            known = [text for text in column_texts if text != "-"]
            if known:
                assert (side == "right") == all(re.fullmatch(r"[\d.,]+", text) for text in known), known


@pytest.mark.parametrize("width, height, dark", [(1280, 900, False), (390, 844, False), (1280, 900, True)])
def test_no_network_no_errors_no_overflow(width: int, height: int, dark: bool, page: Page, made: Path) -> None:
    page.open(made / "leaderboard.html", width, height, dark)
    requested = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert requested == [(made / "leaderboard.html").as_uri()]
    problems = [e for e in page.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert problems == []
    assert page.run("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
    channels = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(channels) < 60) == dark
    # measured and reported look different: in shape, not by colour alone
    styles = "getComputedStyle(document.querySelector('#board tr.{} .badge')).borderStyle"
    assert page.run(styles.format("measured")) == "solid"
    assert page.run(styles.format("reported")) == "dashed"
    file = made / "page.png"
    page.screenshot(file)
    assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size > 20_000


def test_speeds_of_several_backends_count_once() -> None:
    """The newest of each, and of these the fastest."""
    entry = entries.Entry("a", "measured", "224", None, "", architecture="a")
    way = {"model": "a", "mode": "infer", "img_size": "224", "dtype": "bf16", "compile": "False", "device": "A GPU"}
    speeds = [("cuda", "900"), ("cuda", "700"), ("triton", "600")]
    entries.add_speeds([entry], [{**way, "scan_backend": name, "img_per_s": speed} for name, speed in speeds])
    assert entry.speeds == {"A GPU, bf16, measured": 700.0}


def test_speeds_are_of_the_same_model_size_and_mode() -> None:
    entry = entries.Entry("a", "measured", "224", None, "", architecture="arm_base_patch16_224.arm_in1k")
    way = {"img_size": "224", "dtype": "bf16", "compile": "False", "device": "A GPU", "scan_backend": "cuda"}
    rows = [
        {**way, "model": "arm_base_patch16_224.other_weights", "mode": "infer", "img_per_s": "700"},
        {**way, "model": "arm_base_patch16_384", "mode": "infer", "img_per_s": "300"},
        {**way, "model": "arm_base_patch16_224", "mode": "infer", "img_per_s": "200", "img_size": "384"},
        {**way, "model": "arm_base_patch16_224", "mode": "finetune", "img_per_s": "100"},
    ]
    entries.add_speeds([entry], rows)
    assert entry.speeds == {"A GPU, bf16, measured": 700.0}


def test_peak_memory_is_shown_where_it_was_taken() -> None:
    assert columns.SPEEDS["peak MiB"]({"peak_mib": "2048.4"}) == "2,048"
    assert columns.SPEEDS["peak MiB"]({"peak_mib": ""}) == columns.SPEEDS["peak MiB"]({}) == "-"


def speeds_of(model: str, *figures: tuple[int, int, float, str], **others: str) -> list[dict[str, str]]:
    """Rows of image size, batch size, images per second and MiB at the peak."""
    way = {
        "model": model,
        "mode": "infer",
        "dtype": "bf16",
        "compile": "True",
        "device": "A GPU",
        "date": "2026-11-29T",
    }
    names = ("img_size", "batch_size", "img_per_s", "peak_mib")
    return [way | dict(zip(names, map(str, row), strict=True)) | others for row in figures]


def test_curves_are_of_what_was_timed_at_several_places() -> None:
    rows = [
        *speeds_of("arm", (224, 8, 500, "80"), (448, 2, 100, ""), (224, 2, 200, "40"), scan_backend="cuda"),
        *speeds_of("arm", (224, 8, 1000, "96"), scan_backend="cuda"),  # newer
        *speeds_of("vit", (224, 8, 2000, "64"), (448, 2, 125, "")),
        *speeds_of("once", (224, 8, 1, "1")),
        *speeds_of("arm", (224, 8, 1, "1"), mode="finetune"),
    ]
    by_size, by_batch = sorted(curves.curves(rows), key=lambda panel: -len(panel["lines"]))
    assert by_size["way"] == by_batch["way"] == "infer, A GPU, bf16, compiled, measured"
    assert (by_size["axis"], by_batch["axis"]) == ("image size in pixels", "batch size at 224 pixels")
    assert {line["name"]: [(p["at"], p["ms"]) for p in line["points"]] for line in by_size["lines"]} == {
        "arm (cuda)": [(224, 1), (448, 10)],
        "vit": [(224, 0.5), (448, 8)],
    }
    [line] = by_batch["lines"]
    assert [(p["at"], p["ms"], p["mib"]) for p in line["points"]] == [(2, 5, 20), (8, 1, 12)]
    what = "224 pixels, batch 8: 1.000 ms per image, 1,000.0 images per second, 12.0 MiB per image"
    assert (line["points"][1]["text"], line["points"][1]["date"]) == (what, "2026-11-29")
    assert curves.curves([]) == curves.curves(speeds_of("once", (224, 8, 1, "1"))) == []


def test_curves_are_drawn_of_the_chosen_way(page: Page, made: Path) -> None:
    rows = [
        *speeds_of("arm", (224, 1, 100, "10"), (224, 2, 150, "15"), (448, 1, 30, "30")),
        *speeds_of("vit", (224, 1, 100, ""), (224, 2, 150, "")),
        *speeds_of("vit", (224, 1, 50, ""), (224, 2, 60, ""), mode="finetune"),
    ]
    tables.append(made / "curves.csv", rows, tuple(rows[0]))
    assert leaderboard.main(["--folder", str(made), "--throughput", str(made / "curves.csv")]) == 0
    assert "draws time and memory against image size and batch size" in (made / "LEADERBOARD.md").read_text()
    page.open(made / "leaderboard.html", 390, 844)

    def drawn() -> dict[str, list[int]]:
        """Title of each panel -> number of marks of each of its lines."""
        lines = "[...panel.querySelectorAll('.model')].map((line) => line.querySelectorAll('path').length)"
        of_panel = f"[panel.querySelector('h3').textContent, {lines}]"
        return dict(page.run(f"[...document.querySelectorAll('#curves section')].map((panel) => {of_panel})"))

    time, memory, sizes, batches = *("Milliseconds", "Peak MiB"), "image size in pixels", "batch size at 224 pixels"
    assert drawn() == {
        f"{time} per image by {sizes}": [2],
        f"{memory} per image by {sizes}": [2],
        f"{time} per image by {batches}": [2, 2],
        f"{memory} per image by {batches}": [2],
    }
    assert page.run("document.getElementById('curves').textContent").count("measured 2026-11-29") == 4
    [label] = page.run("[...document.querySelectorAll('#curves section:first-child .model')].map((g) => g.ariaLabel)")
    assert label.startswith("arm: 224 pixels, batch 2: 6.667 ms per image, 150.0 images per second")
    heights = (
        "[...document.querySelectorAll('#curves section:first-child path')].map((p) => p.getBoundingClientRect().y)"
    )
    small, large = page.run(heights)
    assert small > large  # a larger image takes more time
    way = "document.getElementById('way')"
    page.run(f"{way}.value = 'finetune, A GPU, bf16, compiled, measured'; {way}.dispatchEvent(new Event('input'))")
    assert drawn() == {f"{time} per image by {batches}": [2]}
    assert page.run("document.getElementById('legend').textContent") == "vit"
    assert page.run("document.documentElement.scrollWidth") <= 390


def test_without_several_sizes_or_batches_there_are_no_curves(made: Path) -> None:
    for name in ("leaderboard.html", "LEADERBOARD.md"):
        assert "memory against image size" not in (made / name).read_text()


def test_the_chart_compares_what_was_timed_together() -> None:
    def row(model: str, size: int, speed: float, device: str = "B", **others: str) -> dict[str, str]:
        facts = {"model": model, "img_size": str(size), "img_per_s": str(speed), "device": device}
        return {**facts, "mode": "infer", "compile": "True", "batch_size": "8", **others}

    rows = [
        row(chart.MODEL, 224, 1, "A"),
        row(chart.PEER, 224, 1, "A"),
        *(row(chart.MODEL, size, speed) for size, speed in ((512, 30.0), (128, 50.0), (256, 70.0))),
        *(row(chart.PEER, size, speed) for size, speed in ((512, 20.0), (128, 100.0))),
        row(chart.PEER, 256, 1.0, mode="finetune"),
        row(chart.PEER, 256, 1.0, compile="False"),
        row(chart.MODEL, 512, 1.0, date="later"),
        *(row(model, 512, 1.0, date="later", batch_size="1") for model in (chart.MODEL, chart.PEER)),
    ]
    drawn = chart.speed_chart(rows)
    assert drawn["device"] == "B"
    assert [(point["size"], point["ratio"]) for point in drawn["points"]] == [(128, 0.5), (512, 1.5)]
    first, last = drawn["points"]
    assert first["x"] < last["x"] and drawn["bottom"] > first["y"] > drawn["one"] > last["y"]
    assert chart.speed_chart([])["points"] == []
