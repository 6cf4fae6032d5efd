"""AdamW's parameter groups and the learning-rate schedule."""

import math
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW

from recipes.config import TrainConfig


def create_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over `parameter_groups`; the rate starts at 0 and is set before every step."""
    groups = parameter_groups(model, config.weight_decay, getattr(config, "layer_decay", None))
    fused = config.fused_adamw and next(model.parameters()).device.type == "cuda"
    return AdamW(groups, lr=0.0, betas=config.betas, eps=1e-8, fused=fused)


def parameter_groups(model: Any, weight_decay: float, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """What is trained, in groups with `weight_decay`, but 0 for biases, 1-D parameters and `model.no_weight_decay()`.

    With `layer_decay`, the factor of the rate from one layer to the one below it, they have `lr_scale` too.
    """
    undecayed = model.no_weight_decay()
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed)
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay)


def learning_rate(epoch: float, config: TrainConfig) -> float:
    """Linear warm-up from 0, then half a cosine to `min_lr`; `epoch` is fractional, so every step has its rate."""
    peak = config.base_lr * config.global_batch / 256
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
