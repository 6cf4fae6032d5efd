"""Supervised training, from a pretrained encoder or from scratch.

python -m recipes.finetune data.source=FOLDER
accelerate launch -m recipes.finetune --config recipes/configs/finetune_digits.yaml key=value ...
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that mistakes are reported at once
    from recipes import command_line

    command_line.main("finetune")
    raise SystemExit

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from timm import get_pretrained_cfg
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from arm_zoo.files import described_by_folder, read_config, weights_in
from arm_zoo.loading import entry_of, label_names
from arm_zoo.weights.find import find_weights
from recipes import command_line
from recipes.command_line import say
from recipes.config import FinetuneConfig
from recipes.data.batches import Batch
from recipes.data.labels import check_several
from recipes.errors import RunError
from recipes.objectives import Trained, TrainingObjective
from recipes.signals import StopRequest
from recipes.training.engine import LossFunction
from recipes.training.export import save_timm_model
from recipes.training.scoring import evaluation
from recipes.training.setup import train

PRETRAINED_HEAD_STD = 2e-5  # the paper's: so small that the random head decides nothing in the first steps


def finetune(
    config: FinetuneConfig, title: str = "finetune", resume: str = "auto", stop: StopRequest | None = None
) -> Trained:
    """Train with labels, and write `model.safetensors` and `config.json`. See `train`."""
    return train(config, CLASSIFICATION, title, resume, stop)


def create_classifier(config: FinetuneConfig, class_names: Sequence[str]) -> nn.Module:
    """A classifier with the weights that `config.pretrained` names, or with random ones.

    The head of the weights is kept if it was trained on the same classes in the same order. Otherwise the head is new,
    and a message says so.
    """
    check_several(class_names, config.data.source)
    classes = len(class_names)
    if (asked := config.model_args.get("num_classes", classes)) != classes:
        problem = f"model_args.num_classes is {asked}, but {config.data.source} has {classes} classes"
        raise RunError(f"{problem}; allowed: {classes}, or leave it out")
    if config.pretrained is None:
        return config.build(num_classes=classes)
    file, pretrained_names, channels = starting_weights(config.pretrained)
    own: Any = get_pretrained_cfg(config.model)
    # timm adapts the patch embedding from the channels of the weights, and takes those for the model's unless told
    described = {"file": str(file), "input_size": (channels or own.input_size[0], *own.input_size[1:])}
    keywords = {"in_chans": own.input_size[0], **config.model_args, "num_classes": classes}
    try:
        model: Any = config.build(pretrained=True, pretrained_cfg_overlay=described, **keywords)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch's message has a line for each name
        raise RunError(f"pretrained={config.pretrained} does not fit {config.model}: {reason}") from error
    if tuple(class_names) == pretrained_names:
        say(f"the head of {config.pretrained} is kept: it was trained on the same {classes} classes")
        return model
    if pretrained_names:
        say(f"the head of {config.pretrained} was trained on other classes: a new head takes its place")
    head = model.get_classifier()
    nn.init.trunc_normal_(head.weight, std=PRETRAINED_HEAD_STD)
    nn.init.zeros_(head.bias)
    return model


def starting_weights(pretrained: str) -> tuple[Path, tuple[str, ...], int | None]:
    """The file of weights that `pretrained` names, the class names of its head, none if they are not known, and the
    channels of the images that it was trained on, None if they are not known."""
    path = Path(pretrained)
    if not path.exists():
        entry = entry_of(pretrained)
        cfg: Any = get_pretrained_cfg(entry)
        return find_weights(entry), tuple(cfg.label_names or ()), cfg.input_size[0]
    file = weights_in(path) if path.is_dir() else path
    saved = read_config(file.parent) if described_by_folder(file) else {}
    channels, *_ = (saved.get("pretrained_cfg") or {}).get("input_size") or (None,)
    return file, label_names(saved, saved.get("num_classes", 0)), channels


def classification_loss(config: FinetuneConfig, num_classes: int) -> LossFunction:
    """Cross-entropy with smoothed labels, of mixed images if mixup or cutmix is on.

    timm's batch mode mixes every image with the image at the mirrored place of the micro-batch. The loader gives it
    the same partner for any number of processes; fraction and box come from NumPy, which is seeded in every step.
    """
    if config.mixup == config.cutmix == 0:
        cross_entropy = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        return lambda model, batch: cross_entropy(model(batch.images), batch.classes)
    mix = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_probability,
        switch_prob=config.mixup_switch_probability,
        mode="batch",
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )
    soft_cross_entropy = SoftTargetCrossEntropy()

    def mixed_loss(model: nn.Module, batch: Batch) -> Tensor:
        images, targets = mix(batch.images, batch.classes)
        return soft_cross_entropy(model(images), targets)

    return mixed_loss


CLASSIFICATION = TrainingObjective(
    create=lambda config, source: create_classifier(config, source.class_names),
    loss=lambda config, source: classification_loss(config, len(source.class_names)),
    evaluation=evaluation,
    export=lambda trained: save_timm_model(
        trained.model, trained.folder, trained.inputs, label_names=list(trained.source.class_names)
    ),
)


def run(config: FinetuneConfig, resume: str, stop: StopRequest) -> None:
    """Train, then print the accuracy and what to do with the result."""
    result = finetune(config, resume=resume, stop=stop)
    last, folder = result.history[-1], config.output_dir
    scored, damaged = int(last["images_scored"]), int(last["undecodable"]) + int(last["images_skipped"])
    say(f"top-1 {result.top1:.2f}% of {scored} validation images; wrote {folder}")
    if damaged:
        say(f"{damaged} damaged image{'s were' if damaged > 1 else ' was'} left out; the log names what and why")
    say(f"  classify an image: python -m arm_zoo predict IMAGE --model {shlex.quote(folder)}")
    say(f'  load it in Python: timm.create_model("local-dir:{folder}", pretrained=True), after import arm_zoo, timm')


main = partial(command_line.main, "finetune")
