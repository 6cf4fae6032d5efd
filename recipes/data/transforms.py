"""Transforms of decoded images: cropping and resizing, and on the device warping and normalising."""

import hashlib
import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, v2

from recipes.data.config import DataConfig
from recipes.data.resample import REACHES

ORDER, LANE, AUGMENTATION = range(3)  # purposes of random numbers, as parts of the key of `seed_of`
Transform = Callable[[Tensor], Tensor]  # of one image (C, H, W), uint8
Window = tuple[int, int, int, int]  # height and width to which an image is resized; top and left of what is kept


def seed_of(*key: int) -> int:
    """A random number of 63 bits for every key, for example (seed, epoch, purpose)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_global_generators(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch (CPU), which transforms draw from."""
    number = seed_of(*key)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number)


@contextmanager
def global_generators_restored() -> Iterator[None]:
    """Leave the three generators as they were before the block."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


def cropped(
    image: Tensor,
    box: tuple[int, int, int, int],
    size: Sequence[int],
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
) -> Tensor:
    """Crop a box (top, left, height, width) of an image (C, H, W) of 8 bits, and resize it with antialiasing."""
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    part = part.contiguous(memory_format=torch.channels_last)  # the layout that is resized fastest
    return resized(part, size, interpolation)[0]


def resized(images: Tensor, size: Sequence[int], interpolation: InterpolationMode) -> Tensor:
    """Resize images (N, C, H, W) of 8 bits with antialiasing, in whole numbers: to the same values on every CPU.

    torchvision's resize is bilinear in floating point on some CPUs, and differs by one grey level in a sixth of the
    values.
    """
    if interpolation in REACHES:
        return F.interpolate(images, tuple(size), mode=interpolation.value, align_corners=False, antialias=True)
    return v2.functional.resize(images, list(size), interpolation, antialias=True)


class ScoringTransform:
    """timm's evaluation transform of a model's data configuration, for tensors of 8 bits, without normalising.

    Sizes and places are timm's; the resize is torchvision's for tensors, which rounds differently from Pillow's.
    """

    def __init__(self, data_config: Mapping[str, Any]) -> None:
        keys = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean")
        timms = create_transform(is_training=False, normalize=False, **{key: data_config[key] for key in keys})
        self._resize, self._crop, _ = timms.transforms  # the last step converts to a tensor
        self._steps = Compose([on_tensors(self._resize), on_tensors(self._crop)])
        self.size: tuple[int, int] = self._crop.size
        self.interpolation: InterpolationMode = self._resize.interpolation
        self._said = ", ".join(f"{key}={data_config[key]}" for key in ("crop_mode", "crop_pct", "interpolation"))

    def __call__(self, image: Tensor) -> Tensor:
        """Transform an image (C, H, W)."""
        return self._steps(image)

    @property
    def no_window(self) -> str | None:
        """Why a GPU cannot make these images as windows of resized ones; None if it can."""
        sides = [self._resize.size] * 2 if isinstance(self._resize.size, int) else self._resize.size
        padded = not isinstance(self._crop, CenterCrop) or any(map(int.__lt__, sides, self.size))
        if not padded and self.interpolation in REACHES:
            return None
        known = "crop_mode center or squash, crop_pct up to 1, interpolation bicubic or bilinear"
        return f"the model's images have {self._said}, which the GPU does not prepare (it does for {known})"

    def window(self, height: int, width: int) -> Window:
        """What this makes of an image of this size, if it is a window."""
        whole = size_after(self._resize, torch.empty(1, height, width, device="meta"))
        top, left = (round((side - kept) / 2) for side, kept in zip(whole, self.size, strict=True))
        return whole[0], whole[1], top, left


def on_tensors(step: Any) -> Transform:
    """A step of timm's evaluation transform that keeps tensors in 8 bits, where timm's own would use 32."""
    if isinstance(step, (Resize, ResizeKeepRatio)):
        return partial(resized_by, step)
    if isinstance(step, CenterCropOrPad):
        return partial(pad_and_crop, step)
    return step


def resized_by(step: Resize | ResizeKeepRatio, image: Tensor) -> Tensor:
    return resized(image[None], size_after(step, image), step.interpolation)[0]


def size_after(step: Resize | ResizeKeepRatio, image: Tensor) -> list[int]:
    """Height and width of an image (C, H, W) after a step of timm's transform."""
    if isinstance(step, ResizeKeepRatio):
        return step.get_params(image, step.size, step.longest)
    if isinstance(step.size, int):  # of the shorter side
        return [int(step.size * side / min(image.shape[1:])) for side in image.shape[1:]]
    return list(step.size)


def pad_and_crop(step: CenterCropOrPad, image: Tensor) -> Tensor:
    height, width = (max(0, wanted - size) for wanted, size in zip(step.size, image.shape[1:], strict=True))
    top, left = height // 2, width // 2
    return step(v2.functional.pad(image, [left, top, width - left, height - top], fill=step.fill))


class Normalisation:
    """Normalises images (N, C, H, W), of 8 bits or float32 in 0..1 (changed in place), to mean 0 and deviation 1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._mean, self._std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        values = images.float().div_(255) if images.dtype == torch.uint8 else images
        return values.sub_(self._mean).div_(self._std)


def warp(images: Tensor, draws: Tensor, config: DataConfig) -> Tensor:
    """Rotate, zoom and shift images (N, C, H, W) by draws (N, 4) from -1..1, each times its largest value."""
    rotation, zoom, shift_x, shift_y = draws.unbind(1)
    angle = rotation * math.radians(config.max_rotation)
    scale = 1 / (1 + zoom * config.max_zoom)  # the inverse, as the matrix maps places in the output to the input
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # affine_grid's coordinates run from -1 to 1 over each side, whatever its length
    reach, aspect = 2 * config.max_shift, images.shape[3] / images.shape[2]
    rows = [
        torch.stack([cos, -sin / aspect, shift_x * reach], dim=-1),
        torch.stack([sin * aspect, cos, shift_y * reach], dim=-1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
