"""Export for other programs: ONNX for onnxruntime, pt2 for torch.export, and the authors' names for their code.

`arm_zoo.onnx` translates the operators of arm_zoo to ONNX. In pt2 they stay, so that whoever loads the program must
import arm_zoo.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import arm_zoo
from arm_zoo.files import replacing_files, save_tensors
from arm_zoo.models import Backbone
from arm_zoo.pretraining import PretrainingModel
from hub.folders import TOLERANCE, UsageError, relative_error


def export(source: str, file: Path, format: str) -> list[str]:
    """Write a model to `file`, compare the file's answers with the model's, and say what was written.

    'onnx' and 'pt2' programs take any number of images of the model's size; 'official' is a state dict (.safetensors)
    with the names of the authors' code.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a folder; name a file to write to")
    model = arm_zoo.from_pretrained(source).eval().requires_grad_(False)
    if not isinstance(model, Backbone | PretrainingModel):
        kind = f"a {type(model).__name__}, a backbone with a head of another kind"
        raise UsageError(f"{source} is {kind}; allowed: a backbone, or with --format official a pretraining model")
    if format != "official" and isinstance(model, PretrainingModel):
        raise UsageError(f"{source} is a pretraining model; onnx and pt2 are for backbones: finetune it first")
    with replacing_files(file.parent) as beside:
        said = FORMATS[format](model, beside / file.name)
    return [f"wrote {file}: {said}"]


def _images(model: Any) -> torch.Tensor:
    """Two images, so that the exporter does not take the number of images for a constant."""
    return torch.randn(2, *model.input_size(), generator=torch.Generator().manual_seed(0))


def _compare(actual: torch.Tensor, expected: torch.Tensor) -> str:
    error = relative_error(actual, expected)
    if not error <= TOLERANCE:
        raise arm_zoo.CheckpointError(f"the exported program differs from the model by {error:.1e}, relative")
    return f"differs from the model by {error:.1e}, relative"


def _write_official(model: nn.Module, file: Path) -> str:
    tensors = arm_zoo.to_official(model)
    save_tensors(tensors, file, {"format": "pt"})
    return f"{len(tensors)} tensors under the names of the authors' code"


def _write_pt2(model: Any, file: Path) -> str:
    images = _images(model)
    with arm_zoo.scan_backend("torch"):
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    archive = io.BytesIO()  # if PyTorch wrote to a full disk itself, it would end the process
    torch.export.save(program, archive)
    file.write_bytes(archive.getbuffer())
    said = _compare(torch.export.load(file).module()(images[:1]), model(images[:1]))
    return f"{said}; load it with torch.export.load after `import arm_zoo`"


def _write_onnx(model: Any, file: Path) -> str:
    images = _images(model)
    try:
        import onnxruntime

        from arm_zoo.onnx import translation_table

        with warnings.catch_warnings(), arm_zoo.scan_backend("torch"):
            warnings.simplefilter("ignore")  # those of the exporter are for its own developers
            names = {"input_names": ["images"], "output_names": ["logits" if model.num_classes else "features"]}
            options: dict[str, Any] = {**names, "custom_translation_table": translation_table(), "opset_version": 18}
            program: Any = torch.onnx.export(
                model, (images,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False, **options
            )
    except ImportError as error:  # the exporter imports what some versions of onnxscript lack
        needs = "--format onnx needs onnx, onnxscript and onnxruntime: pip install --upgrade -e '.[hub]'"
        raise UsageError(f"{needs} ({error})") from error
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": images[:1].numpy()})
    return f"{len(program.model.graph)} nodes, {_compare(torch.from_numpy(output), model(images[:1]))}"


FORMATS: dict[str, Callable[[Any, Path], str]] = {"onnx": _write_onnx, "pt2": _write_pt2, "official": _write_official}
