"""The numbers behind augmentation: timm's distributions, and a function of seed, epoch and place alone."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import random_erasing, transforms

from arm_zoo.pretraining import noise
from recipes.data.config import DataConfig
from recipes.data.draws import ATTEMPTS, CROP, ERASED, Drawing, Draws, mixed_bits, random_bits
from recipes.data.randaugment import Operation

VARIED = DataConfig(source="x", random_crop=(0.2, 1.0), flip=0.3, erase=0.6, randaugment="rand-m9-mstd0.5-inc1")
MEAN = (0.5, 0.4, 0.3)


def drawing(config: DataConfig = VARIED, seed: int = 0) -> Drawing:
    return Drawing(config, (32, 32), MEAN, seed)


def equal(first: Draws, second: Draws, rows: slice = slice(None)) -> bool:
    """Whether these rows of the first are the second."""
    return all(
        one[rows] == two if isinstance(one, list) else np.array_equal(one[rows], two)
        for one, two in zip(first, second, strict=True)
    )


def drawn_numbers(epoch: int, images: int, part: slice) -> NDArray[np.float64]:
    """What attempts at rectangles (images, ATTEMPTS, 4) are made of."""
    bits = random_bits(0, epoch, range(images), ERASED.stop)[:, part]
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(images, ATTEMPTS, 4)


class Fed:
    """Stands in for Python's module ``random``: gives numbers in the order of an attempt at a rectangle."""

    def __init__(self, attempts: NDArray[np.float64]) -> None:
        self._attempts = iter(attempts.tolist())
        self._left: Iterator[float] = iter(())

    def random(self) -> float:
        return 0.0

    def uniform(self, low: float, high: float) -> float:
        following = next(self._left, None)
        if following is None or self._drawn == 2:  # a new attempt: the last one did not fit
            self._left, self._drawn = iter(next(self._attempts)), 0
            following = next(self._left)
        self._drawn += 1
        return low + (high - low) * following

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self._left) * (high - low + 1))


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (8, 8), (40, 400), (400, 40), (1, 1), (3, 700)])
def test_crops_are_those_of_timm(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(3, *size)
    for scale in ((0.2, 1.0), (0.08, 1.0), (0.9, 1.0)):
        drawn = drawing(DataConfig(source="x", random_crop=scale))
        for crop, numbers in zip(drawn(3, range(60)).crops, drawn_numbers(3, 60, CROP), strict=True):
            monkeypatch.setattr(transforms, "random", Fed(numbers))
            expected = transforms.RandomResizedCropAndInterpolation.get_params(image, scale, (3 / 4, 4 / 3))
            top, left, height, width = drawn.box(crop, *size)
            assert (top, left) == expected[:2] or 0 in expected[2:]
            assert (height, width) == (max(1, expected[2]), max(1, expected[3]))  # timm may cut out nothing


def test_boxes_of_many_images_are_those_of_each() -> None:
    drawn = drawing(DataConfig(source="x", random_crop=(0.5, 1.0)))
    crops, sizes = drawn(1, range(50)).crops, np.array([(5 + 7 * number, 300 - 5 * number) for number in range(50)])
    expected = [drawn.box(crop, *size) for crop, size in zip(crops, sizes.tolist(), strict=True)]
    assert drawn.boxes(crops, sizes).tolist() == [list(box) for box in expected]


def test_central_crops_come_where_no_attempt_fits() -> None:
    crop = np.tile([0.9, 1.1, 0.5, 0.5], (ATTEMPTS, 1))  # too wide for any image that is not much wider than high
    drawn = drawing(DataConfig(source="x", random_crop=(0.9, 1.0)))
    assert drawn.box(crop, 100, 100) == (0, 0, 100, 100)
    assert drawn.box(crop, 300, 30) == (130, 0, 40, 30)
    assert drawing(DataConfig(source="x")).box(crop, 300, 30) == (0, 0, 300, 30)  # squashed


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (224, 192)])
def test_erased_rectangles_are_those_of_timm(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawing(DataConfig(source="x", erase=1.0), size, MEAN, 0)
    rectangles = drawn(0, range(200)).erased
    erase = random_erasing.RandomErasing(probability=1, mode="const", device="cpu")
    for attempts, (top, left, height, width) in zip(drawn_numbers(0, 200, ERASED), rectangles, strict=True):
        monkeypatch.setattr(random_erasing, "random", Fed(attempts))
        expected, image = erase(torch.ones(1, *size)), torch.ones(1, *size)
        image[:, top : top + height, left : left + width] = 0
        assert torch.equal(image, expected)
    assert all(height * width > 0 for _, _, height, width in rectangles)


def test_draws_depend_on_neither_batch_nor_order() -> None:
    whole = drawing()(2, range(50))
    assert equal(whole, drawing()(2, range(10, 20)), slice(10, 20))
    assert equal(whole, drawing()(2, range(49, -1, -1)), slice(None, None, -1))


@pytest.mark.parametrize(("seed", "epoch"), [(1, 2), (0, 3)])
def test_draws_change_with_seed_and_epoch(seed: int, epoch: int) -> None:
    one, two = drawing()(2, range(50)), drawing(seed=seed)(epoch, range(50))
    assert not np.isin(one.crops, two.crops).any() and not np.isin(one.noise_seeds, two.noise_seeds).any()
    assert not np.array_equal(one.flips, two.flips) and one.changes != two.changes


def test_draws_are_even_and_independent() -> None:
    draws = drawing(replace(VARIED, randaugment=None))(0, range(20_000))
    crops = drawn_numbers(0, 20_000, CROP).reshape(20_000, -1)
    assert np.array_equal(
        draws.crops[..., 2:].reshape(20_000, -1), crops.reshape(20_000, -1, 4)[..., 2:].reshape(20_000, -1)
    )
    numbers = np.concatenate([crops, (draws.warps + 1) / 2], axis=1)
    counts = np.apply_along_axis(lambda column: np.histogram(column, 10, (0, 1))[0], 0, numbers)
    chi_squared = ((counts - 2000) ** 2 / 2000).sum(axis=0)
    assert chi_squared.max() < 33  # of 9 degrees of freedom; one in 20,000 is above, of 44
    correlations = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    following = np.corrcoef(numbers[:-1].T, numbers[1:].T)[: numbers.shape[1], numbers.shape[1] :]
    assert np.abs(correlations).max() < 5 / 20_000**0.5 and np.abs(following).max() < 5 / 20_000**0.5
    assert abs(draws.flips.mean() - 0.3) < 0.015 and abs((draws.erased[:, 2] > 0).mean() - 0.6) < 0.015


def test_places_that_an_image_leaves_get_the_mean_colour() -> None:
    white = Image.new("RGB", (32, 32), "white")
    moved = drawing().changes.apply_to_image(white, [Operation("TranslateXRel", (0.5,))])
    assert moved.getpixel((31, 0)) == (128, 102, 76) and moved.getpixel((0, 0)) == (255, 255, 255)


def test_global_generators_are_left_alone() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    drawing()(0, range(3))
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert torch.equal(states[2], torch.get_rng_state())


def test_bits_are_mixed_as_those_of_tensors() -> None:
    states = np.random.default_rng(0).integers(2**64, size=1000, dtype=np.uint64)
    mixed = noise.mixed_bits(torch.from_numpy(states.view(np.int64)))
    assert np.array_equal(mixed_bits(states), mixed.numpy().view(np.uint64))
