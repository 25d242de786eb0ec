"""The forwarder: what callers point their base URL at.

A request for a model that we keep is passed on only after `ensure_warm` said so; everything else passes
untouched. Until the first byte of an upstream's answer has gone out everything may still be decided; after it
nothing is tried again. What measures a stream stands behind it and cannot touch it.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from keepalive.core.errors import Cut, NotWarm, Reason, TimedOut, Unreachable, UpstreamError
from keepalive.core.facts import InstanceLost, ModelFact, ModelId, RequestEnded, RequestStarted
from keepalive.http1 import (
    BadHead,
    Headers,
    Limits,
    Pool,
    Reply,
    RequestHead,
    Ticker,
    end_to_end,
    host_of,
    preferred_wait,
    values,
)
from keepalive.protocols import routes
from keepalive.protocols.meter import Meter
from keepalive.protocols.sse import Splitter

#: Of an event that is not complete yet: held back, so that what a caller has always ends where an event does.
HELD_BACK_BYTES = 262_144
#: Of an upstream's error answer: read before it is decided what becomes of it.
ERROR_BYTES = 65_536
#: Conversations whose home is remembered.
HOMES = 4096

NO_STORE = [(b"Cache-Control", b"no-store"), (b"X-Content-Type-Options", b"nosniff")]


class Outcome(StrEnum):
    OK = "ok"
    CLIENT_GONE = "client_gone"
    UPSTREAM_ERROR = "upstream_error"  # it could not be reached, or said no
    TIMEOUT = "timeout"  # the model did not get warm in time, or the upstream stopped in a head
    CUT = "cut"  # the upstream's answer ended before its end
    REJECTED = "rejected"  # by us: key, origin, size


class Heartbeat(StrEnum):
    COMMENT = "comment"
    REASONING = "reasoning"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a model at this moment; times in seconds."""

    state: str
    reason: str | None = None
    elapsed: float | None = None
    eta: float | None = None
    instance_id: str | None = None
    in_flight: int = 0
    waiting: int = 0
    retry_after: float | None = None
    max_wait: float = 600.0


class Keeping(Protocol):
    """Who keeps the models."""

    def find(self, key: str, /) -> Sequence[ModelId]:
        """The models that a request for `key` means, on whichever upstreams; none when nobody keeps it."""

    def view(self, model: ModelId, /) -> View: ...

    async def ensure_warm(self, models: Sequence[ModelId], /) -> ModelId:
        """Waits until one of them is warm. Raises NotWarm. Cancelling it is leaving: the load goes on."""

    def record(self, fact: ModelFact, /) -> None: ...


class Caller(Protocol):
    """Who asks and is answered: an `Exchange`, or whoever asks in the name of one."""

    on_pause: Callable[[], None] | None
    on_resume: Callable[[], None] | None

    @property
    def head(self) -> RequestHead: ...
    @property
    def gone(self) -> bool: ...
    @property
    def refused(self) -> BadHead | None: ...
    @property
    def started(self) -> bool: ...
    @property
    def finished(self) -> bool: ...
    @property
    def paused(self) -> bool: ...
    @property
    def body_ended(self) -> bool: ...

    async def read(self) -> bytes: ...
    async def drained(self) -> None: ...
    def start(
        self, status: int, headers: Headers, *, reason: bytes | None = None, length: int | None = None
    ) -> None: ...
    def push(self, data: bytes) -> None: ...
    def flush(self) -> None: ...
    def finish(self) -> None: ...
    def answer(self, status: int, headers: Headers, body: bytes) -> None: ...
    def abort(self) -> None: ...
    async def tunnel(self, reply: Reply, headers: Headers) -> None: ...


@dataclass(frozen=True, slots=True)
class Address:
    url: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Key:
    """A caller's key: `name` may be shown, `secret` never."""

    name: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Settings:
    upstreams: Mapping[str, Address]  # the first one serves what is for no model that we keep
    heartbeat: float = 5.0
    heartbeat_mode: Heartbeat = Heartbeat.COMMENT
    limits: Limits = field(default_factory=Limits)
    connect_timeout: float = 5.0
    #: Of the bodies of all requests that wait, together.
    kept_bytes: int = 512 * 1024 * 1024
    loopback: bool = True  # nobody but this machine can reach the listener
    allowed_hosts: frozenset[str] = frozenset()
    allowed_origins: frozenset[str] = frozenset()
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """One request, when it is over: for metrics and the log. Holds nothing that was said."""

    model: ModelId | None
    route: str
    key: str | None  # name of the caller's key
    outcome: Outcome
    status: int
    start: str | None = None  # "warm", "cold"; None for a model that nobody keeps
    wait_seconds: float = 0.0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    events: int = 0
    gaps: tuple[int, ...] = ()
    gap_seconds: float = 0.0


class Proxy:
    """Handles the exchanges of a listener. One for the life of the daemon."""

    def __init__(self, settings: Settings, keeping: Keeping, seen: Callable[[Seen], None]) -> None:
        self.settings = settings
        self.keeping = keeping
        self.seen = seen
        #: Requests that have not been answered to the end, and those of them that wait for a model.
        self.in_progress = 0
        self.waiting = 0
        self.kept_bytes = 0
        self.ticker = Ticker(min(max(settings.heartbeat / 10, 0.01), 0.5))
        self.pools: dict[str, Pool] = {}
        self._retired: list[Pool] = []
        self.calls: set[_Call] = set()
        self.stopping: str | None = None
        self._homes: OrderedDict[bytes, ModelId] = OrderedDict()
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """New settings for the requests that come from now on; those under way keep what they began with."""
        before, self.settings = self.settings, settings
        pools: dict[str, Pool] = {}
        for name, address in settings.upstreams.items():
            known = self.pools.get(name)
            if known is not None and before.upstreams[name].url == address.url:
                pools[name] = known
            else:
                pools[name] = Pool(
                    address.url,
                    name=name,
                    connect_timeout=settings.connect_timeout,
                    limits=settings.limits,
                )
        # What runs on a pool that is not wanted any more runs on; its idle connections end by themselves.
        self._retired = [
            *self._retired,
            *(pool for pool in self.pools.values() if pool not in pools.values()),
        ]
        self._retired = [pool for pool in self._retired if pool.links]
        self.pools = pools
        self.ticker.interval = min(max(settings.heartbeat / 10, 0.01), 0.5)

    async def __call__(self, exchange: Caller, route: routes.Route | None = None) -> None:
        """Answers one request, as one for `route` where it is not its path that tells."""
        call = _Call(self, exchange, route or routes.route_of(exchange.head.method, exchange.head.target))
        self.in_progress += 1
        self.calls.add(call)
        try:
            if self.stopping is not None:
                call.fail(503, self.stopping, "shutting_down", retry_after=5)
            else:
                await self._serve(call)
        except asyncio.CancelledError:
            if exchange.gone:
                call.outcome = Outcome.CLIENT_GONE
            elif exchange.refused is not None:
                call.outcome, call.status = Outcome.REJECTED, exchange.refused.status
            elif self.stopping is not None:
                call.fail(503, self.stopping, "shutting_down", retry_after=5)
                return
            else:
                call.outcome = Outcome.TIMEOUT  # of whoever asked in the name of a caller
            raise
        finally:
            self.calls.discard(call)
            self.in_progress -= 1
            call.end()

    async def _serve(self, call: "_Call") -> None:
        """What becomes of one request."""
        head = call.exchange.head
        call.key, refused = self.admit(head)
        if refused is not None:
            return call.fail(*refused, outcome=Outcome.REJECTED)
        default = next(iter(self.pools))
        if head.upgrade is not None and head.upgrade.lower() == b"websocket":
            return await self._tunnel(call, default)
        if not (call.route.inference and head.method == b"POST"):
            return await self._pass(call, default)
        if values(head.headers, b"content-encoding"):
            # LM Studio would unpack it and find the model that we did not see.
            return call.fail(
                415, "send the body uncompressed", "unsupported_encoding", outcome=Outcome.REJECTED
            )
        if not await self._gather(call):
            return call.fail(503, "too many requests are waiting", "overloaded", retry_after=1)
        models = self.keeping.find(call.asked.model) if call.asked.model is not None else ()
        if not models:
            return await self._pass(call, default)
        call.hold(models)
        again = True  # one more attempt, for a request that nothing was generated for
        while True:
            try:
                model = await self._warm(call, models)
            except TimeoutError:
                return call.not_ready(models)
            except NotWarm as error:
                return call.fail(503, str(error), "model_not_ready", retry_after=error.retry_after or 5)
            try:
                reply = await call.ask(model.upstream, model)
            except Unreachable as error:
                call.lost(str(error))
                others = [other for other in models if other.upstream != model.upstream]
                if not others and not again:
                    return call.broken(error)
                again = again and bool(others)
                models = others or models
                continue
            except UpstreamError as error:
                return call.broken(error)
            try:
                told = await call.read_refusal(reply)
                if told is not None and told.retryable and again:
                    again = False
                    continue
                return await call.relay(reply)
            finally:
                call.close(reply)

    async def _warm(self, call: "_Call", models: Sequence[ModelId]) -> ModelId:
        """The model to ask, once it is warm: where the conversation was last, while that is still good."""
        home = self._homes.get(call.asked.conversation) if call.asked.conversation is not None else None
        if home is not None and home in models and self.keeping.view(home).state == "warm":
            models = [home]
        cold = all(self.keeping.view(model).state != "warm" for model in models)
        began = call.now()
        if cold:
            self.waiting += 1
            call.beat()
        try:
            async with asyncio.timeout_at(call.deadline):
                model = await self.keeping.ensure_warm(models)
        finally:
            if cold:
                self.waiting -= 1
            call.waited += call.now() - began
        if call.asked.conversation is not None:
            self._homes[call.asked.conversation] = model
            self._homes.move_to_end(call.asked.conversation)
            if len(self._homes) > HOMES:
                self._homes.popitem(last=False)
        return model

    async def _gather(self, call: "_Call") -> bool:
        """Reads the whole body, since the last of several `model` keys counts; False: no room for it."""
        exchange = call.exchange
        pieces: list[bytes] = []
        finder: routes.ModelFinder | None = None
        while data := await exchange.read():
            if self.kept_bytes + len(data) > self.settings.kept_bytes:
                return False
            self.kept_bytes += len(data)
            call.kept += len(data)
            if exchange.body_ended and not pieces:
                call.body = data
                call.asked = routes.read_body(data)
                return True
            finder = finder or routes.ModelFinder()
            finder.feed(data)
            pieces.append(data)
        call.body = b"".join(pieces)
        if finder is not None:
            call.asked = finder.finish()
        return True

    async def _pass(self, call: "_Call", upstream: str) -> None:
        """Straight through."""
        try:
            reply = await call.ask(upstream, None)
        except UpstreamError as error:
            return call.broken(error)
        try:
            await call.relay(reply)
        finally:
            call.close(reply)
        return None

    async def _tunnel(self, call: "_Call", upstream: str) -> None:
        """A WebSocket: bytes both ways until both sides are done."""
        try:
            reply = await call.ask(upstream, None, upgrade=True)
        except UpstreamError as error:
            return call.broken(error)
        try:
            if reply.head.status != 101:
                return await call.relay(reply)
            call.status = 101
            headers = [*end_to_end(reply.head.headers), *_UPGRADE]
            try:
                await call.exchange.tunnel(reply, headers)
            except Cut as error:
                return call.broken(error)
            call.outcome = Outcome.OK
        finally:
            call.close(reply)
        return None

    # --- who may ----------------------------------------------------------------------------------

    def admit(self, head: RequestHead) -> tuple[Key | None, tuple[int, str, str] | None]:
        """The caller's key, where it showed one; status, message and code for a caller that may not ask."""
        settings = self.settings
        origin = (head.get(b"origin") or b"").decode("latin-1")
        if settings.loopback and not settings.keys:
            host = host_of(head.get(b"host") or b"")
            if host and not (host == "localhost" or host in settings.allowed_hosts or _is_address(host)):
                why = "this Host is not expected here; if it is yours, add it to server.allowed_hosts"
                return None, (403, why, "host")
            if _is_foreign(head, origin) and origin not in settings.allowed_origins:
                why = "a page of another origin may not do this; if it is yours: server.allowed_origins"
                return None, (403, why, "origin")
        if settings.keys and not (head.method == b"OPTIONS" and origin in settings.allowed_origins):
            # Browsers send no key with a preflight.
            key = _key_of(head, settings.keys)
            if key is None:
                why = "a key is required: send it as Authorization: Bearer"
                return None, (401, why, "invalid_api_key")
            return key, None
        return None, None

    # --- the end ----------------------------------------------------------------------------------

    def stop(self, why: str = "the proxy is shutting down") -> None:
        """Ends every open request in the way of its route, and refuses new ones."""
        self.stopping = why
        for call in list(self.calls):
            call.task.cancel()

    async def close(self) -> None:
        for pool in [*self.pools.values(), *self._retired]:
            await pool.close()


class _Call:
    """One request on its way: what was asked, what the caller has been told, what was measured."""

    __slots__ = (
        "_began",
        "_bytes",
        "_committed",
        "_first",
        "_forwarded",
        "_mode",
        "_passed",
        "_quiet",
        "_sent_at",
        "_split",
        "_tail",
        "_torn",
        "asked",
        "body",
        "cold",
        "deadline",
        "exchange",
        "kept",
        "key",
        "meter",
        "model",
        "now",
        "outcome",
        "proxy",
        "route",
        "state",
        "status",
        "task",
        "waited",
    )

    def __init__(self, proxy: Proxy, exchange: Caller, route: routes.Route) -> None:
        self.proxy = proxy
        self.exchange = exchange
        self.now = asyncio.get_running_loop().time
        self.route = route
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self._began = self.now()
        self.asked = routes.Asked()
        self.body = b""
        self.kept = 0
        self.key: Key | None = None
        self.model: ModelId | None = None
        self.state: str | None = None  # of the model, when the request came
        self.cold = False
        self.deadline = 0.0
        self.waited = 0.0
        self.status = 0
        self.outcome = Outcome.UPSTREAM_ERROR
        self.meter: Meter | None = None
        self._mode = Heartbeat.OFF
        self._committed = False  # 200 and an event stream were promised before the upstream answered
        self._quiet = 0.0
        self._sent_at = 0.0
        self._forwarded: ModelId | None = None  # told the keeper; its end is still to be told
        self._split: Callable[[bytes], int] | None = None  # of a stream of events
        self._passed = False  # events of the upstream have gone out
        self._tail = bytearray()
        self._torn = False
        self._first = b""
        self._bytes = 0

    # --- waiting ----------------------------------------------------------------------------------

    def hold(self, models: Sequence[ModelId]) -> None:
        """The request is for models that we keep: from here on silence is filled."""
        head, settings = self.exchange.head, self.proxy.settings
        views = [self.proxy.keeping.view(model) for model in models]
        best = next((index for index, view in enumerate(views) if view.state == "warm"), 0)
        self.model, self.state = models[best], views[best].state
        self.cold = self.state != "warm"
        longest = views[best].max_wait
        wish = preferred_wait(head.headers)
        self.deadline = self._began + (longest if wish is None else min(longest, wish))
        if self.asked.stream and self.route.streams and head.method != b"HEAD":
            wanted = (head.get(b"x-keepalive-heartbeat") or b"").decode("latin-1").lower()
            self._mode = Heartbeat(wanted) if wanted in set(Heartbeat) else settings.heartbeat_mode
        if self._mode is not Heartbeat.OFF:
            self.proxy.ticker.add(self)

    def tick(self, now: float) -> None:
        self._quiet += self.proxy.ticker.interval
        if self._quiet + self.proxy.ticker.interval / 2 >= self.proxy.settings.heartbeat:
            self.beat()

    def beat(self) -> None:
        """Tells a streaming caller what it waits for, where an event may stand."""
        exchange, model = self.exchange, self.model
        if self._mode is Heartbeat.OFF or exchange.finished or model is None:
            return
        self._quiet = 0.0
        if not exchange.started:
            self._commit()
        elif exchange.paused or self._torn:
            return
        view = self.proxy.keeping.view(model)
        elapsed = self.now() - self._began if view.elapsed is None else view.elapsed
        if self._mode is Heartbeat.REASONING and not self._passed:
            words = routes.heartbeat_reasoning(self.route, model.key, view.state, elapsed, view.eta)
        else:
            words = routes.heartbeat_comment(model.key, view.state, elapsed, view.eta)
        exchange.push(words)

    def _commit(self) -> None:
        self._committed = True
        self.status = 200
        headers = [(b"Content-Type", b"text/event-stream"), (b"Cache-Control", b"no-cache, no-store")]
        self.exchange.start(200, [*headers, (b"X-Accel-Buffering", b"no"), *self._ours()])

    def _ours(self) -> Headers:
        timing = b"wait;dur=%.1f" % (self.waited * 1000)
        if self._sent_at:
            timing += b", upstream;dur=%.1f" % ((self.now() - self._sent_at) * 1000)
        headers = [(b"Server-Timing", timing)]
        if self.state is not None:
            headers.append((b"X-Keepalive-Model-State", self.state.encode("ascii", "replace")))
        return headers

    # --- the upstream -----------------------------------------------------------------------------

    async def ask(self, upstream: str, model: ModelId | None, *, upgrade: bool = False) -> Reply:
        """Passes the request on; its answer's head."""
        exchange, head = self.exchange, self.exchange.head
        pool, address = self.proxy.pools[upstream], self.proxy.settings.upstreams[upstream]
        without = [b"host", b"content-length", b"expect", b"x-keepalive-heartbeat"]
        if self.proxy.settings.keys or address.token is not None:
            without += [b"authorization", b"x-api-key"]
        if self.asked.stream:
            # Between the bytes of a compressed stream there is no place for a heartbeat.
            without.append(b"accept-encoding")
        headers = end_to_end(head.headers, without=without)
        if address.token is not None:
            headers.append((b"Authorization", b"Bearer " + address.token.encode("latin-1")))
        if upgrade:
            headers += _UPGRADE
        body, framing = self.body, None
        if not body and head.body:
            # Small bodies come at once; only the others are sent while they come, and cannot be sent again.
            body = self.body = await exchange.read()
        if body and not exchange.body_ended:
            framing = head.body
        elif not body and head.method in (b"POST", b"PUT", b"PATCH"):
            framing = 0
        more = None if exchange.body_ended else exchange.read
        self.model = model
        self._sent_at = self.now()
        if model is not None:
            self._forwarded = model
            self.proxy.keeping.record(RequestStarted(self._sent_at, model))
        try:
            return await pool.send(
                head.method,
                head.target,
                headers,
                body,
                more=more,
                framing=framing,
                upgrade=upgrade,
                once=self.route.changes,  # a load that is sent twice is a second copy in memory
            )
        except UpstreamError:
            self._told(answered=False)
            raise

    async def read_refusal(self, reply: Reply) -> routes.Lost | None:
        """Whether this answer says that the model went away; then the keeper knows it too."""
        if reply.head.status < 400:
            return None
        self._first = await reply.read(ERROR_BYTES)
        lost = routes.looks_lost(reply.head.status, self._first)
        if lost is not None:
            self.lost(lost.message, lost.reason)
        return lost

    def lost(self, message: str, why: Reason | None = None) -> None:
        if self.model is not None:
            self.proxy.keeping.record(InstanceLost(self.now(), self.model, message, why))

    def close(self, reply: Reply) -> None:
        self.exchange.on_pause = self.exchange.on_resume = None
        reply.close()
        self._told(answered=False)

    def _told(self, *, answered: bool) -> None:
        model, self._forwarded = self._forwarded, None
        if model is not None:
            self.proxy.keeping.record(RequestEnded(self.now(), model, answered))

    # --- the answer -------------------------------------------------------------------------------

    async def relay(self, reply: Reply) -> None:
        """The upstream's answer becomes ours, byte for byte."""
        exchange, head = self.exchange, reply.head
        self._release()
        stream = head.stream and head.status == 200 and exchange.head.method != b"HEAD"
        if self._committed and not stream:
            return await self._explain(reply)
        if not self._committed:
            self.status = head.status
            bodiless = exchange.head.method == b"HEAD" or head.status == 304
            exchange.start(
                head.status,
                end_to_end(head.headers, without=() if bodiless else (b"content-length",)) + self._ours(),
                reason=head.reason,
                length=None if bodiless or stream or head.body < 0 or head.status == 204 else head.body,
            )
        exchange.head.headers = head.headers = []
        if exchange.paused:
            await exchange.drained()
        exchange.on_pause, exchange.on_resume = reply.pause, reply.resume
        if stream:
            self._split = Splitter().feed
            self.meter = Meter(self.route.protocol, self._began)
            reply.pour(self._take_events)
            exchange.flush()
            return self._end_stream(complete=await reply.ended())
        self.proxy.ticker.discard(self)
        first, self._first = self._first, b""
        if first:
            self._take(first)
        reply.pour(self._take)
        if not (reply.complete or reply.cut):
            exchange.flush()
        if not await reply.ended():
            self.outcome = Outcome.CUT
            exchange.abort()
            return None
        exchange.finish()
        good = head.status < 400 and not self._first.lstrip().startswith(b'{"error"')
        self.outcome = Outcome.OK if good else Outcome.UPSTREAM_ERROR
        if good:
            self._told(answered=head.status == 200)
        elif head.status < 400 and (lost := routes.looks_lost(head.status, self._first)) is not None:
            self.lost(lost.message, lost.reason)
        return None

    def _take(self, data: bytes) -> None:
        self.exchange.push(data)
        self._bytes += len(data)
        if len(self._first) < 4096:
            self._first += data[:4096]

    def _take_events(self, data: bytes) -> None:
        # The hot path. What the caller has must end where an event does: an upstream may die within one.
        self._quiet = 0.0
        self._passed = True
        assert self._split is not None
        end = self._split(data)
        if end == len(data) and not self._tail:
            self.exchange.push(data)
            self._torn = False
        else:
            self._take_part(data, end)
        self._bytes += len(data)
        meter = self.meter
        if meter is not None:
            try:
                meter.feed(self.now(), data)
            except Exception:  # noqa: BLE001  a measurement may fail, a stream may not
                self.meter = None

    def _take_part(self, data: bytes, end: int) -> None:
        if end:
            self._tail += memoryview(data)[:end]
            self.exchange.push(bytes(self._tail))
            self._tail = bytearray(memoryview(data)[end:])
            self._torn = False
        else:
            self._tail += data
        if len(self._tail) > HELD_BACK_BYTES:
            self.exchange.push(bytes(self._tail))
            self._tail.clear()
            self._torn = True

    def _end_stream(self, *, complete: bool) -> None:
        exchange, meter = self.exchange, self.meter
        if complete:
            exchange.push(bytes(self._tail))
            exchange.finish()
            if meter is None or meter.ended:
                self.outcome = Outcome.OK
            else:
                self.outcome = Outcome.UPSTREAM_ERROR if meter.error is not None else Outcome.CUT
        else:
            self.outcome = Outcome.CUT
            if self._torn:
                exchange.abort()
            else:
                exchange.push(routes.error_event(self.route, "the upstream's answer was cut", "upstream_cut"))
                exchange.finish()
        gone = routes.looks_lost(200, meter.error) if meter is not None and meter.error is not None else None
        if gone is not None:
            self.lost(gone.message, gone.reason)
        answered = meter is not None and meter.first_token_seconds is not None
        self._told(answered=answered and gone is None)

    async def _explain(self, reply: Reply) -> None:
        """An answer that is no event stream, to a caller that was promised one."""
        body = self._first or await reply.read(ERROR_BYTES)
        status = reply.head.status
        message = routes.error_message(body)
        if message is None:
            message = f"the upstream answered {status} without events"
        self.fail(502 if status < 400 else status, message, f"upstream_{status}")

    def fail(
        self,
        status: int,
        message: str,
        code: str,
        *,
        retry_after: float | None = None,
        outcome: Outcome = Outcome.UPSTREAM_ERROR,
    ) -> None:
        """The end, in the way of the route: an error answer, or an error event where events were promised."""
        exchange = self.exchange
        self.outcome = outcome
        if exchange.finished or exchange.gone:
            return
        if not exchange.started:
            self.status = status
            headers = [(b"Content-Type", b"application/json"), *NO_STORE, *self._ours()]
            if retry_after is not None:
                headers.append((b"Retry-After", b"%d" % max(1, math.ceil(retry_after))))
            if status == 401:
                headers.append((b"WWW-Authenticate", b"Bearer"))
            exchange.answer(status, headers, routes.error_body(self.route, status, message, code))
        elif (self._committed or self._split is not None) and not self._torn:
            exchange.push(routes.error_event(self.route, message, code))
            exchange.finish()
        else:
            exchange.abort()

    def not_ready(self, models: Sequence[ModelId]) -> None:
        view = self.proxy.keeping.view(models[0])
        reason = f": {view.reason}" if view.reason else ""
        self.fail(
            503,
            f"{models[0].key} is {view.state} and did not get warm in time{reason}",
            "model_not_ready",
            retry_after=view.eta or view.retry_after or 5,
            outcome=Outcome.TIMEOUT,
        )

    def broken(self, error: UpstreamError) -> None:
        """The upstream gave no answer that could be passed on."""
        if isinstance(error, TimedOut):
            self.fail(504, str(error), "upstream_timeout", outcome=Outcome.TIMEOUT)
        elif isinstance(error, Unreachable):
            kept = self.model is not None
            self.fail(
                503 if kept else 502, str(error), "upstream_unreachable", retry_after=5 if kept else None
            )
        else:
            cut = isinstance(error, Cut)
            self.fail(502, str(error), "upstream_cut", outcome=Outcome.CUT if cut else Outcome.UPSTREAM_ERROR)

    def _release(self) -> None:
        self.body = b""
        self.proxy.kept_bytes -= self.kept
        self.kept = 0

    def end(self) -> None:
        """The request is over, however it went."""
        proxy, meter = self.proxy, self.meter
        proxy.ticker.discard(self)
        self._release()
        self._told(answered=False)
        record = Seen(
            model=self.model,
            route=self.route.name,
            key=self.key.name if self.key is not None else None,
            outcome=self.outcome,
            status=self.status,
            start=None if self.state is None else "cold" if self.cold else "warm",
            wait_seconds=self.waited,
            first_token_seconds=meter.first_token_seconds if meter is not None else None,
            seconds=self.now() - self._began,
            bytes=self._bytes,
            events=meter.events if meter is not None else 0,
            gaps=tuple(meter.gaps) if meter is not None else (),
            gap_seconds=meter.gap_seconds if meter is not None else 0.0,
        )
        with contextlib.suppress(Exception):
            proxy.seen(record)


_UPGRADE: Headers = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_foreign(head: RequestHead, origin: str) -> bool:
    """A browser says that a page of another origin asks; or does not say, and the origin is another one."""
    site = head.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    return bool(origin) and origin.partition("://")[2] != (head.get(b"host") or b"").decode("latin-1")


def _key_of(head: RequestHead, keys: Sequence[Key]) -> Key | None:
    """Which of `keys` the caller showed. Takes the same time however much of it was right."""
    shown = [value[7:] for value in values(head.headers, b"authorization") if value[:7].lower() == b"bearer "]
    shown += values(head.headers, b"x-api-key")
    found = None
    for given in shown:
        digest = hashlib.sha256(given.strip()).digest()
        for key in keys:
            if hmac.compare_digest(digest, hashlib.sha256(key.secret.encode()).digest()):
                found = key
    return found
