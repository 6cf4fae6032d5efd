"""How ONNX writes the two operators of arm_zoo; `arm_zoo/scan/reference.py` defines them.

In the functions that onnxscript compiles, annotations are ONNX types, not Python's.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op

import arm_zoo  # noqa: F401  (registers the operators)

Value = Any  # of the graph that is being built


@script(default_opset=op)
def recurrence(
    state: FLOAT[...], u: FLOAT[...], delta: FLOAT[...], A: FLOAT[...], B: FLOAT[...], C: FLOAT[...]
) -> FLOAT[...]:
    @graph()
    def step(h, u_t, delta_t, B_t, C_t):  # noqa: ANN001, ANN202
        last = op.Constant(value_ints=[-1])
        channels = op.Constant(value_ints=[2])
        decay = op.Exp(op.Mul(op.Unsqueeze(delta_t, last), A))
        into = op.Mul(op.Unsqueeze(op.Mul(delta_t, u_t), last), op.Unsqueeze(B_t, channels))
        after = op.Add(op.Mul(decay, h), into)
        y_t = op.ReduceSum(op.Mul(after, op.Unsqueeze(C_t, channels)), last, keepdims=0)
        return after, y_t

    _final, y = op.Scan(
        state,
        u,
        delta,
        B,
        C,
        body=step,
        num_scan_inputs=4,
        scan_input_axes=[2, 2, 2, 2],
        scan_output_axes=[2],
    )
    return y


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


def _causal_conv(x: Value, weight: Value, bias: Value, order: Value | None, backend: str) -> Value:
    """A sum of shifted products."""
    taps = weight.shape[2]
    sequences = op.Unsqueeze(x, _ints(1)) if order is None else op.Gather(x, order, axis=1)  # (B, K, L, D)
    padded = op.Pad(sequences, _ints(0, 0, taps - 1, 0, 0, 0, 0, 0))
    total = op.Unsqueeze(bias, _ints(1))
    for j in range(taps):
        end = j - taps + 1 or 2**31
        shifted = op.Slice(padded, _ints(j), _ints(end), _ints(2))
        factor = op.Transpose(op.Gather(weight, _ints(j), axis=2), perm=[0, 2, 1])  # (K, 1, D)
        total = op.Add(total, op.Mul(shifted, factor))
    return op.Transpose(op.Mul(total, op.Sigmoid(total)), perm=[1, 0, 2, 3])


def _selective_scan(
    u: Value,
    delta: Value,
    A: Value,
    B: Value,
    C: Value,
    D: Value,
    delta_bias: Value | None,
    delta_weight: Value | None,
    delta_softplus: bool,
    order: Value | None,
    save_states: bool,
    gate: Value | None,
    backend: str,
) -> tuple[Value, Value]:
    """One Scan node over the steps of all directions."""
    if delta_weight is not None:  # (K, D, R) -> (K, 1, R, D)
        delta = op.MatMul(delta, op.Unsqueeze(op.Transpose(delta_weight, perm=[0, 2, 1]), _ints(1)))
    delta = delta if delta_bias is None else op.Add(delta, op.Unsqueeze(delta_bias, _ints(1, 2)))
    delta = op.Softplus(delta) if delta_softplus else delta
    batch, sizes = op.Shape(u, start=0, end=2), op.Shape(A, start=1, end=3)
    state = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, sizes, axis=0))  # (K, B, D, S)
    y = recurrence(state, u, delta, op.Unsqueeze(A, _ints(1)), B, C)
    y = op.Add(y, op.Mul(op.Unsqueeze(D, _ints(1, 2)), u))
    if order is not None:
        length = op.Constant(value_int=u.shape[2])
        steps = op.Range(op.Constant(value_int=0), length, op.Constant(value_int=1))
        inverse = op.ScatterElements(order, order, op.Expand(steps, op.Shape(order)), axis=1)
        y = op.GatherElements(y, op.Expand(op.Unsqueeze(inverse, _ints(1, 3)), op.Shape(y)), axis=2)
    no_states = op.ConstantOfShape(
        op.Concat(batch, _ints(0), op.Shape(A, start=2), op.Shape(A, start=1, end=2), axis=0)
    )
    y = op.ReduceMean(y, _ints(0), keepdims=0)
    gated = y if gate is None else op.Mul(y, op.Mul(gate, op.Sigmoid(gate)))
    return gated, no_states  # which only a backward pass would read


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.arm_zoo.causal_conv.default: _causal_conv,
    torch.ops.arm_zoo.selective_scan.default: _selective_scan,
}
