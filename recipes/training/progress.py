"""Progress of a run: the bar, a line for each epoch, figures for trackers, and the MFU."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arm_zoo.pretraining.autoregressive import DVAE_TOKENS
from recipes.config import TrainConfig
from recipes.training.ema import FIGURES

GEMM_SIZE, GEMM_RUNS = 8192, 20
SCORES = (*FIGURES.values(), "miou")  # of a model on validation images


def image_flops(build: Callable[..., nn.Module], shape: tuple[int, int, int], views: int = 1) -> int:
    """Floating-point operations in the matrix products of one image's forward and backward pass.

    They are counted on the meta device, for views of a shape (channels, height, width). Scans are not matrix products
    and do not count, nor does what gradient checkpointing computes twice: the MFU is about useful products.
    """
    model: Any = build(device="meta").eval()
    tokens = {}
    if getattr(model, "target", None) == DVAE_TOKENS:  # the forward pass needs them for its loss
        tokens["tokens"] = torch.empty(views, model.patch_embed.num_patches, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(views, *shape, device="meta"), **tokens)
    counts, kind = counter.get_flop_counts(), type(model).__name__
    idle = [name for name, part in model.named_children() if not any(p.requires_grad for p in part.parameters())]
    forward_only = sum(sum(counts[f"{kind}.{name}"].values()) for name in idle if f"{kind}.{name}" in counts)
    # a backward pass has two products for each product of the forward pass, but none in parts without gradients
    return 3 * counter.get_total_flops() - 2 * forward_only


def peak_speed(config: TrainConfig, shape: tuple[int, int, int], accelerator: Accelerator) -> float | None:
    """Images per second if all GPUs computed as fast as in a large square matrix product; None without a GPU."""
    if accelerator.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, device=accelerator.device, dtype=dtype)
    from torch.utils.benchmark import Timer  # its import looks for a CUDA compiler, and warns where there is no GPU

    timer = Timer("a @ b", globals={"a": a, "b": b})
    timer.timeit(GEMM_RUNS)  # a warm-up, in which the clocks rise
    flops_per_second = 2 * GEMM_SIZE**3 / timer.timeit(GEMM_RUNS).mean
    return flops_per_second * accelerator.num_processes / image_flops(config.build, shape, config.views)


class Messages(Console):
    """What a run says on stderr. Once nobody reads it any more, it falls silent, where rich would end the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@dataclass
class ProgressDisplay:
    """Progress bar, epoch lines and trackers of one run; only the main process shows anything."""

    accelerator: Accelerator  # its trackers, if any, get the figures
    console: Console
    title: str
    config: TrainConfig
    steps_per_epoch: int
    peak: float | None  # see `peak_speed`; the speed divided by it is the model FLOPs utilisation (MFU)

    def __post_init__(self) -> None:
        title = TextColumn("{task.description}", markup=False)
        columns = (title, BarColumn(), TaskProgressColumn(), "{task.fields[reading]}")
        times = (TimeElapsedColumn(), "left", TimeRemainingColumn())
        hidden = not self.accelerator.is_main_process
        self.bar = Progress(*columns, *times, console=self.console, speed_estimate_period=600, disable=hidden)
        self._task = self.bar.add_task(self.title, total=self.config.epochs * self.steps_per_epoch, reading="loss -")

    def begin(self, step: int) -> None:
        self.bar.update(self._task, completed=step)
        self._last = (step, time.perf_counter())

    def speed(self, images_per_second: float) -> dict[str, float]:
        """Speed and memory: on a GPU the most that tensors have taken, on a CPU what the process takes now."""
        device = self.accelerator.device
        used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        figures = {"images_per_second": images_per_second, "memory_gib": used / 2**30}
        return figures if self.peak is None else figures | {"mfu": images_per_second / self.peak}

    def step(self, step: int, figures: dict[str, Any]) -> None:
        """Show and log the figures, at least `loss`, after `step` optimizer steps."""
        now = time.perf_counter()
        figures = figures | self.speed((step - self._last[0]) * self.config.global_batch / (now - self._last[1]))
        self._last = (step, now)
        mfu = f"  {figures['mfu']:.0%} of GEMM peak" if "mfu" in figures else ""
        speed = f"{figures['images_per_second']:,.0f} img/s{mfu}  {figures['memory_gib']:.1f} GiB"
        self.bar.update(self._task, completed=step, reading=f"loss {figures['loss']:.3f}  {speed}")
        self.accelerator.log({f"step/{name}": value for name, value in figures.items()}, step=step)

    def epoch(self, step: int, row: dict[str, float]) -> None:
        """Log an epoch's figures and print them in a line: all where no bar can be drawn, else the scores, if any."""
        self.accelerator.log({f"epoch/{name}": value for name, value in row.items()}, step=step)
        names = [name for name in row if name != "epoch"]
        if self.console.is_terminal:
            scores = [name for name in SCORES if name in row]
            names = ["loss", *scores] if scores else []
        if names:
            shown = {name: row[name] if isinstance(row[name], int) else f"{row[name]:.4g}" for name in names}
            line = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.console.print(f"epoch {row['epoch']}/{self.config.epochs}  {line}", soft_wrap=True)
        self._last = (step, time.perf_counter())  # scoring is not training
