"""Weights fetched from the Hub, or found in the package, and compared with their sha256 before they are used."""

import errno
import logging
import os
import re
from pathlib import Path
from typing import Any

from arm_zoo.files import WEIGHTS, CheckpointError, sha256_of
from arm_zoo.weights.hosted import (
    ORGANISATION,
    TABLE,
    bundled_entries,
    bundled_file,
    known_sha256,
    repository_of,
    ways_on,
)

_logger = logging.getLogger(__name__)
_TRIES = 3
_LOGIN = "log in (`hf auth login`, or the environment variable HF_TOKEN)"


class DownloadError(CheckpointError):
    """Weights that could not be fetched from the Hub; `__cause__` is what the Hub's client met."""


def organisation() -> str:
    """The entries' Hub organisation; the environment variable ARM_ZOO_HUB_ORG, read at every call, overrides it."""
    return os.environ.get("ARM_ZOO_HUB_ORG") or ORGANISATION


def find_weights(entry: str, cache_dir: str | Path | None = None) -> Path:
    """The file with an entry's weights, from the package or the Hub; CheckpointError if it has none or other ones."""
    weights = TABLE.get(entry)
    if weights is not None and weights.where == "bundled":
        return _verified(bundled_file(entry), weights.sha256, "install arm-zoo anew")
    repository = hub_repository(entry)
    if repository is None:
        raise CheckpointError(ways_on(entry))
    return download(repository, cache_dir=cache_dir)


def hub_repository(entry: str) -> str | None:
    """ORG/NAME of an entry's weights on the Hub, of ours with @REVISION; None if they are not there.

    Another organisation than ours is asked for every entry of the table but the bundled ones: its copies are its own,
    so the table's revision and sha256 do not count for them.
    """
    weights = TABLE.get(entry)
    if weights is None or weights.where == "bundled":
        return None
    if organisation() != ORGANISATION:
        return f"{organisation()}/{entry}"
    return f"{repository_of(entry)}@{weights.revision}" if weights.where == "hosted" else None


def whereabouts(entry: str) -> str:
    """Where `pretrained=True` finds an entry's weights: "bundled" (package), "hosted" (Hub) or "not hosted"."""
    return "bundled" if entry in bundled_entries() else "hosted" if hub_repository(entry) else "not hosted"


def download(
    repo: str,
    filename: str = WEIGHTS,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    sha256: str | None = None,
) -> Path:
    """One file of a model repository, in the cache of huggingface_hub and checked.

    The endpoint, the cache, tokens and offline mode are those of huggingface_hub and its environment variables.
    Weights that the table has, at its revision or none in particular, must have its sha256. Of others none is known:
    one log line says so, and files that the Hub names by their sha256 are still compared with it.

    `repo` is ORG/NAME or ORG/NAME@REVISION, `sha256` for callers who know what the file must have.
    """
    name, _, at = repo.partition("@")
    revision = revision or at or None
    if not filename.endswith((".safetensors", ".json")):
        raise DownloadError(
            f"{name}: {filename!r} is not fetched: only .safetensors and .json files are, since pickles can run code. "
            "Download it yourself if you trust it, and convert it: python -m hub convert FILE OUT"
        )
    try:
        path = Path(_fetch(name, filename, revision=revision, cache_dir=cache_dir, token=token))
    except Exception as error:  # the client's, the network's and the file system's errors have no common parent
        raise DownloadError(f"cannot fetch {filename} of {name}: {explain(error, name, cache_dir)}") from error
    blob = _blob(path)
    blobs = os.path.normpath(path.parents[len(Path(filename).parts) + 1] / "blobs")
    if blob is not None and str(blob.parent) != blobs:
        path.unlink()  # the link alone: what it points to may be any file of the user
        refused = f"refused: the server asked to store the file outside the cache, at {blob}"
        raise DownloadError(f"{name}: {filename}: {refused}")
    if not filename.endswith(".safetensors"):
        return path
    if sha256 is None and filename == WEIGHTS:
        sha256 = known_sha256(name, revision)
    if sha256 is None:
        _logger.warning("%s: %s is not verified: the table of arm_zoo has no sha256 for it", name, filename)
        # the Hub names large files by their sha256, and its client keeps the name
        sha256 = blob.name if blob is not None and re.fullmatch("[0-9a-f]{64}", blob.name) else None
    try:
        return _verified(path, sha256, "it was taken out of the cache, so load again to fetch it anew")
    except CheckpointError as error:
        _discard(path)
        raise DownloadError(f"{name}: {filename}: {error}") from error


def _fetch(*args: Any, **kwargs: Any) -> str:
    """`hf_hub_download`, again where the connection broke off: not every version of the client does so, or always."""
    from huggingface_hub import hf_hub_download

    for _ in range(_TRIES - 1):
        try:
            return hf_hub_download(*args, **kwargs)
        except Exception as error:
            # by name: version 1 of the client speaks through httpx, version 2 through httpx2
            if type(error).__name__ not in ("ReadError", "RemoteProtocolError"):
                raise
            _logger.info("the connection broke off (%s), trying again", error)
    return hf_hub_download(*args, **kwargs)


def _verified(path: Path, sha256: str | None, advice: str) -> Path:
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {advice}") from error
    if sha256 not in (None, actual):
        found = f"its sha256 is {actual}, expected {sha256}"
        raise CheckpointError(f"{path} is damaged, cut short or another file: {found}; {advice}")
    return path


def _blob(path: Path) -> Path | None:
    """What the cache's link to a file points to, maybe a link too (to a store that caches share); None without one."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None


def _discard(path: Path) -> None:
    """Take a file out of the cache, where that may be written to; otherwise the next load fails alike."""
    blob, stored = _blob(path) or path, path.resolve()
    in_shared_store = stored.is_relative_to((blob.parents[2] / "blobs").resolve())
    for file in {path, blob, stored if in_shared_store else path}:
        try:
            file.unlink(missing_ok=True)
        except OSError:
            _logger.warning("cannot delete %s from the cache: delete it yourself", file)


def explain(error: BaseException, repo: str, cache_dir: str | Path | None = None, right: str = "read") -> str:
    """What happened, and what to do about it; `right` is what a token must have."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE
    again = "try again later; the environment variable HF_ENDPOINT names a mirror"
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    status = next((part.response.status_code for part in chain if isinstance(part, errors.HfHubHTTPError)), None)
    disk = next((part for part in chain if isinstance(part, OSError) and part.errno), OSError())
    if isinstance(error, errors.GatedRepoError):
        return f"access is gated; accept its conditions at {endpoint}/{repo}, then {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        advice = "check the name (the environment variable ARM_ZOO_HUB_ORG sets the organisation)"
        return f"there is no such repository at {endpoint}, or it is private; {advice}, or {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision; {endpoint}/{repo} shows those that it has"
    if any(isinstance(part, errors.OfflineModeIsEnabled) for part in chain) or constants.HF_HUB_OFFLINE:
        folder = "name a folder: create_model('local-dir:FOLDER', pretrained=True)"
        advice = f"load it once where there is a network and copy the cache, or {folder}"
        return f"offline mode is on (HF_HUB_OFFLINE) and the file is not in the cache {cache}; {advice}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        advice = f"look at {endpoint}/{repo}, and convert weights of another format: python -m hub convert FILE OUT"
        return f"the repository has no such file, so it is none that `python -m hub publish` wrote; {advice}"
    if status in (401, 403):
        return f"{endpoint} refuses access (HTTP {status}); {_LOGIN} with a token that may {right} {repo}"
    if status == 412:
        return f"{repo} has changed meanwhile; run the same command again"
    if status is not None:
        reason = "too many requests" if status == 429 else "it is out of order" if status >= 500 else "refused"
        return f"{endpoint} answers HTTP {status} ({reason}); {again}"
    if disk.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the cache {cache} is full; free some space, or set HF_HOME to a larger disk"
    if disk.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        where = disk.filename or cache
        return f"{where} cannot be written to; set HF_HOME or cache_dir to a folder of yours"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no name of a repository; expected ORG/NAME"
    reason = f"{type(chain[-1]).__name__}: {chain[-1]}".splitlines()[0]
    return f"no whole answer from {endpoint} ({reason}); check the network, or {again}"
