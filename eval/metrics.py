"""Label maths of the scores, without any reading or writing: ranks, masks, label sets, calibration, intervals."""

import json
import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import timm.data
import torch
from timm.data import ImageNetInfo

TOP = 5
CALIBRATION_BINS = 15
WILSON_Z = 1.959963984540054  # 95% of a normal distribution lie within so many standard deviations
SUBSETS = ("a", "r")  # sets that have 200 of the 1000 classes


class Ranks(NamedTuple):
    """The most probable classes of some pictures: (N, 5) class indices, best first, and (N,) probability of the best.

    Fewer than five classes leave -1 at the end; a row of -1 is a picture whose logits are not numbers.
    """

    classes: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class Score:
    """Accuracy of one set: counts are exact, the rest is in percent."""

    n: int
    correct1: int
    correct5: int
    ece: float

    @property
    def top1(self) -> float:
        return percent(self.correct1, self.n)

    @property
    def top5(self) -> float:
        return percent(self.correct5, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of top-1."""
        return wilson(self.correct1, self.n)


def percent(part: int, whole: int) -> float:
    """NaN where there is nothing to count."""
    return 100 * part / whole if whole else math.nan


def rank(logits: torch.Tensor, subset: Sequence[int] | None = None) -> Ranks:
    """(N, classes) logits -> the best classes; with a subset, only its classes are candidates, before the argmax.

    Equal logits rank by class index, so that no batch size or device changes a tie.
    """
    candidates = logits.float()
    if subset is not None:
        candidates = candidates[:, torch.as_tensor(subset, device=logits.device)]
    confidence = candidates.softmax(dim=1).amax(dim=1).cpu().numpy()
    order = candidates.argsort(dim=1, descending=True, stable=True)[:, :TOP].cpu().numpy()
    classes = order if subset is None else np.asarray(subset)[order]
    out = np.full((len(logits), TOP), -1, dtype=np.int32)
    out[:, : classes.shape[1]] = classes
    broken = logits.isnan().any(dim=1).cpu().numpy()
    out[broken], confidence[broken] = -1, 0
    return Ranks(out, confidence)


def hits(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, 5) ranked classes and (N,) labels -> (N, 5) booleans: the class at this rank is right."""
    return classes == labels[:, None]


def hits_of_sets(classes: np.ndarray, label_sets: Sequence[Sequence[int]]) -> np.ndarray:
    """As `hits`, for pictures with several right classes; none is right where the set is empty."""
    return np.array([[c in labels for c in row] for row, labels in zip(classes, label_sets, strict=True)]).reshape(
        len(classes), TOP
    )


def score(right: np.ndarray, confidence: np.ndarray) -> Score:
    """(N, 5) hits and (N,) confidences -> counts and calibration error."""
    return Score(
        n=len(right),
        correct1=int(right[:, 0].sum()),
        correct5=int(right.any(axis=1).sum()),
        ece=expected_calibration_error(confidence, right[:, 0]),
    )


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Mean distance, in points, of confidence from accuracy over bins of equal width, by pictures in the bin."""
    if not len(confidence):
        return math.nan
    # bins are open below and closed above, as in Guo et al. 2017
    places = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=confidence.astype(np.float64) - correct.astype(np.float64), minlength=bins)
    return float(100 * np.abs(gaps).sum() / len(confidence))


def wilson(correct: int, n: int, z: float = WILSON_Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent."""
    if n == 0:
        return math.nan, math.nan
    share, square = correct / n, z * z / n
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / n + square / n / 4) / (1 + square)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The 1000 classes in index order, from timm's list."""
    return tuple(ImageNetInfo().label_names())


@cache
def subset_indices(name: str) -> tuple[int, ...]:
    """The 200 of the 1000 class indices that ImageNet-A ('a') or ImageNet-R ('r') has, from timm's lists."""
    data = pkgutil.get_data(timm.data.__name__, f"_info/imagenet_{name}_indices.txt")
    return tuple(int(line) for line in (data or b"").split())


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """Right classes of ILSVRC2012_val_00000001 ... 00050000, from timm's list; 3,163 of them have none."""
    data = pkgutil.get_data(timm.data.__name__, "_info/imagenet_real_labels.json")
    return tuple(map(tuple, json.loads(data or b"[]")))
