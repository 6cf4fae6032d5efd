"""The two sets of tensors that the authors' code computed, for tests that run on the small one, the whole one or both.

The small set, `tests/golden`, is part of the checkout; the whole one lies beside it. A test that asks for the fixture
`golden` gets the whole set, and with one of these decorators the small set too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.golden.cut import ARM_BLOCKS

in_both_sets = pytest.mark.parametrize("golden", ["small", "whole"], indirect=True)


def golden_cases(small: Sequence[str], whole: Sequence[str]) -> pytest.MarkDecorator:
    """Run a test with the arguments `golden` and `case` on these cases of the small and of the whole set."""
    cases = [*(("small", case) for case in small), *(("whole", case) for case in whole)]
    return pytest.mark.parametrize("golden, case", cases, indirect=["golden"], scope="module")


class OtherBlocks(nn.Module):
    """Stands for the blocks that the small set leaves out: it gives what the last of the authors' gave."""

    def __init__(self, tokens: torch.Tensor) -> None:
        """`tokens`: (B, L, dim)."""
        super().__init__()
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return self.tokens + 0 * x


def add_other_blocks(model: Any, case: Path) -> None:
    """Complete an ARM of the small set, so that it gives the authors' features and logits; the others are whole."""
    if len(model.blocks) == ARM_BLOCKS:
        model.blocks.add_module("11", OtherBlocks(load_file(case / "outputs_f64.safetensors")["hidden_12"]))
