"""Listing every entry, and what the authors' files on the Hub are, without downloading them."""

from collections.abc import Iterator
from typing import Any

from timm.models import get_pretrained_cfg

from arm_zoo.files import CheckpointError
from arm_zoo.identify import find_variant
from arm_zoo.weights.download import explained
from arm_zoo.weights.hosted import ARM_REPOSITORY, TABLE, Weights, training_commands
from arm_zoo.weights.reading import quoted
from arm_zoo.weights.upstream import RemoteFile, fits, list_files, look
from hub.catalog import PAPER_NAMES, RESULTS, measured, reported, state

_TOLD = ("model", "input_size", "epochs", "nb_classes")  # arguments of the authors' programs that are worth showing


def list_sources(repo: str = ARM_REPOSITORY) -> Iterator[str]:
    """Lines for people: the entries, which need no network, then a repository's checkpoints and what each of them is.

    Raises DownloadError if these cannot be listed.
    """
    yield "The entries, and where their weights come from:"
    width = max(map(len, TABLE))
    for name in TABLE:
        yield f"  {name:{width}}  {state(name):10}  {_known(name)}"
    weights = Weights("upstream", repository=repo)
    with explained(f"list {repo}", repo, authors="hub"):
        files = list_files(weights)
        yield f"{repo}{f' at {files[0].revision}' if files else ''}: {len(files)} checkpoints"
        for file in files:
            yield f"  {file.name!r}  {file.size or 0:,} bytes  {_what(file, weights)}"


def origin(name: str) -> str:
    """Where the weights of an entry come from: an address, a page, or the commands that train them."""
    weights = TABLE[name]
    if weights.where == "bundled":
        return "the runs of recipes/RESULTS.md, which has their commands"
    if weights.where != "upstream":
        return training_commands(name)
    if weights.file is None:
        return f"{weights.repository}, a file that has its shapes"
    return RemoteFile(str(weights.repository), weights.file, weights.revision, weights.host == "github").address


def _known(name: str) -> str:
    """The origin, licence and figures of an entry, the paper's and ours apart."""
    ours = {key: float(row["top1"]) for key, row in measured(TABLE[name].sha256, RESULTS).items()}
    cfg: Any = get_pretrained_cfg(name)
    parts = [f"from {origin(name)}", f"licence {cfg.license}"]
    if name in PAPER_NAMES:
        parts.insert(0, PAPER_NAMES[name])
    if TABLE[name].where == "planned":
        parts.insert(0, "not trained yet")
    for kind, figures in (("reported by the paper", reported(name)), ("measured by us", ours)):
        if figures:
            parts.append(f"{kind}: {', '.join(f'{key} {top1:.2f}' for key, top1 in figures.items())}")
    return "; ".join(parts)


def _what(file: RemoteFile, weights: Weights) -> str:
    """What a file is, which entries it fits, and what it holds besides weights; errors are part of the text."""
    contents = look(file, weights)
    if isinstance(contents, CheckpointError):
        return f"cannot be told: {contents}"
    try:
        variant = find_variant(contents.tensors)
        phase = "pretraining model" if variant.pretraining else f"backbone, {variant.num_classes} classes"
        parts = [f"{variant.architecture}, {phase}"]
    except CheckpointError as error:
        parts = [f"cannot be told: {error}"]
    rows = ((entry, row) for entry, row in TABLE.items() if row.repository == file.repository)
    fitting = [entry for entry, row in rows if row.file == file.name or (row.shapes and fits(contents, row))]
    arguments = [f"{key}={contents.arguments[key]!r}"[:80] for key in _TOLD if key in contents.arguments]
    parts += [f"fits {', '.join(fitting)}"] if fitting else []
    parts += [f"beside {quoted(contents.beside)}"] if contents.beside else []
    parts += [f"arguments {', '.join(arguments)}"] if arguments else []
    return "; ".join([*parts, f"told from {contents.bytes_read:,} bytes"])
