"""Sources of pictures: every layout, every kind of file, and a clear refusal of what cannot be meant."""

import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from arm_zoo.images.decode import UndecodableImage, decode_image
from recipes.braces import expand_braces
from recipes.config import DataConfig
from recipes.locate import SourceError, locate
from recipes.sources import PictureStream, PictureTable, Source, open_source
from tests.pictures import (
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
    """The picture with its left half transparent."""
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
def test_every_kind_of_picture_comes_out_as_it_looks(kind: str) -> None:
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
def test_pictures_come_out_upright(kind: str, orientation: int, turns: int, flip: bool) -> None:
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    upright = np.asarray(decode_image(encode(RGB, kind, exif=exif(orientation), **options), "x")).astype(int)
    expected = np.rot90(pixels(), turns)
    expected = expected[:, ::-1] if flip else expected
    assert np.abs(upright - expected).max() <= (6 if kind == "JPEG" else 0)


def test_grey_pictures_stay_grey_when_asked_for() -> None:
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
def test_damaged_pictures_are_named(kind: str) -> None:
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
    assert isinstance(source.train, PictureTable) and isinstance(source.test, PictureTable)
    assert (len(source.train), len(source.test), source.class_names) == (train, test, names)
    image, label, name = source.train[0]
    assert image.mode == "RGB" and image.size == (24, 16) and label == 0 and name


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"n01": 3, "n02": 2, "n10": 2})
    write_folder(tmp_path / "val", {"n01": 1, "n02": 1, "n10": 1})
    (tmp_path / "annotations").mkdir()  # ImageNet has folders without pictures beside the splits
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


def test_pictures_without_class_folders_can_be_pretrained_on(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.JPEG").write_bytes(jpeg(number))
    assert len(open_named(tmp_path, labels_needed=False).train) == 3  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"holds pictures .* but no class folders; allowed: FOLDER/CLASS/PICTURE"):
        open_named(tmp_path)


NAMES = datasets.ClassLabel(names=["cat", "dog"])


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
    strings = datasets.Value("string")
    first = write_parquet(tmp_path / "one" / "a.parquet", ["b", "a", "c"], strings)
    write_parquet(tmp_path / "one" / "b.parquet", ["c"], strings)
    other = write_parquet(tmp_path / "val.parquet", ["a", "c"], strings)
    check_labels = open_named(tmp_path / "one" / "*.parquet", validation=str(other))
    assert check_labels.class_names == ("a", "b", "c")
    assert [label for _, label, _ in check_labels.train] == [1, 0, 2, 2]
    assert [label for _, label, _ in check_labels.test] == [0, 2]  # type: ignore[union-attr]
    with pytest.raises(SourceError, match=r"has 1 classes, the training pictures have 3 \(only there: d, in 1 row\)"):
        unknown = write_parquet(tmp_path / "unknown.parquet", ["d"], strings)
        open_named(first, validation=str(unknown))
    integers = write_parquet(tmp_path / "integers.parquet", [2, 0, 1])
    source = open_named(integers, validation=str(write_parquet(tmp_path / "few.parquet", [1])))
    assert source.class_names == ("0", "1", "2") and source.train[0][1] == 2  # type: ignore[index]
    with pytest.raises(SourceError, match="has 4 classes, the training pictures have 3"):
        open_named(integers, validation=str(write_parquet(tmp_path / "more.parquet", [3])))
    with pytest.raises(
        SourceError, match=r"1 of the 2 labels of .* are none .*: -1 in 1 row; allowed: 0 to 0"
    ):
        open_named(integers, validation=str(write_parquet(tmp_path / "hidden.parquet", [-1, 0])))


def test_a_parquet_file_without_declared_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": jpeg(number), "path": None} for number in range(3)]
    pq.write_table(pa.table({"picture": images, "kind": ["x", "y", "x"], "id": [5, 6, 7]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"picture": images[:2], "kind": ["x", "y"], "id": [8, 9]}), tmp_path / "val.parquet")
    with pytest.raises(SourceError, match=r"label column .* is none of kind, id; say which with data.label_column"):
        open_named(tmp_path)
    check(open_named(tmp_path, label_column="kind"), 3, 2, ("x", "y"))
    with pytest.raises(SourceError, match=r"data.label_column is 'kid'; allowed: a column of .*: kind, id"):
        open_named(tmp_path, label_column="kid")


def test_several_label_columns_must_be_told_apart(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(
        {"img": [{"bytes": jpeg(), "path": None}] * 2, "fine": [0, 2], "coarse": [1, 0]},
        features=datasets.Features(
            {
                "img": datasets.Image(),
                "fine": datasets.ClassLabel(names=["a", "b", "c"]),
                "coarse": datasets.ClassLabel(names=["x", "y"]),
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
    swapped = write_parquet(tmp_path / "b.parquet", [0, 1], datasets.ClassLabel(names=["dog", "cat"]))
    source = open_named(train, validation=str(swapped))
    assert [label for _, label, _ in source.test] == [1, 0]  # type: ignore[union-attr]
    fewer = write_parquet(tmp_path / "c.parquet", [0], datasets.ClassLabel(names=["dog"]))
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
    assert isinstance(stream.train, PictureStream) and stream.train.size == 5 and stream.class_names == names
    assert [(label, image.mode) for image, label, _ in stream.train] == [(n, "RGB") for n in (0, 1, 2, 2, 1)]
    assert [name.rpartition("/")[2] for *_, name in stream.train] == [f"{number:06}" for number in range(5)]
    for streaming in (False, True):
        with pytest.raises(
            SourceError, match=r"2 of the 5 labels of .* are none .*: 2 in 2 rows; allowed: 0 to 1"
        ):
            open_named(tmp_path, streaming=streaming, num_classes=2)


def test_streams_of_parquet_tell_their_size_and_read_shards_in_any_order(tmp_path: Path) -> None:
    for file in range(3):
        write_parquet(tmp_path / f"train-{file}.parquet", [file % 2] * 5, NAMES, row=[file * 5 + n for n in range(5)])
    write_parquet(tmp_path / "val.parquet", [0, 1], NAMES, row=[0, 1])
    stream = open_named(tmp_path, streaming=True).train
    assert isinstance(stream, PictureStream) and stream.size == 15

    assert stream.num_shards == 3 and stream.shard_sizes == [5, 5, 5]
    assert [row.data for row in stream.shard(1, first_row=3)] == [jpeg(3), jpeg(4)]
    assert [row.name.partition("] ")[2] for row in stream.shard(1, 4)] == [""]
    assert [row.label for row in stream.shard(1)] == [1] * 5
    assert len(list(stream.encoded())) == 15


def test_digits_are_split_once_and_in_proportion() -> None:
    source = open_named("digits")
    assert isinstance(source.train, PictureTable) and isinstance(source.test, PictureTable)
    assert (len(source.train), len(source.test), source.channels) == (1437, 360, 1)
    images, labels, _ = zip(*[*source.train, *source.test], strict=True)
    assert {image.mode for image in images} == {"L"} and {image.size for image in images} == {(8, 8)}
    values = np.stack([np.asarray(image) for image in images])
    assert values.min() == 0 and values.max() == 255 and len(np.unique(values)) == 17
    assert source.mean[0] == pytest.approx(values[:1437].mean() / 255, rel=1e-6)
    shares = [np.bincount(part) / len(part) for part in (labels[:1437], labels[1437:])]
    assert np.abs(shares[0] - shares[1]).max() < 0.003
    with pytest.raises(SourceError, match=r"the digits .* have their own validation pictures"):
        open_named("digits", validation="digits")
    with pytest.raises(SourceError, match=r"the digits have 10 classes, but data.num_classes is 5"):
        open_named("digits", num_classes=5)


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("a{08..10}{x,y}") == ["a08x", "a08y", "a09x", "a09y", "a10x", "a10y"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_bad_sources_are_refused_in_plain_words(tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    refused = {
        str(tmp_path / "nowhere"): "there is no .*nowhere'; allowed: a folder of pictures in class subfolders",
        "mnist": "there is no 'mnist'; allowed: a folder of pictures",
        str(tmp_path / "*.parquet"): "no file matches .*parquet",
        str(tmp_path / "train-{0..3}.tar"): "no file matches .*train-0.tar",
        "hf://imagenet": "'hf://imagenet' is no data set on the Hub; allowed: hf://owner/name",
    }
    (tmp_path / "empty").mkdir()
    refused[str(tmp_path / "empty")] = "empty' is empty; allowed: a folder of pictures"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "notes.txt").write_text("hello")
    refused[str(tmp_path / "odd")] = "odd' holds no pictures, parquet files or tars; allowed: a folder of pictures"
    refused["./nowhere"] = "there is no './nowhere'"
    refused["recipes/nowhere"] = "there is no 'recipes/nowhere'"  # not asked of the Hub: recipes/ is a folder here
    (tmp_path / "notes.txt").write_text("hello")
    refused[str(tmp_path / "notes.txt")] = "cannot read .*notes.txt'"
    both = write_folder(tmp_path / "both", {"cat": 1})
    write_parquet(both / "train.parquet", [0])
    refused[str(both)] = "holds parquet and pictures; name the files"
    mixed = write_folder(tmp_path / "mixed", {"train": 1, "car": 1, "plane": 1})
    refused[str(mixed)] = "holds train beside car, plane: splits or classes?"
    unclear = tmp_path / "unclear"
    write_parquet(unclear / "train.parquet", [0])
    write_parquet(unclear / "more.parquet", [0])
    refused[str(unclear)] = "which split is .*more.parquet' of?"
    hollow = write_folder(tmp_path / "hollow" / "train", {"cat": 1, "dog": 0})
    few = write_parquet(tmp_path / "few" / "few.parquet", [0, 0])
    with pytest.raises(SourceError, match=r"has 2 pictures, but data.train_size is 3; leave it out"):
        open_named(few, train_size=3, validation=str(few))
    refused[str(hollow.parent)] = r"class folders of .*hollow \[train\] hold no picture: dog; fill or remove them"
    for name, message in refused.items():
        with pytest.raises(SourceError, match=message):
            open_named(name)


def test_disagreeing_splits_and_damaged_files_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "train", {"x": 1, "y": 1})
    write_folder(tmp_path / "a" / "val", {"x": 1, "y": 1, "z": 3})
    with pytest.raises(SourceError, match=r"has 3 classes, the training pictures have 2 \(only there: z, in 3 rows\)"):
        open_named(tmp_path / "a")
    for name in ("train.parquet", "train.tar"):
        (tmp_path / name).write_bytes(b"not at all")
        with pytest.raises(SourceError, match=f"cannot read .*{name}"):
            open_named(tmp_path / name)
    with pytest.raises(SourceError, match=r"is a folder of pictures, which needs no data.streaming"):
        open_named(tmp_path / "a", streaming=True)
    write_parquet(tmp_path / "b" / "val.parquet", [0])
    write_parquet(tmp_path / "b" / "test.parquet", [0])
    with pytest.raises(SourceError, match="has the splits test, val, but no training split"):
        open_named(tmp_path / "b")


def test_the_hub_switched_off_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("hf://someone/pictures", "someone/pictures"):
        with pytest.raises(SourceError, match=r"no file or folder 'someone/pictures'.*switched off \(HF_HUB_OFF"):
            open_named(name)


def test_a_data_set_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train = datasets.load_dataset("parquet", data_files=str(write_parquet(tmp_path / "a.parquet", [0, 1, 1], NAMES)))
    asked = []

    def load_dataset(name: str, streaming: bool) -> dict[str, datasets.Dataset]:
        asked.append((name, streaming))
        return {"train": train["train"], "validation": train["train"].select([0]), "test": train["train"].select([1])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_named("hf://someone/pictures")
    check(source, 3, 1, ("cat", "dog"))
    assert source.test[0][1] == 0 and asked == [("someone/pictures", False)]  # type: ignore[index]
    (tmp_path / "someone").mkdir()
    assert locate("someone/pictures").kind == "hub"
