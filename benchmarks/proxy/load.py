"""Callers that cost next to nothing. Prints one line of JSON.

load.py streams PORT COUNT     COUNT streams at once, to their end
load.py first PORT COUNT       COUNT streams one after another; time to the first event of each
load.py requests PORT COUNT SECONDS   COUNT connections, small JSON, as fast as it goes
load.py paced PORTS COUNT SECONDS RATE MODELS   COUNT connections to each of some ports, with commas between; RATE small
                               requests a second all in all, of `other-0`, `other-1`, … in turn, MODELS of them
load.py hold PORT COUNT        COUNT streams that stay open until stdin ends; prints when they are
load.py crowd PORT COUNT       COUNT streams for a model that is not there yet: prints when all of them wait, and
                               after a line from stdin, which is when it came, how long the last one waited for a word
"""

import asyncio
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence

import uvloop

BODY = (
    b'{"model":"bench","stream":%s,"messages":[{"role":"user","content":"Tell me about kittens."}],'
    b'"max_tokens":500}'
)


def request(port: int, *, stream: bool) -> bytes:
    body = BODY % (b"true" if stream else b"false")
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: */*\r\n"
        b"Content-Type: application/json\r\nUser-Agent: bench\r\nContent-Length: %d\r\n\r\n%s"
        % (port, len(body), body)
    )


class Caller(asyncio.Protocol):
    """Sends one request at a time and says when its first event and its end came."""

    def __init__(self) -> None:
        self.events = 0
        self.first = 0.0
        self.tail = b""
        self.end = b"0\r\n\r\n"
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def ask(self, data: bytes) -> None:
        self.sent = time.perf_counter()
        self.first = 0.0
        self.tail = b""
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        events = data.count(b'"delta"')
        if events and not self.first:
            self.first = time.perf_counter() - self.sent
            if not self.begun.done():
                self.begun.set_result(None)
        self.events += events
        ended = data.endswith(self.end) or (self.tail + data[-8:]).endswith(self.end)
        if ended and not self.done.done():
            self.done.set_result(None)
        self.tail = (self.tail + data[-8:])[-8:]

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self.begun, self.done):
            if not future.done():
                future.set_exception(ConnectionError("the connection ended before the answer did"))
                future.exception()


async def callers(port: int, count: int) -> list[Caller]:
    loop = asyncio.get_running_loop()
    found = []
    for _ in range(count):
        _, caller = await loop.create_connection(Caller, "127.0.0.1", port)
        found.append(caller)
    return found


async def streams(port: int, count: int) -> dict[str, float]:
    all_of_them = await callers(port, count)
    for caller in all_of_them:
        caller.ask(request(port, stream=True))
        await asyncio.sleep(0.02 / count)  # spread over one gap between events
    await asyncio.gather(*(caller.done for caller in all_of_them))
    return {
        "events": sum(caller.events for caller in all_of_them),
        "first": statistics.median(caller.first for caller in all_of_them),
    }


async def first(port: int, count: int) -> dict[str, float]:
    (caller,) = await callers(port, 1)
    times = []
    for _ in range(count):
        caller.done = asyncio.get_running_loop().create_future()
        caller.ask(request(port, stream=True))
        await caller.done
        times.append(caller.first)
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


async def requests(port: int, count: int, seconds: float) -> dict[str, float]:
    all_of_them = await callers(port, count)
    until = time.perf_counter() + seconds
    total = 0
    data = request(port, stream=False)

    waited: list[float] = []

    async def repeat(caller: Caller) -> None:
        nonlocal total
        caller.end = b'"end":1}'
        while time.perf_counter() < until:
            caller.done = asyncio.get_running_loop().create_future()
            caller.ask(data)
            await caller.done
            waited.append(time.perf_counter() - caller.sent)
            total += 1

    began = time.perf_counter()
    await asyncio.gather(*(repeat(caller) for caller in all_of_them))
    seconds = time.perf_counter() - began
    waited.sort()
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "most": 1.0}
    late = {name: waited[min(int(len(waited) * share), len(waited) - 1)] for name, share in shares.items()}
    return {"requests": total, "seconds": seconds, **late}


async def paced(
    ports: Sequence[int], count: int, seconds: float, rate: float, models: int
) -> dict[str, float]:
    every = [
        caller
        for some in zip(*[await callers(port, count) for port in ports], strict=True)
        for caller in some
    ]
    bodies = [request(0, stream=False).replace(b'"bench"', b'"other-%d"' % n) for n in range(models)]
    # Another name takes other bytes.
    length = len(BODY % b"false")
    bodies = [
        body.replace(
            b"Content-Length: %d" % length, b"Content-Length: %d" % len(body.partition(b"\r\n\r\n")[2])
        )
        for body in bodies
    ]
    began = time.perf_counter()
    waited: list[float] = []

    async def repeat(first: int, caller: Caller) -> None:
        caller.end = b'"end":1}'
        for number in range(first, int(rate * seconds), len(every)):
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            caller.done = asyncio.get_running_loop().create_future()
            caller.ask(bodies[number % models])
            await caller.done
            waited.append(time.perf_counter() - caller.sent)

    await asyncio.gather(*(repeat(n, caller) for n, caller in enumerate(every)))
    return {
        "requests": len(waited),
        "seconds": time.perf_counter() - began,
        "p50": statistics.median(waited),
        "most": max(waited),
    }


async def hold(port: int, count: int) -> None:
    all_of_them = []
    while len(all_of_them) < count:
        batch = await callers(port, min(50, count - len(all_of_them)))
        for caller in batch:
            caller.ask(request(port, stream=True))
        await asyncio.gather(*(caller.begun for caller in batch))
        all_of_them += batch
    print(json.dumps({"open": len(all_of_them)}), flush=True)
    await asyncio.to_thread(sys.stdin.read)


class Waiter(Caller):
    """A caller that is told at once that it waits: a head and a comment."""

    def __init__(self) -> None:
        super().__init__()
        self.told: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        if not self.told.done():
            self.told.set_result(None)
        super().data_received(data)


async def crowd(port: int, count: int) -> None:
    loop = asyncio.get_running_loop()
    waiters = []
    while len(waiters) < count:
        batch = []
        for _ in range(min(50, count - len(waiters))):
            _, waiter = await loop.create_connection(Waiter, "127.0.0.1", port)
            waiter.ask(request(port, stream=True))
            batch.append(waiter)
        await asyncio.gather(*(waiter.told for waiter in batch))
        waiters += batch
    print(json.dumps({"open": len(waiters)}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began = time.perf_counter()
    await asyncio.gather(*(waiter.begun for waiter in waiters))
    last = time.perf_counter() - began
    await asyncio.gather(*(waiter.done for waiter in waiters))
    print(json.dumps({"last": last, "events": sum(w.events for w in waiters)}), flush=True)


async def main() -> None:
    what, port, count, *rest = sys.argv[1:]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    if what in ("hold", "crowd"):
        await {"hold": hold, "crowd": crowd}[what](int(port), int(count))
        return
    if what == "requests":
        result = await requests(int(port), int(count), float(rest[0]))
    elif what == "paced":
        ports = list(map(int, port.split(",")))
        result = await paced(ports, int(count), float(rest[0]), float(rest[1]), int(rest[2]))
    else:
        result = await {"streams": streams, "first": first}[what](int(port), int(count))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
