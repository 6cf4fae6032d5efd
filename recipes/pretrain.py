"""Self-supervised pretraining, by default by predicting each cluster of patches from those before it.

accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_digits.yaml key=value ...
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that mistakes are reported at once
    from recipes import command_line

    command_line.main("pretrain")
    raise SystemExit

from functools import partial

from recipes import command_line
from recipes.command_line import say
from recipes.config import PretrainConfig
from recipes.objectives import TRAINING, Trained
from recipes.parsing import ConfigError
from recipes.signals import StopRequest
from recipes.training.export import BACKBONE
from recipes.training.setup import train


def pretrain(
    config: PretrainConfig, title: str = "pretrain", resume: str = "auto", stop: StopRequest | None = None
) -> Trained:
    """Train without labels, and write `pretraining_model/`, `backbone/` and predictions. See `train`."""
    if config.objective not in TRAINING:
        raise ConfigError({"objective": f"objective is {config.objective!r}; allowed: {', '.join(TRAINING)}"})
    return train(config, TRAINING[config.objective], title, resume, stop)


def run(config: PretrainConfig, resume: str, stop: StopRequest) -> None:
    folder = pretrain(config, resume=resume, stop=stop).folder
    say(f"wrote {folder} and {folder.with_name(BACKBONE)}; finetune it with pretrained={folder}")


main = partial(command_line.main, "pretrain")
