"""Logistic regression on features of length one, as in DINOv2 (arXiv:2304.07193); held-out images choose C."""

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.scores import Features, Score, held_out

GRID = tuple(10.0**power for power in range(-6, 6))  # values of C: DINOv2's range, a quarter as fine
MOST_STEPS = 300  # of L-BFGS for each C, from the solution for the C before
IMAGES_AT_ONCE = 65_536  # their logits take 250 MiB for a thousand classes


def score(train: Extracted, test: Extracted, config: ProbeConfig, device: torch.device) -> list[Score]:
    """Of the C that is best on the held-out images, with all training images."""
    fitted, scored = (unit_length(part.of(config.features).to(device)) for part in (train, test))
    number = fitted.number
    chosen_on, kept = (fitted.rows(places) for places in held_out(fitted.classes, config.seed))
    parameters, counts = torch.zeros(number, fitted.values.shape[1] + 1, device=device), []
    for strength in GRID:
        parameters = fit(kept, strength, parameters)
        counts.append(right(parameters, chosen_on))
    best = GRID[counts.index(max(counts))]
    count = right(fit(fitted, best, torch.zeros_like(parameters)), scored)
    return [Score.of_images("logistic", config.features, {"C": best}, count, len(scored.classes))]


def unit_length(features: Features) -> Features:
    return features._replace(values=F.normalize(features.values, dim=1))


def fit(features: Features, strength: float, start: Tensor) -> Tensor:
    """Minimise the loss from `start` on; gives weights (classes, D + 1) with the bias as last column.

    The loss is scikit-learn's, C (`strength`) times the sum of cross entropies plus half the squared weights without
    biases, divided by C and the number of images, so that tolerances mean the same for all.
    """
    parameters = start.clone().requires_grad_()
    images = len(features.classes)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=MOST_STEPS,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = parameters[:, :-1].square().sum() / (2 * strength * images)
        total.backward()
        for values, classes in zip(
            features.values.split(IMAGES_AT_ONCE), features.classes.split(IMAGES_AT_ONCE), strict=True
        ):
            part = F.cross_entropy(logits_of(parameters, values), classes, reduction="sum") / images
            part.backward()
            total = total.detach() + part.detach()
        return total

    optimizer.step(loss)
    return parameters.detach()


def logits_of(parameters: Tensor, values: Tensor) -> Tensor:
    """(N, D) -> (N, classes)."""
    return torch.addmm(parameters[:, -1], values, parameters[:, :-1].T)


def right(parameters: Tensor, features: Features) -> int:
    """The number of images that are classified correctly."""
    parts = features.values.split(IMAGES_AT_ONCE)
    chosen = torch.cat([logits_of(parameters, values).argmax(dim=1) for values in parts])
    return int((chosen == features.classes).sum())
