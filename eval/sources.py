"""Where labelled pictures come from: a folder tree, tars of one, WebDataset shards, parquet files, the Hub.

Every source becomes a `Listing`, which knows of each picture its file name, its label as the source has it, and how to
read its bytes. What the labels mean is for `eval.sets` to say.
"""

import glob
import io
import os
import posixpath
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from timm.data import get_img_extensions
from timm.utils import natural_key

from arm_zoo.images.tars import FromTar, Member, read_members, read_shards, sidecar

SPLITS = ("validation", "val", "test")  # of a source with several, the first of these that is there
HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>\w+))?")

EXTENSIONS = frozenset({*get_img_extensions(as_set=True), ".webp"})

Reader = Callable[[int], IO[bytes]]


def is_picture(path: str) -> bool:
    name = posixpath.basename(path)
    return posixpath.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


@dataclass(frozen=True)
class Listing:
    """Labelled pictures in an order that does not depend on how the disk lists them.

    Attributes:
        location: what the user called it.
        files: '/'-separated path of each picture inside the source, '' where the source has no file names.
        labels: (N,) indices into `class_names`, or the numbers that the source has where it names no classes.
        class_names: names of the classes: folders, or those of a ClassLabel; None where labels are bare numbers.
        is_tree: the class names are folders.
        read: opens the picture of an index.
        sizes: (N,) bytes of each picture.
    """

    location: str
    files: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...] | None
    is_tree: bool
    read: Reader
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, index: int) -> str:
        """A name for messages."""
        return self.files[index] or f"picture {index}"


def open_source(locations: Sequence[str], folders: Sequence[str] = ()) -> Listing:
    """The pictures at one location, or in several tars or parquet files of one set.

    Args:
        locations: folders, files, patterns such as 'val-*.tar', or one Hub id 'OWNER/NAME[@REVISION][:SPLIT]'.
        folders: names of the folder in which the set's release keeps its class folders; looked for below the location.

    Raises:
        ValueError: for what is not there, not readable or has no pictures.
    """
    location = " ".join(locations)
    expanded = [os.path.expanduser(item) for item in locations]  # not all shells do it after NAME=
    paths = [Path(path) for item in expanded for path in (sorted(glob.glob(item)) or [item])]
    missing = [path for path in paths if not path.exists()]
    if missing:
        if len(locations) == 1 and HUB_ID.fullmatch(location):
            return _open_hub(location)
        raise ValueError(f"no file or folder {str(missing[0])!r}, and it is no Hub dataset id (OWNER/NAME) either")
    # where a release was unpacked, or sorted, beside its tars, the folder counts
    if len(paths) == 1 and paths[0].is_dir() and not any((paths[0] / folder).is_dir() for folder in folders):
        paths = _files_of_folder(paths[0]) or paths
    if all(path.suffix == ".parquet" for path in paths):
        listing = _open_parquet(location, paths)
    elif all(path.is_file() and tarfile.is_tarfile(path) for path in paths):
        listing = _open_tars(location, paths, folders)
    elif len(paths) == 1 and paths[0].is_dir():
        listing = _open_folder(location, paths[0], folders)
    else:
        raise ValueError(f"{location}: expected one folder, or tar files only, or parquet files only")
    if not len(listing):
        raise ValueError(f"no pictures ({', '.join(sorted(EXTENSIONS))}) in {location}")
    return listing


def _files_of_folder(folder: Path) -> list[Path]:
    """Tars or parquet files of a folder that holds the set as such; empty for a tree of pictures."""
    tars = sorted(path for path in folder.iterdir() if path.name.endswith((".tar", ".tar.gz", ".tgz")))
    if tars:
        return tars
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    for split in SPLITS:
        of_split = [path for path in files if re.split(r"[-.]", path.name)[0] == split]
        if of_split:
            return of_split
    return files


def _by_folder(location: str, files: list[str], read: Reader, sizes: Sequence[int]) -> Listing:
    """A listing of a tree whose folders are the classes."""
    parents = [posixpath.basename(posixpath.dirname(file)) for file in files]
    class_names = tuple(sorted(set(parents), key=natural_key))
    index = {name: i for i, name in enumerate(class_names)}
    labels = np.array([index[name] for name in parents], dtype=np.int64)
    return Listing(location, files, labels, class_names, True, read, np.array(sizes))


def _below(paths: list[str], folders: Sequence[str]) -> list[str]:
    """The paths that go through the first of the folders that any goes through; all where none does."""
    for folder in folders:
        inside = [path for path in paths if f"/{folder}/" in f"/{path}"]
        if inside:
            return inside
    return paths


def _open_folder(location: str, root: Path, folders: Sequence[str]) -> Listing:
    for folder in folders:
        if (root / folder).is_dir():
            root = root / folder
    walk = os.walk(root, followlinks=True)
    paths = [Path(parent, name).relative_to(root).as_posix() for parent, _, names in walk for name in names]
    paths = sorted(_below([path for path in paths if is_picture(path)], folders))
    own = Path(os.path.abspath(root)).name  # a single class folder is known by it
    places = [root / path for path in paths]
    sizes = [_size(place) for place in places]
    return _by_folder(location, [f"{own}/{path}" for path in paths], _FromDisk(places), sizes)


def _size(file: Path) -> int:
    """In bytes; -1 where a link leads nowhere, which is an undecodable picture like others."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


@dataclass(frozen=True)
class _FromDisk:
    files: Sequence[Path]

    def __call__(self, index: int) -> IO[bytes]:
        return open(self.files[index], "rb")


@dataclass(frozen=True)
class _FromDataset:
    dataset: Any
    column: str

    def __call__(self, index: int) -> IO[bytes]:
        cell = self.dataset[index][self.column]
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else open(cell["path"], "rb")


def _open_tars(location: str, paths: Iterable[Path], folders: Sequence[str]) -> Listing:
    shards = {path: read_members(path) for path in paths}
    if any(sidecar(file, members) for members in shards.values() for file in members if is_picture(file)):
        files, raw, places = read_shards(shards, is_picture)
        return _labelled(location, files, raw, FromTar(places), [place.size for place in places])
    tree: dict[str, Member] = {}
    for shard, members in shards.items():
        if twice := tree.keys() & members.keys():
            raise ValueError(f"{location}: {min(twice)} is there twice, the second time in {shard}")
        tree |= members
    pictures = sorted(_below([name for name in tree if is_picture(name)], folders))
    places = [tree[name] for name in pictures]
    return _by_folder(location, pictures, FromTar(places), [place.size for place in places])


def _labelled(location: str, files: list[str], raw: Sequence[str], read: Reader, sizes: Sequence[int]) -> Listing:
    """A listing by labels written as text: numbers or names."""
    if all(re.fullmatch(r"-?\d+", label) for label in raw):
        try:
            numbers = np.array([int(label) for label in raw], dtype=np.int64)
        except OverflowError as error:
            raise ValueError(f"{location}: {max(raw, key=len)} is no label") from error
        return Listing(location, files, numbers, None, False, read, np.array(sizes))
    class_names = tuple(sorted(set(raw)))
    index = {name: i for i, name in enumerate(class_names)}
    labels = np.array([index[label] for label in raw])
    return Listing(location, files, labels, class_names, False, read, np.array(sizes))


def _open_parquet(location: str, paths: Sequence[Path]) -> Listing:
    from datasets import Dataset

    _quiet_in_logs()
    try:
        dataset = Dataset.from_parquet([str(path) for path in paths])
    except Exception as error:  # from damaged files pyarrow and datasets raise all sorts
        raise ValueError(f"cannot read {location} as parquet: {_first_line(error)}") from error
    return _of_dataset(location, dataset)


def _open_hub(location: str) -> Listing:
    from datasets import load_dataset, load_dataset_builder
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise ValueError(
            f"no file or folder {location!r} here, and offline mode is on (HF_HUB_OFFLINE); download the data set "
            "where there is a network (hf download --repo-type dataset OWNER/NAME) and name its parquet files or tars"
        )
    _quiet_in_logs()
    match = HUB_ID.fullmatch(location)
    name, revision, split = match["id"], match["revision"], match["split"]  # type: ignore[index]
    try:
        files = load_dataset_builder(name, revision=revision).config.data_files
        splits = [str(found) for found in files]
        split = split or _choose_split(splits, name)
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}, only {', '.join(splits)}")
        # without data_files, the files of all other splits are fetched, too
        dataset = load_dataset(name, split=split, revision=revision, data_files={split: list(files[split])})
    except ValueError:
        raise
    except Exception as error:  # offline, gated, private or not there: each has a class of its own
        raise ValueError(
            f"{location} is neither a file or folder here nor a dataset the Hub gives us: {_first_line(error)}"
        ) from error
    return _of_dataset(location, dataset)


def _quiet_in_logs() -> None:
    """Progress bars of `datasets` are for terminals."""
    from datasets import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def _choose_split(splits: Sequence[str], name: str) -> str:
    for split in SPLITS if len(splits) > 1 else splits:
        if split in splits:
            return split
    raise ValueError(f"{name} has the splits {', '.join(splits)}; name the one to score: {name}:{splits[0]}")


def _of_dataset(location: str, dataset: Any) -> Listing:
    """Of a `datasets.Dataset`: the column of pictures, undecoded, and the column of labels."""
    import pyarrow.compute as pc
    from datasets import ClassLabel, Image

    picture = _column(location, dataset, ("image", "img"), Image)
    label = _column(location, dataset, ("label", "labels", "cls", "wnid"), ClassLabel)
    feature = dataset.features[label]
    dataset = dataset.cast_column(picture, Image(decode=False))
    values = dataset.data.column(label).to_pylist()
    cells = dataset.data.column(picture)
    paths = [path or "" for path in pc.struct_field(cells, "path").to_pylist()]
    # where a cache has the pictures is for this machine only
    files = [posixpath.basename(path) if os.path.isabs(path) else path for path in paths]
    sizes = pc.binary_length(pc.struct_field(cells, "bytes")).fill_null(-1).to_pylist()
    read = _FromDataset(dataset, picture)
    if None in values:
        raise ValueError(f"{location}: {values.count(None)} rows have no {label}")
    if isinstance(feature, ClassLabel):
        labels = np.array(values, dtype=np.int64)
        return Listing(location, files, labels, tuple(feature.names), False, read, np.array(sizes))
    return _labelled(location, files, [str(value) for value in values], read, sizes)


def _column(location: str, dataset: Any, names: Sequence[str], feature: type) -> str:
    found = [name for name in names if name in dataset.column_names]
    found += [name for name, kind in dataset.features.items() if isinstance(kind, feature)]
    if not found:
        raise ValueError(f"{location} has no column {' or '.join(names[:2])}, only {', '.join(dataset.column_names)}")
    return found[0]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
