"""Label spaces against timm's lists, metrics on hand-made logits, and what is refused with which message."""

import argparse
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from safetensors.torch import save_file
from scipy.stats import binomtest
from timm.data import ImageNetInfo

from eval import __main__ as program
from eval import tables
from eval.command_line import guarded
from eval.scoring import labels, metrics, sets
from tests import ROOT

WNIDS = ImageNetInfo().label_names()
INFO = Path(timm.data.__file__).parent / "_info"


def image_bytes() -> bytes:
    out = io.BytesIO()
    Pillow.new("RGB", (8, 8), "red").save(out, "JPEG")
    return out.getvalue()


def tree(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes())
    return root


def label(name: str, path: Path | str) -> labels.LabelledSet:
    return labels.label(name, labels.open_set(name, [str(path)]))


# metrics


def test_ranks_and_scores_of_hand_made_logits() -> None:
    logits = torch.tensor([[0.0, 3, 1, 2, -1, -2], [5, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]])
    classes, confidence = metrics.rank(logits)
    assert classes.tolist() == [[1, 3, 2, 0, 4], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1]]  # ties by class index
    assert confidence == pytest.approx(logits.softmax(1).max(1).values.numpy())
    score = metrics.score(classes, confidence, np.array([[1], [4], [0]]))
    assert (score["n"], score["top1"], score["top5"]) == pytest.approx((3, 100 / 3, 200 / 3))


def test_other_classes_are_left_out_before_the_argmax() -> None:
    classes, confidence = metrics.rank(torch.tensor([[9.0, 1, 2, 8]]), [1, 2])
    assert classes.tolist() == [[2, 1, -1, -1, -1]]
    assert confidence[0] == pytest.approx(1 / (1 + np.exp(-1)))


def test_any_of_several_right_classes_counts() -> None:
    none = metrics.NO_CLASS
    classes, confidence = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, -1, -1, -1]]), np.full(3, 0.5)
    score = metrics.score(classes, confidence, np.array([[7, 1], [3, none], [none, none]]))
    assert (score["n"], score["top1"], score["top5"]) == pytest.approx((3, 100 / 3, 200 / 3))
    empty = metrics.score(classes[:0], confidence[:0], np.zeros((0, 2), dtype=int))
    assert empty.pop("n") == 0 and np.isnan(list(empty.values())).all()


def test_calibration_error_of_two_bins() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.35, 0.35])
    correct = np.array([True, True, True, False, False, True])
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(100 * (4 * 0.2 + 2 * 0.15) / 6)
    apart, correct = np.array([0.62, 0.68]), np.array([True, False])  # on either side of 10 / 15
    assert metrics.expected_calibration_error(apart, correct) == pytest.approx(100 * (0.38 + 0.68) / 2)


def test_wilson_interval() -> None:
    for correct, n in ((41_600, 50_000), (3, 7), (7, 7)):
        theirs = binomtest(correct, n).proportion_ci(method="wilson")
        assert metrics.wilson(correct, n) == pytest.approx((100 * theirs.low, 100 * theirs.high))
    assert metrics.wilson(0, 10)[0] == 0
    assert np.isnan(metrics.wilson(0, 0)).all()


def test_lists_are_timms() -> None:
    for name, count in (("a", 200), ("r", 200)):
        synsets = (INFO / f"imagenet_{name}_synsets.txt").read_text().split()
        assert len(set(labels.candidates(name))) == count
        assert [WNIDS[i] for i in labels.candidates(name)] == list(labels.class_list(name)) == synsets
    assert len(set(labels.candidates("a")) & set(labels.candidates("r"))) == 86
    assert list(labels.class_list("in1k")) == WNIDS == sorted(WNIDS)
    assert len(labels.real_labels()) == 50_000
    assert sum(map(bool, labels.real_labels())) == sets.SETS["real"].images == 46_837


# label spaces


def test_every_folder_of_v2_is_its_number(tmp_path: Path) -> None:
    labelled = label("v2", tree(tmp_path, *(f"{i}/x.jpeg" for i in range(1000))))
    by_folder = {
        Path(file).parent.name: int(t) for file, t in zip(labelled.listing.files, labelled.targets, strict=True)
    }
    assert by_folder == {str(i): i for i in range(1000)}


def test_every_wnid_is_its_rank(tmp_path: Path) -> None:
    labelled = label(
        "in1k", tree(tmp_path, *(f"train/{w}/y.JPEG" for w in WNIDS[:2]), *(f"val/{w}/x.JPEG" for w in WNIDS))
    )
    assert labelled.targets.tolist() == list(range(1000))  # and train's images are not in


def test_release_folders_are_found_below(tmp_path: Path) -> None:
    root = tree(tmp_path, "ILSVRC/Data/train/n01440764/1.JPEG", "ILSVRC/Data/val/n01443537/1.JPEG", "notes/x.png")
    assert label("in1k", root).listing.files == [f"{tmp_path.name}/ILSVRC/Data/val/n01443537/1.JPEG"]


@pytest.mark.parametrize("name", ["a", "r"])
def test_bare_numbers_of_200_classes(name: str, tmp_path: Path) -> None:
    indices = labels.candidates(name)

    def targets(numbers: list[int]) -> list[int]:
        rows = [{"image": {"bytes": image_bytes(), "path": None}, "label": n} for n in numbers]
        file = tmp_path / "set.parquet"
        Dataset.from_list(rows, Features(image=Image(), label=Value("int64"))).to_parquet(file)
        return label(name, file).targets.tolist()

    assert targets(list(range(200))) == list(indices)
    assert targets([indices[3], indices[190]]) == [indices[3], indices[190]]
    foreign = next(n for n in range(200) if n not in indices)
    assert targets([foreign]) == [indices[foreign]]  # no class index, so a position
    with pytest.raises(ValueError, match=r"could be class indices 0 ... 999 or positions 0 ... 199; name the classes"):
        targets([indices[0], indices[1]])
    with pytest.raises(ValueError, match="are not among the 200 class indices"):
        targets([foreign, indices[-1]])


def test_class_labels_with_descriptions_need_all_thousand(tmp_path: Path) -> None:
    def targets(name: str, names: list[str]) -> list[int]:
        rows = [{"image": {"bytes": image_bytes(), "path": None}, "label": 7}]
        file = tmp_path / "set.parquet"
        Dataset.from_list(rows, Features(image=Image(), label=ClassLabel(names=names))).to_parquet(file)
        return label(name, file).targets.tolist()

    assert targets("in1k", [f"thing {i}" for i in range(1000)]) == [7]
    with pytest.raises(ValueError, match="1 of 1 classes are not among the 200 classes of ImageNet-A: 'thing 7'"):
        targets("a", [f"thing {i}" for i in range(200)])


def test_objectnets_list_is_of_classes_of_imagenet() -> None:
    """Facts of the release: 113 folders; most of them stand for one class of ImageNet-1k, none shares a class."""
    listed = labels.class_list("objectnet")
    meant = [index for indices in listed.values() for index in indices]
    assert len(listed) == sets.SETS["objectnet"].classes == 113
    assert len(meant) == len(set(meant)) == 125 and max(map(len, listed.values())) == 3
    describe = ImageNetInfo().index_to_description
    names = {folder: list(map(describe, listed[folder])) for folder in ("alarm_clock", "t-shirt", "wheel")}
    assert names["alarm_clock"] == ["analog clock", "digital clock"]
    assert names["t-shirt"] == ["jersey, T-shirt, tee shirt"]
    assert names["wheel"] == ["car wheel", "paddlewheel, paddle wheel"]


def test_classes_of_a_list_are_told_apart_by_their_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "CLASSES", tmp_path)
    first, second, third = WNIDS[:3]
    (tmp_path / "objectnet.csv").write_text(f"class,wnids\ncup,{first} {second}\nmug,{first} {third}\n")
    labels.class_list.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"classes/objectnet\.csv: classes that differ have the same first wnid"):
            labels.class_list("objectnet")
        (tmp_path / "objectnet.csv").write_text(f"class,wnids\ncup,{first} {second}\nmug,{third} {first}\n")
        assert labels.class_list("objectnet") == {"cup": (0, 1), "mug": (2, 0)}
    finally:
        labels.class_list.cache_clear()


@pytest.mark.slow
def test_a_new_subset_is_a_row_and_a_list(tmp_path: Path) -> None:
    """In a process of its own, which reads a table with one row more; a table of results without it is read, too."""
    old = tmp_path / "old.csv"
    tables.append(old, [{"model": "m", "set": "in1k"}])
    code = f"""
import dataclasses
from pathlib import Path
from eval.scoring import sets

sets.SETS["tiny"] = dataclasses.replace(sets.SETS["a"], name="tiny", title="Tiny", classes=3, class_list="tiny.txt")
sets.SUBSETS += ("tiny",)
from eval import tables
from eval.board import columns, entries
from eval.scoring import labels

labels.CLASSES = Path({str(tmp_path)!r})
assert labels.candidates("tiny") == [4, 7, 9], labels.candidates("tiny")
assert tables.COLUMNS[14:17] == ("clean3_tiny_n", "clean3_tiny_top1", "clean3_tiny_top5"), tables.COLUMNS
[row] = tables.read(Path({str(old)!r}))
assert row["clean3_tiny_top1"] == "" and row["model"] == "m"
row |= {{"set": "tiny", "limit": "", "n": "3", "top1": "50", "weights_sha256": "", "params_m": "1"}}
[entry] = entries.measured_entries([row | {{"clean3_tiny_top1": "75"}}])
[figures] = columns.board([entry])
assert figures["Tiny"] == (50, 2) and figures["clean TINY"] == (75, 2), figures
"""
    (tmp_path / "tiny.txt").write_text("4\n7\n9\n")
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_objectnet_leaves_out_classes_that_imagenet_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ("alarm_clock", "squeegee", "t-shirt", "air_freshener")
    root = tree(tmp_path / "objectnet-1.0", *(f"images/{folder}/x.png" for folder in folders))
    labelled = label("objectnet", root)
    assert labelled.listing.files == ["images/alarm_clock/x.png", "images/t-shirt/x.png"]
    assert labelled.targets.tolist() == [409, 610]
    assert labelled.answers(False)["objectnet"].tolist() == [[409, 530], [610, metrics.NO_CLASS]]
    assert labelled.warnings == ("2 images instead of 18574", "2 classes instead of 113")
    assert program.main(["--sets", f"objectnet={root}", "--show-mapping", "--device", "cpu"]) == 0
    assert "-> class 409 analog clock or class 530 digital clock" in capsys.readouterr().out
    message = refusal(capsys, "--sets", f"objectnet={tree(tmp_path / 'x', 'a/1.png', 'b/1.png')}", "--show-mapping")
    assert "2 of 2 classes are not among the 113 classes of ObjectNet: 'a', 'b'; each class needs a folder" in message


def test_objectnets_border_is_cut_off(tmp_path: Path) -> None:
    image = Pillow.new("RGB", (12, 10), "red")
    image.paste((0, 0, 255), (2, 2, 10, 8))
    (tmp_path / "mug").mkdir()
    image.save(tmp_path / "mug" / "x.png")
    listing = labels.open_set("objectnet", [str(tmp_path)])
    assert listing.decode(0, "RGB").getcolors() == [(8 * 6, (0, 0, 255))]


def test_the_record_of_sets_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for name, spec in sets.SETS.items():
        assert name == sets.CUSTOM or (spec.images and spec.card_name and spec.source.startswith("https://"))
    assert sets.SUBSETS == ("a", "r")
    assert program.main([]) == 0
    shown = capsys.readouterr().out
    for command in ("eval", "eval.verify", "eval.throughput", "eval.scan", "eval.leaderboard"):
        assert f"python -m {command} " in shown
    assert all(f"  {name} " in shown for name in sets.SETS)


def test_real_labels_go_by_file_name(tmp_path: Path) -> None:
    names = ["ILSVRC2012_val_00000003", "ILSVRC2012_val_00000002_n01440764"]  # the second as on the Hub
    labelled = label("in1k", tree(tmp_path, f"{WNIDS[0]}/{names[0]}.JPEG", f"{WNIDS[0]}/{names[1]}.JPEG"))
    found = dict(
        zip([Path(f).stem for f in labelled.listing.files], labels.real_label_sets(labelled.listing), strict=True)
    )
    assert found == {names[0]: labels.real_labels()[2], names[1]: labels.real_labels()[1]}


def test_mapping_of_three_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path, *(f"{i}/x.jpeg" for i in (2, 10, 999)))
    assert program.main(["--sets", f"v2={root}", "--show-mapping", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "10/x.jpeg: label 10 -> class 10 brambling, Fringilla montifringilla" in lines[0]


def test_mapping_of_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some, empty = (next(k for k, s in enumerate(labels.real_labels()) if bool(s) == has) for has in (True, False))
    names = [f"{WNIDS[0]}/ILSVRC2012_val_{k + 1:08d}.JPEG" for k in (some, empty)]
    root = tree(tmp_path, *names)
    assert program.main(["--sets", f"in1k={root}", "real", "--show-mapping", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["in1k", "in1k", "real", "real"]
    [first] = [line for line in lines[2:] if names[0] in line]
    assert all(f"class {c} " in first for c in labels.real_labels()[some])
    assert any(line.endswith("no label, not in n") for line in lines[2:])


# refusals: one line on stderr, exit code 1, no traceback


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert program.main([*words, "--device", "cpu", "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "name, files, message",
    [
        ("in1k", ["n01440764/x.JPEG", "n99999999/x.JPEG"],
         "1 of 2 classes are not among the 1000 classes of ImageNet-1k: 'n99999999'"),
        ("a", ["n01498041/x.jpg", "n01440764/x.jpg"], "not among the 200 classes of ImageNet-A: 'n01440764'"),
        ("sketch", ["sketch/tench/x.JPEG", "sketch/shark/x.JPEG"],
         "each class needs a folder or label named as in the release: 'n01440764', 'n01443537' and 998 more"),
        ("v2", ["0/x.jpeg", "1000/x.jpeg"],
         "1 of 2 classes are not among the 1000 classes of ImageNet-V2: '1000'; each class needs a folder or label "
         "named as in the release: '0', '1' and 998 more"),
        ("v2", ["n01440764/x.jpeg", "n01443537/x.jpeg"], "of ImageNet-V2: 'n01440764', 'n01443537'"),
        ("v2", ["0/x.jpeg", "007/x.jpeg"], "of ImageNet-V2: '007'"),
        ("in1k", ["val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG"],
         "all 2 images lie flat in one folder, so their classes are unknown; put ILSVRC2012_img_val.tar"),
        ("v2", ["a.jpeg", "b.jpeg"], "each class needs a folder of its own"),
        ("in1k", ["n01440764/readme.txt"], "no images (.jpeg, .jpg, .png, .webp) in"),
    ],
)  # fmt: skip
def test_trees_that_are_refused(
    name: str, files: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "set", *files)
    assert message in refusal(capsys, "--sets", f"{name}={root}", "--show-mapping")


def test_flat_release_tar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ILSVRC2012_img_val.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(2):
            info = tarfile.TarInfo(f"ILSVRC2012_val_{i + 1:08d}.JPEG")
            info.size = len(image_bytes())
            archive.addfile(info, io.BytesIO(image_bytes()))
    assert "torchvision.datasets.ImageNet('FOLDER', split='val')" in refusal(
        capsys, "--sets", f"in1k={path}", "--show-mapping"
    )


def test_real_without_file_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "set", "n01440764/1.JPEG")
    message = refusal(capsys, "--sets", f"in1k={root}", "real", "--show-mapping")
    assert "1 of 1 images of in1k=" in message
    assert "give in1k with its original file names, or leave real out" in message


def test_damaged_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set.parquet").write_bytes(b"no parquet")
    assert "as parquet:" in refusal(capsys, "--sets", f"in1k={tmp_path / 'set.parquet'}", "--show-mapping")
    tree(tmp_path / "big", *(f"n01440764/{i}.JPEG" for i in range(30)))
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "big", "big")
    data = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "set.tar").write_bytes(data[: len(data) // 2 + 100])
    assert "cannot read the tar" in refusal(capsys, "--sets", f"in1k={tmp_path / 'set.tar'}", "--show-mapping")
    (tmp_path / "set.zip").write_bytes(b"PK")
    message = refusal(capsys, "--sets", f"in1k={tmp_path / 'set.zip'}", "--show-mapping")
    assert "expected one folder, or tar files only, or parquet files only" in message


@pytest.mark.parametrize(
    "words, message",
    [
        (["real"], "--sets real scores the images of in1k by other labels; add in1k=PATH"),
        (["real=x"], "real takes no path"),
        (["v3=x"], "--sets v3=x: allowed are real and NAME=PATH with NAME one of in1k, v2,"),
        (["in1k"], "allowed are real and NAME=PATH"),
        (
            ["in1k=no_such"],
            "--sets in1k: no file or folder 'no_such', and it is no Hub dataset id (OWNER/NAME) either",
        ),
    ],
)
def test_words_of_sets(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(capsys, "--sets", *words, "--show-mapping")


def test_models_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "set", "n01440764/1.JPEG")
    output = tmp_path / "results.csv"
    file = tmp_path / "head10.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), file)

    def refused(*words: str) -> str:
        return refusal(capsys, "--sets", f"in1k={root}", "--output", str(output), *words)

    assert "nothing to score: name models with --models" in refused()
    assert "unknown model 'test_vita'; did you mean test_vit" in refused("--models", "test_vita")
    assert "the weights of arm_base_patch16_224.in1k are not hosted yet: give them with --weights FILE" in refused(
        "--models", "arm_base_patch16_224.in1k"
    )
    timm.models.save_for_hf(timm.create_model("test_vit", in_chans=4), tmp_path / "four")
    message = refused("--models", f"local-dir:{tmp_path / 'four'}")
    assert "takes images of 4 channels; allowed: models of 1 or 3" in message
    assert "no file or folder 'gone.pth'" in refused("--models", "test_vit", "--weights", "gone.pth")
    assert "with several models, type MODEL=FILE once for each" in refused(
        "--models", "test_vit", "test_vit2", "--weights", str(file)
    )
    assert "names a model twice" in refused("--models", "test_vit", "test_vit", "--weights", f"test_vit={file}")
    message = refused("--models", "test_vit", "--weights", str(file))
    assert "test_vit has 10 classes, in1k is for models of ImageNet's 1000" in message
    assert "--sets custom=PATH" in message
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "other.pth")
    assert "has no classifier" in refused("--models", "test_vit", "--weights", str(tmp_path / "other.pth"))
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:1000])
    assert "cannot read the checkpoint" in refused(
        "--models", "test_vit", "--weights", str(tmp_path / "torn.safetensors")
    )
    folder = tmp_path / "folder"
    timm.models.save_for_hf(timm.create_model("test_vit2"), folder)
    assert "are of test_vit2, not of test_vit" in refused("--models", "test_vit", "--weights", str(folder))
    assert not output.exists()


def test_output_is_checked_before_anything_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    words = ["--sets", "in1k=x", "--show-mapping", "--output"]
    assert "must be a .csv file in a folder that exists" in refusal(capsys, *words, str(tmp_path / "no" / "x.csv"))
    assert "is another table: it lacks the columns model, set" in refusal(capsys, *words, str(tmp_path / "other.csv"))


def test_columns_of_other_people_stay(tmp_path: Path) -> None:
    output = tmp_path / "results.csv"
    tables.append(output, [{"model": "first"}])
    head, row = output.read_text().splitlines()
    output.write_text(f"{head},comment\n{row},keep me\n")
    tables.append(output, [{"model": "second"}])
    assert [(row["model"], row["comment"]) for row in tables.read(output)] == [("first", "keep me"), ("second", "")]


def test_columns_of_older_versions_have_their_new_names(tmp_path: Path) -> None:
    output = tmp_path / "results.csv"
    tables.append(output, [{"model": "first", "warnings": "odd", "images": 7}])
    head, *rows = output.read_text().splitlines()
    old = head.replace("warnings", "marks").replace("images", "pictures")
    output.write_text("\n".join(["\ufeff" + old, "", *rows]))  # as Excel writes it, with an empty line
    tables.append(output, [{"model": "second"}])
    assert output.read_text().startswith(head + "\n")
    assert [(row["warnings"], row["images"]) for row in tables.read(output)] == [("odd", "7"), ("", "")]


def test_rows_are_appended_whole(tmp_path: Path) -> None:
    output = tmp_path / "results.csv"
    for i in range(3):
        tables.append(output, [{"model": f'm{i}, "quoted"', "set": "in1k", "n": i}])
    assert [row["model"] for row in tables.read(output)] == [f'm{i}, "quoted"' for i in range(3)]
    before = output.read_bytes()

    class Broken:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tables.append(output, [{"model": Broken()}])
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["results.csv"]


@pytest.mark.parametrize(
    "name, label, message",
    [
        ("1.json", b'{"width": 3}', "has the files jpg, json (width). Say where the label is"),
        ("1.json", b"5", "has the files jpg, json. Say where the label is"),
        ("1.json", b"{bad", "x.tar: 1.json holds no label: Expecting property name"),
        ("1.cls", b"\xff\xfe", "x.tar: 1.cls holds no label: 'utf-8' codec"),
        ("1.cls", b"9" * 23, "1 of 1 classes are not among the 1000 classes of ImageNet-V2: '99999999999999"),
    ],
)
def test_sidecars_without_label(
    name: str, label: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for file, data in (("1.jpg", image_bytes()), (name, label)):
            info = tarfile.TarInfo(file)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert message in refusal(capsys, "--sets", f"v2={tmp_path / 'x.tar'}", "--show-mapping")


def test_another_release_of_v2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "set", "imagenetv2-threshold0.7-format-val/0/1.jpeg")
    message = refusal(capsys, "--sets", f"v2={root}", "--show-mapping")
    assert (
        f"{root} has images of imagenetv2-threshold0.7-format-val; that is the set v2-threshold0.7={root}" in message
    )


def test_pipes_among_images_are_undecodable_ones(tmp_path: Path) -> None:
    """timm lists them, and would wait for ever for what they say."""
    root = tree(tmp_path / "set", "n01440764/1.JPEG")
    os.mkfifo(root / "n01440764" / "2.JPEG")
    pipe = os.open(root / "n01440764" / "2.JPEG", os.O_RDWR | os.O_NONBLOCK)  # so that opening it would succeed
    try:
        listing = labels.open_set("in1k", [str(root)])
        assert len(listing) == 2
        with pytest.raises(OSError, match=r"2\.JPEG is no regular file"):
            listing.decode(1, "RGB")
    finally:
        os.close(pipe)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run", interrupted)
    assert program.main(["--sets", "in1k=x"]) == 130
    assert capsys.readouterr().err == "stopped; python -m eval --resume goes on from here\n"
    assert guarded(interrupted, argparse.Namespace()) == 130  # as of eval.verify, which keeps nothing to go on with
    assert capsys.readouterr().err == "stopped\n"
    monkeypatch.setenv("RANK", "1")
    assert guarded(interrupted, argparse.Namespace()) == 130
    assert capsys.readouterr().err == ""


def test_devices_without_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--sets", "in1k=x", "--device", "meta"])
    assert "device 'meta' holds no numbers; expected cpu, cuda" in capsys.readouterr().err


def test_hub_datasets_that_are_not_to_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str, revision: str | None) -> None:
        raise ConnectionError("no such host\nin this test")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    message = refusal(capsys, "--sets", "in1k=data/val", "--show-mapping")
    assert "no file or folder 'data/val' here, and hf://data/val did not come from the Hub: ConnectionErr" in message
    found = SimpleNamespace(config=SimpleNamespace(data_files={"train": ["x"], "extra": ["y"]}))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda name, revision: found)
    message = refusal(capsys, "--sets", "in1k=data/val", "--show-mapping")
    assert "data/val has the splits train, extra; name the one to score: data/val:train" in message
    message = refusal(capsys, "--sets", "in1k=data/val:test", "--show-mapping")
    assert "data/val has no split 'test', only train, extra" in message
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refusal(capsys, "--sets", "in1k=data/val", "--show-mapping")
    assert "no file or folder 'data/val' here, and the Hub is switched off (HF_HUB_OFFLINE=1)" in message


@pytest.mark.parametrize("named, chosen", [("train valid", 1), ("train test", 1), ("train dev test", 1), ("a b", 2)])
def test_of_a_folder_of_parquet_files_the_validation_split_is_scored(named: str, chosen: int, tmp_path: Path) -> None:
    for number, word in enumerate(named.split()):
        rows = [{"image": {"bytes": image_bytes(), "path": None}, "label": number}]
        file = tmp_path / "data" / f"{word}-0.parquet"
        file.parent.mkdir(exist_ok=True)
        Dataset.from_list(rows, Features(image=Image(), label=Value("int64"))).to_parquet(file)
    assert label("in1k", tmp_path).targets.tolist() == ([1] if chosen == 1 else [0, 1])


@pytest.mark.parametrize("form", ["numbers", "words", "declared"])
def test_any_label_of_a_list_is_right(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image without a label is not in n, as one of ReaL's."""
    file, given = tmp_path / "set.parquet", [[7, 2], [], [9], [2, 7, 9]]
    inner = {"numbers": Value("int64"), "words": Value("string"), "declared": ClassLabel(names=WNIDS)}[form]
    held = [[WNIDS[i] for i in labels] if form == "words" else labels for labels in given]
    rows = [{"image": {"bytes": image_bytes(), "path": None}, "label": each} for each in held]
    Dataset.from_list(rows, Features(image=Image(), label=List(inner))).to_parquet(file)
    labelled, none = label("in1k", file), metrics.NO_CLASS
    expected = [[7, 2, none], [none, none, none], [9, none, none], [2, 7, 9]]
    assert labelled.answers(False)["in1k"].tolist() == expected
    assert labelled.targets.tolist() == [7, none, 9, 2] and labelled.classes.tolist() == [2, 7, 9]
    assert labelled.warnings == ("4 images instead of 50000", "3 classes instead of 1000")
    assert labelled.listing.decode(3, "RGB").size == (8, 8)
    listing = labelled.listing.select(np.array([3, 0]))
    chosen = labels.label("in1k", listing)
    assert chosen.answers(False)["in1k"].tolist() == [[2, 7, 9], [7, 2, none]]
    other = labels.label("in1k", replace(listing, label_sets=listing.label_sets[:, ::-1]))
    assert other.fingerprint() != chosen.fingerprint()
    assert program.main(["--sets", f"in1k={file}", "--show-mapping", "--device", "cpu"]) == 0
    said = "7 or 2" if form == "numbers" else f"{WNIDS[7]} or {WNIDS[2]}"
    lines = capsys.readouterr().out.splitlines()
    assert f"label {said} -> class 7 cock or class 2 great white shark" in lines[0]
    assert lines[1].endswith("-> no label, not in n")


def test_labels_of_a_list_that_are_no_class_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "set.parquet"
    rows = [{"image": {"bytes": image_bytes(), "path": None}, "label": each} for each in ([7, 1000], [-1])]
    for count, message in ((1, "1 of 1 images have labels that cannot be right: 1000 (1)"), (2, "-1 in 1 row")):
        features = Features(image=Image(), label=List(Value("int64")))
        Dataset.from_list(rows[:count], features).to_parquet(file)
        capsys.readouterr()
        assert message in refusal(capsys, "--sets", f"in1k={file}", "--show-mapping")


def test_parquet_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "set.parquet"
    Dataset.from_list([{"photo": "x", "label": 1}]).to_parquet(file)
    capsys.readouterr()
    message = refusal(capsys, "--sets", f"in1k={file}", "--show-mapping")
    assert f"the image column of {file} is none of photo, label" in message
    Dataset.from_list([{"image": {"bytes": image_bytes(), "path": None}}], Features(image=Image())).to_parquet(file)
    capsys.readouterr()
    message = refusal(capsys, "--sets", f"in1k={file}", "--show-mapping")
    assert f"the label column of {file} is missing;" in message
