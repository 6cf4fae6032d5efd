"""A family and an objective join: one file each, which here are classes of a test, and one row."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import is_model
from torch import Tensor, nn
from torch.nn import functional as F

import arm_zoo
from arm_zoo import CheckpointError, from_official, from_pretrained, to_official
from arm_zoo.base import ZooModel
from arm_zoo.identify import find_variant
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.models._builder import ARCHITECTURES, Backbone, entry_configs, register_family
from arm_zoo.models.arm import ARM
from arm_zoo.pretraining._registry import OBJECTIVES, Objective
from arm_zoo.pretraining.autoregressive import ARMPretrain
from arm_zoo.weights.hosted import training_commands
from arm_zoo.weights.tensor_names import MIXER_NAMES, OfficialNames
from hub.check import check_folder
from hub.convert import convert

NAME = "toy_pico_patch2_8"
SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "d_state": 4}


class Toy(ARM):
    """ARM with a second norm at its end, under other official names."""

    official_names = OfficialNames(
        [*MIXER_NAMES, ("layers.{}.norm.", "blocks.{}.norm1.", None), ("layers.{}.", "blocks.{}.", None)],
        "https://example.org/toy",
    )
    keys = (*ARM.keys, "last.weight")
    untrained = (*ARM.untrained, "last.")

    @wraps(ARM.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last = nn.LayerNorm(self.embed_dim, device=kwargs.get("device"))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.last(super().forward_features(x))


class ToyPretrain(ARMPretrain):
    """Pretraining with one more tensor."""

    backbone = Toy
    backbones = MappingProxyType({"arm": Toy})  # under the name that the class has without being asked for one
    official_names = Toy.official_names
    keys = (*ARMPretrain.keys, "temperature")

    @wraps(ARMPretrain.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(torch.ones((), device=kwargs.get("device")))


class Bare(Backbone):
    """A family without a class token, with learned position embeddings, of which `rows` are not of patches."""

    keys = ("pos_embed", "norm.weight")

    def __init__(self, img_size: int = 8, num_classes: int = 10, rows: int = 0, device: Any = None) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, 2, in_chans=1, embed_dim=16, device=device)
        self.in_chans, self.num_features, self.num_classes = 1, 16, num_classes
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + rows, 16, device=device))
        self.norm = nn.LayerNorm(16, device=device)
        self.head = self.make_head(device=device)


class WithToken(ToyPretrain):
    """Pretraining with a class token, which has no row among the position embeddings."""

    keys = (*ToyPretrain.keys, "cls_token")

    @wraps(ARMPretrain.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cls_token = nn.Parameter(torch.randn(1, 1, SIZES["embed_dim"], device=kwargs.get("device")))


cfg = {"num_classes": 10, "input_size": (1, 8, 8), "pool_size": None, "fixed_input_size": True, "crop_pct": 1.0}
cfg |= {"mean": (0.5,), "std": (0.5,), "first_conv": "patch_embed.proj", "classifier": "head", "license": "mit"}
cfg |= {"interpolation": "bicubic", "crop_mode": "center", "paper_ids": "none", "paper_name": "none"}
default_cfgs = entry_configs({f"{NAME}.untrained": cfg})


@pytest.fixture(autouse=True, scope="module")
def family() -> Iterator[None]:
    register_family(Toy, {NAME: {key: SIZES[key] for key in ("patch_size", "embed_dim", "depth", "d_state")}}, {})
    yield
    del ARCHITECTURES[NAME]  # timm forgets none


@pytest.fixture
def objective(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**SIZES, "cluster_size": 4, "decoder_dim": 64, "decoder_depth": 1}
    row = Objective(ToyPretrain, {"toy_pico": sizes}, "an encoder and a thermometer", "loss, heat")
    monkeypatch.setitem(OBJECTIVES, "toy", row)


def outputs(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(64.0).view(1, 1, 8, 8) / 64)


@pytest.mark.parametrize("official", [False, True])
def test_a_family_joins_by_a_row(official: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    tensors = to_official(model) if official else model.state_dict()
    assert official == ("layers.0.norm.weight" in tensors) == ("layers.0.mixer.A_b_log" in tensors)
    variant = find_variant(tensors)
    assert (variant.architecture, variant.num_classes, variant.official) == (NAME, 10, official)
    assert not variant.model_args and variant.pretraining is None
    if official:
        assert from_official(tensors, model).keys() == model.state_dict().keys()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "folder").mkdir()
    model.save_pretrained(tmp_path / "folder")
    said, _ = convert(tmp_path / "model.safetensors", tmp_path / "out")
    assert said.startswith(f"{NAME} (backbone") and check_folder(tmp_path / "out").startswith("golden")
    for source in (tmp_path / "model.safetensors", tmp_path / "folder", tmp_path / "out"):
        loaded = from_pretrained(source)
        assert isinstance(loaded, Toy) and torch.equal(outputs(loaded), outputs(model)), source
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"].get("origin_url") == ("https://example.org/toy" if official else None)


def test_another_family_is_none_of_ours(tmp_path: Path) -> None:
    assert find_variant(timm.create_model("arm_pico_patch2_8").state_dict()).architecture == "arm_pico_patch2_8"
    with pytest.raises(CheckpointError, match=r"this is no ARM or .*Toy checkpoint: expected"):
        find_variant({"weight": torch.ones(1)})
    assert f"supervised_base.yaml model={NAME}" in training_commands(f"{NAME}.untrained")


def test_a_second_table_of_a_family_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = timm.create_model(NAME, d_state=2).state_dict()
    assert find_variant(tensors).architecture == NAME
    row = replace(ARCHITECTURES[NAME], arguments={**ARCHITECTURES[NAME].arguments, "d_state": 2})
    monkeypatch.setitem(ARCHITECTURES, "arm_pico_patch2_8", row)  # under a name that has a configuration
    assert find_variant(tensors).architecture == "arm_pico_patch2_8"


def test_a_model_without_tables_loads() -> None:
    class Plain(ZooModel):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    saved, model = Plain().state_dict(), Plain()
    model.load_state_dict(saved)
    assert torch.equal(model.head.weight, saved["head.weight"])


def test_families_are_imported_where_one_looks() -> None:
    assert is_model("arm_pico_patch2_8") and NAME in ARCHITECTURES and issubclass(Toy, Backbone)


@pytest.mark.usefixtures("objective")
def test_an_objective_joins_by_a_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = arm_zoo.create_pretraining_model("toy_pico", "toy")
    variant = find_variant(model.state_dict(), {"cluster_size": 4})
    assert (variant.architecture, variant.objective) == (NAME, "toy")
    assert variant.pretraining.items() <= model.config.items()  # not switches, which no shape tells
    model.save_pretrained(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["objective"] == "toy"
    assert "temperature" in Toy.pretraining_keys and "temperature" not in ARM.pretraining_keys
    backbone = timm.create_model(NAME)
    adapted = backbone.adapt({**model.state_dict(), "extra.weight": torch.ones(1)}, backbone, timm_adapts=False)
    assert adapted["blocks.1.mixer.D"].equal(model.blocks[1].mixer.D.expand(4, -1))
    convert(tmp_path / "run", tmp_path / "out")
    assert check_folder(tmp_path / "out").startswith("golden features and prediction match")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A pretraining model: an encoder and a thermometer." in card and "loss, heat = model(images)" in card
    for source in (tmp_path / "run", tmp_path / "out"):
        loaded = from_pretrained(source)
        assert type(loaded) is ToyPretrain
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_an_objective_may_have_a_class_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one of pretraining all the same, and its backbone gets the token that it trained."""
    sizes = {**SIZES, "cluster_size": 4, "decoder_dim": 64, "decoder_depth": 1}
    monkeypatch.setitem(OBJECTIVES, "token", Objective(WithToken, {"toy_pico": sizes}, "an encoder", "loss"))
    model = arm_zoo.create_pretraining_model("toy_pico", "token")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is WithToken
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    for size in (8, 16):
        backbone = from_pretrained(tmp_path, as_backbone=True, img_size=size)
        assert type(backbone) is Toy and torch.equal(backbone.cls_token, model.cls_token)
        middle = size * size // 8
        assert not backbone.pos_embed[:, middle].any() and backbone.pos_embed.any(-1).sum() == 2 * middle
    backbone.save_pretrained(tmp_path / "backbone")
    assert torch.equal(from_pretrained(tmp_path / "backbone").pos_embed, backbone.pos_embed)


def test_position_embeddings_without_a_class_token_are_resized() -> None:
    source, model = Bare(), Bare(img_size=16)
    adapted = model.adapt(source.state_dict(), model)
    table = source.pos_embed.detach().view(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = F.interpolate(table, (8, 8), mode="bicubic").flatten(2).mT
    assert torch.equal(adapted["pos_embed"], expected)


def test_position_embeddings_that_cannot_be_resized_are_refused() -> None:
    """Those with other rows than of patches, and learned ones of a pretraining model."""
    rows = Bare(rows=3)
    assert rows.adapt(rows.state_dict(), rows)["pos_embed"].equal(rows.pos_embed)
    learned = arm_zoo.create_pretraining_model("arm_pico", img_size=16)
    learned.pos_embed.requires_grad_(True)
    small = arm_zoo.create_pretraining_model("arm_pico").state_dict()
    for source, model in ((rows.state_dict(), Bare(img_size=16, rows=3)), (small, learned)):
        count = len(model.pos_embed[0])
        with pytest.raises(CheckpointError, match=rf"pos_embed \(1, \d+, \d+\) -> \(1, {count}, ") as error:
            model.adapt(source, model)
        assert str(error.value).endswith("\n  pos_embed is resized only if `adapt` of the model's class does so")
    learned.pos_embed.requires_grad_(False)
    assert learned.adapt(small, learned)["pos_embed"].equal(learned.pos_embed)
