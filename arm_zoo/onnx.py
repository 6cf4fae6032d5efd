"""Translates the operators of arm_zoo, which `arm_zoo/ops/reference.py` defines, to ONNX.

Importing this module registers the translations for `torch.onnx.export(..., dynamo=True)`. It needs the packages onnx
and onnxscript. A scan becomes one `Scan` node for all directions and any number of patches. It runs along the first
axis and uses no values from the graph around it, as some runtimes require. Annotations here are types of ONNX.
"""

# mypy: ignore-errors

from collections.abc import Callable
from typing import Any, Optional

import torch

import arm_zoo.ops  # noqa: F401  (registers the operators)

try:
    import onnxscript
    from onnxscript import FLOAT, INT64, graph, script
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.registration import torch_op

    if tuple(map(int, onnxscript.__version__.split(".")[:2])) < (0, 7):
        raise ImportError(f"onnxscript is {onnxscript.__version__}")
except ImportError as error:
    needs = "arm_zoo.onnx needs onnx, and onnxscript 0.7 or newer"
    raise ImportError(f"{needs} ({error}): pip install --upgrade onnx 'onnxscript>=0.7'") from error

# Values of the graph that is being built; by these annotations torch.onnx requires float32 of the model.
Value = FLOAT
Table = INT64
OptionalValue = Optional[FLOAT]  # noqa: UP045  (onnxscript does not read the newer form)
OptionalTable = Optional[INT64]  # noqa: UP045
Step = FLOAT[None, None, None, None]  # a step or the state; OpenVINO needs to know that there are four axes


@script(default_opset=op)
def recurrence(
    state: FLOAT[...], A: FLOAT[...], delta: FLOAT[...], into: FLOAT[...], B: FLOAT[...], C: FLOAT[...]
) -> FLOAT[...]:
    @graph()
    def step(h: Step, rates: Step, delta_t: Step, into_t: Step, B_t: Step, C_t: Step):  # noqa: ANN202
        decay = op.Exp(op.Mul(delta_t, rates))
        after = op.Add(op.Mul(decay, h), op.Mul(B_t, into_t))
        y_t = op.MatMul(C_t, after)
        same = op.Identity(rates)
        return after, same, y_t

    _final, _rates, y = op.Scan(state, A, delta, into, B, C, body=step, num_scan_inputs=4)
    return y


def _ints(*values: int) -> Table:
    return op.Constant(value_ints=list(values))


def _silu(x: Value) -> Value:
    return op.Mul(x, op.Sigmoid(x))


def _softplus(x: Value) -> Value:
    """relu(x) + log1p(exp(-|x|)): as exact as ONNX's own Softplus, which onnxruntime does not vectorise."""
    one = op.Constant(value_float=1.0)
    small = op.Exp(op.Neg(op.Abs(x)))
    sum_ = op.Add(small, one)
    lost = op.Div(op.Sub(op.Sub(sum_, one), small), sum_)  # the error of its logarithm by rounding the sum
    return op.Add(op.Relu(x), op.Sub(op.Log(sum_), lost))


def _causal_conv(x: Value, weight: Value, bias: Value, order: OptionalTable, backend: str) -> Value:
    taps = weight.shape[2]
    steps = op.Transpose(x, perm=[1, 0, 2])  # (B, L, D) -> (L, B, D)
    if order is None:
        sequences = op.Unsqueeze(steps, _ints(1))
    else:
        sequences = op.Gather(steps, op.Transpose(order, perm=[1, 0]), axis=0)  # (L, K, B, D)
    padded = op.Pad(sequences, _ints(taps - 1, 0, 0, 0, 0, 0, 0, 0))
    total = op.Unsqueeze(bias, _ints(1))  # (K, 1, D)
    for j in range(taps):
        end = j - taps + 1 or 2**31
        shifted = op.Slice(padded, _ints(j), _ints(end), _ints(0))
        factor = op.Transpose(op.Gather(weight, _ints(j), axis=2), perm=[0, 2, 1])  # (K, 1, D)
        total = op.Add(total, op.Mul(shifted, factor))
    return op.Transpose(_silu(total), perm=[1, 2, 0, 3])


def _by_step(sequence: Value) -> Value:
    """(K, B, L, N) -> (L, K, B, N)."""
    return op.Transpose(sequence, perm=[2, 0, 1, 3])


def _taken(sequence: Value, order: Table) -> Value:
    """(K, B, L, N) in token order -> in scan order."""
    tables = [op.Gather(order, op.Constant(value_int=k), axis=0) for k in range(order.shape[0])]
    rows = [op.Gather(op.Gather(sequence, _ints(k), axis=0), steps, axis=2) for k, steps in enumerate(tables)]
    return op.Concat(*rows, axis=0)


def _selective_scan(
    u: Value, delta: Value, A: Value, B: Value, C: Value, D: Value, delta_bias: OptionalValue,
    delta_weight: OptionalValue, delta_softplus: bool, order: OptionalTable, mean: bool, save_states: bool,
    gate: OptionalValue, backend: str,
) -> tuple[Value, Value]:  # fmt: skip
    if len(u.shape) == 3:  # all sequences are in token order, and the directions share u
        u = op.Expand(op.Unsqueeze(u, _ints(0)), op.Concat(op.Shape(A, end=1), op.Shape(u), axis=0))
        u, delta, B, C = (sequence if order is None else _taken(sequence, order) for sequence in (u, delta, B, C))
    if delta_weight is not None:  # (K, D, R) -> (K, 1, R, D)
        delta = op.MatMul(delta, op.Unsqueeze(op.Transpose(delta_weight, perm=[0, 2, 1]), _ints(1)))
    delta = delta if delta_bias is None else op.Add(delta, op.Unsqueeze(delta_bias, _ints(1, 2)))
    delta = _softplus(delta) if delta_softplus else delta
    u, delta = _by_step(u), _by_step(delta)
    rates = op.Unsqueeze(op.Transpose(A, perm=[0, 2, 1]), _ints(1))  # (K, D, S) -> (K, 1, S, D)
    directions_and_batch = op.Shape(u, start=1, end=3)
    state_shape = op.Concat(directions_and_batch, op.Shape(rates, start=2), axis=0)
    state = op.Expand(op.Constant(value_float=0.0), state_shape)  # (K, B, S, D)
    row = _ints(3)
    delta_rows, into, C_rows = (op.Unsqueeze(t, row) for t in (delta, op.Mul(delta, u), _by_step(C)))
    y = recurrence(state, rates, delta_rows, into, op.Unsqueeze(_by_step(B), _ints(4)), C_rows)
    y = op.Add(op.Squeeze(y, row), op.Mul(op.Unsqueeze(D, _ints(1)), u))  # (L, K, B, D)
    if order is not None:  # for every token the rows, among L * K, in which the directions visit it
        directions = order.shape[0]
        zero, one, count = (op.Constant(value_int=value) for value in (0, 1, directions))
        steps = op.Expand(op.Range(zero, op.Squeeze(op.Shape(order, start=1)), one), op.Shape(order))
        inverse = op.ScatterElements(order, order, steps, axis=1)  # (K, L)
        first = op.Unsqueeze(op.Range(zero, count, one), _ints(1))
        rows = op.Transpose(op.Add(op.Mul(inverse, count), first), perm=[1, 0])
        y = op.Gather(op.Reshape(y, op.Concat(_ints(-1), op.Shape(y, start=2), axis=0)), rows, axis=0)
    y = (op.ReduceMean if mean else op.ReduceSum)(y, _ints(1), keepdims=0)
    y = op.Transpose(y, perm=[1, 0, 2])  # (B, L, D)
    no_states = op.ConstantOfShape(op.Concat(directions_and_batch, _ints(0), op.Shape(rates, start=2), axis=0))
    return y if gate is None else op.Mul(y, _silu(gate)), no_states  # only a backward pass needs states


_TRANSLATIONS: dict[str, Callable[..., Any]] = {"causal_conv": _causal_conv, "selective_scan": _selective_scan}
for _name, _translation in _TRANSLATIONS.items():
    torch_op(f"arm_zoo::{_name}", trace_only=True)(_translation)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our operators and their translations, for `torch.onnx.export(..., custom_translation_table=...)`."""
    return {getattr(torch.ops.arm_zoo, name).default: translation for name, translation in _TRANSLATIONS.items()}
