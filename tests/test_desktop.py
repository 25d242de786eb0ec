"""What runs keepalive for one person: the files are read as their systems do, and what they start is started."""

import plistlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.kit import PROJECT
from tests.kit.live import Running, ask, ending, environment, reserved_port, settings, wait_until

UNIT = PROJECT / "desktop/keepalive.service"
AGENT: Mapping[str, Any] = plistlib.loads((PROJECT / "desktop/keepalive.plist").read_bytes())


def at_home(folder: Path) -> Path:
    """A home in which keepalive is installed as the manual says."""
    home = folder / "a home"
    command = home / ".local/bin/keepalive"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m keepalive "$@"\n')
    command.chmod(0o755)
    (home / ".config/keepalive").mkdir(parents=True)
    return home


def test_the_agent_of_macos_starts_the_daemon_with_its_secrets_and_passes_signals_on(tmp_path: Path) -> None:
    home = at_home(tmp_path)
    (home / ".config/keepalive/secrets").write_text('LM_API_TOKEN="sk-lm-canary"\n')
    with reserved_port() as nowhere, reserved_port() as port:
        upstream = 'api_token_env = "LM_API_TOKEN"'
        text = settings(f"http://127.0.0.1:{nowhere}", "a", upstream=upstream)
        text = text.replace('admin_listen = "127.0.0.1:0"', f'admin_listen = "127.0.0.1:{port}"')
        (home / ".config/keepalive/config.toml").write_text(text)
        running = Running(AGENT["ProgramArguments"], tmp_path, "agent", HOME=str(home))
        with ending(running):
            log = home / "Library/Logs/keepalive.log"
            wait_until(lambda: log.exists() and "daemon.started" in log.read_text(), "it starts")
            status, _, _ = ask(f"http://127.0.0.1:{port}/livez")
            running.signal(signal.SIGTERM)
            code = running.ended()

    assert (status, code) == (200, 0)
    assert "canary" not in log.read_text()


def test_launchd_keeps_it_running_and_lets_streams_finish() -> None:
    assert (AGENT["Label"], AGENT["RunAtLoad"], AGENT["KeepAlive"]) == ("keepalive", True, True)
    assert AGENT["ExitTimeOut"] > 30, "server.drain_timeout"
    assert AGENT["ProcessType"] == "Interactive"


def test_the_unit_of_a_user_is_good_and_starts_what_the_agent_starts(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here: apt install systemd")
    home = at_home(tmp_path)
    unit = tmp_path / "keepalive.service"
    unit.write_text(UNIT.read_text().replace("%h/.local/bin/keepalive", "/bin/true"))
    told = subprocess.run(
        [analyze, "--user", "verify", "--man=no", str(unit)],
        env=environment(HOME=str(home), XDG_RUNTIME_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    start = re.search(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)

    assert (told.returncode, told.stderr) == (0, "")
    assert start is not None
    assert (
        start[1].replace("%h", "$HOME")
        == "$HOME/.local/bin/keepalive run -c $HOME/.config/keepalive/config.toml"
    )
    assert 'folder="$HOME/.config/keepalive"' in AGENT["ProgramArguments"][2]


@pytest.mark.parametrize("path", re.findall(r"\bdesktop/[\w.]+", (PROJECT / "docs/desktop.md").read_text()))
def test_the_manual_names_files_that_are_there(path: str) -> None:
    assert (PROJECT / path).is_file()
