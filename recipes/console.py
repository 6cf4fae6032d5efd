"""Where the recipes print what happens: paths and names as they are, not as rich's markup."""

from rich.console import Console


def plain_console(quiet: bool = False) -> Console:
    """A console on stderr that leaves `[x]` and `:name:` in what a person typed alone."""
    return Console(stderr=True, quiet=quiet, markup=False, emoji=False)
