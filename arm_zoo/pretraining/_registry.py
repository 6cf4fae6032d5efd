"""The pretraining objectives: one row each, with its class and the sizes of its models."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from arm_zoo.pretraining.autoregressive import ARMPretrain


class Objective(NamedTuple):
    """A way of pretraining: the class of its models, and their arguments by name."""

    model_class: type[ARMPretrain]
    sizes: Mapping[str, Mapping[str, int]]


_PICO = {"embed_dim": 64, "depth": 4, "d_state": 8, "img_size": 8, "patch_size": 2, "cluster_size": 4, "in_chans": 1}
DEFAULT_OBJECTIVE = "autoregressive"  # also of a config.json that names none, as all did once
OBJECTIVES: dict[str, Objective] = {
    "autoregressive": Objective(
        ARMPretrain,
        {
            "arm_pico": _PICO,
            "arm_tiny": {"embed_dim": 192, "depth": 12},
            "arm_small": {"embed_dim": 384, "depth": 12},
            "arm_base": {"embed_dim": 768, "depth": 12},
            "arm_large": {"embed_dim": 1024, "depth": 24},
            "arm_huge": {"embed_dim": 1536, "depth": 24},
        },
    )
}


def create_pretraining_model(name: str, objective: str = DEFAULT_OBJECTIVE, **overrides: Any) -> ARMPretrain:
    """The pretraining model of a size, e.g. `create_pretraining_model("arm_base", img_size=224, cluster_size=32)`.

    Args:
        name: arm_tiny, arm_small, arm_base, arm_large or arm_huge; arm_pico for 8x8 images.
        objective: what it learns, a key of `OBJECTIVES`.
        overrides: arguments of the objective's class.

    Raises:
        ValueError: for an unknown name or objective, or sizes that do not fit each other.
        TypeError: for an unknown keyword.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    model_class, sizes = OBJECTIVES[objective]
    if name not in sizes:
        raise ValueError(f"unknown pretraining model {name!r}; choose one of {', '.join(sizes)}")
    keywords = inspect.signature(model_class).parameters
    if unknown := sorted(set(overrides) - set(keywords)):
        raise TypeError(f"{name}: unknown keyword {', '.join(unknown)}; the model takes {', '.join(sorted(keywords))}")
    return model_class(**{**sizes[name], **overrides})
