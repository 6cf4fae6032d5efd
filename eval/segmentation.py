"""Score a segmentation model on images with masks: mIoU, and the IoU of each class.

Run from the repository root, for example `python -m eval.segmentation --model local-dir:runs/segment --data ADE20K`.
The folder of images is laid out as ADE20K or Pascal VOC is. `python -m recipes.segment` trains such models.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torchmetrics.classification import MulticlassJaccardIndex

from arm_zoo.command_line import show, usable_device
from arm_zoo.heads.models import Segmenter
from arm_zoo.heads.segmentation import segment
from arm_zoo.images.masks import IGNORED, compare_class_names, no_class, open_masks
from eval import tables
from eval.command_line import guarded
from eval.scoring import models

COLUMNS = (
    *("model", "weights", "weights_sha256", "data_set", "split", "images", "classes", "miou"),
    *("img_size", "device", "torch", "timm", "pillow", "arm_zoo", "date"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.segmentation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--data", required=True, metavar="FOLDER", help="images with masks")
    add("--split", choices=("training", "validation"), default="validation", help="(%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=device, help="(%(default)s)")
    add("--output", type=Path, metavar="FILE", help="add a row to this .csv or .json file")
    return parser


def run(args: argparse.Namespace) -> int:
    tables.check_output(args.output, COLUMNS)
    models.check([args.model], {})
    split = open_masks(args.data, args.split)
    candidate = models.load(args.model, None)
    model, config = candidate.model, candidate.data_config
    if not isinstance(model, Segmenter):
        raise ValueError(f"{args.model} is no segmentation model; python -m recipes.segment trains one")
    compare_class_names(candidate.label_names, split.class_names, f"{args.model} and {args.data}")
    model.to(args.device)
    metric = MulticlassJaccardIndex(len(split.class_names), average=None, ignore_index=IGNORED).to(args.device)
    console = Console(stderr=True)
    for place in track(range(len(split)), args.data, console=console, disable=not console.is_terminal):
        image, labels = split[place]
        found = segment(model, image, config["input_size"][1:], config["mean"], config["std"])
        metric.update(found[None], labels[None].to(args.device))
    each = metric.compute()
    there = metric.confmat.sum(dim=0) + metric.confmat.sum(dim=1) > 0  # all other classes have no IoU
    if not there.any():
        raise ValueError(no_class(args.data))
    miou = f"{100 * each[there].mean().item():.4f}"
    row = {
        **{"model": args.model, "weights": candidate.weights, "weights_sha256": candidate.weights_sha256},
        **{"data_set": Path(args.data).name, "split": args.split, "images": len(split), "classes": int(there.sum())},
        **{"miou": miou, "img_size": "x".join(map(str, config["input_size"][1:])), "device": str(args.device)},
        **models.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lines = [
        [name, f"{100 * iou:.2f}" if here else "-"]
        for name, iou, here in zip(split.class_names, each.tolist(), there.tolist(), strict=True)
    ]
    means = ["mean", f"{float(miou):.2f}"]
    with tables.added(args.output, [row], COLUMNS):
        show(f"{args.model}, {args.data}")
        tables.show_table(tables.text_table("", ["class"], ["IoU"], [*lines, means]), width=100)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
