"""The pretraining model: the authors' numbers and training steps, causality, any sizes, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import to_2tuple
from timm.optim import param_groups_weight_decay
from torch import nn

from arm_zoo import ARMPretrain, create_pretraining_model, from_official, to_official
from arm_zoo.pretraining.decoder import sincos_pos_embed
from arm_zoo.pretraining.targets import patchify
from tests.helpers.golden import (
    PRECISIONS,
    Run,
    StateDict,
    assert_near,
    golden_cases,
    in_both_sets,
    trained_gradients,
    under_official_names,
)

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 6, "decoder_dim": 64, "decoder_depth": 2}
NINE_CLUSTERS: dict[str, Any] = {**SMALL, "img_size": 48, "patch_size": 8, "cluster_size": 16}
SIZES: list[dict[str, Any]] = [
    {"img_size": 48, "patch_size": 8, "cluster_size": 16},
    {"img_size": (32, 64), "patch_size": 8, "cluster_size": 16, "decoder_depth": 1},
    {"img_size": (24, 64), "patch_size": (4, 8), "cluster_size": (12, 16), "decoder_depth": 8, "in_chans": 1},
    {"img_size": 8, "patch_size": 2, "cluster_size": 4, "decoder_depth": 4, "in_chans": 1, "depth": 1},
    {"img_size": 32, "patch_size": 16, "cluster_size": 16, "depth": 2, "in_chans": 4},
    {"img_size": (16, 32), "patch_size": 4, "cluster_size": 16, "depth": 3},
    {"img_size": (48, 16), "patch_size": 16, "cluster_size": 16},
]


def small(**kwargs: Any) -> ARMPretrain:
    """A small model in float64."""
    return create_pretraining_model("arm_tiny", **{**NINE_CLUSTERS, **kwargs}).double().eval()


def images_for(model: ARMPretrain, batch: int = 2) -> torch.Tensor:
    parameter = next(model.parameters())
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=parameter.dtype)


def authors(golden: Path, case: str) -> ARMPretrain:
    """The authors' model, with the arguments and the weights of a golden case."""
    arguments = json.loads((golden / case / "meta.json").read_text())["constructor"]
    sizes = {name: arguments[name] for name in ("embed_dim", "depth", "img_size", "patch_size")}
    model = create_pretraining_model("arm_base", decoder_dim=arguments["dec_embed_dim"], **sizes)
    model.load_state_dict(from_official(load_file(golden / case / "state_dict.safetensors"), model))
    return model


# the authors' numbers


@pytest.fixture(scope="module", params=PRECISIONS)
def run(request: pytest.FixtureRequest, golden: Path) -> Run:
    folder = golden / "arm_pretrain_d12"
    device, dtype = request.param
    model = authors(golden, folder.name).eval().to(device, dtype)
    images = load_file(folder / "inputs.safetensors", device=device)["images"].to(dtype).requires_grad_()
    outputs: StateDict = {}

    def keep(name: str) -> Any:
        return lambda _, inputs, output=None: outputs.update({name: inputs[0] if output is None else output})

    for i, block in enumerate([6, 8, 10, 12]):
        model.blocks[block - 1].register_forward_hook(keep(f"skip_{i}_after_block_{block:02}"))
    model.decoder_blocks[0].register_forward_pre_hook(keep("dec_query"))
    for i, block in enumerate(model.decoder_blocks):
        block.register_forward_hook(keep(f"dec_block_{i}"))
    latent = model.encoder_to_decoder.register_forward_hook(keep("latent"))
    loss, outputs["pred"], outputs["target"] = model(images)
    latent.remove()
    loss.backward()
    assert images.grad is not None
    outputs["grad_input_target_constant"] = images.grad
    outputs["latent"] = model.forward_encoder(images)
    outputs["dec_query"] = outputs["dec_query"].expand(len(images), -1, -1)  # ours is made once for all images
    outputs["loss"] = loss.view(1)
    outputs["loss_per_token"] = (outputs["pred"] - outputs["target"]).square().mean(dim=(0, 2))
    outputs = {key: value.detach().cpu() for key, value in outputs.items()}
    return Run(folder, dtype, outputs, trained_gradients(model.cpu()))


def test_outputs_are_the_authors(run: Run, golden: Path) -> None:
    """Taps, latents, decoder query and blocks, prediction, target, loss and the image's gradient."""
    compared = set()
    for file in ("outputs_f64", "outputs_f64_rounded_to_f32"):
        for name, expected in load_file(golden / "arm_pretrain_d12" / f"{file}.safetensors").items():
            tolerance = run.tolerance(expected.dtype == torch.float64, gradient="grad" in name)
            assert_near(run.outputs[name], expected, tolerance, name)
            compared.add(name)
    assert compared == run.outputs.keys()
    assert len(compared) == 15


def test_gradients_are_the_authors(run: Run, golden: Path) -> None:
    norms = json.loads((golden / "arm_pretrain_d12" / "grad_norms.json").read_text())
    assert norms.keys() | {"mask"} == run.gradients.keys()
    assert {name for name, norm in norms.items() if norm is None} == {"pos_embed", "dec_pos_embed"}
    for name, norm in norms.items():
        gradient = run.gradients[name]
        if norm is None:
            assert gradient.isnan().all(), name
        else:
            assert gradient.norm().item() == pytest.approx(norm, rel=run.tolerance(True, gradient=True)), name


def test_order_and_mask_are_the_authors(golden: Path) -> None:
    tables = load_file(golden / "arm_pretrain_d12" / "order_and_mask.safetensors")
    model = create_pretraining_model("arm_base", **SMALL)
    assert torch.equal(model.order.view(9, 16), tables["cluster_patch_index"])
    assert torch.equal(model.order[:-16], tables["encoder_patch_index"])
    assert torch.equal(model.order[16:], tables["target_patch_index"])
    assert torch.equal(to_official(model)["mask"], tables["mask"])


@in_both_sets
def test_training_steps_are_the_authors(golden: Path) -> None:
    """AdamW with the official groups, schedule and clipping, in float64: three steps, one in the small set."""
    folder = golden / "arm_pretrain_train_steps"
    facts = json.loads((folder / "meta.json").read_text())
    schedule, images = facts["schedule_args"], load_file(folder / "inputs.safetensors")
    model = authors(golden, folder.name).double().train()
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    for step, expected in enumerate(facts["log"]):
        epoch, warmup = 0.5 + step / 3, schedule["warmup_epochs"]
        done = max(0.0, (epoch - warmup) / (schedule["epochs"] - warmup))
        rate = schedule["lr"] * min(epoch / warmup, 0.5 * (1 + math.cos(math.pi * done)))
        assert rate == pytest.approx(expected["lr"], rel=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, _, _ = model(images[f"images_{step}"].double())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), schedule["clip_grad"])
        optimizer.step()
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-10)
        assert norm.item() == pytest.approx(expected["grad_norm_before_clip"], rel=1e-9)
    if len(facts["log"]) < 3:
        return
    final = to_official(model)
    for name, expected in load_file(folder / "final_params_subset_f64.safetensors").items():
        assert_near(final[name], expected, 1e-8, name)
    norms = json.loads((folder / "final_param_norms.json").read_text())
    assert norms.keys() | {"mask"} == final.keys()
    for name, expected in norms.items():
        assert final[name].norm().item() == pytest.approx(expected, rel=1e-8), name


@golden_cases(["d12"], ["d12", "d24"])
def test_weight_decay_groups_are_the_authors(case: str, golden: Path) -> None:
    depth = int(case.removeprefix("d"))
    model = create_pretraining_model("arm_base", embed_dim=16, decoder_dim=64, depth=depth)
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    values = {
        name: torch.full_like(parameter, decays.get(id(parameter), torch.nan))
        for name, parameter in model.named_parameters()
    }
    official = under_official_names(model, values)
    del official["mask"]
    expected = json.loads((golden / "optim" / f"pretrain_wd_groups_{case}.json").read_text())
    assert official.keys() == expected.keys()
    for name, decay in expected.items():
        frozen = decay == "frozen: not in the optimiser"
        assert torch.all(official[name].isnan() if frozen else official[name] == decay), name


def test_sincos_tables_are_the_authors(golden: Path) -> None:
    tables = load_file(golden / "sincos" / "pos_embed.safetensors")
    assert len(tables) == 6
    for name, expected in tables.items():
        dim, side = (int(part[1:]) for part in name.split("_")[1:3])
        table = sincos_pos_embed(dim, side, side)[0]
        assert table.dtype == torch.float32
        table = table[::7] if "step7" in name else table
        assert_near(table, expected, 2e-6, name)  # the last bit of NumPy's float32 power is the processor's


def test_sincos_of_a_grid_that_is_not_square() -> None:
    """First half: the column, sines before cosines; second half: the row."""
    table = sincos_pos_embed(8, 2, 3)[0].view(2, 3, 8)
    for row in range(2):
        for column in range(3):
            half = [[f(x), f(x / 100), g(x), g(x / 100)] for x in (column, row) for f, g in [(math.sin, math.cos)]]
            assert table[row, column].tolist() == pytest.approx(half[0] + half[1], abs=1e-6)


def test_initialisation_is_the_authors(golden: Path) -> None:
    """Mean, spread and extremes of every parameter, against the authors' model as constructed."""
    facts = json.loads((golden / "init" / "pretrain_arm_base_pz16.json").read_text())["params"]
    official = to_official(create_pretraining_model("arm_base", depth=12))
    for name, fact in facts.items():
        value = official[name].double()
        noise = 6 * fact["std"] / math.sqrt(value.numel())
        assert value.mean().item() == pytest.approx(fact["mean"], abs=1.5 * noise + 1e-6), name
        assert value.std(correction=0).item() == pytest.approx(fact["std"], abs=noise + 1e-6), name
        if value.numel() > 5000:  # the extremes tell a uniform distribution from a normal or a truncated one
            assert value.min().item() == pytest.approx(fact["min"], rel=0.2, abs=1e-6), name
            assert value.max().item() == pytest.approx(fact["max"], rel=0.2, abs=1e-6), name


# causality


@pytest.mark.parametrize("changed", range(9))
def test_a_cluster_changes_later_predictions_only(changed: int) -> None:
    model = small()
    before = images_for(model, batch=1)
    after = before.clone()
    row, column = changed // 3 * 16, changed % 3 * 16
    after[:, :, row : row + 16, column : column + 16] += torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        predictions = [model(images)[1].view(8, 4, -1) for images in (before, after)]
    same = [torch.equal(*pair) for pair in zip(*predictions, strict=True)]  # of clusters 1 to 8
    assert all(same[:changed])
    # the prediction of cluster j + 1, the first that may see cluster j, and all after it
    assert not any(same[changed:])


def test_every_pixel_of_a_cluster_is_seen_by_the_next_prediction() -> None:
    """And by no earlier one: gradients of one cluster's prediction end at the cluster before it."""
    model = small()
    images = images_for(model, batch=1).requires_grad_()
    _, prediction, _ = model(images)
    prediction.view(8, 4, -1)[4].square().sum().backward()  # cluster 5, which sees clusters 0 to 4
    assert images.grad is not None
    seen = images.grad.abs().sum(dim=(0, 1))
    clusters = seen.unflatten(1, (3, 16)).unflatten(0, (3, 16)).transpose(1, 2).reshape(9, 256)
    assert (clusters[:5] > 0).all()
    assert not clusters[5:].any()


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = small()
    images = images_for(model, batch=3)
    with torch.no_grad():
        for whole, single in zip(model(images)[1:], model(images[1:2])[1:], strict=True):
            assert_near(whole[1:2], single, 1e-12, "the second image alone")


# taps


def test_taps() -> None:
    def taps(depth: int) -> tuple[int, ...]:
        return create_pretraining_model("arm_tiny", device="meta", depth=depth).taps

    assert taps(12) == (6, 8, 10, 12)
    assert taps(24) == (12, 16, 20, 24)
    assert taps(6) == (3, 4, 5, 6)
    assert taps(18) == (9, 12, 15, 18)
    for depth in range(1, 24):
        chosen = taps(depth)
        exact = (depth / 2, depth * 2 / 3, depth * 5 / 6, depth)
        assert all(abs(tap - place) < 0.501 for tap, place in zip(chosen, exact, strict=True)), depth
        assert chosen[0] >= 1 and chosen[3] == depth and sorted(chosen) == list(chosen)


def test_latents_are_what_the_projection_itself_gives() -> None:
    """The model takes its rows in another order, layer by layer, unless it has hooks, which see it as it is."""
    model = small(decoder_depth=3)
    images, results = images_for(model), []
    for _ in range(2):
        latent = model.forward_encoder(images)
        own = list(model.encoder_to_decoder.parameters())
        results.append([latent, *torch.autograd.grad(latent.sin().sum(), own)])
        model.encoder_to_decoder.register_forward_hook(lambda *_: None)
    assert results[0][0].stride(-2) == 1  # channels of a layer lie side by side
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("depth", [1, 2, 5, 24])
def test_the_decoder_sees_the_tapped_blocks(depth: int) -> None:
    model = small(depth=depth)
    seen: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    model.encoder_to_decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(images_for(model))
        expected = [norm(outputs[tap - 1]) for norm, tap in zip(model.skip_norms, model.taps, strict=True)]
    assert torch.equal(seen[0], torch.cat(expected, dim=-1))


# sizes, targets and the loss


def target_by_hand(image: torch.Tensor, model: ARMPretrain) -> torch.Tensor:
    """Normalised patches of all clusters but the first, pixel by pixel in loops."""
    _, height, width = image.shape
    (p, q), (rows, columns) = (to_2tuple(model.config[name]) for name in ("patch_size", "cluster_size"))
    patches = []
    for y in range(0, height, rows):
        for x in range(0, width, columns):
            for top in range(y, y + rows, p):
                for left in range(x, x + columns, q):
                    pixels = [image[:, i, j] for i in range(top, top + p) for j in range(left, left + q)]
                    patches.append(torch.cat(pixels))  # channels fastest
    stacked = torch.stack(patches[(rows // p) * (columns // q) :])
    mean = stacked.mean(dim=1, keepdim=True)
    variance = (stacked - mean).square().sum(dim=1, keepdim=True) / (stacked.shape[1] - 1)
    return (stacked - mean) / (variance + 1e-6).sqrt()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_sizes(sizes: dict[str, Any]) -> None:
    """Target and loss by hand, and every trained parameter takes part."""
    model = small(**sizes).train()
    images = images_for(model)
    loss, prediction, target = model(images)
    assert_near(target, torch.stack([target_by_hand(image, model) for image in images]), 1e-12, "target")
    assert prediction.shape == target.shape
    assert loss.shape == ()
    assert loss.item() == pytest.approx(((prediction - target) ** 2).sum().item() / target.numel(), rel=1e-12)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.any(), name


def test_default_sizes() -> None:
    model = create_pretraining_model("arm_base", **SMALL)
    loss, prediction, target = model(torch.randn(2, 3, 192, 192))
    assert prediction.shape == target.shape == (2, 128, 768)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "name, width, depth",
    [("tiny", 192, 12), ("small", 384, 12), ("base", 768, 12), ("large", 1024, 24), ("huge", 1536, 24)],
)
def test_named_sizes(name: str, width: int, depth: int) -> None:
    model = create_pretraining_model(f"arm_{name}", device="meta")
    assert (model.patch_embed.proj.out_channels, len(model.blocks)) == (width, depth)
    assert (model.decoder_pred.in_features, len(model.decoder_blocks)) == (512, 4)
    assert model.config["img_size"] == 192 and model.config["patch_size"] == 16 and model.config["cluster_size"] == 64


def test_loss_under_autocast_is_finite_and_in_float32() -> None:
    model = create_pretraining_model("arm_tiny", **NINE_CLUSTERS)
    images = images_for(model)
    exact, _, _ = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction, target = model(images)
    assert prediction.dtype == torch.bfloat16
    assert loss.dtype == target.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_loss_of_bfloat16_parameters() -> None:
    model = create_pretraining_model("arm_tiny", **NINE_CLUSTERS, dtype=torch.bfloat16)
    loss, _, target = model(images_for(model))
    assert loss.dtype == target.dtype == torch.float32
    assert loss.isfinite()


def test_flat_patches_do_not_break_the_loss() -> None:
    """A patch of one colour has no spread to be normalised by."""
    loss, _, target = small()(torch.full((1, 3, 48, 48), 0.7, dtype=torch.float64))
    assert loss.isfinite()
    assert target.abs().max() < 1e-6


def test_gradient_checkpointing_changes_nothing() -> None:
    model = small().train()
    images = images_for(model)
    gradients = []
    calls: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 3  # the second backward pass ran the block again
    for name, gradient in gradients[0].items():
        assert_near(gradients[1][name], gradient, 1e-12, name)


def test_meta_device() -> None:
    """Built without memory, then filled from a checkpoint; order and mask are in no checkpoint."""
    source = create_pretraining_model("arm_tiny", **NINE_CLUSTERS)
    model = create_pretraining_model("arm_tiny", **NINE_CLUSTERS, device="meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    model.init_non_persistent_buffers()
    images = images_for(model)
    for ours, theirs in zip(model(images), source(images), strict=True):
        assert torch.equal(ours, theirs)


# images


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reconstruction_of_a_perfect_prediction_is_the_image(
    sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(**sizes)
    images = images_for(model) * 3 + 1
    _, _, target = model(images)
    monkeypatch.setattr(model, "forward_decoder", lambda latent: target)
    before = images.clone()
    assert_near(model.reconstruct(images), images, 1e-12, "reconstruction")
    assert torch.equal(images, before)


def test_reconstruction_shows_the_prediction() -> None:
    """The first cluster is the image's own; in every other patch mean and spread are right, and details predicted."""
    model = small()
    images = images_for(model)
    reconstructed = model.reconstruct(images)
    assert not reconstructed.requires_grad
    assert torch.equal(reconstructed[:, :, :16, :16], images[:, :, :16, :16])
    _, prediction, _ = model(images)
    order = model.order[model.cluster_tokens :]
    patches, predicted = (patchify(x, model.patch_size)[:, order] for x in (images, reconstructed))
    expected = prediction * (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt() + patches.mean(dim=-1, keepdim=True)
    assert_near(predicted, expected, 1e-12, "predicted patches")
    assert not torch.isclose(predicted, patches).all(dim=-1).any()


# files


def test_save_pretrained(tmp_path: Path) -> None:
    """What is written rebuilds the model; nothing else is left in the folder."""
    model = create_pretraining_model("arm_tiny", **{**NINE_CLUSTERS, "img_size": (32, 48)})
    folder = tmp_path / "new" / "folder"
    model.save_pretrained(folder)
    model.save_pretrained(str(folder))  # over the first ones
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "objective": "autoregressive",
        "pretraining_model": {
            **{"img_size": [32, 48], "patch_size": 8, "cluster_size": 16, "in_chans": 3, "embed_dim": 24, "depth": 6},
            **{"d_state": 16, "decoder_dim": 64, "decoder_depth": 2, "vocab_size": None},
            **{"prediction_order": "row", "target": "normed_pixel", "backbone": "arm"},
        },
    }
    again = ARMPretrain(**config["pretraining_model"])
    again.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    images = images_for(model)
    for ours, theirs in zip(model(images), again(images), strict=True):
        assert torch.equal(ours, theirs)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_pretraining_model("arm_tiny", **NINE_CLUSTERS)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def disk_full(tensors: StateDict, file: str, **kwargs: Any) -> None:
        Path(file).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("arm_zoo.files.save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_backbone_starts_from_the_file(tmp_path: Path) -> None:
    """Through create_model, at another image size; tests/arm_zoo/weights/test_weights.py compares every tensor."""
    model = create_pretraining_model("arm_tiny", **NINE_CLUSTERS)
    model.save_pretrained(tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    sizes = {"embed_dim": 24, "depth": 6, "patch_size": 8, "img_size": (40, 72), "num_classes": 7}
    backbone = timm.create_model("arm_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    assert backbone(torch.randn(1, 3, 40, 72)).shape == (1, 7)
    assert torch.equal(backbone.blocks[5].mixer.A_log[3], model.blocks[5].mixer.A_log[0])


# bad input


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"img_size": 200}, r"img_size \(200, 200\) must be a multiple of .* \(64, 64\), for example \(192, 192\)"),
        ({"img_size": (192, 200)}, r"img_size \(192, 200\) must be a multiple of cluster_size \(64, 64\)"),
        ({"cluster_size": 40, "img_size": 80}, r"cluster_size \(40, 40\) must be a multiple of patch_size \(16, 16\)"),
        ({"cluster_size": (64, 8)}, r"cluster_size \(64, 8\) must be a multiple of patch_size \(16, 16\)"),
        ({"img_size": 64}, r"img_size \(64, 64\) holds a single cluster \(64, 64\); there is no next one to predict"),
        (
            {"decoder_dim": 100},
            r"decoder_dim must be a multiple of 64 \(the size of a head\), got 100; for example 128",
        ),
        (
            {"embed_dim": 30},
            r"a sine-cosine position table needs a width that is a multiple of 4, got 30; for example 32",
        ),
        ({"depth": 0}, "ARMPretrain: depth must be at least 1, got 0"),
        ({"patch_size": (16, 0)}, r"ARMPretrain: patch_size must be at least 1, got \(16, 0\)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_pretraining_model("arm_tiny", **sizes)


def test_unknown_size_name() -> None:
    with pytest.raises(ValueError, match="unknown pretraining model 'arm_giant'; choose one of arm_pico, arm_tiny,"):
        create_pretraining_model("arm_giant")


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match=r"arm_tiny: unknown keyword dept; the model takes .*depth, .*patch_size"):
        create_pretraining_model("arm_tiny", dept=6)


def test_other_images_are_refused_with_what_this_model_has() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"another size use create_pretraining_model\(\.\.\., img_size=\.\.\.\)$"):
        model(torch.zeros(1, 3, 64, 48, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"channels needs create_pretraining_model\(\.\.\., in_chans=\.\.\.\)$"):
        model(torch.zeros(1, 4, 48, 48, dtype=torch.float64))


def test_weights_can_be_drawn_anew() -> None:
    model = small(device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    model.init_non_persistent_buffers()
    assert model(images_for(model))[0].isfinite()


@pytest.mark.parametrize("method", ["forward", "reconstruct"])
def test_wrong_images(method: str) -> None:
    model = small()
    call = getattr(model, method)
    with pytest.raises(ValueError, match="expected images of 48x48, got 48x64"):
        call(torch.zeros(1, 3, 48, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, height, width\), got \(1, 1, 48, 48\)"):
        call(torch.zeros(1, 1, 48, 48, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, height, width\), got \(3, 48, 48\)"):
        call(torch.zeros(3, 48, 48, dtype=torch.float64))
