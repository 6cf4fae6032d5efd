"""Every program ends after Ctrl-C with 130 and one line, whatever it was doing."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests import ROOT

CONFIG = str(ROOT / "recipes" / "configs" / "pretrain_digits.yaml")
# A program, the function that does its work, and words that start it.
PROGRAMS = [
    ("arm_zoo.__main__", "run_list", ["list"]),
    ("hub.__main__", "check", ["check"]),
    ("eval.leaderboard", "run", []),
    ("eval.scan", "run", []),
    ("recipes.probe", "probe", ["--weights", "arm_pico_patch2_8", "data.source=digits"]),
    ("recipes.loader_speed", "loader_speed", ["data.source=digits"]),
    ("recipes.digit_scenes", "write_scenes", ["FOLDER/scenes"]),
    ("recipes.quickstart", "quickstart", ["--output", "FOLDER/quickstart"]),
    ("recipes.cost", "table", ["--images-per-second", "1000"]),
    ("recipes.ablate", "ablate", ["8"]),
    ("recipes.kill_test", "KillTest", ["--config", CONFIG, "--output", "FOLDER/kills"]),
]


@pytest.mark.parametrize(("module", "work", "words"), PROGRAMS, ids=[module for module, *_ in PROGRAMS])
def test_a_program_ends_with_130_and_one_line(
    module: str,
    work: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    program = importlib.import_module(module)
    monkeypatch.setattr(program, work, interrupted)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the quickstart's
    main: Callable[[list[str]], int | None] = program.main
    try:
        code = main([word.replace("FOLDER", str(tmp_path)) for word in words])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    said = capsys.readouterr().err.splitlines()
    assert code == 130 and len(said) == 1 and ("stopped" in said[0] or "interrupted" in said[0])
