"""timm's evaluation transform on tensors: the same sizes and places, and the same pixels up to rounding."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from recipes.data.transforms import ScoringTransform


def photograph(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(rows / 9 + k) + 37 * np.cos(columns / 7 - k * rows / 50) for k in range(3)]
    return Image.fromarray(np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("image_size", [(48, 48), (40, 56)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_scoring_is_timms_up_to_rounding(
    crop_mode: str, image_size: tuple[int, int], interpolation: str, crop_pct: float
) -> None:
    config: dict[str, Any] = {
        "input_size": (3, *image_size), "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation,
        "mean": (0.2, 0.5, 0.9),
    }  # fmt: skip
    timms, ours = create_transform(**config, is_training=False, normalize=False), ScoringTransform(config)
    for size in ((97, 130), (130, 97), (31, 33), (48, 48), (300, 20)):
        image = photograph(*size)
        levels = (timms(image).int() - ours(pil_to_tensor(image)).int()).abs()
        assert levels.max() <= 2 and (levels > 0).float().mean() < 0.1
    config |= {"mean": (0.5,), "input_size": (1, *image_size)}
    image = photograph(60, 90, "L")
    expected = create_transform(**config, is_training=False, normalize=False)(image)
    assert (expected.int() - ScoringTransform(config)(pil_to_tensor(image)).int()).abs().max() <= 2
