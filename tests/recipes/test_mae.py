"""Masked autoencoding by the recipes: masks, interrupted runs, two processes, what is left, and what is refused."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import arm_zoo
from recipes.config import FinetuneConfig, PretrainConfig, load_config
from recipes.data.loader import TrainLoader
from recipes.data.sampling import batch_plan
from recipes.data.sources import open_source
from recipes.errors import RunError
from recipes.finetune import finetune
from recipes.objectives import TRAINING, Trained
from recipes.parsing import ConfigError
from recipes.pretrain import pretrain
from recipes.signals import Stopped, StopRequest
from tests import ROOT
from tests.recipes.training.test_checkpoint import on_two_processes

CONFIG = ROOT / "recipes" / "configs" / "pretrain_mae_digits.yaml"
TINY = ["epochs=3", "global_batch=256", "tracker=none", "model_args.embed_dim=16", "model_args.depth=1",
        "model_args.d_state=2", "model_args.decoder_depth=1", "model_args.decoder_dim=32"]  # fmt: skip


def config_of(folder: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, CONFIG, [*TINY, f"output_dir={folder}", *overrides])


def run(folder: Path, *overrides: str) -> Trained:
    return pretrain(config_of(folder, *overrides), stop=StopRequest().listen())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def loaders(config: PretrainConfig, processes: int) -> list[TrainLoader]:
    source, plan = open_source(config.data), batch_plan(config.global_batch, processes)
    device = torch.device("cpu")
    return [TrainLoader(source, config, plan, (8, 8), process, processes, device) for process in range(processes)]


def test_masks_are_functions_of_seed_epoch_and_image(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    model: Any = config.build()

    def masks(epoch: int, processes: int, seed: int = 0) -> dict[int, list[int]]:
        """Of the first step's images, by their places in the set."""
        found = {}
        for loader in loaders(dataclasses.replace(config, seed=seed), processes):
            for batch in next(loader.epoch(epoch)):
                found |= dict(zip(batch.indices.tolist(), model.kept(batch.seeds).tolist(), strict=True))
        return found

    first = masks(0, 1)
    assert first == masks(0, 2) and len(first) == 256 and len({tuple(kept) for kept in first.values()}) > 200
    for other in (masks(1, 1), masks(0, 1, seed=1)):
        both = first.keys() & other.keys()
        assert len(both) > 20 and sum(first[index] == other[index] for index in both) < 5


def test_the_masks_of_a_batch_decide_its_loss(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (loader,) = loaders(config, 1)
    (batch,) = next(loader.epoch(0))
    model, loss = config.build(), TRAINING["mae"].loss(config, None)  # type: ignore[arg-type]
    first = loss(model, batch)
    torch.manual_seed(5)
    assert loss(model, batch).equal(first)
    assert not loss(model, batch._replace(seeds=batch.seeds + 1)).equal(first)
    halves = [loss(model, batch._replace(images=part, seeds=seeds)) for part, seeds in
              zip(batch.images.chunk(2), batch.seeds.chunk(2), strict=True)]  # fmt: skip
    torch.testing.assert_close(sum(halves) / 2, first)


@pytest.mark.parametrize("model", ["arm_pico", pytest.param("vim_pico", marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_epochs_it_ends_with_equal_bits(
    model: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = f"model={model}"
    if model == "vim_pico":
        whole = tmp_path / "whole"
        run(whole, family)
    original, steps = TRAINING["mae"], iter(range(1, 100))

    def loss(model: Any, batch: Any) -> Any:
        if next(steps) in (2, 7):
            os.kill(os.getpid(), signal.SIGTERM)
        return original.loss(None, None)(model, batch)  # type: ignore[arg-type]

    monkeypatch.setitem(TRAINING, "mae", dataclasses.replace(original, loss=lambda config, source: loss))
    stopped = tmp_path / "stopped"
    for _ in range(2):
        with pytest.raises(Stopped):
            run(stopped, family)
    run(stopped, family)
    for name in ("pretraining_model", "backbone"):
        ended = [(folder / name / "model.safetensors").read_bytes() for folder in (stopped, whole)]
        assert ended[0] == ended[1], name
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(whole: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(CONFIG), *TINY, f"output_dir={tmp_path}", "device=cpu"]
    with on_two_processes(arguments) as process:
        _, printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    sizes = ["model_args.embed_dim=32", "model_args.depth=2", "global_batch=64", "epochs=3"]
    history = run(tmp_path, *sizes).history
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]


@pytest.mark.parametrize(
    "family, scans, one_scan", [("arm", 4, "false"), pytest.param("vim", 2, "true", marks=pytest.mark.slow)]
)
def test_it_leaves_a_model_and_a_backbone_that_finetunes(
    family: str, scans: int, one_scan: str, tmp_path: Path
) -> None:
    own = [f"model={family}_pico", f"model_args.one_scan={one_scan}", "epochs=1", "warmup_epochs=0"]
    trained = run(tmp_path / "run", *own)
    config = json.loads((trained.folder / "config.json").read_text())
    assert (config["objective"], config["pretraining_model"]["backbone"]) == ("mae", family)
    assert (tmp_path / "run" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    loaded = arm_zoo.from_pretrained(trained.folder)
    assert isinstance(loaded, arm_zoo.MAEPretrain)
    tensors = load_file(trained.folder / "model.safetensors")
    backbone = timm.create_model(f"local-dir:{tmp_path / 'run' / 'backbone'}", pretrained=True)
    expected = tensors["blocks.0.mixer.A_log"]
    assert len(expected) == (1 if one_scan == "true" else scans)
    assert torch.equal(backbone.blocks[0].mixer.A_log, expected.expand(scans, -1, -1))
    settings = ["model_args.img_size=8", "model_args.in_chans=1", "data.source=digits", "data.workers=0", "epochs=1",
                *TINY[1:6], "device=cpu", "warmup_epochs=0", "layer_decay=1", "data.validation=null"]  # fmt: skip
    settings += [f"model={family}_pico_patch2_8", f"pretrained={trained.folder}", f"output_dir={tmp_path / 'tuned'}"]
    tuned = finetune(load_config(FinetuneConfig, None, [*settings, "base_lr=1e-9", "precision=fp32", "min_lr=0"]))
    assert torch.allclose(tuned.model.blocks[0].mixer.A_log, expected.expand(scans, -1, -1), atol=1e-4)
    assert type(tuned.model).__name__ == {"arm": "ARM", "vim": "Vim"}[family]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective=mea", "unknown objective 'mea'; choose one of autoregressive, .*mae"),
        ("model=vmamba_tiny", "unknown pretraining model 'vmamba_tiny'; choose one of arm_pico"),
        ("model_args.cluster_size=4", "unknown keyword cluster_size"),
        ("model_args.mask_ratio=1", "mask_ratio 1 of 16 patches keeps 0; from 1 to 15 can be kept"),
        ("model_args.decoder_heads=5", "decoder_dim 32 with 5 heads must be a multiple of 20, for example 40"),
        ("model_args.backbone=vit", "unknown backbone 'vit'; choose one of arm, vim"),
    ],
)
def test_mistakes_are_told_before_training(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config_of(tmp_path, override)
    assert len(error.value.problems) == 1


def test_another_objective_does_not_go_on_with_a_checkpoint(whole: Path) -> None:
    with pytest.raises(RunError, match="objective was mae, is autoregressive"):
        settings = ["objective=autoregressive", "model_args.cluster_size=4", "model_args.decoder_dim=64", "epochs=4"]
        run(whole, *settings)


@pytest.mark.parametrize("normed", [True, False])
def test_the_predictions_tell_what_is_taken_from_the_true_image(
    normed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("recipes.objectives.draw_predictions", lambda *arguments: drawn.append(arguments))
    run(tmp_path, f"model_args.normed_pixels={normed}", "epochs=1", "warmup_epochs=0")
    [(*_, explanation)] = drawn
    assert ("true mean and deviation" in explanation) == normed
