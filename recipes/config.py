"""Typed training configurations: a YAML file and `key=value` overrides, checked before anything is built.

Importing this module imports neither torch nor timm, so that mistakes in keys, values and files are reported at once.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from arm_zoo.images.errors import SourceError
from arm_zoo.images.locate import locate
from recipes.data.config import BUILT_IN, DataConfig
from recipes.data.splits import fewer_training_images, too_large_a_batch, validation_fraction
from recipes.parsing import (
    ABOVE_ZERO,
    BELOW_ONE,
    ONE_OR_MORE,
    PROBABILITY,
    SEED,
    ZERO_OR_MORE,
    ConfigError,
    Limit,
    filled,
    limited,
    missing,
    read_yaml,
)

if TYPE_CHECKING:  # torch takes seconds to import, and most mistakes can be found without it
    from torch import nn

ENTRY = re.compile(r"[a-z]\w*(\.\w+)?")  # a text that may be an entry's name, with or without a tag
ConfigT = TypeVar("ConfigT", bound="Config")
# The keys of all recipes that name files or folders: the shell leaves the ~ of key=~/folder alone. Those of `data` are
# expanded where sources are located.
PATHS = ("output_dir", "pretrained", "dvae", "output", "cache", "export")

CONTRASTIVE = "moco"  # the objective that takes two views of each image, made as `recipes.data.views` says
# What that objective restricts: key -> the only value that it allows, and the reason.
TWO_VIEWS: dict[str, tuple[Any, str]] = {
    "max_batch_per_device": (None, "which compares all images of a step, so that they go through the model at once"),
    "fsdp": (False, "whose momentum encoder needs whole parameters"),
    "data.randaugment": (None, "which changes colours in its own way"),
}
# Keywords of a model that are no `model_args`, as the recipe sets them -> the reason, and what to type instead.
SET_BY_ALL = {
    "device": "the recipe chooses the device; type device=auto or device=cpu",
    "dtype": "parameters are float32; type precision=fp32 or precision=bf16 for the computation",
}
LOADED = dict.fromkeys(("pretrained", "checkpoint_path"), "the recipe loads the weights; type pretrained=WEIGHTS")
NO_SETTING = "it is no setting of a model that a recipe takes; leave it out"
NOT_TAKEN = dict.fromkeys(("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"), NO_SETTING)
TAKEN_BY_MODELS = "as model_args.NAME the model's keywords, with values as it takes them"
# What making a model raises where it does not take the arguments: few of timm's models check theirs.
NOT_BUILT = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
BETAS: Limit = ("a list of two numbers of 0 up to, not including, 1", lambda x: all(0 <= beta < 1 for beta in x))


@dataclass(frozen=True)
class Config:
    """What `load_config` fills in and checks; each method returns the problems it finds, by key."""

    def conflicts(self) -> dict[str, str]:
        """Values that are fine on their own, but do not go together."""
        return {}

    def unready(self) -> dict[str, str]:
        """What a run needs and this machine does not have."""
        return {}

    def unbuildable(self, to_run: bool) -> dict[str, str]:
        """Why the model cannot be built. That takes seconds of imports, so it is asked once all else is right."""
        return {}


@dataclass(frozen=True)
class TrainConfig(Config):
    """The settings that all trainings share; a key means the same in every YAML file."""

    model: str = limited("", ("a model name; `python -m arm_zoo list` shows them", bool))
    model_args: dict[str, Any] = field(default_factory=dict)  # keywords of the model, as model_args.NAME
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = limited("", ("a folder to write to, as in output_dir=runs/first", bool))
    seed: int = limited(0, SEED)

    epochs: int = limited(100, ONE_OR_MORE)
    global_batch: int = limited(1024, ONE_OR_MORE)  # images per optimizer step, over all processes
    base_lr: float = limited(1.5e-4, ABOVE_ZERO)  # for 256 images: the peak is base_lr * global_batch / 256
    min_lr: float = limited(0.0, ZERO_OR_MORE)
    warmup_epochs: float = limited(5.0, ZERO_OR_MORE)
    weight_decay: float = limited(0.05, ZERO_OR_MORE)
    betas: tuple[float, float] = limited((0.9, 0.999), BETAS)
    clip_grad: float | None = limited(None, ABOVE_ZERO)  # L2 norm of all gradients together

    device: Literal["auto", "cpu"] = "auto"
    cpu_threads: int | None = limited(None, ONE_OR_MORE)  # of each process; null: torch's choice
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast; parameters, optimizer and scan states stay fp32
    # Larger parts of the global batch take several forward passes, whose gradients add up; null: all at once.
    max_batch_per_device: int | None = limited(None, ("a whole number, 2 or more", lambda x: x >= 2))
    compile: bool = False
    cuda_graphs: bool = False  # with compile, on GPUs: replay a step's kernel launches all at once
    fused_adamw: bool = True  # on CUDA; elsewhere the plain one is used
    gradient_checkpointing: bool = False  # recompute the blocks' activations: less memory, a third more work
    fsdp: bool = False  # shard parameters, gradients and optimizer over the processes

    log_every: int = limited(20, ONE_OR_MORE)  # steps between two readings of loss and gradient norm
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    checkpoint_epochs: int = limited(1, ONE_OR_MORE)  # a checkpoint at the end of every so many epochs,
    checkpoint_steps: int | None = limited(None, ONE_OR_MORE)  # after every so many optimizer steps,
    checkpoint_minutes: float | None = limited(10.0, ABOVE_ZERO)  # and when the last one is so old
    keep_last: int = limited(3, ONE_OR_MORE)  # newest checkpoints kept
    keep_every: int | None = limited(None, ONE_OR_MORE)  # and those at the end of every so many epochs

    # constants of the phase, not settings: without an annotation dataclasses ignore them
    labels_needed = False
    set_by_recipe = SET_BY_ALL

    @property
    def views(self) -> int:
        """How many views of each image a step trains on."""
        return 1

    def build(self, **keywords: Any) -> "nn.Module":
        """A new model, untrained; `keywords` win over `model_args`."""
        raise NotImplementedError

    def conflicts(self) -> dict[str, str]:
        """Conflicts of the data, the model, the schedule, the batch size, CUDA graphs and the device."""
        found = self.data.conflicts(self.device) | refused_keywords(self.model_args, self.set_by_recipe)
        if (warmup := self.warmup_epochs) >= self.epochs:
            found["warmup_epochs"] = f"warmup_epochs is {warmup:g} but epochs is {self.epochs}; allowed: fewer"
        if self.min_lr > (peak := self.base_lr * self.global_batch / 256):
            found["min_lr"] = (
                f"min_lr is {self.min_lr:g} but the peak is {peak:g} (base_lr * global_batch / 256); allowed: up to it"
            )
        if self.global_batch % 2:
            even = f"an even number, such as {self.global_batch + 1}"
            why = "every recipe draws the images of a step in twos, so that mixup, where it is on, mixes the same ones"
            said = f"global_batch is {self.global_batch}; allowed: {even}, as {why} on any number of processes"
            found["global_batch"] = said
        if self.cuda_graphs and (not self.compile or self.fsdp):
            found["cuda_graphs"] = "cuda_graphs is true; allowed: only with compile=true and fsdp=false"
        if self.data.labels_per_class is not None and not self.labels_needed:
            problem = f"data.labels_per_class is {self.data.labels_per_class}, but nothing here learns from labels"
            found["data.labels_per_class"] = f"{problem}; leave it out"
        for key, (allowed, reason) in TWO_VIEWS.items() if self.views == 2 else ():
            if (value := attrgetter(key)(self)) != allowed:
                typed = json.dumps(allowed)  # as in YAML: null, false
                found[key] = f"{key} is {value} but objective is {CONTRASTIVE}, {reason}; allowed: {key}={typed}"
        return found

    def unready(self) -> dict[str, str]:
        """Images, output folder, tracker and decoder, as far as they can be checked without reading an image."""
        found = self._wrong_images()
        if self.output_dir and (reason := why_not_writable(Path(self.output_dir))):
            found["output_dir"] = f"output_dir is {self.output_dir}, but {reason}; allowed: a folder to write to"
        if self.tracker != "none" and importlib.util.find_spec(self.tracker) is None:
            ways = f"`pip install {self.tracker}` or tracker=none"
            found["tracker"] = f"tracker is {self.tracker}, which is not installed; type {ways}"
        if self.data.decode == "gpu" and importlib.util.find_spec("torchcodec") is None:
            ways = "`pip install torchcodec` or data.decode=auto"
            found["data.decode"] = f"data.decode is gpu, which takes torchcodec, which is not installed; type {ways}"
        return found

    def _wrong_images(self) -> dict[str, str]:
        """Images that are missing, are too few, or would have the run's own figures among them at the next reading."""
        found = {}
        for key, name in (("data.source", self.data.source), ("data.validation", self.data.validation)):
            if not isinstance(name, str) or name in ("", *BUILT_IN):
                continue
            if self.output_dir and is_read_with(Path(name), Path(self.output_dir)):
                why = f"which lies in the folder {key}={name}: curves.png would be read as an image from then on"
                found["output_dir"] = f"output_dir is {self.output_dir}, {why}; allowed: a folder outside {name}"
            try:
                located = locate(name, one_split=self.data.validation is not None)
                if key == "data.source":
                    fraction = validation_fraction(self.data.validation, located.has_validation, self.labels_needed)
                    fewer = fewer_training_images(located, self.global_batch, fraction, self.labels_needed)
                    if fewer is not None:
                        found["global_batch"] = too_large_a_batch(self.global_batch, fewer)
            except SourceError as error:
                found[key] = f"{key}: {error}"
        return found

    def unbuildable(self, to_run: bool) -> dict[str, str]:
        """An unknown model, or sizes that do not fit each other."""
        try:
            if self.model:
                self.build(device="meta")
        except NOT_BUILT as error:
            given = ", ".join(f"model_args.{name}={value!r}" for name, value in self.model_args.items())
            model = f"model {self.model!r}{f' with {given}' if given else ''}"
            if isinstance(error, ValueError):  # which says what is allowed
                return {"model": f"{model}: {error}"}
            allowed = f"; allowed: {TAKEN_BY_MODELS}" if given else ""
            return {"model": f"{model}: {type(error).__name__}: {error}{allowed}"}
        return {}


def refused_keywords(model_args: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, str]:
    """The problem of each of `model_args` that has a reason, by keyword, not to be typed."""
    typed = {name: f"model_args.{name}" for name in reasons if name in model_args}
    return {key: f"{key} is {model_args[name]}, but {reasons[name]}" for name, key in typed.items()}


def is_read_with(images: Path, folder: Path) -> bool:
    """Whether a folder, which need not exist yet, is or lies in a folder of images, and in no hidden one there."""
    images, folder = (path.expanduser().resolve() for path in (images, folder))
    if not (images.is_dir() and folder.is_relative_to(images)):
        return False
    return not any(part.startswith(".") for part in folder.relative_to(images).parts)


def why_not_writable(folder: Path) -> str | None:
    """The reason why a folder, which need not exist yet, cannot be written to; None if it can."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    try:
        # asking for a file tells the truth where permission bits do not, as for root and on read-only disks
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        return f"{nearest} cannot be written to ({error.strerror})"
    return None


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Self-supervised pretraining; the defaults are the paper's ARM-B."""

    epochs: int = limited(1600, ONE_OR_MORE)
    global_batch: int = limited(2048, ONE_OR_MORE)
    warmup_epochs: float = limited(40.0, ZERO_OR_MORE)
    betas: tuple[float, float] = limited((0.9, 0.95), BETAS)
    clip_grad: float | None = limited(3.0, ABOVE_ZERO)
    objective: str = "autoregressive"  # what is learnt, a key of `recipes.objectives.TRAINING`
    dvae: str | None = None  # file or address of the dVAE's encoder, for model_args.target=dvae_tokens

    def conflicts(self) -> dict[str, str]:
        """Also, predicted tokens without a dVAE, or a dVAE whose tokens are not predicted."""
        found, predicted = super().conflicts(), self.model_args.get("target")
        if (predicted == "dvae_tokens") != (self.dvae is not None):
            problem = f"dvae is {self.dvae} but model_args.target is {predicted or 'normed_pixel'}"
            found["dvae"] = f"{problem}; allowed: dvae=FILE with model_args.target=dvae_tokens, or neither"
        return found

    def unready(self) -> dict[str, str]:
        """Also, the file of the dVAE, unless it is an address."""
        found = super().unready()
        is_address = str(self.dvae).startswith(("https://", "http://"))
        if self.dvae is not None and not is_address and not Path(self.dvae).is_file():
            ways = "OUTPUT_DIR/model.safetensors of `python -m recipes.dvae`, or OpenAI's encoder.pkl or its address"
            found["dvae"] = f"dvae is {self.dvae}, which is no file; allowed: {ways}"
        return found

    @property
    def views(self) -> int:
        return 2 if self.objective == CONTRASTIVE else 1

    def build(self, **keywords: Any) -> "nn.Module":
        import arm_zoo

        return arm_zoo.create_pretraining_model(self.model, self.objective, **{**self.model_args, **keywords})


@dataclass(frozen=True)
class DVAEConfig(TrainConfig):
    """Training of a small dVAE without labels; the settings are ours."""

    model: str = limited("dvae", ("dvae", lambda x: x == "dvae"))  # whose `model_args` are those of `DVAE`
    epochs: int = limited(20, ONE_OR_MORE)
    base_lr: float = limited(1e-3, ABOVE_ZERO)
    warmup_epochs: float = limited(1.0, ZERO_OR_MORE)
    global_batch: int = limited(256, ONE_OR_MORE)
    weight_decay: float = limited(0.0, ZERO_OR_MORE)
    clip_grad: float | None = limited(1.0, ABOVE_ZERO)

    def build(self, **keywords: Any) -> "nn.Module":
        from arm_zoo.base import check_keywords
        from arm_zoo.pretraining.dvae import DVAE

        arguments = {**self.model_args, **keywords}
        check_keywords(self.model, arguments, inspect.signature(DVAE).parameters)
        return DVAE(**arguments)


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Supervised training, from a pretrained encoder or from scratch; the defaults are the paper's ARM-B."""

    base_lr: float = limited(5e-4, ABOVE_ZERO)
    min_lr: float = limited(1e-6, ZERO_OR_MORE)
    pretrained: str | None = None  # a folder or file of weights, or the name of an entry; null: from scratch
    layer_decay: float = limited(0.65, ("above 0, up to 1 (1: one rate for all layers)", lambda x: 0 < x <= 1))
    drop_path: float = limited(0.1, BELOW_ONE)
    label_smoothing: float = limited(0.1, BELOW_ONE)
    mixup: float = limited(0.8, ZERO_OR_MORE)  # alpha of the Beta distribution that fractions are drawn from; 0: none
    cutmix: float = limited(1.0, ZERO_OR_MORE)
    mixup_probability: float = limited(1.0, PROBABILITY)  # that a batch is mixed at all
    mixup_switch_probability: float = limited(0.5, PROBABILITY)  # that it is by cutmix, where both are on
    ema_decay: float | None = limited(0.99992, ("a number above 0 and below 1", lambda x: 0 < x < 1))
    evaluate_every: int = limited(1, ONE_OR_MORE)  # epochs

    labels_needed = True
    set_by_recipe = (
        SET_BY_ALL | NOT_TAKEN | LOADED | {"drop_path_rate": "the recipe has a setting for it; type drop_path=RATE"}
    )

    def build(self, **keywords: Any) -> "nn.Module":
        import timm

        from arm_zoo.loading import entries

        if self.model not in (names := sorted(name for name in entries() if "." not in name)):
            raise ValueError(f"unknown; choose one of {', '.join(names)}")
        return timm.create_model(self.model, drop_path_rate=self.drop_path, **{**self.model_args, **keywords})

    def unready(self) -> dict[str, str]:
        """Also, the weights to start from, unless they may be an entry."""
        return super().unready() | ({} if ENTRY.fullmatch(self.pretrained or "") else self._missing_start(()))

    def unbuildable(self, to_run: bool) -> dict[str, str]:
        """Also, an unknown entry in `pretrained`."""
        from arm_zoo.loading import entries

        return super().unbuildable(to_run) | (self._missing_start(entries()) if to_run else {})

    def _missing_start(self, names: Collection[str]) -> dict[str, str]:
        if self.pretrained is None or self.pretrained in names or Path(self.pretrained).exists():
            return {}
        similar = difflib.get_close_matches(self.pretrained, names, cutoff=0.4)
        entry = f"an entry{' such as ' if similar else ''}{', '.join(similar)}"
        return {
            "pretrained": f"pretrained is {self.pretrained!r}, which does not exist; allowed: {entry} (`python -m "
            "arm_zoo list` shows them, and which have weights), a folder with model.safetensors or such a file "
            "(`python -m recipes.pretrain` writes OUTPUT_DIR/pretraining_model), or null"
        }


@dataclass(frozen=True)
class SegmentConfig(TrainConfig):
    """A segmentation head on the feature maps of any model of timm, frozen or trained with it.

    `data.source` is a folder in the layout of ADE20K or Pascal VOC (`arm_zoo.images.masks`). `data.validation` may
    name another such folder, whose validation images are then scored. Of the other keys of `data`, only `workers` and
    `flip` may be set.
    """

    epochs: int = limited(40, ONE_OR_MORE)
    global_batch: int = limited(16, ONE_OR_MORE)
    base_lr: float = limited(1.6e-2, ABOVE_ZERO)  # a peak of 1e-3 for 16 images
    warmup_epochs: float = limited(1.0, ZERO_OR_MORE)
    pretrained: str | None = None  # a folder or file of weights, or the name of an entry; null: drawn at random
    head: Literal["linear", "fpn"] = "linear"
    frozen: bool = True  # the backbone's weights stay as they are
    # Sizes of training images, 1 where an image just covers what the model takes; a part of that size is cut out.
    scale: tuple[float, float] = limited(
        (0.5, 2.0), ("two sizes above 0, as in [0.5, 2.0]", lambda x: 0 < x[0] <= x[1])
    )
    evaluate_every: int = limited(1, ONE_OR_MORE)  # epochs

    labels_needed = True
    set_by_recipe = (
        SET_BY_ALL | NOT_TAKEN | LOADED | {"num_classes": "the classes are those of data.source; leave it out"}
    )

    def build(self, **keywords: Any) -> "nn.Module":
        import torch

        from arm_zoo.heads.models import Segmenter
        from arm_zoo.loading import timm_entries

        if self.model not in timm_entries():
            raise ValueError("unknown; allowed: a model of `timm.list_models()` or of `python -m arm_zoo list`")
        with torch.device(keywords.pop("device", "cpu")):
            classes = keywords.pop("num_classes", 2)
            arguments = {**self.model_args, **keywords}
            return Segmenter(self.model, arguments, self.head, classes, frozen=self.frozen)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation to normalise images by: those of the weights, or ImageNet's for grey models."""
        from timm import get_pretrained_cfg
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        from arm_zoo.loading import saved_config, timm_entries

        own = saved_config(self.pretrained).get("pretrained_cfg", {}) if self.pretrained else {}
        name = self.pretrained if self.pretrained in timm_entries() else self.model
        entry: Any = get_pretrained_cfg(name)
        mean, std = own.get("mean", entry.mean), own.get("std", entry.std)
        return (tuple(mean), tuple(std)) if len(mean) == 3 else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def conflicts(self) -> dict[str, str]:
        """Also, keys of `data` that have no use here."""
        problems = self.data.unused({"source", "validation", "workers", "flip"}, "segmentation")
        if isinstance(self.data.validation, float):
            problems["data.validation"] = (
                f"data.validation is {self.data.validation}; allowed: another folder, or null"
            )
        return super().conflicts() | problems

    def _wrong_images(self) -> dict[str, str]:
        found = {}
        for key, name in (("data.source", self.data.source), ("data.validation", self.data.validation)):
            if isinstance(name, str) and not (name and Path(name).expanduser().is_dir()):
                problem = f"{key} is {name}, which is no folder" if name else f"{key} is missing"
                found[key] = f"{problem}; allowed: a folder of images with masks"
        return found


def load_config(
    kind: type[ConfigT],
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    to_run: bool = True,
    fit: Callable[[ConfigT, Set[str]], tuple[Mapping[str, Any], str]] | None = None,
) -> ConfigT:
    """Read a YAML file, apply overrides such as "data.source=digits" (the last one wins) and check the result.

    A `ConfigError` names all problems at once, and those of the model once all else is right. With `to_run`, nothing
    may be missing, files must exist and the output folder must be writable. `fit` is called with the configuration so
    far and the keys that were set; it returns values for other keys, and a text about them to print.
    """
    problems: dict[str, str] = {}
    values = {} if file is None else read_yaml(file)
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals:
            values[key.strip()] = text.strip()
        else:
            problems[override] = f"{override!r} is no override; type key=value, as in epochs=3"
    for key in PATHS:
        if str(values.get(key)).startswith("~/"):
            values[key] = str(Path(values[key]).expanduser())
    config, told = filled(kind, values, problems), ""
    if fit is not None:
        try:
            fitted, told = ({}, "") if problems else fit(config, values.keys())
        except ConfigError as error:
            problems = error.problems
        if problems:  # those of keys that are not fitted yet would mislead
            unready = config.unready().items() if to_run else ()
            raise ConfigError({key: problem for key, problem in unready if key in values} | problems)
        config = filled(kind, {**fitted, **values}, problems)
    found = config.conflicts()
    if to_run:
        found = missing(config) | config.unready() | found
    if problems := found | problems or config.unbuildable(to_run):
        given = {key: problems[key] for key in values if key in problems}
        raise ConfigError(given if given and fit else problems)  # problems of fitted values follow from the given ones
    if told:
        print(told, file=sys.stderr)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, as `load_config` reads it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
