"""Gradients that CUDA graphs leave, as of several micro-batches and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from recipes.config import TrainConfig
from recipes.training.parallel import Gradients
from tests import ROOT

CONFIGS = ROOT / "recipes" / "configs"
IMAGES = 12
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def model_and_images() -> tuple[nn.Module, Tensor]:
    """The same in every process; the last layer is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2), nn.Linear(2, 2).requires_grad_(False))
    return model, torch.randn(IMAGES, 3)


def gradients_of(model: nn.Module, images: Tensor, micro_batches: int, processes: int = 1) -> dict[str, Tensor | None]:
    """Of two steps, of which the second one counts, as a step with CUDA graphs takes them."""
    config = TrainConfig(compile=True, cuda_graphs=True)
    gradients = Gradients(model, model, config, SimpleNamespace(num_processes=processes))  # type: ignore[arg-type]
    for _ in range(2):
        model.zero_grad()
        for number, part in enumerate(images.chunk(micro_batches)):
            with gradients.of_micro_batch(number, micro_batches):
                (model(part).square().mean() / micro_batches).backward()
                replayed = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            if micro_batches * processes > 1:
                for gradient in replayed:  # as the next replay does
                    gradient.fill_(torch.nan)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(found: dict[str, Tensor | None]) -> None:
    """Compare with the gradients of the whole batch at once."""
    model, images = model_and_images()
    model(images).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert expected["3.weight"] is None is found["3.weight"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_micro_batches_add_up(micro_batches: int) -> None:
    check(gradients_of(*model_and_images(), micro_batches))


def one_of_two(process: int, store: Path) -> None:
    distributed.init_process_group("gloo", init_method=store.as_uri(), rank=process, world_size=2)
    try:
        model, images = model_and_images()
        for micro_batches in (1, 2):
            check(gradients_of(model, images.chunk(2)[process], micro_batches, processes=2))
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    multiprocessing.spawn(one_of_two, (tmp_path / "store",), nprocs=2)


def losses(folder: Path, command: list[str], *settings: str) -> list[float]:
    """Of the epochs of a pretraining in a process of its own."""
    tiny = ["epochs=3", "global_batch=256", "model_args.embed_dim=16", "model_args.depth=1", "model_args.d_state=2"]
    command = [*command, *tiny, f"output_dir={folder}", "tracker=none", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_whole_runs_exchange_what_graphs_would_leave(tmp_path: Path) -> None:
    """Two processes on the CPU, where nothing is compiled: with accumulation, against one process with DDP's way."""
    script = tmp_path / "uncompiled.py"
    script.write_text(
        "import torch\nfrom recipes.pretrain import main\nfrom recipes.training import engine\n"
        "engine.for_training = lambda model, config, accelerator: model\nmain()\n"
    )
    config = ["--config", str(CONFIGS / "pretrain_digits.yaml")]
    graphs = ["compile=true", "cuda_graphs=true", "max_batch_per_device=64"]
    two = losses(tmp_path / "two", [*LAUNCHER, "2", str(script), *config], *graphs)
    one = losses(tmp_path / "one", [sys.executable, "-m", "recipes.pretrain", *config])
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["pretrain_digits", "pretrain_moco_digits"])
@pytest.mark.parametrize("part", ["null", "64"], ids=["whole", "accumulated"])
def test_graphs_on_two_gpus_have_the_losses_of_one(recipe: str, part: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if (recipe, part) == ("pretrain_moco_digits", "64"):
        pytest.skip("MoCo takes the whole batch at once")
    settings = ["device=auto", "compile=true", f"max_batch_per_device={part}"]
    config = ["-m", "recipes.pretrain", "--config", str(CONFIGS / f"{recipe}.yaml")]
    two = losses(tmp_path / "two", [*LAUNCHER, "2", *config], *settings, "cuda_graphs=true")
    one = losses(tmp_path / "one", [sys.executable, *config], *settings, "cuda_graphs=false")
    assert two == pytest.approx(one, rel=1e-3)
