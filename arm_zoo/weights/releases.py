"""Reads parts of files of GitHub releases, or fetches whole ones, from GitHub's own hosts and no others.

GitHub redirects a request to the server that stores the file. The environment variable ARM_ZOO_GITHUB_ENDPOINT
names a mirror, as HF_ENDPOINT does for the Hub. Offline mode and proxies are those of huggingface_hub, whose HTTP
client this uses; it sends no token.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import IncompleteRead
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from fsspec.spec import AbstractBufferedFile

from arm_zoo.files import DownloadError

_logger = logging.getLogger(__name__)
_GITHUB = "https://github.com"
_STORES = ("objects.githubusercontent.com", "release-assets.githubusercontent.com")
_MOST_REDIRECTS = 4
_TRIES = 3
# Errors of a connection that broke off, by name: version 1 of huggingface_hub has httpx, version 2 httpx2.
_BROKEN_OFF = ("ConnectError", "ConnectTimeout", "IncompleteRead", "ReadError", "ReadTimeout", "RemoteProtocolError")
T = TypeVar("T")


def endpoint() -> str:
    """The server to ask for releases: GitHub or its mirror."""
    return (os.environ.get("ARM_ZOO_GITHUB_ENDPOINT") or _GITHUB).rstrip("/")


def release_url(repository: str, tag: str, file: str) -> str:
    """The address at GitHub of a file of a release, even if a mirror will be asked for it."""
    return f"{_GITHUB}/{repository}/releases/download/{quote(tag, safe='')}/{quote(file, safe='')}"


def without_login(url: str) -> str:
    """An address without any user name and password, to be shown."""
    return re.sub(r"^([a-z][a-z0-9+.-]*://)?[^/]*@", r"\1", url)


def again_if_cut(call: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """The result of a call, which is repeated when the connection breaks off, until three calls made no progress."""
    idle, before = 0, progress()
    while True:
        try:
            return call()
        except Exception as error:
            idle, before = idle + 1 if progress() == before else 0, progress()
            if idle == _TRIES or type(error).__name__ not in _BROKEN_OFF:
                raise
            _logger.info("the connection broke off (%s), trying again", error)
            time.sleep(1)


class ReleaseFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file of a release, of which only the blocks that are asked for are read and kept."""

    def __init__(self, url: str) -> None:
        with _answer(url, 0, 1) as (_, size):
            super().__init__(None, url, block_size=2**16, cache_type="blockcache", size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return again_if_cut(lambda: _read_range(self.path, start, min(end, self.size)))  # the last block is short


def download_release(url: str, target: Path, most_bytes: int) -> None:
    """Fetch a file of a release; whenever the connection breaks off, go on where it stopped."""
    from huggingface_hub.utils import tqdm

    first = None  # size and ETag of the first answer

    def fetch_the_rest() -> None:
        nonlocal first
        with _answer(url, file.tell()) as (response, size):
            told = (size, response.headers.get("ETag"))
            first = first or told
            if told != first:
                raise DownloadError(f"{url} changed while it was fetched; load again")
            if size > most_bytes:
                raise DownloadError(f"{url} has {size:,} bytes; at most {most_bytes:,} are fetched")
            bar.total = size
            for chunk in response.iter_raw():
                if file.tell() + len(chunk) > size:
                    raise DownloadError(f"{url}: more came than the {size:,} bytes that were announced; load again")
                bar.update(file.write(chunk))
            if file.tell() < size:
                raise IncompleteRead(b"", size - file.tell())

    with open(target, "wb") as file, tqdm(desc=target.name, unit="B", unit_scale=True) as bar:
        again_if_cut(fetch_the_rest, file.tell)


def _read_range(url: str, start: int, end: int) -> bytes:
    """The bytes of a file from `start` up to but not including `end`."""
    contents = b""
    with _answer(url, start, end) as (response, _):
        for chunk in response.iter_raw():
            contents += chunk
            if len(contents) > end - start:
                raise DownloadError(f"{url}: more came than the {end - start} bytes that were asked for")
    if len(contents) < end - start:
        raise IncompleteRead(contents, end - start - len(contents))
    return contents


@contextmanager
def _answer(url: str, start: int, end: int | None = None) -> Iterator[tuple[Any, int]]:
    """The answer to a request for the bytes from `start` up to but not including `end`, and the whole file's size.

    If `end` is None, all bytes from `start` on are requested.
    """
    from huggingface_hub import constants, get_session

    last = "" if end is None else end - 1
    settings: dict[str, Any] = {
        "headers": {"Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"},
        "follow_redirects": False,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
    }
    url = url.replace(_GITHUB, endpoint(), 1)
    for _ in range(_MOST_REDIRECTS + 1):
        with get_session().stream("GET", url, **settings) as response:
            if not response.has_redirect_location:
                response.raise_for_status()
                yield response, _whole_size(response, start)
                return
            url = _allowed(urljoin(url, response.headers["Location"]))
    raise DownloadError(f"{without_login(endpoint())} redirects more than {_MOST_REDIRECTS} times")


def _whole_size(response: Any, start: int) -> int:
    """The size of the whole file, told by an answer that must begin at byte `start`."""
    told = response.headers.get("Content-Range", "")
    part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", told)
    if part is None:
        said = f"{response.url.host} ignores range requests (HTTP {response.status_code})"
        raise DownloadError(f"{said}; ARM_ZOO_GITHUB_ENDPOINT names a mirror that takes them")
    if int(part[1]) != start:
        raise DownloadError(f"{response.url.host} sends {told!r} where the bytes from {start} on were asked for")
    return int(part[2])


def _allowed(url: str) -> str:
    """The address, if it is that of a server that may send files of releases; else DownloadError."""
    own, wanted = urlsplit(endpoint()), urlsplit(url)
    host = without_login(own.netloc)
    allowed = [(own.scheme, own.netloc), (own.scheme, host), *(("https", store) for store in _STORES)]
    if (wanted.scheme, wanted.netloc) not in allowed:
        where = f"{wanted.scheme}://{wanted.netloc}"
        raise DownloadError(
            f"refused: {host} redirects to {where}; allowed are {own.scheme}://{host} and "
            f"{', '.join(_STORES)} over https (ARM_ZOO_GITHUB_ENDPOINT names a mirror)"
        )
    return url
