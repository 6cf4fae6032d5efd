"""A stand-in for the Hub and GitHub, and a process that is logged in there, one of each for a module of tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hub_server import Client, HubServer, running_client, running_hub


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: HubServer, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running_client(server, repo, tmp_path_factory.mktemp("home"), HF_TOKEN="hf_ada") as client:
        yield client
