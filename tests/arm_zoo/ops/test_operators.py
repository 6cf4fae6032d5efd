"""What all custom operators do around their computation."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from arm_zoo.ops import operators


def test_kernels_start_on_the_device_of_the_first_input_whatever_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for tensors on devices that are not there."""
    entered: list[int | None] = []
    registered: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: entered.append(index) or nullcontext())
    monkeypatch.setattr(torch.library, "custom_op", lambda name, run, **_: registered.append(run) or Mock())
    operators.register("kind", "(Tensor x) -> str", lambda x: x.device.type, fake=lambda x: "")
    [run] = registered
    kinds = [run(SimpleNamespace(device=torch.device(name))) for name in ("cpu", "cuda:1", "xpu:2")]
    assert (kinds, entered) == (["cpu", "cuda", "xpu"], [None, 1, 2])
