"""How errors end a program."""

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
