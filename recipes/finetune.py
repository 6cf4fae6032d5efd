"""Supervised training, from a pretrained encoder or from scratch.

accelerate launch -m recipes.finetune --config recipes/configs/finetune_digits.yaml key=value ...
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

import arm_zoo  # noqa: F401  (registers the models)

from .config import BatchPlan, FinetuneConfig, config_from_command_line
from .data import eval_loader, train_loader
from .engine import Metrics, Trainer, start_accelerator, top1
from .files import replacing_files
from .optim import create_optimizer
from .sources import Source, open_source

PRETRAINED_HEAD_STD = 2e-5  # the paper's: the encoder's features decide from the first step, not a random head


@dataclass(frozen=True)
class FinetuneResult:
    """A supervised run: the model that was scored last, one row of figures per epoch, and top-1 in percent."""

    model: nn.Module
    history: list[Metrics]
    top1: float


def finetune(config: FinetuneConfig, title: str = "finetune") -> FinetuneResult:
    """Train with labels and write ``model.safetensors``, ``config.json``, ``metrics.jsonl`` and ``config.yaml``.

    The weights that count are the last ones (their moving average if ``ema_decay`` is set): none are picked by score.

    Args:
        config: What to train, from which weights, on what, for how long, and ``output_dir``.
        title: Stands before the progress bar.
    """
    accelerator = start_accelerator(config)
    source = open_source(config.data)
    model = create_classifier(config, len(source.class_names)).to(accelerator.device)
    ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay)
    processes, device = accelerator.num_processes, accelerator.device
    plan = BatchPlan(config.global_batch // processes, 1)
    inputs = {**resolve_model_data_config(model), "mean": source.mean, "std": source.std}
    share = (accelerator.process_index, processes)
    test = eval_loader(source.test, inputs, 256, *share, device=device)

    def evaluate(epochs_done: int) -> Metrics:
        if epochs_done % config.evaluate_every and epochs_done != config.epochs:
            return {}
        scores = {"top1": top1(accelerator, model, test)}
        return scores if ema is None else scores | {"top1_ema": top1(accelerator, ema.module, test)}

    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=create_optimizer(model, config, config.layer_decay),
        loader=train_loader(source, config, plan, inputs["input_size"][-2:], *share, device),
        loss_function=partial(classification_loss, label_smoothing=config.label_smoothing),
        config=config,
        title=title,
        evaluate=evaluate,
        ema=ema,
    )
    history = trainer.fit()
    final = model if ema is None else ema.module
    if accelerator.is_main_process:
        save_classifier(final, Path(config.output_dir), source)
    return FinetuneResult(final, history, history[-1]["top1" if ema is None else "top1_ema"])


def create_classifier(config: FinetuneConfig, num_classes: int) -> nn.Module:
    """The backbone with a head: around the pretrained encoder if ``config.pretrained`` names one, else fresh."""
    arguments = {"num_classes": num_classes, "drop_path_rate": config.drop_path, **config.model_args}
    if config.pretrained is None:
        return timm.create_model(config.model, **arguments)
    weights = Path(config.pretrained)
    file = weights / "model.safetensors" if weights.is_dir() else weights
    overlay = {"file": str(file)}
    model = timm.create_model(config.model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    nn.init.trunc_normal_(model.get_classifier().weight, std=PRETRAINED_HEAD_STD)
    return model


def classification_loss(model: nn.Module, pictures: Tensor, classes: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with smoothed labels."""
    return F.cross_entropy(model(pictures), classes, label_smoothing=label_smoothing)


def save_classifier(model: nn.Module, folder: Path, source: Source) -> None:
    """Write ``model.safetensors`` and ``config.json``, which ``timm.create_model("local-dir:FOLDER")`` loads."""
    data_config = {"mean": source.mean, "std": source.std}
    labels = {"label_names": list(source.class_names)}
    with replacing_files(folder) as beside:
        save_for_hf(model, str(beside), model_config=labels, safe_serialization=True, data_config=data_config)
        config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        # It stands in the config already; as a model argument it would overrule the caller's num_classes.
        config["model_args"].pop("num_classes", None)
        (beside / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config = config_from_command_line(FinetuneConfig, "Train an ARM classifier.", argv)
    result = finetune(config)
    print(
        f"top-1 {result.top1:.2f}%; wrote {config.output_dir}; load it with "
        f'timm.create_model("local-dir:{config.output_dir}", pretrained=True)'
    )


if __name__ == "__main__":
    main()
