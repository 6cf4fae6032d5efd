"""From a model and the sets to rows of the table."""

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from arm_zoo.files import HELD_OUT
from arm_zoo.heads.models import Segmenter
from arm_zoo.messages import listed
from eval import tables
from eval.scoring import labels, models
from eval.scoring.labels import LabelledSet
from eval.scoring.listing import Listing
from eval.scoring.metrics import NO_CLASS, score
from eval.scoring.models import Candidate
from eval.scoring.predict import Settings, predict, record_type
from eval.scoring.sets import CUSTOM, REAL, SETS, SUBSETS
from eval.scoring.unfinished import Unfinished
from eval.tables import Row

NAMED_IN_ROW = 10  # undecodable images; stderr names them all


@dataclass(frozen=True)
class Request:
    """A set to be scored: its images, and whether they are also scored by ReaL's labels."""

    name: str
    listing: Listing
    real: bool


def label(request: Request, candidate: Candidate) -> LabelledSet:
    """The set with class indices of the model; ValueError if the model has other classes, or classes of pixels."""
    if isinstance(candidate.model, Segmenter):
        raise ValueError(f"{candidate.name} classifies pixels, not images; `python -m eval.segmentation` scores it")
    if request.name != CUSTOM and candidate.num_classes != 1000:
        own = f"{candidate.name} has {candidate.num_classes} classes"
        wrong = f"{own}, {request.name} is for models of ImageNet's 1000"
        raise ValueError(f"{wrong}; score it on images of its own classes: --sets {CUSTOM}=PATH")
    labelled = labels.label(request.name, request.listing, candidate.label_names, candidate.num_classes)
    held_out, count = _held_out(candidate, request.listing), len(request.listing)
    if not 0 < held_out < count:
        return labelled
    warning = f"the model's run held out {held_out} of these {count} images ({HELD_OUT}): the others trained it"
    return replace(labelled, warnings=(*labelled.warnings, warning))


def _held_out(candidate: Candidate, listing: Listing) -> int:
    """How many of the images the run of a model held out, by the paths below the folder, wherever that lies."""
    files, names = set(listing.files), (name.split("/") for name in candidate.held_out)
    return sum(any("/".join(parts[start:]) in files for start in range(len(parts))) for parts in names)


def base_row(candidate: Candidate, labelled: LabelledSet, settings: Settings) -> Row:
    """The columns that are known before scoring."""
    config, images = candidate.data_config, len(labelled.listing)
    weights = {"weights": candidate.weights, "weights_sha256": candidate.weights_sha256}
    counts = {"images": images, "classes": len(labelled.classes), "batch_size": settings.batch_size}
    return {
        **{"model": candidate.name, "set": labelled.name, "dtype": settings.dtype, **weights, **counts},
        "params_m": f"{sum(parameter.numel() for parameter in candidate.model.parameters()) / 1e6:.1f}",
        "limit": settings.limit if settings.limit is not None and settings.limit < images else "",
        "img_size": "x".join(map(str, config["input_size"][1:])),
        **{name: config[name] for name in ("crop_pct", "crop_mode", "interpolation")},
        **{name: " ".join(map(str, config[name])) for name in ("mean", "std")},
        "listing_sha256": labelled.fingerprint(),
        **models.versions(),
    }


def make_rows(
    labelled: LabelledSet, real: bool, records: np.ndarray, undecodable: Sequence[int], row: Row
) -> list[Row]:
    """The rows of one pass: the set's own, and ReaL's if asked."""
    warnings = list(labelled.warnings)
    if row["limit"] != "":
        warnings.append(f"limited to {row['limit']} of {row['images']} images")
    if undecodable:
        names = listed([labelled.listing.describe(i) for i in undecodable], NAMED_IN_ROW)
        warnings.append(f"{len(undecodable)} undecodable, not in n: {names}")
    records = records[records["undecodable"] == 0]
    if broken := int((records["classes"][:, 0, 0] < 0).sum()):
        warnings.append(f"{broken} images have logits that are not finite numbers, counted as wrong")
    rows = []
    for name, answers in labelled.answers(real).items():
        own = figures(records, 0, answers)
        count = int((answers[:, 0] != NO_CLASS).sum())
        lacking = [f"{count} images with labels instead of {SETS[REAL].images}"]
        said = [*warnings, *(lacking if name == REAL and count != SETS[REAL].images else [])]
        rows.append({**row, "set": name, **own, "warnings": "; ".join(said)})
    for head, subset in enumerate(SUBSETS[: records["classes"].shape[1] - 1], 1):  # other sets than in1k have one head
        among = np.isin(labelled.targets, labels.candidates(subset) or ())
        clean = figures(records, head, np.where(among, labelled.targets, NO_CLASS)[:, None])
        known = clean if clean["n"] else {"n": 0, "top1": "", "top5": ""}
        rows[0] |= {SETS[subset].clean + name: known[name] for name in ("n", "top1", "top5")}
    return rows


def figures(records: np.ndarray, head: int, answers: np.ndarray) -> Row:
    """The columns of a head's score over all images with a right class; `answers` (N, K) are by index of the image."""
    right = answers[records["index"]]
    chosen = right[:, 0] != NO_CLASS
    result = score(records["classes"][chosen, head], records["confidence"][chosen, head], right[chosen])
    return {name: value if name == "n" else f"{value:.4f}" for name, value in result.items()}


class Scorer:
    """Scores models on sets with all processes, and writes the table."""

    def __init__(self, output: Path, settings: Settings, state: PartialState, resume: bool, recompute: bool) -> None:
        self.output, self.settings, self.state = output, settings, state
        self.resume, self.recompute = resume, recompute

    def say(self, row: Row, text: str, kind: str = "") -> None:
        if self.state.is_main_process:
            print(f"{kind}{row['model']}, {row['set']}: {text}", file=sys.stderr)

    def rows(self, candidate: Candidate, requests: Sequence[Request]) -> Iterator[Row]:
        """The row of each set, computed now or found in the table; messages on stderr say which, and its warnings."""
        known = {}
        if self.state.is_main_process and not self.recompute:
            known = {tables.key(row): row for row in tables.read(self.output)}
        for request, labelled in [(request, label(request, candidate)) for request in requests]:
            row = base_row(candidate, labelled, self.settings)
            wanted = [{**row, "set": name} for name in (request.name, *([REAL] if request.real else ()))]
            # only the main process reads and writes the table
            found: list[Row | None] = broadcast_object_list([known.get(tables.key(row)) for row in wanted])
            computed = [] if all(found) else self.score(candidate, request, labelled, row)
            fresh = [new for new, old in zip(computed, found, strict=False) if not old]
            if fresh and self.state.is_main_process:
                fresh = tables.append(self.output, fresh)
            for old in found:
                row = old or fresh.pop(0)
                if old:
                    self.say(row, "finished before; --recompute scores it again")
                if row["warnings"]:
                    self.say(row, row["warnings"], "warning: ")
                yield row

    def score(self, candidate: Candidate, request: Request, labelled: LabelledSet, row: Row) -> list[Row]:
        """The rows of one pass over the set; raises ValueError if none of its images can be decoded."""
        # in1k's images are ranked among the subsets' classes, too
        heads = [labels.candidates(name) for name in (request.name, *(SUBSETS if request.name == "in1k" else ()))]
        device = self.state.device
        cpu = f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        row = {**row, "device": name, "processes": self.state.num_processes}
        # an earlier run's predictions count only if these columns are the same
        way = [str(row[column]) for column in ("batch_size", "device", *models.versions())]
        unfinished = Unfinished(self.output, tables.key(row), way, record_type(heads))
        kept, said = unfinished.begin(self.resume) if self.state.is_main_process else (None, "")
        if said:
            self.say(row, said)
        [kept] = broadcast_object_list([kept])
        found = predict(candidate, request.listing, heads, self.settings, self.state, unfinished, kept)
        records, undecodable, computed, seconds = found
        if self.state.is_main_process:
            unfinished.end()
            for index, reason in undecodable.items():
                print(f"undecodable: {request.listing.describe(index)}: {reason}", file=sys.stderr)
        if len(undecodable) == len(records):
            images = f"none of the {len(records)} images of {request.listing.location} that were read"
            raise ValueError(f"{row['model']}, {row['set']}: {images} could be decoded, so there is nothing to score")
        row |= {"undecodable": len(undecodable), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        row |= {"seconds": f"{seconds:.1f}", "img_per_s": f"{computed / seconds:.1f}"}
        return make_rows(labelled, request.real, records, list(undecodable), row)
