"""The evaluation sets, from sets.csv, which `hub` reads too. To add a set, add a row and a list of its classes."""

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

    `class_list` says how the release names its classes. Empty: by the 1000 wnids. `numbers`: by 0 ... 999. A .txt file
    in classes/ or of timm: by the wnids of the indices in it, and images are ranked among these classes only. A .csv
    file in classes/: by names of its own, each for one or several of the 1000 classes, which are all right for its
    images; images of other classes are left out. In all cases, the label of an image may be a list of several labels.
    """

    name: str  # in `--sets` and in the rows of results
    title: str  # of its column on the leaderboard; empty for sets without one
    card_name: str  # its name on our model cards
    card_pattern: str  # a pattern for its name on other cards, in small letters; empty for none
    paper_column: str  # in eval/board/paper/table3_robustness.csv; empty if the paper has no figures
    images: int | None  # their number in the release; None if any number is right
    classes: int | None  # the same of the classes
    images_of: str  # the set whose images it scores by other labels
    folder: str  # the folder of the release that has the class folders
    class_list: str
    border: int  # pixels to cut off at each side of an image: two for ObjectNet, as its authors do
    source: str  # where to get it

    @property
    def is_subset(self) -> bool:
        """Whether it has some of the 1000 classes, and images are ranked among these only."""
        return self.class_list.endswith(".txt")

    @property
    def clean(self) -> str:
        """The beginning of the columns for in1k's images of this set's classes."""
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
