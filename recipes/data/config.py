"""The settings of the images: the keys `data.NAME`, which all recipes share. Importing this brings no torch."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from recipes.parsing import BELOW_ONE, ONE_OR_MORE, PROBABILITY, WHOLE, Limit, limited

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

BUILT_IN = {  # data sets that come with packages
    "digits": "scikit-learn's 1,797 handwritten digits",
    "pieces": "of 18 pictures that scikit-image and scikit-learn bring",
}
SOURCE: Limit = (
    "a folder of images, parquet files, WebDataset tars, hf://owner/name, "
    f"{', '.join(f'{name} ({what})' for name, what in BUILT_IN.items())}, as in data.source=digits",
    bool,
)
OF_FILES = {"train_size", "image_column", "label_column", "max_pixels"}  # keys about files of images
VALIDATION: Limit = (
    "a fraction of the training images above 0 and below 1, as in 0.2, or another source (a folder called 1 is "
    "written ./1)",
    lambda x: isinstance(x, str) or 0 < x < 1,
)
CROP: Limit = ("two fractions of the image's area, as in [0.2, 1.0]", lambda x: 0 < x[0] <= x[1] <= 1)
RANDAUGMENT: Limit = (
    "timm's words for RandAugment, as in rand-m9-mstd0.5-inc1: rand, then any of m, mmax and inc with a whole number, "
    "n with one above 0, mstd and p with a number",
    lambda x: re.fullmatch(r"rand(-((m|mmax|inc)\d+|n0*[1-9]\d*|(mstd|p)\d+(\.\d+)?))*", x, re.ASCII) is not None,
)


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how those of the training are augmented (keys `data.NAME`).

    `source` and `validation` are written in one syntax (`arm_zoo.images.locate`). Nothing is augmented unless asked
    for; it happens in the order random_crop, flip, randaugment, then (normalised) shift, rotation and zoom together,
    erase.
    """

    source: str = limited("", SOURCE)
    # Another source, or the fraction of the training images to hold out for validation; null: the validation (or test)
    # split of `source`, or a fifth of the training images where labels are needed and there is no such split.
    validation: float | str | None = limited(None, VALIDATION)
    streaming: bool = False  # read in sequence, without unpacking first; for parquet, tars and the Hub
    train_size: int | None = limited(None, ONE_OR_MORE)  # training images, where a stream does not tell
    shuffle_buffer: int = limited(4096, ONE_OR_MORE)  # images of a stream, kept encoded, to draw from at random
    num_classes: int | None = limited(None, ONE_OR_MORE)  # null: as many as the source has; else checked
    # Training images of each class, drawn by the run's seed, where labels are needed; null: all.
    labels_per_class: int | None = limited(None, ONE_OR_MORE)
    image_column: str | None = None  # null: the only one that holds images
    label_column: str | None = None  # null: the only one that looks like a class
    # Processes that decode images for each training process, by default one for each of its cores, at most 12; 0: the
    # training process decodes its images itself.
    workers: int = limited(min(12, max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))), WHOLE)
    # Where JPEG files are decoded, but the CPU decodes those on which training is scored; auto: on the GPU, if the run
    # has one and torchcodec is installed.
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    # Where all training images are kept, read before the first step, if they fit: gpu, decoded, so that small sets
    # load as fast as a step takes them; memory, decoded if all have one size, else as files.
    cache: Literal["none", "memory", "gpu"] = "none"
    # Largest tolerated fraction of corrupt images of each split; null: 0.001, but at least 3 images.
    max_undecodable: float | None = limited(None, BELOW_ONE)
    max_pixels: int | None = limited(None, ONE_OR_MORE)  # larger images count as corrupt; null: 89,478,485
    random_crop: tuple[float, float] | None = limited(None, CROP)  # fraction of the area; null: all, squashed
    flip: float = limited(0.0, PROBABILITY)  # left to right
    randaugment: str | None = limited(None, RANDAUGMENT)
    erase: float = limited(0.0, PROBABILITY)  # one rectangle becomes noise
    max_shift: float = limited(0.0, BELOW_ONE)  # of the image's side
    max_rotation: float = limited(0.0, ("0 to 180 (degrees, either way)", lambda x: 0 <= x <= 180))
    max_zoom: float = limited(0.0, BELOW_ONE)  # sizes from 1 - max_zoom to 1 + max_zoom

    @property
    def data_set(self) -> str:
        """The name of the source in tables and figures, without its path on this machine."""
        return self.source.removeprefix("hf://") if self.source.startswith("hf://") else Path(self.source).name

    def unused(self, used: Collection[str], purpose: str) -> dict[str, str]:
        """A problem for each key that is typed, but not among those that are used for a purpose."""
        typed = (key.name for key in fields(self) if key.name not in used and getattr(self, key.name) != key.default)
        return {f"data.{name}": f"data.{name} has no use in {purpose}; leave it out" for name in typed}

    def conflicts(self, device: str = "auto") -> dict[str, str]:
        """The problem of each key whose value is fine on its own, but not with another's or on the device."""
        found = {}
        if self.source in BUILT_IN:
            found = self.unused({field.name for field in fields(self)} - OF_FILES, f"data.source={self.source}")
        if self.cache != "none" and self.streaming:
            problem = f"data.cache is {self.cache} but data.streaming is true"
            found["data.cache"] = f"{problem}; allowed: data.cache=none, or data.streaming=false"
        if self.cache == self.decode == "gpu":
            problem = "data.decode is gpu but data.cache is gpu, for which the CPU decodes each image once"
            found["data.decode"] = f"{problem}; allowed: data.decode=auto"
        if self.decode == "gpu" and device == "cpu":
            found["data.decode"] = "data.decode is gpu but device is cpu; allowed: data.decode=auto, or device=auto"
        if self.cache == "gpu" and device == "cpu":
            found["data.cache"] = "data.cache is gpu but device is cpu; allowed: data.cache=memory, or device=auto"
        return found
