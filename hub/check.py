"""Checking published and bundled weights: sha256, names and shapes, golden answers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

from arm_zoo.files import CONFIG, WEIGHTS, CheckpointError, sha256_of
from arm_zoo.loading import from_pretrained
from arm_zoo.models import Backbone
from arm_zoo.weights.download import download
from arm_zoo.weights.hosted import TABLE, repository_of
from hub.convert import answers
from hub.folders import GOLDEN, TOLERANCE, check_complete, read_header, relative_error

BUNDLED_GOLDEN = Path(__file__).parent / "golden"  # golden answers of bundled entries; hosted ones have a repository


def check(folders: Sequence[Path] = ()) -> Iterator[str]:
    """Check folders up to the first that fails, or without folders all hosted and bundled entries; a line for each."""
    for folder in folders:
        yield f"{folder}: {check_folder(folder)}"
    if folders:
        return
    failed = 0
    for entry, weights in TABLE.items():
        if weights.where not in ("bundled", "hosted"):
            continue
        try:
            if weights.sha256 is None:
                raise CheckpointError("arm_zoo/weights/hosted.py has no sha256 of it")
            if weights.where == "bundled":
                golden_file = BUNDLED_GOLDEN / f"{entry}.safetensors"
                yield f"{entry}: ok, bundled, {_meet(golden_file, from_pretrained(entry), weights.sha256)}"
            else:
                yield f"{entry}: ok, {check_hosted(entry)}"
        except (CheckpointError, OSError) as error:
            failed += 1
            yield f"{entry}: FAILED, {error}"
    if not any(weights.where == "hosted" for weights in TABLE.values()):
        yield "no entry is hosted yet"
    if failed:
        raise CheckpointError(f"{failed} of the entries failed; the lines above say why")


def check_folder(folder: Path) -> str:
    """Load a folder strictly, compare the model's answers with the golden ones, and say how well they agree."""
    check_complete(folder, (WEIGHTS, CONFIG, GOLDEN))
    return _meet(folder / GOLDEN, from_pretrained(folder), sha256_of(folder / WEIGHTS))


def _meet(golden_file: Path, model: Any, sha256: str) -> str:
    """Compare a model's answers with the golden ones, which belong to the weights with this sha256."""
    of = read_header(golden_file).get("model_sha256")
    if of != sha256:
        raise CheckpointError(f"{golden_file} belongs to weights with sha256 {of}; convert them together")
    golden = load_file(golden_file)
    actual = answers(model.eval(), golden.pop("input"))
    if actual.keys() != golden.keys():
        raise CheckpointError(f"{golden_file} holds {', '.join(golden)}; the model gives {', '.join(actual)}")
    worst = max(relative_error(actual[name], expected) for name, expected in golden.items())
    if not worst <= TOLERANCE:
        raise CheckpointError(f"{golden_file}: the answers differ from the golden ones by {worst:.1e} (relative)")
    return f"golden {' and '.join(golden)} match to {worst:.1e}, relative"


def check_hosted(entry: str) -> str:
    """Fetch a hosted entry at the revision in the table, and check it as users load it."""
    repo, revision = repository_of(entry), TABLE[entry].revision
    files = [download(repo, name, revision) for name in (CONFIG, GOLDEN, WEIGHTS)]
    model = from_pretrained(entry)
    by_name = timm.create_model(entry, pretrained=True, num_classes=getattr(model, "num_classes", 0))
    if isinstance(model, Backbone):
        for name, value in model.state_dict().items():
            if not torch.equal(value, by_name.state_dict()[name]):
                raise CheckpointError(f"{entry}: timm.create_model and arm_zoo.from_pretrained differ in {name}")
    return check_folder(files[0].parent)
