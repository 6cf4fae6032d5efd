"""The protocols by name: a file each, which gives a function `score`, and a row here."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from recipes.parsing import ConfigError
from recipes.probing import knn, linear
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from recipes.probing.outputs import FEATURES
from recipes.probing.scores import Score


class Protocol(NamedTuple):
    """How frozen features are scored."""

    does: str
    score: Callable[[Extracted, Extracted, ProbeConfig, torch.device], list[Score]]
    arrays: tuple[str, ...] | None = None  # of `outputs` that it takes, if the model has them; None: of `features`


PROTOCOLS = {
    "knn": Protocol("k-NN", knn.score),
    "linear": Protocol("linear classifiers, the best of a grid", linear.score, ("pooled", "token", "average")),
}


def chosen(names: str) -> list[str]:
    """The protocols that a text names, in the table's order; ConfigError for one that is not there."""
    words = list(PROTOCOLS) if names == "all" else [word.strip() for word in names.split(",")]
    if unknown := [word for word in words if word not in PROTOCOLS]:
        allowed = f"allowed: {', '.join(PROTOCOLS)}, joined by commas, or all"
        raise ConfigError({"protocols": f"protocols names {', '.join(map(repr, unknown))}; {allowed}"})
    return [name for name in PROTOCOLS if name in words]


def arrays_for(names: list[str], features: str) -> list[str]:
    """The arrays that protocols take, the model's own pooling where it may have no others."""
    taken = (PROTOCOLS[name].arrays for name in names)
    return list(dict.fromkeys(array for arrays in taken for array in arrays or (FEATURES[features][0],)))
