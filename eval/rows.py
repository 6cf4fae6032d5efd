"""From a model and the sets to rows of the table: who scores what, and what each row says."""

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from arm_zoo.images.listing import listed
from eval import metrics, models, results, sets
from eval.listing import Listing
from eval.models import Candidate
from eval.results import Row, Unfinished
from eval.scoring import Predictions, Settings, predict, record_type
from eval.sets import CUSTOM, REAL, SETS, LabelledSet

NAMED_IN_ROW = 10  # undecodable pictures; stderr names them all


@dataclass(frozen=True)
class Request:
    """A set to be scored: its pictures, and what besides its own row comes from the same pass."""

    name: str
    listing: Listing
    real: bool

    @property
    def heads(self) -> list[Sequence[int] | None]:
        """Class subsets to rank: those of A and R, too, on the clean pictures of in1k."""
        if self.name == "in1k":
            return [None, *(metrics.subset_indices(subset) for subset in metrics.SUBSETS)]
        subset = SETS[self.name].subset
        return [None if subset is None else metrics.subset_indices(subset)]


def label(request: Request, candidate: Candidate) -> LabelledSet:
    """The set with class indices of the model.

    Raises:
        ValueError: if the model has other classes than the set.
    """
    if request.name != CUSTOM and candidate.num_classes != 1000:
        raise ValueError(
            f"{candidate.name} has {candidate.num_classes} classes, {request.name} is for models of ImageNet's 1000; "
            f"score it on pictures of its own classes: --sets {CUSTOM}=PATH"
        )
    return sets.label(request.name, request.listing, candidate.label_names, candidate.num_classes)


def base_row(candidate: Candidate, labelled: LabelledSet, settings: Settings) -> Row:
    """What is known before scoring."""
    config = candidate.data_config
    limit = settings.limit if settings.limit is not None and settings.limit < len(labelled.listing) else ""
    return {
        "model": candidate.name,
        "set": labelled.name,
        "params_m": f"{sum(parameter.numel() for parameter in candidate.model.parameters()) / 1e6:.1f}",
        "pictures": len(labelled.listing),
        "classes": labelled.classes,
        "limit": limit,
        "img_size": "x".join(map(str, config["input_size"][1:])),
        **{name: config[name] for name in ("crop_pct", "crop_mode", "interpolation")},
        **{name: " ".join(map(str, config[name])) for name in ("mean", "std")},
        "dtype": settings.dtype,
        "weights": candidate.weights,
        "weights_sha256": candidate.weights_sha256,
        "listing_sha256": labelled.fingerprint(),
        "batch_size": settings.batch_size,
        **models.versions(),
    }


def scored(row: Row, score: metrics.Score, marks: Sequence[str]) -> Row:
    low, high = score.interval
    figures = {"top1": score.top1, "top5": score.top5, "top1_low": low, "top1_high": high, "ece": score.ece}
    return {**row, "n": score.n, **{k: f"{v:.4f}" for k, v in figures.items()}, "marks": "; ".join(marks)}


def make_rows(request: Request, labelled: LabelledSet, predictions: Predictions, row: Row) -> list[Row]:
    """The rows of one pass: the set's own, and ReaL's."""
    marks = list(labelled.marks)
    if row["limit"] != "":
        marks.append(f"limited to {row['limit']} of {row['pictures']} pictures")
    if predictions.undecodable:
        names = [labelled.listing.describe(i) for i in predictions.undecodable]
        marks.append(f"{len(names)} undecodable, not in n: {listed(names, NAMED_IN_ROW)}")
    main = predictions.heads[0]
    broken = int((main.classes[:, 0] < 0).sum())
    if broken:
        marks.append(f"{broken} pictures have logits that are not numbers, counted as wrong")
    targets = labelled.targets[predictions.indices]
    row = {
        **row,
        "undecodable": len(predictions.undecodable),
        "seconds": f"{predictions.seconds:.1f}",
        "img_per_s": f"{predictions.computed / predictions.seconds:.1f}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    own = scored(row, metrics.score(metrics.hits(main.classes, targets), main.confidence), marks)
    if request.name == "in1k":
        own |= clean_columns(predictions, targets)
    return [own, *([real_row(labelled, predictions, row, marks)] if request.real else [])]


def clean_columns(predictions: Predictions, targets: np.ndarray) -> Row:
    """Clean validation pictures of the 200 classes of A and of R, ranked among these as A's and R's own are."""
    out: Row = {}
    for subset, ranks in zip(metrics.SUBSETS, predictions.heads[1:], strict=True):
        among = np.isin(targets, metrics.subset_indices(subset))
        right = metrics.hits(ranks.classes[among], targets[among])
        score = metrics.score(right, ranks.confidence[among])
        prefix = f"clean200_{subset}"
        top1, top5 = (f"{score.top1:.4f}", f"{score.top5:.4f}") if score.n else ("", "")
        out |= {f"{prefix}_n": score.n, f"{prefix}_top1": top1, f"{prefix}_top5": top5}
    return out


def real_row(labelled: LabelledSet, predictions: Predictions, row: Row, marks: Sequence[str]) -> Row:
    """ReaL's row: pictures without labels are left out."""
    label_sets = sets.real_label_sets(labelled)
    listed = sum(map(bool, label_sets))
    marks = list(marks)
    if listed != sets.REAL_PICTURES:
        marks.append(f"{listed} pictures with labels instead of {sets.REAL_PICTURES}")
    own = [label_sets[i] for i in predictions.indices]
    kept = np.array([bool(labels) for labels in own], dtype=bool)
    main = predictions.heads[0]
    right = metrics.hits_of_sets(main.classes, own)[kept]
    return scored({**row, "set": REAL}, metrics.score(right, main.confidence[kept]), marks)


class Scorer:
    """Scores candidates on sets with all processes, and keeps the table."""

    def __init__(self, output: Path, settings: Settings, state: PartialState, resume: bool, recompute: bool) -> None:
        self.output, self.settings, self.state = output, settings, state
        self.resume, self.recompute = resume, recompute

    def from_main(self, value: object) -> object:
        """What the main process has, for every process: only it reads and writes the table."""
        return broadcast_object_list([value])[0]

    def rows(self, candidate: Candidate, requests: Sequence[Request]) -> Iterator[tuple[Row, bool]]:
        """The row of each set, and whether it was computed now and not found in the table."""
        for labelled, request in [(label(request, candidate), request) for request in requests]:
            row = base_row(candidate, labelled, self.settings)
            wanted = [row, *([{**row, "set": REAL}] if request.real else [])]
            found: list[Row | None] = self.from_main(self.finished(wanted))  # type: ignore[assignment]
            computed = [] if all(found) else self.score(candidate, request, labelled, row)
            fresh = [new for new, old in zip(computed, found, strict=False) if not old]
            if fresh and self.state.is_main_process:
                fresh = results.append(self.output, fresh)
            new = iter(fresh)
            yield from ((old or next(new), not old) for old in found)

    def finished(self, wanted: Sequence[Row]) -> list[Row | None]:
        """For each of these the newest equal row that the table has, and None where it is to be computed."""
        if self.recompute or not self.state.is_main_process:
            return [None] * len(wanted)
        known = {results.key(row): row for row in results.read(self.output)}
        return [known.get(results.key(row)) for row in wanted]

    def score(self, candidate: Candidate, request: Request, labelled: LabelledSet, row: Row) -> list[Row]:
        """The rows of one pass over the set.

        Raises:
            ValueError: if none of its images can be decoded.
        """
        heads = request.heads
        record = record_type(len(heads))
        row = {**row, "device": device_name(self.state.device), "processes": self.state.num_processes}
        # what the row says of a pass holds for all of it
        said = ("batch_size", "device", *models.versions())
        unfinished = Unfinished(self.output, results.key(row), [str(row[column]) for column in said], record)
        kept = np.zeros(0, record)
        if self.state.is_main_process:
            if unfinished.remove_others() and self.resume:
                print(
                    f"{row['model']}, {row['set']}: starting over; a run that died had another {', '.join(said)}",
                    file=sys.stderr,
                )
            left = unfinished.load()
            if len(left):
                doing = "going on after" if self.resume else "starting over; --resume would have gone on after"
                print(
                    f"{row['model']}, {row['set']}: {doing} {len(left)} pictures of a run that died", file=sys.stderr
                )
            kept = left if self.resume else kept
            unfinished.start(kept)
        kept = self.from_main(kept)  # type: ignore[assignment]
        predictions = predict(candidate, request.listing, heads, self.settings, self.state, unfinished, kept)
        if self.state.is_main_process:
            unfinished.remove()
            for index, reason in predictions.undecodable.items():
                print(f"undecodable: {request.listing.describe(index)}: {reason}", file=sys.stderr)
        if not len(predictions.indices):
            raise ValueError(
                f"{row['model']}, {row['set']}: none of the {len(predictions.undecodable)} images of "
                f"{request.listing.location} that were read could be decoded, so there is nothing to score"
            )
        return make_rows(request, labelled, predictions, row)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
