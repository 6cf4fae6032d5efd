"""Outputs that cannot be written to."""

import os
from pathlib import Path
from typing import TextIO

import pytest

needs_full_disk = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="only Linux has a disk that is always full"
)


def output_without_reader() -> TextIO:
    """A pipe whose reader has gone, as after `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")
