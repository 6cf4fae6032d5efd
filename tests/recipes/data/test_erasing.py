"""Random erasing: the rectangles that were drawn, filled with noise that depends on nothing but the image's seed."""

import numpy as np
import pytest
import torch

from recipes.data.erasing import erase

RECTANGLES = np.array([[2, 3, 20, 9], [0, 0, 0, 0], [1, 0, 30, 32]], np.int32)
SEEDS = np.array([5, 6, 7], np.int64)


def erased(images: torch.Tensor, rectangles: np.ndarray = RECTANGLES, seeds: np.ndarray = SEEDS) -> torch.Tensor:
    erase(images, rectangles, seeds)
    return images


def test_only_the_rectangles_change() -> None:
    found = erased(torch.full((3, 3, 32, 32), 9.0)) != 9
    expected = torch.zeros(3, 3, 32, 32, dtype=torch.bool)
    expected[0, :, 2:22, 3:12] = expected[2, :, 1:31] = True
    assert torch.equal(found, expected)


def test_noise_is_normal_and_differs_between_pixels_and_channels() -> None:
    noise = erased(torch.zeros(3, 3, 32, 32))[2, :, 1:31]
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.06  # 2,880 values
    assert noise.unique().numel() > 0.99 * noise.numel()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_noise_depends_on_the_seed_alone(kind: str) -> None:
    images = torch.zeros(3, 3, 32, 32, device=kind)
    before = torch.get_rng_state()
    found = erased(images.clone())
    reverse = erased(images.clone().to(memory_format=torch.channels_last), RECTANGLES[::-1], SEEDS[::-1])
    assert torch.equal(found, reverse.flip(0)) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(found, erased(images.clone(), seeds=SEEDS + 1))
    assert torch.equal(found[2:], erased(images[2:].clone(), RECTANGLES[2:], SEEDS[2:]))
