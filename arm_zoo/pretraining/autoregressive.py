"""ARM's autoregressive pretraining: an encoder scans an image in clusters of patches, and a decoder predicts the next.

See section 3.2.2 of the paper. A cluster is 64x64 pixels by default. The encoder has the backbone's blocks with one
causal scan over the clusters. The decoder's queries know only their own position; they attend to the features of all
earlier clusters and predict the normalised pixels of their own. The arguments of the model include the switches of the
paper's ablations (tables 4 to 7): cluster size, order of prediction, decoder and target.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.files import StateDict
from arm_zoo.layers.block import init_block_weights, run_blocks
from arm_zoo.layers.init import fill
from arm_zoo.layers.order import ORDERS, cluster_order, in_order, sorted_clusters
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.layers.sizes import Device, Pair, Size, check_positive, nearest_multiple, one_or_two
from arm_zoo.models import arm
from arm_zoo.ops.fused import at_least_float32, is_plain_layer, run_norm
from arm_zoo.pretraining._registry import OBJECTIVES, Objective
from arm_zoo.pretraining._sequence import ENCODER_KEYS, SequencePretrain, sizes_of_encoders
from arm_zoo.pretraining.decoder import HEAD_DIM, DecoderBlock, sincos_pos_embed
from arm_zoo.pretraining.noise import drawn_seeds, noise
from arm_zoo.pretraining.targets import NORMED_PIXEL, PIXEL_TARGETS, patchify, statistics, unpatchify

_TAPS = 4
_DIRECTIONS = 1  # the encoder scans once, as its tokens already lie in the order of `cluster_order`
RANDOM = "random"  # a new order of clusters for every image
PREDICTION_ORDERS = (*(f"{name}{way}" for name in ORDERS for way in ("", "_reversed")), RANDOM)
DVAE_TOKENS = "dvae_tokens"
TARGETS = (*PIXEL_TARGETS, DVAE_TOKENS)
DVAE_VOCABULARY = 8192  # of the published dVAE


class ARMPretrain(SequencePretrain):
    """Autoregressive pretraining of an ARM or a Vim encoder; `arm_zoo.create_pretraining_model` has the sizes."""

    official_names = arm.ARM.official_names
    keys = (*ENCODER_KEYS, "encoder_to_decoder.weight", "query_token", "decoder_blocks.*.norm_query.weight")
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
        prediction_order: str = "row",
        target: str = NORMED_PIXEL,
        vocab_size: int | None = None,
        backbone: str = "arm",
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
            prediction_order: of the clusters: row, column, row_reversed, column_reversed, or random, which draws an
                order for every image in `forward` and means row where results must not be random.
            target: what is predicted for each patch: normed_pixel, pixel or dvae_tokens. The last are what `forward`
                takes as `tokens`.
            vocab_size: how many different tokens the dVAE has, for target dvae_tokens only; None means 8192.
            backbone: the family of the encoder, arm or vim.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = {"img_size": img_size, "patch_size": patch_size, "cluster_size": cluster_size}
        self.config |= {"in_chans": in_chans, "embed_dim": embed_dim, "depth": depth, "d_state": d_state}
        self.config |= {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth, "vocab_size": vocab_size}
        check_positive("ARMPretrain", self.config, optional=("vocab_size",))
        self.config |= {"prediction_order": prediction_order, "target": target, "backbone": backbone}
        family: Any = self.backbone_named(backbone)
        _check_sizes(to_2tuple(img_size), to_2tuple(patch_size), to_2tuple(cluster_size), decoder_dim)
        pixels = math.prod(to_2tuple(patch_size)) * in_chans
        _check_switches(prediction_order, target, vocab_size, pixels)
        self.in_chans, self.target, self.prediction_order = in_chans, target, prediction_order
        self.patch_size: Pair = to_2tuple(patch_size)
        rows, columns = to_2tuple(cluster_size)
        self.cluster_grid = (rows // self.patch_size[0], columns // self.patch_size[1])
        self.cluster_tokens = self.cluster_grid[0] * self.cluster_grid[1]

        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans=in_chans, embed_dim=embed_dim, factory="create_pretraining_model", **dd
        )
        patches = self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, patches, embed_dim, **dd), requires_grad=False)
        block = partial(family.make_block, embed_dim, _DIRECTIONS, d_state, family.default_norm)
        self.blocks = nn.ModuleList(block(**dd) for _ in range(depth))
        self.float32_residual = family.float32_residual
        # blocks (counted from 1) whose outputs the decoder sees: depth / 2, 2 / 3, 5 / 6 and depth, rounded
        self.taps = tuple((depth * sixths + 3) // 6 for sixths in (3, 4, 5, 6))
        self.skip_norms = nn.ModuleList(nn.LayerNorm(embed_dim, **dd) for _ in range(_TAPS))
        self.encoder_to_decoder = nn.Linear(_TAPS * embed_dim, decoder_depth * decoder_dim, **dd)

        self.query_token = nn.Parameter(torch.empty(1, 1, decoder_dim, **dd))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, patches, decoder_dim, **dd), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(decoder_dim, **dd) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, **dd)
        self.vocab_size = (vocab_size or DVAE_VOCABULARY) if target == DVAE_TOKENS else None
        self.decoder_pred = nn.Linear(decoder_dim, self.vocab_size or pixels, **dd)

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
        name = "row" if self.prediction_order == RANDOM else self.prediction_order
        self.fill_table("order", cluster_order(*self.patch_embed.grid_size, *self.cluster_grid, name, device="cpu"))
        cluster = torch.arange(len(self.decoder_mask), device="cpu") // self.cluster_tokens
        # query of cluster j + 1 sees the latents of clusters 0..j
        self.fill_table("decoder_mask", cluster[:, None] >= cluster)

    def forward_encoder(self, images: Tensor, order: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> latents (B, T, decoder_dim, decoder_depth) in cluster order, without the last cluster.

        `order` (B, N) gives each image a cluster order of its own, in place of the model's.
        """
        order = self.order if order is None else order
        x = in_order(self.patch_embed(images) + self.pos_embed, order[..., : -self.cluster_tokens])
        x = at_least_float32(x) if self.float32_residual else x
        outputs = run_blocks(self.blocks, x, None, self.taps, self.grad_checkpointing)
        taps = zip(self.skip_norms, self.taps, strict=True)
        normed = [run_norm(norm, outputs[tap]) for norm, tap in taps]
        skips = torch.cat(normed, dim=-1)
        # the layers' slices are interleaved: feature q * decoder_depth + k is channel q of decoder layer k
        layer, depth = self.encoder_to_decoder, len(self.decoder_blocks)
        if not is_plain_layer(layer, nn.Linear):
            return layer(skips).unflatten(-1, (-1, depth))
        # computed layer by layer, so that the norm of each decoder layer reads contiguous memory
        weight, bias = (t.unflatten(0, (-1, depth)).transpose(0, 1).flatten(0, 1) for t in (layer.weight, layer.bias))
        return F.linear(skips, weight, bias).unflatten(-1, (depth, -1)).transpose(-1, -2)

    def forward_decoder(self, latent: Tensor, order: Tensor | None = None) -> Tensor:
        """Latents -> predictions (B, T, pixels or vocabulary) for the patches of all clusters but the first.

        They are in cluster order; `order` is as in `forward_encoder`.
        """
        query = self._predicted(self.query_token + self.decoder_pos_embed, order)
        for k, block in enumerate(self.decoder_blocks):
            query = block(query, latent[..., k], self.decoder_mask)
        return self.decoder_pred(self.decoder_norm(query))

    def forward(
        self, images: Tensor, seeds: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) images -> (loss, prediction, target).

        The loss is computed in at least float32 (paper, table 7): the mean squared error against the patches' pixels,
        normalised or plain, or the cross entropy against the dVAE's `tokens` (B, N) of all patches, row by row. The
        prediction is (B, T, pixels or vocabulary), the target (B, T, pixels) or (B, T), in cluster order without the
        first cluster.

        `seeds` (B,), int64, decide the random order of each image; by default PyTorch's generator draws them.
        """
        order = self.random_orders(images, seeds) if self.prediction_order == RANDOM else None
        prediction = self.forward_decoder(self.forward_encoder(images, order), order)
        exact = at_least_float32(prediction)
        if self.target == DVAE_TOKENS:
            target = self._predicted(self._checked(tokens)[..., None], order)[..., 0]
            return F.cross_entropy(exact.flatten(0, 1), target.flatten()), prediction, target
        patches = self._predicted(patchify(images.detach(), self.patch_size), order)  # constants for autograd
        target = PIXEL_TARGETS[self.target](at_least_float32(patches))
        return F.mse_loss(exact.to(target.dtype), target), prediction, target

    def random_orders(self, images: Tensor, seeds: Tensor | None = None) -> Tensor:
        """A random cluster order for each image, (B, N); `seeds` are as in `forward`."""
        seeds = drawn_seeds(images) if seeds is None else seeds
        return sorted_clusters(self.order, noise(seeds, len(self.order) // self.cluster_tokens))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in which all clusters but the first, in the model's order, are predictions.

        Normalised predictions are scaled by the mean and deviation of the true patches. ValueError for a model that
        predicts tokens.
        """
        if self.target == DVAE_TOKENS:
            raise ValueError("the model predicts tokens of a dVAE, not pixels; there is nothing to draw")
        prediction = self.forward_decoder(self.forward_encoder(images)).to(images.dtype)
        patches = patchify(images, self.patch_size).clone()
        if self.target == NORMED_PIXEL:
            mean, deviation = statistics(self._predicted(patches))
            prediction = prediction * deviation + mean
        patches[:, self.order[self.cluster_tokens :]] = prediction
        return unpatchify(patches, self.patch_size, self.patch_embed.grid_size)

    @torch.jit.ignore
    def official_extras(self) -> StateDict:
        """The decoder's mask as numbers that attention adds to its scores: 0 or minus infinity."""
        visible = self.decoder_mask
        return {"mask": torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -math.inf)}

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], int]:
        """See `ZooModel.read_shapes`. The official mask tells the cluster size; without it 4x4 patches are assumed."""
        encoder, patches = cls.read_encoder(source)
        patch = to_2tuple(encoder["patch_size"])
        mask = source.get("mask")  # saved by the official code; it has a row for each patch but those of one cluster
        side = 4 if mask is None else math.isqrt(max(patches - len(mask), 0))
        arguments = {
            **encoder,
            "cluster_size": one_or_two((side * patch[0], side * patch[1])),
            "decoder_dim": source["query_token"].shape[-1],
            "decoder_depth": len({name.split(".")[1] for name in source if name.startswith("decoder_blocks.")}),
        }
        outputs = len(source["decoder_pred.weight"])
        if outputs != math.prod(patch) * encoder["in_chans"]:
            arguments |= {"target": DVAE_TOKENS, "vocab_size": outputs}
        return arguments, patches

    def shown(self, images: Tensor) -> Tensor:
        """The index (B, 1), row by row, of the only cluster that `reconstruct` does not predict: the first one."""
        (height, width), columns = self.cluster_grid, self.patch_embed.grid_size[1]
        row, column = divmod(int(self.order[0]), columns)
        return torch.tensor([[row // height * (columns // width) + column // width]]).expand(len(images), 1)

    def _predicted(self, patches: Tensor, order: Tensor | None = None) -> Tensor:
        """The patches to be predicted, in cluster order: those of all clusters but the first."""
        return in_order(patches, (self.order if order is None else order)[..., self.cluster_tokens :])

    def _checked(self, tokens: Tensor | None) -> Tensor:
        """The dVAE's tokens (B, N); ValueError unless there is one for every patch."""
        patches = self.patch_embed.num_patches
        if tokens is None or tokens.shape[1:] != (patches,):
            came = "none" if tokens is None else f"{tuple(tokens.shape)}"
            raise ValueError(f"target {DVAE_TOKENS} takes tokens (batch, {patches}) beside the images, got {came}")
        return tokens

    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """The latents that the decoder gets, and its predictions."""
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


def _check_switches(order: str, target: str, vocab_size: int | None, pixels: int) -> None:
    for name, value, allowed in (("prediction_order", order, PREDICTION_ORDERS), ("target", target, TARGETS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
    if vocab_size is not None and target != DVAE_TOKENS:
        raise ValueError(f"vocab_size {vocab_size} goes with target {DVAE_TOKENS}, not with {target}; leave it out")
    if target == NORMED_PIXEL and pixels == 1:
        raise ValueError("a patch of a single value cannot be normalised; choose target pixel, or a larger patch_size")


OBJECTIVES["autoregressive"] = Objective(
    ARMPretrain,
    sizes_of_encoders({"pico": {"cluster_size": 4}}),
    description="a causal encoder and the decoder that predicts the next part of an image from it",
    outputs="loss, prediction, target",
)
