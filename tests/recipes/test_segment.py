"""Segmentation heads trained on a few scenes of digits: the score, what is left, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from arm_zoo import loading
from arm_zoo.heads.segmentation import segment as segment_image
from arm_zoo.images.masks import IGNORED, open_masks
from eval import segmentation, tables
from recipes import digit_scenes, segment
from recipes.config import ConfigError, SegmentConfig, load_config
from recipes.data.batches import Batch
from tests import ROOT
from tests.helpers.output import output_without_reader

MODEL = ["model=test_vit", "model_args.img_size=32", "model_args.patch_size=8"]
SETTINGS = ["data.workers=0", "device=cpu", "precision=fp32", "tracker=none", "global_batch=8", "warmup_epochs=0"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    digit_scenes.main([str(folder), "--training", "16", "--validation", "4"])
    return folder


def trained(scenes: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    segment.main([*MODEL, *SETTINGS, f"data.source={scenes}", f"output_dir={output}", *settings])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def miou(scenes: Path, folder: Path) -> float:
    """In percent, counted class by class."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    split, config = open_masks(scenes, "validation"), timm.data.resolve_model_data_config(model)
    pairs = []
    for place in range(len(split)):
        image, labels = split[place]
        found = segment_image(model, image, config["input_size"][1:], config["mean"], config["std"])
        pairs.append((found.numpy(), labels.numpy()))
    found, labels = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    found, labels = found[labels != IGNORED], labels[labels != IGNORED]
    parts = [((found == k) & (labels == k), (found == k) | (labels == k)) for k in range(len(split.class_names))]
    return 100 * float(np.mean([both.sum() / either.sum() for both, either in parts if either.any()]))


def test_scenes_are_what_they_say(scenes: Path) -> None:
    split = open_masks(scenes, "training")
    assert len(split) == 16 and split.class_names[:2] == ("background", "zero")
    labels = torch.stack([split[place][1] for place in range(16)])
    assert labels.shape == (16, 64, 64) and 0.05 < (labels > 0).float().mean() < 0.5 and len(labels.unique()) > 8


def test_scenes_are_not_mixed_with_others(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message, code in (
        ([str(scenes)], f"{scenes} has images already; name another folder", 1),
        ([str(scenes / "new"), "--training", "0"], "expected a whole number of at least 1, got '0'", 2),
    ):
        with pytest.raises(SystemExit) as stop:
            digit_scenes.main(words)
        ended = stop.value.code  # Python prints a code that is a message, and ends with 1
        assert message in (capsys.readouterr().err or str(ended)) and (ended == 2) == (code == 2)


def test_short_names_have_statistics() -> None:
    configs = [SegmentConfig(model=name) for name in ("arm_base", "arm_base_patch16_224")]
    assert configs[0].statistics() == configs[1].statistics()


def test_statistics_are_those_of_the_weights_however_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = timm.create_model("arm_tiny_patch8_64", num_classes=0)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    model.save_pretrained(tmp_path)
    fetched = []
    monkeypatch.setattr(loading, "download", lambda repo, file: fetched.append(repo) or tmp_path / file)
    for name in (tmp_path, tmp_path / "model.safetensors", f"local-dir:{tmp_path}", "hf-hub:ada/scenes@v1"):
        config = SegmentConfig(model="arm_tiny_patch8_64", pretrained=str(name))
        assert config.statistics() == ((0.1, 0.2, 0.3), IMAGENET_DEFAULT_STD)
    assert fetched == ["ada/scenes@v1"]
    untold = SegmentConfig(model="arm_tiny_patch8_64", pretrained="hf://ada/scenes/weights.pth")
    assert untold.statistics() == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_keywords_of_a_segmenter_are_those_of_its_backbone() -> None:
    """As in the other recipes they win over `model_args`, and an unknown one is refused."""
    config = SegmentConfig(model="arm_pico_patch2_8", model_args={"in_chans": 1})
    assert config.build(device="meta").get_submodule("backbone.patch_embed.proj").weight.shape[1] == 1
    assert config.build(device="meta", in_chans=2).get_submodule("backbone.patch_embed.proj").weight.shape[1] == 2
    with pytest.raises(TypeError, match=r"unknown keyword typo; the model takes .*img_size"):
        config.build(typo=1)


def test_the_loss_is_the_mean_over_pixels_with_a_class() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), IGNORED, dtype=torch.uint8)
    labels[0, 1, 2], labels[1, 3, 0] = 2, 0
    batch = Batch(logits, labels, torch.arange(2), [])
    expected = -(logits[0, :, 1, 2].log_softmax(0)[2] + logits[1, :, 3, 0].log_softmax(0)[0]) / 2
    torch.testing.assert_close(segment.pixel_loss(nn.Identity(), batch), expected)
    assert segment.pixel_loss(nn.Identity(), batch._replace(classes=torch.full_like(labels, IGNORED))) == 0


def test_the_evaluator_scores_what_the_recipe_scored(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And both what is counted by hand; the frozen backbone is as it was."""
    weights = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0).state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    rows = trained(scenes, tmp_path / "run", "epochs=2", "base_lr=0.3", f"pretrained={tmp_path / 'vit.safetensors'}")
    expected = miou(scenes, tmp_path / "run")
    assert rows[1]["loss"] < rows[0]["loss"] and 1 < expected < 100
    assert rows[-1]["miou"] == pytest.approx(expected, abs=1e-3)
    words = ["--model", f"local-dir:{tmp_path / 'run'}", "--data", str(scenes), "--device", "cpu"]
    capsys.readouterr()
    assert segmentation.main([*words, "--output", str(tmp_path / "scores.csv")]) == 0
    [row] = tables.read(tmp_path / "scores.csv", segmentation.COLUMNS)
    assert float(row["miou"]) == pytest.approx(expected, abs=1e-3) and row["data_set"] == scenes.name
    assert "background" in capsys.readouterr().out
    with output_without_reader() as unread, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", unread)
        assert segmentation.main([*words, "--output", str(tmp_path / "scores.csv")]) == 0
    assert len(tables.read(tmp_path / "scores.csv", segmentation.COLUMNS)) == 2
    said = json.loads((tmp_path / "run" / "config.json").read_text())["pretrained_cfg"]
    assert said["crop_pct"] == timm.get_pretrained_cfg("test_vit").crop_pct != 0.875  # the entry's, not timm's default
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert all(torch.equal(value, model.backbone.state_dict()[name]) for name, value in weights.items())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(scenes: Path, tmp_path: Path) -> None:
    """With the same bits, whether the backbone is trained too or not."""
    settings = ["head=fpn", "frozen=false", "checkpoint_steps=1", "evaluate_every=5"]
    whole = trained(scenes, tmp_path / "whole", *settings, "epochs=2")
    (tmp_path / "whole" / "curves.png").unlink()
    first = sorted((tmp_path / "whole" / "checkpoints").iterdir())[0]
    again = trained(scenes, tmp_path / "whole", *settings, "epochs=2", "--resume", str(first))
    assert [row["loss"] for row in again] == [row["loss"] for row in whole] and again[-1]["miou"] == whole[-1]["miou"]


@pytest.mark.slow
def test_two_processes_score_what_is_exported(scenes: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = [*MODEL, *SETTINGS, f"data.source={scenes}", f"output_dir={tmp_path}", "epochs=2", "base_lr=0.3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, "-m", "recipes.segment", *settings], cwd=ROOT, check=True, env=environment)
    [*_, last] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["miou"] == pytest.approx(miou(scenes, tmp_path), abs=1e-3)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        segment.main(words)
    assert stop.value.code not in (0, None)
    return f"{stop.value.code} {capsys.readouterr().err}"


def test_what_cannot_be_trained_is_told(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [*SETTINGS, f"output_dir={tmp_path / 'run'}", "epochs=1"]
    digit_scenes.main([str(tmp_path / "other"), "--training", "1", "--validation", "1"])
    (tmp_path / "other" / "classes.txt").write_text("".join(f"{name}\n" for name in "abcdefghijk"))
    images = [*MODEL, f"data.source={scenes}"]
    message = refusal(capsys, *whole, *images, f"data.validation={tmp_path / 'other'}")
    assert "have other classes (11 and 11): only in the first: background, zero" in message
    (tmp_path / "other" / "classes.txt").write_text("background\nzero\n")
    message = refusal(capsys, *whole, *MODEL, f"data.source={tmp_path / 'other'}", "global_batch=2")
    assert "global_batch is 2; allowed: up to the 1 training images" in message
    digit_scenes.write_scenes(tmp_path / "other", "training", 2)
    (tmp_path / "other" / "classes.txt").write_text("background\nzero\n")
    message = refusal(capsys, *whole, *MODEL, f"data.source={tmp_path / 'other'}", "global_batch=2")
    assert ".png has the numbers " in message and "allowed: 1 to 2, the 2 classes, and 0" in message
    message = refusal(capsys, *whole, *images, f"data.validation={tmp_path / 'gone'}", "data.erase=0.5")
    assert "gone, which is no folder" in message and "data.erase has no use in segmentation" in message
    message = refusal(capsys, *whole, *MODEL, "model_args.device=meta")
    assert "data.source is missing; allowed: a folder of images with masks" in message and "digits" not in message
    assert "model_args.device is meta, but the recipe chooses the device" in message
    message = refusal(capsys, *whole, f"data.source={scenes}", "model=vit_giant", "model_args.img_size=32")
    assert "model 'vit_giant' with model_args.img_size=32: unknown" in message and message.count("allowed: ") == 1
    for words, reason in (
        ("width=3", "model_args.width=3: TypeError: VisionTransformer.__init__() got an unexpected keyword argument"),
        ("embed_dim=7", "model_args.embed_dim=7: AssertionError: dim should be divisible by num_heads"),
        ("act_layer=fast", "model_args.act_layer='fast': KeyError: 'fast'"),
        ("num_heads=0", "model_args.num_heads=0: ZeroDivisionError: "),
    ):
        message = refusal(capsys, *whole, *images, f"model_args.{words}")
        assert message.startswith("1 ") and reason in message
        assert message.endswith("; allowed: as model_args.NAME the model's keywords, with values as it takes them\n")
    for words in ("num_classes=3", "checkpoint_path=x.pth", "pretrained=true", "pretrained_cfg=x"):
        assert f"model_args.{words.split('=')[0]} is " in refusal(capsys, *whole, *images, f"model_args.{words}")
    message = refusal(capsys, *whole, *images, "pretrained=gone")
    assert "no checkpoint at gone; name an entry" in message
    message = refusal(capsys, *whole, *images, "model_args.in_chans=1")
    assert "the model takes 1 channels, the images have 3" in message
    monkeypatch.delattr(timm.models.VisionTransformer, "forward_intermediates")
    with pytest.raises(ConfigError, match="test_vit gives no feature maps"):
        load_config(SegmentConfig, None, [*whole, *images])


def test_masks_that_cannot_be_scored_by_are_told_before_training(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digit_scenes.main([str(tmp_path / "other"), "--training", "1", "--validation", "2"])
    words = [*SETTINGS, *MODEL, f"data.source={scenes}", f"data.validation={tmp_path / 'other'}", "epochs=1"]
    last, first = sorted((tmp_path / "other" / "annotations" / "validation").iterdir(), reverse=True)
    for number, message in ((77, f"{last} has the numbers 77"), (0, f"no pixel of the masks in {last.parent} has a")):
        for mask in (first, last):
            Image.new("L", (64, 64), number if mask == last else 0).save(mask)
        assert message in refusal(capsys, *words, f"output_dir={tmp_path / 'run'}")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
    trained(scenes, tmp_path / "run", "epochs=1")
    assert segmentation.main(["--model", f"local-dir:{tmp_path / 'run'}", "--data", str(tmp_path / "other")]) == 1
    assert f"no pixel of the masks in {tmp_path / 'other'} has a class; allowed" in capsys.readouterr().err


def test_the_evaluator_refuses_other_models(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segmentation.main(["--model", "arm_pico_patch2_8", "--data", str(scenes), "--device", "cpu"]) == 1
    assert "arm_pico_patch2_8 is no segmentation model" in capsys.readouterr().err
