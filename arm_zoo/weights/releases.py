"""Files of GitHub releases, read in part or fetched whole, from GitHub's own hosts and no others.

GitHub answers with a redirect to the store where the file lies. The environment variable ARM_ZOO_GITHUB_ENDPOINT
names a mirror, as HF_ENDPOINT does for the Hub. Offline mode and proxies are those of huggingface_hub, whose HTTP
client this uses; it sends no token.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from fsspec.spec import AbstractBufferedFile

from arm_zoo.files import DownloadError

_logger = logging.getLogger(__name__)
_ENDPOINT = "https://github.com"
_STORES = ("objects.githubusercontent.com", "release-assets.githubusercontent.com")
_MOST_REDIRECTS = 4
_TRIES = 3
# Errors of a connection that broke off, by name: version 1 of huggingface_hub has httpx, version 2 httpx2.
_BROKEN_OFF = ("ConnectError", "ReadError", "ReadTimeout", "RemoteProtocolError")


def endpoint() -> str:
    """Where releases are asked for."""
    return (os.environ.get("ARM_ZOO_GITHUB_ENDPOINT") or _ENDPOINT).rstrip("/")


def release_url(repository: str, tag: str, file: str) -> str:
    """The address of a file of a release."""
    return f"{endpoint()}/{repository}/releases/download/{quote(tag, safe='')}/{quote(file, safe='')}"


class ReleaseFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file of a release, opened for reading in a few places; blocks of it are kept."""

    def __init__(self, url: str) -> None:
        with _answer(url, 0, 1) as response:
            size = _whole_size(response)
        super().__init__(None, url, block_size=2**16, cache_type="blockcache", size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)  # the last block is not a whole one
        for _ in range(_TRIES - 1):
            try:
                return _read_range(self.path, start, end)
            except Exception as error:
                _say_or_raise(error)
        return _read_range(self.path, start, end)


def download_release(url: str, target: Path, most_bytes: int) -> None:
    """Fetch a file of a release, going on where it was whenever the connection breaks off."""
    from huggingface_hub.utils import tqdm

    idle, first = 0, None  # tries in a row without a byte; size and name of the contents that the first answer told
    with open(target, "wb") as file, tqdm(desc=target.name, unit="B", unit_scale=True) as bar:
        while True:
            begin = file.tell()
            try:
                with _answer(url, begin) as response:
                    told = (_whole_size(response), response.headers.get("ETag"))
                    first = first or told
                    if told != first:
                        raise DownloadError(f"{url} changed while it was fetched; load again")
                    if first[0] > most_bytes:
                        raise DownloadError(f"{url} has {first[0]:,} bytes; at most {most_bytes:,} are fetched")
                    bar.total = first[0]
                    for chunk in response.iter_raw():
                        bar.update(file.write(chunk))
                        if file.tell() > first[0]:
                            break
                if file.tell() != first[0]:
                    raise DownloadError(f"{url}: {file.tell():,} bytes came where {first[0]:,} were told; load again")
                return
            except Exception as error:
                idle = 0 if file.tell() > begin else idle + 1
                _say_or_raise(error, give_up=idle == _TRIES)


def _say_or_raise(error: Exception, give_up: bool = False) -> None:
    if give_up or type(error).__name__ not in _BROKEN_OFF:
        raise error
    _logger.info("the connection broke off (%s), trying again", error)
    time.sleep(1)


def _read_range(url: str, start: int, end: int) -> bytes:
    with _answer(url, start, end) as response:
        contents = b"".join(response.iter_raw())
    if len(contents) != end - start:
        raise DownloadError(f"{url}: {len(contents)} bytes came where {end - start} were asked for")
    return contents


def _whole_size(response: Any) -> int:
    """Size of the file that an answer has a part of."""
    told = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not told.isdecimal():
        raise DownloadError(f"{response.url.host} sends no part of a file (HTTP {response.status_code})")
    return int(told)


@contextmanager
def _answer(url: str, start: int, end: int | None = None) -> Iterator[Any]:
    """The answer to a request for the bytes from `start` up to but not including `end`, None for all that follow."""
    from huggingface_hub import constants, get_session

    last = "" if end is None else end - 1
    settings: dict[str, Any] = {
        "headers": {"Range": f"bytes={start}-{last}", "Accept-Encoding": "identity"},
        "follow_redirects": False,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
    }
    for _ in range(_MOST_REDIRECTS + 1):
        with get_session().stream("GET", url, **settings) as response:
            if not response.has_redirect_location:
                response.raise_for_status()
                yield response
                return
            url = _allowed(urljoin(url, response.headers["Location"]))
    raise DownloadError(f"{endpoint()} redirects without end; {_MOST_REDIRECTS} redirects are followed")


def _allowed(url: str) -> str:
    """The address, if files of releases may be fetched from there."""
    own, wanted = urlsplit(endpoint()), urlsplit(url)
    if wanted[:2] != own[:2] and (wanted.scheme, wanted.netloc) not in [("https", store) for store in _STORES]:
        where = f"{wanted.scheme}://{wanted.netloc}"
        raise DownloadError(
            f"refused: {own.netloc} redirects to {where}; allowed are {own.scheme}://{own.netloc} and "
            f"{', '.join(_STORES)} over https (ARM_ZOO_GITHUB_ENDPOINT names a mirror)"
        )
    return url
