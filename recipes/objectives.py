"""The training objectives: a record of the parts in which they differ, which `recipes.training.setup` puts together.

To add a pretraining objective, add a row to `TRAINING`, under the name of its models in `arm_zoo.pretraining`. The
records of the other recipes are in recipes/finetune.py, segment.py and dvae.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from arm_zoo.pretraining.autoregressive import RANDOM
from arm_zoo.pretraining.dvae import fetched, read_dvae
from arm_zoo.pretraining.targets import NORMED_PIXEL
from recipes.command_line import say
from recipes.config import PretrainConfig, TrainConfig
from recipes.data.batches import Batch
from recipes.data.source import Source
from recipes.data.sources import open_source
from recipes.errors import RunError
from recipes.training.checkpoint import Metrics, dvae_sha256
from recipes.training.ema import FIGURES, winner
from recipes.training.engine import NO_HOOKS, Figures, LossFunction, StepHooks
from recipes.training.export import BACKBONE, EXPORT, InputConfig, save_pretraining
from recipes.training.plots import draw_predictions

TRUE_STATISTICS = "\nnormalised pixels are predicted, and drawn with the true mean and deviation of each patch"


@dataclass(frozen=True)
class Trained:
    """A run that has ended."""

    config: TrainConfig
    source: Source
    inputs: InputConfig
    model: Any  # on the CPU; only the main process has its trained weights
    history: list[Metrics]  # one row of figures per epoch
    folder: Path  # where the weights are written

    @property
    def top1(self) -> float:
        """Top-1 after the last epoch, in percent, of the trained weights or their average, whichever is better."""
        return self.history[-1][FIGURES[winner(self.history[-1])]]


@dataclass(frozen=True)
class TrainingObjective:
    """The parts of a run that depend on the objective."""

    loss: Callable[[Any, Any], LossFunction]  # (configuration, source) -> the loss
    export: Callable[[Trained], None]  # writes the results, beside the curves and metrics that all runs have
    # (configuration, source) -> the model to train
    create: Callable[[Any, Any], nn.Module] = lambda config, source: config.build()
    evaluation: Callable[..., Callable[[int], Metrics]] | None = None  # see `recipes.training.scoring.evaluation`
    folders: tuple[str, ...] = (".",)  # in OUTPUT_DIR, for the results; the first one gets the trained weights
    # configuration -> the source
    open: Callable[[Any], Any] = lambda config: open_source(config.data, config.labels_needed, config.seed)
    hooks: StepHooks = NO_HOOKS  # what every step does besides the loss


def export_autoregressive(trained: Trained) -> None:
    """Write `pretraining_model/`, `backbone/`, and `predictions.png`: predictions of validation images and targets.

    A model that predicts a dVAE's tokens gets no picture; the file and sha256 of the dVAE go to its config.json.
    """
    model, source, inputs = trained.model, trained.source, trained.inputs
    config: Any = trained.config
    if config.dvae is not None:
        save_pretraining(model, config, inputs, dvae={"file": config.dvae, "sha256": dvae_sha256(config)})
        return
    save_pretraining(model, config, inputs)
    file, cluster = Path(config.output_dir) / "predictions.png", to_2tuple(model.config["cluster_size"])
    explanation = "each cluster of pixels is predicted from those before it (hatched: given)"
    if model.target == NORMED_PIXEL:
        explanation += TRUE_STATISTICS
    draw_predictions(file, model, source, inputs, config.seed, cluster, explanation)


def autoregressive_loss(config: PretrainConfig, source: Source) -> LossFunction:
    """The loss of predicting pixels or a dVAE's tokens, in one order or in orders drawn by the batch's seeds."""
    if config.dvae is not None:
        return token_loss(config, source)
    if config.model_args.get("prediction_order") == RANDOM:
        return seeded_loss
    return lambda model, batch: model(batch.images)[0]  # whose forward gives the loss first


def token_loss(config: PretrainConfig, source: Source) -> LossFunction:
    """The loss of predicting the tokens of a dVAE, which is read here; RunError if it does not fit the model."""
    built: Any = config.build(device="meta")
    encoder, grid = read_dvae(fetched(str(config.dvae))), built.patch_embed.grid_size
    for key, has, wanted in (
        ("vocab_size", encoder.vocab_size, built.vocab_size),
        ("in_chans", encoder.in_chans, built.in_chans),
    ):
        if has != wanted:
            raise RunError(f"dvae={config.dvae} has {key} {has}, the model {wanted}; allowed: model_args.{key}={has}")
    say(f"tokens are those of {config.dvae}: a vocabulary of {encoder.vocab_size:,}, sha256 {dvae_sha256(config)}")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        pixels = source.in_unit_range(batch.images)
        tokens = encoder.to(pixels.device).tokens(pixels, grid)
        return model(batch.images, batch.seeds.to(pixels.device, non_blocking=True), tokens)[0]

    return loss


def export_mae(trained: Trained) -> None:
    """Write `pretraining_model/`, `backbone/`, and `predictions.png`: predictions of validation images and targets."""
    model, config, source, inputs = trained.model, trained.config, trained.source, trained.inputs
    save_pretraining(model, config, inputs)
    file, patch = Path(config.output_dir) / "predictions.png", model.patch_embed.patch_size
    explanation = "the pixels of each patch are predicted from the patches that are given (hatched)"
    if model.normed_pixels:
        explanation += TRUE_STATISTICS
    draw_predictions(file, model, source, inputs, config.seed, patch, explanation)


def seeded_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss with masks or orders from the batch's seeds: functions of the run's seed, the epoch and the image."""
    seeds = batch.seeds.to(batch.images.device, non_blocking=True)
    return model(batch.images, seeds)[0]


AUTOREGRESSIVE = TrainingObjective(loss=autoregressive_loss, export=export_autoregressive, folders=(EXPORT, BACKBONE))
MAE = TrainingObjective(loss=lambda config, source: seeded_loss, export=export_mae, folders=(EXPORT, BACKBONE))


def watch_for_collapse(model: Any, before: Figures) -> Figures:
    """The spread of the features in this step, and the largest gradient norm of the first block in this epoch."""
    first_block = (parameter.grad for parameter in model.base_encoder.blocks[0].parameters())
    norm = nn.utils.get_total_norm([gradient for gradient in first_block if gradient is not None])
    largest = torch.maximum(norm, before.get("first_block_grad_norm", norm))
    return {"feature_std": model.feature_std.clone(), "first_block_grad_norm": largest}


MOCO = TrainingObjective(
    loss=lambda config, source: lambda model, batch: model(batch.images)[0],  # images of `recipes.data.views`
    evaluation=lambda config, collectives, models, source, inputs: (
        lambda epochs_done: {"loss_at_chance": models["model"].loss_at_chance(config.global_batch)}
    ),
    export=lambda trained: save_pretraining(trained.model, trained.config, trained.inputs),
    folders=(EXPORT, BACKBONE),
    hooks=StepHooks(begin=lambda model, done: model.update_momentum_encoder(done), figures=watch_for_collapse),
)
TRAINING = {"autoregressive": AUTOREGRESSIVE, "mae": MAE, "moco": MOCO}  # the objectives of pretraining
