"""The linear probe's grid, against a plain loop with a model and an optimizer for each head."""

import pytest
import torch
from torch import Tensor, nn

from recipes.probing import linear
from recipes.probing.config import ProbeConfig
from recipes.probing.linear import Head, Standardised
from tests.helpers.probing import clusters, extracted

CPU = torch.device("cpu")


def alone(values: Tensor, classes: Tensor, number: int, rate: float, epochs: int) -> nn.Linear:
    """One head, by PyTorch's own parts."""
    layer = nn.Linear(values.shape[1], number)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    steps = epochs * -(-len(values) // linear.BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(3)
    for _ in range(epochs):
        for batch in torch.randperm(len(values), generator=generator).split(linear.BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(values[batch]), classes[batch]).backward()
            optimizer.step()
            schedule.step()
    return layer


def test_the_grid_in_one_pass_is_each_head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BATCH", 16)
    values, classes = clusters(100, 4, 6, distance=0.3, seed=1)
    inputs = {"token": Standardised(values, values, CPU), "average": Standardised(values[:, :3], values[:, :3], CPU)}
    heads = [Head(name, rate) for name in inputs for rate in (0.01, 0.3)]
    fitted = linear.fit(inputs, classes, torch.arange(100), 4, heads, epochs=3, seed=3)
    counts = linear.right(fitted, inputs, classes, torch.arange(100))
    for place, (name, rate) in enumerate(heads):
        plain = inputs[name][torch.arange(100)]
        layer = alone(plain, classes, 4, rate, epochs=3)
        weights, biases = fitted[name]
        assert torch.allclose(weights[place % 2], layer.weight, rtol=1e-4, atol=1e-6)
        assert torch.allclose(biases[place % 2], layer.bias, rtol=1e-4, atol=1e-6)
        assert counts[place] == int((layer(plain).argmax(dim=1) == classes).sum())


def test_the_best_features_are_chosen_without_the_test_images() -> None:
    """Of noise and features, at scales that differ by far: the average's first column tells the classes."""
    classes = torch.arange(300) % 3
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    told = noise.clone()
    told[:, 0] = 1e3 + 1e-2 * classes
    train = extracted(classes, 4, token=noise, average=told)
    wrong = extracted(classes.roll(1), 4, token=noise, average=told)  # as if the test's classes were others
    config = ProbeConfig(linear_epochs=8)
    [score] = linear.score(train, train, config, CPU)
    assert score.features in ("average", "average_last4") and score.top1 == 100 and score.low > 98
    [other] = linear.score(train, wrong, config, CPU)
    assert (other.features, other.settings, other.top1) == (score.features, score.settings, 0)


def test_a_model_without_blocks_has_its_pooled_features() -> None:
    values, classes = clusters(60, 3, 5, distance=9, seed=1)
    [score] = linear.score(*2 * [extracted(classes, 5, pooled=values)], ProbeConfig(linear_epochs=5), CPU)
    assert (score.features, score.top1) == ("pooled", 100)
