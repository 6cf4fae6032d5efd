"""Weights from their authors: what is chosen, what is fetched and kept, and what happens if something goes wrong.

The real client of the Hub runs in a process of its own against a stand-in for the Hub and for GitHub; a guard on its
sockets sees to it that it asks nobody else. The files have the authors' layout at a small width.
"""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from safetensors import safe_open
from torch import nn

import arm_zoo
from arm_zoo import CheckpointError, DownloadError, to_official
from arm_zoo.weights import upstream
from arm_zoo.weights.hosted import TABLE, Weights
from arm_zoo.weights.reading import Contents
from arm_zoo.weights.upstream import RemoteFile
from tests.helpers import hub_server
from tests.helpers.hub_server import VERSION, Client, HubServer, digest, running_client, running_hub
from tests.helpers.official import NARROW, CfgNode, RunsCode, finetuned, official_bytes, pretrained

ENTRY = "arm_base_patch16_224.arm_in1k_ft_in1k"
ARM = "OliverRen/ARM"
VMAMBA, TAG, FILE = "MzeroMiko/VMamba", "#v2cls", "vssm_base_0229_ckpt_epoch_237.pth"
ON_HUB = {"where": "upstream", "repository": ARM, "shapes": {"pos_embed": (1, 197, 32), "head.weight": (1000, 32)}}
ON_GITHUB = {"where": "upstream", "host": "github", "repository": VMAMBA, "revision": TAG, "file": FILE}
ON_GITHUB |= {"license": "mit", "choice": "model"}
TIMM = {"pretrained": True, **NARROW}


@pytest.fixture(scope="module")
def second(hub: HubServer, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running_client(hub, repo, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return finetuned(ENTRY)


@pytest.fixture(scope="module")
def contents(model: nn.Module) -> bytes:
    """The authors' file for it."""
    return official_bytes(model)


@pytest.fixture(scope="module")
def repository(contents: bytes) -> dict[str, bytes]:
    """Files as the authors' repository may have them, one of which is that of the entry."""
    wider = official_bytes(finetuned(ENTRY, embed_dim=64))
    larger = official_bytes(finetuned(ENTRY, img_size=384))
    files = {"b_ft.pth": contents, "l_ft.pth": wider, "b_ft_384.pth": larger, "b_pt.pth": official_bytes(pretrained())}
    return {**files, "README.md": b"ARM", "broken.pth": b"PK\x03\x04", "logs/train.txt": b"0"}


def whole(requests: list[str]) -> list[str]:
    """The requests for whole files that may be weights."""
    gets = [line for line in requests if line.startswith("GET") and ".pth" in line and "releases/" not in line]
    return [line for line in gets if "bytes=" not in line or line.endswith("-")]


def kept(cache: Path) -> list[str]:
    """Names of all files that hold weights, or parts of them where the Hub's client leaves none on purpose."""
    endings = (".pth", ".safetensors", *([".incomplete"] if VERSION >= 2 else []))
    return sorted(file.name for file in cache.rglob("*") if file.is_file() and file.suffix in endings)


def test_the_file_is_chosen_by_its_shapes_and_fetched_once(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, repository: dict[str, bytes], tmp_path: Path
) -> None:
    """One file of all is fetched whole, others in part; the pickle goes, the licence is spoken of once."""
    hub.add(ARM, repository)
    hub.requests.clear()
    reply = client.load("timm", "arm_base", table={ENTRY: ON_HUB}, cache_dir=tmp_path, **TIMM)
    assert reply.get("digest") == digest(model), reply
    [commit] = hub.repositories[ARM].commits
    address = f"hf://{ARM}@{commit}/b_ft.pth"
    [line] = reply["log"]
    assert line.startswith(f"{address}: no licence is stated")
    [get] = whole(hub.requests)
    assert "/b_ft.pth" in get
    assert kept(tmp_path) == ["model.safetensors"]
    [file] = tmp_path.rglob("model.safetensors")
    record = json.loads((file.parent / "source.json").read_text())
    sha256 = hashlib.sha256(contents).hexdigest()
    assert (record["source"], record["commit"], record["sha256"], record["license"]) == (
        address,
        commit,
        sha256,
        "unknown",
    )
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["license"] == "unknown" and opened.metadata()["source"] == address
        assert set(opened.keys()) == set(to_official(model))
    hub.requests.clear()
    reply = client.load("timm", ENTRY, cache_dir=tmp_path, **TIMM)
    assert (reply["digest"], reply["log"], hub.requests) == (digest(model), [], [])


def test_of_two_files_that_fit_one_is_to_be_named(
    hub: HubServer, client: Client, model: nn.Module, repository: dict[str, bytes], tmp_path: Path
) -> None:
    """By ARM_ZOO_ARM_FILE or by its address; both are reported, and neither is fetched before."""
    other = finetuned(ENTRY)
    hub.add(ARM, {**repository, "sub/b_ft2.pth": official_bytes(other)})
    hub.requests.clear()
    arguments = {"table": {ENTRY: ON_HUB}, "cache_dir": tmp_path}
    reply = client.load("timm", ENTRY, **arguments, **TIMM)
    assert reply["own"] and reply["error"] == "DownloadError"
    first, *files, last = reply["message"].splitlines()
    assert first == f"{ARM}: 2 files fit {ENTRY} (pos_embed (1, 197, 32), head.weight (1000, 32)):"
    size = len(repository["b_ft.pth"])
    held = "pos_embed (1, 197, 32), head.weight (1000, 32); beside 'optimizer', 'scaler', 'epoch', 'args'"
    assert files[0] == f"  'b_ft.pth' ({size:,} bytes): {held}" and files[1].startswith("  'sub/b_ft2.pth' (")
    assert "ARM_ZOO_ARM_FILE=b_ft.pth" in last and f"arm_zoo.from_pretrained('hf://{ARM}/b_ft.pth')" in last
    assert not kept(tmp_path) and not whole(hub.requests)
    for name, expected in (("b_ft.pth", model), ("sub/b_ft2.pth", other), ("l_ft.pth,b_ft.pth", model)):
        reply = client.load("timm", ENTRY, **arguments, **TIMM, environment={"ARM_ZOO_ARM_FILE": name})
        assert reply.get("digest") == digest(expected), reply
    reply = client.load("arm_zoo", f"hf://{ARM}/sub/b_ft2.pth", cache_dir=tmp_path)
    assert reply.get("digest") == digest(other), reply
    reply = client.load("arm_zoo", Path(f"hf://{ARM}/sub/b_ft2.pth"), cache_dir=tmp_path)  # as argparse may make it
    assert reply.get("digest") == digest(other), reply
    reply = client.load("timm", ENTRY, **arguments, **TIMM, environment={"ARM_ZOO_ARM_FILE": "none.pth"})
    assert f"{ARM} at main has no file 'none.pth'; it has 'b_ft.pth', " in reply["message"]
    reply = client.load("timm", ENTRY, **arguments, **TIMM, environment={"ARM_ZOO_ARM_FILE": "l_ft.pth"})
    assert f"{ARM}: no file fits {ENTRY}" in reply["message"]
    assert "'l_ft.pth'" in reply["message"] and "b_ft.pth" not in reply["message"]


def test_if_no_file_fits_all_are_reported(
    hub: HubServer, client: Client, repository: dict[str, bytes], tmp_path: Path
) -> None:
    """Also those that cannot be read, or want to run something."""
    del (files := dict(repository))["b_ft.pth"]
    hub.add(ARM, {**files, "trap.pth": official_bytes(finetuned(ENTRY), args=RunsCode(tmp_path / "trap"))})
    reply = client.load("timm", ENTRY, table={ENTRY: ON_HUB}, cache_dir=tmp_path / "cache", **TIMM)
    lines = dict(line.strip().split(" ", 1) for line in reply["message"].splitlines()[1:-1])
    assert reply["message"].startswith(f"{ARM}: no file fits {ENTRY}")
    assert "pos_embed (1, 577, 32), head.weight (1000, 32)" in lines["'b_ft_384.pth'"]
    assert "pos_embed (1, 64, 32), no head.weight; beside" in lines["'b_pt.pth'"]
    assert "cannot read the checkpoint broken.pth: " in lines["'broken.pth'"]
    assert "it asks to run 'posix.mkdir'; nothing in it was run" in lines["'trap.pth'"]
    assert not kept(tmp_path) and not (tmp_path / "trap").exists()
    hub.add(ARM, {})
    assert "no file fits" in client.load("timm", ENTRY, cache_dir=tmp_path / "cache", **TIMM)["message"]


def test_pretrained_weights(hub: HubServer, client: Client, repository: dict[str, bytes], tmp_path: Path) -> None:
    """They are told by their decoder; from_pretrained gives the pretraining model, timm the backbone."""
    hub.add(ARM, repository)
    entry = "arm_base_patch16_224.arm_in1k"
    row = {"where": "upstream", "repository": ARM, "shapes": {"enc2dec.weight": (256, 128)}}
    reply = client.load("arm_zoo", entry, table={entry: row}, cache_dir=tmp_path)
    assert reply.get("class") == "ARMPretrain", reply
    keywords = {"embed_dim": 32, "depth": 2, "cache_dir": tmp_path}
    reply = client.load("arm_zoo", entry, as_backbone=True, **keywords)
    by_timm = client.load("timm", entry, pretrained=True, **keywords)
    assert reply["class"] == by_timm["class"] == "ARM" and reply["classes"] == 0


def test_releases_of_github(hub: HubServer, client: Client, model: nn.Module, tmp_path: Path) -> None:
    """Redirects are followed to the store; settings of yacs lie in the file, and the trained weights count."""
    averaged = to_official(finetuned(ENTRY))
    contents = official_bytes(model, config=CfgNode(A=1, B=CfgNode(C=[1, "x"])), model_ema=averaged)
    hub.release(VMAMBA, TAG, {FILE: contents})
    hub.requests.clear()
    arguments = {"table": {ENTRY: ON_GITHUB}, "cache_dir": tmp_path, **TIMM}
    (tmp_path / "assets" / "arm-zoo" / "upstream" / f"{ENTRY}--{FILE}" / ".partial-abcdefgh").mkdir(
        parents=True
    )  # of a killed one
    reply = client.load("timm", ENTRY, **arguments, environment={"ARM_ZOO_KEEP_PICKLES": "1"})
    assert reply.get("digest") == digest(model), reply
    assert [line.split()[1] for line in hub.requests] == [
        f"/{VMAMBA}/releases/download/%23v2cls/{FILE}",
        f"/store/{VMAMBA}/%23v2cls/{FILE}?sig=1",
    ]
    sha256 = hashlib.sha256(contents).hexdigest()
    [line] = reply["log"]
    assert line.endswith(f"is not verified: no sha256 is published for it; it has {sha256}")
    assert kept(tmp_path) == ["model.safetensors", FILE]
    [record] = [json.loads(path.read_text()) for path in tmp_path.rglob("source.json")]
    assert (record["license"], record["commit"], record["sha256"]) == ("mit", TAG, sha256)
    assert record["source"] == f"https://github.com/{VMAMBA}/releases/download/%23v2cls/{FILE}"
    assert not list(tmp_path.rglob(".partial-*"))
    known = {ENTRY: {**ON_GITHUB, "sha256": sha256}}
    reply = client.load("timm", ENTRY, **{**arguments, "table": known, "cache_dir": tmp_path / "known"})
    assert (reply["digest"], reply["log"], kept(tmp_path / "known")) == (digest(model), [], ["model.safetensors"])
    known[ENTRY]["sha256"] = "0" * 64
    reply = client.load("timm", ENTRY, **{**arguments, "table": known, "cache_dir": tmp_path / "other"})
    assert f"its sha256 is {sha256}, expected {'0' * 64}" in reply["message"] and reply["own"]
    assert not kept(tmp_path / "other")


@pytest.mark.parametrize(
    "fault, message",
    [
        (hub_server.refuses(404), "has no such file (HTTP 404): it was moved or renamed"),
        (hub_server.refuses(429), "answers HTTP 429 (too many requests)"),
        (
            hub_server.refuses(500),
            "(it is out of order); try again later; the environment variable ARM_ZOO_GITHUB_END",
        ),
        (hub_server.silent, "timed out"),
        (hub_server.redirects_to("https://evil.example/x.pth"), "redirects to https://evil.example; allowed are"),
        (hub_server.redirects_to("http://objects.githubusercontent.com/x"), "redirects to http://objects.github"),
        (hub_server.redirects_to("https://objects.githubusercontent.com:8443/x"), "githubusercontent.com:8443; all"),
        (hub_server.redirects_to("https://u@objects.githubusercontent.com/x"), "u@objects.githubusercontent.com; a"),
        (hub_server.redirects_to("file:///etc/passwd"), "redirects to file://; allowed"),
        (hub_server.redirects_to("?again"), "redirects more than 4 times"),
        (hub_server.sends_other_contents(b"<!doctype html>"), "ignores range requests (HTTP 200)"),
    ],
)
def test_refusals_of_github(
    fault: hub_server.Fault, message: str, hub: HubServer, client: Client, contents: bytes, tmp_path: Path
) -> None:
    hub.release(VMAMBA, TAG, {FILE: contents}, fault)
    impatient = message == "timed out"
    reply = client.load("timm", ENTRY, table={ENTRY: ON_GITHUB}, cache_dir=tmp_path, impatient=impatient, **TIMM)
    assert reply["own"] and reply["error"] == "DownloadError" and message in reply["message"], reply
    assert not kept(tmp_path) and "\n" not in reply["message"]


def test_a_cut_connection_to_github(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    """The download goes on where it was, unless the file has changed; if that never ends, it is reported."""
    hub.release(VMAMBA, TAG, {FILE: contents}, hub_server.cuts_off(contents, times=2))
    hub.requests.clear()
    arguments = {"table": {ENTRY: ON_GITHUB}, **TIMM}
    reply = client.load("timm", ENTRY, cache_dir=tmp_path / "cut", **arguments)
    assert reply.get("digest") == digest(model), reply
    resumed = [int(line.rpartition("=")[2].strip("-")) for line in hub.requests if "/store/" in line]
    assert resumed[0] == 0 and len(resumed) == 3 and resumed[1] == len(contents) // 2 < resumed[2]
    hub.release(VMAMBA, TAG, {FILE: contents[:-1]}, hub_server.cuts_off(contents, times=1))
    message = client.load("timm", ENTRY, cache_dir=tmp_path / "changed", **arguments)["message"]
    assert message.endswith("changed while it was fetched; load again") and not kept(tmp_path / "changed")
    hub.release(VMAMBA, TAG, {FILE: contents}, hub_server.cuts_off(contents, times=10**9))
    assert "no whole answer from" in client.load("timm", ENTRY, cache_dir=tmp_path / "x", **arguments)["message"]
    assert not kept(tmp_path / "x")


def test_files_beyond_all_sizes_are_not_fetched(hub: HubServer, client: Client, tmp_path: Path) -> None:
    def fault(request: hub_server.Handler, name: str) -> bool:
        request.answer(206, b"0", Content_Range=f"bytes 0-0/{2**40}")
        return True

    hub.release(VMAMBA, TAG, {}, fault)
    reply = client.load("timm", ENTRY, table={ENTRY: ON_GITHUB}, cache_dir=tmp_path, **TIMM)
    assert f"has {2**40:,} bytes; at most" in reply["message"] and not kept(tmp_path)
    source, weights = RemoteFile(ARM, "x.pth", "0" * 40, False, 2**40), Weights("upstream", repository=ARM)
    with pytest.raises(DownloadError, match=r"has 1,099,511,627,776 bytes; at most"):
        upstream._convert(source, weights, tmp_path, None, None)


def test_the_hub_names_the_sha256(hub: HubServer, client: Client, contents: bytes, tmp_path: Path) -> None:
    """Other contents of the same length are refused and thrown away; what the table knows counts too."""
    changed = contents[:-1] + b"!"
    row = {**ON_HUB, "file": "b_ft.pth"}
    hub.add(ARM, {"b_ft.pth": contents}, hub_server.sends_other_contents(changed))
    reply = client.load("timm", ENTRY, table={ENTRY: row}, cache_dir=tmp_path, **TIMM)
    assert reply["own"] and f"its sha256 is {hashlib.sha256(changed).hexdigest()}, expected" in reply["message"]
    hub.add(ARM, {"b_ft.pth": contents})
    reply = client.load("timm", ENTRY, table={ENTRY: {**row, "sha256": "0" * 64}}, cache_dir=tmp_path, **TIMM)
    assert reply["own"] and f"its sha256 is {hashlib.sha256(contents).hexdigest()}, expected 000" in reply["message"]
    assert not kept(tmp_path)


def test_a_cut_connection_to_the_hub(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    hub.add(ARM, {"b_ft.pth": contents}, hub_server.cuts_off(contents, times=2))
    hub.requests.clear()
    reply = client.load("timm", ENTRY, table={ENTRY: ON_HUB}, cache_dir=tmp_path, **TIMM)
    assert reply.get("digest") == digest(model), reply
    assert len([line for line in whole(hub.requests) if "bytes=" in line]) == 2


@pytest.mark.parametrize(
    "status, code, message",
    [
        (401, "", "refuses access (HTTP 401); log in"),
        (403, "GatedRepo", "access is gated; accept its conditions at"),
        (429, "", "answers HTTP 429 (too many requests)"),
        (500, "", "answers HTTP 500 (it is out of order); try again later; the environment variable HF_ENDPOINT"),
    ],
)
def test_refusals_of_the_hub(
    status: int, code: str, message: str, hub: HubServer, client: Client, contents: bytes, tmp_path: Path
) -> None:
    """When the files are looked into, and when one is fetched."""
    hub.add(ARM, {"b_ft.pth": contents}, hub_server.refuses(status, code))
    for row in (ON_HUB, {**ON_HUB, "file": "b_ft.pth"}):
        assert message in client.refused("timm", ENTRY, table={ENTRY: row}, cache_dir=tmp_path, **TIMM)
    del hub.repositories[ARM]
    assert "there is no such repository at" in client.refused("timm", ENTRY, cache_dir=tmp_path, **TIMM)


def test_a_token_is_shown_to_the_hub_alone(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    hub.add(ARM, {"b_ft.pth": contents}, hub_server.wants_token("hf_ada"))
    address = f"hf://{ARM}/b_ft.pth"
    assert "refuses access (HTTP 401)" in client.refused("arm_zoo", address, cache_dir=tmp_path)
    assert client.load("arm_zoo", address, cache_dir=tmp_path, token="hf_ada").get("digest") == digest(model)
    hub.release(VMAMBA, TAG, {FILE: contents}, hub_server.wants_token("hf_ada"))
    arguments = {"table": {ENTRY: ON_GITHUB}, "cache_dir": tmp_path / "github", "environment": {"HF_TOKEN": "hf_ada"}}
    assert "refuses access (HTTP 401)" in client.refused("arm_zoo", ENTRY, token="hf_ada", **arguments)


@pytest.mark.parametrize(
    "address",
    [
        f"hf://{ARM}/README.md",
        f"hf://{ARM}",
        "hf://x/y.pth",
        f"hf:{ARM}/x.pth",
        f"hf://{ARM}@main",
        f"hf://{ARM}/x@y.pth",
    ],
)
def test_addresses_that_name_no_checkpoint(address: str, client: Client, tmp_path: Path) -> None:
    reply = client.load("arm_zoo", address, cache_dir=tmp_path)
    assert reply["error"] == "DownloadError" and "expected hf://ORG/NAME[@REVISION]/FILE" in reply["message"]


def test_revisions(hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path) -> None:
    """An address may name one; a file that is gone from the branch is there at the commit."""
    repository = hub.add(ARM, {"b_ft.pth": contents})
    old = repository.refs["main"]
    repository.commit({})
    reply = client.load("arm_zoo", f"hf://{ARM}@{old}/b_ft.pth", cache_dir=tmp_path)
    assert reply.get("digest") == digest(model), reply
    other = client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", revision=old, cache_dir=tmp_path / "other")
    assert other.get("digest") == digest(model), other
    reply = client.load("arm_zoo", ENTRY, revision=old, cache_dir=tmp_path, table={ENTRY: ON_HUB})
    assert "at the revision 'main'; a file of another is" in reply["message"] and reply["error"] == "ValueError"
    reply = client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", cache_dir=tmp_path)
    assert f"{ARM} at main has no file 'b_ft.pth'; it has no checkpoints" in reply["message"]
    assert "it has no such revision" in client.refused("arm_zoo", f"hf://{ARM}@v9/b_ft.pth", cache_dir=tmp_path)


@pytest.mark.parametrize("row", [ON_HUB, ON_GITHUB], ids=["hub", "github"])
def test_offline(
    row: dict[str, Any],
    hub: HubServer,
    client: Client,
    offline: Client,
    model: nn.Module,
    contents: bytes,
    tmp_path: Path,
) -> None:
    """From a warm cache, read-only or not, without one request; a cold one is explained."""
    hub.add(ARM, {"b_ft.pth": contents})
    hub.release(VMAMBA, TAG, {FILE: contents})
    arguments = {"table": {ENTRY: row}, "cache_dir": tmp_path / "warm", **TIMM}
    client.load("timm", ENTRY, **arguments)
    hub.requests.clear()
    assert offline.load("timm", ENTRY, **arguments).get("digest") == digest(model)
    message = offline.refused("timm", ENTRY, **{**arguments, "cache_dir": tmp_path / "cold"})
    assert "offline mode is on (HF_HUB_OFFLINE) and the file is not in the cache" in message
    assert hub.requests == []


@pytest.mark.parametrize("row", [ON_HUB, ON_GITHUB], ids=["hub", "github"])
def test_read_only_caches(
    row: dict[str, Any], hub: HubServer, client: Client, model: nn.Module, contents: bytes
) -> None:
    """A filled one, as on clusters, is as good as any; into an empty one nothing can be fetched."""
    hub.add(ARM, {"b_ft.pth": contents})
    hub.release(VMAMBA, TAG, {FILE: contents})
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        arguments = {"table": {ENTRY: row}, **TIMM}
        client.load("timm", ENTRY, cache_dir=cache, **arguments)
        (cache / "empty").mkdir()
        folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        try:
            reply = client.load("timm", ENTRY, cache_dir=cache, nobody=True, **arguments)
            message = client.refused("timm", ENTRY, cache_dir=cache / "empty", nobody=True, **arguments)
        finally:
            for path in folders:
                path.chmod(0o755)
    assert reply.get("digest") == digest(model), reply
    assert str(cache) in message and "cannot be written to; set HF_HOME or cache_dir to a folder of yours" in message


@pytest.mark.parametrize("row", [ON_HUB, ON_GITHUB], ids=["hub", "github"])
def test_full_disks(row: dict[str, Any], hub: HubServer, client: Client, contents: bytes, tmp_path: Path) -> None:
    hub.add(ARM, {"b_ft.pth": contents})
    hub.release(VMAMBA, TAG, {FILE: contents})
    message = client.refused("timm", ENTRY, table={ENTRY: row}, cache_dir=tmp_path, full=True, **TIMM)
    assert f"the disk of the cache {tmp_path} is full; free some space, or set HF_HOME" in message
    assert not kept(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", [ON_HUB, ON_GITHUB], ids=["hub", "github"])
def test_of_two_processes_one_fetches_and_the_other_waits(
    row: dict[str, Any],
    hub: HubServer,
    client: Client,
    second: Client,
    model: nn.Module,
    contents: bytes,
    tmp_path: Path,
) -> None:
    hub.add(ARM, {"b_ft.pth": contents}, hub_server.late(0.25))
    hub.release(VMAMBA, TAG, {FILE: contents}, hub_server.late(0.25))
    hub.requests.clear()
    arguments = {"table": {ENTRY: row}, "cache_dir": tmp_path, **TIMM}
    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(lambda process: process.load("timm", ENTRY, **arguments), [client, second]))
    assert [reply.get("digest") for reply in replies] == [digest(model)] * 2, replies
    assert len(whole(hub.requests)) == 1


def test_damage_in_the_cache_is_noticed(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    hub.add(ARM, {"b_ft.pth": contents})
    arguments = {"table": {ENTRY: ON_HUB}, "cache_dir": tmp_path, **TIMM}
    client.load("timm", ENTRY, **arguments)
    [file] = tmp_path.rglob("model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert upstream.cached(ENTRY, Weights(**ON_HUB), tmp_path) is None and file.exists()  # it may be half replaced
    reply = client.load("timm", ENTRY, **arguments)
    assert reply.get("digest") == digest(model), reply
    assert "is damaged, cut short or another file" in reply["log"][0] and "are fetched anew" in reply["log"][0]
    (file.parent / "source.json").write_text("[")
    assert client.load("timm", ENTRY, **arguments).get("digest") == digest(model)


def test_files_that_were_in_the_hubs_cache_stay(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    hub.add(ARM, {"b_ft.pth": contents})
    code = "import huggingface_hub; file = huggingface_hub.hf_hub_download({!r}, 'b_ft.pth', cache_dir={!r})"
    assert "names" in client.load("run", code.format(ARM, str(tmp_path)), tmp_path)
    assert client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", cache_dir=tmp_path).get("digest") == digest(model)
    assert kept(tmp_path) == ["b_ft.pth", "model.safetensors"]


@pytest.mark.parametrize("row", [{**ON_HUB, "file": "trap.pth"}, {**ON_GITHUB, "file": "trap.pth"}])
def test_pickles_that_want_more_are_refused(
    row: dict[str, Any], hub: HubServer, client: Client, model: nn.Module, tmp_path: Path
) -> None:
    """Nothing of them is run, and they do not stay."""
    contents = official_bytes(model, args=RunsCode(tmp_path / "trap"))
    hub.add(ARM, {"trap.pth": contents})
    hub.release(VMAMBA, TAG, {"trap.pth": contents})
    message = client.refused("timm", ENTRY, table={ENTRY: row}, cache_dir=tmp_path / "cache", **TIMM)
    assert "it asks to run 'posix.mkdir'; nothing in it was run" in message
    assert not (tmp_path / "trap").exists() and not kept(tmp_path)


def test_upstream_can_be_turned_off(hub: HubServer, client: Client, contents: bytes, tmp_path: Path) -> None:
    hub.add(ARM, {"b_ft.pth": contents})
    hub.requests.clear()
    arguments = {"table": {ENTRY: ON_HUB}, "cache_dir": tmp_path, "environment": {"ARM_ZOO_UPSTREAM": "0"}}
    for reply in (client.load("timm", ENTRY, **arguments, **TIMM), client.load("arm_zoo", ENTRY, **arguments)):
        assert (
            f"published only by their authors ({ARM}), and ARM_ZOO_UPSTREAM=0 forbids fetching them. Ways on:"
            in (reply["message"])
        )
        assert "python -m hub convert FILE OUT" in reply["message"]
    assert hub.requests == []


@pytest.mark.slow
def test_timm_lists_what_can_be_fetched(repo: Path) -> None:
    code = "import arm_zoo, timm; print(*timm.list_pretrained('arm_*'))"
    environment = {**os.environ, "ARM_ZOO_UPSTREAM": "0"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, check=True)
    upstream = {name for name, row in TABLE.items() if row.where == "upstream"}
    bundled = {name for name, row in TABLE.items() if row.where == "bundled"}
    assert upstream and upstream <= set(timm.list_pretrained()) and set(result.stdout.split()) == bundled


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("vim_tiny_patch16_224.in1k", NARROW),
        ("vim_small_patch16_stride8_224.in1k_ft", NARROW),
        ("vmamba_base_s2l15.in1k", {"embed_dim": 16, "depths": (1, 1, 1, 1)}),
    ],
)
def test_peers_load_by_name(name: str, sizes: dict[str, Any], hub: HubServer, client: Client, tmp_path: Path) -> None:
    """As the table names their files; VMamba's come with settings of yacs, and the averaged weights do not count."""
    row, small = TABLE[name], finetuned(name, **sizes)
    contents = official_bytes(small, config=CfgNode(A=1), model_ema=to_official(finetuned(name, **sizes)))
    if row.host == "github":
        hub.release(str(row.repository), row.revision, {str(row.file): contents})
    else:
        hub.add(str(row.repository), {str(row.file): contents, "other.pth": b""})
    reply = client.load("timm", name, pretrained=True, cache_dir=tmp_path, **sizes)
    assert reply.get("digest") == digest(small), reply
    [record] = [json.loads(path.read_text()) for path in tmp_path.rglob("source.json")]
    assert record["license"] == timm.get_pretrained_cfg(name).license and kept(tmp_path) == ["model.safetensors"]
    assert not [line for line in reply["log"] if "licence" in line]


SMALL = {"vmamba_base_s2l15.in1k": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_classes": 10}}
SCORE = """
import functools
from unittest import mock
import timm
from eval.__main__ import main
with mock.patch("timm.create_model", functools.partial(timm.create_model, **{sizes!r})):
    if main({words!r}) != 0:
        raise RuntimeError("eval failed")
"""


@pytest.mark.parametrize(
    "entry", [ENTRY, "vim_tiny_patch16_224.in1k", "vmamba_base_s2l15.in1k"], ids=["arm", "vim", "vmamba"]
)
def test_eval_scores_what_was_fetched(entry: str, hub: HubServer, client: Client, repo: Path, tmp_path: Path) -> None:
    """By the entry's name, and by the address of the file on the Hub, which has the same weights."""
    sizes = SMALL.get(entry, {**NARROW, "num_classes": 10})
    row = TABLE[entry]
    file = row.file or "any_name.pth"
    contents = official_bytes(finetuned(entry, **sizes), config=CfgNode(A=1))
    hub.add(str(row.repository), {file: contents})
    hub.release(str(row.repository), row.revision, {file: contents})
    for number in range(10):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (25 * number, 0, 0)).save(tmp_path / "images" / str(number) / "0.png")
    names = [entry] if row.host == "github" else [entry, f"hf://{row.repository}/{file}"]
    words = ["--models", *names, "--sets", f"custom={tmp_path / 'images'}", "--output", str(tmp_path / "results.csv")]
    table = {ENTRY: {**ON_HUB, "shapes": {"head.weight": (10, 32)}}} if entry == ENTRY else {}
    code = SCORE.format(sizes=sizes, words=[*words, "--workers", "0"])
    reply = client.load("run", code, repo, table=table)
    assert "names" in reply, reply
    with (tmp_path / "results.csv").open(newline="") as opened:
        by_name, *by_address = csv.DictReader(opened)
    source = "https://github.com" if row.host == "github" else f"hf://{row.repository}@"
    assert by_name["weights"].startswith(source) and by_name["weights"].endswith(file), by_name
    assert by_name["n"] == "10" and len(by_address) == len(names) - 1
    for other in by_address:
        assert other["weights"] == names[1]
        assert [other[key] for key in ("n", "top1", "ece")] == [by_name[key] for key in ("n", "top1", "ece")]


def test_files_of_another_family_are_refused() -> None:
    small = [finetuned(entry, **SMALL.get(entry, NARROW)) for entry in (ENTRY, "vim_tiny_patch16_224", *SMALL)]
    for model, other in permutations(small, 2):
        with pytest.raises(CheckpointError, match="does not fit the model"):
            model.adapt(to_official(other), model)


def test_entries_without_a_source_refuse_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"arm_base_patch16_224\.in1k are not hosted yet\. Ways on:"):
        timm.create_model("arm_base_patch16_224.in1k", pretrained=True)


def test_the_tables_shapes_are_those_of_the_models() -> None:
    """Each row fits its own model, under the authors' names, and no other row of the same repository."""
    rows = {entry: row for entry, row in TABLE.items() if row.shapes}
    for entry in rows:
        size = re.match(r"arm_[a-z]+", entry)
        assert size is not None
        model = (
            arm_zoo.create_pretraining_model(size[0], device="meta")
            if entry.endswith(".arm_in1k")
            else timm.create_model(entry, device="meta")
        )
        contents = Contents(to_official(model), [], {}, 0)
        assert [other for other, row in rows.items() if upstream.fits(contents, row)] == [entry]


def test_rows_say_what_they_must() -> None:
    for entry, row in TABLE.items():
        if row.where == "upstream":
            assert row.repository and (row.file or row.shapes) and row.revision, entry
            assert row.host == "hub" or row.file, entry
            assert (row.license or "") == timm.get_pretrained_cfg(entry).license.removeprefix("unknown"), entry


def test_addresses_have_the_licence_and_the_choice_of_their_repository(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """Of the Hub's repositories only: one called like a repository of GitHub is somebody else's."""
    row = TABLE["vim_tiny_patch16_224.in1k"]
    trained = finetuned("vim_tiny_patch16_224")
    contents = official_bytes(trained, model_ema=to_official(finetuned("vim_tiny_patch16_224")))
    for repository, license, choice in ((str(row.repository), "apache-2.0", "model"), (VMAMBA, "unknown", None)):
        hub.add(repository, {"x.pth": contents})
        cache = tmp_path / license
        reply = client.load("arm_zoo", f"hf://{repository}/x.pth", cache_dir=cache)
        assert (reply.get("digest") == digest(trained)) == (choice == "model"), reply
        [record] = [json.loads(path.read_text()) for path in cache.rglob("source.json")]
        assert (record["license"], record["choice"]) == (license, choice)


def test_an_address_is_fetched_where_upstream_is_off(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    hub.add(ARM, {"b_ft.pth": contents})
    arguments = {"cache_dir": tmp_path, "environment": {"ARM_ZOO_UPSTREAM": "0"}}
    assert client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", **arguments).get("digest") == digest(model)


def test_a_branch_that_moves_is_followed(
    hub: HubServer, client: Client, offline: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    """Another commit with the same file is no reason to fetch it; without a network what is there counts."""
    repository, newer = hub.add(ARM, {"b_ft.pth": contents}), finetuned(ENTRY)
    old = repository.refs["main"]
    arguments = {"cache_dir": tmp_path}
    client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", **arguments)
    client.load("arm_zoo", f"hf://{ARM}@{old}/b_ft.pth", **arguments)
    hub.requests.clear()
    repository.commit({"b_ft.pth": contents, "README.md": b"new"})
    assert client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", **arguments).get("digest") == digest(model)
    [request] = hub.requests
    assert "/revision/main" in request
    repository.commit({"b_ft.pth": official_bytes(newer)})
    assert offline.load("arm_zoo", f"hf://{ARM}/b_ft.pth", **arguments).get("digest") == digest(model)
    assert client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", **arguments).get("digest") == digest(newer)
    hub.requests.clear()
    assert client.load("arm_zoo", f"hf://{ARM}@{old}/b_ft.pth", **arguments).get("digest") == digest(model)
    assert hub.requests == []


def test_files_named_for_one_entry_do_not_take_each_others_place(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    other = finetuned(ENTRY)
    hub.add(ARM, {"a.pth": contents, "b.pth": official_bytes(other)})
    expected = {"a.pth": digest(model), "b.pth": digest(other)}
    for _ in range(2):
        hub.requests.clear()
        for name in expected:
            reply = client.load(
                "timm",
                ENTRY,
                table={ENTRY: ON_HUB},
                cache_dir=tmp_path,
                environment={"ARM_ZOO_ARM_FILE": name},
                **TIMM,
            )
            assert reply.get("digest") == expected[name], reply
    assert hub.requests == []


def test_files_that_another_commit_has_in_the_hubs_cache_stay(
    hub: HubServer, client: Client, contents: bytes, tmp_path: Path
) -> None:
    repository = hub.add(ARM, {"b_ft.pth": contents})
    code = "import huggingface_hub; file = huggingface_hub.hf_hub_download({!r}, 'b_ft.pth', cache_dir={!r})"
    client.load("run", code.format(ARM, str(tmp_path)), tmp_path)
    repository.commit({"b_ft.pth": contents, "README.md": b"new"})
    assert "digest" in client.load("arm_zoo", f"hf://{ARM}/b_ft.pth", cache_dir=tmp_path)
    assert [path.read_bytes() == contents for path in tmp_path.rglob("b_ft.pth")] == [True, True]


def test_a_hub_that_ignores_ranges_is_refused(hub: HubServer, client: Client, contents: bytes, tmp_path: Path) -> None:
    """Before the cache of parts holds the whole file many times."""
    hub.add(ARM, {"b_ft.pth": contents}, hub_server.sends_other_contents(contents))
    reply = client.load("timm", ENTRY, table={ENTRY: ON_HUB}, cache_dir=tmp_path, **TIMM)
    assert reply["own"] and "the Hub, or its mirror, ignores range requests" in reply["message"]


def test_advice_is_that_of_the_authors_place(hub: HubServer, client: Client, contents: bytes, tmp_path: Path) -> None:
    """A login at the Hub does not open GitHub, nor does our organisation or `hub publish` concern authors."""
    hub.release(VMAMBA, TAG, {FILE: contents}, hub_server.refuses(403))
    arguments = {"cache_dir": tmp_path, **TIMM}
    message = client.refused("timm", ENTRY, table={ENTRY: ON_GITHUB}, **arguments)
    assert "refuses access (HTTP 403); try again later; the environment variable ARM_ZOO_GITHUB_END" in message
    hub.repositories.pop(ARM, None)
    message = client.refused("timm", ENTRY, table={ENTRY: ON_HUB}, **arguments)
    assert "there is no such repository at" in message and "ARM_ZOO_HUB_ORG" not in message
    hub.add(ARM, {"b_ft.pth": contents}, lambda request, name: request.refuse(404, "EntryNotFound"))
    message = client.refused("timm", ENTRY, table={ENTRY: {**ON_HUB, "file": "b_ft.pth"}}, **arguments)
    assert "the repository has no such file; look at" in message and "publish" not in message


def test_weights_that_the_caller_names_take_the_authors_place(
    hub: HubServer, client: Client, contents: bytes, tmp_path: Path
) -> None:
    """No file of theirs is fetched then; without, the token that from_pretrained is given goes the whole way."""
    hub.add(ARM, {"b_ft.pth": contents}, hub_server.wants_token("hf_ada"))
    arguments = {"table": {ENTRY: ON_HUB}, "cache_dir": tmp_path, **NARROW}
    reply = client.load("arm_zoo", ENTRY, token="hf_ada", **arguments)
    assert "digest" in reply, reply
    own = finetuned(ENTRY)
    (tmp_path / "own.pth").write_bytes(official_bytes(own))
    hub.requests.clear()
    overlay = {"file": str(tmp_path / "own.pth")}
    reply = client.load("arm_zoo", ENTRY, **{**arguments, "cache_dir": tmp_path / "x"}, pretrained_cfg_overlay=overlay)
    assert reply.get("digest") == digest(own) and hub.requests == [], reply


def test_a_token_is_not_shown_to_the_store_that_the_hub_redirects_to(
    hub: HubServer, client: Client, model: nn.Module, contents: bytes, tmp_path: Path
) -> None:
    seen = []

    def listens(request: hub_server.Handler, name: str) -> bool:
        seen.append(request.headers.get("Authorization"))
        return False

    with running_hub() as store:
        store.add(ARM, {"b_ft.pth": contents}, listens)

        def redirects(request: hub_server.Handler, name: str) -> bool:
            sha256 = hashlib.sha256(contents).hexdigest()
            linked = {"X_Linked_Etag": f'"{sha256}"', "X_Linked_Size": str(len(contents)), "ETag": f'"{sha256}"'}
            commit = hub.repositories[ARM].refs["main"]
            request.answer(302, Location=f"{store.endpoint}{request.path}", X_Repo_Commit=commit, **linked)
            return True

        hub.add(ARM, {"b_ft.pth": contents}, redirects)
        store.repositories[ARM].commits[hub.repositories[ARM].refs["main"]] = {"b_ft.pth": contents}
        for row in ({**ON_HUB, "file": "b_ft.pth"}, ON_HUB):
            cache = tmp_path / str(len(row))
            reply = client.load("arm_zoo", ENTRY, table={ENTRY: row}, cache_dir=cache, token="hf_ada", **NARROW)
            assert reply.get("digest") == digest(model), reply
    assert seen and set(seen) == {None}
