"""k-NN by hand, and against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from recipes.probing import knn
from recipes.probing.scores import Features


def at(*degrees: float) -> torch.Tensor:
    """Features on a circle; the radius, which must not matter, grows."""
    return torch.tensor(
        [[math.cos(math.radians(d)) * (n + 1), math.sin(math.radians(d)) * (n + 1)] for n, d in enumerate(degrees)]
    )


def test_knn_by_hand() -> None:
    train = Features(at(0, 20, 24, 90), torch.tensor([2, 1, 1, 0]))
    # From 8 degrees: cos 8 = 0.990 for class 2, cos 12 + cos 16 = 0.978 and 0.961 for class 1.
    test = Features(at(8), torch.tensor([2]))
    assert top1(train, test, neighbours=1, temperature=0.07) == 100
    votes = [math.exp(0.99027 / 0.07), math.exp(0.97815 / 0.07) + math.exp(0.96126 / 0.07)]
    assert votes[1] > votes[0]  # so with three neighbours the two others win, unless the temperature is low
    assert top1(train, test, neighbours=3, temperature=0.07) == 0
    assert top1(train, test, neighbours=3, temperature=0.005) == 100
    assert top1(train, test, neighbours=50, temperature=0.07) == 0  # more than there are
    both = Features(at(8, 22), torch.tensor([2, 1]))
    assert top1(train, both, neighbours=3, temperature=0.07) == 50


def top1(train: Features, test: Features, neighbours: int, temperature: float) -> float:
    [count] = knn.right(train, test, [neighbours], temperature)
    return 100 * count / len(test.classes)


@pytest.mark.parametrize("temperature", [0.01, 0.001, 1e-6, 1e-300])
def test_knn_at_low_temperatures_is_the_nearest_one(temperature: float) -> None:
    """exp(similarity / 0.01) overflows float32: the first class of equal infinities must not be the right one."""
    train = Features(at(0, 20, 24, 90), torch.tensor([2, 0, 1, 0]))
    assert top1(train, Features(at(8, -3), torch.tensor([2, 2])), 3, temperature) == 100
    assert top1(train, Features(at(23, 95), torch.tensor([1, 0])), 4, temperature) == 100


def test_a_class_without_training_images_is_never_predicted() -> None:
    train = Features(at(0, 90), torch.tensor([0, 1]))
    assert top1(train, Features(at(5, 85, 40), torch.tensor([0, 1, 2])), 1, 0.07) == pytest.approx(200 / 3)


@pytest.mark.parametrize("block", [7, 1000])
def test_against_scikit_learn(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks smaller than the number of neighbours, and one block."""
    monkeypatch.setattr(knn, "TRAINING_AT_ONCE", block)
    monkeypatch.setattr(knn, "COMPARED_AT_ONCE", 13)
    generator = torch.Generator().manual_seed(0)
    values, classes = torch.randn(300, 8, generator=generator), torch.randint(5, (300,), generator=generator)
    values += 2 * torch.nn.functional.one_hot(classes, 8)
    train, test = Features(values[:200], classes[:200]), Features(values[200:], classes[200:])
    counts = []
    for k in (10, 20):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        theirs.fit(train.values.numpy(), train.classes.numpy())
        counts.append(int((theirs.predict(test.values.numpy()) == test.classes.numpy()).sum()))
    assert knn.right(train, test, (10, 20), 0.07) == counts
    assert 40 < counts[0] < 100  # neither chance nor certain
