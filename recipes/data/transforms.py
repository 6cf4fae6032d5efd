"""How images are augmented and brought to size: timm's transforms, drawing from generators seeded for each image."""

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
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Resize

from recipes.config import DataConfig

ORDER, LANE, AUGMENTATION, ERASING = range(4)  # what a random stream is for
Transform = Callable[[Image.Image], Tensor]  # to (C, H, W), uint8


def seed_of(*key: int) -> int:
    """63 random bits for every key, for example (seed, epoch, purpose)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_global_generators(*key: int) -> None:
    """Seed those of Python, NumPy and torch (CPU), which transforms draw from."""
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


def training_transform(config: DataConfig, image_size: tuple[int, int], mean: tuple[float, ...]) -> Transform:
    """timm's training transform: crop, flip, RandAugment, bicubic throughout; normalising is left to the batch."""
    crop_and_flip, randaugment, to_tensor = create_transform(
        image_size,
        is_training=True,
        scale=config.random_crop,
        hflip=config.flip,
        color_jitter=None,  # type: ignore[arg-type]  # timm declares fewer kinds than it takes
        auto_augment=config.randaugment,
        interpolation="bicubic",
        mean=mean,
        normalize=False,
        separate=True,
    )
    if config.random_crop is None:
        crop_and_flip.transforms[0] = Resize(image_size, InterpolationMode.BICUBIC)
    for operation in (operation for augment in randaugment.transforms for operation in augment.ops):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(posterized, posterize=operation.aug_fn)
    return Compose([*crop_and_flip.transforms, *randaugment.transforms, *to_tensor.transforms])


def posterized(
    image: Image.Image, bits: int, *, posterize: Callable[..., Image.Image], **keywords: Any
) -> Image.Image:
    """timm's operation; 0 bits, which Pillow refuses from release 13 on, leave black as they did before."""
    return posterize(image, bits, **keywords) if bits else Image.new(image.mode, image.size)


def scoring_transform(data_config: Mapping[str, Any]) -> Transform:
    """timm's evaluation transform of a model's data configuration, without normalising."""
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    return create_transform(is_training=False, normalize=False, **{key: data_config[key] for key in keys})


class Normalisation:
    """Images (N, C, H, W), 8 bits or float32 in 0..1 (changed in place), as float32 of mean 0 and deviation 1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._mean, self._std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        values = images.float().div_(255) if images.dtype == torch.uint8 else images
        return values.sub_(self._mean).div_(self._std)


def warp(images: Tensor, draws: Tensor, config: DataConfig) -> Tensor:
    """Rotate, zoom and shift images (N, C, H, W) by draws (N, 4) from -1..1, each times its largest value."""
    rotation, zoom, shift_x, shift_y = draws.unbind(1)
    angle = rotation * math.radians(config.max_rotation)
    scale = 1 / (1 + zoom * config.max_zoom)  # 1 over: the matrix maps output places to input places
    cos, sin = scale * angle.cos(), scale * angle.sin()
    reach = 2 * config.max_shift  # affine_grid's coordinates run from -1 to 1 over the side
    rows = [torch.stack([cos, -sin, shift_x * reach], dim=-1), torch.stack([sin, cos, shift_y * reach], dim=-1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
