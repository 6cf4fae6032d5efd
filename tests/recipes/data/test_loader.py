"""Batches: each image once, the same for any number of processes and workers, and resumed where they stopped."""

import io
import logging
import pickle
import random
import tarfile
from functools import cache
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from arm_zoo.images.errors import SourceError
from arm_zoo.images.tables import Encoded
from recipes.config import PretrainConfig, load_config
from recipes.data.batches import Batch
from recipes.data.config import DataConfig
from recipes.data.loader import EvalLoader, TrainLoader
from recipes.data.sampling import BatchPlan, Key, mixed, training_order
from recipes.data.sources import Source, open_source
from recipes.data.streams import ImageStream
from recipes.data.transforms import Normalisation, warp
from tests.helpers.images import encode, jpeg, needs_torchcodec, pixels, write_folder, write_parquet, write_tar

CPU = torch.device("cpu")
ON_EACH_PATH = pytest.mark.parametrize(
    "decode", ["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, needs_torchcodec])]
)
VARIED = ["data.random_crop=[0.2,1]", "data.flip=0.5", "data.randaugment=rand-m9-mstd0.5-inc1", "data.erase=0.5"]
SCORING = {
    "input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0,
    "crop_mode": "squash",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` unpacks stays among the test's files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training images in two classes, 7 to score on."""
    root = tmp_path_factory.mktemp("folder")
    write_folder(root / "train", {"cat": 14, "dog": 12})
    write_folder(root / "val", {"cat": 3, "dog": 4})
    return root


def configure(source: Path | str, *overrides: str, batch: int = 12) -> PretrainConfig:
    settings = ["model=arm_pico", "output_dir=unused", "warmup_epochs=0", f"data.source={source}", "data.workers=0"]
    return load_config(PretrainConfig, None, [*settings, f"global_batch={batch}", *overrides])


def loader(config: PretrainConfig, process: int = 0, processes: int = 1, accumulation: int = 1) -> TrainLoader:
    plan = BatchPlan(config.global_batch // processes // accumulation, accumulation)
    source = open_source(config.data, labels_needed=True)
    device = torch.device("cuda") if config.data.decode == "gpu" else CPU
    return TrainLoader(source, config, plan, (16, 16), process, processes, device)


def epoch(config: PretrainConfig, number: int, *share: int, first_step: int = 0) -> list[list[Batch]]:
    return list(loader(config, *share).epoch(number, first_step))


def equal(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    pairs = zip(chain.from_iterable(first), chain.from_iterable(second), strict=True)
    return all(torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) for a, b in pairs)


def by_index(*shares: list[list[Batch]]) -> dict[int, tuple[torch.Tensor, int]]:
    """Index -> image and class; every index may come once."""
    found: dict[int, tuple[torch.Tensor, int]] = {}
    for batch in chain.from_iterable(chain.from_iterable(shares)):
        for index, image, label in zip(batch.indices.tolist(), batch.images, batch.classes.tolist(), strict=True):
            assert index not in found
            found[index] = (image, label)
    return found


def steps(*shares: list[list[Batch]]) -> list[set[int]]:
    """The images of each global batch."""
    return [
        {index for batches in step for batch in batches for index in batch.indices.tolist()}
        for step in zip(*shares, strict=True)
    ]


@cache
def whole(folder: Path, decode: str = "cpu") -> list[list[Batch]]:
    """Epoch 3 of one process without workers."""
    return epoch(configure(folder, *VARIED, f"data.decode={decode}"), 3)


@ON_EACH_PATH
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_any_number_of_processes_and_workers_gives_the_same_images(
    folder: Path, processes: int, accumulation: int, workers: int, decode: str
) -> None:
    config = configure(folder, *VARIED, f"data.workers={workers}", f"data.decode={decode}")
    shares = [epoch(config, 3, process, processes, accumulation) for process in range(processes)]
    assert all(len(step) == accumulation for share in shares for step in share)
    expected, found = by_index(whole(folder, decode)), by_index(*shares)
    assert len(found) == 24 and found.keys() == expected.keys()  # 26 images, two batches of 12
    assert all(torch.equal(found[i][0], expected[i][0]) and found[i][1] == expected[i][1] for i in found)
    assert steps(*shares) == steps(whole(folder, decode))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (3, 2)])
def test_images_to_be_mixed_stand_at_mirrored_places(folder: Path, processes: int, accumulation: int) -> None:
    [[first], *_] = whole(folder)
    partner = dict(zip(first.indices.tolist(), first.indices.flip(0).tolist(), strict=True))
    for process in range(processes):
        for batch in epoch(configure(folder), 3, process, processes, accumulation)[0]:
            for index, other in zip(batch.indices.tolist(), batch.indices.flip(0).tolist(), strict=True):
                assert partner[index] == other


@ON_EACH_PATH
@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_where_it_stopped(folder: Path, workers: int, decode: str) -> None:
    config = configure(folder, *VARIED, f"data.workers={workers}", f"data.decode={decode}", "epochs=3", batch=4)
    run = loader(config)
    assert run.steps_per_epoch == 6
    uninterrupted = [list(run.epoch(number)) for number in range(3)]
    assert equal(uninterrupted[1][4:], epoch(config, 1, first_step=4))
    resumed = loader(config)
    assert equal(uninterrupted[1][2:4], [step for step, _ in zip(resumed.epoch(1, 2), range(2), strict=False)])
    assert equal(uninterrupted[1][5:], list(resumed.epoch(1, 5)))  # stopped and resumed twice
    assert equal(uninterrupted[2], list(resumed.epoch(2)))
    assert equal(uninterrupted[0], list(resumed.epoch(0)))  # and back


def test_order_and_variation_change_with_seed_and_epoch(folder: Path) -> None:
    config = configure(folder, *VARIED)
    runs = [epoch(config, 0), epoch(config, 1), epoch(configure(folder, *VARIED, "seed=1"), 0)]
    assert equal(runs[0], epoch(config, 0))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert steps(runs[first]) != steps(runs[second])
        shared = by_index(runs[first]).keys() & by_index(runs[second]).keys()
        pairs = [(by_index(runs[first])[i][0], by_index(runs[second])[i][0]) for i in shared]
        assert not any(torch.equal(*pair) for pair in pairs)


def test_global_generators_are_left_alone(folder: Path) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    epoch(configure(folder, *VARIED), 0)
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()  # type: ignore[index]
    assert torch.equal(states[2], torch.get_rng_state())


def test_without_variation_training_and_scoring_see_the_same(folder: Path) -> None:
    source = open_source(DataConfig(source=str(folder)))
    trained = by_index(epoch(configure(folder, batch=26), 0))
    inputs = {**SCORING, "mean": source.mean, "std": source.std}
    scored = by_index([[batch] for batch in EvalLoader(source.train, inputs, batch_size=5)])
    assert trained.keys() == scored.keys() == set(range(26))
    assert all(torch.allclose(trained[i][0], scored[i][0]) and trained[i][1] == scored[i][1] for i in trained)
    image, label, _ = source.train[20]  # type: ignore[index]
    reference = create_transform((3, 16, 16), interpolation="bicubic", crop_pct=1.0, crop_mode="squash")
    rounding = 5 / 255 / min(source.std)  # of torchvision's resizing and Pillow's
    assert torch.allclose(scored[20][0], reference(image), atol=rounding) and scored[20][1] == label


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_scoring_sees_each_image_once(folder: Path, processes: int, workers: int) -> None:
    test = open_source(DataConfig(source=str(folder))).test
    assert test is not None
    loaders = [EvalLoader(test, SCORING, 2, process, processes, workers) for process in range(processes)]
    for _ in range(2):  # a loader can be used again
        found = by_index(*([[batch] for batch in loader] for loader in loaders))
        assert sorted(found) == list(range(7))
        assert [found[index][1] for index in range(7)] == [0, 0, 0, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training tars of unequal length, 14 images in all; the class of image n is n % 5."""
    root = tmp_path_factory.mktemp("tars")
    for shard, (first, last) in enumerate(((0, 7), (7, 9), (9, 14))):
        write_tar(root / f"train-{shard}.tar", [number % 5 for number in range(first, last)], first=first)
    write_tar(root / "val-0.tar", [number % 5 for number in range(5)])
    return root


STREAM = ["data.streaming=true", "data.num_classes=5", "data.shuffle_buffer=4"]


@ON_EACH_PATH
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_streams_give_each_image_once_for_any_number_of_processes_and_workers(
    tars: Path, processes: int, workers: int, decode: str
) -> None:
    plain = configure(tars, *STREAM, f"data.decode={decode}", batch=14)
    expected = {torch.sum(image).item() for image, _ in by_index(epoch(plain, 0)).values()}
    assert len(expected) == 14  # all different
    config = configure(tars, *STREAM, f"data.workers={workers}", f"data.decode={decode}", batch=12)
    shares = [epoch(config, 1, process, processes) for process in range(processes)]
    sums = [torch.sum(image).item() for image, _ in by_index(*shares).values()]
    assert len(sums) == len(set(sums)) == 12 and set(sums) <= expected
    alone = epoch(config, 1)
    assert steps(*shares) == steps(alone)
    assert by_index(*shares).keys() == by_index(alone).keys()
    assert all(torch.equal(by_index(*shares)[i][0], by_index(alone)[i][0]) for i in by_index(alone))


@ON_EACH_PATH
def test_streams_go_on_where_they_stopped_and_change_with_the_epoch(tars: Path, decode: str) -> None:
    config = configure(tars, *STREAM, *VARIED, f"data.decode={decode}", batch=2)
    assert equal(epoch(config, 2)[3:], epoch(config, 2, first_step=3))
    classes = [[batch.classes.tolist() for [batch] in epoch(config, number)] for number in (0, 1)]
    assert classes[0] != classes[1]
    test = open_source(config.data).test
    assert test is not None
    shares = [[[batch] for batch in EvalLoader(test, SCORING, 2, process, 2)] for process in range(2)]
    assert {index: label for index, (_, label) in by_index(*shares).items()} == {n: n for n in range(5)}


def test_streams_of_tars_with_images_of_several_kinds_miss_none(tmp_path: Path) -> None:
    for shard, kinds in enumerate((["JPEG", "PNG", "WEBP"], ["PNG"], ["BMP", "JPEG", "GIF", "PNG"])):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for row, kind in enumerate(kinds):
                for ending, content in ((kind, encode(Image.fromarray(pixels(row)), kind)), ("cls", b"word")):
                    member = tarfile.TarInfo(f"{row}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    settings = ["data.streaming=true", "data.shuffle_buffer=2", f"data.validation={tmp_path / 'train-0.tar'}"]
    config = configure(tmp_path / "train-*.tar", *settings, batch=8)
    split = open_source(config.data).train
    assert isinstance(split, ImageStream) and split.shard_sizes == [3, 1, 4] and split.size == 8
    shares = [epoch(config, 0, process, 2) for process in range(2)]
    assert len(by_index(*shares)) == 8 and not [b for step in shares[0] for b in step if b.undecodable]
    names = [[encoded.name for encoded in split.shard(2, first_row=first)] for first in (0, 3)]
    assert names[1] == names[0][3:] == [f"{tmp_path / 'train-2.tar'}/3"]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_a_process_reads_the_shards_of_its_lanes_only(tmp_path: Path, processes: int) -> None:
    for shard in range(6):
        write_tar(tmp_path / f"train-{shard}.tar", [0] * 4, first=4 * shard)
    write_tar(tmp_path / "val-0.tar", [0])
    config = configure(tmp_path, "data.streaming=true", "data.num_classes=1", "data.shuffle_buffer=1", "epochs=1")
    whole = {step: set(keys) for step, keys in enumerate(read_keys(config, 1)[0])}
    shares = read_keys(config, processes)
    for step, names in whole.items():
        assert sorted(names) == sorted(name for share in shares for name in share[step])
    files = [{name.rpartition("/")[0] for step in share for name in step} for share in shares]
    assert [len(names) for names in files] == [6 // processes] * processes
    assert len(set.union(*files)) == 6


def read_keys(config: PretrainConfig, processes: int) -> list[list[list[str]]]:
    """Names of the images of every step, for each process."""
    split = open_source(config.data).train
    plan = BatchPlan(config.global_batch // processes, 1)
    orders = [training_order(split, config, plan, process, processes) for process in range(processes)]
    return [[[key.encoded.name for key in keys if key.encoded] for keys in order] for order in orders]


def test_streams_are_mixed_as_far_as_the_buffer_reaches(tmp_path: Path) -> None:
    """What is stored class by class would otherwise come class by class."""
    write_tar(tmp_path / "train-0.tar", [0] * 48)
    write_tar(tmp_path / "val-0.tar", [0])

    def steps_of(buffer: int) -> list[list[int]]:
        settings = ["data.streaming=true", "data.num_classes=1", f"data.shuffle_buffer={buffer}", "epochs=1"]
        [order] = read_keys(configure(tmp_path, *settings), 1)
        return [sorted(int(name.rpartition("/")[2]) for name in names) for names in order]

    assert steps_of(1) == [list(range(first, first + 12)) for first in (0, 12, 24, 36)]  # as stored
    first = steps_of(24)[0]
    assert 24 <= max(first) < 36 and 0 < sum(number < 12 for number in first) < 12
    assert max(steps_of(48)[0]) > 36


def as_on_the_hub(monkeypatch: pytest.MonkeyPatch, tars: Path) -> None:
    """Let the Hub give the tars, as a stream whose shards cannot be counted."""
    load = datasets.load_dataset

    def load_dataset(name: str, streaming: bool) -> dict[str, datasets.IterableDataset]:
        files = {split: sorted(map(str, tars.glob(f"{split}-*.tar"))) for split in ("train", "val")}
        return {
            split: load("webdataset", data_files={split: files[split]}, split=split, streaming=streaming)
            for split in files
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("processes", [1, 2])
def test_streams_from_the_hub_give_each_image_once(
    tars: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    as_on_the_hub(monkeypatch, tars)
    config = configure("hf://some/tars", *STREAM, "data.train_size=14", batch=4)
    shares = [epoch(config, 0, process, processes) for process in range(processes)]
    sums = {torch.sum(image).item() for image, _ in by_index(*shares).values()}
    assert len(sums) == 12
    assert steps(*shares) == steps(epoch(config, 0)) and equal(epoch(config, 0)[2:], epoch(config, 0, first_step=2))


def test_streams_of_unknown_or_wrong_size_are_refused(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="global_batch is 30; allowed: up to the 14 training images"):
        loader(configure(tars, *STREAM, batch=30))
    as_on_the_hub(monkeypatch, tars)
    with pytest.raises(SourceError, match=r"does not tell its size; type data.train_size=IMAGES"):
        loader(configure("hf://some/tars", *STREAM))
    with pytest.raises(SourceError, match=r"ended 6 images before its end: 20 are expected \(data.train_size"):
        epoch(configure("hf://some/tars", *STREAM, "data.train_size=20", batch=10), 0)


def test_the_buffer_mixes_and_loses_nothing() -> None:
    stream = [Encoded(str(number), number, "") for number in range(50)]
    order = [encoded.label for encoded in mixed(stream, 10, random.Random(0))]
    assert sorted(order) == list(range(50)) != order
    assert all(label <= place + 10 for place, label in enumerate(order))  # none before it was read
    assert order == [encoded.label for encoded in mixed(stream, 10, random.Random(0))]


def damage(root: Path, *numbers: int) -> Path:
    """30 images of one class, these ones cut off."""
    write_folder(root / "train", {"cat": 30})
    write_folder(root / "val", {"cat": 3})
    for number in numbers:
        file = root / "train" / "cat" / f"{number}.jpg"
        file.write_bytes(file.read_bytes()[:-150])
    return root


@ON_EACH_PATH
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, decode: str
) -> None:
    path = [f"data.workers={workers}", f"data.decode={decode}"]
    config = configure(damage(tmp_path, 4, 5, 29), "data.max_undecodable=0.2", *path, batch=30)
    run = loader(config)
    with caplog.at_level(logging.WARNING):
        found = by_index(list(run.epoch(0)))
        list(run.epoch(1))
    assert torch.equal(found[4][0], found[6][0]) and torch.equal(found[29][0], found[0][0])
    assert len(run.undecodable) == 3 and caplog.text.count("skipped: ") == 3  # each is named once
    for number in (4, 5, 29):
        assert caplog.text.count(f"cat/{number}.jpg cannot be decoded: ") == 1


@ON_EACH_PATH
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_images_stop_the_run(tmp_path: Path, workers: int, decode: str) -> None:
    root = damage(tmp_path, 4, 5, 29)
    with pytest.raises(SourceError, match=r"of 30 training images cannot be decoded, .* data.max_undecodable=0.05"):
        epoch(configure(root, "data.max_undecodable=0.05", f"data.decode={decode}", batch=10), 0)
    for number in range(30):
        (root / "train" / "cat" / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match="no image among many in a row can be decoded") as refused:
        epoch(configure(root, f"data.workers={workers}", f"data.decode={decode}", batch=10), 0)
    assert "Traceback" not in str(refused.value)


def test_damaged_images_in_a_stream_and_in_scoring(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [{"bytes": jpeg(number), "path": None} for number in range(6)]
    images[2] = {"bytes": b"gone", "path": None}
    data = datasets.Dataset.from_dict(
        {"image": images, "label": [0] * 6},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])}),
    )
    data.to_parquet(tmp_path / "train.parquet")
    data.to_parquet(tmp_path / "val.parquet")
    settings = ["data.streaming=true", "data.max_undecodable=0.5", "data.shuffle_buffer=1"]
    run = loader(configure(tmp_path, *settings, batch=6))
    found = by_index(list(run.epoch(0)))
    assert torch.equal(found[2][0], found[4][0])  # the one after it in the batch: 0 2 4 and, mirrored, 5 3 1
    list(run.epoch(1))
    assert len(run.undecodable) == 1
    assert [line for line in run.undecodable if "[train], shard 0, row 2 cannot be decoded" in line]
    test = open_source(DataConfig(source=str(tmp_path))).test
    assert test is not None
    caplog.clear()
    loader_to_score = EvalLoader(test, SCORING, 2)
    batches, again = list(loader_to_score), list(loader_to_score)
    assert [batch.indices.tolist() for batch in batches] == [[0, 1], [3], [4, 5]]
    assert [len(batch.undecodable) for batch in again] == [0, 1, 0]  # counted in every pass, named once
    assert caplog.text.count("skipped: ") == caplog.text.count("[val], row 2 cannot be decoded") == 1
    assert "[val], row 2 cannot be decoded" in batches[1].undecodable[0]
    only_damaged = list(EvalLoader(test, SCORING, 1))[2]
    assert len(only_damaged.images) == len(only_damaged.classes) == 0


def test_workers_can_be_started_afresh(folder: Path) -> None:
    """Where processes are not forked, as on macOS, the data set goes to the workers by pickle."""
    run = loader(configure(folder, *VARIED))
    copy = pickle.loads(pickle.dumps(run.images))
    keys = [Key(0, 3), Key(0, 20)]
    assert torch.equal(copy.batch(keys).images, run.images.batch(keys).images)


def test_waiting_for_images_is_measured(folder: Path) -> None:
    run = loader(configure(folder))
    list(run.epoch(0))
    assert run.seconds_waited > 0


def test_shift_rotation_and_zoom_by_hand() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 3] = 1

    def moved(*draws: float, **limits: float) -> list[int]:
        place = warp(image, torch.tensor([draws]), DataConfig(source="x", **limits)).argmax()
        return [int(place) // 8, int(place) % 8]

    assert moved(0, 0, 0, 0) == [2, 3]
    assert moved(0, 0, 1, 0, max_shift=0.125) == [2, 2]  # the window moves right, so the image moves left
    assert moved(0, 0, 0, -1, max_shift=0.25) == [4, 3]
    assert moved(1, 0, 0, 0, max_rotation=180) == [5, 4]
    assert moved(0, 1, 0, 0, max_zoom=0.5) == [1, 3]  # half as large again, away from the middle
    assert moved(0, -1, 0, 0, max_zoom=0.5) == [3, 3]


@pytest.mark.parametrize(
    ("key", "small", "large"), [("shift", 1e-6, 0.5), ("rotation", 1e-4, 90), ("zoom", 1e-6, 0.5)]
)
def test_images_are_moved_as_far_as_asked_for(folder: Path, key: str, small: float, large: float) -> None:
    """Each way on its own, and the values stay those of normalised images."""
    plain, still, moved = (
        torch.stack([image for image, _ in by_index(epoch(configure(folder, f"data.max_{key}={limit}"), 0)).values()])
        for limit in (0, small, large)
    )
    torch.testing.assert_close(still, plain, rtol=0, atol=1e-3)
    assert (moved - plain).abs().mean() > 0.1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (12, 8)])
def test_rotation_keeps_distances(height: int, width: int) -> None:
    image = torch.zeros(1, 1, height, width)
    row, column = height // 2, width // 2
    image[0, 0, row - 2, column - 1] = 1  # half a column from the middle, and one row and a half above it
    turned = warp(image, torch.tensor([[1.0, 0, 0, 0]]), DataConfig(source="x", max_rotation=90))
    expected = torch.zeros_like(image)
    expected[0, 0, row, column - 2] = 1
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)


def test_normalisation_and_erasing(folder: Path) -> None:
    source = open_source(DataConfig(source=str(folder)))
    plain, erased = (by_index(epoch(configure(folder, f"data.erase={share}", batch=26), 0)) for share in (0, 1))
    images = torch.stack([image for image, _ in plain.values()])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (source.mean, source.std))
    values = images * std + mean
    assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6 and values.std() > 0.1
    changed = [(plain[i][0] != erased[i][0]).float().mean().item() for i in plain]
    assert all(0.01 < share < 0.4 for share in changed)  # timm erases 2% to a third of the area


def test_normalisation_by_hand() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    normalise = Normalisation((0.5, 0.0, 0.2), (0.25, 1.0, 0.1), CPU)
    expected = torch.tensor([[-2, -1.2, 2], [0, 0.2, 1], [-2, 0, 8]]).view(1, 3, 1, 3)
    for images in (levels, levels / 255):
        torch.testing.assert_close(normalise(images), expected, rtol=0, atol=1e-6)


def test_a_plan_that_is_no_split_of_the_global_batch_is_refused(folder: Path) -> None:
    config = configure(folder)
    source: Source = open_source(config.data)
    for plan in (BatchPlan(6, 1), BatchPlan(3, 4)):
        with pytest.raises(ValueError, match="is no global batch of 12 in pairs"):
            TrainLoader(source, config, plan, (16, 16), 0, 1, CPU)


def test_parquet_images_reach_the_batches_unchanged(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["a", "b", "c"])
    write_parquet(tmp_path / "train-0.parquet", [2, 0, 1, 1], names)
    write_parquet(tmp_path / "test.parquet", [0, 1, 2], names)
    found = by_index(epoch(configure(tmp_path, batch=4), 0))
    assert [found[index][1] for index in range(4)] == [2, 0, 1, 1]
