"""The real thing for tests: daemons and simulators over sockets, as processes and in this one, all ended.

Ports are free ones, files are in a directory of the test, and every wait is for a condition with a bound that
only a broken program reaches.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from keepalive import config
from keepalive.service.daemon import Daemon
from keepalive.simulator.server import Server, serve
from keepalive.simulator.studio import Studio
from tests.kit import PROJECT

# A machine that runs four workers and two other checkouts was seen to take half a minute to start a daemon.
PATIENCE = 90.0

SETTINGS = """
[server]
listen = "127.0.0.1:0"
admin_listen = "127.0.0.1:0"
{server}
[[upstreams]]
name = "local"
url = "{url}"
{upstream}
[defaults]
refresh_interval = "100ms"
{defaults}
"""


def settings(url: str, *models: str, server: str = "", upstream: str = "", defaults: str = "") -> str:
    """A config as text; a model is its key, or the lines of its table."""
    tables = (f'key = "{model}"' if "=" not in model else model for model in models)
    head = SETTINGS.format(url=url, server=server, upstream=upstream, defaults=defaults)
    return head + "".join(f"\n[[models]]\n{table}\n" for table in tables)


def wait_until(condition: Callable[[], Any], what: str = "", within: float = PATIENCE) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {within:.0f} s: {what or condition}"
        time.sleep(0.02)
    return value


async def until(condition: Callable[[], Any], what: str = "", within: float = PATIENCE) -> Any:
    """The same, while the loop turns."""
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {within:.0f} s: {what or condition}"
        await asyncio.sleep(0.01)
    return value


async def stands_still(value: Callable[[], Any], for_seconds: float = 0.3) -> Any:
    """What `value` is once it has not changed for so long; fails where it changes for ever."""
    end = time.monotonic() + PATIENCE
    before, after = object(), value()
    while before != after:
        assert time.monotonic() < end, f"it goes on: {after}"
        before = after
        await asyncio.sleep(for_seconds)
        after = value()
    return after


def bound(port: int = 0) -> socket.socket:
    """Holds a port where nothing listens: connections are refused, and the kernel gives it to nobody else.

    A server that sets SO_REUSEADDR, as every one in these tests does, can have it all the same.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port for who must know it before it listens there, or for an address where nobody does."""
    with bound() as sock:
        yield sock.getsockname()[1]


# To build one takes a quarter of what it takes to ask.
_PAST_PROXIES = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(
    url: str, method: str = "GET", body: Any = None, **headers: str
) -> tuple[int, Mapping[str, str], str]:
    """Status, headers and text of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with _PAST_PROXIES.open(request, timeout=PATIENCE) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


async def asked(
    url: str, method: str = "GET", body: Any = None, **headers: str
) -> tuple[int, Mapping[str, str], str]:
    """The same, while the loop turns."""
    return await asyncio.to_thread(ask, url, method, body, **headers)


async def raw(url: str, request: bytes) -> bytes:
    """All that comes back for these bytes, until the other side closes."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(request)
        async with asyncio.timeout(PATIENCE):
            await writer.drain()
            return await reader.read()
    finally:
        writer.close()


# --- in this process --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def simulator(*models: Any, **faults: Any) -> AsyncIterator[Server]:
    async with await serve(Studio(models, faults=faults)) as server:
        yield server


def loads(studio: Studio, key: str | None = None) -> int:
    """How many loads LM Studio has begun."""
    return sum(event["kind"] == "load.started" and key in (None, event["model"]) for event in studio.log(0))


async def let_it_load(studio: Studio) -> None:
    """A load that was to take ten minutes ends now. It may just be on its way: so it is waited for."""
    await until(lambda: studio.memory.loads, "a load has begun")
    studio.advance(600)


@contextlib.asynccontextmanager
async def daemon(
    text: str,
    *,
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    wall: Callable[[], float] = time.time,
) -> AsyncIterator[Daemon]:
    """A daemon that runs; it stops as on SIGTERM."""
    environ = environ or {}
    if path is not None:
        path.write_text(text)
    running = Daemon(config.parse(text, str(path or "test"), environ), path, environ, wall=wall)
    task = asyncio.create_task(running.run())
    started = asyncio.create_task(running.started.wait())
    try:
        await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            yield running
    finally:
        started.cancel()
        running.stop()
        await asyncio.wait_for(task, PATIENCE)


def model(running: Daemon, key: str, upstream: str = "local") -> dict[str, Any]:
    """What the status says of one model."""
    found = [m for m in running.status()["models"] if (m["key"], m["upstream"]) == (key, upstream)]
    return dict(found[0])


# --- as processes -----------------------------------------------------------------------------------

KEEPALIVE = [sys.executable, "-m", "keepalive"]
# What `keepalive simulate` is, without all that the command line of the daemon reads at its start.
SIMULATOR = [sys.executable, "-m", "keepalive.simulator"]


def environment(**more: str) -> dict[str, str]:
    """That of this process, without what would change an answer, and without the issuers of the world.

    aiohttp reads those when it is imported, which takes each process a twentieth of a second.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("KEEPALIVE_")
        and name not in ("NO_COLOR", "FORCE_COLOR", "STATE_DIRECTORY", "COLUMNS")
    }
    return {**kept, "PYTHONPATH": str(PROJECT), "SSL_CERT_FILE": os.devnull, **more}


def command(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A `keepalive` command, run to its end."""
    return subprocess.run(
        [*KEEPALIVE, *words],
        cwd=cwd,
        env=environment(**environ),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class Running:
    """A process, with what it writes in files; ended by the fixture that began it."""

    def __init__(self, words: list[str], folder: Path, name: str, stderr: Any = None, **environ: str) -> None:
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err if stderr is None else stderr,
                env=environment(XDG_STATE_HOME=str(folder / "state"), **environ),
                cwd=folder,
            )

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Around the wait for its first word: what never said it is ended here, no fixture has it yet."""
        try:
            yield
        except BaseException:
            self.kill()
            raise

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log lines, whole ones."""
        lines = [json.loads(line) for line in self.err.read_text().splitlines(True) if line.endswith("\n")]
        return [line for line in lines if name in (None, line["event"])]


class SimulatorProcess(Running):
    def __init__(self, folder: Path, *models: str, port: int = 0, host: str = "127.0.0.1") -> None:
        options = ["--host", host, *(word for model in models for word in ("--model", model))]
        super().__init__([*SIMULATOR, "--port", str(port), *options], folder, "simulator")
        with self.begun():
            first = wait_until(lambda: self.out.read_text().partition("\n")[0], "the simulator listens")
        self.url = first.rpartition(" ")[2]

    def log(self, since: int = 0) -> list[dict[str, Any]]:
        return list(json.loads(ask(f"{self.url}/simulator/log?since={since}")[2])["events"])

    def happened(self, kind: str, key: str) -> int:
        """How often this happened to a model."""
        return sum((event["kind"], event.get("model")) == (kind, key) for event in self.log())

    def instances(self, key: str) -> int:
        state = json.loads(ask(f"{self.url}/simulator/state")[2])
        return sum(len(model["instances"]) for model in state["models"] if model["key"] == key)

    def let_it_load(self, key: str) -> None:
        """The same as of the studio in this process."""
        wait_until(lambda: self.happened("load.started", key) > self.happened("load.ended", key), "it loads")
        self.advance(600)

    def advance(self, seconds: float) -> None:
        assert ask(f"{self.url}/simulator/advance", "POST", {"seconds": seconds})[0] == 200

    def evict(self, key: str) -> None:
        assert ask(f"{self.url}/simulator/evict", "POST", {"model": key})[0] == 200

    def faults(self, **faults: Any) -> None:
        assert ask(f"{self.url}/simulator/faults", "PATCH", faults)[0] == 200


class DaemonProcess(Running):
    """`keepalive run`, with its config in the folder; `on` are the words that run it on another machine."""

    def __init__(
        self,
        folder: Path,
        text: str,
        name: str = "daemon",
        stderr: Any = None,
        on: Sequence[str] = (),
        **environ: str,
    ) -> None:
        self.config = folder / f"{name}.toml"
        self.config.write_text(text)
        words = [*on, *KEEPALIVE, "run", "-c", str(self.config)]
        super().__init__(words, folder, name, stderr, **environ)
        if stderr is None:
            with self.begun():
                event = wait_until(self._started, "the daemon has started")
            self.url = event["admin"]

    def _started(self) -> dict[str, Any] | None:
        assert self.process.poll() is None, self.err.read_text()
        found = self.events("daemon.started")
        return found[0] if found else None

    def status(self) -> dict[str, Any]:
        return dict(json.loads(ask(f"{self.url}/api/status")[2]))

    def model(self, key: str) -> dict[str, Any]:
        return next(dict(m) for m in self.status()["models"] if m["key"] == key)

    def reaches(self, key: str, state: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = self.model(key)
            return found if found["state"] == state else None

        return dict(wait_until(look, f"{key} is {state}"))


@contextlib.contextmanager
def ending(*processes: Running) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.process.poll() is None:
                process.kill()
