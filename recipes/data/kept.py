"""Images of a training split that stay in memory, decoded or as they are stored.

They lie in blocks of bytes, which the processes that load images share. Of K blocks, block k holds the images k,
k + K, k + 2 K and so on, so that each block is a sample of the split.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from arm_zoo.images.errors import SourceError
from arm_zoo.images.tables import Encoded, ImageTable
from recipes.data.resample import RaggedImages

DAMAGED_IN_A_ROW = 100  # so many are no chance: a disk is gone, or the files are no images


@dataclass(frozen=True)
class Block:
    """Some images, one after the other."""

    content: Tensor  # (bytes,), uint8
    starts: list[int]  # of each image, and the end of the last; an image that could not be read or decoded is empty

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.content[self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class StoredBlock(Block):
    """Image files."""

    rows: list[Encoded]  # what else is known of each; `data` is None where the content is here

    @classmethod
    def of(cls, rows: Sequence[Encoded], contents: Sequence[bytes]) -> "StoredBlock":
        """Make a block of images and the contents of their files, which are empty where they could not be read."""
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
    problems: list[str]  # for each image "", or a line with its name and the reason why it could not be decoded


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
    """A split whose N images are decoded; the next image takes the place of one that could not be."""

    taken: Tensor  # (N,), the image that stands at each place
    labels: Tensor  # (N,)
    sizes: Tensor  # (N, 2), height and width
    undecodable: dict[int, list[str]]  # place -> a line for each damaged image up to the one that takes the place
    blocks: Sequence[DecodedBlock]  # the pixels; empty if they are on the GPU

    @classmethod
    def of(cls, blocks: Sequence[DecodedBlock]) -> "DecodedSplit":
        """Make a split of its blocks; raises `SourceError` if very many images in a row could not be decoded."""
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
    """The block of each place of a split, and the row in that block."""
    return ((blocks[place % len(blocks)], place // len(blocks)) for place in places)


def starts(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def none_in_a_row(last: str) -> SourceError:
    """An error for a row of damaged images; `last` is the line of one of them."""
    return SourceError(f"no image among many in a row can be decoded; the last one: {last}")
