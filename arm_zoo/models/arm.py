"""ARM and MambaMLP vision backbones as timm models (https://arxiv.org/abs/2406.07537).

Image patches with one class token in the middle of the sequence, learned position embeddings, blocks of a Mamba mixer
with four scans and a SwiGLU, average pooling. `arm_zoo.pretraining.autoregressive` has the same blocks with one scan.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, get_device_dtype, get_norm_layer
from timm.models import checkpoint, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from arm_zoo.files import CheckpointError, StateDict
from arm_zoo.layers.block import Block, init_block_weights, run_blocks
from arm_zoo.layers.init import zero_bias
from arm_zoo.layers.order import scan_order
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.layers.sizes import Device, Size, check_positive, one_or_two
from arm_zoo.models._builder import Backbone, entry_configs, register_family
from arm_zoo.weights.adapt import refuse_foreign_head, resample_pos_embed
from arm_zoo.weights.hosted import BUNDLED_FOLDER
from arm_zoo.weights.tensor_names import MIXER_NAMES, OfficialNames

GlobalPool = Literal["avg", "token", ""]
DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")  # of the scans (paper, section 3.3)

torch.fx.wrap("resample_pos_embed")  # here and below: sizes are not known while a model is traced


@torch.fx.wrap
@register_notrace_function
@torch.jit.ignore
def order_for(height: int, width: int, device: torch.device) -> Tensor:
    return scan_order(height, width, DIRECTIONS, cls_index=height * width // 2, device=device)


# Of the backbone, and of its pretraining model, whose checkpoints become backbones too.
OFFICIAL_NAMES = OfficialNames(
    [
        *MIXER_NAMES,
        ("layers.{}.mlp.w1.", "blocks.{}.mlp.fc1.", 0),
        ("layers.{}.mlp.w2.", "blocks.{}.mlp.fc1.", 1),
        ("layers.{}.mlp.w3.", "blocks.{}.mlp.fc2.", None),
        ("layers.{}.", "blocks.{}.", None),
        ("norm_f.", "norm.", None),
        *((f"norm_{i + 1}.", f"skip_norms.{i}.", None) for i in range(4)),
        ("enc2dec.", "encoder_to_decoder.", None),
        ("dec_block.{}.attn2.", "decoder_blocks.{}.attn.", None),
        ("dec_block.{}.norm2_1.", "decoder_blocks.{}.norm_query.", None),
        ("dec_block.{}.norm2_2.", "decoder_blocks.{}.norm_latent.", None),
        ("dec_block.{}.norm2.", "decoder_blocks.{}.norm_mlp.", None),
        ("dec_block.{}.", "decoder_blocks.{}.", None),
        ("ar_norm.", "decoder_norm.", None),
        ("ar_pred.", "decoder_pred.", None),
        ("ar_token", "query_token", None),
        ("dec_pos_embed", "decoder_pos_embed", None),
    ],
    "https://github.com/OliverRensu/ARM",
)


class ARM(Backbone):
    """Vision backbone of Mamba mixers with a scan for each of DIRECTIONS."""

    official_names = OFFICIAL_NAMES
    keys = ("patch_embed.proj.weight", "pos_embed", "blocks.*.mixer.A_log", "blocks.*.mlp.fc1.weight")
    dynamic_img_size: Final[bool]
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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            img_size: pixels, one number or (height, width).
            patch_size: pixels of a patch.
            patch_stride: pixels between patches; None means the patch size.
            num_classes: 0 leaves the head out.
            global_pool: 'avg' (patches), 'token' (class token) or '' (all tokens).
            d_state: states per channel of the scan.
            drop_rate: dropout before the head.
            pos_drop_rate: dropout after the position embeddings.
            drop_path_rate: stochastic depth, rising linearly over the blocks.
            norm_layer: None means LayerNorm with eps 1e-5; a name or class of `timm.layers`.
            dynamic_img_size: take any image size that patch and stride tile, resampling the position embeddings.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_global_pool(global_pool)
        sizes = {"img_size": img_size, "patch_size": patch_size, "patch_stride": patch_stride, "in_chans": in_chans}
        check_positive("ARM", {**sizes, "embed_dim": embed_dim, "depth": depth, "d_state": d_state})
        norm = get_norm_layer(norm_layer) or partial(nn.LayerNorm, eps=1e-5)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.dynamic_img_size = dynamic_img_size

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + 1, embed_dim, **dd))
        order = torch.empty(len(DIRECTIONS), patches + 1, dtype=torch.long, device=device)
        self.register_buffer("order", order, persistent=False)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        # Block i has the linear rule's rate of i - 1, as in the official training: none has the full rate.
        rates = [0.0, *calculate_drop_path_rates(drop_path_rate, depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, len(DIRECTIONS), d_state, drop_path=rates[i], norm_layer=norm, **dd) for i in range(depth)
        )
        info = {"num_chs": embed_dim, "reduction": max(self.patch_embed.patch_stride)}
        self.feature_info = [{"module": f"blocks.{i}", **info} for i in range(depth)]
        self.norm = norm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.init_weights(needs_reset=False)

    def _init_own_weights(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        init_block_weights(self.blocks)
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.02)
            zero_bias(self.head)

    def init_non_persistent_buffers(self) -> None:
        """Fill the order table, which is computed and never saved."""
        self.fill_table("order", order_for(*self.patch_embed.grid_size, torch.device("cpu")))

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
        """What people want to know of the layers: their width, depth and patches."""
        embed = self.patch_embed
        patch, stride, grid = ("x".join(map(str, s)) for s in (embed.patch_size, embed.patch_stride, embed.grid_size))
        patches = f"{patch}, stride {stride}, grid {grid}"
        return {"width": str(self.embed_dim), "depth": str(len(self.blocks)), "patches": patches}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head, freshly initialised, and optionally the pooling."""
        if global_pool is not None:
            _check_global_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)
        self._init_head()

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change image or patch size; position embeddings are resampled around the class token."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        new_grid = self.patch_embed.grid_size
        if new_grid != old_grid:
            resampled = resample_pos_embed(self.pos_embed.detach(), old_grid, new_grid)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
            self.order = order_for(*new_grid, self.order.device)
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
            order = order_for(grid[0], grid[1], order.device)
        x = self.patch_embed(x)
        middle = (order.shape[1] - 1) // 2
        x = torch.cat([x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), x[:, middle:]], dim=1)
        return self.pos_drop(x + pos_embed), order

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
                taken.append(self.norm(x) if norm else x)
        middle = (order.shape[1] - 1) // 2
        prefix = [y[:, middle : middle + 1] for y in taken]
        patches = [torch.cat([y[:, :middle], y[:, middle + 1 :]], dim=1) for y in taken]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        if output_dict:
            prefixes = {"image_intermediates_prefix": prefix} if return_prefix_tokens else {}
            out = {"image_intermediates": patches, **prefixes}
            return out if intermediates_only else {**out, "image_features": self.norm(x)}
        intermediates = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for; returns the indices that remain."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
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
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """(B, N + 1, dim) tokens -> (B, dim), or the tokens themselves for ''."""
        pool_type = self.global_pool if pool_type is None else pool_type
        middle = (x.shape[1] - 1) // 2
        if pool_type == "token":
            return x[:, middle]
        if pool_type == "avg":
            return mean_around(x, middle)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> class logits, or pooled features with `pre_logits`."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @staticmethod
    def read_shapes(source: StateDict) -> tuple[dict[str, Any], int]:
        """Arguments of a model that a checkpoint fits, and the number of its patches."""
        depth = len({name.split(".")[1] for name in source if name.startswith("blocks.") and name.count(".") > 1})
        states = next(value for name, value in source.items() if name.endswith(".mixer.A_log"))
        patches, table = source["patch_embed.proj.weight"], source["pos_embed"]
        if (states.ndim, patches.ndim, table.ndim) != (3, 4, 3):
            shapes = f"{tuple(states.shape)}, {tuple(patches.shape)} and {tuple(table.shape)}"
            raise CheckpointError(
                f"this is no ARM checkpoint: A_log, patch_embed.proj.weight and pos_embed have the shapes {shapes}"
            )
        refuse_foreign_head(source)
        sizes: dict[str, Any] = {"embed_dim": table.shape[2], "depth": depth, "d_state": states.shape[2]}
        sizes |= {"patch_size": one_or_two(patches.shape[2:]), "in_chans": patches.shape[1]}
        sizes["num_classes"] = len(source.get("head.weight", ()))
        return sizes, table.shape[1] - 1


@torch.fx.wrap
@register_notrace_function
def mean_around(x: Tensor, middle: int) -> Tensor:
    """Average of the tokens before and after the class token, each half with equal weight as in the official code."""
    after = x[:, middle + 1 :].mean(dim=1)
    return after if middle == 0 else (x[:, :middle].mean(dim=1) + after) / 2


def _check_global_pool(global_pool: str) -> None:
    if global_pool not in ("avg", "token", ""):
        raise ValueError(f"global_pool must be 'avg', 'token' or '' (no pooling), got {global_pool!r}")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "crop_mode": "squash",  # resize to a square whatever the aspect ratio, then crop: the official evaluation
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        # The official repository states no licence, so its weights have none that we could name.
        "license": "unknown",
        "paper_ids": "arXiv:2406.07537",
        "paper_name": "Autoregressive Pretraining with Mamba in Vision",
        "origin_url": OFFICIAL_NAMES.origin_url,
        **kwargs,
    }


def _ours(**kwargs: Any) -> dict[str, Any]:
    return _cfg(license="apache-2.0", origin_url=None, **kwargs)


default_cfgs = entry_configs(
    {
        "arm_pico_patch2_8.arm_digits_ft_digits": _ours(
            num_classes=10,
            input_size=(1, 8, 8),
            crop_pct=1.0,
            mean=(0.305433688785187,),  # of the training split
            std=(0.3759592089586701,),
            label_names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ),
        "arm_tiny_patch4_32.arm_cifar10_ft_cifar10": _ours(
            num_classes=10,
            input_size=(3, 32, 32),
            crop_pct=1.0,
            label_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ),
        "arm_tiny_patch8_64.arm_tiny_imagenet_ft_tiny_imagenet": _ours(
            num_classes=200,
            input_size=(3, 64, 64),
            crop_pct=1.0,
            # WordNet numbers, sorted
            label_names=tuple((BUNDLED_FOLDER / "tiny_imagenet.txt").read_text(encoding="utf-8").split()),
        ),
        "arm_tiny_patch16_224.untrained": _ours(),
        "arm_small_patch16_224.untrained": _ours(),
        "arm_base_patch16_224.arm_in1k_ft_in1k": _cfg(),
        "arm_base_patch16_224.arm_in1k": _cfg(num_classes=0),
        "arm_base_patch16_224.in1k": _cfg(),
        "arm_base_patch16_384.arm_in1k_ft_in1k": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "arm_base_patch16_stride8_448.arm_in1k_ft_in1k": _cfg(input_size=(3, 448, 448), crop_pct=1.0),
        "arm_large_patch16_224.arm_in1k_ft_in1k": _cfg(),
        "arm_large_patch16_224.arm_in1k": _cfg(num_classes=0),
        "arm_large_patch16_224.in1k": _cfg(),
        "arm_large_patch16_384.arm_in1k_ft_in1k": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "arm_huge_patch16_224.arm_in1k_ft_in1k": _cfg(),
        "arm_huge_patch16_224.arm_in1k": _cfg(num_classes=0),
        "arm_huge_patch16_384.arm_in1k_ft_in1k": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
    }
)


_TINY, _SMALL = {"embed_dim": 192, "depth": 12}, {"embed_dim": 384, "depth": 12}  # ours, with the widths of DeiT
_BASE, _LARGE = {"embed_dim": 768, "depth": 12}, {"embed_dim": 1024, "depth": 24}  # the paper's, tables 1 and 2
_HUGE = {"embed_dim": 1536, "depth": 24}
SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE, "large": _LARGE, "huge": _HUGE}
register_family(
    ARM,
    {
        # ours, for 8x8 images such as scikit-learn's digits; the quickstart's model
        "arm_pico_patch2_8": {"patch_size": 2, "embed_dim": 64, "depth": 4, "d_state": 8},
        "arm_tiny_patch4_32": {"patch_size": 4, **_TINY},
        "arm_tiny_patch8_64": {"patch_size": 8, **_TINY},
        "arm_tiny_patch16_224": _TINY,
        "arm_small_patch16_224": _SMALL,
        "arm_base_patch16_224": _BASE,
        "arm_base_patch16_384": _BASE,
        "arm_base_patch16_stride8_448": {"patch_stride": 8, **_BASE},
        "arm_large_patch16_224": _LARGE,
        "arm_large_patch16_384": _LARGE,
        "arm_huge_patch16_224": _HUGE,
        "arm_huge_patch16_384": _HUGE,
    },
    short_names={f"arm_{size}": f"arm_{size}_patch16_224" for size in ("base", "large", "huge")},
)
