"""What the documents tell to type, and where they point."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest

from recipes.command_line import RECIPES, read_command
from tests import ROOT

FOLDERS = (".", "arm_zoo", "arm_zoo/ops", "eval", "hub", "recipes")
DOCUMENTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def lines_to_type(text: str) -> Iterator[list[str]]:
    """The lines of each block for the shell, and each command within the sentences."""
    for language, block in BLOCK.findall(text):
        if language == "bash":
            yield block.replace("\\\n", " ").splitlines()
    for command in re.findall(r"`([^`]*-m recipes\.[^`]*)`", BLOCK.sub("", text)):
        yield [re.sub(r"\$\(\((\d+)\*N\)\)", r"\1", " ".join(command.split()))]  # N, the number of GPUs, is 1


def trainings(text: str) -> Iterator[tuple[str, list[str]]]:
    """The recipe and the arguments of each command that trains, with the variables that its block sets."""
    for lines in lines_to_type(text):
        variables: dict[str, str] = {}
        for line in lines:
            words = shlex.split(Template(line).safe_substitute(variables), comments=True)
            while words and re.match(r"\w+=", words[0]):
                name, _, variables[name] = words.pop(0).partition("=")
            for recipe in RECIPES:
                if (program := f"recipes.{recipe}") in words:
                    arguments = words[words.index(program) + 1 :]
                    yield recipe, [word for word in arguments if word != "..."]  # what a reader fills in


def documented() -> Iterator[tuple[str, list[str]]]:
    for path in DOCUMENTS:
        yield from trainings(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.glob("recipes/configs/*.yaml")):  # each begins with its own command
        yield from trainings(f"```bash\n{path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}\n```")


def test_the_documents_trainings_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, settings and files exist, and the settings go together; images and weights need not be there."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for label in ("cat", "dog"):  # settings are fitted to the number of images
        (tmp_path / "my images" / label).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "my images" / label / f"{number}.jpg").touch()
    monkeypatch.chdir(tmp_path)
    found = [*documented()]
    for recipe, arguments in found:
        with pytest.raises(SystemExit) as ended:
            read_command(recipe, [*arguments, "--print-config"])
        assert not ended.value.code, f"python -m recipes.{recipe} {shlex.join(arguments)}"
    assert len(found) > 60


def anchors(path: Path) -> set[str]:
    """The parts of a document that a link may name, as GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documents_links_lead_somewhere() -> None:
    found = 0
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text(encoding="utf-8"))):
            if link.startswith(("https://", "http://")):
                continue
            name, _, part = link.partition("#")
            to = path.parent / name if name else path
            assert to.exists(), f"{path}: {link}"
            assert not part or part in anchors(to), f"{path}: {link}"
            found += 1
    assert found > 40
