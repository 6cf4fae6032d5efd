"""Times models in turn in one process: seconds per step, images per second, memory, ratio to the last model named.

Run from the repository root, for example `python -m eval.throughput --device cpu`.
"""

import argparse
import contextlib
import difflib
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

import arm_zoo
from arm_zoo.scan import scan_backend
from arm_zoo.scan.backends import resolve_backend
from eval.timings import Row, append, check_output

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_MODELS = {
    "infer": ["arm_base_patch16_224", "vit_base_patch16_224"],
    "finetune": ["arm_base_patch16_224", "vit_base_patch16_224"],
    "pretrain": ["arm_base_patch16_224"],
}
NUM_CLASSES = 1000
PRETRAIN_IMG_SIZE = 192
WARM_UP_STEPS = 3
# Steps in a row under one reading: on a GPU they overlap with their launches, as they do in real work.
STEPS_PER_READING = {"cpu": 1, "cuda": 10}
COLUMNS = (
    *("model", "img_size", "median_s", "min_s", "max_s", "img_per_s", "ratio", "pairwise_ratio", "peak_mib"),
    *("scan_backend", "mode", "batch_size", "dtype", "autocast", "compile", "cuda_graphs", "repeats"),
    *("device", "threads", "torch", "timm", "arm_zoo", "date"),
)

Step = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """The command line, one field per option."""

    models: list[str]
    mode: str
    batch_size: int
    img_size: int | None
    device: str
    dtype: str
    autocast: bool
    compile: bool
    cuda_graphs: bool
    scan_backend: list[str]
    repeats: int
    threads: int | None
    profile: int
    output: Path | None

    @property
    def uses_autocast(self) -> bool:
        """Training keeps fp32 weights; inference does so on request."""
        return self.dtype != "fp32" and (self.autocast or self.mode != "infer")


@dataclass(frozen=True)
class Contender:
    """A model ready to be timed, what its scans run on ("" without any), and the peak memory of one step in MiB.

    None on CPU, and with CUDA graphs: torch does not count what a replayed graph uses.
    """

    name: str
    img_size: int
    scan_backend: str
    step: Step
    peak_mib: float | None


def check(settings: Settings) -> None:
    """Raises ValueError for what cannot run, before anything is built."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if settings.cuda_graphs and not (settings.compile and settings.device == "cuda"):
        raise ValueError("--cuda-graphs is for compiled models on a GPU; type --device cuda --compile --cuda-graphs")
    if settings.autocast and settings.dtype == "fp32":
        raise ValueError("--autocast needs a type of 16 bits to run in; type --dtype bf16 or --dtype fp16 with it")
    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    for name in settings.models:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known))
            hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has them all"
            raise ValueError(f"unknown model {name!r}; {hint}")
        if settings.mode == "pretrain" and not re.fullmatch(r"arm_[a-z]+(_patch16_\d+(\..*)?)?", name):
            raise ValueError(
                "--mode pretrain is for ARM models with patches of 16 pixels, such as arm_base_patch16_224; "
                f"got {name!r}"
            )
    for backend in settings.scan_backend:
        taken_backend(backend, settings)
    check_output(settings.output, COLUMNS)


def has_scans(name: str) -> bool:
    """Whether a name is that of one of our models, which all scan."""
    return name.startswith("arm_")


def taken_backend(name: str, settings: Settings) -> str:
    """What scans run on with this backend: its name, or what "auto" takes.

    Raises ValueError for an unknown name, and for one that does not take the device or the type.
    """
    with scan_backend(name):
        return resolve_backend(torch.empty(0, device=settings.device, dtype=DTYPES[settings.dtype]))


def build(name: str, settings: Settings) -> tuple[nn.Module, int]:
    """The model with fresh weights on the CPU, and the size of its images in pixels."""
    if settings.mode == "pretrain":
        img_size = settings.img_size or PRETRAIN_IMG_SIZE
        return arm_zoo.create_pretraining_model(name.partition("_patch")[0], img_size=img_size), img_size
    if settings.img_size is not None:
        with contextlib.suppress(TypeError):  # models without such an argument, as convnets, take any size
            model = timm.create_model(name, num_classes=NUM_CLASSES, img_size=settings.img_size)
            return model, settings.img_size
    model = timm.create_model(name, num_classes=NUM_CLASSES)
    return model, settings.img_size or resolve_model_data_config(model)["input_size"][-1]


def inference_step(model: nn.Module, images: torch.Tensor, settings: Settings) -> Step:
    dtype = DTYPES[settings.dtype]
    if not settings.uses_autocast:
        model, images = model.to(dtype), images.to(dtype)

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast(settings.device, dtype, enabled=settings.uses_autocast):
            model(images)

    return step


def training_step(model: nn.Module, images: torch.Tensor, settings: Settings) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), fused=settings.device == "cuda")
    scaler = torch.amp.GradScaler(settings.device, enabled=settings.dtype == "fp16")
    labels = torch.randint(NUM_CLASSES, (len(images),), device=images.device)

    def step() -> None:
        with torch.autocast(settings.device, DTYPES[settings.dtype], enabled=settings.uses_autocast):
            output = model(images)
            loss = output[0] if settings.mode == "pretrain" else F.cross_entropy(output, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # last, so that no gradients are held while the other models run

    return step


def prepare(name: str, model: nn.Module, img_size: int, backend: str, settings: Settings) -> Contender:
    """Moves a model to its device, runs its first, slow steps and reads the memory of one more."""
    cuda = settings.device == "cuda"
    others = torch.cuda.memory_allocated() if cuda else 0
    model = model.to(settings.device).train(settings.mode != "infer")
    if settings.compile:
        model.compile(mode="reduce-overhead" if settings.cuda_graphs else None)
    channels = resolve_model_data_config(model)["input_size"][0]
    images = torch.randn(settings.batch_size, channels, img_size, img_size, device=settings.device)
    make_step = inference_step if settings.mode == "infer" else training_step
    step = scan_backend(backend)(make_step(model, images, settings))
    for _ in range(WARM_UP_STEPS):
        step()
    peak = None
    if cuda and not settings.cuda_graphs:
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = (torch.cuda.max_memory_allocated() - others) / 2**20
    return Contender(name, img_size, taken_backend(backend, settings) if has_scans(name) else "", step, peak)


def read_clock(step: Step, device: str) -> float:
    """Seconds per step: the mean over the steps of one reading."""
    count = STEPS_PER_READING[device]
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - begin) / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / count


def time_in_turn(steps: Sequence[Step], device: str, repeats: int) -> list[list[float]]:
    """Readings of each step, taken A B A B so that a slow spell of the machine hits every model."""
    # No refresh thread: it would run beside the models.
    rounds = track(range(repeats), "timing in turn", console=Console(stderr=True), auto_refresh=False)
    readings = [[read_clock(step, device) for step in steps] for _ in rounds]
    return [list(column) for column in zip(*readings, strict=True)]


def compare(readings: Sequence[Sequence[float]], batch_size: int) -> list[Row]:
    """Seconds per step and speed of each model; a ratio above 1 is slower than the last model, the peer."""
    peer = readings[-1]
    return [
        {
            "median_s": median(times),
            "min_s": min(times),
            "max_s": max(times),
            "img_per_s": batch_size / median(times),
            "ratio": median(times) / median(peer),
            "pairwise_ratio": median(own / other for own, other in zip(times, peer, strict=True)),
        }
        for times in readings
    ]


def circumstances(settings: Settings) -> Row:
    """What all rows of a run share."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "mode": settings.mode,
        "batch_size": settings.batch_size,
        "dtype": settings.dtype,
        "autocast": settings.uses_autocast,
        "compile": settings.compile,
        "cuda_graphs": settings.cuda_graphs,
        "repeats": settings.repeats,
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "arm_zoo": arm_zoo.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def labels(rows: Sequence[Row]) -> list[str]:
    """What tells the rows apart: the model, and its scans' backend where it was timed with several."""
    names = Counter(row["model"] for row in rows)
    return [
        row["model"]
        if names[row["model"]] == 1 or not row["scan_backend"]
        else f"{row['model']} ({row['scan_backend']})"
        for row in rows
    ]


def as_table(rows: Sequence[Row]) -> Table:
    """The rows for people: times in milliseconds, and what all rows share around the table."""
    shared = rows[0]
    table = Table(
        title="{mode}, batch {batch_size}, {dtype}, autocast {autocast}, ".format(**shared)
        + "compile {compile}, CUDA graphs {cuda_graphs}".format(**shared),
        caption="{device}, {threads} threads, torch {torch}, timm {timm}; {repeats} readings in turn".format(**shared)
        + f"; ratio: time over that of {rows[-1]['model']}",
        box=SIMPLE_HEAD,
    )
    table.add_column("model", overflow="fold")
    columns: dict[str, Callable[[Row], str]] = {
        "ms/step": lambda row: f"{1e3 * row['median_s']:.1f}",
        "min - max": lambda row: f"{1e3 * row['min_s']:.1f} - {1e3 * row['max_s']:.1f}",
        "img/s": lambda row: f"{row['img_per_s']:,.1f}",
        "ratio": lambda row: f"{row['ratio']:.3f}",
        "pairwise": lambda row: f"{row['pairwise_ratio']:.3f}",
    }
    if shared["peak_mib"] is not None:
        columns["peak MiB"] = lambda row: f"{row['peak_mib']:,.0f}"
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for label, row in zip(labels(rows), rows, strict=True):
        table.add_row(label, *(show(row) for show in columns.values()))
    return table


def profile(one: Contender, device: str) -> list[tuple[str, float, float]]:
    """Kernels of one step on a GPU, operations on the CPU: name, calls and milliseconds of each, longest first."""
    cuda = device == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    count = STEPS_PER_READING[device]
    with torch.profiler.profile(activities=[activity]) as recorded:
        for _ in range(count):
            one.step()
        if cuda:
            torch.cuda.synchronize()
    times = [
        (event.key, event.count / count, (event.self_device_time_total if cuda else event.self_cpu_time_total) / count)
        for event in recorded.key_averages()
    ]
    return sorted(((key, calls, us / 1000) for key, calls, us in times if us > 0), key=lambda entry: -entry[2])


def as_profile(name: str, times: Sequence[tuple[str, float, float]], longest: int) -> Table:
    """The longest entries of a profile, with their shares of all."""
    total = sum(milliseconds for *_, milliseconds in times)
    table = Table(title=f"{name}: {total:.2f} ms a step in all", box=SIMPLE_HEAD, expand=True)
    table.add_column("kernel or operation", overflow="ellipsis", no_wrap=True, ratio=1)  # what the numbers leave
    for title in ("calls", "ms", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    for key, calls, milliseconds in times[:longest]:
        table.add_row(key, f"{calls:g}", f"{milliseconds:.3f}", f"{milliseconds / total:.1%}")
    return table


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.throughput", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help="timm names, ours or not; the last one is the peer of the ratios")
    add("--mode", choices=list(DEFAULT_MODELS), default="infer", help="training modes include the AdamW step")
    add("--batch-size", type=positive, default=8)
    add("--img-size", type=positive, help=f"pixels; default: each model's own, {PRETRAIN_IMG_SIZE} for pretrain")
    add("--device", choices=list(STEPS_PER_READING), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=list(DTYPES), default="fp32", help="infer casts the weights, training runs under autocast")
    add("--autocast", action="store_true", help="infer: keep fp32 weights and run under autocast too")
    add("--compile", action="store_true", help="through torch.compile")
    add("--cuda-graphs", action="store_true", help="with --compile: replay a step's launches, which then cost no time")
    backend = arm_zoo.get_scan_backend()
    help_backend = "of ARM models, each timed with every one; see arm_zoo.set_scan_backend"
    add("--scan-backend", nargs="+", default=[backend], metavar="NAME", help=help_backend)
    add("--repeats", type=positive, default=10, help="readings per model")
    add("--threads", type=positive, help="CPU threads; default: torch's choice")
    add("--profile", type=positive, default=0, metavar="N", help="then print the N longest kernels of a step")
    add("--output", type=Path, metavar="FILE", help=".csv or .json file that the rows are added to")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = vars(parser.parse_args(argv))
    settings = Settings(**{**args, "models": args["models"] or DEFAULT_MODELS[args["mode"]]})
    try:
        check(settings)
        built = [
            (name, *build(name, settings), backend)
            for name in settings.models
            for backend in (settings.scan_backend if has_scans(name) else settings.scan_backend[:1])
        ]
    except ValueError as error:
        parser.error(str(error))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    contenders = []
    for name, model, img_size, backend in built:
        try:
            contenders.append(prepare(name, model, img_size, backend, settings))
        except (AssertionError, ValueError, RuntimeError) as error:  # as timm and torch say what does not fit
            parser.error(f"{name} does not run so: {error}")
    readings = time_in_turn([contender.step for contender in contenders], settings.device, settings.repeats)
    shared = circumstances(settings)
    rows = [
        {
            "model": one.name,
            "img_size": one.img_size,
            **measured,
            "peak_mib": one.peak_mib,
            "scan_backend": one.scan_backend,
            **shared,
        }
        for one, measured in zip(contenders, compare(readings, settings.batch_size), strict=True)
    ]
    Console(markup=False, emoji=False).print(as_table(rows))
    if settings.profile:
        for label, one in zip(labels(rows), contenders, strict=True):
            Console(markup=False, emoji=False).print(
                as_profile(label, profile(one, settings.device), settings.profile)
            )
    if settings.output is not None:
        append(settings.output, COLUMNS, rows)


if __name__ == "__main__":
    main()
