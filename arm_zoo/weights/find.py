"""Finds an entry's weights: in the package, on the Hub, or at its authors'."""

import os
from pathlib import Path

from arm_zoo.files import CheckpointError
from arm_zoo.weights.download import check_sha256, download
from arm_zoo.weights.hosted import (
    ORGANISATION,
    TABLE,
    Weights,
    bundled_entries,
    bundled_file,
    repository_of,
    upstream_is_on,
    ways_on,
)
from arm_zoo.weights.upstream import fetch_upstream


def organisation() -> str:
    """The organisation on the Hub that has the weights; the environment variable ARM_ZOO_HUB_ORG may name another."""
    return os.environ.get("ARM_ZOO_HUB_ORG") or ORGANISATION


def find_weights(entry: str, cache_dir: str | Path | None = None) -> Path:
    """The file with an entry's weights: the package's, ours on the Hub, or its authors'; CheckpointError if none."""
    weights = TABLE.get(entry)
    if weights is not None and weights.where == "bundled":
        return check_sha256(bundled_file(entry), weights.sha256, "install arm-zoo anew")
    repository = hub_repository(entry)
    if repository is not None:
        return download(repository, cache_dir=cache_dir)
    if is_upstream(entry):
        return fetch_upstream(entry, cache_dir)
    raise CheckpointError(ways_on(entry))


def is_upstream(entry: str) -> bool:
    """Whether the weights of an entry are fetched from its authors."""
    weights = TABLE.get(entry, Weights())
    return weights.where == "upstream" and upstream_is_on() and organisation() == ORGANISATION


def hub_repository(entry: str) -> str | None:
    """ORG/NAME of an entry's weights on the Hub, with @REVISION in our organisation; None if they are not there.

    If ARM_ZOO_HUB_ORG names another organisation, that is taken to have all entries of the table but the bundled ones,
    with files of its own: the table's revision and sha256 do not count for them.
    """
    weights = TABLE.get(entry)
    if weights is None or weights.where == "bundled":
        return None
    if organisation() != ORGANISATION:
        return f"{organisation()}/{entry}"
    return f"{repository_of(entry)}@{weights.revision}" if weights.where == "hosted" else None


def whereabouts(entry: str) -> str:
    """Where `pretrained=True` finds an entry's weights: "bundled", "hosted" (Hub), "upstream" or "not hosted"."""
    if entry in bundled_entries() or is_upstream(entry):
        return TABLE[entry].where
    return "hosted" if hub_repository(entry) else "not hosted"
