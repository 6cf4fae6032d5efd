"""Layers of the blocks and of the patch embedding that timm does not have in the form needed here."""

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import lecun_normal_, resample_patch_embed, to_2tuple
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from arm_zoo.scan import get_scan_backend

__all__ = [
    "Linear",
    "PatchConv",
    "PatchEmbed",
    "SwiGLU",
    "add_norm",
    "adds_in_norm",
    "check_positive",
    "is_bare",
    "nearest_multiple",
    "zero_bias",
]

_ALIGNMENT = 64  # of the hidden width on CUDA: the matrix products' tiles
_MANY_ROWS = 4096  # from so many tokens on the kernels of `arm_zoo.kernels` are faster than PyTorch's own
_HALVES = (torch.bfloat16, torch.float16)
_ONEDNN = torch.backends.mkldnn.is_available()
_TRITON = importlib.util.find_spec("triton") is not None


def check_positive(model: str, sizes: Mapping[str, Any]) -> None:
    """Refuse sizes below 1, alone or in a pair; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and min(to_2tuple(size)) < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {size}")


def nearest_multiple(size: int, unit: int) -> int:
    """The multiple of `unit` nearest to `size`, at least one unit."""
    return max(1, (2 * size + unit) // (2 * unit)) * unit


def zero_bias(layer: nn.Linear | nn.Conv2d) -> None:
    """Set a layer's bias, if it has one, to zero."""
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@register_notrace_module
class Linear(nn.Linear):
    """`nn.Linear`, run as a 1x1 convolution where that is the faster code for the same sums.

    In float32 on the CPU PyTorch sends matrix products to MKL, which holds back on other makers' processors, and
    convolutions to oneDNN, which uses the widest vectors of all of them: 1.5 to 2 times faster on a Zen 5.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        eager = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        if not (_ONEDNN and eager and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel()):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # channels innermost in memory
        rows = F.conv2d(rows, self.weight[:, :, None, None], self.bias)
        return rows.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def is_bare(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer does what its class does and nothing else: not wrapped, replaced, patched or hooked.

    Hooks on all modules of the process at once are not looked for.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    changed = "forward" in layer.__dict__ or layer._compiled_call_impl is not None
    return type(layer) is kind and not changed and not any(hooks)


@torch.library.custom_op("arm_zoo::gated_product", mutates_args=())
def _gated_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    from arm_zoo.kernels import gated_product  # needs Triton, which not every build of torch brings

    with torch.cuda.device_of(x):
        return gated_product(x, weight, bias)


@_gated_product.register_fake
def _gated_product_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight) // 2)


@register_flop_formula(torch.ops.arm_zoo.gated_product)
def _gated_product_flops(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@torch.library.custom_op("arm_zoo::gate", mutates_args=())
def _gate(halves: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * value of the two halves, which have the bias in them already; its gradient is made with theirs."""
    from arm_zoo.kernels import gate

    with torch.cuda.device_of(halves):
        return gate(*halves.chunk(2, dim=-1))


@_gate.register_fake
def _gate_fake(halves: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return halves.new_empty(*halves.shape[:-1], halves.shape[-1] // 2)


@torch.library.custom_op("arm_zoo::gate_backward", mutates_args=())
def _gate_backward(grad: torch.Tensor, halves: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from arm_zoo.kernels import gate_backward

    (gate, value), grad_halves = halves.chunk(2, dim=-1), halves.new_empty(halves.shape)
    grad_gate, grad_value = grad_halves.chunk(2, dim=-1)
    sums = bias.new_empty(bias.shape, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        gate_backward(grad, gate, value, grad_gate, grad_value, sums)
    return grad_halves, sums.to(bias.dtype)


@_gate_backward.register_fake
def _gate_backward_fake(
    grad: torch.Tensor, halves: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return halves.new_empty(halves.shape), bias.new_empty(bias.shape)


def _gate_setup(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_grad(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.arm_zoo.gate_backward(grad, *ctx.saved_tensors)


_gate.register_autograd(_gate_grad, setup_context=_gate_setup)


@torch.library.custom_op("arm_zoo::add_norm", mutates_args=())
def _add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from arm_zoo.kernels import add_norm

    with torch.cuda.device_of(x):
        return add_norm(x, branch, scale, weight, bias, eps, dtype)


@_add_norm.register_fake
def _add_norm_fake(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    moments = x.new_empty(*x.shape[:2], 2, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=args[-1]), moments


@torch.library.custom_op("arm_zoo::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_total: torch.Tensor,
    grad_normed: torch.Tensor,
    total: torch.Tensor,
    moments: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from arm_zoo.kernels import add_norm_backward

    with torch.cuda.device_of(total):
        return add_norm_backward(grad_total, grad_normed, total, moments, scale, weight, dtype)


@_add_norm_backward.register_fake
def _add_norm_backward_fake(
    grad_total: torch.Tensor, grad_normed: torch.Tensor, total: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, ...]:
    _, _, weight, dtype = args
    grads_of_norm = (weight.new_empty(weight.shape) for _ in range(2))
    return total.new_empty(total.shape), total.new_empty(total.shape, dtype=dtype), *grads_of_norm


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (_, branch, scale, weight, *_), (total, _, moments) = inputs, output
    ctx.dtype = branch.dtype
    ctx.save_for_backward(total, moments, scale, weight)


def _add_norm_grad(
    ctx: Any, grad_total: torch.Tensor, grad_normed: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.arm_zoo.add_norm_backward(grad_total, grad_normed, *ctx.saved_tensors, ctx.dtype)
    grad_x, grad_branch, grad_weight, grad_bias = grads
    return grad_x, grad_branch, None, grad_weight, grad_bias, None, None


_add_norm.register_autograd(_add_norm_grad, setup_context=_add_norm_setup)


# Runs as it is while a model is traced: within a trace, some versions of torch say that every compilation exports.
@torch.compiler.assume_constant_result
def _has_kernel(device: int, *, hopper: bool) -> bool:
    """Whether this GPU may run `arm_zoo.kernels`, or the one of them for Hopper GPUs.

    Not in models that are exported, which may run elsewhere, and not where plain PyTorch was asked for.
    """
    if torch.compiler.is_exporting() or not _TRITON or get_scan_backend() in ("reference", "torch"):
        return False
    return not hopper or (torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0))


def _fit(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take tensors of these types, all of one unless autocast brings them together."""
    autocast = torch.is_autocast_enabled("cuda")
    return all(t.dtype != torch.float64 and (autocast or t.dtype == tensors[0].dtype) for t in tensors)


def _are_many(x: torch.Tensor) -> bool:
    """Whether so many tokens are faster in a kernel; asked last, as it binds a compiled model to the answer."""
    return math.prod(x.shape[:-1]) >= _MANY_ROWS


def adds_in_norm(x: torch.Tensor, norm: nn.Module) -> bool:
    """Whether `add_norm` is for these tokens (B, L, D) and this norm."""
    if not (isinstance(x, torch.Tensor) and x.is_cuda and isinstance(norm, nn.LayerNorm)):
        return False
    if not is_bare(norm, nn.LayerNorm) or norm.normalized_shape != x.shape[-1:] or norm.weight is None:
        return False
    fits = norm.bias is not None and _fit(x, norm.weight, norm.bias)
    return fits and _has_kernel(x.device.index, hopper=False) and _are_many(x)


def add_norm(
    x: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor | None, norm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + scale * branch and its layer norm, in one pass over both, also backward: (B, L, D), (B, L, D), (B).

    The norm has the type that autocast gives a linear layer, which is what follows.
    """
    if torch.promote_types(x.dtype, branch.dtype) != x.dtype:  # bfloat16 tokens under autocast to float16, say
        x = x + (branch if scale is None else branch * scale[:, None, None])
        return x, norm(x)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    total, normed, _ = torch.ops.arm_zoo.add_norm(x, branch, scale, norm.weight, norm.bias, norm.eps, dtype)
    return total, normed


def _gates_in_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `_gated_linear` is for these tokens and this layer."""
    if bias is None or not (x.is_cuda and _fit(x, weight, bias)):
        return False
    if _trains(x, weight, bias):
        return _has_kernel(x.device.index, hopper=False) and _are_many(x)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    whole_rows = x.shape[-1] % 8 == 0 and len(weight) % 16 == 0  # 16 bytes: what the product's kernel needs
    return dtype in _HALVES and whole_rows and _has_kernel(x.device.index, hopper=True) and _are_many(x)


def _trains(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * value of (gate, value), the two halves of the linear layer with this weight and bias."""
    if _trains(x, weight, bias):
        return torch.ops.arm_zoo.gate(F.linear(x, weight, bias.detach()), bias)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return torch.ops.arm_zoo.gated_product(*(t.to(dtype) for t in (x, weight, bias)))


class SwiGLU(nn.Module):
    """fc2(SiLU(gate) * value), with gate and value the two halves of fc1 (paper, section 3.3)."""

    def __init__(
        self, dim: int, hidden: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden, device=device, dtype=dtype)
        self.fc2 = Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and isinstance(x, torch.Tensor):  # symbolic tracing sees the layers
            bare, missing = x.is_cuda and is_bare(self.fc1, Linear), -self.fc2.in_features % _ALIGNMENT
            if bare and missing and is_bare(self.fc2, Linear):
                return self._forward_padded(x, missing)
            if bare and _gates_in_kernel(x, self.fc1.weight, self.fc1.bias):
                return self.fc2(_gated_linear(x, self.fc1.weight, self.fc1.bias))
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)

    def _forward_padded(self, x: torch.Tensor, missing: int) -> torch.Tensor:
        """The same with more hidden channels, all zero.

        Rows whose bytes are no multiple of 16 keep matrix products off the fast kernels: ARM-L has 2730 channels.
        """
        halves = (2, self.fc2.in_features)
        weight = F.pad(self.fc1.weight.unflatten(0, halves), (0, 0, 0, missing)).flatten(0, 1)
        bias = F.pad(self.fc1.bias.unflatten(0, halves), (0, missing)).flatten()
        if _gates_in_kernel(x, weight, bias):
            hidden = _gated_linear(x, weight, bias)
        else:
            gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        return F.linear(hidden, F.pad(self.fc2.weight, (0, missing)), self.fc2.bias)


def _grid_size(
    img_size: tuple[int, int], patch_size: tuple[int, int], patch_stride: tuple[int, int]
) -> tuple[int, int]:
    for size, patch, stride in zip(img_size, patch_size, patch_stride, strict=True):
        if size < patch or (size - patch) % stride:
            raise ValueError(
                f"image size {tuple(img_size)} is not tiled by patches of {patch_size} with stride {patch_stride}: "
                f"each side must be patch + n * stride, for example "
                f"{max(patch, size - (size - patch) % stride)} instead of {size}"
            )
    height, width = ((s - p) // d + 1 for s, p, d in zip(img_size, patch_size, patch_stride, strict=True))
    return height, width


class PatchConv(nn.Conv2d):
    """The convolution that makes patches tokens; on CUDA the same sums as one matrix product.

    cuDNN converts the layout of images of 3 channels twice, which costs six times as much as gathering the patches.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting() or not x.is_cuda:
            return self._conv_forward(x, self.weight, self.bias)
        (height, width), (down, right) = self.kernel_size, self.stride
        patches = x.unfold(2, height, down).unfold(3, width, right)  # (B, C, rows, columns, height, width)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, rows, columns, C * height * width)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Image to patch tokens, row by row; patches overlap where the stride is smaller than the patch.

    timm's own has no stride.
    """

    img_size: tuple[int, int]
    grid_size: tuple[int, int]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        patch_stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
        factory: str = "create_model",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.patch_stride = self.patch_size if patch_stride is None else to_2tuple(patch_stride)
        self.strict_img_size = strict_img_size
        self.factory = factory  # what makes the model, for messages
        self.proj = PatchConv(in_chans, embed_dim, self.patch_size, self.patch_stride, device=device, dtype=dtype)
        self.set_input_size(img_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        lecun_normal_(self.proj.weight)
        zero_bias(self.proj)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size, or the patch size by resampling the kernel (a stride equal to it follows)."""
        new_size = self.img_size if img_size is None else to_2tuple(img_size)
        new_patch = self.patch_size if patch_size is None else to_2tuple(patch_size)
        new_stride = new_patch if self.patch_stride == self.patch_size else self.patch_stride
        # first of all, so that a refused size leaves the layer as it was
        self.grid_size = _grid_size(new_size, new_patch, new_stride)
        self.img_size, self.patch_stride = new_size, new_stride
        if new_patch != self.patch_size:
            self.patch_size = new_patch
            weight = resample_patch_embed(self.proj.weight.detach(), list(new_patch))
            self.proj.weight = nn.Parameter(weight, requires_grad=self.proj.weight.requires_grad)
            self.proj.kernel_size, self.proj.stride = new_patch, new_stride

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token step."""
        return max(self.patch_stride) if as_scalar else self.patch_stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid (rows, columns) of an image size.

        Raises:
            ValueError: if patch and stride do not tile the image.
        """
        return _grid_size(img_size, self.patch_size, self.patch_stride)

    def check_input(self, x: torch.Tensor) -> None:
        """Refuse images of other channels or another size than the model is for."""
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"expected images (batch, {self.proj.in_channels}, height, width), got {tuple(x.shape)}; "
                f"another number of channels needs {self.factory}(..., in_chans=...)"
            )
        if self.strict_img_size and x.shape[2:] != self.img_size:
            changes = ", set_input_size(...) or dynamic_img_size=True" if self.factory == "create_model" else ""
            raise ValueError(
                f"expected images of {self.img_size[0]}x{self.img_size[1]}, got {x.shape[2]}x{x.shape[3]}; "
                f"for another size use {self.factory}(..., img_size=...){changes}"
            )
        self.dynamic_feat_size((x.shape[2], x.shape[3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images -> (B, N, dim) tokens."""
        if not torch.jit.is_scripting():
            self.check_input(x)
        return self.proj(x).flatten(2).transpose(1, 2)
