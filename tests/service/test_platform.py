"""Other systems than this one: by imitation, since nothing else is at hand, and as whole processes."""

import json
import re
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from keepalive.service import platform
from tests.kit import elsewhere, live
from tests.kit.live import (
    KEEPALIVE,
    DaemonProcess,
    Running,
    SimulatorProcess,
    ask,
    command,
    ending,
    settings,
    wait_until,
)

KEY = "acme/x"
INFINITE = 2**63 - 1

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="others are imitated on Linux")


# --- open files ---------------------------------------------------------------------------------------


class System:
    """Limits of a system that grants up to `ceiling`, whatever it says, and counts how often it was asked."""

    def __init__(self, soft: int, hard: int, ceiling: int, error: Exception | None = None) -> None:
        self.soft, self.hard, self.ceiling = soft, hard, ceiling
        self.error = error or ValueError("current limit exceeds maximum limit")
        self.asked = 0

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.soft, self.hard

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        self.asked += 1
        soft, hard = limits
        assert hard == self.hard, "the hard limit is nobody's to change"
        if not 0 <= soft <= self.ceiling:
            raise self.error
        self.soft = soft


def on(system: System, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    return system


@pytest.mark.parametrize(
    ("soft", "hard", "ceiling", "granted"),
    [
        (1024, 65_536, 65_536, 33_024),
        (1024, 4096, 4096, 4096),
        (1024, -1, 1_048_576, 33_024),
        (256, INFINITE, 10_240, 10_240),
        (256, INFINITE, 12_288, 12_288),
        (256, INFINITE, 245_760, 33_024),
        (256, -1, 257, 257),
        (64, 64, 64, 64),
    ],
)
def test_as_many_files_are_had_as_the_system_really_grants(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, ceiling: int, granted: int
) -> None:
    system = on(System(soft, hard, ceiling), monkeypatch)

    assert platform.files(33_024) == granted
    assert system.soft == granted


@pytest.mark.parametrize("soft", [33_024, 100_000])
def test_a_system_that_gives_enough_is_not_asked(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    system = on(System(soft, INFINITE, INFINITE), monkeypatch)

    assert platform.files(33_024) == soft
    assert system.asked == 0


@pytest.mark.parametrize(
    "error", [ValueError("not allowed to raise maximum limit"), PermissionError(1, "no"), OSError(22, "no")]
)
@pytest.mark.parametrize("hard", [64, 512, 65_536, INFINITE, -1])
def test_a_system_that_grants_nothing_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, hard: int
) -> None:
    system = on(System(256, hard, 0, error), monkeypatch)

    assert platform.files(33_024) == 256
    assert system.asked < 20


def test_a_limit_that_is_infinite_is_a_large_number(monkeypatch: pytest.MonkeyPatch) -> None:
    on(System(-1, -1, 0), monkeypatch)

    assert platform.files(33_024) == sys.maxsize


def test_what_is_granted_is_believed_only_when_it_has_been_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    system = on(System(256, INFINITE, INFINITE), monkeypatch)
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: setattr(system, "soft", 10_240))

    assert platform.files(33_024) == 10_240


def test_where_limits_cannot_be_told_the_least_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(which: int) -> Any:
        raise OSError(1, "not here")

    monkeypatch.setattr(resource, "getrlimit", fails)
    refused = platform.files(33_024)
    monkeypatch.delattr(resource, "getrlimit")
    missing = platform.files(33_024)

    assert (refused, missing) == (256, 256)


def test_without_limits_there_is_what_select_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)

    assert platform.files(33_024) == 512


@pytest.mark.parametrize(("files", "connections"), [(64, 16), (256, 64)])
def test_a_daemon_with_few_files_says_how_many_callers_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, connections: int
) -> None:
    monkeypatch.setattr(live, "KEEPALIVE", ["sh", "-c", f'ulimit -n {files} && exec "$0" "$@"', *KEEPALIVE])
    sim = SimulatorProcess(tmp_path, f"{KEY}:0s")
    with ending(sim), ending(daemon := DaemonProcess(tmp_path, settings(sim.url, KEY))):
        daemon.reaches(KEY, "warm")
        said = daemon.events("files.few")[0]

    assert (said["files"], said["connections"]) == (files, connections)


# --- whole processes ----------------------------------------------------------------------------------


def served(daemon: DaemonProcess) -> str:
    """A streamed answer through the client address."""
    url = daemon.events("daemon.started")[0]["listen"]
    body = {"model": KEY, "stream": True, "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    status, _, text = ask(f"{url}/v1/chat/completions", "POST", body)
    assert status == 200
    return text


def where(system: str) -> dict[str, str]:
    # A pipe on Windows is not UTF-8, and there is no HOME.
    more = {"PYTHONIOENCODING": "cp1252", "HOME": ""} if system == "windows" else {}
    return {"PYTHONPATH": elsewhere.path(system), **more}


@pytest.mark.parametrize(("system", "ends_by"), [("windows", signal.SIGINT), ("macos", signal.SIGTERM)])
def test_a_daemon_keeps_a_model_serves_it_and_ends_in_order(
    tmp_path: Path, system: str, ends_by: signal.Signals
) -> None:
    sim = SimulatorProcess(tmp_path, f"{KEY}:300ms")
    text = settings(sim.url, KEY, server='heartbeat = "100ms"')
    with ending(sim), ending(daemon := DaemonProcess(tmp_path, text, **where(system))):
        held = served(daemon)
        daemon.reaches(KEY, "warm")
        there = where(system)
        checked = command("check", "-c", daemon.config.name, cwd=tmp_path, **there)
        shown = command("status", "--url", daemon.url, cwd=tmp_path, **there)
        found = command("doctor", "-c", daemon.config.name, "--url", daemon.url, cwd=tmp_path, **there)
        daemon.signal(ends_by)

        assert daemon.ended() == 0
        assert ": keepalive model=acme/x" in held
        assert "data: [DONE]" in held
        assert (checked.returncode, checked.stderr) == (0, "")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert found.stderr == ""
        assert KEY in shown.stdout
        assert daemon.events("daemon.stopped")
        assert "Traceback" not in daemon.err.read_text()
        assert not daemon.events("bookkeeping.failed")
        assert sim.instances(KEY) == 1
        assert sim.happened("load.started", KEY) == 1


# Two that begin at the same moment may both find the usual address free.
@pytest.mark.xdist_group("package")
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_demo_begins_and_ends(tmp_path: Path, system: str) -> None:
    with ending(demo := Running([*KEEPALIVE, "demo"], tmp_path, "demo", **where(system))):
        wait_until(lambda: b"medicine-llm is loading" in demo.out.read_bytes(), "the load")
        demo.signal(signal.SIGINT)

        assert demo.ended() == 0
        assert demo.err.read_text() == ""


def test_on_macos_it_takes_the_files_it_can_get(tmp_path: Path) -> None:
    most = min(10_240, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    text = settings("http://127.0.0.1:9", KEY)
    with ending(daemon := DaemonProcess(tmp_path, text, **where("macos"))):
        limits = Path(f"/proc/{daemon.process.pid}/limits").read_text()

        assert re.search(rf"Max open files +{most} ", limits)
        assert not daemon.events("files.few")


def test_on_windows_more_callers_than_select_takes_wait_and_are_served(tmp_path: Path) -> None:
    sim = SimulatorProcess(tmp_path, f"{KEY}:0s")
    with ending(sim), ending(daemon := DaemonProcess(tmp_path, settings(sim.url, KEY), **where("windows"))):
        daemon.reaches(KEY, "warm")
        url = daemon.events("daemon.started")[0]["listen"]
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        idle = [socket.create_connection(address, timeout=10) for _ in range(600)]
        fds = Path(f"/proc/{daemon.process.pid}/fd")
        wait_until(lambda: len(list(fds.iterdir())) > 128, "those that fit are let in")
        alive = ask(f"{daemon.url}/livez")[0]
        for one in idle:
            one.close()

        assert alive == 200
        assert "data: [DONE]" in served(daemon)
        assert "Traceback" not in daemon.err.read_text()


def test_on_windows_a_second_daemon_is_not_let_into_the_same_history(tmp_path: Path) -> None:
    text = settings("http://127.0.0.1:9", KEY)
    with (
        ending(first := DaemonProcess(tmp_path, text, **where("windows"))),
        ending(second := DaemonProcess(tmp_path, text, "second", **where("windows"))),
    ):
        wait_until(lambda: json.loads(ask(f"{first.url}/api/history?model={KEY}")[2]), "its history")
        told = wait_until(lambda: second.events("bookkeeping.failed"), "it is told")

        assert "another daemon keeps its history there" in told[0]["error"]
        assert not first.events("bookkeeping.failed")


def test_on_windows_nobody_listens_where_a_daemon_does_and_ctrl_break_ends_that_too(tmp_path: Path) -> None:
    text = settings("http://127.0.0.1:9", KEY)
    with ending(first := DaemonProcess(tmp_path, text, **where("windows"))):
        port = first.events("daemon.started")[0]["listen"].rpartition(":")[2]
        (tmp_path / "second.toml").write_text(
            text.replace('\nlisten = "127.0.0.1:0"', f'\nlisten = "127.0.0.1:{port}"')
        )
        second = command("run", "-c", "second.toml", cwd=tmp_path, **where("windows"))
        first.signal(signal.SIGTTIN)  # the same number as Ctrl-Break

        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
        assert first.ended() == 0
        assert first.events("daemon.stopped")


def test_what_a_terminal_cannot_show_is_no_reason_to_show_nothing(tmp_path: Path) -> None:
    sim = SimulatorProcess(tmp_path, "модель/→:0s")
    with ending(sim), ending(daemon := DaemonProcess(tmp_path, settings(sim.url, "модель/→"))):
        daemon.reaches("модель/→", "warm")
        shown = command("status", "--url", daemon.url, cwd=tmp_path, PYTHONIOENCODING="cp1252")

        assert (shown.returncode, shown.stderr) == (0, "")
        assert "warm" in shown.stdout
