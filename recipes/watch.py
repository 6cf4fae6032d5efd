"""What a run shows while it runs: the progress bar, the share of the device's speed, and figures for trackers."""

import math
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .config import TrainConfig
from .console import plain_console

GEMM_SIZE, GEMM_RUNS = 8192, 20


def picture_flops(build: Callable[..., nn.Module], shape: tuple[int, int, int]) -> int:
    """Floating-point operations of the matrix products of one picture's forward and backward pass.

    Counted on the meta device. The scans are no matrix products and are left out, as is what gradient checkpointing
    does twice: it is the share of the peak that useful products reach which is to be told.

    Args:
        build: Makes the model, as ``build(device="meta")``.
        shape: (channels, height, width).
    """
    model = build(device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"))
    return 3 * counter.get_total_flops()  # backward: two products for each of the forward pass


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measured operations per second of a large square matrix product on a GPU."""
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, device=device, dtype=dtype)
    for _ in range(GEMM_RUNS):
        a @ b
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(GEMM_RUNS):
        a @ b
    end.record()
    end.synchronize()
    return 2 * GEMM_SIZE**3 * GEMM_RUNS / (begin.elapsed_time(end) / 1000)


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU, what the process takes now on a CPU."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30


class Utilisation:
    """Model FLOPs utilisation (MFU): useful matrix products per second over what the GPUs' products reach."""

    def __init__(
        self,
        config: TrainConfig,
        build: Callable[..., nn.Module],
        shape: tuple[int, int, int],
        accelerator: Accelerator,
    ) -> None:
        self._flops = picture_flops(build, shape)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._peak = gemm_peak(accelerator.device, dtype) * accelerator.num_processes

    def share(self, images_per_second: float) -> float:
        """Of the measured peak, 0 to 1."""
        return images_per_second * self._flops / self._peak


def utilisation(
    config: TrainConfig, build: Callable[..., nn.Module], shape: tuple[int, int, int], accelerator: Accelerator
) -> Utilisation | None:
    """What the share of the GPUs' speed is computed with; None where there is no GPU."""
    return Utilisation(config, build, shape, accelerator) if accelerator.device.type == "cuda" else None


class MemoryColumn(ProgressColumn):
    """GiB in use."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def render(self, task: Any) -> str:
        return f"{peak_memory(self._device):.1f} GiB"


class Display:
    """Progress bar, epoch lines and trackers of one run, on the main process; the others show nothing.

    Args:
        accelerator: Its trackers, if any, get the figures.
        title: Stands before the bar.
        config: Length of the run and size of a step.
        steps_per_epoch: Optimizer steps.
        utilisation: Adds the share of the GPUs' speed; None on a CPU.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        title: str,
        config: TrainConfig,
        steps_per_epoch: int,
        utilisation: Utilisation | None,
    ) -> None:
        self._accelerator, self._config, self._steps = accelerator, config, steps_per_epoch
        self._utilisation = utilisation
        self.console = plain_console(quiet=not accelerator.is_main_process)
        mfu = [TextColumn("{task.fields[mfu]:.0%} of GEMM peak")] if utilisation is not None else []
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} img/s "),
            *mfu,
            MemoryColumn(accelerator.device),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=600,  # seconds
            disable=not accelerator.is_main_process,
        )
        total = config.epochs * steps_per_epoch
        self._task = self.progress.add_task(title, total=total, loss=math.nan, rate=0.0, mfu=0.0)
        self._last = (0, time.perf_counter())

    def begin(self, step: int) -> None:
        """Put the bar where the run goes on."""
        self.progress.update(self._task, completed=step)
        self._last = (step, time.perf_counter())

    def speed(self, images_per_second: float) -> dict[str, float]:
        """The figures of speed and memory."""
        figures = {"images_per_second": images_per_second, "memory_gib": peak_memory(self._accelerator.device)}
        return figures if self._utilisation is None else figures | {"mfu": self._utilisation.share(images_per_second)}

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Show where the run is after ``step`` optimizer steps, with at least ``loss``."""
        now = time.perf_counter()
        figures = figures | self.speed((step - self._last[0]) * self._config.global_batch / (now - self._last[1]))
        self._last = (step, now)
        rate, mfu = figures["images_per_second"], figures.get("mfu", 0.0)
        self.progress.update(self._task, completed=step, loss=figures["loss"], rate=rate, mfu=mfu)
        self._accelerator.log({f"step/{name}": value for name, value in figures.items()}, step=step)

    def epoch(self, step: int, row: dict[str, float]) -> None:
        """Log an epoch's figures, as a line too where no bar can be drawn."""
        self._accelerator.log({f"epoch/{name}": value for name, value in row.items()}, step=step)
        if not self.console.is_terminal:
            rest = {name: value for name, value in row.items() if name != "epoch"}
            line = "  ".join(
                f"{name} {value if isinstance(value, int) else f'{value:.4g}'}" for name, value in rest.items()
            )
            self.console.print(f"epoch {row['epoch']:.0f}/{self._config.epochs}  {line}", soft_wrap=True)
        self._last = (step, time.perf_counter())  # scoring is not training
