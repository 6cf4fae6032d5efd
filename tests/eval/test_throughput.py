"""The throughput program: its table maths, its refusals and one tiny run; how fast anything is, no test asks."""

import argparse
import csv
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import arm_zoo
from arm_zoo.ops import backends
from eval import scan, tables, throughput
from eval.speed import timing
from tests.helpers.output import needs_full_disk, output_without_reader

TINY = ["--img-size", "32", "--batch-size", "1", "--repeats", "2", "--device", "cpu"]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a person reads on stderr when the options are refused; the reason is the last line, as of all of eval."""
    assert throughput.main(argv) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    return said


def test_ratios_compare_with_the_last_model() -> None:
    slow, peer = throughput.compare([[0.2, 0.3, 0.8], [0.1, 0.3, 0.2]], batch_size=6)
    assert slow["median_s"] == 0.3
    assert (slow["min_s"], slow["max_s"]) == (0.2, 0.8)
    assert slow["img_per_s"] == pytest.approx(20)
    assert slow["ratio"] == pytest.approx(0.3 / 0.2)
    assert slow["pairwise_ratio"] == pytest.approx(2)  # of 2, 1 and 4
    assert peer["ratio"] == peer["pairwise_ratio"] == 1


def test_models_take_turns() -> None:
    calls: list[str] = []
    readings = timing.time_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], "cpu", repeats=3)
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in readings] == [3, 3]


def test_a_reading_is_the_time_of_one_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setitem(timing.STEPS_PER_READING, "cpu", 4)

    def step() -> None:
        clock[0] += 1.5

    assert timing.time_in_turn([step], "cpu", repeats=2) == [[1.5, 1.5]]


def test_table_shows_milliseconds_and_speed() -> None:
    shared = dict.fromkeys(
        ("mode", "batch_size", "dtype", "autocast", "compile", "cuda_graphs", "device", "threads"), "x"
    )
    shared |= dict.fromkeys(("torch", "timm", "repeats", "img_size"), "x")
    [measured] = throughput.compare([[0.25]], batch_size=8)
    row = {"model": "some_model", "scan_backend": "numba", "peak_mib": 2048.4, **measured, **shared}
    console = Console(width=80)
    with console.capture() as printed:
        console.print(throughput.as_table([row]))
    for text in ("some_model", "(numba)", "250.0 - 250.0", "32.0", "1.000", "2,048"):
        assert text in printed.get()


@pytest.mark.parametrize("mode", ["infer", "finetune"])
def test_run_writes_csv(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # on a busy machine the figures get wide, and the names fold
    file = tmp_path / "speed.csv"
    throughput.main(["--models", "arm_tiny_patch16_224", "test_vit", "--mode", mode, "--output", str(file), *TINY])
    printed = capsys.readouterr()
    assert "arm_tiny_patch16_224" in printed.out
    assert printed.err.startswith(f"timing arm_tiny_patch16_224, test_vit: {mode}, 32 pixels, batch 1, cpu\n")
    with file.open(newline="") as text:
        ours, peer = csv.DictReader(text)
    assert (ours["model"], ours["mode"], ours["img_size"]) == ("arm_tiny_patch16_224", mode, "32")
    assert float(ours["median_s"]) > 0
    assert ours["peak_mib"] == ""
    assert ours["torch"] == torch.__version__
    assert float(peer["ratio"]) == 1


@pytest.mark.slow
def test_pretraining_run_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    options = ["--mode", "pretrain", "--models", "arm_tiny_patch16_224", "--dtype", "bf16", *TINY, "--img-size", "128"]
    throughput.main([*options, "--output", str(file)])
    [row] = json.loads(file.read_text())
    assert (row["mode"], row["img_size"], row["dtype"], row["autocast"]) == ("pretrain", 128, "bf16", True)


@pytest.mark.parametrize("dtype, autocast", [("bf16", False), ("bf16", True), ("fp16", False)])
def test_low_precision_runs(dtype: str, autocast: bool, tmp_path: Path) -> None:
    options = ["--models", "test_vit", "--dtype", dtype, *TINY, "--output", str(tmp_path / "speed.json")]
    throughput.main([*options, "--autocast"] if autocast else options)
    [row] = json.loads((tmp_path / "speed.json").read_text())
    assert (row["dtype"], row["autocast"]) == (dtype, autocast) and row["median_s"] > 0


@pytest.mark.parametrize("options", [[], ["--mode", "pretrain", "--img-size", "16"]])
def test_models_of_grey_images_run(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--models", "arm_pico_patch2_8", "--device", "cpu", "--repeats", "1", "--batch-size", "1", *options]
    assert throughput.main(words) == 0
    assert "arm_pico_patch2_8" in capsys.readouterr().out


def test_unknown_model_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--models", "arm_base_patch16_242")
    assert "unknown model 'arm_base_patch16_242'; did you mean arm_base_patch16_224" in message


@pytest.mark.parametrize("name", ["arm_base", "arm_tiny_patch16_224", "arm_base_patch16_384.arm_in1k_ft_in1k"])
def test_entries_with_the_patches_of_a_pretraining_model_can_be_timed(name: str) -> None:
    assert throughput.is_pretrained_alike(name)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "arm_tiny_patch8_64", "arm_base_patch16_stride8_448"])
def test_pretraining_is_for_our_models(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = " ".join(refusal(capsys, "--mode", "pretrain", "--models", name).split())
    assert f"no pretraining model with the patches of {name}; name an entry such as arm_base_patch16_224" in message
    assert ("type python -m recipes.loader_speed --step pretrain --config FILE" in message) == name.startswith("arm_")


@pytest.mark.parametrize("asked, taken", [("torch", "torch"), ("reference", "reference"), ("auto", None)])
def test_the_environments_backend_is_timed_and_written(
    asked: str, taken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends._choices[0], "name", asked)  # as ARM_ZOO_SCAN does at the start
    file = tmp_path / "speed.json"
    throughput.main(["--models", "arm_pico_patch2_8", "--device", "cpu", "--repeats", "1", "--output", str(file)])
    [row] = json.loads(file.read_text())
    assert row["scan_backend"] in ([taken] if taken else ["numba", "torch"])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "resmlp_12_224"])  # the last one has no set_input_size
def test_models_take_another_size(name: str, tmp_path: Path) -> None:
    throughput.main(["--models", name, *TINY, "--output", str(tmp_path / "speed.json")])
    [row] = json.loads((tmp_path / "speed.json").read_text())
    assert (row["model"], row["img_size"]) == (name, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch finds no CUDA device here; use --device cpu" in refusal(capsys, "--device", "cuda")


@pytest.mark.parametrize("options", [(), ("--compile",)])
def test_cuda_graphs_need_a_gpu_and_a_compiled_model(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    refused = refusal(capsys, "--cuda-graphs", *options, "--device", "cpu")
    assert "--cuda-graphs is for compiled models on a GPU; type --device cuda --compile --cuda-graphs" in refused


@pytest.mark.parametrize("name", ["speed.txt", "no_such_folder/speed.csv", "folder.csv"])
def test_output_is_checked_before_anything_is_timed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.csv").mkdir()
    refused = refusal(capsys, "--output", str(tmp_path / name))
    assert "must be a .csv or .json file in a folder that exists" in refused


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("speed.csv", "", None),
        ("speed.csv", "model,set,top1\n", "is another table: it lacks the columns "),
        ("speed.json", '[{"set": 1}]', "is another table: it lacks the columns "),
        (
            "speed.json",
            "{1",
            "speed.json cannot be read as a table in UTF-8: Expecting property name enclosed in double quotes: line 1",
        ),
        ("speed.json", "[3]", "its JSON is no list of rows, each an object"),
        ("speed.json", "{}", "its JSON is no list of rows, each an object"),
        (
            "speed.csv",
            f"{','.join(throughput.COLUMNS)}\n{'1,' * len(throughput.COLUMNS)}1\n",
            "line 2: it has 24 cells",
        ),
        ("speed.csv", f"\ufeff\n{','.join(throughput.COLUMNS)}\n", None),  # as Excel writes it, with an empty line
        ("speed.csv", "model\udce9\n", "speed.csv cannot be read as a table in UTF-8"),  # é in Latin-1
    ],
)
def test_output_of_something_else_is_left_alone(
    name: str, text: str, message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text(text, errors="surrogateescape")
    if message is None:
        tables.check_output(file, throughput.COLUMNS)
    else:
        assert message in refusal(capsys, "--output", str(file), "--device", "cpu")
    assert file.read_text(errors="surrogateescape") == text


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_rows_are_added(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"speed.{suffix}"
    for batch_size in ("1", "2"):
        throughput.main(["--models", "test_vit", *TINY, "--batch-size", batch_size, "--output", str(file)])
        tables.check_output(file, throughput.COLUMNS)  # which takes what it wrote itself
    if suffix == "csv":
        rows: list[tables.Row] = list(csv.DictReader(file.read_text().splitlines()))
    else:
        rows = json.loads(file.read_text())
    assert [str(row["batch_size"]) for row in rows] == ["1", "2"]


@pytest.mark.parametrize(
    "options, groups",
    [
        ("", [(None, 8)]),
        ("--batch-size 4 --img-size 224 384", [(224, 4), (384, 4)]),
        ("--sweep batch-size", [(None, 2**power) for power in range(9)]),
        ("--sweep batch-size --img-size 512 --batch-size 3 5", [(512, 3), (512, 5)]),
        ("--sweep img-size", list(zip(throughput.SWEEPS["img-size"], (8, 4, 2, 1, 1, 1, 1), strict=True))),
        ("--sweep img-size --img-size 112 --batch-size 2", [(112, 2)]),
    ],
)
def test_sweeps(options: str, groups: list[tuple[int | None, int]]) -> None:
    args = throughput.make_parser().parse_args(["--device", "cpu", *options.split()])
    assert throughput.sizes_and_batches(args) == groups


def test_batches_of_larger_images_are_smaller() -> None:
    sizes = throughput.SWEEPS["img-size"]
    assert [throughput.filling_batch_size(size, "cuda") for size in sizes] == [256, 128, 64, 32, 16, 8, 4]


def test_a_sweep_leaves_out_what_memory_does_not_suffice_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two models and two sizes here the larger size of the second one; ratios are within a size."""
    file = tmp_path / "speed.csv"
    prepare = throughput.prepare

    def prepare_in_little_memory(name: str, backend: str, args: argparse.Namespace) -> tuple[throughput.Step, Any]:
        if name == "test_resnet" and args.img_size == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return prepare(name, backend, args)

    monkeypatch.setattr(throughput, "prepare", prepare_in_little_memory)
    sweep = ["--models", "test_vit", "test_resnet", *TINY, "--sweep", "img-size", "--img-size", "64", "32"]
    throughput.main([*sweep, "--output", str(file)])
    table = csv.DictReader(file.read_text().splitlines())
    rows = [(row["model"], row["img_size"], float(row["ratio"])) for row in table]
    assert [row[:2] for row in rows] == [("test_vit", "64"), ("test_vit", "32"), ("test_resnet", "32")]
    assert rows[0][2] == rows[2][2] == 1
    printed = capsys.readouterr()
    assert "infer, 64 pixels, batch 1, " in printed.out and "infer, 32 pixels, batch 1, " in printed.out
    assert "test_resnet is left out: memory ran out" in printed.err
    assert "nothing was timed: no model fits into memory" in refusal(
        capsys, "--models", "test_resnet", *TINY, "--img-size", "64"
    )


def test_memory_may_run_out_in_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_out(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(throughput, "time_in_turn", run_out)
    refused = refusal(capsys, "--models", "test_vit", *TINY)
    assert "infer, 32 pixels, batch 1, cpu is left out: memory ran out" in refused


def test_what_the_scans_ran_on_is_told() -> None:
    assert tables.model_and_backend({"model": "arm_a", "scan_backend": "torch"}) == "arm_a (torch)"
    for row in ({"model": "vit", "scan_backend": ""}, {"model": "vit"}):
        assert tables.model_and_backend(row) == "vit"


def test_autocast_is_for_16_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--autocast needs a type of 16 bits" in refusal(capsys, "--autocast", "--device", "cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--models", "test_vit", "--img-size", "100"], "test_vit does not run so: Input height (100)"),
        (["--models", "test_resnet", "--mode", "finetune"], "test_resnet does not run so: Expected more than 1 value"),
        (["--models", "test_convnext", "--img-size", "1"], "test_convnext does not run so: Calculated padded input"),
    ],
)
def test_models_that_do_not_run_so_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *TINY, *options)


def test_backends_are_timed_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    models, backend = ["arm_pico_patch2_8", "test_vit"], arm_zoo.get_scan_backend()
    options = ["--models", *models, "--scan-backend", "torch", "reference", "--device", "cpu", "--repeats", "1"]
    throughput.main([*options, "--batch-size", "1", "--profile", "1", "--output", str(file)])
    rows = [(row["model"], row["scan_backend"]) for row in json.loads(file.read_text())]
    assert rows == [(models[0], "torch"), (models[0], "reference"), (models[1], "")]  # which scans nothing
    printed = capsys.readouterr().out
    assert all(f"({name}): " in printed for name in ("torch", "reference")) and "test_vit: " in printed  # profiles
    assert arm_zoo.get_scan_backend() == backend  # as it was


def test_profile_names_the_longest_operations(capsys: pytest.CaptureFixture[str]) -> None:
    throughput.main(["--models", "test_vit", *TINY, "--profile", "3"])
    _, printed = capsys.readouterr().out.split("test_vit: ")
    assert "ms a step in all" in printed
    fractions = [float(line.split()[-1].rstrip("%")) for line in printed.splitlines() if line.rstrip().endswith("%")]
    assert len(fractions) == 3 and fractions == sorted(fractions, reverse=True) and 0 < sum(fractions) <= 100


def test_profile_cuts_names_and_never_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    times = [("a kernel whose name tells all of its template's parameters " * 5, 12.0, 3.0), ("short", 8.0, 1.0)]
    Console(width=60).print(throughput.as_profile("model", times, longest=2))
    numbers = [line.split()[-3:] for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("%")]
    assert numbers == [["12", "3.000", "75.0%"], ["8", "1.000", "25.0%"]]


def test_unknown_scan_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown scan backend 'fast'" in refusal(capsys, "--scan-backend", "fast")


@pytest.mark.skipif("numba" not in backends.available_backends(), reason="the extra `cpu` is not installed")
def test_backend_that_does_not_take_the_type_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    refused = refusal(capsys, "--scan-backend", "numba", "--dtype", "bf16", "--device", "cpu")
    assert "scan backend 'numba' takes float32 on the CPU, got torch.bfloat16 on cpu" in refused


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_counts_are_positive(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        throughput.main(["--batch-size", number])
    assert stop.value.code == 2 and "expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--output", "no_such_folder/scan.csv"), "must be a .csv or .json file in a folder that exists"),
        ((), "it times GPU kernels, and torch finds no CUDA device here"),
    ],
)
def test_kernels_one_by_one_refuse_what_cannot_run(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scan.main(options) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        scan.main(["--channels", "0"])
    assert stop.value.code == 2 and "expected a whole number of at least 1, got '0'" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the figures are printed."""

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    file = tmp_path / "speed.csv"
    assert throughput.main(["--models", "test_vit", *TINY, "--output", str(file)]) == 1
    printed = capsys.readouterr()
    assert "ms/step" in printed.out and printed.err.endswith(f"error: [Errno 28] No space left on device: '{file}'\n")


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=needs_full_disk)], ids=["unread", "on a full disk"])
def test_rows_are_written_where_the_output_ends(full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all groups where nobody reads the tables; the rows of the first where printing fails."""
    file = tmp_path / "speed.csv"
    words = ["--models", "test_vit", *TINY, "--batch-size", "1", "2", "--output", str(file)]
    with open("/dev/full", "w") if full else output_without_reader() as output:
        monkeypatch.setattr(sys, "stdout", output)
        code = throughput.main(words)
    sizes = [row["batch_size"] for row in tables.read(file, throughput.COLUMNS)]
    assert (code, sizes) == ((1, ["1"]) if full else (0, ["1", "2"]))


@pytest.mark.gpu
def test_kernels_one_by_one_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "scan.csv"
    scan.main(["--batch-size", "2", "--grid", "4", "--channels", "64", "--output", str(file)])
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert {row["kernel"] for row in rows} >= {"scan, backward"} and all(float(row["ms"]) > 0 for row in rows)


@pytest.mark.gpu
def test_memory_is_read_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    throughput.main(["--models", "test_vit", "--output", str(file), *TINY, "--device", "cuda"])
    [row] = json.loads(file.read_text())
    assert row["peak_mib"] > 0
