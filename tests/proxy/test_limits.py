"""Much, long and many: what has no limit is not cut, and what has one costs nobody else anything."""

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import shutil
import socket
import struct
import sys
import time

import pytest

from keepalive.http1 import Limits
from tests.kit import live
from tests.kit.fronted import (
    DONE,
    SSE_HEAD,
    STOP,
    Keep,
    answer_ok,
    ask,
    chat,
    chunk,
    delta,
    fronted,
    get,
    post,
    says,
)

TWO_HOURS = 7200.0
EVENTS = 360_000  # as many as two hours have at 50 a second
FRAMES = 200_000


def warm():
    keep = Keep()
    keep.add("m")
    return keep


def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def open_stream(port, request):
    """A caller that has read the head of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return reader, writer


async def read_chunk(reader):
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


# --- long -------------------------------------------------------------------------------------------


async def test_a_stream_of_two_hours_passes_byte_for_byte_in_bounded_memory():
    sent = hashlib.sha256()

    async def script(asking):
        await asking.send(SSE_HEAD)
        for first in range(0, EVENTS, 100):
            events = [delta(f"näh {number}") for number in range(first, first + 100)]
            sent.update(b"".join(events))
            await asking.send(b"".join(map(chunk, events)))
        sent.update(STOP + DONE)
        await asking.send(chunk(STOP) + chunk(DONE) + b"0\r\n\r\n")

    async with fronted(script, keep=warm(), heartbeat=3600.0) as (front, _):
        got = hashlib.sha256()
        reader, writer = await open_stream(front.port, chat())
        size = 0
        before = 0
        while data := await read_chunk(reader):
            got.update(data)
            size += len(data)
            if not before and size > 4_000_000:  # the first of everything has happened
                before = resident()
        grown = resident() - before
        writer.close()

        assert size > 50_000_000
        assert got.digest() == sent.digest()
        assert grown < 8 * 1024 * 1024
        seen = await front.last()
        assert (seen.outcome, seen.events) == ("ok", EVENTS + 2)


@pytest.mark.clock_jumps
async def test_no_stream_no_silence_and_no_tunnel_is_ended_by_the_clock():
    going = asyncio.Event()
    arrived = asyncio.Event()

    async def script(asking):
        if b"upgrade: websocket" in asking.head.lower():
            await asking.send(
                b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            )
            while data := await asking.reader.read(1000):
                await asking.send(data)
            asking.cut()
        elif b"/thinks" in asking.head:
            await going.wait()
            await answer_ok(asking)
        elif b"/half" in asking.head:
            await asking.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfi")
            await going.wait()
            await asking.send(b"ne")
        else:
            await asking.send(SSE_HEAD + chunk(delta("a")))
            arrived.set()
            await going.wait()
            await asking.send(chunk(delta("b")) + chunk(STOP) + chunk(DONE) + b"0\r\n\r\n")

    async with fronted(script, keep=warm(), heartbeat=3600.0) as (front, upstream):
        stream, stream_writer = await open_stream(front.port, chat())
        half, half_writer = await open_stream(front.port, get("/half"))
        thinks, thinks_writer = await asyncio.open_connection("127.0.0.1", front.port)
        thinks_writer.write(get("/thinks"))
        tunnel, tunnel_writer = await asyncio.open_connection("127.0.0.1", front.port)
        tunnel_writer.write(
            get("/llm", "Upgrade: websocket").replace(b"Connection: close", b"Connection: Upgrade")
        )
        await tunnel.readuntil(b"\r\n\r\n")
        await arrived.wait()
        await live.until(lambda: len(upstream.requests) == 4, "all are there")

        for _ in range(3):
            await asyncio.get_running_loop().leap(TWO_HOURS)
        going.set()
        tunnel_writer.write(b"still there")
        async with asyncio.timeout(live.PATIENCE):
            events = b""
            while data := await read_chunk(stream):
                events += data
            rest = await half.read()
            thought = await thinks.read()
            echoed = await tunnel.readexactly(11)

        assert events == delta("a") + delta("b") + STOP + DONE
        assert rest == b"fine"
        assert thought.endswith(b"\r\n\r\nfine")
        assert echoed == b"still there"
        for writer in (stream_writer, half_writer, thinks_writer, tunnel_writer):
            writer.close()
        await live.until(lambda: len(front.seen) == 4, "all are over")
        assert [seen.outcome for seen in front.seen] == ["ok"] * 4


# --- much -------------------------------------------------------------------------------------------


async def test_any_number_of_small_frames_pass_a_tunnel_in_order():
    async def script(asking):
        await asking.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        while data := await asking.reader.read(262_144):
            await asking.send(data)
        asking.cut()

    async def send(writer, hashed):
        frame = struct.Struct(">BBII")  # a masked frame of four bytes: its number
        for first in range(0, FRAMES, 10_000):
            frames = b"".join(frame.pack(0x82, 0x84, 0, number) for number in range(first, first + 10_000))
            hashed.update(frames)
            writer.write(frames)
            await writer.drain()

    async with fronted(script) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get("/llm", "Upgrade: websocket").replace(b"Connection: close", b"Connection: Upgrade"))
        await reader.readuntil(b"\r\n\r\n")
        there, back, size = hashlib.sha256(), hashlib.sha256(), 0
        sending = asyncio.create_task(send(writer, there))
        async with asyncio.timeout(live.PATIENCE):
            while size < FRAMES * 10:
                data = await reader.read(262_144)
                assert data, "the tunnel ended"
                size += len(data)
                back.update(data)
            await sending
        writer.close()

        assert back.digest() == there.digest()
        assert (await front.last()).outcome == "ok"


# --- many -------------------------------------------------------------------------------------------


async def test_a_stream_keeps_nothing_of_the_steps_that_led_to_it():
    async with fronted(says(SSE_HEAD + chunk(delta("Hel"))), keep=warm()) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(chat())
        await reader.readuntil(b"Hel")
        (call,) = front.proxy.calls
        waiting, step = [], call.caller._connection.task.get_coro()
        while hasattr(step, "cr_await"):
            waiting.append(step.__qualname__)
            step = step.cr_await
        writer.close()

        assert waiting == ["Proxy.__call__", "Call._relay_events"]


@pytest.mark.clock_jumps
async def test_c5_five_hundred_who_drip_keep_nobody_waiting_and_are_cut_off():
    body = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"

    async with fronted(keep=warm(), limits=Limits(tick=0.02)) as (front, upstream):
        callers = []
        for number in range(500):
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " if number % 2 else body)
            callers.append((reader, writer))
        await live.until(lambda: front.proxy.in_progress == 250, "all have begun")
        heads, bodies = callers[1::2], callers[::2]

        async def drip(some, seconds):
            for _ in range(seconds // 5):
                for _, writer in some:
                    writer.write(b"x")
                await asyncio.get_running_loop().leap(5)

        async def told(some):
            async with asyncio.timeout(1000):  # of a clock that leaps
                return [(await reader.readuntil(b"\r\n\r\n"))[:13] for reader, _ in some]

        assert (await ask(front.port, get("/x")))[2] == b"fine"
        await drip(callers, 25)
        assert len(front.listener.connections) == 500  # the bodies have 30 s, the heads 75
        assert (await ask(front.port, get("/x")))[2] == b"fine"
        await drip(heads, 10)
        assert await told(bodies) == [b"HTTP/1.1 408 "] * 250
        await live.until(lambda: len(front.listener.connections) == 250, "the bodies are gone")
        await drip(heads, 45)
        assert await told(heads) == [b"HTTP/1.1 408 "] * 250
        for _, writer in callers:
            writer.close()
        await live.until(lambda: not front.listener.connections, "the heads are gone")
        assert len(upstream.requests) == 2


def test_m16_a_daemon_with_few_files_serves_whom_it_can_and_recovers(tmp_path, monkeypatch):
    if sys.platform != "linux" or shutil.which("sh") is None:
        pytest.skip("there is no ulimit to lower")
    key, files = "acme/x", 64
    sim = live.SimulatorProcess(tmp_path, f"{key}:0s")
    few = ["sh", "-c", f'ulimit -n {files} && exec "$0" "$@"', *live.KEEPALIVE]
    monkeypatch.setattr(live, "KEEPALIVE", few)
    with live.ending(sim), live.ending(daemon := live.DaemonProcess(tmp_path, live.settings(sim.url, key))):
        daemon.reaches(key, "warm")
        url = daemon.events("daemon.started")[0]["listen"]
        port = int(url.rpartition(":")[2])
        fds = f"/proc/{daemon.process.pid}/fd"
        with contextlib.ExitStack() as callers:
            for _ in range(300):
                callers.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            # Those that fit are let in; the others wait in the kernel, and nobody's answer waits for them.
            live.wait_until(lambda: len(os.listdir(fds)) >= 16 + 10, "those that fit are let in")
            for _ in range(20):
                assert len(os.listdir(fds)) < files
                assert live.ask(f"{daemon.url}/livez")[0] == 200
                assert live.ask(f"{daemon.url}/metrics")[0] == 200
            assert daemon.model(key)["state"] == "warm"
            assert daemon.events("http1.accept_failed") == []  # it was never tried in vain

        # All of them have left: now as many come with requests, and each gets its turn.
        sim.faults(prompt_seconds=0.0, token_seconds=0.0, parallel=64)
        body = json.dumps({"model": key, "stream": True, "max_tokens": 2, "messages": []}).encode()
        request = post("/v1/chat/completions", body)

        async def all_at_once():
            return await asyncio.gather(*(live.raw(url, request) for _ in range(300)))

        answers = asyncio.run(all_at_once())

        assert [answer[:13] for answer in answers] == [b"HTTP/1.1 200 "] * 300
        assert all(b"data: [DONE]" in answer for answer in answers)
        assert sim.happened("load.started", key) == 1
        assert "Traceback" not in daemon.err.read_text()


def test_m16_a_daemon_that_has_run_out_of_files_says_so_once_and_recovers(tmp_path, monkeypatch):
    if sys.platform != "linux" or shutil.which("sh") is None:
        pytest.skip("there is no ulimit to lower")
    key, files = "acme/x", 27  # fewer than what it has open by itself and its smallest cap of callers
    sim = live.SimulatorProcess(tmp_path, f"{key}:0s")
    few = ["sh", "-c", f'ulimit -n {files} && exec "$0" "$@"', *live.KEEPALIVE]
    monkeypatch.setattr(live, "KEEPALIVE", few)
    with live.ending(sim), live.ending(daemon := live.DaemonProcess(tmp_path, live.settings(sim.url, key))):
        daemon.reaches(key, "warm")
        url = daemon.events("daemon.started")[0]["listen"]
        port = int(url.rpartition(":")[2])
        with contextlib.ExitStack() as callers:
            for _ in range(100):
                callers.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            live.wait_until(lambda: "http1.accept_failed" in daemon.err.read_text(), "there is no file left")
            time.sleep(2.5)  # it tries again every second

            # This was about these lines alone: how often LM Studio could be asked meanwhile is another matter.
            assert len(daemon.events("http1.accept_failed")) == 1

        status, _, text = live.ask(f"{url}/v1/models")

        assert (status, json.loads(text)["object"]) == (200, "list")
        assert daemon.reaches(key, "warm")["loads"] == 1
        assert "Traceback" not in daemon.err.read_text()


# --- once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/v1/models/load", "/API/v1//models/load/?x", "/api/v1/models/unload"])
async def test_a_load_is_never_sent_twice_nor_over_a_connection_that_may_be_closed(path):
    body = json.dumps({"model": "m"}).encode()

    async def script(asking):
        if b"models" in asking.head:
            asking.reset()
        else:
            await answer_ok(asking)

    async with fronted(script, keep=warm(), join_loads=False) as (front, upstream):
        await ask(front.port, get("/x"))
        status, _, _ = await ask(front.port, post(path, body))

        assert status == 502
        assert upstream.bodies == [b"", body]
        assert upstream.connections == 2


async def test_an_upload_that_cannot_be_sent_again_does_not_meet_a_closed_connection():
    async def script(asking):
        await answer_ok(asking)
        if b"GET" in asking.head:
            await asyncio.sleep(0.05)
            asking.reset()

    async with fronted(script) as (front, upstream):
        await ask(front.port, get("/x"))
        status, _, _ = await ask(front.port, post("/y", b"x" * 1_000_000))

        assert status == 200
        assert upstream.bodies == [b"", b"x" * 1_000_000]
        assert upstream.connections == 2
