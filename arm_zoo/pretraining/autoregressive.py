"""The pretraining model: the backbone's blocks with one causal scan, and a decoder that predicts the next cluster.

Paper, section 3.2.2. Clusters of patches (64x64 pixels by default) are scanned in row order; for all but the first,
queries that know only their position attend to the features of those before and predict its normalised pixels.
"""

import math
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.files import StateDict
from arm_zoo.layers.block import Block, init_block_weights, run_blocks
from arm_zoo.layers.init import fill
from arm_zoo.layers.order import cluster_order
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.layers.sizes import Device, Pair, Size, check_positive, nearest_multiple, one_or_two
from arm_zoo.models.arm import ARM, SIZES
from arm_zoo.pretraining._registry import OBJECTIVES, Objective, PretrainingModel
from arm_zoo.pretraining.decoder import HEAD_DIM, DecoderBlock, sincos_pos_embed
from arm_zoo.pretraining.targets import patchify, statistics, unpatchify
from arm_zoo.weights.adapt import sincos_grid

_TAPS = 4
_DIRECTIONS = 1  # of scans, over tokens as `cluster_order` lays them


class ARMPretrain(PretrainingModel):
    """Autoregressive pretraining of an ARM encoder; `arm_zoo.create_pretraining_model` has the sizes."""

    backbone = ARM
    official_names = ARM.official_names
    keys = (*ARM.keys, "encoder_to_decoder.weight", "query_token", "decoder_blocks.*.norm_query.weight")
    parts_to_shard = ("blocks", "decoder_blocks")
    order: Tensor
    decoder_mask: Tensor

    def __init__(
        self,
        img_size: Size = 192,
        patch_size: Size = 16,
        cluster_size: Size = 64,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 16,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            img_size: pixels, one number or (height, width).
            patch_size: pixels of a patch.
            cluster_size: pixels of a cluster, the unit of prediction.
            d_state: states per channel of the scan.
            decoder_dim: width of the decoder, a multiple of 64.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = {"img_size": img_size, "patch_size": patch_size, "cluster_size": cluster_size}
        self.config |= {"in_chans": in_chans, "embed_dim": embed_dim, "depth": depth, "d_state": d_state}
        self.config |= {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth}
        check_positive("ARMPretrain", self.config)
        _check_sizes(to_2tuple(img_size), to_2tuple(patch_size), to_2tuple(cluster_size), decoder_dim)
        self.in_chans = in_chans
        self.patch_size: Pair = to_2tuple(patch_size)
        rows, columns = to_2tuple(cluster_size)
        self.cluster_grid = (rows // self.patch_size[0], columns // self.patch_size[1])
        self.cluster_tokens = self.cluster_grid[0] * self.cluster_grid[1]

        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans=in_chans, embed_dim=embed_dim, factory="create_pretraining_model", **dd
        )
        patches = self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, patches, embed_dim, **dd), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, _DIRECTIONS, d_state, **dd) for _ in range(depth))
        # blocks (counted from 1) whose outputs the decoder sees: depth / 2, 2 / 3, 5 / 6 and depth, rounded
        self.taps = tuple((depth * sixths + 3) // 6 for sixths in (3, 4, 5, 6))
        self.skip_norms = nn.ModuleList(nn.LayerNorm(embed_dim, **dd) for _ in range(_TAPS))
        self.encoder_to_decoder = nn.Linear(_TAPS * embed_dim, decoder_depth * decoder_dim, **dd)

        self.query_token = nn.Parameter(torch.empty(1, 1, decoder_dim, **dd))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, patches, decoder_dim, **dd), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(decoder_dim, **dd) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, **dd)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch_size[0] * self.patch_size[1] * in_chans, **dd)

        tokens = patches - self.cluster_tokens
        self.register_buffer("order", torch.empty(patches, dtype=torch.long, device=device), persistent=False)
        mask = torch.empty(tokens, tokens, dtype=torch.bool, device=device)
        self.register_buffer("decoder_mask", mask, persistent=False)
        self.init_weights(needs_reset=False)

    def _init_own_weights(self) -> None:
        grid = self.patch_embed.grid_size
        for table in (self.pos_embed, self.decoder_pos_embed):
            fill(table, sincos_pos_embed(table.shape[-1], *grid, device=table.device))
        nn.init.normal_(self.query_token, std=0.02)
        init_block_weights(self.blocks)
        for module in self.decoder_blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.encoder_to_decoder.bias)
        nn.init.zeros_(self.decoder_pred.bias)

    def init_non_persistent_buffers(self) -> None:
        """Fill the cluster order and the decoder's mask, which are computed and never saved."""
        self.fill_table("order", cluster_order(*self.patch_embed.grid_size, *self.cluster_grid, device="cpu"))
        cluster = torch.arange(len(self.decoder_mask), device="cpu") // self.cluster_tokens
        # query of cluster j + 1 sees the latents of clusters 0..j
        self.fill_table("decoder_mask", cluster[:, None] >= cluster)

    def forward_encoder(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> latents (B, T, decoder_dim, decoder_depth) in cluster order, without the last cluster."""
        x = self.patch_embed(images) + self.pos_embed
        x = x[:, self.order[: -self.cluster_tokens]]
        outputs = run_blocks(self.blocks, x, None, self.taps, self.grad_checkpointing)
        normed = [norm(outputs[tap]) for norm, tap in zip(self.skip_norms, self.taps, strict=True)]
        skips = torch.cat(normed, dim=-1)
        # the layers' slices are interleaved: feature q * decoder_depth + k is channel q of decoder layer k
        return self.encoder_to_decoder(skips).unflatten(-1, (-1, len(self.decoder_blocks)))

    def forward_decoder(self, latent: Tensor) -> Tensor:
        """Latents -> predicted normalised patches (B, T, pixels) of all clusters but the first, in cluster order."""
        query = (self.query_token + self.decoder_pos_embed)[:, self.order[self.cluster_tokens :]]
        query = query.expand(latent.shape[0], -1, -1)
        for k, block in enumerate(self.decoder_blocks):
            query = block(query, latent[..., k], self.decoder_mask)
        return self.decoder_pred(self.decoder_norm(query))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) images -> (loss, prediction, target).

        The loss is the mean squared error against pixels normalised per patch (paper, table 7), in at least float32;
        prediction and target are (B, T, pixels), in cluster order without the first cluster.
        """
        prediction = self.forward_decoder(self.forward_encoder(images))
        patches = self._predicted(patchify(images.detach(), self.patch_size))  # constants for autograd
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        mean, deviation = statistics(patches)
        target = (patches - mean) / deviation
        return F.mse_loss(prediction.to(target.dtype), target), prediction, target

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) with all clusters but the first as predicted, with the targets' mean and deviation."""
        prediction = self.forward_decoder(self.forward_encoder(images))
        patches = patchify(images, self.patch_size).clone()
        mean, deviation = statistics(self._predicted(patches))
        patches[:, self.order[self.cluster_tokens :]] = prediction.to(images.dtype) * deviation + mean
        return unpatchify(patches, self.patch_size, self.patch_embed.grid_size)

    @torch.jit.ignore
    def official_extras(self) -> StateDict:
        """The decoder's mask as numbers that attention adds."""
        visible = self.decoder_mask
        return {"mask": torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -math.inf)}

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], int]:
        """As `ZooModel.read_shapes`; the cluster size is read from the official mask, else it is 4x4 patches."""
        sizes, patches = cls.backbone.read_shapes(source)
        del sizes["num_classes"]
        patches += 1  # for a backbone, one is the class token
        patch, grid = to_2tuple(sizes["patch_size"]), sincos_grid(source["pos_embed"])
        mask = source.get("mask")  # which the official model saves; it leaves one cluster out
        side = 4 if mask is None else math.isqrt(max(patches - len(mask), 0))
        arguments = {
            **({"img_size": one_or_two((grid[0] * patch[0], grid[1] * patch[1]))} if grid else {}),
            "cluster_size": one_or_two((side * patch[0], side * patch[1])),
            **sizes,
            "decoder_dim": source["query_token"].shape[-1],
            "decoder_depth": len({name.split(".")[1] for name in source if name.startswith("decoder_blocks.")}),
        }
        return arguments, patches

    def _predicted(self, patches: Tensor) -> Tensor:
        """Those of all clusters but the first, in cluster order."""
        return patches[:, self.order[self.cluster_tokens :]]

    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """The decoder's latents, and the predictions."""
        features = self.forward_encoder(images)
        return {"features": features, "prediction": self.forward_decoder(features)}


def _check_sizes(img_size: Pair, patch_size: Pair, cluster_size: Pair, decoder_dim: int) -> None:
    for name, whole, part_name, part in (
        ("cluster_size", cluster_size, "patch_size", patch_size),
        ("img_size", img_size, "cluster_size", cluster_size),
    ):
        if whole[0] % part[0] or whole[1] % part[1]:
            fitting = tuple(nearest_multiple(size, unit) for size, unit in zip(whole, part, strict=True))
            raise ValueError(f"{name} {whole} must be a multiple of {part_name} {part}, for example {fitting}")
    if img_size == cluster_size:
        raise ValueError(f"img_size {img_size} holds a single cluster {cluster_size}; there is no next one to predict")
    if decoder_dim % HEAD_DIM:
        raise ValueError(
            f"decoder_dim must be a multiple of {HEAD_DIM} (the size of a head), got {decoder_dim}; "
            f"for example {nearest_multiple(decoder_dim, HEAD_DIM)}"
        )


_PICO = {"embed_dim": 64, "depth": 4, "d_state": 8, "img_size": 8, "patch_size": 2, "cluster_size": 4, "in_chans": 1}
OBJECTIVES["autoregressive"] = Objective(
    ARMPretrain,
    {"arm_pico": _PICO, **{f"arm_{name}": size for name, size in SIZES.items()}},
    description="a causal encoder and the decoder that predicts the next part of an image from it",
    outputs="loss, prediction, target",
)
