"""The house: each folder's `__init__` says what it may import, and no arrow runs up or round."""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.kit import PROJECT

PACKAGE = PROJECT / "keepalive"
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
FLOORS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
pytestmark = pytest.mark.xdist_group("house")
# What stands beside the folders: the version, the command, and what applications import.
FRONT = {"__init__": set(FLOORS), "__main__": {"cli"}, "client": {"protocols", "core"}}


def imports(path: Path) -> Iterator[str]:
    """The modules of the project that a file imports, as dotted names below the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("keepalive.") for name in names if name.startswith("keepalive."))


def module(name: str) -> str | None:
    """The file that `name` stands in, itself or what it is an attribute of; None for the package's own names."""
    while name:
        for found in (name, f"{name}.__init__"):
            if found in FILES:
                return found
        name = name.rpartition(".")[0]
    return None


@functools.cache
def arrows() -> Mapping[str, set[str]]:
    """Which file imports which; read when a test asks, since each worker collects all tests."""
    return {
        name: {found for one in imports(path) if (found := module(one)) and found != name}
        for name, path in FILES.items()
    }


def floor(name: str) -> str:
    return name.partition(".")[0]


def stated(folder: str) -> set[str]:
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    said = re.search(r"^May import(?: (nothing|everything below it)|: ([^.]*)\.)", text, re.MULTILINE)
    assert said, f"keepalive/{folder}/__init__.py does not say what it may import"
    if said[1] == "everything below it":
        return set(FLOORS) - {folder}
    return set() if said[1] else {name.strip() for name in said[2].split(",")}


def circle(ways: Mapping[str, set[str]]) -> list[str]:
    """Names that lead round to the first of them; none when there is no way round."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(ways.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(ways) if (found := walk(name, []))), [])


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_imports_only_what_it_says(folder):
    named = stated(folder)
    used = {floor(to) for name, tos in arrows().items() if floor(name) == folder for to in tos} - {folder}

    assert named <= set(FLOORS), "it names a folder that does not exist"
    assert used <= named
    assert folder == "cli" or named <= used, "it may import what it does not need"


@pytest.mark.parametrize("name", sorted(FRONT))
def test_what_stands_beside_the_folders_imports_only_what_it_may(name):
    assert {floor(to) for to in arrows()[name]} <= FRONT[name]


def test_every_file_stands_in_a_folder():
    assert {name for name in FILES if "." not in name} == set(FRONT)


def test_no_way_leads_round_between_folders():
    between = {folder: stated(folder) for folder in FLOORS}

    assert circle(between) == []


def test_no_way_leads_round_between_files():
    # An import under TYPE_CHECKING is an arrow, too; a folder's own `__init__` collects its files, and they may not
    # go through it.
    assert circle(arrows()) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_httpx_is_imported_in_one_file():
    users = [
        name for name, path in FILES.items() if re.search(r"^\s*(import|from) httpx", path.read_text(), re.M)
    ]

    assert users == ["lmstudio.client"]


def test_the_tests_mirror_the_package():
    mirrored = {path.name for path in (PROJECT / "tests").iterdir() if path.is_dir()}

    assert set(FLOORS) <= mirrored
