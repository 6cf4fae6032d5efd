"""Random erasing of batches: rectangles become noise, for each image the same in any batch."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def erase(images: Tensor, rectangles: NDArray[np.int32], seeds: NDArray[np.int64]) -> None:
    """Fill a rectangle of each normalised image (N, C, H, W) with noise of mean 0 and deviation 1, in place.

    `rectangles` (N, 4) are top, left, height and width in pixels, with height 0 where nothing is erased. The noise of
    an image follows from its seed, but differs between GPUs and CPUs. The host does not wait for the device.
    """
    generator = torch.Generator(images.device)
    for place in np.flatnonzero(rectangles[:, 2]):
        top, left, height, width = rectangles[place].tolist()
        part = images[place, :, top : top + height, left : left + width]
        generator.manual_seed(int(seeds[place]))
        part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype, device=part.device))
