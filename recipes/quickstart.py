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

from .config import DataConfig, FinetuneConfig, PretrainConfig, load_config
from .engine import Metrics
from .finetune import finetune
from .objectives import Trained
from .plots import drawn_blindly, plot_comparison, prepared_images
from .pretrain import pretrain
from .sources import open_source

CHECKOUT = Path(__file__).parent.parent
CONFIGS = CHECKOUT / "recipes" / "configs"
PICTURES_NAMED = 3
RUNS = "quickstart_runs"  # is deleted at the start: a name that nobody's own runs have


def quickstart(output: Path, seed: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the three trainings, write the model, the plots and ``summary.json`` into ``output``; give the summary.

    Args:
        output: Folder to write to; the files of the three runs go into its subfolder ``quickstart_runs``.
        seed: Of initial weights, order and variation; the split into training and held-out pictures is fixed.
        overrides: Settings of all three runs, as ``key=value``.

    Raises:
        RuntimeError: If training from scratch, which runs in a process of its own, fails.
    """
    runs = output / RUNS
    shutil.rmtree(runs, ignore_errors=True)  # of an earlier quickstart: it is run anew, never resumed
    settings = [f"seed={seed}", *overrides]
    with training_from_scratch(runs / "scratch", settings) as scratch:
        pretrained = run_pretraining(runs / "pretrain", settings)
        finetuned = run_finetuning(runs / "finetune", [*settings, f"pretrained={pretrained.folder}"])
    with replacing_files(output) as beside:
        for file in ("finetune/model.safetensors", "finetune/config.json", "pretrain/predictions.png"):
            shutil.copy(runs / file, beside)
    plot_comparison(
        output / "curves.png",
        pretrained.history,
        {"pretrained, then finetuned": finetuned.history, "from scratch": scratch},
    )
    source = open_source(DataConfig(source="digits"), labels_needed=True)
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
        "named": name_pictures(output, source.test, source.class_names, seed),
        "seconds": time.time() - psutil.Process().create_time(),
    }
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def run_pretraining(folder: Path, settings: Sequence[str]) -> Trained:
    """Pretrain on the digits without looking at their labels."""
    config = load_config(PretrainConfig, CONFIGS / "pretrain_digits.yaml", [*settings, f"output_dir={folder}"])
    return pretrain(config, "1/2 pretrain, no labels")


def run_finetuning(folder: Path, settings: Sequence[str]) -> Trained:
    """Train on the digits with their labels, from pretrained weights."""
    config = load_config(FinetuneConfig, CONFIGS / "finetune_digits.yaml", [*settings, f"output_dir={folder}"])
    return finetune(config, "2/2 finetune")


@contextmanager
def training_from_scratch(folder: Path, settings: Sequence[str]) -> Iterator[list[Metrics]]:
    """Train with the finetuning's configuration, so with its budget, beside what the block does.

    It is the plain command of the recipe, on the second core. The list that the block gets is filled, one row of
    figures per epoch, when the block has ended.
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
        raise RuntimeError(f"training from scratch failed; its log, {log.name}, ends with:\n{tail(folder)}")
    history += map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())


def tail(folder: Path, lines: int = 20) -> str:
    """The last lines of a run's log."""
    return "\n".join((folder / "log.txt").read_text().splitlines()[-lines:])


def name_pictures(folder: Path, test: Any, class_names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Load the written model as any user of timm would and let it name a few held-out pictures."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    indices = drawn_blindly(len(test), PICTURES_NAMED, seed)
    batch = prepared_images(test, indices, resolve_data_config(model=model))
    with torch.inference_mode():
        probabilities, best = model(batch.pictures).softmax(dim=1).max(dim=1)
    rows = zip(indices, best.tolist(), batch.classes.tolist(), probabilities.tolist(), strict=True)
    return [
        {"picture": index, "named": class_names[named], "is": class_names[label], "probability": probability}
        for index, named, label, probability in rows
    ]


def show(summary: dict[str, Any], output: Path, console: Console) -> None:
    """Print the result as a short table."""
    table = Table(title=f"Handwritten digits, {summary['images_test']} held-out pictures", title_justify="left")
    for heading in ("start", "labels seen", "top-1", "pretraining", "training"):
        table.add_column(heading, justify="left" if heading == "start" else "right")
    epochs = f"{summary['finetune_epochs']} epochs"
    before = f"{summary['pretrain_seconds']:.0f} s"
    rows = [("pretrained", before, "finetune"), ("from scratch", "-", "scratch")]
    for start, pretraining, name in rows:
        top1 = summary["finetuned_top1" if name == "finetune" else "scratch_top1"]
        table.add_row(start, epochs, f"{top1:.2f}%", pretraining, f"{summary[f'{name}_seconds']:.0f} s")
    console.print(table)
    for row in summary["named"]:
        verdict = "right" if row["named"] == row["is"] else f"wrong, it is {row['is']}"
        console.print(f'picture {row["picture"]}: "{row["named"]}" ({row["probability"]:.0%}), {verdict}')
    console.print("Training from scratch ran beside the other two, in a process of its own, one thread each.")
    console.print(f"{summary['seconds']:.0f} s in all; written: {output}/ curves.png predictions.png summary.json")
    console.print(f'the finetuned model: timm.create_model("local-dir:{output}", pretrained=True)', soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.quickstart",
        description="Pretrain, finetune and score a small ARM; from the repository's top.",
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder to write to (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and variation (%(default)s)")
    arguments = parser.parse_args(argv)
    # so that the end of this process, asked for by whoever started it, ends its child too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    show(quickstart(arguments.output, arguments.seed), arguments.output, Console(markup=False, emoji=False))


if __name__ == "__main__":
    main()
