"""Score a model and compare top-1 with the figures on its card; exit with 1 if they differ.

Run from the repository root, for example
`python -m eval.verify arm_base_patch16_224 --weights FOLDER --sets in1k=imagenet`.
The card is README.md in the folder or Hub repository of the weights, or --card FILE. Its figures are the accuracies
under model-index, as in all cards of Hugging Face.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm
from huggingface_hub import EvalResult, ModelCard

from arm_zoo.loading import entries, entry_of
from arm_zoo.weights.find import hub_repository
from eval.command_line import guarded
from eval.scoring import models
from eval.scoring.options import open_requests, parse_sets, scoring_parser, settings_of, start_processes
from eval.scoring.rows import Scorer
from eval.scoring.sets import SETS
from eval.tables import show_table, text_table

TRAINERS_TAG = "generated_from_trainer"  # cards of transformers' Trainer have fractions, all others percent
TOP1 = {"accuracy", "acc", "top1", "top1accuracy", "acctop1", "accuracytop1", "acc1"}


def set_of(result: EvalResult) -> str | None:
    """Which of our sets a result is on, by the name of its data set or else its Hub id; None for other sets."""
    for text in (result.dataset_name, result.dataset_type):
        if text in SETS:
            return text
        for name, spec in reversed(SETS.items()):  # in1k is first, and its pattern fits the names of some other sets
            if spec.card_pattern and re.search(spec.card_pattern, (text or "").lower()):
                return name
    return None


def read_card(model: str, weights: str | None, card: Path | None) -> tuple[str, dict[str, float]]:
    """Where the card is, and its top-1 in percent for each of our sets; ValueError if it has none."""
    source = str(card) if card else _card_beside(model, weights)
    if card is not None and not card.is_file():
        raise ValueError(f"there is no card {card}; name a README.md with --card FILE")
    figures: dict[str, float] = {}
    try:
        data = ModelCard.load(source, ignore_metadata_errors=True).data
        # the figures alone do not say whether they are fractions: 0.83 may be either
        scale = 100 if TRAINERS_TAG in (data.get("tags") or ()) else 1
        for result in data.eval_results or []:
            texts = (result.metric_type, result.metric_name)
            metric, title = (re.sub(r"[^a-z0-9]", "", (text or "").lower()) for text in texts)
            name = set_of(result)
            if name is not None and metric in TOP1 and "5" not in title:
                figures.setdefault(name, float(result.metric_value) * scale)
    except Exception as error:  # the errors of the Hub and of YAML have no common class
        raise ValueError(f"cannot read the card {source}: {' '.join(str(error).split())}") from error
    if not figures:
        raise ValueError(f"the card {source} has no accuracy under model-index on a set known here; see --card")
    return source, figures


def _card_beside(model: str, weights: str | None) -> str:
    """README.md in the folder of the weights, or the id of their Hub repository."""
    place = weights or model
    if on_hub := re.match(r"(?:hf-hub:|hf_hub:|hf://)([\w.-]+/[\w.-]+)", place):
        return on_hub[1]
    kind, _, rest = place.partition(":")
    if weights is None and kind != "local-dir" and not Path(place).is_dir():
        cfg = timm.models.get_pretrained_cfg(model)
        repository = hub_repository(entry_of(model)) if model in entries() else cfg and cfg.hf_hub_id
        if not repository:
            raise ValueError(f"{model} has no card on the Hub; name one with --card FILE")
        return str(repository).partition("@")[0]
    path = Path(rest if kind == "local-dir" else place).expanduser()  # as loading does
    readme = (path if path.is_dir() else path.parent) / "README.md"
    if not readme.is_file():
        raise ValueError(f"no card at {readme}; name one with --card FILE")
    return str(readme)


def make_parser() -> argparse.ArgumentParser:
    parser = scoring_parser("python -m eval.verify", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="timm's name, ours or another; a model folder; or hf-hub:, hf://, local-dir:")
    add("--weights", metavar="FILE", help="file, folder, hf-hub:ORG/NAME or hf://ORG/NAME/FILE; default: the entry's")
    add("--card", type=Path, metavar="FILE", help="the card, if it is not beside the weights")
    add("--tolerance", type=float, default=0.1, help="points by which top-1 may differ (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.tolerance <= 100:
        raise ValueError(f"--tolerance must be between 0 and 100 points, got {args.tolerance}")
    models.check([args.model], {args.model: args.weights} if args.weights else {})
    asked = parse_sets(args.sets)
    source, figures = read_card(args.model, args.weights, args.card)
    if missing := [name for name in asked if name not in figures]:
        there = f"only for {', '.join(figures)}"
        raise ValueError(f"the card {source} has no top-1 for {', '.join(missing)}, {there}; leave them out")
    requests, state = open_requests(args), start_processes(args.device)
    candidate = models.load(args.model, args.weights, args.train_size)
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer(Path(folder, "results.csv"), settings_of(args), state, resume=False, recompute=True)
        rows = list(scorer.rows(candidate, requests))
    differences = [float(row["top1"]) - figures[row["set"]] for row in rows]
    # one part in a million more, because 83.2 - 83.1 is above 0.1 in binary fractions
    agreed = [abs(difference) <= args.tolerance * (1 + 1e-6) for difference in differences]
    if state.is_main_process:
        lines = []
        for row, difference, ok in zip(rows, differences, agreed, strict=True):
            numbers = (f"{figures[row['set']]:.2f}", f"{float(row['top1']):.2f}", f"{difference:+.3f}")
            lines.append([row["set"], *numbers, "agrees" if ok else "DIFFERS"])
        title = f"{args.model} and {source}, tolerance {args.tolerance}"
        shown = text_table(title, ["set"], ["on the card", "scored", "difference", ""], lines)
        show_table(shown, width=100)
    return 0 if all(agreed) else 1


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
