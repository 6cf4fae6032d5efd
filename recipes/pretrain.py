"""Self-supervised pretraining: predict each cluster of patches from those before it.

accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_digits.yaml key=value ...
"""

# ruff: noqa: E402
from collections.abc import Sequence

from .command_line import Command, carry_out, leave_when_interrupted, read_command, say
from .config import PretrainConfig


def command(argv: Sequence[str] | None = None) -> Command:
    """What the words of the command line ask for."""
    return read_command("pretrain", PretrainConfig, "Pretrain an ARM without labels.", argv)


if __name__ == "__main__":
    leave_when_interrupted()
    COMMAND = command()  # before the imports that take seconds, so that mistakes are told at once

from recipes.export import BACKBONE
from recipes.objectives import AUTOREGRESSIVE, Trained
from recipes.setup import train
from recipes.signals import StopRequest


def pretrain(
    config: PretrainConfig, title: str = "pretrain", resume: str = "auto", stop: StopRequest | None = None
) -> Trained:
    """Train without labels; `pretraining_model/`, `backbone/` and predictions are written. See `train`."""
    return train(config, AUTOREGRESSIVE, title, resume, stop)


def run(config: PretrainConfig, resume: str, stop: StopRequest) -> None:
    """Pretrain, then say where the results are."""
    folder = pretrain(config, resume=resume, stop=stop).folder
    say(f"wrote {folder} and {folder.with_name(BACKBONE)}; finetune it with pretrained={folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    carry_out(command(argv), run)


if __name__ == "__main__":
    carry_out(COMMAND, run)
