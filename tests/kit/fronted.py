"""A proxy on a real socket: a scripted upstream behind it, callers made of bytes, a keeper of few words."""

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from keepalive.core.callers import Seen
from keepalive.core.errors import NotWarm
from keepalive.core.facts import Entry, Fact, ModelId
from keepalive.core.keeping import View
from keepalive.core.names import Meaning, Names
from keepalive.http1 import Limits, Listener, bind, serve
from keepalive.proxy import Address, Proxy, Settings
from tests.kit.live import PATIENCE, bound

Script = Callable[["Asking"], Awaitable[None]]


@dataclass
class Asking:
    """One connection to the scripted upstream, after its first request was read."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes
    body: bytes
    upstream: "Upstream"

    async def send(self, data: bytes, *, drip: int = 0) -> None:
        pieces = [data[i : i + drip] for i in range(0, len(data), drip)] if drip else [data]
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            if drip:
                await asyncio.sleep(0)

    def cut(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    async def left(self) -> float:
        """Waits until the other side is gone; the time when it was seen."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        return asyncio.get_running_loop().time()

    @property
    def headers(self) -> dict[bytes, bytes]:
        lines = self.head.split(b"\r\n")[1:]
        return {line.partition(b":")[0].lower(): line.partition(b":")[2].strip() for line in lines if line}


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lowered = head.lower()
    if b"content-length:" in lowered:
        size = int(lowered.split(b"content-length:")[1].split(b"\r\n")[0])
        return head, await reader.readexactly(size)
    if b"transfer-encoding: chunked" in lowered:
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return head, body
    return head, b""


class Upstream:
    """A server that plays `script` for each request; no HTTP library in it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Asking] = []
        self.connections = 0
        self.open = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._held: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens; after `stop` on the same port."""
        listening = self._held or bound()
        self._held = None
        self._server = await asyncio.start_server(self._serve, sock=listening, limit=1 << 26)
        self.port = listening.getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head, body = await read_request(reader)
                asking = Asking(reader, writer, head, body, self)
                self.requests.append(asking)
                await self.script(asking)
                if writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def stop(self) -> None:
        """Refuses connections. Its port stays its own: whoever asks the kernel for one meanwhile gets another."""
        if self._server is not None:
            self._server.close()
            self._held = bound(self.port)
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._server = None

    async def end(self) -> None:
        await self.stop()
        if self._held is not None:
            self._held.close()

    @property
    def bodies(self) -> list[bytes]:
        return [asking.body for asking in self.requests]


@dataclass
class Model:
    state: str = "warm"
    reason: str | None = None
    elapsed: float | None = None
    eta: float | None = None
    progress: float | None = None
    load_seconds: float = 0.0
    loaded: asyncio.Event | None = None  # ends the load, where the test says when
    max_wait: float = 600.0
    aliases: tuple[str, ...] = ()
    kind: str = "llm"
    stall_timeout: float | None = None
    resting: Callable[[], tuple[float, float] | None] = lambda: None
    questioned: bool = False
    fails: NotWarm | None = None
    loads: int = 0
    loading: asyncio.Task[None] | None = None
    wanted: bool = True
    facts: list[Fact] = field(default_factory=list)


class Keep:
    """Plays the keeper: one load per model, shared by all who wait, never cancelled by one who leaves."""

    def __init__(self) -> None:
        self.models: dict[ModelId, Model] = {}
        self.upstreams: tuple[str, ...] = ("local",)
        self.default: str | None = None
        self.listings: dict[str, dict[str, Entry]] = {}
        self.lm_studio = True
        self.away: set[str] = set()
        self.waiting = 0
        self.warm_asked = 0

    def add(self, key: str, upstream: str = "local", **how: object) -> Model:
        model = self.models[ModelId(upstream, key)] = Model(**how)  # type: ignore[arg-type]
        return model

    @property
    def names(self) -> Names:
        names = Names()
        names.configure(
            self.upstreams, {model: it.aliases for model, it in self.models.items()}, self.default
        )
        for upstream, entries in self.listings.items():
            names.listed(upstream, entries)
        return names

    def find(self, name: str, /) -> Sequence[ModelId]:
        return self.names.find(name)

    async def meant(self, name: str, /) -> Sequence[ModelId]:
        return self.find(name)

    def take_up(self, name: str, /) -> None:
        pass

    def offered(self) -> list[str]:
        return [model.key for model in self.models]

    async def meaning(self, name: str | None, /, *, default: bool = True) -> Meaning:
        return self.names.meaning(name, self.upstreams, default=default)

    def present(self, upstream: str, kind: str, /) -> Sequence[ModelId]:
        here = [(model, it) for model, it in self.models.items() if model.upstream == upstream]
        return [model for model, it in here if it.state == "warm" and it.kind == kind]

    def is_lm_studio(self, upstream: str, /) -> bool:
        return self.lm_studio

    def is_away(self, upstream: str, /) -> bool:
        return upstream in self.away

    def rows(self, upstream: str, /) -> Mapping[str, Sequence[str]]:
        return self.names.rows(upstream)

    def view(self, model: ModelId, /) -> View:
        it = self.models[model]
        return View(
            state=it.state,
            reason=it.reason,
            elapsed=it.elapsed,
            eta=it.eta,
            progress=it.progress,
            max_wait=it.max_wait,
            stall_timeout=it.stall_timeout,
            resting=it.resting(),
            wanted=it.wanted,
            questioned=it.questioned,
        )

    def ready(self, models: Sequence[ModelId], /) -> ModelId | None:
        self.warm_asked += 1
        return next((model for model in models if self.models[model].state == "warm"), None)

    async def ensure_warm(self, models: Sequence[ModelId], /) -> ModelId:
        ready = self.ready(models)
        if ready is not None:
            return ready
        model = models[0]
        it = self.models[model]
        if it.loading is None:
            it.loads += 1
            it.loading = asyncio.create_task(self._load(it))
        self.waiting += 1
        try:
            await asyncio.shield(it.loading)
        finally:
            self.waiting -= 1
        if it.fails is not None:
            raise it.fails
        return model

    async def _load(self, it: Model) -> None:
        it.state = "loading"
        await (asyncio.sleep(it.load_seconds) if it.loaded is None else it.loaded.wait())
        it.state = "cold" if it.fails else "warm"
        it.loading = None

    def record(self, fact: Fact, /) -> None:
        model = getattr(fact, "model", None)
        if model in self.models:
            self.models[model].facts.append(fact)


class Front:
    """The proxy under test."""

    def __init__(self, proxy: Proxy, listener: Listener, keep: Keep, seen: list[Seen]) -> None:
        self.proxy = proxy
        self.listener = listener
        self.keep = keep
        self.seen = seen

    @property
    def port(self) -> int:
        return self.listener.port

    async def last(self) -> Seen:
        """The record of the request that was made."""
        async with asyncio.timeout(PATIENCE):
            while not self.seen or self.proxy.in_progress:
                await asyncio.sleep(0.001)
        return self.seen[-1]


QUICK = Limits(tick=0.02)


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.asynccontextmanager
async def fronted(
    script: Script | None = None,
    *,
    keep: Keep | None = None,
    upstreams: dict[str, Address] | None = None,
    limits: Limits = QUICK,
    epilogue: bool = True,
    **settings: object,
) -> AsyncIterator[tuple[Front, Upstream]]:
    """A proxy in front of `script`. Afterwards: a normal request works, and nothing is left over."""
    before = asyncio.all_tasks()
    fds = count_fds()
    upstream = Upstream(script or answer_ok)
    await upstream.start()
    keep = keep or Keep()
    seen: list[Seen] = []
    chosen = upstreams or {"local": Address(f"http://127.0.0.1:{upstream.port}")}
    keep.upstreams = tuple(chosen)
    proxy = Proxy(Settings(upstreams=chosen, limits=limits, **settings), keep, seen.append)  # type: ignore[arg-type]
    listener = await serve(proxy, sockets=bind("127.0.0.1", 0), limits=limits, refusal=proxy.refusal)
    front = Front(proxy, listener, keep, seen)
    try:
        yield front, upstream
        if epilogue:
            await _epilogue(front, upstream)
    finally:
        await listener.close()
        await proxy.close()
        await upstream.end()
        for model in keep.models.values():
            if model.loading is not None:
                model.loading.cancel()
                await asyncio.gather(model.loading, return_exceptions=True)
    async with asyncio.timeout(PATIENCE):
        while True:
            left = {task for task in asyncio.all_tasks() if not task.done()} - before
            gc.collect()
            if not left and count_fds() <= fds + 1:  # the loop's own epoll of a watch may be closed late
                break
            await asyncio.sleep(0.02)


async def _epilogue(front: Front, upstream: Upstream) -> None:
    upstream.script = answer_ok
    front.keep.upstreams = ("local",)
    front.proxy.configure(
        replace(
            front.proxy.settings,
            upstreams={"local": Address(f"http://127.0.0.1:{upstream.port}")},
            keys=(),
            loopback=True,
        )
    )
    if upstream._server is None:
        await upstream.start()
    status, _, body = await ask(front.port, get("/epilogue"))
    assert (status, body) == (200, b"fine")
    async with asyncio.timeout(PATIENCE):
        while front.proxy.in_progress or front.proxy.waiting or front.keep.waiting:
            await asyncio.sleep(0.005)
    assert not front.proxy.calls
    assert front.proxy.room.taken == 0
    assert len(front.proxy.ticker) == 0
    async with asyncio.timeout(PATIENCE):
        while front.listener.connections:
            await asyncio.sleep(0.005)


# --- scripts ---------------------------------------------------------------------------------------


async def answer_ok(asking: Asking) -> None:
    await asking.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nfine")


def says(data: bytes, *, drip: int = 0, then: str = "keep") -> Script:
    async def script(asking: Asking) -> None:
        await asking.send(data, drip=drip)
        if then == "cut":
            asking.cut()
        elif then == "reset":
            asking.reset()

    return script


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


CHUNK = b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'


def delta(text: str) -> bytes:
    return CHUNK + b'"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % text.encode()


STOP = CHUNK + b'"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def stream(*events: bytes) -> bytes:
    return SSE_HEAD + b"".join(chunk(event) for event in events) + b"0\r\n\r\n"


CHAT_STREAM = stream(delta("Hel"), delta("lo"), STOP, DONE)
CHAT_BODY = delta("Hel") + delta("lo") + STOP + DONE


# --- callers ---------------------------------------------------------------------------------------


def get(path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def chat(model: str = "m", *headers: str, stream: bool = True) -> bytes:
    flag = b"true" if stream else b"false"
    body = b'{"model":"%b","stream":%b,"messages":[{"role":"user","content":"hi"}]}' % (model.encode(), flag)
    return post("/v1/chat/completions", body, "Content-Type: application/json", *headers)


def split_answer(data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and decoded body; fails when the answer is not whole."""
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    status = int(lines[0].split(b" ")[1])
    headers = {line.partition(b":")[0].lower(): line.partition(b":")[2].strip() for line in lines[1:]}
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while True:
            size, _, rest = rest.partition(b"\r\n")
            if int(size, 16) == 0:
                assert rest == b"\r\n", rest
                return status, headers, body
            assert len(rest) >= int(size, 16) + 2, "cut in a chunk"
            body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    if b"content-length" in headers:
        assert len(rest) == int(headers[b"content-length"]), (rest, headers)
    return status, headers, rest


async def raw(port: int, data: bytes, *, drip: int = 0) -> bytes:
    """Everything that comes until the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
    try:
        async with asyncio.timeout(PATIENCE):
            for piece in [data[i : i + drip] for i in range(0, len(data), drip)] if drip else [data]:
                writer.write(piece)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                if drip:
                    await asyncio.sleep(0)
            got = b""
            with contextlib.suppress(ConnectionError):
                while more := await reader.read(65536):
                    got += more
            return got
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask(port: int, data: bytes, *, drip: int = 0) -> tuple[int, dict[bytes, bytes], bytes]:
    return split_answer(await raw(port, data, drip=drip))


class Watching:
    """A caller that notes when which bytes came."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.began = 0.0
        self.arrivals: list[tuple[float, bytes]] = []

    async def call(self, data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.began = asyncio.get_running_loop().time()
        writer.write(data)
        while more := await reader.read(65536):
            self.arrivals.append((asyncio.get_running_loop().time() - self.began, more))
        writer.close()
        return split_answer(b"".join(data for _, data in self.arrivals))

    async def heard(self, words: bytes, times: int) -> None:
        """Waits until that has come so often."""
        async with asyncio.timeout(PATIENCE):
            while b"".join(data for _, data in self.arrivals).count(words) < times:
                await asyncio.sleep(0.01)


def without_comments(body: bytes) -> bytes:
    return b"".join(event + b"\n\n" for event in body.split(b"\n\n") if event and not event.startswith(b":"))


def leave(writer: asyncio.StreamWriter, how: str) -> None:
    if how == "half-close":
        writer.write_eof()
        return
    if how == "reset":
        writer.get_extra_info("socket").setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")
    writer.transport.abort()
