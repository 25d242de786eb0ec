"""The daemon as a service: first what systemd is told, then all of it in a real systemd.

The second half boots machines (see systemd_machine.py) and runs where that is possible: as root, with
cgroup 2 and Debian's systemd. Machines are cheap, so each test has one of its own, put on the files of one in
which keepalive was installed.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import keepalive
from keepalive.admin import words
from keepalive.observers import logs
from keepalive.service import systemd
from tests.kit import PROJECT
from tests.kit.systemd_machine import Machine, Shed, shed, until, why_not

# --- What systemd is told ------------------------------------------------------------------------------


class Manager:
    """systemd's end of $NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.setblocking(False)

    def told(self) -> list[str]:
        """Everything since the last time, a line each."""
        lines: list[str] = []
        while True:
            try:
                lines += self.socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return lines


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    opened = Manager(str(tmp_path / "notify"))
    yield opened
    opened.socket.close()


def test_a_notification_reaches_a_socket_that_has_a_path(manager: Manager) -> None:
    taken = systemd.notify(manager.environ, READY=1, STATUS="2/2 models warm")

    assert taken
    assert manager.told() == ["READY=1", "STATUS=2/2 models warm"]


def test_a_notification_reaches_a_socket_without_a_path() -> None:
    manager = Manager(f"@keepalive-test-{os.getpid()}")

    taken = systemd.notify(manager.environ, READY=1)

    assert taken
    assert manager.told() == ["READY=1"]
    manager.socket.close()


def test_a_value_cannot_smuggle_in_a_second_field(manager: Manager) -> None:
    systemd.notify(manager.environ, STATUS="bad\nREADY=1\r\nword")

    assert manager.told() == ["STATUS=bad READY=1 word"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "/nowhere/at/all"},
        {"NOTIFY_SOCKET": "@nobody-listens-here"},
        {"NOTIFY_SOCKET": "/" + 300 * "x"},
        {"NOTIFY_SOCKET": "vsock:2:1234"},
    ],
)
def test_a_notification_that_nobody_takes_is_no_error(environ: dict[str, str]) -> None:
    assert systemd.notify(environ, READY=1, STATUS="\udcff") is False


def test_a_notification_does_not_wait_for_a_manager_that_does_not_read(manager: Manager) -> None:
    taken = [systemd.notify(manager.environ, WATCHDOG=1) for _ in range(2000)]

    assert taken[0] is True
    assert taken[-1] is False


TAKES_SOCKETS = """
import json, os, sys
from keepalive.service import systemd
environ = {**os.environ, "LISTEN_PID": sys.argv[1].replace("me", str(os.getpid()))}
try:
    found = systemd.listen_sockets(environ)
except systemd.SocketError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps({name: [s.getsockname()[1] for s in sockets] for name, sockets in found.items()}))
    assert not any(s.get_inheritable() or s.getblocking() for sockets in found.values() for s in sockets)
    sys.stdout.flush()
    os._exit(0)  # they are not ours to close one by one
"""


def take_sockets(names: str, pid: str = "me", count: int = 3) -> tuple[Any, list[int]]:
    """What a process makes of three listening sockets under these names, and their ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    numbers = " ".join(str(s.fileno()) for s in sockets)
    # As systemd does it: the first is number 3.
    dup = f"import os, sys\nfor n, f in enumerate(map(int, '{numbers}'.split())): os.dup2(f, 100 + n)\n"
    dup += "for n in range(3): os.dup2(100 + n, 3 + n, inheritable=True)\n"
    dup += "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", dup, TAKES_SOCKETS, pid],
        env={"LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "PATH": os.environ["PATH"]},
        pass_fds=[s.fileno() for s in sockets],
        capture_output=True,
        text=True,
        check=False,
    )
    ports = [s.getsockname()[1] for s in sockets]
    for one in sockets:
        one.close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), ports


def test_listening_sockets_are_taken_by_their_names() -> None:
    found, (first, second, third) = take_sockets("admin:client:admin")

    assert found == {"client": [second], "admin": [first, third]}


def test_sockets_that_were_passed_to_another_process_are_not_touched() -> None:
    found, _ = take_sockets("admin:client:admin", pid="1")

    assert found == {"client": [], "admin": []}


def test_a_socket_without_a_name_of_ours_says_what_to_write() -> None:
    message, _ = take_sockets("client:keepalive.socket:admin")

    assert message == (
        'systemd passed a socket with the name "keepalive.socket"; write FileDescriptorName=client or '
        "FileDescriptorName=admin in its .socket unit"
    )


MODEL = {"key": "medicine-llm", "wanted": True, "state": "warm", "load": None, "reason": None}
UP = {"name": "local", "state": "up", "error": None}


def status(*models: dict[str, Any], upstream: dict[str, Any] = UP, **more: Any) -> dict[str, Any]:
    return {
        "models": [MODEL | model for model in models],
        "upstreams": [upstream],
        "config": {"mistakes": []},
        "draining": False,
        **more,
    }


class FakeDaemon:
    def __init__(self) -> None:
        self.document = status({}, upstream=UP | {"state": "unknown"})
        self.trouble: str | None = None
        self.stopping = False

    def status(self) -> dict[str, Any]:
        return self.document

    def alive(self) -> str | None:
        return self.trouble


class Hours:
    """A service whose time passes in `for_seconds`."""

    def __init__(
        self, manager: Manager, monkeypatch: pytest.MonkeyPatch, watchdog: float | None = None
    ) -> None:
        self.manager = manager
        self.daemon = FakeDaemon()
        self.now = 1000.0
        environ = dict(manager.environ)
        if watchdog:
            environ |= {"WATCHDOG_USEC": str(int(watchdog * 1e6)), "WATCHDOG_PID": str(os.getpid())}
        self.service = systemd.Service(self.daemon, words.summary, environ, clock=lambda: self.now)
        self._woken: asyncio.Queue[None] = asyncio.Queue()
        self._slept: asyncio.Queue[float] = asyncio.Queue()

        async def sleep(seconds: float) -> None:
            self._slept.put_nowait(seconds)
            await self._woken.get()

        monkeypatch.setattr("keepalive.service.systemd.asyncio.sleep", sleep)

    async def begin(self) -> list[str]:
        self.task = asyncio.create_task(self.service.run())
        self._pause = await self._slept.get()
        return self.manager.told()

    async def for_seconds(self, seconds: float) -> list[str]:
        """Let time pass, and return what was told meanwhile."""
        end = self.now + seconds
        while self.now + self._pause <= end:
            self.now += self._pause
            self._woken.put_nowait(None)
            self._pause = await self._slept.get()
        return self.manager.told()

    async def end(self) -> list[str]:
        self.task.cancel()
        await asyncio.wait([self.task])
        return self.manager.told()


async def test_ready_is_said_once_when_every_upstream_was_asked(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours(manager, monkeypatch)

    before = await hours.begin() + await hours.for_seconds(5)
    hours.daemon.document = status({"state": "cold"}, upstream=UP | {"state": "down", "error": "refused"})
    after = await hours.for_seconds(5)

    assert before == ["STATUS=1/1 models warm"]
    assert after == ["READY=1", "STATUS=0/1 models warm; local is down: refused"]
    await hours.end()


async def test_an_upstream_that_never_answers_delays_ready_only_so_long(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours(manager, monkeypatch)

    early = await hours.begin() + await hours.for_seconds(29)
    late = await hours.for_seconds(2)

    assert "READY=1" not in early
    assert late == ["READY=1"]
    await hours.end()


async def test_the_watchdog_is_fed_in_half_its_time_and_only_while_the_scheduler_runs(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours(manager, monkeypatch, watchdog=30)
    hours.daemon.document = status({})

    await hours.begin()
    alive = await hours.for_seconds(60)
    hours.daemon.trouble = "the scheduler has not run for 12 s"
    stuck = await hours.for_seconds(60)
    hours.daemon.trouble = None
    again = await hours.for_seconds(2)

    assert alive == 4 * ["WATCHDOG=1"]
    assert stuck == []
    assert again == ["WATCHDOG=1"]
    await hours.end()


async def test_a_reload_is_told_around_the_work_also_when_it_fails(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours(manager, monkeypatch)
    hours.daemon.document = status({})
    await hours.begin()

    during: list[str] = []

    def fail() -> None:
        with hours.service.reloading():
            during.extend(manager.told())
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()

    assert during[0] == "RELOADING=1"
    assert re.fullmatch(r"MONOTONIC_USEC=\d+", during[1])
    assert manager.told() == ["READY=1"]
    await hours.end()


async def test_a_reload_before_the_daemon_is_ready_does_not_say_ready(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours(manager, monkeypatch)
    await hours.begin()

    with hours.service.reloading():
        pass

    assert manager.told() == []
    await hours.end()


async def test_while_streams_end_more_time_is_asked_for_and_the_watchdog_is_fed(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = Hours(manager, monkeypatch, watchdog=2)
    hours.daemon.document = status({})
    await hours.begin()

    hours.daemon.stopping = True
    draining = await hours.for_seconds(2)
    hours.daemon.trouble = "the scheduler has not run for 12 s"
    stuck = await hours.for_seconds(2)
    last = await hours.end()

    assert draining == 2 * ["STOPPING=1", "EXTEND_TIMEOUT_USEC=10000000", "WATCHDOG=1"]
    assert stuck == []
    assert last == ["STOPPING=1", "STATUS=stopping"]


async def test_without_systemd_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    service = systemd.Service(FakeDaemon(), words.summary, {"WATCHDOG_USEC": "1000000"})

    async with asyncio.timeout(5):
        await service.run()
        with service.reloading():
            pass

    assert systemd.listen_sockets({}) == {"client": [], "admin": []}


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (status({}, {"key": "b"}, {"key": "c", "wanted": False, "state": "cold"}), "2/2 models warm"),
        (
            status({}, {"state": "loading", "load": {"elapsed_seconds": 62.1, "eta_seconds": 50.4}}),
            "1/2 models warm; medicine-llm loading, 62 s, about 50 s to go",
        ),
        (
            status({"state": "backoff", "reason": "not enough memory"}),
            "0/1 models warm; medicine-llm failed: not enough memory",
        ),
        (
            status({}, config={"mistakes": ["config.toml:3: oops"]}),
            "1/1 models warm; config rejected, the one before is in use",
        ),
        (status({}, draining=True), "stopping; 1/1 models warm"),
    ],
)
def test_the_status_line_says_what_a_person_wants_to_know(document: dict[str, Any], line: str) -> None:
    assert words.summary(document) == line


def test_the_journal_gets_a_priority_on_every_line_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    at = os.fstat(write)
    monkeypatch.setenv("JOURNAL_STREAM", f"{at.st_dev}:{at.st_ino}")
    with os.fdopen(write, "w") as stream:
        end = logs.start(level="info", as_json=None, stream=stream)
        logs.logger().info("model.loaded", model="medicine-llm", seconds=12.5)
        logs.logger().warning("upstream.error", error='two\nlines and a "quote"', well=False)
        logs.logger().error("config.rejected", mistakes=["one", "and another"])
        logs.logger().debug("never.seen")
        end()
    with os.fdopen(read) as journal:
        lines = journal.read().splitlines()

    assert lines == [
        "<6>model.loaded model=medicine-llm seconds=12.5",
        r'<4>upstream.error error="two\nlines and a \"quote\"" well=false',
        '<3>config.rejected mistakes="one; and another"',
    ]


def test_another_streams_number_does_not_make_it_the_journal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")
    with (tmp_path / "log").open("w") as stream:
        end = logs.start(level="info", as_json=None, stream=stream)
        logs.logger().info("model.loaded")
        end()

    assert json.loads((tmp_path / "log").read_text()).keys() == {"event", "level", "timestamp"}


# --- In a real systemd -----------------------------------------------------------------------------------

WHY_NOT = why_not()
in_systemd = pytest.mark.skipif(WHY_NOT is not None, reason=f"a real systemd {WHY_NOT}")
pytestmark = pytest.mark.timeout(400)

CONFIG = """
[defaults]
refresh_interval = "1s"

[[models]]
key = "medicine-llm"
context_length = 8192

[[models]]
key = "small-talk-1b"
"""
CONFIG_PATH = "/etc/keepalive/config.toml"
MODELS = ("--model", "medicine-llm:2", "--model", "small-talk-1b:1")
PYTHON = "/usr/bin/python3"
ADMIN = "http://127.0.0.1:9235"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `systemd/install` needs instead of a network, for Debian's Python."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = folder / "venv/bin/pip"
    subprocess.run([PYTHON, "-m", "venv", folder / "venv"], check=True)
    # hatchling for an installation from source, which builds a wheel.
    subprocess.run([pip, "-q", "wheel", "--wheel-dir", folder / "wheels", PROJECT, "hatchling"], check=True)
    return folder / "wheels"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shed]:
    with shed(tmp_path_factory.mktemp("machines")) as opened:
        yield opened


@pytest.fixture(scope="module")
def installed(ground: Shed, wheels: Path) -> tuple[Path, ...]:
    """The layers of a machine where keepalive was installed, with CONFIG and no LM Studio."""
    with Machine(ground, shared={"/mnt/keepalive": PROJECT, "/mnt/wheels": wheels}) as machine:
        machine.write(CONFIG_PATH, CONFIG)
        machine.run("/mnt/keepalive/systemd/install", "--wheels", "/mnt/wheels", patience=300)
        machine.run("cp", "-rL", "/opt/keepalive/venv", "/opt/lmstudio")
        machine.run("systemctl", "stop", "keepalive.socket", "keepalive-admin.socket", "keepalive")
    return machine.layers


@pytest.fixture
def machine(ground: Shed, installed: tuple[Path, ...], wheels: Path) -> Iterator[Machine]:
    """A machine that has just booted, with keepalive running."""
    with Machine(ground, installed, {"/mnt/keepalive": PROJECT, "/mnt/wheels": wheels}) as booted:
        yield booted


def start_lm_studio(machine: Machine, *options: str, known_at_once: bool = True) -> None:
    """A simulated one, outside of the installation that an upgrade replaces.

    A daemon that has found none asks again some seconds later, unless it starts anew.
    """
    if known_at_once:
        machine.run("systemctl", "stop", "keepalive")
    machine.run(
        *("systemd-run", "--quiet", "--unit=lmstudio", "--property=Type=exec"),
        *("/opt/lmstudio/bin/python", "-m", "keepalive", "simulate", *(options or MODELS)),
    )
    until(lambda: ask(machine, "http://127.0.0.1:1234/simulator/state"), "LM Studio did not start")
    if known_at_once:
        machine.run("systemctl", "start", "keepalive")


def ask(machine: Machine, url: str, *options: str) -> Any:
    """What is answered, as JSON; None when nobody answers."""
    answer = machine.run("curl", "-s", "--max-time", "60", *options, url, check=False).stdout
    return json.loads(answer) if answer else None


def loads(machine: Machine) -> list[str]:
    """The loads that LM Studio was asked for, in their order."""
    events = ask(machine, "http://127.0.0.1:1234/simulator/log?since=0")["events"]
    return [event["model"] for event in events if event["kind"] == "load.started"]


def copies(machine: Machine) -> dict[str, int]:
    models = ask(machine, "http://127.0.0.1:1234/simulator/state")["models"]
    return {model["key"]: len(model["instances"]) for model in models}


def wait_warm(machine: Machine) -> None:
    machine.run("keepalive", "wait", "--timeout", "80s")


def status_line(machine: Machine) -> str:
    return machine.property("keepalive", "StatusText")


def drop_in(machine: Machine, text: str, unit: str = "keepalive.service") -> None:
    machine.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
    machine.run("systemctl", "daemon-reload")


def restarts(machine: Machine) -> int:
    return int(machine.property("keepalive", "NRestarts"))


def is_running_again(machine: Machine, before: int) -> Callable[[], bool]:
    return lambda: restarts(machine) > before and machine.property("keepalive", "ActiveState") == "active"


@in_systemd
def test_it_is_ready_before_lm_studio_exists_and_warms_the_models_when_it_appears(machine: Machine) -> None:
    before = machine.run("systemctl", "status", "--no-pager", "keepalive").stdout
    start_lm_studio(machine, known_at_once=False)
    wait_warm(machine)
    until(lambda: status_line(machine) == "2/2 models warm", "the status line did not follow")
    after = machine.run("systemctl", "status", "--no-pager", "keepalive").stdout

    assert "Active: active (running)" in before
    assert 'Status: "0/2 models warm; local is down: nothing listens at http://127.0.0.1:1234"' in before
    assert 'Status: "2/2 models warm"' in after
    assert copies(machine) == {"medicine-llm": 1, "small-talk-1b": 1}


@in_systemd
def test_the_status_line_follows_a_load(machine: Machine) -> None:
    start_lm_studio(machine, "--model", "medicine-llm:600", "--model", "small-talk-1b:1")

    line = until(lambda: re.search(r"medicine-llm loading, \d+", status_line(machine)), "no load shown")

    assert status_line(machine).startswith("0/2 models warm; ")
    assert line


@in_systemd
def test_doctor_finds_a_service_that_the_next_boot_would_not_start(machine: Machine) -> None:
    start_lm_studio(machine)
    wait_warm(machine)
    enabled = machine.run("keepalive", "doctor", "-c", "/etc/keepalive/config.toml", check=False)
    machine.run("systemctl", "disable", "keepalive.service")

    disabled = machine.run("keepalive", "doctor", "-c", "/etc/keepalive/config.toml", check=False)

    assert "keepalive.service" not in enabled.stdout
    assert "✗ keepalive.service is disabled" in disabled.stdout
    assert "do:  systemctl enable keepalive.service" in disabled.stdout
    assert disabled.returncode == 1


@in_systemd
def test_a_second_installation_changes_nothing_and_uninstalling_leaves_only_the_config(
    machine: Machine,
) -> None:
    pid = machine.property("keepalive", "MainPID")
    said = machine.run("/mnt/keepalive/systemd/install", "--wheels", "/mnt/wheels", patience=300).stdout
    same_pid = machine.property("keepalive", "MainPID")
    machine.run("/mnt/keepalive/systemd/install", "--uninstall")
    machine.run("rm", "-r", "/opt/lmstudio")
    left = machine.shell("find /etc /opt /var/lib /run /usr/local -name '*keepalive*'")
    units = machine.run("systemctl", "list-units", "--all", "--no-legend", "keepalive*").stdout
    again = machine.run("/mnt/keepalive/systemd/install", "--uninstall", "--purge").returncode
    config = machine.run("ls", "/etc/keepalive", check=False)

    assert "is installed and runs" in said
    assert same_pid == pid
    assert left == "/etc/keepalive\n"
    assert units == ""
    assert again == 0
    assert config.returncode != 0


@in_systemd
def test_a_good_reload_is_applied_and_a_bad_one_fails_and_changes_nothing(machine: Machine) -> None:
    start_lm_studio(machine)
    wait_warm(machine)
    pid = machine.property("keepalive", "MainPID")

    machine.write(CONFIG_PATH, CONFIG.split("[[models]]")[0] + '[[models]]\nkey = "small-talk-1b"\n')
    machine.run("systemctl", "reload", "keepalive")
    until(lambda: status_line(machine) == "1/1 models warm", "the new config was not applied")
    machine.write(CONFIG_PATH, "[defaults]\nping_interval = 30\n")
    bad = machine.run("systemctl", "reload", "keepalive", check=False)
    rejected = "1/1 models warm; config rejected, the one before is in use"
    until(lambda: status_line(machine) == rejected, "the rejection is not shown")
    errors = machine.journal("--unit=keepalive", "--priority=err", "--output=cat")

    assert bad.returncode == 1
    assert machine.property("keepalive", "ActiveState") == "active"
    assert machine.property("keepalive", "MainPID") == pid
    assert "config.rejected" in errors
    assert '"30s"' in errors
    assert (
        "keepalive_config_last_reload_successful 0.0" in machine.run("curl", "-s", f"{ADMIN}/metrics").stdout
    )


@in_systemd
def test_reloads_without_end_leave_the_daemon_as_it_was(machine: Machine) -> None:
    pid = machine.property("keepalive", "MainPID")

    machine.shell(f"for n in $(seq 300); do kill -HUP {pid}; done")
    machine.run("systemctl", "reload", "keepalive")

    assert machine.property("keepalive", "MainPID") == pid
    assert machine.property("keepalive", "ActiveState") == "active"


@in_systemd
def test_a_daemon_that_stands_still_is_killed_by_the_watchdog_and_started_again(machine: Machine) -> None:
    drop_in(machine, "[Service]\nWatchdogSec=6s\nTimeoutAbortSec=1s\n")
    machine.run("systemctl", "restart", "keepalive")
    start_lm_studio(machine)
    wait_warm(machine)
    before = restarts(machine)

    machine.run("systemctl", "kill", "--signal=STOP", "keepalive")
    until(is_running_again(machine, before), "no watchdog came")
    wait_warm(machine)

    assert "Watchdog timeout" in machine.journal("--unit=keepalive")
    assert loads(machine) == ["medicine-llm", "small-talk-1b"]


@in_systemd
def test_a_blocked_event_loop_tells_the_journal_where_it_stood(machine: Machine) -> None:
    block = "import signal, time\ndef wait_for_nothing(*_): time.sleep(600)\n"
    machine.write("/opt/block/sitecustomize.py", f"{block}signal.signal(signal.SIGUSR1, wait_for_nothing)\n")
    settings = "WatchdogSec=6s\nTimeoutAbortSec=20s\nEnvironment=PYTHONPATH=/opt/block"
    drop_in(machine, f"[Service]\n{settings}\n")
    machine.run("systemctl", "restart", "keepalive")
    before = restarts(machine)

    machine.run("systemctl", "kill", "--signal=USR1", "keepalive")
    until(is_running_again(machine, before), "no watchdog came")
    errors = machine.journal("--unit=keepalive", "--priority=err", "--output=cat")

    assert "Fatal Python error: Aborted" in errors
    assert "in wait_for_nothing" in errors
    assert machine.shell("find /var/lib/systemd /tmp -name 'core*' -type f") == ""


@in_systemd
def test_killed_in_the_middle_of_a_load_it_does_not_load_a_second_copy(machine: Machine) -> None:
    start_lm_studio(machine, "--model", "medicine-llm:12", "--model", "small-talk-1b:1")
    until(lambda: "medicine-llm" in loads(machine), "no load began")
    before = restarts(machine)

    machine.run("systemctl", "kill", "--signal=KILL", "keepalive")
    until(is_running_again(machine, before), "it was not started again")
    wait_warm(machine)

    assert loads(machine) == ["medicine-llm", "small-talk-1b"]
    assert copies(machine) == {"medicine-llm": 1, "small-talk-1b": 1}


# Asks without end on new connections, and one more worker on connections that it keeps. A kept connection may
# be closed while a request is on its way, as HTTP says; then that worker, too, takes a new one.
TRAFFIC = """
import http.client, json, sys, threading
over, lost, count = threading.Event(), [], [0]
def one(connection):
    path = "/livez" if connection.port == 9235 else "/v1/models"
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        lost.append(f"{connection.port} {answer.status}")
    count[0] += 1
def fresh(port):
    while not over.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
        try:
            one(connection)
        except Exception as error:
            lost.append(f"{port} {error!r}")
        connection.close()
def kept(port):
    connection, used = None, 0
    while not over.is_set():
        try:
            if connection is None:
                connection, used = http.client.HTTPConnection("127.0.0.1", port, timeout=100), 0
            one(connection)
            used += 1
            if connection.sock is None:
                connection = None
        except Exception as error:
            connection = None
            if not used:
                lost.append(f"{port} {error!r}")
tasks = [(work, port) for port in (1235, 9235) for work in (fresh, fresh, kept)]
workers = [threading.Thread(target=work, args=[port]) for work, port in tasks]
for worker in workers:
    worker.start()
sys.stdin.read()
over.set()
for worker in workers:
    worker.join()
print(json.dumps({"asked": count[0], "lost": lost}))
"""


class Traffic:
    """Requests without end, to both addresses, from the beginning of a `with` to its end; `lost` are those
    without a good answer."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.asked, self.lost = 0, [""]

    def __enter__(self) -> "Traffic":
        pipe = subprocess.PIPE
        self._process = self._machine.start(PYTHON, "-c", TRAFFIC, stdin=pipe, stdout=pipe)
        return self

    def __exit__(self, *_: object) -> None:
        found = json.loads(self._process.communicate("", timeout=180)[0])
        self.asked, self.lost = found["asked"], found["lost"]


@in_systemd
def test_fifty_restarts_under_traffic_refuse_nobody_and_load_nothing_again(machine: Machine) -> None:
    start_lm_studio(machine)
    wait_warm(machine)

    with Traffic(machine) as traffic:
        for _ in range(50):
            machine.run("systemctl", "restart", "keepalive")
    wait_warm(machine)

    assert traffic.lost == []
    assert traffic.asked > 50
    # A second load would have made a second copy, and would be there.
    assert copies(machine) == {"medicine-llm": 1, "small-talk-1b": 1}


@in_systemd
def test_a_hundred_restarts_at_once_lock_nobody_out(machine: Machine) -> None:
    for _ in range(100):
        machine.run("systemctl", "restart", "--no-block", "keepalive")
    for _ in range(10):
        machine.run("systemctl", "kill", "--signal=KILL", "keepalive", check=False)
    machine.shell("for n in $(seq 40); do curl -s --max-time 0.05 http://127.0.0.1:9235/livez || true; done")
    until(lambda: ask(machine, f"{ADMIN}/livez"), "it does not answer")
    until(lambda: machine.property("keepalive", "ActiveState") == "active", "it was locked out")

    assert ask(machine, f"{ADMIN}/livez") == {"alive": True, "reason": None}
    for unit in ("keepalive.socket", "keepalive-admin.socket"):
        assert machine.property(unit, "ActiveState") == "active"


@in_systemd
def test_a_connection_starts_a_daemon_that_was_stopped_unless_its_sockets_were_too(machine: Machine) -> None:
    machine.run("systemctl", "stop", "keepalive")
    woken = ask(machine, f"{ADMIN}/livez")
    machine.run("systemctl", "stop", "keepalive.socket", "keepalive-admin.socket", "keepalive")
    refused = ask(machine, f"{ADMIN}/livez")

    assert woken == {"alive": True, "reason": None}
    assert refused is None


STOP = ("systemctl", "stop", "keepalive.socket", "keepalive-admin.socket", "keepalive")
ASK = {"model": "medicine-llm", "stream": True, "messages": [{"role": "user", "content": "hello"}]}


def start_stream(machine: Machine, tokens: int) -> subprocess.Popen[str]:
    """A chat of ten tokens a second, whose first event is here."""
    start_lm_studio(machine, *MODELS, "--fault", f"answer_tokens={tokens}", "--fault", "token_seconds=0.1")
    wait_warm(machine)
    url = "http://127.0.0.1:1235/v1/chat/completions"
    headers = ("-H", "Content-Type: application/json")
    command = ("curl", "-sN", "-w", "%{http_code}", *headers, "-d", json.dumps(ASK), url)
    stream = machine.start(*command, stdout=subprocess.PIPE)
    assert stream.stdout is not None
    until(lambda: stream.stdout and stream.stdout.readline().startswith("data: "), "no stream")
    return stream


@in_systemd
def test_a_stop_lets_a_stream_end_with_an_error_event_and_leaves_the_models_loaded(machine: Machine) -> None:
    # A drain that is longer than systemd's patience: more time has to be asked for.
    machine.write(CONFIG_PATH, CONFIG + '[server]\ndrain_timeout = "9s"\n')
    drop_in(machine, "[Service]\nTimeoutStopSec=3s\n")
    watching = machine.start("curl", "-sN", f"{ADMIN}/api/events", stdout=subprocess.DEVNULL)
    stream = start_stream(machine, tokens=100_000)

    machine.run(*STOP)
    rest = stream.communicate(timeout=60)[0]
    watching.wait(60)

    assert stream.returncode == 0
    assert rest.endswith("200")
    assert '"error"' in rest[-1000:]
    assert machine.property("keepalive", "Result") == "success"
    assert machine.property("keepalive", "ExecMainStatus") == "0"
    assert copies(machine) == {"medicine-llm": 1, "small-talk-1b": 1}
    assert "daemon.stopped" in machine.journal("--unit=keepalive")


@in_systemd
def test_a_restart_lets_a_stream_that_ends_in_time_end_well(machine: Machine) -> None:
    machine.write(CONFIG_PATH, CONFIG + '[server]\ndrain_timeout = "80s"\n')
    stream = start_stream(machine, tokens=150)

    machine.run("systemctl", "restart", "--no-block", "keepalive")
    until(lambda: machine.property("keepalive", "ActiveState") == "deactivating", "it does not stop")
    assert stream.poll() is None
    rest = stream.communicate(timeout=60)[0]

    assert rest.endswith("data: [DONE]\n\n200")
    until(lambda: ask(machine, f"{ADMIN}/livez"), "it did not start again")


@in_systemd
def test_a_token_reaches_lm_studio_and_appears_nowhere_else(machine: Machine) -> None:
    token = "canary-5f1c0d"
    machine.write("/etc/credstore/lm_token.local", f"{token}\n", mode="600")
    machine.run("systemctl", "restart", "keepalive")
    start_lm_studio(machine, *MODELS, "--fault", f"auth_token={token}")
    wait_warm(machine)
    pid = machine.property("keepalive", "MainPID")
    seen = [
        machine.shell(f"cat /proc/{pid}/environ /proc/{pid}/cmdline | tr '\\0' '\\n'"),
        machine.run("systemctl", "show", "keepalive").stdout,
        machine.run("systemctl", "status", "--full", "--no-pager", "keepalive").stdout,
        machine.journal("--unit=keepalive", "--output=export"),
        machine.run("curl", "-s", f"{ADMIN}/api/status", f"{ADMIN}/metrics").stdout,
        machine.shell("cat /var/lib/keepalive/* 2>/dev/null | tr -cd '[:print:]\\n'"),
    ]
    kept = machine.shell(f"ls -l /proc/{pid}/root/run/credentials/keepalive.service/")

    assert [place for place in seen if token in place] == []
    assert all(seen[:5])
    assert "lm_token.local" in kept


@in_systemd
def test_state_survives_a_restart_and_belongs_to_nobody_else(machine: Machine) -> None:
    start_lm_studio(machine, "--model", "medicine-llm:600", "--model", "small-talk-1b:1")
    state = "/var/lib/private/keepalive"
    noted = until(lambda: "load-" in machine.shell(f"ls {state}"), "no load was noted")
    kept = until(
        lambda: json.loads(machine.run("curl", "-s", f"{ADMIN}/api/history").stdout)["kept"], "no history"
    )

    machine.run("systemctl", "restart", "keepalive")
    entries = machine.shell(f"stat -c '%a %U' {state} {state}/*").splitlines()

    assert noted
    assert kept
    assert (entries[0], set(entries[1:])) == ("700 keepalive", {"600 keepalive"})
    assert "medicine-llm" in until(lambda: " ".join(loads(machine)), "no load")
    assert loads(machine) == ["medicine-llm"]


@in_systemd
def test_a_full_disk_costs_the_memory_of_loads_and_the_history_and_nothing_else(machine: Machine) -> None:
    state = "/var/lib/private/keepalive"
    machine.run("systemctl", "stop", "keepalive")
    machine.shell(f"mount -t tmpfs -o size=64k,mode=700 tmpfs {state}; cat /dev/zero >{state}/full || true")
    machine.run("systemctl", "start", "keepalive")
    start_lm_studio(machine)
    wait_warm(machine)
    warnings = machine.journal("--unit=keepalive", "--priority=warning", "--output=cat")

    said = sorted({line for line in warnings.splitlines() if line.startswith("bookkeeping.failed")})

    assert [re.findall(r'"([a-z_.]+): .* \((.*)\)', line)[0] for line in said] == [
        ("history.path", "database or disk is full"),
        ("server.state_dir", "no space left on device"),
    ]
    assert copies(machine) == {"medicine-llm": 1, "small-talk-1b": 1}


# What LM Studio's `lms` does, as far as a unit sees it.
LMS = """#!/bin/sh
echo "$@" >>$HOME/lms.log
case $* in
    "server start")
        /opt/lmstudio/bin/python -m keepalive simulate MODELS >/dev/null 2>&1 &
        until curl -s http://127.0.0.1:1234/ >/dev/null; do sleep 0.1; done ;;
    "daemon down") pkill -u lmstudio -f simulate ;;
esac
"""


def put_lm_studio_unit(machine: Machine, lms: str) -> None:
    machine.run("useradd", "--create-home", "lmstudio")
    machine.write("/home/lmstudio/.lmstudio/bin/lms", lms.replace("MODELS", " ".join(MODELS)), mode="755")
    machine.run("chown", "-R", "lmstudio:", "/home/lmstudio")
    machine.run("cp", "/mnt/keepalive/systemd/examples/lmstudio.service", "/etc/systemd/system/")
    machine.run("systemctl", "enable", "lmstudio.service")


@in_systemd
def test_after_a_boot_it_starts_after_lm_studio_and_all_is_warm(machine: Machine, ground: Shed) -> None:
    put_lm_studio_unit(machine, LMS)
    machine.close()
    with Machine(ground, machine.layers) as second:
        wait_warm(second)
        times = [
            second.property("lmstudio", "ActiveEnterTimestampMonotonic"),
            second.property("keepalive", "ExecMainStartTimestampMonotonic"),
        ]
        second.run("systemctl", "restart", "lmstudio")
        until(lambda: not all(copies(second).values()), "LM Studio forgot nothing")
        until(lambda: all(copies(second).values()), "the models are not warm again")
        asked = second.shell("cat /home/lmstudio/lms.log").splitlines()

        assert int(times[0]) < int(times[1])
        assert asked[:3] == ["daemon up", "server start", "daemon down"]
        assert copies(second) == {"medicine-llm": 1, "small-talk-1b": 1}


@in_systemd
def test_an_lm_studio_that_cannot_start_keeps_nothing_from_starting(machine: Machine, ground: Shed) -> None:
    put_lm_studio_unit(machine, "#!/bin/sh\nexit 1\n")
    machine.close()
    with Machine(ground, machine.layers) as second:
        assert second.property("lmstudio", "ActiveState") == "failed"
        assert second.property("keepalive", "ActiveState") == "active"
        assert ask(second, f"{ADMIN}/livez") == {"alive": True, "reason": None}


def wheel_of(wheels: Path, folder: Path, version: str, changes: dict[str, Callable[[str], str]]) -> None:
    """Put a keepalive of another version into `folder`, with some files changed, beside what it needs."""
    shutil.copytree(wheels, folder, dirs_exist_ok=True)
    old = next(folder.glob("keepalive-*.whl"))
    was = old.name.split("-")[1]
    with zipfile.ZipFile(old) as given, zipfile.ZipFile(folder / old.name.replace(was, version), "w") as made:
        for name in given.namelist():
            text = given.read(name)
            if name in changes:
                text = changes[name](text.decode()).encode()
            if name.endswith((".dist-info/METADATA", ".dist-info/RECORD", "keepalive/__init__.py")):
                text = text.replace(was.encode(), version.encode())
            made.writestr(name.replace(f"keepalive-{was}.dist-info", f"keepalive-{version}.dist-info"), text)
    old.unlink()


@pytest.fixture
def upgrade(
    ground: Shed, wheels: Path, installed: tuple[Path, ...], tmp_path: Path
) -> Iterator[Callable[..., tuple[Machine, Callable[[], subprocess.CompletedProcess[str]]]]]:
    """`upgrade(changes)` boots a machine, and gives what upgrades it there to version 9.0.0."""
    with contextlib.ExitStack() as stack:

        def prepare(**changes: Callable[[str], str]) -> Any:
            files = {f"keepalive/{name}.py": change for name, change in changes.items()}
            wheel_of(wheels, tmp_path / "new", "9.0.0", files)
            shared = {"/mnt/keepalive": PROJECT, "/mnt/wheels": tmp_path / "new"}
            machine = stack.enter_context(Machine(ground, installed, shared))
            machine.write("/etc/pip.conf", "[install]\nno-compile = yes\n")  # it saves ten seconds
            command = ("/mnt/keepalive/systemd/install", "--upgrade", "--wheels", "/mnt/wheels")
            return machine, lambda: machine.run(*command, check=False, patience=300)

        yield prepare


@in_systemd
def test_an_upgrade_under_traffic_keeps_the_config_and_refuses_nobody(upgrade: Any) -> None:
    machine, run = upgrade()
    start_lm_studio(machine)
    wait_warm(machine)

    with Traffic(machine) as traffic:
        done = run()
    wait_warm(machine)

    assert done.stdout == "keepalive 9.0.0 runs.\n"
    assert ask(machine, f"{ADMIN}/api/status")["version"] == "9.0.0"
    assert traffic.lost == []
    assert machine.shell(f"cat {CONFIG_PATH}") == CONFIG
    assert len(machine.shell("ls -d /opt/keepalive/venv.*").split()) == 1
    assert copies(machine) == {"medicine-llm": 1, "small-talk-1b": 1}


def _crashes(text: str) -> str:
    return text + '\nraise RuntimeError("this version does not start")\n'


def _never_says_ready(text: str) -> str:
    return text.replace("self._notify(READY=1)", "False")


@in_systemd
@pytest.mark.parametrize(
    "broken", [{"daemon": _crashes}, {"systemd": _never_says_ready}], ids=["crashes", "hangs"]
)
def test_an_upgrade_that_does_not_become_ready_is_taken_back(upgrade: Any, broken: dict[str, Any]) -> None:
    machine, run = upgrade(**broken)
    drop_in(machine, "[Service]\nTimeoutStartSec=15s\n")
    before = machine.shell("readlink /opt/keepalive/venv; cat /etc/systemd/system/keepalive.service")
    start_lm_studio(machine)

    with Traffic(machine) as traffic:
        done = run()

    assert done.returncode == 1
    assert f"did not become ready; keepalive {keepalive.__version__} runs again." in done.stderr
    assert machine.property("keepalive", "ActiveState") == "active"
    assert ask(machine, f"{ADMIN}/api/status")["version"] == keepalive.__version__
    assert machine.shell("readlink /opt/keepalive/venv; cat /etc/systemd/system/keepalive.service") == before
    assert len(machine.shell("ls -d /opt/keepalive/venv.*").split()) == 1
    assert traffic.lost == []


@in_systemd
def test_an_upgrade_that_refuses_the_config_changes_nothing(upgrade: Any) -> None:
    machine, run = upgrade()
    machine.write(CONFIG_PATH, CONFIG + "[server]\nport = 1\n")
    pid = machine.property("keepalive", "MainPID")

    done = run()

    assert done.returncode == 1
    assert "The new version refuses /etc/keepalive/config.toml; nothing was changed." in done.stderr
    assert machine.property("keepalive", "MainPID") == pid
    assert len(machine.shell("ls -d /opt/keepalive/venv.*").split()) == 1


@in_systemd
def test_the_sandbox_is_tight_and_the_daemon_works_in_it(machine: Machine) -> None:
    start_lm_studio(machine)
    wait_warm(machine)
    verdict = machine.run("systemd-analyze", "security", "--no-pager", "keepalive").stdout
    exposure = re.search(r"Overall exposure level for keepalive.service: ([0-9.]+)", verdict)
    metrics = machine.run("curl", "-s", f"{ADMIN}/metrics").stdout
    pid = machine.property("keepalive", "MainPID")
    limits = machine.shell(f"cat /proc/{pid}/limits")
    most = int(machine.shell("ulimit -Hn"))

    assert exposure is not None
    assert float(exposure[1]) <= 1.3
    for name in ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds", "open_fds", "max_fds"):
        assert f"\nprocess_{name} " in metrics
    # A computer that allows fewer gives what it has.
    assert re.search(r"Max open files +(\d+)", limits)[1] == str(min(65536, most))  # type: ignore[index]
    assert re.search(r"Max core file size +0 ", limits)
    assert machine.shell(f"grep -E 'Uid|Seccomp:|CapEff|NoNewPrivs' /proc/{pid}/status").split()[1] != "0"
    assert not re.search("denied|not permitted", machine.journal("--unit=keepalive", "--output=cat"))


@in_systemd
def test_the_measured_need_fits_the_limits_with_room(machine: Machine) -> None:
    start_lm_studio(machine)
    wait_warm(machine)
    watch = f"curl -sN --max-time 60 {ADMIN}/api/events >/dev/null &"
    streams = machine.start("/bin/sh", "-c", f"for n in $(seq 200); do {watch} done; wait")
    until(lambda: process_metric(machine, "open_fds") > 200, "no streams")
    memory = process_metric(machine, "resident_memory_bytes")
    pid = machine.property("keepalive", "MainPID")
    tasks = int(machine.shell(f"ls /proc/{pid}/task | wc -l"))
    streams.kill()
    streams.wait()

    assert memory < int(machine.property("keepalive", "MemoryHigh")) / 3
    assert tasks < int(machine.property("keepalive", "TasksMax")) / 3


def process_metric(machine: Machine, name: str) -> float:
    metrics = machine.run("curl", "-s", f"{ADMIN}/metrics").stdout
    found = re.search(rf"^process_{name} (\S+)$", metrics, re.MULTILINE)
    assert found
    return float(found[1])


@in_systemd
def test_the_journal_has_priorities_fields_and_one_time_per_line(machine: Machine) -> None:
    start_lm_studio(machine)
    wait_warm(machine)
    lines = machine.journal("--unit=keepalive", "--output=json").splitlines()
    entries = [json.loads(line) for line in lines]
    said = {e["MESSAGE"].split()[0]: e for e in entries if e["SYSLOG_IDENTIFIER"] == "keepalive"}
    loaded = said["model.loaded"]["MESSAGE"]

    assert said["daemon.started"]["PRIORITY"] == "6"
    assert said["upstream.state"]["PRIORITY"] == "6"
    assert re.fullmatch(
        r"model\.loaded model=small-talk-1b upstream=local seconds=[0-9.]+ elapsed=[0-9.]+ "
        r"instance=small-talk-1b",
        loaded,
    )
    assert not [e["MESSAGE"] for e in said.values() if re.search(r"20\d\d-\d\d|<\d>", e["MESSAGE"])]


@in_systemd
def test_a_burst_of_lines_is_bounded(machine: Machine) -> None:
    drop_in(machine, "[Service]\nLogRateLimitIntervalSec=1h\nLogRateLimitBurst=20\n")
    machine.run("systemctl", "restart", "keepalive")
    machine.write(CONFIG_PATH, "oops")
    pid = machine.property("keepalive", "MainPID")

    machine.shell(f"for n in $(seq 400); do kill -HUP {pid}; sleep 0.02; done")
    shown = machine.journal(f"_PID={pid}", "--output=cat").splitlines()

    # journald allows more than it was told where the disk has room: up to six times as much.
    assert 10 < len(shown) <= 130
    assert machine.property("keepalive", "ActiveState") == "active"


@in_systemd
def test_the_drop_in_for_another_host_lets_it_talk_to_that_one_alone(machine: Machine) -> None:
    for address in ("192.168.1.20", "192.168.1.21"):
        machine.run("ip", "address", "add", f"{address}/32", "dev", "lo")
    start_lm_studio(machine, *MODELS, "--host", "0.0.0.0")
    upstreams = [
        f'[[upstreams]]\nname = "{n}"\nurl = "http://192.168.1.{n[1:]}:1234"\n' for n in ("m20", "m21")
    ]
    models = '[[models]]\nkey = "medicine-llm"\nupstream = ["m20", "m21"]\n'
    machine.write(CONFIG_PATH, "".join([*upstreams, models]))
    folder = "/etc/systemd/system/keepalive.service.d"
    machine.shell(f"mkdir {folder}; cp /mnt/keepalive/systemd/examples/lmstudio-elsewhere.conf {folder}/")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "keepalive")
    known = {u["name"]: u["state"] for u in ask(machine, f"{ADMIN}/api/status")["upstreams"]}

    assert known == {"m20": "up", "m21": "down"}


# The commands of the manual, in its order. Blocks that say `console` are for the eye.
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@in_systemd
def test_every_command_of_the_manual_works_word_for_word(ground: Shed, wheels: Path) -> None:
    blocks = COMMANDS.findall((PROJECT / "docs/operations.md").read_text())
    with Machine(ground, shared={"/mnt/keepalive": PROJECT, "/mnt/wheels": wheels}) as machine:
        # There is no network, so the index is a folder.
        index = "PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=yes PIP_FIND_LINKS=/mnt/wheels"
        machine.run("mkdir", "/root/keepalive")
        machine.shell("cd /mnt/keepalive; cp -r keepalive systemd docs *.* LICENSE /root/keepalive")
        for block in blocks:
            machine.shell(f"export {index}; cd /root/keepalive\n{block}", patience=300)
            if block == "systemd/install\n":
                machine.run("cp", "-rL", "/opt/keepalive/venv", "/opt/lmstudio")
                start_lm_studio(machine, "--model", "qwen/qwen3-4b-2507:1", "--host", "0.0.0.0")

    assert len(blocks) > 8
