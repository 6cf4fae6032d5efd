"""The protocols by name: each has a row here, and a file of its own with a function `score`."""

from collections.abc import Callable, Collection
from itertools import chain
from typing import NamedTuple

import torch

from recipes.errors import RunError
from recipes.parsing import ConfigError
from recipes.probing import attentive, few_shot, knn, linear, logistic
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.outputs import FEATURES, PATCHES
from recipes.probing.scores import Score


class Protocol(NamedTuple):
    """A way to score frozen features."""

    does: str
    score: Callable[[Extracted, Extracted, ProbeConfig, torch.device], list[Score]]
    arrays: tuple[str, ...] | None = None  # those of `outputs` that it uses, if the model has them; None: `features`


PROTOCOLS = {
    "knn": Protocol("k-NN", knn.score),
    "logistic": Protocol("logistic regression", logistic.score),
    "few_shot": Protocol("nearest class mean of 1, 5 and 10 labels a class", few_shot.score),
    "linear": Protocol("linear classifiers, the best of a grid", linear.score, ("pooled", "token", "average")),
    "attentive": Protocol("AIM's attentive probe of the patches", attentive.score, (PATCHES,)),
}


def chosen(names: str) -> list[str]:
    """The protocols that a text names, in the order of PROTOCOLS; ConfigError for an unknown name."""
    words = list(PROTOCOLS) if names == "all" else [word.strip() for word in names.split(",")]
    if unknown := [word for word in words if word not in PROTOCOLS]:
        allowed = f"allowed: {', '.join(PROTOCOLS)}, joined by commas, or all"
        raise ConfigError({"protocols": f"protocols names {', '.join(map(repr, unknown))}; {allowed}"})
    return [name for name in PROTOCOLS if name in words]


def arrays_for(names: list[str], features: str, had: Collection[str]) -> list[str]:
    """The arrays that protocols use, of those that the model has; RunError if it does not have `features`."""
    taken = [PROTOCOLS[name].arrays for name in names]
    own = FEATURES[features][0]
    if None in taken and own not in had:
        allowed = ", ".join(name for name, (array, _) in FEATURES.items() if array in had)
        raise RunError(f"the model gives no features={features}; allowed: {allowed}")
    wanted = dict.fromkeys(chain.from_iterable(arrays or (own,) for arrays in taken))
    return [array for array in wanted if array in had]
