"""k-NN: the nearest training images vote by cosine similarity, as in DINO (arXiv:2104.14294, section 4.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.data.sources import tell
from recipes.errors import RunError
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.scores import Features, Score

NEIGHBOURS = (10, 20)
TRAINING_AT_ONCE, COMPARED_AT_ONCE = 65_536, 1024  # training and test images whose similarities take 256 MiB


def score(train: Extracted, test: Extracted, config: ProbeConfig, device: torch.device) -> list[Score]:
    """Score each number of neighbours, but for larger numbers than there are training images, which are logged."""
    asked = NEIGHBOURS if config.neighbours is None else (config.neighbours,)
    numbers = [k for k in asked if k <= train.images]
    if config.neighbours and not numbers:
        raise RunError(f"neighbours is {config.neighbours}; allowed: up to the {train.images} training images")
    if left := asked[len(numbers) :]:
        tell(f"there are {train.images} training images: there is no k-NN of {' and '.join(map(str, left))} of them")
    if not numbers:
        return []
    features = train.of(config.features), test.of(config.features).to(device)
    settings = [{"neighbours": k, "temperature": config.temperature} for k in numbers]
    counts = right(*features, numbers, config.temperature)
    return [
        Score.of_images("knn", config.features, setting, count, test.images)
        for setting, count in zip(settings, counts, strict=True)
    ]


def right(train: Features, test: Features, neighbours: Sequence[int], temperature: float) -> list[int]:
    """How many test images the vote of their neighbours classifies correctly, for each number of neighbours.

    Each neighbour's vote weighs exp(similarity / temperature).
    """
    number = max(train.number, test.number)
    similarity, places = nearest(train.values, test.values, max(neighbours))
    # Subtracting the largest similarity changes no vote's share, but keeps exp from overflowing at low temperatures.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    classes = train.classes.to(places.device)[places]
    counts = []
    for k in neighbours:
        votes = weights.new_zeros(len(weights), number).scatter_add_(1, classes[:, :k], weights[:, :k])
        counts.append(int((votes.argmax(dim=1) == test.classes).sum()))
    return counts


def nearest(train: Tensor, test: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and places of the `count` most similar training images, (tests, count), best first.

    The result is exact, and on the tests' device. All pairs are compared in blocks, as not all training features may
    fit there.
    """
    tests = F.normalize(test, dim=1).split(COMPARED_AT_ONCE)
    best = [(values.new_empty(len(values), 0), values.new_empty(len(values), 0, dtype=torch.long)) for values in tests]
    for start in range(0, len(train), TRAINING_AT_ONCE):
        block = F.normalize(train[start : start + TRAINING_AT_ONCE].to(test.device), dim=1)
        for row, values in enumerate(tests):
            similarity, places = (values @ block.T).topk(min(count, len(block)), dim=1)
            both = torch.cat([best[row][0], similarity], 1), torch.cat([best[row][1], places + start], 1)
            similarity, order = both[0].topk(min(count, both[0].shape[1]), dim=1)
            best[row] = similarity, both[1].gather(1, order)
    similarities, places = zip(*best, strict=True)
    return torch.cat(similarities), torch.cat(places)
