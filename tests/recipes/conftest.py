"""What the tests of the recipes share."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def any_device() -> Iterator[None]:
    """Let the runs of a test choose their device, which accelerate keeps from the first run of a process on.

    Afterwards, too: what the tests of a module share is made before this is asked for.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
