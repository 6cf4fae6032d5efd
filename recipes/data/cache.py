"""`data.cache`: training sets that fit into memory are read or decoded once, before the first step."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from arm_zoo.images.decode import UndecodableImage
from arm_zoo.images.tables import ImageTable
from recipes.data.batches import AugmentedImages, EncodedImages, decoded, read
from recipes.data.config import DataConfig
from recipes.data.kept import BlockT, DecodedBlock, DecodedSplit, StoredBlock, StoredSplit, starts
from recipes.data.resample import RaggedImages
from recipes.data.sources import tell
from recipes.data.streams import ImageStream
from recipes.data.workers import WorkerLoader
from recipes.errors import RunError

CPU = torch.device("cpu")
BLOCK = 64  # images at most in a block, the unit that workers send
CGROUP = Path("/sys/fs/cgroup")  # where a container on Linux sees its own limits
MIB = 2**20


class TooLarge(RunError):
    """The training images do not fit into memory."""


def fill(images: AugmentedImages, config: DataConfig, device: torch.device) -> RaggedImages | None:
    """Keep the training images as `data.cache` says, and return them if the GPU keeps them.

    A GPU keeps decoded images. Main memory keeps images of one size decoded, unless the GPU decodes them or they do
    not fit; all other images are kept as files. Raises `RunError` if they do not fit.
    """
    table = images.split
    if config.cache == "none" or isinstance(table, ImageStream):  # a cached stream is refused as a configuration
        return None
    if config.cache == "gpu":
        kept = DecodedSplit.of(list(collected(table, decode_block, config.workers, device)))
        images.kept = replace(kept, blocks=())
        return kept.ragged()
    if not isinstance(images, EncodedImages):
        images.kept = decoded_in_memory(table, config.workers)
    if images.kept is None:
        images.split = StoredSplit(table, list(collected(table, read_block, config.workers, CPU)))
    return None


def decoded_in_memory(table: ImageTable, workers: int) -> DecodedSplit | None:
    """Decode the whole split; None if its images have several sizes or do not fit."""
    blocks, shapes = list[DecodedBlock](), set[tuple[int, ...]]()
    try:
        for block in collected(table, decode_block, workers, CPU):
            blocks.append(block)
            shapes.update(shape for shape, problem in zip(block.shapes, block.problems, strict=True) if not problem)
            if len(shapes) > 1:
                return None
    except TooLarge:
        return None
    return DecodedSplit.of(blocks)


def collected(
    table: ImageTable, make: Callable[[ImageTable, Sequence[int]], BlockT], workers: int, device: torch.device
) -> Iterator[BlockT]:
    """The blocks of a split, in the memory of a device; raises `TooLarge` once it is clear that not all will fit."""
    count = -(-len(table) // BLOCK)
    order = [list(range(first, len(table), count)) for first in range(count)]
    what = "files" if make is read_block else "decoded images"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    where, own = ("main memory", processes) if device == CPU else (f"the memory of {device}", 1)
    room, size, images = free_bytes(device) // 2 // own, 0, 0
    for block in WorkerLoader(partial(make, table), order, workers, pin=False):
        yield replace(block, content=block.content.to(device, copy=True))  # leaves the memory shared with the worker
        size, images = size + len(block.content), images + len(block)
        needed = size * len(table) // images
        takes = f"{len(table):,} {what} take about {needed / MIB:,.1f} MiB of {where}"
        takes += f" in each of {processes} processes" if processes > 1 else ""
        if needed > room:
            ways = "data.cache=none" if device == CPU else "data.cache=memory or data.cache=none"
            allowed = f"{room / MIB:,.1f} MiB, half of what is free"
            raise TooLarge(f"{takes}, which is more than {allowed}; type {ways}")
        if images == len(block):
            tell(f"{takes}; they are read before the first step")


def decode_block(table: ImageTable, places: Sequence[int]) -> DecodedBlock:
    """Decode some images."""
    pixels, labels, problems = list[Tensor](), list[int](), list[str]()
    for encoded in table.encoded(places):
        labels.append(encoded.label)
        try:
            pixels.append(decoded(encoded, table.mode))
            problems.append("")
        except UndecodableImage as error:
            pixels.append(torch.empty(0, 0, 0, dtype=torch.uint8))
            problems.append(str(error))
    content = torch.cat([image.reshape(-1) for image in pixels])
    shapes = [tuple(image.shape) for image in pixels]
    return DecodedBlock(content, starts([image.numel() for image in pixels]), shapes, labels, problems)


def read_block(table: ImageTable, places: Sequence[int]) -> StoredBlock:
    """Read some image files."""
    rows = table.encoded(places)
    return StoredBlock.of(rows, list(map(read, rows)))


def free_bytes(device: torch.device) -> int:
    """Free memory in bytes, of a GPU, or of this machine or container."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, but not in use
        return torch.cuda.mem_get_info(device)[0] + held
    free: int = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without limit
        return free
    return min(free, limit - int(used["anon"]) - int(used["shmem"]))  # the system's file cache does not count as used
