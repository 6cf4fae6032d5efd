"""The catalogue of the entries: their names in the paper, and their figures.

`arm_zoo.weights.hosted` has what loading needs. *Reported* figures are the paper's, *measured* figures are ours; both
are read from the tables in eval/, where the evaluator and the leaderboard keep them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from arm_zoo.tables import FIGURE, has_images, read
from arm_zoo.weights.hosted import TABLE
from hub.folders import UsageError

EVALUATION = Path(__file__).parent.parent / "eval"
SETS = EVALUATION / "scoring" / "sets.csv"
RESULTS = EVALUATION / "results.csv"
FROZEN = EVALUATION / "frozen.csv"


# Entry -> the paper's name for the model, for the paper's own models.
PAPER_NAMES: dict[str, str] = {
    "arm_base_patch16_224.arm_in1k_ft_in1k": "ARM-B",
    "arm_base_patch16_224.arm_in1k": "ARM-B, pretrained",
    "arm_base_patch16_224.in1k": "MambaMLP-B",
    "arm_base_patch16_384.arm_in1k_ft_in1k": "ARM-B at 384 pixels",
    "arm_base_patch16_stride8_448.arm_in1k_ft_in1k": "ARM-B at 448 pixels, stride 8",
    "arm_large_patch16_224.arm_in1k_ft_in1k": "ARM-L",
    "arm_large_patch16_224.arm_in1k": "ARM-L, pretrained",
    "arm_large_patch16_224.in1k": "MambaMLP-L",
    "arm_large_patch16_384.arm_in1k_ft_in1k": "ARM-L at 384 pixels",
    "arm_huge_patch16_224.arm_in1k_ft_in1k": "ARM-H",
    "arm_huge_patch16_224.arm_in1k": "ARM-H, pretrained",
    "arm_huge_patch16_384.arm_in1k_ft_in1k": "ARM-H at 384 pixels",
}


def state(name: str) -> Literal["hosted", "upstream", "ours"]:
    """Whether an entry's weights are hosted by us, are at their authors', or come from our own training."""
    where = TABLE[name].where
    return where if where in ("hosted", "upstream") else "ours"


def candidates(architecture: str, num_classes: int, standard: bool) -> list[str]:
    """Entries whose weights have this shape; a shape does not tell pretraining from training from scratch."""
    if not standard or num_classes not in (0, 1000):
        return []
    return [
        name
        for name in PAPER_NAMES
        if name.startswith(f"{architecture}.") and bool(reported(name)) == (num_classes == 1000)
    ]


def set_names() -> dict[str, str]:
    """The names of the evaluation sets on cards."""
    return {row["name"]: row["card_name"] or row["name"] for row in read(SETS)}


def reported(name: str) -> dict[str, float]:
    """Top-1 in percent that the paper (tables 2 and 3) reports for an entry, by set."""
    sets = {row["paper_column"]: row["name"] for row in read(SETS) if row["paper_column"]}
    for row in read(EVALUATION / "board" / "paper" / "table3_robustness.csv"):
        if row["model"] == PAPER_NAMES.get(name):
            return {sets[column]: float(value) for column, value in row.items() if column in sets and value}
    for row in read(EVALUATION / "board" / "paper" / "table2_imagenet.csv"):
        if row["entry"] == name and row["top1"]:  # empty where training collapsed
            return {"in1k": float(row["top1"])}
    return {}


def measured(sha256: str | None, results: Path) -> dict[str, dict[str, str]]:
    """Rows of eval's CSV file for these weights, by set; the last row counts, without those of a part of a set."""
    rows = _of_weights(sha256, results, ("set", "n"), ("top1",), "python -m eval")
    return {row["set"]: row for row in rows if not row.get("limit")}


def measured_frozen(sha256: str, frozen: Path) -> list[dict[str, str]]:
    """Rows of the probe's CSV file for these weights; the last row of each protocol, set and setting counts."""
    what = ("data_set", "images_train", "images_test", "protocol", "features", "settings")
    rows = _of_weights(sha256, frozen, what, ("top1", "low", "high"), "python -m recipes.probe")
    return list({tuple(row[name] for name in what): row for row in rows}.values())


def _of_weights(
    sha256: str | None, table: Path, columns: Sequence[str], figures: Sequence[str], program: str
) -> list[dict[str, str]]:
    """The rows with images for these weights in a table that a program has written; none if there is no table."""
    if not sha256 or not table.exists():
        return []
    try:
        rows = read(table, (*columns, *figures, "weights_sha256"), dict.fromkeys(figures, FIGURE))
    except ValueError as error:
        raise UsageError(f"{error}; `{program}` writes such tables") from error
    return [row for row in rows if row["weights_sha256"] == sha256 and has_images(row)]
