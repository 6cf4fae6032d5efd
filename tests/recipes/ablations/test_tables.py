"""What the rows of a table come to in each preset, and what is refused."""

import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.ablations import FOLDER, PHASES
from recipes.ablations.runs import runs_of
from recipes.config import FinetuneConfig, PretrainConfig
from recipes.parsing import ConfigError
from tests.helpers.ablations import read_table

NUMBERS = range(4, 9)
as_shipped = cache(read_table)  # reading one builds all its models


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("preset", ["paper", "small", "digits"])
def test_every_row_can_be_built(number: int, preset: str) -> None:
    """And no two rows of a table are the same run."""
    table = as_shipped(number, preset)
    runs = runs_of(table, [0], Path("runs"))
    assert len(runs) == len({run.folder for run in runs}) >= 3
    assert all([*row.phases] == [phase for phase in PHASES if phase in row.phases] for row in table.rows)
    assert all("finetune" in row.phases for row in table.rows)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_papers_figures_are_the_papers(number: int, repo: Path) -> None:
    files = [*(repo.parent / "shared" / "spec" / "tables").glob(f"table{number}_*.csv")]
    if not files:
        pytest.skip("the paper's tables are not there")
    expected = list(csv.DictReader(files[0].read_text().splitlines()))
    rows = [
        row["reported"]
        for row in yaml.safe_load((FOLDER / f"table{number}.yaml").read_text())["rows"]
        if "reported" in row
    ]
    same = expected[:4] + expected[4:5] + expected[6:] if number == 6 else expected  # 4 x 512 is there twice
    assert sorted(row["top1"] for row in rows) == sorted(float(row["top1"]) for row in same)
    if number == 8:
        assert [row["hours"] for row in rows] == [float(row["training_cost_h_8xA5000"]) for row in expected]


def test_settings_of_the_paper() -> None:
    """Of the preset, the row and the row in the preset; a switch of each table is what its rows differ in."""
    rows = {row.name: row for number in (4, 5, 6, 7) for row in as_shipped(number, "paper").rows}

    def of(name: str, *keys: str) -> Any:
        config: Any = rows[name].configs["pretrain"]
        return tuple(config.model_args.get(key) for key in keys)

    default: Any = rows["row-first, forward"].configs["pretrain"]
    assert isinstance(default, PretrainConfig) and (default.epochs, default.global_batch) == (300, 2048)
    assert of("1/6 (32 px of 192)", "img_size", "patch_size", "cluster_size") == (192, 16, 32)
    assert of("one pixel", "img_size", "patch_size", "cluster_size", "target") == (12, 1, 1, "pixel")
    assert of("column-first, backward", "prediction_order") == ("column_reversed",)
    assert of("depth 8", "decoder_depth") == (8,) and of("width 384", "decoder_dim") == (384,)
    tokens: Any = rows["tokens of a dVAE"].configs["pretrain"]
    assert tokens.dvae == "https://cdn.openai.com/dall-e/encoder.pkl" and "dvae" not in rows["tokens of a dVAE"].phases
    supervised: Any = rows["supervised"].configs["finetune"]
    assert [*rows["supervised"].configs] == ["finetune"] and isinstance(supervised, FinetuneConfig)
    assert (supervised.pretrained, supervised.epochs) == (None, 300)


@pytest.mark.parametrize("number", NUMBERS)
def test_tables_for_one_gpu_keep_their_images_there(number: int) -> None:
    """So that no row needs more than the two processes that draw."""
    configs = [config for row in as_shipped(number, "small").rows for config in row.configs.values()]
    assert {(config.data.cache, config.data.workers) for config in configs} == {("gpu", 2)}


@pytest.mark.parametrize(
    "preset, base, before, after", [("short", "small", 32, 12), ("cifar10-short", "cifar10", 16, 6)]
)
@pytest.mark.parametrize("number", [4, 8])
def test_short_presets_are_the_long_ones_in_fewer_epochs(
    number: int, preset: str, base: str, before: int, after: int
) -> None:
    """Row by row; supervised training alone is again twice as long as finetuning."""
    short, long = as_shipped(number, preset), as_shipped(number, base)
    assert [row.name for row in short.rows] == [row.name for row in long.rows]
    for row, other in zip(short.rows, long.rows, strict=True):
        epochs = {phase: settings["epochs"] for phase, settings in row.phases.items()}
        assert epochs == ({"pretrain": before, "finetune": after} if "pretrain" in epochs else {"finetune": 2 * after})
        assert row.phases == {phase: {**other.phases[phase], "epochs": epochs[phase]} for phase in row.phases}


def test_wrong_rows_and_settings_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no row of table 5 is called 'spiral' in preset small; allowed: 'row-"):
        read_table(5, "small", rows=["spiral"])
    with pytest.raises(ConfigError, match=r"none of these rows of table 5 has the phase dvae; leave out dvae\.KEY"):
        read_table(5, "digits", ["dvae.epochs=3"], ["random"])
    order = "pretrain.model_args.prediction_order=row"  # the table would call by its name what is another row
    with pytest.raises(
        ConfigError, match=rf"row 'random' .* would be the same as row 'row-first, forward' with {order};"
    ):
        read_table(5, "digits", [order], ["random"])
    ratio = "pretrain.model_args.mask_ratio=0.5"  # which only this row takes
    assert [row.name for row in read_table(8, "digits", [ratio], ["Vim, MAE"]).rows] == ["Vim, MAE"]
    with pytest.raises(ConfigError) as refused:
        read_table(6, "small", ["pretrain.epochs=0"])
    [problem] = refused.value.problems.values()  # told once for all six rows
    assert problem.startswith("pretrain of row 'depth 1', 'depth 2', ") and "epochs is 0; allowed:" in problem
    for override in ("seed=9", "pretrain.output_dir=elsewhere", "finetune.pretrained=elsewhere"):
        key = override.partition("=")[0].rpartition(".")[2]
        with pytest.raises(ConfigError, match=f" of row 'random': {key} is set for each run; leave it out"):
            read_table(5, "digits", [override], ["random"])
    monkeypatch.setattr("arm_zoo.pretraining._registry.OBJECTIVES", {"autoregressive": None})
    with pytest.raises(ConfigError, match=r"pretrain of row 'MambaMLP, MAE': .*unknown objective 'mae'"):
        read_table(8, "digits", rows=["MambaMLP, MAE"])
