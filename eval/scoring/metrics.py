"""The arithmetic of scores: ranks, hits, calibration, intervals."""

import math
from collections.abc import Sequence

import numpy as np
import torch

TOP = 5
NO_CLASS = -2  # fills up the rows of images that have fewer right classes than others
BINS = 15  # of the calibration error
WILSON_Z = 1.959963984540054  # 95% of a normal distribution lies within so many standard deviations


def rank(logits: torch.Tensor, subset: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(N, classes) logits -> (N, 5) most probable classes, best first, and (N,) probability of the best.

    With a subset, only its classes are candidates. Equal logits rank by class index, so that neither batch size nor
    device changes a tie. Fewer than five classes leave -1 at the end; an image whose logits are not numbers, or have
    overflowed to infinity, has -1 everywhere.
    """
    indices = np.arange(logits.shape[1]) if subset is None else np.asarray(subset)
    candidates = logits.float()[:, torch.as_tensor(indices, device=logits.device)]
    confidence = candidates.softmax(dim=1).amax(dim=1).cpu().numpy()
    order = candidates.argsort(dim=1, descending=True, stable=True)[:, :TOP].cpu().numpy()
    out = np.full((len(logits), TOP), -1, dtype=np.int32)
    out[:, : order.shape[1]] = indices[order]
    broken = logits.isnan().any(dim=1).cpu().numpy() | np.isnan(confidence)  # as the probability of infinity is
    out[broken], confidence[broken] = -1, 0
    return out, confidence


def score(classes: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Figures in percent for N images from `rank`, whose right classes are (N, K), filled up with NO_CLASS."""
    hits = (classes[:, :, None] == right[:, None, :]).any(axis=2)
    n, correct = len(hits), int(hits[:, 0].sum())
    top1, top5 = (100 * int(count) / n if n else math.nan for count in (correct, hits.any(axis=1).sum()))
    low, high = wilson(correct, n)
    ece = expected_calibration_error(confidence, hits[:, 0])
    return {"n": n, "top1": top1, "top5": top5, "top1_low": low, "top1_high": high, "ece": ece}


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean distance, in points, of confidence (N,) and accuracy over bins of equal width, weighted by their images."""
    if not len(confidence):
        return math.nan
    # bins are open below and closed above, as in Guo et al. 2017
    places = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(places, weights=confidence.astype(np.float64) - correct.astype(np.float64), minlength=BINS)
    return float(100 * np.abs(gaps).sum() / len(confidence))


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent."""
    if n == 0:
        return math.nan, math.nan
    fraction, square = correct / n, WILSON_Z**2 / n
    centre = (fraction + square / 2) / (1 + square)
    half = WILSON_Z * math.sqrt(fraction * (1 - fraction) / n + square / n / 4) / (1 + square)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
