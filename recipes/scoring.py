"""Top-1 on the validation images; over all processes every image counts once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from recipes.checkpoint import Metrics
from recipes.config import FinetuneConfig
from recipes.data import EvalLoader, eval_loader
from recipes.export import InputConfig
from recipes.parallel import Collectives, whole_parameters
from recipes.sources import Source
from recipes.undecodable import check_undecodable

BATCH = 256


def evaluation(
    config: FinetuneConfig,
    accelerator: Accelerator,
    collectives: Collectives,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    source: Source,
    inputs: InputConfig,
) -> Callable[[int], Metrics]:
    """A function of the epochs done that scores the model and its moving average on the validation images."""
    process, device = (accelerator.process_index, accelerator.num_processes), accelerator.device
    loader = eval_loader(source.test, inputs, BATCH, *process, config.data.workers, device)
    candidates = {"top1": model} | ({} if ema is None else {"top1_ema": ema.module})

    def evaluate(epochs_done: int) -> Metrics:
        if epochs_done % config.evaluate_every and epochs_done != config.epochs:
            return {}
        scores = {name: score(config, accelerator, collectives, each, loader) for name, each in candidates.items()}
        counts = {"images_scored": scores["top1"].scored, "images_skipped": scores["top1"].skipped}
        return {name: each.top1 for name, each in scores.items()} | counts

    return evaluate


class Score(NamedTuple):
    """Top-1 in percent, of how many images, and how many more could not be decoded; of all processes."""

    top1: float
    scored: int
    skipped: int


@torch.no_grad()  # inference mode would spoil the tensors that sharded parameters are gathered into
def score(
    config: FinetuneConfig, accelerator: Accelerator, collectives: Collectives, model: nn.Module, loader: EvalLoader
) -> Score:
    """Fraction of the validation images that the model classifies rightly.

    Args:
        config: Its precision is used for scoring too.
        accelerator: Its processes each score their own images; nothing is padded.
        collectives: End all processes if one of them cannot go on.
        model: The bare model (a wrapper's collective calls would hang where processes have unequal numbers of images).
        loader: Of this process's images.

    Raises:
        RunError: If none can be decoded.
        SourceError: If more cannot be decoded than `data.max_undecodable` allows.
    """
    device = accelerator.device
    correct, total, skipped = torch.zeros((), dtype=torch.long, device=device), 0, 0
    was_training = model.training
    model.eval()
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    with whole_parameters(model), half, collectives.together():
        for batch in loader:
            skipped += len(batch.undecodable)
            if len(batch.classes) == 0:  # none of them could be decoded
                continue
            correct += (model(batch.pictures).argmax(dim=1) == batch.classes).sum()
            total += len(batch.classes)
    model.train(was_training)
    counts = torch.stack([correct, *torch.tensor([total, skipped], device=device)])
    right, scored, skipped = accelerator.reduce(counts, "sum").tolist()
    check_undecodable(skipped, scored + skipped, "validation", config.data.max_undecodable)  # the same everywhere
    return Score(100 * right / scored, scored, skipped)
