"""Images of a training split that stay in memory, decoded or as they are stored.

They lie in blocks of bytes, which the processes that load images share. Of K blocks number k holds the images k,
k + K, k + 2 K and so on: each block is a sample of the split.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from arm_zoo.images.listing import SourceError
from arm_zoo.images.tables import Encoded, ImageTable
from recipes.data.resample import RaggedImages

DAMAGED_IN_A_ROW = 100  # more than chance: a disk is gone, or the files are no images


@dataclass(frozen=True)
class Block:
    """Some images, one after the other."""

    content: Tensor  # (bytes,), uint8
    starts: list[int]  # of each image, and the end of the last; what could not be read or decoded has no bytes

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.content[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class StoredBlock(Block):
    """Image files."""

    rows: list[Encoded]  # what else is known of each, and its data where they could not be read

    @classmethod
    def of(cls, rows: Sequence[Encoded], contents: Sequence[bytes]) -> "StoredBlock":
        """Images and their files, which are empty where they could not be read."""
        content = torch.from_numpy(np.frombuffer(bytearray().join(contents), np.uint8))
        known = [row._replace(data=None) if data else row for row, data in zip(rows, contents, strict=True)]
        return cls(content, starts(list(map(len, contents))), known)

    def encoded(self, row: int) -> Encoded:
        """An image as it is stored."""
        content = self[row].numpy().tobytes()
        return self.rows[row]._replace(data=content) if content else self.rows[row]


@dataclass(frozen=True)
class DecodedBlock(Block):
    """Pixels."""

    shapes: list[tuple[int, ...]]  # (C, H, W) of each image
    labels: list[int]
    problems: list[str]  # a line for what could not be decoded, with its name and the reason; else ""


BlockT = TypeVar("BlockT", bound=Block)


class StoredSplit(ImageTable):
    """A split whose files are in memory."""

    def __init__(self, table: ImageTable, blocks: Sequence[StoredBlock]) -> None:
        vars(self).update(vars(table))
        self._blocks = blocks

    def encoded(self, indices: Sequence[int]) -> list[Encoded]:
        """Some rows, not decoded."""
        return [block.encoded(row) for block, row in located(self._blocks, indices)]


@dataclass(frozen=True)
class DecodedSplit:
    """A split whose N images are decoded; in place of one that could not be stands the next one."""

    taken: Tensor  # (N,), the place of the image that stands at each place
    labels: Tensor  # (N,)
    sizes: Tensor  # (N, 2), height and width
    undecodable: dict[int, list[str]]  # place -> lines of the damaged images there, up to the one that stands for them
    blocks: Sequence[DecodedBlock]  # the pixels, if they are here

    @classmethod
    def of(cls, blocks: Sequence[DecodedBlock]) -> "DecodedSplit":
        """The split in these blocks; raises `SourceError` if very many in a row could not be decoded."""
        size = sum(map(len, blocks))
        rows = list(located(blocks, range(size)))
        taken, undecodable = list(range(size)), {}
        for place in [place for place, (block, row) in enumerate(rows) if block.problems[row]]:
            lines = []
            for ahead in range(min(size, DAMAGED_IN_A_ROW)):
                block, row = rows[(place + ahead) % size]
                if not block.problems[row]:
                    break
                lines.append(block.problems[row])
            else:
                raise none_in_a_row(lines[-1])
            taken[place], undecodable[place] = (place + len(lines)) % size, lines
        chosen = [rows[place] for place in taken]
        return cls(
            torch.tensor(taken),
            torch.tensor([block.labels[row] for block, row in chosen]),
            torch.tensor([block.shapes[row][1:] for block, row in chosen]),
            undecodable,
            blocks,
        )

    def image(self, place: int) -> Tensor:
        """Pixels (C, H, W)."""
        [(block, row)] = located(self.blocks, [int(self.taken[place])])
        return block[row].view(block.shapes[row])

    def ragged(self) -> RaggedImages:
        """All images, in the order of their places."""
        images = RaggedImages.of([self.image(place) for place in range(len(self.taken))])
        return replace(images, owners=tuple(block.content for block in self.blocks))


def located(blocks: Sequence[BlockT], places: Sequence[int]) -> Iterator[tuple[BlockT, int]]:
    """The block and the row therein of each place of a split."""
    return ((blocks[place % len(blocks)], place // len(blocks)) for place in places)


def starts(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def none_in_a_row(last: str) -> SourceError:
    """`last` is the line of one of them."""
    return SourceError(f"no image among many in a row can be decoded; the last one: {last}")
