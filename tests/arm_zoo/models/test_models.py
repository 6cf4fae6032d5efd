"""The backbones as timm citizens: what timm's own test-suite asks of models, groups for optimisers, initialisation."""

import copy
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import RmsNorm, create_feature_extractor, get_graph_node_names, set_scriptable
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from arm_zoo import CheckpointError, create_pretraining_model, from_pretrained, to_official
from arm_zoo.layers.block import Block, init_block_weights, run_blocks
from arm_zoo.layers.mlp import SwiGLU
from arm_zoo.layers.order import scan_order
from arm_zoo.layers.patch_embed import PatchEmbed
from arm_zoo.loading import entries, entry_of
from arm_zoo.models.arm import ARM, DIRECTIONS
from arm_zoo.ops import fused, scan_backend
from arm_zoo.ops.fused import is_plain, is_plain_layer, run_linear
from arm_zoo.weights.hosted import TABLE, bundled_file
from tests.arm_zoo.ops.test_scan import Recorder
from tests.helpers.golden import close, golden_cases, in_both_sets

Weights = dict[str, torch.Tensor]

PAPER = "arm_in1k_ft_in1k"
TAGS = {  # name: tags, the default one first
    "arm_pico_patch2_8": ["arm_digits_ft_digits"],
    "arm_tiny_patch16_224": ["untrained"],
    "arm_tiny_patch4_32": ["arm_cifar10_ft_cifar10", "arm_cifar10"],
    "arm_tiny_patch8_64": ["arm_tiny_imagenet_ft_tiny_imagenet", "arm_tiny_imagenet"],
    "arm_small_patch16_224": ["untrained"],
    "arm_base_patch16_224": [PAPER, "arm_in1k", "in1k"],
    "arm_base_patch16_384": [PAPER],
    "arm_base_patch16_stride8_448": [PAPER],
    "arm_large_patch16_224": [PAPER, "arm_in1k", "in1k"],
    "arm_large_patch16_384": [PAPER],
    "arm_huge_patch16_224": [PAPER, "arm_in1k"],
    "arm_huge_patch16_384": [PAPER],
}
CLASSES = {"arm_pico_patch2_8": 10, "arm_tiny_patch4_32": 10, "arm_tiny_patch8_64": 200}  # the others: 1000
SHORT = {name: f"{name}_patch16_224" for name in ("arm_base", "arm_large", "arm_huge")}
PAPERS = [name for name, tags in TAGS.items() if PAPER in tags]
SIZES = {  # width, depth
    "arm_pico": (64, 4),
    "arm_tiny": (192, 12),
    "arm_small": (384, 12),
    "arm_base": (768, 12),
    "arm_large": (1024, 24),
    "arm_huge": (1536, 24),
}


def tiny(name: str = "arm_base_patch16_224", **kwargs: Any) -> Any:
    """An entry made small: 4 x 4 patches, 48 wide, 2 deep, in evaluation mode."""
    small = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_classes": 10}
    return timm.create_model(name, **{**small, **kwargs}).eval()


def images(model: Any, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=dtype)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a number that depends on all outputs, by parameter."""
    model.zero_grad()
    output = model(x)
    output.to(torch.promote_types(output.dtype, torch.float32)).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ----------------------------------------------------------------------------------------------------------- registry


def test_names_are_exactly_these() -> None:
    assert set(timm.list_models("arm_*")) == {*TAGS, *SHORT}
    assert set(timm.list_modules()) >= {"arm"}
    assert all(timm.is_model(name) for name in (*TAGS, *SHORT))


@pytest.mark.parametrize("name", TAGS)
def test_tags_are_exactly_these(name: str) -> None:
    cfgs = timm.models.get_arch_pretrained_cfgs(name)
    assert list(cfgs) == [f"{name}.{tag}" for tag in TAGS[name]]
    assert timm.models.get_pretrained_cfg(name).tag == TAGS[name][0]
    for tag in TAGS[name]:
        model = timm.create_model(f"{name}.{tag}", device="meta")
        assert model.pretrained_cfg["tag"] == tag
        only_pretrained = tag.startswith("arm_") and "_ft_" not in tag
        assert model.num_classes == (0 if only_pretrained else CLASSES.get(name, 1000))


@pytest.mark.parametrize("name", [*TAGS, *SHORT])
def test_entries_have_the_sizes_that_their_names_say(name: str) -> None:
    model = timm.create_model(name, device="meta")
    full = SHORT.get(name, name)
    dim, depth = SIZES["_".join(full.split("_")[:2])]
    patch, size = int(full.split("_")[2].removeprefix("patch")), int(full.split("_")[-1])
    stride = 8 if "stride8" in full else patch
    side = (size - patch) // stride + 1
    assert isinstance(model, ARM)
    assert (model.embed_dim, len(model.blocks)) == (dim, depth)
    assert model.patch_embed.img_size == (size, size)
    assert model.patch_embed.proj.stride == (stride, stride)
    assert model.patch_embed.grid_size == (side, side)
    assert model.pos_embed.shape == (1, side * side + 1, dim)
    assert model.order.shape == (4, side * side + 1)
    assert model.pretrained_cfg["architecture"] == full
    assert model.pretrained_cfg["input_size"] == (model.in_chans, size, size)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}


def test_overlapping_patches_at_448() -> None:
    assert timm.create_model("arm_base_patch16_stride8_448", device="meta").patch_embed.grid_size == (55, 55)


@pytest.mark.parametrize("name", PAPERS)
def test_weights_are_described(name: str) -> None:
    for cfg in timm.models.get_arch_pretrained_cfgs(name).values():
        assert cfg.crop_mode == "squash"
        assert cfg.crop_pct == (0.875 if cfg.input_size[-1] == 224 else 1.0)
        assert cfg.interpolation == "bicubic"
        assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert cfg.license
        assert cfg.paper_ids == "arXiv:2406.07537"
        assert cfg.paper_name == "Autoregressive Pretraining with Mamba in Vision"
        assert cfg.origin_url == "https://github.com/OliverRensu/ARM"
        assert (cfg.first_conv, cfg.classifier) == ("patch_embed.proj", "head")
        assert cfg.fixed_input_size


@pytest.mark.parametrize("name, resized", [("arm_base_patch16_224", 256), ("arm_base_patch16_384", 384)])
def test_evaluation_squashes_the_image(name: str, resized: int) -> None:
    config = timm.data.resolve_model_data_config(timm.create_model(name, device="meta"))
    transform = timm.data.create_transform(**config)
    size = config["input_size"][-1]
    assert transform.transforms[0](Image.new("RGB", (300, 200))).size == (resized, resized)
    assert transform(Image.new("RGB", (300, 200))).shape == (3, size, size)


def test_weights_are_listed_that_are_in_the_package_or_at_their_authors() -> None:
    there = {name for name, weights in TABLE.items() if weights.where != "planned" and name.startswith("arm_")}
    there |= {name.replace("_patch16_224", "") for name in there if name.split(".")[0] in SHORT.values()}
    assert set(timm.list_pretrained("arm_*")) == there and "arm_large_patch16_224.in1k" not in there
    assert timm.list_models("arm_*", pretrained=True) == timm.list_pretrained("arm_*")
    untrained = ["arm_small_patch16_224", "arm_tiny_patch16_224"]
    assert sorted(name for name in TAGS if not timm.models.is_model_pretrained(name)) == untrained


def test_names_of_classes_belong_to_weights() -> None:
    """The bundled digits' names are not those of other weights of the architecture."""
    model = timm.create_model("arm_pico_patch2_8", pretrained=True)
    assert model.pretrained_cfg["label_names"][3] == "three" and model.hub_config()["label_names"][3] == "three"
    assert timm.create_model("arm_pico_patch2_8").pretrained_cfg.get("label_names") is None
    overlay = {"file": str(bundled_file("arm_pico_patch2_8.arm_digits_ft_digits"))}
    model = timm.create_model("arm_pico_patch2_8", pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg.get("label_names") is None


def from_script(name: str, pretrained: bool, **kwargs: Any) -> Any:
    """A model as timm's train.py and validate.py make it: they hand the entry's configuration on as a dict."""
    return timm.create_model(**timm.models.resolve_model_input_args(name, {}, pretrained=pretrained, **kwargs))


@pytest.mark.parametrize("short, name", [*SHORT.items(), ("vim_tiny", "vim_tiny_patch16_224")])
def test_scripts_of_timm_know_short_names(short: str, name: str) -> None:
    tagged = timm.models.get_arch_pretrained_cfgs(name)
    assert tagged
    for long in (name, *tagged):
        alias = long.replace(name, short)
        expected = from_script(long, False, device="meta").pretrained_cfg
        for make in (from_script, timm.create_model):
            assert make(alias, pretrained=False, device="meta").pretrained_cfg == expected
        assert timm.get_pretrained_cfg(alias).crop_mode == expected["crop_mode"]
        assert alias in entries() and entry_of(alias) == entry_of(long)


def test_scripts_of_timm_make_the_same_models() -> None:
    name = "arm_pico_patch2_8"
    expected, model = timm.create_model(name, pretrained=True).eval(), from_script(name, True).eval()
    x = images(expected)
    assert torch.equal(model(x), expected(x)) and model.pretrained_cfg == expected.pretrained_cfg
    assert from_script(name, False).pretrained_cfg == timm.create_model(name).pretrained_cfg  # no names of classes


@pytest.mark.parametrize("num_classes", [10, 3, 0])
def test_a_configuration_may_tell_the_file_alone(num_classes: int) -> None:
    name = "arm_pico_patch2_8"
    cfg = {"file": str(bundled_file(f"{name}.arm_digits_ft_digits")), "input_size": (1, 8, 8)}
    model = timm.create_model(name, pretrained=True, pretrained_cfg=cfg, num_classes=num_classes).eval()
    expected = timm.create_model(name, pretrained=True).eval()
    x = images(model)
    assert torch.equal(model.forward_features(x), expected.forward_features(x))
    assert torch.equal(model(x), expected(x)) if num_classes == 10 else model.num_classes == num_classes


def test_train_script_of_timm_asks_for_a_new_head() -> None:
    """With `--pretrained-path FILE`, by a number of classes of -1."""
    name = "arm_pico_patch2_8"
    overlay = {"file": str(bundled_file(f"{name}.arm_digits_ft_digits")), "num_classes": -1}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    expected = timm.create_model(name, pretrained=True)
    assert torch.equal(model.norm.weight, expected.norm.weight)
    assert not torch.equal(model.head.weight, expected.head.weight) and model.head.bias.count_nonzero() == 0


@pytest.mark.parametrize("name", ["arm_base_patch16_224.in1k", "arm_large_patch16_224.in1k"])
def test_pretrained_names_the_ways_on(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"weights of \S+ are not hosted yet") as refusal:
        timm.create_model(name, pretrained=True)
    for way in ("pretrained_cfg_overlay=dict(file=", "recipes.pretrain", "pretrained=False"):
        assert way in str(refusal.value)


TWICE = """
import importlib, sys
import arm_zoo, timm
importlib.reload(arm_zoo)
del sys.modules["arm_zoo"]
import arm_zoo
assert "arm_huge" in timm.list_models("arm_*")
"""
PLUGIN = """
import sys, types, timm, torch
plugin = sys.modules["plugin"] = types.ModuleType("plugin")
plugin.Linear = torch.nn.Linear
exec("def arm_base_pz16(pretrained=False, **kwargs): return Linear(1, 1)", plugin.__dict__)
timm.models.register_model(plugin.arm_base_pz16)
import arm_zoo
assert isinstance(timm.create_model("arm_base_pz16"), torch.nn.Linear)
"""


@pytest.mark.slow
@pytest.mark.parametrize("statements", [TWICE, PLUGIN], ids=["twice", "plugin"])
def test_imports_are_quiet(statements: str, repo: Path) -> None:
    """Twice, after timm, or next to a plug-in with the authors' own names, which are left to them."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", statements], cwd=repo, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ----------------------------------------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("name", [*TAGS, *SHORT])
def test_forward_backward_and_configuration(name: str) -> None:
    model = tiny(name).train()
    x = images(model)
    state, cfg = model.state_dict(), model.pretrained_cfg
    assert cfg["classifier"] + ".weight" in state
    assert cfg["first_conv"] + ".weight" in state
    found = gradients(model, x)
    assert found.keys() == dict(model.named_parameters()).keys(), "some parameters have no gradient"
    assert all(grad.isfinite().all() and grad.count_nonzero() for grad in found.values())

    model.eval()
    tokens = model.patch_embed.num_patches + 1
    features = model.forward_features(x)
    assert features.shape == (2, tokens, 48)
    assert model.num_features == model.head_hidden_size == model.embed_dim == 48
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 48)
    assert model.forward_head(features).equal(model(x))
    assert model.get_classifier()(pooled).equal(model(x))
    assert model(x).shape == (2, 10)
    assert model(x).isfinite().all()

    model.reset_classifier(0)
    assert model(x).equal(pooled)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).equal(features)
    model.reset_classifier(7, "token")
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    assert tiny(name, num_classes=0)(x).shape == (2, 48)
    assert tiny(name, num_classes=0, global_pool="")(x).shape == (2, tokens, 48)


def test_batches_do_not_mix() -> None:
    model = tiny()
    x = images(model, batch=3)
    assert close(torch.cat([model(one[None]) for one in x]), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_reset_classifier_keeps_the_mode_the_device_and_the_type(training: bool) -> None:
    model = tiny(dtype=torch.bfloat16, device="meta").train(training)
    model.reset_classifier(3)
    assert model.head.training == training
    assert (model.head.weight.dtype, model.head.weight.device.type) == (torch.bfloat16, "meta")


def test_a_refused_pooling_leaves_the_head() -> None:
    model = tiny(num_classes=7)
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(5, "map")
    assert model.num_classes == model.head.out_features == 7


def test_weights_can_be_drawn_anew() -> None:
    model = tiny(device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    model.init_non_persistent_buffers()
    assert model(images(model)).isfinite().all()
    bound = (model.embed_dim * len(model.blocks)) ** -0.5  # of the output projections, also when drawn again
    model.init_weights()
    assert all(0.9 * bound < block.mixer.out_proj.weight.abs().max() <= bound for block in model.blocks)


def test_an_empty_batch_gives_empty_logits_and_no_gradients() -> None:
    model = tiny(num_classes=7)
    logits = model(images(model)[:0])
    assert logits.shape == (0, 7)
    logits.sum().backward()
    assert all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters())


WRONG_TYPES = [{"img_size": size} for size in ("32", 32.0, (32,), (32, 32, 32), (32.5, 32))]
WRONG_TYPES += [
    {"in_chans": "3"},
    {"in_chans": (3, 3)},
    {"embed_dim": 47.5},
    {"num_classes": "3"},
    {"num_classes": 2.0},
]


@pytest.mark.parametrize("name", ["arm_tiny_patch4_32", "vim_tiny_patch4_32", "vmamba_tiny_s1l8"])
@pytest.mark.parametrize("sizes", WRONG_TYPES, ids=str)
def test_sizes_of_another_type(name: str, sizes: dict[str, Any]) -> None:
    ((key, size),) = sizes.items()
    with pytest.raises(
        TypeError, match=re.escape(f": {key} must be a whole number") + f".*, got {re.escape(repr(size))}"
    ):
        timm.create_model(name, device="meta", **sizes)


@pytest.mark.parametrize("name", ["arm_tiny_patch4_32", "vim_tiny_patch4_32", "vmamba_tiny_s1l8"])
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"drop_path_rate": 1.5}, "drop_path_rate must be a number between 0 and 1, got 1.5"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate must be a number between 0 and 1, got '0.1'"),
        ({"drop_rate": -1}, "drop_rate must be a number between 0 and 1, got -1"),
        ({"norm_layer": "nope"}, "norm_layer must be a name of timm.layers, such as 'layernorm'.*, got 'nope'"),
        ({"norm_layer": 5}, "norm_layer must be a name of timm.layers.*, got 5"),
    ],
)
def test_wrong_rates_and_norms(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, device="meta", **kwargs)


@pytest.mark.parametrize("sizes", [{"depth": 0}, {"patch_size": 0}, {"embed_dim": -4}, {"img_size": (0, 32)}], ids=str)
def test_sizes_below_one(sizes: dict[str, Any]) -> None:
    ((name, size),) = sizes.items()
    with pytest.raises(ValueError, match=re.escape(f"ARM: {name} must be at least 1, got {size}")):
        timm.create_model("arm_tiny_patch16_224", **sizes)


def test_intermediates_of_a_wrong_image() -> None:
    with pytest.raises(ValueError, match="expected images"):
        tiny().forward_intermediates(torch.zeros(3, 32, 32))


@pytest.mark.parametrize("name", ["arm_base_patch16_224", "arm_base_patch16_stride8_448"])
def test_grad_checkpointing_changes_nothing_but_memory(name: str) -> None:
    model = tiny(name).train()
    x = images(model)
    calls: list[nn.Module] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    plain, expected = model(x), gradients(model, x)
    model.set_grad_checkpointing(True)
    assert model(x).equal(plain)
    calls.clear()
    actual = gradients(model, x)
    assert len(calls) == 2 * len(model.blocks), "blocks are not computed again in the backward pass"
    assert all(close(actual[key], expected[key]) for key in expected)
    assert model.forward_intermediates(x)[0].equal(model.forward_features(x))
    model.set_grad_checkpointing(False)
    calls.clear()
    gradients(model, x)
    assert len(calls) == len(model.blocks)


def test_drop_rates_act_in_training_only() -> None:
    for rates in ({"drop_rate": 0.5}, {"pos_drop_rate": 0.5}, {"drop_path_rate": 0.9, "depth": 3}):
        model = tiny(**rates)
        x = images(model)
        assert model(x).equal(model(x))
        model.train()
        assert not model(x).equal(model(x)), rates
    model = tiny(drop_rate=0.1, pos_drop_rate=0.2)
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)


def test_drop_path_rates_are_the_official_ones(golden: Path) -> None:
    tables = json.loads((golden / "init" / "finetune_drop_path.json").read_text())
    assert len(tables) == 3
    for key, rates in tables.items():
        depth, rate = re.fullmatch(r"depth(\d+)_rate([\d.]+)", key).groups()
        model = tiny(depth=int(depth), drop_path_rate=float(rate), device="meta")
        found = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
        assert found == pytest.approx(rates, abs=1e-7)


@pytest.mark.parametrize("img_size", [64, 80, 16])  # 16, 25 patches (halves of 12 and 13) and a single one
def test_pooling(img_size: int) -> None:
    model = tiny(img_size=img_size)
    features = model.forward_features(images(model))
    patches = features.shape[1] - 1
    before, after = features[:, : patches // 2], features[:, patches // 2 + 1 :]
    halves = [half.mean(1) for half in (before, after) if half.shape[1]]
    average = model.forward_head(features, pre_logits=True)
    assert close(average, sum(halves) / len(halves))
    largest = torch.cat([before, after], dim=1).amax(1)
    model.reset_classifier(10, "max")
    assert model.forward_head(features, pre_logits=True).equal(largest)
    assert model.forward_head(features).equal(model.head(largest))
    model.reset_classifier(10, "avgmax")
    assert close(model.forward_head(features, pre_logits=True), (average + largest) / 2)
    model.reset_classifier(10, "token")
    assert model.forward_head(features, pre_logits=True).equal(features[:, patches // 2])
    model.reset_classifier(10, "")
    assert model.forward_head(features, pre_logits=True).equal(features)
    for pool in ("avg", "avgmax", "max", "token", ""):
        assert tiny(img_size=img_size, global_pool=pool).global_pool == pool


def test_class_token_sits_in_the_middle() -> None:
    model = tiny(img_size=(48, 80))
    with torch.no_grad():
        model.pos_embed.zero_()
        model.cls_token.fill_(3.0)
    embedded, order = model._embed(images(model))
    assert embedded[:, 15 // 2].eq(3.0).all()
    assert embedded.eq(3.0).all(-1).sum(1).tolist() == [1, 1]
    assert order.equal(scan_order(3, 5, DIRECTIONS, cls_index=7))


# ------------------------------------------------------------------------------------- sizes that no stored tensor has


def spec_mixer(p: Weights, x: torch.Tensor) -> torch.Tensor:
    """arm.md, section 2: four branches, with the class token at the wrong place where the authors have it there."""
    length = x.shape[1]
    row, side, token = torch.arange(length), math.isqrt(length - 1), length // 2
    patches = torch.cat([row[:token], row[token + 1 :]]).reshape(side, side).t().flatten()
    column = torch.cat([patches[:token], row[token, None], patches[token:]])
    x, z = F.linear(x, p["in_proj.weight"]).chunk(2, dim=-1)
    total = torch.zeros_like(x)
    for suffix, order in (("", row), ("_b", row.flip(0)), ("_c", column), ("_c_b", column.flip(0))):
        taps = p[f"conv1d{suffix}.weight"]
        u = F.conv1d(F.pad(x[:, order].mT, (3, 0)), taps, p[f"conv1d{suffix}.bias"], groups=len(taps))
        u = F.silu(u).mT
        A, dt_weight = -p[f"A{suffix}_log"].exp(), p[f"dt_proj{suffix}.weight"]
        dt, B, C = F.linear(u, p[f"x_proj{suffix}.weight"]).split([dt_weight.shape[1], 16, 16], dim=-1)
        delta = F.softplus(F.linear(dt, dt_weight, p[f"dt_proj{suffix}.bias"]))
        state, steps = torch.zeros(len(x), *A.shape, dtype=x.dtype), []
        for t in range(length):
            step = delta[:, t, :, None]
            state = torch.exp(step * A) * state + step * B[:, t, None] * u[:, t, :, None]
            steps.append((state * C[:, t, None]).sum(-1))
        y = (torch.stack(steps, dim=1) + p[f"D{suffix}"] * u) * F.silu(z[:, order])
        total = total.index_add(1, order, y)
    return F.linear(total / 4, p["out_proj.weight"])


def norm(p: Weights, x: torch.Tensor, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def linear(p: Weights, x: torch.Tensor, name: str) -> torch.Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def spec_blocks(p: Weights, x: torch.Tensor, stride: int, depth: int) -> torch.Tensor:
    """arm.md, section 4, under the official names: images to the tokens that the last block gives."""
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=stride).flatten(2).mT
    middle = x.shape[1] // 2
    x = torch.cat([x[:, :middle], p["cls_token"].expand(len(x), -1, -1), x[:, middle:]], dim=1) + p["pos_embed"]
    for i in range(depth):
        mixer = f"layers.{i}.mixer."
        inside = {name.removeprefix(mixer): value for name, value in p.items() if name.startswith(mixer)}
        x = x + spec_mixer(inside, norm(p, x, f"layers.{i}.norm1"))
        inner, mlp = norm(p, x, f"layers.{i}.norm2"), f"layers.{i}.mlp"
        x = x + linear(p, F.silu(linear(p, inner, f"{mlp}.w1")) * linear(p, inner, f"{mlp}.w2"), f"{mlp}.w3")
    return x


def spec_head(p: Weights, x: torch.Tensor, pool: str) -> torch.Tensor:
    """The tokens of the last block to logits."""
    x, middle = norm(p, x, "norm_f"), (x.shape[1] - 1) // 2
    halves = (x[:, :middle].mean(1) + x[:, middle + 1 :].mean(1)) / 2
    return linear(p, halves if pool == "avg" else x[:, middle], "head")


@in_both_sets
def test_specification_equals_the_stored_tensors(golden: Path) -> None:
    files = {path.stem: load_file(path) for path in (golden / "arm_ft_img64_gp").glob("*.safetensors")}
    weights = {name: value.double() for name, value in files["state_dict"].items()}
    outputs, depth = files["outputs_f64"], len({name.split(".")[1] for name in weights if ".mixer." in name})
    tokens = spec_blocks(weights, files["inputs"]["images"].double(), 16, depth)
    assert close(tokens, outputs[f"hidden_{depth:02}"], 1e-10)
    for pool, name in (("avg", "logits"), ("token", "logits_cls")):
        assert close(spec_head(weights, outputs["hidden_12"], pool), outputs[name], 1e-10)


@pytest.mark.parametrize(
    "img_size, stride, depth, pool",
    [
        (80, 16, 2, "avg"),  # 5 x 5, an odd number of patches
        (80, 16, 2, "token"),
        (64, 8, 2, "avg"),  # 7 x 7 of overlapping patches
        (64, 16, 24, "avg"),
        (32, 16, 3, "token"),
    ],
)
def test_model_follows_the_specification(img_size: int, stride: int, depth: int, pool: str) -> None:
    model = tiny(
        img_size=img_size, patch_stride=stride, depth=depth, global_pool=pool, embed_dim=20, dtype=torch.float64
    )
    with torch.no_grad():  # away from the zeros and ones of initialisation
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    weights = {name: value.requires_grad_() for name, value in to_official(model).items()}
    x = images(model, dtype=torch.float64)
    output, expected = model(x), spec_head(weights, spec_blocks(weights, x, stride, depth), pool)
    assert close(output, expected, 1e-10)

    expected.square().sum().backward()
    found = gradients(model, x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    for name, gradient in to_official(model).items():
        assert close(gradient, weights[name].grad, 1e-9), name


# ----------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("name", ["arm_base_patch16_224", "arm_base_patch16_stride8_448", "arm_pico_patch2_8"])
def test_features_only(name: str) -> None:
    model = tiny(name, depth=4, features_only=True)
    x = torch.randn(2, model.in_chans, 64, 64)
    reduction = 8 if "stride8" in name else 16
    side = (64 - 16) // reduction + 1
    assert model.feature_info.channels() == [48] * 3
    assert model.feature_info.reduction() == [reduction] * 3
    assert model.feature_info.module_name() == ["blocks.1", "blocks.2", "blocks.3"]
    assert [feature.shape for feature in model(x)] == [(2, 48, side, side)] * 3


@pytest.mark.parametrize("indices", [(0, 3), (-1,), 2, (1, -2)])
def test_feature_classes_agree(indices: int | tuple[int, ...]) -> None:
    make = partial(tiny, depth=4, features_only=True, out_indices=indices)
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    getter = make()
    found = {}
    for kind in ("getter", "hook", "fx"):
        torch.manual_seed(1)
        model = make(feature_cls=kind)
        assert model.feature_info.channels() == getter.feature_info.channels()
        assert model.feature_info.module_name() == getter.feature_info.module_name()
        found[kind] = model(x)
        assert len(found[kind]) == len(model.feature_info.out_indices)
    for maps, hooked, traced in zip(*found.values(), strict=True):
        assert hooked.equal(traced)
        patches = torch.cat([hooked[:, :8], hooked[:, 9:]], dim=1)  # the class token is number 8 of 17
        assert maps.equal(patches.transpose(1, 2).unflatten(2, (4, 4)))


@pytest.mark.parametrize("img_size", [(64, 96), 80])
def test_forward_intermediates(img_size: int | tuple[int, int]) -> None:
    model = tiny(img_size=img_size, depth=4)
    with torch.no_grad():
        model.norm.weight.normal_()
    x = images(model)
    (height, width), middle = model.patch_embed.grid_size, model.patch_embed.num_patches // 2
    outputs: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: outputs.__setitem__(i, out))
    expected = model.forward_features(x)
    tokens = dict(outputs)

    final, maps = model.forward_intermediates(x)
    assert final.equal(expected)
    assert [feature.shape for feature in maps] == [(2, 48, height, width)] * 4
    _, rows = model.forward_intermediates(x, output_fmt="NLC")
    for i in range(4):
        patches = torch.cat([tokens[i][:, :middle], tokens[i][:, middle + 1 :]], dim=1)
        assert rows[i].equal(patches)
        assert maps[i].flatten(2).transpose(1, 2).equal(patches)

    _, [(last, prefix)] = model.forward_intermediates(
        x, indices=1, norm=True, output_fmt="NLC", return_prefix_tokens=True
    )
    assert torch.cat([last[:, :middle], prefix, last[:, middle:]], dim=1).equal(expected)
    assert len(model.forward_intermediates(x, indices=2)[1]) == 2
    assert model.forward_intermediates(x, indices=[-4], intermediates_only=True)[0].equal(maps[0])

    outputs.clear()
    stopped = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert sorted(outputs) == [0, 1]
    assert stopped[1].equal(maps[1])

    both = model.forward_intermediates(x, indices=[2], output_dict=True, return_prefix_tokens=True)
    assert both.keys() == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    assert both["image_features"].equal(expected)
    assert both["image_intermediates"][0].equal(maps[2])
    assert both["image_intermediates_prefix"][0].equal(tokens[2][:, middle : middle + 1])
    assert model.forward_intermediates(x, output_dict=True, intermediates_only=True).keys() == {"image_intermediates"}


def test_padded_mlp_is_the_same_function() -> None:
    layer = SwiGLU(12, 21, dtype=torch.float64)  # on CUDA, widths that are no multiple of 64 take the padded form
    results = []
    for forward in (layer, partial(layer._forward_padded, missing=43)):
        x = torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = forward(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


class Quantised(torch.Tensor):
    """Stands for the weights of quantisers, which are tensors of a class of their own."""


class QuantisedFake(FakeTensor):
    """The same without data."""


@pytest.mark.parametrize("change", ["none", "hook", "wrapper", "subclass", "patch", "quantised", "sparse", "bias"])
def test_layers_are_called_unless_they_are_plain(change: str) -> None:
    """Who looks at a layer, or has put another in its place, must find that it is called."""
    layer: nn.Module = nn.Linear(3, 5)
    calls = []
    if change == "hook":
        layer.register_forward_hook(lambda *_: calls.append("hook"))
    elif change == "wrapper":
        layer = nn.Sequential(layer)
    elif change == "subclass":
        layer = type("Adapted", (nn.Linear,), {})(3, 5)
    elif change == "patch":
        layer.forward = lambda x: x
    elif change == "quantised":
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)
    elif change == "sparse":
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    elif change == "bias":
        layer.bias = nn.Parameter(layer.bias.detach().as_subclass(Quantised), requires_grad=False)
    assert is_plain_layer(layer, nn.Linear) == (change == "none")
    x = torch.randn(2, 3)
    assert close(run_linear(layer, x), layer(x))
    assert len(calls) == 2 * (change == "hook")


def test_compiled_code_knows_plain_layers() -> None:
    quantised = nn.Linear(3, 5)
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(Quantised), requires_grad=False)

    @torch.compile(backend="eager", fullgraph=True)
    def asks(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + (is_plain(x) and is_plain_layer(layer, nn.Linear))

    answers = [asks(layer, torch.zeros(())).item() for layer in (nn.Linear(3, 5), nn.Sequential(), quantised)]
    assert answers == [1, 0, 0]


def test_hooks_on_all_modules_see_the_layers() -> None:
    model = tiny(depth=2)
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        model(images(model))
        assert not is_plain_layer(model.head, nn.Linear)
    assert is_plain_layer(model.head, nn.Linear)
    assert {id(m) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)} <= {id(m) for m in seen}


def gpus_can_be_faked() -> bool:
    """Whether tensors without data can be on a GPU that is not there; torch 2.8 and 2.9 do not allow it."""
    try:
        with FakeTensorMode():
            nn.Linear(4, 4, device="cuda:0")(torch.empty(2, 4, device="cuda:0"))
    except RuntimeError:
        return False
    return True


fakes_a_gpu = pytest.mark.skipif(not gpus_can_be_faked(), reason="this torch cannot fake a GPU")


@fakes_a_gpu
@pytest.mark.parametrize("change", ["none", "quantised", "hook", "groups", "padding", "dilation"])
def test_when_patches_are_gathered_on_a_gpu(change: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        embed = PatchEmbed(32, 4, in_chans=2, embed_dim=6, strict_img_size=False, device="cuda:0")
        kwargs = {"groups": 2} if change == "groups" else {change: 1 + (change == "dilation")}
        if change == "hook":
            embed.proj.register_forward_hook(lambda *_: None)
        elif change == "quantised":
            embed.proj.weight.__class__ = QuantisedFake
        elif change != "none":
            embed.proj = nn.Conv2d(2, 6, 4, 4, device="cuda:0", **kwargs)
        with _FlopCounterMode(counter := FlopCounterMode()):  # without its hooks on all modules, which it tells apart
            embed(torch.empty(3, 2, 32, 32, device="cuda:0"))
    operators = {str(operator) for operator in counter.get_flop_counts()["Global"]}
    assert operators == {"aten.addmm" if change == "none" else "aten.convolution"}


@fakes_a_gpu
@pytest.mark.parametrize("hidden", [128, 100])  # 100 are padded
@pytest.mark.parametrize(
    "case, taken",
    [
        ("inference in bfloat16", "gated_product"),
        ("inference in float32", None),
        ("few tokens", None),
        ("rows of no multiple of 16 bytes", None),
        ("a hook on fc1", None),
        ("quantised fc1", None),
        ("another GPU", None),
        ("training in bfloat16", "gate"),
        ("training in float32", "gate"),
        ("training in float64", None),
        ("training with few tokens", None),
        ("training with a hook on fc1", None),
        ("training on another GPU", "gate"),
    ],
)
def test_when_a_kernel_makes_the_gate(
    case: str, taken: str | None, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA tensors without data, so that it is decided here as on a GPU."""
    monkeypatch.setattr(fused, "_has_kernel", lambda device, hopper: not (hopper and "another GPU" in case))
    dim, batch = 60 if "multiple" in case else 64, 2 if "few" in case else 32
    dtype = {"32": torch.float32, "64": torch.float64}.get(case[-2:], torch.bfloat16)
    with FakeTensorMode(), torch.set_grad_enabled("training" in case), Recorder() as recorder:
        layer = SwiGLU(dim, hidden, device="cuda:0", dtype=dtype)
        if "hook" in case:
            layer.fc1.register_forward_hook(lambda *_: None)
        if "quantised" in case:
            layer.fc1.weight.__class__ = QuantisedFake
        with _FlopCounterMode(counter := FlopCounterMode()):
            y = layer(torch.empty(batch, 197, dim, device="cuda:0", dtype=dtype))
    assert y.shape == (batch, 197, dim)
    assert list(recorder.calls) == ([f"arm_zoo::{taken}"] if taken else [])
    width = hidden if hidden == 128 or "fc1" in case else 128
    assert counter.get_total_flops() == 2 * batch * 197 * 3 * width * dim


@fakes_a_gpu
@pytest.mark.parametrize(
    "case, count",
    [
        ("training", 4),  # of six norms all but the first and that after block 1, whose result is asked for
        ("inference", 4),
        ("few tokens", 0),
        ("checkpointing", 3),  # those inside the blocks
        ("a hook on a block", 3),
        ("a compiled block", 3),
        ("a norm of another kind", 0),
        ("a norm without bias", 0),
        ("second norms of sharded weights", 1),
        ("double precision", 0),
    ],
)
def test_when_norms_make_the_sums(case: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between blocks only where nobody looks at what a block gives."""
    monkeypatch.setattr(fused, "_has_kernel", lambda device, hopper: True)
    dtype = torch.float64 if "double" in case else torch.float32
    with FakeTensorMode(), torch.set_grad_enabled(case != "inference"), Recorder() as recorder:
        norm = RmsNorm if "kind" in case else partial(nn.LayerNorm, bias="bias" not in case)
        factory = {"device": "cuda:0", "dtype": dtype}
        blocks = nn.ModuleList(Block(24, 1, 2, 0.1 * i, norm_layer=norm, **factory) for i in range(3))
        for block in blocks if "sharded" in case else ():
            block.norm2.weight.__class__ = QuantisedFake
        calls: list[str] = []
        if "hook" in case:
            blocks[1].register_forward_hook(lambda *_: calls.append("hook"))
        if "compiled" in case:
            blocks[1]._compiled_call_impl = blocks[1]._call_impl
        x = torch.empty(2 if "few" in case else 32, 197, 24, requires_grad=True, **factory)
        y = run_blocks(blocks, x, None, (1, 3), checkpointing="checkpointing" in case)
    assert list(y) == [1, 3] and y[3].shape == x.shape
    assert recorder.counts["arm_zoo::add_norm"] == count
    assert calls == ["hook"] * ("hook" in case)


@pytest.mark.parametrize("scripted", [False, True])
def test_blocks_may_be_mixers_alone(scripted: bool) -> None:
    """As Vim's: two directions, twice as wide inside, another norm, no MLP."""
    norm = partial(nn.RMSNorm, eps=1e-5)
    blocks = nn.ModuleList(Block(16, 2, 4, 0.0, norm, expand=2.0, mlp=False) for _ in range(2))
    init_block_weights(blocks)
    assert {name.split(".")[1] for name, _ in blocks.named_parameters()} == {"norm1", "mixer"}
    assert blocks[0].mixer.in_proj.weight.shape == (4 * 16, 16)
    x, order = torch.randn(2, 6, 16), scan_order(2, 3, DIRECTIONS[:2])
    expected = x
    for block in blocks:
        expected = expected + block.mixer(block.norm1(expected), order)
    run = [torch.jit.script(block) for block in blocks] if scripted else blocks
    assert close(run_blocks(nn.ModuleList(run), x, order, (2,))[2], expected)


def test_compiled_models_follow_the_backend_around_the_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "why_not", lambda name: None)

    @torch.compile(backend="eager", fullgraph=True)
    def asks(x: torch.Tensor) -> torch.Tensor:
        return x + fused._has_kernel(0, hopper=False)

    answers = []
    for backend in ("auto", "torch", "reference", "auto"):
        with scan_backend(backend):
            answers.append(asks(torch.zeros(())).item())
    assert answers == [1, 0, 0, 1]


@fakes_a_gpu
@pytest.mark.parametrize("batch", [4, 32])
def test_export_on_a_gpu_is_for_any_batch(batch: int) -> None:
    """What is decided by the number of tokens must not bind the exported program to it."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(24, 1, 2, device="cuda:0") for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return run_blocks(self.blocks, x, None, (2,))[2]

    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        x = torch.empty(batch, 197, 24, device="cuda:0")
        sizes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
        program = torch.export.export(Stack(), (x,), dynamic_shapes=sizes, strict=False)
    [constraint] = program.range_constraints.values()
    assert (constraint.lower, constraint.upper) == (1, 1024)
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("add_norm" in name or "gate" in name for name in names)


def test_layers_of_the_mlp_are_nodes_of_the_traced_model() -> None:
    nodes = get_graph_node_names(tiny())[0]
    assert {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"} <= set(nodes)


def test_a_model_that_a_configuration_cannot_describe(tmp_path: Path) -> None:
    model = tiny(norm_layer=partial(nn.LayerNorm, eps=1e-6))
    with pytest.raises(
        CheckpointError, match=r"config\.json cannot hold its argument norm_layer, .*partial.*norm_layer='layernorm'"
    ):
        model.save_pretrained(tmp_path / "folder")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["arm_base_patch16_224", "vim_base_patch16_224"])
def test_a_model_pruned_of_its_norm_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.prune_intermediate_layers([0], prune_norm=True)
    model.save_pretrained(tmp_path)
    loaded: Any = from_pretrained(tmp_path).eval()
    assert isinstance(loaded.norm, nn.Identity) and loaded(x := images(model)).equal(model(x))


def test_prune_intermediate_layers() -> None:
    model = tiny(depth=4)
    x = images(model)
    full, kept = copy.deepcopy(model), copy.deepcopy(model)
    assert model.prune_intermediate_layers([0, -3], prune_norm=True) == [0, 1]
    assert len(model.blocks) == 2
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    for pruned, whole in zip(
        model.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
        full.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
        strict=True,
    ):
        assert pruned.equal(whole)
    assert kept.prune_intermediate_layers(1, prune_head=False) == [3]
    assert kept(x).equal(full(x))


# --------------------------------------------------------------------------------- tracing, scripting, copies, devices


def test_fx_traces_the_whole_model() -> None:
    model = tiny()
    x = images(model)
    output = get_graph_node_names(model)[1][-1]
    traced = create_feature_extractor(model, [output])
    assert close(traced(x)[output], model(x))


def test_fx_model_trains_and_scripts() -> None:
    model = tiny()
    x = images(model)
    output = get_graph_node_names(model)[1][-1]
    traced = create_feature_extractor(model, [output])
    traced(x)[output].square().sum().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())
    assert close(torch.jit.script(traced)(x)[output], model(x))


@pytest.mark.parametrize("name", ["arm_base_patch16_224", "arm_base_patch16_stride8_448"])
def test_torchscript(name: str) -> None:
    with set_scriptable(True):
        model = tiny(name)
    x = images(model)
    assert close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_poolings_go_every_road(pool: str, tmp_path: Path) -> None:
    with set_scriptable(True):
        model = tiny(global_pool=pool, num_classes=3)
    x = images(model)
    expected = model(x).detach()
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for run in (torch.jit.script(model), torch.fx.symbolic_trace(model), compiled, exported):
        assert close(run(x).detach(), expected)
    model.save_pretrained(tmp_path)
    assert close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x).detach(), expected)


def test_torchscript_of_any_size() -> None:
    with set_scriptable(True):
        model = tiny(dynamic_img_size=True)
    scripted = torch.jit.script(model)
    for x in (images(model), images(model)[..., :16]):
        assert close(scripted(x), model(x))


def test_copies_and_pickles_are_equal() -> None:
    model = tiny()
    x = images(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(model(x))
        with torch.no_grad():
            twin.head.weight.zero_()
        assert not twin(x).equal(model(x)), "the copy shares memory"


def test_meta_model_comes_to_life() -> None:
    model = tiny(img_size=(64, 96))
    lazy = tiny(img_size=(64, 96), device="meta").to_empty(device="cpu")
    lazy.order.fill_(-1)  # whatever lies in empty memory
    lazy.load_state_dict(model.state_dict())
    assert "(root)" in reinit_non_persistent_buffers(lazy)
    x = images(model)
    assert lazy.order.equal(model.order)
    assert lazy(x).equal(model(x))
    assert "order" not in model.state_dict()


def test_parameters_in_bfloat16() -> None:
    model, low = tiny(), tiny(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    low.load_state_dict(model.state_dict())
    x = images(model, dtype=torch.bfloat16)
    assert low(x).dtype == torch.bfloat16
    assert close(low(x), model(x.float()), 5e-2)
    assert all(grad.isfinite().all() and grad.dtype == torch.bfloat16 for grad in gradients(low, x).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = tiny().train()
    x = images(model)
    with torch.autocast("cpu", dtype):
        output = model(x)
    assert output.dtype == dtype
    assert close(output, model(x), 3e-2)
    output.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------- other sizes


@pytest.mark.parametrize("img_size", [(64, 96), (32, 32), (80, 48), (16, 16)])
def test_dynamic_image_size(img_size: tuple[int, int]) -> None:
    model = tiny(dynamic_img_size=True)
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size)
    x = torch.randn(2, 3, *img_size)
    assert close(model(x), resized(x))
    assert resized.patch_embed.grid_size == (img_size[0] // 16, img_size[1] // 16)
    maps = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    assert maps.shape[2:] == resized.patch_embed.grid_size
    fixed = tiny(img_size=img_size)
    fixed.load_state_dict(resized.state_dict())
    assert close(fixed(x), resized(x))


@pytest.mark.parametrize("example", [(64, 64), (48, 96)])
def test_export_is_for_any_size(example: tuple[int, int]) -> None:
    """Of those that patches tile, the model's own among them, whichever the example has."""
    model = tiny(dynamic_img_size=True)
    sizes = {side: 16 * torch.export.Dim(name, min=2, max=16) for side, name in ((2, "rows"), (3, "columns"))}
    program = torch.export.export(model, (torch.randn(2, 3, *example),), dynamic_shapes=(sizes,), strict=False)
    exported = program.module()
    for size in ((64, 64), (48, 96), (160, 32)):
        x = torch.randn(2, 3, *size)
        assert close(exported(x), model(x))


def test_set_input_size_resamples_around_the_class_token() -> None:
    model = tiny()
    with torch.no_grad():  # an image of positions that a bicubic resize keeps, with an odd one out in the middle
        model.pos_embed.fill_(1.0)
        model.pos_embed[:, 8] = 5.0
    model.pos_embed.requires_grad_(False)
    model.set_input_size((48, 80))
    assert model.pos_embed.shape == (1, 16, 48)
    assert not model.pos_embed.requires_grad
    assert model.pos_embed[:, 7].eq(5.0).all()
    others = torch.cat([model.pos_embed[:, :7], model.pos_embed[:, 8:]], dim=1)
    assert close(others, torch.ones_like(others))
    assert model(images(model)).shape == (2, 10)


@pytest.mark.parametrize("stride", [None, 16, 8])
def test_set_input_size_takes_patch_sizes(stride: int | None, tmp_path: Path) -> None:
    model = tiny(patch_stride=stride)
    model.set_input_size((48, 64), patch_size=8)
    assert model.patch_embed.proj.weight.shape == (48, 3, 8, 8)
    assert model.patch_embed.proj.stride == (8, 8)
    assert model.patch_embed.grid_size == (6, 8)
    assert all(parameter.requires_grad for parameter in model.parameters())  # the new ones, too
    x = images(model)
    assert model(x).shape == (2, 10)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x).equal(model(x))


@pytest.mark.parametrize("refused", [{"img_size": 65}, {"patch_size": 7}, {"img_size": (64, 8)}])
def test_refused_sizes_leave_the_model_as_it_was(refused: dict[str, Any]) -> None:
    model = tiny()
    x = images(model)
    before = model(x)
    with pytest.raises(ValueError, match="is not tiled by patches"):
        model.set_input_size(**refused)
    assert model(x).equal(before)


@pytest.mark.parametrize(
    "refused, message",
    [
        ({"patch_size": 0}, "ARM: patch_size must be at least 1, got 0"),
        ({"patch_size": "8"}, r"ARM: patch_size must be a whole number or two, \(height, width\), got '8'"),
        ({"img_size": 64.0}, "ARM: img_size must be a whole number"),
        ({"img_size": (64,)}, "ARM: img_size must be a whole number"),
    ],
)
def test_set_input_size_names_what_it_refuses(refused: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tiny().set_input_size(**refused)


def test_feature_info_follows_the_patches() -> None:
    model = tiny()
    model.set_input_size(patch_size=8)
    made = tiny(patch_size=8)
    assert model.feature_info == made.feature_info and made.feature_info[0]["reduction"] == 8


@pytest.mark.parametrize("in_chans", [1, 5])
def test_input_channels(in_chans: int) -> None:
    model = tiny(in_chans=in_chans)
    assert model(torch.randn(2, in_chans, 64, 64)).shape == (2, 10)
    assert timm.models.get_model_traits(model)["in_chans"] == in_chans


def test_keywords_win_over_the_entry() -> None:
    model = tiny(
        "arm_large_patch16_384",
        img_size=(64, 96),
        patch_size=(16, 32),
        patch_stride=(8, 16),
        d_state=4,
        norm_layer="rmsnorm",
        depth=3,
    )
    assert model.patch_embed.grid_size == (7, 5)
    assert model.blocks[0].mixer.A_log.shape == (4, 48, 4)
    assert len(model.blocks) == 3
    assert type(model.norm) is type(model.blocks[0].norm1) is timm.layers.RmsNorm
    assert model(images(model)).shape == (2, 10)
    assert isinstance(tiny(norm_layer=partial(nn.LayerNorm, eps=1e-6)).norm, nn.LayerNorm)
    assert {tiny().norm.eps, *(block.norm1.eps for block in tiny().blocks)} == {1e-5}


def test_traits_follow_changes() -> None:
    model = tiny(in_chans=4)
    model.set_input_size((48, 80))
    model.reset_classifier(5)
    traits = timm.models.get_model_traits(model)
    expected = {"img_size": (48, 80), "fixed_input_size": True, "in_chans": 4, "num_classes": 5}
    assert traits == {**expected, "first_conv": "patch_embed.proj"}
    assert not timm.models.get_model_traits(tiny(dynamic_img_size=True))["fixed_input_size"]


@pytest.mark.parametrize("img_size, num_classes", [(None, 6), (96, 6), ((48, 80), 3), (64, 0)])
def test_saved_folder_round_trip(img_size: int | tuple[int, int] | None, num_classes: int, tmp_path: Path) -> None:
    model = tiny(num_classes=6, img_size=(64, 96), global_pool="token")
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    kwargs = {} if img_size is None else {"img_size": img_size}
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=num_classes, **kwargs).eval()
    if img_size is not None:
        model.set_input_size(img_size)
    assert (loaded.num_classes, loaded.global_pool) == (num_classes, "token")
    x = images(model)
    assert close(loaded.forward_features(x), model.forward_features(x))
    assert loaded(x).shape == (2, num_classes or 48)
    if num_classes == 6:
        assert close(loaded(x), model(x))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["arm_base_patch16_224", "arm_base", "arm_pico_patch2_8"])
def test_unknown_keyword_names_those_there_are(name: str) -> None:
    with pytest.raises(TypeError, match=r"unknown keyword dropout, widths; the model takes") as refusal:
        tiny(name, dropout=0.1, widths=3)
    allowed = str(refusal.value).partition("takes")[2].replace(",", " ").split()
    assert {"img_size", "patch_stride", "depth", "d_state", "drop_path_rate", "dynamic_img_size"} <= set(allowed)


REFUSED = [
    ({"img_size": 65}, r"image size \(65, 65\) is not tiled by patches of \(16, 16\).*64 instead of 65"),
    ({"img_size": (64, 100)}, r"image size \(64, 100\) is not tiled.*96 instead of 100"),
    ({"img_size": 8}, r"image size \(8, 8\) is not tiled.*16 instead of 8"),
    ({"patch_stride": 10}, r"is not tiled by patches of \(16, 16\) with stride \(10, 10\).*56 instead of 64"),
    ({"global_pool": "map"}, r"global_pool must be 'avg', 'avgmax', 'max', 'token' or '' \(no pooling\), got 'map'"),
]


@pytest.mark.parametrize("kwargs, message", REFUSED)
def test_bad_sizes_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_unknown_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match="arm_giant_patch16_224"):
        timm.create_model("arm_giant_patch16_224")


@pytest.mark.parametrize(
    "dynamic, shape, message",
    [
        (False, (1, 3, 64, 80), r"expected images of 64x64, got 64x80; .*img_size=.*set_input_size.*dynamic_img_size"),
        (False, (1, 4, 64, 64), r"expected images \(batch, 3, height, width\), got \(1, 4, 64, 64\); .*in_chans="),
        (False, (3, 64, 64), r"expected images \(batch, 3, height, width\), got \(3, 64, 64\)"),
        (True, (1, 3, 64, 81), r"image size \(64, 81\) is not tiled .* 80 instead of 81"),
        (True, (1, 1, 64, 64), r"expected images \(batch, 3, height, width\), got \(1, 1, 64, 64\)"),
    ],
)
def test_bad_images_are_refused(dynamic: bool, shape: tuple[int, ...], message: str) -> None:
    model = tiny(dynamic_img_size=dynamic)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, x: model.reset_classifier(3, "map"), "global_pool must be"),
        (lambda model, x: model.reset_classifier("3", ""), "ARM: num_classes must be a whole number, got '3'"),
        (lambda model, x: model.forward_intermediates(x, output_fmt="NHWC"), "output_fmt must be 'NCHW' or 'NLC'"),
    ],
)
def test_bad_options_are_refused(call: Callable[..., Any], message: str) -> None:
    model = tiny()
    x = images(model)
    before = model(x)
    with pytest.raises((TypeError, ValueError), match=message):
        call(model, x)
    assert model(x).equal(before) and model.num_classes == 10


# ------------------------------------------------------------------------------------------------ groups of parameters


def official_names(model: nn.Module) -> dict[str, str]:
    """Official parameter name -> ours, found by numbering our parameters and reading the numbers in the export."""
    ours = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(i)
    exported = {name: value for name, value in to_official(model).items() if name != "mask"}
    return {name: ours[int(value.flatten()[0])] for name, value in exported.items()}


def by_our_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@golden_cases(["d12_ld065"], ["d12_ld065", "d24_ld075"])
def test_layer_decay_groups_are_the_official_ones(case: str, golden: Path) -> None:
    depth, decay = {"d12_ld065": (12, 0.65), "d24_ld075": (24, 0.75)}[case]
    model = tiny(depth=depth, embed_dim=16, img_size=16)
    names = official_names(model)
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay
    )
    found = by_our_name(model, groups)
    table = json.loads((golden / "optim" / f"lrd_groups_{case}.json").read_text())
    assert names.keys() == table.keys()
    for name, (scale, weight_decay) in table.items():
        group = found[names[name]]
        assert group["lr_scale"] == pytest.approx(scale, rel=1e-12), name
        assert group["weight_decay"] == weight_decay, name

    sequence = json.loads((golden / "optim" / f"lrd_group_sequence_{case}.json").read_text())
    official = {ours: [name for name in names if names[name] == ours] for ours in names.values()}
    members = [[name for ours in found if found[ours] is group for name in official[ours]] for group in groups]
    assert len(groups) == len(sequence)
    for entry in sequence:  # theirs has the head before the blocks; the groups are the same
        [of_group] = [group for group, inside in zip(groups, members, strict=True) if entry["first"] in inside]
        assert of_group["lr_scale"] == pytest.approx(entry["lr_scale"], rel=1e-12)
        assert of_group["weight_decay"] == entry["weight_decay"]
        assert len(next(inside for inside in members if entry["first"] in inside)) == entry["n_params"]


@pytest.mark.parametrize("depth", [12, 24])
def test_weight_decay_groups_of_pretraining_are_the_official_ones(depth: int, golden: Path) -> None:
    model = create_pretraining_model(
        "arm_base", embed_dim=16, depth=depth, decoder_dim=64, img_size=32, cluster_size=16
    )
    names = official_names(model)
    groups = param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    found = by_our_name(model, groups)
    table = json.loads((golden / "optim" / f"pretrain_wd_groups_d{depth}.json").read_text())
    assert names.keys() == table.keys()
    for name, weight_decay in table.items():
        if isinstance(weight_decay, str):
            assert "frozen" in weight_decay
            assert names[name] not in found, name
        else:
            assert found[names[name]]["weight_decay"] == weight_decay, name


def test_optimisers_of_timm_find_the_groups() -> None:
    model = tiny()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    found = by_our_name(model, optimizer.param_groups)
    assert found["blocks.0.mixer.D"]["weight_decay"] == 0
    assert found["blocks.0.mixer.A_log"]["weight_decay"] == 0.05
    assert found["norm.weight"]["lr_scale"] == found["head.weight"]["lr_scale"] == 1
    assert found["blocks.1.mixer.D"]["lr_scale"] == 0.5
    assert found["pos_embed"]["lr_scale"] == 0.125


def test_names_without_weight_decay_exist() -> None:
    model = tiny()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert {"cls_token", "pos_embed", "blocks.1.mixer.D", "blocks.1.mixer.dt_proj_bias"} <= model.no_weight_decay()


# ------------------------------------------------------------------------------------------------------ initialisation


class Distribution(NamedTuple):
    """A distribution by its quantile function, which gives its moments, its bounds and what extremes are likely."""

    quantile: Callable[[torch.Tensor], torch.Tensor]

    def complaints(self, n: int, mean: float, std: float, low: float, high: float) -> list[str]:
        """What n drawn numbers with these statistics have that the distribution would practically never give."""
        middles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        values = self.quantile(middles)
        center, spread = values.mean().item(), values.std().item()
        kurtosis = ((values - center) / spread).pow(4).mean().item()

        def at(p: float) -> float:
            return self.quantile(torch.tensor(p, dtype=torch.float64)).item()

        rare, outer = min(30 / n, 0.5), 1e-7 / n
        slack = 1e-5 * max(abs(at(outer)), abs(at(1 - outer)))  # float32
        checks = {
            "mean": abs(mean - center) <= 6 * spread / math.sqrt(n),
            "std": abs(std - spread) <= 6 * spread * math.sqrt((kurtosis - 1) / (4 * n)),
            "min": at(outer) - slack <= low <= at(rare),
            "max": at(1 - rare) <= high <= at(1 - outer) + slack,
        }
        return [name for name, fine in checks.items() if not fine]


def normal(std: float) -> Distribution:
    return Distribution(lambda p: std * torch.special.ndtri(p))


def uniform(bound: float) -> Distribution:
    return Distribution(lambda p: bound * (2 * p - 1))


def truncated_normal(std: float) -> Distribution:
    """Cut off at two of its standard deviations."""
    tail = torch.special.ndtr(torch.tensor(-2.0, dtype=torch.float64)).item()
    return Distribution(lambda p: std * torch.special.ndtri(tail + p * (1 - 2 * tail)))


def step_bias() -> Distribution:
    """Inverse softplus of step sizes whose logarithms are uniform between those of 0.001 and 0.1."""
    return Distribution(lambda p: torch.exp(math.log(1e-3) + p * math.log(100)).expm1().log())


def expected_distribution(name: str, shape: list[int], depth: int, embed_dim: int) -> Distribution | float | str:
    """arm.md, section 6: a distribution, a constant, or 'table' for what is computed."""
    fan_in = shape[-1]
    patterns: list[tuple[str, Distribution | float | str]] = [
        (r"A(_b|_c|_c_b)?_log|(dec_)?pos_embed_table", "table"),
        (r"cls_token|pos_embed|ar_token|head\.weight", normal(0.02)),
        (r"patch_embed\.proj\.weight", truncated_normal(math.sqrt(1 / math.prod(shape[1:])) / 0.87962566103423978)),
        (r"conv1d\w*\.(weight|bias)", uniform(0.5)),
        (r"dt_proj\.bias", step_bias()),
        (r"dt_proj\w*\.weight", uniform(math.ceil(embed_dim / 16) ** -0.5)),
        (r"out_proj\.weight", uniform(fan_in**-0.5 / math.sqrt(depth))),
        (r"dec_block\.\d\.\w+\.\w+\.weight", uniform(math.sqrt(6 / sum(shape[-2:])))),
        (r"D(_b|_c|_c_b)?|(ar_)?norm\w*\.weight", 1.0),
        (r".*bias", 0.0),
        (r"(in_proj|x_proj\w*|w1|w2|w3|enc2dec|ar_pred)\.weight", uniform(fan_in**-0.5)),
    ]
    short = re.sub(r"^layers\.\d+\.(mixer\.|mlp\.)?|^dec_block\.\d\.(?=norm)", "", name)
    return next(expected for pattern, expected in patterns if re.fullmatch(pattern, short))


def check_initialisation(model: nn.Module, table: dict[str, Any], frozen: set[str]) -> None:
    """Hold our tensors, and the official statistics with the same rule, to the distributions of the specification."""
    settings = table["constructor"]
    ours = {name: value for name, value in to_official(model).items() if name != "mask"}
    assert ours.keys() == table["params"].keys()
    assert sum(parameter.numel() for parameter in model.parameters()) == table["n_params"]
    for name, official in table["params"].items():
        value = ours[name].double()
        assert list(value.shape) == official["shape"], name
        assert official["requires_grad"] == (name not in frozen)
        statistics = [value.mean(), value.std(), value.min(), value.max()]
        found, theirs = ([float(s) for s in statistics], [official[k] for k in ("mean", "std", "min", "max")])
        key = f"{name}_table" if name in frozen else name
        expected = expected_distribution(key, official["shape"], settings["depth"], settings["embed_dim"])
        if isinstance(expected, Distribution):
            assert not expected.complaints(value.numel(), *theirs), f"the rule for {name} is wrong"
            assert not expected.complaints(value.numel(), *found), name
        elif isinstance(expected, float):
            assert value.eq(expected).all(), name
        else:
            assert found == pytest.approx(theirs, abs=1e-5), name


def test_backbone_starts_as_the_official_one(golden: Path) -> None:
    table = json.loads((golden / "init" / "finetune_arm_base_pz16.json").read_text())
    model = timm.create_model("arm_base_patch16_224")
    check_initialisation(model, table, frozen=set())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for block in model.blocks:
        assert close(block.mixer.A_log.exp(), torch.arange(1, 17).expand(4, 768, 16))


def test_pretraining_model_starts_as_the_official_one(golden: Path) -> None:
    table = json.loads((golden / "init" / "pretrain_arm_base_pz16.json").read_text())
    model = create_pretraining_model("arm_base")
    check_initialisation(model, table, frozen={"pos_embed", "dec_pos_embed"})
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", "decoder_pos_embed"}


def test_new_heads_start_as_the_first_one() -> None:
    model = tiny(embed_dim=192, depth=1)
    for num_classes in (1000, 10):
        model.reset_classifier(num_classes)
        weight = model.head.weight.detach().double()
        assert weight.shape == (num_classes, 192)
        statistics = [float(value) for value in (weight.mean(), weight.std(), weight.min(), weight.max())]
        assert not normal(0.02).complaints(weight.numel(), *statistics)
        assert model.head.bias.eq(0).all()


def test_the_rule_for_distributions_can_fail() -> None:
    draws = torch.randn(100_000, dtype=torch.float64) * 0.02
    statistics = [float(value) for value in (draws.mean(), draws.std(), draws.min(), draws.max())]
    assert not normal(0.02).complaints(len(draws), *statistics)
    assert normal(0.0205).complaints(len(draws), *statistics) == ["std"]
    assert uniform(0.02 * math.sqrt(3)).complaints(len(draws), *statistics) == ["min", "max"]
    assert "mean" in normal(0.02).complaints(len(draws), 0.001, *statistics[1:])
