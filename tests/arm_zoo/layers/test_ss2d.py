"""VMamba's mixer against the authors' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from arm_zoo.layers.order import scan_order
from arm_zoo.layers.ss2d import DIRECTIONS, SS2D, order_for
from arm_zoo.models.vmamba import OFFICIAL_NAMES
from arm_zoo.ops import scan_backend
from arm_zoo.weights.tensor_names import under_our_names
from tests.helpers.golden import close, in_both_sets

PREFIX = "layers.0.blocks.0.op.", "stages.0.blocks.0.ss2d."


def under_mixers_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a mixer alone, from the authors' names."""
    ours = under_our_names({PREFIX[0] + name: value for name, value in tensors.items()}, OFFICIAL_NAMES)
    return {name.removeprefix(PREFIX[1]): value for name, value in ours.items()}


@pytest.fixture
def case(golden: Path) -> dict[str, Any]:
    folder = golden / "mixer_vmamba"
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def mixer(case: dict[str, Any], dtype: torch.dtype) -> SS2D:
    made = SS2D(24, expand=2.0, dtype=dtype)
    made.load_state_dict({name: value.to(dtype) for name, value in under_mixers_names(case["state_dict"]).items()})
    return made


@in_both_sets
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_mixer_is_the_authors_one(case: dict[str, Any], backend: str) -> None:
    made, expected = mixer(case, torch.float64), case["outputs_f64"]
    x = case["inputs"]["x"].double().permute(0, 2, 3, 1).requires_grad_()
    with scan_backend(backend):
        y = made(x, order_for(x))
        cotangent = case["inputs"]["cotangent"].double().permute(0, 2, 3, 1)
        grad_x, *grads = torch.autograd.grad(y, [x, *made.parameters()], cotangent)
    assert close(y, expected["output"].permute(0, 2, 3, 1), 1e-12)
    assert close(grad_x, expected["grad_input"].permute(0, 2, 3, 1), 1e-12)
    stored = under_mixers_names(case["param_grads"])
    for (name, _), grad in zip(made.named_parameters(), grads, strict=True):
        assert close(grad, stored[name], 1e-7), name


@in_both_sets
def test_directions_are_summed(case: dict[str, Any]) -> None:
    """Which the norm behind the sum hides."""
    made, expected = mixer(case, torch.float64), case["outputs_f64"]
    u = made.in_proj(case["inputs"]["x"].double().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    u = F.silu(made.conv2d(u)).flatten(2).transpose(1, 2)
    assert close(made.scan(u, scan_order(5, 7, DIRECTIONS)), expected["merged"].flatten(2).transpose(1, 2), 1e-12)
    with torch.no_grad():
        made.x_proj_weight.zero_()
    skips = made.D.view(4, -1).sum(0)
    assert close(made.scan(u, scan_order(5, 7, DIRECTIONS)), skips * u, 1e-12)


def test_orders_are_the_authors_ones(case: dict[str, Any]) -> None:
    sequences = case["outputs_f64"]["scanned"]  # (B, K, D, L)
    order = order_for(torch.empty(1, 5, 7, 1))
    for k in range(4):
        assert sequences[:, k].equal(sequences[:, 0][..., order[k]])


@in_both_sets
def test_single_precision(case: dict[str, Any]) -> None:
    x = case["inputs"]["x"].permute(0, 2, 3, 1)
    y = mixer(case, torch.float32)(x, order_for(x))
    assert close(y, case["outputs_f64"]["output"].permute(0, 2, 3, 1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    made, x = SS2D(32, expand=2.0), torch.randn(2, 6, 5, 32)
    with torch.autocast("cpu", dtype):
        y = made(x, order_for(x))
    assert y.dtype == dtype and close(y, made(x, order_for(x)), 3e-2)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made.parameters())
