"""Layers of the blocks and of the patch embedding that timm does not have in the form needed here."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import lecun_normal_, resample_patch_embed, to_2tuple
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from arm_zoo.fused import gated_linear, gates_in_kernel, is_bare

__all__ = ["Linear", "PatchConv", "PatchEmbed", "SwiGLU", "check_positive", "nearest_multiple", "zero_bias"]

_ALIGNMENT = 64  # of the hidden width on CUDA: the matrix products' tiles
_ONEDNN = torch.backends.mkldnn.is_available()


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
            if bare and gates_in_kernel(x, self.fc1.weight, self.fc1.bias):
                return self.fc2(gated_linear(x, self.fc1.weight, self.fc1.bias))
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)

    def _forward_padded(self, x: torch.Tensor, missing: int) -> torch.Tensor:
        """The same with more hidden channels, all zero.

        Rows whose bytes are no multiple of 16 keep matrix products off the fast kernels: ARM-L has 2730 channels.
        """
        halves = (2, self.fc2.in_features)
        weight = F.pad(self.fc1.weight.unflatten(0, halves), (0, 0, 0, missing)).flatten(0, 1)
        bias = F.pad(self.fc1.bias.unflatten(0, halves), (0, missing)).flatten()
        if gates_in_kernel(x, weight, bias):
            hidden = gated_linear(x, weight, bias)
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
