"""Whether published weights are what they should be: sha256, names and shapes, golden answers."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

import arm_zoo
from arm_zoo.files import CONFIG, WEIGHTS, CheckpointError, sha256_of
from arm_zoo.hosted import ORGANISATION, TABLE, download
from arm_zoo.loading import from_pretrained

from .convert import answers
from .folders import GOLDEN, read_header

TOLERANCE = 1e-4  # of the largest value: float32 on other machines


def check_folder(folder: Path) -> str:
    """Load a folder strictly and compare its answers with the golden ones.

    Returns:
        One line that says how well they agree.

    Raises:
        CheckpointError: if it does not load, or answers otherwise.
    """
    golden_file = folder / GOLDEN
    if not golden_file.exists():
        raise CheckpointError(f"no {GOLDEN} in {folder}; python -m hub convert writes it")
    model = from_pretrained(folder).eval()
    of = read_header(golden_file).get("model_sha256")
    if of != sha256_of(folder / WEIGHTS):
        raise CheckpointError(f"{golden_file} belongs to weights with sha256 {of}; convert them together")
    golden = load_file(golden_file)
    actual = answers(model, golden.pop("input"))
    if actual.keys() != golden.keys():
        raise CheckpointError(f"{golden_file} holds {', '.join(golden)}; the model gives {', '.join(actual)}")
    worst = max(_difference(actual[name], expected) for name, expected in golden.items())
    if not worst <= TOLERANCE:
        raise CheckpointError(f"{folder}: the golden answers are missed by {worst:.1e}, relative")
    return f"golden {' and '.join(golden)} met to {worst:.1e}, relative"


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def check_entry(entry: str) -> str:
    """Fetch a hosted entry at the table's revision, and check it as its users load it."""
    weights = TABLE[entry]
    repo = f"{ORGANISATION}/{weights.repository}"
    if weights.sha256 is None:
        raise CheckpointError(f"{entry} is hosted, but arm_zoo/hosted.py has no sha256 of it")
    files = [download(repo, name, weights.revision) for name in (CONFIG, GOLDEN, WEIGHTS)]
    model = from_pretrained(entry)
    by_name = timm.create_model(entry, pretrained=True, num_classes=getattr(model, "num_classes", 0))
    if isinstance(model, arm_zoo.arm.ARM):
        for name, value in model.state_dict().items():
            if not torch.equal(value, by_name.state_dict()[name]):
                raise CheckpointError(f"{entry}: timm.create_model and arm_zoo.from_pretrained differ in {name}")
    return check_folder(files[0].parent)


def check_all() -> tuple[list[str], int]:
    """One line for each hosted entry, and how many failed."""
    lines, failed = [], 0
    for entry in (entry for entry, weights in TABLE.items() if weights.hosted):
        try:
            lines.append(f"{entry}: ok, {check_entry(entry)}")
        except (CheckpointError, OSError) as error:
            failed += 1
            lines.append(f"{entry}: FAILED, {error}")
    return lines or ["no entry is hosted yet, so there is nothing to check"], failed
