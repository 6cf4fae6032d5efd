"""Scoring: small sets in their original layouts, against a scorer written here without any code of `eval`.

The test model's weights are random, so labels are planted by what it says of each image: its first, its third or an
unlikely class.
"""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import PIL
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config

from eval import __main__ as program
from eval import tables, verify
from eval.scoring import metrics, models, sources
from eval.scoring import predict as scoring
from eval.scoring.unfinished import Unfinished
from tests.helpers.output import needs_full_disk

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


def jpeg(image: Pillow.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def random_image(generator: np.random.Generator) -> Pillow.Image:
    """Smooth colours of its own, of any size near the model's, so that the model tells images apart."""
    small = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    size = tuple(int(x) for x in generator.integers(150, 260, 2))
    return Pillow.fromarray(small).resize(size, Pillow.Resampling.BICUBIC)


class Killed(BaseException):
    """In place of a signal that ends the process."""


class OwnScorer:
    """Pixels to logits without eval or timm.data: Pillow, NumPy and the model's published preprocessing."""

    def __init__(self, weights: Path) -> None:
        self.model = timm.create_model(MODEL).eval()
        self.model.load_state_dict(load_file(weights))
        assert self.model.pretrained_cfg["crop_pct"] == 0.95
        assert self.model.pretrained_cfg["mean"] == self.model.pretrained_cfg["std"] == (0.5, 0.5, 0.5)

    def logits(self, data: bytes) -> np.ndarray:
        image = Pillow.open(io.BytesIO(data)).convert("RGB")
        width, height = image.size
        short = math.floor(160 / 0.95)
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize(size, Pillow.Resampling.BICUBIC)
        left, top = round((size[0] - 160) / 2), round((size[1] - 160) / 2)
        pixels = np.asarray(image.crop((left, top, left + 160, top + 160)), dtype=np.float32)
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
    """(five best classes, right classes) of images -> n, right at once, right among five."""
    return len(rows), sum(top[0] in right for top, right in rows), sum(bool(right & set(top)) for top, right in rows)


def ranked(logits: np.ndarray, subset: Sequence[int]) -> list[int]:
    """The five best classes among those of a subset."""
    return sorted(subset, key=lambda j: -logits[j])[:5]


def plant(logits: np.ndarray, name: str, i: int) -> int:
    """The label of image i: what the model thinks, nearly that, or what it does not think at all."""
    # among the clean images, those of A's and R's classes come up, too
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
    with torch.no_grad():  # a head that says of every image something else, with one bias for all
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
            data = jpeg(random_image(generator))
            logits = own.logits(data)
            target = plant(logits, name, i)
            folder, file = WNIDS[target], f"{i}_0.5{SUFFIX[name]}"
            if name == "v2":
                folder = str(target)
            if name == "in1k":
                best = int(logits.argmax())  # right by ReaL, without ReaL labels, or whatever
                fitting = (k for k in range(50_000) if (best in real_labels[k], not real_labels[k], True)[i % 3])
                number = next(k for k in fitting if k not in numbers)
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
    return tables.read(output)


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
    assert world.real[0] < PER_SET  # some images have no ReaL label


def test_folders_score_as_counted_by_hand(world: World, tmp_path: Path) -> None:
    rows = run(world, tmp_path / "results.csv", "--sets", *world.sets(), "--batch-size", "7")
    check(rows, world)
    row = rows[0]
    assert (row["model"], row["img_size"], row["crop_pct"], row["crop_mode"]) == (MODEL, "160x160", "0.95", "center")
    assert (row["interpolation"], row["dtype"], row["weights"]) == ("bicubic", "fp32", "weights.safetensors")
    assert len(row["weights_sha256"]) == 64 and models.versions().items() <= row.items()
    assert (row["torch"], row["pillow"]) == (torch.__version__, PIL.__version__)
    assert "18 images instead of 50000" in row["warnings"] and "classes instead of 1000" in row["warnings"]
    assert len(row["top1"].partition(".")[2]) >= 2


@pytest.mark.slow
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
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    rows = tables.read(output)
    check(rows, world)
    assert {row["processes"] for row in rows} == {str(processes)}
    assert result.stderr.count("warning: test_vit, in1k:") == 1


def test_order_of_the_disk_changes_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--sets", *world.sets(), "--batch-size", "5"]
    rows = run(world, tmp_path / "sorted.csv", *words)
    walk, generator = os.walk, np.random.default_rng(0)

    def shuffled(*args: object, **options: object) -> list[tuple[str, list[str], list[str]]]:
        folders = list(walk(*args, **options))
        return [folders[i] for i in generator.permutation(len(folders))]

    monkeypatch.setattr(os, "walk", shuffled)
    changing = ("seconds", "img_per_s", "date")
    again = run(world, tmp_path / "shuffled.csv", *words)
    assert [{k: v for k, v in row.items() if k not in changing} for row in again] == [
        {k: v for k, v in row.items() if k not in changing} for row in rows
    ]


def as_tar(files: dict[str, bytes], path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def as_parquet(planted: Planted, path: Path, names: list[str], with_files: bool = True) -> Path:
    rows = [
        {
            "image": {"bytes": data, "path": file.rpartition("/")[2] if with_files else None},
            "label": names.index(file.partition("/")[0]),
        }
        for file, data in planted.files.items()
    ]
    np.random.default_rng(0).shuffle(rows)
    Dataset.from_list(rows, Features(image=Image(), label=ClassLabel(names=names))).to_parquet(path)
    return path


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def source_of(kind: str, world: World, folder: Path) -> list[str]:
    """The words of --sets for in1k and v2 as another kind of source, real among them."""
    words = ["real"]
    for name in ("in1k", "v2"):
        planted = world.planted[name]
        if kind == "tar":
            files = {f"./{TREE[name]}/{file}": data for file, data in planted.files.items()} | {"about.json": b"{}"}
            words.append(f"{name}={as_tar(files, folder / f'{name}.tar')}")
        elif kind == "tar.gz":
            words.append(f"{name}={as_tar(planted.files, folder / f'{name}.tar.gz', 'w:gz')}")
        elif kind == "tars":
            items = sorted(planted.files.items())
            (folder / name).mkdir()
            for shard in range(2):
                as_tar(dict(items[shard::2]), folder / name / f"{shard}.tar")
            words.append(f"{name}={folder / name}")
            if name == "v2":  # named one by one, as a shell expands a pattern
                words[-1:] = [f"{name}={folder / name / '0.tar'}", f"{name}={folder / name / '1.tar'}"]
        elif kind == "webdataset":
            for shard in range(2):  # keys of V2 are unique within a shard only
                files = {}
                for i, (file, data) in enumerate(sorted(planted.files.items())[shard::2]):
                    label = file.partition("/")[0]
                    index, key = (WNIDS.index(label), Path(file).stem) if name == "in1k" else (int(label), f"{i:04d}")
                    files[f"{key}.jpg"] = data
                    sidecar = {".cls": str(index).encode(), ".json": json.dumps({"label": index}).encode()}
                    suffix = (".cls", ".json")[i % 2]
                    files[key + suffix] = sidecar[suffix]
                as_tar(files, folder / f"{name}-{shard}.tar")
            words.append(f"{name}={folder}/{name}-*.tar")
        elif kind == "parquet":
            # ClassLabels of V2 are what ImageFolder makes of it: sorted as text, so that 10 comes before 2
            names = WNIDS if name == "in1k" else sorted(map(str, range(1000)))
            words.append(f"{name}={as_parquet(planted, folder / f'{name}.parquet', names)}")
    return words


@pytest.mark.usefixtures("caches")
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tars", "webdataset", "parquet"])
def test_sources_of_other_kinds_count_the_same(kind: str, world: World, tmp_path: Path) -> None:
    rows = run(world, tmp_path / "results.csv", "--sets", *source_of(kind, world, tmp_path))
    expected = {name: world.planted[name].counts for name in ("in1k", "v2")} | {"real": world.real}
    assert {row["set"]: counts_of(row) for row in rows} == expected


def builder_of(**files: list[str]) -> SimpleNamespace:
    """What `datasets` knows of a data set before it fetches it."""
    return SimpleNamespace(config=SimpleNamespace(data_files=files))


@pytest.mark.usefixtures("caches")
def test_hub_dataset(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = as_parquet(world.planted["a"], tmp_path / "a.parquet", WNIDS)
    asked = []

    def load_dataset(name: str, split: str, revision: str | None, data_files: dict[str, list[str]]) -> Dataset:
        asked.append((name, split, revision, data_files))
        return Dataset.from_parquet(str(parquet))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda name, revision: builder_of(train=["x"], test=["y"]))
    rows = run(world, tmp_path / "results.csv", "--sets", "a=someone/imagenet-a@v1")
    assert asked == [("someone/imagenet-a", "test", "v1", {"test": ["y"]})]
    assert counts_of(rows[0]) == world.planted["a"].counts


def test_releases_sorted_beside_their_tars(world: World, tmp_path: Path) -> None:
    """As torchvision leaves ImageNet's, following the advice for a flat folder."""
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "val").symlink_to(world.planted["in1k"].path, target_is_directory=True)
    with tarfile.open(tmp_path / "imagenet" / "ILSVRC2012_img_val.tar", "w") as archive:
        archive.add(next(world.planted["in1k"].path.rglob("*.JPEG")), "ILSVRC2012_val_00000001.JPEG")
    rows = run(world, tmp_path / "results.csv", "--sets", f"in1k={tmp_path / 'imagenet'}")
    assert counts_of(rows[0]) == world.planted["in1k"].counts


def odd_images(folder: Path) -> None:
    """What ImageNet has besides plain JPEGs, and more: every one a file that timm reads."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    for i in range(4):
        (folder / f"plain{i}.JPEG").write_bytes(jpeg(random_image(generator), quality=60 + 10 * i))
    rotated = Pillow.Exif()
    rotated[0x0112] = 6
    (folder / "exif.JPEG").write_bytes(jpeg(random_image(generator), exif=rotated))
    (folder / "grey.JPEG").write_bytes(jpeg(random_image(generator).convert("L")))
    (folder / "cmyk.JPEG").write_bytes(jpeg(random_image(generator).convert("CMYK")))
    (folder / "small.JPEG").write_bytes(jpeg(random_image(generator).resize((20, 30))))
    (folder / "wide.JPEG").write_bytes(jpeg(random_image(generator).resize((700, 90))))
    random_image(generator).save(folder / "png.JPEG", "PNG")  # ImageNet has one of these
    random_image(generator).convert("P").save(folder / "palette.png")
    random_image(generator).convert("RGBA").save(folder / "alpha.png")


def timms_loader(folder: Path, config: dict[str, object]) -> tuple[Iterable[torch.Tensor], list[str]]:
    """Batches as timm's validation script makes them, and the names of the images in their order."""
    mode = {1: "L", 3: "RGB"}[config["input_size"][0]]
    dataset = create_dataset("", root=str(folder), split="validation", input_img_mode=mode)
    loader = create_loader(
        dataset, **config, batch_size=5, num_workers=0, device=torch.device("cpu"), use_prefetcher=True
    )
    return (images for images, _ in loader), [Path(dataset.filename(i)).name for i in range(len(dataset))]


def own_batches(candidate: models.Candidate, folder: Path, order: list[str]) -> list[torch.Tensor]:
    """The model's answers, in the same batches."""
    listing = sources.open_source([str(folder)])
    indices = [[Path(file).name for file in listing.files].index(name) for name in order]
    batches = [indices[i : i + 5] for i in range(0, len(indices), 5)]
    forward = scoring.Forward(candidate, torch.device("cpu"), "fp32")
    loaded = scoring.load_batches(listing, candidate.data_config, batches, 0, False)
    return [forward(images) for _, images, _ in loaded]


@pytest.mark.usefixtures("precisions")
def test_fp32_is_not_rounded_in_programs_that_allow_tf32() -> None:
    """By torch's older interface or its newer one, which torch has from version 2.9 on."""
    backends: Any = torch.backends
    backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    newer = hasattr(backends.cuda.matmul, "fp32_precision")
    if newer:
        backends.fp32_precision = backends.cudnn.fp32_precision = "tf32"
    candidate = models.Candidate("x", torch.nn.Identity(), {"mean": [0.0], "std": [1.0]}, 1, (), "", "")
    scoring.Forward(candidate, torch.device("cpu"), "fp32")
    assert torch.get_float32_matmul_precision() == "highest" and not backends.cudnn.allow_tf32
    operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn) if newer else ()
    assert all(operation.fp32_precision == "ieee" for operation in operations)


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "arm_base_patch16_224", "arm_base_patch16_384", "arm_pico_patch2_8"]
)
def test_pixels_equal_timms_to_the_last_bit(name: str, tmp_path: Path) -> None:
    odd_images(tmp_path / "n01440764")
    model = timm.create_model(name, device="meta")
    config = resolve_data_config({}, model=model, use_test_size=True)
    batches, order = timms_loader(tmp_path, config)
    candidate = models.Candidate(name, torch.nn.Identity(), config, 1000, (), "", "")
    theirs, ours = torch.cat(list(batches)), torch.cat(own_batches(candidate, tmp_path, order))
    assert len(ours) == 12
    assert torch.equal(ours, theirs)


def test_argmax_equals_timms_on_every_image(world: World, tmp_path: Path) -> None:
    odd_images(tmp_path / "n01440764")
    candidate = models.load(MODEL, str(world.weights))
    batches, order = timms_loader(tmp_path, resolve_data_config({}, model=candidate.model, use_test_size=True))
    with torch.inference_mode():
        theirs = torch.cat([candidate.model(images) for images in batches])
    ours = torch.cat(own_batches(candidate, tmp_path, order))
    assert np.array_equal(metrics.rank(ours)[0][:, 0], theirs.argmax(dim=1).numpy())
    assert len(set(theirs.argmax(dim=1).tolist())) > 3  # or it would be easy


def test_test_size_and_crop_are_used_unless_train_size(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    overlay = {"test_input_size": (3, 192, 192), "test_crop_pct": 1.0}
    folder = tmp_path / "folder"
    timm.models.save_for_hf(model, folder, model_config={"pretrained_cfg": {**model.pretrained_cfg, **overlay}})
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= overlay
    (folder / "config.json").write_text(json.dumps(config))
    tested = models.load("test_efficientnet", str(folder)).data_config
    trained = models.load("test_efficientnet", str(folder), train_size=True).data_config
    assert (tuple(tested["input_size"]), tested["crop_pct"]) == ((3, 192, 192), 1.0)
    assert (tuple(trained["input_size"]), trained["crop_pct"]) == ((3, 160, 160), 0.95)


def test_models_are_scored_in_evaluation_mode(world: World) -> None:
    """Batch norms, dropout and drop path would change the scores unnoticed."""
    assert not any(module.training for module in models.load(MODEL, str(world.weights)).model.modules())


def test_a_run_that_was_killed_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "results.csv"
    words = ["--sets", *world.sets(), "--batch-size", "4"]
    forward = scoring.Forward.__call__
    calls = []

    def dying(self: scoring.Forward, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 8:  # in the second set: v2 has had three batches, one of them cut short below
            raise Killed
        return forward(self, images)

    monkeypatch.setattr(scoring.Forward, "__call__", dying)
    with pytest.raises(Killed):
        run(world, output, *words)
    assert [row["set"] for row in tables.read(output)] == ["in1k", "real"]
    [partial] = (tmp_path / "results.csv.partial").glob("*.0")
    partial.write_bytes(partial.read_bytes()[:-7])
    calls.clear()
    calls += [0] * 100
    rows = run(world, output, *words, "--resume")
    check(rows, world)
    assert sum(calls) == PER_SET * 4 - 4  # one whole batch of v2 was there; the other sets were not begun
    assert not (tmp_path / "results.csv.partial").exists()


def test_a_kill_while_a_run_goes_on_from_its_records_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = np.zeros(3, scoring.record_type([None]))
    records["index"] = range(3)

    def begin() -> list[int]:
        unfinished = Unfinished(tmp_path / "results.csv", ["row"], ["way"], records.dtype)
        return list(unfinished.begin(resume=True)[0]["index"])

    Unfinished(tmp_path / "results.csv", ["row"], ["way"], records.dtype).add(0, records)
    for kind, method in ((Unfinished, "add"), (Path, "unlink")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(kind, method, Mock(side_effect=Killed))
            begin()
    for _ in range(2):
        assert begin() == [0, 1, 2]
    assert len(list((tmp_path / "results.csv.partial").iterdir())) == 1


@needs_full_disk
def test_a_full_disk_is_told_with_the_file_of_records(tmp_path: Path) -> None:
    records = np.zeros(3, scoring.record_type([None]))
    unfinished = Unfinished(tmp_path / "results.csv", ["row"], ["way"], records.dtype)
    unfinished.add(0, records)
    [file] = (tmp_path / "results.csv.partial").iterdir()
    file.unlink()
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        unfinished.add(0, records)


def test_a_killed_run_of_another_batch_size_is_told_and_forgotten(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.csv"
    words = ["--sets", f"a={world.planted['a'].path}", "--batch-size"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(scoring.Forward, "__call__", Mock(side_effect=Killed))
        run(world, output, *words, "4")
    [row] = run(world, output, *words, "8", "--resume")
    assert counts_of(row) == world.planted["a"].counts
    assert "starting over; a run that died had another batch size, device or version" in capsys.readouterr().err
    assert not (tmp_path / "results.csv.partial").exists()


def test_finished_rows_are_scored_again_on_request_only(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.csv"
    words = ["--sets", f"a={world.planted['a'].path}"]
    assert len(run(world, output, *words)) == 1
    before = output.read_bytes()
    run(world, output, *words, "--resume")
    run(world, output, *words)
    assert output.read_bytes() == before
    assert "test_vit, a: finished before; --recompute" in capsys.readouterr().err
    assert len(run(world, output, *words, "--recompute")) == 2
    assert len(run(world, output, *words, "--dtype", "bf16")) == 3


def edited_copy(world: World, folder: Path, **changes: object) -> Path:
    """The weights as a folder whose configuration says something else of the preprocessing."""
    model = timm.create_model(MODEL)
    model.load_state_dict(load_file(world.weights))
    timm.models.save_for_hf(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.4, 0.5, 0.6]},
        {"std": [0.2, 0.2, 0.2]},
        {"interpolation": "bilinear"},
        {"crop_mode": "squash"},
        {"crop_pct": 0.9},
        {"test_input_size": [3, 192, 192]},
    ],
)
def test_rows_of_other_preprocessing_are_not_reused(
    change: dict[str, object], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, words = tmp_path / "results.csv", ["--sets", f"a={world.planted['a'].path}", "--limit", "4", "--resume"]
    before = edited_copy(world, tmp_path / "before")
    after = edited_copy(world, tmp_path / "after", **change)
    forward, seen = scoring.Forward.__call__, []

    def dying(self: scoring.Forward, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        if len(seen) == 3:
            raise Killed
        return forward(self, images) if images.shape[-1] == 160 else torch.zeros(len(images), 1000)  # all it takes

    monkeypatch.setattr(scoring.Forward, "__call__", dying)
    with pytest.raises(Killed):
        run(world, output, *words, "--batch-size", "1", weights=before)
    seen.clear()
    seen += [0] * 10
    run(world, output, *words, "--batch-size", "1", weights=after)
    assert sum(seen) == 4  # nothing of the other run
    assert len(run(world, output, *words, "--batch-size", "1", weights=before)) == 2
    assert len(run(world, output, *words, "--batch-size", "2", weights=after)) == 2


def test_rows_of_other_contents_are_not_reused(world: World, tmp_path: Path) -> None:
    """The same names and labels, an image mended or replaced."""
    shutil.copytree(world.planted["v2"].path, tmp_path / "v2")
    file = min((tmp_path / "v2").rglob("*.jpeg"))
    whole = file.read_bytes()
    file.write_bytes(whole[:400])
    words = ["--sets", f"v2={tmp_path / 'v2'}"]
    assert [row["undecodable"] for row in run(world, tmp_path / "results.csv", *words)] == ["1"]
    file.write_bytes(whole)
    assert [row["undecodable"] for row in run(world, tmp_path / "results.csv", *words)] == ["1", "0"]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("order", [("a", "r", "in1k"), ("a", "in1k", "r"), ("in1k", "r", "a")])
def test_clean_columns_come_in_any_order_of_runs(
    order: tuple[str, ...], resume: list[str], world: World, tmp_path: Path
) -> None:
    output = tmp_path / "results.csv"
    for name in order:
        run(world, output, "--sets", f"{name}={world.planted[name].path}", *resume)
    rows = {row["set"]: row for row in tables.read(output)}
    assert len(rows) == 3
    for name in ("a", "r"):
        n, top1, top5 = (float(rows[name][f"clean200_{name}_{what}"]) for what in ("n", "top1", "top5"))
        assert (n, round(n * top1 / 100), round(n * top5 / 100)) == world.clean[name]
    assert rows["a"]["clean200_r_n"] == rows["r"]["clean200_a_n"] == ""


def test_clean_columns_are_of_the_same_measurement(world: World, tmp_path: Path) -> None:
    output = tmp_path / "results.csv"
    run(world, output, "--sets", f"a={world.planted['a'].path}")
    run(world, output, "--sets", f"in1k={world.planted['in1k'].path}", "--dtype", "bf16")
    assert tables.read(output)[0]["clean200_a_n"] == ""


def test_limit_spreads_over_the_set_and_marks_the_row(world: World, tmp_path: Path) -> None:
    [row] = run(world, tmp_path / "results.csv", "--sets", f"v2={world.planted['v2'].path}", "--limit", "6")
    assert (row["n"], row["limit"]) == ("6", "6")
    assert "limited to 6 of 18 images" in row["warnings"]
    settings = scoring.Settings(batch_size=4, workers=0, dtype="fp32", limit=6)
    assert scoring.cut(18, settings) == [[0, 3, 6, 9], [12, 15]]


def test_undecodable_images_are_counted_and_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.planted["v2"].path, tmp_path / "v2")
    files = sorted((tmp_path / "v2").rglob("*.jpeg"))
    files[0].write_bytes(files[0].read_bytes()[:400])
    files[5].write_bytes(b"no image")
    [row] = run(world, tmp_path / "results.csv", "--sets", f"v2={tmp_path / 'v2'}", "--batch-size", "1")
    assert (row["n"], row["undecodable"]) == (str(PER_SET - 2), "2")
    errors = capsys.readouterr().err
    for file in (files[0], files[5]):
        name = "/".join(file.parts[-3:])
        assert name in row["warnings"]
        assert f"undecodable: {name}: " in errors
    assert "warning: test_vit, v2:" in errors and "2 undecodable" in errors


def test_no_workers_are_a_number_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    parser = program.make_parser()
    assert parser.parse_args(["--sets", "real", "--workers", "0"]).workers == 0
    with pytest.raises(SystemExit):
        parser.parse_args(["--sets", "real", "--workers", "-1"])
    assert "--workers: expected a whole number of at least 0, got '-1'" in capsys.readouterr().err


def test_custom_images_go_by_the_models_own_names(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = ["zebra", "ape", "cat", "dog"]
    model = timm.create_model(MODEL, num_classes=4).eval()
    save = tmp_path / "model"
    timm.models.save_for_hf(model, save, model_config={"num_classes": 4, "label_names": names})
    answers = []
    for i in range(8):
        path = tmp_path / "images" / names[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(generator).save(path)
        config = resolve_data_config({}, model=model)
        image = timm.data.create_transform(**config)(Pillow.open(path))
        answers.append(int(model(image[None]).argmax()) == i % 4)
    output = tmp_path / "results.csv"
    options = ["--models", MODEL, "--weights", str(save), "--device", "cpu", "--workers", "0"]
    assert program.main([*options, "--sets", f"custom={tmp_path / 'images'}", "--output", str(output)]) == 0
    [row] = tables.read(output)
    assert counts_of(row)[:2] == (8, sum(answers))
    assert float(row["top5"]) == 100  # of four classes
    assert row["warnings"] == ""


@pytest.mark.parametrize("logits", [math.nan, math.inf])
def test_logits_that_are_no_finite_numbers_are_wrong_and_said(logits: float, world: World, tmp_path: Path) -> None:
    """Infinite ones, to which float16 overflows, would make the calibration error of the whole set no number."""
    state = load_file(world.weights)
    state["head.bias"][:] = logits
    save_file(state, tmp_path / "broken.safetensors")
    [row] = run(
        world, tmp_path / "r.csv", "--sets", f"v2={world.planted['v2'].path}", weights=tmp_path / "broken.safetensors"
    )
    assert float(row["top5"]) == 0 and "18 images have logits that are not finite numbers" in row["warnings"]
    assert math.isfinite(float(row["ece"]))


def test_classes_that_a_model_excludes_have_logits_of_minus_infinity() -> None:
    found, confidence = metrics.rank(torch.tensor([[-math.inf, 1.0, 2.0]]))
    assert found.tolist() == [[2, 1, 0, -1, -1]] and confidence == pytest.approx([math.e / (1 + math.e)])


def test_any_class_that_objectnets_stands_for_is_right(world: World, tmp_path: Path) -> None:
    state = load_file(world.weights)
    state["head.bias"][530] = 1e4  # digital clock, the second class of alarm_clock
    save_file(state, tmp_path / "clock.safetensors")
    for i, folder in enumerate(("alarm_clock", "alarm_clock", "mug", "squeegee", "squeegee")):
        path = tmp_path / "images" / folder / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(np.random.default_rng(i)).save(path)
    words = ["--sets", f"objectnet={tmp_path}"]
    [row] = run(world, tmp_path / "results.csv", *words, weights=tmp_path / "clock.safetensors")
    assert counts_of(row)[:2] == (3, 2)
    assert row["warnings"] == "3 images instead of 18574; 2 classes instead of 113"


def test_speed_is_shown_and_nothing_written(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(world, tmp_path / "results.csv", "--sets", f"v2={world.planted['v2'].path}", "--speed")
    assert "loader alone" in capsys.readouterr().out
    assert not (tmp_path / "results.csv").exists()


def card(path: Path, figures: dict[str, float], tags: list[str] | None = None) -> Path:
    results = [
        EvalResult("image-classification", f"imagenet-{name}", f"ImageNet-{name}", "accuracy", value)
        for name, value in figures.items()
    ]
    data = ModelCardData(model_name="some-model", eval_results=results, tags=tags)
    path.write_text(f"---\n{data.to_yaml()}\n---\n# some model\n")
    return path


def test_verify_compares_with_the_card(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = {name: 100 * planted.counts[1] / planted.counts[0] for name, planted in world.planted.items()}
    figures = {"1k": right["in1k"] + 0.05, "V2": right["v2"], "R": right["r"]}
    file = card(tmp_path / "README.md", figures)
    shutil.copy(world.weights, tmp_path / "model.pth.safetensors")
    words = [
        MODEL,
        "--weights",
        str(tmp_path / "model.pth.safetensors"),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--sets",
    ]
    words += [f"{name}={world.planted[name].path}" for name in ("in1k", "v2", "r")]
    assert verify.main(words) == 0  # the card beside the weights
    assert capsys.readouterr().out.count("agrees") == 3
    assert verify.main([*words, "--tolerance", "0.01"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    card(file, {**figures, "V2": right["v2"] - 0.2})
    assert verify.main([*words, "--card", str(file)]) == 1
    assert verify.main([*words, "--card", str(file), "--tolerance", "0.2"]) == 0


@pytest.mark.parametrize("tags, expected", [(["arm-zoo"], [0.83, 1.0]), (["generated_from_trainer"], [83.0, 100.0])])
def test_small_figures_are_percent_unless_the_trainer_wrote_the_card(
    tags: list[str], expected: list[float], tmp_path: Path
) -> None:
    file = card(tmp_path / "README.md", {"A": 0.83, "R": 1.0}, tags)
    figures = verify.read_card("some_model", None, file)[1]
    assert list(figures) == ["a", "r"]
    assert list(figures.values()) == pytest.approx(expected)


def test_top5_on_a_card_is_not_taken_for_top1(tmp_path: Path) -> None:
    results = [
        EvalResult("image-classification", "imagenet-1k", "ImageNet-1k", "accuracy", value, metric_name=name)
        for name, value in (("Top 5 Accuracy", 96.5), ("Top 1 Accuracy", 83.2))
    ]
    data = ModelCardData(model_name="some-model", eval_results=results)
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n")
    assert verify.read_card("some_model", None, tmp_path / "README.md")[1] == {"in1k": 83.2}


@pytest.mark.parametrize(
    "names, expected",
    [
        (("ImageNet-1k validation", "imagenet-1k"), "in1k"),
        (("ILSVRC/imagenet-1k", "imagenet-1k"), "in1k"),
        (("in1k", "in1k"), "in1k"),
        (("a", "a"), "a"),
        (("ImageNet-A", "imagenet-a"), "a"),
        (("ImageNet-R", "imagenet-1k"), "r"),
        (("ImageNet ReaL", "imagenet-1k"), "real"),
        (("ImageNet-V2 (matched-frequency)", "imagenet-v2"), "v2"),
        (("ImageNetV2 top-images", ""), "v2-top-images"),
        (("v2-threshold0.7", ""), "v2-threshold0.7"),
        (("ImageNet-Sketch", ""), "sketch"),
        (("ObjectNet (ImageNet-1k overlap)", ""), "objectnet"),
        (("ImageNet-21k", "imagenet-21k"), None),
        (("CIFAR-10", "cifar10"), None),
    ],
)
def test_names_of_sets_on_cards(names: tuple[str, str], expected: str | None) -> None:
    assert verify.set_of(EvalResult("image-classification", names[1], names[0], "accuracy", 1.0)) == expected


def test_verify_needs_figures(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [MODEL, "--weights", str(world.weights), "--device", "cpu", "--sets", f"v2={world.planted['v2'].path}"]
    assert verify.main(words) == 1
    assert "no card at" in capsys.readouterr().err
    assert verify.main([*words, "--card", str(tmp_path / "none.md")]) == 1
    assert f"there is no card {tmp_path / 'none.md'}; name a README.md" in capsys.readouterr().err
    empty = tmp_path / "empty.md"
    empty.write_text("# no figures\n")
    assert verify.main([*words, "--card", str(empty)]) == 1
    assert "has no accuracy under model-index on a set known here" in capsys.readouterr().err
    assert verify.main([*words, "--card", str(card(tmp_path / "card.md", {"1k": 80.0}))]) == 1
    assert "has no top-1 for v2, only for in1k" in capsys.readouterr().err


def test_models_that_timm_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain module, registered by a plugin: its weights are loaded and its classes counted."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classify = torch.nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classify(x.mean(dim=(2, 3)))

    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **kw: Plain() if name == "plain" else create_model(name, **kw)
    )
    model = Plain()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    candidate = models.load("plain", str(tmp_path / "plain.safetensors"))
    assert candidate.num_classes == 5
    assert torch.equal(candidate.model.classify.weight, model.classify.weight)
    save_file({"classify.weight": torch.zeros(5, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"cannot load plain .*Missing key.*classify.bias"):
        models.load("plain", str(tmp_path / "part.safetensors"))


def test_weights_of_another_organisation_are_scored_and_compared_with_its_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nobodys = "arm_base_patch16_224.in1k"
    with pytest.raises(ValueError, match="not hosted yet"):
        models.check([nobodys], {})
    with pytest.raises(ValueError, match="arm_base has no card on the Hub"):
        verify._card_beside("arm_base", None)
    monkeypatch.setenv("ARM_ZOO_HUB_ORG", "group")
    models.check([nobodys, "resnet18", "arm_pico_patch2_8"], {})
    assert verify._card_beside("arm_base", None) == "group/arm_base_patch16_224.arm_in1k_ft_in1k"
    assert verify._card_beside("resnet18", None) == "timm/resnet18.a1_in1k"
    for weights in ("hf-hub:group/base@v1", "hf://group/base@v1/model.pth"):
        models.check(["arm_base"], {"arm_base": weights})
        assert verify._card_beside("arm_base", weights) == "group/base"


def test_weights_may_lie_in_the_home_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all shells expand the ~ of --weights MODEL=~/FILE."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(world.weights, tmp_path / world.weights.name)
    (tmp_path / "README.md").write_text("# a card\n")
    weights = f"~/{world.weights.name}"
    models.check([MODEL], {MODEL: weights})
    assert models.load(MODEL, weights).weights_sha256 == models.load(MODEL, str(world.weights)).weights_sha256
    assert verify._card_beside(MODEL, weights) == str(tmp_path / "README.md")


def test_weights_of_the_package_are_called_by_name() -> None:
    candidate = models.load("arm_pico_patch2_8.arm_digits_ft_digits", None)
    assert candidate.weights == "arm_pico_patch2_8.arm_digits_ft_digits.safetensors"
    assert len(candidate.weights_sha256) == 64


def test_weights_of_an_unknown_file_have_a_checksum(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda name, **_: saved)
    checksums = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        saved = timm.models.vision_transformer.test_vit()
        checksums.append(models.load(MODEL, None).weights_sha256)
    assert len(checksums[0]) == 64
    assert checksums[0] == checksums[1] != checksums[2]


@pytest.mark.parametrize("source", ["local-dir:{}", "{}", "{}/model.safetensors"])
def test_folders_of_weights(source: str, tmp_path: Path) -> None:
    model = timm.create_model(MODEL, num_classes=3)
    names = {"label_names": ["x", "y", "z"]}
    timm.models.save_for_hf(model, tmp_path / "model", model_config=names, safe_serialization=True)
    candidate = models.load(MODEL, source.format(tmp_path / "model"))
    assert (candidate.num_classes, candidate.label_names) == (3, ("x", "y", "z"))
    assert torch.equal(candidate.model.head.weight, model.head.weight)
    file = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert candidate.weights_sha256 == hashlib.sha256(file).hexdigest()
    assert candidate.weights in ("model", "model.safetensors")


@pytest.mark.parametrize("source", ["local-dir:{}", "{}"])
def test_a_folder_is_a_model(source: str, tmp_path: Path) -> None:
    model = timm.create_model(MODEL, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    name = source.format(tmp_path / "model")
    models.check([name], {})
    assert torch.equal(models.load(name, None).model.head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"no card at .*README\.md"):
        verify.read_card(name, None, None)  # it is sought in the folder
    with pytest.raises(ValueError, match=r"comes with its weights; leave out --weights gone\.pth"):
        models.check([name], {name: "gone.pth"})
    with pytest.raises(ValueError, match="unknown model"):
        models.check([f"{tmp_path / 'none'}"], {})
