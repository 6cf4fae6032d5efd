"""The speed of loading: generated files to measure with, the loader alone, and a step on real and on fixed images."""

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from recipes import digit_scenes, loader_speed
from recipes.config import TrainConfig
from recipes.data import generated
from recipes.data.config import DataConfig
from recipes.data.generated import HEIGHT, WIDTH
from recipes.data.sampling import BatchPlan
from recipes.data.sources import open_source
from recipes.training.turns import EPOCHS_OF_A_TURN, FIXED, Turns
from tests.helpers.decoding import stand_in_for_gpu
from tests.helpers.images import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of one class."""
    return write_folder(tmp_path_factory.mktemp("folder"), {"cat": 12})


def make(folder: Path, *options: str, number: int = 130) -> dict[str, bytes]:
    """CLASS/NAME -> content of generated files."""
    loader_speed.main(["--make", str(number), str(folder), *options])
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*.jpg"))}


def test_generated_files_are_like_photographs(tmp_path: Path) -> None:
    files = make(tmp_path / "first")
    assert len(files) == 130 == len(set(files.values()))
    source = open_source(DataConfig(source=str(tmp_path / "first"), validation=0.5))
    assert len(source.class_names) == 100 and source.train.size == 100  # of 30 classes with two images one is held out
    assert all(60_000 <= len(content) <= 110_000 for content in files.values())
    for name in (f"{number % 100:02}/{number:06}.jpg" for number in (0, 99, 100)):
        image = Image.open(tmp_path / "first" / name)
        assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGB") == ((500, 375), "RGB")
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
        values = np.asarray(image, np.float64)
        assert np.corrcoef(values.reshape(-1, 3).T).min() > 0.5  # the channels differ little
        spectrum = np.abs(np.fft.rfft(values.mean(axis=2) - values.mean(), axis=1)).mean(axis=0)
        slope = np.polyfit(np.log(np.arange(4, 100)), np.log(spectrum[4:100]), 1)[0]
        assert -1.5 < slope < -0.5  # of the amplitude

    assert make(tmp_path / "again", number=101).items() <= files.items()  # the same for any number of files
    assert not set(make(tmp_path / "seed", "--seed", "1", number=3).values()) & set(files.values())
    make(tmp_path / "sharp", "--subsampling", "4:4:4", number=1)
    assert JpegImagePlugin.get_sampling(Image.open(tmp_path / "sharp" / "00" / "000000.jpg")) == 0
    with pytest.raises(SystemExit, match="seed' exists and is not an empty folder; allowed: a new folder"):
        make(tmp_path / "seed")


@pytest.mark.parametrize("program", [loader_speed, digit_scenes])
def test_a_full_disk_leaves_no_half_set(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the next attempt would refuse, or a measurement would take for the whole; the message names the folder."""
    save, folder = Image.Image.save, tmp_path / "set"

    def full(image: Image.Image, file: Any, **options: Any) -> None:
        if str(file).endswith(("03.jpg", "03.png")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, file, **options)

    command = ["--make", "8", str(folder)] if program is loader_speed else [str(folder), "--training", "8"]
    monkeypatch.setattr(generated, "ProcessPoolExecutor", ThreadPoolExecutor)  # whose workers see the change below
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(SystemExit, match=f"No space left on device: '{folder}'$"):
            program.main(command)
    assert not any(folder.iterdir())
    program.main(command)
    assert any(folder.rglob("*03.*"))


def test_a_full_disk_leaves_the_file_of_measurements_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the new ones are printed; the message names the file."""
    file = tmp_path / "speed.jsonl"
    command = ["data.source=digits", "image_size=8", "batch=4", "data.workers=0", "--rounds", "1", "--batches", "1"]
    loader_speed.main([*command, "--json", str(file)])
    before = file.read_text()

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(SystemExit, match=f"No space left on device: '{file}'$"):
            loader_speed.main([*command, "--json", str(file)])
    assert before.count("\n") == 1 and file.read_text() == before
    assert capsys.readouterr().out.count("the loader alone at 8 px, batch 4") == 2
    loader_speed.main([*command, "--json", str(file)])
    assert file.read_text().startswith(before) and file.read_text().count("\n") == 2


@pytest.mark.slow
def test_speed_of_the_loader_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"data.source={folder}", "data.workers=1", "image_size=16", "batch=4", "--batches", "2"]
    file = tmp_path / "speed.jsonl"
    loader_speed.main([*settings, "data.decode=cpu", "--json", str(file)])
    stand_in_for_gpu(monkeypatch)
    monkeypatch.setattr(loader_speed, "decodes_on_gpu", lambda decode, device: True)
    loader_speed.main([*settings, "--json", str(file)])
    alone, by_cpu, by_gpu = (json.loads(line) for line in file.read_text().splitlines())
    assert (alone["images"], by_cpu["images"], by_gpu["images"]) == ("decode=cpu", "decode=cpu", "decode=gpu")
    for row in (alone, by_cpu, by_gpu):
        assert len(row["rounds"]) == 3 and sorted(row["rounds"])[1] == row["images_per_second"] > 0
        assert (row["image_size"], row["batch"], row["workers"], row["recipe"]) == (16, 4, 1, None)
    ratios = [mine / other for mine, other in zip(by_gpu["rounds"], by_cpu["rounds"], strict=True)]
    assert alone["ratio"] == by_cpu["ratio"] == 1 and by_gpu["ratio"] == sorted(ratios)[1]
    printed = capsys.readouterr().out
    speed = f"{alone['images_per_second']:,.0f}"
    assert printed.startswith("the loader alone at 16 px, batch 4, ")
    assert (
        f"| decode=cpu | {speed} | {speed} | {speed} | 1.000 | 100.0% | " in printed and "\n| decode=gpu | " in printed
    )
    loader_speed.main([*settings, "batch=256", "data.decode=cpu"])  # more than there are: all of them are a batch
    assert "batch 12, " in capsys.readouterr().out
    loader_speed.main([*settings, "data.cache=memory"])
    assert "| cache=memory | " in capsys.readouterr().out
    loader_speed.main([*settings, "data.labels_per_class=2", "data.decode=cpu"])  # of one class: two images in all
    assert "batch 2, " in capsys.readouterr().out


class Steps(list[Any]):
    """Batches of one epoch of `turns`, each looked ahead of."""

    def __init__(self, turns: Turns, epoch: int) -> None:
        super().__init__()
        for [batch] in turns.epoch(epoch):
            self.append(batch)
            turns.look_ahead()


def test_turns_of_one_batch_and_of_all_images(folder: Path) -> None:
    data = DataConfig(source=str(folder), workers=0, random_crop=(0.2, 1.0))
    config = TrainConfig(data=data, global_batch=4, epochs=1)
    source = open_source(data, labels_needed=False)
    turns = Turns([{"decode": "cpu"}], 2, source, config, BatchPlan(4, 1), (16, 16), 0, 1, torch.device("cpu"))
    assert turns.steps_per_epoch == 2 and turns.seconds_waited == 0
    fixed, real, again, later = (
        [batch for epoch in range(first, first + EPOCHS_OF_A_TURN) for batch in Steps(turns, epoch)]
        for first in range(0, 4 * EPOCHS_OF_A_TURN, EPOCHS_OF_A_TURN)
    )
    assert all(batch is fixed[0] for batch in fixed + again)
    seen = [set(batch.indices.tolist()) for batch in real + later]  # steps of an epoch of the images: 3
    assert len(seen) == 8 and set.union(*seen[:3]) == set.union(*seen[3:6]) == set(range(12))
    assert not torch.equal(real[0].images, later[0].images)
    assert turns.seconds_waited > 0 and len(turns.memory) == 4 * EPOCHS_OF_A_TURN
    assert all(memory["host_gib"] > 0 for memory in turns.memory)


def test_speed_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.jsonl"
    often = ["--batches", "1", "--rounds", "2", "--json", str(file)]
    config = ["--config", "recipes/configs/pretrain_digits.yaml", "data.source=digits", "global_batch=16"]
    loader_speed.main(["--step", "pretrain", *config, *often])
    fixed, real = (json.loads(line) for line in file.read_text().splitlines())
    assert (fixed["images"], fixed["ratio"], fixed["data_wait"]) == (FIXED, 1, 0)
    for row in (fixed, real):
        assert (row["recipe"], row["model"], row["image_size"], row["batch"]) == ("pretrain", "arm_pico", 8, 16)
        assert len(row["rounds"]) == 2
    ratios = [one / other for one, other in zip(real["rounds"], fixed["rounds"], strict=True)]
    assert (
        real["images"] == "decode=cpu"
        and real["ratio"] == pytest.approx(sum(ratios) / 2)
        and 0 < real["data_wait"] < 1
    )
    printed = capsys.readouterr().out
    assert re.search(r"\| fixed batch \| [\d,]+ \| .*\n\| decode=cpu \| [\d,]+ \| ", printed)


def test_mistakes_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"data.source={folder}", "image_size=16"]
    with pytest.raises(SystemExit, match="there is no 'nowhere'"):
        loader_speed.main(["data.source=nowhere"])
    with pytest.raises(SystemExit, match=r"No such file or directory: 'nowhere/speed\.jsonl'"):  # before anything else
        loader_speed.main(["data.source=nowhere", "--json", "nowhere/speed.jsonl"])
    of_argparse = 0
    for argv, message in (
        ([*settings, "batch=3"], "batch is 3; allowed: an even number"),
        ([*settings, "--rounds", "0"], "--rounds: expected a whole number of at least 1, got '0'"),
        ([*settings, "--config", "x.yaml"], "--config goes with --step"),
        ([*settings, "--seed", "1"], "--subsampling and --seed go with --make"),
        (["--make", "1", str(tmp_path), *settings], "--make only writes files; leave out"),
        (["--make", "1", str(tmp_path), "--seed", "-1"], "--seed is -1; allowed: 0 or more"),
        (["--make", "none", str(tmp_path)], "allowed: a number of files, 1 or more, then a folder"),
        (["--step", "pretrain", "data.source=digits"], "model is missing"),
        (["--step", "segment", "data.source=digits"], "invalid choice: 'segment'"),
    ):
        with pytest.raises(SystemExit) as stop:
            loader_speed.main(argv)
        said = capsys.readouterr().err
        assert message in said and stop.value.code == (2 if said.startswith("usage: ") else 1)
        of_argparse += said.startswith("usage: ")
    assert of_argparse == 7  # others are told of by the program itself
