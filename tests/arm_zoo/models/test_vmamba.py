"""VMamba against the authors' own, as a timm citizen, and its weights under either names."""

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import RmsNorm, create_feature_extractor, get_graph_node_names, set_scriptable
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from arm_zoo import CheckpointError, from_official, from_pretrained, to_official
from arm_zoo.identify import describe, find_variant
from arm_zoo.loading import load
from arm_zoo.models.vmamba import OFFICIAL_NAMES, VMamba
from arm_zoo.weights.tensor_names import under_our_names
from hub.check import check_folder
from hub.convert import convert
from hub.export import export
from tests.arm_zoo.models.test_models import (
    Distribution,
    by_our_name,
    gradients,
    normal,
    official_names,
    step_bias,
    uniform,
)
from tests.helpers.golden import close

NAMES = ["vmamba_tiny_s1l8", "vmamba_small_s2l15", "vmamba_base_s2l15"]
CASES = ["vmamba_b_64", "vmamba_t_96x64"]
SMALL = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_classes": 10}


def tiny(name: str = "vmamba_base_s2l15", **kwargs: Any) -> Any:
    """An entry made small, in evaluation mode."""
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def images(height: int = 64, width: int = 48, channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, height, width, dtype=dtype)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, golden: Path) -> dict[str, Any]:
    folder = golden / request.param
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return tensors | {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def model_of(case: dict[str, Any], dtype: torch.dtype) -> Any:
    flags = case["meta"]["constructor"]
    sizes = {"embed_dim": flags["dims"], "depths": flags["depths"], "expand": flags["ssm_ratio"]}
    model = tiny(**sizes, num_classes=flags["num_classes"], drop_path_rate=flags["drop_path_rate"], dtype=dtype)
    tensors = from_official(case["state_dict"], model)
    model.load_state_dict({name: value.to(dtype) for name, value in tensors.items()})
    return model


# ------------------------------------------------------------------------------------------------- the authors' model


@pytest.mark.parametrize("dtype, tolerance, of_gradients", [(torch.float64, 1e-12, 1e-7), (torch.float32, 1e-4, 1e-3)])
def test_model_is_the_authors_one(
    case: dict[str, Any], dtype: torch.dtype, tolerance: float, of_gradients: float
) -> None:
    model, expected = model_of(case, dtype), case["outputs_f64"]
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({name: output.permute(0, 3, 1, 2)})

    model.patch_embed.register_forward_hook(keep("patch_embed"))
    model.norm.register_forward_hook(keep("normed"))
    for i, stage in enumerate(model.stages):
        if i:
            stage.downsample.register_forward_hook(keep(f"stage_{i - 1}_downsampled"))
        for j, block in enumerate(stage.blocks):
            block.register_forward_hook(keep(f"stage_{i}_block_{j}"))
    x = case["inputs"]["images"].to(dtype).requires_grad_()
    found["logits"] = model(x)
    found["features"] = model.forward_head(model.forward_features(x), pre_logits=True)
    (found["logits"] * case["inputs"]["cotangent"]).sum().backward()
    found["grad_input"] = x.grad
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert close(value, expected[name], of_gradients if name == "grad_input" else tolerance), name

    with torch.no_grad():  # the gradients under the authors' names
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    grads = to_official(model)
    assert grads.keys() == case["grad_norms"].keys()
    for name, norm in case["grad_norms"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=of_gradients), name
    for name, value in case.get("param_grads", {}).items():
        assert close(grads[name], value, of_gradients), name


@pytest.mark.parametrize("golden", ["small"], indirect=True)
def test_first_stages_are_the_authors(golden: Path) -> None:
    folder = golden / "vmamba_t_96x64"
    model: Any = tiny("vmamba_tiny_s1l8", embed_dim=14, depths=(1, 1), num_classes=0, dtype=torch.float64)
    official = load_file(folder / "state_dict.safetensors")
    missing = model.load_state_dict(under_our_names(official, OFFICIAL_NAMES), strict=False).missing_keys
    assert missing == ["norm.weight", "norm.bias"]  # which theirs has of the last stage
    x = load_file(folder / "inputs.safetensors")["images"].double()
    expected = load_file(folder / "outputs_f64.safetensors")
    for i, found in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        assert close(found, expected[f"stage_{i}_block_0"], 1e-12)
    names = to_official(model).keys() - {"classifier.norm.weight", "classifier.norm.bias"}
    assert names == official.keys()


def test_names_go_both_ways(case: dict[str, Any]) -> None:
    back = to_official(model_of(case, torch.float32))
    assert back.keys() == case["state_dict"].keys()
    assert all(back[name].equal(value) for name, value in case["state_dict"].items())


def test_linear_layers_may_come_as_convolutions(case: dict[str, Any]) -> None:
    model = model_of(case, torch.float32)
    taken = re.compile(r".*(in_proj|out_proj|fc1|fc2)\.weight")
    tensors = {k: v[:, :, None, None] if taken.fullmatch(k) else v for k, v in case["state_dict"].items()}
    assert sum(value.ndim == 4 for value in tensors.values()) == 5 + 5 + 5 * 4
    adapted = from_official({"model": tensors, "epoch": 237}, model)
    assert all(adapted[name].equal(value) for name, value in model.state_dict().items())
    assert find_variant(tensors).model_args == find_variant(case["state_dict"]).model_args


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_the_authors_ones(name: str, golden: Path) -> None:
    table = json.loads((golden / "init" / f"{name}.json").read_text())
    settings = table["constructor"]
    model: Any = timm.create_model(name, drop_path_rate=settings["drop_path_rate"], device="meta")
    assert isinstance(model, VMamba)
    assert [info["num_chs"] for info in model.feature_info] == settings["dims"]
    assert [len(stage.blocks) for stage in model.stages] == settings["depths"]
    assert sum(parameter.numel() for parameter in model.parameters()) == table["n_params"]
    assert len(to_official(model)) == table["n_tensors"]
    assert list(model.buffers()) == []
    rates = [[getattr(block.drop_path, "drop_prob", 0.0) for block in stage.blocks] for stage in model.stages]
    for ours, official in zip(rates, table["drop_path_per_block"], strict=True):
        assert ours == pytest.approx(official, abs=1e-7)


def expected_distribution(name: str, shape: list[int]) -> Distribution | float:
    """vmamba.md, section 6."""
    patterns: list[tuple[str, Distribution | float]] = [
        (r"(patch_embed\.[05]|downsample\.1|conv2d)\.weight", uniform(math.prod(shape[1:]) ** -0.5)),
        (r"patch_embed\.0\.bias", uniform(27**-0.5)),
        (r"(patch_embed\.5|downsample\.1)\.bias", uniform((9 * shape[0] / 2) ** -0.5)),
        (r"(in_proj|out_proj|fc1|fc2|head)\.weight", normal(0.02)),
        (r"x_proj_weight|dt_projs_weight", uniform(shape[-1] ** -0.5)),
        (r"dt_projs_bias", step_bias()),
        (r"A_logs|.*bias", 0.0),
        (r"Ds|(patch_embed|downsample)\.\d\.weight|.*norm2?\.weight", 1.0),
    ]
    short = re.sub(r"^layers\.\d+\.(blocks\.\d+\.)?(op\.|mlp\.)?|^classifier\.", "", name)
    return next(expected for pattern, expected in patterns if re.fullmatch(pattern, short))


def test_model_starts_as_the_official_one(golden: Path) -> None:
    table = json.loads((golden / "init" / "vmamba_tiny_s1l8.json").read_text())["params_first_block_of_each_stage"]
    ours = to_official(timm.create_model("vmamba_tiny_s1l8"))
    assert {name for name in ours if "blocks." not in name or ".blocks.0." in name} == table.keys()
    for name, official in table.items():
        value = ours[name].double()
        assert list(value.shape) == official["shape"], name
        expected = expected_distribution(name, official["shape"])
        if isinstance(expected, float):
            assert value.eq(expected).all() and official["min"] == official["max"] == expected, name
            continue
        found = [float(value.mean()), float(value.std()), float(value.min()), float(value.max())]
        theirs = [official[key] for key in ("mean", "std", "min", "max")]
        # theirs is cut off at -2, which torch draws by mistake once in some millions of numbers
        assert set(expected.complaints(value.numel(), *theirs)) <= ({"min"} if theirs[2] == -2 else set()), name
        assert not expected.complaints(value.numel(), *found), name


def test_weight_decay_groups_are_the_official_ones(golden: Path) -> None:
    table = json.loads((golden / "optim" / "vmamba_wd_groups_base_s2l15_first_blocks.json").read_text())
    model = tiny(embed_dim=16)
    names = official_names(model)
    for layer_decay in (None, 1.0):  # as the recipes have it, and as they have it with layers' own rates
        if layer_decay is None:
            groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        else:
            keywords = {"no_weight_decay_list": model.no_weight_decay(), "layer_decay": layer_decay}
            groups = param_groups_layer_decay(model, 0.05, **keywords)
        found = by_our_name(model, groups)
        assert {name: found[names[name]]["weight_decay"] for name in table} == table


def test_layer_decay_counts_blocks_from_the_head() -> None:
    model = tiny()
    found = by_our_name(model, create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.5).param_groups)
    scales = [found[f"stages.{i}.blocks.{j}.ss2d.D"]["lr_scale"] for i, j in ((3, 0), (2, 1), (2, 0), (1, 0), (0, 0))]
    assert scales == sorted(scales, reverse=True) and len(set(scales)) == 5
    assert found["head.weight"]["lr_scale"] == found["norm.weight"]["lr_scale"] == 1
    assert found["patch_embed.conv1.weight"]["lr_scale"] < scales[-1]
    assert model.group_matcher(coarse=True)["blocks"] == [(r"^stages\.(\d+)", None)]


# ----------------------------------------------------------------------------------------------------------- registry


def test_names_are_exactly_these() -> None:
    assert sorted(timm.list_models("vmamba_*")) == sorted(NAMES)
    for name in NAMES:
        assert list(timm.models.get_arch_pretrained_cfgs(name)) == [f"{name}.in1k"]
        cfg: Any = timm.models.get_pretrained_cfg(name)
        assert (cfg.license, cfg.crop_pct, cfg.crop_mode, cfg.interpolation) == ("mit", 0.875, "center", "bicubic")
        assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (cfg.first_conv, cfg.classifier, cfg.fixed_input_size) == ("patch_embed.conv1", "head", False)
        assert cfg.origin_url == "https://github.com/MzeroMiko/VMamba" == OFFICIAL_NAMES.origin_url


def test_evaluation_keeps_the_picture_in_shape() -> None:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tiny()))
    assert transform.transforms[0](Image.new("RGB", (300, 200))).size == (384, 256)
    assert transform(Image.new("RGB", (300, 200))).shape == (3, 224, 224)


# ----------------------------------------------------------------------------------------------- forward and backward


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_and_configuration(name: str) -> None:
    model, x = tiny(name).train(), images()
    found = gradients(model, x)
    assert found.keys() == dict(model.named_parameters()).keys(), "some parameters have no gradient"
    assert all(grad.isfinite().all() and grad.count_nonzero() for grad in found.values())
    model.eval()
    assert {f"{model.pretrained_cfg[key]}.weight" for key in ("first_conv", "classifier")} <= model.state_dict().keys()
    features = model.forward_features(x)
    assert features.shape == (2, 2, 2, 96) and model.output_fmt == "NHWC"
    assert model.num_features == model.head_hidden_size == 96
    pooled = model.forward_head(features, pre_logits=True)
    assert close(pooled, features.flatten(1, 2).mean(1))
    assert model(x).equal(model.get_classifier()(pooled)) and model(x).shape == (2, 10)
    model.reset_classifier(0)
    assert model(x).equal(pooled) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).equal(features)
    model.train().reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and model.num_classes == 7 and model.head.training
    assert tiny(name, num_classes=0)(x).shape == (2, 96)


@pytest.mark.parametrize("height, width", [(32, 32), (100, 68), (33, 97), (31, 5), (1, 1)])
def test_any_image_size(height: int, width: int) -> None:
    model = tiny(features_only=True)
    assert model.feature_info.channels() == [12, 24, 48, 96]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    grids = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)]
    assert [tuple(feature.shape[2:]) for feature in model(images(height, width))] == grids
    whole = tiny()
    assert whole(images(height, width)).isfinite().all()


def test_maps_of_different_sizes_do_not_mix() -> None:
    """What is kept of one size must not be taken for another, of the same number of tokens even."""
    model = tiny()
    wide, high = images(64, 128), images(128, 64)
    expected = {True: model(wide), False: model(high)}
    for is_wide in (False, True, True, False):
        assert model(wide if is_wide else high).equal(expected[is_wide])
    assert not close(model(high.transpose(2, 3)), expected[False], 1e-3), "rows and columns have weights of their own"


def test_grad_checkpointing_changes_nothing_but_memory() -> None:
    model, x = tiny().train(), images()
    calls: list[nn.Module] = []
    for stage in model.stages:
        for block in stage.blocks:
            block.register_forward_pre_hook(lambda module, _: calls.append(module))
    plain, expected = model(x), gradients(model, x)
    model.set_grad_checkpointing()
    assert model(x).equal(plain)
    calls.clear()
    actual = gradients(model, x)
    assert len(calls) == 2 * 5 and all(close(actual[key], expected[key]) for key in expected)
    model.set_grad_checkpointing(False)
    calls.clear()
    gradients(model, x)
    assert len(calls) == 5


def test_drop_rates_act_in_training_only() -> None:
    for rates in ({"drop_rate": 0.5}, {"drop_path_rate": 0.9}):
        model, x = tiny(**rates), images()
        assert model(x).equal(model(x))
        model.train()
        assert not model(x).equal(model(x)), rates


def test_forward_intermediates() -> None:
    model, x = tiny(), images(100, 68)
    final, maps = model.forward_intermediates(x)
    assert final.equal(model.forward_features(x))
    assert [tuple(each.shape) for each in maps] == [(2, 12, 25, 17), (2, 24, 13, 9), (2, 48, 7, 5), (2, 96, 4, 3)]
    _, rows = model.forward_intermediates(x, output_fmt="NHWC")
    assert all(row.permute(0, 3, 1, 2).equal(each) for row, each in zip(rows, maps, strict=True))
    _, [normed] = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC")
    assert normed.equal(final)
    early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert early[1].equal(maps[1])
    both = model.forward_intermediates(x, indices=[2], output_dict=True)
    assert both["image_features"].equal(final) and both["image_intermediates"][0].equal(maps[2])
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([1, 0], prune_norm=True) == [1, 0]
    assert len(pruned.stages) == 2 and isinstance(pruned.head, nn.Identity)
    assert pruned.forward_intermediates(x, [1], intermediates_only=True)[0].equal(maps[1])


@pytest.mark.parametrize("kwargs", [{}, {"prune_norm": True}, {"prune_head": False}])
def test_pruned_models_end_at_their_last_stage(kwargs: dict[str, bool]) -> None:
    model, x = tiny(), images()
    _, maps = model.forward_intermediates(x, output_fmt="NHWC")
    model.prune_intermediate_layers([1], **kwargs)
    assert model.forward_features(x).equal(maps[1]) and model(x).equal(maps[1])
    model.reset_classifier(7, "avg")
    assert model.num_features == model.head_hidden_size == 24 and model(x).shape == (2, 7)
    assert all(grad.isfinite().all() for grad in gradients(model, x).values())


@pytest.mark.parametrize("index, kwargs", [(1, {}), (3, {}), (3, {"prune_norm": True})])
def test_pruned_models_are_saved_and_loaded(index: int, kwargs: dict[str, bool], tmp_path: Path) -> None:
    model, x = tiny(), images()
    model.prune_intermediate_layers([index], **kwargs)
    for classes in (0, 7):
        model.reset_classifier(classes)
        model.save_pretrained(tmp_path)
        loaded: Any = from_pretrained(tmp_path).eval()
        assert len(loaded.stages) == index + 1 and loaded(x).equal(model(x))


def test_feature_classes_agree() -> None:
    found = {}
    for kind in ("getter", "hook", "fx"):
        torch.manual_seed(1)
        model = tiny(features_only=True, out_indices=(0, 2), feature_cls=kind)
        assert model.feature_info.module_name() == ["stages.0", "stages.2"]
        found[kind] = model(torch.ones(1, 3, 40, 64))
    for maps, hooked, traced in zip(*found.values(), strict=True):
        assert hooked.equal(traced) and maps.equal(hooked.permute(0, 3, 1, 2))


# --------------------------------------------------------------------------------- tracing, scripting, copies, devices


def test_torchscript_and_fx_take_any_size() -> None:
    with set_scriptable(True):
        model = tiny()
    output = get_graph_node_names(model)[1][-1]
    traced = create_feature_extractor(model, [output])
    scripted = torch.jit.script(model)
    symbolic = torch.fx.symbolic_trace(model)
    for x in (images(), images(33, 70)):
        for run in (scripted, symbolic, lambda x: traced(x)[output]):
            assert close(run(x), model(x))
    assert torch.jit.trace(model, x)(x).equal(model(x))


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_poolings_go_every_road(pool: str, tmp_path: Path) -> None:
    with set_scriptable(True):
        model = tiny(global_pool=pool)
    x = images(33, 70)
    features = model.forward_features(x)
    largest = features.amax(dim=(1, 2))
    pooled = largest if pool == "max" else (largest + features.mean(dim=(1, 2))) / 2
    assert close(model.forward_head(features, pre_logits=True), pooled)
    expected = model(x).detach()
    exported = torch.export.export(model, (x,)).module()
    for run in (torch.jit.script(model), torch.fx.symbolic_trace(model), exported):
        assert close(run(x).detach(), expected)
    model.save_pretrained(tmp_path)
    assert close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x).detach(), expected)
    model.reset_classifier(0)
    assert close(model(x), pooled)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_images_gives_the_gradients_of_each() -> None:
    model, x = tiny(depths=(1, 1, 1, 1)), images()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i, image in enumerate(x):
        assert all(close(found[name][i], grad, 1e-4) for name, grad in gradients(model, image[None]).items())


@pytest.mark.slow
def test_compiled_in_one_piece_for_any_size() -> None:
    model = tiny(depths=(1, 1, 1, 1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x in (images(), images(33, 70)):
        assert close(compiled(x), model(x))


@pytest.mark.slow
def test_compiled_training() -> None:
    model, x = tiny(depths=(1, 1, 1, 1)).train(), images()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)  # on the CPU inductor fails at sizes left open
    assert close(compiled(x), model(x))
    expected, actual = gradients(model, x), gradients(compiled, x)
    assert all(close(actual[f"_orig_mod.{name}"], value, 1e-4) for name, value in expected.items())


def test_copies_pickles_and_models_from_nothing() -> None:
    model, x = tiny(), images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(model(x))
    lazy = tiny(device="meta").to_empty(device="cpu")
    for parameter in lazy.parameters():
        nn.init.constant_(parameter, torch.nan)
    lazy.init_weights()
    assert lazy(x).isfinite().all()
    lazy.load_state_dict(model.state_dict())
    lazy.init_non_persistent_buffers()
    assert lazy(x).equal(model(x))


def test_lower_precision() -> None:
    model, x = tiny(), images()
    low = tiny(dtype=torch.bfloat16)
    low.load_state_dict(model.state_dict())
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert close(low(x.bfloat16()), model(x), 5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16 and close(output, model(x), 5e-2)
    output.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_empty_batches_and_other_channels() -> None:
    model = tiny(in_chans=5)
    assert model(images(channels=5)[:0]).shape == (0, 10)
    with pytest.raises(ValueError, match=r"expected images \(batch, 5, height, width\), got .*in_chans="):
        model(images())
    assert isinstance(tiny(norm_layer="rmsnorm").stages[1].blocks[0].ss2d.out_norm, RmsNorm)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"depths": ()}, ValueError, r"depths must be one to four numbers of blocks, each at least 1, got \(\)"),
    ({"depths": (1, 1, 1, 1, 1)}, ValueError, r"each at least 1, got \(1, 1, 1, 1, 1\)"),
    ({"depths": (2, 0, 8, 2)}, ValueError, r"each at least 1, got \(2, 0, 8, 2\)"),
    ({"depths": 3}, ValueError, r"each at least 1, got 3"),
    ({"depths": "2282"}, ValueError, r"each at least 1, got '2282'"),
    ({"embed_dim": 1}, ValueError, r"embed_dim // 2 must be at least 1, got 0"),
    ({"expand": 0.0}, ValueError, r"expand \* embed_dim must be a whole number, at least 1, got 0.0 \* 12 = 0"),
    ({"embed_dim": 34, "expand": 1.05}, ValueError, r"must be a whole number, at least 1, got 1.05 \* 34 = 35.7"),
    ({"global_pool": "token"}, ValueError, r"global_pool must be 'avg', 'avgmax', 'max' or '' .*, got 'token'"),
    ({"img_size": (64, 0)}, ValueError, r"img_size must be at least 1, got \(64, 0\)"),
    ({"d_state": 16}, TypeError, r"unknown keyword d_state; the model takes depths"),
]


@pytest.mark.parametrize("kwargs, error, message", REFUSED, ids=lambda value: str(value)[:20])
def test_bad_arguments_are_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny(**kwargs)


def test_bad_options_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(images(), output_fmt="NLC")
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(5, "token")
    assert model.head.out_features == 10


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmamba_base_s2l15"])
def test_files_are_loaded_by_their_shapes(name: str, official: bool, tmp_path: Path) -> None:
    model, x = tiny(name), images()
    tensors = to_official(model) if official else model.state_dict()
    variant = find_variant(tensors)
    assert variant.official == official and variant.num_classes == 10
    assert variant.input_size == (3, 224, 224) and "224x224 pixels, 10 classes" in describe(variant, model)
    torch.save({"model": tensors, "epoch": 237, "max_accuracy": 83.9}, tmp_path / "official.pth")
    save_file(tensors, tmp_path / "weights.safetensors")
    said, _ = convert(tmp_path / "official.pth", tmp_path / "out", license="mit")
    assert said.startswith(variant.architecture)
    assert check_folder(tmp_path / "out").startswith("golden")
    model.save_pretrained(tmp_path / "folder")
    for source in ("official.pth", "weights.safetensors", "out", "folder"):
        loaded: Any = from_pretrained(tmp_path / source).eval()
        assert isinstance(loaded, VMamba) and loaded(x).equal(model(x)), source
    assert load(name, tmp_path / "official.pth", embed_dim=12, depths=(1, 1, 2, 1)).model.eval()(x).equal(model(x))
    overlay = {"file": str(tmp_path / "official.pth")}
    again: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    assert again(x).equal(model(x))


def test_any_whole_inner_width_is_loaded_by_its_shapes() -> None:
    model, x = tiny(embed_dim=22, expand=15 / 22), images()
    assert model.stages[2].blocks[0].ss2d.in_proj.out_features == 4 * 15
    assert find_variant(model.state_dict()).load(model.state_dict())(x).equal(model(x))


def test_whole_sizes_are_told_by_their_shapes() -> None:
    for name in NAMES:
        model = timm.create_model(name, device="meta")
        variant = find_variant(model.state_dict())
        assert (variant.architecture, variant.model_args, variant.num_classes) == (name, {}, 1000)


def test_saved_folders_take_other_heads_and_channels(tmp_path: Path) -> None:
    model, x = tiny(img_size=(64, 48)), images()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["depths"] == [1, 1, 2, 1] and config["num_features"] == 96
    assert model.hub_config()["pretrained_cfg"]["input_size"] == model.input_size() == (3, 64, 48)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert other(x[:, :1]).shape == (2, 3)
    same: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert same(x).equal(model(x)) and same.input_size() == (3, 64, 48)
    config["model_args"]["depths"] = [2, 2, 10**9, 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"depths=.*expected at most 512"):
        from_pretrained(tmp_path)


def damaged(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {k: v for k, v in {**tensors, name: value}.items() if v is not None}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("patch_embed.conv2.weight", torch.ones(3), "this is no VMamba checkpoint: the convolutions of patch_embed"),
        ("stages.0.blocks.0.ss2d.in_proj.weight", torch.ones(4, 0), "this is no VMamba checkpoint"),
        ("patch_embed.conv2.weight", None, "this is no ARM or .*VMamba"),
        ("head.1.weight", torch.ones(3, 3), "the checkpoint's head is not one linear layer"),
        ("stages.0.blocks.600.norm1.weight", torch.ones(12), "only in the model"),
        ("stages.4.blocks.0.norm1.weight", torch.ones(12), r"one to four numbers of blocks.*got \(1, 1, 2, 1, 1\)"),
        ("x.blocks.y", torch.ones(1), r"only in the checkpoint \(1\): x.blocks.y"),
        ("stages.1.downsample.conv.weight", torch.ones(24, 12, 5, 5), r"\(24, 12, 5, 5\) -> \(24, 12, 3, 3\)"),
    ],
)
def test_damaged_checkpoints_are_refused(name: str, value: torch.Tensor | None, message: str) -> None:
    tensors = damaged(tiny().state_dict(), name, value)
    with pytest.raises(CheckpointError, match=message):
        find_variant(tensors).load(tensors)


def test_checkpoints_of_another_family_are_refused(tmp_path: Path) -> None:
    vim = timm.create_model("vim_pico_patch2_8")
    save_file(vim.state_dict(), tmp_path / "vim.safetensors")
    with pytest.raises(CheckpointError, match=r"another width, depth or family\?\)\n  only in the model"):
        tiny(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "vim.safetensors")})
    with pytest.raises(CheckpointError, match="another width, depth or family"):
        from_official(to_official(vim), tiny())


def test_too_many_blocks_are_refused() -> None:
    tensors = tiny().state_dict() | {f"stages.2.blocks.{i}.norm1.weight": torch.ones(1) for i in range(510)}
    with pytest.raises(CheckpointError, match=r"with depths \(1, 1, 510, 1\); from 1 to 512"):
        find_variant(tensors)


@pytest.mark.parametrize(
    "ending, format", [pytest.param("pt2", "pt2", marks=pytest.mark.slow), ("safetensors", "official")]
)
def test_exports(ending: str, format: str, tmp_path: Path) -> None:
    model = tiny(num_classes=3, img_size=40)
    model.save_pretrained(tmp_path / "folder")
    assert export(str(tmp_path / "folder"), tmp_path / f"file.{ending}", format)
    if format == "official":
        assert load_file(tmp_path / "file.safetensors").keys() == to_official(model).keys()


def test_authors_names_translate_to_names_that_exist(golden: Path) -> None:
    tensors = load_file(golden / "vmamba_b_64" / "state_dict.safetensors")
    assert under_our_names(tensors, OFFICIAL_NAMES).keys() == tiny(num_classes=11).state_dict().keys()
