"""The training loop: steps, figures, checkpoints, stopping, resuming. It knows no model."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from arm_zoo.files import write_text
from recipes.config import TrainConfig, to_yaml
from recipes.data.batches import Batch
from recipes.data.loader import TrainLoader
from recipes.data.transforms import seed_of
from recipes.errors import RunError
from recipes.parsing import flatten
from recipes.signals import EXIT_CODE, Stopped, StopRequest, StopWaiting
from recipes.training.checkpoint import CheckpointFolder, Metrics, Position, identity_of, kept_tensors, restore
from recipes.training.optim import learning_rate
from recipes.training.parallel import Collectives, Gradients, for_training
from recipes.training.progress import ProgressDisplay
from recipes.training.resume import ORDER, Start, changed_settings, compare_classes, compare_steps

LossFunction = Callable[[nn.Module, Batch], Tensor]  # model, batch -> scalar
Figures = Mapping[str, Tensor]  # scalars by name
GO_ON, SAVE, SAVE_AND_STOP = range(3)
NEVER = 2**62


@dataclass(frozen=True)
class StepHooks:
    """What every optimizer step does besides the loss, on the bare model; nothing here may wait for the device."""

    begin: Callable[[Any, float], None] = lambda model, done: None  # `done`: the fraction of the training that is over
    # Called once all gradients are there, with the epoch's figures so far; returns the updated figures, which end up
    # in the epoch's row of metrics.
    figures: Callable[[Any, Figures], Figures] = lambda model, before: before


NO_HOOKS = StepHooks()


@dataclass
class Trainer:
    """One training run; `config.yaml` and `metrics.jsonl` go to `config.output_dir`."""

    collectives: Collectives  # its accelerator holds the device
    model: nn.Module  # bare, on its device, sharded if `config.fsdp`; it is trained in place
    ema: ModelEmaV3 | None  # moving average of the weights, updated after every step
    optimizer: Optimizer
    loader: TrainLoader  # gives this process's micro-batches
    loss_function: LossFunction
    # Called after each epoch with the number of epochs done; the result joins the epoch's figures.
    evaluate: Callable[[int], Metrics] | None
    config: TrainConfig
    checkpoints: CheckpointFolder
    display: ProgressDisplay
    stop: StopRequest  # looked at after every step
    hooks: StepHooks = NO_HOOKS

    def __post_init__(self) -> None:
        self.accelerator, self._steps = self.collectives.accelerator, self.loader.steps_per_epoch
        self.position, device = Position(), self.accelerator.device
        self._identity = identity_of(self.config, self.loader.class_names, self._steps)
        self._forward = for_training(self.model, self.config, self.accelerator)
        self._gradients = Gradients(self._forward, self.model, self.config, self.accelerator)
        self._loss_sum = torch.zeros((), device=device)
        self._figures: Figures = {}
        self._first_bad = torch.full((), NEVER, device=device)  # step of the first loss that is not finite
        self._started = time.monotonic()  # moved back by the time that earlier, interrupted processes trained

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the beginning of the run."""
        return self.position.epoch * self._steps + self.position.step

    def resume(self, start: Start | None) -> None:
        """Go on from a checkpoint, if there is one; RunError if its classes or its number of images are others."""
        if start is None:
            return
        compare_classes(start, self.loader.class_names)
        compare_steps(start, self._steps)
        self.position = restore(*start, self.model, self.ema, self.optimizer)
        self._started -= self.position.seconds
        self._loss_sum.fill_(self.position.loss_sum)
        device = self._loss_sum.device
        self._figures = {name: torch.tensor(value, device=device) for name, value in self.position.figures.items()}
        if not changed_settings(start, self.config).keys() & set(ORDER):  # the images are the same
            self.loader.undecodable.update(self.position.undecodable)

    def fit(self) -> list[Metrics]:
        """Train up to `config.epochs` and return one row of figures per epoch, as in `metrics.jsonl`."""
        self._write("config.yaml", to_yaml(self.config))
        project = "tensorboard" if self.config.tracker == "tensorboard" else "arm-zoo"  # tensorboard's is a folder
        settings = {key: str(value) for key, value in flatten(dataclasses.asdict(self.config))}
        self.accelerator.init_trackers(project, settings)
        self._saved_at = time.monotonic()
        try:
            with self.display.bar:
                self.display.begin(self.steps_done)
                while self.position.epoch < self.config.epochs:
                    self._train_epoch()
                    self._end_epoch()
        except StopWaiting:
            self._checkpoint(SAVE_AND_STOP)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self.position.history

    def _train_epoch(self) -> None:
        self._forward.train()
        self._epoch_started = (time.monotonic(), self.loader.seconds_waited, self.position.step)
        steps = self.loader.epoch(self.position.epoch, self.position.step)
        while self.position.step < self._steps:
            with self.collectives.together():  # if one process gets no images, all stop
                micro_batches = next(steps)
            self._optimizer_step(micro_batches)
            self.loader.look_ahead()
            self.position.step += 1
            if self._is_logged(self.position.step):
                loss = self._total_loss() / self.position.step  # waits for the device
                norm = self._grad_norm.full_tensor() if hasattr(self._grad_norm, "full_tensor") else self._grad_norm
                figures = {"loss": loss, "grad_norm": norm.item(), "lr": self._rate, **self._read_figures()}
                self.display.step(self.steps_done, figures)
            request = self._due()
            if self.position.step < self._steps or request == SAVE_AND_STOP:  # else the epoch's end follows
                self._checkpoint(request)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self._steps

    def _optimizer_step(self, micro_batches: list[Batch]) -> None:
        """Forward and backward of every micro-batch, then one update; nothing here waits for the device."""
        epoch, step = self.position.epoch, self.position.step
        self._rate = learning_rate(epoch + step / self._steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * group.get("lr_scale", 1.0)  # which scales `min_lr` too
        self.hooks.begin(self.model, (epoch + step / self._steps) / self.config.epochs)
        half = torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        for number, batch in enumerate(micro_batches):
            seed_step(self.config.seed, epoch, step, number, self.accelerator.process_index)
            with self._gradients.of_micro_batch(number, len(micro_batches)):
                with half:
                    loss = self.loss_function(self._forward, batch) / len(micro_batches)
                loss.backward()
            self._loss_sum += loss.detach()
            bad_here = torch.where(loss.detach().isfinite(), NEVER, self.steps_done + 1)
            self._first_bad = torch.minimum(self._first_bad, bad_here)
        self._figures = self.hooks.figures(self.model, self._figures)
        if self.config.clip_grad is not None:
            self._grad_norm = nn.utils.clip_grad_norm_(self._gradients.parameters, self.config.clip_grad)
        elif self._is_logged(step + 1):
            gradients = [p.grad for p in self._gradients.parameters if p.grad is not None]
            self._grad_norm = nn.utils.get_total_norm(gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def _read_figures(self) -> Metrics:
        return {name: value.item() for name, value in self._figures.items()}

    def _total_loss(self) -> float:
        """The loss summed over the epoch's steps, mean of all processes; RunError if any loss was not finite."""
        first_bad = int(self.accelerator.gather(self._first_bad.reshape(1)).min().item())
        if first_bad != NEVER:
            raise self._not_finite("loss", first_bad)
        return self.accelerator.reduce(self._loss_sum, "mean").item()

    def _not_finite(self, what: str, step: int) -> RunError:
        last = next(reversed(self.checkpoints.all()), "none: there was no time for one")
        return RunError(
            f"the {what} of step {step} (epoch {(step - 1) // self._steps + 1}) is not finite. The last good "
            f"checkpoint is {last}. Try a smaller base_lr, more warmup_epochs, clip_grad=1 or precision=fp32: the "
            "same command with such a setting goes on from that checkpoint, with --resume none it starts over"
        )

    def _end_epoch(self) -> None:
        """Score the model, add the epoch's row of figures, and perhaps write a checkpoint."""
        position = self.position
        row: Metrics = {"epoch": position.epoch + 1, "loss": self._total_loss() / self._steps}
        row |= {"lr": learning_rate(position.epoch + 1, self.config), **self._read_figures()}
        started, waited, first_step = self._epoch_started
        now = time.monotonic()  # the device has been waited for: the loss is read
        seconds = now - started
        row |= {"seconds": now - self._started, "undecodable": len(self._undecodable())}
        row |= {"processes": self.accelerator.num_processes}
        if steps := position.step - first_step:  # none where a run was stopped at the end of an epoch and goes on
            row |= {"data_wait": (self.loader.seconds_waited - waited) / seconds}
            row |= self.display.speed(steps * self.config.global_batch / seconds)
        if self.evaluate is not None:
            row |= self.evaluate(position.epoch + 1)
        position.history.append(row)
        position.epoch, position.step = position.epoch + 1, 0
        self._loss_sum.zero_()
        self._figures = {}
        self._write("metrics.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in position.history))
        self.display.epoch(self.steps_done, row)
        at_end = position.epoch == self.config.epochs or position.epoch % self.config.checkpoint_epochs == 0
        self._checkpoint(max(self._due(), SAVE if at_end else GO_ON))

    def _undecodable(self) -> set[str]:
        """The damaged training images that all processes have found; too many are an error on every process."""
        self.loader.undecodable = set().union(*self.collectives.gather(self.loader.undecodable))
        self.loader.check_undecodable()
        return self.loader.undecodable

    def _due(self) -> int:
        """Whether to write a checkpoint now. All processes agree, although their clocks and signals differ."""
        every, minutes = self.config.checkpoint_steps, self.config.checkpoint_minutes
        due = every is not None and self.steps_done % every == 0
        due = due or (minutes is not None and time.monotonic() - self._saved_at > 60 * minutes)
        return self.collectives.largest(SAVE_AND_STOP if self.stop.name is not None else SAVE if due else GO_ON)

    def _checkpoint(self, request: int) -> None:
        if request == GO_ON:
            return
        total = self._total_loss()  # raises before weights that are not finite are saved
        if self.steps_done > 0:
            self._save(total)
        if request == SAVE_AND_STOP:
            done = f"stopped after step {self.steps_done}; the same command goes on from there"
            reason = self.stop.name or "another process was asked to stop"
            self.display.console.print(f"{reason}: {done}", soft_wrap=True)
            raise Stopped(EXIT_CODE)

    def _save(self, total: float) -> None:
        found = sorted(self._undecodable())
        seconds = time.monotonic() - self._started
        figures = self._read_figures()
        now = dataclasses.replace(self.position, loss_sum=total, figures=figures, seconds=seconds, undecodable=found)
        state = {**self._identity, "position": dataclasses.asdict(now)}
        tensors = kept_tensors(self.model, self.ema, self.optimizer)

        def save() -> None:
            if not all(tensor.isfinite().all() for tensor in tensors["model"].values()):
                raise self._not_finite("update", self.steps_done)
            self.checkpoints.save(self.steps_done, self._steps, tensors, state)

        self.collectives.on_main(save)
        self._saved_at = time.monotonic()

    def _write(self, name: str, text: str) -> None:
        self.collectives.on_main(lambda: write_text(Path(self.config.output_dir) / name, text))


def seed_step(seed: int, epoch: int, step: int, micro_batch: int, process: int) -> None:
    """Make the randomness of a forward pass a function of its position, so that no random state has to be saved.

    Mixup draws from NumPy, the same for all parts of a global batch; drop path draws from torch, anew for each part.
    """
    np.random.seed(seed_of(seed, epoch, step) & 0xFFFFFFFF)
    torch.manual_seed(seed_of(seed, epoch, step, micro_batch, process))
