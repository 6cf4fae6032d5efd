"""Inference of mixers that were changed after an inference: it never computes with what they were before."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from arm_zoo.layers.mixer import MambaMixer
from arm_zoo.ops import scan_backend

IMAGES = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)


def create(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("arm_pico_patch2_8", depth=2, d_state=2, embed_dim=16).eval()
    for mixer in mixers(model):
        nn.init.normal_(mixer.A_log)
    return model


def mixers(model: nn.Module) -> list[MambaMixer]:
    return [part for part in model.modules() if isinstance(part, MambaMixer)]


@torch.no_grad()
def edit(model: nn.Module) -> nn.Module:
    """In place, without a word to anybody."""
    for name, parameter in model.named_parameters():
        if "mixer" in name:
            parameter.mul_(1.5)
    return model


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(IMAGES).square().sum().backward()
    optimizer.step()
    return model.eval()


def average(model: nn.Module) -> nn.Module:
    averaged = AveragedModel(model, multi_avg_fn=lambda own, new, _: torch._foreach_lerp_(own, new, 0.5))
    with torch.no_grad():
        for other in (create(1), create(2)):  # the first is copied
            averaged(IMAGES)
            averaged.update_parameters(other)
    return averaged.module


def copied_and_edited(model: nn.Module) -> nn.Module:
    kept, before = model, infer(model)
    other = edit(copy.deepcopy(model))
    assert torch.equal(infer(kept), before)
    return other


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(edit(model), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def swapped(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data
    return model


def parametrised(model: nn.Module) -> nn.Module:
    """With values that are computed from others at every access."""
    for mixer in mixers(model):
        nn.utils.parametrize.register_parametrization(mixer, "A_log", nn.Softplus())
    infer(model)
    return edit(model)


def resized(model: Any) -> nn.Module:
    """With other tables of orders."""
    model.set_input_size((4, 8))
    assert infer(model, IMAGES[:, :, :4]).isfinite().all()
    model.set_input_size((8, 8))
    return edit(model)


def loaded(model: nn.Module, assign: bool) -> nn.Module:
    model.load_state_dict(create(1).state_dict(), assign=assign)
    return model


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "edited": edit,
    "trained": train,
    "averaged": average,
    "copied": copied_and_edited,
    "pickled": lambda model: pickle.loads(pickle.dumps(edit(model))),
    "saved": saved,
    "swapped": swapped,
    "loaded": lambda model: loaded(model, assign=False),
    "assigned": lambda model: loaded(model, assign=True),
    "rounded": lambda model: edit(model).bfloat16().float(),
    "moved": lambda model: edit(edit(model).double()).float(),
    "emptied and loaded": lambda model: loaded(model.to("meta"), assign=True),
    "parametrised": parametrised,
    "resized": resized,
    "quantised": lambda model: edit(torch.ao.quantization.quantize_dynamic(model, {nn.Linear})),
}


@torch.no_grad()
def infer(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor = IMAGES) -> torch.Tensor:
    return model(images)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")  # of torch.ao
@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str) -> None:
    model = create()
    before = infer(model)
    model = CHANGES[change](model)
    after = infer(model)
    assert not torch.allclose(after, before, rtol=1e-3)
    with scan_backend("reference"):
        torch.testing.assert_close(after, infer(model))


def check_compiled(model: nn.Module, images: torch.Tensor, **options: Any) -> None:
    compiled = torch.compile(model, fullgraph=True, **options)
    with torch.inference_mode():
        before = compiled(images).clone()
        compiled(images)  # a second time, after which CUDA graphs are recorded
        for change in (edit, swapped, CHANGES["loaded"]):
            with torch.inference_mode(False):
                change(model)
            after = compiled(images).clone()
            assert not torch.allclose(after, before, rtol=1e-3)
            with scan_backend("reference"):
                torch.testing.assert_close(after, model(images), rtol=1e-4, atol=1e-5)
            before = after


def test_changes_count_in_compiled_models() -> None:
    check_compiled(create(), IMAGES, backend="aot_eager")


@pytest.mark.gpu
def test_changes_count_in_cuda_graphs() -> None:
    check_compiled(create().cuda(), IMAGES.cuda(), mode="reduce-overhead")


def test_changes_count_in_exported_models() -> None:
    exported = torch.export.export(create(), (IMAGES,)).module()
    infer(exported)
    exported.load_state_dict(create(1).state_dict())
    torch.testing.assert_close(infer(exported), infer(create(1)))


def test_parameters_that_a_call_brings_count() -> None:
    model, other = create(), create(1)
    before = infer(model)
    with torch.no_grad():
        called = torch.func.functional_call(model, dict(other.named_parameters()), (IMAGES,))
    assert torch.equal(called, infer(other)) and torch.equal(infer(model), before)
