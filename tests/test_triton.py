"""The Triton kernels: in Triton's interpreter on the CPU, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch

import arm_zoo
from arm_zoo.order import scan_order
from arm_zoo.scan import causal_conv, selective_scan

pytest.importorskip("triton", reason="no triton in this build of torch")

IN_THE_INTERPRETER = """
import sys
import torch
sys.path.insert(0, "tests")
from test_triton import CASES, worst_error
import arm_zoo
assert arm_zoo.get_scan_backend() == "triton", arm_zoo.get_scan_backend()
for case in CASES:
    error = worst_error(*case, torch.float32, "cpu")
    assert error < 1e-5, (case, error)
model = arm_zoo.create_pretraining_model("arm_pico", embed_dim=8, depth=1, d_state=2, decoder_dim=64, decoder_depth=1)
images = torch.randn(1, 1, 8, 8)
losses = []
for backend in ("triton", "torch"):
    with arm_zoo.scan_backend(backend):
        loss = model(images)[0]
        model.zero_grad()
        loss.backward()
        losses.append([loss.item(), model.patch_embed.proj.weight.grad.norm().item()])
assert torch.allclose(*map(torch.tensor, losses), rtol=1e-5), losses
print("the kernels agree")
"""
# directions, height, width, class token's index, channels, d_state
CASES = [(1, 1, 1, None, 6, 1), (4, 3, 2, 3, 70, 3), (2, 2, 9, 0, 5, 4), (4, 4, 5, 10, 33, 2)]


def worst_error(
    directions: int, height: int, width: int, cls_index: int | None, channels: int, d_state: int,
    dtype: torch.dtype, device: str,
) -> float:  # fmt: skip
    """Largest relative L2 error of outputs and gradients of both operations, against the reference in float64."""
    torch.manual_seed(0)
    order = scan_order(height, width, directions, cls_index, device=device)
    batch, length = 2, order.shape[1]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    rates = -draw(directions, channels, d_state).exp()
    skip, bias = draw(directions, channels), draw(directions, channels)
    u, delta = (draw(directions, batch, length, channels).to(dtype) for _ in range(2))
    into, out = (draw(directions, batch, length, d_state).to(dtype) for _ in range(2))
    gate, tokens = (draw(batch, length, channels).to(dtype) for _ in range(2))
    taps = draw(directions, channels, 4)

    def everything(backend: str, convert: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [u, delta - 1, rates, into, out, skip, gate, bias, tokens, taps]
        leaves = [t.detach().to(convert or t.dtype).requires_grad_() for t in leaves]
        with arm_zoo.scan_backend(backend):
            y = selective_scan(*leaves[:8], True, order)
            v = causal_conv(leaves[8], leaves[9], leaves[5], order)
        (y.double().sin().sum() + v.double().sin().sum()).backward()
        return [y, v, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    pairs = zip(everything("triton", None), everything("reference", torch.float64), strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in pairs)


def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ARM_ZOO_SCAN": "triton", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the kernels agree" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("case", [*CASES, (4, 14, 14, 98, 96, 16)])
def test_kernels_on_the_gpu(
    case: tuple[int, int, int, int | None, int, int], dtype: torch.dtype, limit: float
) -> None:  # fmt: skip
    assert worst_error(*case, dtype, "cuda") < limit


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs where there is CUDA")
def test_without_a_gpu_the_backend_says_why() -> None:
    with pytest.raises(ValueError, match="scan backend 'triton' cannot run here: it needs a CUDA device"):
        arm_zoo.set_scan_backend("triton")
