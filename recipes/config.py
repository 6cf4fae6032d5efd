"""Typed training configurations: a YAML file and ``key=value`` overrides, checked before anything is built."""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

Scalar = bool | int | float | str
ConfigT = TypeVar("ConfigT", bound="Config")


class ConfigError(ValueError):
    """Every problem of a configuration at once.

    Args:
        problems: Key -> one line that names what came and what is allowed.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  - ".join([f"the configuration has {count}:", *problems.values()]))


Limit = tuple[str, Callable[[Any], bool]]  # the allowed values in words and as a test
ONE_OR_MORE: Limit = ("1 or more", lambda x: x >= 1)
ABOVE_ZERO: Limit = ("above 0", lambda x: x > 0)
ZERO_OR_MORE: Limit = ("0 or more", lambda x: x >= 0)
SHARE: Limit = ("0 up to, not including, 1", lambda x: 0 <= x < 1)
ABOVE_ZERO_OR_NULL: Limit = ("above 0, or null", lambda x: x is None or x > 0)
ONE_OR_MORE_OR_NULL: Limit = ("1 or more, or null", lambda x: x is None or x >= 1)
PROBABILITY: Limit = ("0 to 1", lambda x: 0 <= x <= 1)
CROP_OR_NULL: Limit = (
    "two shares of the picture's area, as in [0.2, 1.0], or null",
    lambda x: x is None or 0 < x[0] <= x[1] <= 1,
)
RANDAUGMENT_OR_NULL: Limit = (
    "timm's words for RandAugment, as in rand-m9-mstd0.5-inc1, or null",
    lambda x: x is None or re.fullmatch(r"rand(-(m|mstd|mmax|n|inc|p|t|w)[\d.]+)*", x) is not None,
)
SOURCES = (
    "a folder of pictures, parquet files, WebDataset tars, hf://owner/name, or digits (scikit-learn's 1,797 "
    "handwritten digits), as in data.source=digits"
)
BETAS: Limit = ("two values of 0 up to, not including, 1", lambda x: all(0 <= beta < 1 for beta in x))


def limited(default: Any, limit: Limit) -> Any:
    """A dataclass field whose value is checked."""
    return field(default=default, metadata={"limit": limit})


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures come from and how training pictures are varied (keys ``data.NAME``).

    ``source`` and ``validation`` are written in one syntax (``recipes.sources``): a folder of pictures, parquet files,
    WebDataset tars, ``hf://owner/name``, or ``digits``. All variation is off unless asked for; it acts in the order
    random_crop, flip, randaugment, then (normalised) shift, rotation and zoom together, erase.
    """

    source: str = limited("", (SOURCES, bool))
    validation: str | None = None  # another source; null: the validation (or test) split of ``source``
    streaming: bool = False  # read in sequence, without unpacking first; for parquet, tars and the Hub
    train_size: int | None = limited(None, ONE_OR_MORE_OR_NULL)  # training pictures, where a stream does not tell
    shuffle_buffer: int = limited(4096, ONE_OR_MORE)  # pictures of a stream, kept encoded, to draw from at random
    num_classes: int | None = limited(None, ONE_OR_MORE_OR_NULL)  # null: as many as the source has; else checked
    image_column: str | None = None  # null: the only one that holds pictures
    label_column: str | None = None  # null: the only one that looks like a class
    workers: int = limited(4, ZERO_OR_MORE)  # processes that decode, for each training process; 0: none but itself
    max_undecodable: float = limited(0.001, SHARE)  # share of damaged training pictures that is put up with
    random_crop: tuple[float, float] | None = limited(None, CROP_OR_NULL)  # share of the area; null: all, squashed
    flip: float = limited(0.0, PROBABILITY)  # left to right
    randaugment: str | None = limited(None, RANDAUGMENT_OR_NULL)  # in timm's words
    erase: float = limited(0.0, PROBABILITY)  # one rectangle becomes noise
    max_shift: float = limited(0.0, SHARE)  # of the picture's side
    max_rotation: float = limited(0.0, ("0 to 180 (degrees, either way)", lambda x: 0 <= x <= 180))
    max_zoom: float = limited(0.0, SHARE)  # sizes from 1 - max_zoom to 1 + max_zoom


class Config:
    """What ``load_config`` fills: a frozen dataclass that checks its values."""

    def __post_init__(self) -> None:
        problems = dict(_out_of_range(self)) | self.conflicts()
        if problems:
            raise ConfigError(problems)

    def conflicts(self) -> dict[str, str]:
        """Problems between values that are fine on their own."""
        return {}


@dataclass(frozen=True)
class TrainConfig(Config):
    """What both phases share; a key means the same thing in every YAML file."""

    model: str = limited("", ("a model name; `python -m arm_zoo list` shows them", bool))
    model_args: dict[str, Scalar] = field(default_factory=dict)  # keywords of the model, as model_args.NAME
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = limited("", ("a folder to write to, as in output_dir=runs/first", bool))
    seed: int = limited(0, ZERO_OR_MORE)
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    epochs: int = limited(100, ONE_OR_MORE)
    global_batch: int = limited(1024, ONE_OR_MORE)  # pictures per optimizer step, over all processes
    base_lr: float = limited(1.5e-4, ABOVE_ZERO)  # for 256 pictures: the peak is base_lr * global_batch / 256
    min_lr: float = limited(0.0, ZERO_OR_MORE)
    warmup_epochs: float = limited(0.0, ZERO_OR_MORE)
    weight_decay: float = limited(0.05, ZERO_OR_MORE)
    betas: tuple[float, float] = limited((0.9, 0.999), BETAS)
    clip_grad: float | None = limited(None, ABOVE_ZERO_OR_NULL)  # L2 norm of all gradients together

    def conflicts(self) -> dict[str, str]:
        """Problems between values that are fine on their own: the cosine needs epochs after the warm-up."""
        if self.warmup_epochs < self.epochs:
            return {}
        message = f"warmup_epochs is {self.warmup_epochs:g} but epochs is {self.epochs}; allowed: fewer than epochs"
        return {"warmup_epochs": message}


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Self-supervised pretraining; the defaults are the paper's ARM-B."""

    epochs: int = limited(1600, ONE_OR_MORE)
    global_batch: int = limited(2048, ONE_OR_MORE)
    warmup_epochs: float = limited(40.0, ZERO_OR_MORE)
    precision: Literal["fp32", "bf16"] = "bf16"
    betas: tuple[float, float] = limited((0.9, 0.95), BETAS)
    clip_grad: float | None = limited(3.0, ABOVE_ZERO_OR_NULL)


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Supervised training, from a pretrained encoder or from scratch; the defaults are the paper's ARM-B."""

    precision: Literal["fp32", "bf16"] = "bf16"
    base_lr: float = limited(5e-4, ABOVE_ZERO)
    min_lr: float = limited(1e-6, ZERO_OR_MORE)
    warmup_epochs: float = limited(5.0, ZERO_OR_MORE)
    pretrained: str | None = None  # a pretraining_model/ folder or a file of weights; null: from scratch
    layer_decay: float = limited(0.65, ("above 0, up to 1 (1: one rate for all layers)", lambda x: 0 < x <= 1))
    drop_path: float = limited(0.1, SHARE)
    label_smoothing: float = limited(0.1, SHARE)
    ema_decay: float | None = limited(0.99992, ("above 0 and below 1, or null", lambda x: x is None or 0 < x < 1))
    evaluate_every: int = limited(1, ONE_OR_MORE)  # epochs

    def conflicts(self) -> dict[str, str]:
        """The same, and the starting weights must exist."""
        found = super().conflicts()
        if self.pretrained is not None and not Path(self.pretrained).exists():
            found["pretrained"] = (
                f"pretrained is {self.pretrained!r}, which does not exist; allowed: a folder with model.safetensors "
                "or such a file (`python -m recipes.pretrain` writes OUTPUT_DIR/pretraining_model), or null"
            )
        return found


class BatchPlan(NamedTuple):
    """How one process works through its share of a global batch."""

    per_device: int  # pictures in one forward pass
    accumulation: int  # forward passes per optimizer step


def load_config(kind: type[ConfigT], file: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, lay ``key=value`` overrides over it and check the whole.

    Args:
        kind: The dataclass to fill, for example ``PretrainConfig``.
        file: YAML file with the dataclass's keys; nested keys may also be written with a dot.
        overrides: Strings such as ``"epochs=3"`` or ``"data.source=digits"``; the last one wins.

    Raises:
        ConfigError: With every unknown key, wrong type, value out of range and impossible combination at once.
        FileNotFoundError: If there is no such file.
    """
    problems: dict[str, str] = {}
    values = dict(_flatten(_read_yaml(file, problems)))
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals:
            values[key.strip()] = text.strip()
        else:
            problems[override] = f"{override!r} is no override; type key=value, as in epochs=3"
    arguments = _arguments(kind, values, "", problems)
    if values:  # what no field took
        problems["unknown keys"] = _unknown_keys(kind, values)
    try:
        config = kind(**arguments)
    except ConfigError as error:
        raise ConfigError(error.problems | problems) from None
    if problems:
        raise ConfigError(problems)
    return config


def config_from_command_line(kind: type[ConfigT], description: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Parse ``--config FILE key=value ...``; problems end the program with exit code 2 and the whole list."""
    parser = argparse.ArgumentParser(description=f"{description} Run it from the top of the repository.")
    parser.add_argument("--config", type=Path, help="YAML file, for example one of recipes/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    arguments = parser.parse_intermixed_args(argv)
    try:
        return load_config(kind, arguments.config, arguments.overrides)
    except (ConfigError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration, as ``load_config`` reads it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _read_yaml(file: str | Path | None, problems: dict[str, str]) -> Mapping[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        problems["--config"] = f"{file} is not YAML: {error}"
        return {}
    if not isinstance(content, Mapping):
        problems["--config"] = f"{file} holds {type(content).__name__}; allowed: a mapping of keys to values"
        return {}
    return content


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys: {data: {source: digits}} -> data.source."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _out_of_range(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for item in dataclasses.fields(config):
        key, value = prefix + item.name, getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _out_of_range(value, f"{key}.")
        elif "limit" in item.metadata:
            allowed, holds = item.metadata["limit"]
            if not holds(value):
                yield key, f"{key} is {value if value != '' else 'missing'}; allowed: {allowed}"


def _arguments(kind: type[Any], values: dict[str, Any], prefix: str, problems: dict[str, str]) -> dict[str, Any]:
    """Take the keys of the dataclass ``kind`` out of ``values``, converted; what does not convert is a problem."""
    arguments: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        key = prefix + name
        if dataclasses.is_dataclass(hint):
            arguments[name] = hint(**_arguments(hint, values, f"{key}.", problems))
        elif typing.get_origin(hint) is dict:
            found = [given for given in values if given.startswith(f"{key}.")]
            arguments[name] = {given.removeprefix(f"{key}."): _scalar(values.pop(given)) for given in found}
        elif key in values:
            value = values.pop(key)
            try:
                arguments[name] = _convert(value, hint)
            except ValueError:
                problems[key] = f"{key} is {value!r}; allowed: {_describe(hint)}"
    return arguments


def _scalar(value: Any) -> Any:
    """What a command line's text means: YAML's reading, and 1e-3 a number although YAML 1.1 wants 1.0e-3."""
    if not isinstance(value, str):
        return value
    parsed = yaml.safe_load(value)
    if not isinstance(parsed, str):
        return parsed
    try:
        return float(parsed)
    except ValueError:
        return parsed


def _convert(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``; ValueError if it is something else (True is no number, 2.5 no integer)."""
    if hint is str and isinstance(value, str):
        return value
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal and value in choices:
        return value
    parsed = _scalar(value)
    if isinstance(hint, types.UnionType):
        return None if parsed is None else _convert(value, choices[0])
    if typing.get_origin(hint) is tuple and isinstance(parsed, list) and len(parsed) == len(choices):
        return tuple(_convert(entry, choice) for entry, choice in zip(parsed, choices, strict=True))
    if hint is bool and isinstance(parsed, bool):
        return parsed
    if hint is float and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        return float(parsed)
    if hint is int and isinstance(parsed, int) and not isinstance(parsed, bool):
        return parsed
    raise ValueError(value)


def _describe(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, choices))
    if isinstance(hint, types.UnionType):
        return f"{_describe(choices[0])}, or null"
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(choices)}, each {_describe(choices[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


def _unknown_keys(kind: type[Config], unknown: Iterable[str]) -> str:
    known = list(_keys(kind))
    named = []
    for key in unknown:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        named.append(f"{key} (did you mean {close[0]}?)" if close else key)
    return f"no key of {kind.__name__}: {', '.join(named)}; allowed: {', '.join(known)}"


def _keys(kind: type[Any], prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}.NAME" if typing.get_origin(hint) is dict else prefix + name
