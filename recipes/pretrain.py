"""Self-supervised pretraining: predict each cluster of patches from those before it.

accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_digits.yaml key=value ...
"""

if __name__ == "__main__":  # before the imports that take seconds, so that mistakes in the command are told at once
    from recipes import command_line

    command_line.main("pretrain")
    raise SystemExit

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

import arm_zoo
from recipes import command_line
from recipes.command_line import say
from recipes.config import PretrainConfig, batch_plan

from .data import Batch, train_loader
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
        loader=train_loader(
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
    loss, _, _ = model(batch.pictures)
    return loss


def run(config: PretrainConfig, resume: str, stop: StopRequest) -> None:
    """Pretrain, then say where the results are."""
    folder = pretrain(config, resume=resume, stop=stop).folder
    say(f"wrote {folder} and {folder.with_name(BACKBONE)}; finetune it with pretrained={folder}")


main = partial(command_line.main, "pretrain")
