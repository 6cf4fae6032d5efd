"""The command line of both recipes: configuration, where to start, and mistakes told in one message.

Importing this module brings neither torch nor timm, so that most mistakes are told at once.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import Config, ConfigError, ConfigT, load_config, to_yaml

if TYPE_CHECKING:
    from .signals import StopRequest

Run = Callable[[ConfigT, str, "StopRequest"], None]
Fit = Callable[..., Mapping[str, Any]]  # of a configuration, the keys that were set, and going_on, see first_run


class Command(NamedTuple):
    """What a person asked for: the program's name, the checked configuration, and where to start."""

    program: str
    config: Config
    resume: str


def read_command(
    recipe: str, kind: type[ConfigT], description: str, argv: Sequence[str] | None = None, fit: Fit | None = None
) -> Command:
    """Parse ``--config FILE --resume WHERE key=value ...``.

    The program ends with code 2 and the whole list if the configuration is wrong, and with 0 after printing it if that
    is what was asked for.

    Args:
        recipe: The module's name.
        kind: The dataclass to fill.
        description: What it does, for ``--help``.
        argv: The words; None: those of this process.
        fit: Gives values for what nobody set where there is no ``--config``, see ``load_config``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.{recipe}", description=f"{description} Run it from the top of the repository."
    )
    without = "" if fit is None else "; without one, settings are fitted to the images of data.source and told"
    parser.add_argument("--config", type=Path, help=f"YAML file, for example one of recipes/configs{without}")
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
    to_run = not arguments.print_config
    try:
        fitted = None
        if fit is not None and arguments.config is None:
            fitted = partial(fit, going_on=arguments.resume == "auto")
        config = load_config(kind, arguments.config, arguments.overrides, to_run, fitted)
    except (ConfigError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if not to_run:
        print(to_yaml(config), end="")
        parser.exit()
    return Command(parser.prog, config, arguments.resume)


def leave_when_interrupted() -> None:
    """Let Ctrl-C end this program with 130 and one line until ``carry_out`` begins: imports take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job's may be ignored
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough
    print("interrupted before the run began", file=sys.stderr)
    sys.exit(130)


def carry_out(command: Command, run: Run) -> None:
    """Call ``run(config, resume, stop)``, where ``stop`` notes what asks this process to stop.

    The program ends with 1 and one message if the run cannot start or go on.
    """
    from .mistakes import MISTAKES, described
    from .signals import StopRequest
    from .workers import end_workers

    stop = StopRequest().listen()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(command.config, command.resume, stop)
        leave_processes()
    except SystemExit:  # stopped by a signal, or finished already: on all processes at the same step
        leave_processes()
        raise
    except MISTAKES as error:
        sys.exit(f"{command.program}: {described(error)}")
    except KeyboardInterrupt:
        print(f"{command.program}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    finally:
        stop.ignore()
        end_workers()


def say(text: str) -> None:
    """Print on the main process."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(text)


def leave_processes() -> None:
    """End the connection to the other processes, if there are any."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
