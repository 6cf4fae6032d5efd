"""The attentive probe of AIM (arXiv:2401.08541, section 4): one query gathers the patches by cross-attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_HEADS = 12  # AIM's number, for widths that it divides


class AttentiveClassifier(nn.Module):
    """Patches (B, N, dim) -> logits (B, num_classes): batch norm, attention of a learned query, a linear layer.

    As in AIM, the norm has no parameters and no layer has a bias. There are 12 attention heads, or the next smaller
    number that divides the width.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = next(heads for heads in range(MOST_HEADS, 0, -1) if dim % heads == 0)
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, num_classes, bias=False) if num_classes else nn.Identity()
        nn.init.normal_(self.query, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        query = self.query.expand(len(x), -1, -1)
        # (B, tokens, dim) -> (B, heads, tokens, dim / heads)
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (query, self.key(x), self.value(x)))
        gathered = F.scaled_dot_product_attention(q, k, v)
        return self.head(gathered.transpose(1, 2).flatten(1))
