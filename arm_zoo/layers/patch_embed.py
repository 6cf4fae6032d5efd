"""Images to tokens."""

import torch
from timm.layers import lecun_normal_, resample_patch_embed, to_2tuple
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.layers.init import zero_bias
from arm_zoo.layers.sizes import Device, Pair, Size
from arm_zoo.ops.fused import is_plain, is_plain_layer


@torch.fx.wrap  # sizes of images are not known while a model is traced
def _grid_size(img_size: Pair, patch_size: Pair, patch_stride: Pair) -> Pair:
    for size, patch, stride in zip(img_size, patch_size, patch_stride, strict=True):
        if size < patch or (size - patch) % stride:
            raise ValueError(
                f"image size {tuple(img_size)} is not tiled by patches of {patch_size} with stride {patch_stride}: "
                f"each side must be patch + n * stride, for example "
                f"{max(patch, size - (size - patch) % stride)} instead of {size}"
            )
    height, width = ((s - p) // d + 1 for s, p, d in zip(img_size, patch_size, patch_stride, strict=True))
    return height, width


def _run_patch_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, on CUDA as a matrix product: cuDNN's layouts cost six times as much as gathering the patches."""
    if not (is_plain(x) and x.is_cuda and is_plain_layer(layer, nn.Conv2d)):
        return layer(x)
    if layer.groups > 1 or layer.padding != (0, 0) or layer.dilation != (1, 1):  # a layer of somebody's own
        return layer(x)
    (height, width), (down, right) = layer.kernel_size, layer.stride
    patches = x.unfold(2, height, down).unfold(3, width, right)  # (B, C, rows, columns, height, width)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, rows, columns, C * height * width)
    return F.linear(patches, layer.weight.flatten(1), layer.bias).permute(0, 3, 1, 2)


@torch.fx.wrap
def check_images(x: Tensor, channels: int, size: Pair | None, factory: str) -> None:
    """ValueError, advising arguments of `factory`, for images of other channels or size (None: any size)."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(
            f"expected images (batch, {channels}, height, width), got {tuple(x.shape)}; "
            f"another number of channels needs {factory}(..., in_chans=...)"
        )
    if size is not None and x.shape[2:] != size:
        changes = ", set_input_size(...) or dynamic_img_size=True" if factory == "create_model" else ""
        raise ValueError(
            f"expected images of {size[0]}x{size[1]}, got {x.shape[2]}x{x.shape[3]}; "
            f"for another size use {factory}(..., img_size=...){changes}"
        )


@register_notrace_module
class PatchEmbed(nn.Module):
    """Image to patch tokens, row by row; unlike timm's own it has a stride, so that patches may overlap."""

    img_size: Pair
    grid_size: Pair

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        patch_stride: Size | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        strict_img_size: bool = True,
        factory: str = "create_model",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.patch_stride = self.patch_size if patch_stride is None else to_2tuple(patch_stride)
        self.in_chans, self.strict_img_size = in_chans, strict_img_size
        self.factory = factory  # the function that makes the model, for messages
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_stride, device=device, dtype=dtype)
        self.set_input_size(img_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        lecun_normal_(self.proj.weight)
        zero_bias(self.proj)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size, or the patch size by resampling the kernel (a stride equal to it follows)."""
        new_size = self.img_size if img_size is None else to_2tuple(img_size)
        new_patch = self.patch_size if patch_size is None else to_2tuple(patch_size)
        new_stride = new_patch if self.patch_stride == self.patch_size else self.patch_stride
        if new_patch != self.patch_size and not isinstance(self.proj, nn.Conv2d):
            raise TypeError(
                f"{type(self.proj).__name__} stands in place of the convolution that makes patches tokens; its weight "
                "cannot be resampled to another patch size; merge or take away what was added to it"
            )
        # before anything is changed, so that a refused size leaves the layer as it was
        self.grid_size = _grid_size(new_size, new_patch, new_stride)
        self.img_size, self.patch_stride = new_size, new_stride
        if new_patch != self.patch_size:
            self.patch_size = new_patch
            weight = resample_patch_embed(self.proj.weight.detach(), list(new_patch))
            self.proj.weight = nn.Parameter(weight, requires_grad=self.proj.weight.requires_grad)
            self.proj.kernel_size, self.proj.stride = new_patch, new_stride

    def dynamic_feat_size(self, img_size: Pair) -> Pair:
        """Grid (rows, columns) of an image size; a ValueError where patch and stride do not tile it."""
        return _grid_size(img_size, self.patch_size, self.patch_stride)

    def check_input(self, x: Tensor) -> None:
        """Refuse images of other channels or another size than the model is for, or that patches do not tile."""
        check_images(x, self.in_chans, self.img_size if self.strict_img_size else None, self.factory)
        self.dynamic_feat_size((x.shape[2], x.shape[3]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, N, dim) tokens."""
        if torch.jit.is_scripting():
            x = self.proj(x)
        else:
            self.check_input(x)
            x = _run_patch_conv(self.proj, x)
        return x.flatten(2).transpose(1, 2)
