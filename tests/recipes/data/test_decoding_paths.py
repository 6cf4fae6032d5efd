"""JPEG files decoded by workers or on the GPU: the same images, of good files and of odd and damaged ones."""

import io
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_STD

from arm_zoo.images import decode
from arm_zoo.images.decode import UndecodableImage, decode_tensor
from arm_zoo.images.errors import SourceError
from recipes.config import ConfigError, PretrainConfig, load_config
from recipes.data import batches as loading
from recipes.data import gpu_decode, loader
from recipes.data.batches import Batch
from recipes.data.loader import ScoringLoader, TrainLoader
from recipes.data.sampling import BatchPlan, ScoringOrder
from recipes.data.sources import open_source
from recipes.errors import RunError
from recipes.signals import StopWaiting
from tests.helpers import images
from tests.helpers.decoding import stand_in_for_gpu
from tests.helpers.images import needs_torchcodec, pixels

SIZE = (20, 20)
VARIED = ["data.random_crop=[0.2,1]", "data.flip=0.5", "data.erase=0.5", "data.max_rotation=20"]
STREAM = ["data.streaming=true", "data.num_classes=2", "data.shuffle_buffer=8"]
PREPARATIONS = [{}, {"crop_mode": "squash", "interpolation": "bilinear"}, {"crop_pct": 1.0}]  # for scoring
RANDAUGMENT = "data.randaugment=rand-m9-mstd0.5-inc1"
CPU = torch.device("cpu")


def odd_files() -> Iterator[bytes]:
    """30 files, some of which the GPU is not asked to decode, and three that nobody can decode."""
    encode = partial(images.encode, subsampling="4:4:4")
    colour = Image.fromarray(pixels(3)).resize((60, 44))
    turned = Image.Exif()
    turned[0x0112] = 6
    yield encode(colour, "JPEG", exif=turned)
    yield encode(colour.convert("CMYK"), "JPEG")
    yield encode(colour, "PNG")
    yield encode(colour.convert("L"), "JPEG")
    yield encode(colour, "JPEG", progressive=True)
    yield encode(colour, "WEBP", lossless=True)
    yield b"gone"
    yield encode(colour, "JPEG")[:-300]
    yield encode(colour.resize((300, 200)), "JPEG")  # more pixels than are allowed
    for number in range(21):
        yield encode(Image.fromarray(pixels(number)), "JPEG", quality=95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for number, file in enumerate(odd_files()):
        path = root / f"{'even' if number % 2 == 0 else 'odd'}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file)
    return root


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a stream."""
    path = tmp_path_factory.mktemp("tar") / "train-0.tar"
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(odd_files()):
            for name, data in ((f"{number:02}.jpg", content), (f"{number:02}.cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def configure(source: Path, *overrides: str, batch: int = 10) -> PretrainConfig:
    settings = ["model=arm_pico", "output_dir=unused", "warmup_epochs=0", f"data.source={source}", "data.workers=0"]
    more = [
        f"data.validation={source}",
        "data.max_undecodable=0.2",
        "data.max_pixels=50000",
        f"global_batch={batch}",
        "epochs=3",
    ]
    return load_config(PretrainConfig, None, [*settings, *more, *overrides])


def create(config: PretrainConfig, process: int = 0, processes: int = 1, device: torch.device = CPU) -> TrainLoader:
    source = open_source(config.data, labels_needed=True)
    return TrainLoader(
        source, config, BatchPlan(config.global_batch // processes, 1), SIZE, process, processes, device
    )


def batches(loader: TrainLoader, epoch: int = 0, first_step: int = 0) -> list[Batch]:
    return list(chain.from_iterable(loader.epoch(epoch, first_step)))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.classes, two.classes)
        assert torch.equal(one.indices, two.indices)
        assert sorted(one.undecodable) == sorted(two.undecodable)


def both(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, **share: int) -> tuple[list[Batch], list[Batch]]:
    """An epoch whose images are decoded by workers, and by the stand-in for a GPU."""
    by_workers = batches(create(config, **share))
    stand_in_for_gpu(monkeypatch)
    return by_workers, batches(create(config, **share))


@pytest.mark.parametrize("objective, workers", [("autoregressive", 0), ("autoregressive", 2), ("moco", 0)])
@pytest.mark.parametrize("source", ["folder", "tar"])
def test_both_paths_train_on_the_same_images(
    source: str, objective: str, workers: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [f"objective={objective}", f"data.workers={workers}", *(STREAM if source == "tar" else [])]
    config = configure(request.getfixturevalue(source), *VARIED, *more)
    by_workers, by_gpu = both(config, monkeypatch)
    assert_equal(by_workers, by_gpu)
    assert len({line for batch in by_gpu for line in batch.undecodable}) == 3


@pytest.mark.parametrize("overrides", [(), ("data.flip=0.5",), ("data.random_crop=[0.2,1]", RANDAUGMENT)])
def test_each_kind_of_augmentation_is_the_same_on_both_paths(
    folder: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_workers, by_gpu = both(configure(folder, *overrides), monkeypatch)
    if RANDAUGMENT not in overrides:
        assert_equal(by_workers, by_gpu)
    for one, two in zip(by_workers, by_gpu, strict=True):
        levels = (one.images - two.images).abs() * 255 / 4  # 1 / std is above 4
        assert (levels <= 1.2).float().mean() > 0.98


@pytest.mark.parametrize("objective", ["autoregressive", "moco"])  # one view of each image, and two
def test_what_the_gpu_refuses_is_decoded_or_named_here(
    folder: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(folder, *VARIED, f"objective={objective}")
    expected = batches(create(config))
    stand_in_for_gpu(monkeypatch)
    by_gpu: Callable[..., Any] = gpu_decode.decode
    monkeypatch.setattr(gpu_decode, "decode", lambda files, device: [None, *by_gpu(files[1:], device)])
    assert_equal(expected, batches(create(config)))


@pytest.mark.parametrize("objective", ["autoregressive", "moco"])
@pytest.mark.parametrize("source", ["folder", "tar"])
def test_damage_that_only_decoding_shows_is_named_and_replaced_as_by_workers(
    source: str, objective: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers promise images that none of the decoders gets."""
    more = [f"objective={objective}", "data.max_undecodable=0.9", *(STREAM if source == "tar" else [])]
    config = configure(request.getfixturevalue(source), *VARIED, *more)

    def by_cpu(content: bytes, name: str, mode: str, max_pixels: int) -> torch.Tensor:
        if len(content) % 3 == 0:
            raise UndecodableImage(name, "damaged")
        return decode_tensor(content, name, mode, max_pixels)

    monkeypatch.setattr(loading, "decode_tensor", by_cpu)
    expected = batches(create(config))
    assert len({line for batch in expected for line in batch.undecodable}) > 5
    stand_in_for_gpu(monkeypatch)
    by_gpu: Callable[..., Any] = gpu_decode.decode
    monkeypatch.setattr(
        gpu_decode,
        "decode",
        lambda files, device: [None if len(f) % 3 == 0 else by_gpu([f], device)[0] for f in files],
    )
    assert_equal(expected, batches(create(config)))


def test_several_processes_get_each_image_once_on_the_gpu_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(folder, *VARIED)
    whole = {
        i: image
        for batch in batches(create(config))
        for i, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }
    stand_in_for_gpu(monkeypatch)
    shares = [batches(create(config, process, 5)) for process in range(5)]
    found = [
        (i, image) for share in shares for b in share for i, image in zip(b.indices.tolist(), b.images, strict=True)
    ]
    assert sorted(i for i, _ in found) == sorted(whole) == list(range(30))
    assert all(torch.equal(image, whole[i]) for i, image in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_at_any_step_on_the_gpu_path(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_gpu(monkeypatch)
    config = configure(folder, *VARIED, f"data.workers={workers}", batch=6)
    run = create(config)
    uninterrupted = [batches(run, epoch) for epoch in range(3)]
    resumed = create(config)
    for epoch, step in ((1, 3), (0, 0), (2, 4), (1, 1)):  # each time with a step ahead that is not wanted
        steps = resumed.epoch(epoch, step)
        [batch] = next(steps)
        resumed.look_ahead()
        assert_equal([batch], [uninterrupted[epoch][step]])
    assert_equal(list(chain.from_iterable(steps)), uninterrupted[1][2:])
    assert_equal(batches(resumed, 2), uninterrupted[2])


def test_a_step_is_made_ahead_and_its_lines_come_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(configure(folder, "seed=1"))
    made: list[int] = []
    finish = run._finishing.finish
    monkeypatch.setattr(run._finishing, "finish", lambda loaded: made.append(1) or finish(loaded))
    steps = run.epoch(0)
    for number in range(3):
        [batch] = next(steps)
        assert len(made) == number + 1
        known = set(run.undecodable)
        assert set(batch.undecodable) <= known
        run.look_ahead()
        run.look_ahead()  # once is enough
        assert len(made) == number + 2 and run.undecodable == known
    assert len(run.undecodable) == 3
    assert list(steps) == []
    next(run.epoch(1))
    assert len(made) == 4  # the next epoch's first step was there


@pytest.mark.parametrize("error", [RunError("a process that decodes images was killed"), StopWaiting()])
def test_what_prevents_a_step_comes_when_it_is_asked_for(
    folder: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create(configure(folder))
    finish = run._finishing.finish
    steps = run.epoch(0)
    next(steps)

    def fail(loaded: Any) -> Batch:
        raise error

    run.look_ahead()
    monkeypatch.setattr(run._finishing, "finish", fail)
    next(steps)
    run.look_ahead()
    with pytest.raises(type(error)):
        next(steps)
    monkeypatch.setattr(run._finishing, "finish", finish)


def test_a_gpu_asked_for_in_vain_is_told(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.decode is gpu but device is cpu; allowed: data.decode=auto, or device"
    ):
        configure(folder, "data.decode=gpu", "device=cpu")
    with pytest.raises(RunError, match=r"data.decode is gpu, but the run's device is cpu; allowed: data.decode=auto"):
        create(configure(folder, "data.decode=gpu"))
    with pytest.raises(ConfigError, match="allowed: "):
        configure(folder, "data.decode=tpu")


@needs_torchcodec
def test_without_torchcodec_pillow_gives_the_same_images(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(folder, *VARIED)
    expected = batches(create(config))
    assert "torchcodec" not in caplog.text
    monkeypatch.setattr(loader, "jpeg_decoder", lambda: None)
    monkeypatch.setattr(decode, "jpeg_decoder", lambda: None)
    assert_equal(expected, batches(create(config)))
    assert caplog.text.count("torchcodec is not installed, or not one for this torch: Pillow decodes") == 1


def test_what_a_gpu_lacks_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(loader, "decoder_missing", lambda device: "a decoder is missing; type this")
    monkeypatch.setattr(loader, "find_spec", lambda name: name)
    assert not loader.decodes_on_gpu("auto", CPU) and not loader.decodes_on_gpu("cpu", gpu) and not caplog.text
    assert not loader.decodes_on_gpu("auto", gpu) and loader.keeps_on_gpu("gpu", gpu)
    assert "the CPU decodes, for which the GPU may have to wait: a decoder is missing; type this" in caplog.text
    with pytest.raises(RunError, match=r"decode is gpu, but a decoder is missing; type this; allowed: data.decode"):
        loader.decodes_on_gpu("gpu", gpu)
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    assert not loader.decodes_on_gpu("auto", gpu) and caplog.text.count("Triton is not installed") == 1
    with pytest.raises(RunError, match=r"data\.cache is gpu, but Triton is not installed, .*; allowed: data\.cache"):
        loader.keeps_on_gpu("gpu", gpu)


def test_no_image_at_all_ends_the_gpu_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat").mkdir()
    for number in range(4):
        (tmp_path / "cat" / f"{number}.jpg").write_bytes(b"")
    stand_in_for_gpu(monkeypatch)
    with pytest.raises(SourceError, match="no image among many in a row can be decoded"):
        batches(create(configure(tmp_path, batch=4)))


def test_images_are_cropped_and_resized_as_by_timm_but_for_rounding(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for number in range(4):
        Image.fromarray(pixels(number)).resize((90, 70)).save(tmp_path / "cat" / f"{number}.png")
    config = configure(tmp_path, "data.random_crop=[0.3,1]", batch=4)
    run = create(config)
    source = open_source(config.data, labels_needed=True)
    [[batch]] = run.epoch(0)
    drawing = run.images.drawing
    for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
        stored, _, _ = source.train[index]  # type: ignore[index]
        top, left, height, width = drawing.box(drawing(0, [index]).crops[0], stored.height, stored.width)
        part = stored.crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize(SIZE, Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (source.mean, source.std))
        assert np.abs((image.numpy() * std + mean) * 255 - expected).max() < 5.1


def to_score(
    source: Path, *overrides: str, device: torch.device = CPU, batch: int = 10, **preparation: Any
) -> list[Batch]:
    """All batches of the training images, prepared as for scoring."""
    config = configure(source, *overrides)
    opened = open_source(config.data, labels_needed=True)
    inputs = {"input_size": (3, *SIZE), "crop_mode": "center", "crop_pct": 0.9, "interpolation": "bicubic"}
    inputs |= {"mean": opened.mean, "std": opened.std, **preparation}
    order = ScoringOrder(opened.train, batch, 0, 1)
    return list(ScoringLoader(inputs, config.data, device).batches(opened.train, order))


@pytest.mark.parametrize("preparation", PREPARATIONS, ids=str)
@pytest.mark.parametrize("source, workers", [("folder", 0), ("folder", 2), ("tar", 0)])
def test_images_to_score_on_are_the_same_on_both_paths(
    source: str,
    workers: int,
    preparation: dict[str, Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = [f"data.workers={workers}", *(STREAM if source == "tar" else [])]
    by_workers = to_score(request.getfixturevalue(source), *settings, **preparation)
    stand_in_for_gpu(monkeypatch)
    by_gpu = to_score(request.getfixturevalue(source), *settings, "data.decode=gpu", **preparation)
    assert_equal(by_workers, by_gpu)
    assert sum(len(batch.images) for batch in by_gpu) == 27
    assert sum(len(batch.undecodable) for batch in by_gpu) == 3


@pytest.mark.parametrize("batch", [1, 10])
def test_what_the_gpu_refuses_to_score_on_is_decoded_or_named_here(
    folder: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers promise some images that none of the decoders gets, so that batches of one are empty."""

    def by_cpu(content: bytes, name: str, mode: str, max_pixels: int) -> torch.Tensor:
        if len(content) % 3 == 0:
            raise UndecodableImage(name, "damaged")
        return decode_tensor(content, name, mode, max_pixels)

    monkeypatch.setattr(loading, "decode_tensor", by_cpu)
    expected = to_score(folder, batch=batch)
    assert sum(len(batch.undecodable) for batch in expected) > 5
    stand_in_for_gpu(monkeypatch)
    by_gpu: Callable[..., Any] = gpu_decode.decode

    def refuse_most(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
        return [by_gpu([file], device)[0] if len(file) % 3 == 1 else None for file in files]

    monkeypatch.setattr(gpu_decode, "decode", refuse_most)
    found = to_score(folder, "data.decode=gpu", batch=batch)
    assert [len(batch.images) for batch in expected] == [len(batch.images) for batch in found]
    assert [sorted(batch.undecodable) for batch in expected] == [sorted(batch.undecodable) for batch in found]
    whole = [(one, two) for one, two in zip(expected, found, strict=True) if len(one.images)]
    assert_equal([one for one, _ in whole], [two for _, two in whole])


@pytest.mark.parametrize("decode, widths", [("gpu", {127, 128}), ("auto", {128})])
def test_small_images_to_score_on_are_left_to_the_cpu_unless_the_gpu_is_asked_for(
    decode: str, widths: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, width in enumerate((127, 128, 127, 128)):
        path = tmp_path / "ab"[number // 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.encode(Image.new("RGB", (width, 128)), "JPEG"))
    stand_in_for_gpu(monkeypatch)
    by_gpu: Callable[..., list[torch.Tensor]] = gpu_decode.decode
    seen = set[int]()

    def watched(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        made = by_gpu(files, device)
        seen.update(image.shape[2] for image in made)
        return made

    monkeypatch.setattr(gpu_decode, "decode", watched)
    [batch] = to_score(tmp_path, f"data.decode={decode}", "global_batch=4")
    assert len(batch.images) == 4 and seen == widths


def test_images_that_no_gpu_prepares_are_decoded_by_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "resizer_missing", lambda device: None)
    monkeypatch.setattr(loader, "decoder_missing", lambda device: None)
    said = (
        "the model's images have crop_mode=border, crop_pct=0.9, interpolation=bicubic, which the GPU does not prepare"
    )
    with pytest.raises(RunError, match=f"decode is gpu, but {said} .*; allowed: data.decode=auto or data.decode=cpu"):
        to_score(folder, "data.decode=gpu", crop_mode="border")
    [first, *_] = to_score(folder, crop_mode="border")
    assert first.images.shape == (8, 3, *SIZE) and not caplog.text.count("the CPU decodes")
    assert not loader.decodes_on_gpu("auto", torch.device("cuda"), said)
    assert caplog.text.count(f"the CPU decodes, for which the GPU may have to wait: {said}") == 1


@pytest.mark.gpu
@needs_torchcodec
@pytest.mark.parametrize("preparation", PREPARATIONS, ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_the_gpu_to_score_on_are_those_of_the_cpu(
    folder: Path, workers: int, preparation: dict[str, Any]
) -> None:
    """PNG, CMYK, progressive and damaged files among them."""
    gpu, settings = torch.device("cuda"), f"data.workers={workers}"
    by_workers = to_score(folder, settings, "data.decode=cpu", device=gpu, **preparation)
    by_gpu = to_score(folder, settings, "data.decode=gpu", device=gpu, **preparation)
    for one, two in zip(by_workers, by_gpu, strict=True):
        assert torch.equal(one.indices, two.indices) and torch.equal(one.classes, two.classes)
        assert sorted(one.undecodable) == sorted(two.undecodable)
        std = torch.tensor(IMAGENET_DEFAULT_STD, device=gpu).view(3, 1, 1)
        assert ((one.images - two.images).abs() * std * 255).max() < 1.1


@pytest.mark.gpu
@needs_torchcodec
@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_the_gpu_are_those_of_the_cpu(folder: Path, workers: int) -> None:
    """Within a grey level, of files whose colours have full resolution: others the GPU's decoder does not smooth."""
    settings = [*VARIED[:2], f"data.workers={workers}"]
    by_workers = batches(create(configure(folder, *settings)))
    by_gpu = batches(create(configure(folder, *settings, "data.decode=gpu"), device=torch.device("cuda")))
    for one, two in zip(by_workers, by_gpu, strict=True):
        assert torch.equal(one.indices, two.indices) and torch.equal(one.classes, two.classes.cpu())
        assert sorted(one.undecodable) == sorted(two.undecodable)
        std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
        levels = (one.images - two.images.cpu()).abs() * std * 255
        assert levels.max() < 1.1
