"""The CUDA kernels themselves without a GPU: a C++ compiler makes functions of them, whose threads take turns."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from arm_zoo.ops import reference
from arm_zoo.ops.layout import ScanInputs, in_order
from tests.helpers import emulated_gpu
from tests.helpers.cuda_backend import cuda_backend

pytest.importorskip("triton", reason="no triton in this build of torch")
pytestmark = pytest.mark.skipif(emulated_gpu.COMPILER is None, reason="needs the compiler g++ on Linux")

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # relative L2


def merged(y: Tensor, order: Tensor | None, share: float, gate: Tensor | None, **_: Any) -> Tensor:
    """What Triton's kernel computes: the sum of the directions' outputs (K, B, L, D), in token order."""
    y = y.float() if order is None else in_order(y.float(), order.argsort(dim=-1))
    return y.sum(0) * share


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The backend's module, whose launches run on the CPU."""
    with cuda_backend(monkeypatch, emulated_gpu.Program, emulated_gpu.launch) as module:
        monkeypatch.setattr(module, "merge", merged)
        yield module


def draw(
    directions: int, batch: int, length: int, channels: int, d_state: int, rank: int, dtype: torch.dtype,
    *, shared: bool = False, per_image: bool = False, biased: bool = True,
) -> ScanInputs:  # fmt: skip
    """Inputs as they lie in a model: step sizes of low rank, B and C are parts of wider rows."""
    torch.manual_seed(0)
    sequences = directions, batch, length
    rows = torch.randn(batch, length, directions, (rank or channels) + 2 * d_state).to(dtype).permute(2, 0, 1, 3)
    delta, B, C = rows.split([rank or channels, d_state, d_state], dim=-1)
    u = torch.randn(*sequences[shared:], channels).to(dtype)
    A = -torch.randn(directions, channels, d_state).exp()
    D, bias = torch.randn(2, directions, channels)
    weight = torch.randn(directions, channels, rank) / math.sqrt(rank) if rank else None
    tables = (batch, directions) if per_image else (directions,)
    order = torch.rand(*tables, length).argsort(dim=-1)
    return ScanInputs(
        u, delta, A, B, C, D, bias - 1 if biased else None, weight, True, order, mean=not shared
    )  # fmt: skip


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-6)).item()


def exact(scan: ScanInputs) -> tuple[Tensor, list[Tensor]]:
    """The reference's output in float64, and its inputs, of which it has gradients."""
    inputs = [None if t is None else t.double().requires_grad_() for t in scan[:8]]
    output = reference.selective_scan(ScanInputs(*inputs, *scan[8:]).in_scan_order())
    return output, [t for t in inputs if t is not None]


def check(cuda: ModuleType, scan: ScanInputs) -> None:
    """Outputs and all gradients, against the reference in float64."""
    limit, (expected, _) = LIMITS[scan.u.dtype], exact(scan)
    for save in (False, True):
        y, saved = cuda.selective_scan(scan, save, None)
        assert relative_error(y, expected) < limit
    whole = scan.with_whole_steps()  # which the backward kernel takes
    expected, leaves = exact(whole)
    grad = torch.randn(y.shape).to(scan.u.dtype)
    grads = cuda.selective_scan_backward(grad, whole, saved)
    names = "u", "delta", "A", "B", "C", "D", "delta_bias"
    expected_grads = torch.autograd.grad(expected, leaves, grad.double())  # of a bias only where there is one
    for name, got, right in zip(names, grads, expected_grads, strict=False):
        assert relative_error(got, right) < limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_scan_of_low_rank_steps(cuda: ModuleType, dtype: torch.dtype) -> None:
    check(cuda, draw(2, 3, 37, 72, 16, 12, dtype))


@pytest.mark.parametrize("length", [1, 16, 17])
def test_lengths(cuda: ModuleType, length: int) -> None:
    check(cuda, draw(1, 2, length, 24, 16, 48, torch.bfloat16))


@pytest.mark.parametrize(
    "d_state, channels, rank",
    [
        (16, 33, 0),
        (4, 66, 6),
        (1, 72, 8),
        pytest.param(8, 40, 0, marks=pytest.mark.slow),
        pytest.param(2, 33, 0, marks=pytest.mark.slow),
        pytest.param(1, 35, 0, marks=pytest.mark.slow),
    ],
)
def test_numbers_of_states(cuda: ModuleType, d_state: int, channels: int, rank: int) -> None:
    """Also numbers of channels that are odd or fill no block."""
    check(cuda, draw(2, 2, 19, channels, d_state, rank, torch.bfloat16, biased=d_state > 2))


@pytest.mark.parametrize("d_state, rank", [(16, 6), (1, 16), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_tokens_that_directions_share(
    cuda: ModuleType, d_state: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single state also with two pairs of channels a lane, which else only work for a whole GPU takes."""
    monkeypatch.setattr(cuda, "_WARPS_OF_WIDE_LANES", 0)
    check(cuda, draw(4, 3, 35, 132, d_state, rank, torch.float16, shared=True))


def test_orders_of_each_image(cuda: ModuleType) -> None:
    check(cuda, draw(2, 3, 21, 64, 16, 4, torch.bfloat16, per_image=True))


def test_parameters_as_they_lie_in_a_model(cuda: ModuleType) -> None:
    """Logarithms of rates, and all parameters in 16 bits: the forward kernel reads them so, in inference."""
    scan = draw(2, 2, 20, 64, 16, 12, torch.bfloat16)
    parameters = {"A": (-scan.A).log(), "D": scan.D, "delta_bias": scan.delta_bias}
    halves = {name: value.bfloat16() for name, value in parameters.items()}
    y, _ = cuda.selective_scan(scan._replace(**halves, log_rates=True), False, None)
    rates = -halves["A"].double().exp()
    expected, _ = exact(scan._replace(A=rates, D=halves["D"], delta_bias=halves["delta_bias"]))
    assert relative_error(y, expected) < LIMITS[torch.bfloat16]


# lanes that share a pair of channels, parts of the length in the forward scan, parts in the backward scan; length
SPLITS = [(2, 1, 1, 37), (4, 1, 2, 37), (1, 4, 2, 70), (4, 4, 4, 63)]
LARGE_SPLITS = [pytest.param(*split, marks=pytest.mark.slow) for split in ((2, 8, 4, 130), (4, 16, 8, 257))]


@pytest.mark.parametrize("lanes, parts, parts_backward, length", [*SPLITS, *LARGE_SPLITS])
@pytest.mark.parametrize("rank", [12, pytest.param(0, marks=pytest.mark.slow)])
def test_sequences_that_are_split(
    cuda: ModuleType,
    lanes: int,
    parts: int,
    parts_backward: int,
    length: int,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "forward_split", lambda *_: (lanes, parts))
    monkeypatch.setattr(cuda, "backward_split", lambda *_: parts_backward)
    check(cuda, draw(2, 1, length, 80, 16, rank, torch.bfloat16))
