"""The whole way in minutes on a CPU: pretrain without labels, finetune, compare with training from scratch.

python -m recipes.quickstart [--output quickstart] [--seed 0]
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.data import resolve_data_config

from arm_zoo.files import replacing_files, write_text
from recipes.config import FinetuneConfig, PretrainConfig, load_config
from recipes.errors import RunError, reporting_mistakes
from recipes.finetune import finetune
from recipes.pretrain import pretrain
from recipes.training.engine import Metrics
from recipes.training.plots import drawn_blindly, plot_comparison

CHECKOUT = Path(__file__).parent.parent
CONFIGS = CHECKOUT / "recipes" / "configs"
IMAGES_NAMED = 3
RUNS = "quickstart_runs"  # deleted at the start, hence a name that no user would choose


def quickstart(output: Path, seed: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the three trainings, write the model, the plots and `summary.json` into `output`; give the summary."""
    runs = output / RUNS
    settings = [f"seed={seed}", *overrides]
    before, after = CONFIGS / "pretrain_digits.yaml", CONFIGS / "finetune_digits.yaml"
    config = load_config(PretrainConfig, before, [*settings, f"output_dir={runs / 'pretrain'}"])
    shutil.rmtree(runs, ignore_errors=True)  # of an earlier quickstart: it is run anew, never resumed
    with training_from_scratch(runs / "scratch", settings) as scratch:
        pretrained = pretrain(config, "1/2 pretrain, no labels")
        start = [f"pretrained={pretrained.folder}", f"output_dir={runs / 'finetune'}"]
        finetuned = finetune(load_config(FinetuneConfig, after, [*settings, *start]), "2/2 finetune")
    with replacing_files(output) as beside:
        for file in ("finetune/model.safetensors", "finetune/config.json", "pretrain/predictions.png"):
            shutil.copy(runs / file, beside)
    histories = {"pretrained, then finetuned": finetuned.history, "from scratch": scratch}
    plot_comparison(output / "curves.png", pretrained.history, histories)
    source: Any = finetuned.source  # of which both splits are tables
    summary = {
        "finetuned_top1": finetuned.top1,
        "scratch_top1": scratch[-1]["top1"],
        "images_train": len(source.train),
        "images_test": len(source.test),
        "seed": seed,
        "pretrain_epochs": len(pretrained.history),
        "finetune_epochs": len(finetuned.history),
        "pretrain_seconds": pretrained.history[-1]["seconds"],
        "finetune_seconds": finetuned.history[-1]["seconds"],
        "scratch_seconds": scratch[-1]["seconds"],
        "examples": name_images(output, source, seed),
        "seconds": time.time() - psutil.Process().create_time(),
    }
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


@contextmanager
def training_from_scratch(folder: Path, settings: Sequence[str]) -> Iterator[list[Metrics]]:
    """Train by the plain command, with the finetuning's configuration and so its budget, beside what the block does.

    The list that the block gets is filled, one row of figures per epoch, when the block has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recipes.finetune", "--config", str(CONFIGS / "finetune_digits.yaml")]
    command += [*settings, "pretrained=null", f"output_dir={folder.resolve()}"]
    history: list[Metrics] = []
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT)
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
    table = Table(title=f"Handwritten digits, {summary['images_test']} validation images", title_justify="left")
    for heading in ("start", "supervised epochs", "top-1", "pretraining", "training"):
        table.add_column(heading, justify="left" if heading == "start" else "right")
    epochs = str(summary["finetune_epochs"])
    before, after, scratch = (f"{summary[f'{run}_seconds']:.0f} s" for run in ("pretrain", "finetune", "scratch"))
    table.add_row("pretrained", epochs, f"{summary['finetuned_top1']:.2f}%", before, after)
    table.add_row("from scratch", epochs, f"{summary['scratch_top1']:.2f}%", "-", scratch)
    console.print(table, "Less than two points apart is noise: on so few images either may end ahead.", sep="\n")
    little = f"pretrained for {summary['pretrain_epochs']} epochs on {summary['images_train']:,} images of 8x8 pixels"
    console.print(f"This shows the way, not the gain: expect a start {little} to be no better than none.")
    for row in summary["examples"]:
        verdict = "right" if row["predicted"] == row["label"] else f"wrong, it is {row['label']}"
        console.print(f'image {row["image"]}: "{row["predicted"]}" ({row["probability"]:.0%}), {verdict}')
    console.print("Training from scratch ran at the same time as pretraining and finetuning, one thread each.")
    console.print(f"{summary['seconds']:.0f} s in all; written: {output}/ curves.png predictions.png summary.json")
    load = f'import arm_zoo, timm; timm.create_model("local-dir:{output}", pretrained=True)'
    console.print(f"load the finetuned model: {load}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    does = "Pretrain, finetune and score a small ARM; from the repository's top."
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
