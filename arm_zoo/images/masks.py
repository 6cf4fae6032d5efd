"""Images with a class for each pixel, in the layouts of ADE20K and of Pascal VOC.

- ADE20K: `images/training/NAME.jpg` and `annotations/training/NAME.png`, and the same with `validation`. In a mask 0
  is "other", which counts nowhere, and the number k class k - 1. Names of classes are in `objectInfo150.txt`.
- Pascal VOC: `JPEGImages/NAME.jpg` and `SegmentationClass/NAME.png`, and in `ImageSets/Segmentation/train.txt` and
  `val.txt` the names of each split. In a mask 255 counts nowhere. The classes are VOC's 21.

A file `classes.txt` in the folder, a name in each line, stands for other classes in either layout.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from arm_zoo.images.errors import SourceError
from arm_zoo.images.listing import is_image
from arm_zoo.messages import listed

IGNORED = 255  # in labels: pixels that count nowhere
SplitName = Literal["training", "validation"]
_VOC_SPLITS = {"training": "train", "validation": "val"}
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_ALLOWED = (
    "allowed: a folder with images/training and annotations/training (as ADE20K has), or with JPEGImages, "
    "SegmentationClass and ImageSets/Segmentation/train.txt (as Pascal VOC has)"
)


@dataclass(frozen=True)
class LabelledPixels:
    """One split: images and their masks."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    class_names: tuple[str, ...]
    first: int  # number of class 0 in the masks: 1 in the layout of ADE20K, else 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        """An image (3, H, W), uint8, and its labels (H, W), int64; SourceError if the two do not fit.

        The orientation in EXIF data is ignored, since masks belong to the pixels as they are stored.
        """
        file = self.masks[place]
        image, mask = self._opened(self.images[place]).convert("RGB"), self._opened(file)
        if image.size != mask.size:
            sizes = f"{file} has {mask.width}x{mask.height} pixels, its image {image.width}x{image.height}"
            raise SourceError(f"{sizes}; allowed: a mask of the image's size")
        if mask.mode not in ("1", "L", "P", "I", "I;16"):
            raise SourceError(f"{file} has colours (mode {mask.mode}); allowed: one number for each pixel")
        return pil_to_tensor(image), self._labels(np.asarray(mask).astype(np.int64), file)

    def check(self) -> None:
        """Read all of them, whose faults are told before they are needed; SourceError too if no pixel has a class."""
        if not any([(self[place][1] != IGNORED).any() for place in range(len(self))]):
            raise SourceError(no_class(self.masks[0].parent))

    def _opened(self, file: Path) -> Image.Image:
        try:
            image = Image.open(file)
            image.load()
        except Exception as error:  # decoders raise almost anything on damaged files
            raise SourceError(f"{file} cannot be decoded: {type(error).__name__}: {error}") from None
        return image

    def _labels(self, numbers: np.ndarray, mask: Path) -> Tensor:
        """The numbers in a mask as labels, from 0 and with IGNORED; SourceError for numbers of no class."""
        last = self.first + len(self.class_names) - 1
        nowhere = 0 if self.first == 1 else IGNORED
        known = (numbers >= self.first) & (numbers <= last)
        if unknown := sorted(set(np.unique(numbers[~known]).tolist()) - {nowhere}):
            allowed = (
                f"{self.first} to {last}, the {len(self.class_names)} classes, and {nowhere}, which counts nowhere"
            )
            raise SourceError(f"{mask} has the numbers {listed(unknown)}; allowed: {allowed}")
        return torch.from_numpy(np.where(known, numbers - self.first, IGNORED))


def open_masks(root: str | Path, split: SplitName) -> LabelledPixels:
    """A split of a folder in either layout; SourceError if it has neither, or lacks an image or a mask."""
    folder = Path(root).expanduser()
    if (folder / "annotations" / split).is_dir():
        images, masks = folder / "images" / split, folder / "annotations" / split
        if not images.is_dir():
            raise SourceError(f"{folder} has annotations/{split} but no images/{split}; {_ALLOWED}")
        names, first = sorted(file.stem for file in images.iterdir() if is_image(file.name)), 1
    elif (names_of_split := folder / "ImageSets" / "Segmentation" / f"{_VOC_SPLITS[split]}.txt").is_file():
        images, masks, first = folder / "JPEGImages", folder / "SegmentationClass", 0
        names = _lines(names_of_split)
    else:
        problem = f"has no {split} images with masks" if folder.is_dir() else "is no folder"
        raise SourceError(f"{folder} {problem}; {_ALLOWED}")
    files = {
        "image": [file for file in images.glob("*") if is_image(file.name)],
        "mask": [file for file in masks.glob("*") if file.suffix.lower() == ".png"],
    }
    found = {kind: {file.stem: file for file in some} for kind, some in files.items()}
    for kind, have in found.items():
        if lacking := [name for name in names if name not in have]:
            raise SourceError(f"of {split} in {folder} these have no {kind}: {listed(lacking)}; add or remove them")
    if not names:
        raise SourceError(f"{folder} has no {split} images; {_ALLOWED}")
    # as a.jpg and a.png are, either of which may be meant
    counts = [Counter(names), *(Counter(file.stem for file in some) for some in files.values())]
    if twice := [name for name in counts[0] if max(count[name] for count in counts) > 1]:
        raise SourceError(f"of {split} in {folder} these are there more than once: {listed(twice)}; keep one of each")
    chosen = {kind: tuple(have[name] for name in names) for kind, have in found.items()}
    return LabelledPixels(chosen["image"], chosen["mask"], _names(folder, first), first)


def _lines(file: Path) -> list[str]:
    """The lines of a text, perhaps of Windows, that hold anything; names of files and classes may have spaces."""
    return list(filter(None, map(str.strip, file.read_text(encoding="utf-8-sig").splitlines())))


def no_class(where: str | Path) -> str:
    """The message for masks by which nothing can be scored."""
    return f"no pixel of the masks in {where} has a class; allowed: masks of which some pixels count"


def _names(folder: Path, first: int) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers."""
    own, ade = folder / "classes.txt", folder / "objectInfo150.txt"
    if own.is_file():
        names = tuple(_lines(own))
    elif first == 0:
        names = _VOC_CLASSES
    elif ade.is_file():
        names = tuple(
            line.split("\t")[-1].strip() for line in ade.read_text(encoding="utf-8").splitlines()[1:] if line
        )
    else:
        raise SourceError(f"{folder} tells no names of classes; write classes.txt there, a name in each line")
    if not 1 < len(names) < IGNORED or len(set(names)) < len(names):
        raise SourceError(
            f"the {len(names)} names of classes in {folder} must differ, and be 2 to {IGNORED - 1}: {listed(names)}"
        )
    return names


def compare_class_names(one: Sequence[str], other: Sequence[str], where: str) -> None:
    """SourceError if two lists of classes differ."""
    if tuple(one) != tuple(other):
        only = [[name for name in a if name not in b] for a, b in ((one, other), (other, one))]
        difference = f"only in the first: {listed(only[0])}; only in the second: {listed(only[1])}"
        what = difference if any(only) else "the same names in another order"
        raise SourceError(f"{where} have other classes ({len(one)} and {len(other)}): {what}; allowed: one list")
