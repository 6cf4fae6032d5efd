"""The small golden set is cut from the whole one and is small."""

from pathlib import Path

from tests.golden.cut import cut


def test_the_small_set_is_cut_from_the_whole_one(golden: Path, repo: Path, tmp_path: Path) -> None:
    cut(golden, tmp_path)
    small = repo / "tests" / "golden"
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stored = {path.relative_to(small): path for path in small.glob("*/*") if path.suffix != ".pyc"}
    assert made.keys() == stored.keys()
    assert [file for file, path in stored.items() if path.read_bytes() != made[file]] == []


def test_the_small_set_is_small(repo: Path) -> None:
    files = [path for path in (repo / "tests" / "golden").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") < 4_000_000
