"""Training images that are kept in memory: the same batches, and an error where they do not fit."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image

from arm_zoo.images import tables
from arm_zoo.images.errors import SourceError
from recipes.config import ConfigError, PretrainConfig, load_config
from recipes.data import cache, loader
from recipes.data.batches import Batch
from recipes.data.cache import free_bytes
from recipes.data.config import DataConfig
from recipes.data.kept import StoredSplit
from recipes.data.loader import TrainLoader
from recipes.data.sampling import BatchPlan
from recipes.data.sources import open_source
from recipes.errors import RunError
from tests.helpers.decoding import stand_in_for_gpu
from tests.helpers.images import encode, pixels, write_parquet

SIZE = (20, 20)
VARIED = ["data.random_crop=[0.2,1]", "data.flip=0.5", "data.erase=0.5", "data.randaugment=rand-m9-mstd0.5-inc1"]
CPU = torch.device("cpu")
DAMAGED = (0, 4, 5, 6, 29)  # one after the other, and at both ends


def write(root: Path, one_size: bool) -> Path:
    """30 files in one class, of several kinds, five of which nobody can decode."""
    (root / "cat").mkdir(parents=True)
    for number in range(30):
        image = Image.fromarray(pixels(number))
        image = image if one_size or number % 3 else image.resize((30, 40))
        content = encode(image, "PNG" if number % 2 else "JPEG")
        (root / "cat" / f"{number:02}.jpg").write_bytes(content[:60] if number in DAMAGED else content)
    (root / "cat" / "07.jpg").write_bytes(encode(Image.fromarray(pixels()).resize((300, 200)), "PNG"))  # too large
    return root


@pytest.fixture(scope="module", params=["one size", "several sizes"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("kept") / "train", request.param == "one size")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "BLOCK", 8)


def configure(source: Path, *overrides: str, batch: int = 10) -> PretrainConfig:
    settings = [
        "model=arm_pico", "output_dir=unused", "warmup_epochs=0", "epochs=3", f"data.source={source}",
        f"data.validation={source}", "data.workers=0", "data.max_undecodable=0.5", "data.max_pixels=50000",
        f"global_batch={batch}",
    ]  # fmt: skip
    return load_config(PretrainConfig, None, [*settings, *overrides])


def create(config: PretrainConfig, process: int = 0, processes: int = 1, device: torch.device = CPU) -> TrainLoader:
    source, plan = open_source(config.data, labels_needed=True), BatchPlan(config.global_batch // processes, 1)
    return TrainLoader(source, config, plan, SIZE, process, processes, device)


def batches(run: TrainLoader, epoch: int = 0, first_step: int = 0) -> list[Batch]:
    return list(chain.from_iterable(run.epoch(epoch, first_step)))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.classes, two.classes)
        assert torch.equal(one.indices, two.indices) and one.undecodable == two.undecodable


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["memory", "gpu"])
def test_kept_images_make_the_same_batches(
    folder: Path, where: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*(VARIED[:3] if where == "gpu" else VARIED), "data.decode=cpu"]
    plain = create(configure(folder, *settings))
    expected = [batches(plain, epoch) for epoch in range(2)]
    assert sum(len(batch.undecodable) for batch in expected[0]) > 6  # those after others are named with these, too
    stand_in_for_gpu(monkeypatch)
    kept = create(configure(folder, *settings, f"data.cache={where}", f"data.workers={workers}"))
    for epoch in (0, 1):
        assert_equal(expected[epoch], batches(kept, epoch))
    assert kept.undecodable == plain.undecodable and len(plain.undecodable) == 6


def test_each_kind_of_augmentation_follows_from_the_draws(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_gpu(monkeypatch)
    for settings in ([], ["data.max_rotation=20"], ["data.flip=0.5", "data.erase=0.5"]):
        expected = batches(create(configure(folder, *settings, "data.decode=cpu")))
        assert_equal(expected, batches(create(configure(folder, *settings, "data.cache=gpu"))))


@pytest.mark.parametrize("where", ["memory", "gpu"])
def test_files_are_read_once(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_gpu(monkeypatch)
    for one_size in (True, False):
        folder = write(tmp_path / str(one_size), one_size)
        plain = create(configure(folder, *VARIED[:3], "data.decode=cpu"))
        decode = "cpu" if where == "memory" else "auto"
        kept = create(configure(folder, *VARIED[:3], f"data.cache={where}", f"data.decode={decode}"))
        expected = [batches(plain, epoch) for epoch in range(2)]
        assert_equal(expected[0], batches(kept, 0))
        for path in folder.rglob("*.jpg"):
            if int(path.stem) not in DAMAGED:
                path.unlink()
        assert_equal(expected[1], batches(kept, 1))
        assert isinstance(kept.images.split, StoredSplit) == (where == "memory" and not one_size)


def test_files_are_kept_for_the_gpu_to_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_gpu(monkeypatch)
    expected = batches(create(configure(folder, *VARIED[:3])))
    kept = create(configure(folder, *VARIED[:3], "data.cache=memory", "data.workers=2"))
    assert_equal(expected, batches(kept))
    assert isinstance(kept.images.split, StoredSplit)


@pytest.mark.parametrize("where", ["memory", "gpu"])
def test_processes_share_a_step_and_resume_anywhere(folder: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["data.decode=cpu", "data.flip=0.5"]
    expected = [batches(create(configure(folder, *settings)), epoch) for epoch in range(3)]
    stand_in_for_gpu(monkeypatch)
    config = configure(folder, *settings, f"data.cache={where}")
    shares = [batches(create(config, process, 5), 1) for process in range(5)]
    found = {i: image for b in chain(*shares) for i, image in zip(b.indices.tolist(), b.images, strict=True)}
    whole = {i: image for b in expected[1] for i, image in zip(b.indices.tolist(), b.images, strict=True)}
    assert found.keys() == whole.keys() and all(torch.equal(found[i], whole[i]) for i in whole)
    resumed = create(config)
    for epoch, step in ((1, 1), (0, 2), (2, 0)):
        assert_equal(expected[epoch][step:], batches(resumed, epoch, step))


def test_rows_of_parquet_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "train.parquet", [0, 1] * 10)
    settings = ["data.validation=0.1", "data.flip=0.5"]
    expected = batches(create(configure(tmp_path, *settings, batch=6)))
    assert_equal(expected, batches(create(configure(tmp_path, *settings, "data.cache=memory", batch=6))))


@pytest.mark.parametrize(("where", "what", "free"), [("memory", "files", 2), ("gpu", "decoded images", 6)])
def test_a_set_that_does_not_fit_is_told_with_both_sizes_at_once(
    tmp_path: Path, where: str, what: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_gpu(monkeypatch)
    (tmp_path / "cat").mkdir()
    for number in range(40):
        (tmp_path / "cat" / f"{number}.png").write_bytes(encode(Image.effect_noise((256, 256), 90), "PNG"))
    read = tables.Encoded.read
    names: list[str] = []
    monkeypatch.setattr(tables.Encoded, "read", lambda row: names.append(row.name) or read(row))  # type: ignore[func-returns-value]
    monkeypatch.setattr(cache, "free_bytes", lambda device: free * 2**20)
    config = configure(tmp_path, f"data.cache={where}", "data.max_pixels=null")
    more = f"which is more than {free // 2}.0 MiB, half of what is free; type data.cache=none"
    with pytest.raises(RunError, match=rf"^40 {what} take about \d.\d MiB of main memory, {more}"):
        batches(create(config))
    assert len(names) == 8  # a block


def test_images_that_fit_as_files_only_are_kept_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "train", one_size=True)
    monkeypatch.setattr(cache, "free_bytes", lambda device: 2 * 25_000)
    kept = create(configure(folder, "data.cache=memory"))
    assert_equal(batches(create(configure(folder))), batches(kept))
    assert isinstance(kept.images.split, StoredSplit)
    [told] = [record.message for record in caplog.records if "before the first step" in record.message]
    assert told.startswith("30 files take about 0.0 MiB of main memory; ")


def test_processes_of_a_host_divide_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "train", one_size=False)
    monkeypatch.setattr(cache, "free_bytes", lambda device: 40_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(RunError, match=r"MiB of main memory in each of 4 processes, which is more than 0.0 MiB, half"):
        batches(create(configure(folder, "data.cache=memory")))
    monkeypatch.setattr(cache, "free_bytes", lambda device: 10 * 2**20)
    batches(create(configure(folder, "data.cache=memory")))
    assert "30 files take about 0.0 MiB of main memory in each of 4 processes; they" in caplog.text


def test_containers_limit_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CGROUP", tmp_path)
    machine = free_bytes(CPU)
    assert machine > 10_000
    (tmp_path / "memory.stat").write_text("anon 3000\nfile 5000\nshmem 1000\n")
    (tmp_path / "memory.max").write_text("10000\n")
    assert free_bytes(CPU) == 6000  # cached files make way
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 10_000


@pytest.mark.parametrize("where", ["memory", "gpu"])
def test_nothing_to_decode_is_told_as_without_a_cache(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_gpu(monkeypatch)
    (tmp_path / "cat").mkdir()
    for number in range(10):
        (tmp_path / "cat" / f"{number}.jpg").write_bytes(b"gone")
    with pytest.raises(SourceError, match=r"no image among many in a row can be decoded; the last one: .*jpg"):
        batches(create(configure(tmp_path, f"data.cache={where}")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.cache=memory", "data.streaming=true"], "data.cache is memory but data.streaming is true; allowed: "),
        (["data.cache=gpu", "data.decode=gpu"], "data.decode is gpu but data.cache is gpu, .* allowed: data.decode=a"),
        (["data.cache=gpu", "device=cpu"], "data.cache is gpu but device is cpu; allowed: data.cache=memory, or dev"),
        (["data.cache=disk"], "data.cache is disk; allowed: none, memory, gpu"),
    ],
)
def test_settings_that_contradict_a_cache(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(tmp_path, *settings)


def test_a_gpu_asked_for_in_vain_is_told() -> None:
    with pytest.raises(RunError, match=r"cache is gpu, but the run's device is cpu; allowed: data.cache=memory or "):
        loader.kind_of_images(DataConfig(cache="gpu"), CPU)


def check_cropped_by_the_kernel(folder: Path) -> None:
    """In Triton's interpreter: the same up to the rounding of the normalisation."""
    settings = ["data.random_crop=[0.2,1]", "data.flip=0.5"]
    [expected] = next(create(configure(folder, *settings, batch=4)).epoch(0))
    setattr(loader, "keeps_on_gpu", lambda where, device: where == "gpu")  # noqa: B010
    [kept] = next(create(configure(folder, *settings, "data.cache=gpu", batch=4)).epoch(0))
    assert torch.equal(expected.indices, kept.indices)
    torch.testing.assert_close(expected.images, kept.images, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_kept_images_are_cropped_by_the_kernel(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="no triton in this build of torch")
    write(tmp_path / "train", one_size=False)
    script = "import sys; from tests.recipes.data.test_cache import *; check_cropped_by_the_kernel(Path(sys.argv[1]))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, str(tmp_path / "train")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_images_on_the_gpu_are_those_of_the_cpu(folder: Path, workers: int) -> None:
    settings = ["data.random_crop=[0.2,1]", "data.flip=0.5", f"data.workers={workers}"]
    expected = batches(create(configure(folder, *settings, "data.decode=cpu")))
    kept = create(configure(folder, *settings, "data.cache=gpu"), device=torch.device("cuda"))
    for one, two in zip(expected, batches(kept), strict=True):
        assert torch.equal(one.indices, two.indices) and torch.equal(one.classes, two.classes.cpu())
        assert one.undecodable == two.undecodable
        levels = (one.images - two.images.cpu()).abs() * 255 / 4  # 1 / std is above 4
        assert levels.max() < 1.2


@pytest.mark.gpu
def test_a_step_of_kept_images_does_not_wait_for_the_gpu(folder: Path) -> None:
    run = create(configure(folder, *VARIED[:2], "data.cache=gpu"), device=torch.device("cuda"))
    steps = run.epoch(0)
    next(steps)  # fills the cache and compiles the kernel
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        [batch] = next(steps)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert batch.images.is_cuda and batch.images.shape == (10, 3, *SIZE)
