"""The panels: what each shows, for which models, and what is refused."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import arm_zoo
from arm_zoo.layers.order import cluster_order
from arm_zoo.ops import scan_backend
from arm_zoo.see.panels import Panel, panels, patch_features, patches_of_tokens, principal_colours, receptive_field
from arm_zoo.see.scans import ScanRecorder, attention_row

ALWAYS, SCAN = ["image", "features", "effective receptive field"], "attention of the scan"
ROWS, COLUMNS = ["scan: row", "scan: row reversed"], ["scan: column", "scan: column reversed"]
VMAMBA = {"embed_dim": 16, "depths": (1, 1, 1, 1)}
VIT = {"img_size": (32, 48), "depth": 2}


def shown_of(model: nn.Module, *shape: int, **options: Any) -> tuple[list[Panel], list[str]]:
    images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    return panels(model.eval(), images, (0.5,) * shape[0], (0.25,) * shape[0], **options)


@pytest.mark.parametrize("name, arguments, shape, grid, titles", [
    ("arm_pico_patch2_8", {}, (1, 8, 8), (4, 4), [*ALWAYS, SCAN, *ROWS, *COLUMNS]),
    ("arm_pico_patch2_8", {"dynamic_img_size": True}, (1, 6, 10), (3, 5), [*ALWAYS, SCAN, *ROWS, *COLUMNS]),
    ("vim_pico_patch2_8", {}, (1, 8, 8), (4, 4), [*ALWAYS, SCAN, *ROWS]),
    ("vmamba_tiny_s1l8", VMAMBA, (3, 64, 96), (2, 3), [*ALWAYS, SCAN, *ROWS[:1], *COLUMNS[:1], ROWS[1], COLUMNS[1]]),
    ("vit_tiny_patch16_224", VIT, (3, 32, 48), (2, 3), ALWAYS),
    ("resnet10t", {}, (3, 64, 64), (2, 2), ALWAYS),
])  # fmt: skip
def test_what_applies_is_shown(
    name: str, arguments: dict[str, Any], shape: tuple[int, ...], grid: tuple[int, int], titles: list[str]
) -> None:
    model = timm.create_model(name, **arguments)
    shown, missing = shown_of(model, *shape)
    assert [panel.title for panel in shown] == titles
    assert missing[0] == "predicted clusters: this is no pretraining model of pixels"
    scans = f"attention and directions of the scan: {type(model).__name__} has none"
    assert missing[1:] == ([] if SCAN in titles else [scans])
    for panel in shown:
        assert panel.values.min() >= 0 and panel.values.max() <= 1
        assert panel.values.shape[-2:] == (shape[1:] if panel.title in (ALWAYS[0], ALWAYS[2]) else grid)
    parts = [panel for panel in shown if panel.title.startswith("scan: ")]
    if parts:
        percents = sum(int(panel.note.partition("%")[0]) for panel in parts)
        assert percents == pytest.approx(100, abs=2)  # each is rounded
    again, _ = shown_of(model, *shape)
    assert all(torch.equal(panel.values, other.values) for panel, other in zip(shown, again, strict=True))


def test_the_patch_is_marked_where_it_lies() -> None:
    model = timm.create_model("vmamba_tiny_s1l8", **VMAMBA)
    shown, _ = shown_of(model, 3, 64, 96, layer=1, patch=(1, 10))
    marks = {panel.title: panel.mark for panel in shown if panel.mark}
    assert marks.keys() == {"image", "effective receptive field", SCAN}
    assert set(marks.values()) == {(10 / 12, 1 / 8, 11 / 12, 2 / 8)}


def test_attention_is_of_the_patch_and_without_the_class_token() -> None:
    """Of patch 9, which is token 10, as the class token is token 8."""
    model = timm.create_model("arm_pico_patch2_8")
    shown, _ = shown_of(model, 1, 8, 8, patch=(2, 1))
    with torch.no_grad(), scan_backend("torch"), ScanRecorder() as recorder:
        model(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert recorder.last is not None
    row = attention_row(recorder.last, 10)
    row = torch.cat([row[:8], row[9:]])
    [attention] = [panel.values for panel in shown if panel.title == SCAN]
    torch.testing.assert_close(attention.flatten(), ((row / row.max()).log10() / 3 + 1).clamp(0, 1))


def test_a_pretraining_model_shows_predictions() -> None:
    model = arm_zoo.create_pretraining_model("arm_pico")
    shown, missing = shown_of(model, 1, 8, 8)
    assert [panel.title for panel in shown] == ["image", "predicted clusters", *ALWAYS[1:], SCAN]
    assert missing == ["contributions of directions: the scan has only one"]
    image, predicted = (panel.values for panel in shown[:2])
    images = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(image, (images[0] * 0.25 + 0.5).clamp(0, 1))
    with scan_backend("torch"):
        expected = model.reconstruct(images)[0] * 0.25 + 0.5
    torch.testing.assert_close(predicted, expected.clamp(0, 1))
    assert shown[1].mark == (0, 0, 0.5, 0.5)
    last_cluster = torch.zeros(4, 4, dtype=torch.bool)
    last_cluster[2:, 2:] = True
    for title in ("features", SCAN):
        [values] = [panel.values for panel in shown if panel.title == title]
        assert torch.equal(values.isnan(), last_cluster.expand_as(values))


@pytest.mark.parametrize("target, told", [("normed_pixel", True), ("pixel", False)])
def test_the_predictions_tell_what_is_taken_from_the_true_image(target: str, told: bool) -> None:
    shown, _ = shown_of(arm_zoo.create_pretraining_model("arm_pico", target=target), 1, 8, 8)
    [note] = [panel.note for panel in shown if panel.title == "predicted clusters"]
    assert ("true mean and deviation" in note) == told


def test_pretraining_sees_the_clusters_before() -> None:
    """Both what the pixels do and what the decays let through stop at the patch, in the order of clusters."""
    model = arm_zoo.create_pretraining_model("arm_pico", img_size=12).eval()
    images, order = torch.randn(1, 1, 12, 12, requires_grad=True), cluster_order(6, 6, 2, 2)
    with scan_backend("torch"), ScanRecorder() as recorder:
        features = patch_features(model, images, -1)
    for step in (0, 3, 9, 31):
        patch, before = int(order[step]), torch.zeros(36, dtype=torch.bool)
        before[order[: step + 1]] = True
        [gradient] = torch.autograd.grad(features[:, *divmod(patch, 6)].norm(), images, retain_graph=True)
        moved = gradient[0, 0].unflatten(1, (6, 2)).unflatten(0, (6, 2)).abs().sum((1, 3)) > 0
        assert torch.equal(moved.flatten(), before)
        assert recorder.last is not None
        patches = patches_of_tokens(model, 36, 32)
        attention = attention_row(recorder.last, step)
        assert torch.equal(patches[attention > 0].sort().values, before.nonzero().flatten())


def test_the_class_token_stands_for_no_patch() -> None:
    model = timm.create_model("vim_pico_patch2_8")
    assert patches_of_tokens(model, 16, 17).tolist() == [*range(8), -1, *range(8, 16)]
    assert patches_of_tokens(model, 16, 16).tolist() == [*range(16)]


@pytest.mark.parametrize("layer", [-1, 1])
def test_the_receptive_field_is_what_a_step_of_a_pixel_does(layer: int) -> None:
    model = timm.create_model("arm_pico_patch2_8", num_classes=0, dtype=torch.float64).eval()
    images = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    steps = 1e-5 * torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    with torch.no_grad():
        [up], [down] = (
            model.forward_intermediates(images + step, indices=[layer], intermediates_only=True)
            for step in (steps, -steps)
        )
    moved = (up[:, :, 2, 1].norm(dim=1) - down[:, :, 2, 1].norm(dim=1)) / 2e-5
    images.requires_grad_()
    field = receptive_field(images, patch_features(model, images, layer)[:, 2, 1])
    torch.testing.assert_close(field.flatten(), moved.abs(), rtol=1e-5, atol=1e-8)


def test_colours_are_principal_components() -> None:
    """The strongest is red, then green and blue, whatever the channel; each rises with its largest weight."""
    ramp = torch.linspace(-1, 1, 9)
    features = torch.stack([0.1 * ramp.square().expand(9, 9), 5 * ramp.expand(9, 9), 2 * ramp[:, None].expand(9, 9)])
    red, green, blue = principal_colours(features + 7).float()
    assert torch.equal(red, red[:1].expand(9, 9)) and torch.equal(green, green[:, :1].expand(9, 9))
    torch.testing.assert_close(red[0], green[:, 0])
    torch.testing.assert_close(red[0], (ramp + 1) / 2)
    torch.testing.assert_close(blue[0], ramp.square())
    features[1, 4, 4] = 1000  # one patch alone does not change the scale of the others
    assert principal_colours(features)[0].quantile(0.9) > 0.9


def test_few_patches_have_few_colours() -> None:
    assert principal_colours(torch.randn(8, 1, 1)).flatten().tolist() == [0, 0, 0]
    assert principal_colours(torch.randn(8, 1, 2))[1:].max() < 1e-3


@pytest.mark.parametrize("options, message", [
    ({"patch": (4, 0)}, "no patch in row 4 and column 0: the map of features has rows 0 to 3 and columns 0 to 3"),
    ({"patch": (0, -1)}, "no patch in row 0 and column -1"),
    ({"layer": 4}, "no layer 4: the model has the layers 0 to 3, or -4 to -1"),
    ({"layer": -5}, "no layer -5"),
])  # fmt: skip
def test_places_that_are_not_there(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shown_of(timm.create_model("arm_pico_patch2_8"), 1, 8, 8, **options)


@pytest.mark.parametrize("options, message", [
    ({"patch": (3, 2)}, "the encoder never sees the last cluster, where patch 3 2 lies; name another"),
    ({"layer": 0}, "a pretraining model shows what its decoder gets, not a layer; got the layer 0"),
])  # fmt: skip
def test_what_pretraining_has_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shown_of(arm_zoo.create_pretraining_model("arm_pico"), 1, 8, 8, **options)


def test_models_without_features() -> None:
    with pytest.raises(ValueError, match="Flatten gives no features of patches: it has no forward_intermediates"):
        shown_of(nn.Flatten(), 3, 8, 8)
