"""Features are extracted once: what is kept on the disk, by which name, and how an interrupted command goes on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from recipes.data.built_in import open_digits
from recipes.data.config import DataConfig
from recipes.data.sources import open_source
from recipes.errors import RunError
from recipes.probing import features
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extracted, Extractor, extract, listed, steady_speed
from recipes.probing.store import Store
from tests.helpers.decoding import stand_in_for_gpu
from tests.helpers.images import encode, jpeg, needs_torchcodec, write_folder

ARRAYS = ("pooled", "token", "average", "patches")


@pytest.fixture
def model() -> Any:
    return small(0)


def small(seed: int) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=0, img_size=16, patch_size=8, in_chans=1).eval()


def digits(model: Any, cache: Path, wanted: tuple[str, ...] = ARRAYS, **settings: Any) -> Extracted:
    """Of the 360 images to score on."""
    config = ProbeConfig(DataConfig(source="digits", workers=0), cache=str(cache), batch=50, **settings)
    inputs = resolve_model_data_config(model) | {"input_size": (1, 16, 16), "mean": (0.3,), "std": (0.4,)}
    return extract(Extractor(model, inputs, config, wanted), open_digits().test, "validation")


def writes(monkeypatch: pytest.MonkeyPatch, end_after: int | None = None) -> list[int]:
    """The first place of each batch that is written from now on, until the program ends after some."""
    places, write = list[int](), Store.write

    def counted(self: Store, rows: torch.Tensor, values: Any) -> None:
        if len(places) == end_after:
            raise KeyboardInterrupt
        write(self, rows, values)
        places.append(int(rows[0]))

    monkeypatch.setattr(Store, "write", counted)
    return places


def test_features_are_the_models_and_kept(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = digits(model, tmp_path)
    table = open_digits().test
    assert found.classes.tolist() == [table.stored(place).label for place in range(360)]
    assert found.names == ["pooled", "token", "average", "token_last4", "average_last4"]
    assert found.of("token_last4").values.shape == (360, 256) and found.of("token").values.shape == (360, 64)
    assert torch.equal(found.of("token").values, found.arrays["token"][:, :64])
    assert found.of("patches").values.dtype == torch.float16 and found.of("patches").values.shape == (360, 4, 64)
    places = writes(monkeypatch)
    again = digits(model, tmp_path)
    assert places == [] and all(torch.equal(again.arrays[name], found.arrays[name]) for name in ARRAYS)
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith("test_vit-")


def test_arrays_are_made_when_they_are_asked_for(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits(model, tmp_path, ("pooled",))
    [folder] = tmp_path.iterdir()
    assert not (folder / "patches.npy").exists()
    places = writes(monkeypatch)
    both = digits(model, tmp_path, ("pooled", "patches"))
    assert len(places) == 8 and both.of("patches").values.abs().sum(dim=(1, 2)).min() > 0


def test_an_interrupted_command_goes_on(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digits(model, tmp_path / "whole")
    with monkeypatch.context() as patched:
        writes(patched, end_after=3)
        with pytest.raises(KeyboardInterrupt):
            digits(model, tmp_path / "parts")
    places = writes(monkeypatch)
    rest = digits(model, tmp_path / "parts")
    assert places == [150, 200, 250, 300, 350]
    assert all(torch.equal(rest.arrays[name], whole.arrays[name]) for name in ARRAYS)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches(
    processes: int, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in place of side by side: each does its own batches, whatever was done before."""
    whole, made = digits(model, tmp_path / "one"), None
    for number in range(processes):
        state = SimpleNamespace(process_index=number, num_processes=processes, wait_for_everyone=lambda: None)
        todo = [range(start, min(start + 50, 360)) for start in range(0, 360, 50)][number::processes]
        with monkeypatch.context() as patched:
            patched.setattr(features, "PartialState", lambda state=state: state)
            patched.setattr(features, "check_undecodable", lambda *_: None)
            places = writes(patched)
            digits(model, tmp_path / "several")
            assert places == [batch[0] for batch in todo]
    places = writes(monkeypatch)
    made = digits(model, tmp_path / "several")
    assert places == [] and all(torch.equal(made.arrays[name], whole.arrays[name]) for name in ARRAYS)


def test_what_decides_on_features_is_in_their_name(model: Any, tmp_path: Path) -> None:
    def folders() -> int:
        return len(list(tmp_path.iterdir()))

    digits(model, tmp_path, ("pooled",))
    digits(small(1), tmp_path, ("pooled",))
    assert folders() == 2
    model.global_pool = "avg" if model.global_pool == "token" else "token"
    digits(model, tmp_path, ("pooled",))
    assert folders() == 3
    digits(model, tmp_path, ("pooled",), model_args={"dynamic_img_size": True})
    assert folders() == 4
    digits(model, tmp_path, ("pooled",), seed=5, temperature=1.0)  # which decide on nothing here
    assert folders() == 4


def photographs(folder: Path, decode: str, device: str = "cpu") -> Extracted:
    """Of 20 images of a folder, a fifth of them held out: one is a PNG file, one grey, one CMYK and one damaged."""
    if not folder.exists():
        write_folder(folder / "train", {"a": 10, "b": 10})
        for number, (kind, mode) in {3: ("PNG", "RGB"), 4: ("JPEG", "L"), 5: ("JPEG", "CMYK")}.items():
            path = folder / "train" / "a" / f"{number}.jpg"
            path.write_bytes(encode(Image.open(path).convert(mode), kind))
        (folder / "train" / "b" / "12.jpg").write_bytes(jpeg()[:-40])
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", num_classes=0, img_size=16, patch_size=8).eval().to(device)
    data = DataConfig(source=str(folder), workers=0, decode=decode)  # type: ignore[arg-type]
    config = ProbeConfig(data, cache=str(folder / "cache"), batch=8)
    inputs = resolve_model_data_config(model) | {"input_size": (3, 16, 16)}
    return extract(Extractor(model, inputs, config, ARRAYS), open_source(data).train, "training")


def test_features_of_images_that_the_gpu_decodes_are_others_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_cpu = photographs(tmp_path / "images", "cpu")
    stand_in_for_gpu(monkeypatch)
    for decode in ("gpu", "auto"):  # auto leaves small images to the CPU
        by_gpu = photographs(tmp_path / "images", decode)
        assert by_cpu.skipped == by_gpu.skipped == 1 and torch.equal(by_cpu.classes, by_gpu.classes)
        for name in ARRAYS:
            assert torch.equal(by_cpu.of(name).values, by_gpu.of(name).values)
    manifests = [json.loads(file.read_text()) for file in (tmp_path / "images" / "cache").glob("*/features.json")]
    found = sorted(manifest["decoded_on"] for manifest in manifests)
    assert found == ["cpu", "gpu", "gpu, below 16384 pixels cpu"]


@pytest.mark.gpu
@needs_torchcodec
def test_features_of_images_that_the_gpu_decodes_are_those_of_the_cpu(tmp_path: Path) -> None:
    by_cpu, by_gpu = (photographs(tmp_path / "images", decode, "cuda") for decode in ("cpu", "gpu"))
    assert by_cpu.skipped == by_gpu.skipped == 1 and torch.equal(by_cpu.classes, by_gpu.classes)
    for name in ARRAYS:
        one, two = by_cpu.of(name).values.float().flatten(1), by_gpu.of(name).values.float().flatten(1)
        assert len(one) == 15 and torch.cosine_similarity(one, two).min() > 0.999


def test_a_folder_of_other_weights_is_refused(model: Any, tmp_path: Path) -> None:
    digits(model, tmp_path, ("pooled",))
    [folder] = tmp_path.iterdir()
    manifest = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**manifest, "weights_sha256": "0" * 64}))
    with pytest.raises(RunError, match=f"features of other weights, images or settings; delete {folder}"):
        digits(model, tmp_path, ("pooled",))


@pytest.mark.parametrize("array", ["pooled", "pooled.written"])
@pytest.mark.parametrize("kept", [0, 100, -1])
def test_an_array_that_was_cut_off_is_no_features(array: str, kept: int, model: Any, tmp_path: Path) -> None:
    """NumPy fills such a file up with zeros, which would be scored as features of the images."""
    digits(model, tmp_path, ("pooled",))
    [folder] = tmp_path.iterdir()
    file = folder / f"{array}.npy"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RunError, match=rf"{file} is damaged \(.*; delete {folder}, and its features are extracted"):
        digits(model, tmp_path, ("pooled",))


def test_a_disk_that_is_too_small_is_told(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
    with pytest.raises(RunError, match=r"features take 0.0 GiB, but .* has 0.0 GiB left; name another folder"):
        digits(model, tmp_path)


def test_the_speed_is_that_of_the_second_half() -> None:
    assert steady_speed([(0.0, 50), (9.0, 50), (9.1, 50)]) is None
    assert steady_speed([(0.0, 50), (9.0, 50), (9.5, 50), (10.0, 30)]) == 60
    assert steady_speed([(0.0, 9), (5.0, 9), (6.0, 9), (7.0, 20), (8.0, 10)]) == 15


def test_other_images_have_another_listing(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    write_folder(tmp_path / "val", {"a": 2, "b": 2})

    def listing() -> str:
        digest, classes = listed(open_source(DataConfig(source=str(tmp_path))).train)  # type: ignore[arg-type]
        assert classes.tolist() == [0, 0, 1, 1]
        return digest

    first = listing()
    assert listing() == first
    [image, *_] = sorted((tmp_path / "train" / "a").iterdir())
    os.utime(image, ns=(0, 0))
    assert listing() != first
