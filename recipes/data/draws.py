"""Everything random about augmentation, known before an image is decoded: a function of seed, epoch and place.

Crop and erased rectangle have the distributions of timm's transforms. Nothing here reads or changes a global
generator, but RandAugment, whose draws are timm's own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.config import DataConfig
from recipes.data.randaugment import Operation, RandAugment
from recipes.data.transforms import AUGMENTATION, global_generators_restored, seed_global_generators, seed_of

ATTEMPTS = 10  # at a rectangle that fits, timm's number
ASPECTS = (3 / 4, 4 / 3)  # width by height of a random crop
ERASED_AREAS, ERASED_ASPECTS = (0.02, 1 / 3), (1 / 0.3, 0.3)  # fractions of the image; timm's are height by width
# What the numbers of an image are for: four for each attempt at a rectangle, then the single ones.
CROP, ERASED, WARP = slice(0, 4 * ATTEMPTS), slice(4 * ATTEMPTS, 8 * ATTEMPTS), slice(8 * ATTEMPTS, 8 * ATTEMPTS + 4)
FLIP, ERASE, NOISE, NUMBERS = range(8 * ATTEMPTS + 4, 8 * ATTEMPTS + 8)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels
NOTHING: Box = (0, 0, 0, 0)


class Draws(NamedTuple):
    """The augmentation of N images."""

    crops: NDArray[np.float64]  # (N, ATTEMPTS, 4) in 0..1, for `Drawing.box`, which needs the size of the image
    flips: NDArray[np.bool_]  # (N,)
    operations: list[list[Operation]]  # of RandAugment, for each image
    warps: NDArray[np.float32]  # (N, 4) in -1..1: rotation, zoom and two shifts
    erased: NDArray[np.int32]  # (N, 4), rectangles; height 0: none
    noise_seeds: NDArray[np.int64]  # (N,), of what fills the rectangles, and of what objectives draw


class Drawing:
    """Draws as `config` says for images of a size (height, width) after the crop."""

    def __init__(self, config: DataConfig, image_size: tuple[int, int], mean: tuple[float, ...], seed: int) -> None:
        self._config, self._image_size, self._seed = config, image_size, seed
        self.randaugment = RandAugment(config.randaugment, image_size, mean) if config.randaugment else None

    def __call__(self, epoch: int, places: Sequence[int]) -> Draws:
        """The draws of the images at these places of an epoch: the same in any batch and any order."""
        bits = random_bits(self._seed, epoch, places, NUMBERS)
        numbers = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in 0..1, without 1
        erased = [
            fitting_box(attempts, *self._image_size, ERASED_AREAS, ERASED_ASPECTS, inside=1) if is_erased else None
            for attempts, is_erased in zip(
                numbers[:, ERASED].reshape(-1, ATTEMPTS, 4), numbers[:, ERASE] < self._config.erase, strict=True
            )
        ]
        return Draws(
            crops=numbers[:, CROP].reshape(-1, ATTEMPTS, 4),
            flips=numbers[:, FLIP] < self._config.flip,
            operations=self._operations(epoch, places),
            warps=(2 * numbers[:, WARP] - 1).astype(np.float32),
            erased=np.array([box or NOTHING for box in erased], np.int32),
            noise_seeds=(bits[:, NOISE] >> np.uint64(1)).astype(np.int64),
        )

    def box(self, crop: NDArray[np.float64], height: int, width: int) -> Box:
        """What is cut out of an image of this size, as timm's random crop: a box that fits, else the central part."""
        if self._config.random_crop is None:
            return 0, 0, height, width
        found = fitting_box(crop, height, width, self._config.random_crop, ASPECTS)
        if found is not None:
            return found
        narrowest, widest = ASPECTS
        part_height, part_width = min(height, round(width / narrowest)), min(width, round(height * widest))
        return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width

    def _operations(self, epoch: int, places: Sequence[int]) -> list[list[Operation]]:
        if self.randaugment is None:
            return [[] for _ in places]
        operations = []
        with global_generators_restored():
            for place in places:
                seed_global_generators(self._seed, epoch, AUGMENTATION, place)
                operations.append(self.randaugment.draw())
        return operations


def fitting_box(
    attempts: NDArray[np.float64],
    height: int,
    width: int,
    areas: tuple[float, float],
    aspects: tuple[float, float],
    inside: int = 0,
) -> Box | None:
    """The first rectangle that leaves at least `inside` rows and columns of an image free, None if none does.

    `attempts` (any number, 4) are in 0..1: for area, aspect (width by height; evenly in its logarithm), top and left.
    """
    low, high = map(math.log, aspects)
    for area, aspect, top, left in attempts.tolist():
        pixels = (areas[0] + (areas[1] - areas[0]) * area) * height * width
        ratio = math.exp(low + (high - low) * aspect)
        box_height = max(1, round(math.sqrt(pixels / ratio)))
        box_width = max(1, round(math.sqrt(pixels * ratio)))
        free_height, free_width = height - box_height, width - box_width
        if min(free_height, free_width) >= inside:
            return int(top * (free_height + 1)), int(left * (free_width + 1)), box_height, box_width
    return None


def random_bits(seed: int, epoch: int, places: Sequence[int], count: int) -> NDArray[np.uint64]:
    """64 random bits (images, count) for each place and number of a draw, from the generator SplitMix64."""
    first = np.array([seed_of(seed, epoch, AUGMENTATION)], np.uint64)
    streams = mixed_bits(first + GOLDEN * np.array(places, np.uint64))
    return mixed_bits(streams[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def mixed_bits(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))
