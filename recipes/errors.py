"""Errors that a user causes or can fix, and how they are reported."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from arm_zoo import CheckpointError
from arm_zoo.command_line import is_out_of_memory
from arm_zoo.images.errors import SourceError
from recipes.parsing import ConfigError
from recipes.signals import interrupted


class RunError(RuntimeError):
    """The run cannot start or go on; the message says what happened and what to type."""


WHAT_NEEDS_LESS = (
    "type a smaller max_batch_per_device, which leaves the results of a training as they are, or a smaller batch of "
    "recipes.probe or global_batch of objective=moco, or see by nvidia-smi which other programs use the GPU"
)
MISTAKES = (RunError, SourceError, CheckpointError, ConfigError, OSError, SafetensorError)


@contextmanager
def reporting_mistakes(program: str) -> Iterator[None]:
    """End the program with one message, and a code of `arm_zoo.command_line`, if the block raises a user's mistake."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted(f"{program}: interrupted")
    except MISTAKES as error:
        sys.exit(f"{program}: {described(error)}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{program}: the GPU's memory is full; {WHAT_NEEDS_LESS} ({str(error).splitlines()[0]})")


def described(error: Exception) -> str:
    """The message of a mistake; if it is the system's and names no file, with the line of code that it comes from."""
    nameless = isinstance(error, OSError) and error.errno is not None and error.filename is None
    return with_line(error) if nameless or isinstance(error, SafetensorError) else str(error)


def with_line(error: Exception) -> str:
    """An error as text, with the line of code that it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
