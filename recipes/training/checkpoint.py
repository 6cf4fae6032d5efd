"""Checkpoints: a folder that is either complete or not there, whatever kills the run, and is checked before use.

OUTPUT_DIR/checkpoints/step-XXXXXXXX/ holds `model.safetensors`, `ema.safetensors` (if there is an average),
`optimizer.safetensors`, `state.json` (`identity_of` the run, and its `Position`) and `manifest.json` (size and SHA-256
of each). There is no random state in it: order, augmentation, mixing and drop path are functions of the seed, the
epoch and the step, so the position says it all. Nothing in it depends on the number of processes.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.optim import Optimizer

from arm_zoo.files import flush, save_tensors, sha256_of
from arm_zoo.pretraining.dvae import fetched
from recipes.config import TrainConfig
from recipes.errors import RunError
from recipes.training.ema import candidates
from recipes.training.parallel import WHOLE, Tensors, model_state

STATE, MANIFEST = "state.json", "manifest.json"
Metrics = dict[str, float]


@dataclass
class Position:
    """The position of a run: all that changes besides tensors."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done in the current epoch
    loss_sum: float = 0.0  # over these steps, mean of all processes
    figures: Metrics = field(default_factory=dict)  # of these steps, from the hooks of the objective
    seconds: float = 0.0  # of training, up to this checkpoint
    history: list[Metrics] = field(default_factory=list)  # one row per epoch done
    undecodable: list[str] = field(default_factory=list)  # a line for each damaged training image found so far


def identity_of(config: TrainConfig, class_names: Sequence[str], steps_per_epoch: int) -> dict[str, Any]:
    """What `state.json` says of the run that wrote it."""
    run = {"config": asdict(config), "class_names": class_names, "steps_per_epoch": steps_per_epoch}
    return run | {"dvae_sha256": dvae_sha256(config)}


def dvae_sha256(config: TrainConfig) -> str | None:
    """SHA-256 of the dVAE's file, which tells it from others wherever it lies; None for trainings without a dVAE."""
    file = getattr(config, "dvae", None)
    return None if file is None else sha256_of(fetched(file))


def kept_tensors(model: nn.Module, ema: ModelEmaV3 | None, optimizer: Optimizer) -> dict[str, Tensors]:
    """The whole tensors of each file, on the main process; every process must call this.

    The optimizer's are `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` for every parameter NAME of the model.
    """
    state: Any = dcp_state.get_optimizer_state_dict(model, optimizer, options=WHOLE).get("state", {})
    by_name = {f"{kind}/{name}": tensor for name, kinds in state.items() for kind, tensor in kinds.items()}
    return {**{name: model_state(each) for name, each in candidates(model, ema).items()}, "optimizer": by_name}


def restore(
    checkpoint: Path, state: Mapping[str, Any], model: nn.Module, ema: ModelEmaV3 | None, optimizer: Optimizer
) -> Position:
    """Load what `kept_tensors` gave, one file after the other; `optimizer` keeps its own rates and weight decay."""
    options = dcp_state.StateDictOptions(full_state_dict=True)
    for name, each in candidates(model, ema).items():
        weights: Any = load_file(checkpoint / f"{name}.safetensors")
        dcp_state.set_model_state_dict(each, weights, options=options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    whole: Any = {"state": {}, "param_groups": groups}
    for key, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        whole["state"].setdefault(name, {})[kind] = tensor
    dcp_state.set_optimizer_state_dict(model, optimizer, whole, options=options)
    return Position(**state["position"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of `state.json`."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


class DamagedCheckpoint(RunError):
    """The files of a checkpoint are not as they were written."""


def check(checkpoint: Path) -> None:
    """Raise `DamagedCheckpoint` if a file is missing or differs from the manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        damaged = [name for name, written in files.items() if fingerprint(checkpoint / name) != written]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{checkpoint} is damaged: {error}") from None
    if damaged or STATE not in files:
        raise DamagedCheckpoint(f"{checkpoint} is damaged: {', '.join(damaged) or STATE} is not as it was written")


def fingerprint(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


@dataclass
class CheckpointFolder:
    """The checkpoints of one run; only the main process may use this."""

    folder: Path  # usually OUTPUT_DIR/checkpoints
    keep_last: int  # how many of the newest to keep
    keep_every: int | None  # also keep the checkpoint at the end of every so many epochs
    console: Console  # where warnings go

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))

    def clean(self) -> None:
        """Remove what a killed process was writing, and undo a replacement that it had begun."""
        for old in self.folder.glob(".old-*"):
            final = self.folder / old.name.removeprefix(".old-")
            if not final.exists():
                old.rename(final)
        for leftover in (*self.folder.glob(".old-*"), *self.folder.glob(".partial-*")):
            shutil.rmtree(leftover)

    def newest_intact(self) -> Path | None:
        """The newest undamaged checkpoint; damaged ones are renamed to `damaged-step-...`, with a warning."""
        self.clean()
        for checkpoint in reversed(self.all()):
            try:
                check(checkpoint)
                return checkpoint
            except DamagedCheckpoint as damage:
                aside = free_name(self.folder / f"damaged-{checkpoint.name}")
                checkpoint.rename(aside)
                message = f"warning: {damage}; set aside as {aside.name}, using the one before"
                self.console.print(message, soft_wrap=True)
        return None

    def set_aside(self, after_step: int) -> None:
        """Move the checkpoints after `after_step` out of the way of a run that starts over from there."""
        if abandoned := [path for path in self.all() if step_of(path) > after_step]:
            aside = free_name(self.folder.with_name(f"{self.folder.name}-before"))
            aside.mkdir()
            for checkpoint in abandoned:
                checkpoint.rename(aside / checkpoint.name)
            self.console.print(f"moved {len(abandoned)} checkpoints of the earlier run to {aside}", soft_wrap=True)

    def save(self, step: int, steps_per_epoch: int, tensors: Mapping[str, Tensors], state: dict[str, Any]) -> None:
        """Write a checkpoint under another name, rename it, then delete the checkpoints that need not be kept."""
        final = self.folder / f"step-{step:08d}"
        partial, old = (self.folder / f".{kind}-{final.name}" for kind in ("partial", "old"))
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, content in tensors.items():
                whole = {key: tensor.contiguous() for key, tensor in content.items()}
                save_tensors(whole, partial / f"{name}.safetensors", {"format": "pt"})
            (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            manifest = {"files": {file.name: fingerprint(file) for file in sorted(partial.iterdir())}}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                flush(path)
            if final.exists():  # the same step, before the epoch's end was scored
                final.rename(old)
            partial.rename(final)
            flush(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"the checkpoint {final} could not be written: {error}. The last good one is "
                f"{next(reversed(self.all()), 'none')}; make room, then start the same command again"
            ) from None
        for checkpoint in self.all()[: -self.keep_last]:
            epochs, rest = divmod(step_of(checkpoint), steps_per_epoch)
            if rest or self.keep_every is None or epochs % self.keep_every:
                try:
                    shutil.rmtree(checkpoint)
                except OSError as error:
                    self.console.print(f"warning: cannot remove the old {checkpoint}: {error}", soft_wrap=True)


def free_name(path: Path) -> Path:
    """The path itself if it does not exist, else the path with the first free number behind it."""
    names = (path.with_name(f"{path.name}-{number}") for number in range(1, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())
