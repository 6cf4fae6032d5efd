"""The tests; they import each other and their helpers as `tests.NAME`, from whatever folder they lie in."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
