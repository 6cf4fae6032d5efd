"""Conversion, publishing, checking and export of weights: `python -m hub`."""

import sys

# While `python -m` looks for a module, "-m" is the first argument.
if sys.argv[0] == "-m" and (module := sys.orig_argv[-len(sys.argv)]).startswith("hub.") and module != "hub.__main__":
    raise SystemExit(f"{module} is no program; python -m hub lists the commands")
