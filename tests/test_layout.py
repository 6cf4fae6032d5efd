"""The rules that keep the packages apart, and what the wheel carries."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

PROGRAMS = ("hub", "recipes", "eval")
PACKAGES = ("arm_zoo", *PROGRAMS)
# The library's modules from the ground up, each by the longest path that leads to it. A module imports from the lines
# below its own only, and from its own folder, so that each can be read without those above it.
RANKS = (
    ("files", "heads/attentive", "heads/segmentation", "images/jpeg", "messages", "ops/layout", "tables"),
    ("command_line", "heads", "images", "ops", "weights/reading", "weights/releases"),
    ("layers", "pretraining/targets", "weights/hosted", "weights/tensor_names"),
    ("weights",),
    ("base",),
    ("models/_builder",),
    ("models/_sequence",),
    ("models",),
    ("pretraining",),
    ("identify", "see"),
    ("loading",),
    ("__init__",),
    ("__main__", "onnx"),
)
PACKAGE_RANKS = {  # the same of the other packages
    "arm_zoo": RANKS,
    "hub": (
        ("doctor", "folders"),
        ("catalog", "export"),
        ("card",),
        ("convert",),
        ("check",),
        ("publish",),
        ("upstream",),
        ("__init__", "__main__"),
    ),
    "recipes": (
        ("data/splits", "parsing", "signals"),
        ("data/config",),
        ("config", "errors"),
        ("data",),
        ("first_run", "probing", "training"),
        ("command_line",),
        ("objectives",),
        ("training/setup",),
        ("cost", "digit_scenes", "dvae", "finetune", "kill_test", "pretrain", "probe", "segment"),
        ("ablations", "loader_speed", "quickstart"),
        ("ablate",),
        ("__init__", "__main__"),
    ),
    "eval": (
        ("command_line", "scoring/sets"),
        ("tables",),
        ("scoring",),
        ("board", "speed"),
        ("leaderboard", "scan", "segmentation", "throughput", "verify"),
        ("__init__", "__main__"),
    ),
}
# timm's own model files take helpers from these two; everything else is imported by its public name.
TIMM_PRIVATE = ("timm.models._features.", "timm.models._input.")


def imported(tree: ast.AST, into_functions: bool = True, package: str = "") -> Iterator[str]:
    """Dotted names of the modules imported in the tree, optionally not those imported when a function is called.

    `package` is the dotted name of the package around the tree, for imports that are relative to it.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif into_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(node, into_functions, package)


@cache
def imports_by_file(package: str, into_functions: bool = True) -> dict[str, list[str]]:
    """Path within the package -> dotted names that the file imports."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        around = ".".join(path.relative_to(ROOT).parent.parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path.relative_to(ROOT / package).as_posix()] = list(imported(tree, into_functions, around))
    return found


def top_levels(package: str, into_functions: bool = True) -> dict[str, set[str]]:
    """Path within the package -> packages that the file imports from."""
    return {
        file: {name.partition(".")[0] for name in names}
        for file, names in imports_by_file(package, into_functions).items()
    }


def programs(package: str) -> list[Path]:
    """The files that are started by `python -m`, relative to the repository's top."""
    files = (path for path in (ROOT / package).rglob("*.py") if 'if __name__ == "__main__"' in path.read_text())
    return sorted(file.relative_to(ROOT) for file in files)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_exists(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()


def test_library_stands_alone() -> None:
    for file, tops in top_levels("arm_zoo").items():
        assert not tops & {*PROGRAMS, "accelerate"}, file


def test_library_reaches_the_hub_only_on_demand() -> None:
    for file, tops in top_levels("arm_zoo", into_functions=False).items():
        assert "huggingface_hub" not in tops, file


def rank(module: str, package: str = "arm_zoo") -> tuple[int, str] | None:
    """Line of the ranks and the path there that leads to a module, a path such as ops/fused; None without a rank."""
    ranks = PACKAGE_RANKS[package]
    found = [(i, path) for i, paths in enumerate(ranks) for path in paths if f"{module}/".startswith(f"{path}/")]
    return max(found, key=lambda entry: len(entry[1]), default=None)


def own_imports(package: str) -> dict[str, set[str]]:
    """Modules of a package, as paths without ending -> the modules of the package that they import."""
    modules = {file: file.removesuffix(".py").removesuffix("/__init__") for file in imports_by_file(package)}

    def module_of(name: str) -> str:
        """A dotted name is that of a module, or of something within one."""
        parts = name.split(".")[1:]
        paths = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((path for path in paths if path in modules.values()), "__init__")

    return {
        modules[file]: {module_of(name) for name in names if name.partition(".")[0] == package}
        for file, names in imports_by_file(package).items()
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_rank(package: str) -> None:
    modules, ranks = own_imports(package).keys(), PACKAGE_RANKS[package]
    assert [module for module in modules if rank(module, package) is None] == []
    used = {rank(module, package) for module in modules}
    assert [entry for i, paths in enumerate(ranks) for path in paths if (entry := (i, path)) not in used] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_downwards(package: str) -> None:
    imports = own_imports(package)
    for module, others in imports.items():
        for other in others:
            own, below = rank(module, package), rank(other, package)
            assert own is not None and below is not None, (module, other)
            assert below[0] < own[0] or below == own, f"{package}: {module} imports {other}"
    TopologicalSorter(imports).prepare()  # raises if modules of one folder import each other


def test_the_longest_path_gives_the_rank() -> None:
    assert rank("ops") == rank("ops/fused") == rank("ops/deeper/module") == (1, "ops")
    assert rank("ops/layout") == (0, "ops/layout")
    assert rank("operations") is rank("new") is None


@pytest.mark.parametrize("package", PACKAGES)
def test_timm_is_used_by_its_public_names(package: str) -> None:
    for file, names in imports_by_file(package).items():
        private = [name for name in names if name.startswith("timm.") and "._" in name]
        assert not [name for name in private if not name.startswith(TIMM_PRIVATE)], file


@pytest.mark.parametrize("package", PROGRAMS)
def test_programs_use_the_library_by_its_public_names(package: str) -> None:
    for file, names in imports_by_file(package).items():
        assert not [name for name in names if name.startswith("arm_zoo.") and "._" in name], file


@pytest.mark.parametrize("package", PROGRAMS)
def test_programs_meet_in_files_only(package: str) -> None:
    for file, tops in top_levels(package).items():
        assert not tops & (set(PROGRAMS) - {package}), file


def test_imports_inside_functions_are_told_apart() -> None:
    tree = ast.parse("import a\nif True:\n    from b.c import d\ndef f():\n    import e\n")
    assert list(imported(tree)) == ["a", "b.c.d", "e"]
    assert list(imported(tree, into_functions=False)) == ["a", "b.c.d"]


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from . import a\nfrom .b import c\nfrom .. import d\nfrom ..e.f import g\n")
    assert list(imported(tree, package="top.inner")) == ["top.inner.a", "top.inner.b.c", "top.d", "top.e.f.g"]


def test_wheel_ships_the_library_only(tmp_path: Path) -> None:
    # Built from a copy: setuptools leaves build folders behind, and packs what it finds in old ones.
    source, out = tmp_path / "source", tmp_path / "out"
    ignore = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [wheel] = out.glob("arm_zoo-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path.relative_to(ROOT) for path in (ROOT / "arm_zoo").rglob("*") if path.is_file())
    assert packed == {str(file) for file in files if "__pycache__" not in file.parts and file.suffix != ".md"}


def called_in(function: ast.FunctionDef) -> set[str]:
    """Names of what a function calls, without their modules; "assert" too if it has an assertion."""
    nodes = list(ast.walk(function))
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    return names | {"assert" for node in nodes if isinstance(node, ast.Assert)}


def test_every_test_asserts_something() -> None:
    """It can fail on purpose: by an assertion, an expected error, or a helper that has one."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    called = [(function.name, called_in(function)) for function in functions]
    # the last two are of torch.testing, and processes of their own, whose failure fails the test
    helpers, more = {"assert", "raises", "warns", "assert_close", "spawn"}, {""}
    while more:
        more = {name for name, names in called if names & helpers and not name.startswith("test_")} - helpers
        helpers |= more
    assert [name for name, names in called if name.startswith("test_") and not names & helpers] == []


def test_no_paths_of_one_machine() -> None:
    folders = "|".join(("home", "root", "work", "tmp", "mnt", "Users"))
    absolute = re.compile(rf"(?<![\w./-])/(?:{folders})\b")
    texts = [
        path
        for package in (*PACKAGES, "tests", ".ci", "findings")
        for path in (ROOT / package).rglob("*")
        if path.is_file()
    ]
    texts += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml") or path.name == "Makefile"]
    for path in texts:
        if "__pycache__" not in path.parts:
            found = absolute.search(path.read_text(errors="ignore"))
            assert found is None, f"{path.relative_to(ROOT)}: {found}"


def test_the_readme_names_what_is_there() -> None:
    """What its table for contributors names in a file is in one of the files of that row."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Contributing")[2].partition("\n## ")[0]
    rows = [set(re.findall(r"`([^`]+)`", line)) for line in table.splitlines() if line.startswith("|")]
    found = 0
    for named in rows:
        files = {name for name in named if name.endswith((".py", ".csv")) and "NAME" not in name}
        paths = [
            path for name in files for package in PACKAGES for path in ROOT.glob(f"{package}/**/{Path(name).name}")
        ]
        assert all(any(path.as_posix().endswith(f"/{name}") for path in paths) for name in files), files
        text = " ".join(path.read_text(encoding="utf-8") for path in paths)
        names = {name for name in named if name.isidentifier()}
        assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set(), sorted(files)
        found += len(names)
    assert found > 10


@pytest.mark.parametrize("file", [file for package in PACKAGES for file in programs(package)], ids=str)
def test_help_names_the_command_to_type(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = ".".join(file.with_suffix("").parts)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and printed.startswith(f"usage: python -m {module.removesuffix('.__main__')} ")
    if module == "recipes.kill_test":
        assert "--config FILE [key=value ...]" in printed and "are handed on to the recipe" in printed


@pytest.mark.parametrize("package, extra", [("recipes", "train"), ("eval", "eval")])
def test_a_program_without_its_requirements_tells_what_to_type(
    package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, find = importlib.import_module(package), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    told = re.escape(f"rich is not installed; type `pip install -e '.[{extra}]'` at the top of the checkout")
    with pytest.raises(ModuleNotFoundError, match=told):
        importlib.reload(program)
