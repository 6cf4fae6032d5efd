"""The CUDA kernels without a GPU: NVRTC compiles them, and the host gives them as many arguments as they take."""

import re
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from arm_zoo.ops.layout import ScanInputs
from tests.helpers.cuda_backend import cuda_backend

pytest.importorskip("triton", reason="no triton in this build of torch")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="no NVRTC in this build of torch")


class Program:
    """The compiler, as `cuda.core` has it; a kernel is its number of parameters."""

    def __init__(self, code: str, language: str, options: Any) -> None:
        self.code, self.options = code, [f"-std={options.std}".encode(), f"-arch={options.arch}".encode()]

    def compile(self, target: str) -> "Program":
        _, program = nvrtc.nvrtcCreateProgram(self.code.encode(), b"scan.cu", 0, [], [])
        (result,) = nvrtc.nvrtcCompileProgram(program, len(self.options), self.options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * (size + 1)  # it is written into: a string of one byte would be Python's only one of its kind
            nvrtc.nvrtcGetProgramLog(program, log)
            pytest.fail(log.decode())
        return self

    def get_kernel(self, name: str) -> int:
        return re.search(rf" {name}\((.*?)\)", self.code, re.DOTALL)[1].count(",") + 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The backend's module over a compiler without a device; `cuda.launches` has (parameters, arguments, block)."""
    launches: list[tuple[int, int, int]] = []

    def launch(stream: Any, config: SimpleNamespace, kernel: int, *arguments: Any) -> None:
        launches.append((kernel, len(arguments), config.block))

    with cuda_backend(monkeypatch, Program, launch) as module:
        monkeypatch.setattr(module, "merge", lambda y, *_, **__: y[0])
        monkeypatch.setattr(module, "_WARPS_OF_WIDE_LANES", 0)  # no work is then too little for lanes of four channels
        module.launches = launches
        yield module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "d_state, channels, rank, biased, shared",
    [
        (16, 768, 48, True, False),
        (8, 33, 0, False, False),
        (4, 64, 96, True, True),
        (2, 33, 0, True, False),
        (1, 256, 8, True, True),
        (1, 70, 8, False, True),
        (1, 70, 0, False, False),
    ],
)
def test_kernels_compile(
    d_state: int, channels: int, rank: int, biased: bool, shared: bool, dtype: torch.dtype, cuda: ModuleType
) -> None:
    u = torch.empty(*(() if shared else (4,)), 1, 5, channels, dtype=dtype)
    rows = torch.empty(4, 1, 5, (rank or channels) + 2 * d_state, dtype=dtype)
    delta, B, C = rows.split([rank or channels, d_state, d_state], dim=-1)
    A, D = torch.empty(4, channels, d_state), torch.empty(4, channels)
    weight = torch.empty(4, channels, rank) if rank else None
    order = torch.arange(5).expand(4, -1)
    scan = ScanInputs(u, delta, A, B, C, D, D if biased else None, weight, True, order, not shared)
    cuda.selective_scan(scan._replace(A=A.to(dtype), D=D.to(dtype), log_rates=True), False, None)
    _, saved = cuda.selective_scan(scan, True, None)
    whole = u.expand(scan.shape)
    grads = cuda.selective_scan_backward(whole[0], scan._replace(delta=whole), saved)
    assert [grad.shape for grad in grads[:2]] == [u.shape, scan.shape]
    assert all(parameters == arguments for parameters, arguments, _ in cuda.launches)
    images = {0: 1, 8: 4, 48: 4, 96: 2}[rank if dtype != torch.float32 else 0]
    assert [block for *_, block in cuda.launches] == [32 * images, 32 * images, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_for_an_order_of_each_image(dtype: torch.dtype, cuda: ModuleType) -> None:
    u, delta, into = (torch.empty(4, 2, 5, size, dtype=dtype) for size in (64, 64, 16))
    rates, order = torch.empty(4, 64, 16), torch.arange(5).expand(2, 4, -1).contiguous()
    scan = ScanInputs(u, delta, rates, into, into, rates[..., 0], None, None, True, order, True)
    _, saved = cuda.selective_scan(scan, True, None)
    grads = cuda.selective_scan_backward(u[0], scan, saved)
    assert grads[0].shape == u.shape and len(cuda.launches) == 2
    assert all(parameters == arguments for parameters, arguments, _ in cuda.launches)


@pytest.mark.parametrize("d_state, rank, lanes, parts", [(16, 48, 2, 8), (16, 64, 1, 4), (1, 0, 1, 32)])
def test_kernels_of_parts_compile(d_state: int, rank: int, lanes: int, parts: int, cuda: ModuleType) -> None:
    """What the backward scan's parts leave of the gradients of A, D and delta_bias is added up."""
    cuda.forward_split, cuda.backward_split = lambda *_: (lanes, parts), lambda *_: 2
    u, B, C = (torch.empty(2, 3, 20, size, dtype=torch.bfloat16) for size in (70, d_state, d_state))
    delta, weight = (torch.empty(2, 3, 20, rank, dtype=u.dtype), torch.empty(2, 70, rank)) if rank else (u, None)
    A, D = torch.empty(2, 70, d_state), torch.empty(2, 70)
    scan = ScanInputs(u, delta, A, B, C, D, D, weight, True, None, True)
    _, saved = cuda.selective_scan(scan, True, None)
    grads = cuda.selective_scan_backward(u[0], scan._replace(delta=u), saved)
    assert [grad.shape for grad in grads] == [t.shape for t in (u, u, A, B, C, D, D)]
    assert all(parameters == arguments for parameters, arguments, _ in cuda.launches)
    assert [block for *_, block in cuda.launches] == [128, 64]


@pytest.mark.parametrize(
    "warps, length, lanes, parts",
    [
        (48, 197, 4, 8),  # one image of ARM-B at 224 pixels: 13 chunks of steps, so 16 parts would leave some without
        (384, 197, 4, 1),  # eight: parts would walk more steps than the GPU gains time
        (1_536, 197, 1, 1),
        (12_288, 197, 1, 1),
        (192, 577, 1, 8),  # four at 384 pixels
        (384, 4_097, 4, 1),  # eight at 1024
        (48, 16_385, 1, 32),  # one at 2048
        (192, 16_385, 1, 8),
        (1, 16_385, 4, 32),  # the most that a cluster has
        (1, 16, 4, 1),  # one chunk is not split
        (1, 64, 4, 4),
    ],
)
def test_parts_of_the_forward_scan(warps: int, length: int, lanes: int, parts: int, cuda: ModuleType) -> None:
    assert cuda.forward_split(warps, length, 16, 4, 132, 8) == (lanes, parts)
    assert cuda.forward_split(warps, length, 8, 4, 132, 8)[0] <= 2  # a lane has no fewer than four states
    assert cuda.forward_split(warps, length, 4, 4, 132, 8)[0] == 1
    assert cuda.forward_split(warps, length, 16, 4, 108, 1)[1] in (1, 4)  # a block, where there are no clusters


@pytest.mark.parametrize(
    "blocks, length, parts", [(48, 197, 8), (384, 4097, 2), (396, 4097, 2), (397, 4097, 1), (1, 16, 1), (1, 17, 2)]
)
def test_parts_of_the_backward_scan(blocks: int, length: int, parts: int, cuda: ModuleType) -> None:
    assert cuda.backward_split(blocks, length, 16, 132, 8) == parts
    assert cuda.backward_split(blocks, length, 16, 132, 1) == 1


def test_what_is_read_in_pairs_lies_where_pairs_can_be_read(cuda: ModuleType) -> None:
    flat = torch.arange(33.0)
    moved = cuda.aligned(flat[1:].view(4, 8))
    assert moved.data_ptr() % 16 == 0 and moved.equal(flat[1:].view(4, 8))
    assert cuda.aligned(flat).data_ptr() == flat.data_ptr()
