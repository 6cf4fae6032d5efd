"""Names of tensors translated from the authors' to ours and back, by the table of a family or an objective.

Ours differ from the official ones in that the directions' parameters are stacked on a leading axis (`A_log`,
`A_b_log`, ... -> `A_log[0]`, `A_log[1]`, ...) and that the two input matrices of SwiGLU are one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from arm_zoo.files import CheckpointError, StateDict

_DIRECTION_SUFFIXES = ("", "_b", "_c", "_c_b")  # of the official names of our directions 0 to 3
_STACKED = {  # our name: the official one, with {} for the suffix of the direction
    "conv_weight": "conv1d{}.weight",
    "conv_bias": "conv1d{}.bias",
    "x_proj_weight": "x_proj{}.weight",
    "dt_proj_weight": "dt_proj{}.weight",
    "dt_proj_bias": "dt_proj{}.bias",
    "A_log": "A{}_log",
    "D": "D{}",
}
Row = tuple[str, str, int | None]  # official name, our name, position inside our tensor (None: it is the whole)
# Of `MambaMixer`, in all families that have it.
MIXER_NAMES: list[Row] = [
    (f"layers.{{}}.mixer.{official.format(suffix)}", f"blocks.{{}}.mixer.{ours}", k)
    for ours, official in _STACKED.items()
    for k, suffix in enumerate(_DIRECTION_SUFFIXES)
]


class OfficialNames:
    """A table of names, row by row.

    In a row, {} stands for a number, and a name that ends in a dot for all names that start with it. The first row
    that matches counts. The official names are those of the code at `origin_url`.
    """

    prefix = "layers."  # some official names start with it, and none of ours

    def __init__(self, rows: Sequence[Row] = (), origin_url: str | None = None) -> None:
        self.origin_url = origin_url
        self.from_official = [(_pattern(official), ours, position) for official, ours, position in rows]
        self.to_official = [(_pattern(ours), official, position) for official, ours, position in rows]

    def are_in(self, state_dict: Mapping[str, torch.Tensor]) -> bool:
        """Whether the names are those of the authors' code."""
        return any(key.startswith(self.prefix) for key in state_dict)

    def covers(self, keys: Iterable[str], state_dict: Mapping[str, torch.Tensor]) -> bool:
        """Whether a state dict, under our or the official names, has all these of ours; * stands for a number."""
        official = self.are_in(state_dict)
        ours = (self.translate(key)[0][0] if official else key for key in state_dict)
        return {re.sub(r"\.\d+\.", ".*.", key) for key in ours}.issuperset(keys)

    @lru_cache(4096)  # noqa: B019 (tables live as long as the process)
    def translate(self, key: str, to_official: bool = False) -> list[tuple[str, int | None]]:
        """The names of a tensor on the other side, with positions; its own name if the table has none."""
        found: list[tuple[str, int | None]] = []
        for pattern, name, position in self.to_official if to_official else self.from_official:
            match = pattern.match(key)
            if match is None or (found and position is None):
                continue
            found.append((name.format(*match.groups()) + key[match.end() :], position))
            if position is None:
                break
        return found or [(key, None)]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + ("" if name.endswith(".") else "$"))


def is_stacked(key: str) -> bool:
    """Whether our tensor of this name has the directions on its first axis."""
    return ".mixer." in key and key.rsplit(".", 1)[-1] in _STACKED


def under_our_names(state_dict: Mapping[str, torch.Tensor], names: OfficialNames) -> StateDict:
    """A state dict of ours or the authors', under our names; CheckpointError if parts of a tensor do not fit."""
    if not names.are_in(state_dict):
        return dict(state_dict)
    parts: dict[str, dict[int | None, torch.Tensor]] = {}
    for key, value in state_dict.items():
        ((ours, position), *_) = names.translate(key)
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
    out, table = {}, getattr(model, "official_names", OfficialNames())
    for key, value in model.state_dict().items():
        names = [name for name, _ in table.translate(key, to_official=True)]
        value = value.unsqueeze(2) if key.endswith("conv_weight") else value
        tensors = value if is_stacked(key) else value.chunk(len(names))
        # clones, so that no two entries share memory, which safetensors refuses to save
        out.update({name: tensor.clone() for name, tensor in zip(names, tensors, strict=False)})
    extras: Any = getattr(model, "official_extras", dict)
    return {**out, **extras()}
