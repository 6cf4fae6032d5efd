"""`--sets custom=...`: images of the user's own, found and decoded as in training, so that top-1 is the same."""

import os
from collections.abc import Sequence
from dataclasses import replace

from arm_zoo.images.columns import Choices
from arm_zoo.images.errors import SourceError
from arm_zoo.images.locate import SCORED, Located, locate
from arm_zoo.images.tables import open_split
from arm_zoo.messages import printable
from eval.scoring.listing import Listing, listing_of
from eval.scoring.sources import ONE_KIND, open_hub

AS_USUAL = Choices(in_training=False)


def open_own(locations: Sequence[str], choices: Choices = AS_USUAL) -> Listing:
    """The labelled images at one location, or in several tars or parquet files; `SourceError` if that is unclear."""
    reading = f"read as in training, up to {choices.max_pixels} pixels"
    if listing := open_hub(locations, choices, reading):
        return listing
    parts = [_to_score(location) for location in locations]
    kinds = {located.kind for located, _, _ in parts}
    name = printable(" ".join(locations))
    if len(kinds) > 1 or (len(parts) > 1 and "images" in kinds):
        raise SourceError(ONE_KIND.format(name))
    if "images" in kinds and (choices.image_column or choices.label_column):
        raise SourceError(
            f"--image-column and --label-column are for parquet files, tars and Hub data sets; not {name}"
        )
    located = replace(parts[0][0], name=name, splits={"": [file for _, files, _ in parts for file in files]})
    split = open_split(located, "", choices, one_class=True)
    return listing_of(split, reading, [note for _, _, note in parts if note])


def _to_score(location: str) -> tuple[Located, list[str], str]:
    """What a location is, its files to score, and a note if other splits of it are left out."""
    located = locate(location, one_split=True)
    if located.kind == "hub":
        raise SourceError(
            f"{location}: a data set of the Hub is scored alone; name it without other files or data sets"
        )
    chosen, *others = [split for split in SCORED if split in located.splits]
    note = ""
    if others:
        note = f"only the split {chosen} is scored, {' and '.join(others)} left out"
    elif chosen == "train" and not located.whole and not os.path.isfile(os.path.expanduser(location)):
        note = "the split train is scored, as there is no other"
    return located, located.splits[chosen], note
