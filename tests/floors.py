"""The oldest version of every requirement that pyproject.toml declares, as constraints for pip: `make test-oldest`."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def floors() -> list[str]:
    """`NAME==VERSION` for each `NAME>=VERSION` of the package and its extras, each once, with the marker that it had.

    Raises:
        ValueError: for a requirement without a lower bound, or one with two different bounds.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    oldest: dict[str, str] = {}
    for requirement in wanted:
        if requirement.startswith(f"{project['name']}["):  # an extra that includes others
            continue
        bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+(?:; .+)?)", requirement)
        if bound is None:
            raise ValueError(f"{requirement!r} in {PYPROJECT.name} has no lower bound; write it as NAME>=VERSION")
        name, version = bound.groups()
        if oldest.setdefault(name, version) != version:
            raise ValueError(f"{name} has the lower bounds {oldest[name]} and {version} in {PYPROJECT.name}; use one")
    return [f"{name}=={version}" for name, version in oldest.items()]


if __name__ == "__main__":
    print("\n".join(floors()))
