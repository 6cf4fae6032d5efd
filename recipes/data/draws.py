"""The random draws of augmentation, made before an image is decoded: functions of seed, epoch and place.

The crop and the erased rectangle have the distributions of timm's transforms. Only RandAugment, whose draws are timm's
own, uses global random generators; they are restored afterwards.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from recipes.data.config import DataConfig
from recipes.data.randaugment import Operation, RandAugment
from recipes.data.transforms import AUGMENTATION, global_generators_restored, seed_global_generators, seed_of

ATTEMPTS = 10  # tries to find a rectangle that fits, as many as timm's
ASPECTS = (3 / 4, 4 / 3)  # width by height of a random crop
ERASED_AREAS, ERASED_ASPECTS = (0.02, 1 / 3), (1 / 0.3, 0.3)  # fractions of the image; timm's are height by width
# Which random numbers of an image are for what: single numbers first, then four for each attempt at a rectangle.
FLIP, ERASE, NOISE, WARP = 0, 1, 2, slice(3, 7)
CROP, ERASED = slice(7, 7 + 4 * ATTEMPTS), slice(7 + 4 * ATTEMPTS, 7 + 8 * ATTEMPTS)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


class Changes(Protocol):
    """Changes of images after crop and flip, as drawn for each, in 8 bits and 1 or 3 channels."""

    def apply_to_image(self, image: Image.Image, drawn: Any, /) -> Image.Image:
        """Change one image by Pillow."""

    def apply_to_batch(self, images: Tensor, drawn: Any, /) -> Tensor:
        """Change images (N, C, H, W) on any device, in place."""


class Draws(NamedTuple):
    """The augmentation of N images."""

    crops: NDArray[np.float64]  # (N, ATTEMPTS, 4), for `Drawing.boxes`, which needs the sizes of the images
    flips: NDArray[np.bool_]  # (N,)
    changes: Sequence[Any] | NDArray[np.float64]  # of each image, for `Drawing.changes`
    warps: NDArray[np.float32]  # (N, 4) in -1..1: rotation, zoom and two shifts
    erased: NDArray[np.int32]  # (N, 4), rectangles; height 0: none
    noise_seeds: NDArray[np.int64]  # (N,), for the noise in the rectangles and the random draws of objectives


class Drawing:
    """Draws the augmentation that `config` asks for; images are `image_size` (height, width) after the crop."""

    views = 1  # of each image
    interpolation = InterpolationMode.BICUBIC  # of the resize after the crop

    def __init__(self, config: DataConfig, image_size: tuple[int, int], mean: tuple[float, ...], seed: int) -> None:
        self._config, self._image_size, self._seed = config, image_size, seed
        self._randaugment = RandAugment(config.randaugment, image_size, mean) if config.randaugment else None
        self.changes: Changes | None = self._randaugment

    def __call__(self, epoch: int, places: Sequence[int]) -> Draws:
        """The draws for the images at these places of an epoch: the same in any batch and any order."""
        count = (ERASED if self._config.erase else CROP).stop
        bits = random_bits(self._seed, epoch, places, count)
        numbers = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in 0..1, without 1
        return Draws(
            crops=rectangles(numbers[:, CROP], self._config.random_crop or (1.0, 1.0), ASPECTS),
            flips=numbers[:, FLIP] < self._config.flip,
            changes=self._operations(epoch, places),
            warps=(2 * numbers[:, WARP] - 1).astype(np.float32),
            erased=self._erased(numbers),
            noise_seeds=(bits[:, NOISE] >> np.uint64(1)).astype(np.int64),
        )

    def boxes(self, crops: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The parts to crop from images of these sizes (N, 2), as timm's random crop does: (N, 4), each a `Box`.

        It is the first box that fits, or the central part if none does.
        """
        if self._config.random_crop is None:
            return np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        boxes, fit = fitting_boxes(crops, sizes)
        if not fit.all():
            narrowest, widest = ASPECTS
            parts = np.minimum(sizes, np.rint(sizes[:, ::-1] * (1 / narrowest, widest)).astype(np.int64))
            boxes = np.where(fit[:, None], boxes, np.concatenate([(sizes - parts) // 2, parts], axis=1))
        return boxes

    def box(self, crop: NDArray[np.float64], height: int, width: int) -> Box:
        """The same as `boxes` for one image, in a tenth of the time."""
        side = math.sqrt(height * width)
        for part_height, part_width, top, left in crop.tolist() if self._config.random_crop else ():
            box_height, box_width = max(1, round(side * part_height)), max(1, round(side * part_width))
            free_height, free_width = height - box_height, width - box_width
            if min(free_height, free_width) >= 0:
                return int(top * (free_height + 1)), int(left * (free_width + 1)), box_height, box_width
        top, left, box_height, box_width = self.boxes(crop[None], np.array([[height, width]]))[0].tolist()
        return top, left, box_height, box_width

    def _erased(self, numbers: NDArray[np.float64]) -> NDArray[np.int32]:
        erased = np.zeros((len(numbers), 4), np.int32)
        rows = np.flatnonzero(numbers[:, ERASE] < self._config.erase)
        if len(rows):
            sizes = np.broadcast_to(self._image_size, (len(rows), 2))
            boxes, fit = fitting_boxes(
                rectangles(numbers[rows, ERASED], ERASED_AREAS, ERASED_ASPECTS), sizes, inside=1
            )
            erased[rows[fit]] = boxes[fit]
        return erased

    def _operations(self, epoch: int, places: Sequence[int]) -> list[list[Operation]]:
        if self._randaugment is None:
            return [[] for _ in places]
        operations = []
        with global_generators_restored():
            for place in places:
                seed_global_generators(self._seed, epoch, AUGMENTATION, place)
                operations.append(self._randaugment.draw())
        return operations


def rectangles(
    numbers: NDArray[np.float64], areas: tuple[float, float], aspects: tuple[float, float]
) -> NDArray[np.float64]:
    """Turn random numbers (N, 4 * ATTEMPTS) in 0..1 into attempts (N, ATTEMPTS, 4) at a rectangle.

    The four numbers of an attempt decide area, aspect (width by height, evenly in its logarithm), top and left. An
    attempt holds height and width as fractions of the side of a square image of the same area, then top and left as
    fractions of the way from the first to the last possible row and column.
    """
    attempts = numbers.reshape(len(numbers), -1, 4).copy()
    area = areas[0] + (areas[1] - areas[0]) * attempts[..., 0]
    low, high = map(math.log, aspects)
    aspect = np.exp(low + (high - low) * attempts[..., 1])
    attempts[..., 0], attempts[..., 1] = np.sqrt(area / aspect), np.sqrt(area * aspect)
    return attempts


def fitting_boxes(
    attempts: NDArray[np.float64], sizes: NDArray[np.int64], inside: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each image, the first attempt at a rectangle that leaves at least `inside` rows and columns free.

    `attempts` (N, any number, 4) are those of `rectangles`, `sizes` (N, 2) those of the images. Returns boxes (N, 4),
    each a `Box`, and whether each image has one, (N,).
    """
    sides = np.sqrt(sizes[:, 0] * sizes[:, 1])[:, None, None]
    extents = np.maximum(np.rint(sides * attempts[..., :2]), 1)
    free = sizes[:, None] - extents
    fit = free.min(axis=2) >= inside
    chosen = np.arange(len(sizes)), fit.argmax(axis=1)
    corners = np.floor(attempts[..., 2:][chosen] * (free[chosen] + 1))
    return np.concatenate([corners, extents[chosen]], axis=1).astype(np.int64), fit.any(axis=1)


def random_bits(seed: int, epoch: int, places: Sequence[int], count: int) -> NDArray[np.uint64]:
    """Random numbers of 64 bits, `count` for each place: (images, count), from the generator SplitMix64."""
    first = np.array([seed_of(seed, epoch, AUGMENTATION)], np.uint64)
    streams = mixed_bits(first + GOLDEN * np.array(places, np.uint64))
    return mixed_bits(streams[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def mixed_bits(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014).

    `arm_zoo.pretraining.noise` has it for tensors; for a batch's few numbers NumPy takes a third of their time.
    """
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))
