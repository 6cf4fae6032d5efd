"""What all objectives for ARM and Vim share: the families, their sizes, and what a checkpoint tells of its encoder."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from timm.layers import to_2tuple

from arm_zoo.files import StateDict
from arm_zoo.layers.sizes import one_or_two
from arm_zoo.models import arm, vim
from arm_zoo.models._sequence import SequenceBackbone
from arm_zoo.pretraining._registry import PretrainingModel
from arm_zoo.weights.adapt import sincos_grid

ENCODER_KEYS = vim.Vim.keys  # in checkpoints of both families: ARM's keys are these and one more
# Ours, for 8x8 images; the backbones have it as arm_pico_patch2_8 and vim_pico_patch2_8.
_PICO = {"embed_dim": 64, "depth": 4, "d_state": 8, "img_size": 8, "patch_size": 2, "in_chans": 1}
# The families that all objectives take, with their sizes: a new one is a row here.
_FAMILIES: dict[str, tuple[type[SequenceBackbone], Mapping[str, Mapping[str, Any]]]] = {
    "arm": (arm.ARM, arm.SIZES),
    "vim": (vim.Vim, vim.SIZES),
}


class SequencePretrain(PretrainingModel):
    """A pretraining model of an ARM or a Vim."""

    backbone: type[SequenceBackbone] = arm.ARM
    backbones: Mapping[str, type[SequenceBackbone]] = MappingProxyType(
        {name: backbone for name, (backbone, _) in _FAMILIES.items()}
    )

    @classmethod
    def read_encoder(cls, source: StateDict) -> tuple[dict[str, Any], int]:
        """The encoder's part of `ZooModel.read_shapes`; it has `img_size` if the position embeddings tell the grid."""
        name = cls.name_of_backbone(source)
        sizes, rows = cls.backbones[name].read_shapes(source)
        del sizes["num_classes"]
        patch, grid = to_2tuple(sizes["patch_size"]), sincos_grid(source["pos_embed"])
        img_size = {"img_size": one_or_two((grid[0] * patch[0], grid[1] * patch[1]))} if grid else {}
        return {"backbone": name, **img_size, **sizes}, rows + 1  # a backbone's table has a row for its class token


def sizes_of_encoders(own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The arguments of each family's sizes by name, such as arm_base; `own` adds an objective's to pico, tiny, ..."""
    return {
        f"{family}_{name}": {"backbone": family, **size, **own.get(name, {})}
        for family, (_, sizes) in _FAMILIES.items()
        for name, size in {"pico": _PICO, **sizes}.items()
    }
