"""One model on many processes: how they start, average gradients (DDP) or shard everything (FSDP), and communicate.

accelerate provides the processes and devices, but its `prepare` is not used: it would also patch `forward` of the bare
model, which is scored, averaged and saved here, and its FSDP needs the optimizer to be rebuilt.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from recipes.config import TrainConfig
from recipes.errors import RunError
from recipes.signals import StopWaiting

Tensors = dict[str, Tensor]
ResultT = TypeVar("ResultT")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the main process gets all, the others nothing
NEWER, OLDER = "forward_sync_buffers", "broadcast_buffers"  # torch 2.14 deprecates what 2.8 knows
BUFFERS_TRAVEL = NEWER if NEWER in inspect.signature(DistributedDataParallel).parameters else OLDER
ENDED, STOPPED, FAILED = range(3)  # how a block ends, the worst way last


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Seed all generators and join the launcher's processes; RunError if they would not work together."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    advice = (
        f"WORLD_SIZE is {asked} in the environment, but each process would train alone. Start them with `torchrun "
        f"--nproc_per_node {asked} -m recipes.pretrain ...` (with device=cpu where there is no GPU for each), "
        "or unset WORLD_SIZE to train with one process"
    )
    if asked > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # what a launcher sets
        raise RunError(advice)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    set_seed(config.seed)
    tracker = None if config.tracker == "none" else config.tracker
    cpu = config.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu)  # made by the first run of a process, and kept
    wanted = "cpu" if cpu else state.default_device.type
    if state.device.type != wanted:
        raise RunError(
            f"device is {config.device}, here {wanted}, but an earlier run bound this process to {state.device.type}; "
            "start this run in a process of its own: with `python -m recipes.pretrain ...`, or after the notebook's "
            "kernel has been restarted"
        )
    accelerator = Accelerator(cpu=cpu, log_with=tracker, project_dir=config.output_dir)
    if accelerator.num_processes == 1 < asked:
        raise RunError(advice)
    return accelerator


class Collectives:
    """Collective calls that let all processes act on what one of them found; all must make the same calls in order.

    They run on the CPU (gloo), so that no process waits for its GPU.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._group: Any = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def gather(self, value: ResultT) -> list[ResultT]:
        """The values of all processes, in their order."""
        values = [value] * self.accelerator.num_processes
        if self._group is not None:
            distributed.all_gather_object(values, value, self._group)
        return values

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        numbers = torch.tensor(number)
        if self._group is not None:
            distributed.all_reduce(numbers, distributed.ReduceOp.MAX, self._group)
        return int(numbers.item())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on every process if the block fails or is asked to stop on any of them, so that none waits forever.

        Nothing in the block may wait for other processes.
        """
        outcome, problem = ENDED, None
        try:
            yield
        except Exception as error:  # whatever it is: it is raised again
            outcome, problem = FAILED, error
        except StopWaiting:
            outcome = STOPPED
        worst = self.largest(outcome)
        if worst == FAILED:
            raise problem or RunError("stopped, as another process cannot go on; its message says why")
        if worst == STOPPED:
            raise StopWaiting

    def on_main(self, action: Callable[[], ResultT]) -> ResultT:
        """Do something on the main process; all processes get its result, or raise if it fails."""
        result: Any = None
        with self.together():
            if self.accelerator.is_main_process:
                result = action()
        return self.gather(result)[0]


def shard(model: Any, accelerator: Accelerator) -> None:
    """Distribute parameters over the processes (FSDP), block by block, in place.

    Parameters are gathered in float32 and computed with under autocast, so that what the scan needs in float32
    (`A_log`, `D`, biases) is what it is without sharding.
    """
    if accelerator.num_processes == 1:
        raise RunError("fsdp is true, but there is one process; start several with torchrun, or type fsdp=false")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for part in (*(part for name in model.parts_to_shard for part in getattr(model, name)), model):
        fully_shard(part, mesh=mesh)


def for_training(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> nn.Module:
    """What is called to train `model`: compiled if asked for, and wrapped in DDP if DDP averages the gradients."""
    kind = accelerator.device.type
    if config.cuda_graphs and kind != "cuda":
        raise RunError(f"cuda_graphs is true, but the device is {kind}; allowed: a GPU (cuda), or cuda_graphs=false")
    mode = "reduce-overhead" if config.cuda_graphs else "default"
    forward: Any = torch.compile(model, mode=mode) if config.compile else model
    if accelerator.num_processes == 1 or config.fsdp or config.cuda_graphs:
        return forward
    options: dict[str, Any] = {BUFFERS_TRAVEL: False, "gradient_as_bucket_view": True}  # buffers are equal everywhere
    return DistributedDataParallel(forward, None if kind == "cpu" else [accelerator.device], **options)


class Gradients:
    """Adds up the gradients of a step's micro-batches, and averages them over the processes after the last one.

    DDP and FSDP do that on their own. With CUDA graphs, the next replay overwrites the gradients. So they are moved
    into one tensor, which all processes exchange at once; DDP would need a copy for each parameter, or split the
    graphs at its buckets.
    """

    _sum: Tensor  # of the micro-batches' gradients so far, one after the other

    def __init__(self, forward: nn.Module, model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> None:
        self._forward, self._model = forward, model
        self._graphs, self._processes = config.cuda_graphs, accelerator.num_processes
        self.parameters = list(model.parameters())  # to find them takes a millisecond of every step

    @contextmanager
    def of_micro_batch(self, number: int, count: int) -> Iterator[None]:
        """Surround the forward and backward pass of micro-batch `number` of `count`, counted from 0."""
        last = number == count - 1
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
        ddp = self._forward if isinstance(self._forward, DistributedDataParallel) else None
        with ddp.no_sync() if ddp is not None and not last else nullcontext():
            yield
        if self._graphs and count * self._processes > 1:
            self._move(number == 0)
            if last:
                self._exchange()

    def _move(self, first: bool) -> None:
        self._trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        moved = torch.cat([cast(Tensor, parameter.grad).flatten() for parameter in self._trained])
        self._sum = moved if first else self._sum.add_(moved)
        for parameter in self._trained:
            parameter.grad = None

    def _exchange(self) -> None:
        if self._processes > 1:
            distributed.all_reduce(self._sum, distributed.ReduceOp.AVG)
        parts = self._sum.split([parameter.numel() for parameter in self._trained])
        for parameter, part in zip(self._trained, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        del self._sum


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Gather all parameters of a sharded model on every process, so that each can run forward passes on its own."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            # the root keeps its own parameters between forward and backward, which is FSDP's default
            module.set_reshard_after_forward(module is not model)


def model_state(model: nn.Module) -> Tensors:
    """The whole tensors of a model by name, on the CPU of the main process; every process must call this."""
    return cast(Tensors, get_model_state_dict(model, options=WHOLE))
