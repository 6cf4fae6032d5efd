"""What is drawn for an image before it is decoded: rectangles as timm's transforms draw them from the same numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import random_erasing
from timm.data import transforms as timm_transforms

from recipes.config import DataConfig
from recipes.data.draws import ASPECTS, ATTEMPTS, ERASED_AREAS, ERASED_ASPECTS, Drawing, fitting_box

SHAPES = [(8, 8), (40, 24), (30, 200)]  # in the last ones attempts fail, often all ten


class GivenNumbers:
    """Stands in for the module `random` and gives out numbers of 0..1, four for each attempt at a rectangle."""

    def __init__(self, attempts: NDArray[np.float64]) -> None:
        self._attempts, self._numbers = iter(attempts.tolist()), list[float]()

    def random(self) -> float:
        return 0.0

    def uniform(self, low: float, high: float) -> float:
        if len(self._numbers) != 3:  # only the area has been taken: the aspect is next, else a new attempt begins
            self._numbers = next(self._attempts)
        return low + (high - low) * self._numbers.pop(0)

    def randint(self, low: int, high: int) -> int:
        return low + int(self._numbers.pop(0) * (high - low + 1))


def attempts(images: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).random((images, ATTEMPTS, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_erased_rectangles_are_those_of_timm(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    erasing = random_erasing.RandomErasing(probability=1, device="cpu")
    for numbers in attempts(200):
        monkeypatch.setattr(random_erasing, "random", GivenNumbers(numbers))
        expected = erasing(torch.ones(1, *shape))[0]
        found = torch.ones(shape)
        if box := fitting_box(numbers, *shape, ERASED_AREAS, ERASED_ASPECTS, inside=1):
            top, left, height, width = box
            found[top : top + height, left : left + width] = 0
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crops_are_those_of_timm(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image, scale = Image.new("L", shape[::-1]), (0.3, 1.0)
    drawing = Drawing(DataConfig(source="x", random_crop=scale), (16, 16), (0.5,), seed=0)
    get_params: Any = timm_transforms.RandomResizedCropAndInterpolation.get_params
    for numbers in attempts(200):
        monkeypatch.setattr(timm_transforms, "random", GivenNumbers(numbers))
        assert drawing.box(numbers, *shape) == get_params(image, scale, ASPECTS)
