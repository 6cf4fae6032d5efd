"""Backbones with a head that was trained on their features, as models of timm: it builds them from a config.json.

Importing this module registers them. They take any backbone that timm knows and that has `forward_intermediates`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._input import get_model_args
from torch import Tensor, nn

from arm_zoo.files import save_model
from arm_zoo.heads.attentive import AttentiveClassifier

HEADED = ("attentive_probe",)  # names under which timm knows these models
_CLASSIFIER = "head.head"
default_cfgs = generate_default_cfgs(
    {name: {"num_classes": 1000, "input_size": (3, 224, 224), "classifier": _CLASSIFIER} for name in HEADED}
)


class AttentiveProbe(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes) of an attentive head on the patches of the last block.

    Args:
        backbone: the name of a model of timm, ours or not.
        backbone_args: its arguments.
        num_classes: 0 gives what the head's query has gathered, (B, dim).
        in_chans: channels of the images, where `backbone_args` do not tell.
    """

    def __init__(
        self,
        backbone: str = "arm_base_patch16_224",
        backbone_args: Mapping[str, Any] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        arguments = {"in_chans": in_chans, **(backbone_args or {}), "num_classes": 0}
        model: Any = timm.create_model(backbone, **arguments)
        self.backbone, self.num_features = model, int(model.feature_info[-1]["num_chs"])
        self.num_classes, self.in_chans = num_classes, arguments["in_chans"]
        self.head = AttentiveClassifier(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        [patches] = self.backbone.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        return self.head(patches.flatten(2).transpose(1, 2))

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.head


@register_model
def attentive_probe(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(AttentiveProbe, "attentive_probe", pretrained, **kwargs)


def save_attentive_probe(
    folder: Path, backbone: Any, head: AttentiveClassifier, inputs: Mapping[str, Any], label_names: list[str]
) -> None:
    """Write the two as what `timm.create_model("local-dir:FOLDER", pretrained=True)` loads after `import arm_zoo`.

    `inputs` tell how images are prepared, by timm's names. Names of classes are written if there is one for each.
    """
    classes = head.head.out_features
    parts = {"backbone": backbone, "head": head}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    arguments = {key: value for key, value in get_model_args(backbone).items() if key != "num_classes"}
    config = {
        "architecture": "attentive_probe",
        "num_classes": classes,
        "num_features": backbone.feature_info[-1]["num_chs"],
        **({"label_names": label_names} if len(label_names) == classes else {}),
        "model_args": {"backbone": backbone.pretrained_cfg["architecture"], "backbone_args": arguments},
        "pretrained_cfg": {**inputs, "num_classes": classes, "classifier": _CLASSIFIER},
    }
    save_model(folder, tensors, config)
