"""A backbone with its head as one model of timm: what is saved is what is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import arm_zoo
from arm_zoo.files import CheckpointError, read_config
from arm_zoo.heads.attentive import AttentiveClassifier
from arm_zoo.heads.models import HEADED, save_attentive_probe
from arm_zoo.loading import entries

SIZES = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "d_state": 2}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("arm_pico_patch2_8", SIZES),
        ("test_vit", {"img_size": 16, "patch_size": 8, "in_chans": 1}),
        ("test_resnet", {"in_chans": 1}),
    ],
)
def test_what_is_saved_is_loaded(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=0, **arguments).eval()
    head = AttentiveClassifier(backbone.feature_info[-1]["num_chs"], 3).eval()
    head.norm.running_mean.normal_()
    inputs = {"input_size": (1, 16, 16), "mean": (0.4,), "std": (0.2,), "crop_pct": 1.0}
    save_attentive_probe(tmp_path, backbone, head, inputs, ["a", "b", "c"])
    images = torch.randn(2, 1, 16, 16)
    with torch.inference_mode():
        [maps] = backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
        expected = head(maps.flatten(2).transpose(1, 2))
        for model in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), arm_zoo.from_pretrained(tmp_path)):
            for part, saved in ((model.backbone, backbone), (model.head, head)):
                kept = part.state_dict()
                assert all(torch.equal(kept[key], tensor) for key, tensor in saved.state_dict().items())
            torch.testing.assert_close(model.eval()(images), expected)  # last bits follow the weights' addresses
            assert (model.num_classes, model.in_chans) == (3, 1)
    config = timm.data.resolve_model_data_config(model)
    assert {key: tuple(config[key]) for key in ("input_size", "mean", "std")} == {
        key: inputs[key] for key in ("input_size", "mean", "std")
    }
    # names of other classes are not kept
    save_attentive_probe(tmp_path, backbone, head, inputs, ["a"])
    assert "label_names" not in read_config(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "hf-hub:ada/model"}, "backbone 'hf-hub:ada/model'; allowed: a name of"),
        ({"backbone": "test_vit", "backbone_args": {"pretrained": True}}, "arguments pretrained; allowed: a name of"),
        (
            {"backbone": "test_vit", "backbone_args": {"pretrained_cfg_overlay": {"file": "x"}}},
            "arguments pretrained_cfg_o",
        ),
    ],
)
def test_a_configuration_has_nothing_else_read(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name in HEADED:
        (tmp_path / "config.json").write_text(
            json.dumps({"architecture": name, "num_classes": 3, "model_args": arguments, "pretrained_cfg": {}})
        )
        with pytest.raises(ValueError, match=message):
            arm_zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained_strict": False}, "model_args has pretrained_strict; expected backbone, backbone_args, "),
        ({"backbone": ["test_vit"]}, r"model_args has backbone=\['test_vit'\]; expected str"),
        (
            {"backbone": "test_resnet", "backbone_args": {}},
            r"no model can be made of local-dir:.* Error\(s\) in loading state_dict",
        ),
    ],
)
def test_a_configuration_that_is_not_of_its_weights(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    backbone = timm.create_model("test_vit", img_size=16, num_classes=0)
    save_attentive_probe(tmp_path, backbone, AttentiveClassifier(64, 3), {"input_size": (3, 16, 16)}, [])
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": config["model_args"] | change}))
    with pytest.raises(CheckpointError, match=message):
        arm_zoo.from_pretrained(tmp_path)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_keywords_win_over_the_configuration(tmp_path: Path) -> None:
    """As in every timm model; what the weights do not have is told."""
    backbone = timm.create_model("test_vit", img_size=16, in_chans=1, num_classes=0)
    save_attentive_probe(tmp_path, backbone, AttentiveClassifier(64, 3), {"input_size": (1, 16, 16)}, [])
    source = f"local-dir:{tmp_path}"
    assert timm.create_model(source, in_chans=2).eval()(torch.zeros(1, 2, 16, 16)).shape == (1, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for backbone\.patch_embed"):
        timm.create_model(source, pretrained=True, in_chans=2)
    headless = timm.create_model(source, pretrained=True, num_classes=0).eval()
    assert headless(torch.zeros(1, 1, 16, 16)).shape == (1, 64)
    with pytest.raises(ValueError, match="num_classes is 0; allowed: 1 or more"):
        timm.create_model("segmenter", backbone="test_vit", num_classes=0)


def test_they_are_timms_but_no_entries() -> None:
    assert set(HEADED) <= set(timm.list_models()) and not set(HEADED) & entries()
