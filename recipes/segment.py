"""Training of a segmentation head on the feature maps of any timm model, frozen or finetuned.

python -m recipes.segment model=arm_base_patch16_224 pretrained=FOLDER data.source=ADE20K output_dir=runs/segment
accelerate launch -m recipes.segment model=vit_small_patch16_224 pretrained=vit_small_patch16_224.dino head=fpn ...
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that mistakes are reported at once
    from recipes import command_line

    command_line.main("segment")
    raise SystemExit

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from arm_zoo.heads.models import save_segmenter
from arm_zoo.heads.segmentation import segment
from arm_zoo.images.masks import IGNORED
from arm_zoo.loading import load, timm_entries
from recipes import command_line
from recipes.command_line import say
from recipes.config import NOT_BUILT, SegmentConfig
from recipes.data.batches import Batch
from recipes.data.pixels import PixelLoader, PixelSource, open_pixels
from recipes.data.sources import tell
from recipes.errors import RunError
from recipes.objectives import Trained, TrainingObjective
from recipes.signals import StopRequest
from recipes.training.checkpoint import Metrics
from recipes.training.export import InputConfig
from recipes.training.parallel import Collectives, whole_parameters
from recipes.training.setup import train


def create_segmenter(config: SegmentConfig, source: PixelSource) -> nn.Module:
    """A random head on a backbone with the weights that `config.pretrained` names, or with random ones."""
    try:
        model: Any = config.build(num_classes=len(source.class_names))
        if config.pretrained is not None:
            is_entry = config.pretrained in timm_entries()
            names = (config.pretrained, None) if is_entry else (config.model, config.pretrained)
            loaded = load(*names, as_backbone=True, num_classes=0, **{"in_chans": model.in_chans, **config.model_args})
            model.backbone.load_state_dict(loaded.model.state_dict())
        elif config.frozen:
            tell("pretrained names no weights: the head learns on a frozen backbone with random weights")
    except NOT_BUILT as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"no segmenter can be made of model={config.model} and pretrained={config.pretrained}: {reason}"
        ) from error
    return model


def pixel_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, the mean over the pixels that have a class; 0 if none has."""
    logits, labels = model(batch.images).float(), batch.classes.long()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def evaluation(
    config: SegmentConfig,
    collectives: Collectives,
    models: Mapping[str, nn.Module],
    source: PixelSource,
    inputs: InputConfig,
) -> Callable[[int], Metrics]:
    """A function that scores the model on the validation images, given the epochs done: mIoU in percent."""
    collectives.on_main(source.test.check)  # now, not at the end of the first epoch
    accelerator, model = collectives.accelerator, models["model"]
    device, window = accelerator.device, inputs["input_size"][1:]
    places = range(accelerator.process_index, len(source.test), accelerator.num_processes)
    half = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def evaluate(epochs_done: int) -> Metrics:
        if epochs_done % config.evaluate_every and epochs_done != config.epochs:
            return {}
        metric, was_training = MulticlassJaccardIndex(len(source.class_names), ignore_index=IGNORED), model.training
        metric = metric.to(device)
        model.eval()
        broadcast(list(model.buffers()))  # score with the batch norms' statistics of the main process, as exported
        with whole_parameters(model), half, collectives.together():
            for place in places:
                image, labels = source.test[place]
                found = segment(model, image, window, inputs["mean"], inputs["std"])
                metric.update(found[None], labels[None].to(device))
        model.train(was_training)
        return {"miou": 100 * metric.compute().item(), "images_scored": len(source.test)}

    return evaluate


def export(trained: Trained) -> None:
    """Write a folder that `timm.create_model` loads and `python -m eval.segmentation` scores."""
    config: Any = trained.config
    save_segmenter(trained.folder, trained.model, config.head, trained.inputs, list(trained.source.class_names))


SEGMENTATION = TrainingObjective(
    create=create_segmenter,
    loss=lambda config, source: pixel_loss,
    evaluation=evaluation,
    export=export,
    open=open_pixels,
)


def run(config: SegmentConfig, resume: str, stop: StopRequest) -> None:
    """Train, then print the mIoU."""
    trained = train(config, SEGMENTATION, "segment", resume, stop, PixelLoader)
    last, folder = trained.history[-1], config.output_dir
    say(f"mIoU {last['miou']:.2f}% of {int(last['images_scored'])} validation images; wrote {folder}")
    say(f"  score it again: python -m eval.segmentation --model local-dir:{folder} --data {config.data.source}")


main = partial(command_line.main, "segment")
