"""The compiled loops for the CPU: against the plain loops in float64, at the edges of float32, in any threads."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import arm_zoo
from arm_zoo.layers.mlp import SwiGLU
from arm_zoo.layers.order import scan_order
from arm_zoo.models.arm import DIRECTIONS
from arm_zoo.ops import causal_conv, mamba_inner, selective_scan
from arm_zoo.ops.fused import gate_halves, gated_transposed, gates_transposed
from tests.arm_zoo.ops.test_scan import largest

numba_backend = pytest.importorskip("arm_zoo.ops.cpu.numba", reason="the extra `cpu` is not installed")


def inputs(directions: int, length: int, channels: int, d_state: int, batch: int = 2) -> list[torch.Tensor]:
    """u, delta, A, B, C, D, gate and the bias of delta."""
    sequences = (directions, batch, length)
    u, delta = torch.randn(*sequences, channels), torch.randn(*sequences, channels)
    rates = -torch.randn(directions, channels, d_state).exp()
    B, C = torch.randn(*sequences, 2 * d_state + 3)[..., 3:].chunk(2, dim=-1)  # rows that do not adjoin, as in models
    skip, bias = torch.randn(2, directions, channels)
    return [u, delta, rates, B, C, skip, torch.randn(batch, length, channels), bias]


Operation = Callable[..., torch.Tensor]


def results(
    backend: str, tensors: Sequence[torch.Tensor], operation: Operation = selective_scan, **options: Any
) -> list[torch.Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with arm_zoo.scan_backend(backend):
        y = operation(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def worst_error(tensors: Sequence[torch.Tensor], operation: Operation = selective_scan, **options: Any) -> float:
    """Largest relative L2 error of output and gradients against the plain loop in float64; decays end at 2e-38."""
    exact = results("reference", [t.double() for t in tensors], operation, **options)
    pairs = zip(results("numba", tensors, operation, **options), exact, strict=True)
    return largest(((ours - theirs).norm() / theirs.norm().clamp_min(1e-20)).item() for ours, theirs in pairs)


def inner_inputs(directions: int, length: int, channels: int, d_state: int, batch: int) -> list[torch.Tensor]:
    """All inputs of `mamba_inner` but the order: steps of rank 3, a convolution of 4 taps."""
    xz, taps = torch.randn(batch, length, 2 * channels), torch.randn(directions, channels, 4)
    projection = torch.randn(directions, 3 + 2 * d_state, channels) / channels**0.5
    back, rates = torch.randn(directions, channels, 3), -torch.rand(directions, channels, d_state) * d_state
    offset, bias, skip = torch.randn(3, directions, channels)
    return [xz, taps, offset, projection, back, bias, rates, skip]


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 197, 577])
def test_lengths(length: int) -> None:
    assert worst_error(inputs(1, length, 5, 4)) < 2e-6


@pytest.mark.parametrize(
    "directions, height, width, cls_index, channels, d_state",
    [(4, 3, 5, 7, 130, 16), (2, 7, 2, 0, 128, 1), (1, 1, 9, None, 600, 3), (4, 6, 4, None, 33, 17)],
)
def test_grids_and_widths(
    directions: int, height: int, width: int, cls_index: int | None, channels: int, d_state: int
) -> None:
    order = scan_order(height, width, DIRECTIONS[:directions], cls_index)
    assert worst_error(inputs(directions, order.shape[1], channels, d_state), order=order) < 2e-6


@pytest.mark.parametrize("ordered", [False, True])
def test_directions_that_share_tokens(ordered: bool) -> None:
    """Everything is in token order, and they are added up, as in VMamba."""
    u, *others = inputs(4, 35, 130, 1)
    order = scan_order(5, 7, DIRECTIONS) if ordered else None
    exact = results("reference", [t.double() for t in (u[0], *others)], order=order, mean=False)
    for ours, theirs in zip(results("numba", [u[0], *others], order=order, mean=False), exact, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).norm() < 2e-6 * theirs.norm()


@pytest.mark.parametrize("raw_delta", [-20.0, -13.8, 0.0, 50.0])
@pytest.mark.parametrize("rate", [-1e-6, -1e4])
def test_extreme_steps_and_rates(raw_delta: float, rate: float) -> None:
    tensors = inputs(1, 500, 6, 4)
    tensors[1] = torch.full_like(tensors[1], raw_delta)
    tensors[2] = torch.full_like(tensors[2], rate)
    tensors[7] = torch.zeros_like(tensors[7])
    assert worst_error(tensors) < 3e-5  # sums over 500 steps that never decay, in float32


@pytest.mark.parametrize("poisoned", [0, 1, 2, 3, 4, 5, 7])
def test_nan_comes_out(poisoned: int) -> None:
    tensors = inputs(1, 20, 6, 4)
    tensors[poisoned] = tensors[poisoned].clone()
    tensors[poisoned].view(-1)[0] = torch.nan
    with arm_zoo.scan_backend("numba"):
        y = selective_scan(*tensors)
    with arm_zoo.scan_backend("reference"):
        expected = selective_scan(*tensors)
    assert expected.isnan().any() and torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize(
    "directions, length, batch, d_state", [(1, 1, 1, 1), (2, 2, 3, 64), (4, 197, 2, 16), (1, 63, 9, 1)]
)
def test_everything_between_the_projections(directions: int, length: int, batch: int, d_state: int) -> None:
    order = torch.stack([torch.randperm(length) for _ in range(directions)])
    assert worst_error(inner_inputs(directions, length, 200, d_state, batch), mamba_inner, order=order) < 4e-6


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
def test_convolutions(taps: int) -> None:
    tensors = [torch.randn(3, 5, 200), torch.randn(2, 200, taps), torch.randn(2, 200)]
    tensors[0] = torch.cat([tensors[0]] * 2, dim=-1)[..., 1:201]  # rows that do not adjoin
    order = torch.stack([torch.randperm(5) for _ in range(2)])
    assert worst_error(tensors, causal_conv, order=order) < 2e-6
    assert worst_error(tensors, causal_conv) < 2e-6


@pytest.mark.parametrize("rows, channels", [((2, 3), 5), ((7,), 200), ((0, 4), 8), ((), 3)])
def test_gates_of_halves(rows: tuple[int, ...], channels: int) -> None:
    halves = 4 * torch.randn(*rows, 2 * channels + 1)[..., 1:]  # rows that do not adjoin
    gate, value = halves.double().chunk(2, dim=-1)
    assert torch.allclose(gate_halves(halves).double(), F.silu(gate) * value, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [(1, 3), (2, 1), (7,)])
def test_gates_of_transposed_halves(tokens: tuple[int, ...]) -> None:
    """Weights and tokens may be parts of others, whose rows do not adjoin."""
    x, weight, bias = torch.randn(*tokens, 20)[..., 3:19], torch.randn(48, 17)[:, 1:], torch.randn(48)
    gate, value = F.linear(x.double(), weight.double(), bias.double()).flatten(0, -2).chunk(2, dim=-1)
    assert torch.allclose(gated_transposed(x, weight, bias).double(), (F.silu(gate) * value).t(), atol=1e-5)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="it is for processors with AVX2")
def test_few_tokens_are_transposed_and_weights_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    mlp = SwiGLU(8, 24)
    few, many = torch.randn(2, 6, 8), torch.randn(2, 7, 8)
    assert not gates_transposed(mlp.fc1, few)  # autograd needs what the layer makes
    with torch.inference_mode():
        assert gates_transposed(mlp.fc1, few) and not gates_transposed(mlp.fc1, many)
        for change in (lambda t: None, lambda t: t.mul_(2), lambda t: t.data.neg_()):
            for parameter in mlp.parameters():
                change(parameter)
            hidden = F.linear(few, mlp.fc1.weight, mlp.fc1.bias)
            gate, value = hidden.chunk(2, dim=-1)
            assert torch.allclose(mlp(few), F.linear(F.silu(gate) * value, mlp.fc2.weight, mlp.fc2.bias), atol=1e-5)
    mlp.fc2.register_forward_hook(lambda layer, inputs, output: output.zero_())
    with torch.no_grad():
        assert mlp(few).count_nonzero() == 0


def test_layers_of_mixed_types_are_left_to_pytorch_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for dtype in (torch.bfloat16, torch.float64):
        mlp = SwiGLU(8, 24)
        mlp.fc1.bias.data = mlp.fc1.bias.data.to(dtype)
        with torch.no_grad(), pytest.raises(RuntimeError, match="type"):
            mlp(torch.randn(2, 6, 8))


def test_gates_of_halves_at_the_edges_of_their_range() -> None:
    gates = torch.tensor([-100.0, -20.0, 0.0, 20.0, 100.0, 1e30, torch.inf, torch.nan])
    halves = torch.cat([gates, torch.ones(8)])
    assert torch.allclose(gate_halves(halves[None])[0], F.silu(gates), equal_nan=True)
    transposed = torch.ops.arm_zoo.gate_transposed(halves[:, None], torch.zeros(16))
    assert torch.allclose(transposed[:, 0], F.silu(gates), equal_nan=True)


def test_only_inference_takes_the_loop_for_gates() -> None:
    mlp, x, taken = SwiGLU(8, 24), torch.randn(2, 3, 8), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            taken.append(operator.name() in ("arm_zoo::gate_halves", "arm_zoo::gate_transposed"))
            return operator(*args, **(kwargs or {}))

    with Record():
        trained = mlp(x)
    assert not any(taken) and trained.requires_grad
    with torch.no_grad(), Record():
        inferred = mlp(x)
    assert any(taken) and torch.allclose(inferred, trained, atol=1e-6)


def test_a_convolution_of_tokens_that_are_not_there_is_refused() -> None:
    tensors = torch.zeros(1, 3, 4), torch.zeros(1, 4, 2), torch.zeros(1, 4)
    with pytest.raises(IndexError, match="causal_conv: order must number 3 tokens"), arm_zoo.scan_backend("numba"):
        causal_conv(*tensors, order=torch.tensor([[0, 1, 3]]))


@pytest.mark.parametrize("operation, make", [(selective_scan, inputs), (mamba_inner, inner_inputs)])
def test_runs_and_threads_change_no_bit(operation: Operation, make: Callable[..., list[torch.Tensor]]) -> None:
    tensors, before = make(4, 30, 200, 16, batch=3), torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results("numba", tensors, operation, order=scan_order(5, 6, DIRECTIONS)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("parallel", [numba_backend._in_openmp, numba_backend._in_own_threads])
def test_threads_work_side_by_side_and_fail_in_the_caller(
    parallel: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if parallel is numba_backend._in_openmp and numba_backend._parallel is not parallel:
        pytest.skip("this PyTorch has no OpenMP that is compatible with GNU's")
    monkeypatch.setattr(numba_backend, "_parallel", parallel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    meeting, done = threading.Barrier(3, timeout=60), []

    def loop(first: int, last: int, name: str) -> None:
        meeting.wait()
        done.append((first, last, name))

    numba_backend._run(loop, 7, "x")
    assert sorted(done) == [(0, 2, "x"), (2, 4, "x"), (4, 7, "x")]

    def failing(first: int, last: int) -> None:
        raise MemoryError(f"of tasks {first} to {last}")

    with pytest.raises(MemoryError, match="of tasks"):
        numba_backend._run(failing, 7)


def test_gradients_of_some_inputs_alone() -> None:
    tensors = inputs(2, 20, 6, 4)
    every = results("numba", tensors)[1:]
    for asked in (0, 2, 6):
        leaves = [t.detach().requires_grad_(i == asked) for i, t in enumerate(tensors)]
        with arm_zoo.scan_backend("numba"):
            selective_scan(*leaves).square().sum().backward()
        assert torch.allclose(leaves[asked].grad, every[asked], rtol=1e-5, atol=1e-5)
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != asked)


def test_no_images_have_no_gradients() -> None:
    for gradient in results("numba", inner_inputs(2, 5, 8, 4, batch=0), mamba_inner)[2:]:
        assert gradient.count_nonzero() == 0


def test_under_autocast_operands_of_16_bits_train() -> None:
    model = timm.create_model("arm_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_classes=3)
    images, gradients = torch.randn(2, 3, 32, 32), []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(images).square().sum()
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


@pytest.mark.parametrize("wrong", [1, 2, 3, 4, 5, 6, 7])
def test_shapes_that_do_not_fit_are_refused(wrong: int) -> None:
    tensors = inputs(2, 5, 6, 4)
    tensors[wrong] = tensors[wrong][:1]
    name = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"][wrong]
    with pytest.raises(ValueError, match=f"selective_scan: {name} is "):
        selective_scan(*tensors)


def test_operands_of_16_bits_join_tokens_of_32() -> None:
    tensors = inputs(4, 9, 6, 2)
    expected = results("reference", [t.bfloat16().double() if i else t.double() for i, t in enumerate(tensors)])
    actual = results("numba", [t.bfloat16() if i else t for i, t in enumerate(tensors)])
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()  # gradients have the operands' types


def test_an_exported_model_does_not_need_numba() -> None:
    model = timm.create_model("arm_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_classes=3).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, 32, 32),))
    backends = [node.args[-1] for node in program.graph.nodes if "arm_zoo" in str(node.target)]
    assert backends and set(backends) == {"torch"}


def test_other_types_are_refused_by_name_and_go_to_torch_by_themselves() -> None:
    tensors = [t.double() for t in inputs(1, 3, 4, 2)]
    with (
        arm_zoo.scan_backend("numba"),
        pytest.raises(ValueError, match=r"'numba' takes float32 on the CPU, got torch\.float64 on cpu; use 'auto'"),
    ):
        selective_scan(*tensors)
    with arm_zoo.scan_backend("auto"):
        assert selective_scan(*tensors).dtype == torch.float64


@pytest.mark.parametrize("order", [[[0, 1, 3]], [[-1, 0, 1]]])
def test_tokens_that_are_not_there_are_refused(order: list[list[int]]) -> None:
    shapes = (1, 2, 3, 4), (1, 2, 3, 4), (1, 4, 2), (1, 2, 3, 2), (1, 2, 3, 2), (1, 4)
    with pytest.raises(IndexError, match="order must number 3 tokens from 0 on, got "), arm_zoo.scan_backend("numba"):
        selective_scan(*(torch.zeros(shape) for shape in shapes), order=torch.tensor(order))


def test_where_no_folder_can_be_written_loops_are_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from arm_zoo.ops.cpu import loops

    compile_anew = loops.njit

    def refuse(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_anew(**options)

    monkeypatch.setattr(loops, "njit", refuse)
    assert loops._compiled(lambda x: x + 1)(2) == 3


def test_without_numba_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from arm_zoo.ops import backends

    def refuse(name: str) -> None:
        raise ImportError(f"no module named {name}")

    monkeypatch.setattr(backends.importlib, "import_module", refuse)
    backends.why_not.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"it needs the package numba \(no module named numba\): pip install 'arm-zoo\[cpu\]'"
        ):
            arm_zoo.set_scan_backend("numba")
    finally:
        backends.why_not.cache_clear()


def test_a_compiled_model_takes_it() -> None:
    """Within a trace torch may say of every compilation that it exports."""
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = timm.create_model("arm_tiny_patch16_224", img_size=32, embed_dim=16, depth=1).eval()
    torch.compile(model, backend=capture, fullgraph=True)(torch.zeros(2, 3, 32, 32))
    names = [node.args[-1] for node in graphs[0].graph.nodes if "arm_zoo" in str(node.target)]
    assert names == ["numba"]
