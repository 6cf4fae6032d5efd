"""Matching the classes of training and validation images, and drawing a few labelled images of each class."""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from arm_zoo.images.errors import SourceError
from arm_zoo.images.labels import Labels
from arm_zoo.messages import listed, plural


def match_labels(train: Labels, test: Labels, where: str) -> tuple[Labels, Labels]:
    """The classes of the training split and of a validation split, which messages call `where`, under the same names.

    If one split has numbers and the other names, the numbers count the names in their order, unless all names are
    numbers themselves. The validation split may lack classes; if it has others, `SourceError` is raised.
    """
    counts = f"{where} has {len(test.names)} classes, the training images have {len(train.names)}"
    if train.numbered and not (test.numbered or _all_numbers(test.names)):
        if len(test.names) != len(train.names):
            allowed = "as many, since names are given to numbers in their order"
            raise SourceError(f"{counts} without names; allowed: {allowed}")
        train = train.renamed(test.names)
    elif test.numbered and not (train.numbered or _all_numbers(train.names)):
        test = test.renamed(train.names)
    known = set(train.names)
    unknown = [name for name in (test.names if test.rows is None else test.rows) if name not in known]
    if unknown:
        images = "" if test.rows is None else f", in {plural(sum(test.rows[name] for name in unknown), 'row')}"
        only = f"only there: {listed(unknown)}{images}"
        raise SourceError(f"{counts} ({only}); allowed: classes of the training images")
    return train, test


def _all_numbers(names: Iterable[str]) -> bool:
    return all(re.fullmatch("0|[1-9][0-9]*", name) for name in names)


def check_several(names: Sequence[str], where: str) -> None:
    """Refuse images, those of `where`, that a classifier always gets right: SourceError."""
    if len(names) < 2:
        raise SourceError(f"{where} has no class but {listed(names)}; allowed: two classes or more")


def drawn(classes: Tensor, labels: int, seed: int) -> Tensor:
    """The places of `labels` random images of each class in `classes` (N,); a class with fewer gives them all."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).to(classes.device)
    shuffled, by_class = classes[order].sort(stable=True)
    starts = torch.searchsorted(shuffled, shuffled)  # where each image's class begins
    return order[by_class[torch.arange(len(classes), device=classes.device) - starts < labels]]
