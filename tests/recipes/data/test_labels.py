"""Few labels of each class."""

from pathlib import Path

import pytest
import torch

from arm_zoo.images.errors import SourceError
from recipes.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from recipes.data.built_in import open_digits
from recipes.data.config import DataConfig
from recipes.data.labels import drawn
from recipes.data.sources import open_source
from recipes.finetune import CLASSIFICATION
from recipes.first_run import survey
from tests.helpers.images import write_folder, write_parquet


def test_draws_have_so_many_of_each_class() -> None:
    classes = torch.tensor([2, 0, 0, 2, 0, 5, 2, 2])
    places = drawn(classes, 2, seed=0)
    assert sorted(classes[places].tolist()) == [0, 0, 2, 2, 5] and len(set(places.tolist())) == 5  # 5 has one image
    draws = {tuple(sorted(drawn(classes, 2, seed).tolist())) for seed in range(100)}
    assert len(draws) == 3 * 6  # all pairs of three, and of four


def test_a_run_trains_on_the_labels_that_its_seed_draws() -> None:
    """The same images as the few-shot probe; all are scored on."""
    settings = ["model=arm_pico_patch2_8", "data.source=digits", "data.labels_per_class=5"]
    opened = [
        CLASSIFICATION.open(load_config(FinetuneConfig, None, [*settings, f"seed={seed}"], to_run=False))
        for seed in (0, 0, 1)
    ]
    classes, names = zip(*(source.train.classes_and_names() for source in opened), strict=True)
    assert [classes[0].count(digit) for digit in range(10)] == [5] * 10 and names[0] == names[1] != names[2]
    everything, rows = open_digits(True).train.classes_and_names()  # type: ignore[union-attr]
    places = drawn(torch.tensor(everything), 5, seed=1)
    assert sorted(names[2]) == sorted(rows[place] for place in places)
    assert [opened[0].test, opened[0].mean] == [open_digits(True).test, open_digits(True).mean]


def test_few_labels_of_a_folder_are_of_what_is_not_held_out(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "pets", {"cat": 6, "dog": 3}))
    few = DataConfig(folder, validation=0.5, labels_per_class=2)
    source, whole = open_source(few), open_source(DataConfig(folder, validation=0.5))
    taken, all_of_them = ([table.classes_and_names() for table in (s.train, s.test)] for s in (source, whole))
    assert taken[0][0] == [0, 0, 1] and set(taken[0][1]) < set(all_of_them[0][1])  # of three dogs two are held out
    assert taken[1] == all_of_them[1]
    assert survey(FinetuneConfig(data=few)).train == 3


def test_few_labels_have_a_use_only_where_labels_and_places_are_known(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [0, 1, 0, 1])
    streamed = DataConfig(str(file), streaming=True, num_classes=2, validation=str(file), labels_per_class=1)
    with pytest.raises(SourceError, match="of a stream no images of each class can be drawn"):
        open_source(streamed)
    settings = ["model=arm_pico", "data.source=digits", "data.labels_per_class=5", "output_dir=out"]
    with pytest.raises(ConfigError, match=r"data\.labels_per_class is 5, but nothing here learns from labels"):
        load_config(PretrainConfig, None, settings)
