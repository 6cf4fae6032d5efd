"""What the backends share: the inputs of a scan, its saved states, and the memory layout of kernels' tensors."""

from typing import NamedTuple, Self, TypeGuard

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

CHUNK = 16  # steps between saved states, which then take d_state / 16 times the memory of one activation


class Norm(NamedTuple):
    """Weight and bias (D) of a layer norm, and the eps that it adds to variances."""

    weight: Tensor
    bias: Tensor
    eps: float


class ScanInputs(NamedTuple):
    """The inputs of a scan, as `arm_zoo.ops.selective_scan` describes them; a u of three axes is in token order.

    With `log_rates`, A holds log(-A), which kernels exponentiate themselves.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor | None
    delta_weight: Tensor | None
    delta_softplus: bool
    order: Tensor | None
    mean: bool
    log_rates: bool = False

    @property
    def shape(self) -> torch.Size:
        """(directions, batch, length, channels)."""
        return torch.Size((len(self.A), *self.u.shape[-3:]))

    @property
    def share(self) -> float:
        """The factor of every direction's output in their sum."""
        return 1 / len(self.A) if self.mean else 1.0

    @property
    def rows(self) -> Tensor | None:
        """The table of the rows of u, delta, B and C that the steps read; None if these are in scan order."""
        return self.order if self.u.ndim == 3 else None

    @property
    def order_of_outputs(self) -> Tensor | None:
        """The table that brings outputs, which lie like the inputs, into token order; None if they have it."""
        return self.order if self.u.ndim == 4 else None

    def in_scan_order(self) -> Self:
        """The same scan with a u for each direction, and all sequences in scan order."""
        if self.u.ndim == 4:
            return self
        u, delta, B, C = (in_order(s, self.order) for s in (self.u.expand(self.shape), self.delta, self.B, self.C))
        return self._replace(u=u, delta=delta, B=B, C=C)

    def with_rates(self) -> Self:
        """The same scan with A instead of its logarithms."""
        return self._replace(A=decay_rates(self.A), log_rates=False) if self.log_rates else self

    def with_whole_steps(self) -> Self:
        """The same scan with step sizes of full rank."""
        if self.delta_weight is None:
            return self
        return self._replace(delta=project(self.delta, self.delta_weight), delta_weight=None)


@torch.fx.wrap
def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in at least float32."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def is_per_image(order: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a table has orders for each image, (B, K, L), and not the same for all, (K, L)."""
    return order is not None and order.ndim == 3


def in_order(sequences: Tensor, order: Tensor | None) -> Tensor:
    """Tokens (K, B, L, N), or (1, B, L, N) for all directions alike, in each direction's order (K, B, L, N)."""
    if order is None:
        return sequences
    table = order.transpose(0, 1) if is_per_image(order) else order[:, None]  # (K, B or 1, L)
    return torch.take_along_dim(sequences, table[..., None], dim=2)


def state_dtype(dtype: torch.dtype, *, half: bool = False) -> torch.dtype:
    """The type to compute in: at least float32, or with `half` bfloat16 for both 16-bit types (for its range)."""
    return torch.bfloat16 if half and dtype.itemsize == 2 else torch.promote_types(dtype, torch.float32)


def empty_states(like: Tensor, A: Tensor, dtype: torch.dtype, *, save: bool) -> Tensor:
    """Memory for the states (K, B, chunks, S, D) before each chunk of `like` (..., B, L, D), if `save`."""
    batch, length, channels = like.shape[-3:]
    chunks = -(-length // CHUNK) if save else 0
    return like.new_empty(len(A), batch, chunks, A.shape[-1], channels, dtype=dtype)


def inner(sequence: Tensor) -> Tensor:
    """The tensor, copied if its last axis is not contiguous or offsets of steps do not fit into 32 bits."""
    near = sequence.shape[-2] * sequence.stride(-2) < 2**31
    return sequence if sequence.stride(-1) == 1 and near else sequence.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is not contiguous or not aligned to 16 bytes, at which kernels read several numbers."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@torch.compiler.assume_constant_result  # for within a trace, some versions of torch take all compilation for export
def _is_exported() -> bool:
    return torch.compiler.is_exporting()


def project(sequences: Tensor, weight: Tensor) -> Tensor:
    """(K, B, L, N) times the transpose of each direction's weight (K, M, N) -> (K, B, L, M)."""
    if _is_exported():  # maybe to ONNX, where the reshapes below get lost if B = K: see findings/
        return sequences @ weight.to(sequences.dtype).transpose(1, 2)[:, None]
    # one batched product over the directions; B * L rows merge without a copy
    product = torch.bmm(sequences.flatten(1, 2), weight.to(sequences.dtype).transpose(1, 2))
    return product.unflatten(1, sequences.shape[1:3])
