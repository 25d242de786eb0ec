"""One answer: what the proxy takes for its caller. It is asked in chat completions, and tells in our events."""

import asyncio
import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from keepalive.core.callers import Key
from keepalive.core.facts import ModelId
from keepalive.core.keeping import Keeping, View
from keepalive.http1 import (
    NO_STORE,
    BadHead,
    Between,
    Caller,
    Exchange,
    Headers,
    Passing,
    Reply,
    RequestHead,
    Ticker,
    values,
)
from keepalive.prompts.asked import Order, Refusal, encode
from keepalive.protocols import sse
from keepalive.protocols.answers import chat_delta, chat_error
from keepalive.protocols.routes import PROMPTS, Route

#: `model_loading` is said at most so often.
LOADING_SECONDS: Final = 1.0
#: When the caller has been told of the end, the upstream has this long to come to its own.
LAST_SECONDS: Final = 5.0
#: Of an upstream's answer that is no stream of events: what its error says stands at its beginning.
ERROR_BYTES: Final = 65_536

_EVENTS: Final[Headers] = [
    (b"Content-Type", b"text/event-stream"),
    (b"Cache-Control", b"no-cache"),
    (b"X-Accel-Buffering", b"no"),
]
# Who may ask is decided again in the proxy, by the same headers; of the others none concerns the upstream.
_PASSED_ON: Final = frozenset(
    (
        b"host",
        b"origin",
        b"sec-fetch-site",
        b"authorization",
        b"x-api-key",
        b"api-key",
        b"prefer",
        b"user-agent",
    )
)


class Forward(Protocol):
    """The proxy."""

    def __call__(self, caller: Caller, route: Route, /) -> Awaitable[None]: ...


@dataclass(slots=True)
class Visit:
    """One request to one of our routes."""

    exchange: Exchange
    key: Key | None
    cors: Headers
    began: float
    quiet: bool = False  # it wants no comments in the silence

    def answer(self, status: int, body: Mapping[str, object], headers: Headers | None = None) -> None:
        kind = (b"Content-Type", b"application/json")
        self.exchange.answer(status, [kind, *NO_STORE, *self.cors, *(headers or ())], encode(body))

    def refuse(self, refusal: Refusal) -> None:
        kind = (b"Content-Type", b"application/json")
        headers = [kind, *NO_STORE, *self.cors, *(refusal.headers or ())]
        self.exchange.answer(refusal.status, headers, refusal.body())


class Stream:
    """What the proxy takes for its caller: asks in chat completions, and tells the real caller in our events.

    Nothing is kept: what the caller does not take is not read from the upstream.
    """

    def __init__(self, visit: Visit, order: Order, keeping: Keeping, heartbeat: float) -> None:
        self._visit = visit
        self._exchange = visit.exchange
        # Not the order itself: its text may be long, and a stream goes on for long.
        self._prompt = order.prompt
        self._models = order.models
        self._timeout = order.timeout
        self._keeping = keeping
        self._heartbeat = heartbeat
        self._now = asyncio.get_running_loop().time
        self._body = order.body()
        headers = [pair for pair in visit.exchange.head.headers if pair[0].lower() in _PASSED_ON]
        headers += [(b"Content-Type", b"application/json"), (b"X-Keepalive-Heartbeat", b"off")]
        self.head = RequestHead(b"POST", b"/v1/chat/completions", headers)
        self.head.body = len(self._body)
        self.started = False  # the proxy has begun its answer
        self.finished = False
        self._begun = False  # the caller has been told of the start
        self._over = False  # and of the end
        self._whole = False
        self._decoder = sse.Decoder()
        self._status = 0  # of an answer that is no stream of events
        self._plain = b""
        self._chunks = 0
        self._length = 0
        self._saying: list[bytes] = []  # events that leave together, as they came
        self._said_at = visit.began
        self._loading_at = -math.inf
        self._slack = 0.0
        self._limit: asyncio.Timeout | None = None

    async def run(self, forward: Forward, ticker: Ticker) -> None:
        """Answers the caller, as the proxy answers."""
        timeout = self._timeout
        deadline = None if timeout is None else self._visit.began + timeout / 1000
        self._slack = ticker.interval / 2
        ticker.add(self)
        try:
            async with asyncio.timeout_at(deadline) as self._limit:
                # Runs when the proxy first waits for something: what it refuses at once keeps its true status.
                asyncio.get_running_loop().call_soon(self._begin)
                await forward(self, PROMPTS)
        except TimeoutError:
            view = self._view()
            state = f"; {self._key} is {view.state}" if view.state != "warm" else ""
            self._fail(504, f"no answer began within {timeout or 0:g} ms{state}", "timeout")
        finally:
            ticker.discard(self)
            self._over = True

    @property
    def _key(self) -> str:
        return self._models[0].key

    def _view(self) -> View:
        return view_of(self._keeping, self._models)

    # --- what it says -----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._begun or self._over or self._exchange.gone:
            return
        self._begun = True
        self._exchange.start(200, [*_EVENTS, *self._visit.cors])
        prompt = self._prompt
        self._say(
            type="start",
            promptId=None if prompt is None else prompt.id,
            promptTitle=None if prompt is None else prompt.title,
            modelId=self._key,
            modelName=self._key,
            lmStudioModelId=self._view().instance_id or self._key,
        )
        self._send()
        self.tick(self._now())

    def _say(self, **event: object) -> None:
        self._saying.append(b"data: %b\n\n" % encode(event))

    def _send(self) -> None:
        if self._saying:
            self._said_at = self._now()
            self._exchange.push(b"".join(self._saying))
            self._saying.clear()

    def tick(self, now: float) -> None:
        """Fills the silence."""
        if not self._begun or self._over or self._exchange.paused:
            return
        if not self.started and now - self._loading_at + self._slack >= LOADING_SECONDS:
            view = self._view()
            if view.state != "warm":
                self._loading_at = now
                self._say_loading(view, now)
                self._send()
        if now - self._said_at + self._slack >= self._heartbeat:
            self._said_at = now
            self._exchange.push(b": keep-alive\n\n")

    def _say_loading(self, view: View, now: float) -> None:
        elapsed = now - self._visit.began if view.elapsed is None else view.elapsed
        self._say(
            type="model_loading",
            message=f"Loading {self._key}"
            if view.state == "loading"
            else f"Waiting for {self._key} ({view.state})",
            estimatedTime=None if view.eta is None else milliseconds(elapsed + view.eta),
            elapsed=milliseconds(elapsed),
            **({} if view.progress is None else {"progress": round(view.progress, 3)}),
        )

    def _hear(self, data: str) -> None:
        """One event of the upstream, or of the proxy."""
        try:
            delta = chat_delta(data)
        except ValueError:
            self._fail(502, "the upstream sent an event that cannot be read", "upstream_error")
            return
        if delta.error is not None:
            self._fail(502, delta.error, delta.code or "upstream_error")
            return
        if delta.reasoning or delta.text:
            self._bound(None)
        if delta.reasoning:
            self._say(type="reasoning", content=delta.reasoning)
        if delta.text:
            self._chunks += 1
            self._length += len(delta.text)
            self._say(type="chunk", content=delta.text, chunkNumber=self._chunks)
        self._whole = self._whole or delta.finished
        if delta.last:
            self._end()

    def _end(self) -> None:
        self._say(
            type="done",
            totalChunks=self._chunks,
            duration=milliseconds(self._now() - self._visit.began),
            outputLength=self._length,
        )
        self._close()

    def _fail(self, status: int, message: str, code: str, headers: Headers | None = None) -> None:
        if self._over:
            return
        if self._begun:
            self._say(type="error", message=message, code=code)
        elif not self._exchange.gone:
            self._visit.refuse(Refusal(status, message, code, headers=headers))
        self._close()

    def _close(self) -> None:
        """The caller has everything: from here on it may leave, and that says nothing about the answer."""
        self._over = True
        self._send()
        self._exchange.finish()
        self._bound(self._now() + LAST_SECONDS)

    def _bound(self, until: float | None) -> None:
        limit = self._limit
        if limit is not None and limit.when() != until and not limit.expired():
            limit.reschedule(until)

    # --- what the proxy does with its caller ------------------------------------------------------

    @property
    def gone(self) -> bool:
        return self._exchange.gone

    @property
    def refused(self) -> BadHead | None:
        return self._exchange.refused

    @property
    def paused(self) -> bool:
        return self._exchange.paused

    @property
    def passes(self) -> Passing | None:
        return self._exchange.passes

    @passes.setter
    def passes(self, source: Passing | None) -> None:
        self._exchange.passes = source

    @property
    def body_ended(self) -> bool:
        return not self._body

    def forget_head(self) -> None:
        self.head.forget()
        self.head.reading = None

    def read_whole(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def read(self) -> bytes:
        return self.read_whole()

    async def drained(self) -> None:
        await self._exchange.drained()

    def start(
        self, status: int, headers: Headers, *, reason: bytes | None = None, length: int | None = None
    ) -> None:
        self.started = True
        kind = next(iter(values(headers, b"content-type")), b"").lower()
        if status != 200 or not kind.startswith(b"text/event-stream"):
            self._status = status
        self._begin()

    def push(self, data: bytes) -> None:
        if self._over:
            return
        if self._status:
            self._plain += data[: ERROR_BYTES - len(self._plain)]
            return
        try:
            events = self._decoder.feed(data)
        except sse.EventTooLong:
            self._fail(502, "the upstream sent an event that is too large", "upstream_error")
            return
        for event in events:
            if isinstance(event, sse.Event) and not self._over:
                self._hear(event.data)
        self._send()

    def flush(self) -> None:
        pass

    def chunk_writer(self) -> None:
        """Whoever is told in other words has no use for chunks."""

    def finish(self) -> None:
        self.finished = True
        if self._status:
            told = chat_error(self._plain)
            status = self._status if self._status >= 400 else 502
            message = told.error or f"the upstream answered {self._status} without events"
            self._fail(status, message, told.code or f"upstream_{self._status}")
        elif self._whole and not self._over:
            self._end()
        else:
            self._fail(502, "the upstream's answer ended before its end", "upstream_cut")

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """The proxy's own words: it refuses."""
        self.started = self.finished = True
        told = chat_error(body)
        ours = {b"content-type", *(name.lower() for name, _ in [*NO_STORE, *self._visit.cors])}
        kept = [pair for pair in headers if pair[0].lower() not in ours]
        self._fail(status, told.error or "refused", told.code or "refused", kept)

    def cancel(self) -> None:
        self._exchange.cancel()

    def abort(self) -> None:
        self.finished = True
        self._fail(502, "the upstream's answer was cut", "upstream_cut")

    async def tunnel(self, reply: Reply, headers: Headers, between: Between | None) -> None:
        raise AssertionError("a prompt is no WebSocket")


def view_of(keeping: Keeping, models: Sequence[ModelId]) -> View:
    """That of the model that a request would be answered by: one that is warm, else one that comes."""
    views = [keeping.view(model) for model in models]
    rank = {"warm": 0, "loading": 1}
    return min(views, key=lambda view: rank.get(view.state, 2))


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
