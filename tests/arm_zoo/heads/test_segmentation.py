"""Heads on maps of plain and of pyramidal backbones, and windows that slide over an image."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import arm_zoo
from arm_zoo.heads.models import Segmenter, map_places, save_segmenter
from arm_zoo.heads.segmentation import FPNHead, segment, starts

OURS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "d_state": 2}
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


@pytest.mark.parametrize("head", ["linear", "fpn"])
@pytest.mark.parametrize(
    ("name", "arguments", "side"),
    [("arm_pico_patch2_8", OURS, 16), ("test_vit", {"img_size": 32}, 32), ("test_resnet", {}, 64)],
)
def test_logits_of_every_pixel(name: str, arguments: dict[str, Any], side: int, head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Segmenter(name, arguments, head, 5, frozen=True)
    images = torch.randn(2, 3, side, side)
    logits = model.train()(images)
    assert logits.shape == (2, 5, side, side)
    logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"head.{name}" for name, _ in model.head.named_parameters()}
    assert not model.backbone.training and model.head.training
    save_segmenter(tmp_path, model, head, {"input_size": (3, side, side)}, list("abcde"))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(images), model.eval()(images))
        assert torch.equal(arm_zoo.from_pretrained(tmp_path).eval()(images), loaded(images))


def test_a_plain_backbone_gives_a_pyramid() -> None:
    head = FPNHead([8, 8, 8, 8], [16, 16, 16, 16], 2)
    maps = [torch.randn(1, 8, 3, 5) for _ in range(4)]
    sizes = [tuple(rescale(x).shape[2:]) for rescale, x in zip(head.rescale, maps, strict=True)]
    assert sizes == [(12, 20), (6, 10), (3, 5), (2, 3)]
    assert head(maps).shape == (1, 2, 12, 20)
    levels = FPNHead([4, 8], [4, 8], 2)([torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)])
    assert levels.shape == (1, 2, 8, 8)


def test_which_maps_are_taken() -> None:
    assert map_places([{"reduction": 16}] * 12) == [2, 5, 8, 11]
    assert map_places([{"reduction": 16}] * 2) == [0, 1]
    assert map_places([{"reduction": 2**level} for level in range(1, 6)]) == [1, 2, 3, 4]


def test_a_model_without_maps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.VisionTransformer, "forward_intermediates")
    with pytest.raises(ValueError, match="test_vit gives no feature maps"):
        Segmenter("test_vit")


def test_an_unknown_head_is_told() -> None:
    with pytest.raises(ValueError, match="unknown head 'unet'; choose one of linear, fpn"):
        timm.create_model("segmenter", head="unet")


class Ramp(nn.Module):
    """Logits that depend on the place in the window and on the pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place


def test_windows_are_averaged() -> None:
    assert starts(6, 6) == [0] and starts(10, 6) == [0, 4] and starts(16, 6) == [0, 4, 8, 10]
    image = torch.randint(256, (3, 6, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = Ramp()
    normed = (image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    expected = torch.zeros(6, 13, dtype=torch.long)
    for column in range(13):
        of_windows = [
            normed[:, :, column] + model.place.data[:, :, column - left]
            for left in (0, 4, 7)
            if left <= column < left + 6
        ]
        expected[:, column] = torch.stack(of_windows).mean(dim=0).argmax(dim=0)
    assert torch.equal(segment(model, image, (6, 6), MEAN, STD), expected)


def test_images_of_any_size_are_segmented() -> None:
    for size in ((3, 5), (6, 6), (20, 13)):
        assert segment(Ramp(), torch.zeros(3, *size, dtype=torch.uint8), (6, 6), MEAN, STD).shape == size
