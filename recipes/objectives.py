"""What sets one way to train apart from another: a record for each, which `recipes.training.setup` carries out.

A new pretraining objective is one more row of `TRAINING`, under the name that its models have in
`arm_zoo.pretraining`; the record of training with labels stands in `recipes.finetune`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

from recipes.config import TrainConfig
from recipes.data.sources import Source
from recipes.training.checkpoint import Metrics
from recipes.training.ema import FIGURES, winner
from recipes.training.engine import NO_HOOKS, Figures, LossFunction, StepHooks
from recipes.training.export import BACKBONE, EXPORT, InputConfig, save_pretraining
from recipes.training.plots import draw_predictions


@dataclass(frozen=True)
class Trained:
    """A run that has ended; `folder` has its weights."""

    config: TrainConfig
    source: Source
    inputs: InputConfig
    model: Any  # on the CPU; only the main process has its trained weights
    history: list[Metrics]  # one row of figures per epoch
    folder: Path

    @property
    def top1(self) -> float:
        """Of the weights that count, after the last epoch, in percent."""
        return self.history[-1][FIGURES[winner(self.history[-1])]]


@dataclass(frozen=True)
class TrainingObjective:
    """The parts of a run that depend on what is trained for."""

    create: Callable[[Any, Source], nn.Module]  # the model to train, for a configuration
    loss: Callable[[Any, Source], LossFunction]
    export: Callable[[Trained], None]  # writes the results, beside curves and figures, which all runs have
    evaluation: Callable[..., Callable[[int], Metrics]] | None = None  # see `recipes.training.scoring.evaluation`
    folders: tuple[str, ...] = (".",)  # of OUTPUT_DIR, for the results; the first one gets the trained weights
    hooks: StepHooks = NO_HOOKS  # what every step does beside the loss


def export_autoregressive(trained: Trained) -> None:
    """Write `pretraining_model/`, `backbone/`, and `predictions.png` of validation images, beside the targets."""
    model, config, source, inputs = trained.model, trained.config, trained.source, trained.inputs
    save_pretraining(model, config, inputs)
    file, cluster = Path(config.output_dir) / "predictions.png", to_2tuple(model.config["cluster_size"])
    explanation = "each cluster of pixels is predicted from those before it (hatched: given)"
    draw_predictions(file, model, source, inputs, config.seed, cluster, explanation)


AUTOREGRESSIVE = TrainingObjective(
    create=lambda config, source: config.build(),
    loss=lambda config, source: lambda model, batch: model(batch.images)[0],  # whose forward gives the loss first
    export=export_autoregressive,
    folders=(EXPORT, BACKBONE),
)


def watch_for_collapse(model: Any, before: Figures) -> Figures:
    """How far features are apart now, and the epoch's largest gradient norm in the first block."""
    first_block = (parameter.grad for parameter in model.base_encoder.blocks[0].parameters())
    norm = nn.utils.get_total_norm([gradient for gradient in first_block if gradient is not None])
    largest = torch.maximum(norm, before.get("first_block_grad_norm", norm))
    return {"feature_std": model.feature_std.clone(), "first_block_grad_norm": largest}


MOCO = TrainingObjective(
    create=lambda config, source: config.build(),
    loss=lambda config, source: lambda model, batch: model(batch.images)[0],  # images of `recipes.data.views`
    evaluation=lambda config, collectives, models, source, inputs: (
        lambda epochs_done: {"loss_at_chance": models["model"].loss_at_chance(config.global_batch)}
    ),
    export=lambda trained: save_pretraining(trained.model, trained.config, trained.inputs),
    folders=(EXPORT, BACKBONE),
    hooks=StepHooks(begin=lambda model, done: model.update_momentum_encoder(done), figures=watch_for_collapse),
)
TRAINING = {"autoregressive": AUTOREGRESSIVE, "moco": MOCO}  # the objectives of pretraining
