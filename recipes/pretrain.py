"""Self-supervised pretraining: predict each cluster of patches from those before it.

accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_digits.yaml key=value ...
"""

# ruff: noqa: E402
from collections.abc import Sequence

from .command_line import Command, carry_out, leave_when_interrupted, read_command, say
from .config import PretrainConfig, batch_plan


def command(argv: Sequence[str] | None = None) -> Command:
    """What the words of the command line ask for."""
    return read_command("pretrain", PretrainConfig, "Pretrain an ARM without labels.", argv)


if __name__ == "__main__":
    leave_when_interrupted()
    COMMAND = command()  # before the imports that take seconds, so that mistakes are told at once

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import arm_zoo

from .data import Batch, TrainLoader
from .engine import Metrics, Trainer
from .export import backbone_entry, input_config, save_backbone, save_pretraining_model
from .optim import create_optimizer
from .parallel import model_state, shard
from .plots import draw_predictions, plot_run
from .processes import start_accelerator
from .resume import starting_point
from .signals import StopRequest
from .sources import open_source
from .watch import utilisation

EXPORT, BACKBONE = "pretraining_model", "backbone"


@dataclass(frozen=True)
class PretrainResult:
    """A pretraining run: the model on the CPU, one row of figures per epoch, and the folder of its weights."""

    model: arm_zoo.ARMPretrain
    history: list[Metrics]
    folder: Path


def pretrain(
    config: PretrainConfig, title: str = "pretrain", resume: str = "auto", stop: StopRequest | None = None
) -> PretrainResult:
    """Train without labels and write ``pretraining_model/``, ``backbone/``, curves, predictions and figures.

    Args:
        config: What to train, on what, for how long, and ``output_dir``.
        title: Stands before the progress bar.
        resume: "auto", "none" or a checkpoint's folder, as ``--resume``.
        stop: What asks this process to stop; None: nothing does.
    """
    accelerator = start_accelerator(config)
    plan = batch_plan(config.global_batch, accelerator.num_processes, config.max_batch_per_device)
    output = Path(config.output_dir)
    start = starting_point(config, resume, accelerator, output / "predictions.png", (EXPORT, BACKBONE))
    source = open_source(config.data, labels_needed=False)
    model = config.build()
    image_size = model.patch_embed.img_size
    inputs = input_config(backbone_entry(config, model), source, model.in_chans, image_size)
    model.set_grad_checkpointing(config.gradient_checkpointing)
    model = model.to(accelerator.device)
    if config.fsdp:
        shard(model, accelerator)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=create_optimizer(model, config),
        loader=TrainLoader(
            source, config, plan, image_size, accelerator.process_index, accelerator.num_processes, accelerator.device
        ),
        loss_function=prediction_loss,
        config=config,
        title=title,
        utilisation=utilisation(config, config.build, (model.in_chans, *image_size), accelerator),
        stop=stop or StopRequest(),
    )
    trainer.resume(start)
    history = trainer.fit()
    weights, result = model_state(model), config.build()
    with trainer.agreement.together():
        if accelerator.is_main_process:
            result.load_state_dict(weights)
            save_pretraining_model(result, output / EXPORT, inputs)
            save_backbone(output / EXPORT, backbone_entry(config, result), output / BACKBONE, inputs, config.seed)
            plot_run(output / "curves.png", history)
            draw_predictions(output / "predictions.png", result, source, inputs, config.seed)
    return PretrainResult(result, history, output / EXPORT)


def prediction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the predicted clusters; the classes are not looked at."""
    loss, _, _ = model(batch.images)
    return loss


def run(config: PretrainConfig, resume: str, stop: StopRequest) -> None:
    """Pretrain, then say where the results are."""
    folder = pretrain(config, resume=resume, stop=stop).folder
    say(f"wrote {folder} and {folder.with_name(BACKBONE)}; finetune it with pretrained={folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    carry_out(command(argv), run)


if __name__ == "__main__":
    carry_out(COMMAND, run)
