"""Two views: Pillow's operations in the authors' order, and a function of seed, epoch and place alone."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from recipes.config import ConfigError, PretrainConfig, load_config
from recipes.data import loader, views
from recipes.data.loader import TrainLoader
from recipes.data.sampling import BatchPlan
from recipes.data.sources import open_source
from recipes.data.transforms import cropped
from recipes.data.views import PIPELINES, Colours, Drawn, Pipeline, drawn
from tests.helpers.decoding import stand_in_for_gpu
from tests.helpers.images import encode, needs_torchcodec, write_folder

CPU = torch.device("cpu")
UNCHANGED = (1.0, 1.0, 1.0, 0.0)  # factors of brightness, contrast and saturation, and a shift of hue


def photograph(size: int = 224) -> torch.Tensor:
    """Something smooth with edges, in colours."""
    y, x = np.mgrid[:size, :size] / size
    values = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * x * y), np.sign(np.sin(20 * (x - y)))])
    return torch.from_numpy(((values + 1) * 127).astype(np.uint8))


def some_of_all_kinds(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Noise, noise of few values, greys, and waves, in turn: (count, channels, height, width)."""
    noise = np.random.default_rng(0).integers(0, 256, (count, channels, height, width))
    rows, columns = np.mgrid[:height, :width]
    for number, image in enumerate(noise):
        if number % 4 == 1:
            image[:] = image // 128 * 215 + 20
        elif number % 4 == 2:
            image[:] = image[:1]
        elif number % 4 == 3:
            image[:] = 128 + 127 * np.sin(columns / (3 + np.arange(channels)[:, None, None]) + rows / 9 + number)
    return torch.from_numpy(noise.astype(np.uint8))


def changes(factors: Sequence[float] = UNCHANGED, order: Sequence[int] = (0, 1, 2, 3), **others: float) -> Drawn:
    """What is drawn of a view, where nothing happens unless it is said."""
    values = np.zeros(views.NUMBERS)
    values[views.FACTORS] = factors
    values[views.TURNS] = np.argsort(order) / 4
    for name, value in others.items():
        values[getattr(views, name)] = value
    return values


def changed(image: torch.Tensor, drawn: Drawn) -> torch.Tensor:
    return pil_to_tensor(Colours().apply_to_image(to_pil_image(image), drawn))


def assert_batch_equals_pillow(images: torch.Tensor, drawn: Sequence[Drawn]) -> None:
    """To the bit, all images in one batch."""
    actual = Colours().apply_to_batch(images.clone(), np.stack(drawn))
    for number, (image, own) in enumerate(zip(images, drawn, strict=True)):
        assert torch.equal(actual[number], changed(image, own)), (number, own)


def shifted_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.array(hue).astype(int) + round(shift * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_colours_are_changed_by_pillow_in_the_order_drawn(order: Sequence[int]) -> None:
    steps = (
        lambda image: ImageEnhance.Brightness(image).enhance(0.8),
        lambda image: ImageEnhance.Contrast(image).enhance(1.2),
        lambda image: ImageEnhance.Color(image).enhance(1.2),
        lambda image: shifted_hue(image, -0.08),
    )
    expected = to_pil_image(photograph())
    for step in order:
        expected = steps[step](expected)
    drawn = changes((0.8, 1.2, 1.2, -0.08), order, IS_JITTERED=1)
    assert torch.equal(changed(photograph(), drawn), pil_to_tensor(expected))
    assert torch.equal(changed(photograph(), changes((0.8, 1.2, 1.2, -0.08), order)), photograph())


def test_grey_blur_and_solarising_are_pillows_and_come_in_this_order() -> None:
    image = to_pil_image(photograph())
    grey = image.convert("L")
    expected = Image.merge("RGB", (grey, grey, grey)).filter(ImageFilter.GaussianBlur(1.05))
    drawn = changes(IS_GREY=1, IS_BLURRED=1, SIGMA=1.05)
    assert torch.equal(changed(photograph(), drawn), pil_to_tensor(expected))
    drawn[views.IS_SOLARISED] = 1
    assert torch.equal(changed(photograph(), drawn), pil_to_tensor(ImageOps.solarize(expected, 128)))
    assert torch.equal(changed(photograph(), changes(SIGMA=1.05)), photograph())


@pytest.mark.parametrize("shape", [(3, 24, 31), (1, 24, 31), (3, 1, 9), (3, 9, 1), (3, 2, 3), (1, 1, 1)], ids=str)
def test_batches_are_changed_as_by_pillow_at_the_extremes(shape: tuple[int, int, int]) -> None:
    """Each operation alone, at its weakest and its strongest and beyond, and all of them in every order."""
    alone = [
        changes([factor if number == own else UNCHANGED[number] for number in range(4)], IS_JITTERED=1)
        for own, (low, high) in enumerate(zip(views.LOWEST, views.HIGHEST, strict=True))
        for factor in (low, (2 * low + high) / 3, high, 3 * high, 0.0)
    ]
    blurred = [changes(IS_BLURRED=1, SIGMA=sigma) for sigma in (0.001, 0.1, 0.57, 1.0, 2.0, 3.7, 9.0)]
    flags = [changes(), changes(IS_GREY=1), changes(IS_SOLARISED=1)]
    ordered = [
        changes(
            factors, order, IS_JITTERED=1, IS_GREY=number % 5 == 0, IS_BLURRED=1, SIGMA=0.4, IS_SOLARISED=number % 2
        )
        for factors in (views.LOWEST, views.HIGHEST)
        for number, order in enumerate(permutations(range(4)))
    ]
    drawn = [own for own in (*alone, *blurred, *flags, *ordered) for _ in range(4)]
    assert_batch_equals_pillow(some_of_all_kinds(len(drawn), *shape), drawn)


def test_drawn_batches_are_changed_as_by_pillow() -> None:
    """Large images, too, whose blurs reach farther and whose means have larger sums."""
    for size, count in ((64, 150), (230, 8)):
        made = [drawn(pipeline, 0, 1, range(count), size) for pipeline in PIPELINES]
        assert_batch_equals_pillow(some_of_all_kinds(2 * count, 3, size, size - 1), [*np.concatenate(made)])


def test_every_colour_has_its_place_in_the_tables() -> None:
    colours = torch.arange(2**24, dtype=torch.int32).view(torch.uint8).view(4096, 4096, 4)[::7, ::5, :3].movedim(2, 0)
    drawn = changes((1.0, 1.0, 1.0, 0.07), IS_JITTERED=1)
    assert_batch_equals_pillow(colours.contiguous()[None], [drawn])


def test_a_batch_without_changes_stays() -> None:
    images = some_of_all_kinds(4, 3, 8, 9)
    assert torch.equal(Colours().apply_to_batch(images.clone(), np.stack([changes()] * 4)), images)
    assert Colours().apply_to_batch(images[:0], np.empty((0, views.NUMBERS))).shape == (0, 3, 8, 9)


class Launches(TorchDispatchMode):
    """Counts what would start a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operator.is_view and "empty" not in operator.name()
        return operator(*args, **(kwargs or {}))


def test_a_batch_takes_few_launches() -> None:
    """However many images it has."""
    made = np.concatenate([drawn(pipeline, 0, 1, range(512), 224) for pipeline in PIPELINES])
    images = some_of_all_kinds(1024, 3, 4, 4)
    Colours().apply_to_batch(images, made)  # makes the tables
    with Launches() as launches:
        Colours().apply_to_batch(images, made)
    assert 100 < launches.count < 150


def test_the_blur_is_as_wide_in_small_images_as_in_large_ones() -> None:
    small, large = (drawn(PIPELINES[0], 0, 0, range(400), side)[:, views.SIGMA] for side in (56, 224))
    assert np.array_equal(4 * small, large) and 0.1 <= large.min() < 0.12 and 1.98 < large.max() <= 2.0


def test_changes_are_as_probable_and_as_strong_as_the_authors() -> None:
    for pipeline, blur, solarise in ((PIPELINES[0], 1.0, 0.0), (PIPELINES[1], 0.1, 0.2)):
        numbers = drawn(pipeline, 0, 0, range(20_000), 224)
        shares = {views.IS_JITTERED: 0.8, views.IS_GREY: 0.2, views.IS_BLURRED: blur, views.IS_SOLARISED: solarise}
        for whether, share in shares.items():
            assert set(numbers[:, whether]) <= {0.0, 1.0} and abs(numbers[:, whether].mean() - share) < 0.01
        factors = numbers[:, views.FACTORS]
        assert np.allclose(factors.min(axis=0), (0.6, 0.6, 0.8, -0.1), atol=1e-3)
        assert np.allclose(factors.max(axis=0), (1.4, 1.4, 1.2, 0.1), atol=1e-3)
        assert np.allclose(factors.mean(axis=0), (1, 1, 1, 0), atol=1e-2)
        first = numbers[:, views.TURNS].argmin(axis=1)
        assert np.allclose(np.bincount(first) / len(first), 0.25, atol=0.015)


def test_crops_are_bilinear_as_pillows_but_for_rounding() -> None:
    box = (10, 20, 150, 170)
    actual = cropped(photograph(), box, (64, 64), InterpolationMode.BILINEAR)
    image = to_pil_image(photograph()).crop((20, 10, 190, 160)).resize((64, 64), Image.Resampling.BILINEAR)
    difference = (actual.int() - pil_to_tensor(image).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.05


def test_numbers_are_a_function_of_seed_epoch_and_place() -> None:
    def some(seed: int = 1, epoch: int = 2, places: Sequence[int] = range(500)) -> NDArray[np.float64]:
        numbers = drawn(Pipeline(0.5, 0.5), seed, epoch, places, 224)
        spread = numbers.std(axis=0)
        assert spread.min() > 0
        return (numbers - numbers.mean(axis=0)) / spread if len(places) > 2 else numbers

    one, two = (drawn(PIPELINES[1], 1, 2, places, 64) for places in (range(500), [7, 8]))
    assert np.array_equal(one[7:9], two) and np.array_equal(some(), some())
    for other in (some(seed=2), some(epoch=3), some(places=range(500, 1000))):
        assert abs(np.corrcoef(some().ravel(), other.ravel())[0, 1]) < 0.05
    correlations = np.corrcoef(some().T) - np.eye(views.NUMBERS)
    assert np.abs(correlations).max() < 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_folder(root / "train", {"cat": 14, "dog": 10})
    return root


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of odd sizes, of which every third is no JPEG file and one cannot be decoded."""
    folder = tmp_path_factory.mktemp("odd") / "train" / "cat"
    folder.mkdir(parents=True)
    for number, image in enumerate(some_of_all_kinds(24, 3, 41, 37)):
        picture = to_pil_image(image[:, : 41 - number, : 5 + number])
        kind = "PNG" if number % 3 == 0 else "JPEG"
        content = encode(picture, kind, **({} if kind == "PNG" else {"subsampling": "4:4:4"}))
        (folder / f"{number:02}.{kind.lower()}").write_bytes(content[: 60 if number == 5 else None])
    return folder.parent.parent


def config(source: Path | str, *overrides: str) -> PretrainConfig:
    settings = ["objective=moco", "model=arm_pico", "output_dir=unused", "warmup_epochs=0", "global_batch=12"]
    settings += [f"data.source={source}", "data.workers=0", "data.random_crop=[0.2,1]", "data.flip=0.5"]
    return load_config(PretrainConfig, None, [*settings, *overrides])


def create(
    settings: PretrainConfig, process: int = 0, processes: int = 1, device: torch.device = CPU, size: int = 16
) -> TrainLoader:
    source = open_source(settings.data, labels_needed=False)
    plan = BatchPlan(settings.global_batch // processes, 1)
    return TrainLoader(source, settings, plan, (size, size), process, processes, device)


def views_by_place(settings: PretrainConfig, processes: int = 1, **where: Any) -> dict[int, torch.Tensor]:
    """Of each image of an epoch (2, C, H, W)."""
    found = {}
    for process in range(processes):
        for step in create(settings, process, processes, **where).epoch(1):
            for batch in step:
                assert len(batch.images) == 2 * len(batch.indices) == 2 * len(batch.classes) == len(batch.seeds)
                first, second = batch.images.cpu().chunk(2)
                places = batch.indices.tolist()
                assert not found.keys() & set(places)
                found.update(zip(places, torch.stack([first, second], dim=1), strict=True))
    return found


@pytest.mark.parametrize(
    "overrides, processes", [(["data.workers=1"], 1), (["data.cache=memory"], 2), (["global_batch=8"], 1)]
)
def test_views_are_the_same_however_they_are_loaded(folder: Path, overrides: list[str], processes: int) -> None:
    expected, actual = views_by_place(config(folder)), views_by_place(config(folder, *overrides), processes)
    assert actual.keys() == expected.keys() == set(range(24))
    assert all(torch.equal(actual[place], expected[place]) for place in expected)
    assert not any(torch.equal(*both) for both in expected.values())


@pytest.mark.parametrize(
    "overrides", [["cache=gpu"], ["cache=gpu", "workers=1"], ["decode=gpu"], ["decode=gpu", "cache=memory"]]
)
def test_views_made_on_the_device_are_those_that_workers_make(
    overrides: list[str], odd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where the resize is, over an epoch of both views, for any number of processes, erased and turned."""
    settings = ["data.erase=0.5", "data.max_rotation=20", "data.max_undecodable=0.1"]
    expected = views_by_place(config(odd_folder, *settings, "data.decode=cpu"))
    stand_in_for_gpu(monkeypatch)
    made_on_device = config(odd_folder, *settings, *(f"data.{override}" for override in overrides))
    for processes in (1, 2):
        actual = views_by_place(made_on_device, processes)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[place], expected[place]) for place in expected)


def test_grey_views_made_on_the_device_are_those_that_workers_make(monkeypatch: pytest.MonkeyPatch) -> None:
    [expected] = next(create(config("digits", "global_batch=128", "data.decode=cpu")).epoch(0))
    stand_in_for_gpu(monkeypatch)
    for override in ("data.cache=gpu", "data.decode=gpu"):
        [actual] = next(create(config("digits", "global_batch=128", override)).epoch(0))
        assert actual.images.shape == (256, 1, 16, 16) and torch.equal(actual.images, expected.images)


@pytest.mark.parametrize("override", ["data.cache=gpu", "data.decode=gpu"])
def test_views_go_on_at_any_step_on_the_device(
    odd_folder: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_gpu(monkeypatch)
    settings = config(odd_folder, override, "data.max_undecodable=0.1", "global_batch=6")
    whole = create(settings)
    steps = [[batch.images for step in whole.epoch(epoch) for batch in step] for epoch in range(2)]
    resumed = create(settings)
    for epoch, first in ((1, 2), (0, 1), (1, 0)):
        again = [batch.images for step in resumed.epoch(epoch, first) for batch in step]
        assert len(again) == 4 - first and all(map(torch.equal, again, steps[epoch][first:]))


def check_made_by_the_kernel(folder: Path) -> None:
    """In Triton's interpreter: the same views."""
    settings = ["data.max_undecodable=0.1", "global_batch=4"]
    [expected] = next(create(config(folder, *settings)).epoch(0))
    setattr(loader, "keeps_on_gpu", lambda where, device: where == "gpu")  # noqa: B010
    [made] = next(create(config(folder, *settings, "data.cache=gpu")).epoch(0))
    assert torch.equal(expected.indices, made.indices)
    assert torch.equal(expected.images, made.images)


@pytest.mark.slow
def test_views_are_cropped_by_the_kernel(odd_folder: Path) -> None:
    pytest.importorskip("triton", reason="no triton in this build of torch")
    script = "import sys; from tests.recipes.data.test_views import *; check_made_by_the_kernel(Path(sys.argv[1]))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, str(odd_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_the_gpu_changes_images_as_the_cpu_and_the_host_does_not_wait() -> None:
    """To the bit."""
    made = np.concatenate([drawn(pipeline, 0, 1, range(64), 224) for pipeline in PIPELINES])
    images = some_of_all_kinds(128, 3, 64, 47)
    on_gpu = images.cuda()
    Colours().apply_to_batch(on_gpu.clone(), made)  # copies the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = Colours().apply_to_batch(on_gpu, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), Colours().apply_to_batch(images, made))


@pytest.mark.gpu
@pytest.mark.parametrize("override", ["data.cache=gpu", pytest.param("data.decode=gpu", marks=needs_torchcodec)])
@pytest.mark.parametrize("size", [16, 224])
def test_views_made_on_the_gpu_are_those_of_the_cpu(odd_folder: Path, override: str, size: int) -> None:
    """But for a grey level here and there, where the resizes round differently; two decoders differ in more."""
    expected = views_by_place(config(odd_folder, "data.max_undecodable=0.1"), size=size)
    made = config(odd_folder, "data.max_undecodable=0.1", override)
    actual = views_by_place(made, device=torch.device("cuda"), size=size)
    assert actual.keys() == expected.keys()
    levels = torch.cat([(actual[place] - expected[place]).abs() * 255 / 4 for place in expected])  # 1 / std is above 4
    assert (levels < (0.01 if override == "data.cache=gpu" else 3.5)).float().mean() > 0.99


@pytest.mark.gpu
def test_a_step_of_kept_views_does_not_wait_for_the_gpu(odd_folder: Path) -> None:
    run = create(config(odd_folder, "data.max_undecodable=0.1", "data.cache=gpu"), device=torch.device("cuda"))
    steps = run.epoch(0)
    next(steps)  # fills the cache, compiles the kernel and copies the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        [batch] = next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.images.is_cuda and batch.images.shape == (24, 3, 16, 16)


def test_what_views_do_not_take_is_refused_with_what_to_type(folder: Path) -> None:
    overrides = {
        "max_batch_per_device": ("6", "null"),
        "fsdp": ("true", "false"),
        "data.randaugment": ("rand-m9", "null"),
    }
    with pytest.raises(ConfigError) as error:
        config(folder, *(f"{key}={value}" for key, (value, _) in overrides.items()))
    assert error.value.problems.keys() == overrides.keys()
    for key, (_, allowed) in overrides.items():
        message = error.value.problems[key]
        assert f"{key} is " in message and "objective is moco, wh" in message and message.endswith(f"{key}={allowed}")
