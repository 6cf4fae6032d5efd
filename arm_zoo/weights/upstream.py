"""Weights as their authors published them: found by a look into files, fetched once, kept as safetensors.

The cache keeps `source.json` beside the safetensors, with the address, revision, sha256 and licence of the file that
they were made from. What is in the cache is used without asking any server. The exception is an address that names a
branch or tag instead of a commit: then the Hub is asked, if it can be reached, whether it still has the same file.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arm_zoo.files import (
    WEIGHTS,
    CheckpointError,
    DownloadError,
    in_own_memory,
    remove_leftovers,
    replacing_files,
    save_tensors,
    sha256_of,
)
from arm_zoo.weights.download import check_sha256, discard, explained, fetch_from_hub, verified
from arm_zoo.weights.hosted import ARM_REPOSITORY, TABLE, Weights
from arm_zoo.weights.reading import Contents, quoted, read_checkpoint, read_contents
from arm_zoo.weights.releases import ReleaseFile, download_release, release_url

_logger = logging.getLogger(__name__)
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # endings of files that may hold weights
RECORD = "source.json"
_MOST_BYTES = 2**35  # of a file; the largest ARM with its training state has about a third of this
_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+?)(?:@([^/@]+))?/([^@]+)")  # a `Path` keeps one slash of two
_BLOCK = 2**16  # bytes of one request when only parts of a file are read
Token = str | bool | None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository on the Hub, or of a release on GitHub."""

    repository: str
    name: str
    revision: str  # the commit, or the tag of the release
    on_github: bool
    size: int | None = None  # bytes; None: no server was asked
    sha256: str | None = None  # as told by the Hub

    @property
    def address(self) -> str:
        """The address of the file, to be shown and recorded."""
        if self.on_github:
            return release_url(self.repository, self.revision, self.name)
        return f"hf://{self.repository}@{self.revision}/{self.name}"

    def contents(self, weights: Weights, token: Token = None) -> Contents:
        """What the file holds, from a few reads of its header or directory."""
        with ReleaseFile(self.address) if self.on_github else self._opened_on_the_hub(token) as file:
            return read_contents(file, self.name, weights.choice)

    def _opened_on_the_hub(self, token: Token) -> Any:
        """The file, opened to read parts of it; a server that sends more than a block at once is refused."""
        from huggingface_hub import HfFileSystem

        file = HfFileSystem(token=token).open(self.address, block_size=_BLOCK, cache_type="blockcache")
        fetch_range = file.cache.fetcher

        def fetch_block(start: int, end: int) -> bytes:
            block: bytes = fetch_range(start, end)
            if len(block) > end - start:
                raise DownloadError(f"{self.address}: the Hub, or its mirror, ignores range requests")
            return block

        file.cache.fetcher = fetch_block
        return file

    @contextmanager
    def fetched(self, folder: Path, cache_dir: str | Path | None, token: Token) -> Iterator[Path]:
        """The whole file, in the Hub's cache or, from GitHub, in `folder`; it is deleted when the block ends.

        It stays if the environment variable ARM_ZOO_KEEP_PICKLES is 1, or if the Hub's cache had it before, for this
        commit or another.
        """
        from huggingface_hub import constants, try_to_load_from_cache
        from huggingface_hub.file_download import repo_folder_name

        keep = os.environ.get("ARM_ZOO_KEEP_PICKLES") == "1"
        if self.on_github:
            file = folder / self.name
            download_release(self.address, file, _MOST_BYTES)
        else:
            known = try_to_load_from_cache(self.repository, self.name, cache_dir, self.revision)
            repository = repo_folder_name(repo_id=self.repository, repo_type="model")
            stored = Path(cache_dir or constants.HF_HUB_CACHE, repository, "blobs", str(self.sha256))
            keep = keep or isinstance(known, str) or stored.exists()
            file = fetch_from_hub(self.repository, self.name, self.revision, cache_dir, token)
        try:
            yield file
        finally:
            if not keep:
                discard(file)


def fetch_upstream(entry: str, cache_dir: str | Path | None = None, token: Token = None) -> Path:
    """The safetensors with the weights of an entry that its authors published, fetched if the cache lacks it."""
    return _fetch(entry, TABLE[entry], cache_dir, token)


def fetch_address(
    address: str, revision: str | None = None, cache_dir: str | Path | None = None, token: Token = None
) -> Path:
    """The safetensors with the weights of the file at hf://ORG/NAME/FILE or hf://ORG/NAME@REVISION/FILE.

    ARM_ZOO_UPSTREAM=0 does not forbid this, as the caller asks for this very file.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not match[3].endswith(CHECKPOINTS):
        expected = f"hf://ORG/NAME[@REVISION]/FILE, where FILE ends in {', '.join(CHECKPOINTS)}"
        raise DownloadError(f"{address!r} names no checkpoint; expected {expected}")
    repository, at, file = match.groups()
    revision = revision or at or "main"
    theirs = (row for row in TABLE.values() if (row.host, row.repository) == ("hub", repository))
    row = next(theirs, Weights())  # tells the licence, and which of the weights in a file to take
    weights = replace(
        row, where="upstream", repository=repository, revision=revision, file=file, shapes={}, sha256=None
    )
    moving = re.fullmatch("[0-9a-f]{40}", revision) is None
    return _fetch(f"{repository}@{revision}", weights, cache_dir, token, moving)


def read_record(file: Path) -> dict[str, Any]:
    """The content of `source.json` beside a file of the cache; empty if it is missing or damaged."""
    try:
        record = json.loads((file.parent / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def list_files(weights: Weights, token: Token = None) -> list[RemoteFile]:
    """The checkpoints in a repository of the Hub; of a release, which cannot be listed, the file in the table.

    Files whose names have control characters are left out.
    """
    from huggingface_hub import HfApi

    repository, on_github = str(weights.repository), weights.host == "github"
    if on_github:
        return [RemoteFile(repository, str(weights.file), weights.revision, on_github)]
    api = HfApi(library_name="arm-zoo", token=token)
    info = api.model_info(repository, revision=weights.revision, files_metadata=True)
    return [
        RemoteFile(
            repository, file.rfilename, str(info.sha), on_github, file.size, file.lfs.sha256 if file.lfs else None
        )
        for file in info.siblings or []
        if file.rfilename.endswith(CHECKPOINTS) and file.rfilename.isprintable()
    ]


def choose(entry: str, weights: Weights, token: Token = None) -> RemoteFile:
    """The file with the weights of an entry; if the table does not name it, by a look into all files."""
    files = _named(list_files(weights, token), weights)
    if weights.file is not None:
        return files[0]
    found = {file: look(file, weights, token) for file in files}
    fitting = [file for file, contents in found.items() if fits(contents, weights)]
    if len(fitting) == 1:
        return fitting[0]
    expected = ", ".join(f"{name} {shape}" for name, shape in weights.shapes.items())
    count, some = (f"{len(fitting)} files fit", fitting[0].name) if fitting else ("no file fits", "FILE")
    lines = [f"  {tell(file, found[file], weights)}" for file in fitting or files]
    name_one = f"name one: ARM_ZOO_ARM_FILE={some}, or arm_zoo.from_pretrained('hf://{weights.repository}/{some}')"
    raise DownloadError("\n".join([f"{weights.repository}: {count} {entry} ({expected}):", *lines, name_one]))


def _named(files: list[RemoteFile], weights: Weights) -> list[RemoteFile]:
    """The files that the table or the environment variable names; all files if neither names any."""
    names = _names(weights)
    if missing := names - {file.name for file in files}:
        there = ", ".join(repr(file.name) for file in files) or "no checkpoints"
        said = f"{weights.repository} at {weights.revision} has no file {', '.join(map(repr, sorted(missing)))}"
        raise DownloadError(f"{said}; it has {there}")
    return [file for file in files if file.name in names or not names]


def _names(weights: Weights) -> set[str]:
    """Names of the files to choose from: the table's, or those in ARM_ZOO_ARM_FILE, by commas; empty means all."""
    if weights.file is not None:
        return {weights.file}
    said = os.environ.get("ARM_ZOO_ARM_FILE", "") if weights.repository == ARM_REPOSITORY else ""
    return {name.strip() for name in said.split(",") if name.strip()}


def look(file: RemoteFile, weights: Weights, token: Token = None) -> Contents | CheckpointError:
    """What a file holds, or the error if it cannot be read, which must not keep others from being found."""
    try:
        return file.contents(weights, token)
    except CheckpointError as error:
        return error


def fits(contents: Contents | CheckpointError, weights: Weights) -> bool:
    """Whether a file's tensors have the shapes in the table."""
    return isinstance(contents, Contents) and _shapes(contents, weights.shapes) == dict(weights.shapes)


def _shapes(contents: Contents, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the named tensors, as far as the file has them."""
    return {name: tuple(contents.tensors[name].shape) for name in names if name in contents.tensors}


def tell(file: RemoteFile, contents: Contents | CheckpointError, weights: Weights) -> str:
    """One line that describes a file."""
    size = "" if file.size is None else f" ({file.size:,} bytes)"
    if isinstance(contents, CheckpointError):
        return f"{file.name!r}{size}: {contents}"
    shapes = _shapes(contents, weights.shapes)
    found = [f"{name} {shapes[name]}" if name in shapes else f"no {name}" for name in weights.shapes]
    beside = [f"beside {quoted(contents.beside)}"] if contents.beside else []
    return f"{file.name!r}{size}: {'; '.join([', '.join(found or ['weights']), *beside])}"


def cached(name: str, weights: Weights, cache_dir: str | Path | None = None) -> Path | None:
    """The safetensors of an entry or address in the cache; None if it is missing, damaged or of another file."""
    file = cache_folder(name, weights, cache_dir) / WEIGHTS
    record, named = read_record(file), _names(weights)
    asked = {"repository": weights.repository, "revision": weights.revision, "choice": weights.choice}
    same = {key: record.get(key) for key in asked} == asked and weights.sha256 in (None, record.get("sha256"))
    if not file.is_file() or not same or (named and record.get("file") not in named):
        return None
    try:
        return check_sha256(file, record.get("converted_sha256"), "the weights are fetched anew")
    except CheckpointError as error:  # nothing is removed, as another process may just be replacing it
        _logger.warning("%s", error)
        return None


def cache_folder(name: str, weights: Weights, cache_dir: str | Path | None = None) -> Path:
    """The folder of the cache for an entry or address, and for the files named for it; made if it is missing."""
    from huggingface_hub import cached_assets_path

    assets = None if cache_dir is None else Path(cache_dir) / "assets"
    folder = re.sub(r"[^\w.-]", "--", "--".join([name, *sorted(_names(weights))]))
    return cached_assets_path("arm-zoo", "upstream", folder, assets_dir=assets)


def _fetch(name: str, weights: Weights, cache_dir: str | Path | None, token: Token, moving: bool = False) -> Path:
    """The safetensors in the cache; if it is not there, one process fetches it while others wait.

    If `moving`, the one in the cache counts only as long as the Hub has the same file.
    """
    from huggingface_hub.utils import WeakFileLock

    def current() -> Path | None:
        file = cached(name, weights, cache_dir)
        return None if file and moving and _is_replaced(read_record(file), weights, token) else file

    repository = str(weights.repository)
    with explained(f"fetch the weights of {name} from {repository}", repository, cache_dir, authors=weights.host):
        if (file := current()) is not None:
            return file
        folder = cache_folder(name, weights, cache_dir)
        with WeakFileLock(folder / ".lock"):
            if (file := current()) is not None:
                return file
            remove_leftovers(folder)
            _convert(choose(name, weights, token), weights, folder, cache_dir, token)
        return folder / WEIGHTS


def _is_replaced(record: dict[str, Any], weights: Weights, token: Token) -> bool:
    """Whether the Hub now has another file under this name; False if it cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        [file] = _named(list_files(weights, token), weights)
    except (CheckpointError, HfHubHTTPError):  # an answer: the file or the revision is gone, or access is refused
        raise
    except Exception:  # offline mode; the network's errors have no common parent
        return False
    return file.sha256 != record["sha256"] if file.sha256 else file.revision != record["commit"]


def _convert(source: RemoteFile, weights: Weights, folder: Path, cache_dir: str | Path | None, token: Token) -> None:
    """Fetch a file and write its weights and record into a folder of the cache, both or neither."""
    if (source.size or 0) > _MOST_BYTES:
        raise DownloadError(f"{source.address} has {source.size:,} bytes; at most {_MOST_BYTES:,} are fetched")
    license = weights.license or "unknown"
    if license == "unknown":
        advice = "ask their authors before you pass them on"
        _logger.warning("%s: no licence is stated for these weights; %s", source.address, advice)
    with replacing_files(folder) as beside, source.fetched(beside, cache_dir, token) as file:
        sha256 = _compared(file, source, weights)
        tensors = in_own_memory(read_checkpoint(file, weights.choice))
        facts = {"format": "pt", "source": source.address, "source_sha256": sha256, "license": license}
        save_tensors(tensors, beside / WEIGHTS, facts)
        record = {
            "source": source.address,
            "repository": weights.repository,
            "file": source.name,
            "revision": weights.revision,
            "commit": source.revision,
            "sha256": sha256,
            "license": license,
            "choice": weights.choice,
            "converted_sha256": sha256_of(beside / WEIGHTS),
        }
        (beside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _compared(file: Path, source: RemoteFile, weights: Weights) -> str:
    """The sha256 of a fetched file, verified by the table's and the Hub's; a log line says if neither has one."""
    known = [sha256 for sha256 in (weights.sha256, source.sha256) if sha256]
    for sha256 in known:
        verified(file, sha256, source.address)
    actual = sha256_of(file)
    if not known:
        _logger.warning("%s is not verified: no sha256 is published for it; it has %s", source.address, actual)
    return actual
