"""Top-1 on the validation images, each of which counts once over all processes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from recipes.config import FinetuneConfig
from recipes.data.loader import EvalLoader
from recipes.data.undecodable import check_undecodable
from recipes.training.checkpoint import Metrics
from recipes.training.ema import FIGURES
from recipes.training.export import InputConfig
from recipes.training.parallel import Collectives, whole_parameters

BATCH = 256


def evaluation(
    config: FinetuneConfig, collectives: Collectives, models: Mapping[str, nn.Module], source: Any, inputs: InputConfig
) -> Callable[[int], Metrics]:
    """A function that scores the models of `ema.candidates` on the validation images, given the epochs done.

    The models are bare: the collective calls of a wrapper would hang, as processes have unequal numbers of images.
    """
    accelerator, device = collectives.accelerator, collectives.accelerator.device
    process = (accelerator.process_index, accelerator.num_processes)
    loader = EvalLoader(source.test, inputs, BATCH, *process, config.data.workers, device)
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    @torch.no_grad()  # inference mode would spoil the tensors that sharded parameters are gathered into
    def count(model: nn.Module) -> list[int]:  # images of all processes that are right, scored, damaged
        counts, was_training = torch.zeros(3, dtype=torch.long, device=device), model.training
        model.eval()
        with whole_parameters(model), half, collectives.together():
            for batch in loader:
                if len(batch.classes) > 0:  # some could be decoded
                    counts[0] += (model(batch.images).argmax(dim=1) == batch.classes).sum()
                counts[1] += len(batch.classes)
                counts[2] += len(batch.undecodable)
        model.train(was_training)
        return accelerator.reduce(counts, "sum").tolist()

    def evaluate(epochs_done: int) -> Metrics:
        if epochs_done % config.evaluate_every and epochs_done != config.epochs:
            return {}
        scores = {}
        for name, model in models.items():
            right, scored, damaged = count(model)
            check_undecodable(damaged, scored + damaged, "validation", config.data.max_undecodable)
            scores[FIGURES[name]] = 100 * right / scored
        return {**scores, "images_scored": scored, "images_skipped": damaged}

    return evaluate
