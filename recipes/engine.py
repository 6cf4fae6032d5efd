"""The training loop of both phases: steps, figures, checkpoints, stopping and going on. It knows no model."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from arm_zoo.files import write_text

from .checkpoint import CheckpointFolder, read_tensors
from .config import TrainConfig, to_yaml
from .data import Batch, TrainLoader
from .errors import RunError
from .optim import learning_rate, set_learning_rate
from .parallel import (
    for_training,
    gradients_reduced,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from .parsing import flatten
from .resume import Start, compare_classes, has_the_same_pictures
from .signals import Agreement, Stopped, StopRequest, StopWaiting
from .transforms import seed_of
from .watch import Display, Utilisation

Metrics = dict[str, float]
LossFunction = Callable[[nn.Module, Batch], Tensor]  # model, batch -> scalar
GO_ON, SAVE, SAVE_AND_STOP = range(3)
NEVER = 2**62


@dataclass
class Position:
    """Where a run is: all that changes beside tensors."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done in the epoch that is going on
    loss_sum: float = 0.0  # over these steps, mean of all processes
    seconds: float = 0.0  # trained before this process started
    history: list[Metrics] = field(default_factory=list)  # one row per epoch done
    undecodable: list[str] = field(default_factory=list)  # a line for each damaged training picture found so far


@dataclass
class Trainer:
    """One training run.

    Args:
        accelerator: Holds the device and the processes.
        model: The bare model on its device, sharded if ``config.fsdp``; it is trained in place.
        optimizer: Over the model's parameters.
        loader: This process's micro-batches.
        loss_function: Called as ``loss_function(model, batch)``.
        config: Schedule, clipping, checkpoints, and the folder for ``config.yaml`` and ``metrics.jsonl``.
        title: Stands before the progress bar.
        evaluate: Called as ``evaluate(epochs_done)`` after each epoch; its figures join the epoch's.
        ema: Moving average of the weights, updated after every step.
        utilisation: For the share of the GPUs' speed.
        stop: Looked at after every step.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Optimizer
    loader: TrainLoader
    loss_function: LossFunction
    config: TrainConfig
    title: str
    evaluate: Callable[[int], Metrics] | None = None
    ema: ModelEmaV3 | None = None
    utilisation: Utilisation | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        device, self._steps = self.accelerator.device, self.loader.steps_per_epoch
        self.position = Position()
        self._forward = for_training(self.model, self.config, self.accelerator)
        self._loss_sum = torch.zeros((), device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._first_bad = torch.full((), NEVER, device=device)  # step of the first loss that is not finite
        self._display = Display(self.accelerator, self.title, self.config, self._steps, self.utilisation)
        self._checkpoints = CheckpointFolder(
            Path(self.config.output_dir) / "checkpoints",
            self.config.keep_last,
            self.config.keep_every,
            self._display.console,
        )
        self.agreement = Agreement(self.accelerator)
        self._started = self._saved_at = time.monotonic()

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the run's beginning."""
        return self.position.epoch * self._steps + self.position.step

    def _seconds(self) -> float:
        """That the run has taken, in all the processes that worked on it one after the other."""
        return self.position.seconds + time.monotonic() - self._started

    def resume(self, start: Start | None) -> None:
        """Take over what a checkpoint holds; nothing is written.

        Args:
            start: The checkpoint to go on from; None: the beginning.

        Raises:
            RunError: If its classes, or the number of training images, are others.
        """
        if start is None:
            return
        checkpoint, state = start
        compare_classes(start, self.loader.class_names)
        if state["steps_per_epoch"] != self._steps:
            raise RunError(
                f"{checkpoint} has {state['steps_per_epoch']} steps per epoch, this run {self._steps}: the training "
                "pictures are others; allowed: the same data.source, another output_dir, or --resume none"
            )
        self.position = Position(**state["position"])
        load_model_state(self.model, read_tensors(checkpoint, "model"))
        load_optimizer_state(self.model, self.optimizer, read_tensors(checkpoint, "optimizer"))
        if self.ema is not None:
            load_model_state(self.ema.module, read_tensors(checkpoint, "ema"))
        self._loss_sum.fill_(self.position.loss_sum)
        if has_the_same_pictures(start, self.config):
            self.loader.undecodable.update(self.position.undecodable)

    def fit(self) -> list[Metrics]:
        """Train up to ``config.epochs`` and return one row of figures per epoch, as in ``metrics.jsonl``.

        Raises:
            RunError: If the loss is no longer finite or a file cannot be written.
            SourceError: If too many pictures cannot be decoded.
            Stopped: After the checkpoint that SIGTERM or SIGUSR1 asked for.
        """
        self._write("config.yaml", to_yaml(self.config))
        project = "tensorboard" if self.config.tracker == "tensorboard" else "arm-zoo"  # the former's is a folder
        settings = {key: str(value) for key, value in flatten(dataclasses.asdict(self.config))}
        self.accelerator.init_trackers(project, settings)
        self._saved_at = time.monotonic()
        with self._display.progress:
            self._display.begin(self.steps_done)
            try:
                while self.position.epoch < self.config.epochs:
                    self._train_epoch()
                    self._end_epoch()
            except StopWaiting:
                self._checkpoint(SAVE_AND_STOP)
        self._finish_trackers()
        return self.position.history

    def _train_epoch(self) -> None:
        """The rest of the pass over the data that the position is in."""
        self._forward.train()
        self._epoch_started = (time.monotonic(), self.loader.seconds_waited, self.position.step)
        for micro_batches in self._micro_batches():
            self._optimizer_step(micro_batches)
            self.position.step += 1
            if self.position.step % self.config.log_every == 0 or self.position.step == self._steps:
                self._read_figures()
            request = self._due()
            if self.position.step < self._steps or request == SAVE_AND_STOP:  # else the epoch's end follows
                self._checkpoint(request)

    def _micro_batches(self) -> Iterator[list[Batch]]:
        """Those of each step that is left in the epoch; without pictures on one process, all stop."""
        steps = self.loader.epoch(self.position.epoch, self.position.step)
        for _ in range(self.position.step, self._steps):
            with self.agreement.together():
                micro_batches = next(steps)
            yield micro_batches

    def _optimizer_step(self, micro_batches: list[Batch]) -> None:
        """Forward and backward of every micro-batch, then one update; nothing here waits for the device."""
        epoch, step = self.position.epoch, self.position.step
        rate = learning_rate(epoch + step / self._steps, self.config)
        set_learning_rate(self.optimizer, rate)
        for number, batch in enumerate(micro_batches):
            seed_step(self.config.seed, epoch, step, number, self.accelerator.process_index)
            with gradients_reduced(self._forward, self.model, last=number == len(micro_batches) - 1):
                loss = self._loss(batch) / len(micro_batches)
                loss.backward()
            self._loss_sum += loss.detach()
            bad_here = torch.where(loss.detach().isfinite(), NEVER, self.steps_done + 1)
            self._first_bad = torch.minimum(self._first_bad, bad_here)
        if self.config.clip_grad is not None:
            self._grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        elif (step + 1) % self.config.log_every == 0 or step + 1 == self._steps:
            self._grad_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def _loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.loss_function(self._forward, batch)

    def _read_figures(self) -> None:
        """Wait for the device, look at loss and gradient norm, and show them."""
        loss = self._mean_loss()
        norm = self._grad_norm.full_tensor() if hasattr(self._grad_norm, "full_tensor") else self._grad_norm
        rate = self.optimizer.param_groups[-1]["lr"] / self.optimizer.param_groups[-1].get("lr_scale", 1.0)
        self._display.step(self.steps_done, {"loss": loss, "grad_norm": norm.item(), "lr": rate})

    def _mean_loss(self) -> float:
        """Mean loss of the epoch's steps so far over all processes.

        Raises:
            RunError: If the loss of some step was not finite.
        """
        first_bad = int(self.accelerator.gather(self._first_bad.reshape(1)).min().item())
        total = self.accelerator.reduce(self._loss_sum, "mean").item()
        if first_bad == NEVER:
            return total / max(self.position.step, 1)
        raise self._not_finite("loss", first_bad)

    def _not_finite(self, what: str, step: int) -> RunError:
        checkpoints = self._checkpoints.all()
        return RunError(
            f"the {what} of step {step} (epoch {(step - 1) // self._steps + 1}) is not finite. The last good "
            f"checkpoint is {checkpoints[-1] if checkpoints else 'none: there was no time for one'}. Try a smaller "
            "base_lr, more warmup_epochs, clip_grad=1 or precision=fp32: the same command with such a setting goes on "
            "from that checkpoint, with --resume none it starts over"
        )

    def _end_epoch(self) -> None:
        """Score the model, add the epoch's row of figures, and perhaps write a checkpoint."""
        position = self.position
        row: Metrics = {"epoch": position.epoch + 1, "loss": self._mean_loss()}
        row |= {"lr": learning_rate(position.epoch + 1, self.config)}
        started, waited, first_step = self._epoch_started
        seconds = time.monotonic() - started  # the device has been waited for: the loss is read
        row |= {"seconds": self._seconds(), "data_wait": (self.loader.seconds_waited - waited) / seconds}
        row |= {"undecodable": self._undecodable(), "processes": self.accelerator.num_processes}
        row |= self._display.speed((position.step - first_step) * self.config.global_batch / seconds)
        if self.evaluate is not None:
            row |= self.evaluate(position.epoch + 1)
        position.history.append(row)
        position.epoch, position.step = position.epoch + 1, 0
        self._loss_sum.zero_()
        self._write("metrics.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in position.history))
        self._display.epoch(self.steps_done, row)
        at_end = position.epoch == self.config.epochs or position.epoch % self.config.checkpoint_epochs == 0
        self._checkpoint(max(self._due(), SAVE if at_end else GO_ON))

    def _undecodable(self) -> int:
        """How many damaged training pictures all processes have found since the run began with these pictures.

        Raises:
            SourceError: On all of them, if they are more than ``data.max_undecodable`` puts up with.
        """
        self.loader.undecodable = self.agreement.union(self.loader.undecodable)
        self.loader.check_undecodable()
        return len(self.loader.undecodable)

    def _due(self) -> int:
        """Whether a checkpoint must be written now, the same on every process: the clocks and signals differ."""
        every = self.config.checkpoint_steps
        request = GO_ON if every is None or self.steps_done % every else SAVE
        minutes = self.config.checkpoint_minutes
        if minutes is not None and time.monotonic() - self._saved_at > 60 * minutes:
            request = SAVE
        return self.agreement.largest(SAVE_AND_STOP if self.stop.name is not None else request)

    def _checkpoint(self, request: int) -> None:
        if request == GO_ON:
            return
        self._mean_loss()  # raises before weights that are not finite are saved
        if self.steps_done > 0:
            self._save()
        if request == SAVE_AND_STOP:
            self._display.console.print(
                f"{self.stop.name or 'another process was asked to stop'}: stopped after step {self.steps_done}; "
                "the same command goes on from there",
                soft_wrap=True,
            )
            self._finish_trackers()
            raise Stopped

    def _finish_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _save(self) -> None:
        """Write a checkpoint on the main process."""
        total = self.accelerator.reduce(self._loss_sum, "mean").item()
        self._undecodable()
        found = sorted(self.loader.undecodable)
        now = dataclasses.replace(self.position, loss_sum=total, seconds=self._seconds(), undecodable=found)
        tensors = {"model": model_state(self.model), "optimizer": optimizer_state(self.model, self.optimizer)}
        if self.ema is not None:
            tensors["ema"] = model_state(self.ema.module)
        config = dataclasses.asdict(self.config)
        state = {
            "config": config,
            "class_names": self.loader.class_names,
            "steps_per_epoch": self._steps,
            "position": dataclasses.asdict(now),
        }
        with self.agreement.together():
            if self.accelerator.is_main_process:
                if not all(tensor.isfinite().all() for tensor in tensors["model"].values()):
                    raise self._not_finite("update", self.steps_done)
                self._checkpoints.save(self.steps_done, self._steps, tensors, state)
        self._saved_at = time.monotonic()

    def _write(self, name: str, text: str) -> None:
        with self.agreement.together():
            if self.accelerator.is_main_process:
                write_text(Path(self.config.output_dir) / name, text)


def seed_step(seed: int, epoch: int, step: int, micro_batch: int, process: int) -> None:
    """Make the randomness of a forward pass a function of where it is, so that none has to be saved.

    Mixup draws from NumPy: the same for all parts of a global batch. Drop path draws from torch: each part its own.
    """
    np.random.seed(seed_of(seed, epoch, step) & 0xFFFFFFFF)
    torch.manual_seed(seed_of(seed, epoch, step, micro_batch, process))
