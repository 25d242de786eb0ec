"""What README shows is what the program does."""

import re

import pytest
from typer.testing import CliRunner

from keepalive import config
from keepalive.cli.app import app
from keepalive.core.states import diagram
from keepalive.protocols.routes import Heartbeat, heartbeat_in
from tests.kit import PROJECT

README = (PROJECT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_its_config_is_a_good_one() -> None:
    parsed = [config.parse(text, "README.md", {}) for text in blocks("toml")]

    assert [kept.key for settings in parsed for kept in settings.kept] == ["qwen/qwen3-4b-2507"]


def test_its_diagram_is_the_table_of_the_program() -> None:
    assert blocks("mermaid") == [diagram() + "\n"]


def test_it_names_every_command_and_no_other() -> None:
    commands = README.partition("| address |")[0]
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}

    assert set(re.findall(r"`keepalive ([a-z]+)", commands)) == known


def test_every_command_explains_itself() -> None:
    for name in ("run", "init", "demo", "simulate", "check", "status", "wait", "warm", "release", "doctor"):
        answer = CliRunner().invoke(app, [name, "--help"])

        assert answer.exit_code == 0
        assert f"keepalive {name}" in answer.output or f" {name} " in answer.output


def test_the_metrics_of_its_query_exist() -> None:
    source = (PROJECT / "keepalive" / "observers" / "metrics.py").read_text()
    named = {name for query in blocks("promql") for name in re.findall(r"keepalive_\w+", query)}

    assert named == {"keepalive_proxy_wait_seconds_sum"}
    assert '"keepalive_proxy_wait_seconds"' in source


def test_every_file_that_it_links_to_is_there() -> None:
    links = {link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link}

    assert {link for link in links if not (PROJECT / link).exists()} == set()


@pytest.mark.parametrize("document", sorted(path.name for path in (PROJECT / "docs").glob("*.md")))
def test_every_file_that_a_document_links_to_is_there(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (PROJECT / "docs" / document).read_text())

    assert {link for link in links if "://" not in link and not (PROJECT / "docs" / link).exists()} == set()


@pytest.mark.parametrize("document", ["README.md", "config.toml", "docs/clients.md", "docs/containers.md"])
def test_every_base_url_with_a_heartbeat_mode_names_one_that_exists(document: str) -> None:
    named = re.findall(r"/heartbeat/\w+", (PROJECT / document).read_text())

    assert {heartbeat_in(target.encode())[0] for target in named} <= set(Heartbeat)
    assert named or document == "README.md"
