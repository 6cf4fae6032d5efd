"""The training recipes: configuration, data, optimiser and the whole way from pretraining to a finetuned model."""

import copy
import csv
import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

import arm_zoo
from arm_zoo.files import recipe_of, replacing_files, save_model
from arm_zoo.heads.segmentation import HEADS
from arm_zoo.images.errors import SourceError
from arm_zoo.layers.mixer import MambaMixer
from arm_zoo.pretraining import DEFAULT_OBJECTIVE, OBJECTIVES
from recipes import command_line
from recipes.__main__ import main as list_commands
from recipes.command_line import RECIPES, carry_out, read_command
from recipes.config import ConfigError, FinetuneConfig, PretrainConfig, SegmentConfig, load_config
from recipes.data.batches import Batch
from recipes.data.built_in import OPENERS
from recipes.data.config import BUILT_IN, CORES, DataConfig
from recipes.data.loader import EvalLoader, TrainLoader
from recipes.data.sampling import batch_plan
from recipes.data.sources import open_source
from recipes.errors import RunError
from recipes.finetune import classification_loss, create_classifier, finetune
from recipes.objectives import TRAINING, Trained
from recipes.parsing import filled
from recipes.pretrain import pretrain
from recipes.probing.config import ProbeConfig
from recipes.quickstart import quickstart, show
from recipes.training import parallel, setup
from recipes.training.ema import FIGURES, winner
from recipes.training.engine import Trainer, seed_step
from recipes.training.export import input_config, save_pretraining
from recipes.training.optim import create_optimizer, learning_rate
from recipes.training.parallel import FAILED, Collectives, start_accelerator
from recipes.training.progress import Messages, ProgressDisplay, image_flops
from recipes.training.scoring import BATCH, evaluation
from tests import ROOT
from tests.helpers.images import write_folder
from tests.helpers.output import needs_full_disk

CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
FOLDER = CONFIGS[0].parent
PRETRAIN, FINETUNE = FOLDER / "pretrain_digits.yaml", FOLDER / "finetune_digits.yaml"
TINY = ["epochs=1", "warmup_epochs=0", "global_batch=256", "device=cpu", "tracker=none"]
TINY_ENCODER = ["model_args.embed_dim=16", "model_args.depth=1", "model_args.d_state=2"]


def recipe_for(file: Path) -> str:
    start = file.name.partition("_")[0]
    return start if start in RECIPES else "finetune"  # as supervised_base.yaml


def kind(file: Path) -> Any:
    return RECIPES[recipe_for(file)][0]


# ------------------------------------------------------------------------------------------------------ configurations


def test_tables_in_two_files_agree() -> None:
    """Configurations are read without torch, so they repeat names of what needs it."""
    assert BUILT_IN.keys() == OPENERS.keys()
    assert TRAINING.keys() == OBJECTIVES.keys()
    assert get_args(get_type_hints(SegmentConfig)["head"]) == tuple(HEADS)
    for name, (recipe, *_) in RECIPES.items():
        assert recipe_of(dataclasses.asdict(recipe())) == name


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configurations_load_and_their_models_can_be_built(file: Path) -> None:
    command = f"# accelerate launch -m recipes.{recipe_for(file)} --config recipes/configs/{file.name}"
    assert file.read_text().startswith(command)
    config = load_config(kind(file), file, to_run=False)
    model = config.build(device="meta")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert config.output_dir == f"runs/{file.stem}"
    assert config.data.workers <= CORES  # torch warns of more
    if "digits" in file.name:
        assert load_config(kind(file), file, ["epochs=3"]).epochs == 3  # sound from three epochs up


@pytest.mark.parametrize(("processes", "workers"), [("1", min(12, CORES)), (str(CORES), 1), (str(10 * CORES), 1)])
def test_training_processes_of_a_machine_share_its_cores(processes: str, workers: int) -> None:
    code = "from recipes.data.config import DataConfig; print(DataConfig().workers)"
    environment = os.environ | {"LOCAL_WORLD_SIZE": processes}
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert int(told.stdout) == workers


def test_shipped_configurations_are_the_papers() -> None:
    names = {file.stem for file in CONFIGS}
    sizes = ("base", "large", "huge")
    assert names >= {f"{phase}_{size}" for phase in ("pretrain", "finetune") for size in sizes}
    assert names >= {f"finetune_{size}_384" for size in sizes} | {"finetune_base_stride8_448"}
    assert names >= {"supervised_base", "supervised_large", "pretrain_digits", "finetune_digits"}
    assert names >= {f"{phase}_{data}" for phase in ("pretrain", "finetune") for data in ("tiny_imagenet", "cifar10")}
    peaks = {"base": (1600, 1.2e-3), "large": (1600, 6e-4), "huge": (800, 3e-4)}
    finetuning = {"base": (0.65, 0.1), "large": (0.75, 0.3), "huge": (0.75, 0.3)}
    for size in sizes:
        config = load_config(PretrainConfig, FOLDER / f"pretrain_{size}.yaml", to_run=False)
        assert (config.epochs, learning_rate(40, config)) == pytest.approx(peaks[size])
        assert (config.betas, config.clip_grad, config.precision) == ((0.9, 0.95), 3.0, "bf16")
        assert (config.warmup_epochs, config.min_lr, config.weight_decay) == (40, 0, 0.05)
        assert config.model_args == {"img_size": 192, "patch_size": 16, "cluster_size": 64}
        data = DataConfig(random_crop=(0.2, 1.0), flip=0.5)
        assert dataclasses.replace(config.data, workers=data.workers) == data
        for suffix in ("", "_384"):
            tuned = load_config(FinetuneConfig, FOLDER / f"finetune_{size}{suffix}.yaml", to_run=False)
            assert (tuned.layer_decay, tuned.drop_path) == finetuning[size]
            assert (tuned.epochs, tuned.ema_decay, tuned.clip_grad) == (100, 0.99992, None)
            assert learning_rate(5, tuned) == pytest.approx(2e-3)
            assert (tuned.warmup_epochs, tuned.min_lr, tuned.weight_decay) == (5, 1e-6, 0.05)
    data = DataConfig(random_crop=(0.08, 1.0), flip=0.5, randaugment="rand-m9-mstd0.5-inc1", erase=0.25)
    small = ("digits", "pieces", "cifar10", "tiny_imagenet")
    for file in CONFIGS:
        if kind(file) is not FinetuneConfig or file.stem.endswith(small):
            continue
        config = load_config(FinetuneConfig, file, to_run=False)
        assert dataclasses.replace(config.data, workers=data.workers) == data
        mixed = config.mixup, config.cutmix, config.mixup_probability, config.mixup_switch_probability
        assert (*mixed, config.label_smoothing, config.betas) == (0.8, 1.0, 1.0, 0.5, 0.1, (0.9, 0.999))
    supervised = load_config(FinetuneConfig, FOLDER / "supervised_large.yaml", to_run=False)
    assert learning_rate(5, supervised) == pytest.approx(1e-3) and supervised.ema_decay == 0.99996
    assert (supervised.layer_decay, supervised.weight_decay, supervised.min_lr) == (1.0, 0.05, 1e-5)
    vim = {"tiny": (1024, 0.1, 0.0), "small": (512, 0.05, 0.05), "base": (1024, 0.1, 0.1)}
    for size, settings in vim.items():  # the scripts of hustvl/Vim; the base size is ours
        config = load_config(FinetuneConfig, FOLDER / f"supervised_vim_{size}.yaml", to_run=False)
        assert (config.global_batch, config.weight_decay, config.drop_path) == settings
        assert learning_rate(5, config) == pytest.approx(1e-3)
    for size in ("tiny", "small"):
        config = load_config(FinetuneConfig, FOLDER / f"finetune_vim_{size}_stride8.yaml", to_run=False)
        assert learning_rate(5, config) == learning_rate(29.9, config) == pytest.approx(1e-5)


def test_print_config_shows_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["epochs=7", "data.source=digits", "betas=[0.8, 0.9]", "model_args.d_state=4"]
    with pytest.raises(SystemExit, match=r"^0$"):
        command_line.main("pretrain", ["--config", str(PRETRAIN), *arguments, "--print-config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(PretrainConfig, tmp_path / "printed.yaml") == load_config(PretrainConfig, PRETRAIN, arguments)
    with pytest.raises(SystemExit, match=r"^0$"):  # nothing needs to exist yet
        command_line.main("finetune", ["--config", str(FOLDER / "finetune_base.yaml"), "--print-config"])
    assert "layer_decay: 0.65" in capsys.readouterr().out


@pytest.mark.parametrize("name, drop_path", [("tiny", 0.2), ("small", 0.3), ("base", 0.6)])
def test_settings_of_vmamba_are_the_authors(name: str, drop_path: float) -> None:
    config = load_config(FinetuneConfig, FOLDER / f"supervised_vmamba_{name}.yaml", to_run=False)
    rates = [learning_rate(epoch, config) for epoch in (10, 20, 160, 300)]
    assert rates == pytest.approx([5e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5])
    assert (config.drop_path, config.weight_decay, config.clip_grad) == (drop_path, 0.05, 5.0)
    assert (config.warmup_epochs, config.ema_decay) == (20, 0.9999)
    groups = create_optimizer(config.build(device="meta"), config).param_groups
    assert {(group["lr_scale"], group["weight_decay"]) for group in groups} == {(1.0, 0.05), (1.0, 0.0)}


def test_recipes_alone_lists_its_commands(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list_commands([])
    told = capsys.readouterr().out
    programs = [file.stem for file in (repo / "recipes").glob("*.py") if '__name__ == "__main__"' in file.read_text()]
    assert len(programs) > 5
    assert all(f"python -m recipes.{name} " in told for name in programs if name != "__main__")


BAD = {  # recipe, override: a part of the message
    ("pretrain", "data.source=nowhere"): "there is no 'nowhere'",
    ("pretrain", "data.source=EMPTY"): "is empty; allowed: a folder of images",
    ("pretrain", "model=arm_giant"): "unknown pretraining model 'arm_giant'; choose one of arm_pico",
    ("pretrain", "model=arm_pico_patch2_8"): "unknown pretraining model 'arm_pico_patch2_8'; did you mean arm_pico?",
    ("pretrain", "model_args.img_size=9"): "img_size (9, 9) must be a multiple of cluster_size (4, 4), for example",
    ("pretrain", "objective=contrastive"): "unknown objective 'contrastive'; choose one of autoregressive",
    ("pretrain", "model_args.objective=autoregressive"): "multiple values for argument 'objective'",
    ("pretrain", "model_args.width=9"): "unknown keyword width; the model takes",
    ("pretrain", "output_dir=FILE/run"): "FILE is a file; allowed: a folder to write to",
    ("pretrain", "device=gpu"): "device is gpu; allowed: auto, cpu",
    ("pretrain", "global_batch=63"): "global_batch is 63; allowed: an even number, such as 64, as every recipe draws",
    ("pretrain", "global_batch=2048"): "global_batch is 2048; allowed: up to the 1437 training images",
    ("pretrain", "dvae=DVAE"): "dvae is DVAE but model_args.target is normed_pixel; allowed: dvae=FILE with",
    ("pretrain", "model_args.target=dvae_tokens"): "dvae is None but model_args.target is dvae_tokens; allowed: dvae=",
    ("pretrain", "model_args.prediction_order=spiral"): "prediction_order is 'spiral'; choose one of row, row_revers",
    ("pretrain", "model_args.cluster_size=6"): "img_size (8, 8) must be a multiple of cluster_size (6, 6)",
    ("dvae", "model_args.img_size=20"): "DVAE: img_size must be a multiple of 8, got 20",
    ("dvae", "model_args.width=9"): "dvae: unknown keyword width; the model takes device, img_size, in_chans",
    ("dvae", "model=arm_tiny"): "model is arm_tiny; allowed: dvae",
    ("pretrain", "fsdp=true"): "fsdp is true, but there is one process",
    ("pretrain", "model_args.in_chans=3"): "the model takes 3 channels, the images have 1",
    ("pretrain", "tracker=abacus"): "tracker is abacus; allowed: tensorboard, wandb, trackio, none",
    ("pretrain", "cuda_graphs=true"): "cuda_graphs is true; allowed: only with compile=true and fsdp=false",
    ("pretrain", "compile=maybe"): "compile is maybe; allowed: true or false",
    ("pretrain", "epochs=*a"): "epochs is *a; allowed: a whole number, 1 or more",
    ("pretrain", "betas=[0.9"): "betas is [0.9; allowed: a list of two numbers",
    ("pretrain", "model_args.img_size={"): "model 'arm_pico' with model_args.img_size='{'",
    ("pretrain", "model_args.img_size=abc"): "model 'arm_pico' with model_args.img_size='abc'",
    ("pretrain", "base_lr=inf"): "base_lr is inf; allowed: a number above 0, and finite",
    ("pretrain", "min_lr=10"): "min_lr is 10 but the peak is",
    ("finetune", "model=resnet50"): "model 'resnet50': unknown; choose one of arm_base",
    ("pretrain", "data.train_size=12"): "data.train_size has no use in data.source=digits; leave it out",
    ("pretrain", "model_args.img_size=[8]"): "img_size must be a whole number or two, (height, width), got [8]",
    ("pretrain", "model_args.decoder_dim=null"): "decoder_dim must be a whole number, got None",
    ("pretrain", "model_args.device=meta"): "model_args.device is meta, but the recipe chooses the device; type",
    ("finetune", "model_args.dtype=float16"): "model_args.dtype is float16, but parameters are float32; type",
    ("finetune", "model_args.pretrained=true"): "but the recipe loads the weights; type pretrained=WEIGHTS",
    ("finetune", "model_args.drop_path_rate=0"): "but the recipe has a setting for it; type drop_path=RATE",
    ("finetune", "model_args.features_only=true"): "it is no setting of a model that a recipe takes; leave it out",
    ("finetune", "model_args.num_classes=5"): "model_args.num_classes is 5, but digits has 10 classes",
    ("finetune", "data.num_classes=5"): "the digits have 10 classes, but data.num_classes is 5",
    ("finetune", "pretrained=FILE"): "FILE",
    ("finetune", "layer_decay=1.5"): "layer_decay is 1.5; allowed: above 0, up to 1",
}


@pytest.mark.parametrize(("recipe", "override"), BAD)
def test_bad_input_ends_in_a_message(
    recipe: str, override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("no weights")
    value = override
    for name in ("EMPTY", "FILE"):
        value = value.replace(name, str(tmp_path / name))
    file = FOLDER / f"{recipe}_digits.yaml"
    with pytest.raises(SystemExit) as refused:
        command_line.main(recipe, ["--config", str(file), f"output_dir={tmp_path / 'run'}", "tracker=none", value])
    printed = capsys.readouterr().err + str(refused.value.code)
    assert refused.value.code not in (None, 0) and BAD[recipe, override] in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "checkpoints").exists()


FAILURES: Mapping[str, tuple[Exception, str]] = {
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "Permission denied: '/a/file'"),
    "no file named": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device (" + __file__),
    "weights": (SafetensorError("HeaderTooLarge"), "SafetensorError: HeaderTooLarge (" + __file__),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_files_end_in_a_message(failure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error, message = FAILURES[failure]

    def run(*arguments: object) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        carry_out(*read_command("pretrain", ["--config", str(PRETRAIN), f"output_dir={tmp_path}"]), run)
    assert message in str(stopped.value.code) and str(stopped.value.code).startswith("python -m recipes.pretrain: ")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "model.safetensors", "curves.png"])
def test_full_disk_is_told_with_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as stopped:
        command_line.main("pretrain", ["--config", str(PRETRAIN), *TINY, *TINY_ENCODER, f"output_dir={tmp_path}"])
    code = str(stopped.value.code)
    assert "No space left on device" in code and str(tmp_path) in code and name in code
    assert not list(tmp_path.rglob(".partial*"))


def test_errors_of_the_system_that_name_no_file_get_its_name(tmp_path: Path) -> None:
    named = pytest.raises(OSError, match=r"No space left on device: '.*run/notes\.txt'")
    with named, replacing_files(tmp_path / "run") as beside:
        (beside / "notes.txt").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list((tmp_path / "run").iterdir())


def test_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tracker is trackio, which is not installed; type `pip install trackio`"):
        load_config(PretrainConfig, PRETRAIN, ["tracker=trackio"])


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(2):
        with pytest.raises(RunError, match=r"WORLD_SIZE is 2 .* `torchrun --nproc_per_node 2 -m recipes\.pretrain"):
            start_accelerator(load_config(PretrainConfig, PRETRAIN))
        monkeypatch.setenv("RANK", "0")  # and still nobody to meet


@pytest.mark.parametrize("asked, here, bound", [("auto", "cuda", "cpu"), ("cpu", "cpu", "cuda")])
def test_runs_that_would_not_get_the_device_they_ask_for_are_refused(
    asked: str, here: str, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where an earlier run has chosen the device."""
    on_cpu, other = (load_config(PretrainConfig, PRETRAIN, [f"device={device}"]) for device in ("cpu", asked))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if bound == "cpu":
        for _ in range(2):
            assert start_accelerator(on_cpu).device.type == "cpu"
    else:
        assert PartialState().device.type == "cuda"
    with pytest.raises(RunError, match=f"device is {asked}, here {here}, but .* to {bound}; start .* of its own"):
        start_accelerator(other)


def test_accelerate_may_be_told_to_leave_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for _ in range(2):
        assert start_accelerator(load_config(PretrainConfig, PRETRAIN, ["device=auto"])).device.type == "cpu"


def test_a_configuration_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"model\.safetensors: 'utf-8' codec .*; allowed: a YAML file of keys"):
        load_config(PretrainConfig, tmp_path / "model.safetensors", to_run=False)


def test_global_batch_is_split_evenly() -> None:
    assert batch_plan(1024, 8) == (128, 1)
    assert batch_plan(1024, 8, 64) == (64, 2)
    assert batch_plan(1024, 8, 100) == (64, 2)
    assert batch_plan(96, 1, 40) == (32, 3)
    assert batch_plan(28, 1, 2) == (2, 14)
    with pytest.raises(
        ConfigError, match=r"2048 does not split over 3 processes .* a multiple of 6, such as 2046 or 2052"
    ):
        batch_plan(2048, 3)
    with pytest.raises(ConfigError, match=r"6 does not split over 4 processes .* a multiple of 8, such as 8$"):
        batch_plan(6, 4)


def test_all_problems_of_a_configuration_come_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(PretrainConfig, None, ["epochs=2.5", "epoch=3", "betas=1", "warmup_epochs=-1"])
    message = str(refused.value)
    assert "epochs is 2.5; allowed: a whole number" in message
    assert "epoch (did you mean epochs?)" in message
    assert "betas is 1; allowed: a list of two numbers" in message
    assert "warmup_epochs is -1; allowed: a number, 0 or more" in message
    assert "model is missing" in message and "output_dir is missing" in message


def test_paths_may_begin_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave the ~ of key=~/folder alone, which would be a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    keys = {FinetuneConfig: ("output_dir", "pretrained"), PretrainConfig: ("dvae",),
            ProbeConfig: ("output", "cache", "export")}  # fmt: skip
    for kind, names in keys.items():
        tokens = ["model_args.target=dvae_tokens"] if kind is PretrainConfig else []
        config = load_config(kind, None, [*tokens, *(f"{name}=~/{name}.csv" for name in names)], to_run=False)
        assert [getattr(config, name) for name in names] == [str(tmp_path / f"{name}.csv") for name in names]


def test_refused_values_are_left_out() -> None:
    problems: dict[str, str] = {}
    config = filled(PretrainConfig, {"betas": "[0.9, 1]", "data.random_crop": "[0.5, 0.2]", "seed": "-1"}, problems)
    assert config == PretrainConfig() and problems.keys() == {"betas", "data.random_crop", "seed"}


TYPED = {  # override: what it comes to; a message where it is refused
    "base_lr=1e-3": 1e-3,
    "base_lr=true": "a number above 0, and finite",
    "clip_grad=null": None,
    "seed=7.0": "a whole number from 0 to 4294967295",
    "epochs=true": "a whole number, 1 or more",
    "epochs=null": "a whole number, 1 or more",
    "betas=[true, 0.9]": "a list of two numbers",
    "betas=[0.8]": "a list of two numbers",
    "betas=[1e-1, 0.9]": (0.1, 0.9),
    "data.random_crop=null": None,
    "data.random_crop=[0.9, 0.2]": "two fractions of the image's area, as in [0.2, 1.0], or null",
    "data.validation=0.25": 0.25,
    "data.validation=1": "a fraction of the training images above 0 and below 1",
    "data.validation=./1": "./1",
    "data.image_column=007": "007",
    "data.image_column=null": None,
    "output_dir=1e-3": "1e-3",
    "output_dir=null": "null",
    "output_dir=[x": "[x",
    "output_dir=a=b: c #d": "a=b: c #d",
    "model_args.img_size=[8, 1e1]": [8, 10.0],
    "model_args.name=abc": "abc",
    "output_dir=${oc.env:HOME}/x": "the value itself, as ${...} and ??? stand for nothing here",
    "model_args.width=${seed}": "the value itself, as ${...} and ??? stand for nothing here",
    "betas=[${seed}, 0.9]": "the value itself, as ${...} and ??? stand for nothing here",
    "output_dir=???": "the value itself, as ${...} and ??? stand for nothing here",
    "data.source=train-???.tar": "train-???.tar",
}


@pytest.mark.parametrize("override", TYPED)
def test_values_are_of_their_type_and_text_stays_text(override: str, tmp_path: Path) -> None:
    expected = TYPED[override]
    key, _, text = override.partition("=")
    try:
        config: Any = load_config(PretrainConfig, None, [override], to_run=False)
    except ConfigError as refused:
        assert str(refused.problems[key]).startswith(f"{key} is {text}; allowed: {expected}")
        return
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    assert config == expected and type(config) is type(expected)


def test_a_file_says_the_same_as_a_command(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("base_lr: 1e-3\ndata.source: digits\ndata: {flip: 0.5, erase: 0}\nmodel_args: {depth: 1}\n")
    config = load_config(PretrainConfig, file, ["data.flip=1"], to_run=False)
    assert (config.base_lr, config.model_args, config.data.flip) == (1e-3, {"depth": 1}, 1.0)
    assert config.data.source == "digits" and config.data.erase == 0.0
    file.write_text("data:\nmodel_args:\noutput_dir: ~/runs\n")
    config = load_config(PretrainConfig, file, to_run=False)
    assert config == PretrainConfig(output_dir=str(Path.home() / "runs"))
    for content, told in {
        "output_dir: 007": "output_dir is 7; allowed: a folder",  # it would become another text
        "epochs: 1\nepochs: 2": "duplicate key",
        "[1, 2]": "it holds a list",
        "data: digits": "no key of PretrainConfig: data",
        "output_dir: ${seed}": "output_dir is ${seed}; allowed: the value itself",
    }.items():
        file.write_text(content)
        with pytest.raises(ConfigError) as refused:
            load_config(PretrainConfig, file, to_run=False)
        assert told in str(refused.value)


def test_conflicts_between_values_are_refused() -> None:
    settings = ["model=arm_pico", "output_dir=out", "data.source=digits", "epochs=5", "warmup_epochs=5"]
    with pytest.raises(ConfigError, match="warmup_epochs is 5 but epochs is 5; allowed: fewer"):
        load_config(PretrainConfig, None, settings)
    with pytest.raises(ConfigError, match="'runs/nowhere', which does not exist"):
        load_config(FinetuneConfig, None, [*settings, "epochs=9", "pretrained=runs/nowhere"])


def test_learning_rate_is_the_official_one(golden: Path) -> None:
    with open(golden / "optim" / "lr_schedule.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] in ("pretrain_b", "finetune_b", "no_warmup")]
    assert len(rows) > 100
    plain = load_config(PretrainConfig, PRETRAIN, ["global_batch=256"])
    for row in rows:
        settings = {key: float(row[key]) for key in ("min_lr", "warmup_epochs", "epochs")}
        config = dataclasses.replace(plain, base_lr=float(row["lr"]), **settings)
        rate = learning_rate(float(row["epoch_float"]), config) * float(row["group_lr_scale"])
        assert rate == pytest.approx(float(row["lr_set"]), rel=1e-12, abs=1e-18)


def test_parameter_groups_leave_frozen_and_one_dimensional_parameters_undecayed() -> None:
    model = arm_zoo.create_pretraining_model("arm_pico", embed_dim=16, depth=1, decoder_dim=64, decoder_depth=1)
    groups = create_optimizer(model, PretrainConfig(weight_decay=0.05)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    mixer = model.blocks[0].mixer
    assert id(model.pos_embed) not in decay and id(model.decoder_pos_embed) not in decay
    assert decay[id(mixer.A_log)] == decay[id(mixer.conv_weight)] == decay[id(model.query_token)] == 0.05
    assert decay[id(mixer.D)] == decay[id(mixer.conv_bias)] == decay[id(mixer.dt_proj_bias)] == 0
    assert sum(p.requires_grad for p in model.parameters()) == len(decay)


def scale_and_decay(name: str, depth: int) -> tuple[float, float]:
    """Of a parameter of an ARM backbone with so many blocks, for layer_decay=0.5 and weight_decay=0.3."""
    blocks = {f"blocks.{number}.": 0.5 ** (depth - number) for number in range(depth)}
    scales = blocks | dict.fromkeys(("patch_embed", "cls_token", "pos_embed"), 0.5 ** (depth + 1))
    undecayed = ("bias", "cls_token", "pos_embed", "mixer.D", "norm")
    scale = next((value for start, value in scales.items() if name.startswith(start)), 1.0)
    return scale, 0.0 if any(part in name for part in undecayed) else 0.3


def test_layer_decay_by_hand() -> None:
    model = timm.create_model("arm_pico_patch2_8", embed_dim=16, depth=2)
    found = {}
    for group in create_optimizer(model, FinetuneConfig(weight_decay=0.3, layer_decay=0.5)).param_groups:
        found |= {id(parameter): (group["lr_scale"], group["weight_decay"]) for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert found[id(parameter)] == scale_and_decay(name, 2), name


def test_moving_average_by_hand() -> None:
    """timm's average is the plain one from the first step on, over parameters and buffers."""
    model = nn.BatchNorm1d(1)
    ema = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        for value in (2.0, 4.0):
            model.weight.fill_(value)
            model.running_mean.fill_(-value)
            model.num_batches_tracked.fill_(int(value))
            ema.update(model)
    state = ema.module.state_dict()
    assert state["weight"].item() == 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4
    assert state["running_mean"].item() == 0.75 * (0.25 * -2) + 0.25 * -4
    assert state["num_batches_tracked"].item() == 4


def test_the_average_wins_only_if_it_scored_higher() -> None:
    rows = {(50.0, 51.0): "ema", (51.0, 50.0): "model", (50.0, 50.0): "model"}
    assert {scores: winner(dict(zip(("top1", "top1_ema"), scores, strict=True))) for scores in rows} == rows
    assert winner({"loss": 1.0}) == winner({"top1": 0.0}) == "model"  # without labels, and without an average


def test_a_classifier_of_the_same_classes_keeps_its_head(tmp_path: Path) -> None:
    """As many classes are not enough: they are the same by their names. A new head is new as a whole."""
    saved = timm.create_model("arm_pico_patch2_8", pretrained=True)
    saved.save_pretrained(tmp_path)
    names = saved.pretrained_cfg["label_names"]
    config = load_config(FinetuneConfig, FINETUNE, [f"pretrained={tmp_path}"])
    with pytest.raises(SourceError, match="digits has no class but zero; allowed: two classes or more"):
        create_classifier(config, ["zero"])
    kept = create_classifier(config, names).get_classifier()
    assert torch.equal(kept.weight, saved.head.weight) and torch.equal(kept.bias, saved.head.bias)
    for others in (names[::-1], names[:9], [*names[:9], "ten"]):
        drawn = create_classifier(config, others).get_classifier()
        assert drawn.weight.std().item() == pytest.approx(2e-5, rel=0.3) and not drawn.bias.any(), others


def test_weights_of_other_channels_than_the_entrys_are_adapted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The entry is of grey images; what was pretrained on colour ones tells its own channels."""
    pretrained = arm_zoo.create_pretraining_model("arm_pico", in_chans=3)
    described = {**pretrained.hub_config(), "pretrained_cfg": {"input_size": [3, 8, 8]}}
    save_model(tmp_path, pretrained.state_dict(), described)
    grey = load_config(FinetuneConfig, FINETUNE, [f"pretrained={tmp_path}"])
    colour = load_config(FinetuneConfig, FINETUNE, [f"pretrained={tmp_path}", "model_args.in_chans=3"])
    weight = pretrained.patch_embed.proj.weight
    assert torch.equal(create_classifier(colour, "ab").get_parameter("patch_embed.proj.weight"), weight)
    adapted = create_classifier(grey, "ab").get_parameter("patch_embed.proj.weight")
    torch.testing.assert_close(adapted, weight.sum(dim=1, keepdim=True))  # as timm does it
    assert not caplog.records


@pytest.mark.parametrize("pretrained", [None, "pretraining_model"])
def test_short_names_of_models_are_trained(pretrained: str | None, tmp_path: Path) -> None:
    """A backbone is called by the name that it was pretrained under: model=vim_tiny in both recipes."""
    small = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1}
    before = arm_zoo.create_pretraining_model("vim_tiny", cluster_size=4, **small)
    save_model(tmp_path / "pretraining_model", before.state_dict(), before.hub_config())
    start = None if pretrained is None else str(tmp_path / pretrained)
    config = FinetuneConfig(model="vim_tiny", model_args=small, pretrained=start)
    model = create_classifier(config, "ab")
    source: Any = SimpleNamespace(channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert input_config(model, config, source)["input_size"] == (3, 8, 8)


def mixing(*overrides: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, FINETUNE, ["mixup=0.8", "cutmix=0", "label_smoothing=0.2", *overrides])


def test_mixup_by_hand() -> None:
    images, classes = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8).clone(), torch.tensor([3, 5])
    logits = torch.linspace(0, 1, 10).repeat(2, 1)
    seen = []

    def model(mixed: torch.Tensor) -> torch.Tensor:
        seen.append(mixed[:, 0, 0, 0].tolist())
        return logits

    seed_step(0, 1, 2, 0, 0)
    loss = classification_loss(mixing(), 10)(model, Batch(images, classes, torch.arange(2), []))
    seed_step(0, 1, 2, micro_batch=3, process=7)  # the draws are the same in all parts of a global batch
    np.random.rand()  # against the probability 1 of mixing at all
    share = np.random.beta(0.8, 0.8)
    assert seen == [pytest.approx([1 - share, share])]
    target = torch.full((2, 10), 0.2 / 10)
    target[0, 3] += 0.8 * share
    target[0, 5] += 0.8 * (1 - share)
    target[1, 5] += 0.8 * share
    target[1, 3] += 0.8 * (1 - share)
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_every_pass_draws_by_its_position_and_mixing_by_that_of_its_step() -> None:
    def drawn(position: list[int]) -> tuple[float, float]:
        seed_step(*position)
        return np.random.rand(), torch.rand(()).item()

    position = [5, 1, 2, 3, 4]  # seed, epoch, step, micro-batch, process
    first = drawn(position)
    assert drawn(position) == first
    for place in range(5):
        mixed, other = drawn([number + (place == each) for each, number in enumerate(position)])
        assert other != first[1] and (mixed == first[0]) == (place > 2)


def test_batches_are_mixed_as_often_as_asked_for() -> None:
    """Of a black and a white image, mixup makes grey ones, and cutmix ones of both colours."""
    loss_of = classification_loss(mixing("cutmix=1", "mixup_probability=0.6", "mixup_switch_probability=0.25"), 10)
    found = Counter[str]()

    def model(images: torch.Tensor) -> torch.Tensor:
        colours = images[0].unique().tolist()
        found["plain" if colours == [0] else "cutmix" if colours == [0, 1] else "mixup"] += 1
        return torch.zeros(2, 10)

    for step in range(1000):
        seed_step(0, 0, step, 0, 0)
        images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).repeat(1, 1, 16, 16)
        loss_of(model, Batch(images, torch.tensor([3, 5]), torch.arange(2), []))
    assert abs(found["mixup"] - 450) < 50 and abs(found["cutmix"] - 150) < 40 and abs(found["plain"] - 400) < 50


@pytest.mark.parametrize("overrides", [(), ("mixup=0", "cutmix=1")])
def test_mixing_is_the_same_for_any_number_of_processes_and_parts(overrides: tuple[str, ...]) -> None:
    config = mixing(*overrides, "global_batch=64")
    source = open_source(config.data)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    loss_of = classification_loss(config, 10)

    def loss(processes: int, most: int | None) -> float:
        plan = batch_plan(64, processes, most)
        total = 0.0
        for process in range(processes):
            loader = TrainLoader(source, config, plan, (8, 8), process, processes, torch.device("cpu"))
            for number, batch in enumerate(next(iter(loader.epoch(1, 3)))):
                seed_step(config.seed, 1, 3, number, process)
                total += loss_of(network, batch).item() / plan.accumulation / processes
        return total

    assert loss(1, None) == pytest.approx(loss(2, None), rel=1e-5)
    assert loss(1, None) == pytest.approx(loss(4, 4), rel=1e-5)


class Cats(nn.Module):
    """Says class 0 of every image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).repeat(len(images), 1)


def test_a_failure_while_scoring_is_told_to_the_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    settings = [f"data.source={tmp_path}", "data.workers=0", "model_args.in_chans=3", f"output_dir={tmp_path / 'run'}"]
    config = load_config(FinetuneConfig, FINETUNE, [*TINY, *settings], to_run=False)
    inputs = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0,
              "interpolation": "bicubic", "crop_mode": "squash"}  # fmt: skip
    accelerator = start_accelerator(config)
    told: list[int] = []
    monkeypatch.setattr(Collectives, "largest", lambda _, number: told.append(number) or number)
    monkeypatch.setattr(Cats, "forward", lambda *_: 1 / 0)
    source = open_source(config.data, labels_needed=True)
    evaluate = evaluation(config, Collectives(accelerator), {"model": Cats()}, source, inputs)
    with pytest.raises(ZeroDivisionError):
        evaluate(1)
    assert told == [FAILED]


def test_damaged_held_out_images_are_counted_named_and_limited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "val", {"cat": 3, "dog": 4})
    for file in (tmp_path / "val").glob("*/[26].jpg"):  # a cat and a dog
        file.write_bytes(b"gone")

    def scores(limit: float) -> dict[str, float]:
        settings = [
            f"data.source={tmp_path}",
            "data.workers=0",
            f"data.max_undecodable={limit}",
            "model_args.in_chans=3",
        ]
        config = load_config(
            FinetuneConfig, FINETUNE, [*TINY, *settings, f"output_dir={tmp_path / 'run'}"], to_run=False
        )
        inputs = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0,
                  "interpolation": "bicubic", "crop_mode": "squash"}  # fmt: skip
        accelerator = start_accelerator(config)
        source = open_source(config.data, labels_needed=True)
        return evaluation(config, Collectives(accelerator), {"model": Cats()}, source, inputs)(1)

    assert scores(0.3) == {"top1": pytest.approx(40), "images_scored": 5, "images_skipped": 2}
    for name in ("cat/2.jpg", "dog/6.jpg"):
        assert caplog.text.count(f"{name} cannot be decoded") == 1
    with pytest.raises(
        SourceError, match=r"2 of 7 validation images cannot be decoded, .* data.max_undecodable=0.28 "
    ):
        scores(0.28)
    for file in (tmp_path / "val").glob("*/*.jpg"):
        file.write_bytes(b"gone")
    with pytest.raises(RunError, match="none of the 7 validation images can be decoded"):
        scores(0.99)


def test_a_run_falls_silent_where_nobody_reads_its_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", closefd=False) as errors:
        monkeypatch.setattr(sys, "stderr", errors)
        console = Messages(stderr=True)
        for epoch in range(2):
            console.print(f"epoch {epoch}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # takes what the file still holds
    assert console.quiet


@needs_full_disk
def test_print_config_tells_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "stdout", full)
        command_line.main("pretrain", ["--config", str(PRETRAIN), "--print-config"])
    said = "python -m recipes.pretrain: [Errno 28] No space left on device: 'standard output'\n"
    assert ended.value.code == 1 and capsys.readouterr().err == said


@pytest.mark.parametrize("peak", [None, 1000.0])
def test_the_bar_shows_no_figures_before_the_first_reading(peak: float | None) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    config = FinetuneConfig(epochs=2, global_batch=100, device="cpu", tracker="none")
    display = ProgressDisplay(start_accelerator(config), console, "train", config, 5, peak)

    def shown() -> str:
        with console.capture() as capture:
            console.print(display.bar.get_renderable())
        return capture.get()

    display.begin(0)
    assert "loss -" in shown() and "nan" not in shown() and "img/s" not in shown()
    display.step(1, {"loss": 2.5})
    assert re.search(r"loss 2.500  [\d,]+ img/s.* GiB", shown())
    assert ("% of GEMM peak" in shown()) == (peak is not None)


@pytest.mark.parametrize(
    "terminal, lines",
    [
        (True, "epoch 2/2  loss 1.5  top1 97.22\n"),
        (False, "epoch 1/2  loss 2.5  processes 1\nepoch 2/2  loss 1.5  processes 1  top1 97.22\n"),
    ],
)
def test_scores_are_printed_above_the_bar_and_all_figures_where_there_is_none(terminal: bool, lines: str) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=160, force_terminal=terminal, color_system=None)
    config = FinetuneConfig(epochs=2, global_batch=100, device="cpu", tracker="none")
    display = ProgressDisplay(start_accelerator(config), console, "train", config, 5, None)
    display.epoch(5, {"epoch": 1, "loss": 2.5, "processes": 1})
    display.epoch(10, {"epoch": 2, "loss": 1.5, "processes": 1, "top1": 97.2222})
    assert printed.getvalue() == lines


def test_flops_are_those_of_the_matrix_products() -> None:
    def build(device: str) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5, device=device))

    assert image_flops(build, (3, 2, 2)) == 3 * 2 * 12 * 5
    config = load_config(PretrainConfig, PRETRAIN)
    assert image_flops(config.build, (1, 8, 8)) > 3 * 2 * 12 * 64 * 256 * 4  # more than its input projections
    per_token = 6 * 12 + 2 * (6 * (1 + 2 * 3) + 1 * 6) + 6 * 6  # in; each direction's x and step sizes; out
    assert image_flops(partial(MambaMixer, 6, directions=2, d_state=3), (5, 6)) == 3 * 2 * 5 * per_token


# ---------------------------------------------------------------------------------------------------------------- runs


def pretraining(folder: Path, *overrides: str) -> Trained:
    settings = [*TINY, *TINY_ENCODER, "model_args.decoder_depth=1", f"output_dir={folder}", *overrides]
    return pretrain(load_config(PretrainConfig, PRETRAIN, settings))


def finetuning(folder: Path, pretrained: Path, *overrides: str) -> Trained:
    settings = [*TINY, *TINY_ENCODER, f"pretrained={pretrained}", f"output_dir={folder}", *overrides]
    return finetune(load_config(FinetuneConfig, FINETUNE, settings))


def test_from_pretraining_to_a_model_that_timm_loads(tmp_path: Path) -> None:
    pretrained = pretraining(tmp_path / "pretrain")
    ema = ["mixup=0.8", "cutmix=1", "ema_decay=0.5", "drop_path=0.1", "epochs=2"]
    result = finetuning(tmp_path / "finetune", pretrained.folder, *ema)
    for folder in ("pretrain", "finetune"):
        for name in ("config.yaml", "metrics.jsonl", "curves.png"):
            assert (tmp_path / folder / name).is_file()
    assert (tmp_path / "pretrain" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads((tmp_path / "finetune" / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.top1 == max(last["top1"], last["top1_ema"]) and last["epoch"] == 2
    assert {"loss", "lr", "seconds", "data_wait", "images_per_second", "memory_gib", "undecodable"} <= last.keys()
    assert (last["processes"], last["images_scored"], last["images_skipped"]) == (1, 360, 0)
    model = timm.create_model(f"local-dir:{tmp_path / 'finetune'}", pretrained=True).eval()
    images = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model(images), result.model.eval()(images)) and model.num_classes == 10
    config = json.loads((tmp_path / "finetune" / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["label_names"][3] == "three"
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 8]
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.3054], abs=1e-4)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(".partial*"))


def test_a_run_computes_what_its_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates, parts of a batch, smoothing, drop path, clipping, AdamW, the average and scores, from formulas."""
    start, steps, take = [], [], Trainer._optimizer_step

    def recorded(trainer: Trainer, micro_batches: list[Batch]) -> None:
        if not start:
            start.append(copy.deepcopy(trainer.model))
        steps.append(micro_batches)
        take(trainer, micro_batches)

    monkeypatch.setattr(Trainer, "_optimizer_step", recorded)
    monkeypatch.setattr(setup, "winner", lambda last: "ema")  # which scores no higher in so short a run
    settings = [*TINY, *TINY_ENCODER, "model_args.depth=3", "drop_path=0.5", f"output_dir={tmp_path}", "epochs=2"]
    settings += ["warmup_epochs=0.5", "base_lr=0.01", "min_lr=0.001", "betas=[0.8, 0.9]", "clip_grad=0.08", "seed=3"]
    settings += ["layer_decay=0.5", "weight_decay=0.3", "ema_decay=0.75", "max_batch_per_device=128"]
    settings += ["evaluate_every=3"]  # and at the end
    result = finetune(load_config(FinetuneConfig, FINETUNE, settings))
    history, model, losses, norms = result.history, start[0].train(), [], []
    parameters = dict(model.named_parameters())
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in average.items()} for _ in range(2))
    assert len(steps) == 10 and all(len(parts) == 2 for parts in steps)
    assert model.blocks[2].drop_path.drop_prob == 0.25  # the authors': a block has the rate of the one before it
    for number, parts in enumerate(steps):
        epoch = number / 5
        rate = 0.01 * epoch / 0.5 if epoch < 0.5 else 0.001 + 0.009 * (1 + math.cos(math.pi * (epoch - 0.5) / 1.5)) / 2
        losses.append(0.0)
        for place, batch in enumerate(parts):
            seed_step(3, *divmod(number, 5), place, 0)
            logarithms = model(batch.images).log_softmax(dim=1)
            right = logarithms.gather(1, batch.classes[:, None]).mean()
            loss = -(0.9 * right + 0.1 * logarithms.mean()) / 2
            loss.backward()
            losses[-1] += loss.item()
        norms.append(torch.stack([parameter.grad.norm() for parameter in parameters.values()]).norm().item())
        with torch.no_grad():
            for name, parameter in parameters.items():
                (scale, decay), gradient = scale_and_decay(name, 3), parameter.grad * min(1.0, 0.08 / norms[-1])
                first[name] = 0.8 * first[name] + 0.2 * gradient
                second[name] = 0.9 * second[name] + 0.1 * gradient.square()
                deviation = (second[name] / (1 - 0.9 ** (number + 1))).sqrt()
                step = first[name] / (1 - 0.8 ** (number + 1)) / (deviation + 1e-8)
                parameter.sub_(scale * rate * (step + decay * parameter))
                average[name] = 0.75 * average[name] + 0.25 * parameter
                parameter.grad = None
    assert min(norms) < 0.08 < max(norms)
    for name, expected in (("model", parameters), ("ema", average)):
        found = load_file(tmp_path / "checkpoints" / "step-00000010" / f"{name}.safetensors")
        for parameter, values in expected.items():
            torch.testing.assert_close(found[parameter], values.detach(), rtol=1e-3, atol=1e-5, msg=parameter)
        model.load_state_dict(found)
        right = 0
        for batch in EvalLoader(result.source.test, result.inputs, BATCH):
            right += int((model.eval()(batch.images).argmax(dim=1) == batch.classes).sum())
        assert history[-1][FIGURES[name]] == pytest.approx(100 * right / 360) and FIGURES[name] not in history[0]
        is_exported = all(torch.equal(found[key], value) for key, value in result.model.state_dict().items())
        assert is_exported == (name == "ema")
    assert [row["loss"] for row in history] == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5], rel=1e-5)
    assert history[0]["images_per_second"] * history[0]["seconds"] >= 5 * 256
    after_one = 0.001 + 0.009 * (1 + math.cos(math.pi / 3)) / 2
    assert [row["lr"] for row in history] == pytest.approx([after_one, 0.001])


def test_pretraining_leaves_a_model_and_a_backbone(tmp_path: Path) -> None:
    pretraining(tmp_path, "tracker=tensorboard")
    assert list((tmp_path / "tensorboard").glob("events.*"))
    files = {"config.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "pretraining_model").iterdir()} == files
    config = json.loads((tmp_path / "pretraining_model" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 8] and config["pretraining_model"]["cluster_size"] == 4
    backbone = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    trained = load_file(tmp_path / "pretraining_model" / "model.safetensors")
    assert backbone(torch.zeros(2, 1, 8, 8)).shape == (2, 16) and backbone.num_classes == 0
    for direction in backbone.blocks[0].mixer.A_log:
        assert torch.equal(direction, trained["blocks.0.mixer.A_log"][0])
    assert backbone.pretrained_cfg["std"] == pytest.approx((0.376,), abs=1e-3)


class Doubled(arm_zoo.ARMPretrain):
    """An objective of its own, whose models take no size of clusters and give nothing but twice the loss."""

    def __init__(
        self,
        img_size: int = 8,
        patch_size: int = 2,
        in_chans: int = 1,
        embed_dim: int = 16,
        depth: int = 1,
        d_state: int = 2,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(img_size, patch_size, 4, in_chans, embed_dim, depth, d_state, 64, 1, device=device)
        self.config = {name: self.config[name] for name in ("img_size", "patch_size", "in_chans", "embed_dim")}
        self.config |= {"depth": depth, "d_state": d_state}

    def forward(self, images: torch.Tensor) -> Any:
        return 2 * super().forward(images)[0]

    def hub_config(self) -> dict[str, Any]:
        return {"objective": "doubled", "pretraining_model": self.config}


def test_another_objective_is_trained_by_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PretrainConfig.objective == DEFAULT_OBJECTIVE and TRAINING.keys() == OBJECTIVES.keys()
    row = OBJECTIVES[DEFAULT_OBJECTIVE]._replace(model_class=Doubled, sizes={"arm_pico": {}})
    monkeypatch.setitem(OBJECTIVES, "doubled", row)
    settings = [*TINY, "global_batch=718", "model=arm_pico", "data.source=digits", "data.workers=0"]
    settings += [f"output_dir={tmp_path}"]
    with pytest.raises(ConfigError, match="objective is 'doubled'; allowed: autoregressive"):
        pretrain(load_config(PretrainConfig, None, [*settings, "objective=doubled"]))

    def export(trained: Trained) -> None:
        del trained.model.patch_size  # this class's own: what all models have is that of patch_embed
        save_pretraining(trained.model, trained.config, trained.inputs)

    record = dataclasses.replace(
        TRAINING[DEFAULT_OBJECTIVE],
        loss=lambda config, source: lambda model, batch: model(batch.images),
        export=export,
    )
    monkeypatch.setitem(TRAINING, "doubled", record)
    result = pretrain(load_config(PretrainConfig, None, [*settings, "objective=doubled"]))
    assert isinstance(result.model, Doubled) and (tmp_path / "checkpoints" / "step-00000002").is_dir()
    assert "objective: doubled" in (tmp_path / "config.yaml").read_text()
    assert not (tmp_path / "predictions.png").exists()  # it says nothing about clusters
    loaded = arm_zoo.from_pretrained(result.folder)
    assert isinstance(loaded, Doubled) and loaded(torch.rand(2, 1, 8, 8)) > 0
    backbone = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True)
    first, second = (model.state_dict()["blocks.0.mixer.A_log"][0] for model in (backbone, loaded))
    assert torch.equal(first, second)
    with pytest.raises(RunError, match="objective was doubled, is autoregressive"):
        pretrain(load_config(PretrainConfig, None, settings))


def test_pretraining_names_the_images_that_it_holds_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "images" / "train", {"cat": 6, "dog": 6})
    source = f"data.source={tmp_path / 'images'}"
    pretraining(tmp_path / "run", "model_args.in_chans=3", "global_batch=8", "data.validation=0.25", source)
    assert len((tmp_path / "run" / "validation.txt").read_text().splitlines()) == 3


def test_exports_are_of_their_run_alone_and_for_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        pretrained = pretraining(tmp_path / "pretrain", "checkpoint_steps=2")
        finetuning(tmp_path / "finetune", pretrained.folder)
    finally:
        os.umask(before)
    for folder in (tmp_path / "pretrain" / "backbone", tmp_path / "finetune"):
        config = json.loads((folder / "config.json").read_text())
        assert "num_classes" not in config["model_args"]  # breaks the timm wrapper of transformers
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == model.num_classes
        foreign = {"tag", "license", "origin_url", "url", "file", "source", "hf_hub_id", "hf_hub_filename", "sha256"}
        assert not foreign & (config.keys() | config["pretrained_cfg"].keys())
    for root in (tmp_path / "pretrain", tmp_path / "finetune"):
        modes = {str(file): file.stat().st_mode & 0o777 for file in root.rglob("*.*") if file.is_file()}
        assert sum(file.endswith(".safetensors") for file in modes) >= 3 and set(modes.values()) == {0o640}, modes


@pytest.mark.slow
def test_parts_of_a_batch_and_recomputing_change_nothing(tmp_path: Path) -> None:
    runs = {"whole": [], "parts": ["max_batch_per_device=64"], "recomputed": ["gradient_checkpointing=true"]}
    results = {name: pretraining(tmp_path / name, *overrides) for name, overrides in runs.items()}
    weights = {name: result.model.state_dict() for name, result in results.items()}
    assert len({round(result.history[0]["loss"], 5) for result in results.values()}) == 1
    for name in ("parts", "recomputed"):
        assert all(torch.allclose(weights[name][key], weights["whole"][key], atol=1e-4) for key in weights["whole"])
    other = pretraining(tmp_path / "other", "seed=1")
    assert other.history[0]["loss"] != results["whole"].history[0]["loss"]


def test_cuda_graphs_need_a_gpu(tmp_path: Path) -> None:
    settings = [*TINY, *TINY_ENCODER, f"output_dir={tmp_path}", "compile=true", "cuda_graphs=true"]
    with pytest.raises(RunError, match=r"cuda_graphs is true, but the device is cpu; allowed: a GPU \(cuda\)"):
        pretrain(load_config(PretrainConfig, PRETRAIN, settings))


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["null", "64"], ids=["whole", "accumulated"])
def test_cuda_graphs_change_no_loss(part: str, tmp_path: Path) -> None:
    losses = []
    for graphs in ("false", "true"):
        settings = ["device=auto", "compile=true", f"cuda_graphs={graphs}", f"output_dir={tmp_path / graphs}"]
        settings += [f"max_batch_per_device={part}", "epochs=3"]
        history = pretrain(load_config(PretrainConfig, PRETRAIN, [*TINY, *TINY_ENCODER, *settings])).history
        losses.append([row["loss"] for row in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.gpu
def test_step_never_waits_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = Trainer._optimizer_step, iter(range(1, 100))

    def watched(trainer: Trainer, micro_batches: list[Batch]) -> None:
        warm = next(count) > 1  # the first step compiles kernels
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            step(trainer, micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_optimizer_step", watched)
    mixed = ["mixup=0.8", "cutmix=1", "ema_decay=0.5", "clip_grad=1", "precision=bf16", "max_batch_per_device=64"]
    settings = [*TINY, *TINY_ENCODER, *mixed, "device=auto", f"output_dir={tmp_path}"]
    assert len(finetune(load_config(FinetuneConfig, FINETUNE, settings)).history) == 1


def test_blocks_of_encoder_and_decoder_are_sharded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Any] = []
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(parallel, "fully_shard", lambda part, mesh: parts.append(part))
    model: Any = arm_zoo.create_pretraining_model("arm_pico")
    parallel.shard(model, SimpleNamespace(num_processes=2, device=torch.device("cpu")))  # type: ignore[arg-type]
    assert parts == [*model.blocks, *model.decoder_blocks, model]


def test_quickstart_refuses_before_it_deletes_or_trains(tmp_path: Path) -> None:
    (tmp_path / "quickstart_runs").mkdir()
    with pytest.raises(ConfigError, match="seed is -1; allowed: a whole number from 0 to"):
        quickstart(tmp_path, seed=-1)
    assert (tmp_path / "quickstart_runs").is_dir() and not any((tmp_path / "quickstart_runs").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; allowed: a folder to write to"):
        quickstart(tmp_path / "file", seed=0)


@pytest.mark.slow
def test_quickstart_writes_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for runs in ("runs", "quickstart_runs"):  # the user's own, as with --output . in a checkout; an earlier start's
        (tmp_path / runs / "first").mkdir(parents=True)
    summary = quickstart(tmp_path, seed=0, overrides=["epochs=1", "warmup_epochs=0", "tracker=none"])
    assert (tmp_path / "runs" / "first").is_dir() and not (tmp_path / "quickstart_runs").exists()
    images = [summary[f"images_{kind}"] for kind in ("unlabelled", "labelled", "test")]
    assert images == [1080, 18, 360] and summary["seeds"] == [0, 1, 2]
    assert [len(scores) for scores in summary["top1"].values()] == [3, 3, 3, 3]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    show(summary, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "shows the way" in said and "import arm_zoo, timm; timm.create_model(" in said
    for name in ("few_labels.png", "predictions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert [row.keys() for row in summary["examples"]] == [{"image", "predicted", "label", "probability"}] * 3
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 18
