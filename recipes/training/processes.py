"""The start of a run: device, processes and seed."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from recipes.config import TrainConfig
from recipes.errors import RunError


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Seed everything and find device and processes, which the launcher decides."""
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
    accelerator = Accelerator(cpu=config.device == "cpu", log_with=tracker, project_dir=config.output_dir)
    if accelerator.num_processes == 1 < asked:
        raise RunError(advice)
    return accelerator
