"""What ARM, Vim and similar backbones share: one sequence of patches with a class token in its middle."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import checkpoint, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from arm_zoo.files import CheckpointError, StateDict
from arm_zoo.layers.block import Block, init_block_weights, run_blocks
from arm_zoo.layers.order import scan_order
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.layers.sizes import Device, Size, check_positive, check_rates, check_whole, one_or_two
from arm_zoo.models._builder import Backbone, norm_layer_of
from arm_zoo.ops.fused import at_least_float32, in_type_of, run_norm
from arm_zoo.weights.adapt import refuse_foreign_head, resample_pos_embed

GlobalPool = Literal["avg", "avgmax", "max", "token", ""]

torch.fx.wrap("in_type_of")  # here and below: types and sizes are not known while a model is traced
torch.fx.wrap("resample_pos_embed")


@torch.fx.wrap
@register_notrace_function
@torch.jit.ignore
def order_for(directions: list[str], height: int, width: int, device: torch.device) -> Tensor:
    """The order table (directions, N + 1) of N = height * width patches and a class token in their middle."""
    return scan_order(height, width, directions, cls_index=height * width // 2, device=device)


class SequenceBackbone(Backbone):
    """Patches and a class token, learned position embeddings, blocks of Mamba mixers, a norm and a linear head.

    A family's class says in which directions its mixers scan and what its blocks are. A `block_class` of its own is
    called like `Block`: with the width of tokens, the number of directions and the states per channel, then by keyword
    with `drop_path`, `norm_layer`, `device`, `dtype` and all that `block` holds. Its `forward(x, order)` takes tokens
    (B, N + 1, dim), in float32 if `float32_residual`, and the order table (directions, N + 1), and returns such
    tokens. A `MambaMixer` anywhere in such a block is initialised and exempt from weight decay as in `Block`; a family
    without `MambaMixer` overrides `read_shapes`.
    """

    directions: list[str]  # names for `scan_order`
    block_class: Callable[..., nn.Module] = Block
    block: Mapping[str, Any] = MappingProxyType({})  # arguments of the block that all sizes share
    float32_residual = False  # whether tokens stay in float32 between blocks of a lower type
    usual_pool: GlobalPool = "avg"  # by which the family classifies; with "token" pretraining has a class token, too
    default_norm: Callable[..., nn.Module] = staticmethod(partial(nn.LayerNorm, eps=1e-5))
    dynamic_img_size: bool
    __constants__ = ("directions", "dynamic_img_size", "float32_residual")  # for TorchScript
    order: Tensor

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        patch_stride: Size | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 16,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[..., nn.Module] | None = None,
        dynamic_img_size: bool = False,
        final_norm: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            img_size: pixels, one number or (height, width).
            patch_size: pixels of a patch.
            patch_stride: pixels between patches; None means the patch size.
            in_chans: channels of the images.
            num_classes: 0 leaves the head out.
            global_pool: 'avg', 'max' or half of their sum, 'avgmax' (of the patches), 'token' (the class token) or ''
                (all tokens).
            embed_dim: width of the tokens.
            depth: number of blocks.
            d_state: states per channel of the scan.
            drop_rate: dropout before the head.
            pos_drop_rate: dropout after the position embeddings.
            drop_path_rate: stochastic depth, rising linearly over the blocks.
            norm_layer: a name or class of `timm.layers`; None means the family's own: LayerNorm for ARM, RMSNorm for
                Vim, eps 1e-5.
            dynamic_img_size: take any image size that patch and stride tile, resampling the position embeddings.
            final_norm: False leaves the norm before the head out, as in a pruned model.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = {"img_size": img_size, "patch_size": patch_size, "patch_stride": patch_stride, "in_chans": in_chans}
        sizes |= {"embed_dim": embed_dim, "depth": depth, "d_state": d_state}
        name, rates = type(self).__name__, {"drop_rate": drop_rate, "pos_drop_rate": pos_drop_rate}
        check_positive(name, sizes, optional=("patch_stride",))
        check_whole(name, {"num_classes": num_classes})
        check_rates(name, {**rates, "drop_path_rate": drop_path_rate})
        norm = norm_layer_of(norm_layer) or self.default_norm
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.set_global_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.dynamic_img_size = dynamic_img_size

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + 1, embed_dim, **dd))
        order = torch.empty(len(self.directions), patches + 1, dtype=torch.long, device=device)
        self.register_buffer("order", order, persistent=False)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        block = partial(self.make_block, embed_dim, len(self.directions), d_state, norm)
        path_rates = self.drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(block(drop_path=rate, **dd) for rate in path_rates)
        info = {"num_chs": embed_dim, "reduction": max(self.patch_embed.patch_stride)}
        self.feature_info = [{"module": f"blocks.{i}", **info} for i in range(depth)]
        self.norm = norm(embed_dim, **dd) if final_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self.make_head(**dd)

        self.init_weights(needs_reset=False)

    @classmethod
    def make_block(
        cls, embed_dim: int, directions: int, d_state: int, norm_layer: Callable[..., nn.Module], **keywords: Any
    ) -> nn.Module:
        """A block of the family; pretraining models make theirs by it too."""
        return cls.block_class(embed_dim, directions, d_state, norm_layer=norm_layer, **cls.block, **keywords)

    @classmethod
    def drop_path_rates(cls, drop_path_rate: float, depth: int) -> list[float]:
        """The drop-path rate of each block."""
        return cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))

    def _init_own_weights(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        init_block_weights(self.blocks)
        self._init_head()

    def init_non_persistent_buffers(self) -> None:
        """Fill the order table, which is computed and never saved."""
        self.fill_table("order", order_for(self.directions, *self.patch_embed.grid_size, torch.device("cpu")))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names without weight decay: embeddings, and what is one-dimensional per direction."""
        return {"pos_embed", "cls_token"} | super().no_weight_decay()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise decay: embeddings, blocks, and the final norm together with the head."""
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    @torch.jit.ignore
    def geometry(self) -> dict[str, str]:
        """See `Backbone.geometry`."""
        embed = self.patch_embed
        patch, stride, grid = ("x".join(map(str, s)) for s in (embed.patch_size, embed.patch_stride, embed.grid_size))
        patches = f"{patch}, stride {stride}, grid {grid}"
        return {"width": str(self.embed_dim), "depth": str(len(self.blocks)), "patches": patches}

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change image or patch size; position embeddings are resampled around the class token."""
        sizes = {"img_size": img_size, "patch_size": patch_size}
        check_positive(type(self).__name__, sizes, optional=sizes)
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        new_grid = self.patch_embed.grid_size
        for info in self.feature_info:
            info["reduction"] = max(self.patch_embed.patch_stride)
        if new_grid != old_grid:
            resampled = resample_pos_embed(self.pos_embed.detach(), old_grid, new_grid)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
            self.order = order_for(self.directions, *new_grid, self.order.device)
        # a stride that followed the patches is recorded with them, or a saved configuration would contradict itself
        patch_stride = None if patch_size is None else self.patch_embed.patch_stride
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size, patch_stride=patch_stride)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) images -> (B, N + 1, dim) tokens with the class token at N // 2, and their order table."""
        pos_embed: Tensor = self.pos_embed
        order = self.order
        if self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            pos_embed = resample_pos_embed(pos_embed, self.patch_embed.grid_size, grid)
            order = order_for(self.directions, grid[0], grid[1], order.device)
        x = self.patch_embed(x)
        middle = (order.shape[1] - 1) // 2
        x = torch.cat([x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), x[:, middle:]], dim=1)
        x = self.pos_drop(x + pos_embed)
        return at_least_float32(x) if self.float32_residual else x, order

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]] | dict[str, Any]:
        """Features of chosen blocks, with the arguments and results of timm's models.

        The class token is taken out of both formats; `return_prefix_tokens` gives it beside them, (B, 1, dim).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.patch_embed.check_input(x)
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x, order = self._embed(x)
        taken = []
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, order) if self.grad_checkpointing else block(x, order)
            if i in take_indices:
                taken.append(self._normed(x) if norm else in_type_of(self.cls_token, x))
        middle = (order.shape[1] - 1) // 2
        prefix = [y[:, middle : middle + 1] for y in taken]
        patches = [torch.cat([y[:, :middle], y[:, middle + 1 :]], dim=1) for y in taken]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        if output_dict:
            prefixes = {"image_intermediates_prefix": prefix} if return_prefix_tokens else {}
            out = {"image_intermediates": patches, **prefixes}
            return out if intermediates_only else {**out, "image_features": self._normed(x)}
        intermediates = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return intermediates if intermediates_only else (self._normed(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for; returns the indices that remain."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        update_model_args(self, depth=len(self.blocks))  # for whoever saves it
        if prune_norm:
            self.norm = nn.Identity()
            update_model_args(self, final_norm=False)
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, N + 1, dim) normed tokens, the class token at N // 2."""
        x, order = self._embed(x)
        if torch.jit.is_scripting():
            for block in self.blocks:
                x = block(x, order)
        else:
            last = len(self.blocks)
            x = run_blocks(self.blocks, x, order, (last,), self.grad_checkpointing)[last]
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        """The final norm of tokens, or the tokens themselves where it was pruned, in the type of the weights."""
        if torch.jit.is_scripting():
            return self.norm(in_type_of(self.cls_token, x))
        return in_type_of(self.cls_token, run_norm(self.norm, x))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(B, N + 1, dim) tokens -> (B, dim), or the tokens themselves for ''."""
        pool_type = self.global_pool if pool_type is None else pool_type
        middle = (x.shape[1] - 1) // 2
        if pool_type == "token":
            return x[:, middle]
        if pool_type == "avg":
            return mean_around(x, middle)
        if pool_type == "max":
            return max_around(x, middle)
        if pool_type == "avgmax":
            return (mean_around(x, middle) + max_around(x, middle)) / 2
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N + 1, dim) tokens -> (B, num_classes) logits, or pooled features (B, dim) with `pre_logits`."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], int]:
        """Arguments of a model that a checkpoint fits, and the number of its patches."""
        depth = len({name.split(".")[1] for name in source if name.startswith("blocks.") and name.count(".") > 1})
        states = next(value for name, value in source.items() if name.endswith(".A_log"))
        patches, table = source["patch_embed.proj.weight"], source["pos_embed"]
        if (states.ndim, patches.ndim, table.ndim) != (3, 4, 3):
            shapes = f"{tuple(states.shape)}, {tuple(patches.shape)} and {tuple(table.shape)}"
            names = "A_log, patch_embed.proj.weight and pos_embed"
            said = f"this is no {cls.__name__} checkpoint: {names} have the shapes {shapes}"
            raise CheckpointError(f"{said}; expected 3, 4 and 3 axes")
        refuse_foreign_head(source)
        sizes: dict[str, Any] = {"embed_dim": table.shape[2], "depth": depth, "d_state": states.shape[2]}
        sizes |= {"patch_size": one_or_two(patches.shape[2:]), "in_chans": patches.shape[1]}
        sizes["num_classes"] = len(source.get("head.weight", ()))
        return sizes, table.shape[1] - 1


@torch.fx.wrap
@register_notrace_function
def mean_around(x: Tensor, middle: int) -> Tensor:
    """Tokens (B, N + 1, dim) -> (B, dim), the mean of the means before and after the class token, as officially."""
    after = x[:, middle + 1 :].mean(dim=1)
    return after if middle == 0 else (x[:, :middle].mean(dim=1) + after) / 2


def max_around(x: Tensor, middle: int) -> Tensor:
    """The largest values of all tokens but the class token."""
    return torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1).amax(dim=1)
