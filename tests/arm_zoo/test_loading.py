"""Loading: one line for every source, and what a person reads when the Hub, the network or the disk fails.

The real client of the Hub runs in a process of its own against a stand-in on the loopback interface; a guard on its
sockets sees to it that it asks nobody else.
"""

import argparse
import copy
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

import arm_zoo
from arm_zoo import ARM, ARMPretrain, CheckpointError, from_official, from_pretrained, to_official
from arm_zoo.files import sha256_of
from arm_zoo.identify import _sizes_of_entries
from arm_zoo.loading import architecture_of, label_names, load
from arm_zoo.models._builder import ARCHITECTURES
from arm_zoo.weights import hosted as table
from arm_zoo.weights.hosted import Weights
from arm_zoo.weights.reading import read_contents
from hub.__main__ import main as hub_command
from recipes.data.built_in import open_digits
from tests.helpers import hub_server
from tests.helpers.hub_server import Client, HubServer, digest
from tests.helpers.official import RunsCode

PICO, ENTRY = "arm_pico_patch2_8", "arm_base_patch16_224.arm_in1k_ft_in1k"
TINY_BASE: dict[str, Any] = {"embed_dim": 32, "depth": 1}  # the entry's model in small, for what is loaded by its name


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(PICO, num_classes=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def files(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A published folder's two files that loading needs."""
    folder = tmp_path_factory.mktemp("folder")
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def entry_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same for a small stand-in of a registered entry."""
    folder = tmp_path_factory.mktemp("entry")
    torch.manual_seed(2)
    timm.create_model(ENTRY, **TINY_BASE).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# folders and files


def test_backbones_from_everywhere(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "folder")
    save_file(to_official(model), tmp_path / "official.safetensors")
    torch.save({"model": to_official(model)}, tmp_path / "official.pth")
    folder = tmp_path / "folder"
    sources = [folder, str(folder), f"local-dir:{folder}", folder / "model.safetensors"]
    for source in [*sources, tmp_path / "official.safetensors", str(tmp_path / "official.pth")]:
        loaded = from_pretrained(source)
        assert isinstance(loaded, arm_zoo.models.arm.ARM)
        assert digest(loaded) == digest(model), source
    finetuned = from_pretrained(tmp_path / "official.pth", num_classes=7, drop_path_rate=0.1)
    assert finetuned.num_classes == 7 and torch.equal(finetuned.norm.weight, model.norm.weight)
    assert from_pretrained(folder, num_classes=7).num_classes == 7
    assert from_pretrained(folder, img_size=16).patch_embed.img_size == (16, 16)


def test_a_path_that_does_not_exist_may_name_an_entry(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As programs hand it on that take names and files by one option."""
    monkeypatch.chdir(tmp_path)
    assert digest(from_pretrained(Path(PICO))) == digest(from_pretrained(PICO))
    model.save_pretrained(PICO)
    assert digest(from_pretrained(Path(PICO))) == digest(model)


def test_a_model_for_use_says_where_its_weights_are(model: nn.Module, tmp_path: Path) -> None:
    """Of ours and of timm, by entry, folder and file; a file without a head makes a model without one."""
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "bare.safetensors")
    model.save_pretrained(tmp_path / "folder")
    entry = f"{PICO}.arm_digits_ft_digits"
    assert load(PICO)[1:] == (table.bundled_file(entry), f"{entry}.safetensors", {})
    folder, bare = load(tmp_path / "folder"), load(PICO, tmp_path / "bare.safetensors")
    assert (folder.file, folder.source) == (tmp_path / "folder" / "model.safetensors", "folder")
    assert folder.config["architecture"] == PICO and bare[1:] == (
        tmp_path / "bare.safetensors",
        "bare.safetensors",
        {},
    )
    assert digest(folder.model) == digest(bare.model) == digest(model)
    with pytest.raises(ValueError, match="are of arm_pico_patch2_8, not of arm_base_patch16_224"):
        load("arm_base", tmp_path / "folder")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    assert load("test_vit", tmp_path / "vit.safetensors").model.num_classes == 0
    with pytest.raises(CheckpointError, match=r"this is no ARM or .*checkpoint"):
        load(tmp_path / "vit.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_is_read_once_and_its_model_made_once(
    kind: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, calls = tmp_path / f"weights.{kind}", []
    (save_file if kind == "safetensors" else torch.save)(model.state_dict(), file)

    def counted(function: Any) -> Any:
        return lambda *args, **kwargs: calls.append(function.__name__) or function(*args, **kwargs)

    reader = "arm_zoo.weights.reading.load_file" if kind == "safetensors" else "torch.load"
    monkeypatch.setattr(reader, counted(arm_zoo.weights.reading.load_file if kind == "safetensors" else torch.load))
    monkeypatch.setattr(arm_zoo.models.arm.ARM, "init_weights", counted(arm_zoo.models.arm.ARM.init_weights))
    loaded = from_pretrained(file)
    assert sorted(calls) == sorted(["load_file" if kind == "safetensors" else "load", "init_weights"])
    assert digest(loaded) == digest(model) and "state_dict" not in loaded.pretrained_cfg


def test_the_table_of_sizes_is_that_of_the_models() -> None:
    """Checkpoints are told by it, and no model is built to learn its sizes."""
    patches = {entry["name"]: entry["patches"] for entry in _sizes_of_entries(ARM)}
    for name in patches:
        sizes, built = ARCHITECTURES[name].sizes(name), timm.create_model(name, device="meta")
        embed = built.patch_embed
        assert (embed.img_size, embed.grid_size[0] * embed.grid_size[1]) == (
            tuple(sizes["img_size"]),
            patches[name],
        )
        found = (built.embed_dim, len(built.blocks), built.blocks[0].mixer.d_state, built.in_chans)
        assert found == tuple(sizes[key] for key in ("embed_dim", "depth", "d_state", "in_chans")), name
    assert {architecture_of("arm_large"), architecture_of("arm_large_patch16_224.in1k")} == {"arm_large_patch16_224"}


def test_objectives_of_pretraining_models(tmp_path: Path) -> None:
    """A folder names its objective; one from before that is autoregressive, an unknown one is refused."""
    arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("objective") == "autoregressive"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert isinstance(from_pretrained(tmp_path), ARMPretrain)
    for name in ("contrastive", ["autoregressive"], None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "objective": name}))
        with pytest.raises(CheckpointError, match=r"names the objective .*; expected one of autoregressive"):
            from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown objective 'contrastive'; choose one of autoregressive"):
        arm_zoo.create_pretraining_model("arm_pico", objective="contrastive")


def test_folders_of_pickles(model: nn.Module, tmp_path: Path) -> None:
    """timm's save_for_hf writes pytorch_model.bin unless it is told otherwise; safetensors beside it come first."""
    save_for_hf(model, str(tmp_path))
    file = tmp_path / "pytorch_model.bin"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    for source in (tmp_path, f"local-dir:{tmp_path}", file):
        assert digest(from_pretrained(source)) == digest(model)
    assert from_pretrained(tmp_path, num_classes=5).num_classes == 5
    assert hub_command(["convert", str(tmp_path), str(tmp_path / "converted")]) == 0
    assert digest(from_pretrained(tmp_path / "converted")) == digest(model)
    save_file({name: value + 1 for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert digest(from_pretrained(tmp_path)) != digest(model) == digest(from_pretrained(file))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": RunsCode(tmp_path / "trap")}, file)
    with pytest.raises(CheckpointError, match=r"it asks to run 'posix\.mkdir'; nothing in it was run"):
        from_pretrained(tmp_path)
    assert not (tmp_path / "trap").exists()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin in "):
        from_pretrained(tmp_path)


def test_checkpoints_of_timms_scripts(model: nn.Module, tmp_path: Path) -> None:
    """Those of train.py, where the averaged weights come first, and what avg_checkpoints.py writes."""
    average = ModelEmaV3(model)
    for parameter in average.module.parameters():
        nn.init.normal_(parameter)
    arguments, optimizer = argparse.Namespace(model=PICO, lr=0.1), torch.optim.AdamW(model.parameters())
    for ema in (None, average):
        folder = tmp_path / str(ema is None)
        folder.mkdir()
        saver = CheckpointSaver(model, optimizer, arguments, ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
        saver.save_checkpoint(0, metric=1.0)
        assert_loads(
            folder / "last.pth.tar", model if ema is None else average.module, tmp_path / f"out {ema is None}"
        )
    torch.save(model.state_dict(), tmp_path / "averaged.pth")
    assert_loads(tmp_path / "averaged.pth", model, tmp_path / "out")


@pytest.mark.parametrize("prefix", ["net.", "model.net.", "module.net.", "net._orig_mod."])
def test_modules_around_a_model(prefix: str, model: nn.Module, tmp_path: Path) -> None:
    """As PyTorch Lightning saves them, of our names and of the authors'."""
    beside = {"epoch": 1, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}, "callbacks": {}}
    for number, tensors in enumerate((model.state_dict(), to_official(model))):
        wrapped = {f"{prefix}{name}": value for name, value in tensors.items()}
        file = tmp_path / f"epoch={number}.ckpt"
        torch.save({"state_dict": wrapped, **beside}, file)
        assert_loads(file, model, tmp_path / f"out{number}")
        assert digest(load(PICO, file).model) == digest(model)
        if number:
            assert_same_tensors(from_official(wrapped, model), model.state_dict())
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    assert digest(from_pretrained(tmp_path / "wrapped.safetensors")) == digest(model)
    with open(tmp_path / "wrapped.safetensors", "rb") as opened:
        assert read_contents(opened, "wrapped.safetensors").tensors.keys() == to_official(model).keys()


@pytest.mark.parametrize("name", ["test_resnet", "deepseek_vit_412m", "samvit_base_patch16"])
def test_prefixes_of_timms_models_are_left_to_timm(name: str, tmp_path: Path) -> None:
    """Some of its models have a prefix of their own, and some of its filters look for one."""
    small = {} if name == "test_resnet" else {"embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model(name, num_classes=0, **small)
    of_sam = name.startswith("samvit")  # the names of Segment Anything's own image encoder
    saved = {
        f"image_encoder.{key.replace('mlp.fc', 'mlp.lin')}" if of_sam else key: value
        for key, value in model.state_dict().items()
    }
    torch.save({"state_dict": saved}, tmp_path / "a")
    assert_same_tensors(load(name, tmp_path / "a", **small).model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "asked", [{"num_classes": 0}, {"features_only": True}, {"features_only": True, "out_indices": [1]}]
)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_parts_of_modules_around_timms_models(name: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """Without the head that the file has, or as features: as from the same file without the prefix."""
    tensors = timm.create_model(name, num_classes=3).state_dict()
    torch.save(tensors, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"net.{key}": value for key, value in tensors.items()}}, tmp_path / "last.ckpt")
    plain, wrapped = (load(name, tmp_path / file, **asked).model for file in ("plain.pth", "last.ckpt"))
    assert_same_tensors(wrapped.state_dict(), plain.state_dict())


@pytest.mark.parametrize("prefix", ["", "net.", "model.net.", "module.model."])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "deepseek_vit_412m"])
def test_modules_around_timms_models(name: str, prefix: str, tmp_path: Path) -> None:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2} if name.startswith("deepseek") else {"num_classes": 3}
    model = timm.create_model(name, **small)
    wrapped = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "pytorch-lightning_version": "2.5.0"}, tmp_path / "last.ckpt")
    found = load(name, tmp_path / "last.ckpt", **small).model
    assert_same_tensors(found.state_dict(), model.state_dict())


def test_a_prefix_that_not_all_names_share_is_left(model: nn.Module, tmp_path: Path) -> None:
    """Which of two models is meant, or what a tensor beside the model is for, nobody knows."""
    twice = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in model.state_dict().items()}
    beside = {f"net.{key}": value for key, value in model.state_dict().items()} | {"criterion.weight": torch.ones(3)}
    for tensors, found in ((twice, r"found student\.blocks"), (beside, r"found criterion\.weight, net\.blocks")):
        torch.save({"state_dict": tensors}, tmp_path / "last.ckpt")
        with pytest.raises(CheckpointError, match=found):
            from_pretrained(tmp_path / "last.ckpt")
        with pytest.raises(CheckpointError, match="the checkpoint does not fit the model"):
            load(PICO, tmp_path / "last.ckpt")


def assert_same_tensors(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def assert_loads(file: Path, model: nn.Module, out: Path) -> None:
    """With its very weights, by timm, by us, and once converted."""
    overlay = {"file": str(file)}
    loaded = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert hub_command(["convert", str(file), str(out)]) == 0
    for each in (loaded, from_pretrained(file), from_pretrained(out)):
        assert digest(each) == digest(model)


@pytest.mark.parametrize(
    "saved, expected",
    [
        (["ant", "bee"], ("ant", "bee")),
        ({"1": "bee", "0": "ant"}, ("ant", "bee")),
        (["ant"], ()),
        (["ant", "bee", "cat"], ()),
        ({"0": "ant", "2": "cat"}, ()),
        (["LABEL_0", "LABEL_1"], ()),
        (None, ()),
    ],
)
def test_names_of_classes_are_as_many_as_the_classes(saved: Any, expected: tuple[str, ...]) -> None:
    assert label_names({"label_names": saved}, 2) == expected


def test_pretraining_models_from_everywhere(tmp_path: Path) -> None:
    pretrained = arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64)
    pretrained.save_pretrained(tmp_path / "folder")
    save_file(to_official(pretrained), tmp_path / "official.safetensors")
    for source in (tmp_path / "folder", tmp_path / "official.safetensors"):
        loaded = from_pretrained(source)
        assert isinstance(loaded, ARMPretrain)
        assert digest(loaded) == digest(pretrained)
        assert loaded.forward_encoder(torch.zeros(1, 1, 8, 8)).shape == (1, 12, 64, 4)
        backbone = from_pretrained(source, as_backbone=True, num_classes=4)
        assert isinstance(backbone, arm_zoo.models.arm.ARM) and backbone.num_classes == 4
        assert torch.equal(backbone.blocks[0].mlp.fc1.weight, pretrained.blocks[0].mlp.fc1.weight)
    larger = from_pretrained(tmp_path / "folder", img_size=16)  # further pretraining on larger images
    assert larger.config["img_size"] == 16 and torch.equal(larger.decoder_norm.bias, pretrained.decoder_norm.bias)
    with pytest.raises(TypeError, match=r"unknown keyword num_classes.*as_backbone=True"):
        from_pretrained(tmp_path / "folder", num_classes=4)


def test_save_and_load_again(model: nn.Module, tmp_path: Path) -> None:
    """What was loaded, resized and given another head is saved as it is."""
    model.save_pretrained(tmp_path / "first")
    loaded = from_pretrained(tmp_path / "first", num_classes=5)
    loaded.set_input_size(img_size=12)
    loaded.save_pretrained(tmp_path / "second")
    again = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True)
    assert digest(again) == digest(loaded) and again.patch_embed.img_size == (12, 12)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["num_classes"] == 5
    assert timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True, num_classes=2).num_classes == 2


def test_a_pruned_model_is_saved_with_its_depth(model: nn.Module, tmp_path: Path) -> None:
    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers([1])
    pruned.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert len(loaded.blocks) == 2 and digest(loaded) == digest(pruned)


def test_the_home_folder_may_be_written_short(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    for source in ("~/saved", "local-dir:~/saved", "~/saved/model.safetensors"):
        assert digest(from_pretrained(source)) == digest(model), source


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("arm_base_patch16_242", ValueError, "did you mean arm_base_patch16_224"),
        ("resnet50", ValueError, "`python -m arm_zoo list` shows the entries"),
        ("arm_tiny_patch4_32.nope", ValueError, "did you mean arm_tiny_patch4_32, "),
        ("arm_tiny_patch4_32.pth", FileNotFoundError, r"no checkpoint at arm_tiny_patch4_32\.pth"),
        ("no/such/folder/here", FileNotFoundError, "no checkpoint at no/such/folder/here"),
        ("none.pth", FileNotFoundError, r"no checkpoint at none\.pth"),
        ("out/pytorch_model.bin", FileNotFoundError, r"no checkpoint at out/pytorch_model\.bin"),
        ("out/model.pt", FileNotFoundError, r"no checkpoint at out/model\.pt"),
        ("out/last.pth.tar", FileNotFoundError, r"no checkpoint at out/last\.pth\.tar"),
        ("../out", FileNotFoundError, r"no checkpoint at \.\./out"),
        ("local-dir:nowhere", FileNotFoundError, r"no config\.json in nowhere"),
        ("arm_large_patch16_224.in1k", CheckpointError, "are not hosted yet"),
    ],
)
def test_sources_that_are_none(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_pretrained(source)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "resnet50"}, "is of 'resnet50', which is no model of arm_zoo"),
        ({"architecture": None}, "is of None"),
        ({"model_args": {"width": 3}}, "model_args has width; expected"),
        ({"pretrained_cfg": 7}, "pretrained_cfg has 7; expected"),
        ({"pretraining_model": {"img_size": 8, "speed": 1}}, "pretraining_model has speed; expected"),
        ({"pretraining_model": {"img_size": 7}}, "cannot be built: .*multiple"),
    ],
)
def test_configurations_that_are_none(change: dict[str, Any], message: str, model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**40, 10**30, 0.5, 1e308, math.nan]))
SIMPLE = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=5))
VALUES = st.one_of(SIMPLE, st.lists(SIMPLE, max_size=3), st.dictionaries(st.text(max_size=5), SIMPLE, max_size=1))
DAMAGE = [b"", b"\0", b"\xff", b"9" * 5000, b"[" * 9999]


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """One value somewhere in a JSON document is another one, gone or new; or its bytes are changed."""
    if draw(st.integers(0, 3)) == 0:
        contents = text.encode()
        at = draw(st.integers(0, len(contents) - 1))
        return contents[:at] + draw(st.sampled_from(DAMAGE)) + contents[at + 1 :]
    place = document = json.loads(text)
    while True:
        key = draw(st.sampled_from([*place, "new"] if isinstance(place, dict) else list(range(len(place)))))
        inner = place[key] if key != "new" else None
        if isinstance(inner, dict | list) and inner and draw(st.booleans()):
            place = inner
        elif inner is None or draw(st.booleans()):
            place[key] = draw(VALUES)
            return json.dumps(document).encode()
        else:
            del place[key]
            return json.dumps(document).encode()


@pytest.mark.parametrize("kind", ["backbone", "pretraining", pytest.param("both", marks=pytest.mark.slow)])
def test_damaged_configurations_end_in_our_error(kind: str, model: nn.Module, tmp_path: Path) -> None:
    """Whatever config.json says: our error, or a model with the very weights of the file."""
    saved = model if kind == "backbone" else arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64, depth=2)
    saved.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    if kind == "both":  # as `python -m hub convert` writes it
        backbone = timm.create_model(PICO, num_classes=0, depth=2).hub_config()
        file.write_text(json.dumps({**backbone, "pretraining_model": saved.config}))
    weights, outcomes = digest(saved), {"loaded": 0, "refused": 0}

    @settings(max_examples=70, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(damaged(file.read_text()), st.booleans())
    def fuzz(contents: bytes, as_backbone: bool) -> None:
        file.write_bytes(contents)
        try:
            loaded = from_pretrained(tmp_path, as_backbone=as_backbone)
            outcomes["loaded"] += 1
        except CheckpointError as error:
            assert str(tmp_path) in str(error) or "does not fit the model" in str(error)
            outcomes["refused"] += 1
        else:
            assert digest(loaded) == weights or type(loaded) is not type(saved)  # a backbone of a pretraining model

    fuzz()
    assert outcomes["refused"] > 20 and outcomes["loaded"] > 10, outcomes


def test_no_head_is_made_for_classes_beyond_number(tmp_path: Path) -> None:
    """An encoder's head is new, so nothing in the file contradicts the configuration."""
    timm.create_model(PICO, num_classes=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 2**40, "label_names": ["a"]}))
    with pytest.raises(CheckpointError, match="num_classes=1099511627776; expected at most 1000000"):
        from_pretrained(tmp_path)


# weights that come with the package


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bundled_weights(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one line of the table; nothing is asked of any network, and the sha256 is checked."""
    architecture = "arm_tiny_patch16_224"
    entry, model = f"{architecture}.untrained", timm.create_model(architecture, num_classes=3)
    file = tmp_path / f"{entry}.safetensors"
    save_file({name: value.to(dtype) for name, value in model.state_dict().items()}, file)
    monkeypatch.setattr(table, "BUNDLED_FOLDER", tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.setitem(table.TABLE, entry, Weights("bundled", sha256_of(file)))
    by_timm = timm.create_model(architecture, pretrained=True, num_classes=3)
    for loaded in (by_timm, from_pretrained(entry, num_classes=3)):
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value.to(dtype).float()), name
    assert timm.create_model(entry, pretrained=True, num_classes=0).num_classes == 0
    with pytest.raises(CheckpointError, match=f"a small model that comes with the package: .*{PICO}"):
        timm.create_model("arm_base_patch16_224.in1k", pretrained=True)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is damaged, cut short or another file.*install arm-zoo anew"):
        timm.create_model(architecture, pretrained=True)
    file.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        timm.create_model(architecture, pretrained=True)


def test_a_folder_whose_files_disagree_about_classes(tmp_path: Path) -> None:
    timm.create_model(PICO, num_classes=10).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 3}))
    with pytest.raises(CheckpointError, match=r"says 3 classes, but the weights beside it have 10: the two files"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).num_classes == 5


def test_a_url_of_the_caller_counts_before_bundled_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = timm.create_model(PICO)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"url": (tmp_path / "weights.pth").as_uri()}
    loaded = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_every_bundled_entry_loads() -> None:
    """Those that the package has: registered, there, and what their line says."""
    bundled = [entry for entry, weights in table.TABLE.items() if weights.where == "bundled"]
    assert len(bundled) == 5 == len(list(table.BUNDLED_FOLDER.glob("*.safetensors")))
    for entry in bundled:
        assert timm.create_model(entry, pretrained=True)(torch.zeros(1, *_input_size(entry))).isfinite().all()
        assert table.bundled_file(entry).stat().st_size <= 15e6
        assert entry in timm.list_pretrained()


def test_the_bundled_digits_classifier_reads_digits() -> None:
    """As its users run it, on the held-out images of the recipes: the figure of recipes/RESULTS.md."""
    model = timm.create_model(PICO, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    digits = open_digits().test
    assert digits is not None and len(digits) == 360
    images, labels = zip(*((transform(digits[i][0]), digits[i][1]) for i in range(360)), strict=True)
    with torch.inference_mode():
        answers = model(torch.stack(images)).argmax(dim=1)
    assert answers.eq(torch.tensor(labels)).sum() == 357


def _input_size(entry: str) -> tuple[int, int, int]:
    return timm.models.get_pretrained_cfg(entry).input_size


def test_no_weights_and_three_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARM_ZOO_UPSTREAM", "0")
    with pytest.raises(CheckpointError) as error:
        timm.create_model("arm_large", pretrained=True)
    message = str(error.value)
    first, *_ = message.splitlines()
    assert first.startswith(
        "the weights of arm_large_patch16_224.arm_in1k_ft_in1k are published only by their authors (Oliver"
    )
    assert first.endswith("ARM_ZOO_UPSTREAM=0 forbids fetching them. Ways on:")
    assert "python -m hub convert FILE OUT" in message
    configs = re.findall(r"accelerate launch -m (recipes\.\w+) --config (\S+)", message)
    assert configs == [
        ("recipes.pretrain", "recipes/configs/pretrain_large.yaml"),
        ("recipes.finetune", "recipes/configs/finetune_large.yaml"),
    ]
    assert "a small model that comes with the package" in message
    with pytest.raises(CheckpointError, match=r"recipes\.finetune --config recipes/configs/supervised_large\.yaml"):
        timm.create_model("arm_large_patch16_224.in1k", pretrained=True)


def test_training_commands_go_the_whole_way() -> None:
    """Finetuned weights are made of trained ones; a size without a configuration has its family's."""
    configs = re.findall(r"configs/(\S+)", table.training_commands("vim_tiny_patch16_stride8_224.in1k_ft"))
    assert configs == ["supervised_vim_tiny.yaml", "finetune_vim_tiny_stride8.yaml"]
    command = table.training_commands("vim_large_patch16_224.untrained")
    assert "supervised_vim_base.yaml model=vim_large_patch16_224" in command


def test_training_commands_name_configurations_that_are_there(repo: Path) -> None:
    for entry in timm.list_models("arm_*", include_tags=True):
        configs = re.findall(r"--config (\S+)", table.training_commands(entry))
        assert configs and all((repo / config).exists() for config in configs), entry


def test_the_table_names_registered_entries() -> None:
    for entry, weights in table.TABLE.items():
        assert timm.is_model(entry), entry
        assert weights.where in ("planned", "upstream") or len(weights.sha256 or "") == 64, entry


# from the Hub


def test_repositories(
    hub: HubServer, client: Client, model: nn.Module, files: dict[str, bytes], tmp_path: Path
) -> None:
    """By both names, at a revision, with other classes; that the table does not know the copy is said."""
    repository = hub.add("ada/pico", files)
    old = repository.refs["main"]
    repository.commit({**files, "model.safetensors": b"later"})
    repository.refs["v1"] = old
    for name in ("ada/pico", "hf-hub:ada/pico"):
        reply = client.load("arm_zoo", name, revision="v1", cache_dir=tmp_path)
        assert reply["digest"] == digest(model) and reply["class"] == "ARM"
        [line] = reply["log"]
        assert "ada/pico: model.safetensors is not verified" in line
    reply = client.load("timm", "hf-hub:ada/pico@v1", pretrained=True, num_classes=5, cache_dir=tmp_path)
    assert reply["classes"] == 5 and "not verified" in reply["log"][0]
    assert client.load("arm_zoo", f"ada/pico@{old}", cache_dir=tmp_path)["digest"] == digest(model)


def test_pretraining_repositories(hub: HubServer, client: Client, tmp_path: Path) -> None:
    pretrained = arm_zoo.create_pretraining_model("arm_pico", decoder_dim=64)
    pretrained.save_pretrained(tmp_path / "folder")
    hub.add("ada/pretrained", {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()})
    reply = client.load("arm_zoo", "ada/pretrained", cache_dir=tmp_path / "cache")
    assert (reply["class"], reply["digest"]) == ("ARMPretrain", digest(pretrained))
    assert client.load("arm_zoo", "ada/pretrained", as_backbone=True, cache_dir=tmp_path / "cache")["class"] == "ARM"


@pytest.mark.parametrize("call", ["timm", "arm_zoo"])
def test_entries_of_our_organisation(
    call: str, hub: HubServer, client: Client, entry_files: dict[str, bytes], tmp_path: Path
) -> None:
    """With the sha256 of the table; then with one that differs."""
    hub.add("arm-zoo/small", entry_files)
    sha256 = hashlib.sha256(entry_files["model.safetensors"]).hexdigest()
    keywords = {"cache_dir": tmp_path, **(TINY_BASE if call == "timm" else {})}
    keywords |= {"pretrained": True} if call == "timm" else {}
    row = {"where": "hosted", "repository": "arm-zoo/small"}
    reply = client.load(call, ENTRY, table={ENTRY: {**row, "sha256": sha256}}, **keywords)
    assert reply["classes"] == 1000 and reply["log"] == []
    [commit] = hub.repositories["arm-zoo/small"].commits  # which the table knows by its revision only
    other = client.load("arm_zoo", f"arm-zoo/small@{commit}", cache_dir=tmp_path)
    assert other["digest"] == reply["digest"] and "not verified" in other["log"][0]
    assert client.load("arm_zoo", "arm-zoo/small", cache_dir=tmp_path)["log"] == []
    message = client.refused(call, ENTRY, table={ENTRY: {**row, "sha256": "0" * 64}}, **keywords)
    assert f"its sha256 is {sha256}, expected {'0' * 64}" in message and "taken out of the cache" in message
    assert not list(tmp_path.rglob("*.safetensors"))
    client.load(call, ENTRY, table={ENTRY: {}}, **keywords)  # as before


def test_another_organisation(hub: HubServer, client: Client, entry_files: dict[str, bytes], tmp_path: Path) -> None:
    """ARM_ZOO_HUB_ORG is read at each loading; what the table says of ours does not count for others."""
    hub.add(f"lab/{ENTRY}", entry_files)
    lab = {"environment": {"ARM_ZOO_HUB_ORG": "lab"}, "cache_dir": tmp_path}
    reply = client.load("timm", "arm_base", pretrained=True, **TINY_BASE, **lab)
    assert reply["classes"] == 1000 and f"lab/{ENTRY}: model.safetensors is not verified" in reply["log"][0]
    assert client.load("arm_zoo", ENTRY, **lab)["digest"] == reply["digest"]
    message = client.refused("timm", "arm_huge", pretrained=True, **lab)
    assert "cannot fetch model.safetensors of lab/arm_huge_patch16_224.arm_in1k_ft_in1k" in message
    row = {"where": "upstream", "repository": "OliverRen/ARM"}
    reply = client.load("timm", "arm_base", pretrained=True, cache_dir=tmp_path, table={ENTRY: row})
    assert "from OliverRen/ARM: there is no such repository" in reply["message"]


# what goes wrong

REFUSED = {
    "401": (401, "", "refuses access (HTTP 401); log in", "HfHubHTTPError"),
    "401 private": (401, "RepoNotFound", "or it is private; check the name", "RepositoryNotFoundError"),
    "403 gated": (403, "GatedRepo", "access is gated; accept its conditions at", "GatedRepoError"),
    "403": (403, "", "refuses access (HTTP 403); log in", "HfHubHTTPError"),
    "404 repo": (404, "RepoNotFound", "there is no such repository at", "RepositoryNotFoundError"),
    "404 file": (404, "EntryNotFound", "has no such file", "RemoteEntryNotFoundError"),
    "429": (429, "", "answers HTTP 429 (too many requests); try again later", "HfHubHTTPError"),
    "500": (500, "", "answers HTTP 500 (it is out of order); try again later", "HfHubHTTPError"),
}


@pytest.mark.parametrize("only", ["", "model.safetensors"], ids=["at once", "weights only"])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(
    case: str, only: str, hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path
) -> None:
    status, code, message, cause = REFUSED[case]
    hub.add("ada/refused", files, hub_server.refuses(status, code, only))
    reply = client.load("arm_zoo", "ada/refused", cache_dir=tmp_path)
    assert reply["error"] == "DownloadError" and reply["own"]
    assert message in reply["message"] and "\n" not in reply["message"]
    assert cause in reply["causes"]
    assert not list(tmp_path.rglob("*.incomplete")) and not list(tmp_path.rglob("*.safetensors"))
    assert f"cannot fetch {only or 'config.json'} of ada/refused" in reply["message"]


@pytest.mark.parametrize(
    "case, error",
    [
        ("401", "HfHubHTTPError"),
        ("403 gated", "GatedRepoError"),
        ("404 repo", "RepositoryNotFoundError"),
        ("429", "LocalEntryNotFoundError"),
        ("500", "LocalEntryNotFoundError"),
    ],
)
def test_refusals_that_timm_meets_itself(
    case: str, error: str, hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path
) -> None:
    """It reads config.json before any code of ours runs, as the README says; the weights are ours to fetch."""
    status, code, message, _ = REFUSED[case]
    hub.add("ada/refused", files, hub_server.refuses(status, code))
    reply = client.load("timm", "hf-hub:ada/refused", pretrained=True, cache_dir=tmp_path)
    assert (reply["error"], reply["own"]) == (error, False)
    hub.add("ada/refused", files, hub_server.refuses(status, code, "model.safetensors"))
    assert message in client.refused("timm", "hf-hub:ada/refused", pretrained=True, cache_dir=tmp_path)


def test_revisions_that_are_none(hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("ada/pico", files)
    assert "it has no such revision" in client.refused("arm_zoo", "ada/pico@v9", cache_dir=tmp_path)


@pytest.mark.slow
def test_time_out(hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("ada/silent", files, hub_server.silent)
    message = client.refused("arm_zoo", "ada/silent", cache_dir=tmp_path, impatient=True)
    assert "cannot fetch model.safetensors of ada/silent: no whole answer from http://127.0.0.1" in message
    assert "timed out" in message and "HF_ENDPOINT names a mirror" in message


def test_connection_cut_in_the_middle(
    hub: HubServer, client: Client, model: nn.Module, files: dict[str, bytes], tmp_path: Path
) -> None:
    """The client goes on where it was; if that never ends, it says so and leaves nothing behind."""
    hub.add("ada/cut", files, hub_server.cuts_off(files["model.safetensors"], times=2))
    hub.requests.clear()
    reply = client.load("arm_zoo", "ada/cut", cache_dir=tmp_path)
    assert reply.get("digest") == digest(model), reply
    resumed = [line for line in hub.requests if "bytes=" in line]
    half = len(files["model.safetensors"]) // 2
    assert len(resumed) == 2 and half - 4096 < int(resumed[0].rpartition("=")[2].strip("-")) <= half
    hub.add("ada/never", files, hub_server.cuts_off(files["model.safetensors"], times=1000))
    assert "no whole answer from" in client.refused("arm_zoo", "ada/never", cache_dir=tmp_path)


def test_other_contents_than_announced(
    hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Also of a repository that the table does not know: the Hub itself names the sha256 of large files."""
    changed = files["model.safetensors"][:-1] + b"!"
    hub.add("ada/changed", files, hub_server.sends_other_contents(changed))
    message = client.refused("arm_zoo", "ada/changed", cache_dir=tmp_path)
    assert "is damaged, cut short or another file: its sha256 is" in message
    assert not list(tmp_path.rglob("*.safetensors"))
    hub.add("ada/shorter", files, hub_server.sends_other_contents(changed[:635]))
    assert "no whole answer from" in client.refused("arm_zoo", "ada/shorter", cache_dir=tmp_path)


def test_truncated_in_the_cache(
    hub: HubServer, client: Client, model: nn.Module, files: dict[str, bytes], tmp_path: Path
) -> None:
    """It is noticed, said and mended by the next load."""
    hub.add("ada/pico", files)
    client.load("arm_zoo", "ada/pico", cache_dir=tmp_path)
    [cached] = tmp_path.rglob("model.safetensors")
    cached.resolve().write_bytes(files["model.safetensors"][:1000])
    message = client.refused("arm_zoo", "ada/pico", cache_dir=tmp_path)
    assert "cut short" in message and "load again to fetch it anew" in message
    assert client.load("arm_zoo", "ada/pico", cache_dir=tmp_path)["digest"] == digest(model)


def test_offline(
    hub: HubServer,
    client: Client,
    offline: Client,
    model: nn.Module,
    files: dict[str, bytes],
    entry_files: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """From a warm cache everything loads without one request; a cold one is explained."""
    hub.add("ada/pico", files)
    hub.add(f"lab/{ENTRY}", entry_files)
    lab = {"environment": {"ARM_ZOO_HUB_ORG": "lab"}, "cache_dir": tmp_path / "warm", "pretrained": True, **TINY_BASE}
    client.load("arm_zoo", "ada/pico", cache_dir=tmp_path / "warm")
    client.load("timm", "arm_base", **lab)
    hub.requests.clear()
    assert offline.load("arm_zoo", "ada/pico", cache_dir=tmp_path / "warm")["digest"] == digest(model)
    assert offline.load("timm", "hf-hub:ada/pico", pretrained=True, cache_dir=tmp_path / "warm")["digest"]
    assert offline.load("timm", "arm_base", **lab)["classes"] == 1000
    message = offline.refused("arm_zoo", "ada/pico", cache_dir=tmp_path / "cold")
    assert f"offline mode is on (HF_HUB_OFFLINE) and the file is not in the cache {tmp_path / 'cold'}" in message
    assert "local-dir:FOLDER" in message
    assert "offline mode is on" in offline.refused("timm", "arm_base", **{**lab, "cache_dir": tmp_path / "cold"})
    assert hub.requests == []


def test_full_disk(hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("ada/pico", files)
    message = client.refused("arm_zoo", "ada/pico", cache_dir=tmp_path, full=True)
    assert f"the disk of the cache {tmp_path} is full; free some space, or set HF_HOME" in message


def test_read_only_cache(hub: HubServer, client: Client, model: nn.Module, files: dict[str, bytes]) -> None:
    """A filled one, as on clusters, is as good as any; into an empty one nothing can be fetched."""
    hub.add("ada/pico", files)
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        client.load("arm_zoo", "ada/pico", cache_dir=cache)
        (cache / "empty").mkdir()
        for path in [cache, *cache.rglob("*")]:
            if path.is_dir():
                path.chmod(0o555)
        try:
            reply = client.load("arm_zoo", "ada/pico", cache_dir=cache, nobody=True)
            message = client.refused("arm_zoo", "ada/pico", cache_dir=cache / "empty", nobody=True)
        finally:
            for path in [cache, *cache.rglob("*")]:
                if path.is_dir():
                    path.chmod(0o755)
    assert reply["digest"] == digest(model)
    assert str(cache) in message and "cannot be written to; set HF_HOME or cache_dir to a folder of yours" in message


def test_hostile_names(hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path) -> None:
    """Names that leave the cache are refused before anything is written."""
    hub.add("ada/pico", {**files, "../../outside.safetensors": files["model.safetensors"]})
    cache = tmp_path / "deep" / "cache"
    for filename in ("../../outside.safetensors", "/outside.safetensors", "a/../../../outside.safetensors"):
        overlay = {"hf_hub_id": "ada/pico", "hf_hub_filename": filename}
        reply = client.load("timm", PICO, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache)
        assert reply["own"] and reply["error"] == "DownloadError", reply
    for name in ("hf-hub:../../outside", "hf-hub:ada/pico/../../x", "hf-hub:", "hf-hub:a b"):
        assert client.load("arm_zoo", name, cache_dir=cache)["error"] == "DownloadError"
    assert not [path for path in tmp_path.rglob("outside*") if cache not in path.parents]


@pytest.mark.parametrize(("header", "place"), [("ETag", "own"), ("ETag", "blobs/own"), ("X_Repo_Commit", "own")])
def test_hostile_servers(
    header: str, place: str, hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path
) -> None:
    """A server that asks its file to be kept outside the cache is refused, and what lies there is left alone."""
    cache = tmp_path / "deep" / "deeper" / "cache"
    own = tmp_path / "deep" / place
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("a file of the user")

    def fault(request: hub_server.Handler, name: str) -> bool:
        names = {"ETag": '"0"', "X_Repo_Commit": "0" * 40, header: f"../../../../{place}"}
        request.answer(200, files["config.json"], **names)
        return True

    hub.add("ada/hostile", files, fault)
    reply = client.load("arm_zoo", "ada/hostile", cache_dir=cache)
    assert reply["error"] == "DownloadError"
    assert own.read_text() == "a file of the user"
    outside = {path for path in tmp_path.rglob("*") if cache not in (path, *path.parents) and path.is_file()} - {own}
    assert all(path.stat().st_size == 0 for path in outside)  # the Hub's client leaves an empty lock


def test_wrong_weights(hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path) -> None:
    """Other shapes, another architecture's weights, another's configuration, and files that are no weights."""
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=1, num_classes=3)
    wide = timm.create_model(PICO, embed_dim=32, num_classes=3)
    for name, other in (("vit", vit), ("wide", wide)):
        save_file(other.state_dict(), tmp_path / name)
        hub.add(f"ada/{name}", {**files, "model.safetensors": (tmp_path / name).read_bytes()})
        reply = client.load("arm_zoo", f"ada/{name}", cache_dir=tmp_path / "cache")
        assert reply["own"] and "the checkpoint does not fit the model" in reply["message"]
        assert "only in the model" in reply["message"] and "other shapes" in reply["message"]
    hub.add("ada/resnet", {**files, "config.json": b'{"architecture": "resnet18", "pretrained_cfg": {}}'})
    reply = client.load("arm_zoo", "ada/resnet", cache_dir=tmp_path / "cache")
    assert reply["own"] and "'resnet18', which is no model of arm_zoo" in reply["message"]
    hub.add("ada/html", {"config.json": b"<!doctype html>", "model.safetensors": b"<!doctype html>"})
    assert "cannot read" in client.refused("arm_zoo", "ada/html", cache_dir=tmp_path / "cache")
    hub.add("ada/garbage", {**files, "model.safetensors": b"<!doctype html>"})
    assert "cannot read the checkpoint" in client.refused("arm_zoo", "ada/garbage", cache_dir=tmp_path / "cache")


def test_pickles_are_not_fetched(hub: HubServer, client: Client, files: dict[str, bytes], tmp_path: Path) -> None:
    """A repository of pickles is explained; one under the name of safetensors is not read as a pickle."""
    torch.save({"model": RunsCode(tmp_path / "trap")}, tmp_path / "trap.pth")
    trap = (tmp_path / "trap.pth").read_bytes()
    hub.add("ada/pickle", {"config.json": files["config.json"], "pytorch_model.bin": trap})
    hub.add("ada/disguised", {"config.json": files["config.json"], "model.safetensors": trap})
    message = client.refused("arm_zoo", "ada/pickle", cache_dir=tmp_path / "cache")
    assert "has no such file" in message and "python -m hub convert FILE OUT" in message
    message = client.refused("timm", "hf-hub:ada/pickle", pretrained=True, cache_dir=tmp_path / "cache")
    assert "has no such file" in message
    message = client.refused("arm_zoo", "ada/disguised", cache_dir=tmp_path / "cache")
    assert "it is a pickle, not safetensors" in message
    overlay = {"hf_hub_id": "ada/pickle", "hf_hub_filename": "pytorch_model.bin"}
    reply = client.load("timm", PICO, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "cache")
    assert reply["own"] and "pickles can run code" in reply["message"]
    assert not (tmp_path / "trap").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "trap").exists()  # it would have worked
