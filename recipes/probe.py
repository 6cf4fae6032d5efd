"""How good are frozen features? k-NN and a linear classifier on them, the quick check of a pretrained model.

python -m recipes.probe --weights runs/pretrain_digits/pretraining_model data.source=digits
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from arm_zoo.files import described_by_folder, read_config, write_text
from arm_zoo.images.listing import SourceError
from arm_zoo.loading import list_entries, load, unknown_model
from recipes import command_line
from recipes.config import ABOVE_ZERO, ONE_OR_MORE, WHOLE, Config, DataConfig
from recipes.data.loader import EvalLoader
from recipes.data.sources import Split, open_source
from recipes.data.undecodable import check_undecodable
from recipes.errors import RunError, reporting_mistakes
from recipes.parsing import limited

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LINEAR_BATCH = 256
HELD_OUT = 0.1  # of the training features, to choose the rate on
COMPARED_AT_ONCE = 256  # images whose similarities to all training images are held in memory


@dataclass(frozen=True)
class ProbeConfig(Config):
    """What `python -m recipes.probe` takes as `key=value`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: str = ""  # a timm entry, for a bare file of weights; folders tell theirs, which must be it
    model_args: dict[str, Any] = field(default_factory=dict)  # keywords of the model, as model_args.NAME
    output: str = limited("probe.json", ("a file to write to, as in output=probe.json", bool))
    seed: int = limited(0, WHOLE)
    device: Literal["auto", "cpu"] = "auto"
    batch: int = limited(256, ONE_OR_MORE)  # images per forward pass
    neighbours: int = limited(20, ONE_OR_MORE)
    temperature: float = limited(0.07, ABOVE_ZERO)
    linear_epochs: int = limited(100, ONE_OR_MORE)


class Features(NamedTuple):
    """Features of one split, (N, D), float32, the class indices, (N,), and how many images could not be decoded."""

    values: Tensor
    classes: Tensor
    skipped: int = 0


def load_backbone(weights: Path, config: ProbeConfig) -> tuple[nn.Module, dict[str, Any]]:
    """A model that gives pooled features, and how images are prepared for it.

    Mean and standard deviation are among the latter where the weights tell those that the model was trained with. The
    weights are a `pretraining_model/`, a folder that timm's `local-dir:` takes, a file, an entry or "hf-hub:ORG/NAME".
    """
    if config.model and config.model not in (known := list_entries()):
        raise RunError(str(unknown_model(config.model, known)))
    names = (config.model, weights) if config.model else (weights, None)
    folder = weights.parent if described_by_folder(weights) else weights
    own = read_config(folder).get("pretraining_model") if folder.is_dir() else None
    torch.manual_seed(config.seed)  # pretraining has no class token: that of the backbone is new
    try:
        size = {"img_size": own["img_size"]} if own else {}
        model, _, _, said = load(*names, as_backbone=True, num_classes=0, **{**size, **config.model_args})
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"no model can be made of {weights} with model={config.model!r} and model_args={config.model_args}: "
            f"{type(error).__name__}: {error}; allowed: weights of that model, and as model_args.NAME its keywords "
            "with values as it takes them"
        ) from error
    inputs = resolve_model_data_config(model)
    if own := said.get("pretraining_model"):
        inputs |= {"input_size": (model.in_chans, *model.patch_embed.img_size), "crop_pct": 1.0}
    if own or (weights.exists() and not said):  # an entry's own configuration tells them
        del inputs["mean"], inputs["std"]
    return model, inputs


@torch.inference_mode()
def extract(model: nn.Module, split: Split, inputs: dict[str, Any], config: ProbeConfig, purpose: str) -> Features:
    """The model's pooled features of every image that can be decoded, without augmentation."""
    device = next(model.parameters()).device
    loader = EvalLoader(split, inputs, config.batch, workers=config.data.workers, device=device)
    quiet, values, classes, skipped = not sys.stdout.isatty(), [], [], 0
    for batch in track(loader, f"features of the {purpose} images", total=None, transient=True, disable=quiet):
        skipped += len(batch.undecodable)
        if len(batch.classes) == 0:
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            values.append(model(batch.images).float())
        classes.append(batch.classes)
    scored = sum(map(len, classes))
    check_undecodable(skipped, scored + skipped, purpose, config.data.max_undecodable)
    features = torch.cat(values)
    if broken := int((~features.isfinite()).any(dim=1).sum()):
        raise RunError(f"the model's features of {broken} of {scored} {purpose} images are not finite numbers")
    return Features(features, torch.cat(classes), skipped)


def knn_top1(train: Features, test: Features, neighbours: int, temperature: float) -> float:
    """Top-1 in percent of the vote of the nearest training images by cosine similarity.

    Each neighbour's vote is exp(similarity / temperature), as in DINO (arXiv:2104.14294, section 4.1).
    """
    number = int(train.classes.max()) + 1
    reference = F.normalize(train.values, dim=1)
    correct = 0
    for values, classes in zip(test.values.split(COMPARED_AT_ONCE), test.classes.split(COMPARED_AT_ONCE), strict=True):
        similarity = F.normalize(values, dim=1) @ reference.T
        nearest, places = similarity.topk(min(neighbours, len(reference)), dim=1)
        # Less the nearest one's similarity, which changes no vote's fraction: exp would overflow at low temperatures.
        weights = ((nearest - nearest[:, :1]).double() / temperature).exp()
        votes = weights.new_zeros(len(values), number).scatter_add_(1, train.classes[places], weights)
        correct += int((votes.argmax(dim=1) == classes).sum())
    return 100 * correct / len(test.classes)


def linear_top1(train: Features, test: Features, epochs: int, seed: int) -> tuple[float, float]:
    """Top-1 in percent of a linear classifier on standardised features; its rate is chosen on held-out ones."""
    std, mean = torch.std_mean(train.values, dim=0)
    train, test = (part._replace(values=(part.values - mean) / (std + 1e-6)) for part in (train, test))
    order = torch.randperm(len(train.classes), generator=torch.Generator().manual_seed(seed)).to(train.classes.device)
    parts = order.tensor_split([max(1, round(HELD_OUT * len(order)))])
    chosen_on, kept = (Features(train.values[part], train.classes[part]) for part in parts)
    number = int(train.classes.max()) + 1
    scores = [top1(layer, chosen_on) for layer in fit_linear(kept, number, RATES, epochs, seed)]
    rate = RATES[scores.index(max(scores))]
    [layer] = fit_linear(train, number, [rate], epochs, seed)
    return top1(layer, test), rate


def fit_linear(train: Features, classes: int, rates: Sequence[float], epochs: int, seed: int) -> list[nn.Linear]:
    """A classifier for each learning rate, all from zero and on the same batches: SGD, cosine decay."""
    layers = [nn.Linear(train.values.shape[1], classes, device=train.values.device) for _ in rates]
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        nn.init.zeros_(parameter)
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train.classes) // LINEAR_BATCH))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(train.classes), generator=generator).to(train.values.device)
        for batch in order.split(LINEAR_BATCH):
            losses = [F.cross_entropy(layer(train.values[batch]), train.classes[batch]) for layer in layers]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()  # independent of each other
            optimizer.step()
            schedule.step()
    return layers


@torch.inference_mode()
def top1(layer: nn.Linear, part: Features) -> float:
    return 100 * (layer(part.values).argmax(dim=1) == part.classes).float().mean().item()


def probe(weights: Path, config: ProbeConfig) -> dict[str, Any]:
    """Score the frozen features of weights as `load_backbone` takes them, and write `config.output`."""
    source: Any = open_source(config.data)  # with images to score on, since labels are needed
    model, inputs = load_backbone(weights, config)
    inputs = {"mean": source.mean, "std": source.std, **inputs}
    if (channels := inputs["input_size"][0]) != source.channels:
        raise SourceError(f"{config.data.source!r} has {source.channels} channels, the model takes {channels}")
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    model = model.eval().to("cuda" if on_gpu else "cpu")
    train = extract(model, source.train, inputs, config, "training")
    test = extract(model, source.test, inputs, config, "validation")
    linear, rate = linear_top1(train, test, config.linear_epochs, config.seed)
    result = {
        "weights": str(weights),
        "source": config.data.source,
        "images_train": len(train.classes),
        "images_test": len(test.classes),
        "images_train_skipped": train.skipped,
        "images_test_skipped": test.skipped,
        "features": train.values.shape[1],
        "knn_top1": knn_top1(train, test, config.neighbours, config.temperature),
        "neighbours": config.neighbours,
        "temperature": config.temperature,
        "linear_top1": linear,
        "linear_rate": rate,
        "linear_epochs": config.linear_epochs,
        "seed": config.seed,
    }
    write_text(config.output, json.dumps(result, indent=2) + "\n")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    does = "k-NN and linear probe on frozen features; from the repository's top."
    parser = argparse.ArgumentParser(prog="python -m recipes.probe", description=does)
    kinds = "pretraining_model/, backbone/, a finetuned folder, a file, an entry's name, or hf-hub:ORG/NAME"
    parser.add_argument("--weights", type=Path, required=True, help=kinds)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.source=..., neighbours=20, ...")
    arguments = parser.parse_intermixed_args(argv)
    config = command_line.read_config(parser, ProbeConfig, None, arguments.overrides)
    with reporting_mistakes(parser.prog):
        result = probe(arguments.weights, config)
    print(f"k-NN ({result['neighbours']} neighbours): {result['knn_top1']:.2f}% of {result['images_test']:,} images")
    print(f"linear (rate {result['linear_rate']:g}): {result['linear_top1']:.2f}%; wrote {config.output}")


if __name__ == "__main__":
    main()
