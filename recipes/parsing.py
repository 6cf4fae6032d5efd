"""From YAML and `key=value` to a typed dataclass, by OmegaConf; this module knows none of the keys.

Values count as they are typed: `${...}` and `???`, which OmegaConf would replace, are refused.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import Field, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Limit = tuple[str, Callable[[Any], bool]]  # the allowed values in words, and a test that all but None must pass
T = TypeVar("T")

ONE_OR_MORE: Limit = ("a whole number, 1 or more", lambda x: x >= 1)
WHOLE: Limit = ("a whole number, 0 or more", lambda x: x >= 0)
SEED: Limit = ("a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)  # what NumPy takes
ABOVE_ZERO: Limit = ("a number above 0, and finite", lambda x: 0 < x < math.inf)
ZERO_OR_MORE: Limit = ("a number, 0 or more, and finite", lambda x: 0 <= x < math.inf)
BELOW_ONE: Limit = ("0 up to, not including, 1", lambda x: 0 <= x < 1)
PROBABILITY: Limit = ("0 to 1", lambda x: 0 <= x <= 1)


class ConfigError(ValueError):
    """All problems of a configuration: for each key, a line that says what was given and what is allowed."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  - ".join([f"the configuration has {count}:", *problems.values()]))


def limited(default: Any, limit: Limit) -> Any:
    """A dataclass field with a limit on its value; a text with a limit must not be empty when a run starts."""
    return field(default=default, metadata={"limit": limit})


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read the values in a YAML file, by dotted key."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        if not isinstance(content, dict):
            raise ValueError("it holds a list")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        allowed = "allowed: a YAML file of keys and values, as in recipes/configs"
        raise ConfigError({"--config": f"--config {file}: {error}; {allowed}"}) from error
    return dict(flatten(content))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to dotted keys: {data: {source: digits}} gives data.source."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def filled(kind: type[T], values: Mapping[str, Any], problems: dict[str, str]) -> T:
    """A `kind` with these values, by dotted key; a value that it cannot take is left out and added to `problems`."""
    known = dict(_fields(kind))
    settings = OmegaConf.structured(kind)
    for part in (settings, *filter(OmegaConf.is_config, settings.values())):
        OmegaConf.set_readonly(part, False)  # as the dataclasses are frozen
    unknown = []
    for key, value in values.items():
        setting = known.get(key) or known.get(f"{key.rpartition('.')[0]}.NAME")
        if value is None and any(name.startswith(f"{key}.") for name in known):
            continue  # a line such as `data:` with nothing below it
        if setting is None:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
            unknown.append(f"{key} (did you mean {close[0]}?)" if close else key)
        elif "${" in str(value) or value == "???":
            problems[key] = f"{key} is {value}; allowed: the value itself, as ${{...}} and ??? stand for nothing here"
        elif not _takes(settings, key, value, setting):
            problems[key] = f"{key} is {value}; allowed: {_allowed(setting)}"
    if unknown:
        problems["unknown keys"] = f"no key of {kind.__name__}: {', '.join(unknown)}; allowed: {', '.join(known)}"
    return cast(T, OmegaConf.to_object(settings))


def missing(config: Any) -> dict[str, str]:
    """The problem of each key whose text is empty although a run needs it."""
    limits = {key: setting for key, setting in _fields(type(config)) if "limit" in setting.metadata}
    empty = [key for key in limits if attrgetter(key)(config) == ""]
    return {key: f"{key} is missing; allowed: {_allowed(limits[key])}" for key in empty}


def _fields(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every dotted key with its field; the keys of a dict are written KEY.NAME."""
    for setting in fields(kind):
        if is_dataclass(setting.type):
            yield from _fields(cast(type[Any], setting.type), f"{prefix}{setting.name}.")
        else:
            yield f"{prefix}{setting.name}{'.NAME' if get_origin(setting.type) is dict else ''}", setting


def _allowed(setting: Field[Any]) -> str:
    """The values that a field takes, in words."""
    if get_origin(setting.type) is Literal:
        return ", ".join(get_args(setting.type))
    words, _ = setting.metadata.get("limit", ("true or false" if setting.type is bool else "text", None))
    return f"{words}, or null" if NoneType in get_args(setting.type) else words


def _takes(settings: DictConfig, key: str, value: Any, setting: Field[Any]) -> bool:
    """Set a value, which OmegaConf converts to the field's type; False if the type or the limit does not allow it."""
    try:
        before = deepcopy(OmegaConf.select(settings, key))  # a list is changed in place
        OmegaConf.update(settings, key, _meant(value, setting.type))
        now = OmegaConf.select(settings, key)
        _, holds = setting.metadata.get("limit", (None, lambda _: True))
        if now is None or now == "" or holds(now):
            return True
        OmegaConf.update(settings, key, before)
    except (ValueError, OmegaConfBaseException):
        pass
    return False


def _meant(value: Any, hint: Any) -> Any:
    """A text as YAML reads it, where 1e-3 is a number; but text stays text, or null, where the field takes text."""
    takes_text = hint in (str, str | None)
    if takes_text and not isinstance(value, str | None):
        raise ValueError(value)  # its text may be another: 7 for 007
    if hint is str or not isinstance(value, str):
        return value
    try:
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except (YAMLError, OmegaConfBaseException):
        return value
    return value if takes_text and read["value"] is not None else read["value"]
