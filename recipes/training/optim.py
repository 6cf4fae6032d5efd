"""AdamW's parameter groups and the learning-rate schedule."""

import math

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from recipes.config import TrainConfig


def create_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW over the trained parameters; the learning rate is 0 until the trainer sets it, before every step.

    Groups have the configuration's weight decay, or 0 for biases, 1-D parameters and `model.no_weight_decay()`. With
    `layer_decay`, by which the rate falls from each layer to the one below it, they also have an `lr_scale`.
    """
    fused = config.fused_adamw and next(model.parameters()).device.type == "cuda"
    decay = getattr(config, "layer_decay", None)
    return create_optimizer_v2(
        model, "adamw", lr=0.0, weight_decay=config.weight_decay, layer_decay=decay, betas=config.betas, fused=fused
    )


def learning_rate(epoch: float, config: TrainConfig) -> float:
    """Linear warm-up from 0, then half a cosine to `min_lr`; `epoch` is fractional, so every step has its rate."""
    peak = config.base_lr * config.global_batch / 256
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
