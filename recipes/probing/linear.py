"""Linear probe: linear classifiers of several features and learning rates, all trained in one pass.

The grid is DINOv2's (arXiv:2304.07193, section A.1) but for its rates, as features are standardised here: learning
rates, one block or the last four, class token or average of the patches. A tenth of the training images chooses.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.data.cache import free_bytes
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.scores import Score, held_out

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
GRID = ("token", "average", "token_last4", "average_last4")
BATCH = 256
SCORED_AT_ONCE = 4096
HELD_OUT = 0.1  # of the training images, to choose on
MOMENTUM = 0.9


class Head(NamedTuple):
    """A point of the grid: a key of `outputs.FEATURES` and a learning rate."""

    features: str
    rate: float


class Standardised:
    """Features (N, D) with the mean and deviation of the training's taken out of each batch."""

    def __init__(self, values: Tensor, like: Tensor, device: torch.device) -> None:
        fits = values.nbytes < free_bytes(device) / 2
        self._values = values.to(device) if fits else values  # else rows are copied as they are needed
        self._std, self._mean = (x.to(device) for x in torch.std_mean(like, dim=0))

    def __getitem__(self, places: Tensor) -> Tensor:
        rows = self._values[places.to(self._values.device)].to(self._mean.device)
        return (rows - self._mean) / (self._std + 1e-6)

    @property
    def width(self) -> int:
        return self._values.shape[1]


Fitted = Mapping[str, tuple[Tensor, Tensor]]  # features -> weights (heads, classes, D) and biases (heads, classes)


def score(train: Extracted, test: Extracted, config: ProbeConfig, device: torch.device) -> list[Score]:
    """Of the head that is best on the held-out images, trained anew on all."""
    names = [name for name in GRID if name in train.names] or ["pooled"]
    parts = [{name: part.of(name) for name in names} for part in (train, test)]
    inputs, tests = (
        {name: Standardised(part[name].values, parts[0][name].values, device) for name in names} for part in parts
    )
    classes, answers = (part[names[0]].classes.to(device) for part in parts)
    number = parts[0][names[0]].number
    chosen_on, kept = held_out(classes, HELD_OUT, config.seed)
    heads = [Head(name, rate) for name in names for rate in RATES]
    fitted = fit(inputs, classes, kept, number, heads, config.linear_epochs, config.seed)
    counts = right(fitted, inputs, classes, chosen_on)
    best = heads[counts.index(max(counts))]
    every = torch.arange(len(classes), device=device)
    fitted = fit(inputs, classes, every, number, [best], config.linear_epochs, config.seed)
    [count] = right(fitted, tests, answers, torch.arange(len(answers), device=device))
    settings = {"rate": best.rate, "epochs": config.linear_epochs}
    return [Score.of_images("linear", best.features, settings, count, len(answers))]


def fit(
    inputs: Mapping[str, Standardised],
    classes: Tensor,
    places: Tensor,
    number: int,
    heads: Sequence[Head],
    epochs: int,
    seed: int,
) -> Fitted:
    """Train heads for `number` classes on the images at `places`, each as it would be alone: SGD, cosine decay.

    All start at zero and see the same batches. Each weight is held over the root of its head's rate: steps of one
    size are then steps of that rate, so that the heads of the same features are one matrix to multiply by.
    """
    device = classes.device
    rates = defaultdict(list)
    for head in heads:
        rates[head.features].append(head.rate)
    scales = {name: torch.tensor(own, device=device).sqrt() for name, own in rates.items()}
    weights = {
        name: torch.zeros(len(own), number, inputs[name].width, device=device, requires_grad=True)
        for name, own in rates.items()
    }
    biases = {name: torch.zeros(len(own), number, device=device, requires_grad=True) for name, own in rates.items()}
    optimizer = torch.optim.SGD([*weights.values(), *biases.values()], lr=1.0, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(places) // BATCH))
    generator = torch.Generator().manual_seed(seed)

    def scaled(name: str) -> tuple[Tensor, Tensor]:
        return scales[name][:, None, None] * weights[name], scales[name][:, None] * biases[name]

    for _ in range(epochs):
        order = places[torch.randperm(len(places), generator=generator).to(device)]
        for batch in order.split(BATCH):
            losses = []
            for name, scale in scales.items():
                logits = logits_of(inputs[name][batch], *scaled(name))
                answers = classes[batch].repeat_interleave(len(scale))
                losses.append(F.cross_entropy(logits.flatten(0, 1), answers, reduction="sum") / len(batch))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # independent of each other
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return {name: scaled(name) for name in scales}


def logits_of(values: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """(N, D) -> (N, heads, classes)."""
    return (values @ weights.flatten(0, 1).T).unflatten(1, biases.shape) + biases


def right(fitted: Fitted, inputs: Mapping[str, Standardised], classes: Tensor, places: Tensor) -> list[int]:
    """How many of the images at `places` each head gets right, in the order of `fitted`."""
    counts = []
    for name, (weights, biases) in fitted.items():
        total = torch.zeros(len(biases), dtype=torch.long, device=classes.device)
        for batch in places.split(SCORED_AT_ONCE):
            chosen = logits_of(inputs[name][batch], weights, biases).argmax(dim=2)
            total += (chosen == classes[batch, None]).sum(dim=0)
        counts += total.tolist()
    return counts
