"""Logistic regression against scikit-learn's."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from recipes.probing import logistic
from recipes.probing.config import ProbeConfig
from recipes.probing.scores import Features, held_out
from tests.helpers.probing import clusters, extracted

CPU = torch.device("cpu")


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_against_scikit_learn(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "IMAGES_AT_ONCE", 70)
    values, classes = clusters(200, 3, 5, distance=0.5, seed=1)
    values = F.normalize(values, dim=1)
    found = logistic.fit(Features(values, classes), strength, torch.zeros(3, 6))
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=10_000).fit(values.numpy(), classes.numpy())
    expected = torch.tensor(theirs.predict_proba(values.numpy()), dtype=torch.float32)
    assert torch.allclose(logistic.logits_of(found, values).softmax(dim=1), expected, atol=1e-3)
    assert torch.allclose(found[:, :-1], torch.tensor(theirs.coef_, dtype=torch.float32), rtol=0.01, atol=1e-3)
    right = int((theirs.predict(values.numpy()) == classes.numpy()).sum())
    assert logistic.right(found, Features(values, classes)) == right


def test_the_whole_protocol_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """C chosen by held-out images, and the fit with all."""
    grid = (1e-3, 1.0, 1e3)
    monkeypatch.setattr(logistic, "GRID", grid)
    values, classes = clusters(300, 6, 8, distance=0.5, seed=1)
    answers, truth = clusters(200, 6, 8, distance=0.5, seed=2)
    train, test = extracted(classes, 8, pooled=values), extracted(truth, 8, pooled=answers)
    [score] = logistic.score(train, test, ProbeConfig(seed=4), CPU)

    unit, asked = F.normalize(values, dim=1).numpy(), F.normalize(answers, dim=1).numpy()
    chosen_on, kept = (part.numpy() for part in held_out(classes, 4))
    assert len(chosen_on) == 30 and sorted([*chosen_on, *kept]) == list(range(300))
    labels, models = classes.numpy(), [LogisticRegression(C=C, tol=1e-6, max_iter=10_000) for C in grid]
    points = [model.fit(unit[kept], labels[kept]).score(unit[chosen_on], labels[chosen_on]) for model in models]
    best = models[points.index(max(points))].fit(unit, labels)
    assert score.settings == {"C": best.C}
    assert score.top1 == pytest.approx(100 * best.score(asked, truth.numpy())) and 20 < score.top1 < 95
    assert score.low < score.top1 < score.high
