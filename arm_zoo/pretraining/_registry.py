"""What all pretraining objectives share, and the table of objectives, to which each objective's file adds its row."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from arm_zoo.base import ZooModel, check_keywords
from arm_zoo.files import StateDict
from arm_zoo.models._builder import Backbone


class PretrainingModel(ZooModel):
    """A pretraining model. Its arguments for image size, patch size and channels have the names that backbones use."""

    backbone: type[Backbone]  # the class that is pretrained unless the argument `backbone` names another
    backbones: Mapping[str, type[Backbone]] = MappingProxyType({})  # the classes that it may name
    config: dict[str, Any]  # the arguments of its constructor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for backbone in {cls.backbone, *cls.backbones.values()}:
            backbone.pretraining_keys |= set(cls.keys) - set(backbone.keys)

    @classmethod
    def backbone_named(cls, name: str | None) -> type[Backbone]:
        """The class that the argument `backbone` names; ValueError for an unknown name."""
        if name is None:
            return cls.backbone
        if name not in cls.backbones:
            raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(cls.backbones)}")
        return cls.backbones[name]

    @classmethod
    def name_of_backbone(cls, source: StateDict) -> str:
        """The family, a key of `backbones`, whose tensors a checkpoint has; of several the one with most `keys`."""
        known = [name for name, each in cls.backbones.items() if each.official_names.covers(each.keys, source)]
        return max(known or cls.backbones, key=lambda name: len(cls.backbones[name].keys))

    def hub_config(self) -> dict[str, Any]:
        """The content of config.json: the objective, and the arguments that make this model."""
        objective = next(name for name, row in OBJECTIVES.items() if row.model_class is type(self))
        return {"objective": objective, "pretraining_model": self.config}

    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """Results for images by name, without randomness: the encoder's `features`, and what is made of them.

        Converted weights keep them to be checked against later.
        """
        raise NotImplementedError


class Objective(NamedTuple):
    """A way of pretraining: the class of its models, their named sizes, and what model cards say of them."""

    model_class: type[PretrainingModel]
    sizes: Mapping[str, Mapping[str, Any]]  # name, such as arm_base -> arguments of the class
    description: str  # of such a model, in one clause
    outputs: str  # the names of what `forward` returns


DEFAULT_OBJECTIVE = "autoregressive"  # also of a config.json that names none, as older ones do not
OBJECTIVES: dict[str, Objective] = {}


def create_pretraining_model(name: str, objective: str = DEFAULT_OBJECTIVE, **overrides: Any) -> Any:
    """The pretraining model of a size, e.g. `create_pretraining_model("arm_base", img_size=224, cluster_size=32)`.

    Args:
        name: arm_tiny, arm_small, arm_base, arm_large, arm_huge, or arm_pico for 8x8 images; where the objective
            pretrains other families too, their sizes have such names as well, for example vim_base.
        objective: the way of pretraining, a key of `OBJECTIVES`.
        overrides: arguments of the objective's class.

    Raises:
        ValueError: for an unknown name or objective, or sizes that do not fit each other.
        TypeError: for an unknown keyword.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    model_class, sizes, *_ = OBJECTIVES[objective]
    if name not in sizes:
        backbone_size = name.partition("_patch")[0]
        advice = f"did you mean {backbone_size}?" if backbone_size in sizes else f"choose one of {', '.join(sizes)}"
        raise ValueError(f"unknown pretraining model {name!r}; {advice}")
    check_keywords(name, overrides, inspect.signature(model_class).parameters)
    return model_class(**{**sizes[name], **overrides})
