"""Few-shot: the nearest class mean of a few labelled images, SimpleShot's rule (arXiv:1911.04623).

The mean of all training features, which needs no labels, is subtracted from every feature, and the result is scaled to
length one.
"""

import math

import torch
from scipy.stats import t
from torch import Tensor
from torch.nn import functional as F

from recipes.data.labels import drawn
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.scores import CONFIDENCE, Features, Score

LABELS = (1, 5, 10)  # labelled images of each class
DRAWS = 5


def score(train: Extracted, test: Extracted, config: ProbeConfig, device: torch.device) -> list[Score]:
    """Score each number of labels that some class has: the mean of five draws, with its Student's interval."""
    known, asked = (part.of(config.features).to(device) for part in (train, test))
    mean = known.values.mean(dim=0)
    known, asked = (part._replace(values=F.normalize(part.values - mean, dim=1)) for part in (known, asked))
    most, scores = int(known.classes.bincount().max()), []
    for labels in (labels for labels in LABELS if labels <= most):
        figures = torch.tensor([top1(known.rows(drawn(known.classes, labels, s)), asked) for s in seeds(config.seed)])
        middle, half = figures.mean().item(), half_width(figures)
        ends = max(0.0, middle - half), min(100.0, middle + half)
        scores.append(Score("few_shot", config.features, {"labels": labels, "draws": DRAWS}, middle, *ends))
    return scores


def seeds(seed: int) -> range:
    """The seeds of the draws, which differ from those of any other `seed`."""
    return range(DRAWS * seed, DRAWS * (seed + 1))


def half_width(figures: Tensor) -> float:
    """Half the width of the 95% interval of the mean of independent figures."""
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(figures) - 1))
    return quantile * figures.std().item() / math.sqrt(len(figures))


def top1(known: Features, asked: Features) -> float:
    """Top-1 in percent, where the nearest class mean decides."""
    present, places, counts = known.classes.unique(return_inverse=True, return_counts=True)
    sums = known.values.new_zeros(len(present), known.values.shape[1]).index_add_(0, places, known.values)
    means = sums / counts[:, None]
    nearness = asked.values @ means.T - means.square().sum(dim=1) / 2  # ranks as the distance does
    return 100 * (present[nearness.argmax(dim=1)] == asked.classes).double().mean().item()
