"""The public operations, as PyTorch custom operators with fake and autograd kernels."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from arm_zoo.scan.backends import implementation, resolve_backend
from arm_zoo.scan.reference import causal_conv_reference, project, selective_scan_reference

__all__ = ["causal_conv", "mamba_inner", "needs_gradient", "refuse_second_derivatives", "selective_scan"]

# Custom operators are opaque to torch.compile and torch.export (no graph breaks); their schemas, fake kernels and
# gradients are what those need to know. The last argument names the backend that computes them.
_CONV_INPUTS = "Tensor x, Tensor weight, Tensor bias, Tensor? order"
_SCAN_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? delta_bias, Tensor? delta_weight, "
    "bool delta_softplus, Tensor? order"
)
_INNER_INPUTS = (
    "Tensor xz, Tensor conv_weight, Tensor conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, "
    "Tensor dt_proj_bias, Tensor A, Tensor D, Tensor? order"
)
# Backends that train through one operator for everything between the mixer's projections.
_WHOLE = ("triton", "cuda")


def _operator(name: str, inputs: str, outputs: str, compute: Callable[..., Any] | None = None) -> Any:
    """Register `compute(module, *inputs)`, or the function of the backend's module that has the operator's name."""

    def run(*args: Any) -> Any:
        *inputs, backend = args
        module = implementation(backend)
        # matrix products keep float32 sums; kernels start on the tensors' GPU, whichever is the current one
        with torch.autocast(inputs[0].device.type, enabled=False), torch.cuda.device_of(inputs[0]):
            return getattr(module, name)(*inputs) if compute is None else compute(module, *inputs)

    schema = f"({inputs}, str backend) -> {outputs}"
    return torch.library.custom_op(f"arm_zoo::{name}", run, mutates_args=(), schema=schema)


def _backward_of_scan(
    module: ModuleType, grad: torch.Tensor, u: torch.Tensor, delta: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...]:
    """The backend's gradients of u, delta, A, B, C, D and delta_bias, and that of delta_weight (empty without one).

    Step sizes of low rank are made whole anew, which takes less time than their memory is worth.
    """
    *rates, delta_weight, delta_softplus, order, saved = others
    whole = project(delta, delta_weight)
    grads = module.selective_scan_backward(grad, u, whole, *rates, delta_softplus, order, saved)
    grads = tuple(t.to(like.dtype) for t, like in zip(grads, _scan_likes(u, whole, *rates), strict=True))
    if delta_weight is None:
        return *grads, u.new_empty(0)
    grad_u, grad_whole, *grad_rates = grads
    grad_delta = torch.bmm(grad_whole.flatten(1, 2), delta_weight.to(grad_whole.dtype)).view_as(delta)
    return grad_u, grad_delta, *grad_rates, _weight_gradient(grad_whole, delta).to(delta_weight.dtype)


def _scan_likes(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """What the gradients of u, delta, A, B, C, D and delta_bias are like.

    Where there is no bias, its own, which nobody asks for, is like D's.
    """
    *others, D, delta_bias = inputs
    return *others, D, D if delta_bias is None else delta_bias


def _weight_gradient(grad: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """(K, B, L, M) and (K, B, L, N) -> (K, M, N), the products' sums over all steps.

    Parts of the batch make a product each, as one a direction would leave most of a GPU idle; these, which have the
    type of the inputs, are added in at least float32.
    """
    directions, batch, length, _ = grad.shape
    parts = math.gcd(batch, 16)
    grad, inputs = (t.reshape(directions * parts, batch * length // parts, t.shape[-1]) for t in (grad, inputs))
    products = torch.bmm(grad.transpose(1, 2), inputs).unflatten(0, (directions, parts))
    return products.sum(1, dtype=torch.promote_types(products.dtype, torch.float32))


def _split(projected: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
    """Step sizes of low rank, B and C, which the mixer projects side by side."""
    d_state = (projected.shape[-1] - rank) // 2
    return projected.split([rank, d_state, d_state], dim=-1)


def _inner_forward(
    module: ModuleType,
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    order: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gated mean of the scans, and what the backward pass needs: the mean, the projected inputs, saved states."""
    x, z = xz.chunk(2, dim=-1)
    u = module.causal_conv(x, conv_weight, conv_bias, order)
    projected = project(u, x_proj_weight)
    delta, B, C = _split(projected, dt_proj_weight.shape[-1])
    inputs, y = (u, delta, A, B, C, D, dt_proj_bias, dt_proj_weight), x.new_empty(x.shape)
    gated, saved = module.selective_scan(*inputs, True, order, True, z, y)
    return gated, y, projected, saved


def _inner_backward(module: ModuleType, grad: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of xz, the weights, A and D; the scans' inputs are convolved anew, as their memory is worth more."""
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D, order, y, projected, saved = args
    (x, z), grad_xz, grad_y = xz.chunk(2, dim=-1), xz.new_empty(xz.shape), y.new_empty(y.shape)
    grad_x, grad_z = grad_xz.chunk(2, dim=-1)
    module.gate_backward(grad, z, y, grad_z, grad_y)
    u = module.causal_conv(x, conv_weight, conv_bias, order)
    delta, B, C = _split(projected, dt_proj_weight.shape[-1])
    inputs = (u, delta, A, B, C, D, dt_proj_bias, dt_proj_weight)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_dt = _backward_of_scan(
        module, grad_y, *inputs, True, order, saved
    )
    grad_projected = torch.cat([grad_delta, grad_B, grad_C], dim=-1)
    rows = grad_u.flatten(1, 2)
    rows.baddbmm_(grad_projected.flatten(1, 2), x_proj_weight.to(rows.dtype))
    grad_x_proj = _weight_gradient(grad_projected, u).to(x_proj_weight.dtype)
    _, *grad_conv = module.causal_conv_backward(rows.view_as(u), x, conv_weight, conv_bias, order, grad_x)
    return grad_xz, *grad_conv, grad_x_proj, grad_dt, grad_bias, grad_A, grad_D


_conv = _operator("causal_conv", _CONV_INPUTS, "Tensor")
_conv_backward = _operator("causal_conv_backward", f"Tensor grad, {_CONV_INPUTS}", "(Tensor, Tensor, Tensor)")
_scan = _operator("selective_scan", f"{_SCAN_INPUTS}, bool save_states, Tensor? gate", "(Tensor, Tensor)")
_scan_backward = _operator(
    "selective_scan_backward",
    f"Tensor grad, {_SCAN_INPUTS}, Tensor saved",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_of_scan,
)
_inner = _operator("mamba_inner", _INNER_INPUTS, "(Tensor, Tensor, Tensor, Tensor)", _inner_forward)
_inner_grads = _operator(
    "mamba_inner_backward",
    f"Tensor grad, {_INNER_INPUTS}, Tensor y, Tensor projected, Tensor saved",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _inner_backward,
)


@_conv.register_fake
def _conv_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, order: torch.Tensor | None, backend: str
) -> torch.Tensor:
    (batch, length, _), (directions, channels, _) = x.shape, weight.shape
    if backend in ("torch", "numba"):  # directions side by side in memory, as its convolution makes them
        return x.new_empty(batch, length, directions, channels).permute(2, 0, 1, 3)
    return x.new_empty(directions, batch, length, channels)


@_conv_backward.register_fake
def _conv_backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@_scan.register_fake
def _scan_fake(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, save_states, _gate, backend = args
    return u.new_empty(u.shape[1:]), _empty_states(u, u.shape, A, save_states, backend)


def _empty_states(
    like: torch.Tensor, shape: torch.Size, A: torch.Tensor, save_states: bool, backend: str
) -> torch.Tensor:
    directions, batch, length, channels = shape
    module = implementation(backend)
    chunk = module.CHUNK if save_states else None
    chunks = 0 if chunk is None else -(-length // chunk)
    return like.new_empty(directions, batch, chunks, A.shape[-1], channels, dtype=module.state_dtype(like.dtype))


@register_flop_formula(torch.ops.arm_zoo.selective_scan)
def _scan_flops(u: list[int], *shapes: Any, **_: Any) -> int:
    """The matrix product that makes step sizes of low rank whole; the recurrence is none."""
    delta_weight = shapes[6]
    return 0 if delta_weight is None else 2 * math.prod(u) * delta_weight[-1]


@_scan_backward.register_fake
def _scan_backward_fake(
    grad: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    delta_bias: torch.Tensor | None,
    delta_weight: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    grad_weight = u.new_empty(0) if delta_weight is None else delta_weight.new_empty(delta_weight.shape)
    return *(t.new_empty(t.shape) for t in _scan_likes(u, delta, A, B, C, D, delta_bias)), grad_weight


@_inner.register_fake
def _inner_fake(xz: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    conv_weight, _, x_proj_weight, _, _, A, _, _, backend = args
    (batch, length, _), (directions, channels, _) = xz.shape, conv_weight.shape
    projected = xz.new_empty(directions, batch, length, x_proj_weight.shape[1])
    states = _empty_states(xz, torch.Size((directions, batch, length, channels)), A, True, backend)
    return *(xz.new_empty(batch, length, channels) for _ in range(2)), projected, states


@register_flop_formula(torch.ops.arm_zoo.mamba_inner)
def _inner_flops(xz: list[int], *shapes: Any, **_: Any) -> int:
    """The two matrix products that make the scans' step sizes, B and C."""
    x_proj_weight, dt_proj_weight = shapes[2:4]
    return 2 * math.prod(xz[:2]) * (math.prod(x_proj_weight) + math.prod(dt_proj_weight))


@register_flop_formula(torch.ops.arm_zoo.mamba_inner_backward)
def _inner_backward_flops(grad: list[int], xz: list[int], *shapes: Any, **_: Any) -> int:
    """Two products for each of the forward pass; what is made anew does not count."""
    return 2 * _inner_flops(xz, *shapes)


@_inner_grads.register_fake
def _inner_grads_fake(grad: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in args[:8])


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _conv_grad(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *torch.ops.arm_zoo.causal_conv_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)  # of what only the backward pass uses there are none
    *tensors, ctx.delta_softplus, order, _save_states, _gate, ctx.backend = inputs
    ctx.save_for_backward(*tensors, order, output[1])


def _scan_grad(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *tensors, order, saved = ctx.saved_tensors
    if grad is None:
        return (None,) * (len(tensors) + 5)
    grads = torch.ops.arm_zoo.selective_scan_backward(grad, *tensors, ctx.delta_softplus, order, saved, ctx.backend)
    given = (grad if tensor is not None else None for grad, tensor in zip(grads, tensors, strict=True))
    return *given, *[None] * 5


def _inner_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _inner_grad(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    return *torch.ops.arm_zoo.mamba_inner_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


_conv.register_autograd(_conv_grad, setup_context=_conv_setup)
_scan.register_autograd(_scan_grad, setup_context=_scan_setup)
_inner.register_autograd(_inner_grad, setup_context=_inner_setup)


def refuse_second_derivatives(*_: Any) -> None:
    """The gradient of an operator that computes gradients.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "arm_zoo's operators have no second derivatives; compute them `with arm_zoo.scan_backend('reference')`"
    )


_conv_backward.register_autograd(refuse_second_derivatives)
_scan_backward.register_autograd(refuse_second_derivatives)
_inner_grads.register_autograd(refuse_second_derivatives)


@torch.jit.ignore
def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Depthwise causal convolution along every direction's order, then SiLU.

    Args:
        x: (batch, length, channels) tokens.
        weight: (directions, channels, taps); the last tap multiplies the current step.
        bias: (directions, channels).
        order: (directions, length) table of `arm_zoo.order`, every token once in each direction, which is not checked;
            None scans the tokens as they are stored.

    Returns:
        (directions, batch, length, channels) in scan order and the dtype of x, computed in at least float32.

    Raises:
        ValueError: for tensors whose shapes do not fit each other, or on several devices.
    """
    _check_axes("causal_conv", "x", x, "batch", "length", "channels")
    _check("causal_conv", "x", x, _conv_shapes(x, weight), (weight, bias, order))
    backend = resolve_backend(x)
    if backend == "reference":
        return causal_conv_reference(x, weight, bias, order)
    return torch.ops.arm_zoo.causal_conv(x, weight, bias, _table(order), backend)


def _table(order: torch.Tensor | None) -> torch.Tensor | None:
    """Kernels read a table of orders as it lies in memory: direction by direction, in 64 bits."""
    return None if order is None else order.to(torch.int64).contiguous()


_SINGULAR = {"length": "step", "d_state": "state"}


def _check_axes(operation: str, name: str, tensor: torch.Tensor, *axes: str) -> None:
    needed = next(axis for axis in axes if axis in _SINGULAR)
    if tensor.ndim != len(axes) or not tensor.is_floating_point() or tensor.shape[axes.index(needed)] == 0:
        raise ValueError(
            f"{operation}: {name} must hold floating-point numbers ({', '.join(axes)}) of at least one "
            f"{_SINGULAR[needed]}, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check(
    operation: str,
    name: str,
    first: torch.Tensor,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Sequence[torch.Tensor | None],
) -> None:
    """Compiled kernels do not look: what is missing, or on another device, would be read from whatever lies there."""
    for (other, shape), tensor in zip(expected.items(), tensors, strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{operation}: {other} is {tuple(tensor.shape)}, {name} {tuple(first.shape)} needs {shape}"
            )
        if tensor is not None and tensor.device != first.device:
            advice = "move one of them"
            if tensor.is_meta:
                advice = "load the weights, and fill tables by the model's init_non_persistent_buffers()"
            raise ValueError(f"{operation}: {other} is on {tensor.device}, {name} on {first.device}; {advice}")


def _conv_shapes(x: torch.Tensor, weight: torch.Tensor) -> dict[str, tuple[int, ...]]:
    (_, length, channels), directions = x.shape, len(weight)
    return {
        "weight": (directions, channels, weight.shape[-1]),
        "bias": (directions, channels),
        "order": (directions, length),
    }


def _scan_shapes(u: torch.Tensor, A: torch.Tensor, delta_weight: torch.Tensor | None) -> dict[str, tuple[int, ...]]:
    directions, batch, length, channels = u.shape
    d_state, rank = A.shape[-1], channels if delta_weight is None else delta_weight.shape[-1]
    return {
        "delta": (directions, batch, length, rank),
        "A": (directions, channels, d_state),
        "B": (directions, batch, length, d_state),
        "C": (directions, batch, length, d_state),
        "D": (directions, channels),
        "z": (batch, length, channels),
        "delta_bias": (directions, channels),
        "order": (directions, length),
        "delta_weight": (directions, channels, rank),
    }


def _inner_shapes(
    xz: torch.Tensor, conv_weight: torch.Tensor, dt_proj_weight: torch.Tensor, A: torch.Tensor
) -> dict[str, tuple[int, ...]]:
    (_, length, both), directions = xz.shape, len(conv_weight)
    channels, rank, d_state = both // 2, dt_proj_weight.shape[-1], A.shape[-1]
    return {
        "conv_weight": (directions, channels, conv_weight.shape[-1]),
        "conv_bias": (directions, channels),
        "x_proj_weight": (directions, rank + 2 * d_state, channels),
        "dt_proj_weight": (directions, channels, rank),
        "dt_proj_bias": (directions, channels),
        "A": (directions, channels, d_state),
        "D": (directions, channels),
        "order": (directions, length),
    }


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these; None stands for an argument that is not there.

    It may, of a model that torch.jit.trace makes, whichever way gradients are switched while it does.
    """
    if torch.jit.is_tracing():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.jit.ignore
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    order: torch.Tensor | None = None,
    delta_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Selective scan of K directions at once, their mean in token order, gated by SiLU(z) (paper, section 3.1).

    Per direction and channel, from h = 0 and with d = softplus(delta + delta_bias):
    h_t = exp(d_t A) h_{t-1} + d_t u_t B_t and y_t = C_t . h_t + D u_t. The gate is a factor per token, so gating the
    mean equals the mean of gated directions. FLOP counters count the matrix products around the recurrence, not the
    recurrence itself, which takes about 6 operations per direction, step, channel and state.

    Args:
        u: (directions, batch, length, channels) inputs in scan order.
        delta: like u, the step size before its bias and softplus; with `delta_weight`, its last size is the rank.
        A: (directions, channels, d_state), negative.
        B: (directions, batch, length, d_state), shared by all channels.
        C: like B.
        D: (directions, channels).
        z: (batch, length, channels) gate in token order; None leaves the output ungated.
        delta_bias: (directions, channels).
        delta_softplus: apply softplus to the step size.
        order: (directions, length) table of `arm_zoo.order`, every token once in each direction, which is not checked;
            None when the scan order is the token order.
        delta_weight: (directions, channels, rank); the step sizes are delta times its transpose, and not kept for the
            backward pass.

    Returns:
        (batch, length, channels) in token order and the dtype of u. State and sums are float32 (float64 for float64).

    Raises:
        ValueError: for tensors whose shapes do not fit each other, or on several devices.
    """
    _check_axes("selective_scan", "u", u, "directions", "batch", "length", "channels")
    _check_axes("selective_scan", "A", A, "directions", "channels", "d_state")
    others = (delta, A, B, C, D, z, delta_bias, order, delta_weight)
    _check("selective_scan", "u", u, _scan_shapes(u, A, delta_weight), others)
    backend = resolve_backend(u)
    if backend == "reference":
        y = selective_scan_reference(u, project(delta, delta_weight), A, B, C, D, delta_bias, delta_softplus, order)
    else:
        inputs = (u, delta, A, B, C, D, delta_bias, delta_weight)
        order = _table(order)
        save_states = needs_gradient(*inputs)
        # training applies the gate outside, where autograd and the compiler see it
        inside = z is not None and z.dtype == u.dtype and not (save_states or needs_gradient(z))
        gate = z if inside else None
        y = torch.ops.arm_zoo.selective_scan(*inputs, delta_softplus, order, save_states, gate, backend)[0]
        z = None if inside else z
    return y if z is None else (y * F.silu(z)).to(u.dtype)


@torch.jit.ignore
def mamba_inner(
    xz: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_proj_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Everything between a Mamba mixer's projections in and out: convolution, x_proj, `selective_scan` and gate.

    In training the GPU kernels do it as one operator, which keeps neither the convolved sequences nor whole step sizes
    for the backward pass, adds up the two gradients of the scans' inputs inside a matrix product, and writes those of
    tokens and gate side by side.

    Args:
        xz: (batch, length, 2 * channels) tokens, then their gates, as the projection in makes them.
        conv_weight: (directions, channels, taps).
        conv_bias: (directions, channels).
        x_proj_weight: (directions, rank + 2 * d_state, channels): step sizes of low rank, B and C, in this order.
        dt_proj_weight: (directions, channels, rank).
        dt_proj_bias: (directions, channels).
        A: (directions, channels, d_state), negative.
        D: (directions, channels).
        order: (directions, length) table of `arm_zoo.order`, every token once in each direction, which is not checked;
            None scans the tokens as they are stored.

    Returns:
        (batch, length, channels) in token order and the dtype of xz.

    Raises:
        ValueError: for tensors whose shapes do not fit each other, or on several devices.
    """
    _check_axes("mamba_inner", "xz", xz, "batch", "length", "2 * channels")
    if xz.shape[2] % 2:
        raise ValueError(
            f"mamba_inner: xz has as many gates as tokens' channels, side by side, got {xz.shape[2]} in all"
        )
    _check_axes("mamba_inner", "A", A, "directions", "channels", "d_state")
    inputs = (xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D)
    shapes = _inner_shapes(xz, conv_weight, dt_proj_weight, A)
    _check("mamba_inner", "xz", xz, shapes, (*inputs[1:], order))
    backend = resolve_backend(xz)
    if backend in _WHOLE and needs_gradient(*inputs):
        return torch.ops.arm_zoo.mamba_inner(*inputs, _table(order), backend)[0]
    x, z = xz.chunk(2, dim=-1)
    u = causal_conv(x, conv_weight, conv_bias, order)  # (B, L, D) -> (K, B, L, D)
    delta, B, C = _split(project(u, x_proj_weight), dt_proj_weight.shape[-1])
    return selective_scan(u, delta, A, B, C, D, z, dt_proj_bias, True, order, dt_proj_weight)
