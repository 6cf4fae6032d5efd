"""Vim: the authors' numbers, its names, its residual in float32, and what timm asks of its entries."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import create_feature_extractor
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.nn import functional as F

from arm_zoo import from_official, from_pretrained, to_official
from arm_zoo.identify import find_variant
from arm_zoo.models.vim import Vim
from hub.convert import convert
from tests.arm_zoo.models.test_models import Distribution, Weights, expected_distribution, gradients, images
from tests.helpers.golden import close, in_both_sets, trained_gradients

TAGS = {
    "vim_pico_patch2_8": "untrained",
    "vim_tiny_patch4_32": "untrained",
    "vim_tiny_patch16_224": "in1k",
    "vim_tiny_patch16_stride8_224": "in1k_ft",
    "vim_small_patch16_224": "in1k",
    "vim_small_patch16_stride8_224": "in1k_ft",
    "vim_base_patch16_224": "in1k",
    "vim_large_patch16_224": "untrained",
    "vim_huge_patch16_224": "untrained",
}
PARAMETERS = {  # millions: arm.md, section 9, and the paper's table 1
    "vim_small_patch16_224": 25.796584,
    "vim_base_patch16_224": 97.598440,
    "vim_large_patch16_224": 340,
    "vim_huge_patch16_224": 755,
}


def small(name: str = "vim_base_patch16_224", **kwargs: Any) -> Any:
    """An entry made small: 4 x 4 patches, 48 wide, 2 deep, in evaluation mode."""
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_classes": 10}
    return timm.create_model(name, **{**sizes, **kwargs}).eval()


def authors(folder: Path) -> Vim:
    settings = json.loads((folder / "meta.json").read_text())["constructor"]
    sizes = {key: settings[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_classes")}
    model = Vim(**sizes, global_pool="token")
    model.load_state_dict(from_official(load_file(folder / "state_dict.safetensors"), model))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["vim_base_224", "vim_small_img64"])
def test_outputs_and_gradients_are_the_authors(case: str, dtype: torch.dtype, golden: Path) -> None:
    folder = golden / case
    model, given = authors(folder).to(dtype), load_file(folder / "inputs.safetensors")
    outputs: dict[str, Tensor] = {}
    for k, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, k=k: outputs.update({f"block_{k:02}_residual": args[0]}))
        block.mixer.register_forward_hook(lambda _, args, out, k=k: outputs.update({f"block_{k:02}_hidden": out}))
    x = given["images"].to(dtype).requires_grad_()
    tokens = model.forward_features(x)
    outputs["features"], outputs["logits"] = model.pool(tokens), model.forward_head(tokens)
    (outputs["logits"] * given["cotangent"].to(dtype)).sum().backward()
    outputs["grad_input"] = x.grad
    compared = 0
    for file in ("outputs_f64", "outputs_f64_rounded_to_f32"):
        path = folder / f"{file}.safetensors"
        for name, expected in (load_file(path) if path.exists() else {}).items():
            exact = 1e-9 if expected.dtype == torch.float64 else 1e-7
            rough = 1e-3 if name == "grad_input" else 1e-4
            assert close(outputs[name].detach(), expected, exact if dtype == torch.float64 else rough), name
            compared += 1
    assert compared >= 2 * len(model.blocks)
    found, norms = trained_gradients(model), json.loads((folder / "grad_norms.json").read_text())
    assert found.keys() == norms.keys()
    for name, norm in norms.items():
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        assert found[name].norm().item() == pytest.approx(norm, rel=tolerance), name


@in_both_sets
def test_first_blocks_and_the_head_are_the_authors(golden: Path) -> None:
    folder = golden / "vim_small_img64"
    model, expected = authors(folder).double(), load_file(folder / "outputs_f64.safetensors")
    x = load_file(folder / "inputs.safetensors")["images"].double()
    found = model.forward_intermediates(x, indices=[0, 1], output_fmt="NLC", intermediates_only=True)
    for k, patches in enumerate(found):
        tokens = expected[f"block_{k:02}_residual"] + expected[f"block_{k:02}_hidden"]
        assert close(patches.detach(), torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1), 1e-12)
    tokens = model.norm(expected["block_23_residual"] + expected["block_23_hidden"])
    assert close(model.forward_head(tokens, pre_logits=True).detach(), expected["features"], 1e-12)
    assert close(model.forward_head(tokens).detach(), expected["logits"], 1e-12)


@in_both_sets
def test_names_go_both_ways(golden: Path) -> None:
    theirs = load_file(golden / "vim_small_img64" / "state_dict.safetensors")
    model = authors(golden / "vim_small_img64")
    ours = to_official(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    nested = {"model": theirs, "optimizer": {"state": {}}, "epoch": 3}
    again = from_official(nested, model)
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def specification(p: Weights, x: Tensor, stride: int, depth: int) -> Tensor:
    """arm.md, sections 2 and 9, under the official names, for grids and strides that no stored tensor has."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * p[f"{name}.weight"]

    tokens = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=stride).flatten(2).mT
    middle = tokens.shape[1] // 2
    cls_token = p["cls_token"].expand(len(x), -1, -1)
    residual = torch.cat([tokens[:, :middle], cls_token, tokens[:, middle:]], dim=1) + p["pos_embed"]
    for i in range(depth):
        weights = {name.removeprefix(f"layers.{i}.mixer."): value for name, value in p.items()}
        u0, z = F.linear(norm(residual, f"layers.{i}.norm"), weights["in_proj.weight"]).chunk(2, dim=-1)
        total = torch.zeros_like(u0)
        for suffix in ("", "_b"):
            way = u0.flip(1) if suffix else u0
            taps = weights[f"conv1d{suffix}.weight"]
            u = F.silu(F.conv1d(F.pad(way.mT, (3, 0)), taps, weights[f"conv1d{suffix}.bias"], groups=len(taps)).mT)
            dt_weight, A = weights[f"dt_proj{suffix}.weight"], -weights[f"A{suffix}_log"].exp()
            dt, B, C = F.linear(u, weights[f"x_proj{suffix}.weight"]).split([dt_weight.shape[1], 16, 16], dim=-1)
            delta = F.softplus(F.linear(dt, dt_weight, weights[f"dt_proj{suffix}.bias"]))
            state, steps = torch.zeros(len(x), *A.shape, dtype=x.dtype), []
            for t in range(u.shape[1]):
                decay = torch.exp(delta[:, t, :, None] * A)
                state = decay * state + (delta * u)[:, t, :, None] * B[:, t, None]
                steps.append((state * C[:, t, None]).sum(-1))
            y = torch.stack(steps, dim=1) + weights[f"D{suffix}"] * u
            total += y.flip(1) if suffix else y
        residual = residual + F.linear(total / 2 * F.silu(z), weights["out_proj.weight"])
    return F.linear(norm(residual, "norm_f")[:, middle], p["head.weight"], p["head.bias"])


@pytest.mark.parametrize("img_size, stride", [((48, 80), 16), (80, 16), ((32, 40), 8), (16, 16)])
def test_other_grids_follow_the_specification(img_size: Any, stride: int) -> None:
    torch.manual_seed(0)
    model = small(img_size=img_size, patch_stride=stride).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = images(model, dtype=torch.float64)
    assert close(model(x).detach(), specification(to_official(model), x, stride, 2).detach(), 1e-12)


def test_drop_path_rates_are_the_authors(golden: Path) -> None:
    table = json.loads((golden / "vim_small_img64" / "meta.json").read_text())["drop_path_per_block"]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in small(depth=24, drop_path_rate=0.1).blocks]
    # block i of theirs drops what block i - 1 gives, and the model what the last one gives
    assert rates == pytest.approx([*table[1:], 0.1], abs=1e-8)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_the_residual_stays_in_float32(how: str) -> None:
    torch.manual_seed(0)
    model = small(depth=4)
    x, kept = images(model), []
    expected = model(x)
    model = model.bfloat16() if how == "bfloat16" else model
    model.blocks[-1].register_forward_pre_hook(lambda _, args: kept.append(args[0].dtype))
    model.blocks[-1].mixer.register_forward_hook(lambda _, args, out: kept.extend([args[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits = model(x.bfloat16() if how == "bfloat16" else x)
        for features in model.forward_intermediates(x.to(model.pos_embed.dtype), norm=True, intermediates_only=True):
            assert features.isfinite().all()
    assert (kept[0], kept[-1], logits.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert close(logits.detach(), expected.detach(), 0.05)
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("norm_layer", [None, "layernorm", "rmsnorm"])
def test_models_of_16_bits_run_on_every_road(norm_layer: str | None) -> None:
    model = small(norm_layer=norm_layer)
    expected = model(x := images(model)).detach()
    model, x = model.bfloat16(), x.bfloat16()
    extractor = create_feature_extractor(model, ["head"])
    for run in (model, torch.jit.script(model), torch.fx.symbolic_trace(model), lambda x: extractor(x)["head"]):
        logits = run(x).detach()
        assert logits.dtype == torch.bfloat16 and close(logits, expected, 0.05)
    for norm in (False, True):
        final, maps = model.forward_intermediates(x, norm=norm)
        assert {each.dtype for each in (final, *maps)} == {torch.bfloat16}
    model.prune_intermediate_layers([0], prune_norm=True, prune_head=False)
    for pruned in (model, torch.jit.script(model)):
        assert pruned(x).dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["small", "base"])
def test_models_start_as_the_official_ones(size: str, golden: Path) -> None:
    table = json.loads((golden / "init" / f"vim_{size}.json").read_text())
    ours = to_official(timm.create_model(f"vim_{size}_patch16_224", depth=2))
    assert ours.keys() == table["params_depth2"].keys()
    for name, official in table["params_depth2"].items():
        value, shape = ours[name].double(), official["shape"]
        assert list(value.shape) == shape, name
        theirs = [official[key] for key in ("mean", "std", "min", "max")]
        found = [value.mean().item(), value.std().item(), value.min().item(), value.max().item()]
        expected = expected_distribution(name, shape, 2, table["constructor"]["embed_dim"])
        if isinstance(expected, Distribution):
            assert not expected.complaints(value.numel(), *theirs), f"the rule for {name} is wrong"
            assert not expected.complaints(value.numel(), *found), name
        else:
            assert found == pytest.approx(theirs, abs=1e-5), name


def test_entries_are_exactly_these() -> None:
    short = {f"vim_{size}" for size in ("tiny", "small", "base", "large", "huge")}
    assert set(timm.list_models("vim_*")) == {*TAGS, *short}
    for name, tag in TAGS.items():
        assert timm.models.get_pretrained_cfg(name).tag == tag


@pytest.mark.parametrize("name", TAGS)
def test_entries_have_the_sizes_that_their_names_say(name: str) -> None:
    model = timm.create_model(name, device="meta")
    size, stride = int(name.rpartition("_")[2]), 8 if "stride8" in name else None
    patch = int(name.split("_patch")[1].partition("_")[0])
    side = (size - patch) // (stride or patch) + 1
    assert model.patch_embed.grid_size == (side, side) and model.order.shape == (2, side * side + 1)
    assert (model.global_pool, model.blocks[0].mlp) == ("token", None)
    assert model.blocks[0].mixer.out_proj.in_features == 2 * model.embed_dim
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS.get(name, millions), abs=0.5 if millions > 300 else 1e-9)
    variant = find_variant(to_official(timm.create_model(name)) if size < 100 else model.state_dict())
    assert (variant.architecture, variant.model_args) == (name, {})


@pytest.mark.parametrize("name", TAGS)
def test_forward_backward_features_and_heads(name: str) -> None:
    model = small(name, img_size=32, patch_size=8, patch_stride=4 if "stride8" in name else None)
    x = images(model)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    tokens = model.forward_features(x)
    middle = (tokens.shape[1] - 1) // 2
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, middle])
    model.reset_classifier(0, "avg")
    others = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    assert model(x).shape == (2, 48) and close(model(x).detach(), others.mean(1).detach(), 0.2)
    model.set_input_size(48)
    assert model(images(model)).isfinite().all()
    extractor = timm.create_model("vim_pico_patch2_8", features_only=True, out_indices=(0, 3))
    assert [tuple(y.shape) for y in extractor(torch.randn(1, 1, 8, 8))] == [(1, 64, 4, 4)] * 2


def test_scripted_traced_and_compiled_models_agree() -> None:
    model = small()
    x = images(model)
    expected = model(x).detach()
    exported = torch.export.export(model, (x,)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    symbolic = torch.fx.symbolic_trace(model)
    for run in (torch.jit.script(model), torch.jit.trace(model, x), symbolic, compiled, exported):
        assert close(run(x).detach(), expected)


def test_grad_checkpointing_changes_nothing_but_memory() -> None:
    model = small(depth=3).train()
    x, calls = images(model), []
    expected = gradients(model, x)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    model.set_grad_checkpointing()
    actual = gradients(model, x)
    assert len(calls) == 2 * 3 and all(close(actual[name], value) for name, value in expected.items())


def test_layer_decay_has_a_group_for_every_block() -> None:
    model = small(depth=3)
    groups = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    assert sorted({group["lr_scale"] for group in groups}) == [0.5 ** (4 - layer) for layer in range(5)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    free = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.2.mixer.D", "blocks.0.norm1.weight"} <= free
    assert not free & {"blocks.0.mixer.A_log", "blocks.0.mixer.conv_weight", "head.weight"}


def test_checkpoints_of_the_authors_load_and_convert(tmp_path: Path) -> None:
    model = timm.create_model("vim_pico_patch2_8").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = {"model": to_official(model), "optimizer": {"state": {}, "param_groups": []}, "epoch": 7}
    torch.save(theirs, tmp_path / "vim.pth")
    x = torch.randn(2, 1, 8, 8)
    said, _ = convert(tmp_path / "vim.pth", tmp_path / "out")
    assert said.startswith("vim_pico_patch2_8 (backbone")
    for source in (tmp_path / "vim.pth", tmp_path / "out"):
        assert torch.equal(from_pretrained(source).eval()(x), model(x))
    other = timm.create_model(
        "vim_pico_patch2_8", pretrained=True, img_size=12, num_classes=3,
        pretrained_cfg_overlay={"file": str(tmp_path / "vim.pth")},
    )  # fmt: skip
    assert other.pos_embed.shape[1] == 37 and other.head.weight.shape == (3, 64)
    blocks = other.blocks.state_dict()
    assert all(torch.equal(blocks[name], value) for name, value in model.blocks.state_dict().items())
