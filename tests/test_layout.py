"""The layout's rules: who may import whom, what imports without torch, and how long a file may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "edge": {"edge", "wire", "common"},
    "cloud": {"cloud", "wire", "common"},
    "wire": {"wire"},
    "common": {"common"},
}
INPUT_OUTPUT = {"asyncio", "uvloop", "socket", "socketserver", "selectors", "threading", "concurrent", "ssl"}
PURE = [
    *("wire/prelude.py", "wire/frames.py", "wire/messages.py", "wire/outbox.py", "wire/protocol.py"),
    *("wire/errors.py", "common/schedule.py"),
]
LINE_LIMIT = 300
LONG_ON_PURPOSE = {"wire/transport.py"}  # all of asyncio is in this one file

SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for name in MAY_IMPORT for path in (ROOT / name).rglob("*.py")
)


def imported_names(source: str) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it, inside functions and type-checking blocks too."""
    package = source.split("/")[:-1]
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def imported_roots(source: str) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported_names(source)}


@pytest.mark.parametrize("source", SOURCES)
def test_imports_go_one_way(source: str) -> None:
    package = source.split("/")[0]
    assert imported_roots(source) & set(MAY_IMPORT) <= MAY_IMPORT[package]


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_shipped_imports_the_tests_or_the_benchmarks(source: str) -> None:
    assert not imported_roots(source) & {"tests", "benchmarks", "pytest", "hypothesis"}


@pytest.mark.parametrize("source", [source for source in SOURCES if source.endswith("__init__.py")])
def test_package_files_import_no_torch(source: str) -> None:
    assert not imported_roots(source) & {"torch", "torchvision"}


@pytest.mark.parametrize("source", PURE)
def test_pure_files_import_neither_torch_nor_any_input_output(source: str) -> None:
    assert not imported_roots(source) & ({"torch", "torchvision"} | INPUT_OUTPUT)


def test_one_file_of_wire_holds_all_of_asyncio() -> None:
    wire_sources = [source for source in SOURCES if source.startswith("wire/")]
    users = {source for source in wire_sources if imported_roots(source) & {"asyncio", "uvloop"}}
    assert users == {"wire/transport.py"}


def test_unsafe_ways_to_read_the_peer_are_imported_nowhere() -> None:
    unsafe = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}
    assert {source for source in SOURCES if imported_roots(source) & unsafe} == set()


def test_project_file_lists_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    found = {Path(source).parent.as_posix().replace("/", ".") for source in SOURCES}
    assert found == set(listed)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("module", [*MAY_IMPORT, *(path[:-3].replace("/", ".") for path in PURE)])
def test_module_imports_without_loading_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"importing {module} loads torch"


@pytest.mark.parametrize("source", SOURCES)
def test_file_is_short_enough_to_hold_one_idea(source: str) -> None:
    lines = len((ROOT / source).read_text(encoding="utf-8").splitlines())
    within = lines <= LINE_LIMIT or source in LONG_ON_PURPOSE
    assert within, f"{source} has {lines} lines: does it hold two ideas?"


def test_no_file_is_a_drawer_for_anything() -> None:
    drawers = {"util.py", "utils.py", "helpers.py", "misc.py"}
    assert [source for source in SOURCES if Path(source).name in drawers] == []
