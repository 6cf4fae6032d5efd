"""Time the scan's kernels one by one, on each backend in turn, with their rates of bytes and exponentials.

Run from the repository root on a machine with a GPU: `python -m eval.scan`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import arm_zoo
from arm_zoo.command_line import positive
from arm_zoo.layers.order import scan_order
from arm_zoo.models.arm import DIRECTIONS
from arm_zoo.ops.backends import BACKENDS
from eval.command_line import guarded
from eval.scoring.predict import DTYPES
from eval.speed.timing import circumstances, timed
from eval.tables import Row, added, check_output, show_table, text_table

DEVICE = "cuda"  # the backends for this device are timed
REPEATS = 20
SIZES = ("batch_size", "grid", "directions", "channels", "states", "dtype")
COLUMNS = (
    *("backend", "kernel", "ms", "bytes", "exponentials", *SIZES, "copy_bytes_per_s"),
    *("device", "torch", "arm_zoo", "date"),
)


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU with cleared caches; all calls are queued before the first is waited for."""
    flush = torch.empty(512 << 20, dtype=torch.int8, device=DEVICE)
    readings = []
    for _ in range(REPEATS + 3):
        flush.zero_()
        with timed(DEVICE) as seconds:
            call()
        readings.append(seconds)
    return 1000 * median(seconds() for seconds in readings[3:])


def copy_rate() -> float:
    """Bytes per second, read plus written, of a copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * source.numel() / milliseconds(lambda: target.copy_(source))


def draw(args: argparse.Namespace) -> tuple[list[torch.Tensor], list[Any]]:
    """Random inputs of convolution and scan, laid out as in a model, where tokens, steps, B and C are views."""
    K, B, D, S = args.directions, args.batch_size, args.channels, args.states
    order = scan_order(args.grid, args.grid, DIRECTIONS[:K], args.grid**2 // 2 if K == 4 else None, device=DEVICE)
    L, dtype = order.shape[1], DTYPES[args.dtype]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    conv = [randn(B, L, 2 * D)[..., :D], randn(K, D, 4), randn(K, D), order]
    rates = -torch.arange(1.0, S + 1, device=DEVICE).repeat(K, D, 1)
    rank = math.ceil(D / 16)
    delta, into, out = randn(K, B, L, rank + 2 * S).split([rank, S, S], dim=-1)
    skip, bias = torch.randn(K, D, device=DEVICE), torch.randn(K, D, device=DEVICE) - 3
    weight = randn(K, D, rank) / math.sqrt(rank)
    return conv, [randn(K, B, L, D), delta, rates, into, out, skip, bias, weight, True, order, True]


def measure(backend: str, args: argparse.Namespace) -> list[Row]:
    """A row for each kernel: milliseconds, the bytes that it has to move, and the exponentials of the decays."""
    conv, scan = draw(args)
    ops = torch.ops.arm_zoo
    u, gate, decays = scan[0], torch.randn_like(conv[0]), scan[0].numel() * args.states
    conv_backward = partial(ops.causal_conv_backward, torch.randn_like(u), *conv)
    forward = partial(ops.selective_scan, *scan)
    y, saved = forward(True, None, backend)
    backward = partial(ops.selective_scan_backward, torch.randn_like(y), *scan)
    sequence, token, states = u.nbytes, y.nbytes, saved.nbytes
    calls = [
        ("convolution", partial(ops.causal_conv, *conv, backend), token + sequence, 0),
        ("convolution, backward", partial(conv_backward, backend), 2 * token + sequence, 0),
        ("scan, merge and gate", partial(forward, False, gate, backend), sequence + 2 * token, decays),
        ("scan and merge, saving states", partial(forward, True, None, backend), sequence + token + states, decays),
        ("scan, backward", partial(backward, saved, backend), 3 * sequence + token + states, decays),
    ]
    return [
        {"backend": backend, "kernel": name, "bytes": size, "exponentials": exponentials, "ms": milliseconds(call)}
        for name, call, size, exponentials in calls
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.scan", description=__doc__)
    add = parser.add_argument
    add("--backends", nargs="+", metavar="NAME", help="default: all GPU backends that run here")
    add("--batch-size", type=positive, default=128, help="(%(default)s)")
    side = "patches per side; with four directions there is a class token too (%(default)s)"
    add("--grid", type=positive, default=14, help=side)
    add("--directions", type=int, choices=(1, 2, 4), default=4, help="(%(default)s)")
    add("--channels", type=positive, default=768, help="(%(default)s)")
    add("--states", type=positive, default=16, help="(%(default)s)")
    add("--dtype", choices=list(DTYPES), default="bf16", help="(%(default)s)")
    add("--output", type=Path, metavar="FILE", help="add the rows to this .csv or .json file")
    return parser


def run(args: argparse.Namespace) -> int:
    check_output(args.output, COLUMNS)
    if not torch.cuda.is_available():
        raise ValueError("it times GPU kernels, and torch finds no CUDA device here")
    available = [name for name in arm_zoo.available_backends() if BACKENDS[name].device == DEVICE]
    if unknown := set(args.backends or ()) - set(available):
        raise ValueError(f"--backends {' '.join(sorted(unknown))}: available here are {', '.join(available)}")
    rate = copy_rate()
    shared = vars(args) | circumstances(DEVICE) | {"copy_bytes_per_s": rate}
    rows = [row | shared for backend in args.backends or available for row in measure(backend, args)]
    lines = []
    for row in rows:
        per_second = f"{row['exponentials'] / row['ms'] / 1e6:,.0f}" if row["exponentials"] else ""
        bandwidth, floor = f"{row['bytes'] / row['ms'] / 1e9:.2f}", f"{1e3 * row['bytes'] / rate:.3f}"
        lines.append([row["backend"], row["kernel"], f"{row['ms']:.3f}", bandwidth, floor, per_second])
    title = "batch {batch_size}, grid {grid}, {directions} directions, {channels} channels, {states} states, {dtype}"
    figures = ["ms", "TB/s", "floor by bytes, ms", "G exponentials/s"]
    caption = f"{shared['device']}, torch {shared['torch']}; a copy moves {rate / 1e12:.2f} TB/s"
    with added(args.output, rows, COLUMNS):
        show_table(text_table(title.format(**shared), ["backend", "kernel"], figures, lines, caption))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
