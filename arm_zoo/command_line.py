"""What command lines share: types of options, how programs end, and output that nobody may read to its end.

All programs of the checkout end with these codes:

0    the work is done
1    a mistake of the user, a failure of the machine, or a difference that a check finds; a message says which
2    argparse cannot take the words of the command, whose usage it prints
75   training was asked to stop by a signal, and the same command goes on from its checkpoint (`recipes.signals`)
130  Ctrl-C
143  the quickstart was asked to end by SIGTERM

`python -m arm_zoo run` ends as the program that it runs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from arm_zoo.files import CheckpointError


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def usable_device(text: str) -> torch.device:
    """A device that this machine has and that can compute."""
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise argparse.ArgumentTypeError("device 'meta' holds no numbers; expected cpu, cuda, ...")
    return device


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had no memory left, for a tensor or for the program itself."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).startswith("CUDA error: out of memory")


def guarded(run: Callable[[], int], stopped: str = "stopped") -> int:
    """Run a program; gives its exit code. A mistake of the user, or `stopped` after Ctrl-C, is a line on stderr.

    Once nobody reads its output any more, as after `| head`, it ends with 0. Of several processes the first speaks.
    """
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        drop_output()
        return 0
    except (CheckpointError, OSError, ValueError) as error:
        code, said = 1, f"error: {one_line(error)}"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        less = "use --device cpu, or a smaller --batch-size where the program takes one"
        code, said = 1, f"error: the GPU's memory is full; {less}: {reason}"
    except KeyboardInterrupt:
        code, said = 130, stopped
    try:
        sys.stdout.flush()
    except OSError:  # as on a full disk: Python would try again at its end, and end with another code
        drop_output()
    if os.environ.get("RANK", "0") == "0":
        print(said, file=sys.stderr)
    return code


def one_line(error: Exception) -> str:
    """The message of an error, its lines joined by semicolons."""
    lines = (str(error) or type(error).__name__).splitlines()
    return "; ".join(line.strip() for line in lines).replace(":; ", ": ")


def show(line: str) -> None:
    """Print a line. Once nobody reads the output any more, as after `| head`, lines are dropped, and work goes on.

    OSError if it cannot be printed for another reason, such as a full disk.
    """
    try:
        print(line, flush=True)
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError):
            error.filename = "standard output"
            raise


@contextmanager
def shown_by(console: Any, print_text: Callable[[str], None] = show) -> Iterator[None]:
    """What rich's console prints in the block, at its end by `print_text`: rich ends a program that nobody reads."""
    with console.capture() as printed:
        yield
    print_text(printed.get().removesuffix("\n"))


def drop_output() -> None:
    """Send what is still to be printed nowhere: whoever read it, such as `head`, has enough, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
