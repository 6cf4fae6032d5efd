"""Downloads from the Hub, verified by sha256, and clear messages for whatever goes wrong."""

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from arm_zoo.files import WEIGHTS, CheckpointError, DownloadError, sha256_of
from arm_zoo.weights.hosted import known_sha256
from arm_zoo.weights.releases import again_if_cut, endpoint, without_login

_logger = logging.getLogger(__name__)
_LOGIN = "log in (`hf auth login`, or the environment variable HF_TOKEN)"


def download(
    repo: str,
    filename: str = WEIGHTS,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    sha256: str | None = None,
) -> Path:
    """Fetch one file of a model repository into the cache of huggingface_hub, and verify it.

    The endpoint, the cache, tokens and offline mode are those of huggingface_hub and its environment variables.
    Weights in the table of hosted weights, asked for at its revision or at none, must have its sha256. No sha256 is
    known of others: a log line says so, and if the Hub names the file by its sha256 it is compared with that.

    Args:
        repo: ORG/NAME or ORG/NAME@REVISION.
        filename: ends in .safetensors or .json.
        revision: branch, tag or commit.
        cache_dir: instead of the default cache of huggingface_hub.
        token: see `huggingface_hub.hf_hub_download`.
        sha256: expected digest; None takes the table's.

    Raises:
        DownloadError: if the file cannot be fetched, is another one, or has an ending that may hold a pickle.
    """
    name, _, at = repo.partition("@")
    revision = revision or at or None
    if not filename.endswith((".safetensors", ".json")):
        raise DownloadError(
            f"{name}: {filename!r} is not fetched: only .safetensors and .json files are, since pickles can run code. "
            "Download it yourself if you trust it, and convert it: python -m hub convert FILE OUT"
        )
    with explained(f"fetch {filename} of {name}", name, cache_dir):
        path = fetch_from_hub(name, filename, revision, cache_dir, token)
    if not filename.endswith(".safetensors"):
        return path
    if sha256 is None and filename == WEIGHTS:
        sha256 = known_sha256(name, revision)
    if sha256 is None:
        _logger.warning("%s: %s is not verified: the table of arm_zoo has no sha256 for it", name, filename)
    return verified(path, sha256, f"{name}: {filename}")


def fetch_from_hub(
    repo: str, filename: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None
) -> Path:
    """Fetch a file of a repository into the cache, without verifying it."""
    from huggingface_hub import hf_hub_download

    fetch = partial(hf_hub_download, repo, filename, revision=revision, cache_dir=cache_dir, token=token)
    path = Path(again_if_cut(fetch))  # the client itself does not always try again, nor in every version
    blob = _blob(path)
    blobs = os.path.normpath(path.parents[len(Path(filename).parts) + 1] / "blobs")
    if blob is not None and str(blob.parent) != blobs:
        path.unlink()  # the link alone: what it points to may be any file of the user
        refused = f"refused: the server asked to store the file outside the cache, at {blob}"
        raise DownloadError(f"{repo}: {filename}: {refused}")
    return path


def verified(path: Path, sha256: str | None, said: str) -> Path:
    """A file of the cache with this sha256, or else with the one in its name on the Hub; a wrong file is deleted."""
    blob = _blob(path)
    # the Hub names large files by their sha256, and its client keeps the name
    named = blob.name if blob is not None and re.fullmatch("[0-9a-f]{64}", blob.name) else None
    try:
        return check_sha256(path, sha256 or named, "it was taken out of the cache, so load again to fetch it anew")
    except CheckpointError as error:
        discard(path)
        raise DownloadError(f"{said}: {error}") from error


def check_sha256(path: Path, sha256: str | None, advice: str) -> Path:
    """The file, if it can be read and has the sha256 (None: any); else CheckpointError, which ends with the advice."""
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {advice}") from error
    if sha256 not in (None, actual):
        found = f"its sha256 is {actual}, expected {sha256}"
        raise CheckpointError(f"{path} is damaged, cut short or another file: {found}; {advice}")
    return path


def _blob(path: Path) -> Path | None:
    """What a link in the cache points to, maybe a link into a store that caches share; None if it is no link."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None


def discard(path: Path) -> None:
    """Delete a file from the cache; if that may not be written to, a log line says so, and the next load fails too."""
    blob, stored = _blob(path) or path, path.resolve()
    in_shared_store = stored.is_relative_to((blob.parents[2] / "blobs").resolve())
    for file in {path, blob, stored if in_shared_store else path}:
        try:
            file.unlink(missing_ok=True)
        except OSError:
            _logger.warning("cannot delete %s from the cache: delete it yourself", file)


@contextmanager
def explained(doing: str, repo: str, cache_dir: str | Path | None = None, **known: str) -> Iterator[None]:
    """Turn any error inside the block into one DownloadError that says what to do; `known` goes to `explain`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the client's, the network's and the file system's errors have no common parent
        raise DownloadError(f"cannot {doing}: {explain(error, repo, cache_dir, **known)}") from error


def explain(
    error: BaseException, repo: str, cache_dir: str | Path | None = None, right: str = "read", authors: str = ""
) -> str:
    """What happened, and what to do about it.

    Args:
        right: what a token must allow, "read" or "write".
        authors: the host, "hub" or "github", if `repo` belongs to a model's authors; empty for ours.
    """
    from huggingface_hub import constants, errors

    on_github, cache = authors == "github", cache_dir or constants.HF_HUB_CACHE
    host = without_login(endpoint() if on_github else constants.ENDPOINT)
    mirror = "ARM_ZOO_GITHUB_ENDPOINT" if on_github else "HF_ENDPOINT"
    again = f"try again later; the environment variable {mirror} names a mirror"
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    answers = (getattr(part, "response", None) for part in chain)
    status = next((answer.status_code for answer in answers if answer is not None), None)
    disk = next((part for part in chain if isinstance(part, OSError) and part.errno), OSError())
    if isinstance(error, errors.GatedRepoError):
        return f"access is gated; accept its conditions at {host}/{repo}, then {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        organisation = "" if authors else " (the environment variable ARM_ZOO_HUB_ORG sets the organisation)"
        return f"there is no such repository at {host}, or it is private; check the name{organisation}, or {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision; {host}/{repo} shows those that it has"
    if any(isinstance(part, errors.OfflineModeIsEnabled) for part in chain) or constants.HF_HUB_OFFLINE:
        folder = "name a folder: create_model('local-dir:FOLDER', pretrained=True)"
        advice = f"load it once where there is a network and copy the cache, or {folder}"
        return f"offline mode is on (HF_HUB_OFFLINE) and the file is not in the cache {cache}; {advice}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        if authors:
            return f"the repository has no such file; look at {host}/{repo}"
        advice = f"look at {host}/{repo}, and convert weights of another format: python -m hub convert FILE OUT"
        return f"the repository has no such file, so it is none that `python -m hub publish` wrote; {advice}"
    if status == 404:
        return f"{host} has no such file (HTTP 404): it was moved or renamed, or the mirror lacks it"
    if status in (401, 403):
        advice = again if on_github else f"{_LOGIN} with a token that may {right} {repo}"
        return f"{host} refuses access (HTTP {status}); {advice}"
    if status == 412:
        return f"{repo} has changed meanwhile; run the same command again"
    if status is not None:
        reason = "too many requests" if status == 429 else "it is out of order" if status >= 500 else "refused"
        return f"{host} answers HTTP {status} ({reason}); {again}"
    if disk.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the cache {cache} is full; free some space, or set HF_HOME to a larger disk"
    if disk.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        where = disk.filename or cache
        return f"{where} cannot be written to; set HF_HOME or cache_dir to a folder of yours"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no name of a repository; expected ORG/NAME"
    reason = f"{type(chain[-1]).__name__}: {chain[-1]}".splitlines()[0]
    return f"no whole answer from {host} ({reason}); check the network, or {again}"
