"""The features that protocols take, and the scores that they give."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from scipy.stats import binomtest
from torch import Tensor

from arm_zoo.heads.attentive import AttentiveClassifier

CONFIDENCE = 0.95
HELD_OUT = 0.1  # fraction of the training images to choose settings on
COLUMNS = ("protocol", "features", "settings", "top1", "low", "high")  # of a score in tables


class Features(NamedTuple):
    """Features of one split, (N, ...), and the class indices, (N,)."""

    values: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Self:
        return self._replace(values=self.values.to(device), classes=self.classes.to(device))

    def rows(self, places: Tensor) -> Self:
        """The features of the images at `places`."""
        return self._replace(values=self.values[places], classes=self.classes[places])

    @property
    def number(self) -> int:
        """The number of classes, as far as these images have them."""
        return int(self.classes.max()) + 1


@dataclass(frozen=True)
class Score:
    """A score of a protocol: top-1 in percent, with the ends of its 95% interval."""

    protocol: str
    features: str
    settings: dict[str, Any]
    top1: float
    low: float
    high: float
    head: AttentiveClassifier | None = None  # the trained head, if it can be exported

    @classmethod
    def of_images(
        cls,
        protocol: str,
        features: str,
        settings: dict[str, Any],
        right: int,
        images: int,
        head: AttentiveClassifier | None = None,
    ) -> Self:
        """The score for so many correctly classified images; the interval is Wilson's."""
        ends = binomtest(right, images).proportion_ci(CONFIDENCE, "wilson")
        top1, low, high = (100 * float(part) for part in (right / images, ends.low, ends.high))
        return cls(protocol, features, settings, top1, low, high, head)

    def row(self) -> dict[str, Any]:
        """The row of this score in a table."""
        setting = ", ".join(f"{name}={value:g}" for name, value in self.settings.items())
        return {**{name: getattr(self, name) for name in COLUMNS}, "settings": setting}


def held_out(classes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split images at random: the places of HELD_OUT, at least one, to choose settings on, and of all others."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).to(classes.device)
    chosen_on, kept = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
    return chosen_on, kept
