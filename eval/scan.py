"""Times the scan's kernels one by one, on each backend in turn, with their rates of bytes and exponentials.

Run from the repository root on a machine with a GPU: `python -m eval.scan`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import arm_zoo
from arm_zoo.order import scan_order
from eval.throughput import DTYPES, positive
from eval.timings import Row, append, check_output

REPEATS = 20
COLUMNS = (
    *("backend", "kernel", "ms", "bytes", "exponentials"),
    *("batch_size", "grid", "directions", "channels", "states", "dtype", "copy_bytes_per_s"),
    *("device", "torch", "arm_zoo", "date"),
)


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of one call on the GPU, its caches cleared before each reading.

    All calls are queued before any is waited for, so that the GPU does not wait for their launches.
    """
    flush = torch.empty(512 << 20, dtype=torch.int8, device="cuda")
    readings = []
    for _ in range(REPEATS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        readings.append((start, end))
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in readings[3:])


def copy_rate() -> float:
    """Bytes a second, read plus written, of a copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2e3 * source.numel() / milliseconds(lambda: target.copy_(source))


def draw(args: argparse.Namespace) -> tuple[list[torch.Tensor], list[Any]]:
    """Inputs of convolution and scan as a model has them: tokens, step sizes, B and C are parts of projections."""
    K, B, D, S = args.directions, args.batch_size, args.channels, args.states
    order = scan_order(args.grid, args.grid, K, args.grid**2 // 2 if K == 4 else None, device="cuda")
    L, dtype = order.shape[1], DTYPES[args.dtype]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    conv = [randn(B, L, 2 * D)[..., :D], randn(K, D, 4), randn(K, D), order]
    rates = -torch.arange(1.0, S + 1, device="cuda").repeat(K, D, 1)
    rank = math.ceil(D / 16)
    delta, into, out = randn(K, B, L, rank + 2 * S).split([rank, S, S], dim=-1)
    skip, bias = torch.randn(K, D, device="cuda"), torch.randn(K, D, device="cuda") - 3
    weight = randn(K, D, rank) / math.sqrt(rank)
    return conv, [randn(K, B, L, D), delta, rates, into, out, skip, bias, weight, True, order]


def measure(backend: str, args: argparse.Namespace) -> list[Row]:
    """One row a kernel: milliseconds, bytes it cannot do without, and exponentials of the decays."""
    conv, scan = draw(args)
    ops = torch.ops.arm_zoo
    u, gate = scan[0], torch.randn_like(conv[0])
    y, saved = ops.selective_scan(*scan, True, None, backend)
    gradient, gradient_u = torch.randn_like(y), torch.randn_like(u)
    sequence, token = u.numel() * u.element_size(), y.numel() * y.element_size()
    exponentials = u.numel() * args.states
    calls: list[tuple[str, Callable[[], Any], int, int]] = [
        ("convolution", lambda: ops.causal_conv(*conv, backend), token + sequence, 0),
        (
            "convolution, backward",
            lambda: ops.causal_conv_backward(gradient_u, *conv, backend),
            2 * token + sequence,
            0,
        ),
        (
            "scan, merge and gate",
            lambda: ops.selective_scan(*scan, False, gate, backend),
            sequence + 2 * token,
            exponentials,
        ),
        (
            "scan and merge, saving states",
            lambda: ops.selective_scan(*scan, True, None, backend),
            sequence + token + saved.nbytes,
            exponentials,
        ),
        (
            "scan, backward",
            lambda: ops.selective_scan_backward(gradient, *scan, saved, backend),
            3 * sequence + token + saved.nbytes,
            exponentials,
        ),
    ]
    return [
        {"backend": backend, "kernel": name, "ms": milliseconds(call), "bytes": size, "exponentials": count}
        for name, call, size, count in calls
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.scan", description=__doc__)
    add = parser.add_argument
    add("--backends", nargs="+", metavar="NAME", help="default: all that run here but the plain ones")
    add("--batch-size", type=positive, default=128)
    add("--grid", type=positive, default=14, help="patches a side; four directions have a class token too")
    add("--directions", type=int, choices=(1, 2, 4), default=4)
    add("--channels", type=positive, default=768)
    add("--states", type=positive, default=16)
    add("--dtype", choices=list(DTYPES), default="bf16")
    add("--output", type=Path, metavar="FILE", help=".csv or .json file that the rows are added to")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_output(args.output, COLUMNS)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("it times GPU kernels, and torch finds no CUDA device here")
    available = [name for name in arm_zoo.available_backends() if name in ("triton", "cuda", "mamba_ssm")]
    if unknown := set(args.backends or ()) - set(available):
        parser.error(f"--backends {' '.join(sorted(unknown))}: available here are {', '.join(available)}")
    rate = copy_rate()
    shared = {
        **{name: getattr(args, name) for name in ("batch_size", "grid", "directions", "channels", "states", "dtype")},
        "copy_bytes_per_s": rate,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "arm_zoo": arm_zoo.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        rows = [row for backend in args.backends or available for row in measure(backend, args)]
    except ValueError as error:  # sizes that a backend does not take
        parser.error(str(error))
    title = "batch {batch_size}, grid {grid}, {directions} directions, {channels} channels, {states} states, {dtype}"
    caption = f"{shared['device']}, torch {torch.__version__}; a copy moves {rate / 1e12:.2f} TB/s"
    table = Table(title=title.format(**shared), caption=caption, box=SIMPLE_HEAD)
    for column in ("backend", "kernel", "ms", "TB/s", "floor by bytes, ms", "G exponentials/s"):
        table.add_column(column, justify="left" if column in ("backend", "kernel") else "right")
    for row in rows:
        seconds = row["ms"] / 1e3
        table.add_row(
            row["backend"],
            row["kernel"],
            f"{row['ms']:.3f}",
            f"{row['bytes'] / seconds / 1e12:.2f}",
            f"{1e3 * row['bytes'] / rate:.3f}",
            f"{row['exponentials'] / seconds / 1e9:,.0f}" if row["exponentials"] else "",
        )
    Console().print(table)
    if args.output is not None:
        append(args.output, COLUMNS, [row | shared for row in rows])


if __name__ == "__main__":
    main()
