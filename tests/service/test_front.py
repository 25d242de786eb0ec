"""The proxy in front of the real keeper and a simulated LM Studio, as applications meet it."""

import asyncio
import contextlib
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import Server
from keepalive.simulator.studio import Studio
from tests.kit.live import (
    DaemonProcess,
    SimulatorProcess,
    ask,
    asked,
    daemon,
    ending,
    let_it_load,
    loads,
    model,
    settings,
    simulator,
    until,
    wait_until,
)

KEY = "acme/x"


class Caller:
    """A streaming request over a socket of its own, and what has come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.text = ""

    @classmethod
    async def send(
        cls, url: str, body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str
    ) -> "Caller":
        host, _, port = url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        caller = cls(reader, writer)
        data = json.dumps(body).encode()
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {host}",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        return caller

    async def hears(self, words: str) -> None:
        while words not in self.text:
            self.text += (await self._reader.read(65536)).decode()

    async def to_the_end(self) -> str:
        while piece := await self._reader.read(65536):
            self.text += piece.decode()
        self.leave()
        return self.text

    def leave(self) -> None:
        self._writer.close()


def chat(key: str = KEY, *, stream: bool = True, **more: Any) -> dict[str, Any]:
    return {"model": key, "stream": stream, "messages": [{"role": "user", "content": "hello"}], **more}


def deltas(text: str) -> int:
    """Pieces of the answer that came, in chat events."""
    return text.count('"delta":{"content"') + text.count('"delta":{"role":"assistant","content"')


@contextlib.asynccontextmanager
async def front(
    *models: SimModel, keep: tuple[str, ...] = (KEY,), server: str = "", defaults: str = "", **faults: Any
) -> AsyncIterator[tuple[Daemon, Studio]]:
    """A daemon before a simulator. Whatever the test does: we never caused a load on demand, nor a second copy."""
    async with simulator(*models, **faults) as upstream:
        text = settings(upstream.url, *keep, server=server, defaults=defaults)
        async with daemon(text) as running:
            yield running, upstream.studio
        assert [
            e for e in upstream.studio.log(0) if e["kind"] == "load.started" and e["owner"] == "jit"
        ] == []
        assert [e for e in upstream.studio.log(0) if e["kind"] == "load.started" and e["copies"] > 0] == []
    assert running.status()["models"][0]["in_flight"] == 0
    assert running.status()["models"][0]["waiting"] == 0


async def test_a_hundred_streams_for_a_cold_model_share_one_load_and_are_all_served() -> None:
    told = ": keepalive model=acme/x state=loading elapsed="
    async with front(SimModel(KEY, load_seconds=600.0), server='heartbeat = "300ms"') as (running, studio):
        callers = [await Caller.send(running.url, chat(max_tokens=3)) for _ in range(100)]
        reading = [asyncio.create_task(caller.to_the_end()) for caller in callers]
        await until(lambda: all(told in caller.text for caller in callers), "all wait and were told")
        await let_it_load(studio)
        texts = await asyncio.gather(*reading)

        assert loads(studio) == 1
        assert [deltas(text) for text in texts] == [3] * 100
        assert all(
            text.rstrip().endswith("data: [DONE]\n\n\r\n0".rstrip()) or "data: [DONE]" in text
            for text in texts
        )
        assert "X-Keepalive-Model-State: " in texts[0]


async def test_a_request_that_does_not_stream_is_held_and_then_served() -> None:
    async with front(SimModel(KEY, load_seconds=1.0)) as (running, studio):
        status, headers, text = await asked(
            f"{running.url}/v1/chat/completions", "POST", chat(stream=False, max_tokens=2)
        )

        assert status == 200
        assert json.loads(text)["model"] == KEY
        assert "wait;dur=" in headers["Server-Timing"]
        assert loads(studio) == 1


async def test_no_request_is_lost_for_a_model_that_is_taken_again_and_again() -> None:
    async with front(SimModel(KEY, load_seconds=0.2)) as (running, studio):
        statuses = []
        for _ in range(6):
            await until(lambda: model(running, KEY)["state"] == "warm")
            studio.evict(KEY)
            await until(lambda: model(running, KEY)["state"] != "warm")
            body = chat(stream=False, max_tokens=2)
            statuses.append((await asked(f"{running.url}/v1/chat/completions", "POST", body))[0])

        assert statuses == [200] * 6
        assert loads(studio) == 7


async def test_a_caller_says_how_long_it_would_wait_and_is_told_when_to_come_again() -> None:
    async with front(SimModel(KEY, load_seconds=600.0)) as (running, _):
        # On a busy machine the first look at LM Studio takes longer than this caller waits.
        await until(lambda: model(running, KEY)["state"] == "loading", "it is loaded")
        status, headers, text = await asked(
            f"{running.url}/v1/chat/completions", "POST", chat(stream=False), Prefer="wait=1"
        )

        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        assert "loading" in json.loads(text)["error"]["message"]
        assert running.status()["models"][0]["state"] == "loading"


async def test_a_model_that_is_refused_memory_fails_at_once_with_the_reason() -> None:
    async with front(SimModel(KEY), load_result="guardrail") as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "backoff", "the load was refused")
        caller = await Caller.send(running.url, chat())
        streamed = await caller.to_the_end()
        status, headers, text = await asked(f"{running.url}/v1/chat/completions", "POST", chat(stream=False))

        assert "insufficient system resources" in streamed
        assert "data: [DONE]" not in streamed
        assert status == 503
        assert "insufficient system resources" in text
        assert 200 < int(headers["Retry-After"]) <= 300
        assert loads(studio) == 1


async def test_a_request_whose_model_is_unloaded_while_it_queues_joins_the_next_load() -> None:
    async with front(SimModel(KEY, load_seconds=0.5), parallel=1, token_seconds=0.1) as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "warm", "warm")
        first = await Caller.send(running.url, chat(max_tokens=60))
        await until(lambda: studio.in_flight == 1, "one is answered")
        await first.hears("delta")  # before its first byte it would be asked anew, too
        second = await Caller.send(running.url, chat(max_tokens=7))
        await until(lambda: any(e.get("max_tokens") == 7 for e in studio.log(0)), "one queues")
        studio.evict(KEY)
        cut, served = await asyncio.gather(first.to_the_end(), second.to_the_end())

        assert "unloaded" in cut
        assert "data: [DONE]" not in cut
        assert deltas(served) == 7
        assert "data: [DONE]" in served
        assert loads(studio) == 2


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_model_that_lm_studio_no_longer_knows_because_somebody_unloaded_it_is_loaded_anew(
    streaming: bool,
) -> None:
    others = SimModel("acme/y", load_seconds=0), SimModel("acme/z", load_seconds=0)
    async with front(SimModel(KEY, load_seconds=0.2), *others, jit=False) as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "warm", "warm")
        for other in others:
            await asked(f"{running.url}/api/v1/models/load", "POST", {"model": other.key})
        studio.evict(KEY)
        caller = await Caller.send(running.url, chat(max_tokens=3, stream=streaming))
        answer = await caller.to_the_end()
        draft = await Caller.send(running.url, chat("acme/nobody", stream=streaming))
        refused = await draft.to_the_end()

        assert " 200 " in answer.partition("\r\n")[0]
        assert "Invalid model" not in answer
        assert loads(studio, KEY) == 2
        assert 'Invalid model identifier \\"acme/nobody' in refused


@pytest.mark.parametrize("streaming", [True, False])
async def test_who_finds_a_server_that_was_started_anew_and_loads_waits_for_it(streaming: bool) -> None:
    async with front(SimModel(KEY, load_seconds=0.2)) as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "warm", "warm")
        studio.set_faults(loading_503="always")
        caller = await Caller.send(running.url, chat(max_tokens=3, stream=streaming))
        await until(lambda: model(running, KEY)["state"] == "loading", "it is seen to load")
        studio.set_faults(loading_503=None)
        answer = await caller.to_the_end()

        assert " 200 " in answer.partition("\r\n")[0]
        assert "This answer" in answer if not streaming else deltas(answer) == 3
        assert "Loading model" not in answer


async def test_a_crash_that_a_user_meets_is_mended_before_the_next_refresh() -> None:
    table = f'key = "{KEY}"\nrefresh_interval = "5m"'
    async with front(SimModel(KEY, load_seconds=0.2), keep=(table,)) as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "warm", "warm")
        studio.set_faults(stream_breaks={"value": "crash", "times": 1}, stream_breaks_after=2)
        text = await (await Caller.send(running.url, chat(max_tokens=9))).to_the_end()
        await until(lambda: loads(studio) == 2, "it is loaded again")
        await until(lambda: model(running, KEY)["state"] == "warm", "warm again")

        assert "has crashed" in text
        assert model(running, KEY)["evictions"] == 1
        assert model(running, KEY)["last_eviction"]["cause"] == "crash"


async def test_users_requests_stand_in_for_pings() -> None:
    for interval in (0.5, 2.0, 8.0, 32.0):
        defaults = f'ping_interval = "{round(interval * 1000)}ms"\nlease = "1h"'
        async with front(SimModel(KEY), defaults=defaults) as (running, _):
            await until(lambda: model(running, KEY)["state"] == "warm", "warm")
            before = model(running, KEY)["last_ping"]["at"]
            asked_at = [time.monotonic()]
            while asked_at[-1] < asked_at[0] + 3 * interval:
                await (await Caller.send(running.url, chat(max_tokens=2))).to_the_end()
                asked_at.append(time.monotonic())
                await asyncio.sleep(interval / 4)
            page = running.metrics("")[0].decode()
            after = model(running, KEY)["last_ping"]["at"]
        # A machine that left the model alone for as long as that proves nothing: once more, with more time.
        if max(later - earlier for earlier, later in itertools.pairwise(asked_at)) < interval * 0.9:
            break

    assert after == before
    labels = 'model="acme/x",upstream="local"'
    skipped = next(
        x for x in page.splitlines() if x.startswith(f'keepalive_model_pings_total{{{labels},outcome="sk')
    )
    assert float(skipped.rpartition(" ")[2]) >= 1.0


async def test_a_caller_that_leaves_while_held_does_not_end_the_load() -> None:
    async with front(SimModel(KEY, load_seconds=600.0)) as (running, studio):
        caller = await Caller.send(running.url, chat())
        await until(lambda: model(running, KEY)["waiting"] == 1, "it waits")
        await until(lambda: studio.memory.loads, "and there is a load")
        caller.leave()
        await until(lambda: model(running, KEY)["waiting"] == 0, "it is gone")
        await let_it_load(studio)
        await until(lambda: model(running, KEY)["state"] == "warm", "warm")

        assert loads(studio) == 1


async def test_a_released_model_is_loaded_for_who_asks_for_it() -> None:
    async with front(SimModel(KEY, load_seconds=0.2)) as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "warm", "warm")
        await asked(f"{running.admin_url}/api/models/{KEY}/release", "POST")
        await until(lambda: model(running, KEY)["state"] == "cold", "released")
        text = await (await Caller.send(running.url, chat(max_tokens=2))).to_the_end()

        assert deltas(text) == 2
        assert loads(studio) == 2


async def test_a_model_that_nobody_keeps_passes_untouched() -> None:
    other = SimModel("acme/other", load_seconds=0.2)
    async with simulator(SimModel(KEY), other) as upstream, daemon(settings(upstream.url, KEY)) as running:
        text = await (await Caller.send(running.url, chat("acme/other", max_tokens=2))).to_the_end()

        assert deltas(text) == 2
        assert "X-Keepalive-Model-State" not in text
        assert ": keepalive" not in text


async def test_bookkeeping_that_fails_does_not_touch_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async with front(SimModel(KEY, load_seconds=0.5)) as (running, _):

        def broken(*_: object) -> None:
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr("keepalive.observers.metrics.Metrics.observe", broken)
        monkeypatch.setattr("keepalive.observers.metrics.ProxyMetrics.count", broken)
        monkeypatch.setattr("keepalive.observers.logs.Log.observe", broken)
        monkeypatch.setattr("keepalive.admin.server.Feed.observe", broken)
        text = await (await Caller.send(running.url, chat(max_tokens=5))).to_the_end()

        assert deltas(text) == 5
        assert "data: [DONE]" in text


# --- several upstreams ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[Daemon, Server, Server]]:
    """One model, kept on two upstreams and warm on both."""
    async with simulator(SimModel(KEY)) as one, simulator(SimModel(KEY)) as two:
        text = settings(one.url, f'key = "{KEY}"\nupstream = ["local", "second"]')
        text += f'\n[[upstreams]]\nname = "second"\nurl = "{two.url}"\n'
        async with daemon(text) as running:
            for name in ("local", "second"):
                await until(lambda name=name: model(running, KEY, name)["state"] == "warm", f"warm on {name}")
            yield running, one, two


def answered(server: Server) -> int:
    """Chats of users; pings ask for one token."""
    return sum(e["kind"] == "request" and e.get("max_tokens") == 3 for e in server.studio.log(0))


async def test_a_conversation_stays_where_its_prompt_cache_is() -> None:
    async with pair() as (running, one, two):
        for turn in range(4):
            body = chat(max_tokens=3)
            body["messages"] += [
                {"role": "assistant", "content": "hi"},
                {"role": "user", "content": "more"},
            ] * turn
            await (await Caller.send(running.url, body)).to_the_end()

        assert sorted([answered(one), answered(two)]) == [0, 4]


async def test_before_the_first_byte_a_failing_upstream_is_left_for_the_next() -> None:
    async with pair() as (running, one, two):
        await one.close()
        texts = [await (await Caller.send(running.url, chat(max_tokens=3))).to_the_end() for _ in range(3)]

        assert [deltas(text) for text in texts] == [3, 3, 3]
        assert answered(two) == 3


# --- its end ----------------------------------------------------------------------------------------


def test_on_sigterm_open_streams_and_held_requests_are_finished_and_the_model_stays(tmp_path: Path) -> None:
    sim = SimulatorProcess(tmp_path, f"{KEY}:600s")
    server = 'heartbeat = "200ms"\ndrain_timeout = "10m"'
    with ending(sim), ending(running := DaemonProcess(tmp_path, settings(sim.url, KEY, server=server))):
        url = running.events("daemon.started")[0]["listen"]

        async def story() -> str:
            caller = await Caller.send(url, chat(max_tokens=4))
            await until(lambda: running.model(KEY)["waiting"] == 1, "it is held")
            await until(lambda: sim.happened("load.started", KEY), "behind a load")
            running.process.terminate()
            await until(lambda: ask(f"{running.url}/readyz")[0] == 503, "not ready")
            with contextlib.suppress(OSError):
                while True:  # it says that it is not ready a moment before it refuses connections
                    (await Caller.send(url, chat())).leave()
            sim.let_it_load(KEY)
            return await caller.to_the_end()

        text = asyncio.run(story())

        assert running.ended() == 0
        assert deltas(text) == 4
        assert "data: [DONE]" in text
        assert sim.instances(KEY) == 1


async def test_a_body_that_is_too_large_is_refused_in_the_words_of_whoever_serves_its_path() -> None:
    server = 'max_body = "1KiB"\nallowed_origins = ["app://obsidian.md"]'
    large = chat(text="x" * 2000)
    async with front(SimModel(KEY), server=server) as (running, _):
        for path, layout in {
            "/v1/chat/completions": '"type":"invalid_request_error"',
            "/v1/messages": '"type":"request_too_large"',
            "/api/prompts/execute/stream": '{"success":false,"error":{',
        }.items():
            text = await (
                await Caller.send(running.url, large, path, Origin="app://obsidian.md")
            ).to_the_end()

            assert text.startswith("HTTP/1.1 413 ")
            assert "\r\nAccess-Control-Allow-Origin: app://obsidian.md\r\n" in text
            assert layout in text


def test_after_the_drain_timeout_a_stream_is_ended_by_an_error_event(tmp_path: Path) -> None:
    sim = SimulatorProcess(tmp_path, f"{KEY}:600s")
    server = 'heartbeat = "200ms"\ndrain_timeout = "500ms"'
    with ending(sim), ending(running := DaemonProcess(tmp_path, settings(sim.url, KEY, server=server))):
        url = running.events("daemon.started")[0]["listen"]

        async def story() -> str:
            caller = await Caller.send(url, chat())
            await until(lambda: running.model(KEY)["waiting"] == 1, "it is held")
            running.process.terminate()
            return await caller.to_the_end()

        text = asyncio.run(story())

        assert running.ended() == 0
        assert '"error"' in text
        assert text.endswith("\r\n0\r\n\r\n")


def test_no_secret_of_a_caller_is_found_in_log_status_or_metrics(tmp_path: Path) -> None:
    secret = "canary-7f3a"
    (tmp_path / "key").write_text(f"{secret}-key")
    sim = SimulatorProcess(tmp_path, KEY)
    sim.faults(answer_text=f"{secret}-answer")
    text = settings(sim.url, KEY, server='log_level = "debug"', upstream='api_token_env = "LM_TOKEN"')
    text += f'\n[auth]\nclient_keys = [{{ name = "ward", file = "{tmp_path}/key" }}]\n'
    with ending(sim), ending(running := DaemonProcess(tmp_path, text, LM_TOKEN=f"{secret}-token")):
        url = running.events("daemon.started")[0]["listen"]
        running.reaches(KEY, "warm")
        body = {"model": KEY, "stream": True, "messages": [{"role": "user", "content": f"{secret}-prompt"}]}
        status, _, answer = ask(
            f"{url}/v1/chat/completions", "POST", body, Authorization=f"Bearer {secret}-key"
        )
        refused, _, _ = ask(
            f"{url}/v1/chat/completions", "POST", body, Authorization=f"Bearer {secret}-wrong"
        )
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as caller:
            head = (
                f"POST /v1/chat/completions?{secret} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n"
            )
            caller.sendall(head.encode())
            too_large = caller.recv(12)
        # The log is written by the batch, a moment after what it tells.
        wait_until(lambda: len(running.events("proxy.request")) == 3, "all are logged")
        shown = running.err.read_text() + json.dumps(running.status()) + ask(f"{running.url}/metrics")[2]

        assert status == 200
        assert secret in answer
        assert refused == 401
        assert secret not in shown
        assert too_large == b"HTTP/1.1 413"
        told = [(e["key"], e["error"]) for e in running.events("proxy.request")]
        assert told == [("ward", None), (None, "invalid_api_key"), (None, "too_large")]


async def test_how_long_ago_lm_studio_was_seen_to_rest_goes_on_while_nothing_else_changes() -> None:
    async with (
        simulator(SimModel(KEY, load_seconds=0.0)) as upstream,
        daemon(settings(upstream.url, KEY)) as running,
    ):
        front, identity = running._front, running.find(KEY)[0]
        await until(lambda: front.view(identity).state == "warm" and front.view(identity).resting)
        first, then = front.view(identity).resting, front.view(identity).resting

    assert first is not None
    assert then is not None
    assert then[1] > first[1]


async def test_what_callers_are_told_of_a_warm_model_follows_its_record_and_the_config(
    tmp_path: Path,
) -> None:
    async with simulator(SimModel(KEY, load_seconds=0.0)) as upstream:
        path = tmp_path / "config.toml"
        path.write_text(settings(upstream.url, KEY, defaults='max_wait = "10m"'))
        async with daemon(path.read_text(), path=path) as running:
            front, identity = running._front, running.find(KEY)[0]
            await until(lambda: front.view(identity).state == "warm")
            before = front.view(identity)
            again = front.view(identity)
            path.write_text(settings(upstream.url, KEY, defaults='max_wait = "1m"'))
            running.reload()
            after = front.view(identity)
            upstream.studio.evict(KEY)
            await until(lambda: running.status()["models"][0]["evictions"] == 1)
            await until(lambda: front.view(identity).state == "warm")
            later = front.view(identity)

    assert replace(again, resting=before.resting) == before
    assert (before.max_wait, after.max_wait) == (600.0, 60.0)
    assert later is not after
