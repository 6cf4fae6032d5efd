"""How errors end a program."""

import pytest
import torch

from recipes.errors import RunError, reporting_mistakes
from recipes.parsing import ConfigError


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


def test_a_wrong_configuration_ends_a_program_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is noticed late; what goes wrong at work ends it with a message, which Python makes 1."""
    with pytest.raises(SystemExit) as ended, reporting_mistakes("python -m recipes.probe"):
        raise ConfigError({"protocols": "protocols names 'svm'"})
    said = "python -m recipes.probe: the configuration has 1 problem:\n  - protocols names 'svm'\n"
    assert ended.value.code == 2 and capsys.readouterr().err == said
    with pytest.raises(SystemExit) as ended, reporting_mistakes("python -m recipes.probe"):
        raise RunError("no image is left")
    assert ended.value.code == "python -m recipes.probe: no image is left"
