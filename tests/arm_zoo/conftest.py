"""A stand-in for the Hub and GitHub, and processes that load from it, one of each for a module of tests."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_server import Client, HubServer, running_client, running_hub


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, repo: Path) -> Iterator[Client]:
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)  # one test loads as another user
        with running_client(hub, repo, Path(home)) as client:
            yield client


@pytest.fixture(scope="module")
def offline(hub: HubServer, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running_client(hub, repo, tmp_path_factory.mktemp("home"), HF_HUB_OFFLINE="1") as client:
        yield client
