"""The moving average of the weights (EMA): making it, its names beside the trained model's, and which of them wins."""

from collections.abc import Mapping

from timm.utils import ModelEmaV3
from torch import nn

from recipes.config import TrainConfig

FIGURES = {"model": "top1", "ema": "top1_ema"}  # of the trained model and its average, whose name ends so


def moving_average(model: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """Starts as the model and is updated after every step, without a warm-up of the decay; None if not asked for."""
    decay = getattr(config, "ema_decay", None)
    return None if decay is None else ModelEmaV3(model, decay=decay)


def candidates(model: nn.Module, ema: ModelEmaV3 | None) -> dict[str, nn.Module]:
    """The trained model and, if there is one, its average, by their names in `FIGURES`."""
    return {"model": model} if ema is None else {"model": model, "ema": ema.module}


def winner(last: Mapping[str, float]) -> str:
    """The name of the weights that count: the average's if it scored higher in the last epoch's row, else "model"."""
    scored = [name for name, figure in FIGURES.items() if figure in last]
    return max(scored, key=lambda name: last[FIGURES[name]], default="model")
