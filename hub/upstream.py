"""What the authors' repository on the Hub holds, asked at run time, and what is known about every entry."""

from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import HfApi
from timm.models import get_pretrained_cfg

from arm_zoo.identify import find_variant
from arm_zoo.weights.hosted import TABLE, training_commands
from hub.catalog import AUTHORS_REPOSITORY, CATALOG, RESULTS, Entry, measured, reported, state
from hub.publish import explained

CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def list_sources(repo: str = AUTHORS_REPOSITORY) -> Iterator[str]:
    """Lines for people: the repository's files with what each is, then the entries of the catalogue."""
    api = HfApi(library_name="arm-zoo")
    with explained(f"list {repo}", repo):
        info = api.model_info(repo, files_metadata=True)
    files = info.siblings or []
    yield f"{repo} at {info.sha}: {len(files)} files"
    for file in files:
        yield f"  {file.rfilename!r}  {file.size or 0:,} bytes  {_what(api, repo, file.rfilename)}"
    yield "The entries, and where their weights are to come from:"
    width = max(map(len, CATALOG))
    for name, entry in CATALOG.items():
        yield f"  {name:{width}}  {state(name):10}  {_known(name, entry)}"


def _known(name: str, entry: Entry) -> str:
    """Origin, licence and figures; the paper's and ours apart."""
    ours = {key: float(row["top1"]) for key, row in measured(TABLE[name].sha256, RESULTS).items()}
    cfg: Any = get_pretrained_cfg(name)
    origin = f"from {entry.source or training_commands(name)}"
    parts = [entry.paper_name or "not in the paper", origin, f"licence {cfg.license}"]
    for kind, figures in (("reported by the paper", reported(name)), ("measured by us", ours)):
        if figures:
            parts.append(f"{kind}: {', '.join(f'{key} {top1:.2f}' for key, top1 in figures.items())}")
    return "; ".join(parts)


def _what(api: HfApi, repo: str, name: str) -> str:
    """What a file is; of safetensors the header says it, of a pickle only the whole file does."""
    if not name.endswith(CHECKPOINTS):
        return ""
    if not name.endswith(".safetensors"):
        return "a pickle: download and convert it to see which model it is"
    try:
        tensors = api.parse_safetensors_file_metadata(repo, name).tensors
        variant = find_variant({key: torch.empty(info.shape, device="meta") for key, info in tensors.items()})
    except Exception as error:  # an unreadable file must not hide the others
        return f"cannot be told: {error}".splitlines()[0]
    phase = "pretraining model" if variant.pretraining else f"backbone, {variant.num_classes} classes"
    return f"{variant.architecture}, {phase}"
