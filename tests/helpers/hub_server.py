"""A stand-in for the Hub on the loopback interface, and a process in which the real client of the Hub talks to it.

The stand-in answers from memory what huggingface_hub asks, with faults on demand. A guard on the process's sockets
sees to it that nobody else is asked.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from torch import nn

RELEASE = re.compile(r"/([\w.-]+/[\w.-]+)/releases/download/([^/]+)/([^/]+)")
STORE = re.compile(r"/store/([\w.-]+/[\w.-]+)/([^/]+)/([^/]+)")  # where releases redirect to
LARGE = (".safetensors", ".pth")  # the Hub keeps such files apart and names them by their sha256
RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+))?)?(?:/.*)?")
VERSION = int(version("huggingface_hub").partition(".")[0])
Fault = Callable[["Handler", str], bool]


def git_hash(contents: bytes) -> str:
    """What Git, and so the Hub, names a small file by."""
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


@dataclass
class Repository:
    """Files of every commit, and what branches and tags name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    fault: Fault | None = None  # gets the request and the file's name; True if it has answered

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs[branch] = digest
        return digest

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        digest = self.refs.get(unquote(revision), revision)
        return (digest, self.commits[digest]) if digest in self.commits else None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: "HubServer"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range') or ''}".strip())

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str) -> bool:
        self.answer(status, X_Error_Code=code, X_Error_Message=code)
        return True

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer_json({"name": "ada", "type": "user", "orgs": []})
        if release := RELEASE.fullmatch(path) or STORE.fullmatch(path):
            self._release(*release.groups(), redirect=path.startswith("/store/") is False)
            return None
        resolve, api = RESOLVE.fullmatch(path), API.fullmatch(path)
        match = resolve or api
        repository = self.server.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            self.refuse(404, "RepoNotFound")
        elif resolve:
            self._resolve(repository, resolve[2], resolve[3])
        else:
            self._describe(match[1], repository, match[2], match[3] or "main")

    def _resolve(self, repository: Repository, revision: str, name: str) -> None:
        if repository.fault is not None and repository.fault(self, name):
            return
        found = repository.at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound")
            return
        commit, files = found
        if name not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        self.send_file(commit, files[name], large=name.endswith(LARGE))

    def _release(self, repository: str, tag: str, name: str, redirect: bool) -> None:
        """A release's file: GitHub sends to the store, which sends the file."""
        files, fault = self.server.releases.get((repository, tag), ({}, None))
        if fault is not None and fault(self, name):
            return
        if name not in files:
            self.answer(404)
        elif redirect:
            self.answer(302, Location=f"{self.server.endpoint}/store/{repository}/{quote(tag, safe='')}/{name}?sig=1")
        else:
            self.send_file("0" * 40, files[name], large=False)

    def send_file(self, commit: str, contents: bytes, large: bool, **headers: str) -> None:
        """A file as the Hub sends it: large ones are named by their sha256, others by Git's hash."""
        sha = hashlib.sha256(contents).hexdigest()
        etag = f'"{sha if large else git_hash(contents)}"'
        linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(contents))} if large else {}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        begin, end = 0, len(contents)
        if span:
            begin, end = int(span[1]), min(int(span[2]) + 1 if span[2] else end, end)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(contents)}"
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes", **linked, **headers}
        self.answer(206 if span else 200, contents[begin:end], **headers)

    def _describe(self, name: str, repository: Repository, what: str | None, revision: str) -> None:
        if what == "refs":
            refs = [{"name": ref, "ref": ref, "targetCommit": sha} for ref, sha in repository.refs.items()]
            branches = [ref for ref in refs if ref["name"] == "main"]
            tags = [ref for ref in refs if ref["name"] != "main"]
            return self.answer_json({"branches": branches, "tags": tags, "converts": []})
        found = repository.at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound")
            return
        commit, files = found
        if what == "tree":
            return self.answer_json([self._entry(path, contents) for path, contents in files.items()])
        entries = [self._entry(path, contents) for path, contents in files.items()]
        siblings = [
            {
                "rfilename": entry["path"],
                "size": entry["size"],
                "blobId": entry["oid"],
                **({"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}),
            }
            for entry in entries
        ]
        described = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        self.answer_json(described)

    @staticmethod
    def _entry(path: str, contents: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(contents), "oid": git_hash(contents)}
        if path.endswith(LARGE):
            sha = hashlib.sha256(contents).hexdigest()
            return {**entry, "lfs": {"oid": sha, "size": len(contents), "pointerSize": 130}}
        return entry

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.server.repositories.setdefault(name, Repository()).commit({})
            return self.answer_json({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        match = API.fullmatch(path)
        repository = self.server.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            self.refuse(404, "RepoNotFound")
        elif match[2] == "preupload":
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer_json({"files": [{k: v for k, v in file.items() if k != "sample"} for file in files]})
        elif match[2] == "commit":
            self._commit(repository, match[1], match[3] or "main", body)
        elif match[2] == "tag":
            tag = json.loads(body)["tag"]
            if tag in repository.refs:
                self.refuse(409, "TagExists")
            else:
                repository.refs[tag], _ = repository.at(match[3] or "main") or ("", {})
                self.answer(200)
        elif match[2] == "paths-info":
            _, files = repository.at(match[3] or "main") or ("", {})
            wanted = [path for path in json.loads(body)["paths"] if path in files]
            self.answer_json([self._entry(path, files[path]) for path in wanted])
        else:
            self.refuse(404, "EntryNotFound")

    def _commit(self, repository: Repository, name: str, branch: str, body: bytes) -> None:
        _, files = repository.at(branch) or ("", {})
        files = dict(files)
        for line in body.decode().splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "deletedFile":
                files.pop(operation["value"]["path"], None)
        commit = repository.commit(files, branch)
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


class HubServer(ThreadingHTTPServer):
    """The stand-in: repositories by name, GitHub's releases by repository and tag, and the requests that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.releases: dict[tuple[str, str], tuple[dict[str, bytes], Fault | None]] = {}
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, as some must here, are no news."""

    def add(self, name: str, files: dict[str, bytes], fault: Fault | None = None) -> Repository:
        repository = self.repositories[name] = Repository(fault=fault)
        repository.commit(files)
        return repository

    def release(self, name: str, tag: str, files: dict[str, bytes], fault: Fault | None = None) -> None:
        self.releases[name, tag] = (files, fault)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# faults


def refuses(status: int, code: str = "", only: str = "") -> Fault:
    """Every request, or that for one file, is answered by an error."""

    def fault(request: Handler, name: str) -> bool:
        return (not only or name == only) and request.refuse(status, code)

    return fault


def silent(request: Handler, name: str) -> bool:
    """The weights do not come before an impatient client hangs up."""
    if request.command == "HEAD" or not name.endswith(LARGE):
        return False
    time.sleep(3)
    request.close_connection = True
    return True


def late(seconds: float) -> Fault:
    """The weights do not come for a while."""

    def fault(request: Handler, name: str) -> bool:
        if request.command == "HEAD" or not name.endswith(LARGE):
            return False
        time.sleep(seconds)
        return False

    return fault


def cuts_off(contents: bytes, times: int) -> Fault:
    """The connection ends after half of what was asked for, some times, then works."""
    left = [times]

    def fault(request: Handler, name: str) -> bool:
        if request.command == "HEAD" or not name.endswith(LARGE) or not left[0]:
            return False
        first = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        if RELEASE.fullmatch(unquote(urlsplit(request.path).path)) or ("Range" in request.headers and not first):
            return False  # a redirect, or a look into the file
        left[0] -= 1
        begin = int(first[1]) if first else 0
        rest = contents[begin:]
        request.send_response(206 if first else 200)
        request.send_header("ETag", f'"{git_hash(contents)}"')
        if first:
            request.send_header("Content-Range", f"bytes {begin}-{len(contents) - 1}/{len(contents)}")
        request.send_header("Content-Length", str(len(rest)))
        request.end_headers()
        request.wfile.write(rest[: len(rest) // 2])
        request.wfile.flush()
        request.close_connection = True
        return True

    return fault


def sends_other_contents(contents: bytes) -> Fault:
    """The weights' headers are right, what follows is not."""

    def fault(request: Handler, name: str) -> bool:
        if request.command == "HEAD" or not name.endswith(LARGE):
            return False
        request.answer(200, contents)
        return True

    return fault


def redirects_to(location: str) -> Fault:
    """The file is said to be somewhere else."""

    def fault(request: Handler, name: str) -> bool:
        request.answer(302, Location=location)
        return True

    return fault


def wants_token(token: str) -> Fault:
    """Nothing is sent to others than those who know it."""

    def fault(request: Handler, name: str) -> bool:
        return request.headers.get("Authorization") != f"Bearer {token}" and request.refuse(401, "")

    return fault


# the client

CLIENT = """
import contextlib, hashlib, io, json, logging, os, socket, sys, time

contacted = []
real_connect, real_lookup = socket.socket.connect, socket.getaddrinfo

def connect(self, address):
    contacted.append(address[0])
    if address[0] != "127.0.0.1":
        raise ConnectionRefusedError(f"the test lets nobody talk to {address[0]}")
    return real_connect(self, address)

def lookup(host, *args, **kwargs):
    contacted.append(host)
    return real_lookup(host, *args, **kwargs)

socket.socket.connect, socket.getaddrinfo = connect, lookup
import timm, torch
import arm_zoo
from huggingface_hub import constants, file_download

constants.DOWNLOAD_CHUNK_SIZE = 4096  # what came before a cut is kept by the chunk
time.sleep = lambda seconds: None  # between the client's retries
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("arm_zoo").addHandler(handler)
http_get = file_download.http_get

def full_disk(url, temp_file, **kwargs):
    temp_file.write(b"half of")
    raise OSError(28, "No space left on device")

class FullFile(io.FileIO):
    def write(self, data):
        raise OSError(28, "No space left on device")

def describe(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    classes = getattr(model, "num_classes", None)
    return {"class": type(model).__name__, "digest": digest.hexdigest(), "classes": classes}

def command_line(*argv):
    from hub.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

def run(code, folder):
    names = {}
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)
    return {"names": {name: describe_value(value) for name, value in names.items() if not name.startswith("_")}}

def describe_value(value):
    return list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__

CALLS = {
    "arm_zoo": lambda *args, **kwargs: describe(arm_zoo.from_pretrained(*args, **kwargs)),
    "timm": lambda *args, **kwargs: describe(timm.create_model(*args, **kwargs)),
    "hub": command_line,
    "run": run,
}

for line in sys.stdin:
    task = json.loads(line)
    lines.clear()
    for name in ("ARM_ZOO_HUB_ORG", "ARM_ZOO_ARM_FILE", "ARM_ZOO_UPSTREAM", "ARM_ZOO_KEEP_PICKLES"):
        os.environ.pop(name, None)
    os.environ.update(task.get("environment", {}))
    for name, row in task.get("table", {}).items():
        shapes = {key: tuple(shape) for key, shape in row.pop("shapes", {}).items()}
        arm_zoo.weights.hosted.TABLE[name] = arm_zoo.weights.hosted.Weights(**row, shapes=shapes)
    constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.3 if task.get("impatient") else 60
    file_download.http_get = full_disk if task.get("full") else http_get
    arm_zoo.weights.releases.open = (lambda path, mode: FullFile(path, "w")) if task.get("full") else open
    if task.get("nobody") and os.geteuid() == 0:
        os.seteuid(65534)
    try:
        reply = CALLS[task["call"]](*task["args"], **task["kwargs"])
    except BaseException as error:
        causes, cause = [], error.__cause__
        while cause is not None:
            causes.append(type(cause).__name__)
            cause = cause.__cause__ or cause.__context__
        own = isinstance(error, arm_zoo.CheckpointError)
        reply = {"error": type(error).__name__, "own": own, "message": str(error), "causes": causes}
    if os.geteuid() == 65534 and os.getuid() == 0:
        os.seteuid(0)
    print(json.dumps({**reply, "log": list(lines), "hosts": sorted(set(contacted))}), flush=True)
"""

OF_THE_TASK = ("environment", "table", "full", "impatient", "nobody")


@dataclass
class Client:
    """The process that loads, told what to load line by line."""

    process: subprocess.Popen[str]

    def load(self, call: str, *args: Any, **task: Any) -> dict[str, Any]:
        kwargs = {key: task.pop(key) for key in list(task) if key not in OF_THE_TASK}
        request = {"call": call, "args": [str(arg) for arg in args], "kwargs": kwargs, **task}
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert set(reply["hosts"]) <= {"127.0.0.1"}
        return reply

    def refused(self, call: str, *args: Any, **task: Any) -> str:
        """What a person reads; the error is ours and its cause is chained."""
        reply = self.load(call, *args, **task)
        assert reply.get("own"), reply
        assert reply["causes"], reply
        cache = task.get("cache_dir")
        if cache is not None and Path(cache).is_dir():
            # nothing half-written stays; version 1 of the client keeps what it has, to go on from there next time
            assert VERSION < 2 or not list(Path(cache).rglob("*.incomplete"))
            assert not [path for path in Path(cache).rglob("*.safetensors") if not path.exists()]
        message: str = reply["message"]
        return message


def digest(model: nn.Module) -> str:
    """Of all its parameters, as the client's `describe` computes it."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().float().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def running_client(hub: HubServer, repo: Path, home: Path, **environment: str) -> Iterator[Client]:
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "ARM_ZOO_")
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(names) and "proxy" not in key.lower()
    }
    environment = {
        **inherited,
        "HF_ENDPOINT": hub.endpoint,
        "ARM_ZOO_GITHUB_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DISABLE_TELEMETRY": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", CLIENT]
    with subprocess.Popen(command, cwd=repo, env=environment, text=True, **pipes) as process:
        yield Client(process)
        process.kill()
