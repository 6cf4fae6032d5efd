"""The attentive probe on patches of which one tells the class."""

import logging
import math

import pytest
import torch
from torch.nn import functional as F

from arm_zoo.heads.attentive import AttentiveClassifier
from recipes.errors import RunError
from recipes.probing import attentive
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted
from tests.helpers.probing import extracted

CPU = torch.device("cpu")


def told(images: int, seed: int) -> Extracted:
    """Patches of noise, and in a random place one marked by its first column, whose other columns are the class's."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(images) % 4
    patches = torch.randn(images, 16, 12, generator=generator)
    place = torch.randint(16, (images,), generator=generator)
    patches[torch.arange(images), place] = 0.0
    patches[torch.arange(images), place, 0] = 12.0
    patches[torch.arange(images), place, 1 + classes] = 8.0
    return extracted(classes, 12, patches=patches.half())


def test_the_patch_that_tells_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive, "BATCH", 32)
    train, test = told(800, 0), told(200, 1)
    head = attentive.fit(train, epochs=15, seed=0, device=CPU)
    assert attentive.right(head, test, CPU) > 150
    assert attentive.right(head, test._replace(classes=test.classes.roll(1)), CPU) < 50


def test_it_learns_by_adamw_along_a_cosine_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive, "BATCH", 32)
    split = told(80, 0)  # three batches
    found = attentive.fit(split, epochs=2, seed=3, device=CPU)
    torch.manual_seed(3)
    head, generator = AttentiveClassifier(12, 4), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.1)
    batches = [batch for _ in range(2) for batch in torch.randperm(80, generator=generator).split(32)]
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 6)) / 2
        optimizer.zero_grad()
        F.cross_entropy(head(split.arrays["patches"][batch].float()), split.classes[batch]).backward()
        optimizer.step()
    for name, value in head.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, msg=name)
    assert not found.training


def test_the_seed_decides() -> None:
    split = told(100, 0)
    state = torch.get_rng_state()
    first, again, other = (attentive.fit(split, epochs=1, seed=seed, device=CPU).head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_damaged_images_have_no_part() -> None:
    split = told(40, 0)
    split.arrays["patches"][::4] = torch.nan
    rows = torch.arange(40)[torch.arange(40) % 4 > 0]
    kept = split._replace(rows=rows, skipped=10)
    [score] = attentive.score(kept, kept, ProbeConfig(attentive_epochs=1), CPU)
    assert score.settings == {"rate": 1e-3, "epochs": 1} and round(score.top1 * 30 / 100, 6).is_integer()
    with pytest.raises(RunError, match="loss is no finite number"):
        attentive.score(split, split, ProbeConfig(attentive_epochs=1), CPU)


def test_a_model_without_patches_is_told(caplog: pytest.LogCaptureFixture) -> None:
    split = extracted(torch.arange(4), 3, pooled=torch.randn(4, 3))
    with caplog.at_level(logging.WARNING):
        assert attentive.score(split, split, ProbeConfig(), CPU) == []
    assert "gives no patches: there is no attentive probe" in caplog.text
