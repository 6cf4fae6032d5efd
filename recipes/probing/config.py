"""The settings that `python -m recipes.probe` takes as `key=value`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recipes.config import NO_SETTING, NOT_TAKEN, SET_BY_ALL, Config, refused_keywords, why_not_writable
from recipes.data.config import DataConfig
from recipes.parsing import ABOVE_ZERO, ONE_OR_MORE, SEED, Limit, limited

USED = {  # keys of `data`
    *("source", "validation", "streaming", "train_size", "num_classes", "labels_per_class", "image_column"),
    *("label_column", "workers", "decode", "max_undecodable", "max_pixels"),
}
SET_BY_RECIPE = {  # as in `recipes.config`
    **SET_BY_ALL,
    **NOT_TAKEN,
    "dtype": NO_SETTING,
    **dict.fromkeys(("pretrained", "checkpoint_path"), "--weights names the weights; untrained=true draws them"),
    "num_classes": "features need no classifier; leave it out",
}

TABLE: Limit = ("a file that ends in .json or .csv, as in output=probe.json", lambda x: x.endswith((".json", ".csv")))


@dataclass(frozen=True)
class ProbeConfig(Config):
    """Where images come from, how features are scored, and where features and scores are written."""

    data: DataConfig = field(default_factory=DataConfig)
    # A timm entry, needed with a bare file of its weights; folders and entries tell theirs, which must be the same.
    model: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)  # keywords of the model, as model_args.NAME
    untrained: bool = False  # weights drawn at random from the seed, in place of an entry's own
    output: str = limited("probe.json", TABLE)
    cache: str = limited("runs/features", ("a folder to keep features in, as in cache=runs/features", bool))
    seed: int = limited(0, SEED)
    device: Literal["auto", "cpu"] = "auto"
    batch: int = limited(256, ONE_OR_MORE)  # images per forward pass
    protocols: str = limited("knn,linear", ("names joined by commas, as in protocols=knn,linear, or all", bool))
    # The features for the protocols that do not choose theirs: those that the model itself pools, the class token, or
    # the average of all patches, of the last block or of the last four side by side.
    features: Literal["pooled", "token", "average", "token_last4", "average_last4"] = "pooled"
    neighbours: int | None = limited(None, ONE_OR_MORE)  # of k-NN; null: 10, and 20
    temperature: float = limited(0.07, ABOVE_ZERO)  # of k-NN
    linear_epochs: int = limited(100, ONE_OR_MORE)
    attentive_epochs: int = limited(20, ONE_OR_MORE)
    export: str | None = None  # a folder for the model with the attentive probe as its head; null: it is not kept

    def conflicts(self) -> dict[str, str]:
        """Keys that have no use here, and conflicts of the images with the device."""
        unused = self.data.unused(USED, "recipes.probe, which reads each image once, as it is")
        return self.data.conflicts(self.device) | unused | refused_keywords(self.model_args, SET_BY_RECIPE)

    def unready(self) -> dict[str, str]:
        """Places that cannot be written to."""
        found = {}
        for key, folder in (("output", Path(self.output).parent), ("cache", self.cache), ("export", self.export)):
            if folder is not None and (reason := why_not_writable(Path(folder))):
                found[key] = f"{key} is {getattr(self, key)}, but {reason}; allowed: a place to write to"
        if Path(self.output).is_dir():
            found["output"] = f"output is {self.output}, which is a folder; allowed: a file to write to"
        return found
