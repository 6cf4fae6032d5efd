"""Which code runs the scan: backends by name, chosen per process or per block of code.

`reference` is the plain loop, `torch` the fast path on any device, `numba` a faster forward scan on the CPU, `triton`
the GPU kernels, `cuda` the same with faster scans, `mamba_ssm` the kernels of the package mamba-ssm, for comparison.
The environment variable ARM_ZOO_SCAN sets the choice at start.
"""

import contextlib
import functools
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

import torch
from torch.autograd import forward_ad

__all__ = [
    "available_backends",
    "get_scan_backend",
    "implementation",
    "is_transformed",
    "resolve_backend",
    "scan_backend",
    "set_scan_backend",
]

_logger = logging.getLogger("arm_zoo.scan")
_BACKENDS = ("reference", "torch", "numba", "triton", "cuda", "mamba_ssm")
_MODULES = {
    "torch": "arm_zoo.scan.chunked",
    "numba": "arm_zoo.scan.numba",
    "triton": "arm_zoo.scan.triton",
    "cuda": "arm_zoo.scan.cuda",
    "mamba_ssm": "arm_zoo.scan.mamba_ssm",
}
_NEEDS = {
    "numba": ("numba",),
    "triton": ("triton",),
    "cuda": ("triton", "cuda.core"),
    "mamba_ssm": ("causal_conv1d", "selective_scan_cuda"),
}
_INSTALLS = {  # module -> its package and how to get it
    "numba": ("numba", "pip install 'arm-zoo[cpu]'"),
    "triton": ("triton", "pip install triton (Linux builds of torch bring it)"),
    "cuda.core": ("cuda-core", "pip install 'arm-zoo[cuda]' (with torch before 2.10 also 'cuda-core[cu12]')"),
    "causal_conv1d": ("causal-conv1d", "pip install 'arm-zoo[kernels]'"),
    "selective_scan_cuda": ("mamba-ssm with its CUDA extension", "pip install 'arm-zoo[kernels]'"),
}
_USED = {"cuda.core": ("Device", "LaunchConfig", "Program", "ProgramOptions", "launch")}  # which older versions lack
_ON_GPUS = ("triton", "cuda", "mamba_ssm")
_announced: set[str] = set()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")  # as Triton reads it


@functools.cache
def _why_not(name: str) -> str | None:
    """Why a backend cannot run here, with what to do about it; None if it can."""
    for module in _NEEDS.get(name, ()):
        package, installation = _INSTALLS[module]
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            return f"it needs the package {package} ({error}): {installation}"
        if any(not hasattr(found, attribute) for attribute in _USED.get(module, ())):
            upgrade = installation.replace("install", "install --upgrade", 1)
            return f"it needs a newer version of the package {package}: {upgrade}"
    if name in _ON_GPUS and not (torch.cuda.is_available() or (name == "triton" and _interpreted())):
        return "it needs a CUDA device; on the CPU use 'torch', or TRITON_INTERPRET=1 to test 'triton' slowly"
    if name == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < (8, 0)):
        return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; use 'triton'"
    return None


def available_backends() -> list[str]:
    """Names of the backends that run here."""
    return [name for name in _BACKENDS if _why_not(name) is None]


def _check(name: str) -> str:
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose 'auto' or one of {available_backends()}")
    if (reason := _why_not(name)) is not None:
        raise ValueError(f"scan backend {name!r} cannot run here: {reason}")
    return name


def _from_environment() -> str:
    try:
        return _check(os.environ.get("ARM_ZOO_SCAN") or "auto")
    except ValueError as error:
        raise ValueError(f"environment variable ARM_ZOO_SCAN: {error}") from None


class _Choice:
    """A backend and the thread that chose it: the process's own, or one for the time of a `scan_backend` block."""

    def __init__(self, name: str) -> None:
        self.name, self.thread = name, _thread()


def _thread() -> int | None:
    return None if torch.compiler.is_compiling() else threading.get_ident()  # which compiled code cannot ask for


# The process's own choice, then those of the blocks that are open, in any thread; the last one is in force. Adding,
# removing and reading one is a single step, between which no other thread can come.
_choices = [_Choice(_from_environment())]


def get_scan_backend() -> str:
    """The backend in force: a name from `available_backends()` or "auto"."""
    return _choices[-1].name


def set_scan_backend(name: str) -> None:
    """Choose the backend of every later scan in this process; in a `scan_backend` block, until the block ends.

    "auto" takes `cuda` or else `triton` on CUDA, and `numba` for float32 on the CPU, each where it is installed; else,
    and always for float64, `torch`; and `reference` for derivatives by torch.func and forward-mode ones.

    Raises:
        ValueError: for an unknown name, or one that cannot run here; the message says what can, or what to install.
    """
    process, *blocks = _choices
    own = [choice for choice in blocks if choice.thread == _thread()]
    (own or [process])[-1].name = _check(name)


@contextlib.contextmanager
def scan_backend(name: str) -> Iterator[None]:
    """Choose the backend of the process inside a `with` block only; see `set_scan_backend`.

    All threads share the choice, also those of PyTorch that run backward passes: while blocks are open in several
    threads, the one that was opened last decides. When all have ended, what `set_scan_backend` chose is in force.
    """
    choice = _Choice(_check(name))
    _choices.append(choice)
    try:
        yield
    finally:
        _choices.remove(choice)


def implementation(name: str) -> ModuleType:
    """The module that computes the operators for a backend."""
    return importlib.import_module(_MODULES[name])


# Runs as it is while a model is traced, where transforms are at work as they are outside.
@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether derivatives by torch.func, or forward-mode ones in any thread, are at work.

    Custom operators have no rules for them, and would leave out tangents without a word.
    """
    derivatives = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() in derivatives for level in levels)


def resolve_backend(x: torch.Tensor) -> str:
    """The backend that a call on `x` runs on; what "auto" chose is logged once.

    Raises:
        ValueError: if the backend in force does not take such tensors, or not these derivatives.
        RuntimeError: in an export to ONNX that lacks `arm_zoo.onnx`.
    """
    if x.is_meta:  # nothing is computed: the shapes are the same for all
        return "torch"
    selected = get_scan_backend()
    if selected != "reference":
        _check_onnx_export(x.dtype)
    if is_transformed():
        if selected not in ("auto", "reference"):
            raise ValueError(
                f"scan backend {selected!r} knows neither torch.func's derivatives nor forward-mode ones; "
                "use 'auto', which takes 'reference' there"
            )
        return "reference"
    half_or_single = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fits = {
        "numba": x.device.type == "cpu" and x.dtype == torch.float32,
        **{name: half_or_single and x.is_cuda for name in _ON_GPUS},
    }
    fits["triton"] |= half_or_single and _interpreted()
    if selected == "auto":
        return _choose(("cuda", "triton") if fits["cuda"] else ("numba",) if fits["numba"] else ())
    if not fits.get(selected, True):
        takes = "float32 on the CPU" if selected == "numba" else "float32, bfloat16 and float16 on CUDA"
        raise ValueError(
            f"scan backend {selected!r} takes {takes}, got {x.dtype} on {x.device.type}; use 'auto' or 'torch'"
        )
    return selected


@torch.compiler.assume_constant_result
def _check_onnx_export(dtype: torch.dtype) -> None:
    """Refuse an export to ONNX that cannot end well, before its own error, which does not say what to do."""
    if not torch.onnx.is_in_onnx_export():
        return
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.onnx.export(..., dynamo=False) cannot write arm_zoo's scans: `import arm_zoo.onnx` and export with "
            "dynamo=True, or type `python -m hub export MODEL FILE` in a checkout"
        )
    if "arm_zoo.onnx" not in sys.modules:
        raise RuntimeError(
            "torch.onnx.export does not know arm_zoo's operators yet: `import arm_zoo.onnx` before it, or type "
            "`python -m hub export MODEL FILE` in a checkout"
        )
    if dtype != torch.float32:
        raise RuntimeError(f"exports to ONNX are in float32, got {dtype}: export model.float(), convert the file then")


# Runs as it is while a model is traced: compiled models log the choice too, and know whether they are exported (within
# a trace, some versions of torch say so of every compilation).
@torch.compiler.assume_constant_result
def _choose(best: tuple[str, ...]) -> str:
    """The first of the backends that is installed, else `torch`; always `torch` in exports, which run anywhere."""
    if torch.compiler.is_exporting():
        return "torch"
    name = next((name for name in best if _why_not(name) is None), "torch")
    if name not in _announced:
        _announced.add(name)
        _logger.info("scan backend: auto chose %r (available: %s)", name, ", ".join(available_backends()))
    return name
