"""The scan: the fast path against the plain loop, the authors' mixers, memory, backends, compiling."""

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import arm_zoo
from arm_zoo.layers.mixer import MambaMixer
from arm_zoo.layers.order import scan_order
from arm_zoo.models.arm import DIRECTIONS
from arm_zoo.ops import (
    available_backends,
    backends,
    causal_conv,
    functional,
    fused,
    get_scan_backend,
    mamba_inner,
    scan_backend,
    selective_scan,
)
from tests.helpers.golden import golden_cases

Tensors = dict[str, torch.Tensor]

# ------------------------------------------------------------------------------------- the fast path and the reference


class Case(NamedTuple):
    """One set of scan inputs: sizes, the class token's place, and which optional inputs are there."""

    directions: int
    height: int
    width: int
    cls_index: int | None = None
    channels: int = 5
    d_state: int = 16
    batch: int = 2
    ordered: bool = True
    gated: bool = True
    biased: bool = True
    softplus: bool = True
    taps: int = 4
    rank: int = 0  # of the step sizes; 0: they are whole
    mean: bool = True
    shared: bool = False  # one u for all directions, and everything in token order

    @property
    def length(self) -> int:
        return self.height * self.width + (self.cls_index is not None)

    def order(self) -> torch.Tensor | None:
        names = DIRECTIONS[: self.directions]
        return scan_order(self.height, self.width, names, self.cls_index) if self.ordered else None

    def scan_inputs(self) -> Tensors:
        K, B, L, D, S = self.directions, self.batch, self.length, self.channels, self.d_state
        sequence = torch.randn(K, B, L, D, dtype=torch.float64)
        delta = torch.randn_like(sequence) - 1 if self.softplus else torch.rand_like(sequence) * 0.5
        inputs = {
            "u": sequence[0] if self.shared else sequence,
            "delta": delta,
            "A": -torch.arange(1, S + 1) * torch.rand(K, D, 1, dtype=torch.float64),
            "B": torch.randn(K, B, L, S, dtype=torch.float64),
            "C": torch.randn(K, B, L, S, dtype=torch.float64),
            "D": torch.randn(K, D, dtype=torch.float64),
        }
        if self.gated:
            inputs["z"] = torch.randn(B, L, D, dtype=torch.float64)
        if self.biased:
            # step sizes stay positive without the softplus
            inputs["delta_bias"] = torch.rand(K, D, dtype=torch.float64)
        if self.rank:
            inputs["delta"] = torch.rand(K, B, L, self.rank, dtype=torch.float64)
            inputs["delta_weight"] = torch.rand(K, D, self.rank, dtype=torch.float64) / self.rank
        return inputs

    def conv_inputs(self) -> Tensors:
        return {
            "x": torch.randn(self.batch, self.length, self.channels, dtype=torch.float64),
            "weight": torch.randn(self.directions, self.channels, self.taps, dtype=torch.float64),
            "bias": torch.randn(self.directions, self.channels, dtype=torch.float64),
        }

    def scan(self, **inputs: torch.Tensor) -> torch.Tensor:
        return selective_scan(**inputs, delta_softplus=self.softplus, order=self.order(), mean=self.mean)

    def conv(self, **inputs: torch.Tensor) -> torch.Tensor:
        return causal_conv(**inputs, order=self.order())


# Chosen so that lengths, directions, widths and switches meet in pairs; lengths by name are those of the issue.
CASES = {
    "length1": Case(1, 1, 1, ordered=False, channels=3),
    "length2": Case(4, 1, 1, cls_index=0, channels=1, d_state=5, gated=False),
    "length3": Case(2, 1, 2, cls_index=1, channels=7, d_state=1, biased=False),
    "length63": Case(4, 9, 7, channels=6, d_state=5, softplus=False, biased=False),
    "length64": Case(2, 7, 9, cls_index=31, channels=3, batch=1, taps=2),
    "length65": Case(1, 8, 8, cls_index=32, channels=11, d_state=1),
    "length197": Case(4, 14, 14, cls_index=98, channels=3),
    "length577": Case(4, 24, 24, cls_index=288, channels=2, batch=1, d_state=5),
    "class-token-first": Case(4, 2, 7, cls_index=0, channels=13, d_state=1, softplus=False),
    "class-token-last": Case(4, 7, 5, cls_index=35, channels=5, batch=3, gated=False, biased=False),
    "odd-grid": Case(4, 5, 5, cls_index=12, channels=33, d_state=3),
    "unordered": Case(2, 3, 11, ordered=False, channels=9, d_state=5, taps=1),
    "low-rank": Case(4, 3, 6, cls_index=9, channels=10, d_state=3, rank=4),
    "low-rank-without-bias": Case(1, 1, 2, channels=3, biased=False, gated=False, softplus=False, rank=1),
    "sum": Case(4, 3, 5, channels=6, d_state=2, gated=False, mean=False),
    "shared": Case(4, 5, 7, channels=6, d_state=1, gated=False, mean=False, rank=2, shared=True),
    "shared-whole": Case(2, 3, 7, cls_index=4, channels=9, d_state=3, batch=3, biased=False, shared=True),
    "shared-unordered": Case(3, 1, 5, channels=4, d_state=2, mean=False, ordered=False, shared=True),
}
# More images, channels and states than one pass of the fast path takes, so that it has to divide the work.
DIVIDED = Case(4, 3, 6, channels=190, batch=46)
DIVIDED_SHARED = Case(4, 7, 7, channels=260, batch=70, d_state=1, gated=False, mean=False, rank=2, shared=True)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 distance in units of the expected tensor's length; NaN, which compares false, if there is one."""
    return ((actual.double() - expected).norm() / expected.double().norm().clamp(min=1e-30)).item()


def largest(errors: Iterable[float]) -> float:
    """The largest of the errors; NaN, which compares false, if there is one, as Python's max would not say."""
    return torch.tensor(list(errors)).max().item()


def run(
    function: Callable[..., torch.Tensor],
    inputs: Tensors,
    backend: str = "torch",
    cotangent: torch.Tensor | None = None,
) -> Tensors:
    """Output of a function and, for a cotangent, every gradient, by name."""
    leaves = {name: value.detach().clone().requires_grad_(cotangent is not None) for name, value in inputs.items()}
    with scan_backend(backend):
        results = {"output": function(**leaves)}
        if cotangent is not None:
            results["output"].backward(cotangent.to(results["output"].dtype))
    return {name: t.detach() for name, t in results.items()} | {
        f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
    }


def compare(function: Callable[..., torch.Tensor], inputs: Tensors, forward: float, backward: float) -> None:
    """Hold output and gradients of the fast path to the float64 reference on the same numbers."""
    promoted = {name: value.double() for name, value in inputs.items()}
    with torch.no_grad():
        cotangent = torch.randn_like(run(function, promoted)["output"]).to(next(iter(inputs.values())).dtype)
    expected = run(function, promoted, "reference", cotangent.double())
    actual = run(function, inputs, "torch", cotangent)
    assert actual.keys() == expected.keys()
    assert len(actual) == 1 + len(inputs), "an input got no gradient"
    for name, value in actual.items():
        tolerance = forward if name == "output" else backward
        assert relative(value, expected[name]) < tolerance, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference_in_float64(case: Case) -> None:
    compare(case.scan, case.scan_inputs(), 1e-10, 1e-10)
    compare(case.conv, case.conv_inputs(), 1e-10, 1e-10)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_reference_in_float32(case: Case) -> None:
    compare(case.scan, as_type(case.scan_inputs(), torch.float32), 1e-5, 1e-4)
    compare(case.conv, as_type(case.conv_inputs(), torch.float32), 1e-5, 1e-4)


def test_equals_reference_when_the_work_is_divided() -> None:
    for case in (DIVIDED, DIVIDED_SHARED):
        compare(case.scan, as_type(case.scan_inputs(), torch.float32), 1e-5, 1e-4)
    compare(DIVIDED.conv, as_type(DIVIDED.conv_inputs(), torch.float32), 1e-5, 1e-4)


def as_type(inputs: Tensors, dtype: torch.dtype, keep: tuple[str, ...] = ()) -> Tensors:
    return {name: value.float() if name in keep else value.to(dtype) for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["kept in float32", "rounded too"])
@pytest.mark.parametrize("name", ["length3", "length65", "class-token-last", "odd-grid", "low-rank", "shared"])
def test_half_precision_inputs(name: str, dtype: torch.dtype, parameters: str) -> None:
    case = CASES[name]
    keep = ("A", "D", "delta_bias", "delta_weight", "weight", "bias") if parameters == "kept in float32" else ()
    scan_inputs, conv_inputs = as_type(case.scan_inputs(), dtype, keep), as_type(case.conv_inputs(), dtype, keep)
    compare(case.scan, scan_inputs, 1e-2, 1e-2)
    compare(case.conv, conv_inputs, 1e-2, 1e-2)
    for backend in ("torch", "reference"):
        assert run(case.scan, scan_inputs, backend)["output"].dtype == dtype
        assert run(case.conv, conv_inputs, backend)["output"].dtype == dtype


def test_inputs_may_lie_in_memory_in_any_way() -> None:
    case = CASES["class-token-first"]
    cotangent = torch.randn(case.batch, case.length, case.channels, dtype=torch.float64)
    plain = case.scan_inputs()
    strided = {name: torch.stack([value, value], dim=-1)[..., 0].mT.contiguous().mT for name, value in plain.items()}
    assert not any(value.is_contiguous() for name, value in strided.items() if value.shape[-1] > 1)

    def clone_free(inputs: Tensors) -> Tensors:
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        output = case.scan(**leaves)
        output.backward(cotangent.mT.contiguous().mT)
        return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    expected, actual = clone_free(plain), clone_free(strided)
    for name in expected:
        assert relative(actual[name], expected[name]) < 1e-12, name
    plain = case.conv_inputs()
    strided = {name: value.mT.contiguous().mT for name, value in plain.items()}
    cotangent = torch.randn(case.directions, case.batch, case.length, case.channels, dtype=torch.float64)
    expected = run(case.conv, plain, "reference", cotangent)
    leaves = {name: value.requires_grad_() for name, value in strided.items()}
    output = case.conv(**leaves)
    for name, gradient in zip(leaves, torch.autograd.grad(output, [*leaves.values()], cotangent), strict=True):
        assert relative(gradient, expected[f"gradient of {name}"]) < 1e-12, name
    assert relative(output, expected["output"]) < 1e-12


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_outside(dtype: torch.dtype, backend: str) -> None:
    """Convolution, state and sums keep the precision of their inputs, also in a backward pass under autocast."""
    for function, inputs in ((LONG.scan, LONG.scan_inputs()), (LONG.conv, LONG.conv_inputs())):
        inputs = as_type(inputs, torch.float32)
        cotangent = torch.randn_like(run(function, inputs)["output"])
        expected = run(function, inputs, backend, cotangent)
        with torch.autocast("cpu", dtype):
            actual = run(function, inputs, backend, cotangent)
        for name in expected:
            assert actual[name].dtype == torch.float32
            assert actual[name].equal(expected[name]), name


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 3, 6, channels=2, d_state=2, batch=1, ordered=False, gated=False, biased=False),
        Case(2, 2, 2, cls_index=2, channels=3, d_state=1, batch=2),
        Case(4, 2, 2, cls_index=2, channels=2, d_state=2, batch=1, softplus=False),
        Case(4, 1, 3, channels=2, d_state=3, batch=1, biased=False, taps=2),
        Case(2, 1, 3, channels=3, d_state=1, batch=1, rank=2),
        Case(4, 2, 2, channels=3, d_state=1, batch=2, gated=False, mean=False, rank=2, shared=True),
    ],
    ids=["one", "two", "four", "four-without-bias", "low-rank", "shared"],
)
def test_gradcheck(case: Case) -> None:
    for function, inputs in ((case.scan, case.scan_inputs()), (case.conv, case.conv_inputs())):
        leaves = [value.requires_grad_() for value in inputs.values()]
        by_position = bind(function, tuple(inputs))
        assert torch.autograd.gradcheck(by_position, leaves)


def bind(function: Callable[..., torch.Tensor], names: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    """The function with its keyword arguments taken by position, as gradcheck gives them."""
    return lambda *values: function(**dict(zip(names, values, strict=True)))


# ----------------------------------------------------------------------------------------------------------- extremes

LONG = Case(4, 5, 8, cls_index=20, channels=3)


def inverse_softplus(step: float) -> float:
    return float(torch.tensor(step, dtype=torch.float64).expm1().log())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("step", [1e-6, 50.0])
@pytest.mark.parametrize("decay", [1e-3, 1.0, 1e4])
def test_extreme_step_sizes_and_decays(step: float, decay: float, softplus: bool, dtype: torch.dtype) -> None:
    case = LONG._replace(softplus=softplus, biased=False)
    inputs = case.scan_inputs()
    inputs["delta"].fill_(inverse_softplus(step) if softplus else step)
    inputs["A"].fill_(-decay)
    precise = dtype == torch.float64
    compare(case.scan, as_type(inputs, dtype), 1e-10 if precise else 1e-5, 1e-10 if precise else 1e-4)


@pytest.mark.parametrize("raw", [-1e4, 20.5, 1e4])
def test_softplus_far_from_zero(raw: float) -> None:
    """Above 20 softplus is the identity, as in the official kernel, and its slope exactly 1."""
    case = LONG._replace(biased=False)
    inputs = case.scan_inputs()
    inputs["delta"].fill_(raw)
    compare(case.scan, inputs, 1e-10, 1e-10)
    compare(case.scan, as_type(inputs, torch.float32), 1e-5, 1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_inputs_equal(value: float) -> None:
    inputs = {name: torch.full_like(tensor, value) for name, tensor in LONG.scan_inputs().items()}
    inputs["A"].neg_()
    compare(LONG.scan, inputs, 1e-10, 1e-10)
    conv_inputs = {name: torch.full_like(tensor, value) for name, tensor in LONG.conv_inputs().items()}
    compare(LONG.conv, conv_inputs, 1e-10, 1e-10)
    if value == 0:
        assert run(LONG.scan, inputs)["output"].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LONG.scan_inputs())
def test_nan_spreads_as_in_the_reference(name: str, dtype: torch.dtype) -> None:
    inputs = as_type(LONG.scan_inputs(), dtype)
    inputs[name].view(-1)[inputs[name].numel() // 2] = torch.nan
    actual, expected = (run(LONG.scan, inputs, backend)["output"].isnan() for backend in ("torch", "reference"))
    assert actual.any()
    assert actual.equal(expected)


@pytest.mark.parametrize("name", LONG.conv_inputs())
def test_nan_spreads_through_the_convolution(name: str) -> None:
    inputs = LONG.conv_inputs()
    inputs[name].view(-1)[inputs[name].numel() // 2] = torch.nan
    actual, expected = (run(LONG.conv, inputs, backend)["output"].isnan() for backend in ("torch", "reference"))
    assert actual.any()
    assert actual.equal(expected)


@pytest.mark.parametrize("name", ["length3", "odd-grid"])
def test_convolution_and_scan_are_causal(name: str) -> None:
    """A change at one step of one direction moves no earlier step of it."""
    case = CASES[name]._replace(directions=1, ordered=False, gated=False)
    step = case.length // 2
    for function, inputs, changed in (
        (case.scan, case.scan_inputs(), "u"),
        (case.conv, case.conv_inputs(), "x"),
    ):
        before = run(function, inputs)["output"].squeeze(0)
        inputs[changed][..., step, :] += 1
        moved = (run(function, inputs)["output"].squeeze(0) != before).any(-1)
        assert not moved[..., :step].any()
        assert moved[..., step].all()


# ------------------------------------------------------------------------------------------------- the authors' mixers

SUFFIXES = ("", "_b", "_c", "_c_b")
STACKED = {
    "conv_weight": "conv1d{}.weight",
    "conv_bias": "conv1d{}.bias",
    "x_proj_weight": "x_proj{}.weight",
    "dt_proj_weight": "dt_proj{}.weight",
    "dt_proj_bias": "dt_proj{}.bias",
    "A_log": "A{}_log",
    "D": "D{}",
}


def stack_directions(official: Tensors, directions: int) -> Tensors:
    """Tensors of an official mixer under our names, shapes and in float64."""
    ours = {name: official[name] for name in ("in_proj.weight", "out_proj.weight")}
    for name, pattern in STACKED.items():
        parts = [official[pattern.format(suffix)] for suffix in SUFFIXES[:directions]]
        ours[name] = torch.stack([part.squeeze(1) if name == "conv_weight" else part for part in parts])
    assert sum(value.numel() for value in ours.values()) == sum(value.numel() for value in official.values())
    return {name: value.double() for name, value in ours.items()}


MIXERS = [  # folder, width, directions, expansion, order
    ("mixer_arm_plain", 64, 1, 1, None),
    ("mixer_arm_plain_short", 48, 1, 1, None),  # three tokens, fewer than the convolution has taps
    ("mixer_arm_v3_even", 64, 4, 1, scan_order(4, 4, DIRECTIONS, cls_index=8)),
    ("mixer_vim_v2_div", 48, 2, 2, scan_order(1, 13, DIRECTIONS[:2])),
]
Mixer = tuple[str, int, int, int, torch.Tensor | None]


def check_mixer(golden: Path, mixer: Mixer, backend: str, dtype: torch.dtype, device: str) -> None:
    """Output, gradient of the input and every parameter's gradient are the official mixer's."""
    folder, dim, directions, expand, order = mixer
    files = {path.stem: load_file(path) for path in (golden / folder).glob("*.safetensors")}
    weights, gradients = (stack_directions(files[name], directions) for name in ("state_dict", "param_grads"))
    x, cotangent = (files["inputs"][name].to(device, dtype) for name in ("x", "cotangent"))
    layer = MambaMixer(dim, directions, expand, device=device, dtype=dtype)
    layer.load_state_dict(weights)
    leaf = x.requires_grad_()
    with scan_backend(backend):
        output = layer(leaf, None if order is None else order.to(device))
        output.backward(cotangent)
    double = dtype == torch.float64
    for name, parameter in layer.named_parameters():  # the golden gradients of parameters are stored in float32
        assert relative(parameter.grad.cpu(), gradients[name]) < (1e-7 if double else 1e-3), name
    results = {"output": output.detach().cpu(), "grad_input": leaf.grad.cpu()}
    for name, expected in files["outputs_f64"].items():
        if double:
            assert relative(results[name], expected) < 1e-10, name
        else:
            error = (results[name] - expected).abs().max() / expected.abs().max()
            assert error < (1e-4 if name == "output" else 1e-3), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@golden_cases(["mixer_arm_plain_short"], [mixer[0] for mixer in MIXERS])
def test_mixer_equals_the_official_one(golden: Path, case: str, backend: str, dtype: torch.dtype) -> None:
    [mixer] = [mixer for mixer in MIXERS if mixer[0] == case]
    check_mixer(golden, mixer, backend, dtype, "cpu")


# ------------------------------------------------------------------------------------------------------------- memory


def saved_for_backward(function: Callable[[], torch.Tensor]) -> dict[int, torch.Tensor]:
    """What autograd keeps between forward and backward, by address."""
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("length", [64, 196])
def test_states_kept_for_training_weigh_one_activation(length: int, rank: int) -> None:
    """And no whole step sizes where those given are of low rank."""
    case = Case(4, length // 4, 4, channels=24, rank=rank)
    inputs = {name: value.float().requires_grad_() for name, value in case.scan_inputs().items()}
    order = case.order()
    saved = saved_for_backward(lambda: selective_scan(**inputs, order=order))
    given = {value.data_ptr() for value in (*inputs.values(), order)}
    output_size = case.batch * case.length * case.channels
    states = [value for address, value in saved.items() if address not in given and value.numel() != output_size]
    activation = inputs["u"]
    assert states, "nothing is kept for the backward pass, so this test sees the wrong thing"
    assert sum(value.nbytes for value in states) <= 1.1 * activation.nbytes
    assert max(value.numel() for value in saved.values()) < case.length * case.d_state * case.channels


def test_nothing_is_kept_without_gradients() -> None:
    inputs = {name: value.float() for name, value in LONG.scan_inputs().items()}
    assert not saved_for_backward(lambda: LONG.scan(**inputs))
    with torch.no_grad():
        inputs["u"].requires_grad_()
        assert not saved_for_backward(lambda: LONG.scan(**inputs))


# ----------------------------------------------------------------------------------------------------------- backends


def test_unknown_backend_names_those_there_are() -> None:
    before = get_scan_backend()
    with pytest.raises(ValueError, match=r"unknown scan backend 'fast'") as refusal:
        arm_zoo.set_scan_backend("fast")
    assert {"reference", "torch"} <= set(available_backends())
    for name in ("auto", *available_backends()):
        assert repr(name) in str(refusal.value)
    with pytest.raises(ValueError, match="unknown scan backend"), scan_backend("fast"):
        pass
    assert get_scan_backend() == before


@pytest.mark.slow
@pytest.mark.parametrize("name, message", [("fast", "unknown scan backend 'fast'"), ("", None)])
def test_environment_variable_is_named_in_its_refusal(name: str, message: str | None) -> None:
    command = [sys.executable, "-c", "import arm_zoo; print(arm_zoo.get_scan_backend())"]
    environment = {**os.environ, "ARM_ZOO_SCAN": name}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if message is None:
        assert done.stdout.split() == ["auto"]  # empty is as if it were not there
    else:
        assert f"environment variable ARM_ZOO_SCAN: {message}" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("value, taken", [("yes", True), ("0", False)])
def test_tritons_interpreter_is_asked_for_as_triton_reads_it(value: str, taken: bool) -> None:
    pytest.importorskip("triton", reason="no triton in this build of torch")
    script = "import arm_zoo, triton; print('triton' in arm_zoo.available_backends(), triton.knobs.runtime.interpret)"
    environment = {**os.environ, "TRITON_INTERPRET": value, "ARM_ZOO_SCAN": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(taken)] * 2


@pytest.mark.parametrize(
    "name, missing, message",
    [
        ("triton", "triton", r"it needs the package triton \(no module triton\): pip install triton"),
        ("cuda", "cuda.core", r"it needs the package cuda-core .*: pip install 'arm-zoo\[cuda\]'"),
        ("cuda", None, r"it needs a newer version of the package cuda-core: pip install --upgrade 'arm-zoo\[cuda\]'"),
        ("mamba_ssm", "causal_conv1d", r"it needs the package causal-conv1d .*: pip install 'arm-zoo\[kernels\]'"),
    ],
)
def test_refusals_say_what_to_install(
    name: str, missing: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(module: str) -> ModuleType:
        if module == missing:
            raise ImportError(f"no module {module}")
        return ModuleType(module)  # with nothing in it, as an old version

    monkeypatch.setattr(backends.importlib, "import_module", load)
    backends.why_not.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"scan backend '{name}' cannot run here: {message}"):
            arm_zoo.set_scan_backend(name)
    finally:
        backends.why_not.cache_clear()


@pytest.mark.parametrize(
    "name, device, dtype, taken",
    [
        ("torch", "cpu", torch.float64, True),
        ("numba", "cpu", torch.float32, True),
        ("numba", "cpu", torch.bfloat16, False),
        ("cuda", "cuda", torch.bfloat16, True),
        ("cuda", "cuda", torch.float64, False),
        ("mamba_ssm", "cpu", torch.float32, False),
    ],
)
def test_backends_say_which_calls_they_take(name: str, device: str, dtype: torch.dtype, taken: bool) -> None:
    reason = backends.BACKENDS[name].why_not_for(device, dtype)
    assert (reason is None) == taken
    assert taken or reason.endswith(f", got {dtype} on {device}; use 'auto' or 'torch'")


def test_a_new_backend_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = backends.Backend("arm_zoo.ops.cpu.chunked", device="cpu", dtypes=(torch.float64,), directions_inside=True)
    monkeypatch.setitem(backends.BACKENDS, "toy", row)
    backends.why_not.cache_clear()
    inputs = CASES[next(iter(CASES))].scan_inputs()
    assert "toy" in available_backends() and backends._choose("cpu", torch.float64) == "torch"
    with scan_backend("toy"):
        y = selective_scan(**inputs)
        with pytest.raises(ValueError, match=r"'toy' takes float64 on the CPU, got torch\.float32 on cpu"):
            backends.resolve_backend(torch.empty(1))
    with scan_backend("torch"):
        assert y.equal(selective_scan(**inputs))
    monkeypatch.setitem(backends.BACKENDS, "toy", row._replace(auto=1, plain=True))
    assert backends._choose("cpu", torch.float64) == "toy"
    monkeypatch.setitem(backends.BACKENDS, "better", row._replace(auto=2))
    assert backends._choose("cpu", torch.float64) == "better"
    monkeypatch.setitem(backends.BACKENDS, "elsewhere", row._replace(device="xpu", auto=3))
    with pytest.raises(ValueError, match="'elsewhere' cannot run here: it needs a XPU device; on the CPU use 'torch'"):
        arm_zoo.set_scan_backend("elsewhere")


@pytest.mark.parametrize("name, taken", [("auto", True), ("numba", True), ("torch", False), ("reference", False)])
def test_kernels_around_the_scans_go_with_all_but_plain_backends(
    name: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "why_not", lambda name: None)
    monkeypatch.setattr(backends._choices[-1], "name", name)
    assert fused._has_kernel(0, hopper=False) == taken
    monkeypatch.setattr(fused, "why_not", lambda name: "it is there, but `import triton` fails")
    assert not fused._has_kernel(0, hopper=False)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_mixer_chooses_its_backend_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    resolve = functional.resolve_backend
    monkeypatch.setattr(functional, "resolve_backend", lambda x: asked.append(x) or resolve(x))
    with scan_backend(backend):
        MambaMixer(8, 2)(torch.randn(1, 6, 8), scan_order(2, 3, DIRECTIONS[:2]))
    assert len(asked) == 1


def test_context_manager_restores_the_backend() -> None:
    before = get_scan_backend()
    with scan_backend("reference"):
        assert get_scan_backend() == "reference"
        with scan_backend("torch"):
            assert get_scan_backend() == "torch"
        assert get_scan_backend() == "reference"
    with pytest.raises(KeyError), scan_backend("reference"):
        raise KeyError
    assert get_scan_backend() == before


@pytest.mark.parametrize("backend", available_backends())
def test_every_backend_tells_shapes_on_the_meta_device(backend: str) -> None:
    model = timm.create_model("arm_pico_patch2_8", device="meta")
    with scan_backend(backend):
        assert model(torch.empty(2, 1, 8, 8, device="meta")).shape == (2, 10)


def test_backend_can_be_set_for_good() -> None:
    before = get_scan_backend()
    arm_zoo.set_scan_backend("reference")
    try:
        assert get_scan_backend() == "reference"
    finally:
        arm_zoo.set_scan_backend(before)


def test_blocks_of_threads_may_overlap() -> None:
    before, steps = get_scan_backend(), [threading.Event() for _ in range(3)]
    seen = []

    def other() -> None:
        steps[0].wait()
        arm_zoo.set_scan_backend("torch")  # for good, though a block is open elsewhere
        seen.append(get_scan_backend())
        with scan_backend("torch"):
            steps[1].set()
            steps[2].wait()
            seen.append(get_scan_backend())
        seen.append(get_scan_backend())

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with scan_backend("auto"):
            with scan_backend("reference"):
                steps[0].set()
                steps[1].wait()
                assert get_scan_backend() == "torch", "the block that was opened last decides"
            arm_zoo.set_scan_backend("reference")  # until the block ends
        steps[2].set()
        thread.join()
        assert seen == ["reference", "torch", "torch"]
        assert get_scan_backend() == "torch"
    finally:
        arm_zoo.set_scan_backend(before)


AUTO = """
import logging, torch, arm_zoo
from arm_zoo.layers import order
from arm_zoo.layers.mixer import MambaMixer
logging.basicConfig(level=logging.INFO, format="%(name)s:%(message)s")
mixer = MambaMixer(16, 1)
with arm_zoo.scan_backend("reference"):
    mixer(torch.randn(1, 3, 16))
print("reference done", flush=True)
for _ in range(3):
    mixer(torch.randn(1, 3, 16)).sum().backward()
"""


@pytest.mark.slow
def test_auto_logs_its_choice_once(repo: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", AUTO], cwd=repo, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout
    before, _, after = result.stdout.partition("reference done\n")
    assert "arm_zoo" not in before
    [line] = [line for line in after.splitlines() if line.startswith("arm_zoo")]
    assert ("'numba'" if "numba" in available_backends() else "'torch'") in line


# ------------------------------------------------------------------------------------------ what PyTorch asks of an op


class Recorder(TorchDispatchMode):
    """Remembers the project's operators that run, how often, and with which arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "arm_zoo":
            self.calls[func.name()] = func, args
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case", [CASES["length65"], LONG, CASES["low-rank"], CASES["unordered"]._replace(biased=False), CASES["shared"]]
)
def test_operators_pass_opcheck(case: Case) -> None:
    scan_inputs, conv_inputs = as_type(case.scan_inputs(), torch.float32), as_type(case.conv_inputs(), torch.float32)
    with Recorder() as recorder:
        run(case.scan, scan_inputs, cotangent=torch.ones(()).expand(case.batch, case.length, case.channels))
        shape = (case.directions, case.batch, case.length, case.channels)
        run(case.conv, conv_inputs, cotangent=torch.ones(()).expand(shape))
    assert {"arm_zoo::causal_conv", "arm_zoo::selective_scan"} <= {name.split(".")[0] for name in recorder.calls}
    for name, (func, args) in recorder.calls.items():
        # the backward operators have no gradient of their own, so their arguments ask for none
        needs = [isinstance(a, torch.Tensor) and a.requires_grad and "backward" not in name for a in args]
        fresh = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(
            func, tuple(a.requires_grad_() if need else a for a, need in zip(fresh, needs, strict=True))
        )


@pytest.mark.slow
def test_transforms_of_torch_func_take_the_reference() -> None:
    """Operators would drop tangents without a word."""
    mixer, order = MambaMixer(16, 2), scan_order(2, 3, DIRECTIONS[:2])
    x, tangent = torch.randn(2, 6, 16), torch.randn(2, 6, 16)

    def scalar(x: torch.Tensor) -> torch.Tensor:
        return mixer(x, order).square().sum()

    def slope_of(function: Callable[..., torch.Tensor]) -> float:
        return torch.func.jvp(function, (x,), (tangent,))[1].item()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(scalar(leaf), leaf)
    defined = pytest.approx((expected * tangent).sum().item(), rel=1e-4)
    with scan_backend("auto"):
        assert relative(torch.func.grad(scalar)(x), expected) < 1e-5
        assert slope_of(scalar) == slope_of(torch.compile(scalar, backend="eager")) == defined
        assert torch.compile(lambda: torch.func.jvp(scalar, (x,), (tangent,))[1], backend="eager")().item() == defined
    with scan_backend("auto"), torch.no_grad():
        assert slope_of(scalar) == defined
        with torch.autograd.forward_ad.dual_level():
            dual = scalar(torch.autograd.forward_ad.make_dual(x, tangent))
            assert torch.autograd.forward_ad.unpack_dual(dual).tangent.item() == defined
    with scan_backend("torch"):
        with pytest.raises(ValueError, match=r"'torch' knows neither .*; use 'auto'"):
            slope_of(scalar)
        with torch.no_grad():  # needs no derivatives
            assert relative(torch.vmap(mixer)(x[:, None])[:, 0], mixer(x)) < 1e-5
        (first,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; .*scan_backend\('reference'\)"):
        first.sum().backward()


@pytest.mark.parametrize("wrong", range(3))
def test_what_does_not_fit_a_convolution_is_refused(wrong: int) -> None:
    shapes = [(2, 6, 4), (2, 6), (2, 5)]
    shapes[wrong] = [(2, 5, 4), (6,), (1, 5)][wrong]
    weight, bias, order = (torch.zeros(shape, dtype=torch.long if i == 2 else None) for i, shape in enumerate(shapes))
    with pytest.raises(ValueError, match=r"causal_conv: \w+ is .*, x \(3, 5, 6\) needs "):
        causal_conv(torch.zeros(3, 5, 6), weight, bias, order)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 3, 4, 5, dtype=torch.long), torch.zeros(4, 5), torch.zeros(2, 3, 0, 5)]
)
def test_sequences_are_floating_point_with_all_axes_and_a_step(tensor: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"u must hold floating-point numbers \(directions, batch, length, channels\)"
    ):
        selective_scan(tensor, *[torch.zeros(1)] * 5)
    with pytest.raises(ValueError, match="xz must hold floating-point numbers"):
        mamba_inner(tensor[0], *[torch.zeros(1)] * 7)
    with pytest.raises(ValueError, match=r"A must hold .* of at least one state, got torch.float32 \(1, 4, 0\)"):
        selective_scan(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 4, 0), *[torch.zeros(1)] * 3)
    with pytest.raises(ValueError, match=r"floating-point numbers \(batch, length, channels\) of at least one step"):
        selective_scan(torch.zeros(2, 0, 4), *[torch.zeros(1)] * 5)
    with pytest.raises(ValueError, match=r"delta is \(1, 2, 3, 4\), u \(2, 3, 4\) needs \(5, 2, 3, 4\)"):
        selective_scan(torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(5, 4, 1), *[torch.zeros(1)] * 3)
    with pytest.raises(ValueError, match="channels and as many gates, an even number, got 7"):
        mamba_inner(torch.zeros(2, 3, 7), *[torch.zeros(1)] * 7)


def test_a_gate_of_another_type_does_not_change_the_output_s() -> None:
    inputs = as_type(CASES["length65"].scan_inputs(), torch.bfloat16)
    with torch.no_grad():
        assert selective_scan(**{**inputs, "z": inputs["z"].float()}).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_norms_come_after_the_directions_meet_and_before_the_gate(backend: str) -> None:
    inputs = as_type(CASES["low-rank"].scan_inputs(), torch.float32)
    weight, bias = torch.randn(2, 10).unbind()
    z, leaves = inputs.pop("z"), [t.requires_grad_() for t in (inputs["u"], weight, bias)]
    with scan_backend(backend):
        plain = CASES["low-rank"].scan(**inputs)
        expected = torch.nn.functional.layer_norm(plain, (10,), weight, bias, 1e-2) * torch.nn.functional.silu(z)
        y = selective_scan(**inputs, z=z, order=CASES["low-rank"].order(), norm=(weight, bias, 1e-2))
        with torch.no_grad():
            inferred = selective_scan(**inputs, z=z, order=CASES["low-rank"].order(), norm=(weight, bias, 1e-2))
    for actual in (y, inferred):
        torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(y)
    pairs = zip(*(torch.autograd.grad(each, leaves, cotangent) for each in (y, expected)), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)
    with pytest.raises(ValueError, match=r"selective_scan: the norm's bias is \(9,\), u .* needs \(10,\)"):
        selective_scan(**inputs, order=CASES["low-rank"].order(), norm=(weight, bias[:9], 1e-2))


@pytest.mark.parametrize("wrong", range(1, 9))
def test_shapes_that_do_not_fit_are_refused_before_any_kernel(wrong: int) -> None:
    shapes = [(2, 5, 12), (2, 6, 4), (2, 6), (2, 11, 6), (2, 6, 3), (2, 6), (2, 6, 4), (2, 6), (2, 5)]
    shapes[wrong] = (2, 5, 4) if wrong == 1 else (*shapes[wrong][:-1], shapes[wrong][-1] + 2)
    tensors = [torch.zeros(shape, requires_grad=True) for shape in shapes[:-1]]
    with pytest.raises(ValueError, match=r"mamba_inner: \w+ is .*, xz \(2, 5, 12\) needs "):
        mamba_inner(*tensors, torch.zeros(shapes[-1], dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    case = Case(4, 14, 14, cls_index=98, channels=48, batch=3)
    for function, inputs in ((case.scan, case.scan_inputs()), (case.conv, case.conv_inputs())):
        inputs = as_type(inputs, dtype)
        cotangent = torch.randn_like(run(function, inputs)["output"])
        first, second = (run(function, inputs, cotangent=cotangent) for _ in range(2))
        for name in first:
            assert first[name].equal(second[name]), name


def test_calls_leave_nothing_behind() -> None:
    """Neither threads, nor NaN, nor inference mode, nor a default device of before show in a later result."""
    case = Case(4, 5, 8, cls_index=20, channels=30)
    inputs = [as_type(case.scan_inputs(), torch.float32) for _ in range(4)]
    cotangent = torch.randn(case.batch, case.length, case.channels)
    expected = [run_here(case, given, cotangent) for given in inputs]

    def after_others(given: Tensors) -> Tensors:
        with torch.inference_mode():
            poisoned = {name: torch.full_like(value, torch.nan) for name, value in given.items()}
            case.scan(**poisoned)
            with torch.device("meta"), pytest.raises(ValueError, match="order is on meta, u on cpu"):
                case.scan(**poisoned)
        return run_here(case, given, cotangent)

    with ThreadPoolExecutor(len(inputs)) as threads:
        found = list(threads.map(after_others, inputs * 4))
    for actual, wanted in zip(found, expected * 4, strict=True):
        for name in wanted:
            assert actual[name].equal(wanted[name]), name


def run_here(case: Case, inputs: Tensors, cotangent: torch.Tensor) -> Tensors:
    """`run` on the backend in force, which is one for all threads."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    output = case.scan(**leaves)
    output.backward(cotangent)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


class Mean(nn.Module):
    """A mixer down to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = MambaMixer(24, 4)

    def forward(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return self.mixer(x, order).square().mean()


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_mixer_compiles_whole(precision: str) -> None:
    module, order = Mean(), scan_order(3, 5, DIRECTIONS, cls_index=7)
    x = torch.randn(2, 16, 24, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        x.grad = None
        with autocast:
            loss = function(x, order)
        loss.backward()
        results.append([loss.detach(), x.grad, *(parameter.grad for parameter in module.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) < (1e-6 if precision == "float32" else 3e-2)


def test_model_compiles_whole_and_trains() -> None:
    model = timm.create_model("arm_tiny_patch16_224", img_size=(32, 48), embed_dim=32, depth=2, num_classes=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 32, 48)
    results = []
    for function in (model, compiled):
        model.zero_grad()
        loss = function(images).square().sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for eager, other in zip(*results, strict=True):
        assert relative(other, eager) < 1e-5


def test_model_exports_with_any_batch() -> None:
    model = timm.create_model("arm_tiny_patch16_224", img_size=(32, 48), embed_dim=32, depth=2, num_classes=3).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 48),), dynamic_shapes=({0: batch},))
    for size in (1, 2, 5):
        images = torch.randn(size, 3, 32, 48)
        assert relative(exported.module()(images), model(images)) < 1e-5


def test_tensors_on_several_devices_are_refused() -> None:
    inputs = LONG.scan_inputs()
    with pytest.raises(ValueError, match=r"A is on meta, u on cpu; load .* init_non_persistent_buffers\(\)"):
        LONG.scan(**{**inputs, "A": inputs["A"].to("meta")})
    with pytest.raises(ValueError, match=r"selective_scan: delta is on cpu, u on meta; move one of them"):
        LONG.scan(**{**inputs, "u": inputs["u"].to("meta")})


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_table_of_32_bits_is_the_same_table(backend: str) -> None:
    x, order = torch.randn(2, 6, 5), torch.stack([torch.randperm(6), torch.randperm(6)])
    taps, offset = torch.randn(2, 5, 4), torch.randn(2, 5)
    with scan_backend(backend):
        assert torch.equal(causal_conv(x, taps, offset, order.int()), causal_conv(x, taps, offset, order))
