"""The compiled loop for the CPU: against the plain loop in float64, at the edges of float32, in any threads."""

import pytest
import timm
import torch

import arm_zoo
from arm_zoo.layers.order import scan_order
from arm_zoo.models.arm import DIRECTIONS
from arm_zoo.ops import selective_scan
from tests.arm_zoo.test_scan import largest

pytest.importorskip("numba", reason="the extra `cpu` is not installed")


def inputs(directions: int, length: int, channels: int, d_state: int, batch: int = 2) -> list[torch.Tensor]:
    """u, delta, A, B, C, D, gate and the bias of delta."""
    sequences = (directions, batch, length)
    u, delta = torch.randn(*sequences, channels), torch.randn(*sequences, channels)
    rates = -torch.randn(directions, channels, d_state).exp()
    B, C = torch.randn(*sequences, 2 * d_state + 3)[..., 3:].chunk(2, dim=-1)  # rows that do not adjoin, as in models
    skip, bias = torch.randn(2, directions, channels)
    return [u, delta, rates, B, C, skip, torch.randn(batch, length, channels), bias]


def results(
    backend: str, tensors: list[torch.Tensor], order: torch.Tensor | None = None, mean: bool = True
) -> list[torch.Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with arm_zoo.scan_backend(backend):
        y = selective_scan(*leaves, order=order, mean=mean)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def worst_error(tensors: list[torch.Tensor], order: torch.Tensor | None = None) -> float:
    """Largest relative L2 error of output and gradients against the plain loop in float64; decays end at 2e-38."""
    exact = results("reference", [t.double() for t in tensors], order)
    pairs = zip(results("numba", tensors, order), exact, strict=True)
    return largest(((ours - theirs).norm() / theirs.norm().clamp_min(1e-20)).item() for ours, theirs in pairs)


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
    assert worst_error(inputs(directions, order.shape[1], channels, d_state), order) < 2e-6


@pytest.mark.parametrize("ordered", [False, True])
def test_directions_that_share_tokens(ordered: bool) -> None:
    """Everything is in token order, and they are added up, as in VMamba."""
    u, *others = inputs(4, 35, 130, 1)
    order = scan_order(5, 7, DIRECTIONS) if ordered else None
    exact = results("reference", [t.double() for t in (u[0], *others)], order, mean=False)
    for ours, theirs in zip(results("numba", [u[0], *others], order, mean=False), exact, strict=True):
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


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors, before = inputs(4, 30, 200, 16, batch=3), torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with arm_zoo.scan_backend("numba"):
                outputs.append(selective_scan(*tensors))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


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
    assert names == ["numba", "numba"]
