"""The training loop of both phases, its progress bar, its log, and scoring. It knows no model."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import TrainConfig, to_yaml
from .data import EvalLoader, TrainLoader
from .files import write_text
from .optim import learning_rate, set_learning_rate

Metrics = dict[str, float]
LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, pictures, classes -> scalar

READ_EVERY = 20  # steps between two readings of the loss: each makes the host wait for the device


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Seed everything and choose device and precision; ``accelerate launch`` decides the number of processes."""
    set_seed(config.seed)
    return Accelerator(cpu=config.device == "cpu", mixed_precision="no" if config.precision == "fp32" else "bf16")


@dataclass
class Trainer:
    """One training run.

    Args:
        accelerator: Holds the device and the processes.
        model: The bare model; it is trained in place.
        optimizer: Over the model's parameters.
        loader: This process's share of the global batches.
        loss_function: Called as ``loss_function(model, pictures, classes)``.
        config: Schedule, clipping, and the folder that receives ``config.yaml`` and ``metrics.jsonl``.
        title: Stands before the progress bar.
        evaluate: Called as ``evaluate(epochs_done)`` after each epoch; its figures join the epoch's.
        ema: Moving average of the weights, updated after every step.
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
    history: list[Metrics] = field(default_factory=list)

    def fit(self) -> list[Metrics]:
        """Train for ``config.epochs`` and return one row of figures per epoch, as in ``metrics.jsonl``.

        Raises:
            FloatingPointError: If the loss is no longer finite.
        """
        self._write("config.yaml", to_yaml(self.config))
        wrapped, optimizer = self.accelerator.prepare(self.model, self.optimizer)
        started = time.perf_counter()
        with progress_bar(self.accelerator) as progress:
            bar = StepBar(progress, self.title, self.config, self.loader.steps_per_epoch)
            for epoch in range(self.config.epochs):
                row = {"epoch": epoch + 1, "loss": self._train_epoch(wrapped, optimizer, epoch, bar)}
                row |= {"lr": learning_rate(epoch + 1, self.config), "seconds": time.perf_counter() - started}
                if self.evaluate is not None:
                    row |= self.evaluate(epoch + 1)
                self.history.append(row)
                self._write("metrics.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in self.history))
        return self.history

    def _train_epoch(self, wrapped: nn.Module, optimizer: Optimizer, epoch: int, bar: "StepBar") -> float:
        """One pass over the data; returns its mean loss over all processes."""
        wrapped.train()
        total = torch.zeros((), device=self.accelerator.device)
        for step, [batch] in enumerate(self.loader.epoch(epoch)):
            set_learning_rate(optimizer, learning_rate(epoch + step / self.loader.steps_per_epoch, self.config))
            loss = self.loss_function(wrapped, batch.pictures, batch.classes)
            self._update(wrapped, optimizer, loss)
            total += loss.detach()
            if step % READ_EVERY == READ_EVERY - 1 or step == self.loader.steps_per_epoch - 1:
                bar.show(epoch, step + 1, self._finite(total.item() / (step + 1), epoch, step))
        return self.accelerator.reduce(total, "mean").item() / self.loader.steps_per_epoch

    def _update(self, wrapped: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        if self.config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(wrapped.parameters(), self.config.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def _finite(self, loss: float, epoch: int, step: int) -> float:
        if math.isfinite(loss):
            return loss
        raise FloatingPointError(
            f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}; "
            "try a smaller base_lr, more warmup_epochs, clip_grad=1 or precision=fp32"
        )

    def _write(self, name: str, text: str) -> None:
        if self.accelerator.is_main_process:
            write_text(Path(self.config.output_dir) / name, text)


def progress_bar(accelerator: Accelerator) -> Progress:
    """A bar with loss, pictures per second and the time left, on the main process only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} img/s "),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        disable=not accelerator.is_main_process,
    )


class StepBar:
    """The line of one run in a progress bar, counted in steps."""

    def __init__(self, progress: Progress, title: str, config: TrainConfig, steps_per_epoch: int) -> None:
        self._progress, self._steps, self._global_batch = progress, steps_per_epoch, config.global_batch
        self._started = time.perf_counter()
        self._task = progress.add_task(title, total=config.epochs * steps_per_epoch, loss=math.nan, rate=0.0)

    def show(self, epoch: int, step: int, loss: float) -> None:
        """Move the bar to ``step`` steps into ``epoch``."""
        done = epoch * self._steps + step
        rate = done * self._global_batch / (time.perf_counter() - self._started)
        self._progress.update(self._task, completed=done, loss=loss, rate=rate)


@torch.inference_mode()
def top1(accelerator: Accelerator, model: nn.Module, loader: EvalLoader) -> float:
    """Share of a data set that the model classifies rightly, in percent; every picture counts once.

    Args:
        accelerator: Its processes each score their own pictures; nothing is padded.
        model: The bare model (a wrapper's collective calls would hang where processes have unequal shares).
        loader: This process's share of the pictures.
    """
    correct_and_all = torch.zeros(2, dtype=torch.long, device=accelerator.device)
    was_training = model.training
    model.eval()
    for batch in loader:
        with accelerator.autocast():
            logits = model(batch.pictures)
        correct_and_all[0] += (logits.argmax(dim=1) == batch.classes).sum()
        correct_and_all[1] += len(batch.classes)
    model.train(was_training)
    correct, count = accelerator.reduce(correct_and_all, "sum").tolist()
    return 100 * correct / count
