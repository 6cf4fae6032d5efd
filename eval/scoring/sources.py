"""Opening ImageNet's sets: a tree of folders, tars of a tree, WebDataset shards, parquet files, the Hub.

Trees and pixels are read exactly as timm reads them, since published scores are based on that: timm's endings, the
innermost folder as the class, a plain conversion of the pixels. The user's own images are read by `custom`.
"""

import glob
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from timm.data import get_img_extensions

from arm_zoo.images.columns import Choices
from arm_zoo.images.errors import SourceError
from arm_zoo.images.hub import load_split_from_hub
from arm_zoo.images.listing import natural_order
from arm_zoo.images.locate import HUB_ID, SCORED, TAR_ENDINGS, Kind, Located, split_of
from arm_zoo.images.shards import JSON_LABEL, TEXT_LABELS
from arm_zoo.images.tables import Encoded, open_split
from arm_zoo.images.tars import Member, read_members, split_key
from arm_zoo.messages import printable
from eval.scoring.listing import Listing, listing_of, size_of

# Published scores depend on timm's reading; new formats go into IMAGE_ENDINGS of arm_zoo/images/listing.py.
TIMM_ENDINGS = tuple(sorted({*get_img_extensions(as_set=True), ".webp"}))
HUB_SPLIT = re.compile(rf"({HUB_ID.pattern})(?:@([\w./-]+))?(?::(\w+))?")
BY_NAME = Choices(by_name=True, in_training=False)
ONE_KIND = "{}: expected one folder, or tar files only, or parquet files only"


def open_source(locations: Sequence[str], folder: str = "") -> Listing:
    """The images at one location, or in several tars or parquet files of one set; `SourceError` if there are none.

    Locations are folders, files, patterns such as 'val-*.tar', or one Hub id 'OWNER/NAME[@REVISION][:SPLIT]'. `folder`
    is the folder of the release that has the class folders; it may lie anywhere below.
    """
    location = printable(" ".join(locations))
    if listing := open_hub(locations, BY_NAME, ""):
        return listing
    patterns = [os.path.expanduser(item) for item in locations]  # not all shells expand ~ after NAME=
    paths = [Path(path) for item in patterns for path in sorted(glob.glob(item)) or [item]]
    if missing := [path for path in paths if not path.exists()]:
        raise SourceError(f"no file or folder {str(missing[0])!r}, and it is no Hub dataset id (OWNER/NAME) either")
    # if a release was unpacked beside its tars, the folder counts
    if len(paths) == 1 and paths[0].is_dir() and not (folder and (paths[0] / folder).is_dir()):
        paths = _files_of_folder(paths[0]) or paths
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(location, paths[0], folder)
    kind: Kind = "parquet"
    if not all(path.suffix.lower() == ".parquet" for path in paths):
        if not all(path.is_file() and tarfile.is_tarfile(path) for path in paths):
            raise SourceError(ONE_KIND.format(location))
        kind = "tars"
        tars = {path: read_members(path) for path in paths}
        if not any(map(_are_samples, tars.values())):
            tree: dict[str, Member] = {}
            for tar, members in tars.items():
                if twice := tree.keys() & members.keys():
                    raise SourceError(f"{location}: {min(twice)} is in two tars, the second is {tar}")
                tree |= members
            return _open_tree(location, tree, folder)
    located = Located(location, kind, {"": list(map(str, paths))})
    return listing_of(open_split(located, "", BY_NAME), "")


def open_hub(locations: Sequence[str], choices: Choices, reading: str) -> Listing | None:
    """The images of one data set on the Hub; None if the locations are files or folders, whether they exist or not."""
    found = HUB_SPLIT.fullmatch(locations[0].removeprefix("hf://").removeprefix("datasets/"))
    if len(locations) > 1 or found is None or os.path.exists(locations[0]):
        return None
    split = load_split_from_hub(found[1], found[2], found[3])
    return listing_of(open_split(Located(locations[0], "hub"), "", choices, hub=split), reading)


def _files_of_folder(folder: Path) -> list[Path]:
    """The tars or parquet files of a folder that holds a set in such files; none for a tree of images."""
    tars = sorted(path for path in folder.iterdir() if path.name.endswith(TAR_ENDINGS))
    files = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    of_splits = ([path for path in files if split_of(path.name) == split] for split in SCORED)
    return tars or next(filter(None, of_splits), files)


def _open_folder(location: str, root: Path, folder: str) -> Listing:
    root = root / folder if (root / folder).is_dir() else root
    paths = [Path(parent, name) for parent, _, names in os.walk(root, followlinks=True) for name in names]
    tree = {path.relative_to(root).as_posix(): str(path) for path in paths}
    own = Path(os.path.abspath(root)).name  # the class, if the folder is a single class folder
    return _open_tree(location, tree, folder, above=f"{own}/")


def _are_samples(members: Collection[str]) -> bool:
    """Whether the files of a tar are WebDataset's: images with files of labels beside them."""
    endings = (*TEXT_LABELS, JSON_LABEL.partition(".")[0])
    keys = (split_key(file)[0] for file in _images_below(members))
    return any(f"{key}.{ending}" in members for key in keys for ending in endings)


def _images_below(paths: Iterable[str], folder: str = "") -> list[str]:
    """The images, in order, that lie in a folder of this name; all images if none does."""
    names = ((path, posixpath.basename(path)) for path in paths)
    images = sorted(path for path, name in names if name.lower().endswith(TIMM_ENDINGS) and not name.startswith("."))
    return [path for path in images if folder in path.split("/")[:-1]] or images


def _open_tree(location: str, tree: Mapping[str, str | Member], folder: str, above: str = "") -> Listing:
    """The images of a tree (path -> where to read it), whose innermost folders are the classes."""
    places = {f"{above}{file}": tree[file] for file in _images_below(tree, folder)}
    if not places:
        raise SourceError(f"no images ({', '.join(TIMM_ENDINGS)}) in {location}")
    names = [posixpath.basename(posixpath.dirname(file)) for file in places]
    index = {name: i for i, name in enumerate(natural_order(set(names)))}
    labels = np.array([index[name] for name in names], dtype=np.int64)
    sizes = [place.size if isinstance(place, Member) else size_of(place) for place in places.values()]
    stored = [Encoded(place, -1, printable(file)) for file, place in places.items()]
    return Listing(location, list(places), labels, tuple(index), "folders", stored.__getitem__, np.array(sizes))
