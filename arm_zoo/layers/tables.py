"""Models with tables: buffers that are computed from sizes, never saved, and filled again where they lost values."""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class TableModel(nn.Module):
    """A model whose buffers are tables: those lost on the meta device return when weights are there, or are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_fill_tables)

    def init_non_persistent_buffers(self) -> None:
        raise NotImplementedError

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


def _fill_tables(model: Any, _: Any) -> None:
    model.init_non_persistent_buffers()
