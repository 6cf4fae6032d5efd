"""The arrays that models of all kinds give."""

import pytest
import timm
import torch
from torch import nn

from recipes.errors import RunError
from recipes.probing.outputs import arrays_of, outputs, shapes

OURS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "d_state": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "token"),
    [
        ("arm_pico_patch2_8", {**OURS, "in_chans": 3}, True),
        ("test_vit", {"img_size": 32}, True),
        ("test_vit2", {"img_size": 32}, False),  # its only prefix is a register
        ("test_resnet", {}, False),
        ("test_convnext", {}, False),
    ],
)
def test_one_pass_gives_what_the_model_gives(name: str, arguments: dict[str, object], token: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    side = int(str(arguments.get("img_size", 64)))
    images = torch.randn(2, 3, side, side)
    arrays = arrays_of(model)
    assert ("token" in arrays) == token
    with torch.inference_mode():
        made, alone = outputs(model, images, arrays), outputs(model, images, ["pooled"])
        last, pooled = model.forward_features(images), model(images)
    assert torch.allclose(made["pooled"], pooled, atol=1e-6) and torch.equal(alone["pooled"], pooled)
    patches = made["patches"]
    width = patches.shape[2]
    assert torch.allclose(made["average"][:, :width], patches.mean(dim=1), atol=1e-6)
    if token:
        middle = (last.shape[1] - 1) // 2 if name.startswith("arm") else 0
        assert torch.allclose(made["token"][:, :width], last[:, middle], atol=1e-6)
    blocks = min(4, len(model.feature_info))
    assert made["average"].shape[1] == sum(info["num_chs"] for info in model.feature_info[-blocks:])
    assert {array: tuple(values.shape[1:]) for array, values in made.items()} == shapes(model, (3, side, side))


def test_a_model_without_features_is_told() -> None:
    with pytest.raises(RunError, match=r"gives \(1, 2, 4, 4\) for one image without its head, allowed: \(1, D\)"):
        shapes(nn.Conv2d(3, 2, 1), (3, 4, 4))
    with pytest.raises(RunError, match="the model gives no features of images"):
        shapes(nn.Conv2d(1, 2, 1), (3, 4, 4))
