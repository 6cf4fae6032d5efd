"""The public operations: they check their inputs, choose the backend, and call its operators."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.ops import operators, reference
from arm_zoo.ops.backends import BACKENDS, resolve_backend
from arm_zoo.ops.layout import Norm, ScanInputs, decay_rates, is_per_image, project

_SINGULAR = {"length": "step", "d_state": "state"}
_Shaped = Mapping[str, tuple[Tensor | None, tuple[int, ...]]]


def _check_axes(operation: str, name: str, tensor: Tensor, *axes: str) -> None:
    needed = next(axis for axis in axes if axis in _SINGULAR)
    if tensor.ndim != len(axes) or not tensor.is_floating_point() or tensor.shape[axes.index(needed)] == 0:
        raise ValueError(
            f"{operation}: {name} must hold floating-point numbers ({', '.join(axes)}) of at least one "
            f"{_SINGULAR[needed]}, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check(operation: str, name: str, first: Tensor, others: _Shaped) -> None:
    """Compiled kernels do not look: what is missing, or on another device, would be read from whatever lies there."""
    for other, (tensor, shape) in others.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{operation}: {other} is {(*tensor.shape,)}, {name} {(*first.shape,)} needs {shape}")
        if tensor is not None and tensor.device != first.device:
            filling = "load the weights, and fill tables by the model's init_non_persistent_buffers()"
            advice = filling if tensor.is_meta else "move one of them"
            raise ValueError(f"{operation}: {other} is on {tensor.device}, {name} on {first.device}; {advice}")


def _table(order: Tensor | None) -> Tensor | None:
    """Kernels read a table of orders as it lies in memory: direction by direction, in 64 bits."""
    return None if order is None else order.to(torch.int64).contiguous()


def _shape_of_table(order: Tensor | None, batch: int, directions: int, length: int) -> tuple[int, ...]:
    return (batch, directions, length) if is_per_image(order) else (directions, length)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these, or of a model that torch.jit.trace makes may."""
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return asked or torch.jit.is_tracing()


def _conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None, backend: str) -> Tensor:
    if backend == "reference":
        return reference.causal_conv(x, weight, bias, order)
    return torch.ops.arm_zoo.causal_conv(x, weight, bias, order, backend)


def _scan(scan: ScanInputs, z: Tensor | None, backend: str, norm: Norm | None = None) -> Tensor:
    if not BACKENDS[backend].token_order or is_per_image(scan.order):
        scan = scan.in_scan_order()
    *inputs, _ = scan  # by name or by unpacking: torch 2.8 compiles no slice of a named tuple
    if scan.log_rates:
        return torch.ops.arm_zoo.selective_scan_log(*inputs, z, backend)
    needed = needs_gradient(scan.u, scan.delta, scan.A, scan.B, scan.C, scan.D, scan.delta_bias, scan.delta_weight)
    if backend == "reference":
        y = reference.selective_scan(scan)
    elif norm is not None and BACKENDS[backend].own_kernels and not (needed or needs_gradient(norm.weight, norm.bias)):
        y, norm = torch.ops.arm_zoo.selective_scan_norm(*inputs, *norm, backend), None
    else:
        # training applies the gate outside, where autograd and the compiler see it
        fits = norm is None and z is not None and z.dtype == scan.u.dtype
        inside = fits and not (needed or needs_gradient(z))
        y = torch.ops.arm_zoo.selective_scan(*inputs, needed, z if inside else None, backend)[0]
        z = None if inside else z
    if norm is not None:
        y = F.layer_norm(y, norm.weight.shape, *norm).to(scan.u.dtype)
    return y if z is None else (y * F.silu(z)).to(scan.u.dtype)


@torch.jit.ignore
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution along every direction's order, then SiLU.

    Args:
        x: (batch, length, channels) tokens.
        weight: (directions, channels, taps); the last tap multiplies the current step.
        bias: (directions, channels).
        order: (directions, length) table of `arm_zoo.layers.order`, each token once a direction, which is not checked,
            or one for each image (batch, directions, length); None scans the tokens as they are stored.

    Returns:
        (directions, batch, length, channels) in scan order and the dtype of x, computed in at least float32.

    Raises:
        ValueError: for tensors whose shapes do not fit each other, or on several devices; as for all operations here.
    """
    _check_axes("causal_conv", "x", x, "batch", "length", "channels")
    (batch, length, channels), directions = x.shape, len(weight)
    kernel, steps = (directions, channels, weight.shape[-1]), _shape_of_table(order, batch, directions, length)
    _check("causal_conv", "x", x, {"weight": (weight, kernel), "bias": (bias, kernel[:2]), "order": (order, steps)})
    return _conv(x, weight, bias, _table(order), resolve_backend(x))


@torch.jit.ignore
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = True, order: Tensor | None = None,
    delta_weight: Tensor | None = None, mean: bool = True, norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Selective scan of K directions at once, their mean in token order, gated by SiLU(z) (paper, section 3.1).

    Per direction and channel, from h = 0 and with d = softplus(delta + delta_bias):
    h_t = exp(d_t A) h_{t-1} + d_t u_t B_t and y_t = C_t . h_t + D u_t. The gate is a factor per token, so gating the
    mean equals the mean of gated directions. FLOP counters count the matrix products around the recurrence, not the
    recurrence itself, which takes about 6 operations per direction, step, channel and state.

    Args:
        u: (directions, batch, length, channels) inputs in scan order; or (batch, length, channels), the same for all
            directions, in token order, and so are then delta, B and C, of which kernels take the rows by `order`; a
            table for each image copies them.
        delta: (directions, batch, length, channels), the step size before its bias and softplus; with `delta_weight`,
            its last size is the rank.
        A: (directions, channels, d_state), negative.
        B, C: (directions, batch, length, d_state), shared by all channels.
        D, delta_bias: (directions, channels).
        z: (batch, length, channels) gate in token order; None leaves the output ungated.
        delta_softplus: apply softplus to the step size.
        order: as in `causal_conv`.
        delta_weight: (directions, channels, rank); step sizes are delta times its transpose, not kept for backward.
        mean: the mean of the directions, as in ARM and Vim; False for their sum, as in VMamba.
        norm: weight and bias (channels) and eps of a layer norm of that, before the gate; None for none.

    Returns:
        (batch, length, channels) in token order and the dtype of u. State and sums are float32 (float64 for float64).
    """
    shared = u.ndim == 3
    _check_axes("selective_scan", "u", u, *(() if shared else ("directions",)), "batch", "length", "channels")
    _check_axes("selective_scan", "A", A, "directions", "channels", "d_state")
    directions, batch, length, channels = (len(A), *u.shape) if shared else u.shape
    d_state = A.shape[-1]
    rank = channels if delta_weight is None else delta_weight.shape[-1]
    rows, states, channel = (directions, batch, length), (directions, batch, length, d_state), (directions, channels)
    others = {
        "delta": (delta, (*rows, rank)), "A": (A, (*channel, d_state)), "B": (B, states), "C": (C, states),
        "D": (D, channel), "z": (z, (batch, length, channels)), "delta_bias": (delta_bias, channel),
        "order": (order, _shape_of_table(order, batch, directions, length)),
        "delta_weight": (delta_weight, (*channel, rank)),
    }  # fmt: skip
    if norm is not None:
        others |= {"the norm's weight": (norm[0], (channels,)), "the norm's bias": (norm[1], (channels,))}
    _check("selective_scan", "u", u, others)
    scan = ScanInputs(u, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, _table(order), mean)
    return _scan(scan, z, resolve_backend(u), None if norm is None else Norm(*norm))


@torch.jit.ignore
def mamba_inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj_weight: Tensor, dt_proj_weight: Tensor,
    dt_proj_bias: Tensor, A: Tensor, D: Tensor, order: Tensor | None = None, log_rates: bool = False,
) -> Tensor:  # fmt: skip
    """Everything between a Mamba mixer's projections in and out: convolution, x_proj, `selective_scan` and gate.

    In training our kernels do it as one operator, which recomputes convolved sequences and whole step sizes.

    Args:
        xz: (batch, length, 2 * channels) tokens, then their gates, as the projection in makes them.
        conv_weight: (directions, channels, taps).
        conv_bias, dt_proj_bias, D: (directions, channels).
        x_proj_weight: (directions, rank + 2 * d_state, channels): step sizes of low rank, B and C, in this order.
        dt_proj_weight: (directions, channels, rank).
        A: (directions, channels, d_state), negative.
        order: as in `causal_conv`.
        log_rates: A holds log(-A) instead, as models train it; in inference our kernels make rates of it themselves.

    Returns:
        (batch, length, channels) in token order and the dtype of xz.
    """
    _check_axes("mamba_inner", "xz", xz, "batch", "length", "2 * channels")
    (batch, length, both), directions = xz.shape, len(conv_weight)
    if both % 2:
        raise ValueError(f"mamba_inner: xz has as many gates as tokens' channels, side by side, got {both} in all")
    _check_axes("mamba_inner", "A", A, "directions", "channels", "d_state")
    channels, rank, d_state = both // 2, dt_proj_weight.shape[-1], A.shape[-1]
    channel = (directions, channels)
    others = {
        "conv_weight": (conv_weight, (*channel, conv_weight.shape[-1])), "conv_bias": (conv_bias, channel),
        "x_proj_weight": (x_proj_weight, (directions, rank + 2 * d_state, channels)),
        "dt_proj_weight": (dt_proj_weight, (*channel, rank)), "dt_proj_bias": (dt_proj_bias, channel),
        "A": (A, (*channel, d_state)), "D": (D, channel),
        "order": (order, _shape_of_table(order, batch, directions, length)),
    }  # fmt: skip
    _check("mamba_inner", "xz", xz, others)
    backend, order = resolve_backend(xz), _table(order)
    weights = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias)
    own_kernels, trains = BACKENDS[backend].own_kernels, needs_gradient(xz, *weights, A, D)
    if log_rates and (trains or not own_kernels):
        A, log_rates = decay_rates(A), False
    if own_kernels and trains:
        return torch.ops.arm_zoo.mamba_inner(xz, *weights, A, D, order, backend)[0]
    x, z = xz.chunk(2, dim=-1)
    u = _conv(x, conv_weight, conv_bias, order, backend)  # (B, L, D) -> (K, B, L, D)
    delta, B, C = operators.split(project(u, x_proj_weight), rank)
    scan = ScanInputs(u, delta, A, B, C, D, dt_proj_bias, dt_proj_weight, True, order, mean=True, log_rates=log_rates)
    return _scan(scan, z, backend)
