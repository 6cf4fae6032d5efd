"""The rules that keep the packages apart, and what the wheel carries."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("hub", "recipes", "eval")
PACKAGES = ("arm_zoo", *PROGRAMS)
# Inside the library a module imports from lower ranks only, so that each can be read without those above it.
RANKS = {"scan": 0, "images": 1, "order": 0, "files": 0, "weights": 1, "hosted": 1, "mixer": 1, "arm": 2}
RANKS |= {"pretrain": 3, "variant": 4, "loading": 5}
# timm's own model files take helpers from these two; everything else is imported by its public name.
TIMM_PRIVATE = ("timm.models._features.", "timm.models._input.")


def imported(tree: ast.AST, into_functions: bool = True) -> Iterator[str]:
    """Dotted names of the modules imported in the tree, optionally not those imported when a function is called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:  # relative imports stay inside their package
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif into_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(node, into_functions)


def imports_by_file(package: str, into_functions: bool = True) -> dict[str, list[str]]:
    """Path within the package -> dotted names that the file imports."""
    folder = ROOT / package
    return {
        path.relative_to(folder).as_posix(): list(imported(ast.parse(path.read_text()), into_functions))
        for path in folder.rglob("*.py")
    }


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


def test_library_modules_import_downwards() -> None:
    for file, names in imports_by_file("arm_zoo").items():
        own = file.partition("/")[0].removesuffix(".py")
        for name in names:
            top, other, *_ = [*name.split("."), ""]
            if top == "arm_zoo" and other != own and {own, other} <= RANKS.keys():
                assert RANKS[other] < RANKS[own], f"{file} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_timm_is_used_by_its_public_names(package: str) -> None:
    for file, names in imports_by_file(package).items():
        private = [name for name in names if name.startswith("timm.") and "._" in name]
        assert not [name for name in private if not name.startswith(TIMM_PRIVATE)], file


@pytest.mark.parametrize("package", PROGRAMS)
def test_programs_meet_in_files_only(package: str) -> None:
    for file, tops in top_levels(package).items():
        assert not tops & (set(PROGRAMS) - {package}), file


def test_imports_inside_functions_are_told_apart() -> None:
    tree = ast.parse("import a\nif True:\n    from b.c import d\ndef f():\n    import e\n")
    assert list(imported(tree)) == ["a", "b.c.d", "e"]
    assert list(imported(tree, into_functions=False)) == ["a", "b.c.d"]


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
    kinds = ("*.py", "bundled/*.safetensors")
    shipped = {str(path.relative_to(ROOT)) for kind in kinds for path in (ROOT / "arm_zoo").rglob(kind)}
    assert packed >= shipped | {"arm_zoo/py.typed"}
    assert all(name.startswith("arm_zoo/") for name in packed)


def test_no_paths_of_one_machine() -> None:
    folders = "|".join(("home", "root", "work", "tmp", "mnt", "Users"))
    absolute = re.compile(rf"(?<![\w./-])/(?:{folders})\b")
    texts = [path for package in (*PACKAGES, "tests", ".ci") for path in (ROOT / package).rglob("*") if path.is_file()]
    texts += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml") or path.name == "Makefile"]
    for path in texts:
        if "__pycache__" not in path.parts:
            found = absolute.search(path.read_text(errors="ignore"))
            assert found is None, f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize("file", [file for package in PACKAGES for file in programs(package)], ids=str)
def test_help_names_the_command_to_type(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = ".".join(file.with_suffix("").parts)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and printed.startswith(f"usage: python -m {module.removesuffix('.__main__')} ")
    if module == "recipes.kill_test":
        assert "--config FILE [key=value ...]" in printed and "are handed on to the recipe" in printed
