"""VMamba vision backbones as timm models (https://arxiv.org/abs/2401.10166), as finally released ("v2").

Four stages of blocks over maps of tokens, channels last: a mixer that scans the map in four directions, and an MLP.
Nothing depends on the size of the images.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import DropPath, calculate_drop_path_rates, global_pool_nlc
from timm.models._features import feature_take_indices
from timm.models._input import get_model_input_config, update_model_args
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.files import CheckpointError, StateDict
from arm_zoo.layers.block import add_branch, run_blocks
from arm_zoo.layers.init import zero_bias
from arm_zoo.layers.mlp import Mlp
from arm_zoo.layers.patch_embed import check_images
from arm_zoo.layers.sizes import Device, Size, check_positive, check_rates, check_whole
from arm_zoo.layers.ss2d import SS2D, order_for
from arm_zoo.models._builder import Backbone, entry_configs, norm_layer_of, register_family
from arm_zoo.ops.fused import Residual
from arm_zoo.weights.adapt import adapt_state_dict, refuse_foreign_head
from arm_zoo.weights.tensor_names import OfficialNames

GlobalPool = Literal["avg", "avgmax", "max", ""]
_MLP_RATIO = 4

torch.fx.wrap("check_images")  # sizes are not known while a model is traced
torch.fx.wrap("order_for")

_BLOCK = "layers.{}.blocks.{}.", "stages.{}.blocks.{}."
OFFICIAL_NAMES = OfficialNames(
    [
        ("patch_embed.0.", "patch_embed.conv1.", None),
        ("patch_embed.2.", "patch_embed.norm1.", None),
        ("patch_embed.5.", "patch_embed.conv2.", None),
        ("patch_embed.7.", "patch_embed.norm2.", None),
        # at the end of a stage there, at the start of the next one here, so that a stage gives its own state
        *((f"layers.{i}.downsample.1.", f"stages.{i + 1}.downsample.conv.", None) for i in range(3)),
        *((f"layers.{i}.downsample.3.", f"stages.{i + 1}.downsample.norm.", None) for i in range(3)),
        (f"{_BLOCK[0]}norm.", f"{_BLOCK[1]}norm1.", None),
        (f"{_BLOCK[0]}op.A_logs", f"{_BLOCK[1]}ss2d.A_log", None),
        (f"{_BLOCK[0]}op.Ds", f"{_BLOCK[1]}ss2d.D", None),
        (f"{_BLOCK[0]}op.dt_projs_weight", f"{_BLOCK[1]}ss2d.dt_proj_weight", None),
        (f"{_BLOCK[0]}op.dt_projs_bias", f"{_BLOCK[1]}ss2d.dt_proj_bias", None),
        (f"{_BLOCK[0]}op.", f"{_BLOCK[1]}ss2d.", None),
        (*_BLOCK, None),
        ("classifier.norm.", "norm.", None),
        ("classifier.head.", "head.", None),
    ],
    "https://github.com/MzeroMiko/VMamba",
)


class Stem(nn.Module):
    """Images (B, C, H, W) to tokens (B, H / 4, W / 4, dim), sizes rounded up, by two overlapping convolutions."""

    def __init__(
        self, in_chans: int, dim: int, norm_layer: Callable[..., nn.Module], device: Device, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = norm_layer(dim // 2, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_images(x, self.in_chans, None, "create_model")
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as torch.vmap knows no memory_format
        x = self.conv1(x).permute(0, 2, 3, 1)
        x = F.gelu(self.norm1(x)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A map (B, H, W, dim) to one of half the size, rounded up, and another width, by an overlapping convolution."""

    def __init__(
        self, dim: int, width: int, norm_layer: Callable[..., nn.Module], device: Device, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, width, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = norm_layer(width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class VMambaBlock(nn.Module):
    """Scans and MLP, each with its norm and residual; one drop-path rate, sampled twice."""

    def __init__(
        self,
        dim: int,
        expand: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.ss2d = SS2D(dim, expand, norm_layer, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, _MLP_RATIO * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self.forward_deferred(Residual(x), order).sum()
        x = x + self.drop_path(self.ss2d(self.norm1(x), order))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def forward_deferred(self, tokens: Residual, order: Tensor) -> Residual:
        """See `arm_zoo.layers.block.Block`."""
        x, y = tokens.normed(self.norm1)
        x, y = add_branch(x, self.ss2d(y, order), self.drop_path).normed(self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)


class Stage(nn.Module):
    """Blocks over one map, which `downsample` makes from the map of the stage before."""

    def __init__(self, downsample: nn.Module, blocks: list[VMambaBlock]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        order = order_for(x)
        if torch.jit.is_scripting():
            for block in self.blocks:
                x = block(x, order)
        else:
            last = len(self.blocks)
            x = run_blocks(self.blocks, x, order, (last,), self.grad_checkpointing, VMambaBlock)[last]
        return x


class VMamba(Backbone):
    """Hierarchical vision backbone whose mixer, `SS2D`, scans maps of tokens row by row and column by column."""

    official_names = OFFICIAL_NAMES
    parts_to_shard = ("stages",)
    feature_maps = 4
    global_pools = ("avg", "avgmax", "max", "")
    keys = ("patch_embed.conv1.weight", "patch_embed.conv2.weight", "stages.*.blocks.*.ss2d.in_proj.weight")

    def __init__(
        self,
        img_size: Size | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        expand: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[..., nn.Module] | None = None,
        final_norm: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            img_size: pixels of the images that the model is meant for, which timm records; it takes any.
            in_chans: channels of the images.
            num_classes: 0 leaves the head out.
            global_pool: 'avg', 'max' or half of their sum, 'avgmax'; or '' (the whole map).
            embed_dim: width of the first stage, which doubles from stage to stage.
            depths: blocks of the stages, of which there are four, or fewer in a pruned model.
            expand: inner width of the scans as a multiple of the stage's; `expand * embed_dim` must be whole.
            drop_rate: dropout before the head.
            drop_path_rate: stochastic depth, rising linearly over the blocks of all stages.
            norm_layer: None means LayerNorm with eps 1e-5; a name or class of `timm.layers`.
            final_norm: False leaves the norm before the head out, as in a pruned model.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = {"img_size": img_size, "in_chans": in_chans, "embed_dim": embed_dim}
        check_positive("VMamba", sizes, optional=("img_size",))
        check_positive("VMamba", {"embed_dim // 2": embed_dim // 2})
        check_whole("VMamba", {"num_classes": num_classes})
        check_rates("VMamba", {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate})
        _check_stages(embed_dim, depths, expand)
        norm = norm_layer_of(norm_layer) or partial(nn.LayerNorm, eps=1e-5)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.set_global_pool(global_pool)
        self.output_fmt = "NHWC"
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = self.head_hidden_size = widths[-1]

        self.patch_embed = Stem(in_chans, embed_dim, norm, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, width in enumerate(widths):
            downsample = nn.Identity() if i == 0 else Downsample(widths[i - 1], width, norm, **dd)
            stages.append(Stage(downsample, [VMambaBlock(width, expand, rate, norm, **dd) for rate in rates[i]]))
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": width, "reduction": 4 * 2**i} for i, width in enumerate(widths)
        ]
        self.norm = norm(self.num_features, **dd) if final_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.make_head(**dd)

        self.init_weights(needs_reset=False)

    @staticmethod
    def adapt(state_dict: Mapping[str, Tensor], model: nn.Module, timm_adapts: bool = True) -> StateDict:
        """See `adapt_state_dict`; linear layers may come as convolutions over one pixel, as in the official code."""
        flat = {name: value.flatten(1) if value.shape[2:] == (1, 1) else value for name, value in state_dict.items()}
        return adapt_state_dict(flat, model, timm_adapts)

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], None]:
        """Arguments of a model that a checkpoint fits."""
        stem, patches = source["patch_embed.conv1.weight"], source["patch_embed.conv2.weight"]
        in_proj = next(value for name, value in source.items() if name.endswith(".ss2d.in_proj.weight"))
        if (stem.ndim, patches.ndim) != (4, 4) or in_proj.ndim < 2 or in_proj.shape[1] == 0:
            shapes = f"{tuple(stem.shape)}, {tuple(patches.shape)} and {tuple(in_proj.shape)}"
            raise CheckpointError(
                f"this is no VMamba checkpoint: the convolutions of patch_embed and in_proj have the shapes {shapes}; "
                "expected 4, 4 and at least 2 axes"
            )
        refuse_foreign_head(source)
        names = (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name) for name in source)
        blocks = sorted({name.groups() for name in names if name})
        depths = tuple(Counter(stage for stage, _ in blocks).values())
        sizes: dict[str, Any] = {"embed_dim": len(patches), "depths": depths}
        sizes["expand"] = in_proj.shape[0] / in_proj.shape[1]
        _check_stages(**sizes)
        return {**sizes, "in_chans": stem.shape[1], "num_classes": len(source.get("head.weight", ()))}, None

    @torch.jit.ignore
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model is meant for; it takes any height and width."""
        return get_model_input_config(self)["input_size"]

    @torch.jit.ignore
    def geometry(self) -> dict[str, str]:
        """See `Backbone.geometry`; widths, depths and strides are those of the stages."""
        width, stride = (", ".join(str(info[key]) for info in self.feature_info) for key in ("num_chs", "reduction"))
        stages: Any = self.stages
        depth = ", ".join(str(len(stage.blocks)) for stage in stages)
        return {"width": width, "depth": depth, "patches": f"maps of stride {stride}, of any image size"}

    def _init_own_weights(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                zero_bias(layer)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise decay: the stem, then blocks or, if `coarse`, stages, then final norm and head."""
        downsample = (r"^stages\.(\d+)\.downsample", (0,))
        blocks = [(r"^stages\.(\d+)", None)] if coarse else [downsample, (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]] | dict[str, Any]:
        """Maps of chosen stages, with the arguments and results of timm's models.

        `norm` applies the final norm, to the last stage's map, which alone has its width.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.patch_embed(x)
        last = len(self.feature_info) - 1
        maps = []
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return {"image_intermediates": maps} if output_dict else maps
        if i == last:
            x = self.norm(x)
        return {"image_intermediates": maps, "image_features": x} if output_dict else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one asked for; returns the indices that remain.

        The final norm and the head, which have the last stage's width, go with it.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index + 1 < len(self.stages)
        stages: Any = self.stages[: max_index + 1]
        self.stages = stages
        update_model_args(self, depths=tuple(len(stage.blocks) for stage in stages))  # for whoever saves it
        if prune_norm or shortened:
            self.norm = nn.Identity()
            update_model_args(self, final_norm=False)
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, H / 32, W / 32, dim) normed map, sizes rounded up."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, dim) map -> (B, num_classes) logits, or pooled features (B, dim) with `pre_logits`."""
        if self.global_pool:
            x = global_pool_nlc(x.flatten(1, 2), self.global_pool, num_prefix_tokens=0)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_stages(embed_dim: int, depths: tuple[int, ...], expand: float) -> None:
    """Refuse depths of no or too many stages, and widths that are not whole; those of later stages are multiples."""
    whole = isinstance(depths, Sequence) and all(isinstance(depth, int) for depth in depths)
    if not whole or not 1 <= len(depths) <= 4 or min(depths) < 1:
        raise ValueError(f"VMamba: depths must be one to four numbers of blocks, each at least 1, got {depths!r}")
    inner = expand * embed_dim
    if inner < 0.5 or abs(inner - round(inner)) > 1e-6:
        got = f"got {expand} * {embed_dim} = {inner:g}"
        raise ValueError(f"VMamba: expand * embed_dim must be a whole number, at least 1, {got}")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "first_conv": "patch_embed.conv1",
        "license": "mit",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        "origin_url": OFFICIAL_NAMES.origin_url,
        **kwargs,
    }


default_cfgs = entry_configs(
    {"vmamba_tiny_s1l8.in1k": _cfg(), "vmamba_small_s2l15.in1k": _cfg(), "vmamba_base_s2l15.in1k": _cfg()}
)
register_family(
    VMamba,
    {
        "vmamba_tiny_s1l8": {},
        "vmamba_small_s2l15": {"depths": (2, 2, 15, 2), "expand": 2.0},
        "vmamba_base_s2l15": {"embed_dim": 128, "depths": (2, 2, 15, 2), "expand": 2.0},
    },
    short_names={},
)
