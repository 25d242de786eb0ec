"""The manual page: made from the command, so that it says what that does."""

import re
import shutil
import subprocess

import pytest

from keepalive.cli import manual
from tests.kit import PROJECT

PAGE = (PROJECT / "docs/keepalive.1").read_text()


def test_the_page_that_lies_there_is_the_one_of_this_command() -> None:
    assert manual.page() == PAGE, "write it anew: make man"


def test_it_has_every_command_with_what_it_does() -> None:
    for name in ("run", "init", "demo", "simulate", "check", "status", "wait", "warm", "release", "doctor"):
        assert re.search(rf"^\.SS keepalive {name}\b", PAGE, re.MULTILINE)
    assert "\\fB\\-c\\fR, \\fB\\-\\-config\\fR \\fIPATH\\fR" in PAGE


def test_it_is_good_roff() -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("no groff here: apt install groff")
    told = subprocess.run(
        [groff, "-man", "-ww", "-z", "-K", "utf8", str(PROJECT / "docs/keepalive.1")],
        capture_output=True,
        text=True,
        check=True,
    )

    assert told.stderr == ""


def test_what_begins_like_a_command_of_roff_is_text() -> None:
    assert manual._plain(".5 s, -1 and \\n") == "\\&.5 s, \\-1 and \\en"
