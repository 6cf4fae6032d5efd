"""Where pictures come from."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_TEST_IMAGES = 360
SPLIT_SEED = 0  # fixed: a run's seed must not move pictures between training and test


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures of one split: values in 0..1, (N, C, H, W), and class indices, (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        return self.images[index], int(self.labels[index]), str(index)


@dataclass(frozen=True)
class Source:
    """A data set: its two splits, the classes in index order and the statistics for normalisation."""

    train: Pictures
    test: Pictures
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 1


def open_source(config: DataConfig, labels_needed: bool) -> Source:
    """Load what ``data.source`` names.

    Raises:
        ValueError: If no source has this name.
    """
    if config.source != "digits":
        raise ValueError(f"unknown data.source {config.source!r}; allowed: digits")
    return _load_digits()


def _load_digits() -> Source:
    """1,797 handwritten digits, 8x8 grey: 1,437 to train, 360 held out, each class in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # stored as counts 0..16
    labels = torch.from_numpy(digits.target).long()
    everything = np.arange(len(labels))
    train, test = train_test_split(
        everything, test_size=DIGITS_TEST_IMAGES, stratify=digits.target, random_state=SPLIT_SEED
    )
    std, mean = torch.std_mean(images[train])
    return Source(
        train=Pictures(images[train], labels[train]),
        test=Pictures(images[test], labels[test]),
        class_names=DIGIT_NAMES,
        mean=(mean.item(),),
        std=(std.item(),),
    )
