"""The training recipes: configuration, data, optimiser and the whole way from pretraining to a finetuned model."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch

import arm_zoo
from recipes.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from recipes.finetune import finetune
from recipes.optim import learning_rate, parameter_groups
from recipes.pretrain import pretrain
from recipes.quickstart import quickstart

CONFIGS = sorted((Path(__file__).parent.parent / "recipes" / "configs").rglob("*.yaml"))
TINY = ["epochs=1", "warmup_epochs=0", "global_batch=256", "device=cpu"]
TINY_ENCODER = ["model_args.embed_dim=16", "model_args.depth=1", "model_args.d_state=2"]


def kind(file: Path) -> type[PretrainConfig] | type[FinetuneConfig]:
    return PretrainConfig if file.name.startswith("pretrain") else FinetuneConfig


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configurations_load(file: Path) -> None:
    command = f"# accelerate launch -m recipes.{file.name.split('_')[0]} --config recipes/configs/{file.name}"
    assert file.read_text().startswith(command)
    assert load_config(kind(file), file, ["epochs=3"]).epochs == 3  # sound from three epochs up


def test_configurations_are_there() -> None:
    assert {file.name for file in CONFIGS} >= {"pretrain_digits.yaml", "finetune_digits.yaml"}


def test_all_problems_of_a_configuration_come_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(PretrainConfig, None, ["epochs=2.5", "epoch=3", "betas=1", "warmup_epochs=-1"])
    message = str(refused.value)
    assert "epochs is '2.5'; allowed: a whole number" in message
    assert "epoch (did you mean epochs?)" in message
    assert "betas is '1'; allowed: a list of 2" in message
    assert "warmup_epochs is -1.0; allowed: 0 or more" in message
    assert "model is missing" in message and "output_dir is missing" in message


def test_conflicts_between_values_are_refused() -> None:
    settings = ["model=arm_pico", "output_dir=out", "data.source=digits", "epochs=5", "warmup_epochs=5"]
    with pytest.raises(ConfigError, match="warmup_epochs is 5 but epochs is 5; allowed: fewer"):
        load_config(PretrainConfig, None, settings)
    with pytest.raises(ConfigError, match="'nowhere', which does not exist"):
        load_config(FinetuneConfig, None, [*settings, "epochs=9", "pretrained=nowhere"])


def test_learning_rate_is_the_official_one(golden: Path) -> None:
    with open(golden / "optim" / "lr_schedule.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] in ("pretrain_b", "finetune_b", "no_warmup")]
    assert len(rows) > 100
    for row in rows:
        settings = [
            "model=arm_pico", "output_dir=out", "data.source=digits", "global_batch=256",
            *(f"{key}={row[key]}" for key in ("min_lr", "warmup_epochs", "epochs")), f"base_lr={row['lr']}",
        ]  # fmt: skip
        config = load_config(PretrainConfig, None, settings)
        rate = learning_rate(float(row["epoch_float"]), config) * float(row["group_lr_scale"])
        assert rate == pytest.approx(float(row["lr_set"]), rel=1e-12, abs=1e-18)


def test_parameter_groups_leave_frozen_and_one_dimensional_parameters_undecayed() -> None:
    model = arm_zoo.create_pretraining_model("arm_pico", embed_dim=16, depth=1, decoder_dim=64, decoder_depth=1)
    decay = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.05) for p in group["params"]}
    mixer = model.blocks[0].mixer
    assert id(model.pos_embed) not in decay and id(model.decoder_pos_embed) not in decay
    assert decay[id(mixer.A_log)] == decay[id(mixer.conv_weight)] == decay[id(model.query_token)] == 0.05
    assert decay[id(mixer.D)] == decay[id(mixer.conv_bias)] == decay[id(mixer.dt_proj_bias)] == 0
    assert sum(p.requires_grad for p in model.parameters()) == len(decay)


def run(folder: Path, seed: int = 0) -> tuple[float, float, Path]:
    """Pretrain and finetune for one epoch; the two losses and the folder of the finetuned model."""
    configs = CONFIGS[0].parent
    settings = [*TINY, *TINY_ENCODER, f"seed={seed}"]
    pretraining = load_config(
        PretrainConfig,
        configs / "pretrain_digits.yaml",
        [*settings, "model_args.decoder_depth=1", f"output_dir={folder / 'pretrain'}"],
    )
    pretrained = pretrain(pretraining)
    finetuning = load_config(
        FinetuneConfig,
        configs / "finetune_digits.yaml",
        [*settings, f"pretrained={pretrained.folder}", f"output_dir={folder / 'finetune'}"],
    )
    result = finetune(finetuning)
    return pretrained.history[-1]["loss"], result.history[-1]["loss"], folder / "finetune"


def test_from_pretraining_to_a_model_that_timm_loads(tmp_path: Path) -> None:
    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    assert first[:2] == again[:2] != run(tmp_path / "c", seed=1)[:2]
    for name in ("config.yaml", "metrics.jsonl"):
        assert (tmp_path / "a" / "pretrain" / name).is_file() and (first[2] / name).is_file()
    assert {f.name for f in (tmp_path / "a" / "pretrain" / "pretraining_model").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip
    model = timm.create_model(f"local-dir:{first[2]}", pretrained=True).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    config = json.loads((first[2] / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["label_names"][3] == "three"
    assert not list(tmp_path.rglob("*.tmp"))


def test_quickstart_writes_what_it_promises(tmp_path: Path) -> None:
    summary = quickstart(tmp_path, seed=0, overrides=[*TINY, *TINY_ENCODER])
    assert {"finetuned_top1", "scratch_top1", "seconds", "images_test"} <= summary.keys()
    assert summary["images_test"] == 360 and 0 <= summary["finetuned_top1"] <= 100
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in ("curves.png", "predictions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(summary["named"]) == 3
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 10
