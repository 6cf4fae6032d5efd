"""The switches of the paper's ablations: what each changes, and that the future is never seen whatever they say."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from arm_zoo import ARMPretrain, create_pretraining_model
from arm_zoo.identify import find_variant
from arm_zoo.layers.order import cluster_order
from arm_zoo.pretraining.autoregressive import PREDICTION_ORDERS
from arm_zoo.pretraining.targets import patchify, statistics

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "d_state": 4, "decoder_dim": 64, "decoder_depth": 2}
# 144 patches, as in the paper: units of 1, 4, 9, 16 and 36 of them, or each of a single pixel.
UNITS: dict[str, dict[str, Any]] = {
    **{f"{16 * side}px": {"img_size": 48, "patch_size": 4, "cluster_size": 4 * side} for side in (1, 2, 3, 4, 6)},
    "pixel": {"img_size": 12, "patch_size": 1, "cluster_size": 1, "target": "pixel"},
}
NINE = UNITS["64px"]


def small(**sizes: Any) -> ARMPretrain:
    """A small model in float64, the same whenever it is built."""
    torch.manual_seed(1)
    return create_pretraining_model("arm_tiny", **{**SMALL, **NINE, **sizes}).double().eval()


def images_for(model: ARMPretrain, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, dtype=torch.float64)


def clusters_seen(gradient: torch.Tensor, model: ARMPretrain, order: torch.Tensor) -> torch.Tensor:
    """Whether each cluster of an image, in an order, has a gradient (C, H, W) in all of its pixels or in none."""
    patches = patchify(gradient[None], model.patch_size)[0, order]
    seen = (patches != 0).view(len(order) // model.cluster_tokens, -1)
    assert torch.equal(seen.all(1), seen.any(1))
    return seen.all(1)


# causality


@pytest.mark.parametrize("order", PREDICTION_ORDERS)
@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_predicted_from_those_before_it_alone(unit: str, order: str) -> None:
    """By gradients, which of every pixel of the units before are not zero, and of all others are."""
    model = small(**UNITS[unit], prediction_order=order)
    images = images_for(model).requires_grad_()
    orders = model.order.expand(2, -1)
    if order == "random":
        orders = model.random_orders(images)
    prediction = model.forward_decoder(model.forward_encoder(images, orders), orders)
    units = prediction.shape[1] // model.cluster_tokens
    before = units // 2
    prediction.unflatten(1, (units, -1))[:, before].square().sum().backward()
    assert images.grad is not None
    for image in range(2):
        seen = clusters_seen(images.grad[image], model, orders[image])
        assert seen.tolist() == [number <= before for number in range(units + 1)]


@pytest.mark.parametrize("unit", UNITS)
def test_changing_a_unit_changes_later_predictions_only(unit: str) -> None:
    model = small(**UNITS[unit], prediction_order="column_reversed")
    units = model.patch_embed.num_patches // model.cluster_tokens
    changed = units // 2
    before = images_for(model, batch=1)
    pixels = patchify(torch.arange(before.numel()).view(before.shape), model.patch_size)[0, model.order]
    after = before.flatten().index_add(
        0, pixels.view(units, -1)[changed], torch.ones(pixels.numel() // units).double()
    )
    with torch.no_grad():
        both = [model(images)[1].unflatten(1, (units - 1, -1))[0] for images in (before, after.view(before.shape))]
    same = [torch.equal(*pair) for pair in zip(*both, strict=True)]  # of units 1 to the last
    assert same == [number < changed for number in range(units - 1)]


# order


def test_orders_by_hand() -> None:
    """Clusters of one row and two columns, three by three of them: the patches inside always go row by row."""
    orders = {name: cluster_order(3, 6, 1, 2, name).tolist() for name in PREDICTION_ORDERS[:-1]}
    assert orders["row"] == list(range(18))
    assert orders["row_reversed"] == [16, 17, 14, 15, 12, 13, 10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1]
    assert orders["column"] == [0, 1, 6, 7, 12, 13, 2, 3, 8, 9, 14, 15, 4, 5, 10, 11, 16, 17]
    assert orders["column_reversed"] == [16, 17, 10, 11, 4, 5, 14, 15, 8, 9, 2, 3, 12, 13, 6, 7, 0, 1]


def test_the_cluster_that_is_given_is_the_first() -> None:
    shown = [small(prediction_order=order).shown(torch.zeros(2, 3, 48, 48)) for order in PREDICTION_ORDERS]
    assert [numbers.tolist() for numbers in shown] == [[[0], [0]], [[8], [8]], [[0], [0]], [[8], [8]], [[0], [0]]]
    oblong = small(img_size=(48, 32), cluster_size=(8, 16), prediction_order="row_reversed")
    assert oblong.shown(torch.zeros(1, 3, 48, 32)).tolist() == [[11]]


def test_random_orders_differ_and_repeat_with_the_seed() -> None:
    model = small(prediction_order="random")
    images, seeds = images_for(model, batch=8), torch.randint(2**63 - 1, (8,))
    drawn = model.random_orders(images, seeds)
    assert torch.equal(model.random_orders(images, seeds), drawn)
    assert torch.equal(model.random_orders(images[3:5], seeds[3:5]), drawn[3:5])  # each image by its own seed
    torch.manual_seed(7)
    unseeded = model.random_orders(images)
    assert not torch.equal(model.random_orders(images), unseeded)
    torch.manual_seed(7)
    assert torch.equal(model.random_orders(images), unseeded)
    assert len({tuple(row) for row in drawn.tolist()}) == 8
    wholes = {tuple(cluster) for cluster in model.order.view(9, 16).tolist()}
    assert all({tuple(cluster) for cluster in row.view(9, 16).tolist()} == wholes for row in drawn)


def test_the_model_draws_its_orders_from_the_seeds() -> None:
    """Of each forward pass, for prediction and target alike; what must not be random is in row order."""
    model, rows = small(prediction_order="random"), small()
    images, seeds = images_for(model, batch=4), torch.arange(4)
    loss, prediction, target = model(images, seeds)
    order = model.random_orders(images, seeds)
    for image in range(4):
        alone = order[image : image + 1]
        predicted = model.forward_decoder(model.forward_encoder(images[image : image + 1], alone), alone)
        torch.testing.assert_close(predicted[0], prediction[image], rtol=1e-10, atol=1e-12)
        patches = patchify(images[image : image + 1], model.patch_size)[0, order[image, 16:]]
        mean, deviation = statistics(patches)
        torch.testing.assert_close(target[image], (patches - mean) / deviation)
    assert loss.item() == pytest.approx(F.mse_loss(prediction, target).item())
    assert model(images, seeds + 1)[0] != loss
    assert torch.equal(model.reconstruct(images), rows.reconstruct(images))
    assert all(map(torch.equal, model.answers(images).values(), rows.answers(images).values()))


@pytest.mark.parametrize("order", PREDICTION_ORDERS)
def test_a_query_knows_the_position_of_the_patch_that_it_predicts(order: str) -> None:
    """Where all latents are the same, it knows nothing else: in any order, a patch gets one prediction."""
    model, rows = small(prediction_order=order), small()
    orders = model.random_orders(images_for(model)) if order == "random" else model.order.expand(2, -1)
    latent = torch.randn(1, 1, 64, 2, dtype=torch.float64).expand(2, 128, -1, -1)
    found = model.forward_decoder(latent, orders if order == "random" else None)
    expected = rows.forward_decoder(latent)[0]
    place = torch.full((144,), -1).index_copy_(0, rows.order[16:], torch.arange(128))
    assert len(expected.unique(dim=0)) == 128
    for prediction, predicted in zip(found, orders[:, 16:], strict=True):
        both = place[predicted] >= 0  # not the cluster that is given in row order
        assert both.sum() >= 112
        torch.testing.assert_close(prediction[both], expected[place[predicted][both]])


def test_every_order_and_target_gives_another_loss() -> None:
    """With the same weights: a switch that did nothing would not."""
    images = images_for(small())
    losses = {order: small(prediction_order=order)(images)[0].item() for order in PREDICTION_ORDERS}
    losses["pixel"] = small(target="pixel")(images)[0].item()
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize("depth, width", [(1, 64), (8, 64), (2, 128), (3, 384)])
def test_the_decoder_has_the_depth_and_width_asked_for(depth: int, width: int) -> None:
    model = small(decoder_depth=depth, decoder_dim=width)
    inputs: list[torch.Size] = []
    for block in model.decoder_blocks:
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].shape))
    model(images_for(model))[0].backward()
    assert inputs == [(1, 128, width)] + [(2, 128, width)] * (depth - 1)  # the first are made once for all images
    assert all(p.grad is not None and p.grad.any() for p in model.decoder_blocks.parameters())


# targets


def test_pixels_are_a_target() -> None:
    """The patches themselves; a perfect prediction of them is the image."""
    model = small(target="pixel", prediction_order="row_reversed")
    images = images_for(model)
    loss, prediction, target = model(images)
    assert torch.equal(target, patchify(images, model.patch_size)[:, model.order[16:]])
    assert loss.item() == pytest.approx((prediction - target).square().mean().item())
    model.forward_decoder = lambda latent: target  # type: ignore[method-assign, assignment, misc]
    assert torch.equal(model.reconstruct(images), images)


def test_tokens_are_a_target() -> None:
    """Cross entropy, against the token of the patch that each prediction is of."""
    model = small(target="dvae_tokens", vocab_size=20, prediction_order="column")
    tokens = torch.randint(20, (2, 144))
    loss, logits, target = model(images_for(model), tokens=tokens)
    assert logits.shape == (2, 128, 20)
    assert torch.equal(target, tokens[:, model.order[16:]])
    by_hand = -logits.log_softmax(-1).gather(2, target[..., None]).mean()
    assert loss.item() == pytest.approx(by_hand.item())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_tokens_of_random_orders_are_those_of_the_predicted_patches() -> None:
    model = small(target="dvae_tokens", vocab_size=144, prediction_order="random")
    images, seeds = images_for(model), torch.arange(2)
    _, _, target = model(images, seeds, torch.arange(144).expand(2, -1))
    assert torch.equal(target, model.random_orders(images, seeds)[:, 16:])


def test_a_model_of_tokens_asks_for_them() -> None:
    model = small(target="dvae_tokens")
    assert model.decoder_pred.out_features == model.vocab_size == 8192
    for tokens in (None, torch.zeros(2, 143, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"target dvae_tokens takes tokens \(batch, 144\) beside the images, got"):
            model(images_for(model), tokens=tokens)
    with pytest.raises(ValueError, match="predicts tokens of a dVAE, not pixels"):
        model.reconstruct(images_for(model))


# checkpoints


@pytest.mark.parametrize("switches", [{"target": "dvae_tokens", "vocab_size": 20}, UNITS["pixel"]], ids=str)
def test_checkpoints_of_the_switches_are_known(switches: dict[str, Any]) -> None:
    model = small(**switches).float()
    variant = find_variant(model.state_dict(), model.config)
    again = variant.create()
    again.load_state_dict(model.state_dict())
    assert again.hub_config() == model.hub_config()
    assert find_variant(model.state_dict()).create().decoder_pred.weight.shape == model.decoder_pred.weight.shape


def test_a_backbone_of_patches_starts_from_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The embedding of patches is new, which is logged; the position table is resampled, the blocks are taken over."""
    pixels = small(**UNITS["pixel"]).float()
    pixels.patch_embed.proj.bias.data.fill_(3)
    pixels.save_pretrained(tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    sizes = {"embed_dim": 16, "depth": 2, "d_state": 4, "patch_size": 8, "img_size": 112}
    torch.manual_seed(5)
    fresh = timm.create_model("arm_tiny_patch16_224", **sizes)
    torch.manual_seed(5)
    backbone = timm.create_model("arm_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    assert "of single pixels: the embedding of patches of 8x8 pixels starts anew" in caplog.text
    assert torch.equal(backbone.patch_embed.proj.weight, fresh.patch_embed.proj.weight)
    assert not backbone.patch_embed.proj.bias.any()
    assert torch.equal(backbone.blocks[1].mixer.A_log[3], pixels.blocks[1].mixer.A_log[0])
    assert backbone.pos_embed.shape == (1, 14 * 14 + 1, 16)
    torch.testing.assert_close(backbone.pos_embed[0, 0], pixels.pos_embed[0, 0], rtol=0.2, atol=0.2)


def test_patches_are_resampled_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small().float().save_pretrained(tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    sizes = {"embed_dim": 16, "depth": 2, "d_state": 4, "patch_size": 8, "img_size": 96}
    timm.create_model("arm_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    assert "starts anew" not in caplog.text


# Vim


def test_vim_predicts_from_its_own_blocks() -> None:
    """One scan of twice the width and no feed-forward part; its sums stay in float32."""
    model = small(backbone="vim", depth=3)
    assert all(block.mlp is None and isinstance(block.norm1, nn.RMSNorm) for block in model.blocks)
    assert all(block.mixer.A_log.shape == (1, 32, 4) for block in model.blocks)
    images = images_for(model).requires_grad_()
    model(images)[1].unflatten(1, (8, 16))[:, 3].square().sum().backward()
    assert images.grad is not None
    assert clusters_seen(images.grad[0], model, model.order).tolist() == [True] * 4 + [False] * 5
    half = model.bfloat16()
    kinds = [block.register_forward_hook(lambda _, __, output: kept.append(output.dtype)) for block in half.blocks]
    kept: list[torch.dtype] = []
    assert half(images_for(half).bfloat16())[0].isfinite() and kept == [torch.float32] * len(kinds)


def test_a_vim_backbone_starts_from_the_file(tmp_path: Path) -> None:
    """Both of its scans from the one that was pretrained; another class token and norm."""
    model = small(backbone="vim").float()
    model.save_pretrained(tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    sizes = {"embed_dim": 16, "depth": 2, "d_state": 4, "patch_size": 4, "img_size": 48}
    backbone = timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    for ours, theirs in zip(backbone.blocks, model.blocks, strict=True):
        assert torch.equal(ours.mixer.A_log, theirs.mixer.A_log.repeat(2, 1, 1))
        assert torch.equal(ours.mixer.in_proj.weight, theirs.mixer.in_proj.weight)
    variant = find_variant(model.state_dict(), model.config)
    assert variant.architecture.startswith("vim_") and variant.create().config == model.config
    assert find_variant(model.state_dict()).create().config["backbone"] == "vim"


# bad input


@pytest.mark.parametrize(
    "switches, message",
    [
        (
            {"prediction_order": "spiral"},
            "prediction_order is 'spiral'; choose one of row, row_reversed, column, colum",
        ),
        ({"backbone": "vmamba"}, "unknown backbone 'vmamba'; choose one of arm, vim"),
        ({"target": "tokens"}, "target is 'tokens'; choose one of normed_pixel, pixel, dvae_tokens"),
        ({"vocab_size": 512}, "vocab_size 512 goes with target dvae_tokens, not with normed_pixel; leave it out"),
        ({"target": "dvae_tokens", "vocab_size": 0}, "ARMPretrain: vocab_size must be at least 1, got 0"),
        ({"cluster_size": 20}, r"img_size \(48, 48\) must be a multiple of cluster_size \(20, 20\), for example"),
        ({"decoder_dim": 96}, r"decoder_dim must be a multiple of 64 \(the size of a head\), got 96"),
        (
            {**UNITS["pixel"], "in_chans": 1, "target": "normed_pixel"},
            "a patch of a single value cannot be normalised; choose target pixel, or a larger patch_size",
        ),
    ],
    ids=str,
)
def test_switches_that_do_not_fit(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**switches)
