"""What pretraining is for, in minutes on a CPU: one label of each class, with a pretrained encoder and from scratch.

python -m recipes.quickstart [--output quickstart] [--seed 0]

A small ARM is pretrained for a moment, without labels, to show the way. The encoder that comes with the package was
pretrained for longer by the same command, on 50,000 other photographs (recipes/RESULTS.md). It is finetuned with one
labelled piece of each of 18 pictures, and so is one of the same size with random weights, both with three seeds.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.data import resolve_data_config

from arm_zoo.command_line import shown_by
from arm_zoo.files import replacing_files, write_text
from recipes.command_line import say
from recipes.config import FinetuneConfig, PretrainConfig, load_config
from recipes.errors import RunError, reporting_mistakes
from recipes.finetune import finetune
from recipes.pretrain import pretrain
from recipes.probe import probe
from recipes.probing.config import ProbeConfig
from recipes.training.checkpoint import Metrics
from recipes.training.plots import drawn_blindly, plot_bars

CHECKOUT = Path(__file__).parent.parent
CONFIGS = CHECKOUT / "recipes" / "configs"
IMAGES_NAMED = 3
SEEDS = 3
ENCODERS = ("untrained", "pretrained")
RUNS = "quickstart_runs"  # deleted at the start and at the end, hence a name that no user would choose


def quickstart(output: Path, seed: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the trainings, write the model, the figures and `summary.json` into `output`; give the summary."""
    runs, seeds = output / RUNS, range(seed, seed + SEEDS)
    settings = [f"seed={seed}", *overrides]
    before, after = CONFIGS / "pretrain_pieces.yaml", CONFIGS / "finetune_pieces.yaml"
    config = load_config(PretrainConfig, before, [*settings, f"output_dir={runs / 'pretrain'}"])
    shutil.rmtree(runs, ignore_errors=True)  # of an earlier quickstart: it is run anew, never resumed
    with ExitStack() as children:
        scratch = [children.enter_context(training_from_scratch(runs / f"scratch{s}", s, overrides)) for s in seeds]
        pretrained = pretrain(config, "1/2 pretrain, no labels")
        finetuned = []
        for s in seeds:
            own = [f"seed={s}", *overrides, f"output_dir={runs / f'finetune{s}'}"]
            finetuned.append(finetune(load_config(FinetuneConfig, after, own), f"2/2 finetune, seed {s}"))
        as_they_are = {kind: [nearest_neighbour(runs, run.config, kind) for run in finetuned] for kind in ENCODERS}
    first = finetuned[0]
    unlabelled: Any = pretrained.source.train
    with replacing_files(output) as beside:
        for file in (f"finetune{seed}/model.safetensors", f"finetune{seed}/config.json", "pretrain/predictions.png"):
            shutil.copy(runs / file, beside)
    source: Any = first.source  # of which both splits are tables
    figures = {
        **{f"nearest labelled piece, {kind} encoder": scores for kind, scores in as_they_are.items()},
        "trained from scratch": [history[-1]["top1"] for history in scratch],
        "pretrained, then finetuned": [run.top1 for run in finetuned],
    }
    images, classes = len(source.train), len(source.class_names)
    labels = images // classes
    title = f"{images} labelled pieces, {labels} of each picture: from which picture is a new piece?"
    plot_bars(output / "few_labels.png", title, figures)
    summary = {
        "top1": figures,  # of each seed
        "images_unlabelled": len(unlabelled),
        "images_labelled": images,
        "images_test": len(source.test),
        "seeds": [*seeds],
        "pretrain_epochs": len(pretrained.history),
        "finetune_epochs": len(first.history),
        "pretrain_seconds": pretrained.history[-1]["seconds"],
        "finetune_seconds": [run.history[-1]["seconds"] for run in finetuned],
        "scratch_seconds": [history[-1]["seconds"] for history in scratch],
        "examples": name_images(output, source, seed),
        "seconds": time.time() - psutil.Process().create_time(),
    }
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(runs)  # whose checkpoints are more than a gigabyte
    return summary


def nearest_neighbour(runs: Path, config: Any, kind: str) -> float:
    """Top-1 where the most similar of the labelled images that a finetuning had decides, by frozen features."""
    untrained = kind == "untrained"
    settings = ProbeConfig(
        data=replace(config.data, random_crop=None, flip=0.0),
        model_args=config.model_args,
        untrained=untrained,
        output=str(runs / "nearest.json"),
        cache=str(runs / "features"),
        seed=config.seed,
        device="cpu",
        protocols="knn",
        neighbours=1,
    )
    return probe(Path(config.model if untrained else config.pretrained), settings)["knn_top1"]


@contextmanager
def training_from_scratch(folder: Path, seed: int, overrides: Sequence[str]) -> Iterator[list[Metrics]]:
    """Train by the plain command, with the finetuning's configuration and so its budget, beside what the block does.

    The list that the block gets is filled, one row of figures per epoch, when the block has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recipes.finetune", "--config", str(CONFIGS / "finetune_pieces.yaml")]
    command += [f"seed={seed}", *overrides, "pretrained=null", "layer_decay=1.0", f"output_dir={folder.resolve()}"]
    history: list[Metrics] = []
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT)
        if psutil.POSIX:
            psutil.Process(process.pid).nice(10)  # what the block does takes longer, and should not wait
        try:
            yield history
            failed = process.wait() != 0
        finally:
            process.kill()
            process.wait()
    if failed:
        last = "\n".join((folder / "log.txt").read_text().splitlines()[-20:])
        raise RunError(f"training from scratch failed; its log, {log.name}, ends with:\n{last}")
    history += map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())


def name_images(folder: Path, source: Any, seed: int) -> list[dict[str, Any]]:
    """Load the written model as any user of timm would and let it name a few validation images."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    indices, batch = drawn_blindly(source.test, IMAGES_NAMED, seed, resolve_data_config(model=model))
    with torch.inference_mode():
        probabilities, best = model(batch.images).softmax(dim=1).max(dim=1)
    rows = zip(indices, best.tolist(), batch.classes.tolist(), probabilities.tolist(), strict=True)
    names = source.class_names
    return [
        {"image": index, "predicted": names[predicted], "label": names[label], "probability": probability}
        for index, predicted, label, probability in rows
    ]


def show(summary: dict[str, Any], output: Path) -> None:
    console = Console(markup=False, emoji=False)
    labelled, unknown = summary["images_labelled"], summary["images_test"]
    title = f"{labelled} labelled pieces of pictures, {unknown} others to recognise"
    table = Table(title=title, title_justify="left")
    for heading in ("start", "top-1", f"of seeds {', '.join(map(str, summary['seeds']))}"):
        table.add_column(heading, justify="left" if heading == "start" else "right")
    for start, scores in summary["top1"].items():
        table.add_row(start, f"{mean(scores):.1f}%", ", ".join(f"{score:.1f}" for score in scores))
    with shown_by(console, say):
        console.print(table)
        console.print(
            f"Pretraining for {summary['pretrain_seconds']:.0f} s shows the way. The encoder that was finetuned comes "
            "with the package: the same command pretrained it for longer, on 50,000 other photographs without labels."
        )
        for row in summary["examples"]:
            verdict = "right" if row["predicted"] == row["label"] else f"wrong, it is {row['label']}"
            console.print(f'piece {row["image"]}: "{row["predicted"]}" ({row["probability"]:.0%}), {verdict}')
        console.print(
            f"{summary['seconds']:.0f} s in all; written: {output}/ few_labels.png predictions.png summary.json"
        )
        load = f'import arm_zoo, timm; timm.create_model("local-dir:{output}", pretrained=True)'
        console.print(f"load the finetuned model: {load}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    does = "Few labels with a pretrained encoder and from scratch; from the repository's top."
    parser = argparse.ArgumentParser(prog="python -m recipes.quickstart", description=does)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder to write to (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    arguments = parser.parse_args(argv)
    # so that the end of this process, asked for by whoever started it, ends its child too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with reporting_mistakes(parser.prog):
        show(quickstart(arguments.output, arguments.seed), arguments.output)


if __name__ == "__main__":
    main()
