"""Two views of each training image, made as MoCo v3 makes them: cropped, flipped, changed in colour, blurred.

Crop, flip and what `recipes.data.finishing` does later follow the configuration. The rest is Pillow's, as in the
authors' code: on single images its own functions, on batches on any device its rules in torch. Brightness, contrast,
saturation, hue, grey, blur and solarising give the same values on both, to the bit. Only the bilinear resize before
them is torch's for tensors, which rounds differently from Pillow's.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

from recipes.data.config import DataConfig
from recipes.data.draws import Drawing, Draws, random_bits
from recipes.data.randaugment import blend, grey, mean_level, on_device
from recipes.data.transforms import seed_of


class Pipeline(NamedTuple):
    """The probabilities that a view is blurred, and solarised."""

    blur: float
    solarise: float


PIPELINES = (Pipeline(blur=1.0, solarise=0.0), Pipeline(blur=0.1, solarise=0.2))  # of the first and the second view
JITTER, GREY = 0.8, 0.2  # probabilities, in both views
THRESHOLD = 128  # from which on solarising inverts values
SIGMAS = (0.1, 2.0)  # of the blur, in pixels of an image of 224: scaled for others, as small ones would be wiped out
SIDE = 224
BOXES = 3  # Pillow blurs along an axis by so many means of neighbours, one after the other
# The adjustments of colour jitter, made in random order, with their smallest and largest factors (for hue: shifts).
ADJUSTMENTS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)
LOWEST, HIGHEST = (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# What is drawn of a view: for each adjustment its factor and a number that says when its turn is, then single numbers.
FACTORS, TURNS = slice(0, 4), slice(4, 8)
IS_JITTERED, IS_GREY, IS_BLURRED, SIGMA, IS_SOLARISED, NUMBERS = range(8, 14)
WHETHER = [IS_JITTERED, IS_GREY, IS_BLURRED, IS_SOLARISED]
ARRAYS = [name for name in Draws._fields if name != "changes"]
Drawn = NDArray[np.float64]  # (..., NUMBERS)


class TwoViews(Drawing):
    """Draws the augmentation of the first views of some images, then that of the second views."""

    views = len(PIPELINES)
    interpolation = InterpolationMode.BILINEAR

    def __init__(self, config: DataConfig, image_size: tuple[int, int], mean: tuple[float, ...], seed: int) -> None:
        super().__init__(config, image_size, mean, seed)
        self.changes = Colours()
        self._seeds = [seed_of(seed, view) for view in range(self.views)]
        self._each = [Drawing(config, image_size, mean, own) for own in self._seeds]
        self._side = max(image_size)

    def __call__(self, epoch: int, places: Sequence[int]) -> Draws:
        """The draws for both views of the images at these places of an epoch."""
        each = [drawing(epoch, places) for drawing in self._each]
        changes = [drawn(*of_view, epoch, places, self._side) for of_view in zip(PIPELINES, self._seeds, strict=True)]
        arrays: dict[str, Any] = {name: np.concatenate([getattr(draws, name) for draws in each]) for name in ARRAYS}
        return Draws(changes=np.concatenate(changes), **arrays)


def drawn(pipeline: Pipeline, seed: int, epoch: int, places: Sequence[int], side: int) -> Drawn:
    """The changes of a view of images whose longer side is `side`, drawn independently of those of `Drawing`."""
    bits = random_bits(seed_of(seed, NUMBERS), epoch, places, NUMBERS)
    numbers = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in 0..1, without 1
    numbers[:, FACTORS] = LOWEST + np.subtract(HIGHEST, LOWEST) * numbers[:, FACTORS]
    numbers[:, WHETHER] = numbers[:, WHETHER] < (JITTER, GREY, pipeline.blur, pipeline.solarise)
    numbers[:, SIGMA] = (SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * numbers[:, SIGMA]) * side / SIDE
    return numbers


class Colours:
    """The changes of views, in 8 bits and 1 or 3 channels."""

    def apply_to_image(self, image: Image.Image, drawn: Drawn) -> Image.Image:
        """Change one image by Pillow."""
        if drawn[IS_JITTERED]:
            for adjustment in np.argsort(drawn[TURNS]):
                image = ADJUSTMENTS[adjustment](image, float(drawn[FACTORS][adjustment]))
        if drawn[IS_GREY]:
            image = image.convert("L").convert(image.mode)
        if drawn[IS_BLURRED]:
            image = image.filter(ImageFilter.GaussianBlur(float(drawn[SIGMA])))
        return ImageOps.solarize(image, THRESHOLD) if drawn[IS_SOLARISED] else image

    def apply_to_batch(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Change images (N, C, H, W) as drawn for each (N, NUMBERS), in place; the host does not wait."""
        for whether, change in zip(WHETHER, (jitter, remove_colour, blur, solarise), strict=True):
            if len(rows := np.flatnonzero(drawn[:, whether])):
                places = on_device(rows, images.device)
                images.index_copy_(0, places, change(images[places], drawn[rows]))
        return images


def jitter(images: Tensor, drawn: Drawn) -> Tensor:
    """Adjust brightness, contrast, saturation and hue of images (K, C, H, W), in the order drawn for each.

    All but hue go a factor of the way from a plain image to the given one. So every image has three turns, and the
    turn of hue comes before, between or after them.
    """
    factors, times = drawn[:, FACTORS].T, drawn[:, TURNS].T  # (4, K)
    turns, before_hue = np.argsort(times[:HUE], axis=0), (times[:HUE] < times[HUE]).sum(axis=0)
    by_turn = np.stack([turns == CONTRAST, turns == SATURATION, np.take_along_axis(factors, turns, axis=0)], axis=1)
    numbers = on_device(by_turn.astype(np.float32), images.device)[..., None, None, None]
    shifts = (factors[HUE] * 255).astype(np.int32).astype(np.uint8)  # cut to whole numbers; backwards is to wrap
    for turn in range(HUE + 1):
        if len(rows := np.flatnonzero(before_hue == turn)) and images.shape[1] == 3:
            places = on_device(rows, images.device)
            images.index_copy_(0, places, shift_hue(images[places], on_device(shifts[rows], images.device)))
        if turn < HUE:
            is_contrast, is_saturation, factor = numbers[turn]
            levels = grey(images)
            images = blend(levels * is_saturation + mean_level(levels) * is_contrast, images, factor)
    return images


def shift_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Add shifts (K,) of 8 bits to the hue of images (K, 3, H, W), and wrap."""
    to_hsv, to_rgb = colour_tables(images.device)
    pixels = images.new_zeros(len(images), *images.shape[2:], 4)
    pixels[..., :3] = images.movedim(1, -1)
    pixels = to_hsv.index_select(0, pixels.view(torch.int32).flatten()).view(torch.uint8).view_as(pixels)
    pixels[..., 0].add_(shifts[:, None, None])
    pixels = to_rgb.index_select(0, pixels.view(torch.int32).flatten()).view(torch.uint8).view_as(pixels)
    return pixels[..., :3].movedim(-1, 1)


@lru_cache(maxsize=1)
def colour_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """What Pillow makes of all colours, from RGB to HSV and from HSV to RGB: two tables (2**24,), 64 MiB each.

    A colour is a whole number of 32 bits, its channels from the lowest byte on and 0 in the highest. Looking it up
    takes one step, and Pillow's rounding, in single precision here and in double there, some forty.
    """
    colours = np.arange(2**24, dtype="<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()

    def table(mode: str, converted: str) -> Tensor:
        image = Image.frombytes(mode, (4096, 4096), colours).convert(converted)
        return F.pad(torch.from_numpy(np.array(image)), (0, 1)).view(torch.int32).flatten().to(device)

    return table("RGB", "HSV"), table("HSV", "RGB")


def remove_colour(images: Tensor, _: Drawn) -> Tensor:
    """The grey levels of images (K, C, H, W), in all channels."""
    return grey(images).byte().expand_as(images)


def blur(images: Tensor, drawn: Drawn) -> Tensor:
    """Blur images (K, C, H, W), each by its own deviation; edges repeat.

    The means of 8 bits are sums of 32 bits, whose highest byte counts. The values are taken from -128 on, so that the
    sums fit with their sign.
    """
    weights = box_weights(drawn[:, SIGMA])
    offsets = (1 << 23) + 128 * (weights.sum(axis=1, keepdims=True) - (1 << 24))  # to round, as if from 0 on
    table = np.ascontiguousarray(np.concatenate([offsets, weights], axis=1).T, np.int32)
    offset, *taps = on_device(table, images.device)[..., None, None, None]
    values = (images ^ 128).view(torch.int8)
    for axis in (3, 2):
        size = images.shape[axis]
        places = torch.arange(-(len(taps) // 2), size + len(taps) // 2, device=images.device).clamp_(0, size - 1)
        for _ in range(BOXES):
            padded = values.index_select(axis, places)
            sums = torch.addcmul(offset, padded.narrow(axis, 0, size), taps[0])
            for place, weight in enumerate(taps[1:], 1):
                sums.addcmul_(padded.narrow(axis, place, size), weight)
            values = sums.view(torch.int8)[..., 3::4]
    return values.view(torch.uint8) ^ 128


def box_weights(sigmas: NDArray[np.float64]) -> NDArray[np.int64]:
    """The weights (K, taps) of neighbours in the means that make up blurs of these deviations (K,), in 2**-24.

    Extended boxes (Gwosdek et al., 2011, https://www.mia.uni-saarland.de/Publications/gwosdek-ssvm11.pdf): the
    outermost two neighbours weigh less than the others. Precisions and rounding are Pillow's.
    """
    variance = np.square(sigmas.astype(np.float32)) / np.float32(BOXES)
    length = np.sqrt(12 * variance.astype(np.float64) + 1).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1) / 2).astype(np.float32)
    radius = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - np.square(whole + 1)))
    inner = (np.float32(1 << 24) / (2 * radius + 1)).astype(np.int64)[:, None]
    reach = radius.astype(np.int64)[:, None]
    outer = ((1 << 24) - (2 * reach + 1) * inner) // 2
    distance = np.abs(np.arange(-reach.max() - 1, reach.max() + 2))
    return np.where(distance <= reach, inner, np.where(distance == reach + 1, outer, 0))


def solarise(images: Tensor, _: Drawn) -> Tensor:
    """Invert the values from THRESHOLD on, the upper half of all."""
    return torch.minimum(images, ~images)
