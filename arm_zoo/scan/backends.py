"""Which code runs the scan: backends by name, chosen per process, per block of code or per call."""

import contextlib
import logging
from collections.abc import Iterator

import torch

__all__ = ["available_backends", "get_scan_backend", "resolve_backend", "scan_backend", "set_scan_backend"]

_logger = logging.getLogger("arm_zoo.scan")
_BACKENDS = ("reference", "torch")
_selected = "auto"
_announced: set[str] = set()


def available_backends() -> list[str]:
    """Backends that run here: `reference` (the plain loop, any device) and `torch` (the fast path, any device)."""
    return list(_BACKENDS)


def get_scan_backend() -> str:
    """The backend in force: a name from `available_backends()` or "auto"."""
    return _selected


def set_scan_backend(name: str) -> None:
    """Choose the backend of every later scan in this process.

    Raises:
        ValueError: for an unknown name; the message lists the names that work here.
    """
    global _selected
    _selected = _check(name)


@contextlib.contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a `with` block only; see `set_scan_backend`."""
    before = get_scan_backend()
    set_scan_backend(name)
    try:
        yield
    finally:
        set_scan_backend(before)


def resolve_backend() -> str:
    """The backend that a call runs on now; what "auto" chose is logged once."""
    return _choose() if _selected == "auto" else _selected


@torch.compiler.assume_constant_result  # runs as it is while a model is traced, so that compiled models log it too
def _choose() -> str:
    if "torch" not in _announced:
        _announced.add("torch")
        _logger.info("scan backend: auto chose 'torch' (available: %s)", ", ".join(_BACKENDS))
    return "torch"


def _check(name: str) -> str:
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose 'auto' or one of {available_backends()}")
    return name
