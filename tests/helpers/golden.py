"""The two sets of tensors that the authors' code computed, for tests that run on the small one, the whole one or both.

The small set, `tests/golden`, is part of the checkout; the whole one lies beside it. A test that asks for the fixture
`golden` gets the whole set, and with one of these decorators the small set too. Here is also what such tests share to
run our models and compare them with the authors' numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from arm_zoo import to_official
from tests.golden.cut import ARM_BLOCKS

StateDict = dict[str, torch.Tensor]
PRECISIONS = [  # (device, type) in which golden cases are run
    pytest.param(("cpu", torch.float64), id="float64"),
    pytest.param(("cpu", torch.float32), id="float32"),
    pytest.param(("cuda", torch.float32), id="float32-gpu", marks=pytest.mark.gpu),
]
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


@dataclass
class Run:
    """What our model computes for a golden case at one precision; gradients are under the authors' names."""

    folder: Path
    dtype: torch.dtype
    outputs: StateDict
    gradients: StateDict

    def tolerance(self, exact: bool, gradient: bool = False) -> float:
        """Fraction of a tensor's maximum; `exact` tells that the golden one is stored in float64."""
        if self.dtype == torch.float32:
            return 1e-3 if gradient else 1e-4
        return 1e-10 if exact else 1e-7


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to a part of the largest number; NaN is never close."""
    difference = (actual.double() - expected.double()).abs().max()
    return actual.shape == expected.shape and bool(difference <= tolerance * expected.double().abs().max())


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Equal within a fraction of the tensor's largest value."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance * expected.abs().max().item()
    assert error <= limit, f"{name} is off by {error:.2e}, allowed are {limit:.2e}"


def under_official_names(model: nn.Module, values: dict[str, torch.Tensor]) -> StateDict:
    """Values by our parameters' names, each as large as its parameter, under the authors' names."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
        official = to_official(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return official


def trained_gradients(model: nn.Module) -> StateDict:
    """Gradients under the authors' names; of frozen parameters NaN."""
    return under_official_names(
        model,
        {
            name: torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        },
    )
