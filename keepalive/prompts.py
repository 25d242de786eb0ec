"""The streaming prompt API of the client address: a named prompt in, a few kinds of events out.

Rules:
- Here a request is read, checked and rendered. From there on it is a request to the proxy like anybody's: the
  one load that all share, retries, limits, back-pressure, metrics and log lines are the proxy's alone.
- Whatever is wrong with a request is said before the stream begins, all of it at once; what goes wrong later
  is an `error` event. Each event is one `data:` line.
- A value is put into a prompt as text, once: what looks like a variable inside of a value stays what it is.
- What is asked and answered goes to the caller and the upstream, and nowhere else.
"""

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple, NoReturn, Protocol, TypeVar

from keepalive import routes, sse
from keepalive.config import Prompt
from keepalive.config.mistakes import dotted, nearest, shown
from keepalive.errors import NotWarm
from keepalive.facts import ModelId
from keepalive.http1 import BadHead, Exchange, Headers, Reply, RequestHead, Ticker, preferred_wait, values
from keepalive.proxy import NO_STORE, Caller, Keeping, Key, Outcome, Seen, View

EXECUTE: Final = b"/api/prompts/execute/stream"
LIST: Final = b"/api/prompts"
WARMUP: Final = b"/api/models/warmup"
MODULE: Final = b"/keepalive.js"

#: A prompt is text. A body larger than this takes noticeable time to be read, and nothing streams meanwhile.
BODY_BYTES: Final = 16 * 1024 * 1024
#: Of the bodies that are being read, together.
READING_BYTES: Final = 128 * 1024 * 1024
#: Of an upstream's answer that is no stream of events: what its error says stands at its beginning.
ERROR_BYTES: Final = 65_536
#: The largest number that is a whole one in 32 bits, for a client in any language.
MOST: Final = 2**31 - 1
MISTAKES_SHOWN: Final = 20
#: `model_loading` is said at most so often.
LOADING_SECONDS: Final = 1.0

VARIABLE: Final = re.compile(r"\{\{\s*+([\w.-]++)\s*+\}\}")
_ASSET: Final = Path(__file__).parent / "assets" / "keepalive.js"
_EVENTS: Final[Headers] = [
    (b"Content-Type", b"text/event-stream"),
    (b"Cache-Control", b"no-cache"),
    (b"X-Accel-Buffering", b"no"),
]
# Who may ask is decided again in the proxy, by the same headers; of the others none concerns the upstream.
_PASSED_ON: Final = frozenset(
    (b"host", b"origin", b"sec-fetch-site", b"authorization", b"x-api-key", b"prefer", b"user-agent")
)

T = TypeVar("T")


class Forward(Protocol):
    """The proxy."""

    def __call__(self, caller: Caller, route: routes.Route, /) -> Awaitable[None]: ...


class Admit(Protocol):
    """The caller's key; status, message and code for one who may not ask."""

    def __call__(self, head: RequestHead, /) -> tuple[Key | None, tuple[int, str, str] | None]: ...


@dataclass(frozen=True, slots=True)
class Settings:
    prompts: Sequence[Prompt] = ()
    models: Collection[str] = ()  # the keys of those that are kept
    heartbeat: float = 5.0
    body_bytes: int = BODY_BYTES
    allowed_origins: frozenset[str] = frozenset()


class Refusal(Exception):
    """What a caller is told instead of what was asked for; `field` is what to mend in the request."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        field: str | None = None,
        headers: Headers | None = None,
        outcome: Outcome = Outcome.REJECTED,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.headers = headers or []
        self.outcome = outcome


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
        self.keeping = keeping
        self.forward = forward
        self.ticker = ticker
        self._admit = admit
        self._warm = warm
        self._seen = seen
        self._reading_bytes = 0
        self._stopping: str | None = None
        self._held: set[asyncio.Task[object]] = set()

    def configure(self, settings: Settings) -> None:
        """For the requests that come from now on."""
        self.settings = settings

    def stop(self, why: str = "the daemon is shutting down") -> None:
        """Refuses what has not been handed to the proxy yet."""
        self._stopping = why
        for task in list(self._held):
            task.cancel()

    async def __call__(self, exchange: Exchange) -> None:
        route = PATHS[exchange.head.target.partition(b"?")[0]]
        visit = _Visit(exchange, self._cors(exchange.head), asyncio.get_running_loop().time())
        key = None
        try:
            key, refused = self._admit(exchange.head)
            # A script element cannot send a key, and everybody has that file.
            if refused is not None and not (route is _MODULE and refused[0] == 401):
                raise Refusal(refused[0], *refused[1:], headers=_CHALLENGE if refused[0] == 401 else None)
            if exchange.head.method in route.methods:
                await route.answer(self, visit)
            elif exchange.head.method == b"OPTIONS" and len(visit.cors) > 1:
                exchange.answer(204, [*visit.cors, *_preflight(route.methods)], b"")
            else:
                message = f"this is asked with {route.methods[0].decode()}"
                raise Refusal(
                    405, message, "method_not_allowed", headers=[(b"Allow", b", ".join(route.methods))]
                )
        except Refusal as refusal:
            visit.refuse(refusal)
            seconds = asyncio.get_running_loop().time() - visit.began
            name = None if key is None else key.name
            self._seen(Seen(None, route.name, name, refusal.outcome, refusal.status, seconds=seconds))

    async def hold(self, exchange: Exchange, waited: Awaitable[T]) -> T:
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

    # --- its routes ---------------------------------------------------------------------------------

    async def _execute(self, visit: "_Visit") -> None:
        fields = await self._fields(visit)
        order = self._order(fields)
        fields.check()
        assert order is not None
        await _Stream(self, visit, order).run()

    async def _list(self, visit: "_Visit") -> None:
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

    async def _warm_up(self, visit: "_Visit") -> None:
        fields = await self._fields(visit)
        models = self._models(fields, "modelId", fields.text("modelId"))
        fields.check()
        for model in models:
            self._warm(model)
        view = view_of(self.keeping, models)
        wish = preferred_wait(visit.exchange.head.headers)
        patience = view.max_wait if wish is None else min(view.max_wait, wish)
        try:
            async with asyncio.timeout_at(visit.began + patience):
                model = await self.hold(visit.exchange, self.keeping.ensure_warm(models))
        except TimeoutError:
            view = view_of(self.keeping, models)
            reason = f": {view.reason}" if view.reason else ""
            message = f"{models[0].key} is {view.state} and did not get warm in time{reason}"
            raise _unavailable(
                message, "model_not_ready", view.eta or view.retry_after or 5, Outcome.TIMEOUT
            ) from None
        except NotWarm as error:
            raise _unavailable(str(error), "model_not_ready", error.retry_after or 5) from None
        seconds = asyncio.get_running_loop().time() - visit.began
        data = {"modelId": model.key, "warmupDuration": milliseconds(seconds)}
        visit.answer(200, {"success": True, "data": data})

    async def _module(self, visit: "_Visit") -> None:
        """The browsers' module, for pages that name this address in a script element."""
        try:
            source = _ASSET.read_bytes()
        except OSError:
            raise Refusal(404, "there is no such file here", "not_found") from None
        tag = b'"%b"' % blake2b(source, digest_size=12).hexdigest().encode()
        headers = [(b"ETag", tag), (b"Cache-Control", b"no-cache"), (b"X-Content-Type-Options", b"nosniff")]
        if visit.exchange.head.get(b"if-none-match") == tag:
            visit.exchange.answer(304, [*headers, *visit.cors], b"")
        else:
            headers.append((b"Content-Type", b"text/javascript; charset=utf-8"))
            visit.exchange.answer(200, [*headers, *visit.cors], source)

    # --- what is asked ------------------------------------------------------------------------------

    async def _fields(self, visit: "_Visit") -> "Fields":
        """The object in the body, which is read only now: whoever may not ask has been told already."""
        head = visit.exchange.head
        kind = (head.get(b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refusal(
                415, "send Content-Type: application/json", "unsupported_media_type", field="Content-Type"
            )
        if values(head.headers, b"content-encoding"):
            raise Refusal(415, "send the body uncompressed", "unsupported_encoding", field="Content-Encoding")
        return Fields(await self.hold(visit.exchange, self._read(visit.exchange)))

    async def _read(self, exchange: Exchange) -> bytes:
        most, size, pieces = self.settings.body_bytes, 0, []
        try:
            while size <= most and exchange.head.body <= most and (data := await exchange.read()):
                size += len(data)
                self._reading_bytes += len(data)
                if self._reading_bytes > READING_BYTES:
                    raise _unavailable("too many requests are being read", "overloaded", 1)
                pieces.append(data)
        finally:
            self._reading_bytes -= size
        if size > most or exchange.head.body > most:
            raise Refusal(413, f"the body is larger than {most} bytes", "too_large")
        return b"".join(pieces)

    def _order(self, fields: "Fields") -> "Order | None":
        """What to carry out; None, and `fields.wrong`, where that cannot be said."""
        prompt = self._prompt(fields)
        inline, model = fields.text("prompt"), fields.text("model")
        override = fields.text("modelId")
        given = fields.variables()
        max_tokens = fields.number("maxTokens", whole=True)
        timeout = fields.number("timeout")
        content = prompt.content if prompt is not None else inline
        where, key = ("modelId", override) if override is not None else ("model", model)
        if prompt is not None and override is None:
            where, key = "promptId", prompt.model
        if content is None:
            return None  # that has been said
        models = self._models(fields, where, key)
        text = "" if given is None else self._render(fields, content, given)
        tokens = max_tokens if max_tokens is not None else prompt.max_tokens if prompt is not None else None
        return Order(prompt, models, text, None if tokens is None else int(tokens), timeout)

    def _prompt(self, fields: "Fields") -> Prompt | None:
        asked = fields.get("promptId")
        if asked is None:
            if fields.get("prompt") is None:
                fields.wrong.append(("promptId", 'is missing; write one, or "prompt" and "model"'))
            return None
        if fields.get("prompt") is not None:
            fields.wrong.append(("prompt", "stands beside promptId; leave one of them out"))
        if isinstance(asked, bool) or not isinstance(asked, int | str):
            fields.wrong.append(("promptId", "is neither a number nor text"))
            return None
        # As text, because 28 and "28" are one prompt: see the checks of the config.
        known = {str(prompt.id): prompt for prompt in self.settings.prompts}
        if str(asked) not in known:
            near = nearest(str(asked), known)
            some = ", ".join(list(known)[:MISTAKES_SHOWN])
            advice = f"did you mean {shown(near)}? there are {some}" if near else f"there are {some}"
            advice = advice if known else "none are configured: add [[prompts]]"
            fields.wrong.append(("promptId", f"{shown(asked)} is no prompt here; {advice}"))
            fields.status, fields.code = 404, "prompt_not_found"
        return known.get(str(asked))

    def _models(self, fields: "Fields", where: str, key: str | None) -> Sequence[ModelId]:
        if key is None:
            if not any(field == where for field, _ in fields.wrong):
                fields.wrong.append((where, "is missing; write the key of a configured model"))
            return ()
        models = self.keeping.find(key)
        if not models:
            near = nearest(key, self.settings.models)
            some = " or ".join(shown(model) for model in list(self.settings.models)[:MISTAKES_SHOWN])
            advice = f"write {shown(near) if near else some or 'it under [[models]] first'}"
            fields.wrong.append((where, f"{shown(key)} is no model that is kept here; {advice}"))
            fields.status, fields.code = 404, "model_not_found"
        return models

    def _render(self, fields: "Fields", content: str, given: Mapping[str, str]) -> str:
        named = Counter(VARIABLE.findall(content))
        missing = [name for name in named if name not in given]
        if missing:
            fields.wrong += [(dotted(("variables", name)), "is missing") for name in missing]
            fields.code = "missing_variables"
            return ""
        # Before it is built: a short template can make much of one large value.
        size = len(content) + sum(len(given[name]) * times for name, times in named.items())
        if size > self.settings.body_bytes:
            fields.wrong.append(
                ("variables", f"make the prompt larger than {self.settings.body_bytes} bytes")
            )
            fields.status, fields.code = 413, "too_large"
            return ""
        text = VARIABLE.sub(lambda found: given[found[1]], content)
        if not text.strip():
            fields.wrong.append(("variables", "leave nothing of the prompt"))
        return text

    def _cors(self, head: RequestHead) -> Headers:
        """A page that may send, but not read what comes back, has no use of it."""
        origin = head.get(b"origin")
        headers = [(b"Vary", b"Origin")]
        if origin is not None and origin.decode("latin-1") in self.settings.allowed_origins:
            headers.append((b"Access-Control-Allow-Origin", origin))
            headers.append((b"Access-Control-Expose-Headers", b"Retry-After"))
        return headers


class _Route(NamedTuple):
    name: str  # a metric label
    methods: tuple[bytes, ...]
    answer: Callable[[Prompts, "_Visit"], Awaitable[None]]


_READ: Final = (b"GET", b"HEAD")
_MODULE: Final = _Route("module", _READ, Prompts._module)
#: The raw paths that are ours. Everything else is for the upstream.
PATHS: Final[Mapping[bytes, _Route]] = {
    EXECUTE: _Route(routes.PROMPTS.name, (b"POST",), Prompts._execute),
    LIST: _Route(routes.PROMPTS.name, _READ, Prompts._list),
    WARMUP: _Route("warmup", (b"POST",), Prompts._warm_up),
    MODULE: _MODULE,
}
_CHALLENGE: Final[Headers] = [(b"WWW-Authenticate", b"Bearer")]


@dataclass(frozen=True, slots=True)
class _Visit:
    """One request to one of our routes."""

    exchange: Exchange
    cors: Headers
    began: float

    def answer(self, status: int, body: Mapping[str, object], headers: Headers | None = None) -> None:
        kind = (b"Content-Type", b"application/json")
        self.exchange.answer(status, [kind, *NO_STORE, *self.cors, *(headers or ())], _json(body))

    def refuse(self, refusal: Refusal) -> None:
        error = {"message": str(refusal), "code": refusal.code, "field": refusal.field}
        self.answer(refusal.status, {"success": False, "error": error}, refusal.headers)


@dataclass(frozen=True, slots=True)
class Order:
    """A request that can be carried out; `timeout` in milliseconds, to the first delta."""

    prompt: Prompt | None
    models: Sequence[ModelId]
    text: str
    max_tokens: int | None
    timeout: float | None

    def body(self) -> bytes:
        """The same, as the proxy is asked for it."""
        said: dict[str, object] = {
            "model": self.models[0].key,
            "stream": True,
            "messages": [{"role": "user", "content": self.text}],
        }
        if self.max_tokens is not None:
            said["max_tokens"] = self.max_tokens
        return _json(said)


class Fields:
    """A JSON object that somebody sent, and all that is wrong with it. A field that is null is missing."""

    def __init__(self, body: bytes) -> None:
        self._object = read_object(body)
        self.wrong: list[tuple[str, str]] = []
        self.status = 400
        self.code = "invalid_request"

    def check(self) -> None:
        """Raises Refusal with everything that is wrong."""
        if not self.wrong:
            return
        told = [f"{field}: {message}" for field, message in self.wrong[:MISTAKES_SHOWN]]
        more = len(self.wrong) - len(told)
        told += [f"and {more} more"] if more else []
        one = len({message for _, message in self.wrong}) == 1  # kind of mistake
        status, code = (self.status, self.code) if one else (400, "invalid_request")
        raise Refusal(status, "; ".join(told), code, field=self.wrong[0][0])

    def get(self, name: str) -> object:
        return self._object.get(name)

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.wrong.append((name, "is not text"))
        elif not value.strip():
            self.wrong.append((name, "is empty"))
        elif not is_unicode(value):
            self.wrong.append((name, "holds half a character (a lone surrogate)"))
        else:
            return value
        return None

    def number(self, name: str, *, whole: bool = False) -> float | None:
        value = self.get(name)
        kinds = int if whole else (int, float)
        # NaN compares with nothing, and true is a number only to Python.
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and 1 <= value <= MOST):
            return value
        self.wrong.append((name, f"is not a {'whole ' if whole else ''}number from 1 to {MOST}"))
        return None

    def variables(self) -> dict[str, str] | None:
        """Names to what is put in their places; None where that cannot be said."""
        given = self.get("variables")
        if given is None:
            return {}
        if not isinstance(given, dict):
            self.wrong.append(("variables", 'is not an object; write {"topic": "SSE"}'))
            return None
        found = {}
        for name, value in given.items():
            if isinstance(value, bool):
                found[name] = str(value).lower()
            elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
                found[name] = str(value)
            elif isinstance(value, str) and is_unicode(value):
                found[name] = value
            else:
                what = "holds half a character (a lone surrogate)" if isinstance(value, str) else "is no text"
                self.wrong.append((dotted(("variables", name)), what))
                found[name] = ""  # it is not missing, too
        return found


def read_object(body: bytes) -> dict[str, object]:
    """The object in `body`. Raises Refusal, in words of ours: those of a parser may quote what it read."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) < len(items):
            repeated.extend(name for name, times in Counter(name for name, _ in items).items() if times > 1)
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(name)

    try:
        found = json.loads(body.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, f"the body is not JSON: {error.msg} ({place})", "invalid_json") from None
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8", "invalid_json") from None
    except ValueError:
        message = "the body holds a number that is none, such as NaN, or one of thousands of digits"
        raise Refusal(400, message, "invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply", "invalid_json") from None
    if not isinstance(found, dict):
        raise Refusal(400, 'the body is not an object; write {"promptId": 28}', "invalid_json")
    if repeated:
        name = dotted((repeated[0],))
        raise Refusal(400, f"{name}: stands there more than once", "invalid_request", field=name)
    return found


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def variables(content: str) -> list[str]:
    """The names that a template has, in their order."""
    return list(dict.fromkeys(VARIABLE.findall(content)))


def view_of(keeping: Keeping, models: Sequence[ModelId]) -> View:
    """That of the model that a request would be answered by: one that is warm, else one that comes."""
    views = [keeping.view(model) for model in models]
    rank = {"warm": 0, "loading": 1}
    return min(views, key=lambda view: rank.get(view.state, 2))


# --- a stream ---------------------------------------------------------------------------------------


class _Stream:
    """What the proxy takes for its caller: asks in chat completions, and tells the real caller in our events.

    Nothing is held back or kept: what the real caller does not take is not read from the upstream.
    """

    def __init__(self, prompts: Prompts, visit: _Visit, order: Order) -> None:
        self._prompts = prompts
        self._visit = visit
        self._exchange = visit.exchange
        self._order = order
        self._now = asyncio.get_running_loop().time
        self._heartbeat = prompts.settings.heartbeat
        self._body = order.body()
        headers = [pair for pair in visit.exchange.head.headers if pair[0].lower() in _PASSED_ON]
        headers += [(b"Content-Type", b"application/json"), (b"X-Keepalive-Heartbeat", b"off")]
        self.head = RequestHead(b"POST", b"/v1/chat/completions", headers)
        self.head.body = len(self._body)
        self.started = False  # the proxy has begun its answer
        self.finished = False
        self._begun = False  # the real one has begun
        self._over = False  # its last event has been said
        self._status = 0  # of an answer that is no stream of events
        self._plain = b""
        self._decoder = sse.Decoder()
        self._whole = False
        self._chunks = 0
        self._length = 0
        self._said_at = visit.began
        self._loading_at = -math.inf
        self._limit: asyncio.Timeout | None = None

    async def run(self) -> None:
        timeout, loop = self._order.timeout, asyncio.get_running_loop()
        deadline = None if timeout is None else self._visit.began + timeout / 1000
        self._prompts.ticker.add(self)
        try:
            async with asyncio.timeout_at(deadline) as self._limit:
                # Runs when the proxy waits for the first time: what it refuses at once keeps its true status.
                loop.call_soon(self._begin)
                await self._prompts.forward(self, routes.PROMPTS)
        except TimeoutError:
            view = view_of(self._prompts.keeping, self._order.models)
            state = f"; {self._order.models[0].key} is {view.state}" if view.state != "warm" else ""
            self._fail(504, f"no answer began within {timeout:.0f} ms{state}", "timeout")
            self._exchange.finish()
        finally:
            self._prompts.ticker.discard(self)
            self._over = True

    # --- what it says -----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._begun or self._over or self._exchange.gone:
            return
        self._begun = True
        self._exchange.start(200, [*_EVENTS, *self._visit.cors])
        prompt, model = self._order.prompt, self._order.models[0]
        view = view_of(self._prompts.keeping, self._order.models)
        self._say(
            type="start",
            promptId=None if prompt is None else prompt.id,
            promptTitle=None if prompt is None else prompt.title,
            modelId=model.key,
            modelName=model.key,
            lmStudioModelId=view.instance_id or model.key,
        )
        self.tick(self._now())

    def _say(self, **event: object) -> None:
        self._said_at = self._now()
        self._exchange.push(b"data: %b\n\n" % _json(event))

    def tick(self, now: float) -> None:
        """Fills the silence."""
        if not self._begun or self._over or self._exchange.paused:
            return
        slack = self._prompts.ticker.interval / 2
        view = None if self.started else view_of(self._prompts.keeping, self._order.models)
        if view is not None and view.state != "warm":
            if now - self._loading_at + slack >= LOADING_SECONDS:
                self._loading_at = now
                self._say_loading(view)
        elif now - self._said_at + slack >= self._heartbeat:
            self._said_at = now
            self._exchange.push(b": keep-alive\n\n")

    def _say_loading(self, view: View) -> None:
        key = self._order.models[0].key
        elapsed = self._now() - self._visit.began if view.elapsed is None else view.elapsed
        self._say(
            type="model_loading",
            message=f"Loading {key}" if view.state == "loading" else f"Waiting for {key} ({view.state})",
            estimatedTime=None if view.eta is None else milliseconds(elapsed + view.eta),
            elapsed=milliseconds(elapsed),
        )

    def _hear(self, data: str) -> None:
        """One event of the upstream, or of the proxy."""
        try:
            delta = routes.chat_delta(data)
        except ValueError:
            self._fail(502, "the upstream sent an event that cannot be read", "upstream_error")
            return
        if delta.error is not None:
            self._fail(502, delta.error, delta.code or "upstream_error")
            return
        if (delta.reasoning or delta.text) and self._limit is not None:
            self._limit.reschedule(None)
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
        self._over = True

    def _fail(self, status: int, message: str, code: str, headers: Headers | None = None) -> None:
        if self._over:
            return
        if self._begun:
            self._say(type="error", message=message, code=code)
        elif not self._exchange.gone:
            self._visit.refuse(Refusal(status, message, code, headers=headers))
        self._over = True

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
    def on_pause(self) -> Callable[[], None] | None:
        return self._exchange.on_pause

    @on_pause.setter
    def on_pause(self, call: Callable[[], None] | None) -> None:
        self._exchange.on_pause = call

    @property
    def on_resume(self) -> Callable[[], None] | None:
        return self._exchange.on_resume

    @on_resume.setter
    def on_resume(self, call: Callable[[], None] | None) -> None:
        self._exchange.on_resume = call

    @property
    def body_ended(self) -> bool:
        return not self._body

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body

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

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        self.finished = True
        if self._status:
            told = routes.chat_error(self._plain)
            status = self._status if self._status >= 400 else 502
            message = told.error or f"the upstream answered {self._status} without events"
            self._fail(status, message, told.code or f"upstream_{self._status}")
        elif self._whole and not self._over:
            self._end()
        else:
            self._fail(502, "the upstream's answer ended before its end", "upstream_cut")
        self._exchange.finish()

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """The proxy's own words: it refuses."""
        self.started = self.finished = True
        told = routes.chat_error(body)
        ours = {b"content-type", *(name.lower() for name, _ in NO_STORE)}
        kept = [pair for pair in headers if pair[0].lower() not in ours]
        self._fail(status, told.error or "refused", told.code or "refused", kept)
        self._exchange.finish()

    def abort(self) -> None:
        self.finished = True
        self._fail(502, "the upstream's answer was cut", "upstream_cut")
        self._exchange.finish()

    async def tunnel(self, reply: Reply, headers: Headers) -> None:
        raise AssertionError("a prompt is no WebSocket")


def _unavailable(
    message: str, code: str, seconds: float, outcome: Outcome = Outcome.UPSTREAM_ERROR
) -> Refusal:
    headers = [(b"Retry-After", b"%d" % max(1, math.ceil(seconds)))]
    return Refusal(503, message, code, headers=headers, outcome=outcome)


def _preflight(methods: Sequence[bytes]) -> Headers:
    return [
        (b"Access-Control-Allow-Methods", b", ".join(methods)),
        (b"Access-Control-Allow-Headers", b"authorization, content-type, prefer, x-api-key"),
        (b"Access-Control-Max-Age", b"600"),
    ]


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _json(value: object) -> bytes:
    # In ASCII, so that half a character, which a model may well send in each of two deltas, arrives as it is.
    return json.dumps(value, separators=(",", ":")).encode()
