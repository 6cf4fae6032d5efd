"""Two views of each training image, made as MoCo v3 makes them: cropped, changed in colour, blurred, flipped.

Crop, flip and what `recipes.data.finishing` does later follow the configuration. Pillow does the rest, as in the
authors' code. Only the bilinear resize is torchvision's for tensors, which rounds differently from Pillow's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    pil_to_tensor,
    to_pil_image,
)

from recipes.data.batches import AugmentedImages, Loaded, places
from recipes.data.config import DataConfig
from recipes.data.draws import Drawing, Draws, random_bits
from recipes.data.sampling import Key
from recipes.data.sources import Source
from recipes.data.transforms import cropped, seed_of


class Pipeline(NamedTuple):
    """The probabilities that a view is blurred, and solarised."""

    blur: float
    solarise: float


PIPELINES = (Pipeline(blur=1.0, solarise=0.0), Pipeline(blur=0.1, solarise=0.2))  # of the first and the second view
JITTER, GREY = 0.8, 0.2  # probabilities, in both views
THRESHOLD = 128  # from which on solarising inverts values
SIGMAS = (0.1, 2.0)  # of the blur, in pixels of an image of 224: scaled for others, as small ones would be wiped out
SIDE = 224
# The adjustments of colour jitter, made in random order: function, smallest and largest factor (for hue: shift).
Adjustment = tuple[Callable[[Image.Image, float], Image.Image], float, float]
ADJUSTMENTS: tuple[Adjustment, ...] = (
    (adjust_brightness, 0.6, 1.4),
    (adjust_contrast, 0.6, 1.4),
    (adjust_saturation, 0.8, 1.2),
    (adjust_hue, -0.1, 0.1),
)
# Which random numbers of a view are for what: strength and place of each adjustment, then single numbers.
STRENGTHS, PLACES = slice(0, 4), slice(4, 8)
IS_JITTERED, IS_GREY, IS_BLURRED, SIGMA, IS_SOLARISED, NUMBERS = range(8, 14)
ARRAYS = [name for name in Draws._fields if name != "operations"]


class TwoViews(AugmentedImages):
    """Makes batches of training images that hold the first views of all images, then the second views."""

    def __init__(self, source: Source, config: DataConfig, image_size: tuple[int, int], seed: int) -> None:
        super().__init__(source, config, image_size, seed)
        self._seeds = [seed_of(seed, view) for view in range(len(PIPELINES))]
        self._drawings = [Drawing(config, image_size, source.mean, own) for own in self._seeds]

    def batch(self, keys: Sequence[Key]) -> Loaded:
        """Decode a batch; the next image takes the place of one that cannot be decoded."""
        epoch, indices, undecodable = keys[0].epoch, [key.place for key in keys], list[str]()
        draws = [drawing(epoch, indices) for drawing in self._drawings]
        numbers = [drawn(own, epoch, indices) for own in self._seeds]
        images = torch.empty(len(PIPELINES), len(keys), *self._shape, dtype=torch.uint8)
        classes = torch.empty(len(keys), dtype=torch.long)
        for row, (image, label) in enumerate(self._opened(keys, undecodable)):
            classes[row] = label
            for view, pipeline in enumerate(PIPELINES):
                box = self._drawings[view].box(draws[view].crops[row], *image.shape[1:])
                part = cropped(image, box, self._shape[1:], InterpolationMode.BILINEAR)
                made = changed(part, pipeline, numbers[view][row])
                images[view, row] = made.flip(-1) if draws[view].flips[row] else made
        return Loaded(images.flatten(0, 1), classes, places(keys), undecodable, joined(*draws), None)


def drawn(seed: int, epoch: int, indices: Sequence[int]) -> NDArray[np.float64]:
    """Random numbers in 0..1 for a view, (images, NUMBERS), independent of those of `Drawing`."""
    bits = random_bits(seed_of(seed, NUMBERS), epoch, indices, NUMBERS)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def changed(image: Tensor, pipeline: Pipeline, numbers: NDArray[np.float64]) -> Tensor:
    """Change the colours of an image (C, H, W) of 8 bits and 1 or 3 channels, then blur and solarise it."""
    picture: Any = to_pil_image(image)
    if numbers[IS_JITTERED] < JITTER:
        for place in np.argsort(numbers[PLACES]):
            adjust, low, high = ADJUSTMENTS[place]
            picture = adjust(picture, low + (high - low) * float(numbers[STRENGTHS][place]))
    if numbers[IS_GREY] < GREY:
        picture = picture.convert("L").convert(picture.mode)
    if numbers[IS_BLURRED] < pipeline.blur:
        sigma = SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * float(numbers[SIGMA])
        picture = picture.filter(ImageFilter.GaussianBlur(sigma * max(image.shape[1:]) / SIDE))
    if numbers[IS_SOLARISED] < pipeline.solarise:
        picture = ImageOps.solarize(picture, THRESHOLD)
    return pil_to_tensor(picture)


def joined(first: Draws, second: Draws) -> Draws:
    """Join the draws of the first views with those of the second views."""
    arrays = {name: np.concatenate([getattr(draws, name) for draws in (first, second)]) for name in ARRAYS}
    return Draws(operations=first.operations + second.operations, **arrays)
