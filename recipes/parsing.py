"""From YAML and ``key=value`` to typed values: what the configurations are read with; it knows none of their keys."""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

Limit = tuple[str, Callable[[Any], bool]]  # the allowed values in words and as a test


class ConfigError(ValueError):
    """Every problem of a configuration at once.

    Args:
        problems: Key -> one line that names what came and what is allowed.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  - ".join([f"the configuration has {count}:", *problems.values()]))


def read_yaml(file: str | Path | None, problems: dict[str, str]) -> Mapping[str, Any]:
    """The mapping that a file holds; what it holds instead, or that there is no such file, is a problem."""
    if file is None:
        return {}
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems["--config"] = f"--config {file}: there is no such file; allowed: a YAML file, as in recipes/configs"
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems["--config"] = f"{file} is not YAML: {error}; allowed: a YAML file, as in recipes/configs"
        return {}
    if not isinstance(content, Mapping):
        problems["--config"] = f"{file} holds {type(content).__name__}; allowed: a mapping of keys to values"
        return {}
    return content


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys: {data: {source: digits}} -> data.source."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def out_of_range(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Key and problem of every field outside its limit; empty text is missing, not wrong."""
    for key, value, allowed, holds in _limits(config, prefix):
        if value != "" and not holds(value):
            yield key, f"{key} is {value}; allowed: {allowed}"


def missing(config: Any) -> Iterator[tuple[str, str]]:
    """Key and problem of every text that a run cannot do without and that is empty."""
    for key, value, allowed, holds in _limits(config):
        if value == "" and not holds(value):
            yield key, f"{key} is missing; allowed: {allowed}"


def _limits(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str, Callable[[Any], bool]]]:
    for item in dataclasses.fields(config):
        key, value = prefix + item.name, getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _limits(value, f"{key}.")
        elif "limit" in item.metadata:
            yield key, value, *item.metadata["limit"]


def take_arguments(kind: type[Any], values: dict[str, Any], prefix: str, problems: dict[str, str]) -> dict[str, Any]:
    """Take the keys of the dataclass ``kind`` out of ``values``, converted; what does not convert is a problem."""
    taken: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        key = prefix + name
        if dataclasses.is_dataclass(hint):
            taken[name] = hint(**take_arguments(hint, values, f"{key}.", problems))
        elif typing.get_origin(hint) is dict:
            found = [given for given in values if given.startswith(f"{key}.")]
            taken[name] = {given.removeprefix(f"{key}."): _scalar(values.pop(given)) for given in found}
        elif key in values:
            value = values.pop(key)
            try:
                taken[name] = _convert(value, hint)
            except ValueError:
                problems[key] = f"{key} is {value!r}; allowed: {_describe(hint)}"
    return taken


def _scalar(value: Any) -> Any:
    """What a command line's text means: YAML's reading, and 1e-3 a number although YAML 1.1 wants 1.0e-3."""
    if not isinstance(value, str):
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
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
        return None if parsed is None else _convert_to_one(value, choices)
    if typing.get_origin(hint) is tuple and isinstance(parsed, list) and len(parsed) == len(choices):
        return tuple(_convert(entry, choice) for entry, choice in zip(parsed, choices, strict=True))
    if hint is bool and isinstance(parsed, bool):
        return parsed
    if hint is float and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        return float(parsed)
    if hint is int and isinstance(parsed, int) and not isinstance(parsed, bool):
        return parsed
    raise ValueError(value)


def _convert_to_one(value: Any, choices: Iterable[Any]) -> Any:
    """``value`` as the first of several types that it can be."""
    for choice in choices:
        with contextlib.suppress(ValueError):
            return _convert(value, choice)
    raise ValueError(value)


def _describe(hint: Any) -> str:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, choices))
    if isinstance(hint, types.UnionType):
        return ", or ".join("null" if choice is types.NoneType else _describe(choice) for choice in choices)
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(choices)}, each {_describe(choices[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]


def unknown_keys(kind: type[Any], unknown: Iterable[str]) -> str:
    """One line that names every unknown key and the one that was probably meant."""
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
