"""The GPU's part of the data path on a CPU, by what gives the same images there."""

import ctypes
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from arm_zoo.images.decode import UndecodableImage, decode_tensor, jpeg_decoder
from recipes.data import finishing, gpu_decode, loader
from recipes.data.resample import RaggedImages
from recipes.data.transforms import Normalisation, cropped


def decode(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """torchcodec's decoder of the CPU; without one that fits this torch, Pillow's."""
    decoded = jpeg_decoder() or partial(decode_tensor, name="")
    images: list[Tensor | None] = []
    for file in encoded:
        try:
            images.append(decoded(file.numpy().tobytes()))
        except (RuntimeError, UndecodableImage):
            images.append(None)
    return images


def at(images: RaggedImages) -> Iterator[Tensor]:
    """The images at these addresses."""
    numbers = zip(images.addresses.tolist(), images.sizes.tolist(), images.strides.tolist(), strict=True)
    for address, size, strides in numbers:
        shape = (images.channels, *size)
        length = 1 + sum(stride * (count - 1) for stride, count in zip(strides, shape, strict=True))
        content = torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)
        yield content.as_strided(shape, strides)


def crop_resize(
    images: RaggedImages,
    boxes: Tensor,
    flips: Tensor,
    size: tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    interpolation: InterpolationMode,
    windows: Tensor | None = None,
) -> Tensor:
    """torchvision's."""
    numbers = [[*size, 0, 0]] * len(boxes) if windows is None else windows.tolist()
    parts = []
    for image, box, (height, width, top, left) in zip(at(images), boxes.tolist(), numbers, strict=True):
        resized = cropped(image, tuple(box), (height, width), interpolation)
        parts.append(resized[:, top : top + size[0], left : left + size[1]])
    crops = torch.stack([part.flip(-1) if flip else part for part, flip in zip(parts, flips.tolist(), strict=True)])
    return crops if mean is None or std is None else Normalisation(mean, std, crops.device)(crops)


def stand_in_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loaders go the ways of `data.decode=gpu` and `data.cache=gpu` on the CPU."""
    monkeypatch.setattr(
        loader, "decodes_on_gpu", lambda decode, device, no_window=None: decode != "cpu" and no_window is None
    )
    monkeypatch.setattr(gpu_decode, "decode", decode)
    monkeypatch.setattr(finishing, "crop_resize", crop_resize)
    monkeypatch.setattr(loader, "keeps_on_gpu", lambda cache, device: cache == "gpu")
