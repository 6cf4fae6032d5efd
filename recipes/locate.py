"""From what ``data.source`` says to data sets of the library ``datasets``, one for each split."""

import glob
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from .listing import natural_key

if TYPE_CHECKING:  # it takes seconds to import, and what is wrong with files and folders can be told without it
    import datasets

Data: TypeAlias = "datasets.Dataset | datasets.IterableDataset"
Kind = Literal["pictures", "parquet", "tars", "hub"]
WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
SPLIT_OF_WORD = {word: split for split, words in WORDS.items() for word in words}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
FILES: dict[Kind, tuple[str, ...]] = {"parquet": (".parquet",), "tars": (".tar", ".tar.gz", ".tgz")}
COUNTING_THREADS = 16
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
ALLOWED = (
    "a folder of pictures in class subfolders (perhaps below train/ and val/), parquet files or WebDataset tars "
    "(a folder, file, glob or brace list), hf://owner/name, or digits"
)


class SourceError(ValueError):
    """A source that is missing, empty, unclear, or does not fit its use."""


@dataclass(frozen=True)
class Located:
    """What a source turned out to be.

    Args:
        name: The source as it was written.
        kind: How it is read.
        splits: ``train``, ``val`` and ``test``, those that there are -> files, or one folder of pictures.
    """

    name: str
    kind: Kind
    splits: dict[str, list[str]] = field(default_factory=dict)


def locate(name: str) -> Located:
    """Find out what a source is, without reading pictures.

    Raises:
        SourceError: If it is not there, empty, or could be read in two ways.
    """
    name = os.path.expanduser(name)  # the shell leaves the ~ of key=~/folder alone
    if name.startswith("hf://"):
        hub_id = name.removeprefix("hf://").removeprefix("datasets/")
        if not HUB_ID.fullmatch(hub_id):
            raise SourceError(f"{name!r} is no data set on the Hub; allowed: hf://owner/name")
        return Located(hub_id, "hub")
    if os.path.isdir(name):
        return locate_folder(name)
    if os.path.isfile(name):
        return located_files(name, [name])
    if any(sign in name for sign in "*?[{"):
        files = [file for pattern in expand_braces(name) for file in glob.glob(pattern, recursive=True)]
        missing = [pattern for pattern in expand_braces(name) if not glob.glob(pattern, recursive=True)]
        if missing:
            raise SourceError(f"no file matches {missing[0]!r} (source {name!r}); allowed: {ALLOWED}")
        return located_files(name, files)
    if HUB_ID.fullmatch(name) and not os.path.isdir(os.path.dirname(name)):  # else it is a misspelt folder
        return Located(name, "hub")
    raise SourceError(f"there is no {name!r}; allowed: {ALLOWED}")


def expand_braces(pattern: str) -> list[str]:
    """``a{0..2}{x,y}`` as a shell expands it; numbers keep their leading zeros."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for position, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if position % 2 == 0:
            choices.append([part])
        elif span:
            first, last = int(span[1]), int(span[2])
            choices.append([f"{number:0{len(span[1])}}" for number in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(chosen) for chosen in product(*choices)]


def locate_folder(folder: str) -> Located:
    """A folder holds pictures, or parquet files, or tars; two kinds at once are refused."""
    found: dict[Kind, list[str]] = {}
    inside = list(files_near(folder))
    for kind, endings in FILES.items():
        if files := [file for file in inside if file.lower().endswith(endings)]:
            found[kind] = files
    if holds_pictures(folder):
        found["pictures"] = []
    if len(found) > 1:
        raise SourceError(f"{folder!r} holds {' and '.join(found)}; name the files, as in '{folder}/*.parquet'")
    if not found:
        problem = "holds no pictures, parquet files or tars" if any(os.scandir(folder)) else "is empty"
        raise SourceError(f"{folder!r} {problem}; allowed: {ALLOWED}")
    [(kind, files)] = found.items()
    return picture_splits(folder) if kind == "pictures" else located_files(folder, files)


def files_near(folder: str) -> Iterator[str]:
    """Files in a folder and in its subfolders, those of pictures left out: they may hold a million."""
    yield from (entry.path for entry in os.scandir(folder) if entry.is_file())
    for below in subfolders(folder):
        for entry in os.scandir(below):
            if entry.name.lower().endswith(PICTURES):
                break
            if entry.is_file():
                yield entry.path


def located_files(name: str, files: list[str]) -> Located:
    """Parquet files or tars, sorted into splits by the words in their names; a single split needs no word."""
    kinds: dict[str, Kind | None] = {
        file: next((kind for kind, endings in FILES.items() if file.lower().endswith(endings)), None) for file in files
    }
    unknown = [file for file, kind in kinds.items() if kind is None]
    if unknown:
        raise SourceError(f"cannot read {unknown[0]!r} (source {name!r}); allowed: {ALLOWED}")
    if len(set(kinds.values())) > 1:
        raise SourceError(f"{name!r} names parquet files and tars; allowed: one kind at a time")
    splits: dict[str, list[str]] = {}
    unnamed: list[str] = []
    root = name if os.path.isdir(name) else os.path.commonpath(map(os.path.dirname, files))
    for file in sorted(set(files), key=natural_key):
        split = split_of(os.path.relpath(file, root))
        (unnamed if split is None else splits.setdefault(split, [])).append(file)
    if unnamed and splits:
        raise SourceError(
            f"which split is {unnamed[0]!r} of? Other files of {name!r} are of {', '.join(splits)}; allowed: file "
            "names that all carry one of the words train, val, test, or none at all"
        )
    [kind] = set(kinds.values())
    return Located(name, kind, splits or {"train": unnamed})  # type: ignore[arg-type]


def split_of(path: str) -> str | None:
    """The split whose word stands in a relative path: train of ``data/train-00000-of-00002.parquet``."""
    words = [SPLIT_OF_WORD[word] for word in re.split(r"[^a-z]+", path.lower()) if word in SPLIT_OF_WORD]
    return words[-1] if words else None


def picture_splits(folder: str) -> Located:
    """``train/``, ``val/`` and ``test/``, or the folder as one split if no subfolder has such a name."""
    inside = [path.name for path in subfolders(folder) if holds_pictures(str(path))]
    splits = {
        SPLIT_OF_WORD[name.lower()]: [os.path.join(folder, name)] for name in inside if name.lower() in SPLIT_OF_WORD
    }
    others = [name for name in inside if name.lower() not in SPLIT_OF_WORD]
    if "train" in splits and not others:
        return Located(folder, "pictures", splits)
    if splits and others:
        raise SourceError(
            f"{folder!r} holds {', '.join(sorted(set(inside) - set(others)))} beside {', '.join(others[:3])}: splits "
            f"or classes? Name a split's own folder, as in '{folder}/train', with data.validation for the other"
        )
    return Located(folder, "pictures", splits or {"train": [folder]})


def subfolders(folder: str | Path) -> list[Path]:
    """Visible folders inside, in natural order: 2 before 10."""
    inside = [path for path in Path(folder).iterdir() if not path.name.startswith(".") and path.is_dir()]
    return sorted(inside, key=lambda path: natural_key(path.name))


def pictures_below(folder: str | Path) -> Iterator[str]:
    """Every picture file in a folder and below it, in no order."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(PICTURES) and not name.startswith("."):
                yield os.path.join(place, name)


def holds_pictures(folder: str) -> bool:
    """Whether there is one picture file at least."""
    return next(pictures_below(folder), None) is not None


def load_splits(located: Located, streaming: bool, labels_needed: bool) -> dict[str, Data]:
    """Open the splits of a source.

    Args:
        located: What ``locate`` found.
        streaming: Read in sequence instead of unpacking first; not for folders, whose files can be read at random.
        labels_needed: Whether pictures of a folder must lie in class subfolders.
    """
    if located.kind == "hub":
        return load_from_hub(located.name, streaming)
    if located.kind == "pictures":
        if streaming:
            raise SourceError(f"{located.name!r} is a folder of pictures, which needs no data.streaming; leave it out")
        return {split: picture_folder(folder, labels_needed) for split, [folder] in located.splits.items()}
    import datasets

    builder = "parquet" if located.kind == "parquet" else "webdataset"
    loaded = {}
    for split, files in located.splits.items():
        try:
            loaded[split] = datasets.load_dataset(
                builder, data_files={split: list(map(glob.escape, files))}, split=split, streaming=streaming
            )
        except Exception as error:  # whatever a reader makes of a damaged file
            raise SourceError(f"cannot read {located.name!r} as {located.kind}: {error_text(error)}") from error
    return loaded


def error_text(error: BaseException) -> str:
    """What went wrong in the first place: ``datasets`` wraps it in general words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def picture_folder(folder: str, labels_needed: bool) -> "datasets.Dataset":
    """Paths and classes of a folder of pictures: a class for each subfolder, in natural order.

    ``datasets`` has a reader of its own for this, which guesses splits from any word in the path, leaves labels out in
    silence where folders differ in depth, and copies the list of files into its cache.
    """
    if not labels_needed:
        return table_of_paths(sorted(pictures_below(folder), key=natural_key))
    classes = [path.name for path in subfolders(folder)]
    loose = [entry.path for entry in os.scandir(folder) if entry.is_file() and entry.name.lower().endswith(PICTURES)]
    if loose:
        where = "beside its class folders" if classes else "but no class folders"
        raise SourceError(f"{folder!r} holds pictures such as {loose[0]!r} {where}; allowed: FOLDER/CLASS/PICTURE")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = sorted(pictures_below(os.path.join(folder, name)), key=natural_key)
        if not inside:
            raise SourceError(f"the class folder {os.path.join(folder, name)!r} holds no picture; fill or remove it")
        paths += inside
        labels += [label] * len(inside)
    return table_of_paths(paths, labels, classes)


def table_of_paths(
    paths: list[str], labels: list[int] | None = None, classes: Iterable[str] = ()
) -> "datasets.Dataset":
    """Picture files as a data set that holds their paths only."""
    import datasets

    columns: dict[str, list[str] | list[int]] = {"image": paths}
    features = {"image": datasets.Value("string")}
    if labels is not None:
        columns["label"] = labels
        features["label"] = datasets.ClassLabel(names=list(classes))
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return table.cast_column("image", datasets.Image(decode=False))


def load_from_hub(name: str, streaming: bool) -> dict[str, Data]:
    """All splits of a data set on the Hub, or of its copy in the cache."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, streaming=streaming)
    except Exception as error:  # network, permissions, names, several configurations: the Hub's words say which
        raise SourceError(hub_problem(name, error)) from error
    splits: dict[str, Data] = {}
    for split, data in loaded.items():
        word = split_of(str(split))
        if word is not None:
            splits.setdefault(word, data)
    if not splits:
        raise SourceError(
            f"hf://{name} has the splits {', '.join(map(str, loaded))}; none is called train, val or test"
        )
    return splits


def hub_problem(name: str, error: Exception) -> str:
    """Why a data set did not come from the Hub, and what to do."""
    import datasets

    if datasets.config.HF_HUB_OFFLINE:
        return (
            f"there is no file or folder {name!r} here, and the Hub is switched off (HF_HUB_OFFLINE=1) while "
            f"hf://{name} is not in the cache; unset HF_HUB_OFFLINE, load it once where there is a network, "
            "or name files that are here"
        )
    return (
        f"there is no file or folder {name!r} here, and hf://{name} did not come from the Hub: "
        f"{type(error).__name__}: {error}"
    )


def count_rows(files: Sequence[str]) -> list[int]:
    """Rows of each parquet file, which its last bytes tell, or of each tar, whose headers are read for it."""
    with ThreadPool(COUNTING_THREADS) as pool:  # it is waiting for the disk
        return pool.map(_rows_of, files)


def _rows_of(file: str) -> int:
    if file.lower().endswith(FILES["parquet"]):
        import pyarrow.parquet as pq

        return pq.read_metadata(file).num_rows
    rows, last = 0, None
    with tarfile.open(file) as tar:
        for member in tar:
            # Rows are made of neighbours with one name up to the first dot, as in datasets' reader.
            stem = re.match(r"((?:.*/)?[^./]+)\.[^/]*$", member.name)
            tar.members = []  # else all headers stay in memory
            if member.isreg() and stem and not os.path.basename(member.name).startswith("__"):
                rows += stem[1] != last
                last = stem[1]
    return rows
