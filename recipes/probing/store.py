"""Features on the disk: memory-mapped arrays with a row for each image, which any number of processes fill."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from arm_zoo.files import write_text
from recipes.errors import RunError

MANIFEST = "features.json"
IN_HALF = ("patches",)  # arrays in float16, as they are hundreds of times larger; all others are in float32


class Store:
    """The arrays of one split, each (images, ...), in a folder whose name follows from all that decides their values.

    A row counts as written once its values are on the disk, so that a killed process can go on where it was. All
    processes must run on one machine, as they share what is not on the disk yet.
    """

    def __init__(
        self, cache: Path, made_of: Mapping[str, Any], images: int, rows: Mapping[str, tuple[int, ...]]
    ) -> None:
        """
        Args:
            cache: the folder above this one's; it is made if it is not there.
            made_of: the model's name, as 'model', and all else that decides the values.
            images: number of rows of each array.
            rows: name of an array -> shape of a row.
        """
        text = json.dumps({**made_of, "images": images}, indent=2, sort_keys=True, default=str) + "\n"
        self.folder = cache / f"{made_of['model']}-{sha256(text.encode()).hexdigest()[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            self._check_manifest(text)
            missing = {name: (images, *row) for name, row in rows.items() if not self._file(name).exists()}
            self._check_space(sum(math.prod(shape) * _type_of(name).itemsize for name, shape in missing.items()))
            for name, shape in missing.items():  # the array last: if it is there, so is the record of its written rows
                self._create(f"{name}.written", (images,), np.bool_)
                self._create(name, shape, _type_of(name))
        self._arrays = {name: self._open(name) for name in rows}
        self._written = {name: self._open(f"{name}.written") for name in rows}

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _create(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        partial = self.folder / f".partial-{name}.npy"
        try:
            np.lib.format.open_memmap(partial, "w+", dtype, shape).flush()
        except OSError as error:
            error.filename = str(partial)  # NumPy does not name it
            raise
        os.replace(partial, self._file(name))

    def _open(self, name: str) -> Any:
        """An array, to be changed; RunError for one that was cut off, as by a copy that did not end."""
        try:
            np.load(self._file(name), mmap_mode="r")  # where it could be changed, NumPy would add what lacks as zeros
        except (EOFError, ValueError) as error:
            problem = f"{self._file(name)} is damaged ({error})"
            raise RunError(f"{problem}; delete {self.folder}, and its features are extracted anew") from None
        return np.load(self._file(name), mmap_mode="r+")

    def _check_manifest(self, text: str) -> None:
        file = self.folder / MANIFEST
        if not file.exists():
            write_text(file, text)
        elif file.read_text(encoding="utf-8") != text:
            raise RunError(f"{file} is of features of other weights, images or settings; delete {self.folder}")

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            takes = f"the features take {needed / 2**30:.1f} GiB, but {self.folder} has {free / 2**30:.1f} GiB left"
            raise RunError(f"{takes}; name another folder (cache=FOLDER) or fewer protocols")

    def missing(self) -> NDArray[np.bool_]:
        """Which images (images,) lack a written row in any array."""
        return ~np.logical_and.reduce(list(self._written.values()))

    def write(self, places: Tensor, values: Mapping[str, Tensor]) -> None:
        """Write the rows of every array at places (N,)."""
        rows = places.numpy()
        for name, part in values.items():
            self._arrays[name][rows] = part.cpu().numpy().astype(_type_of(name))
            self._arrays[name].flush()
            self._written[name][rows] = True

    def tensors(self) -> dict[str, Tensor]:
        """The arrays, which must not be changed: they are the files."""
        return {name: torch.from_numpy(array) for name, array in self._arrays.items()}


def _type_of(name: str) -> np.dtype[Any]:
    return np.dtype(np.float16 if name in IN_HALF else np.float32)
