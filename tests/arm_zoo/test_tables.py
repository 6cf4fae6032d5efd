"""The reader of tables that people may edit by hand: what it takes, and how it names what it refuses."""

import csv
import re
from pathlib import Path

import pytest

from arm_zoo.tables import ABOVE_ZERO, FIGURE, csv_text, has_images, one_of, read

LIMITS = {"top1": FIGURE, "speed": ABOVE_ZERO.or_empty(), "kind": one_of("measured", "reported")}
HEAD = "n,top1,speed,kind"


def refusal(file: Path, text: str) -> str:
    """What is said of the file with this text, after its name."""
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}") as refused:
        read(file, ("n", "top1"), LIMITS, {"accuracy": "top1"})
    return str(refused.value).removeprefix(str(file))


def test_the_same_rows_are_read_from_csv_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"\ufeff\n{HEAD}\n\n,,,\n9,50.5,,measured\n")  # as spreadsheets leave it
    (tmp_path / "a.json").write_text(
        '\ufeff[{"n": 9, "accuracy": 50.5, "speed": null, "kind": "measured"},'
        ' {"kind": "measured", "n": 8, "accuracy": 1, "speed": 2}]'
    )
    of_csv = read(tmp_path / "a.csv", ("n", "top1"), LIMITS)
    of_json = read(tmp_path / "a.json", ("n", "top1"), LIMITS, {"accuracy": "top1"})
    assert of_csv == [{"n": "9", "top1": "50.5", "speed": "", "kind": "measured"}]
    assert of_json[0] == {"n": 9, "top1": 50.5, "speed": None, "kind": "measured"}
    assert of_json[1] == {"n": 8, "top1": 1, "speed": 2, "kind": "measured"}


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_an_empty_file_has_no_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\n\n")
    assert read(tmp_path / name, ("n",)) == []
    with pytest.raises(FileNotFoundError):
        read(tmp_path / f"no_{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD},n\n", " cannot be read as a table in UTF-8: it names a column twice: 'n'; mend it or name"),
        ("n,top1,accuracy\n", " cannot be read as a table in UTF-8: it names a column twice: 'top1'; mend it or name"),
        ("model\udce9\n", " cannot be read as a table in UTF-8: "),  # é in Latin-1
        ("n,speed\n", " is another table: it lacks the columns top1; mend it or name another file"),
        (f"{HEAD}\n9,1,2\n", ", line 2: it has 3 cells; allowed: 4, one for each column"),
        (f"{HEAD}\n\n9,1,2,measured,\n", ", line 3: it has 5 cells; allowed: 4, one for each column"),
        (f"{HEAD}\n9,,2,measured\n", ", line 2: top1 is empty; allowed: a number of 0 or more"),
        (f"{HEAD}\n9,1,0,measured\n", ", line 2: speed is '0'; allowed: a number above 0, or an empty cell"),
        (f"{HEAD}\n9,1,,Measured\n", ", line 2: kind is 'Measured'; allowed: measured or reported"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.csv", text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"n": 1, "n": 2}]', " cannot be read as a table in UTF-8: it names a column twice: 'n'; mend it or name"),
        ('[{"n": 1},\n {"n" 2}]', " cannot be read as a table in UTF-8: Expecting ':' delimiter: line 2 column 7"),
        ('{"n": 1}', " cannot be read as a table in UTF-8: its JSON is no list of rows, each an object; mend it"),
        ("[3]", " cannot be read as a table in UTF-8: its JSON is no list of rows, each an object; mend it"),
        ("[" * 100_000, " cannot be read as a table in UTF-8: maximum recursion depth"),
        ('[{"n": 1, "top1": 2}, {"n": 1}]', " cannot be read as a table in UTF-8: row 2 has other columns than row 1"),
        ("[{}]", ", row 1: it has 0 cells; allowed: 2, one for each column"),
        ('[{"n": 1, "top1": true}]', ", row 1: top1 is True; allowed: a number of 0 or more"),
        ('[{"n": 1, "top1": null}]', ", row 1: top1 is empty; allowed: a number of 0 or more"),
    ],
)
def test_what_is_wrong_in_a_json_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.json", text).startswith(message)


@pytest.mark.parametrize("cell", ["9" * 200_000, '"9'], ids=["long", "unclosed quotation mark"])
def test_a_cell_that_is_too_long_is_named_by_its_line(cell: str, tmp_path: Path) -> None:
    said = refusal(tmp_path / "a.csv", f"{HEAD}\n9,1,2,measured\n8,1,2,{cell}" + "\n9,1,2,measured" * 10_000)
    line, longest = re.findall(r"by line (\d+), a cell has more than ([\d,]+) characters", said)[0]
    assert int(line) == 3 or cell == '"9'
    assert longest == f"{csv.field_size_limit():,}" and "as one whose quotation mark is not closed; mend it" in said


@pytest.mark.parametrize("n", ["0", "0.0", " 0", "0 ", "00"])
def test_rows_without_images_need_no_figures(n: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{HEAD}\n{n},nan,,\n")
    [row] = read(tmp_path / "a.csv", ("n", "top1"), LIMITS)
    assert not has_images(row) and not has_images({"n": 0})
    assert has_images({"n": "9"}) and has_images({"n": ""}) and has_images({"n": None}) and has_images({})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    rows = [{"model": 'a, "b"\nc', "n": 1}, {"model": "d"}]
    (tmp_path / "a.csv").write_text(csv_text(rows, ["n", "model"]))
    assert read(tmp_path / "a.csv") == [{"n": "1", "model": 'a, "b"\nc'}, {"n": "", "model": "d"}]
