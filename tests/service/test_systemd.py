"""The daemon as a service: first what systemd is told, then all of it in a real systemd.

The second half boots machines (see systemd_machine.py) and runs where that is possible: as root, with
cgroup 2 and Debian's systemd. Each is put on the files of one in which keepalive was installed, once in a run.
Machines are cheap, daemons that start are not: tests share a machine, and each says how it wants to find it.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

import keepalive
from keepalive.admin import words
from keepalive.observers import logs
from keepalive.service import systemd
from tests.kit import PROJECT
from tests.kit.installed import cache
from tests.kit.systemd_machine import PATIENCE, Machine, Shed, until, why_not

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

    async with asyncio.timeout(PATIENCE):
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
pytestmark = pytest.mark.timeout(900)
T = TypeVar("T", bound=Callable[..., Any])


def in_systemd(group: str) -> Callable[[T], T]:
    """For a test that needs a machine. Those of one group run in one process, and so on one machine; there are
    three groups so that two or three processes can share the work."""

    def mark(test: T) -> T:
        for it in (
            pytest.mark.xdist_group(f"systemd-{group}"),
            pytest.mark.skipif(WHY_NOT is not None, reason=f"a real systemd {WHY_NOT}"),
        ):
            test = it(test)
        return test

    return mark


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
DROP_IN_PATH = "/etc/systemd/system/keepalive.service.d/test.conf"
OPTIONS = "--host 0.0.0.0 --model medicine-llm:0.2 --model small-talk-1b:0.1"
WARM = {"medicine-llm": 1, "small-talk-1b": 1}
TOKEN = "canary-5f1c0d"
PYTHON = "/usr/bin/python3"
ADMIN = "http://127.0.0.1:9235"
CLIENT = "http://127.0.0.1:1235"
STUDIO = "http://127.0.0.1:1234"

# What LM Studio's `lms` does, as far as a unit sees it. The program is outside of the installation that an
# upgrade replaces.
LMS = f"""#!/bin/sh
echo "$@" >>$HOME/lms.log
case $* in
    "server start")
        /opt/lmstudio/bin/python -m keepalive.simulator $(cat $HOME/options) >/dev/null 2>&1 &
        until curl -s {STUDIO}/ >/dev/null; do sleep 0.1; done ;;
    "daemon down") pkill -u lmstudio -f simulator ;;
esac
"""
LMS_FOLDER = "/home/lmstudio/.lmstudio/bin"

# To put pip into a new environment takes longer than all else that an installation does, and is none of ours: it finds
# pip there, and after the first time what keepalive needs, where the first installation had them put.
ENSUREPIP = """
import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "packages.pth").write_text("/opt/packages")
"""

# The commands of the manual, in its order. Blocks that say `console` are for the eye.
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MANUAL = COMMANDS.findall((PROJECT / "docs/operations.md").read_text())


def follow(machine: Machine, block: str, wheels: Path) -> None:
    """What the manual says, word for word, in the folder of the unpacked release."""
    # There is no network, so the index is a folder.
    index = f"PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=yes PIP_FIND_LINKS={wheels}"
    machine.shell(f"export {index}; cd /root/keepalive\n{block}", patience=600)


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Shed:
    run = tmp_path_factory.getbasetemp()
    return Shed((run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "machines")


@pytest.fixture(scope="session")
def wheels(ground: Shed) -> Path:
    """What Debian's Python needs instead of a network: the packages of an installation from source.

    The first run of all has them fetched, and whoever needs the same goes on with those.
    """
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    notify = project["project"]["optional-dependencies"]["notify"]
    needs = [*project["project"]["dependencies"], *notify, *project["build-system"]["requires"]]
    version = subprocess.run([PYTHON, "-VV"], stdout=subprocess.PIPE, text=True, check=True).stdout
    kept = cache() / f"wheels-{hashlib.sha256(repr((needs, version)).encode()).hexdigest()[:16]}"

    def fetch() -> None:
        if kept.exists():
            return
        with tempfile.TemporaryDirectory(dir=cache(), prefix="wheels.") as fetched:
            pip = (sys.executable, "-m", "pip", "--python", PYTHON, "--disable-pip-version-check", "-q")
            subprocess.run([*pip, "wheel", "--wheel-dir", f"{fetched}/all", *needs], check=True)
            try:
                Path(fetched, "all").rename(kept)
            except OSError:
                if not kept.exists():  # else another checkout was faster
                    raise

    cache().mkdir(parents=True, exist_ok=True)
    ground.once("wheels", fetch)
    return kept


@pytest.fixture(scope="session")
def installed(ground: Shed, wheels: Path) -> list[Path]:
    """The layers of a machine where keepalive was installed as the manual says, with CONFIG, and LM Studio as
    our example of a unit has it."""

    def install() -> list[str]:
        with Machine(ground, shared={"/mnt/keepalive": PROJECT, "/mnt/wheels": wheels}) as machine:
            machine.run("mkdir", "/root/keepalive")
            machine.shell("cd /mnt/keepalive; cp -r keepalive systemd docs *.* LICENSE /root/keepalive")
            machine.write("/opt/ensurepip", ENSUREPIP)
            machine.shell(f"""
                {PYTHON} -m zipfile -e $(ls /usr/share/python-wheels/pip-*.whl) /opt/packages
                {PYTHON} -m compileall -q /opt/packages || true
                cp /opt/ensurepip $({PYTHON} -c 'import ensurepip; print(ensurepip.__path__[0])')/__main__.py
            """)
            follow(machine, MANUAL[0], Path("/mnt/wheels"))
            machine.run(*STOP)
            machine.write(CONFIG_PATH, CONFIG)
            machine.write(DROP_IN_PATH, "")
            machine.write("/etc/credstore/lm_token.local", f"{TOKEN}\n", mode="600")
            machine.run("useradd", "--create-home", "lmstudio")
            machine.write("/home/lmstudio/options", OPTIONS)
            machine.write(f"{LMS_FOLDER}/lms", LMS, mode="755")
            machine.shell("""
                chown -R lmstudio: /home/lmstudio
                cp /mnt/keepalive/systemd/examples/lmstudio.service /etc/systemd/system/
                systemctl enable lmstudio.service
                cp -rL /opt/keepalive/venv /opt/lmstudio
                cp -r /opt/lmstudio/lib/python3*/site-packages/* /opt/packages
                rm -r /opt/packages/keepalive* /opt/packages/packages.pth
            """)
        return [str(layer) for layer in machine.layers]

    return [Path(layer) for layer in ground.once("installed", install)]


class Common:
    """The machine that tests share, booted for the first of them."""

    def __init__(self, ground: Shed, layers: Sequence[Path], release: Path, wheels: Path) -> None:
        self._ground, self._layers, self._release, self._wheels = ground, layers, release, wheels
        self._machine: Machine | None = None

    def get(self) -> Machine:
        if self._machine is None:
            shared = {"/mnt/keepalive": PROJECT, "/mnt/release": self._release, "/mnt/wheels": self._wheels}
            self._machine = Machine(self._ground, self._layers, shared)
        return self._machine

    def close(self) -> None:
        if self._machine is not None:
            self._machine.close()
        self._machine = None


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, which machines have as /mnt/release."""
    return tmp_path_factory.mktemp("release")


@pytest.fixture(scope="module")
def common(ground: Shed, installed: list[Path], release: Path, wheels: Path) -> Iterator[Common]:
    opened = Common(ground, installed, release, wheels)
    yield opened
    opened.close()


@pytest.fixture
def machine(common: Common, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The machine that tests share, for one that begins with `make_ready`. What a test that failed has left is
    nobody's."""
    failed = request.session.testsfailed
    yield common.get()
    if request.session.testsfailed > failed:
        common.close()


STOP = ("systemctl", "stop", "keepalive.socket", "keepalive-admin.socket", "keepalive")

CONFIGURE = f"""
changed=
put() {{ mkdir -p $(dirname $1); cat >/run/new; cmp -s /run/new $1 || {{ cp /run/new $1; changed=yes; }}; }}
put {CONFIG_PATH} <<'END'
%sEND
put {DROP_IN_PATH} <<'END'
%sEND
[ -z "$changed" ] || {{ systemctl daemon-reload; systemctl stop keepalive; }}
systemctl start keepalive.socket keepalive-admin.socket lmstudio keepalive
"""


def configure(machine: Machine, config: str, drop_in: str) -> None:
    """All runs, under this config and this drop-in; the daemon starts anew where it had others."""
    machine.shell(CONFIGURE % (config, drop_in))


def make_ready(machine: Machine, *, config: str = CONFIG, drop_in: str = "") -> None:
    """The same, and all is warm."""
    configure(machine, config, drop_in)
    faults(machine, auth_token=None, load_seconds=None, answer_tokens=None, token_seconds=None)
    wait_warm(machine)


def wait_warm(machine: Machine) -> None:
    """What `keepalive wait` does, without starting a Python."""
    machine.shell(f"until curl -sf {ADMIN}/readyz >/dev/null; do sleep 0.1; done")


def ask(machine: Machine, url: str, *options: str) -> Any:
    """What is answered, as JSON; None when nobody answers."""
    answer = machine.run("curl", "-s", "--max-time", "240", *options, url, check=False).stdout
    return json.loads(answer) if answer else None


def faults(machine: Machine, **values: Any) -> None:
    assert ask(machine, f"{STUDIO}/simulator/faults", "-X", "PATCH", "-d", json.dumps(values))


def skip_time(machine: Machine, seconds: float) -> None:
    """In LM Studio."""
    assert ask(machine, f"{STUDIO}/simulator/advance", "-d", json.dumps({"seconds": seconds}))


def evict(machine: Machine, model: str) -> None:
    assert ask(machine, f"{STUDIO}/simulator/evict", "-d", json.dumps({"model": model}))


def loads(machine: Machine) -> list[str]:
    """The loads that LM Studio was asked for, in their order."""
    events = ask(machine, f"{STUDIO}/simulator/log?since=0")["events"]
    return [event["model"] for event in events if event["kind"] == "load.started"]


def copies(machine: Machine) -> dict[str, int]:
    models = ask(machine, f"{STUDIO}/simulator/state")["models"]
    return {model["key"]: len(model["instances"]) for model in models}


def state(machine: Machine, key: str) -> str | None:
    """The state of a model, while there is a daemon that answers."""
    known = ask(machine, f"{ADMIN}/api/status")
    return {model["key"]: model["state"] for model in known["models"]}[key] if known else None


def status_line(machine: Machine) -> str:
    return machine.property("keepalive", "StatusText")


def restarts(machine: Machine) -> int:
    return int(machine.property("keepalive", "NRestarts"))


def is_running_again(machine: Machine, before: int) -> Callable[[], bool]:
    return lambda: restarts(machine) > before and machine.property("keepalive", "ActiveState") == "active"


# --- On a machine that stays as it is


@in_systemd("calm")
def test_the_sandbox_is_tight_and_the_daemon_works_in_it(machine: Machine) -> None:
    make_ready(machine)
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


@in_systemd("calm")
def test_the_measured_need_fits_the_limits_with_room(machine: Machine) -> None:
    make_ready(machine)
    streams = ("--parallel", "--parallel-immediate", "--parallel-max", "200", f"{ADMIN}/api/events?[1-200]")
    watching = machine.start("curl", "-sN", *streams, stdout=subprocess.DEVNULL)
    until(lambda: process_metric(machine, "open_fds") > 200, "no streams")
    memory = process_metric(machine, "resident_memory_bytes")
    pid = machine.property("keepalive", "MainPID")
    tasks = int(machine.shell(f"ls /proc/{pid}/task | wc -l"))
    watching.kill()
    watching.wait()

    assert memory < int(machine.property("keepalive", "MemoryHigh")) / 3
    assert tasks < int(machine.property("keepalive", "TasksMax")) / 3


def process_metric(machine: Machine, name: str) -> float:
    metrics = machine.run("curl", "-s", f"{ADMIN}/metrics").stdout
    found = re.search(rf"^process_{name} (\S+)$", metrics, re.MULTILINE)
    assert found
    return float(found[1])


@in_systemd("calm")
def test_the_journal_has_priorities_fields_and_one_time_per_line(machine: Machine) -> None:
    make_ready(machine)
    lines = machine.journal("--unit=keepalive", "--output=json").splitlines()
    entries = [json.loads(line) for line in lines]
    said = {e["MESSAGE"].split()[0]: e for e in entries if e["SYSLOG_IDENTIFIER"] == "keepalive"}
    loaded = said["model.loaded"]["MESSAGE"]

    assert said["daemon.started"]["PRIORITY"] == "6"
    assert said["upstream.state"]["PRIORITY"] == "6"
    assert re.fullmatch(
        r"model\.loaded model=(\S+) upstream=local seconds=[0-9.]+ elapsed=[0-9.]+ instance=\1", loaded
    )
    assert not [e["MESSAGE"] for e in said.values() if re.search(r"20\d\d-\d\d|<\d>", e["MESSAGE"])]


@in_systemd("calm")
def test_a_token_reaches_lm_studio_and_appears_nowhere_else(machine: Machine) -> None:
    make_ready(machine)
    faults(machine, auth_token=TOKEN)
    evict(machine, "medicine-llm")
    until(lambda: copies(machine) == WARM, "it was not found missing, or not loaded")
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

    assert [place for place in seen if TOKEN in place] == []
    assert all(seen[:5])
    assert "lm_token.local" in kept


@in_systemd("calm")
def test_the_status_line_follows_a_load(machine: Machine) -> None:
    make_ready(machine)
    faults(machine, load_seconds=600)
    evict(machine, "small-talk-1b")

    line = until(lambda: re.search(r".*small-talk-1b loading, \d+", status_line(machine)), "no load shown")
    skip_time(machine, 600)
    until(lambda: status_line(machine) == "2/2 models warm", "its end is not shown")

    assert line[0].startswith("1/2 models warm; ")


@in_systemd("calm")
def test_doctor_finds_a_service_that_the_next_boot_would_not_start(machine: Machine) -> None:
    make_ready(machine)
    enabled = machine.run("keepalive", "doctor", "-c", CONFIG_PATH, check=False)
    machine.run("systemctl", "disable", "keepalive.service")

    disabled = machine.run("keepalive", "doctor", "-c", CONFIG_PATH, check=False)
    machine.run("systemctl", "enable", "keepalive.service")

    assert "keepalive.service" not in enabled.stdout
    assert "✗ keepalive.service is disabled" in disabled.stdout
    assert "do:  systemctl enable keepalive.service" in disabled.stdout
    assert disabled.returncode == 1


@in_systemd("calm")
def test_a_second_installation_changes_nothing(machine: Machine) -> None:
    make_ready(machine)
    pid = machine.property("keepalive", "MainPID")
    folders = "/etc/keepalive /etc/systemd/system /opt/keepalive/docs"
    files = f"ls -d /opt/keepalive/*; find {folders} -type f | sort | xargs cksum"
    before = machine.shell(files)

    said = machine.run("/root/keepalive/systemd/install").stdout

    assert "is installed and runs" in said
    assert machine.property("keepalive", "MainPID") == pid
    assert machine.shell(files) == before


@in_systemd("calm")
def test_a_good_reload_is_applied_and_a_bad_one_fails_and_changes_nothing(machine: Machine) -> None:
    make_ready(machine)
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


@in_systemd("calm")
def test_reloads_without_end_leave_the_daemon_as_it_was(machine: Machine) -> None:
    make_ready(machine)
    pid = machine.property("keepalive", "MainPID")

    machine.shell(f"for n in $(seq 300); do kill -HUP {pid}; done")
    machine.run("systemctl", "reload", "keepalive")

    assert machine.property("keepalive", "MainPID") == pid
    assert machine.property("keepalive", "ActiveState") == "active"


DESKTOP = COMMANDS.findall((PROJECT / "docs/desktop.md").read_text())
PERSON = 2000
OWN = "http://127.0.0.1:9236"
OWN_CONFIG = """
[server]
listen = "127.0.0.1:1236"
admin_listen = "127.0.0.1:9236"

[[upstreams]]
name = "local"
url = "http://127.0.0.1:1234"
api_token_env = "LM_API_TOKEN"

[[models]]
key = "medicine-llm"
"""


@in_systemd("calm")
def test_a_person_without_root_runs_it_in_their_own_manager_as_the_manual_says(machine: Machine) -> None:
    make_ready(machine)
    machine.shell(f"""
        useradd --create-home --uid {PERSON} person
        systemctl start user@{PERSON}
    """)

    def person(script: str, check: bool = True) -> str:
        environ = (f"XDG_RUNTIME_DIR=/run/user/{PERSON}", "HOME=/home/person", "PATH=/usr/bin:/bin")
        become = ("setpriv", f"--reuid={PERSON}", f"--regid={PERSON}", "--clear-groups")
        words = ("env", "-i", *environ, "sh", "-euc", f"cd /mnt/keepalive\n{script}")
        done = machine.run(*become, *words, check=check)
        return done.stdout + done.stderr

    def shows(name: str) -> str:
        return person(f"systemctl --user show --property {name} --value keepalive").strip()

    person(f"""
        mkdir -p ~/.local/bin ~/.config/keepalive
        ln -s /opt/keepalive/venv/bin/keepalive ~/.local/bin/
        cat >~/.config/keepalive/config.toml <<'END'\n{OWN_CONFIG}END
    """)
    person(DESKTOP[3].replace("sk-lm-replace-this", TOKEN))
    faults(machine, auth_token=TOKEN)
    person(DESKTOP[1])
    machine.shell(f"until curl -sf {OWN}/readyz >/dev/null; do sleep 0.1; done")
    until(lambda: shows("StatusText") == "1/1 models warm", "its status is not shown")
    pid = shows("MainPID")
    owner, kept = machine.shell(f"stat -c %u /proc/{pid}"), person("ls ~/.local/state/keepalive")
    person("systemctl --user reload keepalive; cp ~/.config/keepalive/config.toml ~/good.toml")
    person("echo 'port = 1' >>~/.config/keepalive/config.toml")
    refused = person("systemctl --user reload keepalive", check=False)
    same = shows("MainPID")
    person(f"cp ~/good.toml ~/.config/keepalive/config.toml; kill -KILL {pid}")
    until(
        lambda: shows("MainPID") not in ("0", pid) and ask(machine, f"{OWN}/livez"), "it does not come back"
    )
    person("systemctl --user disable --now keepalive")

    assert (owner, same) == (f"{PERSON}\n", pid)
    assert "history.db" in kept
    assert "failed" in refused
    assert shows("ActiveState") == "inactive"
    assert copies(machine) == WARM
    machine.run("systemctl", "stop", f"user@{PERSON}")


# --- Restarts


# As long as a daemon may stand still here. A computer that is busy enough to make it stand still for longer
# has it killed once more, which the tests do not mind.
WATCHED = """[Service]
WatchdogSec=6s
TimeoutAbortSec={patience}
Environment=PYTHONPATH=/opt/block
"""
BLOCK = """
import signal, time
def wait_for_nothing(*_): time.sleep(600)
signal.signal(signal.SIGUSR1, wait_for_nothing)
"""


@in_systemd("restarts")
def test_a_blocked_event_loop_tells_the_journal_where_it_stood(machine: Machine) -> None:
    machine.write("/opt/block/sitecustomize.py", BLOCK)
    make_ready(machine, drop_in=WATCHED.format(patience="60s"))
    before = restarts(machine)

    machine.run("systemctl", "kill", "--signal=USR1", "keepalive")
    until(is_running_again(machine, before), "no watchdog came")
    errors = machine.journal("--unit=keepalive", "--priority=err", "--output=cat")

    assert re.search(r"Fatal Python error: Aborted(?s:.*)in wait_for_nothing", errors)
    assert machine.shell("find /var/lib/systemd /tmp -name 'core*' -type f") == ""


@in_systemd("restarts")
def test_a_daemon_that_stands_still_is_killed_by_the_watchdog_and_started_again(machine: Machine) -> None:
    make_ready(machine, drop_in=WATCHED.format(patience="1s"))
    before, loaded = restarts(machine), loads(machine)

    machine.run("systemctl", "kill", "--signal=STOP", "keepalive")
    until(is_running_again(machine, before), "no watchdog came")
    wait_warm(machine)

    assert "Watchdog timeout" in machine.journal("--unit=keepalive")
    assert loads(machine) == loaded


@in_systemd("restarts")
def test_a_load_under_way_is_noted_and_neither_a_restart_nor_a_kill_begins_it_again(machine: Machine) -> None:
    make_ready(machine)
    folder = "/var/lib/private/keepalive"
    loaded = loads(machine)
    until(lambda: ask(machine, f"{ADMIN}/api/history")["kept"], "no history")
    faults(machine, load_seconds=600)
    evict(machine, "medicine-llm")
    until(lambda: "load-" in machine.shell(f"ls {folder}"), "no load was noted")
    entries = machine.shell(f"stat -c '%a %U' {folder} {folder}/*").splitlines()

    machine.run("systemctl", "restart", "keepalive")
    until(lambda: state(machine, "medicine-llm") == "loading", "it is not waited for after a restart")
    before = restarts(machine)
    machine.run("systemctl", "kill", "--signal=KILL", "keepalive")
    until(is_running_again(machine, before), "it was not started again")
    until(lambda: state(machine, "medicine-llm") == "loading", "it is not waited for after a kill")
    skip_time(machine, 600)
    wait_warm(machine)

    assert (entries[0], set(entries[1:])) == ("700 keepalive", {"600 keepalive"})
    assert loads(machine) == [*loaded, "medicine-llm"]
    assert copies(machine) == WARM


# Asks without end on new connections, and one more worker on connections that it keeps. A kept connection may
# be closed while a request is on its way, as HTTP says; then that worker, too, takes a new one. Each has an
# answer before anything else happens, and another one afterwards. They take breath, for the six of them would need
# all of a computer; a restart takes longer than that, so that each of them meets it.
TRAFFIC = """
import http.client, json, sys, threading, time
over, lost = threading.Event(), []
begun = threading.Barrier(7)
def one(connection):
    path = "/livez" if connection.port == 9235 else "/v1/models"
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        lost.append(f"{connection.port} {answer.status}")
def fresh(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        one(connection)
    except Exception as error:
        lost.append(f"{port} {error!r}")
    connection.close()
def kept(port):
    mine = threading.current_thread()
    try:
        if getattr(mine, "connection", None) is None:
            mine.connection, mine.used = http.client.HTTPConnection("127.0.0.1", port, timeout=300), 0
        one(mine.connection)
        mine.used += 1
        if mine.connection.sock is None:
            mine.connection = None
    except Exception as error:
        mine.connection = None
        if not mine.used:
            lost.append(f"{port} {error!r}")
def work(ask, port):
    ask(port)
    begun.wait()
    while not over.is_set():
        time.sleep(0.2)
        ask(port)
    ask(port)
tasks = [(ask, port) for port in (1235, 9235) for ask in (fresh, fresh, kept)]
workers = [threading.Thread(target=work, args=task) for task in tasks]
for worker in workers:
    worker.start()
begun.wait()
print("begun", flush=True)
sys.stdin.read()
over.set()
for worker in workers:
    worker.join()
print(json.dumps(lost))
"""


class Traffic:
    """Requests without end, to both addresses, from the beginning of a `with` to its end; `lost` are those
    without a good answer."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.lost = [""]

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = self._machine.start(PYTHON, "-c", TRAFFIC, stdin=pipe, stdout=pipe)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.lost = json.loads(self._process.communicate("", timeout=300)[0])


@in_systemd("restarts")
def test_restarts_under_traffic_refuse_nobody_and_load_nothing_again(machine: Machine) -> None:
    make_ready(machine)

    # Each of them meets six clients in the middle of something. More of them find nothing new.
    with Traffic(machine) as traffic:
        for _ in range(5):
            machine.run("systemctl", "restart", "keepalive")
    wait_warm(machine)

    assert traffic.lost == []
    # A second load would have made a second copy, and would be there.
    assert copies(machine) == WARM


@in_systemd("restarts")
def test_a_service_that_starts_again_and_again_is_not_locked_out(machine: Machine) -> None:
    """By default systemd gives a service up at the sixth start, and a socket at the twenty-first, in a few
    seconds."""
    make_ready(machine)
    units = ("keepalive.service", "keepalive.socket", "keepalive-admin.socket")
    limits = ("StartLimitIntervalUSec", "TriggerLimitIntervalUSec", "TriggerLimitIntervalUSec")
    pid = "$(systemctl show --property MainPID --value keepalive)"

    machine.shell(f"""
        for n in $(seq 25); do
            old={pid}
            systemctl restart --no-block keepalive
            while [ {pid} = $old ] || [ {pid} = 0 ]; do :; done
        done
        for n in $(seq 40); do curl -s --max-time 0.05 {ADMIN}/livez || true; done
    """)
    until(lambda: machine.property("keepalive", "ActiveState") == "active", "it was locked out")

    assert ask(machine, f"{ADMIN}/livez") == {"alive": True, "reason": None}
    assert [machine.property(unit, "ActiveState") for unit in units] == 3 * ["active"]
    assert [machine.property(*pair) for pair in zip(units, limits, strict=True)] == 3 * ["0"]


@in_systemd("restarts")
def test_a_connection_starts_a_daemon_that_was_stopped_unless_its_sockets_were_too(machine: Machine) -> None:
    make_ready(machine)
    machine.run("systemctl", "stop", "keepalive")
    woken = ask(machine, f"{ADMIN}/livez")
    machine.run(*STOP)
    refused = ask(machine, f"{ADMIN}/livez")

    assert woken == {"alive": True, "reason": None}
    assert refused is None


ASK = {"model": "medicine-llm", "stream": True, "messages": [{"role": "user", "content": "hello"}]}


def start_stream(machine: Machine) -> subprocess.Popen[str]:
    """A chat whose first event is here, and whose last ones come when ten minutes of LM Studio's have passed."""
    faults(machine, answer_tokens=2, token_seconds=600.0)
    headers = ("-H", "Content-Type: application/json")
    command = ("curl", "-sN", "-w", "%{http_code}", *headers, "-d", json.dumps(ASK))
    stream = machine.start(*command, f"{CLIENT}/v1/chat/completions", stdout=subprocess.PIPE)
    assert stream.stdout is not None
    until(lambda: stream.stdout and stream.stdout.readline().startswith("data: "), "no stream")
    return stream


@in_systemd("restarts")
def test_a_stop_lets_a_stream_end_with_an_error_event_and_leaves_the_models_loaded(machine: Machine) -> None:
    # A drain that is longer than systemd's patience: more time has to be asked for, as it is each second.
    config = CONFIG + '[server]\ndrain_timeout = "12s"\n'
    make_ready(machine, config=config, drop_in="[Service]\nTimeoutStopSec=8s\n")
    watching = machine.start("curl", "-sN", f"{ADMIN}/api/events", stdout=subprocess.DEVNULL)
    stream = start_stream(machine)

    machine.run(*STOP)
    rest = stream.communicate(timeout=PATIENCE)[0]
    watching.wait(PATIENCE)

    assert stream.returncode == 0
    assert rest.endswith("200")
    assert '"error"' in rest[-1000:]
    assert machine.property("keepalive", "Result") == "success"
    assert machine.property("keepalive", "ExecMainStatus") == "0"
    assert copies(machine) == WARM
    assert "daemon.stopped" in machine.journal("--unit=keepalive")


@in_systemd("restarts")
def test_a_restart_lets_a_stream_that_ends_in_time_end_well(machine: Machine) -> None:
    make_ready(machine, config=CONFIG + '[server]\ndrain_timeout = "20m"\n')
    stream = start_stream(machine)

    machine.run("systemctl", "restart", "--no-block", "keepalive")
    until(lambda: machine.property("keepalive", "ActiveState") == "deactivating", "it does not stop")
    assert stream.poll() is None
    skip_time(machine, 600)
    rest = stream.communicate(timeout=PATIENCE)[0]

    assert rest.endswith("data: [DONE]\n\n200")
    until(lambda: machine.property("keepalive", "ActiveState") == "active", "it did not start again")


@in_systemd("restarts")
def test_a_full_disk_costs_the_memory_of_loads_and_the_history_and_nothing_else(machine: Machine) -> None:
    make_ready(machine)
    folder = "/var/lib/private/keepalive"
    machine.run("systemctl", "stop", "keepalive")
    machine.shell(f"mount -t tmpfs -o size=64k,mode=700 tmpfs {folder}; cat /dev/zero >{folder}/full || true")
    machine.run("systemctl", "start", "keepalive")
    evict(machine, "medicine-llm")
    until(lambda: copies(machine)["medicine-llm"], "it was not loaded")
    wait_warm(machine)
    pid = machine.property("keepalive", "MainPID")
    warnings = machine.journal(f"_PID={pid}", "--priority=warning", "--output=cat")
    machine.shell(f"systemctl stop keepalive; umount {folder}")

    said = sorted({line for line in warnings.splitlines() if line.startswith("bookkeeping.failed")})

    assert [re.findall(r'"([a-z_.]+): .* \((.*)\)', line)[0] for line in said] == [
        ("history.path", "database or disk is full"),
        ("server.state_dir", "no space left on device"),
    ]
    assert copies(machine) == WARM


@in_systemd("restarts")
def test_the_drop_in_for_another_host_lets_it_talk_to_that_one_alone(machine: Machine) -> None:
    for address in ("192.168.1.20", "192.168.1.21"):
        machine.run("ip", "address", "add", f"{address}/32", "dev", "lo")
    upstreams = [
        f'[[upstreams]]\nname = "{n}"\nurl = "http://192.168.1.{n[1:]}:1234"\n' for n in ("m20", "m21")
    ]
    models = '[[models]]\nkey = "medicine-llm"\nupstream = ["m20", "m21"]\n'
    drop_in = (PROJECT / "systemd/examples/lmstudio-elsewhere.conf").read_text()
    configure(machine, "".join([*upstreams, models]), drop_in)
    known = {u["name"]: u["state"] for u in ask(machine, f"{ADMIN}/api/status")["upstreams"]}

    assert known == {"m20": "up", "m21": "down"}


@in_systemd("restarts")
def test_a_burst_of_lines_is_bounded(machine: Machine) -> None:
    make_ready(machine, drop_in="[Service]\nLogRateLimitIntervalSec=1h\nLogRateLimitBurst=20\n")
    pid = machine.property("keepalive", "MainPID")

    # A line each.
    machine.run("curl", "-sf", "-o", "/dev/null", f"{CLIENT}/v1/models?[1-400]")
    shown = machine.journal(f"_PID={pid}", "--output=cat").splitlines()
    machine.run("systemctl", "restart", "systemd-journald")  # it would go on to hold them back

    # journald allows more than it was told where the disk has room: up to six times as much.
    assert 10 < len(shown) <= 130
    assert machine.property("keepalive", "ActiveState") == "active"


# --- Boots, upgrades, the manual


@in_systemd("changes")
def test_after_a_boot_it_starts_after_lm_studio_and_all_is_warm(
    ground: Shed, installed: list[Path], tmp_path: Path
) -> None:
    with Machine(ground, installed) as machine:
        times = [
            machine.property("lmstudio", "ActiveEnterTimestampMonotonic"),
            machine.property("keepalive", "ExecMainStartTimestampMonotonic"),
        ]
        wait_warm(machine)
        machine.run("systemctl", "restart", "lmstudio")
        until(lambda: loads(machine), "LM Studio forgot nothing")
        wait_warm(machine)
        asked = machine.shell("cat /home/lmstudio/lms.log").splitlines()

        assert int(times[0]) < int(times[1])
        assert asked[:3] == ["daemon up", "server start", "daemon down"]
        assert copies(machine) == WARM


@in_systemd("changes")
def test_an_lm_studio_that_cannot_start_keeps_nothing_from_starting_and_is_found_when_it_does(
    ground: Shed, installed: list[Path], tmp_path: Path
) -> None:
    lms = tmp_path / "lms"
    lms.write_text("#!/bin/sh\nexit 1\n")
    lms.chmod(0o755)
    with Machine(ground, installed, {LMS_FOLDER: tmp_path}) as machine:
        before = machine.run("systemctl", "status", "--no-pager", "keepalive").stdout
        alive = ask(machine, f"{ADMIN}/livez")
        states = [machine.property(unit, "ActiveState") for unit in ("lmstudio", "keepalive")]

        machine.shell(f"umount {LMS_FOLDER}; systemctl start lmstudio")
        wait_warm(machine)
        until(lambda: status_line(machine) == "2/2 models warm", "the status line did not follow")
        after = machine.run("systemctl", "status", "--no-pager", "keepalive").stdout

        assert states == ["failed", "active"]
        assert alive == {"alive": True, "reason": None}
        assert "Active: active (running)" in before
        assert f'Status: "0/2 models warm; local is down: nothing listens at {STUDIO}"' in before
        assert 'Status: "2/2 models warm"' in after
        assert copies(machine) == WARM


Change = Callable[[str], str]


def write_release(folder: Path, **changes: Change) -> None:
    """Version 9.0.0, unpacked, with the packages for `--wheels`; in some files something is changed."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("systemd", "docs"):
        shutil.copytree(PROJECT / name, folder / name)
    shutil.copy(PROJECT / "config.toml", folder)
    unit = folder / "systemd/keepalive.service"
    unit.write_text(changes.pop("unit", str)(unit.read_text()))
    (folder / "wheels").mkdir()
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: keepalive\nVersion: 9.0.0\n"
        "Provides-Extra: notify\nRequires-Dist: apprise; extra == 'notify'\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nkeepalive = keepalive.cli.app:main\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / "wheels/keepalive-9.0.0-py3-none-any.whl", "w") as wheel:
        for name, text in about.items():
            wheel.writestr(f"keepalive-9.0.0.dist-info/{name}", text)
        for path in (PROJECT / "keepalive").rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                data = path.read_bytes()
                name = str(path.relative_to(PROJECT))
                if name == "keepalive/__init__.py":
                    data = data.replace(keepalive.__version__.encode(), b"9.0.0")
                if change := changes.pop(path.stem if path.parent.name == "service" else "", None):
                    data = change(data.decode()).encode()
                wheel.writestr(name, data)
    assert not changes


# What is installed already is installed anew, also what messages need, where an earlier test had them.
INDEX = ("env", "PIP_FIND_LINKS=/mnt/wheels")
UPGRADE = (*INDEX, "/mnt/release/new/systemd/install", "--upgrade", "--wheels", "/mnt/release/new/wheels")


@in_systemd("changes")
def test_an_upgrade_under_traffic_keeps_the_config_and_refuses_nobody(
    ground: Shed, installed: list[Path], tmp_path: Path
) -> None:
    write_release(tmp_path / "new")
    with Machine(ground, installed, {"/mnt/release": tmp_path}) as machine:
        wait_warm(machine)

        with Traffic(machine) as traffic:
            done = machine.run(*UPGRADE, check=False, patience=600)
        wait_warm(machine)

        assert done.stdout == "keepalive 9.0.0 runs.\n"
        assert ask(machine, f"{ADMIN}/api/status")["version"] == "9.0.0"
        assert traffic.lost == []
        assert machine.shell(f"cat {CONFIG_PATH}") == CONFIG
        assert len(machine.shell("ls -d /opt/keepalive/venv.*").split()) == 1
        assert copies(machine) == WARM


def _crashes(text: str) -> str:
    return text + '\nraise RuntimeError("this version does not start")\n'


def _never_says_ready(text: str) -> str:
    assert "self._notify(READY=1)" in text
    return text.replace("self._notify(READY=1)", "False")


def _waits_less(text: str) -> str:
    """The new version's unit, and no other: the old version has all the time it wants."""
    assert "TimeoutStartSec=90s" in text
    return text.replace("TimeoutStartSec=90s", "TimeoutStartSec=5s")


@in_systemd("changes")
@pytest.mark.parametrize(
    "broken",
    [{"daemon": _crashes}, {"systemd": _never_says_ready, "unit": _waits_less}],
    ids=["crashes", "hangs"],
)
def test_an_upgrade_that_does_not_become_ready_is_taken_back(
    machine: Machine, release: Path, broken: dict[str, Change]
) -> None:
    write_release(release / "new", **broken)
    make_ready(machine)
    files = "readlink /opt/keepalive/venv; cat /etc/systemd/system/keepalive.service"
    before, version = machine.shell(files), ask(machine, f"{ADMIN}/api/status")["version"]

    with Traffic(machine) as traffic:
        done = machine.run(*UPGRADE, check=False, patience=600)

    assert done.returncode == 1
    assert f"did not become ready; keepalive {version} runs again." in done.stderr
    assert machine.property("keepalive", "ActiveState") == "active"
    assert ask(machine, f"{ADMIN}/api/status")["version"] == version
    assert machine.shell(files) == before
    assert len(machine.shell("ls -d /opt/keepalive/venv.*").split()) == 1
    assert traffic.lost == []


@in_systemd("changes")
def test_an_upgrade_that_refuses_the_config_changes_nothing(machine: Machine, release: Path) -> None:
    write_release(release / "new")
    make_ready(machine)
    machine.write(CONFIG_PATH, CONFIG + "[server]\nport = 1\n")
    pid = machine.property("keepalive", "MainPID")

    done = machine.run(*UPGRADE, check=False, patience=600)

    assert done.returncode == 1
    assert "The new version refuses /etc/keepalive/config.toml; nothing was changed." in done.stderr
    assert machine.property("keepalive", "MainPID") == pid
    assert len(machine.shell("ls -d /opt/keepalive/venv.*").split()) == 1


RECEIVER = """
import http.server
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        with open("/root/told", "ab") as told:
            told.write(self.rfile.read(int(self.headers["Content-Length"])) + b"\\n")
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", 8099), Receiver).serve_forever()
"""


@in_systemd("changes")
def test_what_messages_need_is_installed_with_an_upgrade_and_they_leave_the_sandbox(
    machine: Machine, release: Path
) -> None:
    write_release(release / "new")
    make_ready(machine)
    receiver = machine.start(PYTHON, "-c", RECEIVER)
    done = machine.run(*UPGRADE, "--with", "notify", patience=600)
    machine.write("/etc/credstore/notify", "json://127.0.0.1:8099/\n", mode="600")
    told = '[notify]\nurls_credential = "notify"\nevents = ["evicted"]\n'
    make_ready(machine, config=CONFIG + told, drop_in="[Service]\nLoadCredential=notify\n")

    evict(machine, "medicine-llm")
    until(lambda: machine.run("test", "-s", "/root/told", check=False).returncode == 0, "nobody was told")
    message = machine.shell("cat /root/told")
    receiver.kill()
    receiver.wait()

    assert done.stdout == "keepalive 9.0.0 runs.\n"
    assert "medicine-llm" in json.loads(message.splitlines()[0])["title"]


@in_systemd("changes")
def test_every_command_of_the_manual_works_word_for_word_and_the_last_leaves_only_the_config(
    ground: Shed, installed: list[Path], wheels: Path
) -> None:
    with Machine(ground, installed, {"/mnt/wheels": wheels}) as machine:
        machine.write("/home/lmstudio/options", "--model qwen/qwen3-4b-2507:0.1 --host 0.0.0.0")
        machine.shell(f"rm {CONFIG_PATH}; systemctl restart lmstudio")
        for block in MANUAL:
            follow(machine, block, Path("/mnt/wheels"))
        machine.run("rm", "-r", "/opt/lmstudio", "/home/lmstudio")
        left = machine.shell("find /etc /opt /var/lib /run /usr/local -name '*keepalive*' | sort").split()
        config = machine.shell("ls /etc/keepalive")
        units = machine.run("systemctl", "list-units", "--all", "--no-legend", "keepalive*").stdout
        machine.run("/root/keepalive/systemd/install", "--uninstall", "--purge")
        purged = machine.shell("find /etc /opt /var/lib /run /usr/local -name '*keepalive*'")

    assert MANUAL[0] == "systemd/install\n"
    assert MANUAL[-1] == "systemd/install --uninstall\n"
    assert len(MANUAL) > 8
    assert left == [
        "/etc/keepalive",
        "/etc/systemd/system/keepalive-admin.socket.d",
        "/etc/systemd/system/keepalive.service.d",
    ]
    assert config == "config.toml\n"
    assert units == ""
    assert purged == ""
