"""The hub's programs: conversion of every kind of checkpoint, all or nothing, and one line for every mistake."""

import argparse
import fractions
import itertools
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import arm_zoo
from arm_zoo import to_official
from arm_zoo.files import CheckpointError, read_checkpoint, sha256_of
from arm_zoo.variant import find_variant
from hub.__main__ import main
from hub.card import BEGIN, END
from hub.convert import convert

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


# conversion gives the authors' numbers


@pytest.mark.parametrize("case", ["arm_ft_img64_gp", "arm_ft_224_gp"])
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_official_backbones_give_the_golden_logits(case: str, form: str, golden: Path, tmp_path: Path) -> None:
    """Converted by the shapes alone, then loaded as timm's users do."""
    file = golden / case / "state_dict.safetensors"
    if form == "pth":
        torch.save({"model": load_file(file), "args": argparse.Namespace()}, tmp_path / "anything.bin")
        file = tmp_path / "anything.bin"
    assert main(["convert", str(file), str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    pictures = load_file(golden / case / "inputs.safetensors")["images"]
    expected = load_file(golden / case / "outputs_f64.safetensors")["logits"]
    with torch.inference_mode():
        error = (model.double()(pictures.double()) - expected).abs().max() / expected.abs().max()
    assert error < 1e-7  # the parameters are float32
    assert to_official(model.float()).keys() == load_file(golden / case / "state_dict.safetensors").keys()
    for name, value in load_file(golden / case / "state_dict.safetensors").items():
        assert torch.equal(to_official(model)[name], value), name


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
    pictures = load_file(case / "inputs.safetensors")["images"].double()
    with torch.inference_mode():
        latent = model.double().forward_encoder(pictures)
        loss, prediction, _ = model(pictures)
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
    assert variant.pretraining == expected
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
    assert "no averaged weights (model_ema); it holds model, optimizer, epoch" in message


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


def test_exports_of_our_recipes_keep_what_shapes_cannot_tell(tmp_path: Path) -> None:
    """Classes' names, preprocessing and a grid that is no square stand in the config.json beside the file."""
    model = small(PICO, img_size=(8, 16), embed_dim=64, num_classes=3, in_chans=1)
    model.save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["label_names"] = ["ant", "bee", "cat"]
    config["pretrained_cfg"] |= {"mean": [0.25], "std": [0.5], "crop_pct": 0.9}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "run" / "model.safetensors", tmp_path / "out", license="apache-2.0")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert loaded.patch_embed.img_size == (8, 16)
    assert loaded.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    assert (loaded.pretrained_cfg["mean"], loaded.pretrained_cfg["crop_pct"]) == ([0.25], 0.9)
    assert loaded.pretrained_cfg["license"] == "apache-2.0" and "origin_url" not in loaded.pretrained_cfg
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_exports_of_our_pretraining(tmp_path: Path) -> None:
    model = arm_zoo.create_pretraining_model("arm_pico", img_size=(8, 16))
    model.save_pretrained(tmp_path / "run")
    convert(tmp_path / "run" / "model.safetensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretraining_model"] == {**model.config, "img_size": [8, 16]}
    golden = load_file(tmp_path / "out" / "golden.safetensors")
    assert torch.allclose(model.eval().forward_encoder(golden["input"]), golden["features"], atol=1e-5)


# mistakes


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


def test_other_architectures(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "vit.safetensors")
    message = mistake(capsys, "convert", tmp_path / "vit.safetensors", tmp_path / "out")
    assert "this is no ARM checkpoint" in message and "found blocks.0.attn.proj.bias" in message
    vim = golden / "vim_small_img64" / "state_dict.safetensors"
    assert "Vim checkpoint" in mistake(capsys, "convert", vim, tmp_path / "out")


class RunsCode:
    """A pickle of this makes a folder when it is read by pickle's own rules."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


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
    assert f"asks to run fractions.Fraction, {os.mkdir.__module__}.mkdir; nothing in it was run" in message
    assert names_in(tmp_path) == ["trap.pth"]
    pickle.loads(file.read_bytes()) if form == "protocol 4" else torch.load(file, weights_only=False)
    assert trap.exists()  # it would have worked


def test_namespaces_alone_are_allowed(tmp_path: Path) -> None:
    allowed = torch.serialization.get_safe_globals()
    file = official_file(tmp_path / "checkpoint.pth", small(), args=argparse.Namespace(inner=argparse.Namespace()))
    assert read_checkpoint(file).keys() == to_official(small()).keys()
    assert torch.serialization.get_safe_globals() == allowed  # what was allowed was allowed for this reading


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
        (OrderedDict(), "this is no ARM checkpoint: .* found nothing"),
    ],
)
def test_files_that_are_no_checkpoints(contents: Any, reason: str, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path / "file.pth", tmp_path / "out")
    assert names_in(tmp_path) == ["file.pth"]


def test_integers_are_no_weights(tmp_path: Path) -> None:
    state_dict = {name: value.int() for name, value in small().state_dict().items()}
    save_file(state_dict, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"has type torch.int32; expected floating point numbers"):
        convert(tmp_path / "file.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model_args": []}, "the model's arguments are a list, not a table"),
        ({"model_args": {"img_size": "64"}}, "img_size is '64'; expected pixels"),
        ({"model_args": {"img_size": 60000}}, "config.json says"),
        ({"pretrained_cfg": 3}, "pretrained_cfg is a int"),
        ({"pretrained_cfg": {"mean": "grey"}}, "mean is 'grey'"),
        ({"pretrained_cfg": {"mean": [0.1, 0.2]}}, "not for 3 channels"),
        ({"label_names": 7}, "label_names is no list of names"),
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
