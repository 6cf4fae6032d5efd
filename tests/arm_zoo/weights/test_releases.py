"""Addresses of GitHub's releases, the hosts that files of them may come from, and answers that are not believed."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from arm_zoo import DownloadError
from arm_zoo.weights.hosted import TABLE
from arm_zoo.weights.releases import _allowed, download_release, release_url, without_login
from tests.helpers.hub_server import Fault, Handler, HubServer, running_hub

CONTENTS = bytes(range(256)) * 40
REPOSITORY, TAG, FILE = "ada/models", "v1", "x.pth"


@pytest.fixture(autouse=True)
def no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARM_ZOO_GITHUB_ENDPOINT", raising=False)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the authors' README has it, the tag's # written as %23; so it is on record, whatever mirror is asked."""
    row = TABLE["vmamba_base_s2l15.in1k"]
    path = "/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"
    assert release_url(str(row.repository), row.revision, str(row.file)) == f"https://github.com{path}"
    monkeypatch.setenv("ARM_ZOO_GITHUB_ENDPOINT", "https://mirror.example/github/")
    assert release_url(str(row.repository), row.revision, str(row.file)) == f"https://github.com{path}"


@pytest.mark.parametrize(
    "url, allowed",
    [
        ("https://github.com/MzeroMiko/VMamba/x", True),
        ("https://release-assets.githubusercontent.com/github-production-release-asset/1?sp=r&sig=x", True),
        ("https://objects.githubusercontent.com/x", True),
        ("http://github.com/x", False),
        ("http://objects.githubusercontent.com/x", False),
        ("https://raw.githubusercontent.com/x", False),
        ("https://objects.githubusercontent.com.evil.example/x", False),
        ("https://evil.example/objects.githubusercontent.com", False),
        ("https://objects.githubusercontent.com@evil.example/x", False),
        ("https://github.com:444/x", False),
        ("ftp://github.com/x", False),
        ("/etc/passwd", False),
    ],
)
def test_hosts(url: str, allowed: bool) -> None:
    if allowed:
        assert _allowed(url) == url
    else:
        with pytest.raises(DownloadError, match=r"^refused: github\.com redirects to .*; allowed are https://github"):
            _allowed(url)


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://ada:secret@mirror.example/x", "https://mirror.example/x"),
        ("ada:secret@proxy.example:3128", "proxy.example:3128"),
        ("https://mirror.example/a@b", "https://mirror.example/a@b"),
        ("1", "1"),
    ],
)
def test_logins_are_not_shown(url: str, shown: str) -> None:
    assert without_login(url) == shown


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with running_hub() as server:
        monkeypatch.setenv("ARM_ZOO_GITHUB_ENDPOINT", server.endpoint)
        yield server


def answers(body: int, begin: int | None = None, cut: int | None = None) -> Fault:
    """A 206 with at most `body` bytes, from `begin` on in place of the first one asked for; breaks off after `cut`."""

    def fault(request: Handler, name: str) -> bool:
        if not request.path.startswith("/store/"):
            return False
        asked = re.fullmatch(r"bytes=(\d+)-\d*", request.headers["Range"])
        assert asked is not None
        start = int(asked[1]) if begin is None else begin
        part = CONTENTS[start : start + body]
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(CONTENTS)}")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        request.wfile.write(part[:cut])
        request.close_connection = True
        return True

    return fault


def test_short_answers_are_not_the_whole_file(github: HubServer, tmp_path: Path) -> None:
    """What is missing is asked for again."""
    github.release(REPOSITORY, TAG, {FILE: CONTENTS}, answers(body=1000))
    download_release(release_url(REPOSITORY, TAG, FILE), tmp_path / FILE, 2**30)
    assert (tmp_path / FILE).read_bytes() == CONTENTS


def test_parts_that_nobody_asked_for_are_refused(github: HubServer, tmp_path: Path) -> None:
    github.release(REPOSITORY, TAG, {FILE: CONTENTS}, answers(body=len(CONTENTS), begin=0, cut=5000))
    with pytest.raises(DownloadError, match=r"sends 'bytes 0-10239/10240' where the bytes from 5000 on were asked"):
        download_release(release_url(REPOSITORY, TAG, FILE), tmp_path / FILE, 2**30)


def test_no_more_is_written_than_was_announced(github: HubServer, tmp_path: Path) -> None:
    def fault(request: Handler, name: str) -> bool:
        if request.path.startswith("/store/"):
            request.answer(206, CONTENTS, Content_Range="bytes 0-99/100")
        return request.path.startswith("/store/")

    github.release(REPOSITORY, TAG, {FILE: CONTENTS}, fault)
    with pytest.raises(DownloadError, match="more came than the 100 bytes that were announced"):
        download_release(release_url(REPOSITORY, TAG, FILE), tmp_path / FILE, 2**30)
    assert (tmp_path / FILE).stat().st_size <= 100


def test_a_mirror_may_want_a_login(github: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is sent to the mirror, but not to the address that it redirects to."""
    seen = []

    def fault(request: Handler, name: str) -> bool:
        seen.append(request.headers.get("Authorization"))
        return False

    github.release(REPOSITORY, TAG, {FILE: CONTENTS}, fault)
    monkeypatch.setenv("ARM_ZOO_GITHUB_ENDPOINT", github.endpoint.replace("//", "//ada:secret@"))
    download_release(release_url(REPOSITORY, TAG, FILE), tmp_path / FILE, 2**30)
    assert seen == ["Basic YWRhOnNlY3JldA==", None] and (tmp_path / FILE).read_bytes() == CONTENTS
