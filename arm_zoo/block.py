"""The block that backbone and pretraining model are made of, stacks of it, and what holds for its parameters."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import nn

from arm_zoo.fused import Addend, add_norm, adds_in_norm, is_bare
from arm_zoo.layers import SwiGLU, zero_bias
from arm_zoo.mixer import MambaMixer

__all__ = ["Block", "init_block_weights", "no_weight_decay_names", "reset_parameters", "run_blocks"]


class Block(nn.Module):
    """Mamba mixer and SwiGLU, each with its norm and residual; one drop-path rate, sampled twice (paper, figure 4)."""

    def __init__(
        self,
        dim: int,
        directions: int = 4,
        d_state: int = 16,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = MambaMixer(dim, directions, d_state=d_state, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = SwiGLU(dim, 8 * dim // 3, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x), order))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    @torch.jit.ignore
    def forward_deferred(
        self, x: torch.Tensor, added: Addend | None, order: torch.Tensor | None
    ) -> tuple[torch.Tensor, Addend]:
        """The block of x + added, up to its last sum; each sum is made by the kernel of the norm that follows it."""
        x, y = (x, self.norm1(x)) if added is None else add_norm(x, added, self.norm1)
        x, y = add_norm(x, self._dropped(self.mixer(y, order)), self.norm2)
        return x, self._dropped(self.mlp(y))

    def _dropped(self, branch: torch.Tensor) -> Addend:
        """The branch and the factors by which drop-path multiplies it, drawn as it draws them."""
        if not isinstance(self.drop_path, DropPath) or not self.drop_path.training:
            return Addend(branch, None)
        return Addend(branch, self.drop_path(branch.new_ones(len(branch), 1, 1)).flatten())


def _is_deferrable(block: nn.Module, x: torch.Tensor) -> bool:
    if not isinstance(block, Block) or not is_bare(block, Block):
        return False
    plain = is_bare(block.drop_path, DropPath) or is_bare(block.drop_path, nn.Identity)
    return plain and adds_in_norm(x, block.norm1) and adds_in_norm(x, block.norm2)


def run_blocks(
    blocks: nn.ModuleList,
    x: torch.Tensor,
    order: torch.Tensor | None,
    kept: Collection[int],
    checkpointing: bool = False,
) -> dict[int, torch.Tensor]:
    """Run a stack of blocks and keep what those with the numbers `kept`, from 1 on, give.

    Args:
        blocks: the stack, an nn.ModuleList.
        x: (B, L, dim) tokens.
        order: (K, L) table of `arm_zoo.order`, or None.
        kept: numbers of blocks; 0 stands for the tokens themselves.
        checkpointing: recompute every block's activations in the backward pass.
    """
    results = {0: x} if 0 in kept else {}
    deferring = not checkpointing and all(_is_deferrable(block, x) for block in blocks)
    added: Addend | None = None
    block: Any  # which type checkers do not know of a list of modules
    for number, block in enumerate(blocks, start=1):
        if deferring:
            x, added = block.forward_deferred(x, added, order)
        else:
            x = checkpoint(block, x, order) if checkpointing else block(x, order)
        if number in kept:
            x, added = x if added is None else added.to(x), None
            results[number] = x
    return results


def reset_parameters(model: nn.Module) -> None:
    """Draw the parameters of all parts anew, inner parts first: an outer one may know better."""
    for module in reversed(list(model.modules())):
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def init_block_weights(blocks: Iterable[nn.Module]) -> None:
    """Official initialisation of a stack: PyTorch's defaults, zero biases, output projections / sqrt(depth)."""
    stack = [block for block in blocks if isinstance(block, Block)]
    for block in stack:
        zero_bias(block.mlp.fc1)
        zero_bias(block.mlp.fc2)
        with torch.no_grad():
            block.mixer.out_proj.weight /= len(stack) ** 0.5


def no_weight_decay_names(blocks: Iterable[nn.Module]) -> set[str]:
    """Names, inside a model, of what is one-dimensional per direction in the blocks and therefore not decayed."""
    return {
        f"blocks.{i}.mixer.{name}"
        for i, block in enumerate(blocks)
        if isinstance(block, Block)
        for name in block.mixer.no_weight_decay()
    }
