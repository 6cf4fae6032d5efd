"""Linear probe: linear classifiers of several features and learning rates, all trained in one pass.

The grid is DINOv2's (arXiv:2304.07193, section A.1): learning rates, one block or the last four, class token or
average of the patches. Only the rates are others, as features are standardised here. The best of the grid is chosen on
a tenth of the training images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recipes.data.cache import free_bytes
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.scores import Score, held_out

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
GRID = ("token", "average", "token_last4", "average_last4")
BATCH = 256
MADE_AT_ONCE = 4096
MOMENTUM = 0.9


class Stacked:
    """Several kinds of features of the same images, each (N, D) with a D of its own, as one tensor to multiply.

    The tensor is (kinds, N, width), its width a multiple of 8 above the widest D, for tensor cores. A row has the
    features, standardised by the training's mean and deviation, then zeros, whose weights stay zero, and last a one,
    whose weights are the biases.
    """

    def __init__(self, features: Sequence[Tensor], like: Sequence[Tensor], device: torch.device) -> None:
        self._features, self._device, self._made = features, device, None
        self._statistics = [torch.std_mean(values, dim=0) for values in like]
        images = len(features[0])
        self.shape = (len(features), images, 8 * (max(values.shape[1] for values in features) // 8 + 1))
        if 4 * math.prod(self.shape) < free_bytes(device) / 2:  # else rows are made when they are needed
            parts = [self._rows(places) for places in torch.arange(images).split(MADE_AT_ONCE)]
            self._made = torch.cat(parts, dim=1)

    def __getitem__(self, places: Tensor) -> Tensor:
        return self._rows(places.to(self._features[0].device)) if self._made is None else self._made[:, places]

    def _rows(self, places: Tensor) -> Tensor:
        kinds, _, width = self.shape
        rows = torch.zeros(kinds, len(places), width)
        rows[..., -1] = 1
        for row, values, (std, mean) in zip(rows, self._features, self._statistics, strict=True):
            row[:, : values.shape[1]] = (values[places] - mean) / (std + 1e-6)
        return rows.to(self._device)


def score(train: Extracted, test: Extracted, config: ProbeConfig, device: torch.device) -> list[Score]:
    """Score the head that is best on the held-out images, after training it anew on all training images."""
    names = [name for name in GRID if name in train.names] or ["pooled"]
    parts = {name: (train.of(name), test.of(name)) for name in names}
    classes, answers = (part.classes.to(device) for part in parts[names[0]])
    number = parts[names[0]][0].number
    values = [parts[name][0].values for name in names]
    inputs = Stacked(values, values, device)
    chosen_on, kept = held_out(classes, config.seed)
    weights = fit(inputs, classes, kept, number, RATES, config.linear_epochs, config.seed)
    counts = right(weights, inputs, classes, chosen_on)
    kind, place = divmod(counts.index(max(counts)), len(RATES))
    best, rate = [values[kind]], RATES[place]
    inputs, every = Stacked(best, best, device), torch.arange(len(classes), device=device)
    weights = fit(inputs, classes, every, number, [rate], config.linear_epochs, config.seed)
    tests = Stacked([parts[names[kind]][1].values], best, device)
    [count] = right(weights, tests, answers, torch.arange(len(answers), device=device))
    settings = {"rate": rate, "epochs": config.linear_epochs}
    return [Score.of_images("linear", names[kind], settings, count, len(answers))]


def fit(
    inputs: Stacked, classes: Tensor, places: Tensor, number: int, rates: Sequence[float], epochs: int, seed: int
) -> Tensor:
    """Train all heads at once: weights (kinds, width, rates, `number` of classes).

    They train on the images at `places`, by SGD with momentum and cosine decay, start at zero and see the same
    batches, so that each ends as it would alone. The gradient of a cross entropy by the logits is the probabilities
    minus the answers, so that a step of all heads is two matrix products. A GPU makes them of numbers rounded to TF32
    (11 bits), on its tensor cores.
    """
    kinds, _, width = inputs.shape
    each = torch.tensor(rates, device=classes.device).repeat_interleave(number)
    weights = torch.zeros(kinds, width, len(each), device=classes.device)
    momenta, minus_one = torch.zeros_like(weights), weights.new_tensor(-1.0)
    generator = torch.Generator().manual_seed(seed)
    step, steps = 0, epochs * -(-len(places) // BATCH)
    with tf32() if classes.device.type == "cuda" else nullcontext():
        for _ in range(epochs):
            order = places[torch.randperm(len(places), generator=generator).to(places.device)]
            for batch in order.split(BATCH):
                values = inputs[batch]
                errors = (values @ weights).unflatten(2, (len(rates), number)).softmax(dim=3)
                answers = classes[batch].view(1, -1, 1, 1).expand(kinds, -1, len(rates), 1)
                errors.scatter_add_(3, answers, minus_one.expand_as(answers))
                momenta.baddbmm_(values.mT, errors.flatten(2), beta=MOMENTUM, alpha=1 / len(batch))
                weights.addcmul_(momenta, each, value=-(1 + math.cos(math.pi * step / steps)) / 2)
                step += 1
    return weights.unflatten(2, (len(rates), number))


@contextmanager
def tf32() -> Iterator[None]:
    """Let a GPU's matrix products round their inputs to TF32.

    From version 2.9 on torch has `fp32_precision`. Once a program has set that, the older interface cannot be read.
    """
    products: Any = torch.backends.cuda.matmul
    is_newer = hasattr(products, "fp32_precision")
    before = products.fp32_precision if is_newer else torch.get_float32_matmul_precision()
    change: Callable[[str], None] = torch.set_float32_matmul_precision
    if is_newer:
        change = partial(setattr, products, "fp32_precision")
    change("tf32" if is_newer else "high")
    try:
        yield
    finally:
        change(before)


def right(weights: Tensor, inputs: Stacked, classes: Tensor, places: Tensor) -> list[int]:
    """How many of the images at `places` each head classifies correctly, all rates of the first kind first."""
    total = torch.zeros(weights.shape[0], weights.shape[2], dtype=torch.long, device=classes.device)
    for batch in places.split(MADE_AT_ONCE):
        chosen = (inputs[batch] @ weights.flatten(2)).unflatten(2, weights.shape[2:]).argmax(dim=3)
        total += (chosen == classes[batch, None]).sum(dim=1)
    return total.flatten().tolist()
