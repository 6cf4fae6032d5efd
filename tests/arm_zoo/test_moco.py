"""MoCo v3: the authors' numbers, what moves and what stays, features, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from arm_zoo import MoCoPretrain, create_pretraining_model
from arm_zoo.pretraining.moco import contrast, contrastive_loss, follow, mlp, momentum_at
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


@in_both_sets
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_is_the_authors(golden: Path, dtype: torch.dtype) -> None:
    case, tolerances = golden / "mocov3_step", (1e-10, 1e-10) if dtype == torch.float64 else (1e-4, 1e-3)
    parts = nn.ModuleDict({"base_encoder": StandIn(), "momentum_encoder": StandIn(), "predictor": mlp(12, 32, 12)})
    parts.load_state_dict(load_file(case / "state_dict.safetensors"))
    parts["momentum_encoder"].requires_grad_(False)
    parts.to(dtype)
    outputs: list[Tensor] = []
    for name in ("predictor", "momentum_encoder"):
        parts[name].register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    follow(parts["momentum_encoder"], parts["base_encoder"], json.loads((case / "meta.json").read_text())["momentum"])
    views = load_file(case / "inputs.safetensors")
    loss, _ = contrast(*parts.values(), (views["x1"].to(dtype), views["x2"].to(dtype)), temperature=0.2)
    loss.backward()
    found = {"loss": loss.detach(), **dict(zip(("q1", "q2", "k1", "k2"), outputs, strict=True))}
    found |= {f"after.{name}": value for name, value in parts.state_dict().items()}
    for name, wanted in load_file(case / "outputs_f64.safetensors").items():
        limit = tolerances[0] * wanted.abs().max().item()
        torch.testing.assert_close(found[name].double(), wanted.double(), rtol=0, atol=limit, msg=name)
    gradients = load_file(case / "param_grads.safetensors")  # computed in float64, stored in float32
    assert {name for name, parameter in parts.named_parameters() if parameter.grad is not None} == gradients.keys()
    for name, parameter in parts.named_parameters():
        if name in gradients and parameter.grad is not None:
            limit = max(tolerances[1], 1e-7) * gradients[name].abs().max().item()
            torch.testing.assert_close(parameter.grad.float(), gradients[name], rtol=0, atol=limit, msg=name)


def test_momentum_goes_from_99_percent_to_1_by_half_a_cosine() -> None:
    assert [momentum_at(done) for done in (0, 0.5, 1)] == pytest.approx([0.99, 0.995, 1])
    assert momentum_at(0.25) == pytest.approx(1 - 0.01 * (1 + math.sqrt(0.5)) / 2)
