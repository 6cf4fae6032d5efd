"""Data sets of the Hub."""

import sys
from collections.abc import Sequence

import datasets

from arm_zoo.images.errors import SourceError
from arm_zoo.images.locate import SCORED, split_of


def quiet_in_logs() -> None:
    """Switch the progress bars of `datasets` off unless stderr is a terminal."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def load_from_hub(name: str, in_sequence: bool) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The splits of a data set on the Hub, or of its copy in the cache: those whose names say train, val or test."""
    quiet_in_logs()
    try:
        loaded = datasets.load_dataset(name, streaming=in_sequence)
    except Exception as error:  # network, permissions, names, several configurations: the Hub's words say which
        raise SourceError(_problem(name, error)) from error
    splits: dict[str, datasets.Dataset | datasets.IterableDataset] = {}
    for split, data in loaded.items():
        if word := split_of(str(split)):
            splits.setdefault(word, data)
    if not splits:
        names = ", ".join(map(str, loaded))
        said = f"hf://{name} has the splits {names}; none is called train, val or test"
        raise SourceError(f"{said}: download it, and name the files of each split by these words")
    return splits


def load_split_from_hub(name: str, revision: str | None, split: str | None) -> datasets.Dataset:
    """One split of a data set on the Hub, by default the one to score, without the files of other splits."""
    quiet_in_logs()
    from_cache = datasets.config.HF_HUB_OFFLINE and revision is None
    try:
        if from_cache:
            files = datasets.load_dataset(name)
        else:
            files = datasets.load_dataset_builder(name, revision=revision).config.data_files or {}
        splits = list(map(str, files))
        split = split or split_to_score(splits, name)
        if split not in splits:
            raise SourceError(f"{name} has no split {split!r}, only {', '.join(splits)}")
        if from_cache:
            return files[split]
        files_of_split = {split: list(files[split])}  # else the files of all are fetched
        return datasets.load_dataset(name, split=split, revision=revision, data_files=files_of_split)
    except SourceError:
        raise
    except Exception as error:  # as above
        raise SourceError(_problem(name, error)) from error


def split_to_score(splits: Sequence[str], name: str) -> str:
    """The only split, or the one by which training would validate."""
    of_word = {split_of(split): split for split in reversed(splits)}
    scored = [of_word[word] for word in SCORED if word in of_word and word != "train"]
    if scored or len(splits) == 1:
        return [*scored, *splits][0]
    raise SourceError(f"{name} has the splits {', '.join(splits)}; name the one to score: {name}:{splits[0]}")


def _problem(name: str, error: Exception) -> str:
    """Why a data set did not come from the Hub, and what to do."""
    here = f"there is no file or folder {name!r} here, and"
    if datasets.config.HF_HUB_OFFLINE:
        advice = "unset HF_HUB_OFFLINE, load it once where there is a network, or name files that are here"
        return f"{here} the Hub is switched off (HF_HUB_OFFLINE=1) while hf://{name} is not in the cache; {advice}"
    return f"{here} hf://{name} did not come from the Hub: {type(error).__name__}: {error}"
