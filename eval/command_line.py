"""How all programs here end: mistakes of the user and Ctrl-C are reported in one line."""

import argparse
import os
import sys
from collections.abc import Callable

import torch

from arm_zoo.command_line import is_out_of_memory, one_line


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, stopped: str = "stopped") -> int:
    """Run a program; gives its exit code. A mistake of the user, or `stopped` after Ctrl-C, is a line on stderr."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        return run(args)
    except (ValueError, OSError) as error:
        if speaks:
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"error: the GPU's memory is full, use a smaller --batch-size: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if speaks:
            print(stopped, file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
