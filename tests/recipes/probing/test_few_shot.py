"""Few-shot by hand."""

import math
import statistics

import pytest
import torch

from recipes.probing import few_shot
from recipes.probing.config import ProbeConfig
from recipes.probing.scores import Features
from tests.helpers.probing import clusters, extracted


def test_the_nearest_mean_by_hand() -> None:
    # The means are (2, 0) of class 1 and (0, 1) of class 4.
    known = Features(torch.tensor([[1.0, 0], [3, 0], [0, 1]]), torch.tensor([1, 1, 4]))
    asked = Features(torch.tensor([[1.2, 0.89], [1.2, 0.91], [9, -9], [0, 0]]), torch.tensor([1, 1, 1, 4]))
    # Squared distances to the two: 1.4321 and 1.4521; 1.4681 and 1.4481, which is wrong; 130 and 181; 4 and 1.
    assert few_shot.top1(known, asked) == 75


def test_the_interval_by_hand() -> None:
    figures = [50.0, 52, 54, 56, 58]
    expected = 2.7764 * statistics.stdev(figures) / math.sqrt(5)
    assert few_shot.half_width(torch.tensor(figures)) == pytest.approx(expected, rel=1e-4)


def test_numbers_of_labels_that_no_class_has_get_no_score() -> None:
    values, classes = clusters(14, 2, 8, distance=0.7, seed=1)  # seven of each
    scores = few_shot.score(*2 * [extracted(classes, 8, pooled=values)], ProbeConfig(), torch.device("cpu"))
    assert [score.settings["labels"] for score in scores] == [1, 5]


def test_more_labels_give_more() -> None:
    values, classes = clusters(400, 4, 8, distance=0.7, seed=1)
    answers, truth = clusters(200, 4, 8, distance=0.7, seed=2)
    train, test = extracted(classes, 8, pooled=values + 9), extracted(truth, 8, pooled=answers + 9)
    config = ProbeConfig()
    scores = few_shot.score(train, test, config, torch.device("cpu"))
    assert [score.settings["labels"] for score in scores] == [1, 5, 10]
    assert 25 < scores[0].top1 < scores[1].top1 < scores[2].top1 < 100
    assert all(score.low < score.top1 < score.high for score in scores)
    again, other = (few_shot.score(train, test, ProbeConfig(seed=seed), torch.device("cpu")) for seed in (0, 1))
    assert again == scores != other
    assert not {*few_shot.seeds(0)} & {*few_shot.seeds(1)} and len(few_shot.seeds(1)) == 5
