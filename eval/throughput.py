"""Time models in turn in one process: seconds per step, images per second, memory, and the ratio to the last model.

Run from the repository root, for example `python -m eval.throughput --device cpu`.
"""

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from rich.table import Table
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

import arm_zoo
from arm_zoo.command_line import positive
from arm_zoo.loading import entries, timm_entries, unknown_model
from arm_zoo.ops import scan_backend
from arm_zoo.ops.backends import resolve_backend
from arm_zoo.pretraining import DEFAULT_OBJECTIVE, OBJECTIVES
from eval.command_line import guarded
from eval.scoring.predict import DTYPES
from eval.speed.timing import STEPS_PER_READING, circumstances, time_in_turn
from eval.tables import Row, added, check_output, model_and_backend, show_table, text_table

DEFAULT_MODELS = ["arm_base_patch16_224", "vit_base_patch16_224"]  # only the first can be pretrained
NUM_CLASSES = 1000
PRETRAIN_IMG_SIZE = 192
DEFAULT_BATCH_SIZE = 8
SWEEPS = {"img-size": [224, 384, 512, 768, 1024, 1536, 2048], "batch-size": [2**power for power in range(9)]}
FULL_BATCH_SIZE = {"cpu": 8, "cuda": 256}  # images of the first size in SWEEPS that keep a device busy
WARM_UP_STEPS = 3
# Of patches, clusters and decoders that a configuration sets, such as those of recipes/configs/pretrain_cifar10.yaml.
TIMES_OTHER_SIZES = (
    "or time the pretraining of a configuration: type python -m recipes.loader_speed --step pretrain --config FILE "
    "data.source=FOLDER, whose line `fixed batch` is the speed without loading"
)
COLUMNS = (
    *("model", "img_size", "median_s", "min_s", "max_s", "img_per_s", "ratio", "pairwise_ratio", "peak_mib"),
    *("scan_backend", "mode", "batch_size", "dtype", "autocast", "compile", "cuda_graphs", "repeats"),
    *("device", "threads", "torch", "timm", "arm_zoo", "date"),
)

Step = Callable[[], None]


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot run, before anything is built."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if args.cuda_graphs and not (args.compile and args.device == "cuda"):
        raise ValueError("--cuda-graphs is for compiled models on a GPU; type --device cuda --compile --cuda-graphs")
    if args.autocast and args.dtype == "fp32":
        raise ValueError("--autocast needs a type of 16 bits to run in; type --dtype bf16 or --dtype fp16 with it")
    known = timm_entries()
    for name in args.models:
        if name not in known:
            raise unknown_model(name, known)
        if args.mode == "pretrain" and not is_pretrained_alike(name):
            such = f"with the patches of {name}; name an entry such as {DEFAULT_MODELS[0]}"
            other = f"; {TIMES_OTHER_SIZES}" if name in entries() else ""
            raise ValueError(f"--mode pretrain: there is no pretraining model {such}{other}")
    for backend in args.scan_backend:
        resolved(backend, args)
    check_output(args.output, COLUMNS)


def is_pretrained_alike(name: str) -> bool:
    """Whether there is a pretraining model with the sizes and the patches of an entry."""
    size = name.partition("_patch")[0]
    if name not in entries() or size not in OBJECTIVES[DEFAULT_OBJECTIVE].sizes:
        return False
    entry: Any = timm.create_model(name, device="meta")
    return entry.patch_embed.patch_stride == arm_zoo.create_pretraining_model(size, device="meta").patch_size


def resolved(backend: str, args: argparse.Namespace) -> str:
    """The backend itself, or the one that "auto" chooses; ValueError if device or type do not fit it."""
    with scan_backend(backend):
        return resolve_backend(torch.empty(0, device=args.device, dtype=DTYPES[args.dtype]))


def sizes_and_batches(args: argparse.Namespace) -> list[tuple[int | None, int]]:
    """The image size in pixels (None: each model's own) and the batch size of each group that is timed.

    A sweep of image sizes keeps the pixels of a batch about the same, unless batch sizes are given.
    """
    if args.sweep == "img-size" and args.batch_size is None:
        return [(size, filling_batch_size(size, args.device)) for size in args.img_size or SWEEPS["img-size"]]
    swept = {args.sweep: SWEEPS[args.sweep]} if args.sweep else {}
    sizes = args.img_size or swept.get("img-size", [None])
    return list(itertools.product(sizes, args.batch_size or swept.get("batch-size", [DEFAULT_BATCH_SIZE])))


def filling_batch_size(img_size: int, device: str) -> int:
    """The smallest power of two whose images have enough pixels to keep the device busy."""
    return 2 ** max(0, math.ceil(math.log2(FULL_BATCH_SIZE[device] * (SWEEPS["img-size"][0] / img_size) ** 2)))


def build(name: str, args: argparse.Namespace) -> tuple[Any, int]:
    """The model with fresh weights on the CPU, and the size of its images in pixels."""
    if args.mode == "pretrain":
        img_size = args.img_size or PRETRAIN_IMG_SIZE
        return arm_zoo.create_pretraining_model(name.partition("_patch")[0], img_size=img_size), img_size
    if args.img_size is not None:
        with contextlib.suppress(TypeError):  # models without this argument, such as convnets, take any size
            return timm.create_model(name, num_classes=NUM_CLASSES, img_size=args.img_size), args.img_size
    model = timm.create_model(name, num_classes=NUM_CLASSES)
    return model, args.img_size or resolve_model_data_config(model)["input_size"][-1]


def inference_step(model: nn.Module, images: torch.Tensor, args: argparse.Namespace) -> Step:
    """A forward pass of images (batch, channels, height, width); without --autocast, weights are cast to --dtype."""
    dtype = DTYPES[args.dtype]
    if not args.autocast:
        model, images = model.to(dtype), images.to(dtype)

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast(args.device, dtype, enabled=args.autocast):
            model(images)

    return step


def training_step(model: nn.Module, images: torch.Tensor, args: argparse.Namespace) -> Step:
    """Loss, backward pass and AdamW step on images (batch, channels, height, width) with random labels."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=args.device == "cuda")
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "fp16")
    labels = torch.randint(NUM_CLASSES, (len(images),), device=images.device)

    def step() -> None:
        with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.autocast):
            output = model(images)
            loss = output[0] if args.mode == "pretrain" else F.cross_entropy(output, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # last, so that no gradients are held while the other models run

    return step


def prepare(name: str, backend: str, args: argparse.Namespace) -> tuple[Step, Row]:
    """A step of a model on its device, after the first, slow ones, and what its row says of it.

    Peak memory is None on the CPU and with CUDA graphs, whose replayed steps allocate nothing that torch would count.
    """
    clear_device_cache(garbage_collection=True)  # of models that were timed before or did not fit
    cuda = args.device == "cuda"
    model, img_size = build(name, args)
    others = torch.cuda.memory_allocated() if cuda else 0
    model = model.to(args.device).train(args.mode != "infer")
    if args.compile:
        model.compile(mode="reduce-overhead" if args.cuda_graphs else None)
    pretrains = args.mode == "pretrain"  # by a model that timm has no configuration of
    channels = model.in_chans if pretrains else resolve_model_data_config(model)["input_size"][0]
    images = torch.randn(args.batch_size, channels, img_size, img_size, device=args.device)
    make_step = inference_step if args.mode == "infer" else training_step
    step = scan_backend(backend)(make_step(model, images, args))
    step()  # compiles
    counted = cuda and not args.cuda_graphs
    if counted:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP_STEPS - 1):
        step()
    peak = (torch.cuda.max_memory_allocated() - others) / 2**20 if counted else None
    taken = resolved(backend, args) if name in entries() else ""  # all of our models scan
    return step, {"model": name, "img_size": img_size, "scan_backend": taken, "peak_mib": peak}


def compare(readings: Sequence[Sequence[float]], batch_size: int) -> list[Row]:
    """Seconds per step and speed of each model; a ratio above 1 means slower than the last model, the peer."""
    rows = []
    for times in readings:
        row = {"median_s": median(times), "min_s": min(times), "max_s": max(times)}
        pairs = zip(times, readings[-1], strict=True)
        ratios = {"ratio": median(times) / median(readings[-1]), "pairwise_ratio": median(a / b for a, b in pairs)}
        rows.append({**row, "img_per_s": batch_size / row["median_s"], **ratios})
    return rows


def as_table(rows: Sequence[Row]) -> Table:
    """The rows as a table for people, in milliseconds; title and caption say what all rows have in common."""
    figures = ["ms/step", "min - max", "img/s", "ratio", "pairwise", "peak MiB"]
    lines = []
    for row in rows:
        middle, low, high = (f"{1e3 * row[name]:.1f}" for name in ("median_s", "min_s", "max_s"))
        ratios = (f"{row[name]:.3f}" for name in ("ratio", "pairwise_ratio"))
        memory = [] if row["peak_mib"] is None else [f"{row['peak_mib']:,.0f}"]
        lines.append([model_and_backend(row), middle, f"{low} - {high}", f"{row['img_per_s']:,.1f}", *ratios, *memory])
    sizes = ", ".join(dict.fromkeys(str(row["img_size"]) for row in rows))
    title = f"{{mode}}, {sizes} pixels, batch {{batch_size}}, {{dtype}}, autocast {{autocast}}, compile {{compile}}, "
    title += "CUDA graphs {cuda_graphs}"
    caption = "{device}, {threads} threads, torch {torch}, timm {timm}; {repeats} readings in turn; ratio: time over "
    shown = caption.format(**rows[0]) + f"that of {rows[-1]['model']}"
    return text_table(title.format(**rows[0]), ["model"], figures[: len(lines[0]) - 1], lines, shown)


def profile(step: Step, device: str) -> list[tuple[str, float, float]]:
    """The kernels of a step on a GPU, or its operations on a CPU: name, calls and milliseconds, longest first."""
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    count = STEPS_PER_READING[device]
    with torch.profiler.profile(activities=[activity]) as recorded:
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    times = [(one.key, one.count / count, getattr(one, spent) / count / 1000) for one in recorded.key_averages()]
    return sorted((one for one in times if one[2] > 0), key=lambda one: -one[2])


def as_profile(name: str, times: Sequence[tuple[str, float, float]], longest: int) -> Table:
    """The longest entries of a profile, with their fractions of the total; very long names are cut."""
    total = sum(milliseconds for *_, milliseconds in times)
    lines = [[f"{key:.100}", f"{calls:g}", f"{ms:.3f}", f"{ms / total:.1%}"] for key, calls, ms in times[:longest]]
    title = f"{name}: {total:.2f} ms a step in all"
    return text_table(title, ["kernel or operation"], ["calls", "ms", "fraction"], lines)


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """End the block, with a message, if memory runs out in it; raise ValueError if it cannot run for other reasons."""
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:  # timm's and torch's errors for what does not fit
        if not should_reduce_batch_size(error):
            raise ValueError(f"{what} does not run so: {error}") from error
        print(f"{what} is left out: memory ran out", file=sys.stderr)


def measure(args: argparse.Namespace) -> list[Row]:
    """Time all models in turn at one image size and one batch size, print the table and add its rows to --output.

    A model that needs more memory than there is has no row; ratios are then to the last model with a row.
    """
    size = f"{args.img_size} pixels, " if args.img_size else ""
    group = f"{args.mode}, {size}batch {args.batch_size}, {args.device}"
    print(f"timing {', '.join(args.models)}: {group}", file=sys.stderr)
    torch.compiler.reset()  # else a second size would be compiled for varying sizes
    shared = vars(args) | circumstances(args.device)
    steps, facts, rows = [], [], []
    for name in args.models:
        for backend in args.scan_backend[: None if name in entries() else 1]:
            with fitting(name):
                step, fact = prepare(name, backend, args)
                steps.append(step)
                facts.append(fact)
    with fitting(group):
        readings = time_in_turn(steps, args.device, args.repeats)
        times = compare(readings, args.batch_size)
        rows = [shared | fact | measured for fact, measured in zip(facts, times, strict=True)]
    if not rows:
        return rows
    with added(args.output, rows, COLUMNS):
        show_table(as_table(rows))
        for row, step in zip(rows, steps, strict=True) if args.profile else ():
            show_table(as_profile(model_and_backend(row), profile(step, args.device), args.profile))
    return rows


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.throughput", description=__doc__)
    add = parser.add_argument
    named = f"timm's names, ours or others; ratios are to the last one; default: {' '.join(DEFAULT_MODELS)}"
    add("--models", nargs="+", metavar="NAME", help=f"{named}, for pretrain only the first")
    modes = ("infer", "finetune", "pretrain")
    what = f"training includes the AdamW step; of pretraining only the {DEFAULT_OBJECTIVE} objective is timed"
    add("--mode", choices=modes, default=modes[0], help=f"{what} (%(default)s)")
    numbers: dict[str, Any] = {"type": positive, "nargs": "+", "metavar": "N"}
    add("--batch-size", **numbers, help=f"one or several; default: {DEFAULT_BATCH_SIZE}")
    own = f"one or several, in pixels; default: each model's own, {PRETRAIN_IMG_SIZE} for pretrain"
    add("--img-size", **numbers, help=own)
    ranges = " or ".join(f"{name} {values[0]} to {values[-1]}" for name, values in SWEEPS.items())
    batch = f"{FULL_BATCH_SIZE['cuda']} images on a GPU and {FULL_BATCH_SIZE['cpu']} on the CPU"
    fewer = f"a sweep of image sizes has batches of as many pixels as {batch} of {SWEEPS['img-size'][0]} pixels"
    add("--sweep", choices=list(SWEEPS), help=f"time {ranges}, unless other numbers are given; {fewer}")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=list(STEPS_PER_READING), default=default_device, help="(%(default)s)")
    cast = "infer casts the weights, training runs under autocast (%(default)s)"
    add("--dtype", choices=list(DTYPES), default="fp32", help=cast)
    add("--autocast", action="store_true", help="infer: keep fp32 weights and run under autocast too")
    add("--compile", action="store_true", help="through torch.compile")
    add("--cuda-graphs", action="store_true", help="with --compile: replay all kernel launches of a step at once")
    chosen = arm_zoo.get_scan_backend()
    add("--scan-backend", nargs="+", default=[chosen], metavar="NAME", help=f"backends to time ({chosen})")
    add("--repeats", type=positive, default=10, help="readings per model (%(default)s)")
    add("--threads", type=positive, help="CPU threads; default: torch's choice")
    add("--profile", type=positive, default=0, metavar="N", help="also print the N longest kernels of a step")
    add("--output", type=Path, metavar="FILE", help="add the rows to this .csv or .json file")
    return parser


def run(args: argparse.Namespace) -> int:
    args.models = args.models or DEFAULT_MODELS[: 1 if args.mode == "pretrain" else None]
    check(args)
    args.autocast |= args.dtype != "fp32" and args.mode != "infer"  # training keeps fp32 weights
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    groups = [{"img_size": size, "batch_size": batch} for size, batch in sizes_and_batches(args)]
    timed = [measure(argparse.Namespace(**vars(args) | group)) for group in groups]
    if not any(timed):
        raise ValueError("nothing was timed: no model fits into memory; type a smaller --batch-size")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
