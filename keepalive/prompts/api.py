"""The routes of the prompt API: who may ask, what is read, what is answered whole."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple, Protocol, TypeVar

from keepalive import assets
from keepalive.core.callers import Key, Outcome, Seen
from keepalive.core.errors import NotWarm
from keepalive.core.facts import ModelId
from keepalive.core.keeping import Keeping
from keepalive.http1 import NO_STORE, Exchange, Headers, RequestHead, Ticker, cors, preferred_wait
from keepalive.prompts.asked import Find, Refusal, Settings, read_order, read_warmup, variables
from keepalive.prompts.stream import Forward, Stream, Visit, milliseconds, view_of
from keepalive.protocols.encodings import BadEncoding, Unpacker, codings
from keepalive.protocols.routes import PROMPTS, Heartbeat, chosen_heartbeat, heartbeat_in
from keepalive.protocols.words import no_heartbeat, refusal_code, told_people

#: Of the bodies that are being read, together.
READING_BYTES: Final = 128 * 1024 * 1024

#: So much is unpacked before others have their turn.
TURN_BYTES: Final = 1024 * 1024

WARMUP: Final = "warmup"  # a metric label

T = TypeVar("T")


class Admit(Protocol):
    """The caller's key; status, message and code for one who may not ask."""

    def __call__(self, head: RequestHead, /) -> tuple[Key | None, tuple[int, str, str] | None]: ...


class Prompts:
    """Answers the exchanges for `PATHS`. One for the life of the daemon."""

    def __init__(
        self,
        forward: Forward,
        admit: Admit,
        keeping: Keeping,
        warm: Callable[[ModelId], None],
        ticker: Ticker,
        seen: Callable[[Seen], None],
    ) -> None:
        self.settings = Settings()
        self._forward = forward
        self._admit = admit
        self._keeping = keeping
        self._warm = warm
        self._ticker = ticker
        self._seen = seen
        self._asset = assets.read()["keepalive.js"]
        self._reading_bytes = 0
        self._stopping: str | None = None
        self._held: set[asyncio.Task[object]] = set()

    def stop(self, why: str = "the daemon is shutting down") -> None:
        """Refuses what has not been handed to the proxy yet."""
        self._stopping = why
        for task in list(self._held):
            task.cancel()

    async def __call__(self, exchange: Exchange) -> None:
        head = exchange.head
        mode, head.target = heartbeat_in(head.target)
        route = PATHS[head.target.partition(b"?")[0]]
        key, refused = self._admit(head)
        visit = Visit(exchange, key, self._cors(head), asyncio.get_running_loop().time())
        try:
            # A script element cannot send a key, and everybody has that file.
            if refused is not None and not (route is _MODULE and refused[0] == 401):
                challenge = [(b"WWW-Authenticate", b"Bearer")] if refused[0] == 401 else None
                raise Refusal(*refused, headers=challenge)
            if mode is not None and mode not in set(Heartbeat):
                raise Refusal(404, no_heartbeat(mode), "unknown_heartbeat")
            wanted = chosen_heartbeat(head.get(b"x-keepalive-heartbeat"), mode)
            visit.quiet = wanted is Heartbeat.OFF
            if head.method in route.methods:
                await route.answer(self, visit)
            elif (preflight := self._preflight(head, route)) is not None:
                exchange.start(204, preflight)
                exchange.finish()
            else:
                allow = [(b"Allow", b", ".join(route.methods))]
                message = f"this is asked with {route.methods[0].decode()}"
                raise Refusal(405, message, "method_not_allowed", headers=allow)
        except Refusal as refusal:
            visit.refuse(refusal)
            self._count(visit, route.name, refusal.outcome, refusal.status, error=refusal.code)

    def _count(
        self,
        visit: Visit,
        route: str,
        outcome: Outcome,
        status: int,
        model: ModelId | None = None,
        error: str | None = None,
    ) -> None:
        """For metrics and the log, as the proxy does for what it answers."""
        seconds = asyncio.get_running_loop().time() - visit.began
        key = None if visit.key is None else visit.key.name
        self._seen(Seen(model, route, key, outcome, status, seconds=seconds, error=error))

    # --- its routes ---------------------------------------------------------------------------------

    async def _execute(self, visit: Visit) -> None:
        settings = self.settings
        body = await self._body(visit)
        order = await self._meant(visit, partial(read_order, body, settings))
        stream = Stream(visit, order, self._keeping, math.inf if visit.quiet else settings.heartbeat)
        del body  # it may be large, and the stream goes on for long
        await stream.run(self._forward, self._ticker)

    async def _list(self, visit: Visit) -> None:
        found = [
            {
                "id": prompt.id,
                "title": prompt.title,
                "model": prompt.model,
                "variables": variables(prompt.content),
                "maxTokens": prompt.max_tokens,
            }
            for prompt in self.settings.prompts
        ]
        visit.answer(200, {"success": True, "data": found})

    async def _warm_up(self, visit: Visit) -> None:
        body = await self._body(visit)
        models = await self._meant(visit, partial(read_warmup, body, self.settings))
        for model in models:
            self._warm(model)
        longest = view_of(self._keeping, models).max_wait
        wish = preferred_wait(visit.exchange.head)
        deadline = visit.began + (longest if wish is None else min(longest, wish))
        try:
            async with asyncio.timeout_at(deadline):
                model = await self._hold(visit.exchange, self._keeping.ensure_warm(models))
        except TimeoutError:
            view = view_of(self._keeping, models)
            message = f"{models[0].key} is {told_people(view.state)} and did not get warm in time"
            message += f": {view.reason}" if view.reason else ""
            later = view.eta or view.retry_after or 5
            raise _unavailable(message, "model_not_ready", later, Outcome.TIMEOUT) from None
        except NotWarm as error:
            raise _unavailable(str(error), "model_not_ready", error.retry_after or 5) from None
        took = milliseconds(asyncio.get_running_loop().time() - visit.began)
        visit.answer(200, {"success": True, "data": {"modelId": model.key, "warmupDuration": took}})
        self._count(visit, WARMUP, Outcome.OK, 200, model)

    async def _module(self, visit: Visit) -> None:
        """The browsers' module, for pages that name this address in a script element."""
        asset, head = self._asset, visit.exchange.head
        headers = [*visit.cors, (b"ETag", asset.etag.encode()), (b"Cache-Control", b"no-cache")]
        if head.get(b"if-none-match") == asset.etag.encode():
            return visit.exchange.answer(304, headers, b"")
        headers.append((b"Content-Type", asset.content_type.encode()))
        headers.append((b"X-Content-Type-Options", b"nosniff"))
        return visit.exchange.answer(200, headers, asset.body)

    # --- what it waits for --------------------------------------------------------------------------

    async def _meant(self, visit: Visit, read: Callable[[Find], T]) -> T:
        """What a body asks for. Its model may be one that nobody asked for before, and is kept from now on."""
        asked: list[str] = []

        def find(name: str) -> Sequence[ModelId]:
            asked.append(name)
            return self._keeping.find(name)

        try:
            return read(find)
        except Refusal:
            for name in asked:
                await self._hold(visit.exchange, self._keeping.meant(name))
            return read(self._keeping.find)

    async def _body(self, visit: Visit) -> bytes:
        """A body of JSON. It is read only now: whoever may not ask has been told already."""
        head = visit.exchange.head
        kind = (head.get(b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            message = "send Content-Type: application/json"
            raise Refusal(415, message, "unsupported_media_type", field="Content-Type")
        packed = codings(head.values(b"content-encoding"))
        if packed is None:
            message = "send the body as gzip or deflate, or uncompressed"
            raise Refusal(415, message, "unsupported_encoding", field="Content-Encoding")
        return await self._hold(visit.exchange, self._read(visit.exchange, Unpacker(packed)))

    async def _read(self, exchange: Exchange, unpacker: Unpacker) -> bytes:
        most, size, pieces = self.settings.body_bytes, exchange.head.body, []
        taken = turn = 0
        try:
            while max(size, taken) <= most and (data := await exchange.read()):
                for piece in unpacker.feed(data):
                    taken += len(piece)
                    self._reading_bytes += len(piece)
                    if self._reading_bytes > READING_BYTES:
                        raise _unavailable("too many requests are being read", "overloaded", 1)
                    if taken > most:
                        break
                    pieces.append(piece)
                    if taken - turn >= TURN_BYTES:  # a few bytes can hold megabytes: others have their turn
                        turn = taken
                        await asyncio.sleep(0)
            if max(size, taken) <= most:
                unpacker.finish()
        except BadEncoding as bad:
            raise Refusal(400, str(bad), "invalid_request", field="Content-Encoding") from None
        finally:
            self._reading_bytes -= taken
        if max(size, taken) > most:
            raise Refusal(413, f"the body is larger than {most} bytes", "too_large")
        return b"".join(pieces)

    async def _hold(self, exchange: Exchange, waited: Awaitable[T]) -> T:
        """Waits for what `stop` ends."""
        task = asyncio.current_task()
        assert task is not None
        self._held.add(task)
        try:
            return await waited
        except asyncio.CancelledError:
            if self._stopping is None or exchange.gone or exchange.refused is not None:
                raise
            raise _unavailable(self._stopping, "shutting_down", 5) from None
        finally:
            self._held.discard(task)

    def _cors(self, head: RequestHead) -> Headers:
        """A page that may send, but not read what comes back, has no use of it."""
        return cors.granted(head, self.settings.allowed_origins) or [(b"Vary", b"Origin")]

    def _preflight(self, head: RequestHead, route: "_Route") -> Headers | None:
        return cors.preflight(head, self.settings.allowed_origins, b", ".join(route.methods))

    def refusal(self, status: int, message: str, head: RequestHead | None) -> tuple[Headers, bytes]:
        """Words the end of a connection whose bytes were no request, or no whole one."""
        grant = [] if head is None else self._cors(head)
        kind = (b"Content-Type", b"application/json")
        return [kind, *NO_STORE, *grant], Refusal(status, message, refusal_code(status)).body()


class _Route(NamedTuple):
    name: str  # a metric label
    methods: tuple[bytes, ...]
    answer: Callable[[Prompts, Visit], Awaitable[None]]


_READ: Final = (b"GET", b"HEAD")
_MODULE: Final = _Route("module", _READ, Prompts._module)
#: The raw paths that are ours. Everything else is for the upstream.
PATHS: Final[Mapping[bytes, _Route]] = {
    b"/api/prompts/execute/stream": _Route(PROMPTS.name, (b"POST",), Prompts._execute),
    b"/api/prompts": _Route(PROMPTS.name, _READ, Prompts._list),
    b"/api/models/warmup": _Route(WARMUP, (b"POST",), Prompts._warm_up),
    b"/keepalive.js": _MODULE,
}


def serves(head: RequestHead) -> bool:
    """Whether this request is for one of `PATHS`."""
    return heartbeat_in(head.target)[1].partition(b"?")[0] in PATHS


def _unavailable(
    message: str, code: str, seconds: float, outcome: Outcome = Outcome.UPSTREAM_ERROR
) -> Refusal:
    later = [(b"Retry-After", b"%d" % max(1, math.ceil(seconds)))]
    return Refusal(503, message, code, headers=later, outcome=outcome)
