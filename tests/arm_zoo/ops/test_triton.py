"""The GPU kernels: Triton's in its interpreter on the CPU, and all of them on a GPU where there is one."""

import importlib
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import arm_zoo
from arm_zoo.layers.block import Block, run_blocks
from arm_zoo.layers.mixer import MambaMixer
from arm_zoo.layers.mlp import SwiGLU
from arm_zoo.layers.order import scan_order
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.layers.ss2d import SS2D, order_for
from arm_zoo.models.arm import DIRECTIONS
from arm_zoo.ops import causal_conv, mamba_inner, selective_scan
from arm_zoo.ops.fused import Residual
from arm_zoo.ops.layout import inner
from tests.arm_zoo.ops.test_scan import MIXERS, Mixer, Recorder, check_mixer, largest

pytest.importorskip("triton", reason="no triton in this build of torch")

HEADER = """
from pathlib import Path
import torch
from tests.arm_zoo.ops.test_order_per_image import worst_error as error_with_own_orders
from tests.arm_zoo.ops.test_scan import MIXERS, check_mixer, largest, saved_for_backward
from tests.arm_zoo.ops.test_triton import (
    CASES, add_norm_errors, check_deferred_root_mean_squares, check_deferred_sums, check_mixer_norms_inside,
    check_operators, check_special_values, extreme_error, gate_errors, gated_product_error, inference_error,
    inner_error, merged_norm_error, worst_error,
)
import arm_zoo
from arm_zoo.ops import causal_conv, mamba_inner, selective_scan
from arm_zoo.ops.triton import conv, merge
assert arm_zoo.get_scan_backend() == "triton", arm_zoo.get_scan_backend()
"""

IN_THE_INTERPRETER = {
    "scans": """
for case in CASES:
    error = worst_error(*case, torch.float32, "cpu")
    assert error < 1e-5, (case, error)
for dtype in (torch.bfloat16, torch.float16):
    error = worst_error(*CASES[1], dtype, "cpu", rank=4)
    assert error < 1e-2, (dtype, error)
for case, dtype in (((4, 2, 3, None, 33, 1), torch.float32), (CASES[1], torch.float32), (CASES[0], torch.bfloat16)):
    for rank in (0, 4):
        error = worst_error(*case, dtype, "cpu", rank=rank, shared=True)
        assert error < {torch.float32: 1e-5}.get(dtype, 1e-2), (case, dtype, rank, error)
for case in ((1, 1, 65, None, 1, 2), (2, 2, 3, 4, 40, 16), (1, 2, 2, None, 33, 64)):
    error = worst_error(*case, torch.float32, "cpu")
    assert error < 1e-5, (case, error)
check_special_values("cpu", "triton")
for sizes, dtype in (((2, 2, 5, 4, 2), torch.float32), ((2, 2, 3, 4, 1), torch.float16)):
    error = error_with_own_orders("triton", dtype, sizes, first=2)
    assert error < {torch.float32: 1e-5}.get(dtype, 4e-2), (sizes, dtype, error)
for batch, directions in ((4, 1), (2, 4), (1, 4)):
    error = inner_error(batch, torch.float32, "cpu", directions=directions)
    assert error < 1e-5, (batch, directions, error)
for size, rate, dtype in ((1e-6, -1e4, torch.bfloat16), (50.0, -1e-4, torch.float16), (50.0, -1e4, torch.float32)):
    error = extreme_error(size, rate, dtype, "cpu")
    assert error < {torch.float32: 1e-4}.get(dtype, 1e-2), (size, rate, dtype, error)
""",
    "what is around the scans": """
check_mixer_norms_inside("cpu")
check_operators("cpu")
for shape in ((3, 130, 20), (1, 600), (1, 1, 2)):
    errors = gate_errors(shape, torch.float32, "cpu")
    assert largest(errors) < 1e-6, (shape, errors)
assert largest(gate_errors((200, 80), torch.bfloat16, "cpu")) < 5e-3
for centred in (True, False):
    for shape, scaled in (((3, 7, 20), True), ((1, 1, 64), False), ((2, 5, 130), False)):
        errors = add_norm_errors(shape, torch.float32, "cpu", scaled, centred)
        assert largest(errors) < 1e-6, (shape, centred, errors)
    for dtype in (torch.bfloat16, torch.float16):
        assert largest(add_norm_errors((2, 9, 40), dtype, "cpu", True, centred)) < 5e-3
for ordered in (False, True):
    for shape in ((9, 33), (1, 1100), (5, 96)):
        error = merged_norm_error(*shape, torch.float32, "cpu", ordered)
        assert error < 1e-6, (shape, ordered, error)
    assert merged_norm_error(9, 40, torch.float16, "cpu", ordered) < 5e-3
check_deferred_sums("cpu")
check_deferred_root_mean_squares("cpu")
for shape in ((2, 130, 64, 72), (1, 3, 96, 264), (1, 1, 200, 136)):
    error = gated_product_error(*shape, torch.float32, "cpu")
    assert error < 1e-6, (shape, error)
assert gated_product_error(2, 3, 72, 64, torch.float16, "cpu") < 1e-3
""",
    "memory, limits and a model": """
for most, dtype, limit in ((0, torch.float32, 1e-6), (2**23, torch.float32, 1e-6), (2**23, torch.float16, 1e-3)):
    merge.FEW = most
    error = inference_error(dtype, "cpu")
    assert error < limit, (most, dtype, error)
results = []
for bias in (torch.linspace(-2, 1, 10).view(5, 2).t(), torch.linspace(-2, 1, 10).view(5, 2).t().contiguous()):
    inputs = [torch.ones(2, 1, 3, 5), torch.ones(2, 1, 3, 5), -torch.ones(2, 5, 2), torch.ones(2, 1, 3, 2)]
    inputs += [torch.ones(2, 1, 3, 2), torch.ones(2, 5)]
    u = inputs[0].requires_grad_()
    y = selective_scan(*inputs, delta_bias=bias)  # however it lies in memory
    results.append([y, *torch.autograd.grad(y.sum(), u)])
assert all(torch.equal(*pair) for pair in zip(*results))
try:
    causal_conv(torch.empty(33_000, 1, 1), torch.empty(2, 1, 4), torch.empty(2, 1))
except ValueError as error:
    assert "up to 65,535 sequences at a time, got 66,000 (2 directions of 33,000 images)" in str(error), error
else:
    raise AssertionError("not refused")
for call in (
    lambda: causal_conv(torch.empty(1, 1, 1).expand(1, 2**20, 2**9), torch.empty(1, 2**9, 4), torch.empty(1, 2**9)),
    lambda: selective_scan(
        *[torch.empty(1, 1, 1, 1).expand(1, 1, 2**20, 2**9)] * 2, torch.empty(1, 2**9, 1),
        *[torch.empty(1, 1, 2**20, 1)] * 2, torch.empty(1, 2**9)
    ),
):
    try:
        call()
    except ValueError as error:
        assert "less than 2**29 numbers and 2**24 steps, got 1,048,576 steps of 512 channels" in str(error), error
    else:
        raise AssertionError("not refused")
tokens, taps, offset = torch.randn(2, 6, 5), torch.randn(2, 5, 4), torch.randn(2, 5)
order = torch.randperm(6).expand(2, -1)  # both directions in one row of memory
expected = causal_conv(tokens, taps, offset, order.contiguous())
assert torch.equal(causal_conv(tokens, taps, offset, order), expected)
conv._WARPS = 0  # as if there were many images: the backward pass then takes up to 128 steps at a time
for length, taps in ((3, 70), (130, 4)):
    leaves = [torch.randn(shape).requires_grad_() for shape in ((1, length, 2), (1, 2, taps), (1, 2))]
    results = []
    for backend in ("triton", "reference"):
        with arm_zoo.scan_backend(backend):
            y = causal_conv(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*results)), (length, taps, results)
shapes = [(2, 18, 16), (2, 8, 4), (2, 8), (2, 7, 8), (2, 8, 3), (2, 8), (2, 8, 2), (2, 8)]
leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
kept = saved_for_backward(lambda: mamba_inner(*leaves))
made = sorted(t.numel() for t in kept.values() if not any(t.data_ptr() == leaf.data_ptr() for leaf in leaves))
# saved states, the mean before its gate, and what x_proj makes; neither convolved sequences nor whole step sizes
assert made == [2 * 2 * 2 * 2 * 8, 2 * 18 * 8, 2 * 2 * 18 * 7], made
model = arm_zoo.create_pretraining_model("arm_pico", embed_dim=8, depth=1, d_state=2, decoder_dim=64, decoder_depth=1)
images = torch.randn(1, 1, 8, 8)
losses = []
for backend in ("triton", "torch"):
    with arm_zoo.scan_backend(backend):
        with torch.no_grad():
            inferred = model(images)[0]
        loss = model(images)[0]
        model.zero_grad()
        loss.backward()
        losses.append([inferred.item(), loss.item(), model.patch_embed.proj.weight.grad.norm().item()])
assert torch.allclose(*map(torch.tensor, losses), rtol=1e-5), losses
""",
}
# directions, height, width, class token's index, channels, d_state
SHARED = [
    (4, 7, 7, None, 66, 1),
    (4, 24, 24, 288, 64, 1),
    (4, 6, 3, None, 33, 1),
    (4, 5, 9, None, 72, 16),
    (2, 1, 3, 1, 64, 2),
]
CASES = [(1, 1, 1, None, 6, 1), (4, 3, 2, 3, 70, 3), (2, 2, 9, 0, 5, 4), (4, 4, 5, 10, 33, 2)]


def worst_error(
    directions: int, height: int, width: int, cls_index: int | None, channels: int, d_state: int,
    dtype: torch.dtype, device: str, kernels: str = "triton", rank: int = 0, shared: bool = False, batch: int = 2,
) -> float:  # fmt: skip
    """Largest relative L2 error of outputs and gradients of both operations, against the reference in float64.

    With a rank, step sizes of low rank and B and C are parts of wider rows, as in the mixer; shared, all directions
    read one u, everything is in token order, and the directions are added up, as in VMamba.
    """
    torch.manual_seed(0)
    order = scan_order(height, width, DIRECTIONS[:directions], cls_index, device=device)
    length = order.shape[1]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    rates = -draw(directions, channels, d_state).exp()
    skip, bias = draw(directions, channels), draw(directions, channels)
    u, delta = (draw(directions, batch, length, channels).to(dtype) for _ in range(2))
    into, out = (draw(directions, batch, length, d_state).to(dtype) for _ in range(2))
    weight = [draw(directions, channels, rank) / math.sqrt(rank)] if rank else []
    u = u[0] if shared else u
    if rank:
        rows = draw(batch, length, directions, rank + 2 * d_state).to(dtype).permute(2, 0, 1, 3)
        delta, into, out = rows.split([rank, d_state, d_state], dim=-1)
    gate, tokens = (draw(batch, length, channels).to(dtype) for _ in range(2))
    taps = draw(directions, channels, 4)
    grad_y, grad_v = draw(batch, length, channels).to(dtype), draw(directions, batch, length, channels).to(dtype)

    scan = partial(selective_scan, mean=not shared)

    def everything(backend: str, convert: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [u, delta if rank else delta - 1, rates, into, out, skip, gate, bias, tokens, taps, *weight]
        leaves = [t.detach().to(convert or t.dtype).requires_grad_() for t in leaves]
        with arm_zoo.scan_backend(backend):
            y = scan(*leaves[:8], True, order, *leaves[10:])
            v = causal_conv(leaves[8], leaves[9], leaves[5], order)
            with torch.no_grad():  # inference gates and norms inside the kernels
                gated = scan(*leaves[:8], True, order, *leaves[10:])
                normed = scan(*leaves[:8], True, order, *leaves[10:], norm=(leaves[5][0], leaves[7][0], 1e-3))
        torch.autograd.backward([y, v], [grad_y.to(y.dtype), grad_v.to(v.dtype)])
        return [y, gated, normed, v, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    pairs = zip(everything(kernels, None), everything("reference", torch.float64), strict=True)
    return largest(((a.double() - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in pairs)


def inner_error(
    batch: int,
    dtype: torch.dtype,
    device: str,
    kernels: str = "triton",
    channels: int = 20,
    d_state: int = 4,
    directions: int = 4,
) -> float:
    """Largest relative L2 error of `mamba_inner` in training, its output and gradients, against float64."""
    torch.manual_seed(0)
    rank, order = 6, scan_order(3, 2, DIRECTIONS[:directions], 3, device=device) if directions > 1 else None

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    xz, grad = (draw(batch, 7, size).to(dtype) for size in (2 * channels, channels))
    shapes = [(channels, 4), (channels,), (rank + 2 * d_state, channels), (channels, rank), (channels,)]
    weights = [draw(directions, *shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    weights += [-draw(directions, channels, d_state).exp(), draw(directions, channels)]

    def everything(backend: str, convert: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [t.detach().to(convert or t.dtype).requires_grad_() for t in (xz, *weights)]
        with arm_zoo.scan_backend(backend):
            y = mamba_inner(*leaves, order)
        y.backward(grad.to(y.dtype))
        return [y, *(leaf.grad for leaf in leaves)]

    pairs = zip(everything(kernels, None), everything("reference", torch.float64), strict=True)
    return largest(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def inference_error(dtype: torch.dtype, device: str, kernels: str = "triton", channels: int = 20) -> float:
    """Relative L2 error of a mixer's inference, which takes the logarithms of rates as they are, against float64."""
    torch.manual_seed(0)
    mixer = MambaMixer(channels, 4, d_state=4, device=device, dtype=dtype).requires_grad_(False)
    torch.nn.init.normal_(mixer.A_log)
    x = torch.randn(2, 7, channels, device=device, dtype=dtype)
    order = scan_order(3, 2, DIRECTIONS, 3, device=device)
    with arm_zoo.scan_backend(kernels), Recorder() as recorder:
        y = mixer(x, order)
    assert recorder.counts["arm_zoo::selective_scan_log"] == 1, recorder.counts
    with arm_zoo.scan_backend("reference"):
        expected = mixer.double()(x.double(), order)
    return ((y - expected).norm() / expected.norm()).item()


def gate_errors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[float]:
    """Relative L2 errors of the gate's operator with the gradients of both halves and their sums, against float64."""
    torch.manual_seed(0)
    halves, bias, grad = (torch.randn(size, device=device).to(dtype) for size in (shape, shape[-1:], shape))
    grad, results = grad[..., : shape[-1] // 2], []
    for convert in (dtype, torch.float64):
        leaves = halves.to(convert).requires_grad_(), bias.to(convert).requires_grad_()
        if convert == dtype:
            y = torch.ops.arm_zoo.gate(*leaves)
        else:  # the operator takes what has the bias in it already
            gate, value = (leaves[0] + leaves[1] - leaves[1].detach()).chunk(2, dim=-1)
            y = torch.nn.functional.silu(gate) * value
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(convert))])
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]


def add_norm_errors(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, scaled: bool, centred: bool
) -> list[float]:
    """Relative L2 errors of sum, layer norm or RMSNorm and all gradients against float64, with tokens in float32."""
    torch.manual_seed(0)
    batch, _, dim = shape
    x, grad_total = (torch.randn(shape, device=device) for _ in range(2))
    branch, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    parameters = torch.randn(2 if centred else 1, dim, device=device).unbind()
    scale = torch.rand(batch, device=device).to(dtype) if scaled else None
    results = []
    for exact in (False, True):
        leaves = [t.detach().to(torch.float64 if exact else t.dtype) for t in (x, branch, *parameters)]
        own = [t.requires_grad_() for t in leaves]
        if exact:
            total = own[0] + own[1] * (1 if scale is None else scale.double()[:, None, None])
            norm = torch.nn.functional.layer_norm if centred else torch.nn.functional.rms_norm
            normed = norm(total, (dim,), *own[2:], eps=1e-3)
        else:
            own_bias = own[3] if centred else None
            total, normed, _ = torch.ops.arm_zoo.add_norm(own[0], own[1], scale, own[2], own_bias, 1e-3, dtype)
        cotangents = [grad_total.to(total.dtype), grad.to(normed.dtype)]
        results.append([total, normed, *torch.autograd.grad([total, normed], own, cotangents)])
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]


def test_sums_of_other_types_than_the_tokens() -> None:
    """They are what PyTorch makes of both: no kernel is asked."""
    x, branch, norm = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8), torch.nn.LayerNorm(8)
    total, normed = Residual(x, branch, torch.tensor([1.0, 0.5])).normed(norm)
    assert torch.equal(total, x + branch * torch.tensor([1.0, 0.5])[:, None, None])
    assert torch.equal(normed, norm(total))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # PyTorch's, of hooked norms
def test_residuals_in_float32_leave_rms_norms_in_the_type_of_weights(
    weights: torch.dtype, autocast: bool, hooked: bool
) -> None:
    """Or of autocast, and are normed before they are rounded; for the kernel's own rounding see `add_norm_errors`."""
    norm = torch.nn.RMSNorm(8, eps=1e-5, dtype=weights)
    torch.nn.init.normal_(norm.weight)
    if hooked:
        norm.register_forward_hook(lambda *_: None)
    residual = torch.promote_types(weights, torch.float32)
    x, branch = 300 * torch.randn(2, 3, 8, dtype=residual), torch.randn(2, 3, 8).to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, normed = Residual(x, branch, torch.tensor([2.0, 0.5], dtype=weights)).normed(norm)
    assert torch.equal(total, x + branch.to(residual) * torch.tensor([2.0, 0.5])[:, None, None])
    defined = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.to(residual)
    torch.testing.assert_close(normed, defined.to(torch.bfloat16 if autocast else weights))


def check_deferred_sums(device: str) -> None:
    """A stack whose sums the norms' kernels make gives what its blocks give one by one, drop-path included."""
    torch.manual_seed(0)
    backbone = {"embed_dim": 24, "img_size": 32, "drop_path_rate": 0.6}
    pretrained = {"embed_dim": 8, "depth": 3, "d_state": 2, "decoder_dim": 64, "decoder_depth": 1}
    for model, sums, shape in (
        (timm.create_model("arm_tiny_patch16_224", depth=3, d_state=2, **backbone), 5, (3, 32, 32)),
        (arm_zoo.create_pretraining_model("arm_pico", **pretrained), 4, (1, 8, 8)),
        (timm.create_model("vmamba_tiny_s1l8", depths=(2, 1), **backbone), 3 + 1, (3, 20, 12)),  # of maps
    ):
        model = model.to(device)
        images, results = torch.randn(4, *shape, device=device), []
        for deferred in (True, False):
            arm_zoo.ops.fused.adds_in_norm = lambda x, norm, deferred=deferred: deferred
            torch.manual_seed(1)
            with arm_zoo.scan_backend("torch"), Recorder() as recorder:  # the fastest in Triton's interpreter
                output = model(images)
            assert recorder.counts["arm_zoo::add_norm"] == sums * deferred
            output = output[0] if isinstance(output, tuple) else output
            trained = [p for p in model.parameters() if p.requires_grad]
            results.append([output, *torch.autograd.grad(output.square().sum(), trained)])
        for actual, expected in zip(*results, strict=True):
            assert (actual - expected).norm() <= 1e-5 * expected.norm(), (actual, expected)


def check_deferred_root_mean_squares(device: str) -> None:
    """The same of a stack as Vim's: mixers alone, RMSNorm, and the residual in float32 also between 16-bit blocks."""
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        torch.manual_seed(0)
        norm = partial(torch.nn.RMSNorm, eps=1e-5)
        stack = [Block(24, 2, 2, drop_path=0.5, norm_layer=norm, expand=2, mlp=False) for _ in range(3)]
        blocks = torch.nn.ModuleList(stack).to(device, dtype)
        order = scan_order(2, 3, DIRECTIONS[:2], 3, device=device)
        tokens, results = torch.randn(4, 7, 24, device=device, requires_grad=True), []
        for deferred in (True, False):
            arm_zoo.ops.fused.adds_in_norm = lambda x, norm, deferred=deferred: deferred
            torch.manual_seed(1)
            with arm_zoo.scan_backend("torch"), Recorder() as recorder:
                output = run_blocks(blocks, tokens, order, {3})[3]
            assert recorder.counts["arm_zoo::add_norm"] == 2 * deferred and output.dtype == torch.float32
            results.append([output, *torch.autograd.grad(output.square().sum(), [tokens, *blocks.parameters()])])
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            assert (actual - expected).norm() <= limit * expected.norm(), (dtype, actual, expected)


def scan_inputs(value: float | None = None, device: str = "cuda") -> list[torch.Tensor]:
    """u, delta, A, B, C and D of one direction, random or all of one value; few in Triton's interpreter."""
    length, channels, states = (70, 33, 16) if device == "cuda" else (18, 3, 2)
    row, rates = (1, 2, length, channels), (1, 2, length, states)
    shapes = [row, row, (1, channels, states), rates, rates, (1, channels)]
    tensors = [torch.randn(shape) if value is None else torch.full(shape, value) for shape in shapes]
    tensors[2] = -tensors[2].abs()
    return [t.to(device) for t in tensors]


def outputs_and_gradients(
    inputs: list[torch.Tensor], backend: str, cotangent: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The output, and the gradients for this gradient of it, or for that of the sum of its squares."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with arm_zoo.scan_backend(backend):
        y = selective_scan(*leaves)
    grad = 2 * y.detach() if cotangent is None else cotangent.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def extreme_error(size: float, rate: float, dtype: torch.dtype, device: str, kernels: str = "triton") -> float:
    """Largest relative L2 error for this step size and rate, NaN where a result is."""
    torch.manual_seed(0)
    u, delta, A, B, C, D = scan_inputs(device=device)
    before_softplus = size if size > 20 else math.log(size)
    sequences = [t.to(dtype) for t in (u, torch.full_like(delta, before_softplus), B, C)]
    inputs = [*sequences[:2], torch.full_like(A, rate), *sequences[2:], D]
    cotangent = torch.randn(u.shape[1:], device=device).to(dtype)
    exact = outputs_and_gradients([t.double() for t in inputs], "reference", cotangent)
    pairs = zip(outputs_and_gradients(inputs, kernels, cotangent), exact, strict=True)
    return largest(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def check_special_values(device: str, kernels: str) -> None:
    """Sequences of one value are scanned right, and NaN in the input is in every result that has it by definition."""
    for value in (0.0, 0.5):
        inputs = scan_inputs(value, device)
        exact = outputs_and_gradients([t.double() for t in inputs], "reference")
        for actual, expected in zip(outputs_and_gradients(inputs, kernels), exact, strict=True):
            assert actual.isfinite().all()
            assert (actual - expected).norm() <= 1e-5 * expected.norm()
    assert all(t.isfinite().all() for t in outputs_and_gradients(scan_inputs(device=device), kernels))
    for poisoned in range(6):
        inputs = scan_inputs(device=device)
        inputs[poisoned].view(-1)[0] = torch.nan
        assert all(t.isnan().any() for t in outputs_and_gradients(inputs, kernels)), poisoned  # of a gradient with NaN
        cotangent = torch.ones(inputs[0].shape[1:], device=device)
        results = outputs_and_gradients(inputs, kernels, cotangent)
        defined = outputs_and_gradients([t.double() for t in inputs], "reference", cotangent)
        assert sum(t.isnan().any() for t in defined) >= 2, poisoned  # the output, and some gradient
        assert all(t.isnan().any() for t, wanted in zip(results, defined, strict=True) if wanted.isnan().any()), (
            poisoned
        )


def check_same_bits(device: str, kernels: str) -> None:
    """Of scan, convolution, mixer, gate and sum with norm, and of all gradients, twice."""
    torch.manual_seed(0)
    order = scan_order(3, 2, DIRECTIONS, 3, device=device)
    shapes = [(2, 7, 24), (4, 12, 4), (4, 12), (4, 14, 12), (4, 12, 6), (4, 12), (4, 12, 4), (4, 12)]
    for dtype in (torch.float32, torch.bfloat16):
        xz, *weights = (torch.randn(shape, device=device) for shape in shapes)
        inputs = [xz.to(dtype), *weights[:5], -weights[5].exp(), weights[6]]
        runs: list[list[torch.Tensor]] = []
        for _ in range(2):
            leaves = [t.detach().requires_grad_() for t in inputs]
            with arm_zoo.scan_backend(kernels):
                y = mamba_inner(*leaves, order)
                u = causal_conv(leaves[0][..., :12], leaves[1], leaves[2], order)
            offset, norm = torch.zeros(24, device=device, requires_grad=True), torch.nn.LayerNorm(12, device=device)
            gated = torch.ops.arm_zoo.gate(leaves[0], offset)
            sums = torch.ops.arm_zoo.add_norm(y.float(), gated, None, norm.weight, norm.bias, 1e-5, dtype)
            results = [y, u, gated, *sums[:2]]
            grads = torch.autograd.grad(
                [t.float().square().sum() for t in results], [*leaves, offset, *norm.parameters()]
            )
            runs.append([*results, *grads])
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True)), dtype


def check_operators(device: str) -> None:
    """What PyTorch asks of operators, and that their counts of operations are those of the parts one by one."""
    halves, bias = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((2, 5, 12), (12,)))
    torch.library.opcheck(torch.ops.arm_zoo.gate.default, (halves, bias))
    tokens, branch, weight = (torch.randn(*shape, device=device) for shape in ((2, 5, 12), (2, 5, 12), (12,)))
    norm_inputs = [t.requires_grad_() for t in (tokens, branch, weight, weight.clone())]
    for bias in (norm_inputs[3], None):
        inputs = (*norm_inputs[:2], torch.rand(2, device=device), norm_inputs[2], bias, 1e-5, torch.float32)
        torch.library.opcheck(torch.ops.arm_zoo.add_norm.default, inputs)
    sequences = scan_inputs(device=device)
    arguments = (None, None, True, None, True)  # without bias, weight and order, and for the mean
    gated = (*sequences, *arguments, False, sequences[0][0], "triton")
    torch.library.opcheck(
        torch.ops.arm_zoo.selective_scan.default, gated, test_utils=("test_schema", "test_faketensor")
    )
    logarithms = (
        *sequences[:2],
        torch.randn_like(sequences[2]),
        *sequences[3:],
        *arguments,
        sequences[0][0],
        "triton",
    )
    torch.library.opcheck(
        torch.ops.arm_zoo.selective_scan_log.default, logarithms, test_utils=("test_schema", "test_faketensor")
    )
    weight = torch.randn(sequences[0].shape[-1], device=device)
    torch.library.opcheck(
        torch.ops.arm_zoo.selective_scan_norm.default,
        (*sequences, *arguments, weight, weight.clone(), 1e-5, "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )
    trained = (*(t.detach().requires_grad_() for t in sequences), *arguments, True, None, "triton")
    torch.library.opcheck(
        torch.ops.arm_zoo.selective_scan.default,
        trained,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    order = scan_order(2, 3, DIRECTIONS[:2], 3, device=device)
    shapes = [(2, 7, 12), (2, 6, 4), (2, 6), (2, 11, 6), (2, 6, 3)]
    drawn = [torch.randn(shape, device=device) for shape in (*shapes, (2, 6), (2, 6, 4), (2, 6))]
    drawn[6] = -drawn[6].exp()
    leaves = [t.requires_grad_() for t in drawn]
    torch.library.opcheck(torch.ops.arm_zoo.mamba_inner.default, (*leaves, order, "triton"))
    mixed = [t.detach().bfloat16() if i in (3, 4, 5) else t.detach() for i, t in enumerate(leaves)]
    y = torch.ops.arm_zoo.mamba_inner(*mixed, order, "triton")
    torch.library.opcheck(
        torch.ops.arm_zoo.mamba_inner_backward.default,
        (y[0], *mixed, order, *y[1:], "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )
    tokens = leaves[0].detach()[..., :6].requires_grad_()
    torch.library.opcheck(torch.ops.arm_zoo.causal_conv.default, (tokens, *leaves[1:3], order, "triton"))
    counts = []
    for backend in ("triton", "torch"):
        with arm_zoo.scan_backend(backend), FlopCounterMode(display=False) as forward:
            loss = mamba_inner(*leaves, order).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0][0] == counts[1][0] and counts[0][1] == 2 * counts[0][0], counts


def gated_product_error(
    batch: int, length: int, dim: int, hidden: int, dtype: torch.dtype, device: str, module: str = "triton.gates"
) -> float:
    """Relative L2 error of the kernel with fc1 of a SwiGLU, SiLU and gate, against float64."""
    gated_product = importlib.import_module(f"arm_zoo.ops.{module}").gated_product
    torch.manual_seed(0)
    shapes = (batch, length, dim), (2 * hidden, dim), (2 * hidden,)
    x, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    actual = gated_product(x, weight / dim**0.5, bias)
    gate, value = torch.nn.functional.linear(x.double(), (weight / dim**0.5).double(), bias.double()).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * value
    return ((actual.double() - expected).norm() / expected.norm()).item()


def merged_norm_error(length: int, channels: int, dtype: torch.dtype, device: str, ordered: bool) -> float:
    """Relative L2 error of the layer norm of the directions' sum against float64, in scan order or token order."""
    from arm_zoo.ops.layout import Norm
    from arm_zoo.ops.triton.merge import merge

    torch.manual_seed(0)
    sequences = torch.randn(4, 3, length, channels, device=device).to(dtype)
    norm = Norm(*torch.randn(2, channels, device=device).unbind(), 1e-3)
    order = torch.rand(4, length, device=device).argsort(dim=1) if ordered else None
    steps = torch.arange(length, device=device).expand(4, -1) if order is None else order.argsort(dim=1)
    total = sum(sequence.double()[:, rows] for sequence, rows in zip(sequences, steps, strict=True))
    expected = torch.nn.functional.layer_norm(total, (channels,), norm.weight.double(), norm.bias.double(), 1e-3)
    return ((merge(sequences, order, 1.0, norm=norm).double() - expected).norm() / expected.norm()).item()


def check_mixer_norms_inside(device: str) -> None:
    """SS2D's norm is part of its scan's kernels in inference, unless it has gradients or is not the plain layer."""
    torch.manual_seed(0)
    mixer, x = SS2D(20, expand=2.0, device=device), torch.randn(2, 3, 5, 20, device=device)
    for parameter in mixer.out_norm.parameters():
        torch.nn.init.normal_(parameter)
    order, expected = order_for(x), mixer(x, order_for(x)).detach()

    def norms_inside() -> bool:
        with Recorder() as recorder:
            y = mixer(x, order)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        return recorder.counts["arm_zoo::selective_scan_norm"] == 1

    assert not norms_inside()
    with torch.no_grad():
        assert norms_inside()
        hook = mixer.out_norm.register_forward_hook(lambda *_: None)
        assert not norms_inside()
        hook.remove()
        mixer.requires_grad_(False)
    assert norms_inside()
    mixer.out_norm.bias.requires_grad_()
    assert not norms_inside()


def test_sequences_are_numbered_in_32_bits() -> None:
    """Those whose steps lie further apart are copied, larger ones refused."""
    near, far = (torch.empty_strided((1, 1, 3, 4), (0, 0, 2**n, 1), device="meta") for n in (29, 30))
    assert inner(near) is near and inner(far).is_contiguous()
    from arm_zoo.ops.triton.common import check_length

    with pytest.raises(
        ValueError, match=r"less than 2\*\*29 numbers and 2\*\*24 steps, got 16,777,216 steps of 1 channels"
    ):
        check_length(2**24, 1)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=() if part == "memory, limits and a model" else pytest.mark.slow)
        for part in IN_THE_INTERPRETER
    ],
)
def test_kernels_in_the_interpreter(part: str) -> None:
    run_in_the_interpreter(IN_THE_INTERPRETER[part])


@pytest.mark.parametrize("golden", ["small", pytest.param("whole", marks=pytest.mark.slow)], indirect=True)
def test_mixers_in_the_interpreter_equal_the_official_ones(golden: Path) -> None:
    run_in_the_interpreter(f"""
golden = Path({str(golden)!r})
mixers = [mixer for mixer in MIXERS if (golden / mixer[0]).is_dir()]
assert mixers
for mixer in mixers:
    check_mixer(golden, mixer, "triton", torch.float32, "cpu")
""")


def run_in_the_interpreter(script: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "ARM_ZOO_SCAN": "triton", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"{HEADER}{script}\nprint('the kernels agree')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the kernels agree" in done.stdout


@pytest.fixture(params=["triton", "cuda", "mamba_ssm"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The name of a backend with GPU kernels."""
    if request.param not in arm_zoo.available_backends():
        pytest.skip(f"the backend {request.param} is not installed")
    return request.param


def skip_what_mamba_ssm_lacks(kernels: str, channels: int, length: int) -> None:
    if kernels == "mamba_ssm" and channels % 8:
        pytest.skip(f"causal-conv1d takes multiples of 8 channels, not {channels}")
    if kernels == "mamba_ssm" and length == 1:
        pytest.skip("the packages' results of one step disagree with the reference")


LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # relative L2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", [*CASES, (4, 14, 14, 98, 96, 16), (2, 5, 3, None, 41, 8), (2, 5, 3, None, 40, 64)])
def test_kernels_on_the_gpu(
    case: tuple[int, int, int, int | None, int, int], dtype: torch.dtype, kernels: str
) -> None:
    _, height, width, cls_index, channels, _ = case
    skip_what_mamba_ssm_lacks(kernels, channels, height * width + (cls_index is not None))
    assert worst_error(*case, dtype, "cuda", kernels) < LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rank", [0, 4, 6, 16, 64])
@pytest.mark.parametrize("case", [*SHARED, CASES[1]])
def test_sums_of_directions_that_share_tokens(
    case: tuple[int, int, int, int | None, int, int], rank: int, dtype: torch.dtype, kernels: str
) -> None:
    skip_what_mamba_ssm_lacks(kernels, case[4], case[1] * case[2])
    assert worst_error(*case, dtype, "cuda", kernels, rank, shared=True) < LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 128, 132])
@pytest.mark.parametrize("rank", [4, 16, 48])
def test_lanes_of_four_channels(rank: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("arm_zoo.ops.cuda.launch", reason="no compiler of CUDA in this build of torch")
    monkeypatch.setattr(launch, "_WARPS_OF_WIDE_LANES", 0)  # without it only work for a whole GPU takes them
    for dtype, limit in LIMITS.items():
        assert worst_error(4, 7, 7, None, channels, 1, dtype, "cuda", "cuda", rank, shared=True) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 3, 8, 24, 25, 63, 64, 65, 197, 577, 3026])
def test_lengths_on_the_gpu(length: int, kernels: str) -> None:
    skip_what_mamba_ssm_lacks(kernels, 24, length)
    for directions in (1, 4):
        for dtype, limit in LIMITS.items():
            assert worst_error(directions, 1, length, None, 24, 16, dtype, "cuda", kernels) < limit


def split(monkeypatch: pytest.MonkeyPatch, lanes: int, parts: int, parts_backward: int) -> None:
    """Let the CUDA scans of 16 states share the work so, whatever their shapes and the GPU."""
    launch = pytest.importorskip("arm_zoo.ops.cuda.launch", reason="no compiler of CUDA in this build of torch")
    if launch._limits(0)[1] == 1:
        pytest.skip("blocks that share memory need compute capability 9.0")
    monkeypatch.setattr(launch, "forward_split", lambda *_: (lanes, parts))
    monkeypatch.setattr(launch, "backward_split", lambda *_: parts_backward)


# lanes that share a pair of channels, parts of the length in the forward scan, and in the backward scan
SPLITS = [(1, 1, 1), (2, 1, 1), (4, 1, 2), (1, 4, 2), (2, 8, 4), (4, 16, 8), (1, 32, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("length", [1, 2, 63, 197, 577])
def test_sequences_in_parts(length: int, splits: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, *splits)
    for directions, batch, channels, rank in ((1, 9, 33, 0), (2, 3, 66, 6), (4, 1, 70, 48)):
        for dtype, limit in LIMITS.items():
            case = directions, 1, length, None, channels, 16, dtype, "cuda", "cuda", rank
            assert worst_error(*case, shared=rank == 6, batch=batch) < limit, case


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [SPLITS[3], SPLITS[-1]])
@pytest.mark.parametrize("length", [3026, 16385])
def test_long_sequences_in_parts(length: int, splits: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, *splits)
    for dtype in (torch.float32, torch.bfloat16):
        assert worst_error(2, 1, length, None, 24, 16, dtype, "cuda", "cuda", 8, batch=1) < LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("d_state, parts", [(1, 4), (1, 32), (2, 8), (4, 16)])
def test_few_states_in_parts(d_state: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, 1, parts, min(parts, 8))
    for dtype, limit in LIMITS.items():
        for rank in (0, 8):
            case = 4, 14, 14, None, 72, d_state, dtype, "cuda", "cuda", rank
            assert worst_error(*case, shared=True, batch=1) < limit, case


@pytest.mark.gpu
@pytest.mark.parametrize("splits", SPLITS[3:])
def test_bits_of_sequences_in_parts_repeat(splits: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    split(monkeypatch, *splits)
    inputs = [t.bfloat16() for t in scan_inputs()]
    runs = [outputs_and_gradients([*inputs[:2], inputs[2].float(), *inputs[3:]], "cuda") for _ in range(3)]
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(runs[0], run, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 4, 12, 16, 44, 48, 64, 96, 128, 160])
def test_step_sizes_of_low_rank(rank: int, kernels: str) -> None:
    for dtype, limit in LIMITS.items():
        assert worst_error(4, 3, 7, 10, 72, 16, dtype, "cuda", kernels, rank) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16, 48, 96])
def test_step_sizes_of_low_rank_of_one_step(rank: int, kernels: str) -> None:
    skip_what_mamba_ssm_lacks(kernels, 33, 1)
    for dtype, limit in LIMITS.items():
        assert worst_error(1, 1, 1, None, 33, 8, dtype, "cuda", kernels, rank) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_everything_between_the_projections(batch: int, directions: int, dtype: torch.dtype, kernels: str) -> None:
    limit = {torch.float32: 2e-5}.get(dtype, 2e-2)  # a product and a rounding more than the scan alone
    assert inner_error(batch, dtype, "cuda", kernels, channels=72, d_state=16, directions=directions) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("few", [0, 2**23])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kernels", ["triton", "cuda"], indirect=True)
def test_inference_takes_parameters_as_they_are(
    few: int, dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arm_zoo.ops.triton.merge.FEW", few)
    for channels in (20, 64):
        assert inference_error(dtype, "cuda", kernels, channels) < LIMITS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(3136, 256), (196, 1024), (49, 2048), (7, 132), (1, 3000)])
def test_norms_of_merged_directions(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for ordered in (False, True):
        assert merged_norm_error(*shape, dtype, "cuda", ordered) < {torch.float32: 1e-6}.get(dtype, 5e-3)


@pytest.mark.gpu
def test_operators_on_the_gpu() -> None:
    check_operators("cuda")
    check_mixer_norms_inside("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 197, 514), (64, 65, 4096), (40_000, 48)])
def test_gate_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert largest(gate_errors(shape, dtype, "cuda")) < {torch.float32: 1e-5}.get(dtype, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 67, 130), (33, 197, 768), (9, 577, 1280)])
def test_sums_with_norms_on_the_gpu(
    shape: tuple[int, int, int], dtype: torch.dtype, scaled: bool, centred: bool
) -> None:
    assert largest(add_norm_errors(shape, dtype, "cuda", scaled, centred)) < {torch.float32: 1e-5}.get(dtype, 5e-3)


@pytest.mark.gpu
def test_deferred_sums_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm_zoo.ops.fused, "adds_in_norm", None)  # so that it is there again after the test
    check_deferred_sums("cuda")
    check_deferred_root_mean_squares("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 67, 200, 136), (64, 65, 96, 264), (33, 197, 192, 512)])
@pytest.mark.parametrize("module", ["triton.gates", "quack"])
def test_gated_product_on_the_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype, module: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it is for Hopper GPUs")
    if module == "quack":
        pytest.importorskip("quack", reason="needs the package quack-kernels: pip install 'arm-zoo[quack]'")
    assert gated_product_error(*shape, dtype, "cuda", module) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [512, 250])  # 250 are padded
@pytest.mark.parametrize("compiled", [False, True])
def test_inference_takes_the_gated_product(hidden: int, compiled: bool) -> None:
    """In 16 bits, plain or under autocast; a hook on fc1, gradients or few tokens go the plain way."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it is for Hopper GPUs")
    layer, x = SwiGLU(192, hidden).cuda(), torch.randn(32, 197, 192, device="cuda")
    gate, value = layer.fc1(x).chunk(2, dim=-1)
    expected = layer.fc2(torch.nn.functional.silu(gate) * value).detach()
    run = torch.compile(layer, fullgraph=True) if compiled else layer

    def took_it(tokens: torch.Tensor) -> bool:
        run(tokens)
        with torch.profiler.profile() as profile:
            y = run(tokens)
            torch.cuda.synchronize()
        assert (y - expected[: len(tokens)]).norm() < 2e-2 * expected[: len(tokens)].norm()
        return any("arm_zoo::gated_product" in event.key for event in profile.key_averages())

    with torch.no_grad():
        assert not took_it(x)  # float32
        with torch.autocast("cuda", torch.bfloat16):
            assert took_it(x) and not took_it(x[:2])
            hook = layer.fc1.register_forward_hook(lambda *_: None)
            torch.compiler.reset()  # compiled models do not look for hooks of later
            assert not took_it(x)
            hook.remove()
            torch.compiler.reset()
    with torch.autocast("cuda", torch.bfloat16):
        assert not took_it(x)  # gradients
    layer.bfloat16()
    with torch.inference_mode():
        assert took_it(x.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", [1e-6, 50.0])
@pytest.mark.parametrize("rate", [-1e-4, -1e4])
def test_extreme_steps_and_rates(size: float, rate: float, dtype: torch.dtype, kernels: str) -> None:
    if kernels == "mamba_ssm" and dtype == torch.float16 and size * rate < -1000:
        pytest.skip("mamba-ssm gives 0.017 where nothing is left of any state and a gradient is 0")
    assert extreme_error(size, rate, dtype, "cuda", kernels) < {torch.float32: 1e-4}.get(dtype, 1e-2)


@pytest.mark.gpu
def test_constant_inputs_and_nan(kernels: str) -> None:
    check_special_values("cuda", kernels)


@pytest.mark.gpu
def test_runs_give_the_same_bits(kernels: str) -> None:
    if kernels == "mamba_ssm":
        pytest.skip("mamba-ssm adds up gradients in the order in which its blocks end")
    check_same_bits("cuda", kernels)


@pytest.mark.gpu
def test_the_longest_sequence(kernels: str) -> None:
    assert worst_error(1, 1, 16_384, None, 8, 4, torch.float32, "cuda", kernels) < LIMITS[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer[0])
def test_mixers_equal_the_official_ones_on_the_gpu(golden: Path, mixer: Mixer, kernels: str) -> None:
    check_mixer(golden, mixer, kernels, torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_model_trains_as_the_eager_one(precision: torch.dtype) -> None:
    model = timm.create_model("arm_tiny_patch16_224", img_size=64, embed_dim=64, depth=2, num_classes=5).cuda()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            logits = run(images)
        logits.float().square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    limit = 1e-4 if precision == torch.float32 else 5e-2
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= limit * expected.norm()


@pytest.mark.gpu
def test_model_runs_in_a_cuda_graph() -> None:
    model = timm.create_model("arm_tiny_patch16_224", img_size=64, embed_dim=64, depth=2).cuda().eval()
    images = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        expected = model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(images)
        logits.zero_()
        graph.replay()
        assert torch.equal(logits, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_takes_the_kernels(compiled: bool) -> None:
    model = timm.create_model("arm_tiny_patch16_224", img_size=32, embed_dim=32, depth=1).cuda()
    if compiled:
        model.compile(fullgraph=True)
        model(torch.randn(2, 3, 32, 32, device="cuda")).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(torch.randn(2, 3, 32, 32, device="cuda")).sum().backward()
        torch.cuda.synchronize()
    ran = {event.key for event in profile.key_averages()}
    expected = ("scan_forward", "scan_backward"), ("_scan_kernel", "_scan_backward_kernel")
    assert ran.issuperset(expected["cuda" not in arm_zoo.available_backends()])


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [16, 8])
def test_images_become_patches_as_by_the_convolution(stride: int) -> None:
    layer = PatchEmbed(64, 16, stride, in_chans=3, embed_dim=24).cuda().double()
    images = torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.float64)
    expected = torch.nn.Conv2d.forward(layer.proj, images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs where there is CUDA")
def test_without_a_gpu_the_backend_says_why() -> None:
    with pytest.raises(ValueError, match="scan backend 'triton' cannot run here: it needs a CUDA device"):
        arm_zoo.set_scan_backend("triton")
