"""A data set on the Hub, as a table, as a stream and from the cache: against a stand-in on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import datasets
import pytest

from tests.helpers.images import write_parquet

COMMIT = "a" * 40
PROGRAM = """
import json, sys
from recipes.data.config import DataConfig
from recipes.data.sources import open_source
for streaming in json.loads(sys.argv[1]):
    source = open_source(DataConfig(source="hf://some/images", streaming=streaming))
    labels = [[label for _, label, _ in split] for split in (source.train, source.test)]
    print(json.dumps([type(source.train).__name__, source.class_names, *labels]))
"""


class Repository(BaseHTTPRequestHandler):
    """As much of the Hub's interface as reading one data set takes."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    sent: ClassVar[list[str]] = []  # names of files, in order

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def describe(self, name: str) -> dict[str, str | int]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def do_POST(self) -> None:
        paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer(json.dumps([self.describe(path) for path in paths if path in self.files]).encode())

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name in self.files:
            return self.send(name)
        if name or not path.startswith("/api/datasets/some/images"):
            return self.answer(b"{}", 404, X_Error_Code="EntryNotFound" if name else "RepoNotFound")
        if "/tree/" in path:
            return self.answer(json.dumps([self.describe(name) for name in self.files]).encode())
        siblings = [{"rfilename": name} for name in self.files]
        return self.answer(json.dumps({"id": "some/images", "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def send(self, name: str) -> None:
        self.sent.append(name)
        content = self.files[name]
        headers = {"ETag": f'"{self.describe(name)["oid"]}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if "Range" not in self.headers:
            return self.answer(content, **headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return self.answer(part, 206, **headers, Content_Range=place)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Hub with one data set: two files to train on, one to validate."""
    root, names = tmp_path_factory.mktemp("repository"), datasets.ClassLabel(names=["cat", "dog"])
    for file, labels in (("train-0", [0, 1, 0]), ("train-1", [1]), ("validation-0", [0, 1])):
        write_parquet(root / f"{file}.parquet", labels, names)
    files = {path.name: path.read_bytes() for path in root.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Repository,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(repo: Path, home: Path, *streaming: bool, program: str = PROGRAM, **environment: str) -> list[list[Any]]:
    """What a process of its own reads: the client takes its settings when it is imported."""
    settings = {**os.environ, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", program, json.dumps(streaming)]
    result = subprocess.run(command, env=settings, cwd=repo, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_a_data_set_on_the_hub(hub: str, repo: Path, tmp_path: Path) -> None:
    expected = [["cat", "dog"], [0, 1, 0, 1], [0, 1]]
    stream, table = read(repo, tmp_path, True, False, HF_ENDPOINT=hub)
    assert stream == ["DatasetStream", *expected] and table == ["ImageTable", *expected]
    assert read(repo, tmp_path, False, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == [table]  # from the cache


SCORED = """
import json
from eval.scoring.sources import open_source
listing = open_source(["some/images"])
print(json.dumps([listing.class_names, listing.labels.tolist()]))
"""


@pytest.mark.slow
def test_scoring_fetches_its_split_alone(hub: str, repo: Path, tmp_path: Path) -> None:
    Repository.sent.clear()
    assert read(repo, tmp_path, program=SCORED, HF_ENDPOINT=hub) == [[["cat", "dog"], [0, 1]]]
    assert set(Repository.sent) == {"validation-0.parquet"}
