"""The command line of both recipes: configuration, where to start, and mistakes told in one message."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError
from torch import distributed

from arm_zoo import CheckpointError

from .config import ConfigError, ConfigT, load_config, to_yaml
from .errors import RunError
from .locate import SourceError
from .signals import StopRequest
from .workers import end_workers

MISTAKES = (RunError, SourceError, CheckpointError, ConfigError, OSError, SafetensorError)


def run_from_command_line(
    recipe: str,
    kind: type[ConfigT],
    run: Callable[[ConfigT, str, StopRequest], None],
    description: str,
    argv: Sequence[str] | None,
) -> None:
    """Parse ``--config FILE --resume WHERE key=value ...`` and call ``run(config, resume, stop)``, where ``stop``
    notes what asks this process to stop.

    The program ends with code 2 and the whole list if the configuration is wrong, with 1 and one message if the run
    cannot start or go on.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.{recipe}", description=f"{description} Run it from the top of the repository."
    )
    parser.add_argument("--config", type=Path, help="YAML file, for example one of recipes/configs")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and end")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="start from the newest checkpoint in OUTPUT_DIR if there is one (auto, the default), from the beginning "
        "(none), or from a checkpoint's folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    arguments = parser.parse_intermixed_args(argv)
    stop = StopRequest().listen()
    try:
        config = load_config(kind, arguments.config, arguments.overrides, to_run=not arguments.print_config)
    except (ConfigError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    try:
        run(config, arguments.resume, stop)
        leave_processes()
    except SystemExit:  # stopped by a signal, or finished already: on all processes at the same step
        leave_processes()
        raise
    except MISTAKES as error:
        sys.exit(f"{parser.prog}: {described(error)}")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        stop.ignore()
        end_workers()


def described(error: Exception) -> str:
    """The message of a mistake; where the system's words name no file, with the place in the code they come from."""
    nameless = isinstance(error, OSError) and error.errno is not None and error.filename is None
    if not nameless and not isinstance(error, SafetensorError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"


def say(text: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(text)


def leave_processes() -> None:
    """End the connection to the other processes, if there are any."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
