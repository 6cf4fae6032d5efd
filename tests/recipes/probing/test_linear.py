"""The linear probe's grid, against a plain loop with a model and an optimizer for each head."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.probing import linear
from recipes.probing.config import ProbeConfig
from recipes.probing.linear import Stacked
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
    kinds, rates, every = [values, values[:, :3]], (0.01, 0.3), torch.arange(100)
    inputs = Stacked(kinds, kinds, CPU)
    weights = linear.fit(inputs, classes, every, 4, rates, epochs=3, seed=3)
    counts = iter(linear.right(weights, inputs, classes, every))
    for kind, features in enumerate(kinds):
        plain = (features - features.mean(dim=0)) / (features.std(dim=0) + 1e-6)
        for place, rate in enumerate(rates):
            layer = alone(plain, classes, 4, rate, epochs=3)
            own = weights[kind, :, place]
            assert torch.allclose(own[: plain.shape[1]], layer.weight.T, rtol=1e-4, atol=1e-6)
            assert not own[plain.shape[1] : -1].any()  # nothing grows where there are no features
            assert torch.allclose(own[-1], layer.bias, rtol=1e-4, atol=1e-6)
            assert next(counts) == int((layer(plain).argmax(dim=1) == classes).sum())


def test_features_that_do_not_fit_the_device_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    kinds, places = [values, values[:, :2]], torch.tensor([7, 0, 3])
    held = Stacked(kinds, kinds, CPU)[places]
    monkeypatch.setattr(linear, "free_bytes", lambda device: 0)
    assert torch.equal(Stacked(kinds, kinds, CPU)[places], held)


NEWER = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has fp32_precision from version 2.9 on"
)


@NEWER
@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize("older", ["highest", "high", "medium"])
def test_tf32_of_the_older_interface_is_put_back(older: str) -> None:
    products: Any = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision(older)
    before = products.fp32_precision
    with linear.tf32():
        assert products.fp32_precision == "tf32"
    assert (torch.get_float32_matmul_precision(), products.fp32_precision) == (older, before)


@NEWER
@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize("newer", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("place", [torch.backends, torch.backends.cuda.matmul], ids=["everything", "products"])
def test_tf32_of_the_newer_interface_is_put_back(newer: str, place: Any) -> None:
    """With "tf32" the older interface raises an error when it is read."""
    place.fp32_precision = newer
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    with pytest.raises(KeyError, match="stopped"), linear.tf32():
        assert products.fp32_precision == "tf32"
        raise KeyError("stopped")
    assert (place.fp32_precision, products.fp32_precision) == (newer, before)


@pytest.mark.usefixtures("precisions")
def test_tf32_is_put_back_in_torch_without_the_newer_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    torch.set_float32_matmul_precision("medium")
    with linear.tf32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.gpu
@NEWER
@pytest.mark.usefixtures("precisions")
@pytest.mark.parametrize("newer", ["ieee", "tf32"])
def test_a_gpu_fits_heads_in_programs_that_use_the_newer_interface(newer: str) -> None:
    torch.backends.fp32_precision = newer  # type: ignore[misc]
    device = torch.device("cuda")
    values, classes = clusters(100, 4, 6, distance=9, seed=1)
    inputs, every = Stacked([values], [values], device), torch.arange(100, device=device)
    weights = linear.fit(inputs, classes.to(device), every, 4, [0.1], epochs=3, seed=3)
    assert linear.right(weights, inputs, classes.to(device), every) == [100]


def test_the_whole_grid_takes_as_many_operators_as_one_head() -> None:
    """On a GPU small models' steps take as long as launching them, so this keeps the grid as fast as one head."""

    class Counted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operators = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            return function(*args, **(kwargs or {}))

    values, classes = clusters(100, 4, 6, distance=9, seed=1)
    every, counts = torch.arange(100), []
    for kinds, rates in ((1, [0.1]), (4, linear.RATES)):
        inputs = Stacked([values] * kinds, [values] * kinds, CPU)
        with Counted() as counted:
            linear.fit(inputs, classes, every, 4, rates, epochs=3, seed=3)
        counts.append(counted.operators)
    assert counts[0] == counts[1] > 0


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


def test_what_the_training_images_alone_tell_is_not_chosen() -> None:
    """Enough columns of noise tell every training image, but no other one."""
    classes = torch.arange(300) % 3
    noise = torch.randn(300, 600, generator=torch.Generator().manual_seed(0))
    told = torch.zeros(300, 600)
    told[:, :3] = nn.functional.one_hot(torch.where(torch.arange(300) % 7 > 0, classes, classes.roll(1)))  # mostly
    train = extracted(classes, 600, token=noise, average=told)
    [score] = linear.score(train, train, ProbeConfig(linear_epochs=20), CPU)
    assert score.features in ("average", "average_last4") and 80 < score.top1 < 90  # six sevenths


def test_scored_features_have_the_scale_of_the_training_images() -> None:
    """Images of one class would look like an average image by their own mean and deviation."""
    values, classes = clusters(300, 3, 5, distance=9, seed=1)
    test = extracted(classes[classes == 1], 5, pooled=values[classes == 1])
    [score] = linear.score(extracted(classes, 5, pooled=values), test, ProbeConfig(linear_epochs=5), CPU)
    assert score.top1 == 100


def test_a_model_without_blocks_has_its_pooled_features() -> None:
    values, classes = clusters(60, 3, 5, distance=9, seed=1)
    [score] = linear.score(*2 * [extracted(classes, 5, pooled=values)], ProbeConfig(linear_epochs=5), CPU)
    assert (score.features, score.top1) == ("pooled", 100)
