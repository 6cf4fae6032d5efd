"""ONNX files: what runs them computes what the model does, whoever asked torch.onnx for them."""

import contextlib
import importlib
import io
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils.onnx import onnx_export
from torch import nn

import arm_zoo
from arm_zoo.layers.order import scan_order
from hub.__main__ import main

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def small(**kwargs: Any) -> nn.Module:
    """One block whose every tensor is random, for an odd number of patches: there the middle is not halfway."""
    sizes = {"embed_dim": 32, "depth": 1, "img_size": 80, "num_classes": 5, **kwargs}
    model = timm.create_model("arm_tiny_patch16_224", **sizes).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return small()


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A file that `python -m hub export` wrote, and how many nodes it said."""
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder / "run")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["export", str(folder / "run"), str(folder / "model.onnx")]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "run"]
    found = re.search(r"(\d+) nodes, differs from the model by", said.getvalue())
    assert found is not None
    return folder / "model.onnx", int(found[1])


def test_an_old_onnxscript_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxscript.__version__", "0.6.9")
    monkeypatch.delitem(sys.modules, "arm_zoo.onnx", raising=False)
    with pytest.raises(ImportError, match=r"onnxscript 0\.7 or newer \(onnxscript is 0\.6\.9\)"):
        importlib.import_module("arm_zoo.onnx")


def images_of(model: nn.Module, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, model.in_chans, *model.patch_embed.img_size, generator=generator)


def check(model: nn.Module, run: Callable[[Any], Any], *batches: int, tolerance: float = 4e-6) -> None:
    """What computes (batch, classes) from numpy's images computes what the model does."""
    for batch in batches:
        images = images_of(model, batch)
        with torch.inference_mode(), arm_zoo.scan_backend("reference"):
            expected = model(images)
        actual = torch.as_tensor(run(images.numpy()))
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() < tolerance * expected.abs().max()


def onnxruntime_of(file: Path) -> Callable[[Any], Any]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def test_onnxruntime(model: nn.Module, exported: tuple[Path, int]) -> None:
    """Any number of images, along an axis that is called what it is, in a graph with one Scan per mixer."""
    file, nodes = exported
    check(model, onnxruntime_of(file), 1, 3)
    graph = onnx.load(file).graph
    assert nodes < 120 and sum(node.op_type == "Scan" for node in graph.node) == 1
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("name, batch", [("arm_tiny_patch16_224", 4), ("vim_tiny_patch16_224", 2)])
def test_as_many_images_as_directions(name: str, batch: int, tmp_path: Path) -> None:
    """onnxscript's optimiser has taken the one axis for the other where the file is for that number of images."""
    importlib.import_module("arm_zoo.onnx")
    model = timm.create_model(name, img_size=48, embed_dim=32, depth=1, num_classes=0).eval().requires_grad_(False)
    images, file = images_of(model, batch), tmp_path / "model.onnx"
    for program in (model, torch.export.export(model, (images,))):
        torch.onnx.export(program, (images,), file, dynamo=True, verbose=False)
        check(model, onnxruntime_of(file), batch)


@pytest.mark.slow
def test_maps_of_any_size(tmp_path: Path) -> None:
    importlib.import_module("arm_zoo.onnx")
    sizes = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_classes": 5}
    model = timm.create_model("vmamba_base_s2l15", **sizes).eval().requires_grad_(False)
    example, other, file = torch.randn(1, 3, 64, 48), torch.randn(1, 3, 33, 70), tmp_path / "model.onnx"
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "opset_version": 21}
    torch.onnx.export(model, (example,), file, dynamic_shapes=({2: "height", 3: "width"},), **options)
    for images in (example, other):
        actual, expected = torch.as_tensor(onnxruntime_of(file)(images.numpy())), model(images)
        assert (actual - expected).abs().max() < 4e-6 * expected.abs().max()


class SharedScan(nn.Module):
    """Four directions of step sizes of low rank, all in token order, added up, as in VMamba."""

    def __init__(self, order: torch.Tensor | None) -> None:
        super().__init__()
        self.order, shapes = order, [(4, 6, 1), (4, 6), (4, 6), (4, 6, 2)]
        self.A, self.D, self.bias, self.weight = (-torch.rand(shape) for shape in shapes)

    def forward(self, u: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        delta, B, C = rows.unflatten(-1, (4, -1)).permute(2, 0, 1, 3).split([2, 1, 1], dim=-1)
        settings = {"order": self.order, "delta_weight": self.weight, "mean": False}
        return arm_zoo.ops.selective_scan(u, delta, self.A, B, C, self.D, delta_bias=self.bias, **settings)


@pytest.mark.parametrize("ordered", [True, False])
def test_directions_that_share_tokens(tmp_path: Path, ordered: bool) -> None:
    importlib.import_module("arm_zoo.onnx")
    order = scan_order(2, 3, ["row", "column", "row_reversed", "column_reversed"]) if ordered else None
    module = SharedScan(order).eval()
    inputs = torch.randn(2, 6, 6), torch.randn(2, 6, 16)
    file = tmp_path / "scan.onnx"
    torch.onnx.export(module, inputs, file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    [actual] = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.as_tensor(actual), module(*inputs))


def test_scans_are_such_as_others_run_them(exported: tuple[Path, int]) -> None:
    """The scanned axis is the first; the body has values with known numbers of axes, and none of the graph around."""
    [scan] = [node for node in onnx.load(exported[0]).graph.node if node.op_type == "Scan"]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in scan.attribute}
    assert not set(attributes.get("scan_input_axes", [])) - {0}
    assert not set(attributes.get("scan_output_axes", [])) - {0}
    body = attributes["body"]
    known = {value.name for value in body.input}
    for node in body.node:
        assert set(node.input) <= known, node
        known |= set(node.output)
    assert all(len(value.type.tensor_type.shape.dim) == 4 for value in body.input)


@pytest.mark.skipif(
    tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23),
    reason="the reference evaluator of older versions fails on a Squeeze",
)
def test_the_reference_evaluator(model: nn.Module, exported: tuple[Path, int]) -> None:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(exported[0]))
    check(model, lambda images: evaluator.run(None, {"images": images})[0], 2)


def test_openvino(model: nn.Module, exported: tuple[Path, int]) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    program = openvino.convert_model(exported[0])
    compiled = openvino.Core().compile_model(program, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(model, lambda images: compiled({0: images})[0], 1, 3, tolerance=2e-5)  # its exp is less exact


@pytest.mark.parametrize(
    "way", ["model", pytest.param("program", marks=pytest.mark.slow), pytest.param("timm", marks=pytest.mark.slow)]
)
def test_torch_onnx_finds_the_operators(way: str, model: nn.Module, tmp_path: Path) -> None:
    """Once `arm_zoo.onnx` is imported, and at any opset."""
    importlib.import_module("arm_zoo.onnx")
    file, images = tmp_path / "model.onnx", images_of(model, 2)
    if way == "timm":
        onnx_export(model, str(file), example_input=images, use_dynamo=True)
    elif way == "program":
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.onnx.export(program, (), file, dynamo=True, verbose=False)
    else:
        options: dict[str, Any] = {"dynamo": True, "verbose": False, "opset_version": 21}
        torch.onnx.export(model, (images,), file, dynamic_shapes=({0: "batch"},), **options)
    check(model, onnxruntime_of(file), 1, 3)


@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
def test_exports_that_cannot_end_well_say_what_to_do(
    dynamo: bool, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's script, which takes TorchScript by default, and torch.onnx without our translation."""
    monkeypatch.setattr("arm_zoo.ops.backends.sys", types.SimpleNamespace(modules={}))  # without arm_zoo.onnx
    with pytest.raises(
        RuntimeError, match=r"`import arm_zoo\.onnx`.* or type `python -m hub export MODEL FILE`"
    ) as raised:
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=images_of(model, 2), use_dynamo=dynamo)
    assert "export with dynamo=True" in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_exports_are_in_float32(dtype: torch.dtype, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("arm_zoo.onnx")
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    model(images_of(model, 1))
    with pytest.raises(RuntimeError, match=rf"in float32, got {re.escape(str(dtype))}: export model\.float\(\)"):
        small().to(dtype)(images_of(model, 1).to(dtype))
    with arm_zoo.scan_backend("reference"):  # is written as it is, step by step
        small().to(dtype)(images_of(model, 1).to(dtype))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_exports_need_the_translation(backend: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arm_zoo.ops.backends.sys", types.SimpleNamespace(modules={}))  # without arm_zoo.onnx
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    with (
        arm_zoo.scan_backend(backend),
        pytest.raises(RuntimeError, match=r"`import arm_zoo\.onnx` before it"),
    ):
        model(images_of(model, 1))


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript", "an old onnxscript", "what torch imports of it"])
def test_what_is_missing_is_said(
    missing: str,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line with what to type."""
    model.save_pretrained(tmp_path / "run")
    monkeypatch.delitem(sys.modules, "arm_zoo.onnx", raising=False)
    if missing == "an old onnxscript":
        monkeypatch.setattr("onnxscript.__version__", "0.5.7")
    elif missing == "what torch imports of it":

        def fail(*args: object, **kwargs: object) -> None:
            raise ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_9'")

        monkeypatch.setattr("torch.onnx.export", fail)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model.onnx")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "pip install --upgrade -e '.[hub]'" in error and "onnxscript" in error
    assert ("0.5.7" in error) == (missing == "an old onnxscript")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
