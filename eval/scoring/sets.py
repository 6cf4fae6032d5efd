"""The record of the evaluation sets, sets.csv, which `hub` reads too. A new set is a row and a list of its classes."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "sets.csv"
REAL = "real"  # the images of in1k by other labels
CUSTOM = "custom"  # images of the user's own


@dataclass(frozen=True)
class ImageSet:
    """A row of sets.csv.

    Its list of classes is what the release calls them. Empty: the 1000 wnids. `numbers`: 0 ... 999. A .txt file in
    classes/ or of timm's: the wnids of these indices, and images are ranked among them only. A .csv file in classes/:
    names of its own, each for one or several of the 1000 classes, which are all right for its images; others' are left
    out. With any of these an image may have several labels: its label is a list then.
    """

    name: str  # in `--sets` and in the rows of results
    title: str  # head of its column on the leaderboard; empty for sets that have none there
    card_name: str  # what our model cards call it
    card_pattern: str  # how other cards call it, in small letters; empty for none
    paper_column: str  # of eval/board/paper/table3_robustness.csv; empty if the paper has no figures
    images: int | None  # None where any number is right, as below
    classes: int | None
    images_of: str  # the set whose images it scores by other labels
    folder: str  # of the release, with the class folders inside
    class_list: str
    border: int  # pixels at each side of an image that are cut off first: of ObjectNet two, as its authors do
    source: str  # where it is got

    @property
    def is_subset(self) -> bool:
        """Whether it has some of the 1000 classes, and images are ranked among these only."""
        return self.class_list.endswith(".txt")

    @property
    def clean(self) -> str:
        """How the columns begin that tell of in1k's images of the set's classes."""
        return f"clean{self.classes}_{self.name}_"

    @property
    def has_own_names(self) -> bool:
        """Whether its release has other classes than ImageNet-1k."""
        return self.class_list.endswith(".csv")


def _record(row: dict[str, Any]) -> ImageSet:
    counts = {name: int(row[name]) if row[name] else None for name in ("images", "classes")}
    return ImageSet(**row | counts | {"border": int(row["border"] or 0)})


with FILE.open(newline="", encoding="utf-8") as _file:
    SETS = {row["name"]: _record(row) for row in csv.DictReader(_file)}
SUBSETS = tuple(name for name, spec in SETS.items() if spec.is_subset)
