"""Masked autoencoding (MAE, https://arxiv.org/abs/2111.06377) of ARM and Vim encoders.

Most patches of every image are masked. The encoder sees only the others, in row order, through all the scans of
finetuning or through one. A decoder of ViT blocks gets a mask token in place of each masked patch and predicts its
pixels.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import checkpoint
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn

from arm_zoo.files import StateDict
from arm_zoo.layers.block import init_block_weights, run_blocks
from arm_zoo.layers.init import fill
from arm_zoo.layers.order import visible_order
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.layers.sizes import Device, Size, check_positive, nearest_multiple
from arm_zoo.ops.fused import at_least_float32, run_norm
from arm_zoo.pretraining._registry import OBJECTIVES, Objective
from arm_zoo.pretraining._sequence import ENCODER_KEYS, SequencePretrain, sizes_of_encoders
from arm_zoo.pretraining.decoder import sincos_pos_embed
from arm_zoo.pretraining.noise import drawn_seeds, noise
from arm_zoo.pretraining.targets import normalised, patchify, statistics, unpatchify

_HEAD_DIM = 32  # of the published decoder: 512 channels, 16 heads


class MAEPretrain(SequencePretrain):
    """Masked autoencoding of an encoder; `arm_zoo.create_pretraining_model(NAME, "mae")` has the sizes.

    The encoder has the parts of its family's backbones, under the same names, but no head. Vim's class token stands
    in the middle of the visible patches; ARM has none before finetuning.
    """

    keys = (*ENCODER_KEYS, "decoder_embed.weight", "mask_token", "decoder_blocks.*.attn.qkv.weight")
    parts_to_shard = ("blocks", "decoder_blocks")

    def __init__(
        self,
        backbone: str = "arm",
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 16,
        one_scan: bool = False,
        mask_ratio: float = 0.75,
        normed_pixels: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            backbone: the family of the encoder, arm or vim.
            img_size: pixels, one number or (height, width).
            patch_size: pixels of a patch.
            d_state: states per channel of the scan.
            one_scan: scan in row order only, which is cheaper, instead of in all directions of the backbone.
            mask_ratio: the fraction of patches that is masked; the number of visible ones is rounded down.
            normed_pixels: predict pixels normalised by the mean and deviation of their patch instead of plain ones.
            decoder_dim: width of the decoder, a multiple of 4 and of its heads.
            decoder_heads: attention heads; None means one for 32 channels, as the published decoder has.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim}
        sizes |= {"depth": depth, "d_state": d_state, "decoder_dim": decoder_dim, "decoder_depth": decoder_depth}
        self.config = {"backbone": backbone, **sizes, "decoder_heads": decoder_heads, "one_scan": one_scan}
        self.config |= {"mask_ratio": mask_ratio, "normed_pixels": normed_pixels}
        family: Any = self.backbone_named(backbone)
        check_positive("MAEPretrain", {**sizes, "decoder_heads": decoder_heads}, optional=("decoder_heads",))
        for name, switch in (("one_scan", one_scan), ("normed_pixels", normed_pixels)):
            if not isinstance(switch, bool):  # text such as "no" would count as true
                raise ValueError(f"{name} must be true or false, got {switch!r}")
        if not isinstance(mask_ratio, int | float):
            raise ValueError(f"mask_ratio must be a number between 0 and 1, got {mask_ratio!r}")
        heads = decoder_heads or max(1, decoder_dim // _HEAD_DIM)
        if decoder_dim % (unit := math.lcm(4, heads)):  # 4: for its position embeddings
            raise ValueError(
                f"decoder_dim {decoder_dim} with {heads} heads must be a multiple of {unit}, "
                f"for example {nearest_multiple(decoder_dim, unit)}"
            )
        self.in_chans, self.normed_pixels = in_chans, normed_pixels
        self.directions: Sequence[str] = family.directions[:1] if one_scan else family.directions
        self.float32_residual = family.float32_residual

        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans=in_chans, embed_dim=embed_dim, factory="create_pretraining_model", **dd
        )
        patches = self.patch_embed.num_patches
        self.kept_patches = int(patches * (1 - mask_ratio))
        if not 0 < self.kept_patches < patches:
            raise ValueError(
                f"mask_ratio {mask_ratio} of {patches} patches keeps {self.kept_patches}; from 1 to {patches - 1} can "
                "be kept, for example with mask_ratio 0.5"
            )
        has_token = family.usual_pool == "token"
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if has_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, patches, embed_dim, **dd), requires_grad=False)
        norm = family.default_norm
        block = partial(family.make_block, embed_dim, len(self.directions), d_state, norm)
        self.blocks = nn.ModuleList(block(**dd) for _ in range(depth))
        self.norm = norm(embed_dim, **dd)

        vit_norm = partial(nn.LayerNorm, eps=1e-6)
        vit_block = partial(ViTBlock, decoder_dim, heads, qkv_bias=True, norm_layer=vit_norm)  # type: ignore[arg-type]
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim, **dd)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim, **dd))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, patches, decoder_dim, **dd), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(vit_block(**dd) for _ in range(decoder_depth))
        self.decoder_norm = vit_norm(decoder_dim, **dd)
        height, width = self.patch_embed.patch_size
        self.decoder_pred = nn.Linear(decoder_dim, height * width * in_chans, **dd)
        self.init_weights(needs_reset=False)

    def _init_own_weights(self) -> None:
        grid = self.patch_embed.grid_size
        for table in (self.pos_embed, self.decoder_pos_embed):
            fill(table, sincos_pos_embed(table.shape[-1], *grid, device=table.device))
        for token in (self.mask_token, self.cls_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        init_block_weights(self.blocks)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)

    def kept(self, seeds: Tensor) -> Tensor:
        """The indices (B, K) of the visible patches, ascending, as decided by each image's seed (B,), int64."""
        return lowest(noise(seeds, self.patch_embed.num_patches), self.kept_patches)

    def forward_encoder(self, images: Tensor, kept: Tensor) -> Tensor:
        """(B, C, H, W) images and the indices (B, K) of their visible patches -> normed tokens (B, K, dim).

        If there is a class token, it stands in their middle, at K // 2, and there are K + 1.
        """
        x = self.patch_embed(images) + self.pos_embed
        x = torch.take_along_dim(x, kept[..., None], dim=1)
        middle = None
        if self.cls_token is not None:
            middle = kept.shape[1] // 2
            x = torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1).to(x.dtype), x[:, middle:]], dim=1)
        x = at_least_float32(x) if self.float32_residual else x
        order = visible_order(kept, *self.patch_embed.grid_size, self.directions, middle)
        last = len(self.blocks)
        return run_norm(self.norm, run_blocks(self.blocks, x, order, (last,), self.grad_checkpointing)[last])

    def forward_decoder(self, latent: Tensor, kept: Tensor) -> Tensor:
        """What `forward_encoder` gives -> predicted pixels (B, N, pixels) of all patches, row by row."""
        x = self.decoder_embed(latent)
        tokens: list[Tensor] = []
        if self.cls_token is not None:
            middle = kept.shape[1] // 2
            tokens, x = [x[:, middle : middle + 1]], torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)
        patches = self.mask_token.to(x.dtype).expand(len(x), self.patch_embed.num_patches, -1)
        patches = patches.scatter(1, kept[..., None].expand(x.shape), x)
        x = torch.cat([*tokens, patches + self.decoder_pos_embed], dim=1)
        for block in self.decoder_blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return self.decoder_pred(self.decoder_norm(x[:, len(tokens) :]))

    def forward(self, images: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) images -> (loss, prediction, mask).

        `seeds` (B,), int64, decide which patches of each image are visible; by default PyTorch's generator draws them.
        The prediction is (B, N, pixels), row by row; the mask (B, N) is 1 where a patch is masked. The loss, in at
        least float32, is the mean squared error over the masked patches.
        """
        kept = self.kept(drawn_seeds(images) if seeds is None else seeds)
        prediction = self.forward_decoder(self.forward_encoder(images, kept), kept)
        mask = mask_of(kept, self.patch_embed.num_patches)
        return masked_loss(prediction, self.target(images), mask), prediction, mask

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted for all patches, (B, N, pixels), in at least float32."""
        patches = at_least_float32(patchify(images.detach(), self.patch_embed.patch_size))  # constants for autograd
        return normalised(patches) if self.normed_pixels else patches

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in which all patches but those of `shown` are predictions.

        Normalised predictions are scaled by the mean and deviation of the true patches.
        """
        kept = self.shown(images)
        prediction = self.forward_decoder(self.forward_encoder(images, kept), kept).to(images.dtype)
        patches = patchify(images, self.patch_embed.patch_size)
        if self.normed_pixels:
            mean, deviation = statistics(patches)
            prediction = prediction * deviation + mean
        is_missing = mask_of(kept, patches.shape[1])[..., None] > 0
        patches = torch.where(is_missing, prediction, patches)
        return unpatchify(patches, self.patch_embed.patch_size, self.patch_embed.grid_size)

    def shown(self, images: Tensor) -> Tensor:
        """The visible patches (B, K) where results must not be random: each image's place in the batch is its seed."""
        return self.kept(torch.arange(len(images), device=images.device))

    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """The encoder's tokens of the visible patches, and the predictions."""
        kept = self.shown(images)
        features = self.forward_encoder(images, kept)
        return {"features": features, "prediction": self.forward_decoder(features, kept)}

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], int]:
        """See `ZooModel.read_shapes`. Shapes do not tell the mask ratio, the target and the heads."""
        encoder, patches = cls.read_encoder(source)
        scans = next(len(value) for key, value in source.items() if key.endswith(".A_log"))
        arguments = {
            **encoder,
            "one_scan": scans == 1,
            "decoder_dim": source["mask_token"].shape[-1],
            "decoder_depth": len({key.split(".")[1] for key in source if key.startswith("decoder_blocks.")}),
        }
        return arguments, patches


def lowest(noise: Tensor, count: int) -> Tensor:
    """The indices (B, count) of the lowest numbers in each row of (B, N), in ascending order."""
    return noise.argsort(dim=1)[:, :count].sort(dim=1).values


def mask_of(kept: Tensor, patches: int) -> Tensor:
    """The mask (B, N): 0 for the visible patches, whose indices are `kept` (B, K), and 1 for the others."""
    return torch.ones(len(kept), patches, device=kept.device).scatter(1, kept, 0.0)


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of patches (B, N, pixels) where the mask (B, N) is 1."""
    errors = (prediction.to(target.dtype) - target).square().mean(-1)
    return (errors * mask).sum() / mask.sum()


_DECODERS = {"pico": {"decoder_dim": 64, "decoder_depth": 2}, "tiny": {"decoder_dim": 256, "decoder_depth": 4}}
OBJECTIVES["mae"] = Objective(
    MAEPretrain,
    sizes_of_encoders(_DECODERS),
    description="an encoder of a part of the patches and the decoder that predicts the others from it",
    outputs="loss, prediction, mask",
)
