"""Sources of images: every layout, every kind of file, and a clear refusal of what cannot be meant."""

import errno
import gzip
import io
import json
import logging
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Value
from numpy.typing import NDArray
from PIL import Image

from arm_zoo.images.braces import expand_braces
from arm_zoo.images.decode import UndecodableImage, decode_image
from arm_zoo.images.errors import SourceError
from arm_zoo.images.labels import Labels
from arm_zoo.images.listing import class_folders, images_in
from arm_zoo.images.locate import locate
from arm_zoo.images.tables import ImageTable
from arm_zoo.images.tars import read_members, read_samples
from recipes.data import built_in
from recipes.data.config import DataConfig
from recipes.data.labels import match_labels
from recipes.data.sources import Source, open_source
from recipes.data.streams import ImageStream
from tests.helpers.images import (
    Counted,
    chunk,
    encode,
    jpeg,
    pixels,
    png_16_bit_colour,
    png_header,
    write_folder,
    write_parquet,
    write_tar,
)

RGB = Image.fromarray(pixels())
GREY = RGB.convert("L")
GREY_16 = np.asarray(GREY).astype(np.uint16) * 257  # white is 65535


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` unpacks stays among the test's files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def open_named(source: Path | str, labels_needed: bool = True, **settings: object) -> Source:
    return open_source(DataConfig(source=str(source), **settings), labels_needed)  # type: ignore[arg-type]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def with_hole(mode: str) -> Image.Image:
    """The image with its left half transparent."""
    alpha = np.full((16, 24), 255, np.uint8)
    alpha[:, :12] = 0
    image = RGB.convert("RGBA")
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


def palette_with_hole() -> bytes:
    image = RGB.quantize(16)
    image.paste(15, (0, 0, 12, 16))
    return encode(image, "PNG", transparency=15)


GREY_RGB = np.asarray(GREY.convert("RGB"))
FILES: dict[str, tuple[Callable[[], bytes], np.ndarray, int]] = {  # file, what it shows, tolerance
    "JPEG colour": (lambda: encode(RGB, "JPEG", quality=100, subsampling=0), pixels(), 6),
    "JPEG progressive": (lambda: encode(RGB, "JPEG", quality=100, subsampling=0, progressive=True), pixels(), 6),
    "JPEG grey": (lambda: encode(GREY, "JPEG", quality=100), GREY_RGB, 3),
    "JPEG CMYK": (lambda: encode(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0), pixels(), 8),
    "TIFF CMYK": (lambda: encode(RGB.convert("CMYK"), "TIFF"), pixels(), 1),
    "PNG colour": (lambda: encode(RGB, "PNG"), pixels(), 0),
    "PNG colour, 16 bits": (lambda: png_16_bit_colour(pixels().astype(np.uint16) * 257), pixels(), 1),
    "PNG grey, 16 bits": (lambda: encode(Image.fromarray(GREY_16), "PNG"), GREY_RGB, 1),
    "TIFF grey, 16 bits": (lambda: encode(Image.fromarray(GREY_16), "TIFF"), GREY_RGB, 1),
    "TIFF grey, 16 bits, high byte first": (
        lambda: encode(Image.frombytes("I;16B", (24, 16), GREY_16.astype(">u2").tobytes()), "TIFF"), GREY_RGB, 1,
    ),
    "TIFF grey, 32 bits": (lambda: encode(Image.fromarray(GREY_16.astype(np.int32)), "TIFF"), GREY_RGB, 1),
    "PNG palette": (lambda: encode(RGB.quantize(256), "PNG"), np.asarray(RGB.quantize(256).convert("RGB")), 0),
    "GIF": (lambda: encode(RGB.quantize(256), "GIF"), np.asarray(RGB.quantize(256).convert("RGB")), 0),
    "PNG black and white": (lambda: encode(GREY.convert("1"), "PNG"), np.asarray(GREY.convert("1").convert("RGB")), 0),
    "PNG grey with opaque alpha": (lambda: encode(GREY.convert("LA"), "PNG"), GREY_RGB, 0),
    "WebP": (lambda: encode(RGB, "WEBP", lossless=True), pixels(), 0),
    "BMP": (lambda: encode(RGB, "BMP"), pixels(), 0),
}  # fmt: skip
HOLES: dict[str, Callable[[], bytes]] = {
    "PNG RGBA": lambda: encode(with_hole("RGBA"), "PNG"),
    "PNG grey with alpha": lambda: encode(with_hole("LA"), "PNG"),
    "WebP RGBA": lambda: encode(with_hole("RGBA"), "WEBP", lossless=True),
    "PNG palette": palette_with_hole,
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_image_comes_out_as_it_looks(kind: str) -> None:
    file, expected, tolerance = FILES[kind]
    image = decode_image(file(), "x")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.parametrize("kind", HOLES)
def test_transparent_parts_are_white_and_opaque_ones_stay(kind: str) -> None:
    shown = np.asarray(decode_image(HOLES[kind](), "x"))
    assert (shown[:, :12] == 255).all()
    assert shown[:, 12:].std() > 20


def test_a_transparent_colour_is_white() -> None:
    shown = np.asarray(decode_image(encode(RGB, "PNG", transparency=tuple(map(int, pixels()[3, 5]))), "x"))
    assert (shown[3, 5] == 255).all()
    assert (shown[3, 6] == pixels()[3, 6]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "turns", "flip"), [(3, 2, False), (6, 3, False), (8, 1, False), (2, 0, True)])
def test_images_come_out_upright(kind: str, orientation: int, turns: int, flip: bool) -> None:
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    upright = np.asarray(decode_image(encode(RGB, kind, exif=exif(orientation), **options), "x")).astype(int)
    expected = np.rot90(pixels(), turns)
    expected = expected[:, ::-1] if flip else expected
    assert np.abs(upright - expected).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_with_damaged_exif_data_are_shown_as_they_are(kind: str) -> None:
    image = decode_image(encode(RGB, kind, exif=b"Exif\0\0garbage!"), "it")
    assert image.size == RGB.size


def test_grey_images_stay_grey_when_asked_for() -> None:
    image = decode_image(encode(GREY, "PNG"), "x", mode="L")
    assert image.mode == "L" and (np.asarray(image) == np.asarray(GREY)).all()


PIXELS = chunk(b"IDAT", b"")
DAMAGED = {
    "cut off": (jpeg()[:-200], "OSError"),
    "PNG cut off": (encode(RGB, "PNG")[:-40], "OSError"),
    "PNG with a wrong byte": (bytearray(encode(RGB, "PNG")), "x.png cannot be decoded"),
    "empty": (b"", "no image in any format"),
    "text": (b"<html>404</html>", "no image in any format"),
    "bomb": (png_header(100_000, 100_000) + PIXELS, "more than the 89,478,485 pixels"),
    "large": (png_header(12_000, 12_000) + PIXELS, "more than the 89,478,485 pixels"),
    "floating-point": (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "white is unknown"),
    "32 bits": (encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "allowed: up to 16 bits"),
}
DAMAGED["PNG with a wrong byte"][0][30] ^= 1  # type: ignore[index]


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_images_are_named(kind: str) -> None:
    content, reason = DAMAGED[kind]
    with warnings.catch_warnings(), pytest.raises(UndecodableImage, match=r"x.png cannot be decoded") as refused:
        warnings.simplefilter("error")
        decode_image(bytes(content), "x.png")
    assert reason in str(refused.value)


def test_decoding_leaves_no_warnings() -> None:
    odd = jpeg()[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff" + jpeg()[2:]  # EXIF data that lead nowhere
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(odd, "x").size == (24, 16)


def check(source: Source, train: int, test: int, names: tuple[str, ...]) -> None:
    assert isinstance(source.train, ImageTable) and isinstance(source.test, ImageTable)
    assert (len(source.train), len(source.test), source.class_names) == (train, test, names)
    image, label, name = source.train[0]
    assert image.mode == "RGB" and image.size == (24, 16) and label == 0 and name


def test_pipes_are_no_images_and_links_to_nothing_are_undecodable_ones(tmp_path: Path) -> None:
    """Reading a pipe never ends; a link to nothing, as to a disk that is not there, is told and not passed over."""
    folder = tmp_path / "set"
    write_folder(folder, {"cat": 2, "dog": 1})
    elsewhere = tmp_path / "elsewhere.bin"
    elsewhere.write_bytes(jpeg(0))
    os.mkfifo(folder / "dog" / "pipe.jpg")
    for link, target in (
        ("dog/to-pipe.jpg", "pipe.jpg"),
        ("dog/to-device.jpg", "/dev/zero"),
        ("dog/to-file.jpg", elsewhere),
        ("cat/to-nothing.jpg", "nowhere"),
        ("cat/to-itself.jpg", "to-itself.jpg"),
    ):
        (folder / link).symlink_to(target)
    found, _ = class_folders(str(folder))
    classes = {name: [os.path.basename(path) for path in paths] for name, paths in found.items()}
    assert {name: [path for path in paths if "-" in path] for name, paths in classes.items()} == {
        "cat": ["to-itself.jpg", "to-nothing.jpg"],
        "dog": ["to-file.jpg"],
    }
    assert "pipe.jpg" not in classes["dog"]
    for name, paths in classes.items():
        assert sorted(map(os.path.basename, images_in(str(folder / name)))) == sorted(paths)
    labels = labels_of(open_named(folder, validation=str(folder)).train)
    assert sum(isinstance(label, str) for label in labels) == 2 and labels.count(0) == 2 and labels.count(1) == 2


def test_links_that_lead_back_do_not_multiply_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pics", {"cat": 2, "dog": 2})
    elsewhere = write_folder(tmp_path / "elsewhere", {"red": 2}) / "red"
    for link, target in (("cat/itself", "."), ("dog/above", ".."), ("all", "."), ("fox", elsewhere)):
        (folder / link).symlink_to(target)
    (elsewhere / "back").symlink_to(folder / "fox")
    check(open_named(folder, validation=0.5), 3, 3, ("cat", "dog", "fox"))


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = write_folder(tmp_path / "pics", {"cat": 2, "dog": 2}) / "dog"
    scandir = os.scandir

    def refusing(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for labels_needed in (True, False):
        with pytest.raises(SourceError, match=r"cannot list the folder .*dog.: Permission denied; allow yourself"):
            open_named(tmp_path / "pics", labels_needed)


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"n01": 3, "n02": 2, "n10": 2})
    write_folder(tmp_path / "val", {"n01": 1, "n02": 1, "n10": 1})
    (tmp_path / "annotations").mkdir()  # ImageNet has folders without images beside the splits
    (tmp_path / "train" / "n01" / "._0.jpg").write_bytes(b"")  # macOS leaves such files behind
    source = open_named(tmp_path)
    check(source, 7, 3, ("n01", "n02", "n10"))
    assert [source.train[index][1] for index in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert source.train[3][2] == str(tmp_path / "train" / "n02" / "3.jpg")
    stored = source.train.encoded([0])[0]  # type: ignore[union-attr]
    assert stored.data == str(tmp_path / "train" / "n01" / "0.jpg")  # not copied anywhere


def test_folder_without_splits_and_another_for_validation(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"2": 2, "10": 2})
    write_folder(tmp_path / "b", {"2": 1, "10": 1})
    source = open_named(tmp_path / "a", validation=str(tmp_path / "b"))
    check(source, 4, 2, ("2", "10"))  # as numbers: strings would sort 10 before 2
    assert open_named(tmp_path / "a").held_out == 0.2  # one of the two images of each class
    unlabelled = open_named(tmp_path / "a", labels_needed=False)
    assert unlabelled.test is None and unlabelled.class_names == () and unlabelled.train[0][1] == -1  # type: ignore[index]


def test_images_without_class_folders_can_be_pretrained_on(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.JPEG").write_bytes(jpeg(number))
    assert len(open_named(tmp_path, labels_needed=False).train) == 3  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"holds images .* but no class folders; allowed: FOLDER/CLASS/IMAGE"):
        open_named(tmp_path)


NAMES = ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize("held_out", ["val.parquet", "test.parquet", "data/validation-00000-of-00001.parquet"])
def test_parquet_folder(tmp_path: Path, held_out: str) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 0], NAMES)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 1], NAMES)
    write_parquet(tmp_path / held_out, [1, 0], NAMES)
    (tmp_path / "classes.json").write_text("{}")
    source = open_named(tmp_path)
    check(source, 5, 2, ("cat", "dog"))
    assert [source.train[index][1] for index in range(5)] == [0, 1, 0, 1, 1]
    assert source.train.encoded([1])[0].data == jpeg(1)  # type: ignore[union-attr]  # never encoded anew


def test_a_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "all.parquet", [0, 1], NAMES)
    monkeypatch.chdir(tmp_path)
    check(open_named("all.parquet", validation="*.parquet"), 2, 2, ("cat", "dog"))


def test_parquet_file_glob_and_other_labels(tmp_path: Path) -> None:
    strings = Value("string")
    first = write_parquet(tmp_path / "one" / "a.parquet", ["b", "a", "c"], strings)
    write_parquet(tmp_path / "one" / "b.parquet", ["c"], strings)
    other = write_parquet(tmp_path / "val.parquet", ["a", "c"], strings)
    check_labels = open_named(tmp_path / "one" / "*.parquet", validation=str(other))
    assert check_labels.class_names == ("a", "b", "c")
    assert [label for _, label, _ in check_labels.train] == [1, 0, 2, 2]
    assert [label for _, label, _ in check_labels.test] == [0, 2]  # type: ignore[union-attr]
    with pytest.raises(SourceError, match=r"has 1 classes, the training images have 3 \(only there: d, in 1 row\)"):
        unknown = write_parquet(tmp_path / "unknown.parquet", ["d"], strings)
        open_named(first, validation=str(unknown))
    integers = write_parquet(tmp_path / "integers.parquet", [2, 0, 1])
    source = open_named(integers, validation=str(write_parquet(tmp_path / "few.parquet", [1])))
    assert source.class_names == ("0", "1", "2") and source.train[0][1] == 2  # type: ignore[index]
    with pytest.raises(SourceError, match="has 4 classes, the training images have 3"):
        open_named(integers, validation=str(write_parquet(tmp_path / "more.parquet", [3])))
    with pytest.raises(SourceError, match=r"1 of the 2 labels of .* are none .*: -1 in 1 row; allowed: 0 to 0"):
        open_named(integers, validation=str(write_parquet(tmp_path / "hidden.parquet", [-1, 0])))


def test_a_parquet_file_without_declared_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg(number), "path": None} for number in range(3)]
    pq.write_table(pa.table({"photo": images, "kind": ["x", "y", "x"], "id": [5, 6, 7]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"photo": images[:2], "kind": ["x", "y"], "id": [8, 9]}), tmp_path / "val.parquet")
    with pytest.raises(SourceError, match=r"label column .* is none of kind, id; say which with data.label_column"):
        open_named(tmp_path)
    check(open_named(tmp_path, label_column="kind"), 3, 2, ("x", "y"))
    with pytest.raises(SourceError, match=r"data.label_column=kid is no column of .*; allowed: kind, id"):
        open_named(tmp_path, label_column="kid")


def test_numbers_that_cannot_be_classes_are_refused_before_they_are_counted_up(tmp_path: Path) -> None:
    identifiers = write_parquet(tmp_path / "train.parquet", [7, 3_000_000_000])
    with pytest.raises(SourceError, match=r"has the label 3000000000; allowed: whole numbers below 1,000,000\."):
        open_named(identifiers, validation=0.5)


def test_a_column_that_cannot_hold_images_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = [{"width": 1, "height": 2}] * 4
    pq.write_table(pa.table({"photo": [jpeg()] * 4, "size": size, "label": [0, 1] * 2}), tmp_path / "train.parquet")
    for column in ("size", "label"):
        with pytest.raises(SourceError, match=rf"the column '{column}' of .* holds .*int64.*; allowed: images, "):
            open_named(tmp_path, validation=0.5, image_column=column)
    assert len(open_named(tmp_path, validation=0.5, image_column="photo").train) == 2  # type: ignore[arg-type]


def test_rows_without_an_image_can_be_held_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = write_folder(tmp_path / "images", {"a": 3})
    images = [{"bytes": None, "path": path} for path in (*map(str, sorted(files.rglob("*.jpg"))), None)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(images, kind), "label": [0, 1, 0, 1]}), tmp_path / "train.parquet")
    source = open_named(tmp_path / "train.parquet", validation=0.5)
    assert len(source.train) == len(source.test) == 2  # type: ignore[arg-type]


def test_the_size_of_the_training_stream_is_not_asked_of_validation_images(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", [0, 1, 0])
    val = write_folder(tmp_path / "some", {"0": 1, "1": 1})
    check(open_named(train, validation=str(val), train_size=3), 3, 2, ("0", "1"))


def test_several_label_columns_must_be_told_apart(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(
        {"img": [{"bytes": jpeg(), "path": None}] * 2, "fine": [0, 2], "coarse": [1, 0]},
        features=datasets.Features(
            {
                "img": datasets.Image(),
                "fine": ClassLabel(names=["a", "b", "c"]),
                "coarse": ClassLabel(names=["x", "y"]),
            }
        ),
    )
    for split in ("train", "test"):
        data.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SourceError, match=r"could be any of fine, coarse; say which with data.label_column=NAME"):
        open_named(tmp_path)
    assert open_named(tmp_path, label_column="coarse").class_names == ("x", "y")


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "a.parquet", [0, 1], NAMES)
    swapped = write_parquet(tmp_path / "b.parquet", [0, 1], ClassLabel(names=["dog", "cat"]))
    source = open_named(train, validation=str(swapped))
    assert [label for _, label, _ in source.test] == [1, 0]  # type: ignore[union-attr]
    fewer = write_parquet(tmp_path / "c.parquet", [0], ClassLabel(names=["dog"]))
    assert [label for _, label, _ in open_named(train, validation=str(fewer)).test] == [1]  # type: ignore[union-attr]
    with pytest.raises(SourceError, match=r"\[train\] has 2 classes, but data.num_classes is 3"):
        open_named(train, validation=str(swapped), num_classes=3)
    folder = write_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    assert open_named(train, validation=str(folder)).class_names == ("cat", "dog")


@pytest.mark.parametrize("as_json", [False, True])
def test_webdataset_tars(tmp_path: Path, as_json: bool) -> None:
    write_tar(tmp_path / "train-000.tar", [0, 1, 2], as_json=as_json)
    write_tar(tmp_path / "train-001.tar", [2, 1], first=3, as_json=as_json)
    val = write_tar(tmp_path / "val-000.tar", [1, 0, 2], as_json=as_json)
    names = ("0", "1", "2")
    check(open_named(tmp_path), 5, 3, names)
    source = open_named(tmp_path / "train-{000..001}.tar", validation=str(val))
    check(source, 5, 3, names)
    assert [label for _, label, _ in source.train] == [0, 1, 2, 2, 1]
    assert source.train.encoded([4])[0].data.read() == jpeg(4)  # type: ignore[union-attr]  # where it lies
    stream = open_named(tmp_path, streaming=True)
    assert isinstance(stream.train, ImageStream) and stream.train.size == 5 and stream.class_names == names
    assert [(label, image.mode) for image, label, _ in stream.train] == [(n, "RGB") for n in (0, 1, 2, 2, 1)]
    assert [name.rpartition("/")[2] for *_, name in stream.train] == [f"{number:06}" for number in range(5)]
    for streaming in (False, True):
        with pytest.raises(SourceError, match=r"2 of the 5 labels of .* are none .*: 2 in 2 rows; allowed: 0 to 1"):
            open_named(tmp_path, streaming=streaming, num_classes=2)


def test_streams_of_parquet_tell_their_size_and_read_shards_in_any_order(tmp_path: Path) -> None:
    for file in range(3):
        write_parquet(tmp_path / f"train-{file}.parquet", [file % 2] * 5, NAMES, row=[file * 5 + n for n in range(5)])
    write_parquet(tmp_path / "val.parquet", [0, 1], NAMES, row=[0, 1])
    stream = open_named(tmp_path, streaming=True).train
    assert isinstance(stream, ImageStream) and stream.size == 15

    assert stream.num_shards == 3 and stream.shard_sizes == [5, 5, 5]
    assert [row.data for row in stream.shard(1, first_row=3)] == [jpeg(3), jpeg(4)]
    assert [row.name.partition("] ")[2] for row in stream.shard(1, 4)] == [""]
    assert [row.label for row in stream.shard(1)] == [1] * 5
    assert len(list(stream.encoded())) == 15


def test_digits_are_split_once_and_in_proportion() -> None:
    source = open_named("digits")
    assert isinstance(source.train, ImageTable) and isinstance(source.test, ImageTable)
    assert (len(source.train), len(source.test), source.channels) == (1437, 360, 1)
    images, labels, _ = zip(*[*source.train, *source.test], strict=True)
    assert {image.mode for image in images} == {"L"} and {image.size for image in images} == {(8, 8)}
    values = np.stack([np.asarray(image) for image in images])
    assert values.min() == 0 and values.max() == 255 and len(np.unique(values)) == 17
    assert source.mean[0] == pytest.approx(values[:1437].mean() / 255, rel=1e-6)
    shares = [np.bincount(part) / len(part) for part in (labels[:1437], labels[1437:])]
    assert np.abs(shares[0] - shares[1]).max() < 0.003
    with pytest.raises(SourceError, match=r"the digits .* have their own validation images"):
        open_named("digits", validation="digits")
    with pytest.raises(SourceError, match=r"the digits have 10 classes, but data.num_classes is 5"):
        open_named("digits", num_classes=5)


def test_pieces_are_grey_of_one_contrast_and_from_two_sides_of_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_named("pieces")
    assert isinstance(source.train, ImageTable) and isinstance(source.test, ImageTable)
    assert (len(source.train), len(source.test), source.channels) == (1080, 360, 3)
    images, labels, _ = zip(*[*source.train, *source.test], strict=True)
    assert {image.mode for image in images} == {"RGB"} and {image.size for image in images} == {(64, 64)}
    assert labels == tuple(np.repeat(np.arange(18), 60)) + tuple(np.repeat(np.arange(18), 20))
    values = np.stack([np.asarray(image) for image in images]) / 255
    assert (values == values[..., :1]).all()
    assert np.abs(values.mean((1, 2, 3)) - 0.5).max() < 0.05  # what is beyond black and white is cut off
    assert np.median(values.std((1, 2, 3))) == pytest.approx(0.25, abs=0.02)
    assert source.mean == pytest.approx((values[:1080].mean(),) * 3, rel=1e-6)

    picture = np.arange(100 * 400, dtype=np.float32).reshape(100, 400) % 400  # its values are the numbers of columns
    monkeypatch.setattr(built_in, "read_picture", lambda name: picture)
    drawn_from: list[NDArray[np.float32]] = []
    monkeypatch.setattr(
        built_in, "draw_piece", lambda part, draws: drawn_from.append(part) or np.zeros((64, 64), "u1")
    )
    built_in.open_pieces.__wrapped__()
    left = [part.max() < 260 for part in drawn_from]
    assert left == ([True] * 60 + [False] * 20) * 18 and all(part.min() >= 260 for part in drawn_from[60:80])


def test_pieces_are_refused_where_their_pictures_are_missing_or_settings_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SourceError, match=r"the pieces .* have their own validation images"):
        open_named("pieces", validation=0.5)
    with pytest.raises(SourceError, match=r"the pieces have 18 classes, but data.num_classes is 5"):
        open_named("pieces", num_classes=5)
    monkeypatch.setitem(built_in.PICTURES, "brick", "skimage/data/no_such_picture.png")
    with pytest.raises(SourceError, match=r"pictures of scikit-image, and data/no_such_picture.png .* pip install"):
        built_in.read_picture("brick")
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SourceError, match=r"pip install scikit-image"):
        built_in.read_picture("grass")


BRACES = {  # as bash expands them
    "plain.tar": "plain.tar",
    "a{08..10}{x,y}": "a08x a08y a09x a09y a10x a10y",
    "{10..8}": "10 9 8",
    "{8..010}": "008 009 010",
    "{-01..1}": "-01 000 001",
    "{0..10..4}": "0 4 8",
    "{9..-1..-5}": "9 4 -1",
    "{e..a..2}": "e c a",
    "a{x}": "a{x}",
    "a{}": "a{}",
    "{1..2}{x}": "1{x} 2{x}",
    "a{b,{c,d}}e": "abe ace ade",
    "{{1..2},x}": "1 2 x",
    "x{{a,b}}": "x{a} x{b}",
    "{a,b}}": "a} b}",
    "{a,{b,c}": "{a,b {a,c",
    "}{a,b}{": "}a{ }b{",
    "{1..x}": "{1..x}",
    "{1..}": "{1..}",
}


@pytest.mark.parametrize("pattern", BRACES)
def test_braces_expand_as_in_a_shell(pattern: str) -> None:
    assert " ".join(expand_braces(pattern)) == BRACES[pattern]
    if bash := shutil.which("bash"):
        assert subprocess.check_output([bash, "-c", f"echo {pattern}"], text=True).strip() == BRACES[pattern]


def test_braces_may_count_down(tmp_path: Path) -> None:
    files = [str(write_tar(tmp_path / f"shard-{number}.tar", [0])) for number in (8, 9, 10)]
    assert locate(str(tmp_path / "shard-{10..8}.tar")).splits == {"train": files}  # and 10 comes after 9


def test_bad_sources_are_refused_in_plain_words(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    refused = {
        str(tmp_path / "nowhere"): "there is no .*nowhere'; allowed: a folder of images in class subfolders",
        "mnist": "there is no 'mnist'; allowed: a folder of images",
        str(tmp_path / "*.parquet"): "no file matches .*parquet",
        str(tmp_path / "train-{0..3}.tar"): "no file matches .*train-0.tar",
        "hf://imagenet": "'hf://imagenet' is no data set on the Hub; allowed: hf://owner/name",
    }
    (tmp_path / "empty").mkdir()
    refused[str(tmp_path / "empty")] = "empty' is empty; allowed: a folder of images"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").write_text("hello")
    refused[str(tmp_path / "odd")] = "odd' holds no images, parquet files or tars; allowed: a folder of images"
    refused["./nowhere"] = "there is no './nowhere'"
    refused["recipes/nowhere"] = "there is no 'recipes/nowhere'"  # not asked of the Hub: recipes/ is a folder here
    (tmp_path / "notes.txt").write_text("hello")
    refused[str(tmp_path / "notes.txt")] = "cannot read .*notes.txt'"
    both = write_folder(tmp_path / "both", {"cat": 1})
    write_parquet(both / "train.parquet", [0])
    refused[str(both)] = "holds parquet and images; name the files"
    mixed = write_folder(tmp_path / "mixed", {"train": 1, "car": 1, "plane": 1})
    refused[str(mixed)] = "holds train beside car, plane: splits or classes?"
    unclear = tmp_path / "unclear"
    write_parquet(unclear / "train.parquet", [0])
    write_parquet(unclear / "more.parquet", [0])
    refused[str(unclear)] = "which split is .*more.parquet' of?"
    hollow = write_folder(tmp_path / "hollow" / "train", {"cat": 1, "dog": 0})
    few = write_parquet(tmp_path / "few" / "few.parquet", [0, 0])
    with pytest.raises(SourceError, match=r"has 2 images, but data.train_size is 3; leave it out"):
        open_named(few, train_size=3, validation=str(few))
    with pytest.raises(SourceError, match=r"is a folder of images, which has no columns; leave out data.label_column"):
        open_named(write_folder(tmp_path / "folder", {"cat": 2, "dog": 2}), label_column="species")
    refused[str(hollow.parent)] = r"class folders of .*hollow \[train\] hold no image: dog; fill or remove them"
    for name, message in refused.items():
        with pytest.raises(SourceError, match=message):
            open_named(name)


def test_disagreeing_splits_and_damaged_files_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "train", {"x": 1, "y": 1})
    write_folder(tmp_path / "a" / "val", {"x": 1, "y": 1, "z": 3})
    with pytest.raises(SourceError, match=r"has 3 classes, the training images have 2 \(only there: z, in 3 rows\)"):
        open_named(tmp_path / "a")
    for name in ("train.parquet", "train.tar"):
        (tmp_path / name).write_bytes(b"not at all")
        with pytest.raises(SourceError, match=f"cannot read .*{name}"):
            open_named(tmp_path / name)
    with pytest.raises(SourceError, match=r"is a folder of images, which needs no data.streaming"):
        open_named(tmp_path / "a", streaming=True)
    write_parquet(tmp_path / "b" / "val.parquet", [0])
    write_parquet(tmp_path / "b" / "test.parquet", [0])
    with pytest.raises(SourceError, match="has the splits test, val, but no training split"):
        open_named(tmp_path / "b")


def test_the_hub_switched_off_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("hf://someone/images", "someone/images"):
        with pytest.raises(SourceError, match=r"no file or folder 'someone/images'.*switched off \(HF_HUB_OFF"):
            open_named(name)


def test_a_data_set_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train = datasets.load_dataset("parquet", data_files=str(write_parquet(tmp_path / "a.parquet", [0, 1, 1], NAMES)))
    asked = []

    def load_dataset(name: str, streaming: bool) -> dict[str, datasets.Dataset]:
        asked.append((name, streaming))
        return {"train": train["train"], "validation": train["train"].select([0]), "test": train["train"].select([1])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_named("hf://someone/images")
    check(source, 3, 1, ("cat", "dog"))
    assert source.test[0][1] == 0 and asked == [("someone/images", False)]  # type: ignore[index]
    (tmp_path / "someone").mkdir()
    assert locate("someone/images").kind == "hub"


WRONG: dict[str, tuple[list[object], object, str]] = {  # labels, their type, what is said of them
    "hidden": ([-1] * 3, NAMES, "3 of the 3 labels of .* are none of its classes: -1 in 3 rows; allowed: 0 to 1"),
    "none": ([0, None, 1, None], NAMES, "2 of the 4 labels of .*: none in 2 rows; allowed: 0 to 1"),
    "both": ([0, -1, None], NAMES, "2 of the 3 labels of .*: -1 in 1 row, none in 1 row; .*hidden labels on the Hub"),
    "integers": ([0, 1, None, -7], Value("int64"), "2 of the 4 labels of .*; allowed: 0 to 1"),
    "strings": (["cat", None, ""], Value("string"), "2 of the 3 labels of .*; allowed: a name in each row"),
    "lists": (
        [[0], [1]],
        datasets.Sequence(Value("int64")),
        "'label' of .* holds .*; allowed: class labels, integers",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", WRONG)
def test_labels_that_cannot_be_right_are_refused(tmp_path: Path, kind: str, split: str, streaming: bool) -> None:
    labels, feature, message = WRONG[kind]
    right = {"strings": ["cat"], "lists": [[0]]}.get(kind, [0, 1])
    for name in ("train", "val"):
        write_parquet(tmp_path / f"{name}.parquet", labels if name == split else right, feature)
    with pytest.raises(SourceError, match=message) as refused:
        open_named(tmp_path, streaming=streaming)
    assert f"[{split}]" in str(refused.value) or kind == "lists"
    unlabelled = open_named(tmp_path, labels_needed=False, streaming=streaming)
    assert {label for _, label, _ in unlabelled.train} == {-1}  # pretraining does not look at them


def test_labels_beyond_the_training_classes_are_refused_with_their_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "val.parquet", [0, 5, 7, 5])
    with pytest.raises(SourceError, match=r"has 8 classes, .* have 2 \(only there: 5, 7, in 3 rows\)"):
        open_named(tmp_path)


def test_hidden_labels_of_a_stream_from_the_hub_are_met_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], NAMES)
    write_parquet(tmp_path / "val.parquet", [-1], NAMES)
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "val")}
    loaded = datasets.load_dataset("parquet", data_files=files, streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, streaming: loaded)
    with pytest.raises(SourceError, match=r"\[val\], shard 0, row 0 .*has the label -1; allowed: one of the 2"):
        open_named("hf://some/images", streaming=True)
    assert open_named("hf://some/images", labels_needed=False, streaming=True).class_names == ()


@pytest.mark.slow
def test_names_and_numbers_of_classes_are_matched(tmp_path: Path) -> None:
    """Numbers stand for names in their order, unless the names are numbers themselves."""
    strings, integers = Value("string"), Value("int64")
    cats = write_parquet(tmp_path / "cats.parquet", ["dog", "cat"], strings)
    numbers = write_parquet(tmp_path / "numbers.parquet", [1, 0, 1], integers)
    assert [label for _, label, _ in open_named(cats, validation=str(numbers)).test] == [1, 0, 1]  # type: ignore[union-attr]
    source = open_named(numbers, validation=str(cats))
    assert source.class_names == ("cat", "dog") and [label for _, label, _ in source.train] == [1, 0, 1]
    declared = write_parquet(tmp_path / "declared.parquet", [0, 1], ClassLabel(names=["dog", "cat"]))
    source = open_named(numbers, validation=str(declared))  # whose order counts, not the alphabet's
    assert source.class_names == ("dog", "cat") and [label for _, label, _ in source.train] == [1, 0, 1]
    assert [label for _, label, _ in source.test] == [0, 1]  # type: ignore[union-attr]
    from_one = write_parquet(tmp_path / "from_one.parquet", ["1", "2"], strings)
    ones = write_parquet(tmp_path / "ones.parquet", [1, 1], integers)
    assert [label for _, label, _ in open_named(from_one, validation=str(ones)).test] == [0, 0]  # type: ignore[union-attr]
    one_name = write_parquet(tmp_path / "one_name.parquet", ["dog"], strings)
    with pytest.raises(SourceError, match=r"has 1 classes, the training images have 2 without names"):
        open_named(numbers, validation=str(one_name))


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = ClassLabel(names=[unicodedata.normalize(form, "café") for form in ("NFC", "NFD")])
    for split in ("train", "val"):
        write_parquet(tmp_path / f"{split}.parquet", [0, 1], twice)
    with pytest.raises(SourceError, match="has two classes that are called 'café', 0 and 1"):
        open_named(tmp_path)


def write_files(tar: Path, files: dict[str, bytes]) -> Path:
    """A tar of these files; a compressed one if its name says so."""
    with tarfile.open(tar, "w:gz" if tar.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return tar


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_that_end_too_early_are_refused_wherever_they_are_cut(tmp_path: Path, form: int) -> None:
    """Before and inside headers, whose lack Python's reader takes for the end of a whole tar; a lone zero block is."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=form) as archive:
        for name in (
            "0.jpg",
            "0.cls",
            f"{'long/' * 30}1.jpg" if form == tarfile.USTAR_FORMAT else f"{'é' * 120}1.jpg",
        ):
            member = tarfile.TarInfo(name)
            member.size = 600
            archive.addfile(member, io.BytesIO(bytes(range(200)) * 3))
        end = archive.offset
    tars = [("w.tar", bytes), ("w.tar.gz", gzip.compress), ("w.tar.xz", lzma.compress)]
    assert len(whole.getvalue()) == tarfile.RECORDSIZE
    for name, compress in tars:
        file = tmp_path / name
        for size in (tarfile.RECORDSIZE, end + 1024, end + 512):
            file.write_bytes(compress(whole.getvalue()[:size]))
            assert len(read_members(file)) == 3 and len(list(read_samples(file, lambda ending: True))) == 2
        for size in (end + 511, end, end - 512, 3 * 1536 - 1100, 1536 + 100, 1536, 1500, 1000, 512):
            file.write_bytes(compress(whole.getvalue()[:size]))
            message = f"^cannot read the tar {re.escape(str(file))}: unexpected end of data"
            with pytest.raises(ValueError, match=message):
                read_members(file)
            with pytest.raises(ValueError, match=message):
                list(read_samples(file, lambda ending: False))
    damaged = whole.getvalue()[:1600] + b"?" * 20 + whole.getvalue()[1620:]  # in the header of the second file
    (tmp_path / "w.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"unexpected end of data after 1536 bytes: .* found: bad checksum"):
        read_members(tmp_path / "w.tar")


@pytest.mark.parametrize("streaming", [False, True])
def test_cut_shards_are_not_trained_on(tmp_path: Path, streaming: bool) -> None:
    for split in ("train", "val"):
        write_files(tmp_path / f"{split}.tar", {"0.jpg": jpeg(0), "0.cls": b"0", "1.jpg": jpeg(1), "1.cls": b"1"})
    members = read_members(tmp_path / "train.tar")
    os.truncate(tmp_path / "train.tar", members["1.jpg"].offset - 512)
    with pytest.raises(SourceError, match=r"cannot read the tar .*train\.tar: unexpected end of data"):
        open_named(tmp_path, streaming=streaming)


def labels_of(split: object) -> list[object]:
    """Class of each image, the message in place of those that cannot be decoded."""
    found: list[object] = []
    stored = split.encoded() if isinstance(split, ImageStream) else split.encoded(range(len(split)))  # type: ignore
    for encoded in stored:
        try:
            found.append(encoded.decode("RGB")[1])
        except UndecodableImage as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_tars_with_images_of_several_kinds_and_words_as_classes(tmp_path: Path, streaming: bool, ending: str) -> None:
    kinds = ["jpg", "JPG", "png", "jpeg", None, "webp", "jpg", "seg.tif"]  # within the first five, and behind them
    encoded = {"jpg": jpeg(1), "JPG": jpeg(1), "jpeg": jpeg(1), "png": encode(RGB, "PNG"), "webp": encode(RGB, "WEBP")}
    for split in ("train", "val"):
        files: dict[str, bytes] = {"README": b"no sample", "./._0000.jpg": b"of macOS"}
        for row, kind in enumerate(kinds):
            if kind is not None:
                files[f"./{row:04}.{kind}"] = encoded.get(kind, encode(RGB, "TIFF"))
            word = ["dog", "cat"][row % 2]
            files[f"./{row:04}.{'json' if row > 5 else 'cls'}"] = (
                json.dumps({"label": word}) if row > 5 else word
            ).encode()
        write_files(tmp_path / f"{split}-0.{ending}", files)
    for labels_needed in (True, False):
        source = open_named(tmp_path, labels_needed, streaming=streaming)
        assert source.class_names == (("cat", "dog") if labels_needed else ())
        for split in (source.train, source.test):
            expected: list[object] = [1, 0] * 4 if labels_needed else [-1] * 8
            found = labels_of(split)
            assert f"0.{ending}/0004 cannot be decoded: there is no image in this row" in str(found[4])
            assert found[:4] + found[5:] == expected[:4] + expected[5:]


def test_what_a_killed_indexing_left_is_removed(tmp_path: Path) -> None:
    write_files(tmp_path / "train.tar", {f"{name}/0.jpg": jpeg() for name in ("cat", "dog")})
    open_named(tmp_path, labels_needed=False)
    [index] = Path(datasets.config.HF_DATASETS_CACHE, "webdataset_indices").glob("*/index.arrow")
    index.unlink()
    (index.parent / ".partial-a1b2c3d4").mkdir()
    open_named(tmp_path, labels_needed=False)
    assert {path.name for path in index.parent.iterdir()} <= {"index.arrow", "index.arrow.lock"}


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_in_tars(tmp_path: Path, streaming: bool) -> None:
    names = [f"photos/{name}/{number}.jpg" for name in ("10", "9", "café") for number in range(2)]
    write_files(tmp_path / "train.tar", {unicodedata.normalize("NFD", name): jpeg() for name in names})
    write_files(tmp_path / "val.tar", {name: jpeg() for name in names[2:]})
    source = open_named(tmp_path, streaming=streaming)
    assert source.class_names == ("9", "10", "café")
    assert labels_of(source.train) == [1, 1, 0, 0, 2, 2] and labels_of(source.test) == [0, 0, 2, 2]
    assert labels_of(open_named(tmp_path, labels_needed=False, streaming=streaming).train) == [-1] * 6
    both = write_files(tmp_path / "both.tar", {f"{s}/cat/0.jpg": jpeg() for s in ("train", "val")})
    for labels_needed in (True, False):
        with pytest.raises(SourceError, match=r"tars of .*both.* hold the folders train, val, which are splits"):
            open_named(both, labels_needed, validation=str(both), streaming=streaming)


REFUSED_TARS: dict[str, tuple[dict[str, bytes], dict[str, object], str]] = {
    "dots in keys": (
        {f"img.{row:04}.{kind}": jpeg() for row in range(8) for kind in ("jpg", "cls")}, {},
        r"img.0000.jpg, img.0001.jpg, .* and 3 more have one key, 'img', as it ends at the first dot of a name; "
        r"allowed: one image for each key. Rename the files so that they have one dot each$",
    ),
    "two images": (
        {"0.jpg": jpeg(), "0.png": jpeg(), "0.cls": b"1"}, {}, "say which ending is meant, as in .*image_column=jpg",
    ),
    "none of the ending": ({"0.jpg": jpeg(), "0.cls": b"1"}, {"image_column": "png"}, "no sample .* ending 'png'; "),
    "no images": ({"0.txt": b"", "0.cls": b"1"}, {}, "no sample of .* has an image file; .* has the files txt, cls"),
    "no labels": (
        {"0.jpg": jpeg(), "0.json": b'{"species": 1}'}, {},
        r"neither a .cls nor a \"label\" in a .json, .*files jpg, json \(species\). Say where .*json.species",
    ),
    "some without": ({"0.jpg": jpeg(), "0.cls": b"1", "1.jpg": jpeg()}, {}, "1 of the 2 .* have no label .*'1'"),
    "wrong column": ({"0.jpg": jpeg(), "0.cls": b"1"}, {"label_column": "txt"}, "1 of the 1 .*label_column=txt"),
    "apart": (
        {"0.jpg": jpeg(), "1.jpg": jpeg(), "0.cls": b"1", "1.cls": b"1"}, {}, "no label .*must stand side by side",
    ),
    "a list": ({"0.jpg": jpeg(), "0.json": b'{"label": [1]}'}, {}, r"0.json.label is \[1\]; allowed as a label"),
    "no text": ({"0.jpg": jpeg(), "0.cls": b"\xff"}, {}, "0.cls holds no label: .*utf-8"),
    "no JSON": ({"0.jpg": jpeg(), "0.json": b"{"}, {}, "0.json holds no label: "),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", REFUSED_TARS)
def test_tars_that_cannot_be_meant_are_refused(tmp_path: Path, kind: str, streaming: bool) -> None:
    files, settings, message = REFUSED_TARS[kind]
    tar = write_files(tmp_path / "some.tar", files)
    with pytest.raises(SourceError, match=message):
        open_named(tar, validation=str(tar), streaming=streaming, **settings)


def test_a_field_of_json_and_an_ending_can_be_chosen(tmp_path: Path) -> None:
    files = {"0.jpg": jpeg(1), "0.mask.png": encode(GREY, "PNG"), "0.json": b'{"species": "x", "label": 3}'}
    tar = write_files(tmp_path / "some.tar", {**files, "1.JPG": jpeg(2), "1.json": b'{"species": "y"}'})
    source = open_named(tar, validation=str(tar), image_column="jpg", label_column="json.species")
    assert source.class_names == ("x", "y") and labels_of(source.train) == [0, 1]


def test_a_tar_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "some.tar", [0, 1])
    assert len(open_named(tar, validation=str(tar)).train) == 2  # type: ignore[arg-type]
    write_tar(tar, [0, 1, 1])
    assert len(open_named(tar, validation=str(tar)).train) == 3  # type: ignore[arg-type]


def test_a_row_without_an_image_says_so(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": jpeg(), "path": None}, None], "label": [0, 1]}
    data = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": NAMES}))
    for split in ("train", "val"):
        data.to_parquet(tmp_path / f"{split}.parquet")
    for streaming in (False, True):
        first, second = labels_of(open_named(tmp_path, streaming=streaming).train)
        assert first == 0 and "row 1 cannot be decoded: there is no image in this row" in str(second)


class Listed:
    """A folder's entries in an order of one's own, as a disk lists them."""

    def __init__(self, entries: Iterable["os.DirEntry[str]"]) -> None:
        self._entries = iter(entries)

    def __iter__(self) -> "Listed":
        return self

    def __next__(self) -> "os.DirEntry[str]":
        return next(self._entries)

    def __enter__(self) -> "Listed":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_order_does_not_depend_on_the_disk_or_on_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["1", "01", "A", "a"]  # all tie in timm's natural order
    for split in ("train", "val"):
        for name in names:
            folder = write_folder(tmp_path / split, {name: 0}) / name
            for file in ("1.png", "01.png", "x.jpg", "X.jpg"):
                (folder / file).write_bytes(jpeg())
    scandir = os.scandir
    seen = set()
    for turn in (list, reversed):
        monkeypatch.setattr(os, "scandir", lambda path, turn=turn: Listed(turn(sorted(scandir(path), key=str))))
        source = open_named(tmp_path)
        unlabelled = open_named(tmp_path, labels_needed=False)
        files = [row.data for split in (source, unlabelled) for row in split.train.encoded(range(16))]  # type: ignore
        seen.add((source.class_names, *files))
    assert len(seen) == 1
    monkeypatch.undo()
    classes = set()
    for rows in (names, names[::-1]):
        parquet = write_parquet(tmp_path / "rows.parquet", rows, Value("string"))
        classes.add(open_named(parquet, validation=str(parquet)).class_names)
    assert classes == {source.class_names}


@pytest.mark.parametrize("turn", [list, reversed])
def test_tables_among_images_are_left_out_in_any_order_of_the_disk(
    tmp_path: Path,
    turn: Callable[..., Iterable["os.DirEntry[str]"]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, held_out = write_folder(tmp_path / "a", {"cat": 1, "dog": 1}), write_folder(tmp_path / "b", {"cat": 1})
    for name in ("cat/a.parquet", "dog/z.tar", ".x.parquet", "._y.tar"):  # macOS hides such files beside others
        (folder / name).write_bytes(b"")
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Listed(turn(sorted(scandir(path), key=str))))
    with caplog.at_level(logging.WARNING):
        assert open_named(folder, validation=str(held_out)).class_names == ("cat", "dog")
    assert "files left out as no images (2): cat/a.parquet, dog/z.tar" in caplog.text


def test_hidden_tables_are_no_part_of_a_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], NAMES)
    (tmp_path / "._train.parquet").write_bytes(b"resources")
    assert locate(str(tmp_path)).splits == {"train": [str(tmp_path / "train.parquet")]}


def test_a_folder_with_another_for_validation_is_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for fold in ("a", "b"):
        write_folder(tmp_path / fold, {"valid": 1, "invalid": 1})
        write_folder(tmp_path / "splits" / fold, {"train": 2, "dev": 2})
        write_folder(tmp_path / "mixed" / fold, {"bus": 1, "car": 1, "Train": 1})
    for root, names in (("", ("invalid", "valid")), ("splits", ("dev", "train")), ("mixed", ("bus", "car", "Train"))):
        folds = [tmp_path / root / fold for fold in ("a", "b")]
        source = open_named(folds[0], validation=str(folds[1]))
        assert source.class_names == names and len(source.train) == len(source.test)  # type: ignore[arg-type]
        assert set(labels_of(source.test)) == set(range(len(names)))
    for fold in folds:  # of the source and of data.validation
        assert f"{str(fold)!r} is named for one split, so its folders Train are classes" in caplog.text


def test_splits_stay_splits_with_another_source_for_validation(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "train", {"cat": 2, "train": 1})
    write_folder(tmp_path / "a" / "val", {"cat": 1, "train": 1})
    write_folder(tmp_path / "b" / "test", {"cat": 1})
    source = open_named(tmp_path / "a", validation=str(tmp_path / "b"))
    assert source.class_names == ("cat", "train") and len(source.train) == 3  # type: ignore[arg-type]


def test_folders_that_may_be_splits_or_classes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "two", {"train": 4, "dev": 4})
    with pytest.raises(SourceError, match=r"no class folders; .*if these are classes, set data.validation"):
        open_named(tmp_path / "two")
    with caplog.at_level(logging.WARNING):
        assert len(open_named(tmp_path / "two", labels_needed=False).train) == 4  # type: ignore[arg-type]
    assert "dev is the val split, train is the train split; if these are classes, set data.validation" in caplog.text
    whole = open_named(tmp_path / "two", labels_needed=False, validation=str(tmp_path / "two"))
    assert len(whole.train) == 8  # type: ignore[arg-type]
    write_folder(tmp_path / "alike", {"train": 1, "training": 1})
    write_folder(tmp_path / "held", {"val": 1, "test": 1})
    for name, message in (("alike", "holds train, training: splits or classes"), ("held", "no training split")):
        for labels_needed in (True, False):
            with pytest.raises(SourceError, match=f"{message}.*if these are classes, set data.validation"):
                open_named(tmp_path / name, labels_needed)


@pytest.mark.parametrize("empty_folder", [False, True])
def test_a_class_may_lack_validation_images(
    tmp_path: Path, empty_folder: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 2, "c": 1})
    write_folder(tmp_path / "val", {"a": 1, "c": 1} | ({"b": 0, "unknown": 0} if empty_folder else {}))
    with caplog.at_level(logging.WARNING):
        source = open_named(tmp_path)
    assert source.class_names == ("a", "b", "c") and labels_of(source.test) == [0, 2]  # by names: no number shifts
    assert "[val] has no images for 1 of the 3 classes, which are not scored: b" in caplog.text


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_scores_of_images_that_are_trained_on_are_told(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "images":
        write_folder(tmp_path / "data", {"a": 1, "b": 2})
        write_folder(tmp_path / "other", {"a": 1, "b": 2})
        names = ["data", "other", "link"]
    else:
        for name in ("data", "other"):
            (tmp_path / name).mkdir()
            write_parquet(tmp_path / name / "0.parquet", [0, 1], NAMES)
        names = ["data", "other", "link/*.parquet"]
    (tmp_path / "link").symlink_to("data")
    same, other, linked = (str(tmp_path / name) for name in names)
    for validation, told in ((same, True), (linked, True), (other, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            open_source(DataConfig(source=same, validation=validation))
        assert ("is scored on images that are trained on: " in caplog.text) == told


def test_a_declared_class_without_training_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        write_parquet(tmp_path / f"{split}.parquet", [0], NAMES)
    with caplog.at_level(logging.WARNING):
        assert open_named(tmp_path).class_names == ("cat", "dog")
    assert "[train] has no images for 1 of its 2 classes: dog" in caplog.text


def write_bytes(folder: bytes, name: bytes, content: bytes) -> None:
    """A file whose name need not be text; skips where the disk takes no such names."""
    os.makedirs(folder, exist_ok=True)
    try:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    except OSError:
        pytest.skip("file names have to be UTF-8 here")


def test_file_names_need_not_be_utf_8(tmp_path: Path) -> None:
    root = os.path.join(os.fsencode(tmp_path), b"r\xe9sum\xe9")
    for split in (b"train", b"val"):
        for name in (b"one", b"two"):
            write_bytes(os.path.join(root, split, name), b"caf\xe9.png", jpeg())
    write_bytes(os.path.join(root, b"train", b"two"), b"damag\xe9.png", b"")
    for labels_needed in (True, False):
        source = open_named(os.fsdecode(root), labels_needed)
        found = labels_of(source.train)
        assert found[:2] == ([0, 1] if labels_needed else [-1, -1])
        assert "two/damag\\xe9.png cannot be decoded" in str(found[2])
        str(found[2]).encode()  # can be printed and kept in a checkpoint
    tar = write_files(
        tmp_path / "some.tar", {os.fsdecode(b"caf\xe9.jpg"): jpeg(), os.fsdecode(b"caf\xe9.cls"): b"cat"}
    )
    assert [name for *_, name in open_named(tar, validation=str(tar)).train] == [f"{tar}/caf\\xe9"]


def test_class_names_have_to_be_utf_8(tmp_path: Path) -> None:
    write_bytes(os.path.join(os.fsencode(tmp_path), b"train", b"caf\xe9"), b"0.png", jpeg())
    with pytest.raises(
        SourceError, match=r"the name of the class folder b'.*caf\\xe9' is not UTF-8; rename the folder"
    ):
        open_named(tmp_path / "train")
    assert len(open_named(tmp_path / "train", labels_needed=False).train) == 1  # type: ignore[arg-type]
    tar = write_files(tmp_path / "some.tar", {os.fsdecode(b"caf\xe9/0.jpg"): jpeg(), "cat/0.jpg": jpeg()})
    with pytest.raises(SourceError, match=r"class folder 'caf\\\\xe9' in .* is not UTF-8; rename it"):
        open_named(tar)


def test_odd_class_names_and_both_forms_of_unicode(tmp_path: Path) -> None:
    for split, form in (("train", "NFC"), ("val", "NFD")):
        write_folder(tmp_path / split, {unicodedata.normalize(form, name): 1 for name in ("①", "5²", "café")})
        strings = [unicodedata.normalize(form, "café"), "b"]
        write_parquet(tmp_path / "rows" / f"{split}.parquet", strings, Value("string"))
        write_parquet(tmp_path / "named" / f"{split}.parquet", [0, 1], ClassLabel(names=strings))
    assert open_named(tmp_path / "train", validation=str(tmp_path / "val")).class_names == ("5²", "café", "①")
    assert open_named(tmp_path / "rows").class_names == ("b", "café")
    assert labels_of(open_named(tmp_path / "named").test) == [0, 1]


def test_thousands_of_classes_open_at_once(tmp_path: Path) -> None:
    names = [f"n{number:08}" for number in range(5000)]
    rows = {"image": [{"bytes": b"", "path": None}] * len(names), "label": list(range(len(names)))}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
    data = datasets.Dataset.from_dict(rows, features)
    for split in ("train", "val"):
        data.to_parquet(tmp_path / f"{split}.parquet")
    assert open_named(tmp_path).class_names == tuple(names)
    many = tuple(Counted(f"n{number:08}") for number in range(21_841))  # of ImageNet-21k
    labels = Labels(many, dict(enumerate(many)), dict.fromkeys(many, 1), numbered=False)
    before = Counted.looks
    train, test = match_labels(labels, labels, "val")
    indices = test.indices(train.names)
    assert Counted.looks - before < 20 * len(many)
    assert train.names == many and indices == {number: number for number in range(len(many))}


def test_the_limit_of_pixels_can_be_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 1})
    [message] = labels_of(open_named(tmp_path / "train", labels_needed=False, max_pixels=24 * 16 - 1).train)
    assert "it has more than the 383 pixels that are allowed (max_pixels)" in str(message)
    large = encode(Image.new("1", (9460, 9460)), "PNG")
    (tmp_path / "train" / "cat" / "0.jpg").write_bytes(large)
    for limit, expected in ((90_000_000, -1), (89_000_000, "89,000,000 pixels that are allowed (max_pixels)")):
        [found] = labels_of(open_named(tmp_path / "train", labels_needed=False, max_pixels=limit).train)
        assert found == expected or str(expected) in str(found)


@pytest.mark.parametrize("labels_needed", [True, False])
def test_files_left_out_are_counted_and_named(
    tmp_path: Path, labels_needed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "val", {"a": 1, "b": 1})
    for name in ("x.heic", "notes.txt", "boxes.csv", "more.xml"):
        (tmp_path / "train" / "a" / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        open_named(tmp_path, labels_needed)
    [told] = [record.message for record in caplog.records]
    assert told.endswith("[train]: files left out as no images (4): a/boxes.csv, a/more.xml, a/notes.txt and 1 more")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_files_beside_class_folders_in_tars_are_no_samples(
    tmp_path: Path, ending: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"README.md": b"", "x/a/0.jpg": jpeg(0), "x/a/boxes.csv": b"", "x/b/1.jpg": jpeg(1), "x/notes/n.txt": b""}
    tar = write_files(tmp_path / f"some.{ending}", files)
    with caplog.at_level(logging.WARNING):
        source = open_named(tar, validation=str(tar), streaming=streaming)
    assert source.class_names == ("a", "b") and labels_of(source.train) == labels_of(source.test) == [0, 1]
    assert "files left out as no images (3): README, x/a/boxes, x/notes/n" in caplog.text
    if streaming:
        assert source.train.shard_sizes == [2] and [row.data for row in source.train.shard(0, 1)] == [jpeg(1)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels_needed", [True, False])
def test_tables_without_rows_are_refused(tmp_path: Path, streaming: bool, labels_needed: bool) -> None:
    val = write_parquet(tmp_path / "val.parquet", [0], NAMES)
    file = write_parquet(tmp_path / "train.parquet", [], NAMES)
    with pytest.raises(SourceError, match=r"\[train\] holds no images|corresponds to no data"):
        open_named(file, labels_needed, streaming=streaming, validation=str(val))


@pytest.mark.slow
def test_images_and_tables_have_one_identity_with_and_without_the_models(repo: Path) -> None:
    """`recipes` takes them from their folder, so that torch is not imported for a refusal."""
    program = (
        "import sys, recipes; from arm_zoo.images.locate import SourceError as early; "
        "from arm_zoo.tables import Limit; assert 'arm_zoo' not in sys.modules; import arm_zoo; "
        "from arm_zoo.images.tables import SourceError as late; assert early is late; "
        "from arm_zoo import tables; assert tables.Limit is Limit"
    )
    subprocess.run([sys.executable, "-c", program], cwd=repo, check=True)
