"""What all tests share: the golden folder, a fixed seed, and the rule for tests that need a GPU."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: with torch's default each would start a thread per core. The variable is for children.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Random weights and inputs are the same in every run and order; the seed, for generators of one's own."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals mean what they did before once a test is over: a recipe's program listens to them to its end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def precisions() -> Iterator[None]:
    """What a test sets of TF32, by torch's older or newer interface, is gone once it is over."""
    backends: Any = torch.backends
    yield
    backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        backends.fp32_precision = backends.cudnn.fp32_precision = backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """The entry of a family that somebody might add, there as long as the test."""
    from tests.helpers import family  # with all models, which few tests need

    monkeypatch.setitem(family.ARCHITECTURES, family.TOY, family.ARCHITECTURE)
    return family.TOY


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest, repo: Path) -> Path:
    """The folder with tensors that the authors' code computed; `tests.helpers.golden` tells which of the two sets."""
    if getattr(request, "param", "whole") == "small":
        return repo / "tests" / "golden"
    folder = repo.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("no golden tensors: ../shared/golden is not there")
    return folder
