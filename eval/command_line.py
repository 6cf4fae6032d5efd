"""How all programs here end."""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from arm_zoo import command_line


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, stopped: str = "stopped") -> int:
    """As `arm_zoo.command_line.guarded`; a process leaves the group that it may have joined."""
    try:
        return command_line.guarded(partial(run, args), stopped)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
