"""MoCo v3: the authors' numbers, what moves and what stays, features, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn

from arm_zoo import ARM, MoCoPretrain, Vim, create_pretraining_model, from_pretrained
from arm_zoo.identify import find_variant
from arm_zoo.pretraining.decoder import sincos_pos_embed
from arm_zoo.pretraining.moco import contrastive_loss, mlp, momentum_at, two_view_loss, update_moving_average
from tests.helpers.golden import in_both_sets

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "d_state": 2, "hidden_dim": 32, "output_dim": 8}


def small(family: str, **sizes: Any) -> MoCoPretrain:
    model = create_pretraining_model(f"{family}_pico", "moco", **{**SMALL, **sizes})
    assert isinstance(model, MoCoPretrain)
    return model


class StandIn(nn.Module):
    """The encoder of the golden step: not one of images, but it ends in a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 24), mlp(24, 32, 32, 12)

    def forward(self, x: Tensor) -> Tensor:
        projection: Tensor = self.head(self.body(x).relu())
        return projection


@in_both_sets
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_of_two_processes_is_the_authors(golden: Path, temperature: float) -> None:
    case = golden / "mocov3_loss"
    inputs = {name: value.double() for name, value in load_file(case / "inputs.safetensors").items()}
    expected = load_file(case / "outputs_f64.safetensors")
    for process in range(2):
        queries = [inputs[name].chunk(2)[process].clone().requires_grad_() for name in ("q1", "q2")]
        pairs = zip(queries, (inputs["k2"], inputs["k1"]), ("q1k2", "q2k1"), strict=True)
        total = torch.zeros((), dtype=torch.float64)
        for query, keys, name in pairs:
            loss = contrastive_loss(query, keys, temperature, process)
            assert loss.item() == pytest.approx(expected[f"loss_{name}_T{temperature}"][process].item(), rel=1e-10)
            total = total + loss
        total.backward()
        for query, name in zip(queries, ("q1", "q2"), strict=True):
            wanted = expected[f"grad_{name}_T{temperature}"][process]
            torch.testing.assert_close(query.grad, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def authors(case: Path) -> nn.ModuleDict:
    """The parts of the golden step, after the momentum encoder has followed, in float64."""
    parts = nn.ModuleDict({"base_encoder": StandIn(), "momentum_encoder": StandIn(), "predictor": mlp(12, 32, 12)})
    parts.load_state_dict(load_file(case / "state_dict.safetensors"))
    parts["momentum_encoder"].requires_grad_(False)
    momentum = json.loads((case / "meta.json").read_text())["momentum"]
    update_moving_average(parts.double()["momentum_encoder"], parts["base_encoder"], momentum)
    return parts


def assert_is_the_authors(
    case: Path, found: dict[str, Tensor], gradients: dict[str, Tensor], tolerance: float
) -> None:
    """`found` has outputs, and `after.NAME` of all that is kept; the golden gradients are stored in float32."""
    for name, wanted in load_file(case / "outputs_f64.safetensors").items():
        if name in found or name.startswith("after."):
            limit = tolerance * wanted.abs().max().item()
            torch.testing.assert_close(found[name].double(), wanted.double(), rtol=0, atol=limit, msg=name)
    expected = load_file(case / "param_grads.safetensors")
    assert gradients.keys() == expected.keys()
    for name, wanted in expected.items():
        limit = max(10 * tolerance, 1e-7) * wanted.abs().max().item()
        torch.testing.assert_close(gradients[name].float(), wanted, rtol=0, atol=limit, msg=name)


def gradients_of(parts: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in parts.named_parameters() if parameter.grad is not None}


@in_both_sets
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_step_is_the_authors(golden: Path, dtype: torch.dtype, tolerance: float) -> None:
    case = golden / "mocov3_step"
    parts, outputs = authors(case).to(dtype), list[Tensor]()
    for name in ("predictor", "momentum_encoder"):
        parts[name].register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    views = load_file(case / "inputs.safetensors")
    loss, _ = two_view_loss(*parts.values(), (views["x1"].to(dtype), views["x2"].to(dtype)), temperature=0.2)
    loss.backward()
    found = {"loss": loss.detach(), **dict(zip(("q1", "q2", "k1", "k2"), outputs, strict=True))}
    found |= {f"after.{name}": value for name, value in parts.state_dict().items()}
    assert_is_the_authors(case, found, gradients_of(parts), tolerance)


def half_a_step(process: int, case: Path, folder: Path) -> None:
    """The golden step for one of two processes, with half of the images; what comes out goes to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=process, world_size=2)
    parts, views = authors(case), load_file(case / "inputs.safetensors")
    own = tuple(views[name].double().chunk(2)[process] for name in ("x1", "x2"))
    loss, deviation = two_view_loss(*parts.values(), own, temperature=0.2)
    loss.backward()
    found = {f"after.{name}": value for name, value in parts.state_dict().items()}
    found |= {"loss": loss.detach(), "deviation": deviation, **gradients_of(parts)}
    save_file(found, folder / f"{process}.safetensors")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_authors_step_of_one(repo: Path, tmp_path: Path) -> None:
    """Their losses and gradients average to those of one process with all images; what they keep is the same."""
    case = repo / "tests" / "golden" / "mocov3_step"
    multiprocessing.start_processes(half_a_step, (case, tmp_path), nprocs=2, start_method="spawn")
    both = [load_file(tmp_path / f"{process}.safetensors") for process in range(2)]
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items() if name.startswith("after."))
    mean = {name: (value + both[1][name]) / 2 for name, value in both[0].items()}
    found = {name: value for name, value in mean.items() if name == "loss" or name.startswith("after.")}
    assert_is_the_authors(
        case, found, {name: mean[name] for name in mean.keys() - found.keys() - {"deviation"}}, 1e-10
    )
    keys = torch.nn.functional.normalize(load_file(case / "outputs_f64.safetensors")["k1"], dim=1)
    for half in both:
        torch.testing.assert_close(half["deviation"], keys.std(dim=0, correction=0).mean())


def test_momentum_goes_from_99_percent_to_1_by_half_a_cosine() -> None:
    assert [momentum_at(done) for done in (0, 0.5, 1)] == pytest.approx([0.99, 0.995, 1])
    assert momentum_at(0.25) == pytest.approx(1 - 0.01 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("family", ["arm", "vim"])
def test_all_but_frozen_parts_and_the_momentum_encoder_learn(family: str) -> None:
    model = small(family)
    loss, deviation = model(torch.randn(8, 1, 8, 8))
    loss.backward()
    frozen = ("base_encoder.pos_embed", "base_encoder.patch_embed.", "momentum_encoder.")
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns != name.startswith(frozen) and parameter.requires_grad != name.startswith(frozen), name
    assert deviation == model.feature_std and 0 < deviation <= 1 / math.sqrt(8)


def test_the_momentum_encoder_follows_by_its_parameters_alone() -> None:
    model = small("arm")
    before = {name: value.clone() for name, value in model.momentum_encoder.state_dict().items()}
    for name, value in model.base_encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter += 1
        for buffer in model.base_encoder.buffers():
            buffer += 1
    model.update_momentum_encoder(done=0.5)
    moved = {name for name, _ in model.momentum_encoder.named_parameters()}
    for name, value in model.momentum_encoder.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.005 if name in moved else before[name], msg=name)


def test_the_loss_is_at_chance_where_features_say_nothing_and_a_collapse_shows() -> None:
    model = small("arm")
    loss = contrastive_loss(torch.zeros(6, 8), torch.randn(6, 8), model.temperature)
    assert 2 * loss.item() == pytest.approx(model.loss_at_chance(6)) == pytest.approx(0.8 * math.log(6))
    _, deviation = model(torch.ones(8, 1, 8, 8))  # batch norm makes zeros of what is all the same
    assert deviation < 1e-3


def test_views_look_for_each_other_at_the_models_temperature() -> None:
    model, images = small("arm", temperature=0.7), torch.randn(8, 1, 8, 8)
    one, other = images[:4], images[4:]
    expected = sum(
        contrastive_loss(model.predictor(model.base_encoder(view)), model.momentum_encoder(mate), 0.7).item()
        for view, mate in ((one, other), (other, one))
    )
    assert model(images)[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("family, backbone_class", [("arm", ARM), ("vim", Vim)])
def test_the_encoder_becomes_a_backbone(family: str, backbone_class: type, tmp_path: Path) -> None:
    """All scans, class token and final norm are the trained ones, the feature what the family classifies with."""
    model, images = small(family).eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        for parameter in model.base_encoder.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["objective"] == "moco"
    backbone = from_pretrained(tmp_path, as_backbone=True).eval()
    assert type(backbone) is backbone_class and backbone.num_classes == 0
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), model.forward_encoder(images))
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    larger = from_pretrained(tmp_path, as_backbone=True, img_size=16, num_classes=5)
    assert larger(torch.randn(2, 1, 16, 16)).shape == (2, 5)
    assert torch.equal(larger.cls_token, model.base_encoder.cls_token)
    by_timm = timm.create_model(
        f"{family}_pico_patch2_8",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")},
        num_classes=0,
        **{name: SMALL[name] for name in ("embed_dim", "depth", "d_state")},
    )
    with torch.inference_mode():
        torch.testing.assert_close(by_timm.eval()(images), model.forward_encoder(images))


@pytest.mark.parametrize("family", ["arm", "vim"])
def test_saved_models_are_found_by_their_shapes_and_go_on_with_their_arguments(family: str, tmp_path: Path) -> None:
    model = small(family, temperature=0.5)
    variant = find_variant(model.state_dict())
    assert (variant.architecture, variant.objective) == (f"{family}_pico_patch2_8", "moco")
    assert variant.pretraining == {name: value for name, value in model.config.items() if name != "temperature"}
    model.save_pretrained(tmp_path)
    for sizes, side in (({}, 8), ({"img_size": 12}, 12)):
        loaded = from_pretrained(tmp_path, **sizes)
        assert isinstance(loaded, MoCoPretrain) and loaded.temperature == 0.5
        for name, value in loaded.state_dict().items():
            if side == 8 or "pos_embed" not in name:
                assert torch.equal(value, model.state_dict()[name]), name
        assert loaded(torch.randn(4, 1, side, side))[0].isfinite()


def test_weights_are_drawn_as_the_authors_do_on_any_way() -> None:
    late = small("vim", device="meta")
    late.to_empty(device="cpu").init_weights()
    for model in (small("vim"), late):
        encoder: Any = model.base_encoder
        patches = torch.cat([encoder.pos_embed[:, :8], encoder.pos_embed[:, 9:]], dim=1)
        assert torch.equal(patches, sincos_pos_embed(16, 4, 4))
        assert not encoder.pos_embed[:, 8].any()
        for name, value in model.momentum_encoder.state_dict().items():
            assert torch.equal(value, encoder.state_dict()[name]), name
        for layer in (encoder.head[0], encoder.head[3], model.predictor[0]):
            bound = 1 / math.sqrt(layer.in_features)
            assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias is None
        assert not [name for name in encoder.head[-1].state_dict() if name in ("weight", "bias")]
        assert (
            torch.equal(model.base_encoder.order, model.momentum_encoder.order)
            and model(torch.randn(4, 1, 8, 8))[0] > 0
        )


def test_heads_have_the_published_sizes() -> None:
    sizes = {768: (20_987_904, 2_105_344), 1024: (22_036_480, 2_105_344)}
    for name, width in (("arm_base", 768), ("vim_large", 1024)):
        model = create_pretraining_model(name, "moco", device="meta")
        heads = (model.base_encoder.head, model.predictor)
        assert tuple(sum(p.numel() for p in head.parameters()) for head in heads) == sizes[width]


def test_recomputing_blocks_changes_no_gradient() -> None:
    images, gradients = torch.randn(8, 1, 8, 8), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = small("arm")
        model.set_grad_checkpointing(recompute)
        model(images)[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"backbone": "vmamba"}, "unknown backbone 'vmamba'; choose one of arm, vim"),
        ({"temperature": 0}, "temperature must be above 0 and finite, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"embed_dim": 18}, "multiple of 4, got 18"),
    ],
)
def test_what_cannot_be_built_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("arm", **sizes)
