"""An order of steps for each image: every backend against the plain loop, which is held to the images one by one.

`tests/arm_zoo/ops/test_triton.py` runs Triton's kernels in its interpreter.
"""

from collections.abc import Callable, Sequence

import pytest
import torch

import arm_zoo
from arm_zoo.ops import available_backends, causal_conv, mamba_inner, selective_scan
from arm_zoo.ops.layout import ScanInputs
from tests.arm_zoo.ops.test_scan import largest, run

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
SIZES = [(1, 1, 1, 3, 1), (4, 1, 3, 5, 2), (2, 3, 17, 70, 4), (4, 2, 37, 20, 16), (4, 5, 16, 33, 1)]
Operation = Callable[..., torch.Tensor]
Operations = list[tuple[Operation, dict[str, torch.Tensor], torch.Tensor]]


def orders(directions: int, batch: int, length: int) -> torch.Tensor:
    """A table (batch, directions, length) of random orders."""
    return torch.rand(batch, directions, length).argsort(dim=-1)


def operations(directions: int, batch: int, length: int, channels: int, d_state: int) -> Operations:
    """The three operations with their inputs by name and the cotangents of their outputs."""
    rank, sequences, tokens = 3, (directions, batch, length), (batch, length, channels)
    conv = {"x": torch.randn(tokens), "weight": torch.randn(directions, channels, 4)}
    conv |= {"bias": torch.randn(directions, channels)}
    rates, skip = -torch.rand(directions, channels, d_state) - 0.1, torch.randn(directions, channels)
    scan = {"u": torch.randn(*sequences, channels), "delta": torch.randn(*sequences, rank), "A": rates}
    scan |= {name: torch.randn(*sequences, d_state) for name in "BC"}
    scan |= {"D": skip, "z": torch.randn(tokens), "delta_bias": torch.randn(directions, channels)}
    scan |= {"delta_weight": torch.randn(directions, channels, rank) / rank}
    inner = {"xz": torch.randn(batch, length, 2 * channels), "conv_weight": conv["weight"], "conv_bias": conv["bias"]}
    inner |= {"x_proj_weight": torch.randn(directions, rank + 2 * d_state, channels) / channels**0.5}
    inner |= {"dt_proj_weight": scan["delta_weight"], "dt_proj_bias": scan["delta_bias"], "A": rates, "D": skip}
    cotangent = torch.randn(tokens)
    of_conv = torch.randn(*sequences, channels)
    return [(causal_conv, conv, of_conv), (selective_scan, scan, cotangent), (mamba_inner, inner, cotangent)]


def worst_error(backend: str, dtype: torch.dtype, sizes: Sequence[int], device: str = "cpu", first: int = 0) -> float:
    """Largest relative L2 error of all outputs and gradients against the reference in float64.

    Of all operations, or from the one with number `first` on.
    """
    torch.manual_seed(0)
    errors = []
    order = orders(*sizes[:3]).to(device)
    for operation, drawn, cotangent in operations(*sizes)[first:]:
        inputs = {name: value.to(device, dtype) for name, value in drawn.items()}
        exact = {name: value.double() for name, value in inputs.items()}

        def ordered(operation: Operation = operation, **inputs: torch.Tensor) -> torch.Tensor:
            return operation(**inputs, order=order)

        cotangent = cotangent.to(device, dtype)
        expected = run(ordered, exact, "reference", cotangent.double())
        for name, actual in run(ordered, inputs, backend, cotangent).items():
            errors.append(((actual.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)).item())
        with torch.no_grad(), arm_zoo.scan_backend(backend):  # inference has its own way
            errors.append(((ordered(**inputs) - expected["output"]).norm() / expected["output"].norm()).item())
    return largest(errors)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_reference_is_that_of_each_image_with_its_own_table(sizes: Sequence[int]) -> None:
    order = orders(*sizes[:3])
    with arm_zoo.scan_backend("reference"):
        for operation, inputs, _ in operations(*sizes):
            output = operation(**inputs, order=order)
            batch_axis = {name: {3: 0, 4: 1}.get(value.ndim) for name, value in inputs.items()}
            batch_axis |= dict.fromkeys(("weight", "conv_weight", "delta_weight", "A"))
            batch_axis |= dict.fromkeys(("x_proj_weight", "dt_proj_weight"))
            for b, table in enumerate(order):
                own = {
                    name: value if batch_axis[name] is None else value.narrow(batch_axis[name] or 0, b, 1)
                    for name, value in inputs.items()
                }
                expected = operation(**own, order=table)
                torch.testing.assert_close(output.narrow(output.ndim - 3, b, 1), expected)


@pytest.mark.parametrize("backend", [name for name in ("torch", "numba") if name in available_backends()])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_gradients_on_the_cpu(backend: str, sizes: Sequence[int]) -> None:
    for dtype, tolerance in DTYPES.items():
        if backend == "torch" or dtype == torch.float32:
            assert worst_error(backend, dtype, sizes) < tolerance, dtype


def test_images_that_one_pass_of_the_fast_path_does_not_take() -> None:
    assert worst_error("torch", torch.float32, (4, 46, 19, 190, 16)) < 1e-4


@pytest.mark.parametrize("backend", [name for name in ("torch", "numba", "reference") if name in available_backends()])
def test_directions_that_share_tokens(backend: str) -> None:
    """Everything is in token order, of which a table for each image makes copies in scan order."""
    order = orders(4, 3, 7)
    _, (_, drawn, cotangent), _ = operations(4, 3, 7, 6, 2)
    u = drawn.pop("u")[0]
    names = ("delta", "B", "C")

    def shared(**inputs: torch.Tensor) -> torch.Tensor:
        return selective_scan(**inputs, order=order)

    def copied(**inputs: torch.Tensor) -> torch.Tensor:
        steps = order.transpose(0, 1)[..., None]
        inputs["u"] = inputs["u"].expand(4, *u.shape)
        taken = {name: torch.take_along_dim(inputs[name], steps, 2) for name in ("u", *names)}
        return selective_scan(**{**inputs, **taken}, order=order)

    expected = run(copied, {"u": u, **drawn}, "reference", cotangent)
    for name, actual in run(shared, {"u": u, **drawn}, backend, cotangent).items():
        assert torch.allclose(actual, expected[name], rtol=1e-4, atol=1e-5), name


def test_a_table_for_each_image_may_hold_the_same_order() -> None:
    table = orders(4, 1, 9)[0]
    for operation, inputs, _ in operations(4, 3, 9, 6, 2):
        each = operation(**inputs, order=table.expand(3, -1, -1))
        torch.testing.assert_close(each, operation(**inputs, order=table))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_table_for_other_images_is_refused(batch: int) -> None:
    for operation, inputs, _ in operations(2, 3, 5, 4, 2):
        with pytest.raises(ValueError, match=rf"order is \({batch}, 2, 5\), \w+ \(.*\) needs \(3, 2, 5\)"):
            operation(**inputs, order=orders(2, batch, 5))


def test_tokens_that_are_not_there_are_refused() -> None:
    pytest.importorskip("numba", reason="the extra `cpu` is not installed")
    order = orders(2, 3, 5)
    order[2, 1, 4] = 5
    with arm_zoo.scan_backend("numba"):
        for operation, inputs, _ in operations(2, 3, 5, 4, 2):
            with pytest.raises(IndexError, match="order must number 5 tokens from 0 on, got 0 to 5"):
                operation(**inputs, order=order)


def test_the_record_of_a_scan_lays_sequences_in_scan_order() -> None:
    _, (_, drawn, _), _ = operations(2, 3, 5, 4, 2)
    order = orders(2, 3, 5)
    scan = ScanInputs(*(drawn[name] for name in ("u", "delta", "A", "B", "C", "D")), None, None, True, order, True)
    laid = scan._replace(u=scan.u[0]).in_scan_order()
    for k, b in ((0, 2), (1, 0)):
        assert torch.equal(laid.u[k, b], drawn["u"][0, b, order[b, k]])
        assert torch.equal(laid.B[k, b], drawn["B"][k, b, order[b, k]])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "mamba_ssm", "torch"])
@pytest.mark.parametrize("sizes", [*SIZES, (4, 7, 49, 256, 16), (2, 3, 577, 136, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_on_a_gpu(backend: str, sizes: Sequence[int], dtype: torch.dtype) -> None:
    if backend not in available_backends():
        pytest.skip(f"the backend {backend} does not run here")
    if backend == "mamba_ssm" and (sizes[2] == 1 or sizes[3] % 8):
        pytest.skip("mamba-ssm takes multiples of 8 channels, and more than one step")
    assert worst_error(backend, dtype, sizes, "cuda") < DTYPES[dtype]
