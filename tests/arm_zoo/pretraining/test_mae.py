"""Masked autoencoding: the authors' numbers, what is seen of an image and what not, features, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from arm_zoo import ARM, CheckpointError, MAEPretrain, Vim, create_pretraining_model, from_pretrained
from arm_zoo.identify import find_variant
from arm_zoo.layers.order import scan_order
from arm_zoo.models.arm import DIRECTIONS
from arm_zoo.pretraining.decoder import sincos_pos_embed
from arm_zoo.pretraining.mae import lowest, mask_of, masked_loss
from arm_zoo.pretraining.noise import mixed_bits, noise
from arm_zoo.pretraining.targets import patchify, unpatchify
from tests.helpers.golden import in_both_sets

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "d_state": 2, "decoder_dim": 32, "decoder_depth": 1}
FAMILIES = {"arm": (ARM, "arm_pico_patch2_8"), "vim": (Vim, "vim_pico_patch2_8")}


def small(family: str = "arm", **sizes: Any) -> MAEPretrain:
    model = create_pretraining_model(f"{family}_pico", "mae", **{**SMALL, **sizes})
    assert isinstance(model, MAEPretrain)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8)


# ------------------------------------------------------------------------------------------------------- the authors'


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_masks_targets_and_losses_are_the_authors(golden: Path, dtype: torch.dtype, tolerance: float) -> None:
    case = golden / "mae_mask"
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs_f64.safetensors")
    kept = lowest(inputs["noise"], 9)
    assert torch.equal(kept, expected["ids_keep"].sort(dim=1).values)
    mask = mask_of(kept, 36)
    assert torch.equal(mask.double(), expected["mask"])
    pictures, prediction = inputs["images"].to(dtype), inputs["pred"].to(dtype)
    assert torch.equal(patchify(pictures, (4, 4)).double(), expected["patches"])
    for normed, name in ((True, "norm_pix"), (False, "pixel")):
        model = small(img_size=24, patch_size=4, in_chans=3, normed_pixels=normed)
        leaf = prediction.clone().requires_grad_()
        loss = masked_loss(leaf, model.target(pictures), mask)
        assert loss.item() == pytest.approx(expected[f"loss_{name}"].item(), rel=tolerance)
        (gradient,) = torch.autograd.grad(loss, leaf)
        wanted = expected[f"grad_pred_{name}"]
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=10 * tolerance * wanted.abs().max().item())
        if normed:
            torch.testing.assert_close(
                model.target(pictures).double(), expected["target_norm_pix"], rtol=0, atol=tolerance
            )
    for counts, wanted in json.loads((case / "meta.json").read_text())["kept_patches"].items():
        patches, ratio = counts.split(" patches, ratio ")
        sizes = {"patch_size": (1, 1), "embed_dim": 4, "decoder_dim": 4, "mask_ratio": float(ratio), "device": "meta"}
        assert small(img_size=(1, int(patches)), **sizes).kept_patches == wanted, counts


@in_both_sets
def test_the_decoder_is_the_authors(golden: Path) -> None:
    """A ViT encoded for it; our Vim has the class token in the middle, where theirs has it in front."""
    case = golden / "mae_small"
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs_f64.safetensors")
    weights = load_file(case / "state_dict.safetensors")
    sizes = json.loads((case / "meta.json").read_text())["constructor"]
    model = create_pretraining_model(
        "vim_pico", "mae", img_size=sizes["img_size"], patch_size=sizes["patch_size"], in_chans=3,
        embed_dim=sizes["embed_dim"], depth=1, decoder_dim=sizes["decoder_embed_dim"],
        decoder_depth=sizes["decoder_depth"], decoder_heads=sizes["decoder_num_heads"],
    ).double()  # fmt: skip
    theirs = {name: value for name, value in weights.items() if name.startswith(("decoder_", "mask_token"))}
    table = theirs.pop("decoder_pos_embed")
    assert not table[:, 0].any()  # of the class token
    torch.testing.assert_close(model.decoder_pos_embed, table[:, 1:].double(), rtol=0, atol=1e-5)
    result = model.load_state_dict({**theirs, "decoder_pos_embed": table[:, 1:]}, strict=False)
    assert not result.unexpected_keys and not any("decoder" in name for name in result.missing_keys)
    shuffled = inputs["noise"].argsort(dim=1)[:, :16]
    kept, places = shuffled.sort(dim=1)
    token, patches = expected["latent"].split([1, 16], dim=1)
    patches = torch.take_along_dim(patches, places[..., None], dim=1)
    prediction = model.forward_decoder(torch.cat([patches[:, :8], token, patches[:, 8:]], dim=1), kept)
    if "pred" in expected:
        torch.testing.assert_close(prediction, expected["pred"], rtol=0, atol=1e-10)
    loss = masked_loss(prediction, model.target(inputs["images"].double()), mask_of(kept, 64))
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-10)
    loss.backward()
    for name, norm in json.loads((case / "grad_norms.json").read_text()).items():
        if name in theirs:
            assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-8), name


def test_the_decoder_has_the_published_number_of_parameters() -> None:
    for name, wanted in (
        ("arm_base", 26_109_184 - 512),
        ("arm_large", 26_240_256 - 512),
    ):  # less the class token's row
        model = create_pretraining_model(name, "mae", device="meta")
        parts = [p for key, p in model.named_parameters() if key.startswith(("decoder_", "mask_token"))]
        assert sum(p.numel() for p in parts) == wanted and model.kept_patches == 49
        assert model.decoder_blocks[0].attn.num_heads == 16  # which no shape tells


# -------------------------------------------------------------------------------------------------------------- masks


def mixed(state: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor % 2**64
    return state ^ state >> 31


def test_noise_is_hashed_from_seeds_and_places() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, -(2**63)])
    for seed, row in zip(seeds.tolist(), noise(seeds, 3).tolist(), strict=True):
        assert [number % 2**64 for number in row] == [mixed((mixed(seed % 2**64) + i) % 2**64) for i in range(3)]
    increment = torch.tensor(0x9E3779B97F4A7C15 - 2**64)
    assert mixed_bits(increment).item() % 2**64 == 0xE220A8397B1DCDAF  # SplitMix64's first number, with seed 0


def test_masks_are_functions_of_the_seeds_and_keep_every_patch_alike() -> None:
    model = small(img_size=24)
    kept = model.kept(torch.arange(4000))
    assert kept.shape == (4000, 36) and (kept.diff(dim=1) > 0).all()
    assert torch.equal(model.kept(torch.tensor([17, 3999])), kept[[17, 3999]])
    share = kept.flatten().bincount(minlength=144) / 4000
    assert (share - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 4000) ** 0.5
    chosen = 1 - mask_of(kept, 144)
    pairs, expected = chosen.T @ chosen / 4000, 36 * 35 / (144 * 143)
    of_others = pairs[~torch.eye(144, dtype=torch.bool)]
    assert (of_others - expected).abs().max() < 6 * (expected * (1 - expected) / 4000) ** 0.5


def test_images_are_masked_by_their_seeds_alone() -> None:
    model, pictures, seeds = small("vim").double(), images().double(), torch.tensor([5, 6, 7])
    _, prediction, mask = model(pictures, seeds)
    _, other, other_mask = model(pictures.flip(0), seeds.flip(0))
    assert torch.equal(mask.flip(0), other_mask)
    torch.testing.assert_close(prediction.flip(0), other)
    torch.manual_seed(3)
    first = model(pictures)[2]
    assert not torch.equal(first, model(pictures)[2])  # without seeds they are drawn
    torch.manual_seed(3)
    assert torch.equal(first, model(pictures)[2])


def test_order_among_the_noise_of_kept_patches_changes_nothing() -> None:
    drawn = torch.rand(4, 20)
    kept = lowest(drawn, 5)
    values = torch.take_along_dim(drawn, kept, dim=1)
    permuted = drawn.scatter(1, kept, values[:, torch.randperm(5)])
    assert not torch.equal(drawn, permuted) and torch.equal(lowest(permuted, 5), kept)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("one_scan", [False, True])
def test_nothing_flows_from_missing_patches_to_kept_ones(family: str, one_scan: bool) -> None:
    model, seeds = small(family, one_scan=one_scan).double(), torch.tensor([1, 2, 3])
    pictures = images().double().requires_grad_()
    kept = model.kept(seeds)
    is_missing = mask_of(kept, 16).bool()
    latent = model.forward_encoder(pictures, kept)
    prediction = model.forward_decoder(latent, kept)
    for output in (latent, prediction):
        (gradient,) = torch.autograd.grad(output.square().sum(), pictures, retain_graph=True)
        by_patch = patchify(gradient, (2, 2)).abs().sum(-1)
        assert not by_patch[is_missing].any() and (by_patch[~is_missing] > 0).all()
    loss, _, mask = model(pictures, seeds)
    assert torch.equal(mask.bool(), is_missing)
    patches = patchify(pictures.detach(), (2, 2))
    changed = unpatchify(torch.where(is_missing[..., None], torch.randn_like(patches), patches), (2, 2), (4, 4))
    assert torch.equal(model.forward_encoder(changed, kept), latent) and model(changed, seeds)[0] != loss


def test_the_loss_is_of_missing_patches_alone() -> None:
    model, pictures, seeds = small(normed_pixels=False).double(), images().double(), torch.tensor([1, 2, 3])
    loss, prediction, mask = model(pictures, seeds)
    errors = (prediction - patchify(pictures, (2, 2))).square()
    assert loss.item() == pytest.approx(errors[mask.bool()].mean().item(), rel=1e-12) and mask.sum() == 3 * 12


# ------------------------------------------------------------------------------------------------------------ encoders


def test_with_all_patches_vim_encodes_as_its_backbone_does() -> None:
    model = small("vim").double()
    torch.nn.init.normal_(model.cls_token)
    backbone = timm.create_model("vim_pico_patch2_8", **{key: SMALL[key] for key in ("embed_dim", "depth", "d_state")})
    backbone = backbone.double()
    backbone.load_state_dict(backbone.adapt(model.state_dict(), backbone, timm_adapts=False))
    pictures = images().double()
    tokens = model.forward_encoder(pictures, torch.arange(16).expand(3, -1))
    torch.testing.assert_close(tokens, backbone.forward_features(pictures), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("one_scan", [False, True])
def test_arm_scans_what_is_kept_in_the_backbones_ways(one_scan: bool) -> None:
    """Each image as if it were alone: its tokens, in the row order of the grid, in tables of its own."""
    model, pictures = small(one_scan=one_scan).double(), images().double()
    kept = model.kept(torch.tensor([4, 5, 6]))
    tokens = model.forward_encoder(pictures, kept)
    whole = scan_order(4, 4, DIRECTIONS[:1] if one_scan else DIRECTIONS)
    for picture, numbers, expected in zip(pictures, kept, tokens, strict=True):
        x = (model.patch_embed(picture[None]) + model.pos_embed)[:, numbers]
        places = {patch: place for place, patch in enumerate(numbers.tolist())}
        order = torch.tensor([[places[patch] for patch in way if patch in places] for way in whole.tolist()])
        for block in model.blocks:
            x = block(x, order)
        torch.testing.assert_close(model.norm(x)[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_activations_changes_nothing(family: str) -> None:
    model, pictures, gradients = small(family), images(), []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        loss = model(pictures, torch.arange(3))[0]
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_lower_precision_the_loss_is_in_float32(family: str) -> None:
    model, pictures = small(family), images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pictures, torch.arange(3))[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(pictures, torch.arange(3))[0].item(), rel=2e-2)
    half = small(family, dtype=torch.bfloat16)
    assert half(pictures.bfloat16())[0].dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_model_draws_and_computes_the_same() -> None:
    model, pictures, seeds = small(), images(), torch.arange(3)
    compiled = torch.compile(model)
    (loss, _, mask), (expected, _, expected_mask) = (each(pictures, seeds) for each in (compiled, model))
    assert torch.equal(mask, expected_mask) and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_tables_stay_and_everything_else_learns() -> None:
    for family in FAMILIES:
        model = small(family)
        model(images())[0].backward()
        idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert idle == {"pos_embed", "decoder_pos_embed"}
        assert torch.equal(model.pos_embed, sincos_pos_embed(16, 4, 4))
        assert ("cls_token" in model.state_dict()) == (family == "vim")
        wide = small(family, embed_dim=512, decoder_dim=512)
        tokens = [token for token in (wide.mask_token, wide.cls_token) if token is not None]
        assert all(token.std().item() == pytest.approx(0.02, rel=0.2) for token in tokens)


def test_reconstructions_keep_what_is_shown() -> None:
    model, pictures = small(), images()
    kept = mask_of(model.shown(pictures), 16) == 0
    before, after = (patchify(each, (2, 2)) for each in (pictures, model.reconstruct(pictures)))
    assert torch.equal(before[kept], after[kept]) and not (before == after).all(-1)[~kept].any()
    mean = (
        after.mean(-1)[~kept],
        (before.mean(-1) + before.std(-1) * model.answers(pictures)["prediction"].mean(-1))[~kept],
    )
    torch.testing.assert_close(*mean, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------- files and names


@pytest.mark.parametrize("family", FAMILIES)
def test_no_backbone_has_what_tells_pretraining_models(family: str) -> None:
    """Or its own checkpoint would pass for one of pretraining, where a part such as the final norm is left out."""
    backbone, entry = FAMILIES[family]
    tensors = timm.create_model(entry).state_dict()
    assert not [key for key in backbone.pretraining_keys if backbone.official_names.covers([key], tensors)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("one_scan", [False, True])
def test_what_is_saved_is_loaded_and_becomes_a_backbone(family: str, one_scan: bool, tmp_path: Path) -> None:
    model = small(family, one_scan=one_scan, mask_ratio=0.5, decoder_heads=2)
    if model.cls_token is not None:
        torch.nn.init.normal_(model.cls_token)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"objective": "mae", "pretraining_model": model.config}
    backbone_class, entry = FAMILIES[family]
    variant = find_variant(model.state_dict())
    assert (variant.objective, variant.architecture) == ("mae", entry)
    told = {"mask_ratio": 0.75, "decoder_heads": None}
    assert create_pretraining_model(f"{family}_pico", "mae", **variant.pretraining).config == {**model.config, **told}
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded = from_pretrained(source)
        assert isinstance(loaded, MAEPretrain)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert isinstance(loaded := from_pretrained(tmp_path), MAEPretrain) and loaded.config == model.config
    resized = from_pretrained(tmp_path, img_size=16)
    assert torch.equal(resized.pos_embed, sincos_pos_embed(16, 8, 8))
    for size in (8, 16):
        backbone = from_pretrained(tmp_path, as_backbone=True, img_size=size)
        assert type(backbone) is backbone_class
        for name in ("A_log", "conv_weight", "dt_proj_bias"):
            ours, theirs = (getattr(each.blocks[1].mixer, name) for each in (model, backbone))
            assert torch.equal(theirs, ours.expand_as(theirs)) and len(ours) == (1 if one_scan else len(theirs))
        assert torch.equal(backbone.norm.weight, model.norm.weight)
        middle = size * size // 8
        assert not backbone.pos_embed[:, middle].any() and backbone.pos_embed.any(-1).sum() == 2 * middle
        assert model.cls_token is None or torch.equal(backbone.cls_token, model.cls_token)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"objective": "autoregressive"}, "pretraining_model has decoder_heads, mask_ratio, "),
        ({"pretraining_model": {**config["pretraining_model"], "backbone": "vim"}}, "does not fit the model"),
        ({"pretraining_model": {**config["pretraining_model"], "backbone": "vit"}}, "unknown backbone 'vit'"),
        ({"pretraining_model": {**config["pretraining_model"], "decoder_depth": 2}}, "does not fit the model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"mask_ratio": 0.99},
            r"mask_ratio 0.99 of 16 patches keeps 0; from 1 to 15 can be kept, .* mask_ratio 0.5$",
        ),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0 of 16 patches keeps 16; from 1 to 15"),
        ({"mask_ratio": "half"}, "mask_ratio must be a number between 0 and 1, got 'half'"),
        ({"one_scan": "no"}, "one_scan must be true or false, got 'no'"),
        ({"normed_pixels": 2}, "normed_pixels must be true or false, got 2"),
        (
            {"decoder_dim": 64, "decoder_heads": 3},
            "decoder_dim 64 with 3 heads must be a multiple of 12, for example 60",
        ),
        ({"decoder_heads": 0}, "MAEPretrain: decoder_heads must be at least 1, got 0"),
        ({"decoder_depth": 0}, "MAEPretrain: decoder_depth must be at least 1, got 0"),
        ({"decoder_dim": 30}, "decoder_dim 30 with 1 heads must be a multiple of 4, for example 32"),
        ({"backbone": "vmamba"}, "unknown backbone 'vmamba'; choose one of arm, vim"),
        ({"img_size": 9}, "not tiled by patches"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**sizes)


def test_names_and_keywords_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown pretraining model 'vmamba_tiny'; choose one of arm_pico, .*vim"):
        create_pretraining_model("vmamba_tiny", "mae")
    with pytest.raises(TypeError, match="arm_pico: unknown keyword cluster_size; the model takes backbone, "):
        create_pretraining_model("arm_pico", "mae", cluster_size=4)
