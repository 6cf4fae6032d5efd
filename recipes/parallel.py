"""One model on many processes: gradients averaged (DDP) or everything sharded (FSDP), and its state as one process's.

accelerate's ``prepare`` is left out on purpose: it also patches ``forward`` of the bare model, which is scored,
averaged and saved here, and its FSDP needs the optimizer to be rebuilt. Its processes and devices are used.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .config import TrainConfig
from .errors import RunError

Tensors = dict[str, Tensor]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the main process; the others get nothing
FROM_WHOLE = StateDictOptions(full_state_dict=True)
# the name that torch 2.14 deprecates for the one that torch 2.8 does not know
NAMES = inspect.signature(DistributedDataParallel).parameters
BUFFERS_TRAVEL = "forward_sync_buffers" if "forward_sync_buffers" in NAMES else "broadcast_buffers"


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Distribute parameters over the processes (FSDP), block by block, in place.

    Parameters are gathered in float32 and computed with under autocast, so that what the scan needs in float32
    (``A_log``, ``D``, biases) is what it is without sharding.

    Raises:
        RunError: If there is only one process.
    """
    if accelerator.num_processes == 1:
        raise RunError("fsdp is true, but there is one process; start several with torchrun, or type fsdp=false")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in (*model.blocks, *getattr(model, "decoder_blocks", ())):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def for_training(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> nn.Module:
    """The callable that trains ``model``: compiled if asked for, gradients averaged over the processes.

    Raises:
        RunError: If CUDA graphs are asked for where they are not known to work.
    """
    kind = accelerator.device.type
    if config.cuda_graphs and (kind != "cuda" or accelerator.num_processes > 1):
        raise RunError(
            f"cuda_graphs is true, but there are {accelerator.num_processes} processes on {kind}; allowed: one "
            "process on a GPU (cuda); type cuda_graphs=false"
        )
    mode = "reduce-overhead" if config.cuda_graphs else "default"
    forward = torch.compile(model, mode=mode) if config.compile else model
    if accelerator.num_processes == 1 or config.fsdp:
        return forward
    on_gpu = kind != "cpu"
    return DistributedDataParallel(
        forward,
        device_ids=[accelerator.device] if on_gpu else None,
        gradient_as_bucket_view=True,
        **{BUFFERS_TRAVEL: False},  # they are tables, equal everywhere
    )


@contextmanager
def gradients_reduced(wrapped: nn.Module, model: nn.Module, last: bool) -> Iterator[None]:
    """Average gradients over the processes only with the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
    else:
        yield


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[nn.Module]:
    """Hold all parameters of a sharded model on every process, so that each can run forward passes on its own."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield model
    finally:
        for module in sharded:
            module.reshard()
            # the root keeps its own parameters between forward and backward, which is FSDP's default
            module.set_reshard_after_forward(module is not model)


def model_state(model: nn.Module) -> Tensors:
    """Names -> whole tensors on the CPU of the main process; every process must call it."""
    return get_model_state_dict(model, options=WHOLE)


def load_model_state(model: nn.Module, tensors: Tensors) -> None:
    """The reverse; every process gives the whole tensors."""
    set_model_state_dict(model, tensors, options=FROM_WHOLE)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``step/NAME`` of every parameter; every process must call it."""
    state = get_optimizer_state_dict(model, optimizer, options=WHOLE).get("state", {})
    return {f"{kind}/{name}": tensor for name, kinds in state.items() for kind, tensor in kinds.items()}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, tensors: Tensors) -> None:
    """The reverse; groups, rates and decay stay those of ``optimizer``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        state.setdefault(name, {})[kind] = tensor
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=FROM_WHOLE)
