"""The command line: what it prints, which images and models it takes, and one line for every mistake."""

import argparse
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_input_data_config
from timm.models import save_for_hf
from torch.nn import functional as F

import arm_zoo
from arm_zoo.__main__ import main, preprocessing
from arm_zoo.files import replacing_files, save_model
from arm_zoo.heads.models import Segmenter, save_segmenter
from arm_zoo.loading import load
from arm_zoo.models._builder import ARCHITECTURES
from arm_zoo.see.sheet import draw
from arm_zoo.weights import hosted
from arm_zoo.weights.tensor_names import to_official
from recipes.command_line import RECIPES

TINY, PICO = "arm_tiny_patch16_224", "arm_pico_patch2_8"
SMALL: dict[str, Any] = {"depth": 2, "img_size": 32}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """A colour photograph of nothing, wider than high, with no two pixels alike."""
    pixels = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(pixels, size=(48, 64), mode="bicubic").clamp(0, 1)[0]
    image = Image.fromarray((smooth * 255).byte().permute(1, 2, 0).contiguous().numpy())
    image.save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """What timm's save_for_hf writes for a small colour model with names for its classes."""
    model = timm.create_model(TINY, num_classes=4, **SMALL)
    torch.nn.init.normal_(model.head.weight)  # as initialised, all classes are nearly equally probable
    names = {"label_names": ["ant", "bee", "cat", "dog"]}
    save_for_hf(model, str(tmp_path / "colour"), model_config=names, safe_serialization=True)
    return tmp_path / "colour"


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    """The same for 8x8 grey images, as the quickstart writes it."""
    model = timm.create_model(PICO, depth=2)
    torch.nn.init.normal_(model.head.weight)
    save_for_hf(model, str(tmp_path / "digits"), model_config={"label_names": DIGITS}, safe_serialization=True)
    return tmp_path / "digits"


def answers(text: str) -> list[tuple[float, str]]:
    """The printed classes with their probabilities in percent."""
    return [(float(percent), name) for percent, name in re.findall(r"^ +([\d.]+)%  (.+)$", text, re.MULTILINE)]


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a person reads after a mistake: exit code 1, nothing on stdout and one line."""
    assert main([str(arg) for arg in argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.endswith("\n")
    assert len(captured.err.splitlines()) == 1
    return captured.err


# list and info


def test_without_a_command_the_help_leads_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "python -m arm_zoo predict cat.jpg" in out and "python -m arm_zoo COMMAND --help" in out
    assert len(out.splitlines()) < 40


def test_list_has_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line}
    tagged = {name for name in timm.list_models("arm_*_patch*", include_tags=True) if "." in name}
    assert tagged <= table.keys()
    base = table["arm_base_patch16_224.arm_in1k_ft_in1k"].split()
    assert base == ["3x224x224", "85.0", "M", "upstream"]
    assert table["arm_base_patch16_224.in1k"].split()[-2:] == ["not", "hosted"]
    assert table["arm_huge_patch16_384.arm_in1k_ft_in1k"].split()[:2] == ["3x384x384", "663.3"]
    assert table["arm_base_patch16_224.arm_in1k"].split()[1] == "84.3"  # the encoder has no head
    assert "arm_large is short for arm_large_patch16_224" in lines
    assert table["mae"].startswith("pretrains arm_pico, ") and table["mae"].endswith(", vim_huge")
    explained = {line.split()[0] for line in lines[lines.index("") :] if line}  # below the table
    assert explained >= {*lines[0].split()}, "each column has a line that says what it holds"
    for place in ("bundled", "hosted", "upstream", "not hosted"):
        assert f" {place}" in "\n".join(lines[lines.index("") :])


def test_the_readme_has_every_model(repo: Path) -> None:
    """In a row of its table `vim_small_...` is to be read as the row's first name with another size."""
    named = set[str]()
    for line in (repo / "README.md").read_text(encoding="utf-8").splitlines():
        first, *others = re.findall(r"`(\w+(?:\.{3})?)`", line) or [""]
        family_and_size = re.match(r"[a-z]+_[a-z]+_", first)
        rest = first[family_and_size.end() :] if family_and_size else ""
        named |= {first, *(name.replace("...", rest) for name in others)}
    assert named >= ARCHITECTURES.keys()


def test_list_knows_what_is_hosted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(hosted.TABLE, "arm_base_patch16_224.in1k", hosted.Weights("hosted"))
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    [row] = [line for line in lines if line.endswith("  hosted")]
    assert row.startswith("arm_base_patch16_224.in1k ")
    main(["info", "arm_base_patch16_224.in1k"])
    assert 'create_model("arm_base_patch16_224.in1k", pretrained=True)\n' in capsys.readouterr().out


def test_info_tells_what_the_entry_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "arm_base_patch16_stride8_448"]) == 0
    out = capsys.readouterr().out
    facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines() if line.startswith("  "))
    assert out.startswith("arm_base_patch16_stride8_448.arm_in1k_ft_in1k\n")
    assert facts["tags"] == "arm_in1k_ft_in1k (default)"
    assert facts["parameters"].startswith("87,204,328")
    assert facts["multiply-adds"].startswith("251,658.0 M per image (matrix products and convolutions; ")
    assert facts["patches"] == "16x16, stride 8x8, grid 55x55"
    assert (facts["width"], facts["depth"], facts["classes"]) == ("768", "12", "1000")
    assert (facts["input_size"], facts["crop_mode"], facts["crop_pct"]) == ("3x448x448", "squash", "1.0")
    assert (facts["interpolation"], facts["mean"]) == ("bicubic", "(0.485, 0.456, 0.406)")
    assert (facts["std"], facts["license"]) == ("(0.229, 0.224, 0.225)", "unknown")
    assert "2406.07537" in facts["paper"] and facts["weights"].endswith("from its authors' OliverRen/ARM")
    assert "pretrained=True)" in out
    assert main(["info", "arm_base_patch16_224.in1k"]) == 0
    out = capsys.readouterr().out
    assert "not hosted; load a .safetensors" in out and "pretrained_cfg_overlay=dict(file=PATH)" in out


def test_info_counts_multiply_adds(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: what each token passes through in each block, the patches' products, and the head's."""
    width, hidden, tokens, rank, states = 192, 512, 65, 12, 16
    mixer = 3 * width**2 + 4 * (rank + 2 * states) * width + 4 * rank * width
    products = 12 * tokens * (mixer + 3 * width * hidden) + 64 * 8 * 8 * 3 * width + width * 200
    assert main(["info", "arm_tiny_patch8_64"]) == 0
    out = capsys.readouterr().out
    assert round(products / 1e6, 1) == 352.2 and "  352.2 M per image " in out
    assert "do not count the recurrence itself" in out


def test_info_of_a_short_name_and_of_a_tag(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", "arm_large"])
    assert capsys.readouterr().out.startswith("arm_large_patch16_224.arm_in1k_ft_in1k\n")
    main(["info", "arm_large_patch16_224.arm_in1k"])
    out = capsys.readouterr().out
    assert out.startswith("arm_large_patch16_224.arm_in1k\n")
    assert "none (encoder without head)" in out


# predict


def test_predict_names_classes(colour_folder: Path, image_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(image_file), "--model", TINY, "--weights", str(colour_folder), "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == str(image_file)
    # by hand: squash to 32 / 0.875 pixels, crop the middle, normalise
    image = Image.open(image_file).resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
    pixels = torch.from_numpy(np.array(image)) / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    model = timm.create_model(f"local-dir:{colour_folder}", pretrained=True).eval()
    with torch.inference_mode():
        probabilities = model(pixels.permute(2, 0, 1)[None])[0].softmax(0) * 100
    expected = sorted(zip(probabilities.tolist(), ["ant", "bee", "cat", "dog"], strict=True), reverse=True)[:3]
    assert [name for _, name in answers(out)] == [name for _, name in expected]
    assert [percent for percent, _ in answers(out)] == pytest.approx([percent for percent, _ in expected], abs=0.06)


def test_predict_from_the_shell(digits_folder: Path, tmp_path: Path, repo: Path) -> None:
    """A whole process, with a damaged image between good ones: the others are classified, the exit code is 1."""
    for name, grey in (("first.png", 20), ("last.png", 200)):
        Image.new("L", (8, 8), grey).save(tmp_path / name)
    (tmp_path / "damaged.png").write_bytes((tmp_path / "first.png").read_bytes()[:40])
    images = [str(tmp_path / name) for name in ("first.png", "damaged.png", "missing.png", "last.png")]
    command = [sys.executable, "-m", "arm_zoo", "predict", *images, "--model", PICO, "--top", "1"]
    result = subprocess.run([*command, "--weights", str(digits_folder)], cwd=repo, capture_output=True, text=True)
    assert result.returncode == 1
    assert [line for line in result.stdout.splitlines() if not line.startswith(" ")] == [images[0], images[3]]
    assert len(answers(result.stdout)) == 2
    assert {name for _, name in answers(result.stdout)} <= set(DIGITS)
    damaged, missing = result.stderr.splitlines()
    assert damaged.startswith(f"{images[1]} cannot be decoded: ")
    assert missing == f"{images[2]}: no such file or folder"


@pytest.mark.parametrize("form", ["folder", "safetensors", "pth", "official"])
def test_weights_come_in_many_forms(
    form: str, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bare file tells its number of classes and channels, where the entry has others, but not the classes' names."""
    model = timm.create_model(PICO, num_classes=4, in_chans=3).eval()
    torch.nn.init.normal_(model.head.weight)
    folder, file = tmp_path / "folder", tmp_path / f"weights.{'pth' if form == 'pth' else 'safetensors'}"
    save_for_hf(model, str(folder), model_config={"label_names": list("abcd")}, safe_serialization=True)
    if form == "pth":
        torch.save({"model": to_official(model), "args": argparse.Namespace(lr=1)}, file)
    else:
        save_file(to_official(model) if form == "official" else model.state_dict(), file)
    options = ["predict", str(image_file), "--model", PICO, "--weights"]
    assert main([*options, str(folder if form == "folder" else file)]) == 0
    found = answers(capsys.readouterr().out)
    image = create_transform(**resolve_input_data_config(model))(Image.open(image_file))
    with torch.inference_mode():
        best, index = (model(image[None])[0].softmax(0) * 100).topk(4)
    assert [percent for percent, _ in found] == pytest.approx(best.tolist(), abs=0.06)
    names = "abcd" if form == "folder" else "0123"
    assert [name for _, name in found] == [names[i] for i in index.tolist()]


def test_model_safetensors_brings_the_config_beside_it(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    outputs = []
    for weights in (digits_folder, digits_folder / "model.safetensors"):
        assert main(["predict", str(tmp_path / "grey.png"), "--model", PICO, "--weights", str(weights)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert {name for _, name in answers(outputs[0])} <= set(DIGITS)


def test_a_thousand_classes_are_imagenets(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model(PICO, num_classes=1000)
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias[[281, 7]] = torch.tensor([20.0, 19.0])
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    main(
        ["predict", str(image_file), "--model", PICO, "--weights", str(tmp_path / "weights.safetensors"), "--top", "2"]
    )
    assert answers(capsys.readouterr().out) == [(73.1, "tabby, tabby cat"), (26.9, "cock")]
    assert ImageNetInfo().label_descriptions()[281] == "tabby, tabby cat"


def test_wordnet_numbers_are_told_in_words(image_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(image_file), "--model", "arm_tiny_patch8_64", "--top", "200"]) == 0
    names = {name for _, name in answers(capsys.readouterr().out)}
    assert len(names) == 200 and "goldfish, Carassius auratus" in names
    assert not any(re.fullmatch(r"n\d{8}", name) for name in names)


def test_top_is_at_most_all_classes(colour_folder: Path, image_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(image_file), "--model", TINY, "--weights", str(colour_folder), "--top", "9"]) == 0
    assert sorted(name for _, name in answers(capsys.readouterr().out)) == ["ant", "bee", "cat", "dog"]


# see


def test_see_draws_what_a_model_sees(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["see", str(image_file), "--model", "arm_tiny_patch8_64"]
    pictures = []
    for name, patch in (("a.png", []), ("b.png", ["--patch", "3", "3"]), ("c.png", ["--patch", "6", "1"])):
        assert main([*options, *patch, "--output", str(tmp_path / "out" / name)]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / "out" / name)))
    written, left_out = capsys.readouterr().out.splitlines()[:2]
    assert written == (
        f"{tmp_path / 'out' / 'a.png'}: image, features, effective receptive field, attention of the scan, scan: row, "
        "scan: row reversed, scan: column, scan: column reversed"
    )
    assert left_out == "left out: predicted clusters: this is no pretraining model of pixels"
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()  # without it, the centre's


def test_see_shows_the_image_as_the_model_gets_it(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of timm's own models too: here the middle of the image, in whose panel a pixel is a square of 17 or 18."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1)
    save_for_hf(model, str(tmp_path / "vit"), safe_serialization=True)
    assert main(["see", str(image_file), "--model", str(tmp_path / "vit"), "--output", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "left out: attention and directions of the scan: VisionTransformer has none\n" in out
    squares = np.asarray(Image.open(tmp_path / "a.png"))[66:, 18:][:280, :280][26:254:18, 26:254:18]
    assert squares.shape == (13, 13, 3)
    config = resolve_input_data_config(model)
    pixels = create_transform(**{**config, "mean": (0, 0, 0), "std": (1, 1, 1)})(Image.open(image_file))
    at = (np.arange(26, 254, 18) * 16 // 280).tolist()
    expected = (pixels[:, at][:, :, at].permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(squares.astype(int) - expected).max() <= 1


def test_see_takes_pretraining_models(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the statistics that were saved beside the weights."""
    model = arm_zoo.create_pretraining_model("arm_pico")
    config = {**model.hub_config(), "pretrained_cfg": {"mean": [0.3], "std": [0.4]}}
    save_model(tmp_path / "own", model.state_dict(), config)
    assert main(["see", str(image_file), "--model", str(tmp_path / "own"), "--output", str(tmp_path / "a.png")]) == 0
    assert "a.png: image, predicted clusters, features, " in capsys.readouterr().out
    prepared = preprocessing(load(tmp_path / "own"))
    assert (prepared["input_size"], [*prepared["mean"]], [*prepared["std"]]) == ((1, 8, 8), [0.3], [0.4])
    model.save_pretrained(tmp_path / "bare")
    assert [*preprocessing(load(tmp_path / "bare"))["mean"]] == [0.485]  # ImageNet's, of one channel


@pytest.mark.parametrize("name, arguments, grid", [
    ("arm_pico_patch2_8", {"in_chans": 3}, "8x8"),
    ("vmamba_tiny_s1l8", {"embed_dim": 16, "depths": (1,)}, "4x4"),
    ("vit_tiny_patch16_224", {"depth": 1}, "1x1"),
    ("resnet10t", {}, "1x1"),
])  # fmt: skip
def test_see_takes_other_sizes(
    name: str, arguments: dict[str, Any], grid: str, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a new size of position embeddings, or because the model takes any."""
    save_for_hf(timm.create_model(name, **arguments), str(tmp_path / "own"), safe_serialization=True)
    notes: list[str] = []
    monkeypatch.setattr("arm_zoo.__main__.draw", lambda shown: notes.extend(p.note for p in shown) or draw(shown))
    options = ["--model", str(tmp_path / "own"), "--img-size", "16", "--output", str(tmp_path / "a.png")]
    assert main(["see", str(image_file), *options]) == 0
    assert notes[:2] == ["as the model gets it, 16x16", f"first three principal components, {grid}"]


def test_see_says_which_size_is_none(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_for_hf(timm.create_model("cait_xxs24_224", depth=1), str(tmp_path / "cait"), safe_serialization=True)
    options = ["see", image_file, "--img-size", "20", "--output", tmp_path / "a.png", "--model"]
    said = mistake(capsys, *options, tmp_path / "cait")
    assert "the model takes no image of 20x20 pixels: Input height (20) doesn't match model (224)" in said
    said = mistake(capsys, *options, "arm_tiny_patch8_64")
    assert "image size (20, 20) is not tiled by patches of (8, 8)" in said


@pytest.mark.parametrize("options, message", [
    (["--patch", "8", "0"], "no patch in row 8 and column 0: the map of features has rows 0 to 7 and columns 0 to 7"),
    (["--layer", "12"], "no layer 12: the model has the layers 0 to 11, or -12 to -1"),
])  # fmt: skip
def test_see_refuses_in_one_line(
    options: list[str], message: str, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.png"
    said = mistake(capsys, "see", image_file, "--model", "arm_tiny_patch8_64", "--output", output, *options)
    assert message in said and not output.exists()
    assert "nowhere.png: no such file or folder" in mistake(
        capsys, "see", "nowhere.png", "--model", "arm_tiny_patch8_64"
    )


def test_see_writes_a_png_beside_the_image(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never over it, under no other ending, and not in the place of a folder."""
    (tmp_path / "a.png").mkdir()
    see = ["see", image_file, "--model", "arm_tiny_patch8_64", "--output"]
    for output in (tmp_path / "a.png", tmp_path / "a.jpg", "", tmp_path):
        with pytest.raises(SystemExit):
            main([*map(str, see), str(output)])
        assert f"expected a file to write to whose name ends in .png, got {str(output)!r}" in capsys.readouterr().err
    before = image_file.read_bytes()
    assert f"{image_file} is the image itself, which would be lost" in mistake(capsys, *see, image_file)
    assert image_file.read_bytes() == before
    assert mistake(capsys, *see, image_file / "b.png").endswith(
        f"'{image_file}'\n"
    )  # of the folder, not of one within
    said = mistake(capsys, "see", tmp_path, *see[2:], tmp_path / "b.png")
    assert f"{tmp_path} is a folder; name one of the images in it" in said


def test_files_do_not_replace_folders(tmp_path: Path) -> None:
    """All or nothing: the others of a set are not replaced either."""
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path / 'b.txt'}'$"), replacing_files(tmp_path) as beside:
        for name in "abc":
            (beside / f"{name}.txt").touch()
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path / 'b.txt'}'$"), replacing_files(tmp_path) as beside:
        (beside / "a").mkdir()
        (beside / "b.txt").mkdir()
    assert [*tmp_path.iterdir()] == [tmp_path / "b.txt"]


# which model


BY_NUMBER = ": classes are shown by number, from 0; label_names in a folder's config.json names them\n"


@pytest.mark.parametrize("source", ["{}", "local-dir:{}", "{}/model.safetensors", "--weights"])
def test_a_folder_names_its_model(
    source: str, colour_folder: Path, image_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weights", str(colour_folder)] if source == "--weights" else ["--model", source.format(colour_folder)]
    assert main(["predict", str(image_file), *options]) == 0
    alone = capsys.readouterr().out
    main(["predict", str(image_file), "--model", TINY, "--weights", str(colour_folder)])
    assert alone == capsys.readouterr().out
    assert {name for _, name in answers(alone)} == {"ant", "bee", "cat", "dog"}


def test_a_bare_file_names_its_model(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the shapes of its tensors."""
    model = timm.create_model("arm_tiny_patch4_32", pretrained=True)
    torch.save({"model": to_official(model)}, tmp_path / "own.pth")
    assert main(["predict", str(image_file), "--model", str(tmp_path / "own.pth")]) == 0
    numbered = capsys.readouterr()
    assert numbered.err == f"the weights do not name their classes{BY_NUMBER}"
    assert main(["predict", str(image_file), "--model", "arm_tiny_patch4_32"]) == 0
    named = answers(capsys.readouterr().out)
    names = model.default_cfg["label_names"]
    assert [(percent, names[int(index)]) for percent, index in answers(numbered.out)] == named


@pytest.mark.parametrize("options, message", [
    ([], "no model: name an entry or a folder with --model, or weights with --weights"),
    (["--model", "runs/none"], "no checkpoint at runs/none; name an entry (`python -m arm_zoo list`), "),
    (["--model", "none.pth"], "no checkpoint at none.pth; "),
    (["--weights", "none"], "unknown model 'none'; "),
    (["--model", "local-dir:none"], "no config.json in none; "),
])  # fmt: skip
def test_models_that_are_none(
    options: list[str], message: str, image_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is asked of the Hub unless it is named."""
    assert message in mistake(capsys, "predict", image_file, *options)


@pytest.mark.parametrize("names, reason", [
    (DIGITS, "the weights come with names of 10 classes, not of 4"),
    ([f"LABEL_{index}" for index in range(4)], "the weights do not name their classes"),
])  # fmt: skip
def test_names_of_other_classes_are_not_printed(
    names: list[str], reason: str, colour_folder: Path, image_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = colour_folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "label_names": names}))
    assert main(["predict", str(image_file), "--model", str(colour_folder)]) == 0
    captured = capsys.readouterr()
    assert sorted(name for _, name in answers(captured.out)) == ["0", "1", "2", "3"]
    assert captured.err == f"{reason}{BY_NUMBER}"


@pytest.mark.slow
def test_what_transformers_saves(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other classes than those of the weights it began with: it keeps the old names unless they are taken out."""
    transformers = pytest.importorskip("transformers")
    timm.create_model("arm_tiny_patch4_32", pretrained=True).save_pretrained(tmp_path / "ten")
    options = {"num_labels": 3, "id2label": {0: "ant", 1: "bee", 2: "cat"}, "ignore_mismatched_sizes": True}
    load = partial(transformers.AutoModelForImageClassification.from_pretrained, tmp_path / "ten", **options)
    stale, told, freed = load(), load(label_names=["ant", "bee", "cat"]), load()
    del freed.config.label_names
    for name, model in (("stale", stale), ("told", told), ("freed", freed)):
        model.save_pretrained(tmp_path / name)
        capsys.readouterr()  # progress bars
        assert main(["predict", str(image_file), "--model", str(tmp_path / name)]) == 0
        captured = capsys.readouterr()
        expected = ["0", "1", "2"] if name == "stale" else ["ant", "bee", "cat"]
        assert sorted(word for _, word in answers(captured.out)) == expected, name
        assert captured.err == (
            f"the weights come with names of 10 classes, not of 3{BY_NUMBER}" if name == "stale" else ""
        )


# images of every kind


@pytest.mark.parametrize("kind", ["I;16", "RGBA", "LA", "turned"])
def test_images_are_read_as_in_training(
    kind: str, digits_folder: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However the file keeps it, an image gets the answers of what it shows: 8-bit grey, upright, on white."""
    grey, folder = Image.open(image_file).convert("L"), tmp_path / "images"
    folder.mkdir()
    grey.save(folder / "a.png")
    other = folder / "b.png"
    if kind == "I;16":
        Image.fromarray(np.array(grey).astype(np.uint16) * 257).save(other)
    elif kind == "turned":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees clockwise
        grey.transpose(Image.Transpose.ROTATE_90).save(other, exif=exif)
    else:  # drawn in the transparency alone, which lies on white
        drawn = Image.new(kind, grey.size, 0)
        drawn.putalpha(ImageOps.invert(grey))
        drawn.save(other)
    assert Image.open(other).mode == (kind if kind != "turned" else "L")
    assert main(["predict", str(folder), "--model", str(digits_folder), "--top", "10"]) == 0
    found = answers(capsys.readouterr().out)
    assert len(found) == 20 and found[:10] == found[10:]


def test_floating_point_images_are_refused(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether 1.0 or 255.0 is white nobody knows; as Pillow converts them, those up to 1 would be all black."""
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "float.tif")
    assert main(["predict", str(tmp_path / "float.tif"), "--model", str(digits_folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "float.tif cannot be decoded: ValueError: floating-point pixels, whose white is unknown" in captured.err


def test_folders_of_images(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All in and below them, in natural order; what is hidden or no image is left out."""
    images = tmp_path / "images"
    for name in ("10.png", "2.png", "b/1.PNG", ".hidden.png", ".cache/3.png", "notes.txt", "b/desktop.ini"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(images / name, "PNG")
    alone = tmp_path / "alone.dat"  # an image that is named counts whatever its ending
    Image.new("L", (8, 8)).save(alone, "PNG")
    (tmp_path / "empty").mkdir()
    places = [str(images), str(tmp_path / "empty"), str(alone)]
    assert main(["predict", *places, "--model", str(digits_folder), "--top", "1"]) == 1
    captured = capsys.readouterr()
    paths = [line for line in captured.out.splitlines() if not line.startswith(" ")]
    assert paths == [str(images / name) for name in ("2.png", "10.png", "b/1.PNG")] + [str(alone)]
    note, line = captured.err.splitlines()
    assert note == f"files left out as no images (2): {images / 'b/desktop.ini'}, {images / 'notes.txt'}"
    assert line.startswith(f"{tmp_path / 'empty'}: no images in this folder; their names end in .jpg, ")


def test_names_that_are_no_text(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old archives hold them, and a terminal may know no more than ASCII; classes likewise."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Image.new("L", (8, 8)).save(os.fsdecode(folder + b"/\xe9.png"))
    with open(folder + b"/\xff.png", "wb"):
        pass
    config = digits_folder / "config.json"
    config.write_text(config.read_text().replace("seven", "\u4e03"), encoding="utf-8")
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, "ascii", "backslashreplace", write_through=True))
    assert main(["predict", os.fsdecode(folder), "--model", str(digits_folder), "--top", "10"]) == 1
    printed = out.getvalue().decode()
    assert printed.splitlines()[0].endswith(r"caf\udce9/\udce9.png") and r"  \u4e03" in printed
    [line] = err.getvalue().decode().splitlines()
    assert line.endswith(r"/\udcff.png cannot be decoded: no image in any format that is known")


def test_one_channel_models_take_colour_images(
    digits_folder: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.open(image_file).convert("L").save(tmp_path / "grey.png")
    images = [str(image_file), str(tmp_path / "grey.png")]
    assert main(["predict", *images, "--model", PICO, "--weights", str(digits_folder), "--top", "10"]) == 0
    found = answers(capsys.readouterr().out)
    assert found[:10] == found[10:]
    assert {name for _, name in found} == set(DIGITS)


@pytest.mark.parametrize("damage", ["text", "empty", "half a JPEG", "half a TIFF", "huge"])
def test_unreadable_images(
    damage: str, digits_folder: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever Pillow raises, it is one line with the path, and the images beside it are classified."""
    bad, good = tmp_path / "bad", tmp_path / "good.png"
    Image.new("L", (8, 8)).save(good)
    if damage == "huge":
        Image.new("1", (10_000, 10_000)).save(bad, "PNG")
    elif damage.startswith("half"):
        Image.open(image_file).save(bad, damage.split()[-1])
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    else:
        bad.write_text("not an image" if damage == "text" else "")
    options = ["--model", PICO, "--weights", str(digits_folder)]
    assert main(["predict", str(good), str(bad), str(good), *options]) == 1
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if not line.startswith(" ")] == [str(good)] * 2
    [line] = captured.err.splitlines()
    assert re.fullmatch(re.escape(f"{bad} cannot be decoded: ") + r"\S.*", line)
    assert damage != "huge" or line.endswith("it has more than the 89,478,485 pixels that are allowed (max_pixels)")


# other programs


SCRIPT = """
import json, sys
import timm
import beside
model = timm.create_model("arm_tiny_patch8_64", device="meta")
facts = [sys.argv, sys.path[0], __name__, __file__, beside.VALUE, type(model).__name__]
print(json.dumps([*facts, "arm_zoo.onnx" in sys.modules]))
if "--fail" in sys.argv:
    raise ValueError("of the script")
sys.exit(7)
"""


@pytest.mark.slow
def test_programs_run_with_the_models_registered(tmp_path: Path, repo: Path) -> None:
    """With arguments, import path and exit code as under `python SCRIPT`."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VALUE = 5")
    arguments = ["--model", "x", "-m", "-h", "--"]
    command = [sys.executable, "-m", "arm_zoo", "run", str(script), *arguments]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert result.returncode == 7 and result.stderr == ""
    expected = [[str(script), *arguments], str(tmp_path), "__main__", str(script), 5, "ARM", True]
    assert json.loads(result.stdout) == expected


def test_errors_of_programs_are_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would be one line in a command of ours is raised here; modules are run as `python -m` does."""
    (tmp_path / "program.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VALUE = 5")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arm_zoo"])
    with pytest.raises(ValueError, match="of the script"):
        main(["run", "-m", "program", "--fail"])
    assert json.loads(capsys.readouterr().out)[0] == [str(tmp_path / "program.py"), "--fail"]


def test_programs_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    for words, name in (([], "''"), (["none.py", "--x"], "'none.py'")):
        assert main(["run", *words]) == 1
        assert capsys.readouterr().err == f"error: no script {name}; expected SCRIPT or -m MODULE\n"


def test_modules_and_folders_that_are_no_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line as for a script that is missing; what the program itself fails to import stays a traceback."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "broken.py").write_text("import nosuchmod")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arm_zoo"])
    for words, reason in (
        (["-m", "nosuchmod"], "No module named nosuchmod"),
        (["-m", "nosuchmod.inside"], "No module named 'nosuchmod'"),
        (["-m", "package"], "'package' is a package and cannot be directly executed"),
        (["-m", ""], ""),
        (["-m", "_json"], ""),
        ([str(tmp_path / "package")], "can't find '__main__' module in"),
    ):
        assert main(["run", *words]) == 1, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error and error.count("\n") == 1, error
    for words in (["-m", "broken"], [str(tmp_path / "broken.py")]):
        with pytest.raises(ModuleNotFoundError, match="No module named 'nosuchmod'"):
            main(["run", *words])


def test_the_maps_of_the_clients_document(repo: Path) -> None:
    """What it gives for Grad-CAM takes out the class token in the middle, whatever the grid."""
    document = (repo / "arm_zoo" / "CLIENTS.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(def tokens_to_map.*?)```", document, re.DOTALL)
    for size in ((8, 8), (6, 10), (6, 6)):  # an odd number of patches has its middle elsewhere
        names: dict[str, Any] = {"torch": torch, "model": timm.create_model(PICO, img_size=size).eval()}
        exec(code.partition("\n\n")[0], names)
        images = torch.randn(2, 1, *size)
        with torch.no_grad():
            tokens = names["model"].forward_features(images)
            [expected] = names["model"].forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
            assert torch.equal(names["tokens_to_map"](tokens), expected), size


# mistakes


def test_weights_of_another_organisation_are_hosted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARM_ZOO_HUB_ORG", "group")
    assert main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("arm_")]
    places = {row[0]: row[-1] for row in rows}
    assert places["arm_base_patch16_224.arm_in1k_ft_in1k"] == "hosted"
    assert places["arm_pico_patch2_8.arm_digits_ft_digits"] == "bundled"
    assert main(["info", "arm_tiny_patch16_224"]) == 0  # the table does not have it
    assert "not hosted" in capsys.readouterr().out


def test_weights_that_are_not_hosted(image_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(capsys, "predict", image_file, "--model", "arm_base_patch16_224.in1k")
    assert "the weights of arm_base_patch16_224.in1k are not hosted yet" in message
    ways = (
        "predict ... --weights FILE",
        "recipes/configs/supervised_base.yaml",
        f"package: {PICO}.arm_digits_ft_digits",
    )
    assert all(message.count(way) == 1 for way in ways), message


def test_unknown_model(image_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["info"], ["predict", image_file, "--model"]):
        message = mistake(capsys, *command, "arm_base_patch16_242")
        assert "unknown model 'arm_base_patch16_242'; did you mean arm_base_patch16_224" in message
    assert "arm_base_patch16_224.arm_in1k" in mistake(capsys, "info", "arm_base_patch16_224.arm_in")
    assert "`python -m arm_zoo list` shows the entries" in mistake(capsys, "info", "resnet50")


def test_missing_weights(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.pth"
    message = mistake(capsys, "predict", image_file, "--model", PICO, "--weights", missing)
    assert f"no checkpoint at {missing}" in message


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors", "other.pth"])
def test_damaged_weights(
    name: str, digits_folder: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = digits_folder / name
    if name == "other.pth":
        torch.save({"model": timm.create_model(PICO).state_dict()}, file)
    whole = (file if file.exists() else digits_folder / "model.safetensors").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    message = mistake(capsys, "predict", image_file, "--model", PICO, "--weights", file)
    assert f"cannot read the checkpoint {file}: " in message
    assert "damaged, cut short" in message


def test_weights_of_another_model(
    colour_folder: Path, digits_folder: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = mistake(capsys, "predict", image_file, "--model", "arm_small_patch16_224", "--weights", colour_folder)
    assert f"the weights in {colour_folder} are of {TINY}, not of arm_small_patch16_224" in message
    file = tmp_path / "weights.safetensors"
    file.write_bytes((colour_folder / "model.safetensors").read_bytes())
    message = mistake(capsys, "predict", image_file, "--model", PICO, "--weights", file)
    assert "the checkpoint does not fit the model" in message
    assert "only in the model" in message and "other shapes, checkpoint -> model" in message


def test_folders_without_a_model(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["predict", image_file, "--model", TINY, "--weights"]
    message = mistake(capsys, *options, tmp_path)
    assert f"no config.json in {tmp_path}; a folder of weights holds model.safetensors and config.json" in message
    arm_zoo.create_pretraining_model("arm_pico").save_pretrained(tmp_path)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        assert f"{weights} holds a pretraining model, which has no classifier" in mistake(capsys, *options, weights)
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path / "config.json") in mistake(capsys, *options, tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_folder_of_an_unfinished_run(
    recipe: str, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, *_ = RECIPES[recipe]
    settings = dataclasses.asdict(kind(epochs=16))
    run = tmp_path / "my run"
    for epoch in (1, 2):
        checkpoint = run / "checkpoints" / f"step-{22 * epoch:08d}"
        checkpoint.mkdir(parents=True)
        state = {"config": settings, "position": {"epoch": epoch}}
        (checkpoint / "state.json").write_text(json.dumps(state))
    message = mistake(capsys, "predict", image_file, "--model", run)
    assert f"no config.json in {run}; its run has not finished: checkpoints/step-00000044 has 2 of 16 epo" in message
    assert message.endswith(f"type python -m recipes.{recipe} --config '{run}/config.yaml'\n")
    (checkpoint / "state.json").write_text("{")
    assert "a folder of weights holds model.safetensors" in mistake(capsys, "predict", image_file, "--model", run)
    (run / "pretraining_model").mkdir()
    message = mistake(capsys, "predict", image_file, "--model", run)
    assert f"its run has written {run / 'pretraining_model'}, and {run / 'backbone'} for use in timm" in message


def test_weights_without_a_head(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a pretraining model nor an encoder can classify; a fresh head would only guess."""
    encoder = timm.create_model(PICO, num_classes=0)
    for name, model in (("pretrained", arm_zoo.create_pretraining_model("arm_pico")), ("encoder", encoder)):
        file = tmp_path / f"{name}.safetensors"
        save_file(model.state_dict(), file)
        message = mistake(capsys, "predict", image_file, "--model", PICO, "--weights", file)
        assert f"{file} has no classifier head; finetune it first" in message


def test_classes_of_pixels(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    save_segmenter(tmp_path, Segmenter("test_vit", {"img_size": 16}, num_classes=3), "linear", inputs, [])
    message = mistake(capsys, "predict", image_file, "--model", tmp_path)
    assert f"{tmp_path} classifies pixels, not images; `python -m eval.segmentation` scores it" in message


def test_channels_that_no_image_has(image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model(PICO, in_chans=4).state_dict(), tmp_path / "four.safetensors")
    message = mistake(capsys, "predict", image_file, "--model", PICO, "--weights", tmp_path / "four.safetensors")
    assert "images have 1 or 3 channels, the model takes 4" in message


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--top", "0"], "expected a whole number of at least 1, got '0'"),
        (["--top", "many"], "expected a whole number of at least 1, got 'many'"),
        (["--device", "gameboy"], "no device 'gameboy' here"),
        (["--device", "meta"], "device 'meta' holds no numbers; expected cpu, cuda"),
    ],
)
def test_options_are_checked(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "image.png", "--model", PICO, *options])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.gpu
def test_predict_on_a_gpu(digits_folder: Path, image_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["predict", str(image_file), "--model", PICO, "--weights", str(digits_folder), "--top", "10"]
    for device in ("cpu", "cuda"):
        assert main([*options, "--device", device]) == 0
    found = answers(capsys.readouterr().out)
    assert dict(map(reversed, found[:10])) == pytest.approx(dict(map(reversed, found[10:])), abs=0.11)


@pytest.mark.gpu
def test_see_on_a_gpu(image_file: Path, tmp_path: Path) -> None:
    pictures = []
    for device in ("cpu", "cuda"):
        options = ["--model", "arm_tiny_patch8_64", "--device", device, "--output", str(tmp_path / f"{device}.png")]
        assert main(["see", str(image_file), *options]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / f"{device}.png")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1


@pytest.mark.parametrize("words", ["arm_zoo list", f"hub doctor {PICO}", "eval"])
def test_output_that_nobody_reads_is_no_mistake(words: str, repo: Path) -> None:
    """As in `python -m arm_zoo list | head`, which closes the pipe after its first lines."""
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", *words.split()]
    ended = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, cwd=repo, text=True, timeout=120)
    os.close(written)
    assert (ended.returncode, ended.stderr) == (0, "")
