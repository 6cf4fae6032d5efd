"""A dVAE trained by its recipe, and pretraining on its tokens and in random orders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from arm_zoo.files import sha256_of
from arm_zoo.pretraining.dvae import DVAE, read_dvae
from recipes import command_line, dvae
from recipes.command_line import read_command
from recipes.config import DVAEConfig, PretrainConfig, load_config
from recipes.data.batches import Batch
from recipes.data.source import Source
from recipes.data.sources import open_source
from recipes.errors import RunError
from recipes.objectives import Trained, autoregressive_loss, token_loss
from recipes.pretrain import pretrain
from recipes.signals import StopRequest
from recipes.training.checkpoint import identity_of, read_state
from recipes.training.progress import image_flops
from recipes.training.resume import Start, changed_settings, compare
from tests import ROOT

CONFIGS = ROOT / "recipes" / "configs"
TINY = ["epochs=1", "warmup_epochs=0", "global_batch=256", "device=cpu", "tracker=none"]
MODEL = ["model_args.embed_dim=16", "model_args.depth=1", "model_args.d_state=2", "model_args.decoder_depth=1"]
TOKENS = ["model_args.target=dvae_tokens", "model_args.vocab_size=16"]


def pretraining(folder: Path, *overrides: str, resume: str = "auto") -> Trained:
    settings = [*TINY, *MODEL, f"output_dir={folder}", *overrides]
    return pretrain(load_config(PretrainConfig, CONFIGS / "pretrain_digits.yaml", settings), resume=resume)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """The file of a dVAE with random weights."""
    DVAE(img_size=32, in_chans=1, n_hid=4, vocab_size=16).save_pretrained(tmp_path / "dvae")
    return tmp_path / "dvae" / "model.safetensors"


def test_the_recipe_writes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["model_args.n_hid=4", "model_args.vocab_size=16", "model_args.img_size=8"]
    arguments = ["--config", str(CONFIGS / "dvae_digits.yaml"), *TINY, *sizes, f"output_dir={tmp_path}"]
    _, config, resume = read_command("dvae", arguments)
    dvae.run(config, resume, StopRequest())  # type: ignore[arg-type]
    told = capsys.readouterr().out
    assert " of 16 tokens are used by 256 images" in told
    assert f"dvae={tmp_path / 'model.safetensors'} model_args.target=dvae_tokens model_args.vocab_size=16" in told
    assert json.loads((tmp_path / "config.json").read_text())["dvae"]["vocab_size"] == 16
    untrained = DVAE(**json.loads((tmp_path / "config.json").read_text())["dvae"])
    untrained.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert (tmp_path / "curves.png").is_file()


def test_tokens_are_learnt_and_their_file_is_recorded(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result: Any = pretraining(tmp_path / "run", f"dvae={tokenizer}", *TOKENS)
    assert result.model.decoder_pred.out_features == 16
    assert 1 < result.history[-1]["loss"] < 5  # a cross entropy of 16 classes, ln 16 = 2.8 by chance
    sha256 = sha256_of(tokenizer)
    assert f"a vocabulary of 16, sha256 {sha256}" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "pretraining_model" / "config.json").read_text())
    assert config["dvae"] == {"file": str(tokenizer), "sha256": sha256}
    assert config["pretraining_model"]["vocab_size"] == 16
    assert not (tmp_path / "run" / "predictions.png").exists()
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert read_state(checkpoint)["dvae_sha256"] == sha256


def test_a_dvae_gets_pixels_and_no_normalised_values(tokenizer: Path) -> None:
    config = load_config(PretrainConfig, CONFIGS / "pretrain_digits.yaml", [*MODEL, f"dvae={tokenizer}", *TOKENS])
    none: Any = None  # no images are opened
    source = Source(none, none, (), mean=(0.3,), std=(0.4,))
    pixels = torch.rand(2, 1, 8, 8)
    batch = Batch((pixels - 0.3) / 0.4, torch.zeros(2), torch.arange(2), [], torch.arange(2))

    def last(*arguments: torch.Tensor) -> Any:
        return [arguments[-1]]

    tokens = token_loss(config, source)(last, batch)  # type: ignore[arg-type]
    assert torch.equal(tokens, read_dvae(tokenizer).tokens(pixels, (4, 4))) and len(tokens.unique()) > 1
    given = dvae.reconstruction_loss(DVAEConfig(), source)(last, batch)  # type: ignore[arg-type]
    torch.testing.assert_close(given, pixels)


def test_going_on_takes_a_dvae_of_the_same_content(tokenizer: Path, tmp_path: Path) -> None:
    def config(file: Path) -> PretrainConfig:
        overrides = [*MODEL, "output_dir=unused", f"dvae={file}", *TOKENS]
        return load_config(PretrainConfig, CONFIGS / "pretrain_digits.yaml", overrides, to_run=False)

    state = {**identity_of(config(tokenizer), (), 6), "position": {"step": 0}}
    start = Start(Path("step-00000006"), json.loads(json.dumps(state)))
    older = Start(start.checkpoint, {**start.state, "dvae_sha256": None})
    moved = tokenizer.rename(tmp_path / "moved.safetensors")
    assert changed_settings(start, config(moved)) == {}
    assert changed_settings(older, config(moved)) == {"dvae": (str(tokenizer), str(moved))}
    moved.write_bytes(b"another dVAE")
    with pytest.raises(RunError, match=r"dvae was a file with sha256 \w+, is a file with"):
        compare(start, config(moved), Console(stderr=True))


def test_tokens_that_do_not_fit_are_refused_before_training(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(tokenizer.read_bytes()[:-10])
    other_size = "has vocab_size 16, the model 17; allowed: model_args.vocab_size=16"
    for overrides, message in (
        ([f"dvae={tokenizer}", TOKENS[0], "model_args.vocab_size=17"], other_size),
        (
            [f"dvae={tmp_path / 'none.pkl'}", *TOKENS],
            "which is no file; allowed: OUTPUT_DIR/model.safetensors of `python -m recipes.dvae`",
        ),
        ([f"dvae={tmp_path / 'other.safetensors'}", *TOKENS], "is no encoder of a dVAE"),
        ([f"dvae={tmp_path / 'cut.safetensors'}", *TOKENS], "cannot read the checkpoint"),
        ([f"dvae={tokenizer}"], "model_args.target is normed_pixel; allowed: dvae=FILE with"),
    ):
        command = [*TINY, *MODEL, f"output_dir={tmp_path / 'run'}", *overrides]
        with pytest.raises(SystemExit) as refused:
            command_line.main("pretrain", ["--config", str(CONFIGS / "pretrain_digits.yaml"), *command])
        told = capsys.readouterr().err + str(refused.value.code)
        assert message in told and "Traceback" not in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_flops_are_counted_without_tokens() -> None:
    """Of which a vocabulary of four takes as many as the four pixels of a patch."""
    counts = []
    for overrides in ([], ["dvae=unused", TOKENS[0], "model_args.vocab_size=4"]):
        settings = [*MODEL, "output_dir=unused", *overrides]
        config = load_config(PretrainConfig, CONFIGS / "pretrain_digits.yaml", settings, to_run=False)
        counts.append(image_flops(config.build, (1, 8, 8)))
    assert counts[0] == counts[1] > 0


def test_random_orders_are_those_of_the_images_seeds() -> None:
    """So that they are the same for any number of processes and parts of a batch."""
    settings = [*MODEL, "model_args.prediction_order=random", "output_dir=unused"]
    config = load_config(PretrainConfig, CONFIGS / "pretrain_digits.yaml", settings)
    model, source = config.build(), open_source(config.data, labels_needed=False)
    batch = Batch(torch.rand(4, 1, 8, 8), torch.zeros(4), torch.arange(4), [], torch.arange(5, 9))
    losses = [autoregressive_loss(config, source)(model, batch).item() for _ in range(2)]
    assert losses == 2 * [model(batch.images, batch.seeds)[0].item()]
    assert losses[0] != model(batch.images, batch.seeds + 1)[0].item()


@pytest.mark.slow
def test_random_orders_are_the_same_when_a_run_goes_on(tmp_path: Path) -> None:
    settings = ["model_args.prediction_order=random", "epochs=2", "checkpoint_steps=3", "keep_last=9"]
    whole = pretraining(tmp_path / "whole", *settings)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000003"
    again = pretraining(tmp_path / "again", *settings, resume=str(checkpoint))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_given_cluster_is_hatched_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("recipes.objectives.draw_predictions", lambda *arguments: drawn.append(arguments))
    pretraining(tmp_path, "model_args.prediction_order=row_reversed")
    [(file, model, *_, unit, explanation)] = drawn
    assert file == tmp_path / "predictions.png" and unit == (4, 4)
    assert "true mean and deviation" in explanation  # of normalised pixels
    assert model.shown(torch.zeros(2, 1, 8, 8)).tolist() == [[3], [3]]  # of two by two, the last one


def test_plain_pixels_take_nothing_from_the_true_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("recipes.objectives.draw_predictions", lambda *arguments: drawn.append(arguments))
    pretraining(tmp_path, "model_args.target=pixel")
    [(*_, explanation)] = drawn
    assert "true mean and deviation" not in explanation
