"""Two processes never write to one folder, and a killed one leaves nothing that would hold up the next."""

import subprocess
import sys
from pathlib import Path

import pytest

from recipes import ablate, finetune
from recipes.ablations.runs import Scheduler
from tests import ROOT

HOLD = "import sys; from pathlib import Path; from recipes.training.alone import alone_in\n"
HOLD += "with alone_in(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("program", ["finetune", pytest.param("ablate", marks=pytest.mark.slow)])
def test_a_folder_that_another_process_writes_to_is_refused(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Scheduler, "carry_out", lambda scheduler, left: None)
    monkeypatch.setattr(finetune, "run", lambda config, resume, stop: None)
    monkeypatch.setattr("recipes.command_line.leave_process_group", lambda: None)
    command = {
        "finetune": lambda: finetune.main(
            ["--config", "recipes/configs/finetune_digits.yaml", "pretrained=null", f"output_dir={tmp_path}"]
        ),
        "ablate": lambda: ablate.main(["5", "--preset", "digits", "--row", "random", "--output", str(tmp_path)]),
    }[program]
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(SystemExit, match=f"another process is at work in {tmp_path} .*name another output folder"):
            command()
        other.kill()
        other.wait()
    command()
