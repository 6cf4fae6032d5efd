"""Self-supervised pretraining: predict each cluster of patches from those before it.

accelerate launch -m recipes.pretrain --config recipes/configs/pretrain_digits.yaml key=value ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import arm_zoo

from .config import BatchPlan, PretrainConfig, config_from_command_line
from .data import train_loader
from .engine import Metrics, Trainer, start_accelerator
from .files import replacing_files
from .optim import create_optimizer
from .sources import open_source


@dataclass(frozen=True)
class PretrainResult:
    """A pretraining run: the model, one row of figures per epoch, and the folder of its weights."""

    model: nn.Module
    history: list[Metrics]
    folder: Path


def pretrain(config: PretrainConfig, title: str = "pretrain") -> PretrainResult:
    """Train without labels and write ``pretraining_model/``, ``metrics.jsonl`` and ``config.yaml``.

    Args:
        config: What to train, on what, for how long, and ``output_dir``.
        title: Stands before the progress bar.
    """
    accelerator = start_accelerator(config)
    model = arm_zoo.create_pretraining_model(config.model, **config.model_args).to(accelerator.device)
    processes, device = accelerator.num_processes, accelerator.device
    plan = BatchPlan(config.global_batch // processes, 1)
    size = (model.config["img_size"],) * 2
    source = open_source(config.data, labels_needed=False)
    loader = train_loader(source, config, plan, size, accelerator.process_index, processes, device)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=create_optimizer(model, config),
        loader=loader,
        loss_function=prediction_loss,
        config=config,
        title=title,
    )
    history = trainer.fit()
    folder = Path(config.output_dir) / "pretraining_model"
    if accelerator.is_main_process:
        with replacing_files(folder) as beside:
            model.save_pretrained(beside)
    return PretrainResult(model, history, folder)


def prediction_loss(model: nn.Module, pictures: Tensor, classes: Tensor) -> Tensor:
    """Mean squared error of the predicted clusters; the classes are not looked at."""
    loss, _, _ = model(pictures)
    return loss


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    result = pretrain(config_from_command_line(PretrainConfig, "Pretrain an ARM without labels.", argv))
    print(f"wrote {result.folder}; finetune it with pretrained={result.folder}")


if __name__ == "__main__":
    main()
