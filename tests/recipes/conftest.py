"""What the tests of the recipes share."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def any_device() -> None:
    """Let the runs of a test choose their device, which accelerate keeps from the first run of a process on."""
    AcceleratorState._reset_state(reset_partial_state=True)
