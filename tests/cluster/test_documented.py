"""What docs/cluster.md tells people to write is taken by what it is written for, and does what it says: three etcd, two
daemons, HAProxy in front of them, Prometheus beside them.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from keepalive import config
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from tests.cluster.test_member import holder, holds
from tests.kit import PROJECT
from tests.kit import etcd as kit
from tests.kit.etcd import needs_etcd
from tests.kit.live import (
    Running,
    asked,
    daemon,
    let_it_load,
    loads,
    model,
    settings,
    simulator,
    until,
    wait_until,
)
from tests.kit.ports import at_ports, reserved
from tests.kit.prometheus import Prometheus, installed

TEXT = (PROJECT / "docs" / "cluster.md").read_text()
MODEL = "qwen/qwen3-4b-2507"

needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy")


def block(kind: str, beginning: str = "") -> str:
    [found] = re.findall(rf"```{kind}\n({beginning}.*?)```", TEXT, re.DOTALL)
    return str(found)


def test_the_config_is_one():
    text = '[[models]]\nkey = "gemma"\n' + block("toml")
    parsed = config.parse(text, "docs/cluster.md", {})
    found, listens = parsed.cluster, parsed.server

    assert (found.name, found.instance, len(found.etcd)) == ("ward", "a", 3)
    # Where HAProxy looks for it.
    where = f"server a {listens.listen.host}:{listens.listen.port} port {listens.admin_listen.port}"
    assert where in block("", "defaults\n")


class Written(kit.Etcd):
    """One of three, as its file says, but for where it listens and keeps what it knows."""

    def __init__(self, folder: Path, n: int, ports: list[int]) -> None:
        name = ("one", "two", "three")[n]
        super().__init__(folder, ports[2 * n], ports[2 * n + 1], name)
        lines = []
        for line in block("sh", "ETCD_").replace("ETCD_NAME=one", f"ETCD_NAME={name}").splitlines():
            own = line if "INITIAL_CLUSTER=" in line else line.replace("10.0.0.1", f"10.0.0.{n + 1}")
            for m in range(3):
                for port, to in ((2379, ports[2 * m]), (2380, ports[2 * m + 1])):
                    own = own.replace(f"10.0.0.{m + 1}:{port}", f"127.0.0.1:{to}")
            lines.append(own)
        self._environ = dict(line.split("=", 1) for line in lines)

    def start(self, *, wait: bool = True) -> None:
        assert kit.ETCD is not None
        environ = {**os.environ, **self._environ, "ETCD_UNSAFE_NO_FSYNC": "true"}
        with (self.folder / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(
                [kit.ETCD, "--data-dir", str(self.folder / self.name)], env=environ, stdout=log, stderr=log
            )


@contextmanager
def three(folder: Path) -> Iterator[list[kit.Etcd]]:
    with reserved(6) as ports, ExitStack() as stack:
        members: list[kit.Etcd] = [Written(folder, n, ports) for n in range(3)]
        for one in members:
            one.start()
            stack.callback(one.kill)
        wait_until(lambda: all(one.answers() for one in members), "all three answer")
        yield members


@needs_haproxy
def test_haproxy_takes_its_config(tmp_path: Path):
    (tmp_path / "haproxy.cfg").write_text(block("", "defaults\n"))
    run = subprocess.run(
        ["haproxy", "-c", "-f", str(tmp_path / "haproxy.cfg")], capture_output=True, text=True, check=False
    )

    assert run.returncode == 0, run.stderr


class HAProxy:
    """`url`; with the socket that Debian's has, by which it is told and asked."""

    def __init__(self, folder: Path, port: int, ports: list[int]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._socket = folder / "admin.sock"
        text = block("", "defaults\n").replace("bind :1235", f"bind 127.0.0.1:{port}")
        for n, (client, admin) in enumerate(zip(ports[::2], ports[1::2], strict=True)):
            text = text.replace(f"10.0.0.{n + 1}:1235 port 9235", f"127.0.0.1:{client} port {admin}")
        # As it says for those whose callers should rather be told at once; and looked at without waiting for it.
        [check] = re.findall(r"ask `(/readyz\S+)` instead", TEXT)
        text = text.replace("GET /livez", f"GET {check}").replace("inter 2s", "inter 100ms")
        text = text.replace("    timeout connect", "    timeout check 30s\n    timeout connect")
        place = f"global\n    stats socket {self._socket} level admin\n\n"
        (folder / "haproxy.cfg").write_text(place + text)
        words = ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
        self.process = Running(words, folder, "haproxy")

    def told(self, words: str) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._socket))
            sock.sendall(words.encode() + b"\n")
            return b"".join(iter(lambda: sock.recv(65_536), b"")).decode()

    def states(self) -> dict[str, str]:
        """UP, DOWN, DRAIN of each server, as far as it can be asked yet."""
        try:
            rows = [line.split(",") for line in self.told("show stat").splitlines()]
        except OSError:
            return {}
        return {row[1]: row[17].split()[0] for row in rows if row[0] == "llm" and row[1] in ("a", "b")}


@contextmanager
def haproxy(folder: Path, port: int, ports: list[int]) -> Iterator[HAProxy]:
    running = HAProxy(folder, port, ports)
    try:
        yield running
    finally:
        running.process.kill()


class Callers:
    """One after the other, until they are told to stop."""

    def __init__(self, url: str) -> None:
        self.answers: set[tuple[int, str]] = set()
        self._url, self._task = url, asyncio.create_task(self._call())

    async def _call(self) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        while True:
            status, _, text = await asked(f"{self._url}/v1/chat/completions", "POST", body)
            self.answers.add((status, "" if status == 200 else text))
            await asyncio.sleep(0.3)

    async def stopped(self) -> set[tuple[int, str]]:
        self._task.cancel()
        await asyncio.wait([self._task])
        return self.answers


class Stream:
    """An answer that takes long, from when its first words are there."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self.task = asyncio.create_task(self._read(url.rpartition(":")[2]))

    async def _read(self, port: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100}
        sent = json.dumps({**body, "stream": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}"
        writer.write(f"{head}\r\nConnection: close\r\n\r\n{sent}".encode())
        while more := await reader.read(65_536):
            self.text += more.decode()
        writer.close()

    async def whole(self) -> bool:
        await self.task
        return "data: [DONE]" in self.text and '"error"' not in self.text


async def a_stream(url: str) -> Stream:
    stream = Stream(url)
    await until(lambda: '"content"' in stream.text or stream.task.done(), "its first words are there")
    assert '"content"' in stream.text, stream.text
    return stream


@asynccontextmanager
async def pair(
    folder: Path, studio_url: str, etcd: list[str], ports: list[int]
) -> AsyncIterator[tuple[dict[str, Daemon], Callable[[str], Any], Callable[[str], Any]]]:
    """Both daemons by name, with the ways to start and to end one."""
    running: dict[str, Daemon] = {}
    contexts: dict[str, AsyncExitStack] = {}
    table = "[cluster]\n" + block("toml").partition("[cluster]\n")[2]
    table = table.replace(re.findall(r"^etcd = .*$", table, re.M)[0], f"etcd = {json.dumps(etcd)}")

    async def start(name: str) -> None:
        n = "ab".index(name)
        state = f'state_dir = "{folder / name}"'
        text = at_ports(settings(studio_url, MODEL, server=state), ports[2 * n : 2 * n + 2])
        contexts[name] = AsyncExitStack()
        text += table.replace('instance = "a"', f'instance = "{name}"')
        running[name] = await contexts[name].enter_async_context(daemon(text, path=folder / f"{name}.toml"))

    async def end(name: str) -> None:
        running.pop(name)
        await contexts.pop(name).aclose()

    try:
        await asyncio.gather(start("a"), start("b"))
        yield running, start, end
    finally:
        for name in list(running):
            await end(name)


@needs_etcd
@needs_haproxy
@pytest.mark.xdist_group("cluster, as documented")
async def test_the_worked_example_does_what_it_says(tmp_path: Path):
    scrapes = block("yaml").replace("scrape_configs:", "global: {scrape_interval: 1s}\nscrape_configs:")
    installed("prometheus")
    with three(tmp_path) as etcd, reserved(5) as [port, *ports]:
        qwen = SimModel(MODEL, size_bytes=2_000_000_000, load_seconds=600.0)
        async with (
            simulator(qwen, token_seconds=0.05) as studio,
            pair(tmp_path, studio.url, [one.url for one in etcd], ports) as (daemons, start, end),
        ):
            with haproxy(tmp_path, port, ports) as front:

                async def balanced(**states: str) -> None:
                    await until(lambda: front.states() == states, f"HAProxy sees {states}: {front.states()}")

                # While it is warm nowhere HAProxy itself says so.
                await balanced(a="DOWN", b="DOWN")
                assert (await asked(f"{front.url}/v1/models"))[0] == 503
                await let_it_load(studio.studio)
                await balanced(a="UP", b="UP")
                first, _ = await holder(list(daemons.values()))
                acts = first.cluster.instance if first.cluster else ""
                other = "b" if acts == "a" else "a"

                # Whoever acts is drained: what it answers goes on, and nobody new comes.
                callers, streams = Callers(front.url), [await a_stream(front.url) for _ in range(2)]
                await until(
                    lambda: all(model(one, MODEL)["in_flight"] for one in daemons.values()), "both answer"
                )
                [command] = re.findall(r'echo "(set server llm/)a( state )drain"', TEXT)
                front.told(acts.join(command) + "drain")
                await balanced(**{acts: "DRAIN", other: "UP"})
                (tmp_path / f"{other}.toml").write_text(
                    (tmp_path / f"{other}.toml").read_text() + "\n# anew\n"
                )
                daemons[other].reload()
                await end(acts)
                assert [await stream.whole() for stream in streams] == [True, True]
                await until(lambda: holds(daemons[other]), "the other acts")
                await start(acts)
                front.told(acts.join(command) + "ready")
                await balanced(a="UP", b="UP")

                # And one is restarted without a word to HAProxy.
                stream = await a_stream(front.url)
                await end(other)
                await start(other)
                await balanced(a="UP", b="UP")
                assert await stream.whole()
                assert await callers.stopped() == {(200, "")}
                assert loads(studio.studio) == 1

                scraped = scrapes.replace("http://10.0.0.1:9235", daemons["a"].admin_url)
                prometheus = await asyncio.to_thread(Prometheus, tmp_path, scraped)
                try:
                    up = "count(count by (instance) (keepalive_cluster_member_up == 1 and on (instance) up)) == 2"
                    await asyncio.to_thread(prometheus.sees, up, "both are found by one")
                    by_name = prometheus.now("up")
                    assert sorted(dict(labels)["instance"] for labels in by_name) == ["a", "b"]
                finally:
                    prometheus.kill()


@needs_etcd
@pytest.mark.xdist_group("cluster, as documented")
def test_the_demo_says_whom_to_kill_and_shows_the_other_one_take_over(tmp_path: Path):
    demo = Running([sys.executable, str(PROJECT / "tests" / "kit" / "demo_cluster.py")], tmp_path, "demo")
    try:
        wait_until(lambda: re.search(r"; b \w+, \S+ is warm", demo.out.read_text()), "the model is warm")
        said = demo.out.read_text()
        [(a, b)] = re.findall(r"kill -9 (\d+) +kill -9 (\d+)", said)
        acts = "a" if "a acts, " in said.splitlines()[-1] else "b"
        os.kill(int(a if acts == "a" else b), signal.SIGKILL)
        other = "b" if acts == "a" else "a"
        wait_until(lambda: f"{other} acts, " in demo.out.read_text().splitlines()[-1], "the other one acts")
        demo.signal(signal.SIGTERM)

        assert demo.ended() == 0
        assert f"{acts} has ended" in demo.out.read_text()
        with pytest.raises(ProcessLookupError):
            os.kill(int(b if acts == "a" else a), 0)
    finally:
        demo.kill()
