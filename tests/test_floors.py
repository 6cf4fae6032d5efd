"""The constraints of `make test-oldest`."""

from tests.floors import floors


def test_every_requirement_has_an_oldest_version() -> None:
    """Also one of some platforms only, which keeps its marker."""
    constraints = floors()
    assert "torch==2.8" in constraints
    [torchcodec] = [line for line in constraints if line.startswith("torchcodec==")]
    assert "; sys_platform == 'linux'" in torchcodec
