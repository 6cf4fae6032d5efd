"""Custom operators for fused kernels (gates, SwiGLU, residual sum with norm, convolution with SiLU), and their use."""

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from arm_zoo.ops.backends import BACKENDS, get_scan_backend, is_transformed, resolve_backend, why_not
from arm_zoo.ops.functional import needs_gradient
from arm_zoo.ops.layout import Tensors
from arm_zoo.ops.operators import register

_logger = logging.getLogger("arm_zoo.ops")

Layer = TypeVar("Layer", bound=nn.Module)

_MANY_ROWS = 4096  # from this number of tokens on the kernels are faster than PyTorch
_ROWS_FOR_QUACK = 16_384  # the same of quack-kernels, each of whose calls keeps the host busy for some 100 us
_HALVES = (torch.bfloat16, torch.float16)
_ONEDNN = torch.backends.mkldnn.is_available()


def is_bare(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the layer runs its class's `forward` and no more: no subclass, patch, hook or compilation."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    changed = "forward" in layer.__dict__ or layer._compiled_call_impl is not None
    return type(layer) is kind and not changed and not any(hooks) and not _has_any_global_hook()


def is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether this is an ordinary dense tensor: not quantised, sharded, sparse, or a symbol of torch.fx."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.layout == torch.strided


def is_plain_layer(layer: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether other code may compute the layer's result from its weight and bias instead of calling it."""
    return is_bare(layer, kind) and all(t is None or is_plain(t) for t in (layer.weight, getattr(layer, "bias", None)))


def layer_norm_of(layer: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and eps of a layer norm that may be computed by the operation before it; else None."""
    if not is_plain_layer(layer, nn.LayerNorm) or layer.weight is None or layer.bias is None:
        return None
    return layer.weight, layer.bias, layer.eps


def run_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; in float32 on the CPU as a 1x1 convolution, by oneDNN: 1.5 to 2 times as fast as MKL on a Zen 5.

    With one thread PyTorch takes MKL for convolutions too, and then copies the bias.
    """
    if not _runs_in_onednn(layer, x):
        return layer(x)
    rows = _convolve_rows(x.reshape(-1, layer.in_features), layer.weight, layer.bias)
    return rows.reshape(*x.shape[:-1], layer.out_features)


def _runs_in_onednn(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    eager = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or torch.get_num_threads() == 1)
    if not (_ONEDNN and eager and is_plain(x) and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel()):
        return False
    return is_plain_layer(layer, nn.Linear)


def _convolve_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer (L, M) of rows (L, N) with a weight (M, N)."""
    pixels = rows[None, :, None].permute(0, 3, 1, 2)  # channels innermost in memory
    return F.conv2d(pixels, weight[:, :, None, None], bias)[0, :, :, 0].t()


def gates_transposed(layer: nn.Module, x: Tensor) -> bool:
    """Whether `gated_transposed` can compute this layer for these tokens, and is faster, also with what follows.

    That holds for few tokens in inference. Not with AVX-512: a Zen 5 would lose by the next layer, which MKL computes.
    """
    if not _runs_in_onednn(layer, x) or layer.bias is None or layer.bias.dtype != x.dtype:
        return False
    if 4 * x.numel() > layer.weight.numel():
        return False
    measured = torch.backends.cpu.get_cpu_capability() == "AVX2" and resolve_backend(x) == "numba"
    return measured and not needs_gradient(x, layer.weight, layer.bias)


def gated_transposed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(gate) * value (N, L) of (gate, value), the halves of the linear layer of tokens (..., M), L in all.

    In every product oneDNN brings the numbers of one factor into another order first, which takes longer for a weight
    (2 * N, M) than for few tokens.
    """
    return torch.ops.arm_zoo.gate_transposed(_convolve_rows(weight, x.reshape(-1, x.shape[-1])), bias)


@torch.fx.wrap  # the type is not known while a model is traced
def in_type_of(weight: Tensor, x: Tensor) -> Tensor:
    """Float32 tokens in the type of the weights that are applied to them; tokens of other types unchanged."""
    return x.to(weight.dtype) if x.dtype == torch.float32 else x


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def run_norm(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`; for a residual kept in float32, the result has the type of the norm's weight, or autocast's.

    PyTorch's own RMSNorm computes in the type of x, other norms in that of their weight.
    """
    if (weight := getattr(layer, "weight", None)) is None:
        return layer(x)
    if not (isinstance(layer, nn.RMSNorm) and is_plain(x)):
        return layer(in_type_of(weight, x))
    plain = is_plain_layer(layer, nn.RMSNorm)  # one type throughout, or PyTorch warns and does not take its kernel
    y = F.rms_norm(x, layer.normalized_shape, weight.to(x.dtype), layer.eps) if plain else layer(x)
    return y.to(_dtype_of_products(weight))


def _dtype_of_products(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def gate_halves(halves: Tensor) -> Tensor:
    """SiLU(gate) * value of (gate, value), the halves of the last axis; in eager inference on the CPU in one loop."""
    fits = is_plain(halves) and halves.device.type == "cpu" and halves.dtype == torch.float32
    if fits and not (torch.compiler.is_compiling() or needs_gradient(halves)) and resolve_backend(halves) == "numba":
        return torch.ops.arm_zoo.gate_halves(halves)
    gate, value = halves.chunk(2, dim=-1)
    return F.silu(gate) * value


def _kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of `arm_zoo.ops.triton`, imported when it is called, as not every build of torch has Triton."""
    return lambda *inputs: getattr(importlib.import_module(f"arm_zoo.ops.triton.{module}"), name)(*inputs)


def _add_norm_backward_fake(grad_total: Tensor, grad_normed: Tensor, total: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, _, weight, _, dtype = args
    return *(total.new_empty(total.shape, dtype=t) for t in (total.dtype, dtype)), weight.new_empty(2, *weight.shape)


def _conv2d_flops(x: list[int]) -> int:
    """Of the depth-wise 3x3 convolution of a map of this shape, as PyTorch counts its own."""
    return 2 * 9 * math.prod(x)


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    (_, branch, scale, weight, bias, *_), (total, _, moments) = inputs, output
    ctx.dtype = branch.dtype
    ctx.save_for_backward(total, moments, scale, weight, bias)


def _add_norm_gradient(ctx: Any, grad_total: Tensor, grad_normed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    *grads, of_norm = torch.ops.arm_zoo.add_norm_backward(grad_total, grad_normed, *saved, ctx.dtype)
    return *grads, None, of_norm[0], None if saved[-1] is None else of_norm[1], None, None


@functools.cache
def _quack() -> ModuleType | None:
    """The module that calls the package quack-kernels; None without it, with a warning if it cannot be imported."""
    try:
        return importlib.import_module("arm_zoo.ops.quack")
    except (ImportError, OSError, RuntimeError) as error:
        if importlib.util.find_spec("quack") is not None:
            install = "pip install --upgrade 'arm-zoo[quack]'"
            _logger.warning("quack-kernels cannot be imported, so Triton's kernel runs: %s; %s", error, install)
        return None


def _gated_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of many tokens by quack-kernels where that is installed, as it is faster, or else by Triton."""
    quack = _quack() if _are_many(x, _ROWS_FOR_QUACK) else None
    product: Tensor = (quack or importlib.import_module("arm_zoo.ops.triton.gates")).gated_product(x, weight, bias)
    return product


register(
    "gated_product",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    _gated_product,
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight) // 2),
    flops=lambda x, weight, *_, **__: 2 * math.prod(x[:-1]) * math.prod(weight),
)
register(
    "gate_backward",
    "(Tensor grad, Tensor halves, Tensor bias) -> (Tensor, Tensor)",
    _kernel("gates", "halves_backward"),
    fake=lambda grad, halves, bias: (halves.new_empty(halves.shape), bias.new_empty(bias.shape)),
)
register(
    "gate",
    "(Tensor halves, Tensor bias) -> Tensor",
    _kernel("gates", "halves"),
    fake=lambda halves, bias: halves.new_empty(*halves.shape[:-1], halves.shape[-1] // 2),
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    gradient=lambda ctx, grad: torch.ops.arm_zoo.gate_backward(grad, *ctx.saved_tensors),
)
register(
    "gate_halves",
    "(Tensor halves) -> Tensor",
    lambda halves: importlib.import_module(BACKENDS["numba"].module).gate(halves),
    fake=lambda halves: halves.new_empty(*halves.shape[:-1], halves.shape[-1] // 2),
)
register(
    "gate_transposed",
    "(Tensor halves, Tensor bias) -> Tensor",
    lambda *inputs: importlib.import_module(BACKENDS["numba"].module).gate_transposed(*inputs),
    fake=lambda halves, bias: halves.new_empty(len(halves) // 2, halves.shape[1]),
)
register(
    "add_norm_backward",
    "(Tensor grad_total, Tensor grad_normed, Tensor total, Tensor moments, Tensor? scale, Tensor weight, "
    "Tensor? bias, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _kernel("norms", "add_norm_backward"),
    fake=_add_norm_backward_fake,
)
register(
    "add_norm",
    "(Tensor x, Tensor branch, Tensor? scale, Tensor weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _kernel("norms", "add_norm"),
    fake=lambda x, *others: (
        *(x.new_empty(x.shape, dtype=dtype) for dtype in (x.dtype, others[-1])),
        x.new_empty(*x.shape[:-1], 2, dtype=torch.float32),
    ),
    save=_save_add_norm,
    gradient=_add_norm_gradient,
)
register(
    "conv2d_silu_backward",
    "(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _kernel("conv2d", "conv2d_silu_backward"),
    fake=lambda grad, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    flops=lambda grad, x, *_, **__: 2 * _conv2d_flops(x),  # what is computed anew does not count
)
register(
    "conv2d_silu",
    "(Tensor x, Tensor weight) -> Tensor",
    _kernel("conv2d", "conv2d_silu"),
    fake=lambda x, weight: x.new_empty(x.shape),
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    gradient=lambda ctx, grad: torch.ops.arm_zoo.conv2d_silu_backward(grad, *ctx.saved_tensors),
    flops=lambda x, *_, **__: _conv2d_flops(x),
)


def _has_kernel(device: int, *, hopper: bool) -> bool:
    """Whether this GPU can run Triton's kernels (`hopper`: that for Hopper GPUs), and nothing speaks against it."""
    plain = (name := get_scan_backend()) in BACKENDS and BACKENDS[name].plain
    return not (plain or is_transformed()) and _runs_kernels(device, hopper)


# Runs as plain Python while a model is traced: within a trace, some versions of torch take all compilation for export.
@torch.compiler.assume_constant_result
def _runs_kernels(device: int, hopper: bool) -> bool:
    if torch.compiler.is_exporting() or why_not("triton") is not None:
        return False
    return not hopper or (torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0))


def _fit(*tensors: Tensor) -> bool:
    """Whether the kernels take these types: no float64, and all the same unless autocast converts them."""
    autocast = torch.is_autocast_enabled("cuda")
    return all(t.dtype != torch.float64 and (autocast or t.dtype == tensors[0].dtype) for t in tensors)


def _are_many(x: Tensor, least: int = _MANY_ROWS) -> bool:
    """Whether a kernel is faster for that many tokens; asked last, as compiled models are bound to the answer."""
    return math.prod(x.shape[:-1]) >= least


def adds_in_norm(x: Tensor, norm: nn.Module) -> bool:
    """Whether one kernel can compute a residual sum of this type and shape (B, ..., D) together with its norm."""
    if not (is_plain(x) and x.is_cuda and (is_plain_layer(norm, nn.LayerNorm) or is_plain_layer(norm, nn.RMSNorm))):
        return False
    if norm.normalized_shape != x.shape[-1:] or norm.weight is None or norm.eps is None:
        return False
    if isinstance(norm, nn.RMSNorm):  # a sum kept in float32 goes with weights of any type
        fits = _fit(norm.weight if x.dtype == torch.float32 else x, norm.weight)
    else:
        fits = norm.bias is not None and _fit(x, norm.weight, norm.bias)
    return fits and _has_kernel(x.device.index, hopper=False) and _are_many(x)


class Residual(NamedTuple):
    """Tokens (B, ..., D) as a sum not yet added up, x + scale * branch, so that one kernel can make it and a norm."""

    x: Tensor
    branch: Tensor | None = None
    scale: Tensor | None = None  # (B), None for 1

    def sum(self) -> Tensor:
        """The tokens themselves."""
        if self.branch is None:
            return self.x
        if self.scale is None:
            return self.x + self.branch
        return self.x + self.branch * self.scale.view(-1, *[1] * (self.branch.ndim - 1))

    def normed(self, norm: Any) -> tuple[Tensor, Tensor]:
        """The tokens, and their norm in the type that autocast gives the linear layer after it."""
        x, branch, scale = self
        # the sum may have another type, for example of float16 tokens under autocast to bfloat16
        if branch is None or not adds_in_norm(x, norm) or torch.promote_types(x.dtype, branch.dtype) != x.dtype:
            total = self.sum()
            return total, run_norm(norm, total)
        bias = None if isinstance(norm, nn.RMSNorm) else norm.bias
        dtype = _dtype_of_products(norm.weight)
        return torch.ops.arm_zoo.add_norm(x, branch, scale, norm.weight, bias, norm.eps, dtype)[:2]


def gates_in_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `gated_linear` can compute this layer for these tokens, and is faster."""
    if bias is None or not (x.is_cuda and _fit(x, weight, bias)):
        return False
    if needs_gradient(x, weight, bias):
        return _has_kernel(x.device.index, hopper=False) and _are_many(x)
    whole_rows = x.shape[-1] % 8 == 0 and len(weight) % 16 == 0  # 16 bytes: what the product's kernel needs
    half = _dtype_of_products(x) in _HALVES
    return half and whole_rows and _has_kernel(x.device.index, hopper=True) and _are_many(x)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(gate) * value of (gate, value), the two halves of the linear layer with this weight and bias."""
    if needs_gradient(x, weight, bias):
        return torch.ops.arm_zoo.gate(F.linear(x, weight, bias.detach()), bias)
    return torch.ops.arm_zoo.gated_product(*(t.to(_dtype_of_products(x)) for t in (x, weight, bias)))


def convolves_in_kernel(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether one kernel can compute this convolution, depth-wise 3x3, of a map (B, H, W, C) together with SiLU."""
    if not (is_plain(x) and x.is_cuda and is_plain_layer(layer, nn.Conv2d) and layer.bias is None):
        return False
    spatial = (layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    if spatial != ((1, 1), (1, 1), (1, 1), "zeros") or layer.weight.shape != (x.shape[-1], 1, 3, 3):
        return False
    return _fit(x, layer.weight) and _has_kernel(x.device.index, hopper=False) and _are_many(x)


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """SiLU(layer(x)) for a convolution and a map (B, H, W, C), channels last in memory."""
    if convolves_in_kernel(layer, x):
        return torch.ops.arm_zoo.conv2d_silu(*(t.to(_dtype_of_products(x)) for t in (x, layer.weight)))
    return F.silu(layer(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
