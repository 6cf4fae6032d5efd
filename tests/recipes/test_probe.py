"""The command that scores frozen features, on small models of all kinds."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import arm_zoo
from arm_zoo import loading
from arm_zoo.images.errors import SourceError
from arm_zoo.models._sequence import SequenceBackbone
from eval import __main__ as program
from eval import tables
from eval.board import frozen
from hub import catalog
from recipes import probe
from recipes.config import ConfigError, load_config
from recipes.data.built_in import open_digits
from recipes.data.config import DataConfig
from recipes.errors import RunError
from recipes.probe import ProbeConfig
from recipes.probing import attentive, logistic, scores
from recipes.probing.protocols import PROTOCOLS
from tests import ROOT
from tests.helpers.images import write_folder

TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 1, "d_state": 2}


def test_features_that_are_not_numbers_are_no_score(pretrained: Path, tmp_path: Path) -> None:
    model, *_ = probe.load_backbone(pretrained, ProbeConfig(data=DataConfig(source="digits")))
    torch.nn.init.constant_(model.norm.bias, math.inf)
    save_for_hf(model, str(tmp_path / "backbone"), safe_serialization=True, data_config={"input_size": (1, 8, 8)})
    with pytest.raises(SystemExit, match="features of 1437 of 1437 training images are not finite numbers"):
        run(tmp_path / "backbone", tmp_path / "probe.json")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pretraining model for the digits, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretraining_model")
    arm_zoo.create_pretraining_model(
        "arm_pico", **TINY, cluster_size=4, decoder_dim=64, decoder_depth=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # features are kept in runs/features


def run(weights: Path | str, output: Path, *overrides: str) -> dict[str, object]:
    settings = ["data.source=digits", "data.workers=0", "linear_epochs=5", "device=cpu", f"output={output}"]
    probe.main(["--weights", str(weights), *settings, *overrides])
    return json.loads(output.read_text())


def test_probing_every_kind_of_weights(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(pretrained, tmp_path / "probe.json")
    assert (result["images_train"], result["images_test"], result["features"]) == (1437, 360, 16)
    assert 15 < float(str(result["knn_top1"])) <= 100 and 15 < float(str(result["linear_top1"])) <= 100  # chance is 10
    said = capsys.readouterr().out
    assert f"{result['knn_top1']:.2f}%" in said and "360 images; wrote" in said and "probe.json" in said
    assert run(pretrained, tmp_path / "again.json") == result
    arguments = [f"model_args.{name}={value}" for name, value in TINY.items()]
    file = run(pretrained / "model.safetensors", tmp_path / "file.json", "model=arm_pico_patch2_8", *arguments)
    assert {**file, "weights": ""} == {**result, "weights": ""}
    model, *_ = probe.load_backbone(pretrained, ProbeConfig(data=DataConfig(source="digits")))
    save_for_hf(model, str(tmp_path / "backbone"), safe_serialization=True, data_config={"input_size": (1, 8, 8)})
    folder = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True)
    assert torch.equal(folder.cls_token, model.cls_token)
    other = run(tmp_path / "backbone", tmp_path / "folder.json", "model=arm_pico_patch2_8")
    assert other["features"] == 16
    digits = ["data.source=digits", "data.workers=0", "device=cpu", "model=arm_base_patch16_224"]
    message = refusal("--weights", str(tmp_path / "backbone"), *digits)
    assert "are of arm_pico_patch2_8, not of arm_base_patch16_224" in message
    mixed = refusal("--weights", str(pretrained), *digits)
    assert f"no model can be made of --weights {pretrained} model=arm_base_patch16_224: " in mixed
    assert "; allowed: weights of arm_base_patch16_224, or no model=, as entries, folders and files" in mixed


def test_probing_an_entry_by_name(tmp_path: Path) -> None:
    """Prepared as the entry's configuration says, whose mean and deviation are not those of the 1,437 digits."""
    result = run("arm_pico_patch2_8", tmp_path / "probe.json")
    assert (
        result["weights"] == "arm_pico_patch2_8.arm_digits_ft_digits.safetensors"
        and float(str(result["knn_top1"])) > 97
    )
    _, inputs, *_ = probe.load_backbone(Path("arm_pico_patch2_8"), ProbeConfig(data=DataConfig(source="digits")))
    assert inputs["mean"] == timm.get_pretrained_cfg("arm_pico_patch2_8").mean


def test_probing_a_repository(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loading._Loader, "from_hub", lambda self, repo, wanted: self.from_folder(folders[repo], wanted)
    )
    folders = {"ada/digits@v1": pretrained}
    config = ProbeConfig(data=DataConfig(source="digits"))
    (model, inputs, *_), (local, same, *_) = (
        probe.load_backbone(name, config) for name in (Path("hf-hub:ada/digits@v1"), pretrained)
    )
    assert inputs == same and "mean" not in inputs
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in model.state_dict().items())


def refusal(*argv: str) -> str:
    """The message that ends the program with 1, or its exit code if that is another."""
    with pytest.raises(SystemExit) as stop:
        probe.main(argv)
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def test_bad_input_of_the_probe(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = ["data.source=digits", "data.workers=0", "device=cpu"]
    assert f"no config.json in {tmp_path}" in refusal("--weights", str(tmp_path), *digits)
    file = str(pretrained / "model.safetensors")
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    assert "this is no ARM" in refusal("--weights", str(tmp_path / "vit.safetensors"), *digits)
    unknown = refusal("--weights", file, "model=arm_giant", *digits)
    assert "unknown model 'arm_giant'; did you mean " in unknown
    keyword = refusal("--weights", str(pretrained), "model_args.width=3", *digits)
    assert "unknown keyword width; the model takes" in keyword and "embed_dim" in keyword
    value = refusal("--weights", file, "model=arm_pico_patch2_8", "model_args.depth=deep", *digits)
    with pytest.raises(
        ConfigError, match=r"model_args.num_classes is 3, but features need no classifier; leave it out"
    ):
        load_config(ProbeConfig, None, ["model_args.num_classes=3", *digits])
    with pytest.raises(ConfigError) as refused:
        load_config(ProbeConfig, None, ["model_args.device=meta", "model_args.features_only=true", *digits])
    assert refused.value.problems.keys() == {"model_args.device", "model_args.features_only"}
    assert "model=arm_pico_patch2_8 model_args.depth=deep: " in value and "; as model_args.NAME the model's" in value
    (tmp_path / "damaged.safetensors").write_text("no weights")
    damaged = refusal("--weights", str(tmp_path / "damaged.safetensors"), "model=arm_pico_patch2_8", *digits)
    assert "cannot read the checkpoint" in damaged and "damaged.safetensors" in damaged
    for number, text in enumerate(("{", '{"pretraining_model": {}}', '{"architecture": "arm_giant"}')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(text)
        assert str(tmp_path / str(number)) in refusal("--weights", str(tmp_path / str(number)), *digits)
    assert "there is no 'nowhere'" in refusal("--weights", file, "data.source=nowhere")
    write_folder(tmp_path / "colour" / "train", {"a": 1})
    write_folder(tmp_path / "colour" / "val", {"a": 1})
    colour = refusal("--weights", str(pretrained), f"data.source={tmp_path / 'colour'}", "data.workers=0")
    assert "has 3 channels, the model takes 1" in colour
    assert refusal("--weights", str(pretrained), "neighbors=5") == "1"
    assert "neighbors (did you mean neighbours?)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"temperature is 0; allowed: a number above 0"):
        load_config(ProbeConfig, None, ["data.source=digits", "temperature=0"])
    with pytest.raises(SourceError):
        probe.probe(pretrained, ProbeConfig(data=DataConfig(source="nowhere")))


def test_settings_that_a_probe_has_no_use_for_are_refused() -> None:
    idle = ["data.cache=memory", "data.flip=0.5", "data.decode=gpu", "device=cpu"]
    with pytest.raises(ConfigError) as refused:
        load_config(ProbeConfig, None, ["data.source=digits", *idle])
    said = str(refused.value)
    assert "data.cache has no use in recipes.probe, which reads each image once" in said and "data.flip has no" in said
    assert "data.decode is gpu but device is cpu; allowed: data.decode=auto, or device=auto" in said


def test_damaged_images_are_counted_named_and_limited(
    pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 6, "b": 6})
    write_folder(tmp_path / "val", {"a": 3, "b": 3})
    (tmp_path / "val" / "a" / "1.jpg").write_bytes(b"gone")
    colour = tmp_path / "colour"
    arm_zoo.create_pretraining_model(
        "arm_pico", **{**TINY, "in_chans": 3}, cluster_size=4, decoder_dim=64, decoder_depth=1
    ).save_pretrained(colour)
    settings = [f"data.source={tmp_path}", "batch=1"]
    result = run(colour, tmp_path / "probe.json", *settings, "data.max_undecodable=0.2")
    assert (result["images_test"], result["images_test_skipped"], result["images_train_skipped"]) == (5, 1, 0)
    assert caplog.text.count("a/1.jpg cannot be decoded") == 1
    with pytest.raises(SystemExit, match="1 of 6 validation images cannot be decoded, which is more than"):
        run(colour, tmp_path / "probe.json", *settings, "data.max_undecodable=0.1")
    for file in (tmp_path / "val").glob("*/*.jpg"):
        file.write_bytes(b"gone")
    with pytest.raises(SystemExit, match="none of the 6 validation images can be decoded"):
        run(colour, tmp_path / "probe.json", *settings, "data.max_undecodable=0.99")


def test_sets_too_small_for_a_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One image or one class is no basis, and fewer images than neighbours are not called so many."""
    write_folder(tmp_path / "few" / "train", {"a": 6, "b": 6})
    write_folder(tmp_path / "few" / "val", {"a": 3, "b": 3})
    write_folder(tmp_path / "one" / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "one" / "val", {"a": 1, "b": 1})
    (tmp_path / "one" / "train" / "b" / "1.jpg").write_bytes(b"gone")
    write_folder(tmp_path / "alike" / "train", {"a": 4})
    write_folder(tmp_path / "alike" / "val", {"a": 4})
    save_for_hf(timm.create_model("arm_pico_patch2_8", in_chans=3), str(tmp_path / "model"), safe_serialization=True)
    scores = run(tmp_path / "model", tmp_path / "probe.json", f"data.source={tmp_path / 'few'}", "protocols=knn")
    assert [row["settings"] for row in scores["scores"]] == ["neighbours=10, temperature=0.07"]
    assert "there are 12 training images: there is no k-NN of 20 of them" in caplog.text
    settings = ["protocols=all", "data.max_undecodable=0.9", "attentive_epochs=1"]
    for folder, message in (
        ("one", "one has one training image"),
        ("alike", "alike has no class but a; allowed"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "model", tmp_path / "probe.json", f"data.source={tmp_path / folder}", *settings)


def test_rows_of_all_protocols(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic, "GRID", (1.0, 10.0))
    settings = ["data.source=digits", "data.workers=0", "device=cpu", "linear_epochs=2", "output=scores.csv"]
    settings += ["attentive_epochs=2"]
    settings += ["model_args.img_size=16", "model_args.in_chans=1", "model_args.patch_size=8", "untrained=true"]
    probe.main(["--weights", "test_vit", *settings, "protocols=all", "features=average"])
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["protocol"] for row in rows} == set(PROTOCOLS) and len(rows) == len(
        PROTOCOLS
    ) + 3  # of k-NN and few-shot several
    assert {row["images_test"] for row in rows} == {"360"} and rows[0]["features"] == "average"
    assert all(15 < float(row["top1"]) < 100 for row in rows)  # chance is 10
    said = capsys.readouterr().out
    assert all(f"{float(row['top1']):.2f}%" in said for row in rows)
    assert {(row["model"], row["weights"], row["data_set"]) for row in rows} == {("test_vit", "untrained", "digits")}
    # the next command adds its rows, and the leaderboard and the cards read them
    probe.main(["--weights", "test_vit", *settings, "protocols=knn", "features=average"])
    more = tables.read(Path("scores.csv"), frozen.COLUMNS)
    assert more == [*rows, *rows[:2]]
    [entry] = frozen.measured_entries(more)
    assert (
        list(frozen.FIGURES) == frozen.titles_of([entry]) and entry.figures["k-NN"] == f"{float(rows[1]['top1']):.2f}"
    )
    assert len(catalog.measured_frozen(rows[0]["weights_sha256"], Path("scores.csv"))) == len(rows)
    Path("other.csv").write_text("model,top1\n")
    assert "output: other.csv is another table: it lacks the columns weights, " in refusal(
        "--weights", "test_vit", *settings, "output=other.csv"
    )


def test_a_table_to_add_to_is_checked_before_anything_is_scored() -> None:
    head, row = ",".join(probe.COLUMNS), ",".join("1" for _ in probe.COLUMNS)
    number = len(probe.COLUMNS)
    for text, message in (
        (f"{head}\n{row}\n\n{row},1\n", f"line 4: it has {number + 1} cells; allowed: {number}, one for each column"),
        (f"{head}\n{row[:-2]}\n", f"line 2: it has {number - 1} cells; allowed: {number}, one for each column"),
        ("model\udce9\n", "output: scores.csv cannot be read as a table in UTF-8: "),  # é in Latin-1
    ):
        Path("scores.csv").write_text(text, errors="surrogateescape")
        with pytest.raises(RunError) as refused:
            probe.rows_of(Path("scores.csv"))
        assert message in str(refused.value)
    Path("scores.csv").write_text(f"\ufeff{head}\n{row}\n")  # as Excel writes it
    assert probe.rows_of(Path("scores.csv")) == [dict.fromkeys(probe.COLUMNS, "1")]


def test_columns_that_people_added_to_a_table_stay() -> None:
    head, row = ",".join(probe.COLUMNS), ",".join("1" for _ in probe.COLUMNS)
    Path("scores.csv").write_text(f"comment,{head}\nkeep,{row}\n")
    result = dict.fromkeys(probe.OF_ALL_SCORES, "2") | {"scores": [dict.fromkeys(scores.COLUMNS, "2")]}
    probe.write(Path("scores.csv"), result)
    old, new = probe.rows_of(Path("scores.csv"))
    assert old == dict.fromkeys(probe.COLUMNS, "1") | {"comment": "keep"}
    assert new == dict.fromkeys(probe.COLUMNS, "2") | {"comment": ""}


@pytest.mark.parametrize(
    ("weights", "others", "message"),
    [
        (
            "arm_tiny_patch4_32.arm_cifar10",
            {"model": "arm_tiny_patch4_32.arm_cifar10_ft_cifar10"},
            "--weights arm_tiny_patch4_32.arm_cifar10 and model=arm_tiny_patch4_32.arm_cifar10_ft_cifar10 are not",
        ),
        (
            "arm_pico_patch2_8",
            {"model_args": {"depth": 1}},
            "--weights arm_pico_patch2_8 model_args.depth=1: CheckpointError: the",
        ),
        (
            "test_vit",
            {"untrained": True, "model_args": {"embed_dim": 7}},
            "--weights test_vit model_args.embed_dim=7: AssertionError: dim should be divisible by num_heads; allowed",
        ),
        (
            "arm_pico_patch2_8",
            {"model": "test_vit"},
            "--weights arm_pico_patch2_8 and model=test_vit are not the same; "
            "type either --weights arm_pico_patch2_8 or --weights test_vit, and leave out model=",
        ),
        (
            "test_vit",
            {"model": "arm_pico_patch2_8", "untrained": True},
            "--weights test_vit and model=arm_pico_patch2_8",
        ),
        (
            "FOLDER",
            {"model": "test_vit"},
            "--weights FOLDER model=test_vit: RuntimeError: .*; allowed: weights of test_",
        ),
        (
            "FOLDER/model.safetensors",
            {"model": "test_vit"},
            "model.safetensors model=test_vit: RuntimeError: .*; allowed",
        ),
        ("FOLDER", {"model": "arm_tiny_patch8_64"}, "--weights FOLDER model=arm_tiny_patch8_64: CheckpointError: "),
        ("FOLDER", {"untrained": True}, "untrained is true, but --weights is FOLDER; allowed: an entry, to draw"),
    ],
)
def test_weights_of_another_model_are_refused(
    weights: str, others: dict[str, Any], message: str, pretrained: Path
) -> None:
    place = str(pretrained)
    with pytest.raises(RunError, match=message.replace("FOLDER", place)):
        probe.load_backbone(Path(weights.replace("FOLDER", place)), ProbeConfig(**others))


def test_an_untrained_entry_is_not_looked_for_in_a_folder_of_its_name() -> None:
    entry = Path("arm_pico_patch2_8")
    beside = probe.load_backbone(entry, ProbeConfig(untrained=True))
    entry.mkdir()
    assert probe.load_backbone(entry, ProbeConfig(untrained=True)).inputs == beside.inputs


@pytest.mark.parametrize("untrained", [False, True])
def test_an_entry_may_be_named_twice(untrained: bool) -> None:
    config = ProbeConfig(model="arm_pico_patch2_8", untrained=untrained)
    frozen = probe.load_backbone(Path("arm_pico_patch2_8.arm_digits_ft_digits"), config)
    assert frozen.weights == ("untrained" if untrained else "arm_pico_patch2_8.arm_digits_ft_digits.safetensors")


@pytest.mark.parametrize(
    ("weights", "arguments"),
    [
        ("arm_pico_patch2_8", ("model_args.in_chans=3",)),
        ("test_vit", ("model_args.img_size=16", "model_args.patch_size=8")),
    ],
)
def test_the_evaluator_scores_the_exported_probe_alike(
    weights: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And timm and `from_pretrained` load it, the latter's features too."""
    monkeypatch.setattr(attentive, "BATCH", 64)
    digits = open_digits().train
    for number in range(500):
        image, label, _ = digits[number]
        folder = tmp_path / "digits" / ("train" if number < 300 else "val") / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    settings = [f"data.source={tmp_path / 'digits'}", "protocols=attentive", "untrained=true", "attentive_epochs=3"]
    result = run(weights, tmp_path / "probe.json", *settings, *arguments, "export=probe")
    [score] = result["scores"]  # type: ignore[misc]
    assert 15 < score["top1"] < 100  # chance is 10
    words = ["--models", "local-dir:probe", "--sets", f"custom={tmp_path / 'digits'}", "--output", "scores.csv"]
    assert program.main([*words, "--device", "cpu", "--workers", "0"]) == 0
    [row] = tables.read(Path("scores.csv"))
    assert (row["n"], float(row["top1"])) == ("200", pytest.approx(score["top1"], abs=1e-4))
    model = arm_zoo.from_pretrained("probe").eval()
    assert model.pretrained_cfg["label_names"] == [f"class {label}" for label in range(10)]
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    features = timm.create_model("local-dir:probe", pretrained=True, num_classes=0).eval()
    assert torch.allclose(model.get_classifier()(features(images)), model(images), atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("protocols=knn,svm", "protocols names 'svm'; allowed: knn, logistic, few_shot, linear, attentive"),
        ("output=pretraining_model0/config.json/x.csv", "config.json is a file; allowed: a place to write to"),
        ("cache=pretraining_model0/config.json", "config.json is a file; allowed: a place to write to"),
        ("export=pretraining_model0/config.json", "config.json is a file; allowed: a place to write to"),
        ("output=scores.txt", "output is scores.txt; allowed: a file that ends in .json or .csv"),
        ("output=folder.csv", "output is folder.csv, which is a folder; allowed: a file to write to"),
    ],
)
def test_wrong_settings_of_the_probe(
    setting: str,
    message: str,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused with 1, as by all recipes; Python makes 1 of a message."""
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "pretraining_model0").symlink_to(pretrained)
    monkeypatch.chdir(tmp_path)
    code = refusal("--weights", pretrained.name, "data.source=digits", setting)
    assert message in (capsys.readouterr().err if code == "1" else code)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("export=probe", "export is probe; allowed: with protocols=attentive, of a model that gives patches"),
        ("neighbours=1438", "neighbours is 1438; allowed: up to the 1437 training images"),
        ("features=average_last4", "the model gives no features=average_last4; allowed: pooled"),
        ("untrained=true", "unknown model 'pretraining_model0'"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_images(
    setting: str, message: str, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pretrained.parent)
    monkeypatch.delattr(SequenceBackbone, "forward_intermediates")
    digits = ["data.source=digits", "data.workers=0", "device=cpu", "protocols=knn"]
    assert message in refusal("--weights", pretrained.name, *digits, setting)


@pytest.mark.slow
def test_processes_give_the_same_scores(tmp_path: Path) -> None:
    scores = []
    for processes in (1, 2, 3):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        settings = ["data.source=digits", "data.workers=0", "device=cpu", "linear_epochs=2", "batch=100"]
        settings += ["attentive_epochs=1"]
        settings += [f"cache={tmp_path / str(processes)}", f"output={tmp_path / f'{processes}.json'}"]
        command = [*launcher, "-m", "recipes.probe", "--weights", "arm_pico_patch2_8", *settings, "protocols=all"]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        scores.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    assert scores[0] == scores[1] == scores[2]
