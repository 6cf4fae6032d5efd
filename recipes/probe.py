"""Scores of frozen features by the usual protocols: a quick check of a pretrained model.

python -m recipes.probe --weights runs/pretrain_digits/pretraining_model data.source=digits
python -m recipes.probe --weights ENTRY data.source=FOLDER protocols=all
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from arm_zoo.command_line import shown_by
from arm_zoo.files import sha256_of, write_text
from arm_zoo.heads.models import save_attentive_probe
from arm_zoo.images.errors import SourceError
from arm_zoo.tables import Row, csv_text, read
from recipes import command_line
from recipes.data.labels import check_several
from recipes.data.sources import open_source
from recipes.errors import RunError, reporting_mistakes
from recipes.probing import scores
from recipes.probing.backbone import load_backbone
from recipes.probing.config import ProbeConfig
from recipes.probing.features import Extractor, extract
from recipes.probing.outputs import PATCHES, arrays_of
from recipes.probing.protocols import PROTOCOLS, arrays_for, chosen
from recipes.probing.scores import Score

OF_ALL_SCORES = ("model", "weights", "weights_sha256", "data_set", "images_train", "images_test", "seed")
COLUMNS = (*OF_ALL_SCORES, *scores.COLUMNS)


def probe(weights: Path, config: ProbeConfig) -> dict[str, Any]:
    """Score the frozen features of `weights`, which `load_backbone` loads; the main process writes `config.output`.

    Processes that `torchrun` has started share the extraction. Only the main process has `scores` in its result.
    """
    protocols = chosen(config.protocols)
    rows_of(Path(config.output))  # fails now if the file is another table
    state = PartialState(cpu=config.device == "cpu")
    source: Any = open_source(config.data, seed=config.seed)  # has images to score on, as labels are needed
    frozen = load_backbone(weights, config)
    inputs = {"mean": source.mean, "std": source.std, **frozen.inputs}
    if (channels := inputs["input_size"][0]) != source.channels:
        raise SourceError(f"{config.data.source!r} has {source.channels} channels, the model takes {channels}")
    check_several(source.class_names, config.data.source)
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda", state.local_process_index) if on_gpu else torch.device("cpu")
    model = frozen.model.eval().to(device)
    arrays = arrays_of(model)
    if config.export and not ("attentive" in protocols and PATCHES in arrays):
        raise RunError(f"export is {config.export}; allowed: with protocols=attentive, of a model that gives patches")
    wanted = arrays_for(protocols, config.features, arrays)
    extractor = Extractor(model, inputs, config, wanted)
    train = extract(extractor, source.train, "training")
    test = extract(extractor, source.test, "validation")
    if train.images < 2:
        raise RunError(f"{config.data.source} has one training image; allowed: two or more")
    found = []
    if state.is_main_process:
        found = [score for name in protocols for score in PROTOCOLS[name].score(train, test, config, device)]
    for score in found:
        if config.export and score.head is not None:
            save_attentive_probe(Path(config.export), model, score.head, inputs, list(source.class_names))
    result = {
        "model": extractor.identity["model"],
        "weights": frozen.weights,
        "weights_sha256": sha256_of(frozen.file) if frozen.file else extractor.identity["weights_sha256"],
        "data_set": config.data.data_set,
        "images_train": train.images,
        "images_test": test.images,
        "images_train_skipped": train.skipped,
        "images_test_skipped": test.skipped,
        "features": train.width,
        "seed": config.seed,
        **summary(found),
        "scores": [score.row() for score in found],
    }
    if state.is_main_process:
        write(Path(config.output), result)
    return result


def summary(found: Sequence[Score]) -> dict[str, Any]:
    """The last scores of k-NN and of the linear probe, as entries of their own."""
    last = {score.protocol: score for score in found}
    figures: dict[str, Any] = {}
    if "knn" in last:
        figures |= {"knn_top1": last["knn"].top1, **last["knn"].settings}
    if "linear" in last:
        settings = {f"linear_{name}": value for name, value in last["linear"].settings.items()}
        figures |= {"linear_top1": last["linear"].top1, **settings}
    return figures


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Write the whole result to a JSON file, or add a row for each score to a CSV file."""
    if file.suffix == ".json":
        write_text(file, json.dumps(result, indent=2) + "\n")
        return
    new = [{**{name: result[name] for name in OF_ALL_SCORES}, **row} for row in result["scores"]]
    with FileLock(file.with_name(f".{file.name}.lock")):
        old = rows_of(file)
        write_text(file, csv_text([*old, *new], dict.fromkeys([*COLUMNS, *(old[0] if old else ())])))


def rows_of(file: Path) -> list[Row]:
    """The rows of a CSV file, if it exists; people may have added columns. RunError if it is another table."""
    try:
        return read(file, COLUMNS) if file.suffix == ".csv" and file.exists() else []
    except ValueError as error:
        raise RunError(f"output: {error}") from error


def show(result: Mapping[str, Any]) -> None:
    """Print a short table."""
    table = Table("protocol", "features", "settings", "top-1", "95% interval", box=None, pad_edge=False)
    for row in result["scores"]:
        ends = f"{row['low']:.2f} to {row['high']:.2f}"
        table.add_row(row["protocol"], row["features"], row["settings"], f"{row['top1']:.2f}%", ends)
    console = Console(width=None if Console().is_terminal else 120)
    with shown_by(console, command_line.say):
        console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    rows = "".join(f"\n  {name:<10} {protocol.does}" for name, protocol in PROTOCOLS.items())
    does = f"Score frozen features. Run it from the top of the repository.\n\nprotocols=NAME,NAME or all, of:{rows}"
    parser = argparse.ArgumentParser(
        prog="python -m recipes.probe", description=does, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = "the folder pretraining_model/, backbone/ or of a finetuned model, a file, an entry, or hf-hub:ORG/NAME"
    parser.add_argument("--weights", type=Path, required=True, help=kinds)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.source=..., neighbours=20, ...")
    arguments = parser.parse_intermixed_args(argv)
    config = command_line.read_config(parser, ProbeConfig, None, arguments.overrides)
    with reporting_mistakes(parser.prog):
        result = probe(arguments.weights, config)
        if PartialState().is_main_process:
            show(result)
        command_line.say(f"{result['images_test']:,} images; wrote {config.output}")
        command_line.leave_process_group()


if __name__ == "__main__":
    main()
