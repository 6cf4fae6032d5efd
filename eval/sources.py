"""Where labelled pictures come from: a folder tree, tars of one, WebDataset shards, parquet files, the Hub.

Every source becomes a `Listing`, which knows of each picture its file name, its label as the source has it, and how to
read its bytes. What the labels mean is for `eval.sets` to say.

Here sources are read as timm reads ImageNet's sets, which published scores are based on: timm's endings, the innermost
folder as the class, timm's plain conversion of the pixels. Images of the user's own are for `eval.own`.
"""

import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from arm_zoo.images.listing import TAR_ENDINGS, printable
from arm_zoo.images.tars import FromTar, Member, read_members, read_shards, sidecar
from eval.listing import AS_TIMM, Listing, Reader, Reading, indexed, labels_of_text
from eval.tables import HUB_ID, SPLITS, Columns, open_hub, open_parquet


def open_source(locations: Sequence[str], folders: Sequence[str] = ()) -> Listing:
    """The pictures at one location, or in several tars or parquet files of one set.

    Args:
        locations: folders, files, patterns such as 'val-*.tar', or one Hub id 'OWNER/NAME[@REVISION][:SPLIT]'.
        folders: names of the folder in which the set's release keeps its class folders; looked for below the location.

    Raises:
        ValueError: for what is not there, not readable or has no pictures.
    """
    location, found = find(locations)
    if not found:
        return not_empty(open_hub(location, AS_TIMM, Columns()))
    paths = [path for expanded in found.values() for path in expanded]
    # where a release was unpacked, or sorted, beside its tars, the folder counts
    if len(paths) == 1 and paths[0].is_dir() and not any((paths[0] / folder).is_dir() for folder in folders):
        paths = _files_of_folder(paths[0]) or paths
    if len(paths) == 1 and paths[0].is_dir():
        return not_empty(_open_folder(location, paths[0], folders))
    if not are_tars(location, paths):
        return not_empty(open_parquet(location, paths, AS_TIMM, Columns()))
    shards = {path: read_members(path) for path in paths}
    if are_shards(shards, AS_TIMM):
        return not_empty(open_shards(location, shards, AS_TIMM))
    tree = joined(location, shards)
    files = sorted(_below([name for name in tree if AS_TIMM.is_image(name)], folders))
    places = [tree[file] for file in files]
    return not_empty(_by_folder(location, files, FromTar(places), [place.size for place in places]))


def find(locations: Sequence[str]) -> tuple[str, dict[str, list[Path]]]:
    """What to call the locations, and the files or folders that each stands for; none for a Hub id."""
    location = printable(" ".join(locations))
    expanded = [os.path.expanduser(item) for item in locations]  # not all shells do it after NAME=
    found = {item: [Path(path) for path in sorted(glob.glob(item)) or [item]] for item in expanded}
    missing = [path for paths in found.values() for path in paths if not path.exists()]
    if missing and not (len(locations) == 1 and HUB_ID.fullmatch(location)):
        raise ValueError(f"no file or folder {str(missing[0])!r}, and it is no Hub dataset id (OWNER/NAME) either")
    return location, {} if missing else found


def not_empty(listing: Listing) -> Listing:
    if not len(listing):
        raise ValueError(f"no pictures ({', '.join(sorted(listing.reading.endings))}) in {listing.location}")
    return listing


def are_tars(location: str, paths: Sequence[Path]) -> bool:
    """Whether the files are tars and not parquet files.

    Raises:
        ValueError: if they are something else, or of both kinds.
    """
    if all(path.suffix.lower() == ".parquet" for path in paths):
        return False
    if all(path.is_file() and tarfile.is_tarfile(path) for path in paths):
        return True
    raise ValueError(f"{location}: expected one folder, or tar files only, or parquet files only")


def _files_of_folder(folder: Path) -> list[Path]:
    """Tars or parquet files of a folder that holds the set as such; empty for a tree of pictures."""
    tars = sorted(path for path in folder.iterdir() if path.name.endswith(TAR_ENDINGS))
    if tars:
        return tars
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    for split in SPLITS:
        of_split = [path for path in files if re.split(r"[-.]", path.name)[0] == split]
        if of_split:
            return of_split
    return files


def _by_folder(location: str, files: list[str], read: Reader, sizes: Sequence[int]) -> Listing:
    """A listing of a tree whose innermost folders are the classes."""
    class_names, labels = indexed([posixpath.basename(posixpath.dirname(file)) for file in files])
    return Listing(location, files, labels, class_names, "folders", read, np.array(sizes), AS_TIMM)


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
    paths = sorted(_below([path for path in paths if AS_TIMM.is_image(path)], folders))
    own = Path(os.path.abspath(root)).name  # a single class folder is known by it
    places = [str(root / path) for path in paths]
    sizes = [size_of(place) for place in places]
    return _by_folder(location, [f"{own}/{path}" for path in paths], FromDisk(places), sizes)


def size_of(file: str) -> int:
    """In bytes; -1 where a link leads nowhere, which is an undecodable picture like others."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


@dataclass(frozen=True)
class FromDisk:
    files: Sequence[str]

    def __call__(self, index: int) -> IO[bytes]:
        file = self.files[index]
        if os.path.exists(file) and not os.path.isfile(file):  # timm would wait for ever at a pipe
            raise OSError(f"{printable(file)} is no regular file")
        return open(file, "rb")


Shards = Mapping[Path, Mapping[str, Member]]


def are_shards(shards: Shards, reading: Reading) -> bool:
    """Whether tars are those of WebDataset, whose images have files with labels beside them."""
    return any(sidecar(file, members) for members in shards.values() for file in members if reading.is_image(file))


def open_shards(location: str, shards: Shards, reading: Reading) -> Listing:
    """The images of WebDataset shards, with the labels beside them."""
    files, texts, places = read_shards(shards, reading.is_image)
    class_names, labels = labels_of_text(location, texts)
    sizes = np.array([place.size for place in places])
    return Listing(location, files, labels, class_names, "words", FromTar(places), sizes, reading)


def joined(location: str, shards: Shards) -> dict[str, Member]:
    """The files of a tree that several tars share.

    Raises:
        ValueError: for a file that two tars have.
    """
    tree: dict[str, Member] = {}
    for shard, members in shards.items():
        if twice := tree.keys() & members.keys():
            raise ValueError(f"{location}: {min(twice)} is there twice, the second time in {shard}")
        tree |= members
    return tree
