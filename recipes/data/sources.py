"""Training and validation images: one syntax for folders, parquet files, WebDataset tars, the Hub and built-in sets.

`data.source` and `data.validation` (which may also be a fraction of the training images) are one of

- `FOLDER` of images: one subfolder for each class, perhaps below `train/` and `val/` (ImageNet's layout); with
  `data.validation` the folder is one split, so that classes may be called like splits,
- `FOLDER`, file or glob of parquet files (`train*.parquet`, `val*.parquet` or `test*.parquet`),
- `FOLDER`, file, glob or brace list (`shard-{000..146}.tar`) of WebDataset tars, or of tars with class folders,
- `hf://owner/name`, or `owner/name` where no such path exists: a data set on the Hub,
- `digits` or `pieces`: images that come with packages (`recipes.data.built_in`).

A stream (`data.streaming=true`) reads in sequence (`recipes.data.streams`), all else is read at random
(`arm_zoo.images.tables`).
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from arm_zoo.images.columns import Choices
from arm_zoo.images.decode import MAX_PIXELS
from arm_zoo.images.errors import SourceError
from arm_zoo.images.hub import load_from_hub
from arm_zoo.images.locate import SCORED, Located, locate
from arm_zoo.images.tables import ImageTable, OpenedSplit, open_split
from arm_zoo.messages import listed
from recipes.data.built_in import OPENERS
from recipes.data.config import DataConfig
from recipes.data.labels import drawn, match_labels
from recipes.data.source import Source, Split
from recipes.data.splits import classes_without_images, none_to_hold_out, split_rows, validation_fraction
from recipes.data.streams import DatasetStream, ImageStream, TarStream

log = logging.getLogger(__name__)


def tell(text: str) -> None:
    """Log a note about the images or the machine; of several processes, only the first one does."""
    if text and os.environ.get("RANK", "0") == "0":
        log.warning(text)


def open_source(config: DataConfig, labels_needed: bool = True, seed: int = 0) -> Source:
    """Open what `data.source` and `data.validation` name; if no labels are needed, every class index is -1.

    With `data.labels_per_class`, the seed decides which images are trained on.
    """
    source = _open_source(config, labels_needed)
    if not labels_needed or config.labels_per_class is None:
        return source
    if isinstance(source.train, ImageStream):
        problem = "of a stream no images of each class can be drawn"
        raise SourceError(f"{problem}; leave out data.streaming, or data.labels_per_class")
    return replace(source, train=_labelled(source.train, config.labels_per_class, seed))


def _labelled(images: ImageTable, labels: int, seed: int) -> ImageTable:
    """Keep `labels` images of each class, in stored order."""
    classes, _ = images.classes_and_names()
    numbers = {value: number for number, value in enumerate(dict.fromkeys(classes))}
    places = drawn(torch.tensor([numbers[value] for value in classes]), labels, seed)
    return images.select(sorted(places.tolist()))


def _open_source(config: DataConfig, labels_needed: bool) -> Source:
    if (opener := OPENERS.get(config.source)) is not None:
        if config.validation is not None or config.streaming:
            own = f"the {config.source} are few and have their own validation images"
            raise SourceError(f"{own}; leave out data.validation and data.streaming")
        asked = config.num_classes
        if asked is not None and asked != (known := len(opener(True).class_names)):
            raise SourceError(f"the {config.source} have {known} classes, but data.num_classes is {asked}")
        return opener(labels_needed)
    train, test = _open_splits(config, labels_needed)
    names: tuple[str, ...] = ()
    classes = test_classes = None
    if labels_needed:
        labels = train.labels()
        if empty := labels.without_images(labels.names):
            if train.located.kind == "images":
                raise classes_without_images(train.name, empty)
            tell(f"{train.name} has no images for {len(empty)} of its {len(labels.names)} classes: {listed(empty)}")
        if test is not None:
            labels, test_labels = match_labels(labels, test.labels(), test.name)
            test_classes = test_labels.indices(labels.names)
            if missing := test_labels.without_images(labels.names):
                number = f"{len(missing)} of the {len(labels.names)} classes"
                tell(f"{test.name} has no images for {number}, which are not scored: {listed(missing)}")
        names, classes = labels.names, labels.indices(labels.names)
    images = _read(train, classes, config.train_size)
    fraction = validation_fraction(config.validation, test is not None, labels_needed)
    if fraction is not None:
        if isinstance(images, ImageStream):
            problem = f"{train.name} has no validation images beside it, and of a stream none can be held out"
            raise SourceError(f"{problem}; name some with data.validation=SOURCE, or leave out data.streaming")
        kept, held_out = split_rows(*images.classes_and_names(), fraction)
        if not held_out:
            raise none_to_hold_out(train.name)
        return Source(images.select(kept), images.select(held_out), names, held_out=fraction)
    if test is None:
        return Source(images, None, names)
    scored = _read(test, test_classes)
    if labels_needed and isinstance(scored, ImageStream) and test.values is None:
        next(scored.encoded(), None)  # fails now, not after the first epoch, if the labels are hidden
    return Source(images, scored, names)


def _read(split: OpenedSplit, classes: Mapping[Any, int] | None, train_size: int | None = None) -> Split:
    """The images of a split, each with the class index of its label."""
    if not split.in_sequence:
        images: Split = ImageTable(split.data, split.reading(classes))
    else:
        images = (TarStream if split.located.kind == "tars" else DatasetStream)(split, classes)
    size = images.size
    if size == 0:
        raise SourceError(f"{split.name} holds no images")
    if None not in (train_size, size) and train_size != size:
        raise SourceError(f"{split.name} has {size} images, but data.train_size is {train_size}; leave it out")
    images.size = train_size if size is None else size
    return images


def _open_splits(config: DataConfig, labels_needed: bool) -> tuple[OpenedSplit, OpenedSplit | None]:
    choices = Choices(config.image_column, config.label_column, config.num_classes, config.max_pixels or MAX_PIXELS)

    def opened(source: Located, splits: Mapping[str, Any], name: str) -> OpenedSplit:
        in_sequence = config.streaming and source.kind != "images"  # which can be read at random
        hub = splits[name] if source.kind == "hub" else None
        split = open_split(source, name, choices, labels_needed, in_sequence, hub)
        tell(split.note and f"{split.name}: {split.note}")
        return split

    def splits_of(source: Located) -> Mapping[str, Any]:
        return load_from_hub(source.name, config.streaming) if source.kind == "hub" else source.splits

    source = locate(config.source, one_split=config.validation is not None)
    if source.kind == "images" and config.streaming:
        raise SourceError(f"{source.name!r} is a folder of images, which needs no data.streaming; leave it out")
    if source.kind == "images" and not isinstance(config.validation, str):  # else they may be those of its columns
        for key, column in (("image_column", config.image_column), ("label_column", config.label_column)):
            if column is not None:
                raise SourceError(f"{source.name!r} is a folder of images, which has no columns; leave out data.{key}")
    splits = splits_of(source)
    chosen = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
    if chosen not in splits:
        note = f" ({source.note})" if source.note else ""
        raise SourceError(f"{config.source!r} has the splits {', '.join(splits)}, but no training split{note}")
    train = opened(source, splits, chosen)
    tell(source.note)
    scored = [name for name in SCORED if name in splits and name not in (chosen, "train")]
    if isinstance(config.validation, str):
        source = locate(config.validation, one_split=True)
        tell(source.note)
        splits = splits_of(source)
        scored = [name for name in SCORED if name in splits]
    if not scored or isinstance(config.validation, float):
        return train, None
    test = opened(source, splits, scored[0])
    if shared := _places(train) & _places(test):
        said = f"{test.name} is scored on images that are trained on: {listed(sorted(shared), 3)}"
        tell(f"{said}. Such scores say nothing of other images; data.validation=0.2 holds a fifth of the images out")
    return train, test


def _places(split: OpenedSplit) -> set[str]:
    """Where the images of a split are: files, a folder, or a split of the Hub's."""
    return {os.path.realpath(file) for file in split.files} or {split.name}
