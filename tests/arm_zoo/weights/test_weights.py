"""Checkpoints: the authors' give the authors' numbers, ours load into any model of the family, others are refused."""

import argparse
import copy
import importlib.util
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_patch_embed
from timm.models import save_for_hf
from torch import nn
from torch.nn import functional as F

from arm_zoo import CheckpointError, create_pretraining_model, from_official, from_pretrained, to_official
from arm_zoo.files import save_model
from arm_zoo.pretraining.decoder import sincos_pos_embed
from arm_zoo.weights.adapt import resample_pos_embed
from tests.helpers.golden import (
    PRECISIONS,
    Run,
    StateDict,
    add_other_blocks,
    assert_near,
    golden_cases,
    in_both_sets,
    trained_gradients,
)
from tests.helpers.official import RunsCode

BASE, PICO = "arm_base_patch16_224", "arm_pico_patch2_8"
FINETUNED = ("arm_ft_img64_gp", "arm_ft_224_gp")
PRETRAINED = ("arm_pretrain_d12", "arm_pretrain_train_steps")
SIZES = ("num_classes", "embed_dim", "depth", "img_size", "patch_size")
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "img_size": 64, "num_classes": 5}
PRETRAIN: dict[str, Any] = {"embed_dim": 32, "depth": 2, "img_size": 128, "decoder_dim": 64}


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal names, shapes, types and values."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def meta(golden: Path, case: str) -> dict[str, Any]:
    """The arguments that the authors' class got."""
    return json.loads((golden / case / "meta.json").read_text())["constructor"]


def finetuned(golden: Path, case: str, file: Path | None = None, **kwargs: Any) -> nn.Module:
    """The authors' finetuning checkpoint, loaded as timm's users would."""
    arguments = meta(golden, case)
    options = {name: arguments[name] for name in SIZES}
    options["global_pool"] = "avg" if arguments["global_pool"] else "token"
    overlay = {
        "file": str(file or golden / case / "state_dict.safetensors"),
        "num_classes": arguments["num_classes"],
    }
    return timm.create_model(BASE, pretrained=True, pretrained_cfg_overlay=overlay, **{**options, **kwargs}).eval()


def pretraining(golden: Path, case: str, **kwargs: Any) -> nn.Module:
    """An untrained pretraining model with the sizes of the golden case."""
    arguments = meta(golden, case)
    options = {name: arguments[name] for name in ("embed_dim", "depth", "img_size")}
    return create_pretraining_model("arm_base", decoder_dim=arguments["dec_embed_dim"], **{**options, **kwargs})


def surgery_result(golden: Path) -> StateDict:
    """The four-scan state dict that the authors' finetuning script makes of arm_pretrain_d12."""
    folder = golden / "arm_surgery_d12"
    return load_file(folder / "mapped.safetensors") | load_file(folder / "missing_init.safetensors")


# the authors' numbers


@pytest.fixture(scope="module", params=FINETUNED)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=PRECISIONS)
def run(request: pytest.FixtureRequest, golden: Path, case: str) -> Run:
    """Everything that a golden case of finetuning stores, by our model."""
    device, dtype = request.param
    model = finetuned(golden, case)
    add_other_blocks(model, golden / case)
    model.to(device, dtype)
    inputs = load_file(golden / case / "inputs.safetensors", device=device)
    images = inputs["images"].to(dtype).requires_grad_()
    outputs: StateDict = {}

    def keep(name: str) -> Any:
        return lambda _, inputs, output=None: outputs.update({name: inputs[0] if output is None else output})

    hooks = [model.blocks[0].register_forward_pre_hook(keep("hidden_00"))]
    for name, block in model.blocks.named_children():
        hooks.append(block.register_forward_hook(keep(f"hidden_{int(name) + 1:02}")))
    outputs["normed"] = model.forward_features(images)
    for hook in hooks:
        hook.remove()
    outputs["features"] = model.forward_head(outputs["normed"], pre_logits=True)
    outputs["logits"] = model.forward_head(outputs["normed"])
    (outputs["logits"] * inputs["cotangent"]).sum().backward()
    assert images.grad is not None
    outputs["grad_input"] = images.grad
    gradients = trained_gradients(model.cpu())
    model.to(device)
    model.reset_classifier(model.num_classes, "token")  # a new head, which is then the old one again
    model.load_state_dict(finetuned(golden, case).state_dict())
    with torch.no_grad():
        outputs["features_cls"] = model.forward_head(outputs["normed"], pre_logits=True)
        outputs["logits_cls"] = model(images)
    return Run(golden / case, dtype, {key: value.detach().cpu() for key, value in outputs.items()}, gradients)


@golden_cases(["arm_ft_img64_gp"], FINETUNED)
def test_outputs_are_the_authors(run: Run) -> None:
    """Logits, features, every hidden state and the image's gradient."""
    compared = set()
    for file in ("outputs_f64", "outputs_f64_rounded_to_f32"):
        path = run.folder / f"{file}.safetensors"
        for name, expected in (load_file(path) if path.exists() else {}).items():
            tolerance = run.tolerance(expected.dtype == torch.float64, gradient=name == "grad_input")
            assert_near(run.outputs[name], expected, tolerance, name)
            compared.add(name)
    assert compared >= {"logits", "features", "normed", "hidden_00", "hidden_01", "hidden_03", "hidden_12"}
    if (run.folder / "grad_norms.json").exists():  # the whole set
        assert compared >= {"grad_input"} | {f"hidden_{i:02}" for i in range(13)}
        assert "img64" not in run.folder.name or compared == run.outputs.keys()


def test_gradients_are_the_authors(run: Run) -> None:
    """The norm of every parameter's gradient, and whole gradients where they are stored."""
    norms = json.loads((run.folder / "grad_norms.json").read_text())
    assert norms.keys() == run.gradients.keys()
    for name, norm in norms.items():
        tolerance = run.tolerance(exact=True, gradient=True)
        assert run.gradients[name].norm().item() == pytest.approx(norm, rel=tolerance), name
    path = run.folder / "param_grads.safetensors"
    assert path.exists() == ("img64" in run.folder.name)
    for name, expected in (load_file(path) if path.exists() else {}).items():
        assert_near(run.gradients[name], expected, run.tolerance(exact=False, gradient=True), name)


@in_both_sets
def test_class_token_pooling_of_create_model(golden: Path) -> None:
    folder = golden / "arm_ft_img64_gp"
    model = finetuned(golden, "arm_ft_img64_gp", global_pool="token")
    add_other_blocks(model, folder)
    model.double()
    expected = load_file(folder / "outputs_f64.safetensors")["logits_cls"]
    assert_near(model(load_file(folder / "inputs.safetensors")["images"].double()), expected, 1e-10, "logits_cls")


@pytest.mark.parametrize("key", ["model", "model_ema", "plain"])
@in_both_sets
def test_official_pickles(key: str, golden: Path, tmp_path: Path) -> None:
    """Training checkpoints carry their arguments along, and the averaged weights beside the plain ones."""
    state_dict = load_file(golden / "arm_ft_img64_gp" / "state_dict.safetensors")
    checkpoint: dict[str, Any] = {key: state_dict, "args": argparse.Namespace(lr=1e-3), "epoch": 99}
    if key == "model_ema":
        checkpoint["model"] = {name: torch.zeros_like(value) for name, value in state_dict.items()}
    torch.save(state_dict if key == "plain" else checkpoint, tmp_path / "checkpoint.pth")
    expected = finetuned(golden, "arm_ft_img64_gp").state_dict()
    assert_same(finetuned(golden, "arm_ft_img64_gp", tmp_path / "checkpoint.pth").state_dict(), expected)
    if key != "plain":
        model = finetuned(golden, "arm_ft_img64_gp")
        assert_same(from_official(checkpoint, model), expected)


# the map to the official names and back


@golden_cases(["arm_ft_img64_gp", "arm_surgery_d12"], [*FINETUNED, "arm_surgery_d12"])
def test_round_trip_of_backbones_is_the_identity(case: str, golden: Path) -> None:
    official = surgery_result(golden) if "surgery" in case else load_file(golden / case / "state_dict.safetensors")
    before = dict(official)
    arguments = meta(golden, case)
    sizes = {name: arguments[name] for name in SIZES}
    model = timm.create_model(BASE, **sizes)
    ours = from_official(official, model)
    assert_same(official, before)
    model.load_state_dict(ours, strict=True)
    wrapped = {f"module.{name}": value for name, value in official.items()}  # by timm's scripts, as DDP names them
    assert_same(from_official({"state_dict": {}, "state_dict_ema": wrapped}, model), ours)
    assert_same(to_official(model), official)
    assert_same(from_official(to_official(model), timm.create_model(BASE, **sizes)), model.state_dict())


@golden_cases(["arm_pretrain_train_steps"], PRETRAINED)
def test_round_trip_of_pretraining_models_is_the_identity(case: str, golden: Path) -> None:
    official = load_file(golden / case / "state_dict.safetensors")
    model = pretraining(golden, case)
    model.load_state_dict(from_official({"model": official}, model), strict=True)
    assert "mask" in official
    assert_same(to_official(model), official)
    assert_same(from_official(to_official(model), pretraining(golden, case)), model.state_dict())


def test_official_state_dicts_are_copies_that_can_be_saved(tmp_path: Path) -> None:
    model = timm.create_model(BASE, **SMALL)
    before, official = copy.deepcopy(model.state_dict()), to_official(model)
    save_file(official, tmp_path / "official.safetensors")
    assert_same(from_official(load_file(tmp_path / "official.safetensors"), model), before)
    for value in official.values():
        value.zero_()
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
@pytest.mark.parametrize("phase", ["finetune", "pretrain"])
def test_official_names_shapes_and_counts(phase: str, size: str, golden: Path) -> None:
    facts = json.loads((golden / "init" / f"{phase}_arm_{size}_pz16.json").read_text())

    def create(**kwargs: Any) -> nn.Module:
        if phase == "finetune":
            return timm.create_model(f"arm_{size}", device="meta", **kwargs)
        return create_pretraining_model(f"arm_{size}", device="meta", **kwargs)

    assert sum(parameter.numel() for parameter in create().parameters()) == facts["n_params"]
    whole = "params" in facts
    official = to_official(create() if whole else create(depth=1))
    shapes = {name: tuple(value.shape) for name, value in official.items()}
    if phase == "pretrain":
        assert shapes.pop("mask") == (128, 128)
    if not whole:
        assert shapes == {name: tuple(shape) for name, shape in facts["shapes_depth1"].items()}
        return
    assert shapes == {name: tuple(fact["shape"]) for name, fact in facts["params"].items()}
    frozen = {name for name, fact in facts["params"].items() if not fact["requires_grad"]}
    assert frozen == ({"pos_embed", "dec_pos_embed"} if phase == "pretrain" else set())
    assert {name for name, parameter in create().named_parameters() if not parameter.requires_grad} == {
        name.replace("dec_", "decoder_") for name in frozen
    }


# from the pretraining checkpoint to the backbone


@in_both_sets
def test_surgery_is_the_authors(golden: Path) -> None:
    """Every tensor of the resulting model; what pretraining does not have keeps the model's values."""
    folder = golden / "arm_surgery_d12"
    arguments = meta(golden, "arm_surgery_d12")
    sizes = {name: arguments[name] for name in SIZES}
    model = timm.create_model(BASE, **sizes)
    model.load_state_dict(from_official(surgery_result(golden), model))
    fresh = load_file(folder / "missing_init.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("cls_token", "norm.", "head.")):
                parameter.fill_(torch.nan)
    checkpoint = load_file(golden / "arm_pretrain_d12" / "state_dict.safetensors")
    model.load_state_dict(from_official(checkpoint, model), strict=True)
    result, expected = to_official(model), surgery_result(golden)
    assert_near(result["pos_embed"], expected["pos_embed"], 1.2e-6, "pos_embed")  # float32 rounds by version
    assert_same({**result, "pos_embed": expected["pos_embed"]}, expected)
    assert fresh.keys() <= expected.keys()


def test_surgery_gives_the_authors_logits(golden: Path) -> None:
    """Through create_model, from the pretraining checkpoint; only the authors' random draws are put in by hand."""
    folder = golden / "arm_surgery_d12"
    model = finetuned(golden, "arm_surgery_d12", golden / "arm_pretrain_d12" / "state_dict.safetensors").double()
    fresh = load_file(folder / "missing_init.safetensors")
    names = {"norm_f.weight": "norm.weight", "norm_f.bias": "norm.bias"}
    result = model.load_state_dict({names.get(key, key): value for key, value in fresh.items()}, strict=False)
    assert not result.unexpected_keys
    images = load_file(folder / "inputs.safetensors")["images"].double()
    expected = load_file(folder / "outputs_f64.safetensors")
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        # 1e-10 would hold if the position embeddings were not resampled in float32, whose last bit builds decide
        assert_near(features, expected["features"], 1e-6, "features")
        assert_near(model(images), expected["logits"], 1e-6, "logits")
        model.load_state_dict(from_official(surgery_result(golden), model))
        assert_near(model(images), expected["logits"], 1e-10, "logits of the authors' result")


@pytest.mark.parametrize("size, stride", [(64, 16), (192, 16), (224, 16), (256, 16), (384, 16), (448, 8)])
def test_position_embeddings_are_resampled_as_the_authors_do(size: int, stride: int, golden: Path) -> None:
    file = golden / "arm_pretrain_d12" / "state_dict.safetensors"
    model = finetuned(golden, "arm_surgery_d12", file, img_size=size, patch_stride=stride)
    name = f"pos_embed_img{size}" + ("_stride8" if stride == 8 else "")
    expected = load_file(golden / "arm_surgery_d12" / "pos_embed_interp.safetensors")[name]
    assert_near(model.pos_embed, expected, 1.2e-6, name)  # torch 2.8 and 2.14 round differently
    middle = (expected.shape[1] - 1) // 2
    assert not model.pos_embed[:, middle].any()  # the class token's row


@pytest.mark.parametrize("old, new", [((4, 4), (7, 7)), ((5, 5), (4, 6)), ((3, 8), (8, 3)), ((14, 14), (24, 24))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_position_embeddings_are_resampled_to_the_last_bit(
    old: tuple[int, int], new: tuple[int, int], dtype: torch.dtype
) -> None:
    """By timm's function, to which the class token is moved first, as by PyTorch's alone."""
    table = torch.randn(1, old[0] * old[1] + 1, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = resample_pos_embed(table, old, new)
    expected = resized(without_middle(table).float().view(1, *old, 24), new).to(dtype)
    assert torch.equal(without_middle(result), expected) and result.dtype == dtype
    assert torch.equal(result[:, new[0] * new[1] // 2], table[:, old[0] * old[1] // 2])


@pytest.mark.parametrize("img_size", [128, 64, 96, (64, 160)], ids=str)
def test_our_pretraining_export_starts_a_backbone(img_size: int | tuple[int, int], tmp_path: Path) -> None:
    """Every direction is a copy of the pretrained one, at any image size; the decoder is left behind."""
    pretrained = create_pretraining_model("arm_base", **PRETRAIN)
    with torch.no_grad():
        pretrained.pos_embed.normal_()
    pretrained.save_pretrained(tmp_path)
    backbone = from_file(tmp_path / "model.safetensors", img_size=img_size)
    source, state_dict = pretrained.state_dict(), backbone.state_dict()
    shared = {name for name in state_dict if name.startswith(("blocks.", "patch_embed."))}
    assert shared <= source.keys()
    for name in shared:
        value = source[name]
        directions = 4 if value.shape[:1] == (1,) else 1
        assert torch.equal(state_dict[name], value.repeat(directions, *[1] * (value.ndim - 1))), name
    stacked = {name.rsplit(".", 1)[-1] for name in shared if state_dict[name].shape != source[name].shape}
    assert stacked == {"conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"}
    grid = backbone.patch_embed.grid_size
    patches = source["pos_embed"].view(1, 8, 8, 32)
    assert_near(without_middle(backbone.pos_embed), resized(patches, grid), 1e-6, "pos_embed")
    assert not backbone.pos_embed[:, grid[0] * grid[1] // 2].any()
    assert backbone.eval()(torch.rand(1, 3, *backbone.patch_embed.img_size)).isfinite().all()


def test_pretraining_checkpoint_of_another_image_size(golden: Path) -> None:
    """The tables are computed, so a pretraining model keeps its own; the rest loads strictly."""
    model = pretraining(golden, "arm_pretrain_d12", img_size=(128, 256))
    official = load_file(golden / "arm_pretrain_d12" / "state_dict.safetensors")
    model.load_state_dict(from_official(official, model), strict=True)
    assert torch.equal(model.pos_embed, sincos_pos_embed(48, 8, 16))
    assert torch.equal(model.decoder_pos_embed, sincos_pos_embed(64, 8, 16))
    assert torch.equal(model.query_token, official["ar_token"])


# our own files


def from_file(file: Path, overlay: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """A small model with the weights of a file; `overlay` says more about it."""
    overlay = {"file": str(file), **(overlay or {})}
    return timm.create_model(BASE, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs})


def without_middle(pos_embed: torch.Tensor) -> torch.Tensor:
    """The patches' rows; the class token's is the one that N // 2 of the N patches come before."""
    middle = (pos_embed.shape[1] - 1) // 2
    return torch.cat([pos_embed[:, :middle], pos_embed[:, middle + 1 :]], dim=1)


def resized(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(1, rows, columns, dim) position embeddings at another grid, as (1, tokens, dim)."""
    image = F.interpolate(patches.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A small backbone on a 4x4 grid and the file that its weights are in."""
    model = timm.create_model(BASE, **SMALL)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return model, tmp_path / "weights.safetensors"


def assert_same_but(model: nn.Module, source: nn.Module, *different: str) -> None:
    """All tensors equal, except those whose names start with one of `different`."""
    ours, theirs = (
        {name: value for name, value in each.state_dict().items() if not name.startswith(different)}
        for each in (model, source)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("img_size", [64, 96, 48, (48, 80), (16, 128)], ids=str)
@pytest.mark.parametrize("source_size", [64, 80])
def test_our_weights_load_at_other_sizes(source_size: int, img_size: int | tuple[int, int], tmp_path: Path) -> None:
    """From an even and from an odd number of patches, where the middle is not the same."""
    source = timm.create_model(BASE, **{**SMALL, "img_size": source_size})
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    model = from_file(tmp_path / "weights.safetensors", img_size=img_size)
    assert_same_but(model, source, "pos_embed")
    side, grid = source_size // 16, model.patch_embed.grid_size
    expected = resized(without_middle(source.pos_embed).view(1, side, side, 32), grid)
    assert_near(without_middle(model.pos_embed), expected, 1e-6, "pos_embed")
    assert torch.equal(model.pos_embed[:, grid[0] * grid[1] // 2], source.pos_embed[:, side * side // 2])


def test_grids_that_are_not_square(tmp_path: Path) -> None:
    """The source's shape comes from the overlay, from timm's config.json, or is the model's own."""
    source = timm.create_model(BASE, **{**SMALL, "img_size": (64, 96)})
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    file = tmp_path / "model.safetensors"
    assert torch.equal(from_file(file, img_size=(64, 96)).pos_embed, source.pos_embed)
    expected = resized(without_middle(source.pos_embed).view(1, 4, 6, 32), (6, 4))
    told = from_file(file, overlay={"input_size": (3, 64, 96)}, img_size=(96, 64))
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(96, 64))
    for model in (told, read):
        assert_near(without_middle(model.pos_embed), expected, 1e-6, "pos_embed")
    assert_same_but(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), source)


@pytest.mark.parametrize("size", [(64, 256), (112, 448)])  # 4x16 = 8x8 patches and 7x28 = 14x14, the entry's default
def test_a_grid_with_as_many_patches_as_a_square_stays_itself(size: tuple[int, int], tmp_path: Path) -> None:
    source = timm.create_model(BASE, **{**SMALL, "img_size": size})
    assert_same(from_official(to_official(source), source), source.state_dict())
    file = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), file)
    told = from_file(file, overlay={"input_size": (3, *size)}, img_size=size)
    assert torch.equal(told.pos_embed, source.pos_embed)
    if size == (64, 256):
        assert torch.equal(from_file(file, img_size=size).pos_embed, source.pos_embed)
    else:
        with pytest.raises(CheckpointError, match="the model's 7x28, or 14x14 as its configuration says"):
            from_file(file, img_size=size)


@pytest.mark.parametrize("size", [(64, 256), (256, 64), (128, 192), (16, 64)])
def test_the_grid_of_a_pretraining_model_is_read_from_its_position_table(
    size: tuple[int, int], tmp_path: Path
) -> None:
    sizes = {"embed_dim": SMALL["embed_dim"], "depth": SMALL["depth"], "decoder_dim": 64}
    model = create_pretraining_model("arm_tiny", img_size=size, cluster_size=16, **sizes)
    model.save_pretrained(tmp_path)
    same = from_file(tmp_path / "model.safetensors", img_size=size)
    assert torch.equal(without_middle(same.pos_embed), model.pos_embed)
    other = from_file(tmp_path / "model.safetensors", img_size=224)
    grid = (size[0] // 16, size[1] // 16)
    expected = resized(model.pos_embed.view(1, *grid, -1), (14, 14))
    assert_near(without_middle(other.pos_embed), expected, 1e-6, "pos_embed")


def test_not_square_and_nobody_says_how(tmp_path: Path) -> None:
    source = timm.create_model(BASE, **{**SMALL, "img_size": (64, 96)})
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    message = "position embeddings for 24 patches, which is neither a square grid nor the model's 6x5; say the source"
    with pytest.raises(CheckpointError, match=message):
        from_file(tmp_path / "weights.safetensors", img_size=(96, 80))


def test_one_channel_from_three_and_three_from_one(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    source, file = saved
    grey = from_file(file, in_chans=1)
    assert_same_but(grey, source, "patch_embed.proj.weight")
    assert_near(grey.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True), 1e-6, "patch_embed")
    save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    colour = from_file(tmp_path / "grey.safetensors", overlay={"input_size": (1, 64, 64)})
    assert_same_but(colour, source, "patch_embed.proj.weight")
    assert_near(colour.patch_embed.proj.weight.sum(1, keepdim=True), grey.patch_embed.proj.weight, 1e-6, "patch_embed")


def test_other_patch_size(saved: tuple[nn.Module, Path]) -> None:
    """The kernel is resampled; where the grid stays, position embeddings do too."""
    source, file = saved
    model = from_file(file, patch_size=8, img_size=32)
    assert_same_but(model, source, "patch_embed.proj.weight")
    assert torch.equal(model.patch_embed.proj.weight, resample_patch_embed(source.patch_embed.proj.weight, [8, 8]))
    assert model(torch.rand(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("num_classes", [3, 1000, 0])
@pytest.mark.parametrize("said", [None, 5, 3, 1000])
def test_heads_for_other_classes_start_anew(num_classes: int, said: int | None, saved: tuple[nn.Module, Path]) -> None:
    """The file, not the pretrained cfg, tells for how many classes its head is: 5, whatever is `said`."""
    source, file = saved
    model = from_file(file, {"num_classes": said} if said else None, num_classes=num_classes)
    assert_same_but(model, source, "head.")
    if num_classes:
        assert model.head.weight.shape == (num_classes, 32)
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert not model.head.bias.any()
    else:
        assert isinstance(model.head, nn.Identity)


@pytest.mark.parametrize("said", [None, 5, 3])
def test_heads_for_the_same_classes_are_kept(said: int | None, saved: tuple[nn.Module, Path]) -> None:
    source, file = saved
    assert_same_but(from_file(file, {"num_classes": said} if said else None), source)


@pytest.mark.parametrize("num_classes", [5, 1000, 0])
def test_encoders_load_without_a_head(num_classes: int, saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    source, _ = saved
    source.reset_classifier(0)
    save_file(source.state_dict(), tmp_path / "encoder.safetensors")
    model = from_file(tmp_path / "encoder.safetensors", num_classes=num_classes)
    assert_same_but(model, source, "head.")
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, num_classes or 32)
    features = from_file(
        tmp_path / "encoder.safetensors", num_classes=num_classes, features_only=True, out_indices=[1]
    )
    assert features(torch.rand(1, 3, 64, 64))[0].shape == (1, 32, 4, 4)


# bad input


def refused(file: Path, **kwargs: Any) -> str:
    """What a person reads when a file does not load."""
    with pytest.raises(CheckpointError) as error:
        from_file(file, **kwargs)
    return str(error.value)


def test_another_width(saved: tuple[nn.Module, Path]) -> None:
    message = refused(saved[1], embed_dim=64)
    assert message.startswith("the checkpoint does not fit the model (another width, depth or family?)")
    assert "only in the model (0): none\n" in message
    assert "other shapes, checkpoint -> model (" in message
    assert "cls_token (1, 1, 32) -> (1, 1, 64), pos_embed (1, 17, 32) -> (1, 17, 64), patch_embed" in message


def test_another_depth(saved: tuple[nn.Module, Path]) -> None:
    deeper, shallower = refused(saved[1], depth=3), refused(saved[1], depth=1)
    assert "only in the model (17): blocks.2.norm1.weight, blocks.2.norm1.bias, blocks.2.mixer" in deeper
    assert "only in the checkpoint (0): none" in deeper
    assert "only in the checkpoint (17): blocks.1." in shallower
    assert "only in the model (0): none" in shallower


def test_another_family(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    message = refused(tmp_path / "vit.safetensors", embed_dim=192)
    ours, theirs, shapes = message.splitlines()[1:]
    assert "only in the model" in ours and "blocks.0.mixer.conv_weight" in ours
    assert "only in the checkpoint" in theirs and "blocks.0.attn.qkv.weight" in theirs
    assert "blocks.0.mlp.fc1.weight (768, 192) -> (1024, 192)" in shapes
    with pytest.raises(CheckpointError, match=r"no key starts with 'layers\.', found cls_token, pos_embed"):
        from_official(vit.state_dict(), timm.create_model(BASE, **SMALL))


@in_both_sets
def test_from_official_names_both_sides(golden: Path) -> None:
    """Also for its own models, and for a pretraining model that is offered a finetuned one."""
    official = load_file(golden / "arm_ft_img64_gp" / "state_dict.safetensors")
    sizes = {name: meta(golden, "arm_ft_img64_gp")[name] for name in ("embed_dim", "depth")}
    with pytest.raises(CheckpointError) as error:
        from_official(official, create_pretraining_model("arm_base", **{**PRETRAIN, **sizes}))
    ours, theirs, shapes = str(error.value).splitlines()[1:]
    assert "only in the model" in ours and "query_token" in ours
    assert "only in the checkpoint (5): " in theirs and "cls_token" in theirs
    assert "mixer.A_log (4, 40, 16) -> (1, 40, 16)" in shapes
    with pytest.raises(CheckpointError, match=r"head\.weight \(11, 40\) -> \(5, 40\)"):
        from_official(official, timm.create_model(BASE, **{**SMALL, **sizes}))
    model = timm.create_model(BASE, **SMALL)
    with pytest.raises(CheckpointError, match=r"pretrained_cfg_overlay=dict\(file="):
        from_official(model.state_dict(), model)


def test_head_of_another_width(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """timm replaces a head for other classes; one that no class count explains is another model's."""
    state_dict = saved[0].state_dict()
    state_dict["head.weight"] = torch.zeros(5, 48)
    save_file(state_dict, tmp_path / "head.safetensors")
    assert "other shapes, checkpoint -> model (1): head.weight (5, 48) -> (5, 32)" in refused(
        tmp_path / "head.safetensors"
    )


def test_heads_of_more_than_one_layer(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """A linear probe's with batch norm is refused, however it is loaded; the encoder below it can be had."""
    source, _ = saved
    file = tmp_path / "probe.pth"
    probe = copy.deepcopy(source)
    probe.head = nn.Sequential(nn.BatchNorm1d(32, affine=False), source.head)
    torch.save({"model": probe.state_dict()}, file)
    for message in (refused(file), refused(file, num_classes=3)):
        assert message.startswith("the checkpoint's head is not one linear layer but holds head.0.running_mean")
        assert "head.1.weight" in message and "num_classes=0" in message and "\n" not in message
    with pytest.raises(CheckpointError, match="not one linear layer"):
        from_pretrained(file)
    encoder = from_file(file, num_classes=0)
    assert_same_but(encoder, source, "head.")
    encoder.save_pretrained(tmp_path / "encoder")
    assert from_file(tmp_path / "encoder" / "model.safetensors", num_classes=3).num_classes == 3


QUANTISED = {  # what stands in a state dict in place of a weight
    "a pair": ("head._packed_params", (torch.zeros(2), None)),
    "a type": ("head._packed_params.dtype", torch.qint8),
    "sparse": ("head.weight", torch.eye(2).to_sparse()),
    "meta": ("head.weight", torch.empty(2, device="meta")),
    "subclass": ("head.weight", torch.zeros(2).as_subclass(type("Int8Tensor", (torch.Tensor,), {}))),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_cannot_be_saved_is_said_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    name, value = QUANTISED[kind]
    with pytest.raises(CheckpointError) as error:
        save_model(tmp_path / "folder", {"norm.weight": torch.ones(2), name: value}, {})
    message = str(error.value)
    assert message.startswith(f"cannot save the model: {name} is a ") and "\n" not in message
    assert "save a model before it is quantised" in message and "torch.save(model.state_dict(), FILE)" in message
    assert kind != "subclass" or "Int8Tensor" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models_are_not_saved(tmp_path: Path) -> None:
    """By PyTorch's own tool, and by torchao where that is installed; nothing is written."""
    quantised = [torch.ao.quantization.quantize_dynamic(timm.create_model(PICO), {nn.Linear})]
    if importlib.util.find_spec("torchao") is not None:
        torchao = importlib.import_module("torchao.quantization")
        quantised.append(timm.create_model(PICO))
        torchao.quantize_(quantised[-1], torchao.Int8WeightOnlyConfig())
    for model in quantised:
        with pytest.raises(CheckpointError, match="save a model before it is quantised"):
            model.save_pretrained(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pth$"):
        from_file(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*, a folder: create_model\('local-dir:"):
        from_file(tmp_path)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["half", "start", "empty", "garbage"])
def test_damaged_files(damage: str, kind: str, saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    file = tmp_path / f"damaged.{kind}"
    torch.save(saved[0].state_dict(), file)
    whole = file.read_bytes() if kind == "pth" else saved[1].read_bytes()
    contents = {"half": whole[: len(whole) // 2], "start": whole[:5], "empty": b"", "garbage": b"<!doctype html>" * 99}
    file.write_bytes(contents[damage])
    message = refused(file)
    assert message.startswith(f"cannot read the checkpoint {file}: ")
    assert message.endswith("; the file is damaged, cut short or no checkpoint: fetch it again")


def test_damaged_folder(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    save_for_hf(saved[0], str(tmp_path / "folder"), safe_serialization=True)
    file = tmp_path / "folder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(CheckpointError, match=f"cannot read the checkpoint {file}: .*damaged"):
        timm.create_model(f"local-dir:{file.parent}", pretrained=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_named_safetensors(zipped: bool, saved: tuple[nn.Module, Path]) -> None:
    source, file = saved
    torch.save(source.state_dict(), file, _use_new_zipfile_serialization=zipped)
    assert refused(file).endswith("; it is a pickle, not safetensors: rename it to .pth if you trust it")


def test_safetensors_named_pickle(saved: tuple[nn.Module, Path]) -> None:
    file = saved[1].rename(saved[1].with_suffix(".pth"))
    assert refused(file).endswith("; it looks like safetensors: rename it to .safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_pickles_is_not_run(zipped: bool, saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    trap, file = RunsCode(tmp_path / "trap"), tmp_path / "trap.pth"
    checkpoint = {"model": saved[0].state_dict(), "args": trap}
    if zipped:
        torch.save(checkpoint, file)
    else:
        file.write_bytes(pickle.dumps(checkpoint, protocol=2))
    message = refused(file)
    assert message.startswith(f"cannot read the checkpoint {file}: ")
    assert message.endswith("nothing in it was run: have its tensors saved alone")
    assert not (tmp_path / "trap").exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert (tmp_path / "trap").exists()  # it would have worked


def test_weights_that_are_not_hosted() -> None:
    with pytest.raises(CheckpointError, match=f"weights of {BASE}.in1k are not hosted yet") as error:
        timm.create_model(f"{BASE}.in1k", pretrained=True)
    for way in ("pretrained_cfg_overlay=dict(file=PATH)", "recipes.pretrain", "pretrained=False"):
        assert way in str(error.value)
    assert f"{BASE}.in1k" not in timm.list_pretrained()
