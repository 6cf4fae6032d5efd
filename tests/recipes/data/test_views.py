"""Two views: Pillow's operations in the authors' order, and a function of seed, epoch and place alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from recipes.config import ConfigError, PretrainConfig, load_config
from recipes.data import views
from recipes.data.loader import TrainLoader
from recipes.data.sampling import BatchPlan
from recipes.data.sources import open_source
from recipes.data.transforms import cropped
from recipes.data.views import PIPELINES, Pipeline, changed, drawn
from tests.helpers.images import write_folder

NOTHING = Pipeline(blur=0.0, solarise=0.0)
NEVER = 0.999


def photograph(size: int = 224) -> torch.Tensor:
    """Something smooth with edges, in colours."""
    y, x = np.mgrid[:size, :size] / size
    values = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * x * y), np.sign(np.sin(20 * (x - y)))])
    return torch.from_numpy(((values + 1) * 127).astype(np.uint8))


def numbers(strengths: Sequence[float] = (0.5,) * 4, order: Sequence[int] = (0, 1, 2, 3), **drawn: float) -> Any:
    """What is drawn of a view, where nothing happens unless it is said."""
    values = np.full(views.NUMBERS, NEVER)
    values[views.STRENGTHS] = strengths
    values[views.PLACES] = np.argsort(order) / 4
    for name, value in drawn.items():
        values[getattr(views, name)] = value
    return values


def shifted_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.array(hue).astype(int) + round(shift * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_colours_are_changed_by_pillow_in_the_order_drawn(order: Sequence[int]) -> None:
    strengths = (0.25, 0.75, 1.0, 0.1)  # of factors between 0.6 and 1.4, twice; 0.8 and 1.2; shifts up to 0.1
    steps = (
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: ImageEnhance.Contrast(image).enhance(1.2),
        lambda image: ImageEnhance.Color(image).enhance(1.2),
        lambda image: shifted_hue(image, -0.08),
    )
    expected = to_pil_image(photograph())
    for step in order:
        expected = steps[step](expected)
    actual = changed(photograph(), NOTHING, numbers(strengths, order, IS_JITTERED=0.79))
    assert torch.equal(actual, pil_to_tensor(expected))
    assert torch.equal(changed(photograph(), NOTHING, numbers(strengths, order, IS_JITTERED=0.81)), photograph())


def test_grey_blur_and_solarising_are_pillows_and_come_in_this_order() -> None:
    image = to_pil_image(photograph())
    grey = image.convert("L")
    expected = Image.merge("RGB", (grey, grey, grey)).filter(ImageFilter.GaussianBlur(0.1 + 1.9 * 0.5))
    blurred = changed(photograph(), PIPELINES[0], numbers(IS_GREY=0.1, IS_BLURRED=NEVER, SIGMA=0.5, IS_SOLARISED=0))
    assert torch.equal(blurred, pil_to_tensor(expected))  # the first view always is, and is never solarised
    second = PIPELINES[1]
    both = changed(photograph(), second, numbers(IS_GREY=0.1, IS_BLURRED=0.09, SIGMA=0.5, IS_SOLARISED=0.19))
    assert torch.equal(both, pil_to_tensor(ImageOps.solarize(expected, 128)))
    neither = numbers(IS_GREY=0.21, IS_BLURRED=0.11, IS_SOLARISED=0.21)
    assert torch.equal(changed(photograph(), second, neither), photograph())


def test_the_blur_is_as_wide_in_small_images_as_in_large_ones() -> None:
    small = changed(photograph(56), PIPELINES[0], numbers(SIGMA=1.0))
    assert torch.equal(small, pil_to_tensor(to_pil_image(photograph(56)).filter(ImageFilter.GaussianBlur(0.5))))


def test_grey_images_stay_grey() -> None:
    image = photograph()[:1]
    for pipeline in PIPELINES:
        drawn = numbers((0.9,) * 4, IS_JITTERED=0, IS_GREY=0, IS_BLURRED=0, SIGMA=0.5, IS_SOLARISED=0)
        assert changed(image, pipeline, drawn).shape == image.shape


def test_crops_are_bilinear_as_pillows_but_for_rounding() -> None:
    box = (10, 20, 150, 170)
    actual = cropped(photograph(), box, (64, 64), InterpolationMode.BILINEAR)
    image = to_pil_image(photograph()).crop((20, 10, 190, 160)).resize((64, 64), Image.Resampling.BILINEAR)
    difference = (actual.int() - pil_to_tensor(image).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.05


def test_numbers_are_a_function_of_seed_epoch_and_place() -> None:
    def some(seed: int = 1, epoch: int = 2, places: Sequence[int] = range(500)) -> NDArray[np.float64]:
        return drawn(seed, epoch, places)

    assert np.array_equal(some()[7:9], some(places=[7, 8])) and np.array_equal(some(), some())
    for other in (some(seed=2), some(epoch=3), some(places=range(500, 1000))):
        assert abs(np.corrcoef(some().ravel(), other.ravel())[0, 1]) < 0.05
    assert np.abs(some().mean(axis=0) - 0.5).max() < 0.06
    correlations = np.corrcoef(some().T) - np.eye(views.NUMBERS)
    assert np.abs(correlations).max() < 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", {"cat": 14, "dog": 10})
    return root


def config(folder: Path, *overrides: str) -> PretrainConfig:
    settings = ["objective=moco", "model=arm_pico", "output_dir=unused", "warmup_epochs=0", "global_batch=12"]
    settings += [f"data.source={folder}", "data.workers=0", "data.random_crop=[0.2,1]", "data.flip=0.5"]
    return load_config(PretrainConfig, None, [*settings, *overrides])


def views_by_place(settings: PretrainConfig, processes: int = 1) -> dict[int, torch.Tensor]:
    """Of each image of an epoch (2, C, H, W)."""
    found = {}
    for process in range(processes):
        source, plan = (
            open_source(settings.data, labels_needed=False),
            BatchPlan(settings.global_batch // processes, 1),
        )
        loader = TrainLoader(source, settings, plan, (16, 16), process, processes, torch.device("cpu"))
        for step in loader.epoch(1):
            for batch in step:
                assert len(batch.images) == 2 * len(batch.indices) == 2 * len(batch.classes)
                first, second = batch.images.chunk(2)
                found.update(zip(batch.indices.tolist(), torch.stack([first, second], dim=1), strict=True))
    return found


@pytest.mark.parametrize(
    "overrides, processes", [(["data.workers=1"], 1), (["data.cache=memory"], 2), (["global_batch=8"], 1)]
)
def test_views_are_the_same_however_they_are_loaded(folder: Path, overrides: list[str], processes: int) -> None:
    expected, actual = views_by_place(config(folder)), views_by_place(config(folder, *overrides), processes)
    assert actual.keys() == expected.keys() == set(range(24))
    assert all(torch.equal(actual[place], expected[place]) for place in expected)
    assert not any(torch.equal(*both) for both in expected.values())


def test_what_views_do_not_take_is_refused_with_what_to_type(folder: Path) -> None:
    overrides = {
        "max_batch_per_device": ("6", "null"),
        "fsdp": ("true", "false"),
        "data.decode": ("gpu", "auto"),
        "data.cache": ("gpu", "memory"),
        "data.randaugment": ("rand-m9", "null"),
    }
    with pytest.raises(ConfigError) as error:
        config(folder, *(f"{key}={value}" for key, (value, _) in overrides.items()))
    assert error.value.problems.keys() == overrides.keys()
    for key, (_, allowed) in overrides.items():
        message = error.value.problems[key]
        assert f"{key} is " in message and "objective is moco, wh" in message and message.endswith(f"{key}={allowed}")
