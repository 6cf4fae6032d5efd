"""What sets one way to train apart from another: a record for each, which `recipes.training.setup` carries out.

A new pretraining objective is one more row of `TRAINING`, under the name that its models have in
`arm_zoo.pretraining`; the record of training with labels stands in `recipes.finetune`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from timm.layers import to_2tuple
from torch import Tensor, nn

from arm_zoo.files import sha256_of
from arm_zoo.pretraining.dvae import fetched, read_dvae
from recipes.command_line import say
from recipes.config import PretrainConfig, TrainConfig
from recipes.data.batches import Batch
from recipes.data.sources import Source
from recipes.errors import RunError
from recipes.training.checkpoint import Metrics
from recipes.training.ema import FIGURES, winner
from recipes.training.engine import LossFunction
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


def export_autoregressive(trained: Trained) -> None:
    """Write `pretraining_model/`, `backbone/`, and `predictions.png` of validation images, beside the targets.

    There is no picture of what predicts a dVAE's tokens, whose file and sha256 the model's config.json gets instead.
    """
    model, source, inputs = trained.model, trained.source, trained.inputs
    config: Any = trained.config
    if config.dvae is not None:
        save_pretraining(model, config, inputs, dvae={"file": config.dvae, "sha256": sha256_of(fetched(config.dvae))})
        return
    save_pretraining(model, config, inputs)
    file, cluster = Path(config.output_dir) / "predictions.png", to_2tuple(model.config["cluster_size"])
    (row, column), (height, width) = model.given, model.patch_size
    explanation = "each cluster of pixels is predicted from those before it (hatched: given)"
    draw_predictions(file, model, source, inputs, config.seed, cluster, (row * height, column * width), explanation)


def autoregressive_loss(config: PretrainConfig, source: Source) -> LossFunction:
    """What the model's forward gives first: the loss of pixels, or that of the tokens of a dVAE."""
    if config.dvae is None:
        return lambda model, batch: model(batch.images)[0]
    file, built = fetched(config.dvae), cast(Any, config.build(device="meta"))
    encoder, grid = read_dvae(file), built.patch_embed.grid_size
    for key, has, wanted in (
        ("vocab_size", encoder.vocab_size, built.vocab_size),
        ("in_chans", encoder.in_chans, built.in_chans),
    ):
        if has != wanted:
            raise RunError(f"dvae={config.dvae} has {key} {has}, the model {wanted}; allowed: model_args.{key}={has}")
    say(f"tokens are those of {config.dvae}: a vocabulary of {encoder.vocab_size:,}, sha256 {sha256_of(file)}")

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        pixels = in_unit_range(batch.images, source)
        return model(batch.images, encoder.to(pixels.device).tokens(pixels, grid))[0]

    return loss


def in_unit_range(images: Tensor, source: Source) -> Tensor:
    """Normalised images (B, C, H, W) of a source as pixels in 0..1."""
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))
    return (images * std + mean).clamp(0, 1)


AUTOREGRESSIVE = TrainingObjective(
    create=lambda config, source: config.build(),
    loss=autoregressive_loss,
    export=export_autoregressive,
    folders=(EXPORT, BACKBONE),
)
TRAINING = {"autoregressive": AUTOREGRESSIVE}  # the objectives of pretraining
