"""Backbones with a head that was trained on their features, as timm models, which timm builds from a config.json.

Importing this module registers them. They take any backbone that timm knows and that has `forward_intermediates`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._input import get_model_args, get_model_input_config
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.files import save_model
from arm_zoo.heads.attentive import AttentiveClassifier
from arm_zoo.heads.segmentation import HEADS

_CLASSIFIER = "head.head"
# Arguments of timm's models that name files to read.
_READING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def create_backbone(name: str, arguments: Mapping[str, Any]) -> Any:
    """An untrained timm model without head; ValueError if it gives no feature maps, or an argument names a file.

    The arguments may stand in anybody's config.json, which must not make a program read more than the weights beside
    it.
    """
    if not timm.is_model(name) or (reading := sorted(_READING.intersection(arguments))):
        problem = f"arguments {', '.join(reading)}" if timm.is_model(name) else f"backbone {name!r}"
        raise ValueError(f"{problem}; allowed: a name of `timm.list_models()`, and arguments of that model")
    model = timm.create_model(name, **{**arguments, "num_classes": 0})
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} gives no feature maps (forward_intermediates), which a head needs")
    return model


def _with_channels(arguments: Mapping[str, Any] | None, in_chans: int | None) -> dict[str, Any]:
    """A backbone's arguments with the channels that are given, else with their own, else with 3."""
    given = {} if in_chans is None else {"in_chans": in_chans}
    return {"in_chans": 3, **(arguments or {}), **given}


class AttentiveProbe(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes) of an attentive head on the patches of the last block.

    Args:
        backbone: the name of a model of timm, ours or not.
        backbone_args: its arguments.
        num_classes: 0 gives what the head's query has gathered, (B, dim).
        in_chans: channels of the images; None: as `backbone_args` tell, or 3.
    """

    def __init__(
        self,
        backbone: str = "arm_base_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        num_classes: int = 1000,
        in_chans: int | None = None,
    ) -> None:
        super().__init__()
        arguments = _with_channels(backbone_args, in_chans)
        model = create_backbone(backbone, arguments)
        self.backbone, self.num_features = model, int(model.feature_info[-1]["num_chs"])
        self.num_classes, self.in_chans = num_classes, arguments["in_chans"]
        self.head = AttentiveClassifier(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        [patches] = self.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return self.head(patches.flatten(2).transpose(1, 2))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.head


class Segmenter(nn.Module):
    """Images (B, C, H, W) -> logits of each pixel (B, num_classes, H, W), by a head on up to four of the maps.

    Args:
        backbone: the name of a model of timm, ours or not.
        backbone_args: its arguments.
        head: a key of `arm_zoo.heads.segmentation.HEADS`.
        num_classes: of pixels.
        in_chans: channels of the images; None: as `backbone_args` tell, or 3.
        frozen: the backbone stays in evaluation mode and is not trained.
    """

    def __init__(
        self,
        backbone: str = "arm_base_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        head: str = "linear",
        num_classes: int = 1000,
        in_chans: int | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; allowed: 1 or more, as it gives the logits of each pixel")
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; choose one of {', '.join(HEADS)}")
        arguments = _with_channels(backbone_args, in_chans)
        model = create_backbone(backbone, arguments)
        self.backbone, self.frozen = model.requires_grad_(not frozen), frozen
        self.num_classes, self.in_chans = num_classes, arguments["in_chans"]
        info = [model.feature_info[place] for place in map_places(model.feature_info)]
        channels, reductions = ([of_map[key] for of_map in info] for key in ("num_chs", "reduction"))
        self.num_features = channels[-1]
        self.head = HEADS[head](channels, reductions, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        places = map_places(self.backbone.feature_info)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone.forward_intermediates(x, indices=places, norm=True, intermediates_only=True)
        return F.interpolate(self.head(maps), x.shape[2:], mode="bilinear")

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    @torch.jit.ignore
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model is made for."""
        return self.in_chans, *get_model_input_config(self.backbone)["input_size"][1:]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own: Any = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in own()}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the backbone's blocks in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self: Any) -> nn.Module:
        return self.head.head


HEADED: dict[str, type[nn.Module]] = {"attentive_probe": AttentiveProbe, "segmenter": Segmenter}  # by timm's names
default_cfgs = generate_default_cfgs(
    {name: {"num_classes": 1000, "input_size": (3, 224, 224), "classifier": _CLASSIFIER} for name in HEADED}
)


def map_places(info: Sequence[Any]) -> list[int]:
    """Indices of the maps for a segmentation head: four evenly spaced ones of a plain backbone, else the last four."""
    count = min(4, len(info))
    if len({of_map["reduction"] for of_map in info}) > 1:
        return list(range(len(info) - count, len(info)))
    return [(place + 1) * len(info) // count - 1 for place in range(count)]


@register_model
def segmenter(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(Segmenter, "segmenter", pretrained, pretrained_strict=True, **kwargs)


@register_model
def attentive_probe(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(AttentiveProbe, "attentive_probe", pretrained, pretrained_strict=True, **kwargs)


def save_attentive_probe(
    folder: Path, backbone: Any, head: AttentiveClassifier, inputs: Mapping[str, Any], label_names: list[str]
) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads after `import arm_zoo`.

    `inputs` say in timm's terms how images are prepared. Names of classes are written if there is one for each class.
    """
    tensors = nn.ModuleDict({"backbone": backbone, "head": head}).state_dict()
    classes: Any = head.head.out_features
    _save(folder, "attentive_probe", backbone, tensors, {}, classes, inputs, label_names)


def save_segmenter(
    folder: Path, model: Segmenter, head: str, inputs: Mapping[str, Any], label_names: list[str]
) -> None:
    """The same as `save_attentive_probe` for a model with the head `HEADS[head]` of `arm_zoo.heads.segmentation`."""
    arguments, classes = {"head": head}, model.num_classes
    _save(folder, "segmenter", model.backbone, model.state_dict(), arguments, classes, inputs, label_names)


def _save(
    folder: Path,
    architecture: str,
    backbone: Any,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    classes: int,
    inputs: Mapping[str, Any],
    label_names: list[str],
) -> None:
    """Write the folder; `arguments` are those of the model apart from `backbone` and `backbone_args`."""
    of_backbone = {key: value for key, value in get_model_args(backbone).items() if key != "num_classes"}
    config = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": backbone.feature_info[-1]["num_chs"],
        **({"label_names": label_names} if len(label_names) == classes else {}),
        "model_args": {"backbone": backbone.pretrained_cfg["architecture"], "backbone_args": of_backbone, **arguments},
        "pretrained_cfg": {**inputs, "num_classes": classes, "classifier": _CLASSIFIER},
    }
    save_model(folder, tensors, config)
