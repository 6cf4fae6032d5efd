"""The backend `cuda` on a machine without a GPU."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch


@contextmanager
def cuda_backend(monkeypatch: pytest.MonkeyPatch, program: type, launch: Callable[..., None]) -> Iterator[ModuleType]:
    """The module `arm_zoo.ops.cuda.launch` with these in the place of `cuda.core`'s, for an H100 of one processor."""
    core = ModuleType("cuda.core")
    core.Program, core.ProgramOptions, core.LaunchConfig, core.launch = (
        program,
        SimpleNamespace,
        SimpleNamespace,
        launch,
    )
    core.Device = lambda index: SimpleNamespace(set_current=lambda: None, create_stream=lambda stream: stream)
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.delitem(sys.modules, "arm_zoo.ops.cuda.launch", raising=False)
    module = importlib.import_module("arm_zoo.ops.cuda.launch")
    properties = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    yield module
    monkeypatch.delitem(sys.modules, "arm_zoo.ops.cuda.launch")
