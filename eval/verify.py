"""Scores a model afresh and compares top-1 with the figures on its card; exits with 1 where they differ.

Run from the repository root, for example
`python -m eval.verify arm_base_patch16_224 --weights FOLDER --sets in1k=imagenet`.
The card is README.md in the folder or Hub repository of the weights, or --card FILE; its figures are the accuracies
under model-index, as Hugging Face's cards have them.
"""

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
from huggingface_hub import EvalResult, ModelCard
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eval import models
from eval.options import (
    add_scoring_options,
    choices_of,
    guarded,
    open_requests,
    parse_sets,
    settings_of,
    start_processes,
    tolerance,
    warn,
)
from eval.rows import Scorer
from eval.sets import REAL, SETS

# How cards call the sets, in lower case; the first that is found in a name decides.
CARD_NAMES = {
    r"real": REAL,
    r"sketch": "sketch",
    r"v2.*threshold": "v2-threshold0.7",
    r"v2.*top": "v2-top-images",
    r"v2": "v2",
    r"(imagenet|in)[-_ ]?a\b": "a",
    r"(imagenet|in)[-_ ]?r\b": "r",
    r"imagenet(?![-_ ]?(21|22|12)k)|\bin[-_ ]?1k": "in1k",
}
TRAINERS_TAG = "generated_from_trainer"  # cards of transformers' Trainer have shares of 1, all others percent
TOP1 = {"accuracy", "acc", "top1", "top1accuracy", "acctop1", "accuracytop1", "acc1"}


def _plain(text: str | None) -> str:
    return re.sub(r"[^a-z0-9]", "", (text or "").lower())


def set_of(result: EvalResult) -> str | None:
    """Which of our sets a result is on, by its data set's name, else by its Hub id; None for others."""
    for text in (result.dataset_name, result.dataset_type):
        if text in (REAL, *SETS):
            return text
        for pattern, name in CARD_NAMES.items():
            if re.search(pattern, (text or "").lower()):
                return name
    return None


def reported(results: Sequence[EvalResult], shares: bool = False) -> dict[str, float]:
    """Top-1 in percent by set; other metrics and sets are passed over.

    Args:
        shares: the card has shares of 1 and not percent. Figures do not tell: 0.83 may be either.
    """
    out: dict[str, float] = {}
    for result in results:
        name = set_of(result)
        if name is None or _plain(result.metric_type) not in TOP1 or "5" in _plain(result.metric_name):
            continue
        out.setdefault(name, float(result.metric_value) * (100 if shares else 1))
    return out


def read_card(model: str, weights: str | None, card: Path | None) -> tuple[str, dict[str, float]]:
    """Where the card is, and its figures.

    Raises:
        ValueError: if there is no card, or it has no figures.
    """
    source = str(card) if card else _card_beside(model, weights)
    if card is not None and not card.is_file():
        raise ValueError(f"there is no card {card}; name a README.md with --card FILE")
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data
        figures = reported(data.eval_results or [], shares=TRAINERS_TAG in (data.get("tags") or ()))
    except Exception as error:  # from the Hub and YAML come classes of all sorts
        raise ValueError(f"cannot read the card {source}: {' '.join(str(error).split())}") from error
    if not figures:
        raise ValueError(f"the card {source} has no accuracy on a set of ours under model-index; see --card")
    return source, figures


def _card_beside(model: str, weights: str | None) -> str:
    """README.md of the folder, or the id of the Hub repository, that the weights are in."""
    place = weights or model
    kind, _, rest = place.partition(":")
    if kind in ("hf-hub", "hf_hub"):
        return rest.partition("@")[0]
    if weights is None and kind != "local-dir":
        cfg = timm.models.get_pretrained_cfg(model)
        if cfg is None or not cfg.hf_hub_id:
            raise ValueError(f"{model} has no card on the Hub; name one with --card FILE")
        return str(cfg.hf_hub_id).partition("@")[0]
    path = Path(rest if kind == "local-dir" else place)
    readme = (path if path.is_dir() else path.parent) / "README.md"
    if not readme.is_file():
        raise ValueError(f"no card at {readme}; name one with --card FILE")
    return str(readme)


def compare(fresh: Mapping[str, float], figures: Mapping[str, float], allowed: float) -> dict[str, bool]:
    """By set: whether the scores differ by no more than is allowed, in points."""
    # one part in a million more, because 83.2 - 83.1 is above 0.1 in binary fractions
    return {name: abs(value - figures[name]) <= allowed * (1 + 1e-6) for name, value in fresh.items()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="timm name, ours or not; hf-hub: and local-dir: too")
    add("--weights", metavar="FILE", help="file, folder or hf-hub:OWNER/NAME; without: the hosted weights")
    add("--card", type=Path, metavar="FILE", help="the card, where it does not lie with the weights")
    add("--tolerance", type=tolerance, default=0.1, help="points by which top-1 may differ (default: %(default)s)")
    add_scoring_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    weights = {args.model: args.weights} if args.weights else {}
    models.check([args.model], weights)
    locations, real = parse_sets(args.sets)
    source, figures = read_card(args.model, args.weights, args.card)
    asked = [*locations, *([REAL] if real else [])]
    if missing := [name for name in asked if name not in figures]:
        raise ValueError(
            f"the card {source} has no top-1 for {', '.join(missing)}, only for {', '.join(figures)}; leave them out"
        )
    state = start_processes(args.device)
    requests = open_requests(locations, real, choices_of(args))
    candidate = models.load(args.model, args.weights, args.train_size)
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(Path(folder, "results.csv"), settings_of(args), state, resume=False, recompute=True)
        rows = [row for row, _ in scorer.rows(candidate, requests)]
    fresh = {row["set"]: float(row["top1"]) for row in rows}
    agreed = compare(fresh, figures, args.tolerance)
    if state.is_main_process:
        for row in rows:
            warn(row)
        table = Table(title=f"{args.model} and {source}, tolerance {args.tolerance}", box=SIMPLE_HEAD)
        for title in ("set", "on the card", "scored", "difference", ""):
            table.add_column(title, justify="right" if title else "left")
        for name, value in fresh.items():
            difference = "-" if math.isnan(value) else f"{value - figures[name]:+.3f}"
            verdict = "agrees" if agreed[name] else "DIFFERS"
            table.add_row(name, f"{figures[name]:.2f}", f"{value:.2f}", difference, verdict)
        Console(width=100, markup=False, emoji=False).print(table)
    return 0 if all(agreed.values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
