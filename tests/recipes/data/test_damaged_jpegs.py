"""A hundred damaged, cut off and odd JPEG files among good ones: each is named or shown, and harms no other."""

import logging
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from arm_zoo.images.decode import UndecodableImage, decode_image
from recipes.config import PretrainConfig, load_config
from recipes.data.loader import TrainLoader
from recipes.data.sampling import BatchPlan
from recipes.data.sources import open_source
from tests.helpers.decoding import stand_in_for_gpu
from tests.helpers.images import encode, needs_torchcodec, pixels

GOOD_AND_BAD = 100  # of each; they alternate
LEVEL = 1 / 255 / 0.224  # a grey level of a normalised image, at most
SCAN, TABLES, FRAME = b"\xff\xda", b"\xff\xdb", b"\xff\xc0"


def good(number: int, mode: str = "RGB", **options: object) -> bytes:
    return encode(Image.fromarray(pixels(number)).convert(mode), "JPEG", quality=95, subsampling=0, **options)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def enormous(content: bytes) -> bytes:
    place = content.index(FRAME) + 5
    return content[:place] + b"\xff\xf0\xff\xf0" + content[place + 4 :]


def garbled(content: bytes, number: int) -> bytes:
    """With other bytes in the middle of the scan."""
    place = (content.index(SCAN) + len(content)) // 2
    return content[:place] + random.Random(number).randbytes(8).replace(b"\xff", b"\x00") + content[place + 8 :]


DAMAGED: tuple[Callable[[int], bytes], ...] = (
    lambda number: b"",
    lambda number: b"no image",
    lambda number: good(number)[:20],
    lambda number: good(number)[: good(number).index(TABLES)],
    lambda number: good(number)[: good(number).index(SCAN) + 40],
    lambda number: good(number)[:-100],
    lambda number: good(number, progressive=True)[:-100],
    lambda number: b"\0\0" + good(number)[2:],
    lambda number: good(number).replace(TABLES, b"\xff\xfe"),  # the tables are a comment
    lambda number: enormous(good(number)),
    lambda number: encode(Image.fromarray(pixels(number)), "PNG")[:60],
)
ODD: tuple[Callable[[int], bytes], ...] = (
    lambda number: good(number, "L"),
    lambda number: good(number, "CMYK"),
    lambda number: good(number, progressive=True),
    lambda number: good(number, exif=turned()),
    lambda number: good(number, keep_rgb=True),
    lambda number: good(number) + b"and more",
    lambda number: encode(Image.fromarray(pixels(number)), "PNG"),
    lambda number: encode(Image.fromarray(pixels(number)), "WEBP", lossless=True),
)
# Decoders need not agree on what these show, or whether they show anything.
GARBLED: tuple[Callable[[int], bytes], ...] = (
    lambda number: garbled(good(number), number),
    lambda number: good(number)[:-100] + b"\xff\xd9",
)


def write(folder: Path, contents: list[bytes]) -> Path:
    (folder / "class").mkdir(parents=True)
    for number, content in enumerate(contents):
        (folder / "class" / f"{number:03}.jpg").write_bytes(content)
    return folder


def shown(content: bytes) -> bytes | None:
    """What a viewer shows, without loss; None for nothing."""
    try:
        return encode(decode_image(content, "name"), "PNG")
    except UndecodableImage:
        return None


def epoch(folder: Path, decode: str, device: str) -> tuple[dict[int, torch.Tensor], set[str]]:
    """Index -> image, and what is named, of one epoch in batches of 20."""
    settings = ["model=arm_pico", "output_dir=unused", "warmup_epochs=0", "data.max_undecodable=0.9", "data.workers=0"]
    config = load_config(
        PretrainConfig, None, [*settings, f"data.source={folder}", f"data.decode={decode}", "global_batch=20"]
    )
    where = (BatchPlan(20, 1), (16, 16), 0, 1, torch.device(device))
    run = TrainLoader(open_source(config.data, labels_needed=False), config, *where)
    batches = [batch for step in run.epoch(0) for batch in step]
    rows = [(batch.indices.tolist(), batch.images.cpu()) for batch in batches]
    return {
        index: image for indices, images in rows for index, image in zip(indices, images, strict=True)
    }, run.undecodable


@pytest.mark.parametrize(
    ("decode", "device"),
    [("cpu", "cpu"), ("auto", "cpu"), pytest.param("gpu", "cuda", marks=[pytest.mark.gpu, needs_torchcodec])],
)
def test_each_is_named_or_shown_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, decode: str, device: str
) -> None:
    if (decode, device) == ("auto", "cpu"):
        stand_in_for_gpu(monkeypatch)
    kinds = (*DAMAGED, *ODD, *GARBLED)
    bad = {number: kinds[number // 2 % len(kinds)] for number in range(1, 2 * GOOD_AND_BAD, 2)}
    contents = [bad.get(number, good)(number) for number in range(2 * GOOD_AND_BAD)]
    viewed = [shown(content) for content in contents]
    expected = [image or after for image, after in zip(viewed, viewed[1:] + viewed[:1], strict=True)]
    with caplog.at_level(logging.WARNING):
        found, named = epoch(write(tmp_path / "mixed", contents), decode, device)
    reference, _ = epoch(write(tmp_path / "shown", [image for image in expected if image]), "cpu", "cpu")

    sure = {number for number in range(len(contents)) if bad.get(number) not in GARBLED}
    assert found.keys() == reference.keys() == set(range(len(contents)))
    for number in sure:
        assert (found[number] - reference[number]).abs().max() < 1.01 * (LEVEL if device == "cuda" else 1e-6), number
    numbers = {int(re.findall(r"class/(\d+)\.jpg cannot be decoded: ", line)[0]) for line in named}
    assert numbers & sure == {number for number, kind in bad.items() if kind in DAMAGED}
    assert len(numbers) == len(named) and all(caplog.text.count(line) == 1 for line in named)
