"""The hub's programs: conversion of every kind of checkpoint, all or nothing, and one line for every mistake."""

import argparse
import dataclasses
import errno
import fractions
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.utils import CheckpointSaver
from torch import nn

import arm_zoo
from arm_zoo import to_official
from arm_zoo.files import CheckpointError, sha256_of
from arm_zoo.heads.models import Segmenter, save_segmenter
from arm_zoo.identify import find_variant
from arm_zoo.layers.sizes import Size
from arm_zoo.pretraining import DEFAULT_OBJECTIVE, OBJECTIVES
from arm_zoo.pretraining._sequence import SequencePretrain
from arm_zoo.pretraining.autoregressive import ARMPretrain
from arm_zoo.weights import hosted as table
from arm_zoo.weights.hosted import TABLE, training_commands
from arm_zoo.weights.reading import Choice, read_checkpoint
from hub.__main__ import main
from hub.card import BEGIN, END, write_card
from hub.catalog import PAPER_NAMES, candidates, measured, measured_frozen, reported, state
from hub.check import BUNDLED_GOLDEN, check_folder
from hub.convert import convert
from hub.export import export
from hub.folders import UsageError, read_header, set_license
from hub.upstream import _known
from tests.helpers.golden import add_other_blocks, golden_cases
from tests.helpers.hub_server import Client, HubServer, sends_other_contents
from tests.helpers.official import RunsCode

PICO = "arm_pico_patch2_8"
FILES = ["README.md", "config.json", "golden.safetensors", "model.safetensors"]
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "img_size": 64, "num_classes": 5}


def small(name: str = "arm_base_patch16_224", **kwargs: Any) -> nn.Module:
    """A backbone whose every tensor is random, so that none can be mistaken for another."""
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def official_file(path: Path, model: nn.Module, **others: Any) -> Path:
    """What the authors' training writes: weights among the state of a training."""
    state = {"model": to_official(model), "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 99}
    torch.save({**state, "scaler": {"scale": 65536.0}, "args": argparse.Namespace(lr=1e-3), **others}, path)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What a person reads after a mistake: exit code 1, nothing on stdout and one line."""
    assert main([str(arg) for arg in argv]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    return captured.err


def test_a_command_is_no_program_of_its_own(repo: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "hub.convert", "a", "b"], cwd=repo, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "hub.convert is no program; python -m hub lists the commands\n")


# conversion gives the authors' numbers


@golden_cases(["arm_ft_img64_gp"], ["arm_ft_img64_gp", "arm_ft_224_gp"])
def test_official_backbones_give_the_golden_logits(case: str, golden: Path, tmp_path: Path) -> None:
    """Converted by the shapes alone, then loaded as timm's users do."""
    file = golden / case / "state_dict.safetensors"
    if case == "arm_ft_224_gp":  # as a pickle
        torch.save({"model": load_file(file), "args": argparse.Namespace()}, tmp_path / "anything.bin")
        file = tmp_path / "anything.bin"
    assert main(["convert", str(file), str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = load_file(golden / case / "inputs.safetensors")["images"]
    expected = load_file(golden / case / "outputs_f64.safetensors")["logits"]
    official = to_official(model)
    add_other_blocks(model, golden / case)
    with torch.inference_mode():
        error = (model.double()(images.double()) - expected).abs().max() / expected.abs().max()
    assert error < 1e-7  # the parameters are float32
    assert official.keys() == load_file(golden / case / "state_dict.safetensors").keys()
    for name, value in load_file(golden / case / "state_dict.safetensors").items():
        assert torch.equal(official[name], value), name


def test_official_pretraining_gives_the_golden_latents(golden: Path, tmp_path: Path) -> None:
    case = golden / "arm_pretrain_d12"
    convert(case / "state_dict.safetensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretraining_model"]["img_size"] == 192
    assert (config["pretraining_model"]["cluster_size"], config["pretraining_model"]["decoder_dim"]) == (64, 64)
    model = arm_zoo.ARMPretrain(**config["pretraining_model"])
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    outputs = {}
    for name in ("outputs_f64", "outputs_f64_rounded_to_f32"):
        outputs |= load_file(case / f"{name}.safetensors")
    images = load_file(case / "inputs.safetensors")["images"].double()
    with torch.inference_mode():
        latent = model.double().forward_encoder(images)
        loss, prediction, _ = model(images)
    for actual, expected in ((latent, outputs["latent"]), (prediction, outputs["pred"])):
        assert (actual - expected).abs().max() / expected.abs().max() < 1e-6
    assert loss.item() == pytest.approx(outputs["loss"].item(), rel=1e-9)
    official = load_file(case / "state_dict.safetensors")
    ours = to_official(model.float())
    assert ours.keys() == official.keys() and all(torch.equal(ours[name], value) for name, value in official.items())


def test_a_converted_pretraining_model_starts_a_backbone(golden: Path, tmp_path: Path) -> None:
    convert(golden / "arm_pretrain_d12" / "state_dict.safetensors", tmp_path / "out")
    backbone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=37)
    expected = load_file(golden / "arm_surgery_d12" / "mapped.safetensors")
    actual = to_official(backbone)
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, atol=1e-6), name


# what is found from shapes


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("arm_tiny_patch16_224", {}),
        ("arm_pico_patch2_8", {}),
        ("arm_base_patch16_224", {"depth": 1}),
        ("arm_base_patch16_384", {"num_classes": 0}),
        ("arm_base_patch16_stride8_448", {}),
        ("arm_large_patch16_224", {"img_size": 256}),
        ("arm_large_patch16_384", {}),
        ("arm_huge_patch16_224", {"num_classes": 21}),
        ("arm_small_patch16_224", {"in_chans": 1}),
    ],
)
def test_every_backbone_is_found_from_its_shapes(name: str, sizes: dict[str, Any]) -> None:
    model = timm.create_model(name, device="meta", **sizes)
    for state_dict in (model.state_dict(), to_official(model)):
        variant = find_variant(state_dict)
        twin = variant.create(device="meta")
        assert variant.architecture == name
        assert variant.model_args == {key: value for key, value in sizes.items() if key != "num_classes"}
        assert variant.num_classes == model.num_classes
        assert twin.patch_embed.img_size == model.patch_embed.img_size
        assert twin.patch_embed.patch_stride == model.patch_embed.patch_stride


@pytest.mark.parametrize("size", ["arm_pico", "arm_tiny", "arm_base", "arm_large", "arm_huge"])
@pytest.mark.parametrize("official", [True, False])
def test_every_pretraining_model_is_found_from_its_shapes(size: str, official: bool) -> None:
    model = arm_zoo.create_pretraining_model(size, device="meta")
    variant = find_variant(to_official(model) if official else model.state_dict())
    expected = dict(model.config)
    if size == "arm_pico" and not official:
        expected["cluster_size"] = 8  # what only the official mask tells: 4x4 patches are assumed
    switches = {"prediction_order": "row", "target": "normed_pixel", "vocab_size": None}  # which shapes do not tell
    assert {**switches, **(variant.pretraining or {})} == expected
    assert variant.architecture == f"{size}_patch{model.patch_size[0]}_{8 if size == 'arm_pico' else 224}"
    assert variant.official == official


def test_the_file_name_says_nothing(tmp_path: Path) -> None:
    file = official_file(tmp_path / "arm_huge_patch16_384_pretrain.pth", small())
    convert(file, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_classes"], config["model_args"]["embed_dim"], config["model_args"]["depth"]) == (5, 32, 2)
    assert "pretraining_model" not in config


# what is written


def test_the_four_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    file = official_file(tmp_path / "checkpoint.pth", model)
    assert main(["convert", str(file), str(tmp_path / "deep" / "out")]) == 0
    out = tmp_path / "deep" / "out"
    assert names_in(out) == FILES and names_in(tmp_path / "deep") == ["out"]
    assert sha256_of(out / "model.safetensors") in capsys.readouterr().out
    with safe_open(out / "model.safetensors", "pt") as opened:
        header = opened.metadata()
    assert header["architecture"] == "arm_tiny_patch16_224"  # the entry nearest in width
    assert header["source_sha256"] == sha256_of(file)
    assert (header["library"], header["library_version"]) == ("arm-zoo", arm_zoo.__version__)
    assert (header["license"], header["dtype"], header["format"]) == ("unknown", "fp32", "pt")
    config = json.loads((out / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["num_classes"] == 5
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    golden = load_file(out / "golden.safetensors")
    assert golden.keys() == {"input", "features", "logits"}
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        features = loaded.forward_head(loaded.forward_features(golden["input"]), pre_logits=True)
        assert torch.allclose(loaded(golden["input"]), golden["logits"], atol=1e-5)
        assert torch.allclose(features, golden["features"], atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_two_conversions_are_equal_to_the_byte(tmp_path: Path) -> None:
    file = official_file(tmp_path / "checkpoint.pth", small())
    for name in "ab":
        convert(file, tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    """The golden logits are those of the rounded weights, which the model gives to whoever loads them."""
    model = small()
    convert(official_file(tmp_path / "checkpoint.pth", model), tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {value.dtype for value in tensors.values()} == {half}
    for name, value in model.state_dict().items():
        assert torch.equal(tensors[name], value.to(half)), name
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    golden = load_file(tmp_path / "out" / "golden.safetensors")
    with torch.inference_mode():
        assert torch.allclose(loaded(golden["input"]), golden["logits"], atol=1e-5)
        assert not torch.allclose(model(golden["input"]), golden["logits"], atol=1e-7)


def test_numbers_too_large_for_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    file = official_file(tmp_path / "checkpoint.pth", model)
    assert "norm_f.weight overflows torch.float16" in mistake(
        capsys, "convert", file, tmp_path / "out", "--dtype", "fp16"
    )
    model.norm.weight.data[0] = torch.nan
    official_file(file, model)
    assert "norm_f.weight is not finite" in mistake(capsys, "convert", file, tmp_path / "out")
    assert names_in(tmp_path) == ["checkpoint.pth"]


def test_averaged_and_trained_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--weights` chooses, the averaged ones are the default; prefixes of DistributedDataParallel go."""
    trained, averaged = small(), small()
    ema = {f"module.{name}": value for name, value in to_official(averaged).items()}
    file = official_file(tmp_path / "checkpoint.pth", trained, model_ema=ema)
    for options, model in (([], averaged), (["--weights", "ema"], averaged), (["--weights", "model"], trained)):
        assert main(["convert", str(file), str(tmp_path / "out"), "--overwrite", *options]) == 0
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    capsys.readouterr()
    official_file(file, trained)
    message = mistake(capsys, "convert", file, tmp_path / "other", "--weights", "ema")
    assert "no averaged weights (model_ema); it holds 'model', 'optimizer', 'epoch'" in message


def test_checkpoints_of_timm(tmp_path: Path) -> None:
    """What train.py writes, the averaged weights first, and what avg_checkpoints.py makes of several."""
    trained, averaged = small(), small()
    saver = CheckpointSaver(
        trained, torch.optim.SGD(trained.parameters()), model_ema=averaged, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(0)
    torch.save(trained.state_dict(), tmp_path / "averaged.pth")
    ways: dict[str, tuple[Choice | None, nn.Module]] = {"ema": ("ema", averaged), "model": ("model", trained)}
    for name, (weights, model) in {"default": (None, averaged), **ways}.items():
        convert(tmp_path / "last.pth.tar", tmp_path / name, weights=weights)
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items()), name
    convert(tmp_path / "averaged.pth", tmp_path / "of averages")
    assert sha256_of(tmp_path / "of averages" / "golden.safetensors") != sha256_of(
        tmp_path / "default" / "golden.safetensors"
    )


def test_shared_tensors_are_written_apart(tmp_path: Path) -> None:
    model = small()
    official = to_official(model)
    shared = torch.randn(5 * 32)
    official["norm_f.weight"], official["norm_f.bias"] = shared[:32], shared[:32]
    official["cls_token"] = shared[32:64].view(1, 1, 32)
    torch.save(official, tmp_path / "shared.pth")
    convert(tmp_path / "shared.pth", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["norm.weight"], shared[:32]) and torch.equal(tensors["norm.bias"], shared[:32])
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_converting_again_keeps_licence_and_origin(tmp_path: Path) -> None:
    convert(official_file(tmp_path / "checkpoint.pth", small()), tmp_path / "first", license="cc-by-4.0")
    convert(tmp_path / "first", tmp_path / "second", dtype="fp16")
    header = read_header(tmp_path / "second" / "model.safetensors")
    assert (header["license"], header["source_names"], header["dtype"]) == ("cc-by-4.0", "official", "fp16")
    cfg = json.loads((tmp_path / "second" / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["license"], cfg["origin_url"]) == ("cc-by-4.0", "https://github.com/OliverRensu/ARM")
    convert(tmp_path / "first", tmp_path / "third", license="mit")
    assert read_header(tmp_path / "third" / "model.safetensors")["license"] == "mit"


def test_cards_promise_transformers_for_colour_only(tmp_path: Path) -> None:
    """Its image processor opens no others."""
    for channels in (1, 3):
        file = tmp_path / f"{channels}.safetensors"
        save_file(small(PICO, in_chans=channels, img_size=8, num_classes=4).state_dict(), file)
        convert(file, tmp_path / str(channels))
        card = (tmp_path / str(channels) / "README.md").read_text()
        assert ("pipeline" in card.partition("---\n\n")[2], "- transformers" in card) == (channels == 3, channels == 3)


def test_a_file_of_the_package_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    """It has no config.json beside it: its sha256 says which entry it is, here of a renamed copy."""
    entry = "arm_tiny_patch4_32.arm_cifar10_ft_cifar10"
    shutil.copy(table.bundled_file(entry), tmp_path / "copy.safetensors")
    convert(tmp_path / "copy.safetensors", tmp_path / "out")
    names = json.loads((tmp_path / "out" / "config.json").read_text())["label_names"]
    assert tuple(names) == timm.get_pretrained_cfg(entry).label_names
    other = small(PICO, embed_dim=64, num_classes=10, in_chans=1)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    convert(tmp_path / "other.safetensors", tmp_path / "other")
    assert "label_names" not in json.loads((tmp_path / "other" / "config.json").read_text())


@pytest.mark.parametrize("file", ["", "model.safetensors", "renamed.SAFETENSORS"])
def test_exports_of_our_recipes_keep_what_shapes_cannot_tell(file: str, tmp_path: Path) -> None:
    """Classes' names, preprocessing and a grid that is no square stand in the config.json beside the file."""
    model = small(PICO, img_size=(8, 16), embed_dim=64, num_classes=3, in_chans=1)
    model.save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["label_names"] = ["ant", "bee", "cat"]
    config["pretrained_cfg"] |= {"mean": [0.25], "std": [0.5], "crop_pct": 0.9}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    if file.startswith("renamed"):
        (tmp_path / "run" / "model.safetensors").rename(tmp_path / "run" / file)
    convert(tmp_path / "run" / file, tmp_path / "out", license="apache-2.0")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert loaded.patch_embed.img_size == (8, 16)
    assert loaded.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    assert (loaded.pretrained_cfg["mean"], loaded.pretrained_cfg["crop_pct"]) == ([0.25], 0.9)
    assert loaded.pretrained_cfg["license"] == "apache-2.0" and "origin_url" not in loaded.pretrained_cfg
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", [PICO, "vim_pico_patch2_8"])
@pytest.mark.parametrize("pooling", ["avg", "max", "token"])
def test_models_keep_their_pooling(name: str, pooling: str, tmp_path: Path) -> None:
    """Whichever their entry has."""
    model = timm.create_model(name, global_pool=pooling, num_classes=3)
    nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 1, 8, 8)
    assert loaded.global_pool == pooling and torch.allclose(loaded(images), model.eval()(images), atol=1e-5)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "global_pool": "fast"}))
    with pytest.raises(CheckpointError, match=r"config.json: global_pool is 'fast'; expected avg, avgmax, max"):
        convert(tmp_path / "run", tmp_path / "again")


def test_exports_of_our_pretraining(tmp_path: Path) -> None:
    model = arm_zoo.create_pretraining_model("arm_pico", img_size=(8, 16), decoder_dim=64)
    model.save_pretrained(tmp_path / "run")
    convert(tmp_path / "run" / "model.safetensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretraining_model"] == {**model.config, "img_size": [8, 16]}
    golden = load_file(tmp_path / "out" / "golden.safetensors")
    assert torch.allclose(model.eval().forward_encoder(golden["input"]), golden["features"], atol=1e-5)


@pytest.mark.parametrize("family", ["arm", "vim"])
def test_exports_of_masked_autoencoders(family: str, tmp_path: Path) -> None:
    sizes = {"embed_dim": 16, "depth": 1, "d_state": 2, "decoder_dim": 32, "decoder_depth": 1, "mask_ratio": 0.5}
    model = arm_zoo.create_pretraining_model(f"{family}_pico", "mae", **sizes)
    model.save_pretrained(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    assert check_folder(tmp_path / "out").startswith("golden features and prediction match")
    loaded = arm_zoo.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, arm_zoo.MAEPretrain) and loaded.config == model.config
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["objective"]) == (f"{family}_pico_patch2_8", "mae")
    assert "loss, prediction, mask = model(images)" in (tmp_path / "out" / "README.md").read_text()


class Halves(ARMPretrain):
    """An objective with the tensors of another, and an argument that they do not tell."""

    def __init__(
        self,
        mask_ratio: float = 0.75,
        img_size: Size = 8,
        patch_size: Size = 2,
        cluster_size: Size = 4,
        in_chans: int = 1,
        embed_dim: int = 32,
        depth: int = 2,
        d_state: int = 4,
        decoder_dim: int = 64,
        decoder_depth: int = 1,
        backbone: str = "arm",
        device: str | None = None,
    ) -> None:
        sizes = (img_size, patch_size, cluster_size, in_chans, embed_dim, depth, d_state, decoder_dim, decoder_depth)
        super().__init__(*sizes, backbone=backbone, device=device)
        own = inspect.signature(Halves).parameters
        self.config = {name: value for name, value in self.config.items() if name in own} | {"mask_ratio": mask_ratio}


def test_exports_of_pretraining_keep_the_objective_and_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "halves", OBJECTIVES[DEFAULT_OBJECTIVE]._replace(model_class=Halves))
    Halves(mask_ratio=0.5).save_pretrained(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    loaded = arm_zoo.from_pretrained(tmp_path / "out")
    assert type(loaded) is Halves and loaded.config == Halves(mask_ratio=0.5).config
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for given, reason in (
        ({"mask_ratio": "half"}, "pretraining_model has mask_ratio='half'; expected float"),
        ({"ratio": 0.5}, "pretraining_model has ratio; expected backbone, cluster_size, "),
        ({"img_size": 0}, "cannot be built: ValueError: "),
        ({"img_size": 16}, "describes 64 patches, but model.safetensors beside it has position embeddings for 16"),
    ):
        (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "pretraining_model": given}))
        assert reason in mistake(capsys, "convert", tmp_path / "run", tmp_path / "new")


# mistakes


def test_without_a_command_the_help_leads_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m hub ") and len(printed.splitlines()) < 30
    for command in ("convert", "publish", "check", "export", "sources", "doctor"):
        assert f"\n    {command} " in printed
    assert "\n  python -m hub convert checkpoint.pth OUT " in printed


def test_destinations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = official_file(tmp_path / "checkpoint.pth", small()), tmp_path / "out"
    out.mkdir()
    assert main(["convert", str(file), str(out)]) == 0  # empty folders are as good as new ones
    before = (out / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert "has a model already; name a new folder, or replace it with --overwrite" in mistake(
        capsys, "convert", file, out
    )
    (out / "notes.txt").write_text("mine")
    assert "holds other files (notes.txt)" in mistake(capsys, "convert", file, out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and (out / "model.safetensors").stat().st_mtime_ns == before
    (out / "notes.txt").unlink()
    assert "lies in" in mistake(capsys, "convert", out / "model.safetensors", out, "--overwrite")
    assert "is a file; name a folder" in mistake(capsys, "convert", file, file)
    assert f"no checkpoint at {tmp_path / 'none.pth'}" in mistake(capsys, "convert", tmp_path / "none.pth", out / "x")


@pytest.mark.parametrize(
    "command, options, message",
    [
        ("check", [], "there is no folder {}; write it: python -m hub convert FILE {}"),
        ("publish", ["--repo", "ada/x"], "there is no folder {}; write it: python -m hub convert FILE {}"),
        ("convert", ["out"], "no checkpoint at {}; name a .pth, a .safetensors or the folder of a run"),
        ("export", ["out.onnx"], "no checkpoint at {}; name an entry (`python -m arm_zoo list`), a folder, a file"),
    ],
)
def test_folders_that_are_missing_or_empty(
    command: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What to type is said, and nothing is written."""
    folder = tmp_path / "folder"
    options = [option if option.startswith("--") or "/" in option else str(tmp_path / option) for option in options]
    assert message.replace("{}", str(folder)) in mistake(capsys, command, folder, *options)
    folder.mkdir()
    empty = mistake(capsys, command, folder, *options)
    assert str(folder) in empty and any(word in empty for word in (" lacks ", "a folder of weights holds", "name a "))
    assert names_in(tmp_path) == ["folder"]


@pytest.mark.parametrize("command", [["check"], ["publish", "--repo", "ada/x"]])
def test_the_folder_of_a_run_is_to_be_converted(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is to be typed is said whole, and works as it stands."""
    small(PICO, in_chans=1, img_size=8).save_pretrained(tmp_path / "run")
    name, *options = command
    said = mistake(capsys, name, tmp_path / "run", *options)
    typed = re.search(r"lacks .*golden.*; write a new folder: python -m hub convert (\S+) OUT", said)
    assert typed and main(["convert", typed[1], str(tmp_path / "out")]) == 0
    assert main(["check", str(tmp_path / "out")]) == 0


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that fails at its last step leaves the folder of before, or none."""
    file, out = official_file(tmp_path / "checkpoint.pth", small()), tmp_path / "out"

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hub.convert.write_card", fail)
        assert main(["convert", str(file), str(out)]) == 1
        assert names_in(tmp_path) == ["checkpoint.pth"]
    convert(file, out)
    before = {name: (out / name).read_bytes() for name in FILES}
    with monkeypatch.context() as patch:
        patch.setattr("hub.convert.write_card", fail)
        assert main(["convert", str(official_file(file, small())), str(out), "--overwrite"]) == 1
    assert {name: (out / name).read_bytes() for name in FILES} == before
    assert names_in(tmp_path) == ["checkpoint.pth", "out"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_ordinary_mode(umask: int, mode: int, tmp_path: Path) -> None:
    """Whoever may read the other files of a person or group may read these too."""
    before = os.umask(umask)
    try:
        small(PICO).save_pretrained(tmp_path / "run")
        arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64).save_pretrained(tmp_path / "pretrained")
        convert(tmp_path / "run", tmp_path / "out")
        convert(tmp_path / "run", tmp_path / "out", overwrite=True)
        export(str(tmp_path / "run"), tmp_path / "official.safetensors", "official")
    finally:
        os.umask(before)
    written = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {found for path, found in written.items() if path.is_file()} == {mode}, written
    assert {found for path, found in written.items() if path.is_dir()} == {0o777 & ~umask}, written


@pytest.mark.parametrize("command", ["convert", "official", "pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_disks_that_are_full(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, what was there before stays, and nothing half-written; a limit of the system stands for the disk."""
    run, place = tmp_path / "run", tmp_path / "place"
    small(PICO, in_chans=3, img_size=8).save_pretrained(run)
    target = place / ("out" if command == "convert" else "file")
    options = ["convert", run, target] if command == "convert" else ["export", run, target, "--format", command]
    place.mkdir()
    if command != "convert":
        target.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = mistake(capsys, *options)
        with pytest.raises(OSError, match="File too large") as error:
            small(PICO).save_pretrained(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and "File too large" in message
    assert names_in(place) == ([] if command == "convert" else ["file"])
    assert command == "convert" or target.read_text() == "before"
    assert names_in(run) == ["config.json", "model.safetensors"] and arm_zoo.from_pretrained(run).num_classes == 5


@pytest.mark.slow
def test_a_killed_conversion_leaves_the_folder_of_before(tmp_path: Path, repo: Path) -> None:
    file, out = official_file(tmp_path / "checkpoint.pth", small()), tmp_path / "out"
    convert(file, out)
    before = {name: (out / name).read_bytes() for name in FILES}
    official_file(file, small())
    code = (
        "import os, signal, sys, hub.convert\nfrom pathlib import Path\n"
        "hub.convert.write_card = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
        "hub.convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=True)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(file), str(out)], cwd=repo)
    assert killed.returncode == -signal.SIGKILL
    assert {name: (out / name).read_bytes() for name in FILES} == before
    convert(file, out, overwrite=True)  # what the killed one had begun goes
    assert names_in(out) == FILES and (out / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_unmatched_keys_are_listed_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official = to_official(small())
    official["extra.weight"] = torch.zeros(3)
    del official["layers.1.norm2.bias"]
    official["norm_f.weight"] = torch.zeros(7)
    torch.save({"model": official}, tmp_path / "checkpoint.pth")
    message = mistake(capsys, "convert", tmp_path / "checkpoint.pth", tmp_path / "out")
    assert "only in the model (1): blocks.1.norm2.bias" in message
    assert "only in the checkpoint (1): extra.weight" in message
    assert "norm.weight (7,) -> (32,)" in message
    assert names_in(tmp_path) == ["checkpoint.pth"]


def test_other_architectures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "vit.safetensors")
    message = mistake(capsys, "convert", tmp_path / "vit.safetensors", tmp_path / "out")
    assert "this is no ARM or " in message and "found blocks.0.attn.proj.bias" in message


@pytest.mark.parametrize("form", ["zip", "old", "protocol 4"])
def test_pickles_that_want_more_are_refused_by_name(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, trap = tmp_path / "trap.pth", tmp_path / "trap"
    checkpoint = {"model": to_official(small()), "args": RunsCode(trap), "rate": fractions.Fraction(1, 3)}
    if form == "protocol 4":
        file.write_bytes(pickle.dumps(checkpoint, protocol=4))
    else:
        torch.save(checkpoint, file, _use_new_zipfile_serialization=form == "zip")
    message = mistake(capfd, "convert", file, tmp_path / "out")
    assert f"asks to run 'fractions.Fraction', '{os.mkdir.__module__}.mkdir'; nothing in it was run" in message
    assert names_in(tmp_path) == ["trap.pth"]
    pickle.loads(file.read_bytes()) if form == "protocol 4" else torch.load(file, weights_only=False)
    assert trap.exists()  # it would have worked


def test_namespaces_alone_are_allowed(tmp_path: Path) -> None:
    allowed = set(torch.serialization.get_safe_globals())  # torch gives them in any order
    file = official_file(tmp_path / "checkpoint.pth", small(), args=argparse.Namespace(inner=argparse.Namespace()))
    assert read_checkpoint(file).keys() == to_official(small()).keys()
    assert set(torch.serialization.get_safe_globals()) == allowed  # what was allowed was allowed for this reading


def test_archives_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    file = official_file(tmp_path / "whole.pth", small())
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in whole.namelist():
            packed.writestr(member, whole.read(member))
    with pytest.raises(CheckpointError, match=r"compressed, which PyTorch never does.*fetch it again"):
        read_checkpoint(tmp_path / "packed.pth")


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    file = official_file(tmp_path / "checkpoint.pth", small())
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"checksum of .*data.* is wrong; the file is damaged"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    "contents, reason",
    [
        ([torch.zeros(3)], "holds no tensors by name but a list"),
        ({"model": 3}, "holds under 'model' no tensors by name but a int"),
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ({3: torch.zeros(3)}, "'3' is a Tensor, not a tensor"),
        ({"w": torch.zeros(1).expand(10**12)}, "larger than its data in the file"),
        ({"w": torch.empty(10**12, device="meta")}, "no plain dense tensor"),
        ({"w": torch.eye(3).to_sparse()}, "no plain dense tensor"),
        (OrderedDict(), "this is no ARM .*checkpoint: .* found none"),
    ],
)
def test_files_that_are_no_checkpoints(contents: Any, reason: str, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path / "file.pth", tmp_path / "out")
    assert names_in(tmp_path) == ["file.pth"]


@pytest.mark.parametrize("family", ["arm", "vim"])
def test_a_model_of_two_encoders_and_heads_is_converted(family: str, tmp_path: Path) -> None:
    sizes = {"embed_dim": 16, "depth": 2, "d_state": 2, "hidden_dim": 32, "output_dim": 8, "temperature": 0.5}
    model = arm_zoo.create_pretraining_model(f"{family}_pico", "moco", **sizes)
    model.predictor[1].num_batches_tracked.fill_(100_000)  # more than float16 holds
    model.save_pretrained(tmp_path / "run")
    said, _ = convert(tmp_path / "run", tmp_path / "out", dtype="fp16")
    assert said.startswith(f"{family}_pico_patch2_8 (pretraining model")
    assert check_folder(tmp_path / "out").startswith("golden features and projections match")
    loaded = arm_zoo.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, arm_zoo.MoCoPretrain) and loaded.config == model.config
    for name, value in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(value, expected.half().float() if expected.is_floating_point() else expected), name
    backbone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), loaded.eval().forward_encoder(images))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "an encoder, its moving average, and the heads" in card and "loss, deviation = model(images)" in card


def test_integers_are_no_weights(tmp_path: Path) -> None:
    state_dict = {name: value.int() for name, value in small().state_dict().items()}
    save_file(state_dict, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"has type torch.int32; expected floating point numbers"):
        convert(tmp_path / "file.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model_args": []}, "model_args is a list, not a table"),
        ({"model_args": {"img_size": "64"}}, "img_size is '64'; expected pixels"),
        ({"model_args": {"img_size": 60000}}, "config.json says"),
        ({"pretrained_cfg": 3}, "pretrained_cfg is a int"),
        ({"pretrained_cfg": {"mean": "grey"}}, "mean is 'grey'"),
        ({"pretrained_cfg": {"mean": [0.1, 0.2]}}, "not for 3 channels"),
        ({"label_names": 7}, "label_names is 7; expected a list of names"),
    ],
)
def test_damaged_configurations(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path / "model.safetensors", tmp_path / "out")
    (tmp_path / "config.json").write_text("[" * 99999)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        convert(tmp_path / "model.safetensors", tmp_path / "out")


FUZZ = """
import json, os, resource, sys
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from arm_zoo.files import CheckpointError
from hub.check import check_folder
from hub.convert import convert
from hub.folders import UsageError

folder = Path(sys.argv[1])
sources = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
outcomes = {"converted": 0, "refused": 0, "grown": 0}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
numbers = st.one_of(st.integers(-2, 70), st.sampled_from([2**31 - 1, 2**31, 2**40, 2**63 - 1, 10**30, 0.5, 1e308]))
values = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=5), st.lists(numbers, max_size=3), st.just({}))


@st.composite
def damaged(draw, contents):
    data = bytearray(contents)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1)) if data else 0
        # headers are where it matters, and at the start or the end
        at = draw(st.sampled_from([at, at % 600, max(0, len(data) - 1 - at % 600)]))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "number"]))
        if kind == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "number":
            number = draw(st.sampled_from([2**16, 2**31 - 1, 2**40, 2**63, 2**64 - 1]))
            data[at : at + 8] = number.to_bytes(8, "little")
    return bytes(data)


@st.composite
def edited(draw, table):
    # one value somewhere in a JSON document is another one, or gone
    document = json.loads(table)
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return json.dumps(document).encode()
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(values)
        else:
            del place[key]
        return json.dumps(document).encode()


@st.composite
def cases(draw):
    name = draw(st.sampled_from(["zip.pth", "old.pth", "model.safetensors", "header", "config.json"]))
    if name == "header":
        contents = sources["model.safetensors"]
        size = int.from_bytes(contents[:8], "little")
        header = draw(edited(contents[8 : 8 + size]))
        return "model.safetensors", len(header).to_bytes(8, "little") + header + contents[8 + size :]
    json_edit = name == "config.json" and draw(st.booleans())
    return name, draw(edited(sources[name]) if json_edit else damaged(sources[name]))


def run(name, contents):
    for source, original in sources.items():
        (folder / source).write_bytes(contents if source == name else original)
    file = folder / ("model.safetensors" if name == "config.json" else name)
    before = peak()
    try:
        convert(file, folder.parent / "out", overwrite=True)
        outcomes["converted"] += 1
    except (CheckpointError, UsageError):
        outcomes["refused"] += 1
    outcomes["grown"] = max(outcomes["grown"], peak() - before)  # by one file; hypothesis itself grows slowly too
    assert {path.name for path in folder.parent.iterdir()} <= {folder.name, "out"}


@settings(max_examples=int(sys.argv[2]), deadline=None, database=None, derandomize=True,
          phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(cases())
def fuzz(case):
    run(*case)


run("zip.pth", sources["zip.pth"])
outcomes["grown"] = 0
address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (address_space + 2**30, resource.RLIM_INFINITY))
fuzz()
print(json.dumps(outcomes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are set as Linux does")
def test_damaged_files_end_in_our_error(tmp_path: Path, repo: Path) -> None:
    """Hundreds of damaged checkpoints and configurations: converted or refused, in bounded memory, nothing left."""
    pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    sources = tmp_path / "place" / "sources"
    model = small(PICO, embed_dim=16, depth=1, img_size=8)
    model.save_pretrained(sources)
    official_file(sources / "zip.pth", model)
    torch.save({"model": to_official(model)}, sources / "old.pth", _use_new_zipfile_serialization=False)
    command = [sys.executable, "-c", FUZZ, str(sources), "200"]
    environment = {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert outcomes["refused"] > 100 and outcomes["converted"] > 5
    assert outcomes["grown"] < 64 * 1024  # KiB


# cards


def test_the_card_keeps_what_people_wrote(tmp_path: Path) -> None:
    file, out = official_file(tmp_path / "checkpoint.pth", small()), tmp_path / "out"
    convert(file, out)
    card = (out / "README.md").read_text()
    assert card.count(BEGIN) == card.count(END) == 1
    edited = card.replace("license: other", "license: other\nlanguage: en\nlicense_link: LICENSE")
    edited = edited.replace(BEGIN, f"Seen by Ada.\n\n{BEGIN}\nlost").replace(END, f"{END}\n\n## Notes\n\nkept")
    (out / "README.md").write_text(edited)
    convert(file, out, overwrite=True)
    again = (out / "README.md").read_text()
    assert "Seen by Ada." in again and "\n## Notes\n\nkept" in again and "lost" not in again
    assert "language: en" in again and again.count("license: other") == 1
    convert(file, out, overwrite=True)
    assert (out / "README.md").read_text() == again


def test_the_card_tells_reported_from_measured(tmp_path: Path) -> None:
    """Figures of the paper stand apart from ours, which alone are in the model index, for these weights only."""
    official = timm.create_model("arm_base_patch16_384", device="meta")
    folder = tmp_path / "base"
    folder.mkdir()
    config = {**official.hub_config(), "model_args": {"img_size": [384, 384]}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"source_names": "official"})
    sha256 = sha256_of(folder / "model.safetensors")
    rows = [
        ("in1k", 50000, 84.11, sha256, ""),
        ("v2", 10000, 73.5, sha256, ""),
        ("v2", 20, 95.0, sha256, "20"),  # scored in part
        ("a", 7500, 1.0, "of another", ""),
    ]
    csv = "".join(f"arm,{name},{n},{top1},99,{sha},{limit}\n" for name, n, top1, sha, limit in rows)
    (tmp_path / "results.csv").write_text(f"model,set,n,top1,top5,weights_sha256,limit\n{csv}")
    columns = "data_set,images_train,images_test,protocol,features,settings,top1,low,high,weights_sha256"
    probed = [
        f'in1k,9,8,knn,token,"neighbours={k}, temperature=0.07",{top1},61,63,{sha256}'
        for k, top1 in ((10, 1), (10, 62.0), (20, 61.5))
    ]
    (tmp_path / "frozen.csv").write_text("\n".join([columns, *probed, "in1k,9,8,linear,token,,70,69,71,another's"]))
    write_card(folder, repo="ada/base", results=tmp_path / "results.csv", frozen=tmp_path / "frozen.csv")
    card = ModelCard.load(folder / "README.md")
    assert "| in1k | knn, neighbours=10, temperature=0.07 | token | 62.00 (61.00 to 63.00) |" in card.text
    assert card.text.count("| token |") == 2
    figures = {(r.dataset_type, r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results or []}
    assert figures == {("in1k", "accuracy", "top1"): 84.11, ("v2", "accuracy", "top1"): 73.5}
    measured, _, reported = card.text.partition("*Reported* by the paper")
    assert "| ImageNet-1k | 50000 | 84.11 |" in measured and "| ImageNet-V2 | 10000 | 73.50 |" in measured
    assert "| ARM-B at 384 pixels | ImageNet-1k | 84.2 |" in reported and "ImageNet-A" not in card.text
    # other weights: what was measured goes, what people added stays
    card.data.tags = ["birds", *(card.data.tags or [])]
    card.save(folder / "README.md")
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors", metadata={"license": "mit"})
    write_card(folder, old=folder / "README.md", results=tmp_path / "results.csv", frozen=tmp_path / "frozen.csv")
    assert "| token |" not in (folder / "README.md").read_text()
    again = ModelCard.load(folder / "README.md")
    assert not again.data.eval_results and "84.11" not in (folder / "README.md").read_text()
    assert again.data.license == "mit" and again.data.license_name is None
    assert again.data.tags == ["arm-zoo", "mamba", "timm", "transformers", "birds"]
    (tmp_path / "results.csv").write_text("model,top1\n")
    (tmp_path / "results.csv").rename(tmp_path / "frozen.csv")
    with pytest.raises(
        ValueError, match=r"lacks the columns data_set, images.*; `python -m recipes.probe` writes such"
    ):
        write_card(folder, frozen=tmp_path / "frozen.csv")
    (tmp_path / "frozen.csv").rename(tmp_path / "results.csv")
    with pytest.raises(ValueError, match="lacks the columns set, n, weights_sha256"):
        write_card(folder, results=tmp_path / "results.csv")


@pytest.mark.parametrize(
    "text", [b"\xff\xfes\0e\0t\0", b"set,n,top1,weights_sha256\n" + b"9" * 200_000], ids=["UTF-16", "long"]
)
def test_what_is_no_table_of_figures_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_bytes(text)
    with pytest.raises(
        UsageError, match=r"results.csv cannot be read as a table in UTF-8: .*; `python -m eval` writes"
    ):
        measured("ours", tmp_path / "results.csv")


@pytest.mark.parametrize(("cell", "came"), [("", "empty"), ("high", "'high'"), ("nan", "'nan'"), ("-1", "'-1'")])
def test_a_wrong_figure_is_named_by_its_file_line_and_column(cell: str, came: str, tmp_path: Path) -> None:
    """Those of no images do not matter."""
    results, probed = tmp_path / "results.csv", tmp_path / "frozen.csv"
    results.write_text(f"set,n,top1,weights_sha256\nv2,0,nan,ours\nv2, 0.0,,ours\n\nin1k,9,{cell},ours\n")
    with pytest.raises(
        UsageError, match=re.escape(f"{results}, line 5: top1 is {came}; allowed: a number of 0 or more")
    ):
        measured("ours", results)
    head = "data_set,images_train,images_test,protocol,features,settings,top1,low,high,weights_sha256"
    probed.write_text(f"\ufeff{head}\npets,9,9,knn,token,k=1,50,{cell},60,ours\n")
    with pytest.raises(
        UsageError, match=re.escape(f"{probed}, line 2: low is {came}; allowed: a number of 0 or more")
    ):
        measured_frozen("ours", probed)


def test_what_shapes_do_not_tell_is_not_claimed() -> None:
    """A pretrained model and one from scratch have the same shapes; other sizes are nobody's."""
    both = [PAPER_NAMES[name] for name in candidates("arm_base_patch16_224", 1000, standard=True)]
    assert both == ["ARM-B", "MambaMLP-B"]
    assert candidates("arm_large_patch16_224", 0, True) == ["arm_large_patch16_224.arm_in1k"]
    assert candidates("arm_base_patch16_224", 10, True) == candidates("arm_base_patch16_224", 1000, False) == []


def test_the_catalogue_and_the_table_agree() -> None:
    assert set(PAPER_NAMES) <= set(TABLE)
    for name, weights in TABLE.items():
        if weights.where == "bundled":
            assert (state(name), timm.models.get_pretrained_cfg(name).license) == ("ours", "apache-2.0"), name
            pretrained_on, _, finetuned_on = name.partition(".arm_")[2].partition("_ft_")
            assert f"pretrain_{pretrained_on}.yaml" in training_commands(name) and not reported(name)
            assert (f"finetune_{pretrained_on}.yaml" in training_commands(name)) == bool(finetuned_on)


def test_reported_figures_are_those_of_the_papers_tables() -> None:
    """Table 3 has all sets of the models at 224 pixels, table 2 the others' ImageNet-1k."""
    base = {"in1k": 83.2, "v2": 72.3, "real": 88.0, "a": 31.9, "r": 48.9, "sketch": 37.2}
    assert reported("arm_base_patch16_224.arm_in1k_ft_in1k") == base
    assert reported("arm_huge_patch16_384.arm_in1k_ft_in1k") == {"in1k": 85.5}
    assert reported("arm_base_patch16_224.in1k") == {"in1k": 81.2}
    assert reported("vim_huge_patch16_224") == {}  # it collapsed in training
    finetuned = [name for name, paper_name in PAPER_NAMES.items() if "pretrained" not in paper_name]
    assert [name for name in TABLE if reported(name)] == finetuned


@pytest.mark.parametrize("kind", ["classifier", "encoder", "pretraining"])
def test_cards_render(kind: str, tmp_path: Path) -> None:
    """As HTML: headings in order, every table with its columns, three snippets, nothing of the templates left over."""
    if kind == "pretraining":
        arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64).save_pretrained(tmp_path / "run")
        convert(tmp_path / "run" / "model.safetensors", tmp_path / "out")
    else:
        model = small(num_classes=5 if kind == "classifier" else 0)
        convert(official_file(tmp_path / "checkpoint.pth", model), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    architecture = json.loads((tmp_path / "out" / "config.json").read_text())["architecture"]
    missing = (
        f"The model architecture '{architecture}' is not supported in your version of timm ... Please upgrade timm"
    )
    assert missing in " ".join(card.text.split()) and f"Unknown model ({architecture})" in card.text
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == ["Licence and origin", "Use", "Figures", "Training", "Limits", "Citation"]
    assert html.count('<code class="language-python">') == 3
    assert all(row.count("<td>") in (0, 2) for row in html.split("<tr>"))
    assert not re.search(r"\$\w|\*\*|\| ", re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL))
    assert card.data.license == "other" and card.data.license_name == "unknown"
    assert ("ask the authors" in html) == (kind != "pretraining")  # ours has no authors to ask
    assert "<em>Measured</em> on this file: nothing yet." in html


@pytest.mark.parametrize("family", SequencePretrain.backbones)
@pytest.mark.parametrize(
    "objective, settings",
    [*((objective, {}) for objective in OBJECTIVES), ("autoregressive", {"target": "dvae_tokens", "vocab_size": 5})],
    ids=[*OBJECTIVES, "tokens"],
)
def test_cards_of_pretraining_models_hold(
    objective: str, settings: dict[str, Any], family: str, tmp_path: Path
) -> None:
    """For each objective: the snippets run on the folder, and a backbone as the entry has it differs in nothing."""
    arm_zoo.create_pretraining_model(f"{family}_pico", objective, **settings).save_pretrained(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| differs from the entry in | nothing |" in card
    found: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        local = snippet.replace("hf-hub:ORG/NAME", f"local-dir:{tmp_path / 'out'}")
        exec(local.replace("ORG/NAME", str(tmp_path / "out")), found)
    assert found["loss"].ndim == 0 and len(found["latents"]) == 2 and found["model"].num_classes == 10


def test_cards_name_what_differs_from_the_entry(tmp_path: Path) -> None:
    """Of a family whose sizes have other names than ARM's, too."""
    model = timm.create_model("vmamba_tiny_s1l8", embed_dim=8, depths=(1, 1), global_pool="max", num_classes=3)
    model.save_pretrained(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| differs from the entry in | embed_dim=8, depths=[1, 1], global_pool=max |" in card


@pytest.mark.parametrize(
    "known, said",
    [
        ({}, ""),
        ({"paper_name": "Toys"}, "*Toys*"),
        ({"paper_ids": "arXiv:1234.56789"}, "[arXiv:1234.56789](https://arxiv.org/abs/1234.56789)"),
    ],
)
def test_cards_say_no_more_of_a_paper_than_is_known(
    known: dict[str, str], said: str, toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = dataclasses.replace(timm.models.get_pretrained_cfg(toy), **known)
    monkeypatch.setattr("hub.card.get_pretrained_cfg", lambda name: cfg)
    timm.create_model(toy, num_classes=3).save_pretrained(tmp_path / "run")
    convert(tmp_path / "run" / "model.safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"An image classifier. Mamba blocks{said and f' after {said}'}.\n" in card
    assert not re.search(r"None(?!])", card)  # but for the snippets' [None]
    assert card.endswith(f"\n## Citation\n\n{said}\n{END}\n") if said else "Citation" not in card


# the Hub


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder of a classifier for 8x8 colour images."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    model = small(PICO, in_chans=3, img_size=8, num_classes=4)
    model.pretrained_cfg |= {"mean": [0.5] * 3, "std": [0.25] * 3, "label_names": ["ant", "bee", "cat", "dog"]}
    model.save_pretrained(folder / "run")
    convert(folder / "run" / "model.safetensors", folder / "out")
    return folder / "out"


def test_publishing_is_shown_first(server: HubServer, client: Client, classifier: Path) -> None:
    server.requests.clear()
    reply = client.load("hub", "publish", classifier, "--repo", "ada/new")
    assert reply["code"] == 0, reply
    lines = reply["out"].splitlines()
    assert "golden features and logits match" in lines[0] and "ada/new (would be created), tag v1" in lines[1]
    for name in FILES:
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        if name != "README.md":  # which is written anew
            assert f"{(classifier / name).stat().st_size:,} bytes" in line
        assert line.endswith("new")
    assert lines[-1] == "dry run, nothing was uploaded; --yes uploads"
    assert not any(line.startswith("POST") for line in server.requests)
    assert "ada/new" not in server.repositories


@pytest.mark.parametrize("offline", [True, False])
def test_publishing_is_shown_without_a_network(
    offline: bool,
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files and sizes; that they were not compared is said, and nothing is uploaded."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OfflineModeIsEnabled("offline") if offline else ConnectionError("no route to host")

    monkeypatch.setattr("hub.publish.HfApi.model_info", unreachable)
    monkeypatch.setattr("hub.publish.HF_HUB_OFFLINE", offline)
    assert main(["publish", str(classifier), "--repo", "ada/new"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "ada/new (could not be reached), tag the next of v1, v2, ..."
    for name in FILES:
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        assert re.search(r" [1-9][\d,]* bytes  not compared$", line)
    reason = "offline mode is on (HF_HUB_OFFLINE)" if offline else "no route to host"
    assert lines[-1].startswith("dry run, not compared with what is there: ") and reason in lines[-1]
    assert main(["publish", str(classifier), "--repo", "ada/new", "--yes", "--license", "mit"]) == 1
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1


@pytest.fixture
def licensed(classifier: Path, tmp_path: Path) -> Path:
    """A copy of the classifier whose weights may be passed on."""
    folder = shutil.copytree(classifier, tmp_path / "licensed")
    set_license(folder, "mit")
    return folder


def test_publishing(server: HubServer, client: Client, licensed: Path, tmp_path: Path) -> None:
    """Upload, tag, fetch back; a second time there is nothing to do; edits of the card stay."""
    arguments = ["publish", licensed, "--repo", "ada/published", "--yes"]
    reply = client.load("hub", *arguments)
    assert reply["code"] == 0, reply
    repository = server.repositories["ada/published"]
    commit, files = repository.at("v1") or ("", {})
    sha256 = sha256_of(licensed / "model.safetensors")
    assert sorted(files) == FILES and files["model.safetensors"] == (licensed / "model.safetensors").read_bytes()
    assert f"uploaded as {commit}, tagged v1, fetched back and compared" in reply["out"]
    assert f'Weights("hosted", "{sha256}", "v1", "ada/published")' in reply["out"]
    card = files["README.md"].decode()
    assert 'timm.create_model("hf-hub:ada/published"' in card
    assert "nothing to upload: all files are there already, tagged v1" in client.load("hub", *arguments)["out"]
    repository.refs.pop("v1")  # as if the connection had broken off between the upload and the tag
    assert f"uploaded as {commit}, tagged v1" in client.load("hub", *arguments)["out"]
    assert len(repository.commits) == 2 and repository.refs["v1"] == commit  # the first is of the empty repository

    edited = card.replace(END, f"{END}\n\n## Notes of ours\n").replace("entry |", "lost |")
    repository.commit({**files, "README.md": edited.encode(), "LICENSE": b"ask us"})
    reply = client.load("hub", *arguments[:-1])
    assert "README.md" in reply["out"] and "changed" in reply["out"] and "'LICENSE' is there and stays" in reply["out"]
    assert re.search(r"^  -\| lost \|", reply["out"], re.MULTILINE)
    assert "model.safetensors" in reply["out"] and "same" in reply["out"]
    reply = client.load("hub", *arguments, "--tag", "v1")
    assert reply["code"] == 1 and "has a revision v1 already" in reply["err"]
    assert "--tag must be letters, digits" in client.load("hub", *arguments, "--tag", "bad tag!")["err"]
    reply = client.load("hub", *arguments)
    _, files = repository.at("v2") or ("", {})
    assert "tagged v2" in reply["out"] and files["LICENSE"] == b"ask us"
    repository.refs.pop("v2")  # the tag failed, while v1 names the commit before
    assert "tagged v2, fetched back and compared" in client.load("hub", *arguments)["out"]
    assert "\n## Notes of ours\n" in files["README.md"].decode() and b"lost" not in files["README.md"]


def test_what_comes_back_is_compared(server: HubServer, client: Client, licensed: Path) -> None:
    repository = server.add("ada/lossy", {})
    repository.fault = sends_other_contents(b"!" * (licensed / "model.safetensors").stat().st_size)
    reply = client.load("hub", "publish", licensed, "--repo", "ada/lossy", "--yes")
    assert reply["code"] == 1 and "model.safetensors of ada/lossy at v1" in reply["err"]
    assert "is not what was sent" in reply["err"] and len(reply["err"].splitlines()) == 1


def test_folders_that_are_not_published(client: Client, classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "out")
    arguments = ["publish", tmp_path / "out", "--repo"]
    assert "--repo must be ORG/NAME, got 'x'" in client.load("hub", *arguments, "x")["err"]
    golden = load_file(tmp_path / "out" / "golden.safetensors")
    golden["logits"] += 0.01
    sha256 = sha256_of(tmp_path / "out" / "model.safetensors")
    save_file(golden, tmp_path / "out" / "golden.safetensors", metadata={"model_sha256": sha256})
    assert "the answers differ from the golden ones by" in client.load("hub", *arguments, "ada/x")["err"]
    save_file(golden, tmp_path / "out" / "golden.safetensors", metadata={"model_sha256": "0"})
    assert "belongs to weights with sha256 0" in client.load("hub", *arguments, "ada/x")["err"]
    (tmp_path / "out" / "golden.safetensors").unlink()
    assert "lacks golden.safetensors" in client.load("hub", *arguments, "ada/x")["err"]


def test_check(server: HubServer, client: Client, classifier: Path) -> None:
    """What is bundled and hosted is loaded and compared, a wrong one fails; that nothing is hosted is said."""
    reply = client.load("hub", "check")
    assert reply["code"] == 0
    bundled = [name for name, weights in TABLE.items() if weights.where == "bundled"]
    lines = reply["out"].splitlines()
    for name in bundled:
        answers = "features and logits" if timm.models.get_pretrained_cfg(name).num_classes else "features"
        assert any(line.startswith(f"{name}: ok, bundled, golden {answers} match to") for line in lines)
    assert any(weights.where == "hosted" for weights in TABLE.values()) or lines[len(bundled) :] == [
        "no entry is hosted yet"
    ]
    model = timm.create_model("arm_tiny_patch16_224")
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(Path(name) / "run")
        convert(Path(name) / "run", Path(name) / "out")
        files = {path.name: path.read_bytes() for path in (Path(name) / "out").iterdir()}
    server.add("arm-zoo/checked", files)
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    row = {"where": "hosted", "repository": "arm-zoo/checked", "sha256": sha256}
    entry = "arm_tiny_patch16_224.untrained"
    reply = client.load("hub", "check", table={entry: row})
    assert reply["code"] == 0, reply
    assert f"{entry}: ok, golden features and logits match to" in reply["out"]
    reply = client.load("hub", "check", table={entry: {**row, "sha256": "0" * 64}})
    assert reply["code"] == 1 and f"{entry}: FAILED" in reply["out"] and "its sha256 is" in reply["out"]
    reply = client.load("hub", "check", table={entry: {**row, "repository": "arm-zoo/gone"}})
    assert reply["code"] == 1 and "there is no such repository" in reply["out"]
    assert client.load("hub", "check", classifier, table={entry: {}})["code"] == 0


@pytest.mark.parametrize("damage", ["none", "sha256", "missing", "golden"])
def test_bundled_entries_are_checked(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file, its sha256 and its golden answers, as of hosted ones."""
    entry = next(name for name, weights in TABLE.items() if weights.where == "bundled")
    file, expected = tmp_path / f"{entry}.safetensors", BUNDLED_GOLDEN / f"{entry}.safetensors"
    shutil.copytree(table.BUNDLED_FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(table, "BUNDLED_FOLDER", tmp_path)
    if damage == "sha256":
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif damage == "missing":
        file.unlink()
    elif damage == "golden":
        with safe_open(expected, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(expected)
        monkeypatch.setattr("hub.check.BUNDLED_GOLDEN", tmp_path / "golden")
        shutil.copytree(BUNDLED_GOLDEN, tmp_path / "golden")
        save_file({**tensors, "logits": tensors["logits"] + 0.01}, tmp_path / "golden" / expected.name, metadata)
    assert main(["check"]) == (damage != "none")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(entry)]
    said = {
        "none": "ok, bundled",
        "sha256": "FAILED, .* is damaged, cut short or another file",
        "missing": "FAILED, .*No such file or directory; install arm-zoo anew",
        "golden": "FAILED, .*the answers differ from the golden ones by",
    }
    assert re.match(f"{entry}: {said[damage]}", line), line


def test_measured_figures_come_from_the_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They appear in the list of entries as soon as eval's CSV has them, by the sha256 of the weights."""
    entry = next(name for name, weights in TABLE.items() if weights.where == "bundled")
    results, sha256 = tmp_path / "results.csv", TABLE[entry].sha256
    assert measured(sha256, results) == {}
    results.write_text(f"set,n,top1,weights_sha256\ncustom,360,99.1667,{sha256}\ncustom,360,1,another\n")
    assert {name: row["top1"] for name, row in measured(sha256, results).items()} == {"custom": "99.1667"}
    assert measured(None, results) == {}
    monkeypatch.setattr("hub.upstream.RESULTS", results)
    assert _known(entry).endswith("licence apache-2.0; measured by us: custom 99.17")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "encoder", "pretraining"])
def test_the_snippets_of_cards_run(
    kind: str, server: HubServer, client: Client, classifier: Path, tmp_path: Path
) -> None:
    """As they stand in the card, against the Hub, with an image."""
    out = classifier
    if kind != "classifier":
        out = tmp_path / "out"
        model = (
            arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64)
            if kind == "pretraining"
            else small(num_classes=0)
        )
        model.save_pretrained(tmp_path / "run")
        convert(tmp_path / "run" / "model.safetensors", out)
    Image.linear_gradient("L").save(tmp_path / "image.jpg")
    assert client.load("hub", "publish", out, "--repo", f"ada/{kind}", "--yes", "--license", "mit")["code"] == 0
    _, files = server.repositories[f"ada/{kind}"].at("main") or ("", {})
    snippets = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    names: dict[str, Any] = {}
    for snippet in snippets:
        if "transformers" in snippet and importlib.util.find_spec("transformers") is None:
            continue
        reply = client.load("run", snippet, tmp_path)
        assert "names" in reply, (snippet, reply)
        names |= reply["names"]
    if kind == "classifier":
        assert names["probabilities"] == [1, 4] and names["pooled"] == [2, 32] and names["final"] == [2, 17, 32]
    if kind == "pretraining":
        assert names["loss"] == [] and names["latents"] == [2, 12, 64, 4]
    if kind == "encoder":
        assert names["vector"] == [1, 32] and names["pooled"] == [2, 32]
    assert len(snippets) == 3


# other programs


def test_transformers(classifier: Path, tmp_path: Path) -> None:
    """Through its timm wrapper; `import arm_zoo` is all that it needs more."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForImageClassification.from_pretrained(classifier).eval()
    golden = load_file(classifier / "golden.safetensors")
    with torch.inference_mode():
        assert torch.allclose(model(golden["input"]).logits, golden["logits"], atol=1e-5)
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "image.png")
    answers = transformers.pipeline("image-classification", model=str(classifier))(str(tmp_path / "image.png"))
    assert {answer["label"] for answer in answers} == {"ant", "bee", "cat", "dog"}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-4)


def test_pt2_and_official_names(tmp_path: Path) -> None:
    model = small(PICO, in_chans=3, img_size=8)
    model.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model.pt2"), "--format", "pt2"]) == 0
    images = torch.randn(3, 3, 8, 8)
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.allclose(program(images), model(images), atol=1e-5)
    file = tmp_path / "official.safetensors"
    assert main(["export", str(tmp_path / "run"), str(file), "--format", "official"]) == 0
    expected = to_official(model)
    assert load_file(file).keys() == expected.keys()
    convert(file, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def test_what_is_not_exported_or_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64).save_pretrained(tmp_path / "run")
    assert "is a pretraining model; onnx and pt2 are for backbones" in mistake(
        capsys, "export", tmp_path / "run", tmp_path / "model.onnx"
    )
    assert "no checkpoint at" in mistake(capsys, "export", tmp_path / "none.pth", tmp_path / "model.onnx")
    segmenter, inputs = Segmenter("test_vit", {"img_size": 16}, num_classes=3), {"input_size": (3, 16, 16)}
    save_segmenter(tmp_path / "segmenter", segmenter, "linear", inputs, [])
    said = mistake(capsys, "convert", tmp_path / "segmenter", tmp_path / "out")
    assert "has a segmenter, which needs no conversion; load its folder as it is: timm.create_model" in said
    for format in ("onnx", "pt2", "official"):
        arguments = ("export", tmp_path / "segmenter", tmp_path / "model", "--format", format)
        assert "is a Segmenter, a backbone with a head of another kind; allowed: a backbone" in mistake(
            capsys, *arguments
        )
    assert names_in(tmp_path) == ["run", "segmenter"]
