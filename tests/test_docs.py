"""What CONTRIBUTING and the architecture name is there: every path, test, module and make target."""

import ast
import importlib.util
import re

import pytest

from tests.kit import PROJECT

DOCUMENTS = ("CONTRIBUTING.md", "docs/architecture.md")


def named(document: str) -> set[str]:
    """What stands in backquotes, in code blocks and in links."""
    text = (PROJECT / document).read_text()
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    quoted = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    linked = re.findall(r"\]\(([^)#]+)", text)
    return {word for part in [*blocks, *quoted, *linked] for word in part.split()} | set(linked)


def functions_of(path: str) -> set[str]:
    tree = ast.parse((PROJECT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_is_there(document):
    paths = {
        word for word in named(document) if re.fullmatch(r"(keepalive|tests|docs|benchmarks)/[\w./]*", word)
    }

    assert paths
    assert {path for path in paths if not (PROJECT / path).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_by_its_name_alone_is_there_once_at_least(document):
    names = {word for word in named(document) if re.fullmatch(r"\w+\.(py|js|toml)", word)}
    there = {path.name for folder in ("keepalive", "tests") for path in (PROJECT / folder).rglob("*")}

    assert names - there - {"config.toml"} == set()


def test_every_test_that_holds_a_promise_is_there():
    held = {word for word in named("docs/architecture.md") if "::" in word}

    assert held
    assert {word for word in held if word.split("::")[1] not in functions_of(word.split("::")[0])} == set()


def test_every_promise_is_held_by_a_test():
    rows = re.findall(
        r"^\| (P\d+) \|.*\|(.*)\|$", (PROJECT / "docs/architecture.md").read_text(), re.MULTILINE
    )

    assert [name for name, _ in rows] == [f"P{n}" for n in range(1, len(rows) + 1)]
    assert all("tests/" in tests for _, tests in rows)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_target_that_a_document_names_is_one_of_the_makefile(document):
    text = (PROJECT / document).read_text()
    targets = set(re.findall(r"(?:`|^|KEEPALIVE_SEED=random )make ([a-z-]+)", text, re.MULTILINE))
    there = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))

    assert targets
    assert targets - there == set()


def test_every_folder_of_the_package_is_on_the_map():
    rows = set(
        re.findall(r"^\| `keepalive/(\w+)/` \|", (PROJECT / "docs/architecture.md").read_text(), re.MULTILINE)
    )

    assert rows == {path.parent.name for path in (PROJECT / "keepalive").glob("*/__init__.py")}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_name_of_the_code_that_a_document_names_exists(document):
    text = (PROJECT / document).read_text()
    words = set(re.findall(r"`([A-Z]\w+(?:\.\w+)?|[a-z]+_[a-z_]+)`", text))
    source = "\n".join(path.read_text() for path in (PROJECT / "keepalive").rglob("*.py"))
    defined = re.compile(r"^ *(?:class |def |async def |)(\w+)", re.MULTILINE)
    there = set(defined.findall(source))

    assert words or document == "CONTRIBUTING.md"
    assert {word for word in words if not set(word.split(".")) <= there} == set()


def test_the_module_that_applications_import_can_be_imported():
    assert importlib.util.find_spec("keepalive.client") is not None
