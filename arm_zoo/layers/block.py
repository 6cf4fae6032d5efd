"""The block of ARM and Vim, how a stack of blocks runs, and how its parameters are initialised."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn

from arm_zoo.layers.init import zero_bias
from arm_zoo.layers.mixer import MambaMixer
from arm_zoo.layers.mlp import SwiGLU
from arm_zoo.layers.sizes import Device
from arm_zoo.ops import fused
from arm_zoo.ops.fused import Residual, in_type_of, is_bare, is_plain


class Block(nn.Module):
    """Mamba mixer and SwiGLU, each with its norm and residual; one drop-path rate, sampled twice (paper, figure 4)."""

    def __init__(
        self,
        dim: int,
        directions: int = 4,
        d_state: int = 16,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        expand: float = 1.0,
        mlp: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `MambaMixer` for its arguments; without `mlp` the block is the mixer alone, as in Vim."""
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = MambaMixer(dim, directions, expand, d_state, **dd)
        self.norm2 = norm_layer(dim, **dd) if mlp else None
        self.mlp = SwiGLU(dim, 8 * dim // 3, **dd) if mlp else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():
            return self.forward_deferred(Residual(x), order).sum()
        weight = self.mixer.conv_weight
        x = x + self.drop_path(self.mixer(self.norm1(in_type_of(weight, x)), order))
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.drop_path(self.mlp(self.norm2(in_type_of(weight, x))))
        return x

    @torch.jit.ignore
    def forward_deferred(self, tokens: Residual, order: Tensor | None) -> Residual:
        """The block without its last residual sum, which the norm after it computes, on GPUs in the same kernel."""
        x, y = tokens.normed(self.norm1)
        tokens = add_branch(x, self.mixer(y, order), self.drop_path)
        if self.mlp is None:
            return tokens
        x, y = tokens.normed(self.norm2)
        return add_branch(x, self.mlp(y), self.drop_path)


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Residual:
    """x plus the branch after drop-path, whose random factors are applied together with the sum."""
    if is_plain(branch) and drop_path.training and is_bare(drop_path, DropPath):
        return Residual(x, branch, drop_path(branch.new_ones(branch.shape[0], 1, 1)).flatten())
    return Residual(x, drop_path(branch))


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    order: Tensor | None,
    kept: Collection[int],
    checkpointing: bool = False,
    kind: type[nn.Module] = Block,  # the class whose blocks may run by `forward_deferred`
) -> dict[int, Tensor]:
    """Run blocks one after the other on tokens (B, ..., dim), and return the outputs of those in `kept` by number.

    The first block is number 1; number 0 stands for the tokens themselves.
    """
    results = {0: x} if 0 in kept else {}
    tokens = Residual(x)
    block: Any  # which type checkers do not know of a list of modules
    for number, block in enumerate(blocks, start=1):
        if checkpointing:
            tokens = Residual(checkpoint(block, tokens.sum(), order))
        elif is_bare(block, kind) and fused.adds_in_norm(tokens.x, block.norm1):
            tokens = block.forward_deferred(tokens, order)
        else:
            tokens = Residual(block(tokens.sum(), order))
        if number in kept:
            results[number] = tokens.sum()
            tokens = Residual(results[number])
    return results


def init_block_weights(blocks: nn.ModuleList) -> None:
    """Official initialisation of a stack: PyTorch's defaults, zero biases, output projections / sqrt(depth).

    It finds mixers and SwiGLUs in blocks of any class.
    """
    for part in blocks.modules():
        if isinstance(part, SwiGLU):
            zero_bias(part.fc1)
            zero_bias(part.fc2)
        elif isinstance(part, MambaMixer):
            with torch.no_grad():
                part.out_proj.weight /= len(blocks) ** 0.5
