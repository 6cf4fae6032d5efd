"""The convolution of maps with SiLU as one kernel, and when VMamba's mixer takes it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import arm_zoo
from arm_zoo.layers.ss2d import SS2D, order_for
from arm_zoo.ops import fused
from tests.arm_zoo.ops.test_scan import Recorder
from tests.arm_zoo.ops.test_triton import LIMITS, run_in_the_interpreter

pytest.importorskip("triton", reason="no triton in this build of torch")


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=len(weight))
    return F.silu(y).permute(0, 2, 3, 1)


def relative_errors(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True)]


def errors(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[float]:
    """Relative L2 errors of the output and of the gradients of map and weight, against float64."""
    torch.manual_seed(0)
    drawn = (torch.randn(size, device=device).to(dtype) for size in (shape, (shape[-1], 1, 3, 3), shape))
    x, weight, grad = drawn
    x, grad = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, grad))  # lie otherwise than results do
    results = []
    for run, kind in ((torch.ops.arm_zoo.conv2d_silu, dtype), (plain, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, weight)]
        y = run(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))])
    assert all(t.is_contiguous() for t in results[0])
    return relative_errors(*results)


def check_operator(device: str) -> None:
    """What PyTorch asks of it, and that it counts the operations that the plain convolution counts."""
    x, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 4, 6), (6, 1, 3, 3)))
    torch.library.opcheck(torch.ops.arm_zoo.conv2d_silu.default, (x, weight))
    counts = []
    for run in (torch.ops.arm_zoo.conv2d_silu, plain):
        with FlopCounterMode(display=False) as forward:
            y = run(x, weight)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0][0] == counts[1][0] == 2 * 9 * x.numel()
    assert counts[0][1] == 2 * counts[0][0]  # PyTorch counts the weight's gradient as if it were not depth-wise


def check_mixer(device: str, choose: Callable[[bool], None], dtype: torch.dtype, limit: float) -> None:
    """With the kernel, which `choose` turns on or off, a mixer gives what it gives without, gradients included."""
    torch.manual_seed(0)
    made, x = SS2D(12, expand=2.0, device=device), torch.randn(2, 3, 4, 12, device=device, requires_grad=True)
    results = []
    for chosen in (True, False):
        choose(chosen)
        autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        with arm_zoo.scan_backend("torch"), autocast, Recorder() as recorder:
            y = made(x, order_for(x))
        assert recorder.counts["arm_zoo::conv2d_silu"] == chosen
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *made.parameters()])])
    assert all(a.dtype == b.dtype for a, b in zip(*results, strict=True))
    assert max(relative_errors(*results)) < limit


def choose_in_mixer(chosen: bool) -> None:
    fused.convolves_in_kernel = lambda *_: chosen


IN_THE_INTERPRETER = {
    "numbers": """
for shape in ((2, 1, 1, 5), (1, 3, 8, 70)):
    found = errors(shape, torch.float32, "cpu")
    assert max(found) < 1e-6, (shape, found)
check_mixer("cpu", choose_in_mixer, torch.bfloat16, 3e-2)
""",
    "the rest": """
for dtype in (torch.bfloat16, torch.float16):
    assert max(errors((2, 2, 3, 6), dtype, "cpu")) < 1e-2, dtype
assert max(errors((1, 30, 15, 2), torch.float32, "cpu")) < 1e-6
check_operator("cpu")
check_mixer("cpu", choose_in_mixer, torch.float32, 1e-5)
limits = ((70_000, 1, 1, 1), "up to 65,535"), ((1, 2**10, 2**10, 2**9), "1,048,576 steps of 512 channels")
for shape, message in limits:
    try:
        torch.ops.arm_zoo.conv2d_silu(torch.empty(1, 1, 1, 1).expand(shape), torch.empty(shape[-1], 1, 3, 3))
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("not refused")
""",
}


@pytest.mark.parametrize("part", ["numbers", pytest.param("the rest", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(part: str) -> None:
    imports = "from tests.arm_zoo.ops.test_conv2d import check_mixer, check_operator, choose_in_mixer, errors"
    run_in_the_interpreter(f"{imports}\n{IN_THE_INTERPRETER[part]}")


def changed(**settings: Any) -> Callable[[SS2D], None]:
    def change(mixer: SS2D) -> None:
        mixer.conv2d = nn.Conv2d(64, 64, **{"kernel_size": 3, "padding": 1, "groups": 64, "bias": False, **settings})

    return change


@pytest.mark.parametrize(
    "change, size, backend, taken",
    [
        (lambda mixer: None, 64, "auto", True),
        (lambda mixer: None, 63, "auto", False),  # few tokens are faster in PyTorch
        (lambda mixer: None, 64, "torch", False),
        (lambda mixer: mixer.conv2d.register_forward_hook(lambda *_: None), 64, "auto", False),
        (changed(), 64, "auto", True),
        (changed(dtype=torch.bfloat16), 64, "auto", False),
        (changed(bias=True), 64, "auto", False),
        (changed(kernel_size=5, padding=2), 64, "auto", False),
        (changed(padding_mode="circular"), 64, "auto", False),
        (changed(padding="same"), 64, "auto", False),
        (changed(dilation=2, padding=2), 64, "auto", False),
        (changed(groups=32), 64, "auto", False),
    ],
)
def test_when_the_kernel_is_taken(
    change: Callable[[SS2D], Any], size: int, backend: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_runs_kernels", lambda *_: True)
    for kind in (SS2D, nn.Linear, nn.Conv2d, nn.LayerNorm):  # torch 2.8 fills no weights on a GPU that is not there
        monkeypatch.setattr(kind, "reset_parameters", lambda _: None)
    with FakeTensorMode(), torch.device("cuda"), arm_zoo.scan_backend(backend):
        mixer = SS2D(32, expand=2.0)
        change(mixer)
        assert fused.convolves_in_kernel(mixer.conv2d, torch.empty(1, size, 64, 64)) == taken
        exact = SS2D(32, expand=2.0, dtype=torch.float64)
        assert not fused.convolves_in_kernel(exact.conv2d, torch.empty(1, 64, 64, 64, dtype=torch.float64))
    assert not fused.convolves_in_kernel(SS2D(32, expand=2.0).conv2d, torch.empty(1, 64, 64, 64))  # on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 5), (1, 3, 7, 70), (3, 14, 14, 192), (2, 57, 31, 130), (40, 7, 7, 2048), (2, 112, 56, 256)]
)
def test_kernels_on_the_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert max(errors(shape, dtype, "cuda")) < LIMITS[dtype]


@pytest.mark.gpu
def test_operator_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check_operator("cuda")
    monkeypatch.setattr(fused, "convolves_in_kernel", None)  # so that it is there again after the test
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        check_mixer("cuda", choose_in_mixer, dtype, limit)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_mixer_takes_the_kernel(trained: bool, compiled: bool) -> None:
    mixer, x = SS2D(32, expand=2.0).cuda(), torch.randn(8, 28, 28, 32, device="cuda")
    run: Any = torch.compile(mixer, fullgraph=True) if compiled else mixer

    def step() -> torch.Tensor:
        with torch.set_grad_enabled(trained), torch.autocast("cuda", torch.bfloat16):
            y = run(x, order_for(x))
        if trained:
            y.float().square().mean().backward()
        return y

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    ran = {event.key for event in profile.key_averages()}
    assert "_conv2d_silu_kernel" in ran and ("_conv2d_backward_kernel" in ran) == trained


@pytest.mark.gpu
def test_runs_give_the_same_bits() -> None:
    assert errors((9, 14, 14, 96), torch.bfloat16, "cuda") == errors((9, 14, 14, 96), torch.bfloat16, "cuda")
