"""The gated product by quack-kernels on a CPU, where a stand-in computes what that package documents."""

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
    fused._gated_product.cache_clear()
    yield
    fused._gated_product.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    """Let the package quack be there, with this in the module that we import from."""
    for name in ("quack", "quack.gemm_interface"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for name, value in content.items():
        setattr(sys.modules["quack.gemm_interface"], name, value)


def gemm_act(
    A: Tensor, B: Tensor, *, bias: Tensor, activation: str, store_preact: bool, tuned: bool
) -> tuple[None, Tensor]:
    """Products of tokens (L, D) and a weight (D, 2 N) whose columns are gates and values in turn."""
    gates, values = (A @ B + bias).unflatten(-1, (-1, 2)).unbind(-1)
    return None, F.silu(gates) * values


def test_the_package_computes_the_gated_product_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gemm_act=gemm_act)
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(12)
    gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)
    torch.testing.assert_close(torch.ops.arm_zoo.gated_product(x, weight, bias), F.silu(gate) * value)


@pytest.mark.parametrize("installed", [False, True], ids=["missing", "of another version"])
def test_without_it_triton_computes_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, installed: bool
) -> None:
    gates = pytest.importorskip("arm_zoo.ops.triton.gates", reason="needs triton", exc_type=ImportError)
    if installed:
        install(monkeypatch)
    else:
        monkeypatch.setitem(sys.modules, "quack", None)
    with caplog.at_level(logging.WARNING, "arm_zoo.ops"):
        assert fused._gated_product() is gates.gated_product is fused._gated_product()
    told = "quack-kernels cannot be imported, so Triton's kernel runs: cannot import name 'gemm_act'"
    assert caplog.text.count(told) == installed == caplog.text.count("pip install --upgrade 'arm-zoo[quack]'")
