"""The admin address of a daemon that somebody means ill: floods, and readers that never read."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.kit.live import (
    PATIENCE,
    DaemonProcess,
    SimulatorProcess,
    ask,
    asked,
    ending,
    settings,
)

pytestmark = pytest.mark.xdist_group("a daemon that somebody means ill")  # one for all of them

KEY = "medicine-llm"
WATCH = b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon with one model, for all that is done to it here, one after another; in the end it stops in order."""
    folder = tmp_path_factory.mktemp("kept")
    studio = SimulatorProcess(folder, f"{KEY}:0.1")
    with ending(studio):
        process = DaemonProcess(folder, settings(studio.url, KEY))
        with ending(process):
            process.reaches(KEY, "warm")
            yield process

            assert ask(f"{process.url}/livez")[0] == 200
            assert [event for event in process.events() if event["level"] in ("error", "critical")] == []
            process.process.terminate()
            assert process.ended() == 0


def memory(process: DaemonProcess) -> float:
    """Resident, in MiB."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def series(process: DaemonProcess) -> list[str]:
    """The name and labels of all that is exported."""
    lines = ask(f"{process.url}/metrics")[2].splitlines()
    return sorted(line.rpartition(" ")[0] for line in lines if not line.startswith("#"))


def client_url(process: DaemonProcess) -> str:
    return str(process.events("daemon.started")[0]["listen"])


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def flood(url: str, requests: int, request: Callable[[int], bytes]) -> int:
    """So many requests, each on a connection of its own, twenty at a time; how many were answered."""
    left = iter(range(requests))
    answered = 0

    async def one_after_another() -> None:
        nonlocal answered
        for number in left:
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE), connected(url) as (reader, writer):
                    writer.write(request(number))
                    answer = await reader.read()
                answered += answer.startswith(b"HTTP/1.")

    await asyncio.gather(*(one_after_another() for _ in range(20)))
    return answered


def named_anew(number: int) -> bytes:
    """A request whose model, path, method, Host or key nobody has ever used before."""
    name = f"x{number}"
    body = f'{{"model":"{name}","messages":[],"max_tokens":1}}'
    line, header = [
        ("POST /v1/chat/completions", ""),
        (f"GET /{name}", ""),
        (f"{name.upper()} /v1/models", ""),
        ("GET /api/status", f"Host: {name}.example\r\n"),
        (f"POST /api/models/{name}/warm", ""),
        (f"GET /readyz?model={name}", f"Authorization: Bearer {name}\r\n"),
        (f"GET /api/history?model={name}", f"Origin: http://{name}.example\r\n"),
    ][number % 7]
    host = "" if header.startswith("Host") else "Host: localhost\r\n"
    head = f"{line} HTTP/1.1\r\n{host}{header}Content-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def test_names_that_nobody_configured_make_no_series_and_take_no_memory(kept: DaemonProcess) -> None:
    for url in (kept.url, client_url(kept)):
        await flood(url, 280, named_anew)
    before, used = series(kept), memory(kept)
    answered = [
        await flood(url, 1_750, lambda number: named_anew(number + 1_000))
        for url in (kept.url, client_url(kept))
    ]
    after = series(kept)

    assert answered == [1_750, 1_750]
    assert after == before
    assert not any("x1" in line for line in after)
    assert memory(kept) < used + 5


async def test_thousands_who_would_watch_are_told_to_come_again_and_cost_little(kept: DaemonProcess) -> None:
    refused = 0

    async with contextlib.AsyncExitStack() as stack:
        watching = [await stack.enter_async_context(connected(kept.url)) for _ in range(256)]
        for reader, writer in watching:
            writer.write(WATCH)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"

        def late(number: int) -> bytes:
            return WATCH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

        async def count(number: int) -> None:
            nonlocal refused
            status, headers, _ = await asked(f"{kept.url}/api/events")
            refused += (status, headers["Retry-After"]) == (503, "10")

        await asyncio.gather(*map(count, range(20)))
        await flood(kept.url, 2_000, late)
        used = memory(kept)
        # Those who watch still hear of everything.
        await asked(f"{kept.url}/api/models/{KEY}/release", "POST")
        for reader, _ in watching:
            async with asyncio.timeout(PATIENCE):
                while b"released by hand" not in await reader.readline():
                    pass

    assert refused == 20
    assert used < 150


async def test_a_scraper_that_never_reads_delays_no_other_and_nobodys_answer(kept: DaemonProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            never = stack.enter_context(socket.socket())
            never.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            place = urlsplit(kept.url)
            await asyncio.to_thread(never.connect, (place.hostname, place.port))
            never.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        scrapes = [asked(f"{kept.url}/metrics") for _ in range(60)]
        chat = {"model": KEY, "messages": [{"role": "user", "content": "?"}]}
        answers = [asked(f"{client_url(kept)}/v1/chat/completions", "POST", chat) for _ in range(20)]
        got = await asyncio.gather(*scrapes, *answers)
        used = memory(kept)

    assert {status for status, _, _ in got} == {200}
    assert all(text.endswith("\n") and "keepalive_build_info" in text for _, _, text in got[:60])
    assert all("choices" in text for _, _, text in got[60:])
    assert used < 150
