"""What is known about the weights of each entry beside where they are: source, licence, recipe, figures, state.

`arm_zoo.table` has what loading needs. Figures *reported* are the paper's (tables 2 and 3); those *measured* are read
from the CSV that `python -m eval` writes, by the sha256 of the weights.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from arm_zoo.table import TABLE, training_commands

from .folders import UsageError

RESULTS = Path(__file__).parent.parent / "eval" / "results.csv"

AUTHORS_REPOSITORY = "OliverRen/ARM"  # on the Hub; which files it has is asked at run time
AUTHORS_CODE = "https://github.com/OliverRensu/ARM"
PAPER = "https://arxiv.org/abs/2406.07537"
SETS = {
    "in1k": "ImageNet-1k",
    "v2": "ImageNet-V2",
    "real": "ImageNet-ReaL",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "sketch": "ImageNet-Sketch",
}
State = Literal["hosted", "to convert", "ours"]


@dataclass(frozen=True)
class Entry:
    """Weights of one entry.

    Attributes:
        name: entry with its tag.
        paper_name: what the paper calls it; None if it is not in the paper.
        reported: top-1 in percent by the paper, by set.
        source: repository on the Hub of the authors' file, or None for weights of our own training.
        license: of the weights.
    """

    name: str
    paper_name: str | None
    reported: dict[str, float] = field(default_factory=dict)
    source: str | None = AUTHORS_REPOSITORY
    license: str = "unknown"

    @property
    def recipe(self) -> str:
        """How they are, or would be, trained, from a checkout."""
        return training_commands(self.name)

    @property
    def measured(self) -> dict[str, float]:
        """Top-1 in percent by our own evaluator, by set; empty as long as nobody has measured these weights."""
        weights = TABLE[self.name]
        rows = measured(weights.sha256, RESULTS) if weights.sha256 else {}
        return {name: float(row["top1"]) for name, row in rows.items()}

    @property
    def state(self) -> State:
        """Whether the weights are there, wait for conversion, or come from our own training."""
        if self.name in TABLE and TABLE[self.name].where == "hosted":
            return "hosted"
        return "to convert" if self.source else "ours"


def _robust(*top1: float) -> dict[str, float]:
    return dict(zip(SETS, top1, strict=True))


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("arm_pico_patch2_8.arm_digits_ft_digits", None, source=None, license="apache-2.0"),
        Entry("arm_tiny_patch4_32.arm_cifar10_ft_cifar10", None, source=None, license="apache-2.0"),
        Entry("arm_tiny_patch8_64.arm_tiny_imagenet_ft_tiny_imagenet", None, source=None, license="apache-2.0"),
        Entry("arm_base_patch16_224.arm_in1k_ft_in1k", "ARM-B", _robust(83.2, 72.3, 88.0, 31.9, 48.9, 37.2)),
        Entry("arm_base_patch16_224.arm_in1k", "ARM-B, pretrained"),
        Entry("arm_base_patch16_224.in1k", "MambaMLP-B", {"in1k": 81.2}, source=None),
        Entry("arm_base_patch16_384.arm_in1k_ft_in1k", "ARM-B at 384 pixels", {"in1k": 84.2}),
        Entry(
            "arm_base_patch16_stride8_448.arm_in1k_ft_in1k",
            "ARM-B at 448 pixels, stride 8",
            {"in1k": 84.8},
        ),
        Entry("arm_large_patch16_224.arm_in1k_ft_in1k", "ARM-L", _robust(84.5, 74.0, 88.6, 41.4, 52.1, 39.2)),
        Entry("arm_large_patch16_224.arm_in1k", "ARM-L, pretrained"),
        Entry("arm_large_patch16_224.in1k", "MambaMLP-L", {"in1k": 81.4}, source=None),
        Entry("arm_large_patch16_384.arm_in1k_ft_in1k", "ARM-L at 384 pixels", {"in1k": 85.1}),
        Entry("arm_huge_patch16_224.arm_in1k_ft_in1k", "ARM-H", _robust(85.0, 75.6, 89.2, 42.3, 53.2, 40.5)),
        Entry("arm_huge_patch16_224.arm_in1k", "ARM-H, pretrained"),
        Entry("arm_huge_patch16_384.arm_in1k_ft_in1k", "ARM-H at 384 pixels", {"in1k": 85.5}),
    )
}


def candidates(architecture: str, num_classes: int, standard: bool) -> list[Entry]:
    """Entries that weights of such a shape may be of; shapes do not tell a pretrained model from one from scratch."""
    if not standard or num_classes not in (0, 1000):
        return []
    return [
        entry
        for name, entry in CATALOG.items()
        if entry.paper_name and name.startswith(f"{architecture}.") and bool(entry.reported) == (num_classes == 1000)
    ]


def measured(sha256: str, results: Path) -> dict[str, dict[str, str]]:
    """Rows of eval's CSV for these weights, by set; the last whole row of a set counts, none of a part of it.

    Raises:
        UsageError: if the file is no such CSV.
    """
    if not results.exists():
        return {}
    with results.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"set", "n", "top1", "weights_sha256"} - set(reader.fieldnames or ())
        if missing:
            raise UsageError(f"{results} lacks the columns {', '.join(sorted(missing))} of `python -m eval`")
        return {row["set"]: row for row in reader if row["weights_sha256"] == sha256 and not row.get("limit")}
