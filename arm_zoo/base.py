"""What backbones and pretraining models share: initialisation, tables, and what is known of their checkpoints."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from arm_zoo.files import StateDict, save_model
from arm_zoo.weights.adapt import adapt_state_dict
from arm_zoo.weights.tensor_names import OfficialNames


class ZooModel(nn.Module):
    """A backbone or a pretraining model of any family.

    Its buffers are tables, which are computed from sizes and never saved. Tables that lost their values on the meta
    device are filled again when weights are loaded into the model or the model is moved.
    """

    official_names = OfficialNames()  # the authors' names of its tensors
    keys: tuple[str, ...] = ()  # tensors that all checkpoints have, by our names, with * for a number
    # Fits a checkpoint to a model of this class. A class overrides it if its class token is not in the middle of the
    # position embeddings, if these have another shape than `adapt_state_dict` expects, or if tensors of checkpoints
    # must be renamed or reshaped.
    adapt = staticmethod(adapt_state_dict)
    parts_to_shard: tuple[str, ...] = ("blocks",)  # lists of modules, each of which FSDP shards by itself

    @classmethod
    def read_shapes(cls, source: StateDict) -> tuple[dict[str, Any], int | None]:
        """A model's arguments from its tensors, under our names, and its number of patches (None: not told).

        Raises:
            ValueError: if no model has tensors of these shapes.
        """
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.register_load_state_dict_post_hook(_fill_tables)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the official code does; `needs_reset=False` is for layers made just now."""
        for module in reversed(list(self.modules())) if needs_reset else ():  # outer ones last: they may know better
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.init_non_persistent_buffers()
        self._init_own_weights()

    def _init_own_weights(self) -> None:
        raise NotImplementedError

    def init_non_persistent_buffers(self) -> None:
        """Fill the tables; models without any leave this as it is."""

    def fill_table(self, name: str, table: Tensor) -> None:
        """Fill one of the tables; a table on the meta device is replaced by one on the device of the weights."""
        buffer = self.get_buffer(name)
        if buffer.is_meta:
            setattr(self, name, table.to(next(self.parameters()).device))
        else:
            buffer.copy_(table)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """Called by every move to another device or type; tables without values, which cannot be moved, are filled."""
        lost = any(table.is_meta for table in self.buffers(recurse=False))
        if lost and not any(parameter.is_meta for parameter in self.parameters()):
            self.init_non_persistent_buffers()
        return super()._apply(fn, recurse)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, as parts of the model, such as `MambaMixer`, tell them."""
        parts = {path: getattr(part, "no_weight_decay", None) for path, part in self.named_modules() if path}
        return {f"{path}.{name}" for path, names in parts.items() if callable(names) for name in names()}

    @torch.jit.ignore
    def input_size(self: Any) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model is made for."""
        return self.in_chans, *self.patch_embed.img_size

    @torch.jit.ignore
    def official_extras(self) -> StateDict:
        """Tensors that the authors' code saves although it computes them, under its names."""
        return {}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def save_pretrained(self: Any, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole, to `folder`; timm loads it as local-dir:FOLDER."""
        save_model(folder, self.state_dict(), self.hub_config())


def _fill_tables(model: Any, _: Any) -> None:
    model.init_non_persistent_buffers()


def check_keywords(model: str, given: Iterable[str], taken: Iterable[str]) -> None:
    """Refuse keywords that a model does not take."""
    if unknown := sorted({*given} - {*taken}):
        raise TypeError(f"{model}: unknown keyword {', '.join(unknown)}; the model takes {', '.join(sorted(taken))}")
