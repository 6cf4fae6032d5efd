"""`python -m recipes.finetune data.source=FOLDER` and nothing else: settings fitted to the images, and printed.

The defaults of `FinetuneConfig` are the paper's, for a million images on many GPUs. Without a YAML file, this module
chooses all other settings so that the command works for a folder of a few dozen images as well as for thousands. What
a person sets always wins. Counting the images of a folder does not import torch.
"""

import json
import os
import shlex
from collections.abc import Set
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from arm_zoo.images.errors import SourceError
from arm_zoo.images.listing import class_folders
from arm_zoo.images.locate import locate
from arm_zoo.messages import plural
from recipes.config import ENTRY, FinetuneConfig
from recipes.data.config import BUILT_IN
from recipes.data.splits import classes_without_images, held_out, none_to_hold_out, validation_fraction
from recipes.parsing import ConfigError

COLOUR, GREY = "arm_tiny_patch8_64", "arm_pico_patch2_8"  # entries whose weights come with the package
PEAK = 5e-4  # learning rate, whatever the batch
LARGEST_BATCH = 64
FEWEST_EPOCHS, MOST_EPOCHS = 5, 10
IMAGES_SEEN = 4000  # over all epochs, between these two
RUNS = Path("runs")


class Survey(NamedTuple):
    """What there is to train on."""

    train: int  # training images, without those held out
    classes: int
    grey: bool = False
    held_out: float | None = None  # the fraction of the images to hold out for validation, if any


class Choice(NamedTuple):
    """Settings that belong together, and why they are as they are."""

    reason: str
    values: dict[str, Any]


def fitted(config: FinetuneConfig, given: Set[str], going_on: bool = True) -> tuple[dict[str, Any], str]:
    """Values for keys that are not `given`, and a table of them with the reasons; `going_on` is `--resume auto`."""
    if not config.data.source:
        raise ConfigError({"data.source": "data.source is missing; type data.source=FOLDER, with a folder per class"})
    try:
        found = survey(config)
    except SourceError as error:
        raise ConfigError({"data.source": f"data.source: {error}"}) from error
    choices = choose(config, given, found, going_on)
    first = os.environ.get("RANK", "0") == "0"  # of several processes only the first one prints
    values = {key: value for choice in choices for key, value in choice.values.items()}
    return values, described(config, found, choices) if first else ""


def survey(config: FinetuneConfig) -> Survey:
    """Count images and classes: in a folder by listing it, in other sources by opening them."""
    data = config.data
    located = None if data.source in BUILT_IN else locate(data.source, one_split=data.validation is not None)
    if located is None or located.kind != "images" or "train" not in located.splits:
        from recipes.data.sources import open_source  # imports the libraries that read them, which takes seconds

        source = open_source(data)
        if source.train.size is None:
            raise SourceError("the training stream does not tell its size; type data.train_size=IMAGES")
        return Survey(source.train.size, len(source.class_names), source.channels == 1, source.held_out)
    [folder] = located.splits["train"]
    classes = {name: len(paths) for name, paths in class_folders(folder)[0].items()}
    images = list(classes.values())
    fraction = validation_fraction(data.validation, located.has_validation, labels_needed=True)
    if sum(images) == 0:
        raise SourceError(f"{folder!r} holds images but no class folders; allowed: FOLDER/CLASS/IMAGE")
    if len(images) == 1:
        raise SourceError(f"{folder!r} has one class folder; a classifier needs two classes: FOLDER/CLASS/IMAGE")
    if 0 in images:
        raise classes_without_images(data.source, [name for name, count in classes.items() if count == 0])
    if fraction and max(images) == 1:
        raise none_to_hold_out(data.source)
    most = data.labels_per_class or max(images)
    train = sum(min(most, count - held_out(count, fraction) if fraction else count) for count in images)
    return Survey(train, len(images), held_out=fraction)


def choose(config: FinetuneConfig, given: Set[str], found: Survey, going_on: bool = True) -> list[Choice]:
    """Choose the settings that were not given, to fit the images and the settings that were given."""
    output = Path(config.output_dir) if "output_dir" in given else _free_folder(config.data.source)
    trained_on, earlier = _source_and_batch(output)  # a run goes on only with its own batch, even if images were added
    if not going_on or trained_on != config.data.source or not any((output / "checkpoints").glob("step-*")):
        earlier = None
    batch = config.global_batch if "global_batch" in given else earlier or _batch(found.train)
    enough = min(MOST_EPOCHS, max(FEWEST_EPOCHS, IMAGES_SEEN // found.train))  # fewer for many images
    epochs = config.epochs if "epochs" in given else enough
    if "warmup_epochs" in given:
        epochs = max(epochs, int(config.warmup_epochs) + 1)
    every = max(1, epochs // 4)
    of_batch = f"of the run in {output}, to go on with" if earlier else f"for {plural(found.train, 'training image')}"
    no_validation = found.held_out is not None and config.data.validation is None
    choices = [
        _start(config, given, found),
        Choice(
            f"there are no validation images: {found.held_out or 0:.0%} of each class are, always the same ones",
            {"data.validation": found.held_out} if no_validation else {},
        ),
        Choice(of_batch, {"global_batch": batch}),
        Choice(f"{plural(found.train // batch, 'step')} each", {"epochs": epochs, "warmup_epochs": epochs / 10}),
        Choice(
            f"a peak of {PEAK:g} at the head, less in the layers below it",
            {"base_lr": PEAK * 256 / batch, "min_lr": 0.0, "layer_decay": 0.75},
        ),
        Choice(
            "against overfitting in long trainings; this one is short",
            {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "ema_decay": None},
        ),
        Choice("epochs between scores and checkpoints", {"evaluate_every": every, "checkpoint_epochs": every}),
        Choice("right on every device; curves.png shows the figures", {"precision": "fp32", "tracker": "none"}),
        Choice("processes that decode images", {"data.workers": 1 if found.train < 1000 else config.data.workers}),
        Choice(
            "augmentation; data.flip=0 where left and right matter, as in writing",
            {} if found.grey else {"data.random_crop": (0.5, 1.0), "data.flip": 0.5},
        ),
        Choice("where the results go", {"output_dir": str(output)}),
    ]
    left = (Choice(why, {key: what[key] for key in what if key not in given}) for why, what in choices)
    return [choice for choice in left if choice.values]


def _start(config: FinetuneConfig, given: Set[str], found: Survey) -> Choice:
    """Choose the model and the weights to start from."""
    bundled = GREY if found.grey else COLOUR
    if "model" in given:
        reason = f"from scratch, as model was named; pretrained={config.model} starts trained"
        return Choice(reason, {"pretrained": None})
    if "pretrained" not in given:
        reason = f"the trained model for {'grey' if found.grey else 'colour'} images that is included"
        return Choice(reason, {"model": bundled, "pretrained": bundled})
    if config.pretrained is None:
        return Choice("the smallest model for such images; it starts from scratch", {"model": bundled})
    return Choice("of the weights to start from", {"model": _architecture(config.pretrained)})


def _architecture(pretrained: str) -> str:
    """The model that these weights belong to; "" if neither their name nor a config.json says so."""
    path = Path(pretrained)
    if not path.exists():
        return pretrained.partition(".")[0] if ENTRY.fullmatch(pretrained) else ""
    if path.name == "pretraining_model":  # the backbone made of it lies beside it
        path = path.with_name("backbone")
    try:
        config = json.loads(((path if path.is_dir() else path.parent) / "config.json").read_text(encoding="utf-8"))
        return str(config.get("architecture", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _batch(images: int) -> int:
    """A global batch that gives three or more steps an epoch, and an even part to each process."""
    unit = 2 * int(os.environ.get("WORLD_SIZE", "1"))
    most = min(images // 3, max(unit, LARGEST_BATCH)) // unit
    return unit * 2 ** max(0, most.bit_length() - 1)


def _free_folder(source: str) -> Path:
    """`runs/NAME`, with a number behind it if that folder belongs to another source of this name."""
    parts = Path(source.removeprefix("hf://").rstrip("/")).expanduser().absolute().parts
    name = next((part for part in reversed(parts) if not set(part) & set("*?[{/")), "run")  # a pattern is no name
    folders = (RUNS / (name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(folder for folder in folders if _source_and_batch(folder)[0] in (None, source))


def _source_and_batch(run: Path) -> tuple[str | None, int | None]:
    """The data.source and global_batch of the run in a folder: None if the folder is empty, "" if it is no run's."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return str(config["data"]["source"]), int(config["global_batch"])
    except FileNotFoundError:
        return "" if run.is_dir() and any(run.iterdir()) else None, None
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError):
        return "", None


def described(config: FinetuneConfig, found: Survey, choices: list[Choice]) -> str:
    """The table of the chosen settings, as a person would type them."""
    typed = [" ".join(f"{key}={shlex.quote(_text(value))}" for key, value in each.values.items()) for each in choices]
    width = max(map(len, typed))
    images = f"{plural(found.train, 'image')} of {found.classes} classes"
    lines = [f"{config.data.source}: {images} to train on. Chosen for them:"]
    lines += [f"  {settings:{width}}  {choice.reason}" for settings, choice in zip(typed, choices, strict=True)]
    return "\n".join([*lines, "Add any of these as key=value to change it."])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
