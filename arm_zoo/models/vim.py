"""Vision Mamba backbones as timm models (https://arxiv.org/abs/2401.09417).

Image patches with one class token in the middle of the sequence, learned position embeddings, blocks of a Mamba mixer
with two scans of twice the width and nothing else, and the class token as feature. The sum of the blocks' outputs
stays in float32.
"""

from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from arm_zoo.models._builder import entry_configs, register_family
from arm_zoo.models._sequence import SequenceBackbone
from arm_zoo.weights.tensor_names import MIXER_NAMES, OfficialNames

OFFICIAL_NAMES = OfficialNames(
    [
        *MIXER_NAMES,
        ("layers.{}.norm.", "blocks.{}.norm1.", None),
        ("layers.{}.", "blocks.{}.", None),
        ("norm_f.", "norm.", None),
    ],
    "https://github.com/hustvl/Vim",
)


DIRECTIONS = ["row", "row_reversed"]  # of the scans


class Vim(SequenceBackbone):
    """Vision backbone of Mamba mixers that scan forwards and backwards, with RMS norms and no feed-forward part."""

    directions = DIRECTIONS
    block = MappingProxyType({"expand": 2.0, "mlp": False})
    float32_residual = True
    usual_pool = "token"
    default_norm = staticmethod(partial(nn.RMSNorm, eps=1e-5))
    official_names = OFFICIAL_NAMES
    keys = ("patch_embed.proj.weight", "pos_embed", "blocks.*.mixer.A_log")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": OFFICIAL_NAMES.origin_url,
        **kwargs,
    }


default_cfgs = entry_configs(
    {
        "vim_pico_patch2_8.untrained": _cfg(
            num_classes=10, input_size=(1, 8, 8), crop_pct=1.0, mean=(0.5,), std=(0.5,), origin_url=None
        ),
        "vim_tiny_patch4_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, origin_url=None),
        "vim_tiny_patch16_224.in1k": _cfg(),
        "vim_tiny_patch16_stride8_224.in1k_ft": _cfg(),
        "vim_small_patch16_224.in1k": _cfg(),
        "vim_small_patch16_stride8_224.in1k_ft": _cfg(),
        "vim_base_patch16_224.in1k": _cfg(),
        "vim_large_patch16_224.untrained": _cfg(),
        "vim_huge_patch16_224.untrained": _cfg(),
    }
)


SIZES = {
    "tiny": {"embed_dim": 192, "depth": 24},
    "small": {"embed_dim": 384, "depth": 24},
    "base": {"embed_dim": 768, "depth": 24},
    "large": {"embed_dim": 1024, "depth": 48},  # the last two are the ARM paper's, table 1
    "huge": {"embed_dim": 1536, "depth": 48},
}
_TOKEN = {"global_pool": Vim.usual_pool}
_TINY, _SMALL, _BASE, _LARGE, _HUGE = ({**size, **_TOKEN} for size in SIZES.values())
register_family(
    Vim,
    {
        # for small images
        "vim_pico_patch2_8": {"patch_size": 2, "embed_dim": 64, "depth": 4, "d_state": 8, **_TOKEN},
        "vim_tiny_patch4_32": {"patch_size": 4, **_TINY},
        "vim_tiny_patch16_224": _TINY,
        "vim_tiny_patch16_stride8_224": {"patch_stride": 8, **_TINY},
        "vim_small_patch16_224": _SMALL,
        "vim_small_patch16_stride8_224": {"patch_stride": 8, **_SMALL},
        "vim_base_patch16_224": _BASE,
        "vim_large_patch16_224": _LARGE,
        "vim_huge_patch16_224": _HUGE,
    },
    short_names={f"vim_{size}": f"vim_{size}_patch16_224" for size in ("tiny", "small", "base", "large", "huge")},
)
