"""Products by quack-kernels; on a CPU, stand-ins compute what that package documents."""

import importlib.machinery
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.ops import fused


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let each test choose the kernel, and leave nothing of a stand-in."""
    monkeypatch.delitem(sys.modules, "arm_zoo.ops.quack", raising=False)
    fused._quack.cache_clear()
    yield
    sys.modules.pop("arm_zoo.ops.quack", None)  # made from a stand-in
    fused._quack.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    """Let the package quack be there, with this in the module that we import from."""
    for name in ("quack", "quack.gemm_interface"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for name, value in content.items():
        setattr(sys.modules["quack.gemm_interface"], name, value)


def gemm_act(
    A: Tensor,
    B: Tensor,
    *,
    bias: Tensor,
    activation: str,
    store_preact: bool,
    tuned: bool,
    concat_layout: tuple[str, ...],
) -> tuple[None, Tensor]:
    """Products of tokens (L, D) and a weight (D, 2 N) whose columns are all gates, then all values; so the bias."""
    assert (activation, store_preact, tuned, concat_layout) == ("swiglu", False, False, ("B", "bias"))
    gates, values = (A @ B + bias).chunk(2, dim=-1)
    return None, F.silu(gates) * values


@pytest.mark.parametrize("enough", [True, False])
def test_the_package_computes_the_gated_product_of_many_tokens(monkeypatch: pytest.MonkeyPatch, enough: bool) -> None:
    """Where it is installed; that of fewer is left to Triton, whose calls take the host less time."""
    gates = pytest.importorskip("arm_zoo.ops.triton.gates", reason="needs triton", exc_type=ImportError)
    install(monkeypatch, gemm_act=gemm_act)
    monkeypatch.setattr(gates, "gated_product", lambda x, weight, bias: x.new_zeros(*x.shape[:-1], len(weight) // 2))
    x, weight, bias = torch.randn(64, 257 - (not enough), 8)[:, 1:], torch.randn(12, 8), torch.randn(12)
    gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)
    expected = F.silu(gate) * value * enough
    torch.testing.assert_close(torch.ops.arm_zoo.gated_product(x, weight, bias), expected)


@pytest.mark.parametrize("installed", [False, True], ids=["missing", "of another version"])
def test_without_it_triton_computes_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: bool
) -> None:
    """However many tokens there are; what is installed and does not fit is told once."""
    gates = pytest.importorskip("arm_zoo.ops.triton.gates", reason="needs triton", exc_type=ImportError)
    monkeypatch.setattr(gates, "gated_product", lambda x, weight, bias: x.new_ones(*x.shape[:-1], len(weight) // 2))
    if installed:
        install(monkeypatch)
    else:
        monkeypatch.setitem(sys.modules, "quack", None)
    with caplog.at_level(logging.WARNING, "arm_zoo.ops"):
        for _ in range(2):
            assert (fused._gated_product(torch.empty(64, 256, 8), torch.empty(12, 8), torch.empty(12)) == 1).all()
        assert fused._quack() is None
    told = "quack-kernels cannot be imported, so Triton's kernel runs: cannot import name 'gemm_act'"
    assert caplog.text.count(told) == installed == caplog.text.count("pip install --upgrade 'arm-zoo[quack]'")
