"""A function of images that is replayed as a CUDA graph."""

import pytest
import torch
from torch import Tensor, nn

from recipes.probing.replayed import Replayed


class Counted(nn.Module):
    """A model that counts the calls of its code; a replay is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.calls = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Flatten()), 0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"features": self.layers(images)}


def batches(device: str) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(size, 3, 16, 16, device=device) for size in (4, 4, 3, 4, 2, 4)]


@torch.inference_mode()
def test_a_cpu_calls_the_function_for_every_batch() -> None:
    model = Counted()
    replayed = Replayed(model)
    for images in batches("cpu"):
        assert torch.equal(replayed(images)["features"], model.layers(images))
    assert model.calls == 6


@pytest.mark.gpu
@torch.inference_mode()
def test_a_gpu_replays_batches_of_one_shape() -> None:
    model = Counted().cuda()
    replayed = Replayed(model)
    for images in batches("cuda"):
        assert torch.equal(replayed(images)["features"], model.layers(images))
    assert model.calls == 4  # the first batch, the capture, and two of other shapes


@pytest.mark.gpu
@torch.inference_mode()
def test_a_function_that_waits_for_the_gpu_is_called_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    model = Counted().cuda()

    def function(images: Tensor) -> dict[str, Tensor]:
        made = model(images)["features"]
        return {"features": made * float(made.sum() < 1e9)}

    replayed, given, stream = Replayed(function), batches("cuda"), torch.cuda.current_stream()
    torch.manual_seed(1)
    drawn = torch.randn(4, device="cuda")
    torch.manual_seed(1)
    for images in given:
        assert torch.equal(replayed(images)["features"], model.layers(images))
    assert torch.cuda.current_stream() == stream and torch.equal(torch.randn(4, device="cuda"), drawn)
    assert caplog.text.count("no CUDA graph can hold the model") == 1
