"""RandAugment, with its random draws apart from its work: on images one by one, or on batches on any device.

In both cases timm draws the operations. On single images they are timm's own functions, which use Pillow. On batches
they are written in torch by Pillow's rules, for every operation that timm's `rand` words can select:

    equal to Pillow: AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd, Brightness, Contrast, Color,
        Sharpness
    1 grey level apart in up to 1% of the values, where rounding decides: Rotate, ShearX, ShearY, TranslateXRel,
        TranslateYRel
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor

GREY_LEVELS = Image.frombytes("L", (256, 1), bytes(range(256)))
# Interpolated values are cut to whole numbers; in 32 bits, a sum may be this much below the number that it should be.
ROUNDING = 2**-12


class Operation(NamedTuple):
    """One operation on an image: timm's name for it, such as ShearX, and its arguments besides the image."""

    name: str
    arguments: tuple[float, ...]


class RandAugment:
    """timm's RandAugment for images (H, W) of one size: bicubic, and the mean colour where an image does not reach.

    `words` are timm's, as in rand-m9-mstd0.5-inc1; `mean` is a value in 0..1 for each channel.
    """

    def __init__(self, words: str, image_size: tuple[int, int], mean: tuple[float, ...]) -> None:
        _, randaugment, _ = create_transform(
            image_size,
            is_training=True,
            color_jitter=None,  # type: ignore[arg-type]  # timm declares fewer kinds than it takes
            auto_augment=words,
            interpolation="bicubic",
            mean=mean,
            separate=True,
        )
        [self._drawing] = randaugment.transforms
        self._functions: dict[str, Callable[..., Image.Image]] = {}
        for operation in self._drawing.ops:
            is_posterize = operation.name.startswith("Posterize")
            function = partial(posterized, posterize=operation.aug_fn) if is_posterize else operation.aug_fn
            self._functions[operation.name] = partial(function, **operation.kwargs)
            self._fill = operation.kwargs["fillcolor"]
            operation.aug_fn = partial(recorded, operation.name)

    def draw(self) -> list[Operation]:
        """The operations of an image, in order, drawn by timm from the global generators of Python and NumPy."""
        return self._drawing([])

    def apply_to_image(self, image: Image.Image, operations: Sequence[Operation]) -> Image.Image:
        """Apply its operations to an image."""
        for name, arguments in operations:
            image = self._functions[name](image, *arguments)
        return image

    def apply_to_batch(self, images: Tensor, operations: Sequence[Sequence[Operation]]) -> Tensor:
        """Apply to each image of (N, C, H, W), of 8 bits and 1 or 3 channels, its own operations, in place.

        The host does not wait for the device.
        """
        for layer in range(max(map(len, operations), default=0)):
            places: dict[Rule, list[int]] = defaultdict(list)
            for place, drawn in enumerate(operations):
                if layer < len(drawn):
                    places[RULES[plain_name(drawn[layer])]].append(place)
            order = on_device(np.concatenate(list(places.values())), images.device)
            parts = images[order].split([len(found) for found in places.values()])
            changed = []
            for (rule, found), part in zip(places.items(), parts, strict=True):
                numbers = self._numbers([operations[place][layer] for place in found], images)
                changed.append(rule(part, on_device(numbers, images.device)))
            images.index_copy_(0, order, torch.cat(changed))
        return images

    def _numbers(self, operations: Sequence[Operation], images: Tensor) -> NDArray[Any]:
        """The arguments of a rule besides the images: a row for each operation."""
        height, width = images.shape[-2:]
        rows: list[Any] = []
        for operation in operations:
            name = plain_name(operation)
            if name in MATRICES:
                to_x, to_y = MATRICES[name](*operation.arguments, height, width)
                rows.append((*to_x, width, *to_y, height, *self._fill))
            elif RULES[name] is look_up:
                rows.append(table(self._functions[operation.name], *operation.arguments))
            else:
                rows.append(operation.arguments)
        return np.array(rows)


def recorded(name: str, operations: list[Operation], *arguments: float, **_: Any) -> list[Operation]:
    """Record an operation instead of applying it: the list of operations takes the place of the image."""
    return [*operations, Operation(name, arguments)]


def posterized(
    image: Image.Image, bits: int, *, posterize: Callable[..., Image.Image], **keywords: Any
) -> Image.Image:
    """timm's operation, but 0 bits or fewer, which Pillow refuses since release 13, give black as they did before."""
    return posterize(image, bits, **keywords) if bits > 0 else Image.new(image.mode, image.size)


def plain_name(operation: Operation) -> str:
    """The name of the operation without timm's suffix, which only says how strengths grow."""
    return operation.name.removesuffix("Increasing")


def on_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """The values as a tensor on a device, without waiting for the copy."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache(maxsize=1024)
def table(function: Callable[..., Image.Image], *arguments: float) -> NDArray[np.uint8]:
    """What the function makes of each of the 256 grey levels."""
    return np.frombuffer(function(GREY_LEVELS, *arguments).tobytes(), np.uint8)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value (K, C, H, W) by its entry in a table (K, 256) or (K, C, 256)."""
    tables = tables.byte().view(len(images), -1, 256).expand(-1, images.shape[1], -1)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Spread the values of each channel, so that they reach from 0 to 255."""
    lowest, highest = (values.double()[..., None] for values in images.flatten(2).aminmax(dim=2))
    levels = torch.arange(256, device=images.device)
    scale = highest.new_full((1,), 255) / (highest - lowest)  # a plain 255 would be multiplied by the reciprocal
    spread = (levels * scale + -lowest * scale).clamp_(0, 255)
    return look_up(images, torch.where(highest > lowest, spread, levels))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Spread the values of each channel, so that all are about equally frequent."""
    values = images.flatten(2).long()
    ones = values.new_ones(1, 1, 1).expand_as(values)
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, ones)
    of_highest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - of_highest) // 255
    below = counts.cumsum(dim=2) - counts
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return look_up(images, torch.where(step > 0, spread, torch.arange(256, device=images.device)))


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply the distance of every value from the image's mean grey level."""
    return blend(mean_level(grey(images)), images, factors)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply the distance of every value from the pixel's grey level."""
    return blend(grey(images), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply the distance of every value from the mean of its surroundings; the outermost pixels stay."""
    values = images.short()
    rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    values[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26  # the centre counts 5 times, so it is a mean of 13, rounded
    return blend(values, images, factors)


def grey(images: Tensor) -> Tensor:
    """Pillow's grey levels (K, 1, H, W): 0.299 red, 0.587 green and 0.114 blue, rounded, in whole numbers."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000) >> 16


def mean_level(levels: Tensor) -> Tensor:
    """The mean (K, 1, 1, 1) of grey levels (K, 1, H, W), rounded half up."""
    pixels = levels.shape[2] * levels.shape[3]
    return (levels.sum(dim=(1, 2, 3), keepdim=True) + pixels // 2) // pixels


def blend(plain: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Go from the plain images' values `factors` (K, 1) of the way to the images', or beyond them if above 1."""
    plain = plain.float()
    return ((images - plain) * factors.float().view(-1, 1, 1, 1) + plain).clamp_(0, 255).byte()


def resample(images: Tensor, numbers: Tensor, axes: str) -> Tensor:
    """Map images (K, C, H, W) by affine maps, with bicubic interpolation along `axes`: x, y or xy.

    `numbers` (K, 8 + C) hold, for x and then for y in the image, the factors of x and y in the result, a shift in
    pixels and the image's size; then the colour outside. Edges repeat; the cubic kernel's slope is -1 at a distance
    of 1.
    """
    height, width = images.shape[-2:]
    maps = numbers[:, :8].view(-1, 2, 4, 1, 1)
    x, y = (torch.arange(size, device=images.device) + 0.5 for size in (width, height))
    source = maps[:, :, 0] * x + maps[:, :, 1] * y[:, None] + maps[:, :, 2]  # (K, 2, H, W), x and y
    inside = ((source >= 0) & (source < maps[:, :, 3])).all(dim=1, keepdim=True)
    source -= 0.5
    nearest = source.floor()
    offsets = torch.arange(-1, 3, dtype=torch.int32, device=images.device).view(4, 1, 1)
    last = (maps[:, :, None, 3] - 1).int()
    places = torch.minimum((nearest.int()[:, :, None] + offsets).clamp_(min=0), last)
    weights = cubic_weights((source - nearest).float())
    x_taps, y_taps = (slice(None) if axis in axes else slice(1, 2) for axis in "xy")  # weights are 0, 1, 0, 0 else
    index = places[:, 1, y_taps, None] * width + places[:, 0, None, x_taps]  # (K, y taps, x taps, H, W)
    weight = weights[:, 1, y_taps, None] * weights[:, 0, None, x_taps]
    index = index.long().view(len(images), 1, -1).expand(-1, images.shape[1], -1)
    taps = images.flatten(2).gather(2, index).view(*images.shape[:2], -1, height, width)
    values = (taps * weight.view(len(images), 1, -1, height, width)).sum(dim=2) + ROUNDING
    return torch.where(inside, values.clamp_(0, 255).byte(), numbers[:, 8:, None, None].byte())


def cubic_weights(fraction: Tensor) -> Tensor:
    """The weights (K, 2, 4, H, W) of the four values around a place that lies this fraction beyond the second one."""
    rest = 1 - fraction
    product = fraction * rest
    inner, outer = 1 + product, -product
    return torch.stack([outer * rest, inner * rest, inner * fraction, outer * fraction], dim=2)


Rule = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, Rule] = {
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Contrast": contrast,
    "Color": color,
    "Sharpness": sharpness,
    "Rotate": partial(resample, axes="xy"),
    **dict.fromkeys(["Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness"], look_up),
    **dict.fromkeys(["ShearX", "TranslateXRel"], partial(resample, axes="x")),
    **dict.fromkeys(["ShearY", "TranslateYRel"], partial(resample, axes="y")),
}


Row = tuple[float, float, float]  # factors of x and y in the result, and a shift in pixels


def rotation(degrees: float, height: int, width: int) -> tuple[Row, Row]:
    """Anticlockwise around the centre, with Pillow's rounding."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (cos, sin, cos * -x + sin * -y + x), (-sin, cos, -sin * -x + cos * -y + y)


# From pixels of the result to those of the image: (argument, height, width) -> the rows for x and y.
MATRICES: dict[str, Callable[..., tuple[Row, Row]]] = {
    "Rotate": rotation,
    "ShearX": lambda factor, height, width: ((1, factor, 0), (0, 1, 0)),
    "ShearY": lambda factor, height, width: ((1, 0, 0), (factor, 1, 0)),
    "TranslateXRel": lambda fraction, height, width: ((1, 0, fraction * width), (0, 1, 0)),
    "TranslateYRel": lambda fraction, height, width: ((1, 0, 0), (0, 1, fraction * height)),
}
