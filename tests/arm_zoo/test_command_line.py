"""How programs end."""

import sys
from collections.abc import Callable

import pytest
import torch

from arm_zoo import CheckpointError
from arm_zoo.command_line import guarded, show
from tests.helpers.output import needs_full_disk, output_without_reader


def ending_with(error: BaseException | None) -> int:
    def run() -> int:
        if error is not None:
            raise error
        return 3

    return guarded(run, "stopped; it goes on from here")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 3, ""),
        (CheckpointError("no weights in x"), 1, "error: no weights in x\n"),
        (ValueError("wrong:\n  - a\n  - b"), 1, "error: wrong: - a; - b\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "stopped; it goes on from here\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_users_cause_ends_a_program_with_a_line(
    error: BaseException | None,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ending_with(error) == code and capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")  # the first of several processes speaks for all
    assert ending_with(error) == code and capsys.readouterr().err == ""


def test_a_full_gpu_is_told_with_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU's memory is full; use --device cpu, or a smaller --batch-size")
    assert said.endswith(": CUDA out of memory. Tried to allocate 2.00 GiB.\n")


def test_errors_of_the_program_itself_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        ending_with(RuntimeError("a shape is wrong"))


@needs_full_disk
@pytest.mark.parametrize("say", [show, print])
def test_a_full_disk_under_the_output_is_told_in_a_line(
    say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is left to print at Python's end, which would fail, too, and change the exit code."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert guarded(lambda: say("all models") or 0) == 1
    where = ": 'standard output'" if say is show else ""
    assert capsys.readouterr().err == f"error: [Errno 28] No space left on device{where}\n"


def test_work_goes_on_where_nobody_reads_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    worked = []

    def run() -> int:
        for number in range(3):
            show(str(number))
            worked.append(number)
        return 3

    with output_without_reader() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert guarded(run) == 3 and worked == [0, 1, 2]
