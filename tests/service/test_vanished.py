"""Machines that lose their power under everything that can be under way, by a real cable between two kernels.

The kernel's patience is seconds here instead of a minute; all else is as it runs.
"""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepalive.core.facts import ModelId
from keepalive.http1 import vanished
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import Server
from tests.kit.live import KEEPALIVE, asked, daemon, model, settings, simulator, until
from tests.kit.machine import Machine, machine

# What LM Studio's return is worth is known after up to a minute, on a machine that is slow itself.
LONG = 300.0


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vanished, "IDLE_SECONDS", 2)
    monkeypatch.setattr(vanished, "INTERVAL_SECONDS", 1)
    monkeypatch.setattr(vanished, "PROBES", 3)
    monkeypatch.setattr(vanished, "UNACKNOWLEDGED_SECONDS", 5)
    monkeypatch.setattr(vanished, "LOOK_SECONDS", 0.5)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as made:
        yield made


class Caller:
    """One connection, and what has come on it until it ended."""

    def __init__(self, url: str, request: bytes) -> None:
        self.got = b""
        self.task = asyncio.create_task(self._call(url, request))

    async def _call(self, url: str, request: bytes) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request)
            while more := await reader.read(65_536):
                self.got += more
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def hears(self, words: bytes) -> None:
        await until(lambda: words in self.got, f"{words!r} came", LONG)

    async def ended(self) -> bytes:
        await asyncio.wait_for(self.task, LONG)
        return self.got


def get(path: str, *more: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *more, "", ""]).encode()


def chat(key: str, *, stream: bool) -> bytes:
    body = json.dumps({"model": key, "stream": stream, "messages": [{"role": "user", "content": "hi"}]})
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close", "", body]).encode()


def record(running: Daemon, key: str) -> Any:
    return running.keeper.model(ModelId("local", key))


async def tell(url: str, **faults: Any) -> None:
    assert (await asked(f"{url}/simulator/faults", "PATCH", faults))[0] == 200


def is_refused(running: Daemon) -> bool:
    return "nothing listens" in str(running.status()["upstreams"][0]["error"])


def lm_studio(other: Machine, *models: str) -> str:
    options = [word for key in models for word in ("--model", key)]
    other.run(*KEEPALIVE, "simulate", "--host", other.there, *options, name="simulator")
    return f"http://{other.there}:1234"


async def test_lm_studios_machine_loses_power_under_all_that_is_under_way(other: Machine) -> None:
    url = lm_studio(other, "talks:0", "pinged:0", "loads:600")
    text = settings(
        url,
        "talks",
        'key = "pinged"\nping_interval = "1s"\nping_timeout = "10m"',
        "loads",
        server='heartbeat = "1s"',
        upstream='connect_timeout = "2s"\nlist_timeout = "2s"\nmax_loading = 3',
    )
    async with daemon(text) as running:
        for key in ("talks", "pinged"):
            await until(lambda key=key: model(running, key)["state"] == "warm", f"{key} is warm")
        await until(lambda: record(running, "loads").load_started is not None, "a load is under way")
        await tell(url, token_seconds=60.0)
        streams = Caller(running.url, chat("talks", stream=True))
        await streams.hears(b'"content"')
        whole = Caller(running.url, chat("talks", stream=False))
        tunnel = Caller(
            running.url,
            get(
                "/llm",
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            ),
        )
        await tunnel.hears(b" 101 ")
        held = Caller(running.url, chat("loads", stream=True))
        await held.hears(b": keepalive model=loads state=loading")
        held_whole = Caller(running.url, chat("loads", stream=False))
        await until(lambda: model(running, "loads")["waiting"] == 2, "two are held")
        await tell(url, prompt_seconds=600.0)
        await until(lambda: model(running, "talks")["in_flight"] == 2, "two are answered")
        await until(lambda: record(running, "pinged").pinging, "a ping is under way")
        await tell(url, list_delay_seconds=600.0)
        listing = Caller(running.url, get("/v1/models", "Connection: close"))
        await asyncio.sleep(0.2)

        other.lose_power()

        assert b'"code":"upstream_cut"' in await streams.ended()
        assert (await streams.ended()).endswith(b"\r\n0\r\n\r\n")
        assert (await whole.ended()).startswith(b"HTTP/1.1 502 ")
        assert b"is gone without a word" in await whole.ended()
        assert (await listing.ended()).startswith(b"HTTP/1.1 502 ")
        assert b" 101 " in await tunnel.ended()
        await until(lambda: not record(running, "pinged").pinging, "the ping has ended", LONG)
        await until(lambda: record(running, "loads").load_started is None, "the load has ended", LONG)
        assert [model(running, key)["in_flight"] for key in ("talks", "pinged", "loads")] == [0, 0, 0]
        assert not held.task.done()
        assert not held_whole.task.done()

        other.is_removed()
        other.power_on()
        # Only then is it known that the load has died with the machine.
        await until(lambda: is_refused(running), "nobody listens on it yet", LONG)
        lm_studio(other, "talks:0", "pinged:0", "loads:0")

        assert b"data: [DONE]" in await held.ended()
        assert (await held_whole.ended()).startswith(b"HTTP/1.1 200 ")
        again = Caller(running.url, chat("talks", stream=False))
        assert (await again.ended()).startswith(b"HTTP/1.1 200 ")


CALLERS = """
import socket, sys, time
kept = []
for request in sys.argv[3:]:
    sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
    sock.sendall(request.encode())
    kept.append(sock)
print("asked", flush=True)
while True:
    time.sleep(60)
"""


def told_to_stop(lm: Server) -> int:
    return sum(event.get("outcome") == "client_gone" for event in lm.studio.log(0))


async def test_callers_whose_machine_loses_power_are_let_go_in_every_phase(other: Machine) -> None:
    async with simulator(SimModel("talks", load_seconds=0), SimModel("loads", load_seconds=600)) as lm:
        text = settings(lm.url, "talks", "loads", upstream="max_loading = 2", server='heartbeat = "1s"')
        async with daemon(
            text.replace('\nlisten = "127.0.0.1:0"', f'\nlisten = "{other.here}:0"')
        ) as running:
            await until(lambda: model(running, "talks")["state"] == "warm", "it is warm")
            await until(lambda: record(running, "loads").load_started is not None, "a load is under way")
            await tell(lm.url, token_seconds=600.0)
            requests = [chat(key, stream=stream) for key in ("talks", "loads") for stream in (True, False)]
            host, _, port = running.url.removeprefix("http://").rpartition(":")
            words = (sys.executable, "-c", CALLERS, host, port, *map(bytes.decode, requests))
            await asyncio.to_thread(other.run, *words, name="callers")
            await until(lambda: model(running, "talks")["in_flight"] == 2, "two are answered")
            await until(lambda: model(running, "loads")["waiting"] == 2, "two are held")

            other.lose_power()

            await until(lambda: model(running, "talks")["in_flight"] == 0, "nothing is in flight", LONG)
            await until(lambda: model(running, "loads")["waiting"] == 0, "nobody waits", LONG)
            await until(lambda: told_to_stop(lm) == 2, "LM Studio is told")
            assert record(running, "loads").load_started is not None  # it goes on: others may want it
