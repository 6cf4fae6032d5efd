"""The command that kills runs at random moments."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from recipes import kill_test
from recipes.kill_test import KillTest
from tests.recipes.training.test_checkpoint import CONFIG, TINY


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_equal_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARM_ZOO_SCAN", "torch")  # nothing to compile in each of the processes
    command = ["--config", str(CONFIG), *TINY, "checkpoint_steps=1"]
    tests = (KillTest("pretrain", command, tmp_path / str(seed), seed) for seed in range(5))
    assert any(test.run(kills=3) for test in tests)  # hits: the first is aimed at a checkpoint's writing, and may miss


def test_a_command_that_no_run_takes_is_refused_before_any_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        kill_test.main(["--output", str(tmp_path / "runs")])
    assert refused.value.code == 1 and "model is missing" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    (tmp_path / "notes").touch()
    with pytest.raises(SystemExit) as refused:
        kill_test.main(["--output", str(tmp_path), "--config", str(CONFIG), *TINY])
    told = capsys.readouterr().err or str(refused.value.code)  # a code that is a message counts as 1
    assert refused.value.code != 2 and f"--output {tmp_path} is not empty; delete it or name another folder" in told
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]


@pytest.mark.slow
def test_a_killed_run_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that load its images neither."""
    monkeypatch.setenv("ARM_ZOO_SCAN", "torch")
    test = KillTest("pretrain", ["--config", str(CONFIG), *TINY, "epochs=100", "data.workers=1"], tmp_path, seed=0)
    process = test._start(tmp_path / "run")
    while not any((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert process.is_alive()
        time.sleep(0.01)
    group = psutil.Process(process.pid).children()
    assert group and not test._kill(process, tmp_path / "run", 0, aimed=False)
    assert not psutil.wait_procs(group, timeout=10)[1]


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_process(tmp_path: Path) -> None:
    test = KillTest("pretrain", [], tmp_path, seed=0)
    process = test._context.Process(target=fail_beside_a_worker, args=(tmp_path / "worker",))
    process.start()
    with pytest.raises(RuntimeError, match="ended with 3; see the logs"):
        test._finish(process)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "worker").read_text())).wait(timeout=10)


def fail_beside_a_worker(file: Path) -> None:
    """End with 3, as a run with a process group of its own whose worker sleeps on."""
    os.setsid()
    file.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    os._exit(3)


def test_kills_are_counted_from_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kill_test.main(["--kills", "0", "--output", str(tmp_path / "runs")])
    assert "--kills is 0; allowed: a whole number, 1 or more" in capsys.readouterr().err
