"""The rows of a table: the settings of each phase, from the YAML files here, and the configurations they make."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from arm_zoo.files import WEIGHTS
from recipes.ablations import FOLDER, PHASES
from recipes.command_line import RECIPES
from recipes.config import TrainConfig, load_config
from recipes.parsing import ConfigError
from recipes.training.export import EXPORT

CONFIGS = FOLDER.parent / "configs"
HANDED_ON = {"dvae": ("dvae", WEIGHTS), "pretrain": ("pretrained", EXPORT)}  # phase -> key of the next, file or folder

Settings = dict[str, Any]  # by dotted key; `config` is the name of a file in recipes/configs


@dataclass(frozen=True)
class Row:
    """A row of a table: what is run for it, by phase, and what the paper reports."""

    table: int  # its number
    name: str
    phases: Mapping[str, Settings]
    configs: Mapping[str, TrainConfig]  # the same settings, resolved
    reported: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """A table of the paper in one preset."""

    number: int
    title: str
    rows: Sequence[Row]
    seeds: Sequence[int]
    images: int  # in an epoch
    preset: str

    @property
    def data_set(self) -> str:
        """The name of the images on which all rows are scored."""
        return self.rows[0].configs["finetune"].data.data_set


def read_tables(
    numbers: Iterable[int], preset: str, overrides: Sequence[str] = (), rows: Sequence[str] = ()
) -> list[Table]:
    """Read tables in a preset, with overrides that are `key=value` for all phases or `PHASE.key=value` for one.

    `rows` are the names of the rows to keep, and tables without any are left out; without names, all are kept. Raises
    ConfigError for an unknown row, for an override of a phase that no row has, for overrides that make a row the same
    as another one of its table, and once for all rows whose settings are wrong.
    """
    shared = yaml.safe_load((FOLDER / "presets.yaml").read_text(encoding="utf-8"))[preset]
    fallback = shared.pop("rows", preset)  # the preset whose settings a row has where it has none for this one
    read = {number: yaml.safe_load((FOLDER / f"table{number}.yaml").read_text(encoding="utf-8")) for number in numbers}
    every = [(number, row, row.get(preset, row.get(fallback, {}))) for number in read for row in read[number]["rows"]]
    found = [(number, row, own) for number, row, own in every if own is not None]
    names = [row["name"] for _, row, _ in found]
    which = f"table{'s' if len(read) > 1 else ''} {', '.join(map(str, read))}"
    if unknown := set(rows) - {*names}:
        allowed = ", ".join(map(repr, dict.fromkeys(names)))
        problem = f"no row of {which} is called {min(unknown)!r} in preset {preset}"
        raise ConfigError({"--row": f"{problem}; allowed: {allowed}"})
    kept_names = set(rows or names)
    configured = cache(lambda phase, file, *typed: load_config(RECIPES[phase][0], file, typed, to_run=False))
    right, refused = list[Row](), dict[tuple[str, str], list[str]]()  # by phase and reasons, the rows that they refuse
    for number, row, own in found:
        phases, configs = phases_of(row, own, shared, overrides), dict[str, TrainConfig]()
        for phase in phases:
            try:
                file, typed = file_and_overrides(phase, phases)
                configs[phase] = configured(phase, file, *typed)  # built once where rows share it
            except ConfigError as error:
                if row["name"] in kept_names:
                    refused.setdefault((phase, "; ".join(error.problems.values())), []).append(repr(row["name"]))
        if configs.keys() == phases.keys():
            right.append(Row(number, row["name"], phases, configs, row.get("reported", {})))
    if refused:
        said = (f"{phase} of row {', '.join(names)}: {reasons}" for (phase, reasons), names in refused.items())
        raise ConfigError({problem: problem for problem in said})
    made = [row for row in right if row.name in kept_names]
    for row, other in itertools.product(made, right):
        if row is not other and row.table == other.table and row.configs == other.configs:
            problem = f"row {row.name!r} of table {row.table} would be the same as row {other.name!r}"
            ways = "leave out the setting by which they differ"
            raise ConfigError({row.name: f"{problem} with {' '.join(overrides)}; {ways}"})
    named = {override.partition(".")[0] for override in overrides} & {*PHASES}
    if idle := named - {phase for row in made for phase in row.phases}:
        problem = f"none of these rows of {which} has the phase {min(idle)}"
        raise ConfigError({min(idle): f"{problem}; leave out {min(idle)}.KEY=..."})
    kept = {number: [row for row in made if row.table == number] for number in read}
    return [
        Table(number, read[number]["title"], kept[number], shared["seeds"], shared["images"], preset)
        for number in read
        if kept[number]
    ]


def phases_of(
    row: Mapping[str, Any], own: Mapping[str, Any], shared: Settings, overrides: Sequence[str]
) -> dict[str, Settings]:
    """The settings of a row by phase: the preset's, the row's, its own in this preset, then the overrides."""
    present = {"dvae": "dvae" in own, "pretrain": row.get("pretrain", {}) is not None, "finetune": True}
    phases = {
        phase: {**shared[phase], **row.get(phase, {}), **own.get(phase, {})} for phase in PHASES if present[phase]
    }
    for override in overrides:
        key, _, value = override.partition("=")
        phase, _, rest = key.partition(".")
        of_one_phase = bool(rest) and phase in PHASES
        for target in ({phase} if of_one_phase else set(PHASES)) & phases.keys():
            phases[target][rest if of_one_phase else key] = value
    return phases


def file_and_overrides(phase: str, phases: Mapping[str, Settings], folder: Path = Path()) -> tuple[Path, list[str]]:
    """A phase's configuration file and its overrides; the phase before it leaves its weights in `folder`.

    Raises ConfigError for settings that a table sets itself.
    """
    order = [*phases]
    before = order[order.index(phase) - 1] if phase != order[0] else None
    given: Settings = {"pretrained": None} if phase == "finetune" else {}
    if before is not None:
        key, name = HANDED_ON[before]
        given = {key: str(folder / before / name)}
    if taken := sorted(phases[phase].keys() & {"seed", "output_dir", *given}):
        says = "{} is set for each run; leave it out (--seeds and --output say which seeds, and where)"
        raise ConfigError({key: says.format(key) for key in taken})
    settings = phases[phase] | given
    typed = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return CONFIGS / typed.pop("config"), [f"{key}={value}" for key, value in typed.items()]
