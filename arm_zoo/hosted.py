"""Where the weights of the entries are, the one table that loading needs, and how they are fetched and checked.

Nothing is hosted yet. An entry is hosted from the commit on that sets `hosted`, the revision and the sha256 that
`python -m hub publish` prints; it is bundled when its file lies in `arm_zoo/bundled/`, its line says so, and the
golden answers that `python -m hub convert` wrote with it lie in `hub/golden/`.
"""

import errno
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_zoo.files import WEIGHTS, CheckpointError, sha256_of

__all__ = [
    "ORGANISATION",
    "TABLE",
    "DownloadError",
    "Weights",
    "bundled_file",
    "download",
    "explain",
    "find_weights",
    "known_sha256",
    "organisation",
    "training_commands",
    "ways_on",
]

_logger = logging.getLogger(__name__)

ORGANISATION = "arm-zoo"
_TRIES = 3
BUNDLED_FOLDER = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Weights:
    """Where an entry's weights are, or will be.

    Attributes:
        repository: name on the Hub, within the organisation; empty if the weights are only bundled.
        revision: tag or commit to load.
        sha256: of model.safetensors, or of the bundled file.
        hosted: whether the repository is there.
        bundled: whether the package itself has the weights, in `arm_zoo/bundled/ENTRY.safetensors`.
    """

    repository: str = ""
    revision: str = "main"
    sha256: str | None = None
    hosted: bool = False
    bundled: bool = False


TABLE: dict[str, Weights] = {
    # small ones of our own, in fp16: recipes/RESULTS.md
    "arm_pico_patch2_8.arm_digits_ft_digits": Weights(
        sha256="ca52358e2046918e7fc139fcedd5d91f320c54711bb84143dc304bccb050d4c4", bundled=True
    ),
    "arm_tiny_patch4_32.arm_cifar10_ft_cifar10": Weights(
        sha256="25d469f0755eaf57fad300d6a9a7f2f7736f6879e7f267d41b69b0c0ed4ce712", bundled=True
    ),
    "arm_tiny_patch8_64.arm_tiny_imagenet_ft_tiny_imagenet": Weights(
        sha256="d0e401c50d022ba24e9b94224e1570b9329cc45b188479c86a4df52076ea6af2", bundled=True
    ),
    "arm_base_patch16_224.arm_in1k_ft_in1k": Weights("arm_base_patch16_224.arm_in1k_ft_in1k"),
    "arm_base_patch16_224.arm_in1k": Weights("arm_base_patch16_224.arm_in1k"),
    "arm_base_patch16_224.in1k": Weights("arm_base_patch16_224.in1k"),
    "arm_base_patch16_384.arm_in1k_ft_in1k": Weights("arm_base_patch16_384.arm_in1k_ft_in1k"),
    "arm_base_patch16_stride8_448.arm_in1k_ft_in1k": Weights("arm_base_patch16_stride8_448.arm_in1k_ft_in1k"),
    "arm_large_patch16_224.arm_in1k_ft_in1k": Weights("arm_large_patch16_224.arm_in1k_ft_in1k"),
    "arm_large_patch16_224.arm_in1k": Weights("arm_large_patch16_224.arm_in1k"),
    "arm_large_patch16_224.in1k": Weights("arm_large_patch16_224.in1k"),
    "arm_large_patch16_384.arm_in1k_ft_in1k": Weights("arm_large_patch16_384.arm_in1k_ft_in1k"),
    "arm_huge_patch16_224.arm_in1k_ft_in1k": Weights("arm_huge_patch16_224.arm_in1k_ft_in1k"),
    "arm_huge_patch16_224.arm_in1k": Weights("arm_huge_patch16_224.arm_in1k"),
    "arm_huge_patch16_384.arm_in1k_ft_in1k": Weights("arm_huge_patch16_384.arm_in1k_ft_in1k"),
}


class DownloadError(CheckpointError):
    """Weights that could not be fetched from the Hub; `__cause__` is what the Hub's client met."""


def organisation() -> str:
    """The Hub organisation of the entries; the environment variable ARM_ZOO_HUB_ORG changes it, whenever it is set."""
    return os.environ.get("ARM_ZOO_HUB_ORG") or ORGANISATION


def bundled_file(entry: str) -> Path:
    """Where the package has, or would have, the weights of an entry."""
    return BUNDLED_FOLDER / f"{entry}.safetensors"


def find_weights(entry: str, cache_dir: str | Path | None = None) -> Path | None:
    """The file with an entry's weights, from the package or the Hub, with the table's sha256; None if it has none.

    Another organisation than ours is asked for every entry of the table: its copies are its own, so the table's
    revision and sha256 do not count for them.

    Raises:
        CheckpointError: if the file is not the one that the table means.
        DownloadError: if it cannot be fetched.
    """
    weights = TABLE.get(entry)
    if weights is None:
        return None
    if weights.bundled:
        return _verified(bundled_file(entry), weights.sha256, "install arm-zoo anew")
    if organisation() != ORGANISATION and weights.repository:
        return download(f"{organisation()}/{weights.repository}", cache_dir=cache_dir)
    if weights.hosted:
        return download(f"{ORGANISATION}/{weights.repository}", revision=weights.revision, cache_dir=cache_dir)
    return None


_SMALL_SETS = {"arm_tiny_patch4_32": "cifar10", "arm_tiny_patch8_64": "tiny_imagenet", "arm_pico_patch2_8": "digits"}


def training_commands(entry: str) -> str:
    """How the weights of an entry are trained, from a checkout; its name and tag tell."""
    architecture, _, tag = entry.partition(".")
    size, resolution = architecture.split("_")[1], architecture.rpartition("_")[2]
    own_config = size in ("base", "large", "huge")
    config = _SMALL_SETS.get(architecture, size if own_config else "base")

    def command(recipe: str, name: str, model: str) -> str:
        override = "" if own_config or architecture in _SMALL_SETS else f" model={model}"
        return f"accelerate launch -m recipes.{recipe} --config recipes/configs/{name}.yaml{override} data.source=PATH"

    pretrain = command("pretrain", f"pretrain_{config}", f"arm_{size}")
    if tag == "arm_in1k":
        return pretrain
    if tag == "in1k":
        supervised = command("finetune", f"supervised_{config}", architecture)
        return f"{supervised} (recipes.pretrain first gives the better .arm_in1k_ft_in1k)"
    suffix = {"384": "_384", "448": "_stride8_448"}.get(resolution, "")
    return f"{pretrain}, then {command('finetune', f'finetune_{config}{suffix}', architecture)}"


def ways_on(entry: str, architecture: str) -> str:
    """What a person can do where weights are not hosted."""
    bundled = [name for name, weights in TABLE.items() if weights.bundled]
    small = f"create_model({bundled[0]!r}, pretrained=True)" if bundled else "none yet"
    return (
        f"the weights of {entry} are not hosted yet. Ways on:\n"
        "  an official .pth: python -m hub convert FILE OUT, from a checkout, then create_model('local-dir:OUT', "
        f"pretrained=True); or as it is, also .safetensors: create_model({architecture!r}, pretrained=True, "
        "pretrained_cfg_overlay=dict(file=PATH))\n"
        f"  train it yourself, from a checkout: {training_commands(entry)}\n"
        f"  a small model that comes with the package: {small}\n"
        "  start untrained: pretrained=False"
    )


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

    Args:
        repo: ORG/NAME, or ORG/NAME@REVISION.
        filename: within the repository.
        revision: branch, tag or commit.
        cache_dir: instead of the default cache.
        token: see `huggingface_hub.hf_hub_download`.
        sha256: that the file must have, for callers who know it.

    Raises:
        DownloadError: if it cannot be had; what to do is said, and the cause is chained.
    """
    name, _, at = repo.partition("@")
    revision = revision or at or None
    if not filename.endswith((".safetensors", ".json")):
        raise DownloadError(
            f"{name}: {filename!r} is not fetched: only .safetensors and .json files are, since pickles can run code. "
            "Download it yourself if you trust it, and convert it: python -m hub convert FILE OUT"
        )
    try:
        path = _fetch(name, filename, revision=revision, cache_dir=cache_dir, token=token)
    except Exception as error:  # the client's, the network's and the file system's errors have no common parent
        raise DownloadError(f"cannot fetch {filename} of {name}: {explain(error, name, cache_dir)}") from error
    if sha256 is None and filename == WEIGHTS:
        sha256 = known_sha256(name, revision)
    return _verified_download(Path(path), f"{name}: {filename}", sha256)


def known_sha256(repo: str, revision: str | None) -> str | None:
    """What the table has for the weights of a repository at a revision; None if it does not know them."""
    for weights in TABLE.values():
        if weights.hosted and repo == f"{ORGANISATION}/{weights.repository}":
            return weights.sha256 if revision in (None, weights.revision) else None
    return None


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


def _verified_download(path: Path, name: str, sha256: str | None) -> Path:
    blob = _blob(path)
    if blob is not None and blob.parent.name != "blobs":
        _discard(path)
        raise DownloadError(f"{name}: the server wants it to be kept outside the cache, as {blob}; trust it not")
    if path.suffix != ".safetensors":
        return path
    if sha256 is None:
        _logger.warning("%s is not verified: the table of arm_zoo has no sha256 for it", name)
        # the Hub names large files by their sha256, and its client keeps the name
        sha256 = blob.name if blob is not None and re.fullmatch("[0-9a-f]{64}", blob.name) else None
    try:
        return _verified(path, sha256, "it was taken out of the cache, so load again to fetch it anew")
    except CheckpointError as error:
        _discard(path)
        raise DownloadError(f"{name}: {error}") from error


def _verified(path: Path, sha256: str | None, advice: str) -> Path:
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {advice}") from error
    if sha256 not in (None, actual):
        raise CheckpointError(
            f"{path} is damaged, cut short or another file: its sha256 is {actual}, expected {sha256}; {advice}"
        )
    return path


def _blob(path: Path) -> Path | None:
    """What the cache's link to a file points to, maybe a link too (to a store that caches share); None without one."""
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None


def _discard(path: Path) -> None:
    """Take a file out of the cache, where that may be written to; otherwise the next load fails alike."""
    for file in {path.resolve(), _blob(path) or path, path}:
        try:
            file.unlink(missing_ok=True)
        except OSError:
            _logger.warning("cannot delete %s from the cache: delete it yourself", file)


_LOGIN = "log in (`hf auth login`, or the environment variable HF_TOKEN)"


def explain(error: BaseException, repo: str, cache_dir: str | Path | None = None, right: str = "read") -> str:
    """What happened, and what to do about it; `right` is what a token must have."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, cache_dir or constants.HF_HUB_CACHE
    again = "try again later; the environment variable HF_ENDPOINT names a mirror"
    chain = list(_chain(error))
    status = next((part.response.status_code for part in chain if isinstance(part, errors.HfHubHTTPError)), None)
    disk = next((part for part in chain if isinstance(part, OSError) and part.errno), OSError())
    if isinstance(error, errors.GatedRepoError):
        return f"access is gated; accept its conditions at {endpoint}/{repo}, then {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no such repository at {endpoint}, or it is private; check the name (the environment variable "
            f"ARM_ZOO_HUB_ORG sets the organisation), or {_LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no such revision; {endpoint}/{repo} shows those that it has"
    if any(isinstance(part, errors.OfflineModeIsEnabled) for part in chain) or constants.HF_HUB_OFFLINE:
        return (
            f"offline mode is on (HF_HUB_OFFLINE) and the file is not in the cache {cache}; load it once where there "
            "is a network and copy the cache, or name a folder: create_model('local-dir:FOLDER', pretrained=True)"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"the repository has no such file, so it is none that `python -m hub publish` wrote; look at "
            f"{endpoint}/{repo}, and convert weights of another format: python -m hub convert FILE OUT"
        )
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


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and those that caused it."""
    return [] if error is None else [error, *_chain(error.__cause__ or error.__context__)]
