"""Supervised training, from a pretrained encoder or from scratch.

python -m recipes.finetune data.source=FOLDER
accelerate launch -m recipes.finetune --config recipes/configs/finetune_digits.yaml key=value ...
"""

if __name__ == "__main__":  # before the imports that take seconds, so that mistakes in the command are told at once
    from recipes import command_line

    command_line.main("finetune")
    raise SystemExit

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.files import described_by_folder, read_config, weights_in, write_text
from arm_zoo.hosted import find_weights, ways_on
from arm_zoo.loading import label_names
from arm_zoo.weights import CheckpointError
from recipes import command_line
from recipes.command_line import say
from recipes.config import FinetuneConfig, batch_plan

from .console import plain_console
from .data import Batch, EvalLoader, eval_loader, train_loader
from .engine import LossFunction, Metrics, Trainer
from .errors import RunError
from .export import InputConfig, input_config, save_classifier
from .optim import create_optimizer
from .parallel import model_state, shard, whole_parameters
from .plots import plot_run
from .processes import start_accelerator
from .resume import starting_point
from .signals import Agreement, StopRequest
from .sources import Source, open_source
from .undecodable import check_undecodable
from .watch import utilisation

PRETRAINED_HEAD_STD = 2e-5  # the paper's: the encoder's features decide from the first step, not a random head
EVAL_BATCH = 256
HELD_OUT = "validation.txt"


@dataclass(frozen=True)
class FinetuneResult:
    """A supervised run: the exported model on the CPU, one row of figures per epoch, and its top-1 in percent."""

    model: nn.Module
    history: list[Metrics]
    top1: float


def finetune(
    config: FinetuneConfig, title: str = "finetune", resume: str = "auto", stop: StopRequest | None = None
) -> FinetuneResult:
    """Train with labels and write ``model.safetensors``, ``config.json``, curves and figures.

    What counts is the last epoch: the better of the model and its moving average, whose weights are exported. No
    earlier epoch is picked by score.

    Args:
        config: What to train, from which weights, on what, for how long, and ``output_dir``.
        title: Stands before the progress bar.
        resume: "auto", "none" or a checkpoint's folder, as ``--resume``.
        stop: What asks this process to stop; None: nothing does.
    """
    accelerator = start_accelerator(config)
    plan = batch_plan(config.global_batch, accelerator.num_processes, config.max_batch_per_device)
    output = Path(config.output_dir)
    start = starting_point(config, resume, accelerator, output / "curves.png")
    source = open_source(config.data, labels_needed=True)
    classes = number_of_classes(config, source)
    model = create_classifier(config, source.class_names)
    image_size = model.patch_embed.img_size
    inputs = input_config(config.model, source, model.in_chans, image_size)
    model.set_grad_checkpointing(config.gradient_checkpointing)
    model = model.to(accelerator.device)
    ema = None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay)  # no warm-up of the decay
    if config.fsdp:
        for part in (model, ema.module) if ema is not None else (model,):
            shard(part, accelerator)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=create_optimizer(model, config, config.layer_decay),
        loader=train_loader(
            source, config, plan, image_size, accelerator.process_index, accelerator.num_processes, accelerator.device
        ),
        loss_function=classification_loss(config, classes),
        config=config,
        title=title,
        evaluate=evaluation(config, accelerator, model, ema, source, inputs),
        ema=ema,
        utilisation=utilisation(config, config.build, (model.in_chans, *image_size), accelerator),
        stop=stop or StopRequest(),
    )
    trainer.resume(start)
    if accelerator.is_main_process and source.held_out is not None:  # only of a run that goes ahead
        say_what_is_held_out(source, output)
    history = trainer.fit()
    scores = history[-1]
    ema_counts = ema is not None and scores["top1_ema"] > scores["top1"]
    weights = model_state(ema.module if ema_counts else model)
    result = config.build(num_classes=classes)
    with trainer.agreement.together():
        if accelerator.is_main_process:
            result.load_state_dict(weights)
            save_classifier(result, output, inputs, source.class_names)
            plot_run(output / "curves.png", history)
    return FinetuneResult(result, history, scores["top1_ema" if ema_counts else "top1"])


def say_what_is_held_out(source: Source, folder: Path) -> None:
    """Name the training images that are validated on instead, for whoever scores or trains on from here."""
    _, names = source.test.classes_and_names()
    write_text(folder / HELD_OUT, "".join(f"{name}\n" for name in names))
    plain_console().print(
        f"{source.held_out:g} of the training images, {len(names)} beside {len(source.train)}, are held out for "
        f"validation; {folder / HELD_OUT} lists them",
        soft_wrap=True,
    )


def number_of_classes(config: FinetuneConfig, source: Source) -> int:
    """The source's.

    Raises:
        RunError: If ``model_args.num_classes`` says otherwise.
    """
    classes = len(source.class_names)
    if (asked := config.model_args.get("num_classes", classes)) != classes:
        raise RunError(
            f"model_args.num_classes is {asked}, but {config.data.source} has {classes} classes; "
            f"allowed: {classes}, or leave it out"
        )
    return classes


def create_classifier(config: FinetuneConfig, class_names: Sequence[str]) -> nn.Module:
    """The backbone with a head: around the pretrained encoder if ``config.pretrained`` names one, else fresh.

    A head that comes with the weights is kept whole if it is one of the same classes in the same order. Otherwise the
    head starts anew, weight and bias, and that is said.

    Raises:
        RunError: If the weights do not fit the model.
        CheckpointError: Likewise, or if an entry's weights are not hosted, or cannot be fetched or read.
        FileNotFoundError: If there is no such file.
    """
    classes = len(class_names)
    if config.pretrained is None:
        return config.build(num_classes=classes)
    file, pretrained_names = starting_weights(config.pretrained)
    keywords = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    try:
        model = config.build(num_classes=classes, **keywords)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch's has a line for each name
        raise RunError(f"pretrained={config.pretrained} does not fit {config.model}: {reason}") from error
    if tuple(class_names) == pretrained_names:
        say(f"the head of {config.pretrained} is kept: it is one of the same {classes} classes")
        return model
    if pretrained_names:
        say(f"the head of {config.pretrained} is left out, and a new one trained: it is one of other classes")
    head = model.get_classifier()
    nn.init.trunc_normal_(head.weight, std=PRETRAINED_HEAD_STD)
    nn.init.zeros_(head.bias)
    return model


def starting_weights(pretrained: str) -> tuple[Path, tuple[str, ...]]:
    """The file of weights that ``pretrained`` names, and the names of the classes of its head as far as it tells."""
    path = Path(pretrained)
    if not path.exists():
        told = timm.create_model(pretrained, device="meta").pretrained_cfg  # whose names are never the short ones
        entry = f"{told['architecture']}.{told['tag']}"
        file = find_weights(entry)
        if file is None:
            raise CheckpointError(ways_on(entry, told["architecture"]))
        return file, tuple(timm.get_pretrained_cfg(entry).label_names or ())
    file = weights_in(path) if path.is_dir() else path
    saved = read_config(file.parent) if described_by_folder(file) else {}
    return file, label_names(saved, saved.get("num_classes", 0))


def classification_loss(config: FinetuneConfig, num_classes: int) -> LossFunction:
    """Cross-entropy with smoothed labels, of mixed pictures if mixup or cutmix is on.

    timm's batch mode mixes every picture with its mirror image in the micro-batch, which the loader deals so that it
    is the same partner for any number of processes; share and box come from NumPy, seeded per step.
    """
    if config.mixup == config.cutmix == 0:
        return lambda model, batch: F.cross_entropy(
            model(batch.pictures), batch.classes, label_smoothing=config.label_smoothing
        )
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
        pictures, targets = mix(batch.pictures, batch.classes)
        return soft_cross_entropy(model(pictures), targets)

    return mixed_loss


def evaluation(
    config: FinetuneConfig,
    accelerator: Accelerator,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    source: Source,
    inputs: InputConfig,
) -> Callable[[int], Metrics]:
    """A function of the epochs done that scores the model and its moving average on the held-out pictures."""
    loader = eval_loader(
        source.test,
        inputs,
        EVAL_BATCH,
        accelerator.process_index,
        accelerator.num_processes,
        config.data.workers,
        accelerator.device,
    )
    agreement = Agreement(accelerator)
    candidates = {"top1": model} | ({} if ema is None else {"top1_ema": ema.module})

    def evaluate(epochs_done: int) -> Metrics:
        if epochs_done % config.evaluate_every and epochs_done != config.epochs:
            return {}
        scores = {name: score(config, accelerator, agreement, each, loader) for name, each in candidates.items()}
        counts = {"images_scored": scores["top1"].scored, "images_skipped": scores["top1"].skipped}
        return {name: each.top1 for name, each in scores.items()} | counts

    return evaluate


class Score(NamedTuple):
    """Top-1 in percent, of how many pictures, and how many more could not be decoded; of all processes."""

    top1: float
    scored: int
    skipped: int


@torch.no_grad()  # inference mode would spoil the tensors that sharded parameters are gathered into
def score(
    config: FinetuneConfig, accelerator: Accelerator, agreement: Agreement, model: nn.Module, loader: EvalLoader
) -> Score:
    """Share of the held-out pictures that the model classifies rightly; every picture counts once.

    Args:
        config: Its precision is used for scoring too.
        accelerator: Its processes each score their own pictures; nothing is padded.
        agreement: Ends all processes if one of them cannot go on.
        model: The bare model (a wrapper's collective calls would hang where processes have unequal shares).
        loader: This process's share of the pictures.

    Raises:
        RunError: If none can be decoded.
        SourceError: If more cannot be decoded than ``data.max_undecodable`` puts up with.
    """
    device = accelerator.device
    correct, total, skipped = torch.zeros((), dtype=torch.long, device=device), 0, 0
    was_training = model.training
    model.eval()
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    with whole_parameters(model), half, agreement.together():
        for batch in loader:
            skipped += len(batch.undecodable)
            if len(batch.classes) == 0:  # none of them could be decoded
                continue
            correct += (model(batch.pictures).argmax(dim=1) == batch.classes).sum()
            total += len(batch.classes)
    model.train(was_training)
    counts = torch.stack([correct, *torch.tensor([total, skipped], device=device)])
    right, scored, skipped = accelerator.reduce(counts, "sum").tolist()
    check_undecodable(skipped, scored + skipped, "held-out", config.data.max_undecodable)  # the same on all processes
    return Score(100 * right / scored, scored, skipped)


def run(config: FinetuneConfig, resume: str, stop: StopRequest) -> None:
    """Train, then say how well, and what to do with the result."""
    result = finetune(config, resume=resume, stop=stop)
    last, folder = result.history[-1], config.output_dir
    scored, damaged = int(last["images_scored"]), int(last["undecodable"]) + int(last["images_skipped"])
    lines = [f"top-1 {result.top1:.2f}% of {scored} validation images; wrote {folder}"]
    if damaged:
        lines += [f"{damaged} damaged image{'s were' if damaged > 1 else ' was'} left out; the log names what and why"]
    lines += [
        f"  classify an image: python -m arm_zoo predict IMAGE --model {shlex.quote(folder)}",
        f'  load it in Python: timm.create_model("local-dir:{folder}", pretrained=True), after import arm_zoo, timm',
    ]
    say("\n".join(lines))


main = partial(command_line.main, "finetune")
