"""The moving average of the weights (EMA), and which wins in the end: the average or the trained model."""

from collections.abc import Mapping

from timm.utils import ModelEmaV3
from torch import nn

from recipes.config import TrainConfig

FIGURES = {"model": "top1", "ema": "top1_ema"}  # the scores of the trained model and of its average in `metrics.jsonl`


def moving_average(model: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """An average that starts as the model, with a constant decay; None where `config` has no `ema_decay`."""
    decay = getattr(config, "ema_decay", None)
    return None if decay is None else ModelEmaV3(model, decay=decay)


def candidates(model: nn.Module, ema: ModelEmaV3 | None) -> dict[str, nn.Module]:
    """The trained model and, if there is one, its average, under their names in `FIGURES`."""
    return {"model": model} if ema is None else {"model": model, "ema": ema.module}


def winner(last: Mapping[str, float]) -> str:
    """Whose weights a run exports: "ema" if the average scored higher in the last epoch's row, else "model"."""
    scored = [name for name, figure in FIGURES.items() if figure in last]
    return max(scored, key=lambda name: last[FIGURES[name]], default="model")
