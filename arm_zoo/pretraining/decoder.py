"""The decoder of pretraining: fixed position tables, and blocks whose queries attend to the encoder's latents."""

from typing import Any

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.layers.sizes import Device, nearest_multiple

HEAD_DIM = 64


def sincos_pos_embed(dim: int, height: int, width: int, device: Device = None) -> Tensor:
    """Fixed position embeddings (1, height * width, dim): sines and cosines of the column, then of the row."""
    if dim % 4:
        raise ValueError(
            f"a sine-cosine position table needs a width that is a multiple of 4, got {dim}; "
            f"for example {nearest_multiple(dim, 4)}"
        )
    # by NumPy as in the official code: PyTorch's float32 power has another last bit, 1.4e-6 in the embeddings
    frequencies = torch.from_numpy(1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float32) / (dim / 4.0)))
    sides = (torch.arange(side, dtype=torch.float32, device=device) for side in (height, width))
    row, column = torch.cartesian_prod(*sides).unbind(1)
    halves = [position[:, None] * frequencies.to(position.device) for position in (column, row)]
    return torch.cat([part for half in halves for part in (half.sin(), half.cos())], dim=1)[None]


class CrossAttention(nn.Module):
    """Queries (B, T, dim), or (1, T, dim) for all images, attend to latents (B, T, dim) where a mask (T, T) is true.

    The heads have 64 channels.
    """

    def __init__(self, dim: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, query: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        key, value = self.kv(latent).chunk(2, dim=-1)
        queries = self.q(query).expand(latent.shape[0], -1, -1)
        q, k, v = (t.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for t in (queries, key, value))
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Cross-attention to the latents, then an MLP; queries never see each other."""

    def __init__(self, dim: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_query = nn.LayerNorm(dim, **dd)
        self.norm_latent = nn.LayerNorm(dim, **dd)
        self.attn = CrossAttention(dim, **dd)
        self.norm_mlp = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)

    def forward(self, query: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        query = query + self.attn(self.norm_query(query), self.norm_latent(latent), mask)
        return query + self.mlp(self.norm_mlp(query))
