"""A person's own folder of images in one command: early refusals, images held out, fitted settings, the whole run."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from arm_zoo import CheckpointError
from arm_zoo.images.errors import SourceError
from recipes import command_line
from recipes.command_line import read_command
from recipes.config import ConfigError, FinetuneConfig, is_read_with, load_config
from recipes.data.config import DataConfig
from recipes.data.sources import open_source
from recipes.data.splits import held_out, split_rows
from recipes.data.undecodable import check_undecodable
from recipes.errors import MISTAKES, RunError
from recipes.finetune import create_classifier, starting_weights
from recipes.first_run import Choice, Survey, choose, described, fitted, survey
from recipes.training.resume import Start, compare
from tests.helpers.images import write_parquet

KINDS = (("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGBA", "png"), ("L", "png"))
SMALL = ["model=arm_pico_patch2_8", "model_args.in_chans=3", "model_args.depth=1", "model_args.embed_dim=16"]
QUICK = ["epochs=2", "data.workers=0", "device=cpu", "cpu_threads=1"]
CLASSES = {"gold fish": 14, "red-panda": 13, "bus": 13}


def write_images(folder: Path, classes: dict[str, int]) -> Path:
    """Class folders of small images of several kinds, with spaces in their names."""
    for place, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            mode, ending = KINDS[number % len(KINDS)]
            colour = (80 * place, 200 - 60 * place, 5 * number, 255)
            image = Image.new("RGBA", (20, 16), colour).convert(mode)
            image.save(folder / name / f"photo {number}.{ending}")
    return folder


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name, in the current folder, of 40 images in three classes; one to train on and one held out are damaged."""
    folder = write_images(tmp_path / "user pics", CLASSES)
    for name in ("photo 1.jpg", "photo 2.webp"):
        (folder / "bus" / name).write_bytes(b"gone")
    monkeypatch.chdir(tmp_path)
    return "user pics"


# ---------------------------------------------------------------------------------------------------- early refusals

CONFIG = "recipes/configs/finetune_tiny_imagenet.yaml"
REFUSED = {  # arguments after FOLDER's: a part of the message
    ("data.source=nowhere",): "there is no 'nowhere'",
    (): "data.source is missing",
    ("data.source=FOLDER", "epochs=2.5"): "epochs is 2.5; allowed: a whole number",
    ("data.source=FOLDER", "epoch=2"): "epoch (did you mean epochs?)",
    ("data.source=FOLDER", "pretrained=runs/x"): "pretrained is 'runs/x', which does not exist",
    ("data.source=FOLDER", "data.validation=1.5"): "data.validation is 1.5; allowed: a fraction of the training",
    ("data.source=FOLDER", "data.validation=nan"): "data.validation: there is no 'nan'",
    ("data.source=FOLDER", "data.validation=0"): "data.validation is 0; allowed: a fraction of the training",
    ("--config", CONFIG, "data.source=FOLDER", "data.validation=2.5", "pretrained=null"): "data.validation is 2.5",
    ("data.source=FOLDER", "data.validation=nowhere"): "data.validation: there is no 'nowhere'",
    ("data.source=FOLDER", "global_batch=32"): "global_batch is 32; allowed: up to the 31 training images",
    ("data.source=FOLDER", "output_dir=FOLDER/bus/photo 0.png/x"): "is a file; allowed: a folder to write to",
    ("data.source=FOLDER", "output_dir=FOLDER/out"): "lies in the folder data.source=FOLDER: curves.png would be read",
    (
        "data.source=FOLDER",
        "output_dir=FOLDER",
    ): "be read as an image from then on; allowed: a folder outside",
    (
        "data.source=SINGLE",
        "data.validation=FOLDER",
        "output_dir=FOLDER/bus/x",
    ): "data.validation=FOLDER: curves.png",
    ("data.source=FOLDER/bus",): "holds images but no class folders; allowed: FOLDER/CLASS/IMAGE",
    ("data.source=PARENT",): "has one class folder; a classifier needs two classes",
    ("data.source=EMPTY",): "EMPTY hold no image: cat; fill or remove them",
    ("data.source=SINGLE",): "no images of SINGLE can be held out for validation, as no class has two; add images,",
    ("--config", CONFIG, "data.source=FOLDER"): "pretrained is 'runs/pretrain_tiny_imagenet/pretraining_model', which",
    ("--config", CONFIG, "data.source=FOLDER", "pretrained=null"): "global_batch is 512; allowed: up to the 31 ",
    ("--config", CONFIG, "data.source=FOLDER", "pretrained=null", "epochs=2"): "warmup_epochs is 5 but epochs is 2",
    ("--config", "nowhere.yaml", "data.source=FOLDER"): "No such file or directory",
    (
        "--config",
        "recipes/configs/pretrain_base.yaml",
        "data.source=FOLDER",
    ): "global_batch is 2048; allowed: up to the 40",
}
REFUSE_ALL = """
import contextlib, io, json, runpy, sys
told = []
for recipe, *arguments in json.load(sys.stdin):
    sys.argv = [recipe, *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            runpy.run_module(f"recipes.{recipe}", run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            told.append([stopped.code, printed.getvalue()])
print(json.dumps([told, sorted({"torch", "timm", "datasets", "pyarrow", "numpy"} & sys.modules.keys())]))
"""


def test_mistakes_are_told_before_torch_is_imported(
    images: str, repo: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("refused")
    words = {"FOLDER": os.path.abspath(images), "PARENT": os.getcwd()}
    words["EMPTY"] = str(write_images(outside / "empty", {"bus": 2, "cat": 0}))
    words["SINGLE"] = str(write_images(outside / "single", {"bus": 1, "cat": 1}))
    commands = []
    for arguments in REFUSED:
        filled = list(arguments)
        for word, path in words.items():
            filled = [argument.replace(word, path) for argument in filled]
        commands.append(["pretrain" if "pretrain_base" in " ".join(arguments) else "finetune", *filled])
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_ALL],
        input=json.dumps(commands), capture_output=True, text=True, cwd=repo, check=True,
    )  # fmt: skip
    told, imported = json.loads(done.stdout)
    for (code, message), (arguments, wanted) in zip(told, REFUSED.items(), strict=True):
        for word, path in words.items():
            message = message.replace(path, word)
        assert code == 1 and wanted in message and "Chosen for them" not in message, (wanted, message)
        assert "--config" in arguments or "has 1 problem:" in message, message  # none of values that nobody set
    assert imported == []


def test_the_images_package_is_run_where_it_is_imported_alone(repo: Path) -> None:
    code = "import recipes, sys; assert 'torch' not in sys.modules; print(sys.modules['arm_zoo.images'].__doc__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.stdout.startswith("Images in files:"), done.stderr


@pytest.mark.parametrize("recipe", ["finetune", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_ctrl_c_during_the_imports_ends_in_one_line(recipe: str, images: str, repo: Path) -> None:
    fake = Path("imports", "timm")  # the first of the imports that take seconds
    fake.mkdir(parents=True)
    lines = [
        "import signal",
        "if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # the tests run in the background of a shell",
        "    signal.signal(signal.SIGINT, signal.default_int_handler)",
        "signal.raise_signal(signal.SIGINT)",
        "raise ImportError",
    ]
    (fake / "__init__.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", f"recipes.{recipe}", f"data.source={images}", "model=arm_pico_patch2_8"]
    done = subprocess.run(
        [*command, "output_dir=out", "global_batch=8", "tracker=none"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(fake.parent.absolute()), str(repo)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted before the run began"


# --------------------------------------------------------------------------------------------------- images held out


def test_a_class_of_two_or_more_keeps_images_on_both_sides() -> None:
    assert [held_out(count, 0.2) for count in (0, 1, 2, 3, 7, 8, 13, 100)] == [0, 0, 1, 1, 1, 2, 3, 20]
    assert [held_out(count, 0.99) for count in (1, 2, 3, 100)] == [0, 1, 2, 99]


def test_the_images_held_out_are_those_of_this_rule() -> None:
    names = [f"pics/a/{number}.jpg" for number in range(10)] + ["pics/b/0.jpg", "pics/c/0.jpg", "pics/c/1.jpg"]
    classes = ["a"] * 10 + ["b"] + ["c"] * 2
    train, validation = split_rows(classes, names, 0.2)
    assert validation == [2, 6, 12] and sorted(train + validation) == list(range(13))
    moved = [f"/elsewhere/{name}" for name in names]
    assert split_rows(classes, moved, 0.2) == (train, validation)
    more = split_rows([*classes, "a"], [*names, "pics/a/new.jpg"], 0.2)[1]
    assert len(set(more) ^ set(validation)) <= 2  # at most one image is exchanged


def test_a_flat_folder_is_divided(images: str, tmp_path: Path) -> None:
    source = open_source(DataConfig(source=images))
    assert source.held_out == 0.2 and source.class_names == ("bus", "gold fish", "red-panda")
    train, validation = (split.classes_and_names() for split in (source.train, source.test))
    assert [validation[0].count(label) for label in range(3)] == [3, 3, 3] and len(train[0]) == 31
    assert not set(train[1]) & set(validation[1])
    shutil.copytree(images, tmp_path / "copy")
    copied = open_source(DataConfig(source=str(tmp_path / "copy"))).test.classes_and_names()[1]
    assert [name.replace(str(tmp_path / "copy"), images) for name in copied] == validation[1]
    assert source.test.encoded([4])[0].data == validation[1][4]
    half = open_source(DataConfig(source=images, validation=0.5), labels_needed=False)
    assert (len(half.train), len(half.test), half.held_out) == (20, 20, 0.5)
    assert open_source(DataConfig(source=images), labels_needed=False).test is None  # only where it is asked for


def test_rows_held_out_of_parquet_keep_their_numbers(tmp_path: Path) -> None:
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": b"gone", "path": None}] * 10, "label": [0, 1] * 5}
    Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "all.parquet")
    source = open_source(DataConfig(source=str(tmp_path / "all.parquet")))
    names = [table.classes_and_names()[1] for table in (source.train, source.test)]
    assert sorted([*names[0], *names[1]]) == sorted(f"row {number}" for number in range(10)) and len(names[1]) == 2
    assert source.test.encoded([1])[0].name.endswith(f", {names[1][1]}")
    with pytest.raises(SourceError, match=r"of a stream none can be held out; name some with data.validation=SOURCE"):
        open_source(DataConfig(source=str(tmp_path / "all.parquet"), streaming=True, num_classes=2))


def test_an_explicit_fraction_leaves_the_validation_split_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 4, "b": 4})
    write_images(tmp_path / "val", {"a": 1, "b": 1})
    assert open_source(DataConfig(source=str(tmp_path))).held_out is None
    divided = open_source(DataConfig(source=str(tmp_path), validation=0.25))
    assert (len(divided.train), len(divided.test), divided.held_out) == (6, 2, 0.25)
    write_images(tmp_path / "single", {"a": 1, "b": 1})
    with pytest.raises(SourceError, match="can be held out for validation, as no class has two"):
        open_source(DataConfig(source=str(tmp_path / "single")))


def test_another_fraction_is_another_run(tmp_path: Path) -> None:
    settings = [*SMALL, f"output_dir={tmp_path}", "data.source=digits", "warmup_epochs=0"]
    before = load_config(FinetuneConfig, None, settings, to_run=False)
    now = load_config(FinetuneConfig, None, [*settings, "data.validation=0.3"], to_run=False)
    start = Start(tmp_path, {"config": asdict(before), "position": {"step": 0}})
    compare(start, before, Console(stderr=True, markup=False, emoji=False))
    with pytest.raises(RunError, match=r"is of another run: data\.validation was None, is 0.3"):
        compare(start, now, Console(stderr=True, markup=False, emoji=False))


# --------------------------------------------------------------------------------------------------- fitted settings


@pytest.mark.parametrize("train", [2, 3, 6, 29, 31, 400, 1437, 50_000])
def test_fitted_settings_are_sound(train: int, images: str) -> None:
    config = FinetuneConfig(data=DataConfig(source=images))
    values = {key: value for each in choose(config, set(), Survey(train, 3)) for key, value in each.values.items()}
    assert values["model"] == values["pretrained"] == "arm_tiny_patch8_64"
    assert values["global_batch"] <= max(2, train // 3) and values["global_batch"] % 2 == 0
    assert 0 < values["warmup_epochs"] < values["epochs"] and values["epochs"] * train // values["global_batch"] >= 5
    assert values["base_lr"] * values["global_batch"] / 256 == pytest.approx(5e-4)
    grey = choose(config, set(), Survey(train, 3, grey=True))
    assert grey[0].values["pretrained"] == "arm_pico_patch2_8"
    assert all("data.flip" not in each.values for each in grey)


def test_what_is_set_wins_and_the_rest_follows(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    def resolved(*overrides: str) -> FinetuneConfig:
        return load_config(FinetuneConfig, None, [f"data.source={images}", *overrides], fit=fitted)

    config = resolved("epochs=1", "global_batch=4", "data.flip=0", "output_dir=here")
    assert (config.epochs, config.global_batch, config.data.flip, config.output_dir) == (1, 4, 0.0, "here")
    assert 0 < config.warmup_epochs < 1 and config.data.random_crop == (0.5, 1.0)
    table = capsys.readouterr().err
    assert "user pics: 31 images of 3 classes to train on" in table and "data.validation=0.2 " in table
    assert " epochs=1" not in table and "global_batch" not in table and "output_dir" not in table
    resolved()
    rows = [shlex.split(line) for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    typed = [word for row in rows for word in row if "=" in word]
    assert "output_dir=runs/user pics" in typed and "data.random_crop=[0.5,1.0]" in typed  # as a shell takes them
    assert resolved("warmup_epochs=30").epochs == 31
    assert resolved("pretrained=null").model == "arm_tiny_patch8_64" and resolved("pretrained=null").pretrained is None
    assert resolved("model=arm_tiny_patch4_32").pretrained is None
    assert resolved("pretrained=arm_tiny_patch4_32.arm_cifar10_ft_cifar10").model == "arm_tiny_patch4_32"
    with pytest.raises(ConfigError, match="'resnet50', which does not exist; allowed: an entry"):
        resolved("pretrained=resnet50")
    for model in ([], ["model=arm_tiny_patch8_64"]):
        with pytest.raises(ConfigError, match=r"'arm_tony', which does not exist; .* such as .*arm_tiny") as refused:
            resolved("pretrained=arm_tony", *model)
        assert list(refused.value.problems) == ["pretrained"]
    with pytest.raises(ConfigError) as refused:
        resolved("global_batch=32", "data.validation=1.5", "epochs=2.5", "warmup_epochs=150")
    assert sorted(refused.value.problems) == ["data.validation", "epochs", "global_batch"]


def test_a_folder_is_listed_anew_whenever_it_is_opened(images: str) -> None:
    config = FinetuneConfig(data=DataConfig(source=images))
    assert survey(config).classes == len(CLASSES)
    shutil.rmtree(Path(images, "bus"))
    assert open_source(config.data).class_names == tuple(sorted({*CLASSES} - {"bus"}))


def test_one_of_a_kind_is_told_in_the_singular(images: str) -> None:
    config, found = FinetuneConfig(data=DataConfig(source=images)), Survey(2, 2)
    assert "  1 step each\n" in described(config, found, choose(config, set(), found))
    assert "user pics: 1 image of 2 classes" in described(config, Survey(1, 2), [Choice("", {"epochs": 5})])


def test_a_class_may_be_called_like_a_split_where_validation_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pics", {"bus": 5, "test": 5})
    typed = [f"data.source={folder}", "data.validation=0.2", f"output_dir={tmp_path / 'out'}", *QUICK]
    config = load_config(FinetuneConfig, None, typed, fit=fitted)
    assert config.global_batch == 2 and config.data.validation == 0.2


def test_the_folder_of_results_is_never_another_sources(images: str, tmp_path: Path) -> None:
    def folder(source: str) -> str:
        return load_config(FinetuneConfig, None, [f"data.source={source}"], to_run=False, fit=fitted).output_dir

    assert folder(images) == folder(f"{images}/") == str(Path("runs", "user pics"))
    Path(folder(images)).mkdir(parents=True)
    Path(folder(images), "config.yaml").write_text(yaml.safe_dump({"data": {"source": images}, "global_batch": 8}))
    other = write_images(tmp_path / "other" / "user pics", {"a": 2, "b": 2})
    assert folder(images) == str(Path("runs", "user pics"))  # the same command goes on
    assert folder(str(other)) == str(Path("runs", "user pics-2"))
    Path("runs", "user pics-2").mkdir()
    Path("runs", "user pics-2", "notes.txt").write_text("somebody's own")
    assert folder(str(other)) == str(Path("runs", "user pics-3"))
    pattern = tmp_path / "tables" / "{train,val}*.parquet"
    for split in ("train", "val"):
        write_parquet(tmp_path / "tables" / f"{split}.parquet", [0, 1] * 4)
    assert folder(str(pattern)) == str(Path("runs", "tables"))  # a pattern is no name


def test_a_run_keeps_its_batch_where_images_were_added(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main("finetune", [f"data.source={images}", *SMALL, *QUICK])
    for number in range(30):
        shutil.copy(Path(images, "red-panda", "photo 0.png"), Path(images, "red-panda", f"more {number}.png"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as finished:
        command_line.main("finetune", [f"data.source={images}", *SMALL, *QUICK])
    told = capsys.readouterr().err
    assert finished.value.code == 0 and "is finished: 2 epochs are done" in told
    assert "global_batch=8" in told and "of the run in runs/user pics, to go on with" in told
    _, over, _ = read_command("finetune", [f"data.source={images}", *SMALL, *QUICK, "--resume", "none"])
    assert over.global_batch == 16


# ---------------------------------------------------------------------------------------------------- starting weights


def classifier(pretrained: Path | str, *names: str) -> Any:
    settings = ["model=arm_pico_patch2_8", "data.source=digits", "output_dir=out", "warmup_epochs=0"]
    torch.manual_seed(5)
    config = load_config(FinetuneConfig, None, [*settings, f"pretrained={pretrained}"])
    return create_classifier(config, names)


def test_an_entry_is_a_start_and_its_head_is_kept_for_its_own_classes(capsys: pytest.CaptureFixture[str]) -> None:
    bundled = timm.create_model("arm_pico_patch2_8", pretrained=True)
    digits = bundled.pretrained_cfg["label_names"]
    for entry in ("arm_pico_patch2_8", "arm_pico_patch2_8.arm_digits_ft_digits"):
        same = classifier(entry, *digits)
        assert all(torch.equal(a, b) for a, b in zip(same.parameters(), bundled.parameters(), strict=True))
        assert "is kept: it was trained on the same 10 classes" in capsys.readouterr().out
    for names in (digits[::-1], digits[:3]):  # another order, another number
        other = classifier("arm_pico_patch2_8", *names)
        assert torch.equal(other.blocks[0].mlp.fc1.weight, bundled.blocks[0].mlp.fc1.weight)
        assert other.head.weight.std() < 1e-4 and not other.head.bias.any()  # anew, both
        assert "was trained on other classes: a new head" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_a_short_name_whose_weights_are_not_to_be_had_is_told_with_the_ways_on(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARM_ZOO_UPSTREAM", "0")
    message = (
        f"the weights of arm_{size}_patch16_224.arm_in1k_ft_in1k are published only by their authors .*\\. Ways on:"
    )
    with pytest.raises(CheckpointError, match=message):
        starting_weights(f"arm_{size}")


def test_the_head_of_a_folder_goes_by_its_class_names(tmp_path: Path) -> None:
    bundled = timm.create_model("arm_pico_patch2_8", pretrained=True)
    bundled.save_pretrained(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    names = [f"class {number}" for number in range(10)]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"label_names": names}))
    for start in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        assert torch.equal(classifier(start, *names).head.weight, bundled.head.weight)
        assert not classifier(start, *bundled.pretrained_cfg["label_names"]).head.bias.any()
    shutil.copy(tmp_path / "run" / "model.safetensors", tmp_path / "alone.safetensors")  # classes unknown
    assert not classifier(tmp_path / "alone.safetensors", *names).head.bias.any()


def test_weights_with_another_head_end_in_one_line(tmp_path: Path) -> None:
    timm.create_model("arm_pico_patch2_8", pretrained=True).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    moved = {key.replace("head.", "head.1."): value for key, value in weights.items()}
    save_file(moved, tmp_path / "probe.safetensors", {"format": "pt"})
    with pytest.raises(MISTAKES) as refused:
        classifier(tmp_path / "probe.safetensors", *"abcdefghij")
    assert "head.1." in str(refused.value)


# ------------------------------------------------------------------------------------------------------- the whole run


def test_three_damaged_images_are_put_up_with_unless_a_share_is_set() -> None:
    check_undecodable(3, 30, "training", None)
    check_undecodable(10, 10_000, "training", None)
    with pytest.raises(SourceError, match=r"4 of 30 training images .* than the default of 0.001, or 3 images,"):
        check_undecodable(4, 30, "training", None)
    with pytest.raises(SourceError, match=r"1 of 30 training images .* data.max_undecodable=0 allows"):
        check_undecodable(1, 30, "training", 0.0)


def test_a_persons_own_images_in_one_command(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main("finetune", [f"data.source={images}", *SMALL, *QUICK])
    run = Path("runs", "user pics")
    out, err = capsys.readouterr()
    assert "top-1 " in out and "of 8 validation images; wrote runs/user pics" in out
    assert "2 damaged images were left out" in out
    assert "python -m arm_zoo predict IMAGE --model 'runs/user pics'" in out
    assert 'timm.create_model("local-dir:runs/user pics", pretrained=True)' in out
    held_out = (run / "validation.txt").read_text().splitlines()
    assert len(held_out) == 9 and all(Path(name).is_file() for name in held_out)
    assert "20% of the images (9) are held out for validation" in err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] == 2 and rows[-1]["undecodable"] == rows[-1]["images_skipped"] == 1
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert model.num_classes == 3
    with pytest.raises(SystemExit) as finished:
        command_line.main("finetune", [f"data.source={images}", *SMALL, *QUICK])
    assert finished.value.code == 0 and "runs/user pics is finished: 2 epochs are done" in capsys.readouterr().err


def test_folders_that_are_read_with_the_images(images: str) -> None:
    Path("link").symlink_to(images)
    for folder in (images, f"{images}/bus/out", "link/out"):
        assert is_read_with(Path(images), Path(folder))
        assert is_read_with(Path("link"), Path(folder))
    for folder in (f"{images}/.runs/out", f"{images} out", "out"):
        assert not is_read_with(Path(images), Path(folder))
    assert not is_read_with(Path(f"{images}/*.parquet"), Path(images, "out"))


def test_a_refused_start_leaves_the_list_of_held_out_images(images: str) -> None:
    command = [f"data.source={images}", *SMALL, *QUICK, "epochs=1", "global_batch=8", "output_dir=out"]
    command_line.main("finetune", command)
    before = Path("out", "validation.txt").read_text()
    shutil.copytree(Path(images, "gold fish"), Path(images, "goldfish"))
    with pytest.raises(SystemExit, match=r"was trained on other classes .* new: 'goldfish'"):
        command_line.main("finetune", [*command, "epochs=2"])
    assert Path("out", "validation.txt").read_text() == before


def test_square_brackets_are_printed_as_they_are(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"data.source={images}", *SMALL, *QUICK, "epochs=1", "output_dir=runs/o [x] :dog: [/x]"]
    command_line.main("finetune", command)
    with pytest.raises(SystemExit):
        command_line.main("finetune", command)
    out, err = capsys.readouterr()
    assert "runs/o [x] :dog: [/x] is finished: 1 epoch is done" in err and "wrote runs/o [x] :dog: [/x]" in out


@pytest.mark.slow
def test_the_included_model_learns_from_forty_images(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main("finetune", [f"data.source={images}", "device=cpu", "cpu_threads=1"])
    assert "top-1 100.00% of 8 validation images" in capsys.readouterr().out  # each class is of one colour
