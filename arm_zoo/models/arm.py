"""ARM and MambaMLP vision backbones as timm models (https://arxiv.org/abs/2406.07537).

Image patches with one class token in the middle of the sequence, learned position embeddings, blocks of a Mamba mixer
with four scans and a SwiGLU, average pooling. `arm_zoo.pretraining.autoregressive` has the same blocks with one scan.
"""

from typing import Any

from arm_zoo.models._builder import entry_configs, register_family
from arm_zoo.models._sequence import SequenceBackbone
from arm_zoo.weights.hosted import BUNDLED_FOLDER
from arm_zoo.weights.tensor_names import MIXER_NAMES, OfficialNames

DIRECTIONS = ["row", "row_reversed", "column", "column_reversed"]  # of the scans (paper, section 3.3)

# Of the backbone, and of its pretraining model, whose checkpoints are loaded into backbones too.
OFFICIAL_NAMES = OfficialNames(
    [
        *MIXER_NAMES,
        ("layers.{}.mlp.w1.", "blocks.{}.mlp.fc1.", 0),
        ("layers.{}.mlp.w2.", "blocks.{}.mlp.fc1.", 1),
        ("layers.{}.mlp.w3.", "blocks.{}.mlp.fc2.", None),
        ("layers.{}.", "blocks.{}.", None),
        ("norm_f.", "norm.", None),
        *((f"norm_{i + 1}.", f"skip_norms.{i}.", None) for i in range(4)),
        ("enc2dec.", "encoder_to_decoder.", None),
        ("dec_block.{}.attn2.", "decoder_blocks.{}.attn.", None),
        ("dec_block.{}.norm2_1.", "decoder_blocks.{}.norm_query.", None),
        ("dec_block.{}.norm2_2.", "decoder_blocks.{}.norm_latent.", None),
        ("dec_block.{}.norm2.", "decoder_blocks.{}.norm_mlp.", None),
        ("dec_block.{}.", "decoder_blocks.{}.", None),
        ("ar_norm.", "decoder_norm.", None),
        ("ar_pred.", "decoder_pred.", None),
        ("ar_token", "query_token", None),
        ("dec_pos_embed", "decoder_pos_embed", None),
    ],
    "https://github.com/OliverRensu/ARM",
)


class ARM(SequenceBackbone):
    """Vision backbone of Mamba mixers with a scan for each of DIRECTIONS, and SwiGLUs."""

    directions = DIRECTIONS
    official_names = OFFICIAL_NAMES
    keys = ("patch_embed.proj.weight", "pos_embed", "blocks.*.mixer.A_log", "blocks.*.mlp.fc1.weight")

    @classmethod
    def drop_path_rates(cls, drop_path_rate: float, depth: int) -> list[float]:
        """As in the official training, block i has the rate that the linear rule gives to block i - 1."""
        return [0.0, *super().drop_path_rates(drop_path_rate, depth)[:-1]]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "crop_mode": "squash",  # resize to a square whatever the aspect ratio, then crop: the official evaluation
        # The official repository states no licence, so its weights have none that we could name.
        "license": "unknown",
        "paper_ids": "arXiv:2406.07537",
        "paper_name": "Autoregressive Pretraining with Mamba in Vision",
        "origin_url": OFFICIAL_NAMES.origin_url,
        **kwargs,
    }


def _ours(**kwargs: Any) -> dict[str, Any]:
    return _cfg(license="apache-2.0", origin_url=None, **kwargs)


default_cfgs = entry_configs(
    {
        "arm_pico_patch2_8.arm_digits_ft_digits": _ours(
            num_classes=10,
            input_size=(1, 8, 8),
            crop_pct=1.0,
            mean=(0.305433688785187,),  # of the training split
            std=(0.3759592089586701,),
            label_names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ),
        "arm_tiny_patch4_32.arm_cifar10_ft_cifar10": _ours(
            num_classes=10,
            input_size=(3, 32, 32),
            crop_pct=1.0,
            label_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ),
        "arm_tiny_patch4_32.arm_cifar10": _ours(num_classes=0, input_size=(3, 32, 32), crop_pct=1.0),
        "arm_tiny_patch8_64.arm_tiny_imagenet_ft_tiny_imagenet": _ours(
            num_classes=200,
            input_size=(3, 64, 64),
            crop_pct=1.0,
            # WordNet numbers, sorted
            label_names=tuple((BUNDLED_FOLDER / "tiny_imagenet.txt").read_text(encoding="utf-8").split()),
        ),
        "arm_tiny_patch8_64.arm_tiny_imagenet": _ours(num_classes=0, input_size=(3, 64, 64), crop_pct=1.0),
        "arm_tiny_patch16_224.untrained": _ours(),
        "arm_small_patch16_224.untrained": _ours(),
        "arm_base_patch16_224.arm_in1k_ft_in1k": _cfg(),
        "arm_base_patch16_224.arm_in1k": _cfg(num_classes=0),
        "arm_base_patch16_224.in1k": _cfg(),
        "arm_base_patch16_384.arm_in1k_ft_in1k": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "arm_base_patch16_stride8_448.arm_in1k_ft_in1k": _cfg(input_size=(3, 448, 448), crop_pct=1.0),
        "arm_large_patch16_224.arm_in1k_ft_in1k": _cfg(),
        "arm_large_patch16_224.arm_in1k": _cfg(num_classes=0),
        "arm_large_patch16_224.in1k": _cfg(),
        "arm_large_patch16_384.arm_in1k_ft_in1k": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "arm_huge_patch16_224.arm_in1k_ft_in1k": _cfg(),
        "arm_huge_patch16_224.arm_in1k": _cfg(num_classes=0),
        "arm_huge_patch16_384.arm_in1k_ft_in1k": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
    }
)


_TINY, _SMALL = {"embed_dim": 192, "depth": 12}, {"embed_dim": 384, "depth": 12}  # ours, with the widths of DeiT
_BASE, _LARGE = {"embed_dim": 768, "depth": 12}, {"embed_dim": 1024, "depth": 24}  # the paper's, tables 1 and 2
_HUGE = {"embed_dim": 1536, "depth": 24}
SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE, "large": _LARGE, "huge": _HUGE}
register_family(
    ARM,
    {
        # ours, for 8x8 images such as scikit-learn's digits
        "arm_pico_patch2_8": {"patch_size": 2, "embed_dim": 64, "depth": 4, "d_state": 8},
        "arm_tiny_patch4_32": {"patch_size": 4, **_TINY},
        "arm_tiny_patch8_64": {"patch_size": 8, **_TINY},
        "arm_tiny_patch16_224": _TINY,
        "arm_small_patch16_224": _SMALL,
        "arm_base_patch16_224": _BASE,
        "arm_base_patch16_384": _BASE,
        "arm_base_patch16_stride8_448": {"patch_stride": 8, **_BASE},
        "arm_large_patch16_224": _LARGE,
        "arm_large_patch16_384": _LARGE,
        "arm_huge_patch16_224": _HUGE,
        "arm_huge_patch16_384": _HUGE,
    },
    short_names={f"arm_{size}": f"arm_{size}_patch16_224" for size in ("base", "large", "huge")},
)
