"""The small golden set is cut from the whole one and is small."""

from pathlib import Path

from tests.golden.cut import CASES, cut


def test_the_small_set_is_cut_from_the_whole_one(golden: Path, repo: Path, tmp_path: Path) -> None:
    cut(golden, tmp_path)
    for case in CASES:
        stored = {path.name: path.read_bytes() for path in (repo / "tests" / "golden" / case).iterdir()}
        made = {path.name: path.read_bytes() for path in (tmp_path / case).iterdir()}
        assert made.keys() == stored.keys()
        assert [name for name in made if made[name] != stored[name]] == []


def test_the_small_set_is_small(repo: Path) -> None:
    paths = [path for path in (repo / "tests" / "golden").rglob("*") if path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in paths) < 4_000_000
