"""Names of tensors: the authors' to ours and back.

Ours differ from the official ones in that the directions' parameters are stacked on a leading axis (`A_log`,
`A_b_log`, ... -> `A_log[0]`, `A_log[1]`, ...) and that the two input matrices of SwiGLU are one.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from arm_zoo.files import CheckpointError, StateDict

_DIRECTION_SUFFIXES = ("", "_b", "_c", "_c_b")  # official names of our directions 0 to 3
_STACKED = {  # ours: official with {} for the direction
    "conv_weight": "conv1d{}.weight",
    "conv_bias": "conv1d{}.bias",
    "x_proj_weight": "x_proj{}.weight",
    "dt_proj_weight": "dt_proj{}.weight",
    "dt_proj_bias": "dt_proj{}.bias",
    "A_log": "A{}_log",
    "D": "D{}",
}
# (official, ours, position inside our tensor); {} is a number, a name that ends in a dot stands for all below it, the
# first row that matches counts
_NAMES: list[tuple[str, str, int | None]] = [
    *(
        (f"layers.{{}}.mixer.{official.format(suffix)}", f"blocks.{{}}.mixer.{ours}", k)
        for ours, official in _STACKED.items()
        for k, suffix in enumerate(_DIRECTION_SUFFIXES)
    ),
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
]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + ("" if name.endswith(".") else "$"))


_FROM_OFFICIAL = [(_pattern(official), ours, position) for official, ours, position in _NAMES]
_TO_OFFICIAL = [(_pattern(ours), official, position) for official, ours, position in _NAMES]


def _translate(key: str, table: list[tuple[re.Pattern[str], str, int | None]]) -> list[tuple[str, int | None]]:
    """All names that `key` has on the other side, with their positions; itself if the table does not know it."""
    found: list[tuple[str, int | None]] = []
    for pattern, name, position in table:
        match = pattern.match(key)
        if match is None or (found and position is None):
            continue
        found.append((name.format(*match.groups()) + key[match.end() :], position))
        if position is None:
            break
    return found or [(key, None)]


def is_stacked(key: str) -> bool:
    return ".mixer." in key and key.rsplit(".", 1)[-1] in _STACKED


def is_official(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the names are those of the authors' code."""
    return any(key.startswith("layers.") for key in state_dict)


def under_our_names(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """The dict under our names, whichever it comes with; CheckpointError if parts of a tensor do not fit together."""
    if not is_official(state_dict):
        return dict(state_dict)
    parts: dict[str, dict[int | None, torch.Tensor]] = {}
    for key, value in state_dict.items():
        ((ours, position), *_) = _translate(key, _FROM_OFFICIAL)
        parts.setdefault(ours, {})[position] = value
    out = {}
    for key, by_position in parts.items():
        tensors = [by_position[position] for position in sorted(by_position, key=lambda p: p or 0)]
        try:
            if is_stacked(key):
                out[key] = torch.stack([part.squeeze(1) if key.endswith("conv_weight") else part for part in tensors])
            else:
                out[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        except (IndexError, RuntimeError) as error:
            raise CheckpointError(f"tensors that belong together have different shapes: {error}") from error
    return out


def to_official(model: nn.Module) -> StateDict:
    """State dict of a backbone or pretraining model under official names and shapes; inverse of `from_official`."""
    out = {}
    for key, value in model.state_dict().items():
        names = [name for name, _ in _translate(key, _TO_OFFICIAL)]
        value = value.unsqueeze(2) if key.endswith("conv_weight") else value
        tensors = value if is_stacked(key) else value.chunk(len(names))
        # clones, so that no two entries share memory, which safetensors refuses to save
        out.update({name: tensor.clone() for name, tensor in zip(names, tensors, strict=False)})
    visible = getattr(model, "decoder_mask", None)
    if isinstance(visible, torch.Tensor):  # the official pretraining model saves its attention mask
        out["mask"] = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -math.inf)
    return out
