"""Small real image files of every kind, and data sets of them in every layout, and a mark for tests of torchcodec."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from arm_zoo.images.decode import jpeg_decoder

needs_torchcodec = pytest.mark.skipif(jpeg_decoder() is None, reason="no torchcodec that fits this torch")

WIDTH, HEIGHT = 24, 16


def pixels(number: int = 0) -> NDArray[np.uint8]:
    """An image (16, 24, 3) without any symmetry; `number` shifts its colours."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    channels = [columns * 255 // (WIDTH - 1), rows * 255 // (HEIGHT - 1), (rows + columns) * 4]
    return ((np.stack(channels, axis=-1) + 7 * number) % 256).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(number: int = 0) -> bytes:
    """A file that decoders of the CPU and of the GPU show alike: its colours are not subsampled."""
    return encode(Image.fromarray(pixels(number)), "JPEG", quality=95, subsampling="4:4:4")


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG file that claims to be this large."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_16_bit_colour(values: NDArray[np.uint16]) -> bytes:
    """What PIL can read but not write: 16 bits for each of three channels, (H, W, 3)."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_folder(root: Path, classes: Mapping[str, int]) -> Path:
    """A folder of JPEG files: class name -> number of images."""
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            (root / name / f"{number}.jpg").write_bytes(jpeg(number))
            number += 1
    return root


class Counted(str):
    """Text that counts how often any such text is hashed or compared: a few times each, unless loops lie in loops."""

    looks = 0

    def __hash__(self) -> int:
        Counted.looks += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return super().__eq__(other)


def write_parquet(file: Path, labels: Sequence[Any], feature: Any = None, **columns: Any) -> Path:
    """A parquet file of `datasets` with one image per label; `feature` is the label column's type."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {"image": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(len(labels))], "label": list(labels)}
    features = {"image": datasets.Image(), "label": feature or datasets.Value("int64")}
    for name, values in columns.items():
        data[name], features[name] = values, datasets.Value("int64")
    datasets.Dataset.from_dict(data, features=datasets.Features(features)).to_parquet(file)
    return file


def write_tar(file: Path, labels: Sequence[Any], first: int = 0, as_json: bool = False) -> Path:
    """A WebDataset tar: NUMBER.jpg with NUMBER.cls, or the label within NUMBER.json."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number, label in enumerate(labels, start=first):
            text = json.dumps({"label": label, "width": WIDTH}) if as_json else str(label)
            for name, content in ((".jpg", jpeg(number)), (".json" if as_json else ".cls", text.encode())):
                member = tarfile.TarInfo(f"{number:06}{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file
