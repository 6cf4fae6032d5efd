"""The backends that can run the scan, chosen by name for the process, a block of code, or by ARM_ZOO_SCAN at start."""

import contextlib
import functools
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

_logger = logging.getLogger("arm_zoo.ops")


class Package(NamedTuple):
    """A package that a backend needs: its module, its name, how to install it, and names that old versions lack."""

    module: str
    name: str
    install: str
    uses: tuple[str, ...] = ()


class Backend(NamedTuple):
    """What a backend needs, which calls it takes, and how it computes.

    Its module gets inputs that were checked, and defines these functions (shapes are as in `arm_zoo.ops`):

    causal_conv(x, weight, bias, order) -> u: tokens (B, L, D) -> sequences (K, B, L, D); order (K, L) may be None.
    causal_conv_backward(grad, x, weight, bias, order) -> the gradients of x, weight and bias, given that of u.
    selective_scan(scan, save_states, gate) -> y (B, L, D) and saved states. `scan` is `ScanInputs`, also with step
        sizes of low rank; y is multiplied by SiLU(gate), (B, L, D), unless gate is None; the states are memory by
        `empty_states`, filled if save_states.
    selective_scan_backward(grad, scan, saved) -> the gradients of u, whole delta, A, B, C, D and delta_bias, given
        that of y.

    With own_kernels there is also gate_backward(grad, z, y, grad_z, grad_y). Its last two inputs are memory for the
    results, and so is one more input of selective_scan, for y without gate, and of causal_conv_backward, for grad_x.
    Then selective_scan(..., norm=`Norm`) gives the layer norm of y. The module of `reference` has only causal_conv and
    selective_scan(scan) -> y, whose gradients autograd derives.
    """

    module: str
    packages: tuple[Package, ...] = ()
    device: str | None = None  # the type of device that it runs on; None for any
    dtypes: tuple[torch.dtype, ...] = ()  # of the sequences; none for any
    compute_capability: tuple[int, int] | None = None  # the least, of NVIDIA GPUs; None for any GPU
    auto: int = 0  # its rank for "auto", which chooses the highest that fits and runs; 0: never chosen
    plain: bool = False  # gates and norms run in PyTorch, too; with all other backends Triton's kernels may run them
    interpreted: bool = False  # runs on the CPU, too, if TRITON_INTERPRET=1
    saves_states: bool = True  # for the backward pass, which scans again if there are none
    directions_inside: bool = False  # in memory, convolved sequences have the axis of steps before that of directions
    token_order: bool = True  # reads tokens where they lie; else they are copied into scan order first
    own_kernels: bool = False  # trains a mixer as one operator, and saves states of 16-bit sequences in 16 bits

    def why_not_here(self) -> str | None:
        """Why the backend cannot run here, with what to do about it; None if it can."""
        for module, package, install, uses in self.packages:
            try:
                found = importlib.import_module(module)
            except ImportError as error:
                return f"it needs the package {package} ({error}): {install}"
            if any(not hasattr(found, name) for name in uses):
                upgrade = install.replace("install", "install --upgrade", 1)
                return f"it needs a newer version of the package {package}: {upgrade}"
        there = self.device is None or torch.get_device_module(self.device).is_available()
        if not (there or (self.interpreted and _interpreting())):
            advice = "on the CPU use 'torch', or TRITON_INTERPRET=1 to test 'triton' slowly"
            return f"it needs a {str(self.device).upper()} device; {advice}"
        least = self.compute_capability
        if least is not None and (torch.version.hip or torch.cuda.get_device_capability() < least):
            return f"it needs an NVIDIA GPU of compute capability {least[0]}.{least[1]} or newer; use 'triton'"
        return None

    def why_not_for(self, device: str, dtype: torch.dtype) -> str | None:
        """Why the backend does not take sequences of this type on this type of device; None if it does."""
        fits = self.device in (None, device) or (self.interpreted and _interpreting())
        if fits and (not self.dtypes or dtype in self.dtypes):
            return None
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        place = "the CPU" if self.device == "cpu" else str(self.device).upper()
        return f"takes {types} on {place}, got {dtype} on {device}; use 'auto' or 'torch'"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")  # as Triton reads it


_TRITON = Package("triton", "triton", "pip install triton (Linux builds of torch bring it)")
_CUDA_CORE = Package(
    "cuda.core",
    "cuda-core",
    "pip install 'arm-zoo[cuda]' (with torch before 2.10 also 'cuda-core[cu12]')",
    uses=("Device", "LaunchConfig", "Program", "ProgramOptions", "launch"),
)
_NUMBA = Package("numba", "numba", "pip install 'arm-zoo[cpu]'")
_CONV = Package("causal_conv1d", "causal-conv1d", "pip install 'arm-zoo[kernels]'")
_SCAN = Package("selective_scan_cuda", "mamba-ssm with its CUDA extension", "pip install 'arm-zoo[kernels]'")
_SMALL = (torch.float32, torch.bfloat16, torch.float16)

BACKENDS = {
    "reference": Backend("arm_zoo.ops.reference", plain=True, token_order=False),  # the plain loop
    "torch": Backend("arm_zoo.ops.cpu.chunked", plain=True, directions_inside=True),  # the fast path on any device
    # compiled loops for the CPU
    "numba": Backend("arm_zoo.ops.cpu.numba", (_NUMBA,), "cpu", (torch.float32,), auto=1, own_kernels=True),
    # GPU kernels, and the same with faster scans
    "triton": Backend("arm_zoo.ops.triton", (_TRITON,), "cuda", _SMALL, auto=1, interpreted=True, own_kernels=True),
    "cuda": Backend("arm_zoo.ops.cuda.launch", (_TRITON, _CUDA_CORE), "cuda", _SMALL, (8, 0), 2, own_kernels=True),
    # the kernels of the package mamba-ssm, for comparison
    "mamba_ssm": Backend(
        "arm_zoo.ops.mamba_ssm", (_CONV, _SCAN), "cuda", _SMALL, saves_states=False, token_order=False
    ),
}
_announced: set[str] = set()


@functools.cache
def why_not(name: str) -> str | None:
    """Why a backend cannot run here; None if it can."""
    return BACKENDS[name].why_not_here()


def available_backends() -> list[str]:
    """Names of the backends that run here."""
    return [name for name in BACKENDS if why_not(name) is None]


def _check(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown scan backend {name!r}; choose 'auto' or one of {available_backends()}")
    if name != "auto" and (reason := why_not(name)) is not None:
        raise ValueError(f"scan backend {name!r} cannot run here: {reason}")
    return name


def _from_environment() -> str:
    try:
        return _check(os.environ.get("ARM_ZOO_SCAN") or "auto")
    except ValueError as error:
        raise ValueError(f"environment variable ARM_ZOO_SCAN: {error}") from None


class _Choice:
    def __init__(self, name: str) -> None:
        self.name, self.thread = name, _thread()


def _thread() -> int | None:
    return None if torch.compiler.is_compiling() else threading.get_ident()  # compiled code cannot ask for it


# The choice of the process, then those of the open blocks of all threads; the last one is in force. Each change to the
# list is atomic.
_choices = [_Choice(_from_environment())]


def get_scan_backend() -> str:
    """The backend in force: a name from `available_backends()` or "auto"."""
    return _choices[-1].name


def set_scan_backend(name: str) -> None:
    """Choose the backend of every later scan in this process; in a `scan_backend` block, until the block ends.

    "auto" chooses `cuda` or else `triton` on CUDA devices, and `numba` for float32 on the CPU, if they are installed.
    Otherwise, and always for float64, it chooses `torch`. For derivatives by torch.func and in forward mode it chooses
    `reference`.

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


# Runs as plain Python while a model is traced, where the same transforms are active as outside.
@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether torch.func or forward mode is differentiating, which custom operators would silently ignore."""
    derivatives = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() in derivatives for level in levels)


def resolve_backend(x: Tensor) -> str:
    """The backend to run a call on `x`; ValueError if the one in force takes no such tensors or derivatives."""
    if x.is_meta:  # nothing is computed: the shapes are the same for all
        return "torch"
    selected = get_scan_backend()
    if is_transformed():
        if selected not in ("auto", "reference"):
            raise ValueError(
                f"scan backend {selected!r} knows neither torch.func's derivatives nor forward-mode ones; "
                "use 'auto', which takes 'reference' there"
            )
        return "reference"
    if selected == "auto":
        return _choose(x.device.type, x.dtype)
    if selected != "reference":
        _check_onnx_export(x.dtype)
    if (reason := BACKENDS[selected].why_not_for(x.device.type, x.dtype)) is not None:
        raise ValueError(f"scan backend {selected!r} {reason}")
    return selected


# Runs as plain Python while a model is traced: within a trace, some versions of torch take all compilation for export.
@torch.compiler.assume_constant_result
def _choose(device: str, dtype: torch.dtype) -> str:
    """The best installed backend for such tensors; `torch` for exports, which may run anywhere."""
    _check_onnx_export(dtype)
    if torch.compiler.is_exporting():
        return "torch"
    fitting = [name for name, row in BACKENDS.items() if row.auto and row.device == device and dtype in row.dtypes]
    fitting.sort(key=lambda name: -BACKENDS[name].auto)
    name = next((name for name in fitting if why_not(name) is None), "torch")
    if name not in _announced:
        _announced.add(name)
        _logger.info("scan backend: auto chose %r (available: %s)", name, ", ".join(available_backends()))
    return name


@torch.compiler.assume_constant_result
def _check_onnx_export(dtype: torch.dtype) -> None:
    """Refuse an export to ONNX that would fail later with an error that does not say what to do."""
    if not torch.onnx.is_in_onnx_export():
        return
    if torch.jit.is_tracing() or "arm_zoo.onnx" not in sys.modules:
        raise RuntimeError(
            "torch.onnx.export does not know arm_zoo's operators: `import arm_zoo.onnx` before it and export with "
            "dynamo=True, or type `python -m hub export MODEL FILE` in a checkout"
        )
    if dtype != torch.float32:
        raise RuntimeError(f"exports to ONNX are in float32, got {dtype}: export model.float(), convert the file then")
