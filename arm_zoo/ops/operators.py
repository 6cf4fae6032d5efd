"""The convolution, the scan and all between a mixer's projections, as custom operators of PyTorch.

torch.compile and torch.export do not look into custom operators; they use the schemas, fakes and gradients given here.
"""

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from arm_zoo.ops.backends import BACKENDS
from arm_zoo.ops.layout import Norm, ScanInputs, Tensors, empty_states, project, state_dtype

_CONV_INPUTS = "Tensor x, Tensor weight, Tensor bias, Tensor? order"
_SCAN_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? delta_bias, Tensor? delta_weight, "
    "bool delta_softplus, Tensor? order, bool mean"
)
_EIGHT = f"({', '.join(['Tensor'] * 8)})"
_INNER_INPUTS = (
    "Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, "
    "Tensor dt_proj_bias, Tensor A, Tensor D, Tensor? order"
)


def register(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],  # `compute` for tensors without data
    *,
    save: Callable[..., None] | None = None,  # autograd's `setup_context`
    gradient: Callable[..., Any] | None = None,  # autograd's `backward`; that of a ..._backward refuses
    flops: Callable[..., int] | None = None,  # inputs' shapes -> operations in matrix products
) -> None:
    """Register the custom operator `arm_zoo::name`, the first of whose inputs is a tensor."""

    def run(first: Tensor, *others: Any) -> Any:
        with torch.accelerator.device_index(first.device.index):  # kernels start on the current device
            return compute(first, *others)

    operator = torch.library.custom_op(f"arm_zoo::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if gradient is None and name.endswith("_backward"):
        gradient = _refuse_second_derivatives
    if gradient is not None:
        operator.register_autograd(gradient, setup_context=save)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.arm_zoo, name))(flops)


def _refuse_second_derivatives(*_: Any) -> None:
    raise RuntimeError(
        "arm_zoo's operators have no second derivatives; compute them `with arm_zoo.scan_backend('reference')`"
    )


def _by_backend(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute(module, *inputs)` as a function of the inputs and of the name of the module's backend."""

    def run(*args: Any) -> Any:
        *inputs, backend = args
        with torch.autocast(inputs[0].device.type, enabled=False):  # matrix products keep float32 sums
            return compute(importlib.import_module(BACKENDS[backend].module), *inputs)

    return run


def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, backend: str) -> Tensor:
    (batch, length, _), (directions, channels, _) = x.shape, weight.shape
    if BACKENDS[backend].directions_inside:
        return x.new_empty(batch, length, directions, channels).permute(2, 0, 1, 3)
    return x.new_empty(directions, batch, length, channels)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)  # no zeros in place of missing gradients
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *(() if isinstance(output, Tensor) else output[1:]))


def _gradient_by(backward: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of an operator whose last inputs are the order and the backend, by another operator."""

    def gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        return *getattr(torch.ops.arm_zoo, backward)(grad, *ctx.saved_tensors, ctx.backend), None, None

    return gradient


register(
    "causal_conv_backward",
    f"(Tensor grad, {_CONV_INPUTS}, str backend) -> (Tensor, Tensor, Tensor)",
    _by_backend(lambda module, *inputs: module.causal_conv_backward(*inputs)),
    fake=lambda grad, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:3]),
)
register(
    "causal_conv",
    f"({_CONV_INPUTS}, str backend) -> Tensor",
    _by_backend(lambda module, *inputs: module.causal_conv(*inputs)),
    fake=_conv_fake,
    save=_save_inputs,
    gradient=_gradient_by("causal_conv_backward"),
)


def _scan_fake(*args: Any) -> Tensors:
    *inputs, save_states, _, backend = args
    scan = ScanInputs(*inputs)
    y = scan.u.new_empty(scan.shape[1:])
    return y, _states_fake(y, scan.A, save_states, backend)


def _states_fake(like: Tensor, A: Tensor, save: bool, backend: str) -> Tensor:
    row = BACKENDS[backend]
    dtype = state_dtype(like.dtype, half=row.own_kernels)
    return empty_states(like, A, dtype, save=save and row.saves_states)


def _scan_backward(module: ModuleType, grad: Tensor, *args: Any) -> Tensors:
    """The gradients of u, delta, A, B, C, D, delta_bias and delta_weight; that of the last is empty without one."""
    *inputs, saved = args
    scan = ScanInputs(*inputs)
    whole = scan.with_whole_steps()  # low-rank step sizes are recomputed at full rank: cheaper than storing them
    grads = module.selective_scan_backward(grad, whole, saved)
    grads = tuple(t.to(like.dtype) for t, like in zip(grads, _differentiable(whole), strict=True))
    if scan.delta_weight is None:
        return *grads, scan.u.new_empty(0)
    grad_u, grad_whole, *others = grads
    grad_delta = torch.bmm(grad_whole.flatten(1, 2), scan.delta_weight.to(grad_whole.dtype)).view_as(scan.delta)
    grad_weight = _weight_gradient(grad_whole, scan.delta).to(scan.delta_weight.dtype)
    return grad_u, grad_delta, *others, grad_weight


def _differentiable(scan: ScanInputs) -> Tensors:
    """u, delta, A, B, C, D and delta_bias; D stands in for a missing bias, as its gradient is dropped."""
    return *scan[:6], scan.D if scan.delta_bias is None else scan.delta_bias


def _scan_backward_fake(grad: Tensor, *args: Any) -> Tensors:
    scan = ScanInputs(*args[:-2])
    weight = scan.u.new_empty(0) if scan.delta_weight is None else scan.delta_weight
    return tuple(t.new_empty(t.shape) for t in (*_differentiable(scan), weight))


def _weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """(K, B, L, M) and (K, B, L, N) -> (K, M, N), the products' sums over all steps, in at least float32."""
    directions, batch, length, _ = grad.shape
    parts = math.gcd(batch, 16)  # of the batch: a single product a direction would leave most of a GPU idle
    grad, inputs = (t.reshape(directions * parts, batch * length // parts, t.shape[-1]) for t in (grad, inputs))
    products = torch.bmm(grad.transpose(1, 2), inputs).unflatten(0, (directions, parts))
    return products.sum(1, dtype=state_dtype(products.dtype))


def _save_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.delta_softplus, order, ctx.mean, _, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, order, output[1])


def _scan_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, order, saved = ctx.saved_tensors
    grads = torch.ops.arm_zoo.selective_scan_backward(
        grad, *tensors, ctx.delta_softplus, order, ctx.mean, saved, ctx.backend
    )
    given = (grad if tensor is not None else None for grad, tensor in zip(grads, tensors, strict=True))
    return *given, *[None] * 6


def _scan_flops(u: list[int], delta: list[int], *shapes: Any, **_: Any) -> int:
    delta_weight = shapes[5]
    return 0 if delta_weight is None else 2 * math.prod(delta) * u[-1]


register(
    "selective_scan_backward",
    f"(Tensor grad, {_SCAN_INPUTS}, Tensor saved, str backend) -> {_EIGHT}",
    _by_backend(_scan_backward),
    fake=_scan_backward_fake,
)
register(
    "selective_scan",
    f"({_SCAN_INPUTS}, bool save_states, Tensor? gate, str backend) -> (Tensor, Tensor)",
    _by_backend(lambda module, *inputs: module.selective_scan(ScanInputs(*inputs[:-2]), *inputs[-2:])),
    fake=_scan_fake,
    save=_save_scan,
    gradient=_scan_gradient,
    flops=_scan_flops,
)


def _scan_norm(module: ModuleType, *args: Any) -> Tensor:
    *inputs, weight, bias, eps = args
    return module.selective_scan(ScanInputs(*inputs), False, None, norm=Norm(weight, bias, eps))[0]


register(
    "selective_scan_norm",
    f"({_SCAN_INPUTS}, Tensor weight, Tensor bias, float eps, str backend) -> Tensor",
    _by_backend(_scan_norm),
    fake=lambda u, *others: u.new_empty(u.shape[-3:]),
    flops=_scan_flops,
)


def _scan_log(module: ModuleType, *args: Any) -> Tensor:
    """The gated scan in inference, where A holds log(-A)."""
    *inputs, gate = args
    return module.selective_scan(ScanInputs(*inputs)._replace(log_rates=True), False, gate)[0]


register(
    "selective_scan_log",
    f"({_SCAN_INPUTS}, Tensor gate, str backend) -> Tensor",
    _by_backend(_scan_log),
    fake=lambda u, *others: u.new_empty(u.shape[-3:]),
    flops=_scan_flops,
)


def split(projected: Tensor, rank: int) -> Tensors:
    """Step sizes of low rank, B and C from the projection that makes all three side by side."""
    d_state = (projected.shape[-1] - rank) // 2
    return projected.split([rank, d_state, d_state], dim=-1)


def _inner(module: ModuleType, *args: Any) -> Tensors:
    """The gated mean of the scans, and for the backward pass the mean, x_proj's result and the saved states."""
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, order = args
    x, z = xz.chunk(2, dim=-1)
    u = module.causal_conv(x, conv_weight, conv_bias, order)
    projected = project(u, x_proj_weight)
    delta, B, C = split(projected, dt_proj_weight.shape[-1])
    scan = ScanInputs(u, delta, A, B, C, D, dt_proj_bias, dt_proj_weight, True, order, mean=True)
    y = x.new_empty(x.shape)
    gated, saved = module.selective_scan(scan, True, z, y)
    return gated, y, projected, saved


def _inner_backward(module: ModuleType, grad: Tensor, *args: Any) -> Tensors:
    """Gradients of xz, the weights, A and D; sequences are convolved anew, which is cheaper than keeping them."""
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, order, y, projected, saved = args
    (x, z), grad_xz, grad_y = xz.chunk(2, dim=-1), xz.new_empty(xz.shape), y.new_empty(y.shape)
    grad_x, grad_z = grad_xz.chunk(2, dim=-1)
    module.gate_backward(grad, z, y, grad_z, grad_y)
    u = module.causal_conv(x, conv_weight, conv_bias, order)
    delta, B, C = split(projected, dt_proj_weight.shape[-1])
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_dt = _scan_backward(
        module, grad_y, u, delta, A, B, C, D, dt_proj_bias, dt_proj_weight, True, order, True, saved
    )
    grad_projected = torch.cat([grad_delta, grad_B, grad_C], dim=-1)
    rows = grad_u.flatten(1, 2)
    rows.baddbmm_(grad_projected.flatten(1, 2), x_proj_weight.to(rows.dtype))
    grad_x_proj = _weight_gradient(grad_projected, u).to(x_proj_weight.dtype)
    _, *grad_conv = module.causal_conv_backward(rows.view_as(u), x, conv_weight, conv_bias, order, grad_x)
    return grad_xz, *grad_conv, grad_x_proj, grad_dt, grad_bias, grad_A, grad_D


def _inner_fake(xz: Tensor, conv_weight: Tensor, *args: Any) -> Tensors:
    _, x_proj_weight, _, _, A, _, _, backend = args
    (batch, length, _), (directions, channels, _) = xz.shape, conv_weight.shape
    projected = xz.new_empty(directions, batch, length, x_proj_weight.shape[1])
    gated, y = (xz.new_empty(batch, length, channels) for _ in range(2))
    return gated, y, projected, _states_fake(y, A, True, backend)


def _inner_flops(xz: list[int], *shapes: Any, **_: Any) -> int:
    x_proj_weight, dt_proj_weight = shapes[2:4]
    return 2 * math.prod(xz[:2]) * (math.prod(x_proj_weight) + math.prod(dt_proj_weight))


register(
    "mamba_inner_backward",
    f"(Tensor grad, {_INNER_INPUTS}, Tensor y, Tensor projected, Tensor saved, str backend) -> {_EIGHT}",
    _by_backend(_inner_backward),
    fake=lambda grad, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:8]),
    flops=lambda grad, *shapes, **_: 2 * _inner_flops(*shapes),  # what is computed anew does not count
)
register(
    "mamba_inner",
    f"({_INNER_INPUTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _by_backend(_inner),
    fake=_inner_fake,
    save=_save_inputs,
    gradient=_gradient_by("mamba_inner_backward"),
    flops=_inner_flops,
)
