"""Runs of MoCo v3: figures, what they leave, resumed to the bit, and the same on two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from arm_zoo import MoCoPretrain, from_pretrained
from recipes.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from recipes.finetune import finetune
from recipes.objectives import Trained
from recipes.pretrain import pretrain
from recipes.training.optim import create_optimizer
from recipes.training.progress import image_flops
from tests import ROOT
from tests.helpers.images import write_folder

CONFIG = ROOT / "recipes" / "configs" / "pretrain_moco_digits.yaml"
TINY = ["epochs=2", "warmup_epochs=1", "global_batch=8", "model_args.in_chans=3", "tracker=none", "checkpoint_steps=1",
        "keep_last=20", "model_args.embed_dim=16", "model_args.depth=1", "model_args.d_state=2",
        "model_args.hidden_dim=32", "model_args.output_dim=8"]  # fmt: skip
WATCHED = ("loss", "feature_std", "first_block_grad_norm", "loss_at_chance")


def settings(folder: Path, images: Path, *overrides: str) -> list[str]:
    return [*TINY, f"output_dir={folder}", f"data.source={images}", *overrides]


def run(folder: Path, images: Path) -> Trained:
    return pretrain(load_config(PretrainConfig, CONFIG, settings(folder, images)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training images, which are five steps."""
    return write_folder(tmp_path_factory.mktemp("images") / "train", {"cat": 22, "dog": 18}).parent


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run that nothing disturbed."""
    return run(tmp_path_factory.mktemp("whole"), images)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_odd_batch_is_refused_for_the_reason_of_all_recipes(images: Path, tmp_path: Path) -> None:
    """Not for the two views of an image, of which there are two with any batch."""
    with pytest.raises(
        ConfigError, match="global_batch is 7; allowed: an even number, such as 8, as every recipe draws"
    ):
        load_config(PretrainConfig, CONFIG, settings(tmp_path, images, "global_batch=7"))


@pytest.mark.parametrize("step", [4, 5])  # after the largest gradient of the first epoch, and at its end
def test_resumed_runs_are_the_same_to_the_bit(whole: Trained, images: Path, step: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
    before = Path(whole.config.output_dir)
    shutil.copytree(before / "checkpoints" / checkpoint.name, checkpoint)
    assert {"momentum_encoder.head.4.running_var", "predictor.4.running_mean"} <= load_file(
        checkpoint / "model.safetensors"
    ).keys()
    result = run(tmp_path, images)
    files = [folder / "pretraining_model" / "model.safetensors" for folder in (before, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [[row[name] for name in WATCHED] for row in rows(tmp_path)] == [
        [row[name] for name in WATCHED] for row in rows(before)
    ]
    assert len(result.history) == 2


def test_the_momentum_encoder_moves_before_every_step(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fraction of the training that is over then."""
    done: list[float] = []
    monkeypatch.setattr(MoCoPretrain, "update_momentum_encoder", lambda model, fraction: done.append(fraction))
    run(tmp_path, images)
    assert done == pytest.approx([step / 10 for step in range(10)])


@pytest.mark.slow
def test_two_processes_train_as_one(whole: Trained, images: Path, tmp_path: Path) -> None:
    """The figures are those of one process, and so are the statistics of batch norms."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        "-m",
        "recipes.pretrain",
        "--config",
        str(CONFIG),
        *settings(tmp_path, images, "checkpoint_steps=null"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARM_ZOO_SCAN": "torch"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    for row, expected in zip(rows(tmp_path), whole.history, strict=True):
        assert (row["processes"], expected["processes"]) == (2, 1)
        for name in WATCHED:
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    weights = load_file(tmp_path / "pretraining_model" / "model.safetensors")
    statistics = {name: value for name, value in whole.model.state_dict().items() if name.endswith("running_var")}
    assert len(statistics) == 8
    for name, value in statistics.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_leaves_a_model_and_a_backbone_to_finetune(whole: Trained, images: Path, tmp_path: Path) -> None:
    folder = Path(whole.config.output_dir)
    model = from_pretrained(whole.folder)
    assert isinstance(model, MoCoPretrain) and whole.folder == folder / "pretraining_model"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.model.state_dict().items())
    inputs = torch.rand(2, 3, 8, 8)
    backbone = timm.create_model(f"local-dir:{folder / 'backbone'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(backbone(inputs), model.eval().forward_encoder(inputs))
    sizes = ["model_args.embed_dim=16", "model_args.depth=1", "model_args.d_state=2", "base_lr=1e-9", "min_lr=0"]
    sizes += ["model_args.in_chans=3", f"data.source={images}", "data.validation=0.25"]
    config = [*sizes, "epochs=1", "warmup_epochs=0", "global_batch=10", "tracker=none", f"pretrained={whole.folder}"]
    file = CONFIG.with_name("finetune_digits.yaml")
    result = finetune(load_config(FinetuneConfig, file, [*config, f"output_dir={tmp_path}"]))
    assert torch.allclose(result.model.cls_token, model.base_encoder.cls_token, atol=1e-6)
    last = rows(folder)[-1]
    assert last["loss_at_chance"] == pytest.approx(0.8 * torch.tensor(8.0).log().item())
    assert 0 < last["feature_std"] <= 8**-0.5 and last["first_block_grad_norm"] > 0


def test_decay_is_that_of_arm(whole: Trained) -> None:
    names = {id(parameter): name for name, parameter in whole.model.named_parameters()}
    groups = create_optimizer(whole.model, whole.config).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    free = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {"base_encoder.blocks.0.mixer.A_log", "base_encoder.head.0.weight", "predictor.3.weight"} <= decayed
    assert {"base_encoder.blocks.0.mixer.D", "base_encoder.blocks.0.mixer.dt_proj_bias", "base_encoder.cls_token",
            "base_encoder.head.1.weight", "base_encoder.norm.bias"} <= free  # fmt: skip
    assert decayed | free == {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}


def test_flops_count_no_backward_pass_of_the_momentum_encoder() -> None:
    config = load_config(PretrainConfig, CONFIG, settings(Path("unused"), Path("digits"), "model_args.in_chans=1"))

    def build(device: str) -> nn.Module:
        encoder: nn.Module = config.build(device=device).get_submodule("base_encoder")
        return encoder.requires_grad_(True)

    encoder = image_flops(build, (1, 8, 8)) // 3  # forward alone
    predictor, comparison = 2 * (8 * 32 + 32 * 8), 2 * 8
    expected = 3 * 2 * (encoder + predictor + comparison) + 2 * encoder
    assert image_flops(config.build, (1, 8, 8), views=2) == expected
