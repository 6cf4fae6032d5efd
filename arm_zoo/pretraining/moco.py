"""Contrastive pretraining of whole ARM and Vim backbones, as in MoCo v3 (https://arxiv.org/abs/2104.02057).

The encoder and a predictor embed one view of an image, the momentum encoder the other view. The two embeddings must
resemble each other and differ from those of other images. The momentum encoder is a slowly moving average of the
trained one.
"""

import copy
import math
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from arm_zoo.files import StateDict
from arm_zoo.layers.init import fill
from arm_zoo.layers.sizes import Device, Size, check_positive
from arm_zoo.ops.fused import at_least_float32
from arm_zoo.pretraining._registry import OBJECTIVES, Objective
from arm_zoo.pretraining._sequence import SequencePretrain, sizes_of_encoders
from arm_zoo.pretraining.decoder import sincos_pos_embed
from arm_zoo.weights.adapt import whole_backbone

START = 0.99  # the momentum when training starts; it ends at 1


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process, and how many processes train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm of features (n, dim) with the statistics of all processes' batches, which must have the same size.

    PyTorch's own SyncBatchNorm runs on GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        _, world_size = rank_and_world_size()
        return self._forward_global(x, world_size) if self.training and world_size > 1 else super().forward(x)

    @torch.compiler.disable
    def _forward_global(self: Any, x: Tensor, world_size: int) -> Tensor:
        from torch.distributed.nn.functional import all_reduce  # differentiable; takes long to import

        values, count = at_least_float32(x), world_size * len(x)
        mean = all_reduce(values.sum(0)) / count
        centred = values - mean
        variance = all_reduce(centred.square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        normed = centred * (variance + self.eps).rsqrt()
        return (normed if self.weight is None else normed * self.weight + self.bias).to(x.dtype)


def mlp(*widths: int, device: Device = None, dtype: torch.dtype | None = None) -> nn.Sequential:
    """Linear layers of these widths, without biases and each followed by a batch norm; ReLUs between them.

    The last batch norm has no parameters.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths), start=2):
        is_last = number == len(widths)
        layers += [nn.Linear(before, after, bias=False, **dd), GlobalBatchNorm(after, affine=not is_last, **dd)]
        layers += [] if is_last else [nn.ReLU()]
    return nn.Sequential(*layers)


def momentum_at(done: float) -> float:
    """The momentum when a fraction `done` of the training is over: half a cosine from START to 1."""
    return 1 - (1 - START) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def update_moving_average(momentum_encoder: nn.Module, base_encoder: nn.Module, momentum: float) -> None:
    """Move all parameters towards those of the trained encoder; buffers, such as those of batch norms, stay."""
    torch._foreach_lerp_(list(momentum_encoder.parameters()), list(base_encoder.parameters()), 1 - momentum)


def two_view_loss(
    base_encoder: nn.Module,
    momentum_encoder: nn.Module,
    predictor: nn.Module,
    views: tuple[Tensor, Tensor],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The loss of two views of n images, and how much the features of images differ; for any encoders with projectors.

    The latter is the standard deviation over all images of the momentum encoder's projections of length 1, averaged
    over channels: 1 / sqrt(channels) where all is well, 0 after a collapse. Update the momentum encoder before this.
    """
    queries = [predictor(base_encoder(view)) for view in views]
    with torch.no_grad():
        keys = [all_gathered(momentum_encoder(view)) for view in views]
        deviation = _unit_length(keys[0]).std(dim=0, correction=0).mean()
    rank, _ = rank_and_world_size()
    losses = [contrastive_loss(*pair, temperature, rank) for pair in zip(queries, keys[::-1], strict=True)]
    return losses[0] + losses[1], deviation


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float, rank: int = 0) -> Tensor:
    """2 * temperature times the cross entropy, in at least float32, of finding each image's key among all keys.

    The queries (n, dim) are those of the process with this rank; the keys (n * processes, dim) are those of all
    processes, in the order of their ranks. At chance the loss is 2 * temperature * ln(n * processes).
    """
    with nullcontext() if queries.is_meta else torch.autocast(queries.device.type, enabled=False):
        logits = _unit_length(queries) @ _unit_length(keys).T / temperature
        right = torch.arange(len(queries), device=queries.device) + len(queries) * rank
        return 2 * temperature * F.cross_entropy(logits, right)


def _unit_length(features: Tensor) -> Tensor:
    return F.normalize(at_least_float32(features), dim=1)


def all_gathered(features: Tensor) -> Tensor:
    """Features (n, dim) -> those of all processes (n * processes, dim), in the order of ranks and without gradient."""
    _, world_size = rank_and_world_size()
    return features if world_size == 1 else _gather(features, world_size)


@torch.compiler.disable
def _gather(features: Tensor, world_size: int) -> Tensor:
    parts = [torch.empty_like(features) for _ in range(world_size)]
    distributed.all_gather(parts, features.contiguous())
    return torch.cat(parts)


class MoCoPretrain(SequencePretrain):
    """MoCo v3 of a backbone with all its scans; `arm_zoo.create_pretraining_model` has the sizes.

    `base_encoder` is the backbone, with the projector as its head. As MoCo v3 advises, the patch embedding stays as it
    was initialised and is not trained; neither are the position embeddings, which are sines and cosines.
    """

    keys = ("base_encoder.blocks.*.mixer.A_log", "momentum_encoder.blocks.*.mixer.A_log", "predictor.*.weight")
    parts_to_shard = ()
    feature_std: Tensor

    def __init__(
        self,
        backbone: str = "arm",
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 16,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        temperature: float = 0.2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            backbone: the family of the encoder: arm, which averages its patches, or vim, which has a class token.
            img_size: pixels, one number or (height, width).
            patch_size: pixels of a patch.
            d_state: states per channel of the scan.
            hidden_dim: width of the hidden layers of projector and predictor.
            output_dim: width of their outputs, by which images are compared.
            temperature: the divisor of similarities.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes: dict[str, Any] = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans}
        sizes |= {"embed_dim": embed_dim, "depth": depth, "d_state": d_state}
        heads = {"hidden_dim": hidden_dim, "output_dim": output_dim}
        check_positive("MoCoPretrain", {**sizes, **heads})
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}; MoCo v3's is 0.2")
        self.config = {"backbone": backbone, **sizes, **heads, "temperature": temperature}
        self.in_chans, self.temperature = in_chans, temperature
        family: Any = self.backbone_named(backbone)
        self.base_encoder = family(num_classes=0, global_pool=family.usual_pool, **sizes, **dd)
        self.base_encoder.head = mlp(embed_dim, hidden_dim, hidden_dim, output_dim, **dd)
        self.predictor = mlp(output_dim, hidden_dim, output_dim, **dd)
        for frozen in (self.base_encoder.pos_embed, *self.base_encoder.patch_embed.parameters()):
            frozen.requires_grad_(False)
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.register_buffer("feature_std", torch.zeros((), device=device), persistent=False)
        self.init_weights(needs_reset=False)

    @property
    def patch_embed(self) -> nn.Module:
        """The patch embedding of the trained encoder."""
        return self.base_encoder.patch_embed

    def _init_own_weights(self) -> None:
        encoder: Any = self.base_encoder
        encoder._init_own_weights()
        rows, columns = encoder.patch_embed.grid_size
        table = sincos_pos_embed(encoder.embed_dim, rows, columns, device=encoder.pos_embed.device)
        middle = table.shape[1] // 2  # the class token stands there and has no position
        fill(encoder.pos_embed, torch.cat([table[:, :middle], 0 * table[:, :1], table[:, middle:]], dim=1))
        for moving, parameter in zip(self.momentum_encoder.parameters(), encoder.parameters(), strict=True):
            fill(moving, parameter)

    def init_non_persistent_buffers(self) -> None:
        """Fill the encoders' order tables, and the deviation of features with 0, as it is not known yet."""
        self.fill_table("feature_std", torch.zeros(()))
        for encoder in (self.base_encoder, self.momentum_encoder):
            encoder.init_non_persistent_buffers()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of every block of the trained encoder in the backward pass."""
        self.base_encoder.set_grad_checkpointing(enable)

    def forward_encoder(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> features (B, embed_dim) of the trained encoder."""
        return self.base_encoder.forward_head(self.base_encoder.forward_features(images), pre_logits=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(2 N, C, H, W) images, first one view of N images and then the other -> loss, deviation of features.

        Training must call `update_momentum_encoder` before each step. See `two_view_loss`.
        """
        first, second = images.unflatten(0, (2, -1)).unbind(0)
        encoders = self.base_encoder, self.momentum_encoder, self.predictor
        loss, deviation = two_view_loss(*encoders, (first, second), self.temperature)
        self.feature_std.copy_(deviation)
        return loss, deviation

    def update_momentum_encoder(self, done: float) -> None:
        """Move the momentum encoder towards the trained one, when a fraction `done` of the training is over."""
        update_moving_average(self.momentum_encoder, self.base_encoder, momentum_at(done))

    def loss_at_chance(self, images: int) -> float:
        """The loss of features that say nothing about their images, of which all processes together have this many."""
        return 4 * self.temperature * math.log(images)

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], int | None]:
        """See `ZooModel.read_shapes`. Shapes do not tell the temperature."""
        encoder = whole_backbone(source)
        name = cls.name_of_backbone(encoder)
        sizes, patches = cls.backbones[name].read_shapes(encoder)
        del sizes["num_classes"]
        hidden_dim, output_dim = source["predictor.0.weight"].shape
        return {"backbone": name, **sizes, "hidden_dim": hidden_dim, "output_dim": output_dim}, patches

    def answers(self, images: Tensor) -> dict[str, Tensor]:
        """The encoder's features and their projections."""
        features = self.forward_encoder(images)
        return {"features": features, "projections": self.base_encoder.head(features)}


OBJECTIVES["moco"] = Objective(
    MoCoPretrain,
    sizes_of_encoders({"pico": {"hidden_dim": 256, "output_dim": 64}}),
    description="an encoder, its moving average, and the heads by which they compare two views of an image",
    outputs="loss, deviation",
)
