"""The client address: the proxy, the prompt API, their listener, and what they are handed.

Translates between parts that do not know each other: the config and the keeper's records on one side, the
proxy's settings and views on the other. Decides nothing.
"""

import asyncio
import errno
import ipaddress
import os
import secrets
import socket
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence

from keepalive import prompts
from keepalive.config import Address as Listen
from keepalive.config import Config, Kept
from keepalive.core.callers import Begun, Key, Outcome, Seen
from keepalive.core.changed import replace
from keepalive.core.errors import KeepaliveError
from keepalive.core.explain import eta
from keepalive.core.facts import ModelId, OpeningRead, PrimedAnswered, WarmAsked
from keepalive.core.keeping import View
from keepalive.core.names import Meaning
from keepalive.core.records import Model, UpstreamState
from keepalive.core.states import State
from keepalive.http1 import Exchange, Headers, Limits, Listener, RequestHead, bind, serve
from keepalive.keeper.keeper import Keeper
from keepalive.lmstudio.wire import SDK_ALONE
from keepalive.observers import logs
from keepalive.observers.history import History
from keepalive.observers.metrics import Metrics, ProxyMetrics
from keepalive.observers.recent import Recent
from keepalive.protocols.meter import GAP_BOUNDS
from keepalive.protocols.routes import Route
from keepalive.proxy import Address, Heartbeat, Proxy, Settings
from keepalive.service import platform
from keepalive.service.openings import Openings

# Kept free for the admin address, for listings and pings, and for what Python opens by itself.
FILES_RESERVED = 256
# A request ties up two sockets: its caller's and the upstream's.
FILES_PER_REQUEST = 2
CONNECTIONS_MAX = 16_384
CONNECTIONS_MIN = 16
# Streams that were ended by us get this long to take the last words.
LAST_WORDS = 2.0
# When the turn of a model comes is seen from all others: not anew for each of a thousand who wait for it.
ETA_HOLDS = 1.0


class StartError(KeepaliveError):
    """The daemon cannot start, though its config is good."""


class Front:
    """Serves callers from `listen` until `drain`."""

    def __init__(
        self,
        settings: Config,
        keeper: Keeper,
        clock: Callable[[], float],
        metrics: Metrics,
        openings: Openings,
        recent: Recent,
        history: History,
    ) -> None:
        self._log = logs.logger()
        self._keeper = keeper
        self._clock = clock
        self._openings = openings
        self._recent = recent
        self._history = history
        # These are asked at each request, and by way of nobody.
        self.ready = keeper.waiting.ready
        self.record = keeper.record
        self.wants = openings.wants
        self._kept: Mapping[ModelId, Kept] = {}
        self._views: dict[ModelId, tuple[Model, View]] = {}
        self._etas: dict[ModelId, tuple[float, float | None]] = {}  # with when they were found
        self._list_timeout = 10.0
        self._limits = _limits(settings)
        self._listener: Listener | None = None
        #: By which we know what we ask ourselves, over an address that leads back here.
        self.mark = secrets.token_hex(8)
        self._proxy = Proxy(self._settings(settings, {}, ()), self, self._seen, self)
        self._prompts = prompts.Prompts(
            self._proxy, self._proxy.admit, self, self._warm, self._proxy.ticker, self._seen
        )
        self._metrics = ProxyMetrics(
            metrics.registry,
            lambda: self._proxy.in_progress,
            lambda: self._proxy.waiting,
            self._proxy.silences,
            GAP_BOUNDS,
            metrics.counts,
        )

    def configure(
        self,
        settings: Config,
        kept: Mapping[ModelId, Kept],
        tokens: Mapping[str, str | None],
        keys: Mapping[str, str],
        page_key: str | None = None,
    ) -> None:
        """Use these from the next request on; `page_key` is that of the status page.

        `kept` is looked into for each request: more models may come into it.
        """
        self._kept = kept
        known = [Key(name, secret) for name, secret in keys.items()]
        if page_key is not None:
            known.append(Key("page", page_key))
        self._proxy.configure(self._settings(settings, tokens, known))
        self._prompts.settings = prompts.Settings(
            settings.prompts,
            self._keeper.meanings.offered,
            heartbeat=settings.server.heartbeat,
            body_bytes=min(prompts.BODY_BYTES, settings.server.max_body),
            allowed_origins=frozenset(settings.server.allowed_origins),
        )

    async def listen(self, address: Listen, sockets: list[socket.socket] | None = None) -> str:
        """Accept callers, on sockets that somebody else has opened or on `address`; returns the URL."""
        shared = bool(sockets)
        if not sockets:
            try:
                sockets = bind(address.host, address.port)
            except OSError as error:
                raise StartError(cannot_listen("server.listen", address, error)) from error
        self._listener = await serve(
            self._handle,
            sockets=sockets,
            limits=self._limits,
            refusal=self._refusal,
            turned_down=self._proxy.turned_down,
            shared=shared,
        )
        return url_of(sockets[0].getsockname())

    def _handle(self, exchange: Exchange) -> Coroutine[object, object, None]:
        """By the raw path: another spelling is for the upstream to understand or not."""
        # Of what the proxy has read once it is known whose it is, whoever says the same again.
        ours = exchange.head.like.reading is None and prompts.serves(exchange.head)
        return self._prompts(exchange) if ours else self._proxy(exchange)

    def _refusal(self, status: int, message: str, head: RequestHead | None) -> tuple[Headers, bytes]:
        ours = head is not None and prompts.serves(head)
        part = self._prompts if ours else self._proxy
        return part.refusal(status, message, head)

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Accept nobody any more; open requests may finish, for `seconds` or until `hurry`, and are then ended."""
        if self._listener is None:
            return
        await self._listener.stop_accepting()
        self._proxy.drain()
        emptied = asyncio.ensure_future(self._listener.emptied())
        hurried = asyncio.ensure_future(hurry.wait())
        await asyncio.wait((emptied, hurried), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not emptied.done():
            self._log.warning("proxy.cut_short", requests=self._proxy.in_progress)
            self._prompts.stop()
            self._proxy.stop()
            await asyncio.wait((emptied,), timeout=LAST_WORDS)
        emptied.cancel()
        hurried.cancel()

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        await self._proxy.close()

    def tick(self) -> None:
        """A second has passed: nobody waits for the first word of a server that has long not answered anything."""
        now = self._clock()
        for upstream in self._keeper.snapshot().upstreams:
            if upstream.silent_since is not None and upstream.state is UpstreamState.DOWN:
                self._proxy.give_up(upstream.name, now - upstream.silent_since)

    def silences(self) -> Mapping[ModelId | None, float]:
        """See `Proxy.silences`."""
        return self._proxy.silences()

    # --- what the proxy asks ------------------------------------------------------------------------

    def find(self, name: str) -> Sequence[ModelId]:
        return self._keeper.meanings.find(name)

    async def meant(self, name: str) -> Sequence[ModelId]:
        return await self._keeper.meanings.meant(name, self._list_timeout)

    def take_up(self, name: str) -> None:
        self._keeper.meanings.take_up(name)

    def offered(self) -> Collection[str]:
        return self._keeper.meanings.offered()

    async def meaning(self, name: str | None, *, default: bool = True) -> Meaning:
        meaning = await self._keeper.meanings.meaning(name, self._list_timeout, default=default)
        if default and name and meaning.known and not meaning.models:
            key = self._keeper.meanings.listed_as(meaning.upstream, name)
            if key is not None:
                self._recent.passed(ModelId(meaning.upstream, key))
        return meaning

    def present(self, upstream: str, kind: str) -> Sequence[ModelId]:
        return self._keeper.present(upstream, kind)

    def is_lm_studio(self, upstream: str) -> bool:
        return self._keeper.is_lm_studio(upstream)

    def is_away(self, upstream: str) -> bool:
        return self._keeper.is_away(upstream)

    def rows(self, upstream: str) -> Mapping[str, Sequence[str]]:
        return self._keeper.meanings.rows(upstream)

    def view(self, model: ModelId) -> View:
        known = self._keeper.glance(model)
        if known is None:
            return View("unknown", reason="it is no longer kept here", max_wait=0.0)
        seen = self._views.get(model)
        if seen is not None and seen[0] is known:
            # Only how long ago it was looked at goes on: an answer must not end by a look from before it.
            if known.idle_since is None:
                return seen[1]
            return replace(seen[1], resting=_resting(known, self._clock()))
        view = self._view(model, known)
        if known.state is State.WARM and view.elapsed is None and view.retry_after is None:
            # Of a model that is warm nothing changes by itself, and nearly all requests are for one.
            self._views[model] = known, view
        return view

    def _view(self, model: ModelId, known: Model) -> View:
        now, since, kept = self._clock(), known.loading_since, self._kept.get(model)
        return View(
            # Of what is about to go whoever comes now waits as if it had gone already.
            State.COLD.value if known.state is State.WARM and not known.given else known.state.value,
            reason=known.reason,
            elapsed=None if since is None else now - since,
            eta=self._eta(model, known, now),
            instance_id=known.instance_id,
            retry_after=None if known.retry_at is None or known.retry_at <= now else known.retry_at - now,
            max_wait=kept.max_wait if kept else 0.0,
            stall_timeout=kept.stall_timeout if kept else None,
            resting=_resting(known, now),
            wanted=known.wanted,
            kind=(kept.kind if kept else None) or known.kind,
            context_length=known.instances[0].context_length if known.instances else None,
            # As a load over HTTP has them: that is what callers compare with theirs.
            load_fields={n: v for n, v in kept.load_fields.items() if n not in SDK_ALONE} if kept else {},
            progress=known.progress,
            questioned=known.pinging or known.priming.under_way is not None,
        )

    def _eta(self, model: ModelId, known: Model, now: float) -> float | None:
        if known.loading_since is not None:
            return eta(known, self._keeper.siblings(model), now)
        if not known.waiting or known.state is not State.COLD:
            return None
        found = self._etas.get(model)
        if found is None or now >= found[0] + ETA_HOLDS:
            found = self._etas[model] = now, self._keeper.ready_in(model)
        at, left = found
        return None if left is None else max(0.0, left - (now - at))

    async def ensure_warm(self, models: Sequence[ModelId]) -> ModelId:
        return await self._keeper.waiting.ensure_warm(models)

    def _warm(self, model: ModelId) -> None:
        self._keeper.record(WarmAsked(self._clock(), model))

    def note(self, model: ModelId, route: Route, body: bytes) -> Begun | None:
        """The opening that a request begins with, where it is one that the model had read before."""
        begun, known = self._openings.note(model, route.protocol, body), self._keeper.glance(model)
        if begun is None or known is None:
            return None
        done = next((primed for primed in known.priming.done if primed.opening == begun.opening), None)
        if done is None and begun.opening in known.priming.wished:
            self._keeper.record(OpeningRead(self._clock(), model, begun.opening))
        return begun if done is not None and done.ours else None

    # --- what it is given ---------------------------------------------------------------------------

    def _settings(self, settings: Config, tokens: Mapping[str, str | None], keys: Sequence[Key]) -> Settings:
        server = settings.server
        self._views.clear()
        self._etas.clear()
        self._list_timeout = max(upstream.list_timeout for upstream in settings.upstreams)
        silence = settings.defaults.stall_timeout
        return Settings(
            upstreams={u.name: Address(u.url, tokens.get(u.name)) for u in settings.upstreams},
            heartbeat=server.heartbeat,
            heartbeat_mode=Heartbeat(server.heartbeat_mode),
            limits=self._limits,
            connect_timeout=min(u.connect_timeout for u in settings.upstreams),
            list_timeout=self._list_timeout,
            join_loads=server.loads == "join",
            stall_timeout=None if silence == "off" else silence,
            loopback=is_loopback(server.listen.host),
            allowed_hosts=frozenset(server.allowed_hosts),
            allowed_origins=frozenset(server.allowed_origins),
            keys=tuple(keys),
            mark=self.mark,
        )

    def _judge(self, seen: Seen) -> None:
        """Whether it helps that a model had read the opening is told by requests of little more, on an idle model."""
        begun, seconds = seen.begun, seen.first_token_seconds
        if seen.model is None or begun is None or not begun.mostly or seconds is None:
            return
        known = self._keeper.model(seen.model)
        if known is not None and not known.in_flight:
            self._keeper.record(PrimedAnswered(self._clock(), seen.model, begun.opening, seconds))

    def _seen(self, seen: Seen) -> None:
        """One request is over: a metric and a line. What fails here fails alone."""
        self._metrics.count(seen)
        logs.request(seen)
        self._recent.add(seen)
        if seen.model is not None and seen.outcome is not Outcome.REJECTED:
            self._history.asked(seen.model, seen.seconds, max(0.0, seen.seconds - seen.wait_seconds))
        if seen.start == "primed":
            self._judge(seen)


def _resting(known: Model, now: float) -> tuple[float, float] | None:
    return None if known.idle_since is None else (known.asked - known.idle_since, now - known.asked)


def _limits(settings: Config) -> Limits:
    """What a connection may cost; as many of them as there are files for."""
    server = settings.server
    files = platform.files(FILES_RESERVED + CONNECTIONS_MAX * FILES_PER_REQUEST)
    room = (files - min(FILES_RESERVED, files // 2)) // FILES_PER_REQUEST
    limits = Limits(
        header_timeout=server.header_timeout,
        body_bytes=server.max_body,
        connections=max(CONNECTIONS_MIN, min(CONNECTIONS_MAX, room)),
    )
    if files < 2 * FILES_RESERVED:
        logs.logger().warning("files.few", files=files, connections=limits.connections)
    return limits


def is_loopback(host: str) -> bool:
    """Whether a listener on `host` can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cannot_listen(place: str, address: Listen, error: OSError) -> str:
    # The system's errors have positive numbers; those of name resolution have words of their own.
    code = error.errno or 0
    why = os.strerror(code).lower() if code > 0 else error.strerror or str(error)
    hint = "; end what uses it, or write another port" if code == errno.EADDRINUSE else ""
    return f"{place}: cannot listen on {address}: {why}{hint}"


def url_of(address: Sequence[object]) -> str:
    """The URL of a listening socket, from its own name."""
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"
