"""A data set, opened."""

from dataclasses import dataclass
from typing import TypeAlias

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from arm_zoo.images.tables import ImageTable
from recipes.data.streams import ImageStream

Split: TypeAlias = ImageTable | ImageStream


@dataclass(frozen=True)
class Source:
    """A data set."""

    train: Split
    test: Split | None  # None where labels are not asked for and there are no images to score on
    class_names: tuple[str, ...]  # in index order; empty if labels were not asked for
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # of each channel, values in 0..1, for normalisation
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    held_out: float | None = None  # the fraction of the training images that `test` was made of, if it was

    @property
    def channels(self) -> int:
        """Channels of the images: 3, or 1 for grey images."""
        return len(self.mean)

    def in_unit_range(self, images: Tensor) -> Tensor:
        """Undo the normalisation of its images (N, C, H, W): pixels in 0..1."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)
