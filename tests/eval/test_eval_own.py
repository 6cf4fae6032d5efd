"""Images of the user's own, `--sets custom=...`: the same images, classes and pixels as training and `predict`."""

import hashlib
import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo, resolve_model_data_config

from arm_zoo.heads.models import Segmenter, save_segmenter
from arm_zoo.images.columns import Choices
from arm_zoo.images.hub import split_to_score
from arm_zoo.images.listing import IMAGE_ENDINGS
from arm_zoo.weights.hosted import bundled_file
from eval import __main__ as program
from eval import tables
from eval.scoring import labels, models
from eval.scoring import predict as scoring
from eval.scoring.custom import AS_USUAL
from recipes.config import FinetuneConfig, load_config
from recipes.data.batches import Images
from recipes.data.built_in import DIGIT_NAMES
from recipes.data.config import DataConfig
from recipes.data.sampling import Key
from recipes.data.sources import open_source
from recipes.data.transforms import ScoringTransform
from recipes.finetune import finetune
from tests import ROOT
from tests.helpers.images import Counted, encode, jpeg, pixels, png_16_bit_colour, png_header

PICO = "arm_pico_patch2_8"
ENTRY = "arm_pico_patch2_8.arm_digits_ft_digits"
WNIDS = ImageNetInfo().label_names()


def save(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def listed(*locations: Path | str, choices: Choices = AS_USUAL) -> labels.Listing:
    return labels.open_set("custom", [str(location) for location in locations], choices)


def classes_of(listing: labels.Listing) -> dict[str, str]:
    """File -> class."""
    names = listing.class_names or ()
    return {listing.describe(i): names[label] for i, label in enumerate(listing.labels)}


def run(output: Path, *words: str, models: Sequence[str] = (PICO,)) -> list[dict[str, str]]:
    """Rows after a run."""
    options = ["--models", *models, "--device", "cpu", "--workers", "0", "--output", str(output)]
    assert program.main([*options, *words]) == 0
    return tables.read(output)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert program.main([*words, "--models", PICO, "--device", "cpu", "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def tar_of(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shard_of(path: Path, labels: Sequence[object]) -> Path:
    """A WebDataset tar, 0000.jpg with 0000.cls and so on; the images are not to be read."""
    files = {}
    for number, label in enumerate(labels):
        files |= {f"{number:04}.jpg": b"", f"{number:04}.cls": str(label).encode()}
    return tar_of(path, files)


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


# The same pixels


def as_8_bit(values: NDArray[np.uint8]) -> bytes:
    return encode(Image.fromarray(values), "PNG")


def as_16_bit(values: NDArray[np.uint8]) -> bytes:
    return encode(Image.fromarray(values.astype(np.uint16) * 257), "PNG")


def as_alpha(values: NDArray[np.uint8]) -> bytes:
    """Black where the image is dark, and nothing where it is white."""
    return encode(Image.fromarray(np.stack([np.zeros_like(values), 255 - values], axis=-1)), "PNG")


def as_turned(values: NDArray[np.uint8]) -> bytes:
    """Lying on its side, with the note that a camera makes of it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return encode(Image.fromarray(np.ascontiguousarray(np.rot90(values))), "PNG", exif=exif)


def as_tiff(values: NDArray[np.uint8]) -> bytes:
    return encode(Image.fromarray(values), "TIFF")


KINDS: dict[str, Callable[[NDArray[np.uint8]], bytes]] = {
    "8-bit.png": as_8_bit,
    "16-bit.png": as_16_bit,
    "alpha.png": as_alpha,
    "turned.png": as_turned,
    "tiff.tif": as_tiff,
}


def write_digits(root: Path, rows: range, kind: str) -> Path:
    digits = load_digits()
    for row in rows:
        values = np.round(digits.images[row] * (255 / 16)).astype(np.uint8)
        save(root / DIGIT_NAMES[digits.target[row]] / f"{row}-{kind}", KINDS[kind](values))
    return root


def test_digits_of_every_kind_score_the_same(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = write_digits(tmp_path / kind, range(100), kind)
        rows = run(tmp_path / "results.csv", "--sets", f"custom={folder}")
    assert [(row["n"], row["top1"], row["warnings"]) for row in rows] == len(KINDS) * [("100", "97.0000", "")]


def test_a_runs_own_top1_is_evals(tmp_path: Path) -> None:
    """Of a small model trained for a moment, on images of all kinds; both for the split and for the whole folder."""
    for place, kind in enumerate(KINDS):
        write_digits(tmp_path / "data" / "train", range(place * 40, place * 40 + 40), kind)
        write_digits(tmp_path / "data" / "val", range(400 + place * 40, 440 + place * 40), kind)
    config = ROOT / "recipes" / "configs" / "finetune_digits.yaml"
    settings = ["model_args.in_chans=3", f"pretrained={bundled_file(ENTRY)}", "epochs=1", "warmup_epochs=0"]
    places = [f"data.source={tmp_path / 'data'}", f"output_dir={tmp_path / 'run'}", "tracker=none", "global_batch=40"]
    top1 = finetune(load_config(FinetuneConfig, config, [*settings, *places])).top1
    assert 50 < top1 < 100
    weights = ["--weights", str(tmp_path / "run")]
    for folder, marks in (("data/val", ""), ("data", "only the split val is scored, train left out")):
        [*_, row] = run(tmp_path / "results.csv", *weights, "--sets", f"custom={tmp_path / folder}", "--recompute")
        assert (row["n"], float(row["top1"]), row["warnings"]) == ("200", pytest.approx(top1, abs=1e-4), marks)


def test_images_that_trained_the_model_are_told(tmp_path: Path) -> None:
    """Of a run that held images out of a folder, and then is scored on the folder."""
    folder = write_digits(tmp_path / "digits", range(8), "8-bit.png")
    timm.create_model(PICO, pretrained=True).save_pretrained(tmp_path / "run")
    files = sorted(file.relative_to(tmp_path).as_posix() for file in folder.rglob("*.png"))
    for held_out, said in (files[:2], "held out 2 of these 8 images"), (files, ""), (["other/zero/900.png"], ""):
        (tmp_path / "run" / "validation.txt").write_text("".join(f"{name}\n" for name in held_out))
        words = ["--sets", f"custom={folder}", "--recompute"]
        [*_, row] = run(tmp_path / "results.csv", *words, models=[str(tmp_path / "run")])
        assert ("held out" in row["warnings"]) == bool(said) and said in row["warnings"]


def odd_images() -> dict[str, bytes]:
    colour = Image.fromarray(pixels())
    deep = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 170
    exif = Image.Exif()
    exif[0x0112] = 8
    cut_out = colour.convert("RGBA")
    cut_out.putalpha(Image.fromarray(pixels(3)[:, :, 0]))
    return {
        "plain.jpg": jpeg(),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "deep-colour.png": png_16_bit_colour(np.stack([deep] * 3, axis=-1)),
        "cut-out.webp": encode(cut_out, "WEBP", lossless=True),
        "grey-cut-out.png": encode(cut_out.convert("LA"), "PNG"),
        "palette.gif": encode(colour.convert("P"), "GIF", transparency=3),
        "colour-key.png": encode(colour, "PNG", transparency=tuple(pixels()[2, 5].tolist())),
        "turned.jpeg": encode(colour, "JPEG", exif=exif),
        "inks.tiff": encode(colour.convert("CMYK"), "TIFF"),
        "bits.bmp": encode(colour.convert("1"), "BMP"),
        "floating.tif": encode(Image.fromarray(deep.astype(np.float32)), "TIFF"),
        "large.png": png_header(12_000, 9_000),
        "damaged.png": jpeg()[:200],
    }


@pytest.mark.parametrize("model", [PICO, "arm_base_patch16_224", "test_efficientnet"])
def test_pixels_equal_the_recipes_but_for_rounding(model: str, tmp_path: Path) -> None:
    for name, data in odd_images().items():
        save(tmp_path / "train" / "thing" / name, data)
        save(tmp_path / "val" / "thing" / name, data)
    inputs = resolve_model_data_config(timm.create_model(model, device="meta"))
    split = open_source(DataConfig(source=str(tmp_path))).test
    split.mode = "L" if inputs["input_size"][0] == 1 else "RGB"
    names = [Path(encoded.name).name for encoded in split.encoded(range(len(split)))]
    images = Images(split, ScoringTransform(inputs))
    theirs = {name: images.batch([Key(0, i)]) for i, name in enumerate(names)}
    listing = listed(tmp_path / "val")
    refused = []
    for i, (_, image) in enumerate(map(scoring.Images(listing, inputs).__getitem__, range(len(listing)))):
        name = Path(listing.files[i]).name
        batch = theirs.pop(name)
        if isinstance(image, str):
            refused.append(name)
            assert batch.undecodable[0].endswith(f"{name} cannot be decoded: {image}")
        else:
            levels = np.abs(np.asarray(image, int) - batch.images[0].numpy().astype(int))
            assert levels.max() <= 5 and (levels > 1).mean() < 0.01  # torchvision's resizing and Pillow's
    assert not theirs and {"damaged.png", "large.png"} <= set(refused)


def test_classes_of_pixels_are_not_scored_as_those_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    segmenter = Segmenter("test_vit", {"img_size": 16}, num_classes=2)
    save_segmenter(tmp_path / "segmenter", segmenter, "linear", inputs, ["a", "b"])
    for name in ("a", "b"):
        save(tmp_path / "images" / name / "1.jpg", jpeg())
    words = ("--models", f"local-dir:{tmp_path / 'segmenter'}", "--output", str(tmp_path / "results.csv"))
    assert program.main([*words, "--sets", f"custom={tmp_path / 'images'}", "--device", "cpu", "--workers", "0"]) == 1
    said = "classifies pixels, not images; `python -m eval.segmentation` scores it"
    assert said in capsys.readouterr().err and not (tmp_path / "results.csv").exists()


def test_the_limit_of_pixels_can_be_raised_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_digits(tmp_path / "digits", range(10), "8-bit.png")
    words = ["--sets", f"custom={folder}"]
    output = tmp_path / "results.csv"
    options = ["--models", PICO, "--device", "cpu", "--workers", "0", "--output", str(output)]
    assert program.main([*options, *words, "--max-pixels", "63"]) == 1
    *images, error = capsys.readouterr().err.splitlines()
    assert any("undecodable: digits/zero/0-8-bit.png: it has more than the 63 pixels that" in line for line in images)
    assert error.startswith("error: ") and f"none of the 10 images of {folder} that were read" in error
    assert list(tmp_path.glob("results*")) == []  # no row that says nothing
    [row] = run(tmp_path / "results.csv", *words, "--max-pixels", "64")
    assert (row["n"], row["undecodable"]) == ("10", "0")


def test_rows_of_the_former_reading_are_not_taken_for_finished(tmp_path: Path) -> None:
    listing = listed(write_digits(tmp_path / "digits", range(20), "8-bit.png"))
    labelled = labels.label("custom", listing, DIGIT_NAMES, 10)
    facts = zip(listing.files, labelled.targets, listing.sizes, strict=True)
    former = "\n".join("\t".join(map(str, image)) for image in facts)
    assert labelled.fingerprint() != hashlib.sha256(former.encode()).hexdigest()
    save(tmp_path / "in1k" / "n01440764" / "x.JPEG", jpeg())
    as_before = labels.label("in1k", labels.open_set("in1k", [str(tmp_path / "in1k")]))
    former = f"in1k/n01440764/x.JPEG\t0\t{len(jpeg())}"
    assert as_before.fingerprint() == hashlib.sha256(former.encode()).hexdigest()  # rows of ImageNet's sets stay valid


def test_killed_and_finished_runs_of_custom_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "results.csv"
    words = ["--sets", f"custom={write_digits(tmp_path / 'digits', range(20), '16-bit.png')}", "--batch-size", "5"]
    forward, seen = scoring.Forward.__call__, []

    def dying(self: scoring.Forward, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(scoring.Forward, "__call__", dying)
    assert (
        program.main(["--models", PICO, "--device", "cpu", "--workers", "0", "--output", str(output), *words]) == 130
    )
    [row] = run(output, *words, "--resume")
    assert sum(seen[3:]) == 10 and row["n"] == "20"
    assert run(output, *words) == [row] and len(run(output, *words, "--recompute")) == 2


# The same images and classes


def test_all_endings_and_whatever_lies_below_a_class(tmp_path: Path) -> None:
    for number, ending in enumerate(IMAGE_ENDINGS):
        for name in ("cat/images", "dog"):
            save(tmp_path / "val" / name / f"{number}{ending.upper() if number % 2 else ending}", jpeg(number))
            save(tmp_path / "train" / name / f"{number}{ending}", jpeg(number))
    for extra in ("dog/notes.txt", "dog/7.psd", "cat/images/boxes.csv", "cat/deep/x.svg", "dog/.hidden.txt", "a.txt"):
        save(tmp_path / "val" / extra, b"no image")
    listing = listed(tmp_path / "val")
    source = open_source(DataConfig(source=str(tmp_path)))
    assert len(listing) == len(source.test) == 2 * len(IMAGE_ENDINGS)
    assert listing.class_names == source.class_names == ("cat", "dog")
    assert classes_of(listing)["val/cat/images/0.jpg"] == "cat"
    assert listing.notes == (
        "files left out as no images (4): cat/deep/x.svg, cat/images/boxes.csv, dog/7.psd and 1 more",
    )
    tar = tar_of(tmp_path / "val.tar", {f"./{file}": jpeg() for file in [*listing.files, "val/cat/images/boxes.csv"]})
    in_tar = listed(tar)
    keys = {f"val.tar/{os.path.splitext(file)[0]}": name for file, name in classes_of(listing).items()}
    assert classes_of(in_tar) == keys
    assert in_tar.notes == ("files left out as no images (1): val/cat/images/boxes",)


def test_imagenets_sets_keep_the_innermost_folder_and_timms_endings(tmp_path: Path) -> None:
    for file in ("n01440764/n01443537/x.JPEG", "n01440764/y.tif", "n01440764/z.png"):
        save(tmp_path / "val" / file, jpeg())
    listing = labels.open_set("in1k", [str(tmp_path)])
    assert classes_of(listing) == {
        "val/n01440764/n01443537/x.JPEG": "n01443537", "val/n01440764/z.png": "n01440764",
    }  # fmt: skip


def test_a_folder_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "three" / "x.png", as_8_bit(pixels()[:, :, 0]))
    assert classes_of(listed(tmp_path / "three")) == {"three/x.png": "three"}
    assert classes_of(listed(tar_of(tmp_path / "t.tar", {"three/x.png": b"", "three/y.png": b""}))) == {
        "t.tar/three/x": "three", "t.tar/three/y": "three",
    }  # fmt: skip
    save(tmp_path / "three" / "more" / "x.png", jpeg())
    message = refusal(capsys, "--sets", f"custom={tmp_path / 'three'}")
    assert "x.png' beside its class folders; allowed: FOLDER/CLASS/IMAGE" in message
    message = refusal(capsys, "--sets", f"custom={tar_of(tmp_path / 'x.tar', {'a/x.png': b'', 'y.png': b''})}")
    assert "do not lie in class folders" in message


def test_of_splits_the_one_is_scored_that_training_validates_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("training", "Test", "dev"):
        save(tmp_path / "a" / split / "cat" / f"{split}.png", jpeg())
    listing = listed(tmp_path / "a")
    assert listing.files == ["dev/cat/dev.png"]
    assert listing.notes == ("only the split val is scored, test and train left out",)
    save(tmp_path / "b" / "train" / "cat" / "x.png", jpeg())
    assert listed(tmp_path / "b").notes == ("the split train is scored, as there is no other",)
    for name in ("train", "test", "bus"):  # classes that are called like splits
        save(tmp_path / "c" / name / "x.png", jpeg())
        assert set(listed(tmp_path / "c").class_names or ()) == {path.name for path in (tmp_path / "c").iterdir()}
    save(tmp_path / "a" / "val" / "cat" / "x.png", jpeg())
    message = refusal(capsys, "--sets", f"custom={tmp_path / 'a'}")
    holds = "holds dev, Test, training, val: splits or classes?"
    assert f"{holds} If these are splits, name the folder of one\n" in message
    tar = tar_of(tmp_path / "x.tar", {"all/train/cat/x.png": b"", "all/val/cat/y.png": b"", "all/val/dog/z.png": b""})
    message = refusal(capsys, "--sets", f"custom={tar}")
    assert "hold the folders train, val, which are splits; allowed: tars of one split" in message


def write_table(
    path: Path,
    labels: Sequence[object],
    feature: object,
    image: str = "image",
    label: str = "label",
    **more: object,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = {"bytes": Value("binary"), "path": Value("string")}
    rows = {image: [{"bytes": jpeg(n), "path": None} for n in range(len(labels))], label: list(labels)}
    features = Features({image: struct, label: feature})
    for name, values in more.items():
        rows[name], features[name] = values, Value("string") if name != "thumb" else ImageFeature()
    Dataset.from_dict(rows, features).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "splits, chosen",
    [(["train", "validation_clean", "test"], "validation_clean"), (["train", "dev"], "dev"), (["train"], "train")],
)
def test_of_the_hubs_splits_the_one_is_scored_that_training_validates_with(splits: list[str], chosen: str) -> None:
    assert split_to_score(splits, "owner/name") == chosen
    with pytest.raises(ValueError, match="owner/name has the splits train, extra; name the one to score"):
        split_to_score(["train", "extra"], "owner/name")


def test_of_files_the_validation_split_is_scored_unless_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, label in (("train", 0), ("val", 1)):
        write_table(tmp_path / "tables" / f"x-{split}-0.parquet", [label], Value("int64"))
        (tmp_path / "tars").mkdir(exist_ok=True)
        shard_of(tmp_path / "tars" / f"{split}-0.tar", [label])
    for location in ("tables", "tables/*.parquet", "tars", "tars/*-0.tar"):
        listing = listed(tmp_path / location)
        assert (listing.labels.tolist(), listing.notes) == ([1], ("only the split val is scored, train left out",))
    assert listed(tmp_path / "tars" / "train-0.tar").labels.tolist() == [0]
    both = listed(*(tmp_path / "tars" / f"{split}-0.tar" for split in ("train", "val")))
    assert sorted(both.labels) == [0, 1] and both.notes == ()
    write_table(tmp_path / "tables" / "more.parquet", [1], Value("int64"))
    message = refusal(capsys, "--sets", f"custom={tmp_path / 'tables'}")
    assert "which split is" in message and "more.parquet' of? Other files of " in message
    save(tmp_path / "tables" / "cat" / "x.png", jpeg())
    assert "tables' holds parquet and images; name the files" in refusal(
        capsys, "--sets", f"custom={tmp_path / 'tables'}"
    )


def test_columns_of_any_name_and_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_table(tmp_path / "a.parquet", ["dog", "cat"], Value("string"), "photo")
    assert listed(file).class_names == ("cat", "dog") and listed(file).decode(0, "RGB").size == (24, 16)
    Dataset.from_dict({"photo": [jpeg()], "target": [3]}).to_parquet(tmp_path / "b.parquet")  # a column of bytes
    assert listed(tmp_path / "b.parquet").labels.tolist() == [3]
    assert listed(tmp_path / "b.parquet").decode(0, "L").size == (24, 16)
    rows = {"image": [{"bytes": jpeg(), "path": None}], "json": [{"label": "cat", "width": 3}]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "c.parquet")
    assert listed(tmp_path / "c.parquet").class_names == ("cat",)
    declared = ClassLabel(names=["one", "two"])
    Dataset.from_dict(
        {"image": [jpeg()], "label": ["x"], "fine": [1]},
        Features(image=Value("binary"), label=Value("string"), fine=declared),
    ).to_parquet(tmp_path / "d.parquet")
    assert listed(tmp_path / "d.parquet").class_names == ("one", "two")  # as training does
    several = write_table(tmp_path / "e.parquet", ["x"], Value("string"), thumb=[None], species=["y"])
    message = refusal(capsys, "--sets", f"custom={several}")
    assert "could be any of image, thumb; say which with --image-column NAME" in message
    chosen = listed(several, choices=replace(AS_USUAL, image_column="image", label_column="species"))
    assert chosen.class_names == ("y",)
    thumbs = listed(several, choices=replace(AS_USUAL, image_column="thumb"))
    assert scoring.Images(thumbs, {"input_size": (3, 8, 8)})[0] == (0, "there is no image in this row")
    message = refusal(capsys, "--sets", f"custom={several}", "--image-column", "image", "--label-column", "kind")
    assert "--label-column kind is no column of" in message and "allowed: label, thumb, species" in message
    for feature, values in ((Value("float32"), [1.5]), (Value("bool"), [True]), ([Value("float32")], [[1.5]])):
        odd = write_table(tmp_path / "f.parquet", values, feature)
        message = refusal(capsys, "--sets", f"custom={odd}")
        assert "the column 'label' of " in message and "allowed: class labels, integers, strings" in message
    save(tmp_path / "folder" / "cat" / "x.png", jpeg())
    message = refusal(capsys, "--sets", f"custom={tmp_path / 'folder'}", "--image-column", "image")
    assert "--image-column and --label-column are for parquet files, tars and Hub data sets" in message
    message = refusal(capsys, "--sets", f"in1k={tmp_path / 'folder'}", "--label-column", "x")
    assert "are for --sets custom=PATH, which is not asked for" in message


def test_tars_of_mixed_endings_and_words(tmp_path: Path) -> None:
    files = {"0.jpg": jpeg(), "0.cls": b"cat", "0.txt": b"a cat", "1.PNG": jpeg(), "1.json": b'{"label": "dog"}'}
    files |= {"2.tif": jpeg(), "2.class": b"dog\n", "3.heic": b"", "3.cls": b"cat"}
    listing = listed(tar_of(tmp_path / "x.tar", files))
    assert classes_of(listing) == {"x.tar/0": "cat", "x.tar/1": "dog", "x.tar/2": "dog", "x.tar/3": "cat"}
    images = scoring.Images(listing, {"input_size": (3, 8, 8)})
    assert images[3] == (3, "there is no image in this row") and not isinstance(images[2][1], str)  # as in training
    [row] = open_source(DataConfig(source=str(tmp_path), validation=str(tmp_path))).train.encoded([3])
    assert row.data is None


@pytest.mark.parametrize(
    "label, problem",
    [
        (b"null", 'have neither a .cls nor a "label" in a .json'),
        (b"[1]", "0.json.label is [1]; allowed as a label: an integer or a string"),
        (b"1.5", "0.json.label is 1.5; allowed as a label: an integer or a string"),
        (b"true", "0.json.label is True; allowed as a label: an integer or a string"),
        (b'""', "are none of its classes: '' in 1 row; allowed: a name in each row"),
    ],
)
def test_labels_in_json_that_are_none(
    label: bytes, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = tar_of(tmp_path / "x.tar", {"0.jpg": jpeg(), "0.json": b'{"label": %b}' % label})
    for name in ("custom", "in1k"):
        assert problem in refusal(capsys, "--sets", f"{name}={tar}")


def write_tree(folder: Path) -> None:
    """Names of classes that sort alike, are no ASCII, or are spelt as macOS does; images of several kinds, deeper."""
    lion = unicodedata.normalize("NFD" if folder.name == "val" else "NFC", "Löwe")
    for number, name in enumerate(["A", "a", "1", "01", "2", "10", "①", "5²", lion, "train", "val"]):
        save(folder / name / "deep" / os.fsdecode(b"caf\xe9.JPG"), jpeg(2 * number))
        save(folder / name / "x.tif", as_tiff(pixels(2 * number + 1)))


def write_tars(
    folder: Path, labels: Sequence[object], endings: Sequence[str] = (".jpg",), sidecar: str = ".cls"
) -> None:
    files = {}
    for number, label in enumerate(labels):
        text = json.dumps({"label": label}) if sidecar == ".json" else str(label)
        files |= {f"{number}{endings[number % len(endings)]}": jpeg(number), f"{number}{sidecar}": text.encode()}
    folder.parent.mkdir(exist_ok=True)
    tar_of(folder.with_name(f"{folder.name}-0.tar"), files)


def write_tree_in_tar(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    names = [f"./pics/{name}/deep/{number}.jpg" for number, name in enumerate(["b", "a", "10", "9"])]
    tar_of(folder.with_name(f"{folder.name}.tar"), {name: jpeg(number) for number, name in enumerate(names)})


def write_rows(folder: Path, labels: Sequence[object], feature: object, **columns: str) -> None:
    write_table(folder.parent / "data" / f"{folder.name}-00000.parquet", labels, feature, **columns)


SOURCES: dict[str, Callable[[Path], None]] = {
    "folders": write_tree,
    "numbers": partial(write_tars, labels=[0, 2, 1, 1]),
    "numbers from 1": partial(write_tars, labels=[1, 2, 3, 3]),
    "words": partial(write_tars, labels=["cat", "dog", "Cat", "cat"], endings=(".jpg", ".JPEG", ".png")),
    "words and numbers": partial(write_tars, labels=["cat", 1, 2, "x"], sidecar=".class"),
    "digits in json": partial(write_tars, labels=["1", "2", "3", "1"], sidecar=".json"),
    "words in json": partial(write_tars, labels=["b", "a", "b", "a"], sidecar=".json"),
    "folders in tars": write_tree_in_tar,
    "integers": partial(write_rows, labels=[0, 2, 1], feature=Value("int32")),
    "digits": partial(write_rows, labels=["10", "9", "1"], feature=Value("string"), image="photo"),
    "strings": partial(write_rows, labels=["b", "B", "a"], feature=Value("string"), label="class"),
    "declared": partial(write_rows, labels=[1, 0, 1], feature=ClassLabel(names=["q", "p"]), label="species"),
    "mappings": partial(write_rows, labels=[{"label": "a"}] * 2, feature={"label": Value("string")}, label="json"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_training_and_custom_find_the_same(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "source"
    for split in ("train", "val"):
        SOURCES[kind](root / split)
    source = open_source(DataConfig(source=str(root)))
    labelled = labels.label("custom", listed(root), source.class_names, len(source.class_names))
    theirs = [(image.tobytes(), label) for image, label, _ in (source.test[i] for i in range(len(source.test)))]
    ours = [(labelled.listing.decode(i, "RGB").tobytes(), int(label)) for i, label in enumerate(labelled.targets)]
    assert sorted(ours) == sorted(theirs) and len(set(ours)) == len(ours) > 1
    if kind != "digits in json":  # which are names to training, whose saved model has them
        by_place = labels.label("custom", labelled.listing, (), len(source.class_names))
        assert np.array_equal(by_place.targets, labelled.targets)


def test_patterns_with_braces(tmp_path: Path) -> None:
    for number in range(3):
        shard_of(tmp_path / f"x-{number}.tar", [number])
    assert sorted(listed(tmp_path / "x-{1..2}.tar").labels) == [1, 2]


# Labels that cannot be right


@pytest.mark.parametrize("name", ["custom", "in1k", "sketch", "v2", "a"])
@pytest.mark.parametrize("kind", ["declared", "numbers", "tar"])
def test_hidden_labels_are_refused_before_anything_runs(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.scoring.models.load", lambda *_: pytest.fail("the model was loaded"))
    labels = [-1, 0, 1, -1]
    if kind == "tar":
        place = shard_of(tmp_path / "x.tar", labels)
    else:
        names = WNIDS if name != "v2" else [str(number) for number in range(1000)]
        feature = ClassLabel(names=names) if kind == "declared" else Value("int64")
        place = write_table(tmp_path / "x.parquet", labels, feature)
    message = refusal(capsys, "--sets", f"{name}={place}")
    assert f"2 of the 4 labels of {place} are none of its classes: -1 in 2 rows; allowed: 0 to " in message
    assert "(-1 or none marks hidden labels on the Hub: take another split)" in message


def test_missing_labels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for feature in (ClassLabel(names=["a", "b"]), Value("int64"), Value("string")):
        some = "0" if feature == Value("string") else 0
        file = write_table(tmp_path / "x.parquet", [some, None, "" if some == "0" else None], feature)
        for name in ("custom", "in1k"):
            message = refusal(capsys, "--sets", f"{name}={file}")
            assert f"2 of the 3 labels of {file} are none of its classes: none in " in message


def test_labels_beyond_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_table(tmp_path / "x.parquet", [0, 10, 11, 11], Value("int64"))
    message = refusal(capsys, "--sets", f"custom={file}")
    assert "3 of 4 images have labels that cannot be right: 10 (1), 11 (2); allowed: 0 ... 9, the model's" in message
    file = write_table(tmp_path / "x.parquet", [5, 1000], Value("int64"))
    message = refusal(capsys, "--sets", f"in1k={file}", "--show-mapping")
    assert "1 of 2 images have labels that cannot be right: 1000 (1); allowed: 0 ... 999, the classes of" in message
    file = write_table(tmp_path / "x.parquet", [0], Value("int64"))
    table = pq.read_table(file)
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    table = table.set_column(1, "label", pa.array([2], pa.int64()))
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), file)
    assert "none of its classes: 2 in 1 row; allowed: 0 to 1\n" in refusal(capsys, "--sets", f"custom={file}")


def test_words_in_place_of_imagenets_classes_have_no_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand descriptions are indices by their place in a ClassLabel only; words come as in the alphabet."""
    tar = shard_of(tmp_path / "x.tar", [f"thing {999 - i}" for i in range(1000)])
    assert "1000 of 1000 classes are not among the 1000 classes" in refusal(capsys, "--sets", f"in1k={tar}")


# The model's names of its classes


def test_classes_without_images_are_marked(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits", range(40), "8-bit.png")
    (folder / "eight").rename(tmp_path / "gone")
    for file in (folder / "one").iterdir():
        file.unlink()
    [row] = run(tmp_path / "results.csv", "--sets", f"custom={folder}")
    assert row["warnings"] == "2 of the model's 10 classes have no images: 'one', 'eight'"
    assert row["classes"] == "8"
    assert len(labels.label("custom", listed(folder), (), 9).warnings) == 1  # by position, the empty folder counts
    numbers = write_table(tmp_path / "x.parquet", list(range(2, 10)), Value("int64"))
    labelled = labels.label("custom", listed(numbers), (), 10)
    assert labelled.warnings == ("2 of the model's 10 classes have no images: 0, 1",)


def test_names_of_classes_are_compared_in_one_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Löwe") for form in ("NFC", "NFD"))
    names = ["5²", "①", composed, "x"]
    for name in ("①", "5²", decomposed):
        save(tmp_path / "pics" / name / "1.png", jpeg())
    tar = tar_of(tmp_path / "x.tar", {f"pics/{name}/1.png": b"" for name in ("①", "5²", decomposed)})
    for listing in (listed(tmp_path / "pics"), listed(tar)):
        for known in (names, [unicodedata.normalize("NFD", name) for name in names]):
            labelled = labels.label("custom", listing, known, 4)
            found = {
                Path(file).parent.name: target for file, target in zip(listing.files, labelled.targets, strict=True)
            }
            assert sorted(found.values()) == [0, 1, 2] and found["①"] == 1
            assert labelled.warnings == ("1 of the model's 4 classes have no images: 'x'",)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    names = [description.split(",")[0] for description in ImageNetInfo().label_descriptions()]
    assert [i for i, name in enumerate(names) if name == "crane"] == [134, 517]
    for name in ("tench", "crane"):
        save(tmp_path / name / "1.png", jpeg())
    with pytest.raises(ValueError, match="classes 134 and 517 are all called 'crane', so which is meant is unknown"):
        labels.label("custom", listed(tmp_path), names, 1000)
    (tmp_path / "crane" / "1.png").unlink()
    assert labels.label("custom", listed(tmp_path), names, 1000).targets.tolist() == [0]


def test_classes_that_the_model_does_not_have_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("one/1.png", "cat/1.png", "cat/2.png"):
        save(tmp_path / "set" / file, jpeg())
    message = refusal(capsys, "--sets", f"custom={tmp_path / 'set'}")
    assert "the model has no classes 'cat', which 2 of 3 images are of; it has 'zero', 'one'" in message


def test_numbers_are_names_where_the_model_has_no_others(tmp_path: Path) -> None:
    numbers = listed(write_table(tmp_path / "x.parquet", [1, 3, 2], Value("int64")))
    assert labels.label("custom", numbers, ["1", "2", "3"], 3).targets.tolist() == [0, 2, 1]
    assert labels.label("custom", numbers, ["zero", "one", "two", "three"], 4).targets.tolist() == [1, 3, 2]
    texts = listed(write_table(tmp_path / "y.parquet", ["10", "9"], Value("string")))  # names, as in training
    assert labels.label("custom", texts, (), 2).targets.tolist() == [1, 0]


def test_names_of_other_classes_are_no_names(tmp_path: Path) -> None:
    """transformers' Trainer keeps those of the classes that a model had before."""
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": list(DIGIT_NAMES)})
    assert models.load("test_vit", str(tmp_path)).label_names == ()


# Order, names and numbers


def test_the_order_of_classes_is_the_same_everywhere(tmp_path: Path) -> None:
    """Names that timm's order does not tell apart: sorted by themselves, not by the disk or Python's hash seed."""
    tied = [name for letter in "abcdefgh" for name in (letter.upper(), letter)] + ["01", "1", "002", "02", "2"]
    expected = ("01", "1", "002", "02", "2", *tied[:16])
    tar = tar_of(tmp_path / "x.tar", {f"all/{name}/x.jpg": b"" for name in tied})
    for name in tied:
        save(tmp_path / "folder" / name / "x.jpg", jpeg())
    assert listed(tar).class_names == listed(tmp_path / "folder").class_names == expected
    assert listed(shard_of(tmp_path / "y.tar", tied[:16])).class_names == tuple(tied[:16])
    assert listed(write_table(tmp_path / "z.parquet", tied, Value("string"))).class_names == expected
    assert labels.open_set("in1k", [str(tmp_path / "folder")]).class_names == expected


@pytest.mark.parametrize("name", ["custom", "in1k"])
def test_names_of_files_that_are_no_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "set" / "n01440764" / "whole.png", jpeg())
    odd = os.fsencode(tmp_path / "set" / "n01440764") + b"/caf\xe9"
    for ending, data in ((b".png", jpeg()), (b"2.jpg", b"damaged"), (b".txt", b"no image")):
        with open(odd + ending, "wb") as file:
            file.write(data)
    model = timm.create_model("test_vit", num_classes=1 if name == "custom" else 1000)
    weights = tmp_path / os.fsdecode(b"mod\xe9l")
    timm.models.save_for_hf(model, weights)
    words = ["--weights", str(weights), "--sets"]
    output = tmp_path / "results.csv"
    [row] = run(output, *words, f"{name}={tmp_path / 'set'}", models=["test_vit"])
    assert (row["n"], row["undecodable"], row["weights"]) == ("2", "1", "mod\\udce9l")
    assert "1 undecodable, not in n: set/n01440764/caf\\xe92.jpg" in row["warnings"]
    assert ("files left out as no images (1): n01440764/caf\\xe9.txt" in row["warnings"]) == (name == "custom")
    assert "undecodable: set/n01440764/caf\\xe92.jpg: " in capsys.readouterr().err
    assert len(run(output, *words, f"{name}={tmp_path / 'set'}", models=["test_vit"])) == 1  # finished before
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "set", "set")
    tar = labels.label(name, labels.open_set(name, [str(tmp_path / "x.tar")]), (), 1)
    assert [len(tar.listing), len(tar.fingerprint())] == [3, 64]


def test_names_of_folders_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/s\xe9t/caf\xe9")
    place = tmp_path / os.fsdecode(b"s\xe9t")
    save(place / os.fsdecode(b"caf\xe9") / "x.png", jpeg())
    message = refusal(capsys, "--sets", f"custom={place}")
    assert "caf\\xe9" in message and "is not UTF-8; rename the folder" in message
    save(place / "three" / "x.png", jpeg())
    assert "not among the 1000 classes" in refusal(capsys, "--sets", f"in1k={place}")
    (place / os.fsdecode(b"caf\xe9")).rename(tmp_path / "gone")
    [row] = run(tmp_path / "results.csv", "--sets", f"custom={place}")
    assert row["n"] == "1"


@pytest.mark.slow
def test_thousands_of_classes_are_matched_at_once(tmp_path: Path) -> None:
    count = 21_841  # of ImageNet-21k
    names = [Counted(f"n{i:08}") for i in range(count)]
    rows = {"image": [{"bytes": b"", "path": None}] * count, "label": list(range(count))}
    features = Features(image=ImageFeature(), label=ClassLabel(names=names))
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "x.parquet")
    listing = replace(listed(tmp_path / "x.parquet"), class_names=tuple(names))
    before = Counted.looks
    labelled = labels.label("custom", listing, names[::-1], count)
    labelled.fingerprint()
    with pytest.raises(ValueError, match="are not among the 1000 classes"):
        labels.label("in1k", listing)
    assert Counted.looks - before < 20 * count
    assert labelled.targets.tolist() == list(range(count))[::-1]


def test_one_data_set_of_the_hub_is_scored_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sets", "custom=owner/name", f"custom={shard_of(tmp_path / 'x.tar', [0])}"]
    assert "owner/name: a data set of the Hub is scored alone" in refusal(capsys, *words)
