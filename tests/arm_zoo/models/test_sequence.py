"""What families on `SequenceBackbone` may bring of their own."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay

from arm_zoo.__main__ import main
from tests.helpers.family import Sandwich


def test_a_family_may_have_its_own_block(toy: str) -> None:
    model = timm.create_model(toy, img_size=(16, 24), num_classes=3).eval()
    assert {type(block) for block in model.blocks} == {Sandwich}
    x = torch.randn(2, 3, 16, 24)
    tokens, order = model._embed(x)
    assert order.shape == (2, 25)
    for block in model.blocks:
        tokens = block(tokens, order)
    assert torch.equal(model.forward_features(x), model.norm(tokens))
    assert [tuple(y.shape) for y in model.forward_intermediates(x, 2, intermediates_only=True)] == [(2, 16, 4, 6)] * 2
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    model.set_grad_checkpointing()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mixers_are_scaled_and_left_undecayed_in_any_block(toy: str) -> None:
    model = timm.create_model(toy)
    width, depth = model.embed_dim, len(model.blocks)
    for block in model.blocks:  # PyTorch's bound, over the square root of the depth
        assert 0.9 < block.scan.out_proj.weight.abs().max() * (width * depth) ** 0.5 <= 1
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    decayed = {name.split(".")[-1] for name, parameter in model.named_parameters() if decay[id(parameter)]}
    assert decayed == {"weight", "conv_weight", "x_proj_weight", "dt_proj_weight", "A_log"}
    assert {f"blocks.3.scan.{name}" for name in ("D", "conv_bias", "dt_proj_bias")} < model.no_weight_decay()


def test_info_leaves_out_a_paper_that_is_not_there(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", toy]) == 0
    printed = capsys.readouterr().out
    assert "paper" not in printed and "None" not in printed and "  license        unknown\n" in printed
