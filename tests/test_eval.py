"""Scoring: small sets in their original layouts, against a scorer written here without any code of `eval`.

The test model's weights are random, so labels are planted by what it says of each picture: its first, its third or an
unlikely class.
"""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo, RealLabelsImagenet, create_dataset, create_loader, resolve_data_config

from eval import __main__ as program
from eval import metrics, models, results, scoring, sets, sources

MODEL = "test_vit"
INFO = Path(timm.data.__file__).parent / "_info"
WNIDS = ImageNetInfo().label_names()
VAL = "ILSVRC2012_val_{:08d}.JPEG"
SUFFIX = {"in1k": ".JPEG", "v2": ".jpeg", "a": ".jpg", "r": ".jpg", "sketch": ".JPEG"}
TREE = {
    "in1k": "val",
    "v2": "imagenetv2-matched-frequency-format-val",
    "a": "imagenet-a",
    "r": "imagenet-r",
    "sketch": "sketch",
}
PER_SET = 18


def timm_indices(name: str) -> list[int]:
    """The 200 classes of A or R, read here straight from timm's files."""
    return [int(x) for x in (INFO / f"imagenet_{name}_indices.txt").read_text().split()]


def jpeg(picture: Pillow.Image, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", **options)
    return out.getvalue()


def random_picture(generator: np.random.Generator) -> Pillow.Image:
    """Smooth colours of its own, of any size near the model's, so that the model tells pictures apart."""
    small = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    size = tuple(int(x) for x in generator.integers(150, 260, 2))
    return Pillow.fromarray(small).resize(size, Pillow.Resampling.BICUBIC)


class OwnScorer:
    """Pixels to logits without eval or timm.data: Pillow, NumPy and the model's published preprocessing."""

    def __init__(self, weights: Path) -> None:
        self.model = timm.create_model(MODEL).eval()
        self.model.load_state_dict(load_file(weights))
        assert self.model.pretrained_cfg["crop_pct"] == 0.95
        assert self.model.pretrained_cfg["mean"] == self.model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)

    def logits(self, data: bytes) -> np.ndarray:
        picture = Pillow.open(io.BytesIO(data)).convert("RGB")
        width, height = picture.size
        short = math.floor(160 / 0.95)
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        picture = picture.resize(size, Pillow.Resampling.BICUBIC)
        left, top = round((size[0] - 160) / 2), round((size[1] - 160) / 2)
        pixels = np.asarray(picture.crop((left, top, left + 160, top + 160)), dtype=np.float32)
        with torch.no_grad():
            return self.model(torch.from_numpy((pixels / 127.5 - 1).transpose(2, 0, 1)[None])).numpy()[0]


@dataclass
class Planted:
    """A set on disk, and by own count the right scores: (n, first right, among five right)."""

    path: Path
    files: dict[str, bytes]  # path below the folder of the set -> bytes
    counts: tuple[int, int, int]


@dataclass
class World:
    root: Path
    weights: Path
    planted: dict[str, Planted]
    real: tuple[int, int, int]
    clean: dict[str, tuple[int, int, int]]

    def sets(self) -> list[str]:
        return [*(f"{name}={planted.path}" for name, planted in self.planted.items()), "real"]


def count(rows: Sequence[tuple[list[int], set[int]]]) -> tuple[int, int, int]:
    """(five best classes, right classes) of pictures -> n, right at once, right among five."""
    return len(rows), sum(top[0] in right for top, right in rows), sum(bool(right & set(top)) for top, right in rows)


def ranked(logits: np.ndarray, subset: Sequence[int]) -> list[int]:
    """The five best classes among those of a subset."""
    return sorted(subset, key=lambda j: -logits[j])[:5]


def plant(logits: np.ndarray, name: str, i: int) -> int:
    """The label of picture i: what the model thinks, nearly that, or what it does not think at all."""
    # among the clean pictures, those of A's and R's classes come up, too
    among = {"a": "a", "r": "r", "in1k": ("", "a", "r", "")[i % 4]}.get(name, "")
    classes = timm_indices(among) if among else range(1000)
    best = sorted(classes, key=lambda j: -logits[j])
    return best[(0, 2, 150)[i // 2 % 3]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("sets")
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    weights = root / "weights.safetensors"
    model = timm.create_model(MODEL).eval()
    with torch.no_grad():  # a head that says of every picture something else, with one bias for all
        model.head.weight.normal_()
        features = model.forward_head(model.forward_features(torch.randn(8, 3, 160, 160)), pre_logits=True)
        model.head.bias.copy_(-model.head.weight @ features.mean(0))
    save_file(model.state_dict(), weights)
    own = OwnScorer(weights)
    real_labels = json.loads((INFO / "imagenet_real_labels.json").read_text())
    planted, in1k, numbers = {}, [], set()
    for name in TREE:
        subset = timm_indices(name) if name in ("a", "r") else list(range(1000))
        files, rows = {}, []
        for i in range(PER_SET):
            data = jpeg(random_picture(generator))
            logits = own.logits(data)
            target = plant(logits, name, i)
            folder, file = WNIDS[target], f"{i}_0.5{SUFFIX[name]}"
            if name == "v2":
                folder = str(target)
            if name == "in1k":
                best = int(logits.argmax())
                wanted = [lambda k: best in real_labels[k], lambda k: not real_labels[k], lambda k: True][i % 3]
                number = next(k for k in range(50_000) if k not in numbers and wanted(k))
                numbers.add(number)
                file = VAL.format(number + 1)
                in1k.append((logits, target, number))
            files[f"{folder}/{file}"] = data
            rows.append((ranked(logits, subset), {target}))
        for file, data in files.items():
            path = root / name / TREE[name] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        planted[name] = Planted(root / name, files, count(rows))
    by_real = [(ranked(logits, range(1000)), set(real_labels[k])) for logits, _, k in in1k]
    clean = {
        name: count([(ranked(logits, timm_indices(name)), {t}) for logits, t, _ in in1k if t in timm_indices(name)])
        for name in ("a", "r")
    }
    return World(root, weights, planted, count([row for row in by_real if row[1]]), clean)


def run(world: World, output: Path, *words: str, weights: Path | None = None) -> list[dict[str, str]]:
    """Rows after a run in this process."""
    options = ["--models", MODEL, "--weights", str(weights or world.weights), "--device", "cpu", "--workers", "0"]
    assert program.main([*options, "--output", str(output), *words]) == 0
    return results.read(output)


def counts_of(row: dict[str, str]) -> tuple[int, int, int]:
    n = int(row["n"])
    return n, round(float(row["top1"]) * n / 100), round(float(row["top5"]) * n / 100)


def check(rows: list[dict[str, str]], world: World) -> None:
    """Rows say what the own scorer counted."""
    by_set = {row["set"]: row for row in rows}
    expected = {name: planted.counts for name, planted in world.planted.items()} | {"real": world.real}
    assert {name: counts_of(row) for name, row in by_set.items()} == expected
    for name in ("a", "r"):
        for row in (by_set["in1k"], by_set[name]):
            n, top1, top5 = (float(row[f"clean200_{name}_{what}"]) for what in ("n", "top1", "top5"))
            assert (n, round(n * top1 / 100), round(n * top5 / 100)) == world.clean[name]
    assert by_set["a"]["clean200_r_n"] == "" and by_set["real"]["clean200_a_n"] == ""


def test_planted_labels_are_of_all_kinds(world: World) -> None:
    for n, top1, top5 in (*(planted.counts for planted in world.planted.values()), *world.clean.values()):
        assert 0 < top1 <= top5 < n
    assert world.real[0] < PER_SET  # some pictures have no ReaL label


def test_folders_score_as_counted_by_hand(world: World, tmp_path: Path) -> None:
    rows = run(world, tmp_path / "results.csv", "--sets", *world.sets(), "--batch-size", "7")
    check(rows, world)
    row = rows[0]
    assert (row["model"], row["img_size"], row["crop_pct"], row["crop_mode"]) == (MODEL, "160x160", "0.95", "center")
    assert (row["interpolation"], row["dtype"], row["weights"]) == ("bicubic", "fp32", "weights.safetensors")
    assert len(row["weights_sha256"]) == 64 and row["torch"] == torch.__version__
    assert "18 pictures instead of 50000" in row["marks"] and "classes instead of 1000" in row["marks"]
    assert len(row["top1"].partition(".")[2]) >= 2


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_counts_the_same(processes: int, world: World, tmp_path: Path, repo: Path) -> None:
    output = tmp_path / "results.csv"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = ["--models", MODEL, "--weights", str(world.weights), "--sets", *world.sets(), "--device", "cpu"]
    result = subprocess.run(
        [*torchrun, "-m", "eval", *options, "--output", str(output), "--batch-size", "5", "--workers", "0"],
        cwd=repo,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    rows = results.read(output)
    check(rows, world)
    assert {row["processes"] for row in rows} == {str(processes)}
    assert result.stderr.count("warning: test_vit, in1k:") == 1
