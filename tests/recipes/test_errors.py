"""How errors end a program."""

import importlib
from pathlib import Path

import pytest
import torch

from recipes.errors import reporting_mistakes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it."),
        RuntimeError("CUDA error: out of memory\nSearch for it."),  # before there is room for a first tensor
    ],
)
def test_a_full_gpu_ends_a_program_with_what_to_type(error: RuntimeError) -> None:
    with pytest.raises(SystemExit) as ended, reporting_mistakes("python -m recipes.pretrain"):
        raise error
    said = str(ended.value)
    assert said.startswith("python -m recipes.pretrain: the GPU's memory is full; type a smaller max_batch_per_device")
    assert said.endswith(f"({str(error).splitlines()[0]})")


def test_errors_of_the_program_itself_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a shape is wrong"), reporting_mistakes("python -m recipes.pretrain"):
        raise RuntimeError("a shape is wrong")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("finetune", ["data.source=FOLDER"]),  # the settings
        ("probe", ["--weights", "arm_pico_patch2_8", "data.source=FOLDER"]),  # the images
        ("probe", ["--weights", "FOLDER", "data.source=digits"]),  # the weights
        ("probe", ["--weights", "arm_pico_patch2_8", "data.source=digits", "protocols=svm"]),
        ("cost", ["--run", "FOLDER"]),
        ("kill_test", ["--output", "FOLDER"]),
    ],
)
def test_all_mistakes_end_a_program_with_1(module: str, words: list[str], tmp_path: Path) -> None:
    """Whenever they are noticed; Python makes 1 of a message, which it prints."""
    program = importlib.import_module(f"recipes.{module}")
    with pytest.raises(SystemExit) as ended:
        program.main([word.replace("FOLDER", str(tmp_path / "missing")) for word in words])
    assert ended.value.code == 1 or str(ended.value.code).startswith(f"python -m recipes.{module}: ")
