"""The two sets of tensors that the authors' code computed, for tests that run on the small one, the whole one or both.

The small set, `tests/golden`, is part of the checkout; the whole one lies beside it. A test that asks for the fixture
`golden` gets the whole set, and with one of these decorators the small set too.
"""

from collections.abc import Sequence

import pytest

in_both_sets = pytest.mark.parametrize("golden", ["small", "whole"], indirect=True)


def golden_cases(small: Sequence[str], whole: Sequence[str]) -> pytest.MarkDecorator:
    """Run a test with the arguments `golden` and `case` on these cases of the small and of the whole set."""
    cases = [*(("small", case) for case in small), *(("whole", case) for case in whole)]
    return pytest.mark.parametrize("golden, case", cases, indirect=["golden"], scope="module")
