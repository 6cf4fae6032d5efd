"""The command line of the trainings: it reads the configuration, starts the recipe and reports mistakes.

Importing this module imports neither torch nor timm, so that most mistakes are reported at once.
"""

import argparse
import gc
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from recipes.config import (
    ConfigT,
    DVAEConfig,
    FinetuneConfig,
    PretrainConfig,
    SegmentConfig,
    TrainConfig,
    load_config,
    to_yaml,
)
from recipes.first_run import fitted
from recipes.parsing import ConfigError
from recipes.signals import StopRequest, interrupted

Fit = Callable[..., tuple[Mapping[str, Any], str]]  # see `load_config`; used without --config
# Name of a recipe -> its configuration, what it does, and what fits its settings to the images.
RECIPES: dict[str, tuple[type[TrainConfig], str, Fit | None]] = {
    "pretrain": (PretrainConfig, "Pretrain a model without labels.", None),
    "dvae": (DVAEConfig, "Train a small dVAE, whose tokens a pretraining can predict.", None),
    "finetune": (FinetuneConfig, "Train a classifier, from pretrained weights or from scratch.", fitted),
    "segment": (SegmentConfig, "Train a segmentation head on a model's feature maps.", None),
}


def main(recipe: str, argv: Sequence[str] | None = None) -> None:
    """Read the command, then import the recipe, which takes seconds, and call its `run(config, resume, stop)`."""
    try:
        command = read_command(recipe, argv)
        run = importlib.import_module(f"recipes.{recipe}").run
    except KeyboardInterrupt:
        interrupted("interrupted before the run began")
    carry_out(*command, run)


def read_command(recipe: str, argv: Sequence[str] | None = None) -> tuple[str, TrainConfig, str]:
    """The program's name, its configuration and --resume; a wrong configuration ends the program with 1."""
    kind, does, fit = RECIPES[recipe]
    does = f"{does} Run it from the top of the repository."
    parser = argparse.ArgumentParser(prog=f"python -m recipes.{recipe}", description=does)
    without = "" if fit is None else "; without one, settings are fitted to the images of data.source and printed"
    parser.add_argument("--config", type=Path, help=f"YAML file, for example one of recipes/configs{without}")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and end")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="start from the newest checkpoint in OUTPUT_DIR, if there is one (auto, the default), from the beginning "
        "(none), or from the checkpoint in folder PATH",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    arguments = parser.parse_intermixed_args(argv)
    fit = partial(fit, going_on=arguments.resume == "auto") if fit and arguments.config is None else None
    config = read_config(parser, kind, arguments.config, arguments.overrides, not arguments.print_config, fit)
    if arguments.print_config:
        from arm_zoo.command_line import show

        try:
            show(to_yaml(config).removesuffix("\n"))
        except OSError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        parser.exit()
    return parser.prog, config, arguments.resume


def read_config(parser: argparse.ArgumentParser, kind: type[ConfigT], *arguments: Any) -> ConfigT:
    """Call `load_config`; mistakes end the program with 1."""
    try:
        return load_config(kind, *arguments)
    except (ConfigError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def carry_out(program: str, config: TrainConfig, resume: str, run: Callable[[Any, str, StopRequest], None]) -> None:
    """Call `run(config, resume, stop)`, where `stop` takes note of requests to stop."""
    from recipes.data.workers import end_workers
    from recipes.errors import reporting_mistakes
    from recipes.training.alone import alone_in

    stop, is_main = StopRequest().listen(), os.environ.get("RANK", "0") == "0"
    with reporting_mistakes(program), alone_in(Path(config.output_dir)) if is_main else nullcontext():
        try:
            run(config, resume, stop)
            leave_process_group()
        except SystemExit:  # stopped by a signal, or finished already: on all processes at the same step
            leave_process_group()
            raise
        except KeyboardInterrupt:
            interrupted(f"{program}: interrupted; the same command goes on from the last checkpoint")
        finally:
            stop.ignore()
            end_workers()


def leave_process_group() -> None:
    """Leave the process group, after freeing models that hold it: its threads would run until Python itself ends."""
    from accelerate import PartialState

    gc.collect()
    PartialState().destroy_process_group()


def say(text: str) -> None:
    """Print on the main process."""
    from accelerate import PartialState

    from arm_zoo.command_line import show

    if PartialState().is_main_process:
        show(text)
