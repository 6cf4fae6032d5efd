"""Addresses of GitHub's releases, and the hosts that files of them may come from."""

import pytest

from arm_zoo import DownloadError
from arm_zoo.weights.hosted import TABLE
from arm_zoo.weights.releases import _allowed, release_url


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
