"""Where a run starts: at the beginning, or at a checkpoint that fits it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from arm_zoo.files import recipe_of, remove_leftovers
from arm_zoo.messages import listed
from arm_zoo.pretraining import DEFAULT_OBJECTIVE
from recipes.config import TrainConfig
from recipes.errors import RunError
from recipes.parsing import flatten
from recipes.training.checkpoint import STATE, CheckpointFolder, check, dvae_sha256, read_state, step_of
from recipes.training.parallel import Collectives

# Keys that say how a run is carried out, not what it computes: they may change from one start to the next.
OPERATION = (
    "output_dir", "device", "cpu_threads", "max_batch_per_device", "compile", "cuda_graphs", "fused_adamw",
    "gradient_checkpointing", "fsdp", "log_every", "tracker", "checkpoint_epochs", "checkpoint_steps",
    "checkpoint_minutes", "keep_last", "keep_every", "data.workers", "data.decode", "data.cache", "evaluate_every",
)  # fmt: skip
# Keys that decide which images of an epoch are still to come: they may change between epochs, not within one.
ORDER = ("data.source", "data.streaming", "data.shuffle_buffer", "data.train_size", "data.labels_per_class")
# Keys that decide what the weights mean, or which images are still to come: they may never change.
IDENTITY = ("model", "model_args", "objective", "dvae", "head", "frozen", "seed", "global_batch")
LATER = {"objective": DEFAULT_OBJECTIVE}  # the values of keys that older checkpoints lack
VALIDATION = "data.validation"
CURVES = "curves.png"  # written last: a run that has it has ended


class AlreadyFinished(SystemExit):
    """Raised when there is nothing left to do; ends the program with its code."""


class Start(NamedTuple):
    """A checkpoint and what its `state.json` holds."""

    checkpoint: Path
    state: dict[str, Any]


def starting_point(
    config: TrainConfig, resume: str, collectives: Collectives, checkpoints: CheckpointFolder, folders: Sequence[str]
) -> Start | None:
    """The checkpoint to go on from, as the main process chooses, or None to start from the beginning.

    `resume` is "auto" (the newest undamaged checkpoint, if any), "none", or the folder of a checkpoint. `folders` are
    the folders of the output that the run writes to; files that a killed process left half-written there are removed.
    """
    output = Path(config.output_dir)
    start = None
    if checkpoint := collectives.on_main(lambda: choose(checkpoints, resume)):
        start = Start(checkpoint, read_state(checkpoint))
        compare(start, config, checkpoints.console)
    is_main = collectives.accelerator.is_main_process
    for folder in (".", *folders) if is_main else ():
        remove_leftovers(output / folder)
    if start is not None:
        if (done := start.state["position"]["epoch"]) >= config.epochs and (output / CURVES).is_file():
            epochs = "1 epoch is" if done == 1 else f"{done} epochs are"
            advice = "Set more epochs to go on, another output_dir for another run, or --resume none to start over"
            checkpoints.console.print(f"{config.output_dir} is finished: {epochs} done. {advice}", soft_wrap=True)
            raise AlreadyFinished(0)
        checkpoints.console.print(f"going on from {checkpoint}", soft_wrap=True)
    if is_main:  # the curves of the same run with fewer epochs would say that it has ended
        (output / CURVES).unlink(missing_ok=True)
    if is_main and resume != "auto":
        is_own = checkpoint is not None and checkpoint.resolve().parent == checkpoints.folder.resolve()
        checkpoints.set_aside(after_step=step_of(checkpoint) if checkpoint and is_own else -1)
    return start


def choose(checkpoints: CheckpointFolder, resume: str) -> Path | None:
    """Choose the checkpoint that `resume` asks for; see `starting_point`."""
    if resume == "auto":
        return checkpoints.newest_intact()
    checkpoints.clean()
    if resume == "none":
        return None
    chosen = Path(resume)
    if not (chosen / STATE).is_file():
        raise RunError(
            f"--resume is {resume!r}, which is no checkpoint; allowed: auto, none, or a folder such as "
            f"{checkpoints.folder / 'step-00000100'}"
        )
    check(chosen)
    return chosen


def changed_settings(start: Start, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Key -> the checkpoint's value and the run's, as JSON holds them, where they differ.

    A dVAE is compared by the content of its file, or by its path if the checkpoint is too old to tell the content.
    """
    before = dict(flatten(start.state["config"]))
    now = dict(flatten(json.loads(json.dumps(dataclasses.asdict(config)))))
    hashes = start.state.get("dvae_sha256"), dvae_sha256(config)
    if None not in hashes:
        before["dvae"], now["dvae"] = (f"a file with sha256 {sha256}" for sha256 in hashes)
    pairs = {key: (before.get(key, LATER.get(key)), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def compare(start: Start, config: TrainConfig, console: Console) -> None:
    """Raise RunError with all differences if the checkpoint is of another run; warn of other settings that changed."""
    ways = "Allowed: the same settings, another output_dir, or --resume none to start over"
    wrote, reads = recipe_of(start.state["config"]), recipe_of(dataclasses.asdict(config))
    if wrote != reads:
        raise RunError(f"{start.checkpoint} was written by recipes.{wrote}, not by recipes.{reads}. {ways}")
    changed = {key: pair for key, pair in changed_settings(start, config).items() if key not in OPERATION}
    described = {key: f"{key} was {before}, is {now}" for key, (before, now) in changed.items()}
    impossible = [described[key] for key in changed if key.partition(".")[0] in IDENTITY]
    if None in changed.get("ema_decay", ()):
        impossible.append(described["ema_decay"])  # an average cannot begin or end in the middle of a run
    if float in map(type, changed.get(VALIDATION, ())):
        impossible.append(described[VALIDATION])  # the run would be scored on images that it was trained on
    if impossible:
        raise RunError(f"{start.checkpoint} is of another run: {'; '.join(impossible)}. {ways}")
    reordered = [described[key] for key in ORDER if key in changed]
    if reordered and start.state["position"]["step"] > 0:
        raise RunError(
            f"{start.checkpoint} is in the middle of an epoch, whose other images would come twice or never with "
            f"{'; '.join(reordered)}. {ways}, or a checkpoint from the end of an epoch by --resume FOLDER, where this "
            "may change"
        )
    if described:
        console.print(f"warning: going on with other settings: {'; '.join(described.values())}", soft_wrap=True)


def compare_steps(start: Start, steps_per_epoch: int) -> None:
    """Raise RunError if the checkpoint is of another number of training images."""
    if (before := start.state["steps_per_epoch"]) != steps_per_epoch:
        raise RunError(
            f"{start.checkpoint} has {before} steps per epoch, this run {steps_per_epoch}: the training images are "
            "others; allowed: the same data.source and data.labels_per_class, another output_dir, or --resume none"
        )


def compare_classes(start: Start, names: Sequence[str]) -> None:
    """Raise RunError if the checkpoint has other classes, or the same in another order: its head would not fit them.

    Older checkpoints, which have no class names, are not compared. `names` are in index order; none without labels.
    """
    before = start.state.get("class_names", names)
    if list(before) == list(names):
        return
    gone, new = ([repr(name) for name in a if name not in set(b)] for a, b in ((before, names), (names, before)))
    found = {"no longer there": gone, "new": new}
    differences = [f"{what}: {listed(classes, 3)}" for what, classes in found.items() if classes]
    if differences:
        differences.insert(0, f"{len(before)} classes before, {len(names)} now")
    else:
        index = next(index for index, name in enumerate(names) if name != before[index])
        differences = [f"the same classes in another order: class {index} was {before[index]!r}, is {names[index]!r}"]
    raise RunError(
        f"{start.checkpoint} was trained on other classes than the images of this run have: {'; '.join(differences)}. "
        "Allowed: a data.source with the same classes in the same order, another output_dir, or --resume none to "
        "start over"
    )
