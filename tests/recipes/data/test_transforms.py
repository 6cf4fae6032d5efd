"""timm's evaluation transform on tensors: the same sizes and places, and the same pixels up to rounding."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from recipes.data.transforms import ScoringTransform, cropped
from tests import ROOT


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


def test_a_cpus_instructions_do_not_change_images() -> None:
    """A run may go on on another machine. torchvision's bilinear resize is another one where a CPU has no AVX2."""
    code = (
        "import torch; from recipes.data.transforms import InterpolationMode, cropped;"
        "image = torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8, generator=torch.Generator().manual_seed(0));"
        "filters = map(InterpolationMode, ('bilinear', 'bicubic'));"
        "print([cropped(image, (3, 5, 50, 70), (32, 47), filtered).tolist() for filtered in filters])"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
            env=os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {}),
        ).stdout
        for capability in ("", "default")
    }  # fmt: skip
    assert len(told) == 1 and len(told.pop()) > 2 * 3 * 32 * 47


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("image_size", [(48, 48), (40, 56)])
@pytest.mark.parametrize("crop_pct", [0.8, 0.875, 0.9, 1.0])
def test_what_is_kept_is_a_window_of_the_resized_image(
    crop_mode: str, image_size: tuple[int, int], crop_pct: float
) -> None:
    config = {
        "input_size": (3, *image_size), "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": "bicubic",
        "mean": (0.5,) * 3,
    }  # fmt: skip
    transform = ScoringTransform(config)
    assert transform.no_window is None and transform.size == image_size
    for size in [(97, 130), (130, 97), (48, 48), (300, 20), *((side, 37) for side in range(1, 100, 3))]:
        image = pil_to_tensor(photograph(*size))
        height, width, top, left = transform.window(*size)
        resized = cropped(image, (0, 0, *size), (height, width))
        assert transform(image).equal(resized[:, top : top + image_size[0], left : left + image_size[1]])


@pytest.mark.parametrize(
    "changes", [{"crop_mode": "border"}, {"crop_pct": 1.1}, {"interpolation": "lanczos"}, {"interpolation": "nearest"}]
)
def test_what_is_no_window_is_told(changes: dict[str, Any]) -> None:
    config = {"input_size": (3, 32, 32), "crop_mode": "center", "crop_pct": 0.9, "interpolation": "bicubic"} | changes
    said = ", ".join(f"{key}={config[key]}" for key in ("crop_mode", "crop_pct", "interpolation"))
    assert f"the model's images have {said}, which the GPU" in str(
        ScoringTransform(config | {"mean": (0.5,) * 3}).no_window
    )
