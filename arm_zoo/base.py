"""What backbones and pretraining models share: initialisation, tables, and what is known of their checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from arm_zoo.files import StateDict, save_model
from arm_zoo.weights.adapt import adapt_state_dict
from arm_zoo.weights.tensor_names import OfficialNames


class ZooModel(nn.Module):
    """A backbone or a pretraining model of any family.

    Its buffers are tables, computed from sizes and never saved: those lost on the meta device return when weights are
    loaded, or are moved.
    """

    official_names = OfficialNames()
    keys: tuple[str, ...] = ()  # our names of tensors, * for a number, that all checkpoints have
    # With the arguments and the result of that function, which says what position embeddings it resizes: those of
    # patches, with a class token's in their middle. A class overrides it whose class token stands elsewhere, whose
    # table has another form, or whose checkpoints have tensors to rename or to reshape.
    adapt = staticmethod(adapt_state_dict)
    parts_to_shard: tuple[str, ...] = ("blocks",)  # lists of modules, each of which FSDP shards by itself
    blocks: nn.ModuleList

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], int | None]:
        """From tensors under our names, the model's arguments, and its patches if told; ValueError for odd shapes."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.register_load_state_dict_post_hook(_fill_tables)

    def init_weights(self, needs_reset: bool = True) -> None:
        """The official initialisation; without `needs_reset` the parts must just have initialised themselves."""
        for module in reversed(list(self.modules())) if needs_reset else ():  # an outer part may know better
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.init_non_persistent_buffers()
        self._init_own_weights()

    def _init_own_weights(self) -> None:
        raise NotImplementedError

    def init_non_persistent_buffers(self) -> None:
        """Fill the tables; a family or an objective without any need not say so."""

    def fill_table(self, name: str, table: Tensor) -> None:
        """Fill one of the tables; one that is on the meta device is made anew, where the weights are."""
        buffer = self.get_buffer(name)
        if buffer.is_meta:
            setattr(self, name, table.to(next(self.parameters()).device))
        else:
            buffer.copy_(table)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """Every move to another device or type comes through here; what has no values cannot be moved."""
        lost = any(table.is_meta for table in self.buffers(recurse=False))
        if lost and not any(parameter.is_meta for parameter in self.parameters()):
            self.init_non_persistent_buffers()
        return super()._apply(fn, recurse)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed: those of which a part of the model, as `MambaMixer`, says so."""
        parts = {path: getattr(part, "no_weight_decay", None) for path, part in self.named_modules() if path}
        return {f"{path}.{name}" for path, names in parts.items() if callable(names) for name in names()}

    @torch.jit.ignore
    def input_size(self: Any) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model is made for."""
        return self.in_chans, *self.patch_embed.img_size

    @torch.jit.ignore
    def official_extras(self) -> StateDict:
        """What the authors' code saves besides parameters, computed, under its names."""
        return {}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def save_pretrained(self: Any, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole, to `folder`, which timm's `local-dir:` takes."""
        save_model(folder, self.state_dict(), self.hub_config())


def _fill_tables(model: Any, _: Any) -> None:
    model.init_non_persistent_buffers()
