"""The admin address: the status page and its data, metrics, probes, and the few changes that people make.

Reads nothing but what it is handed and decides nothing. Requests come from scrapers, scripts and browsers; a
page that a browser has open must not reach us from elsewhere. So everything but metrics and probes asks who
the `Host` is (a rebound name reads as well as it writes), and changes refuse what a browser marks as foreign.
"""

import asyncio
import base64
import difflib
import gzip
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any, Protocol
from urllib.parse import unquote

from aiohttp import ClientError, HttpVersion10, HttpVersion11, web
from multidict import CIMultiDict

from keepalive import assets
from keepalive.core.facts import ModelId
from keepalive.core.quotes import unquoted
from keepalive.observers.feed import Feed

# Idle connections are closed, and a head that dribbles in is given up, after this many seconds.
IDLE_TIMEOUT = 75.0
SUBSCRIBERS_MAX = 256
SLOW_READER = 10.0
# Below this, compression costs more than it saves.
GZIP_FROM = 1024
# JSON is compressed anew for each who asks: quickly rather than well.
GZIP_LEVEL = 4
# What was asked for is said back, but no longer than this.
QUOTED_MAX = 100
# Of the models that there are, whoever asked for another is told so many.
NAMED_MAX = 10

# On every answer of ours, errors included.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "keepalive",
}

# A browser asks for a name and a password: the key is the password, whatever the name.
CHALLENGES = ("Bearer", 'Basic realm="keepalive", charset="UTF-8"')

OPEN_TO_ANY_HOST = frozenset({"/metrics", "/livez", "/readyz"})
OPEN_WITHOUT_KEY = frozenset({"/livez", "/readyz"})
# These lead on to the client address, for the page alone: its errors have the layout of over there.
FORWARDED = {
    "/api/prompts": ("GET", "HEAD"),
    "/api/prompts/execute/stream": ("POST",),
    "/api/models/warmup": ("POST",),
}


class Daemon(Protocol):
    """What the admin address shows and asks for."""

    def status(self) -> Mapping[str, Any]: ...
    def states(self) -> Sequence[Mapping[str, Any]]:
        """Of each model only key, upstream, state, and whether it is wanted: a fraction of the work."""
        ...

    def find(self, name: str) -> Collection[ModelId]:
        """The kept models that a name means: a key, an alias, an instance, a variant."""
        ...

    async def meant(self, name: str) -> Collection[ModelId]:
        """The same, for whoever asks for one: what LM Studio lists may be kept from now on."""
        ...

    def offered(self) -> Collection[str]:
        """The names that may be asked for."""
        ...

    @property
    def stopping(self) -> bool: ...
    def metrics(self, accept: str) -> tuple[bytes, str]: ...
    def requests(self) -> Mapping[str, Any]:
        """Those of the last minutes, and what was asked for that no config names."""
        ...

    def alive(self) -> str | None:
        """None, or why not."""
        ...

    def history(self) -> Mapping[str, Any]:
        """What holds for the history of all models."""
        ...

    def story(self, model: ModelId) -> Mapping[str, Any] | None:
        """What is remembered of one; None when it is not kept any more."""
        ...

    def warm(self, model: ModelId, *, without_engine: bool = False) -> None:
        """`without_engine`: also where etcd, by which daemons agree, cannot be asked."""
        ...

    def release(self, model: ModelId) -> None: ...
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """Where Prometheus finds this daemon and those that are one with it."""
        ...

    async def forward(self, request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
        """What the client address answers to this request."""
        ...


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask: names in `Host` beside IP literals and localhost, and keys (name to secret), if any."""

    hosts: Collection[str] = ()
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)


class _Refusal(Exception):
    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class Admin:
    """Answers requests; `handle` is for aiohttp's low-level server."""

    def __init__(self, daemon: Daemon, feed: Feed, access: Access) -> None:
        self._daemon = daemon
        self._feed = feed
        self._assets = {f"/{name}": asset for name, asset in assets.read().items()}
        self._assets["/"] = self._assets.pop("/index.html")
        self.access = access
        self.closing = False  # each answer is the last one on its connection

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            response = await self._answer(request)
        except _Refusal as refusal:
            told: dict[str, object] = {"error": str(refusal)}
            if request.raw_path.partition("?")[0] in FORWARDED:
                code = refusal.status.phrase.lower().replace(" ", "_")
                told = {"success": False, "error": {"message": str(refusal), "code": code, "field": None}}
            response = _json(told, refusal.status, refusal.headers)
        if self.closing:
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.version not in (HttpVersion10, HttpVersion11):
            raise _Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "this address speaks HTTP/1.1")
        path = _path(request)
        if not path.startswith("/"):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "ask for a path, such as /api/status")
        self._check_host(request, path)
        self._check_key(request, path)
        get = self._GET.get(path, Admin._asset if path in self._assets else None)
        if get is not None:
            if request.method not in ("GET", "HEAD"):
                raise _Refusal(
                    HTTPStatus.METHOD_NOT_ALLOWED, f"{path} is read with GET", {"Allow": "GET, HEAD"}
                )
            return await get(self, request)
        if path in FORWARDED:
            return await self._forward(request, FORWARDED[path])
        if path.startswith("/api/models/"):
            return await self._change(request, path.removeprefix("/api/models/"))
        raise _Refusal(HTTPStatus.NOT_FOUND, f"there is no {path[:QUOTED_MAX]} here")

    async def _asset(self, request: web.BaseRequest) -> web.StreamResponse:
        asset = self._assets[_path(request)]
        # Asked for each time, and mostly answered without a body: an upgrade of the daemon shows at once.
        headers = {**HEADERS, "Cache-Control": "no-cache", "ETag": asset.etag, "Vary": "Accept-Encoding"}
        if asset.etag in (tag.strip() for tag in request.headers.get("If-None-Match", "").split(",")):
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
        headers["Content-Type"] = asset.content_type
        if _reads_gzip(request):
            return web.Response(body=asset.gzipped, headers={**headers, "Content-Encoding": "gzip"})
        return web.Response(body=asset.body, headers=headers)

    async def _status(self, request: web.BaseRequest) -> web.StreamResponse:
        """Of all models; with `?model=NAME` (repeatable), of these."""
        document, asked = self._feed.look(), request.query.getall("model", [])
        if asked:
            named = list(chain(*self._named(document["models"], asked)))
            document = {**document, "models": named, "named": asked}
        return _packed(request, _json(document))

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        page, content_type = self._daemon.metrics(request.headers.get("Accept", ""))
        return web.Response(body=page, headers={**HEADERS, "Content-Type": content_type})

    async def _livez(self, request: web.BaseRequest) -> web.StreamResponse:
        trouble = self._daemon.alive()
        status = HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK
        return _json({"alive": not trouble, "reason": trouble}, status)

    async def _readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        """200 when every wanted model is warm; with `?model=KEY` (repeatable), when these are."""
        models = self._daemon.states()
        asked = request.query.getall("model", [])
        groups = self._named(models, asked) if asked else [[model] for model in models if model["wanted"]]
        # A key that is kept on several upstreams is ready when one of them has it warm.
        cold = [m for group in groups if not any(m["state"] == "warm" for m in group) for m in group]
        stopping = self._daemon.stopping
        body = {
            "ready": not cold and not stopping,
            "not_ready": self._reasons(cold) if cold else [],
            "reason": "the daemon is stopping" if stopping else None,
        }
        return _json(body, HTTPStatus.OK if body["ready"] else HTTPStatus.SERVICE_UNAVAILABLE)

    def _reasons(self, models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        known = {(m["upstream"], m["key"]): m for m in self._daemon.status()["models"]}
        names = ("key", "upstream", "state", "reason", "load")
        return [{name: known[m["upstream"], m["key"]][name] for name in names} for m in models]

    async def _history(self, request: web.BaseRequest) -> web.StreamResponse:
        """What is remembered of all models; with `?model=KEY` (repeatable), of these."""
        models, asked = self._daemon.states(), request.query.getall("model", [])
        named = chain(*self._named(models, asked))
        meant = {ModelId(m["upstream"], m["key"]): None for m in named}
        stories = []
        for model in meant or [ModelId(m["upstream"], m["key"]) for m in models]:
            story = self._daemon.story(model)
            if story is not None:
                stories.append(json.dumps(story))
            # Thousands in one go would hold up users' streams, and so would packing them.
            await asyncio.sleep(0)
        rows = ",\n".join(stories)
        text = f'{json.dumps(self._daemon.history())[:-1]}, "models": [\n{rows}\n]}}\n'
        response = web.Response(text=text, content_type="application/json", headers=HEADERS)
        return await asyncio.to_thread(_packed, request, response)

    async def _requests(self, request: web.BaseRequest) -> web.StreamResponse:
        return _packed(request, _json(self._daemon.requests()))

    async def _targets(self, request: web.BaseRequest) -> web.StreamResponse:
        return _json(self._daemon.targets())

    async def _events(self, request: web.BaseRequest) -> web.StreamResponse:
        feed = self._feed
        if feed.watching >= SUBSCRIBERS_MAX:
            message = f"{SUBSCRIBERS_MAX} others watch already"
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, {"Retry-After": "10"})
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        if request.method == "HEAD":
            return response
        after = request.query.get("after", request.headers.get("Last-Event-ID"))
        seen = feed.place(after) if after is not None else None
        feed.watching += 1
        try:
            await response.prepare(request)
            seen, event = feed.whole() if seen is None else (seen, b": nothing new so far\n\n")
            while True:
                # Whoever does not take what is sent is let go: the next page load starts afresh.
                async with asyncio.timeout(SLOW_READER):
                    await response.write(event)
                seen, event = await feed.next(seen, partial=after is not None)
        except (TimeoutError, ConnectionError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            feed.watching -= 1
        return response

    async def _forward(self, request: web.BaseRequest, methods: Sequence[str]) -> web.StreamResponse:
        if request.method not in methods:
            message = f"this is asked with {methods[0]}"
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, message, {"Allow": ", ".join(methods)})
        self._check_origin(request)
        try:
            return await self._daemon.forward(request, HEADERS)
        except web.HTTPRequestEntityTooLarge:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "that is too much for this page") from None
        except ClientError:
            message = "the client address does not answer; the daemon may be stopping"
            raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, {"Retry-After": "5"}) from None

    async def _change(self, request: web.BaseRequest, rest: str) -> web.StreamResponse:
        key, _, verb = rest.rpartition("/")
        alone = "without_engine" in request.query
        warm = partial(self._daemon.warm, without_engine=alone) if alone else self._daemon.warm
        change = {"warm": warm, "release": self._daemon.release}.get(verb)
        if change is None or not key:
            raise _Refusal(HTTPStatus.NOT_FOUND, "POST to /api/models/KEY/warm or /api/models/KEY/release")
        if request.method != "POST":
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "a change is made with POST", {"Allow": "POST"})
        self._check_origin(request)
        key = unquote(key)
        if verb == "warm" and not await self._daemon.meant(key):
            raise _unknown_model(key, self._daemon.offered())
        models = self._named(self._daemon.states(), [key])[0]
        upstream = request.query.get("upstream")
        models = [m for m in models if upstream in (None, m["upstream"])]
        if not models:
            raise _unknown_model(key)
        for model in models:
            change(ModelId(model["upstream"], model["key"]))
        ids = {(m["upstream"], m["key"]) for m in models}
        changed = [m for m in self._daemon.status()["models"] if (m["upstream"], m["key"]) in ids]
        # The model's status; kept on several upstreams, it has several.
        return _json({**changed[0], "models": changed}, HTTPStatus.ACCEPTED)

    def _named(
        self, models: Sequence[Mapping[str, Any]], names: Sequence[str]
    ) -> list[list[Mapping[str, Any]]]:
        """Those of `models` that each name means."""
        found = []
        for name in names:
            meant = self._daemon.find(name)
            exact = [m for m in models if m["key"] == name]
            found.append(exact or [m for m in models if ModelId(m["upstream"], m["key"]) in meant])
        unknown = [name for name, those in zip(names, found, strict=True) if not those]
        if unknown:
            raise _unknown_model(", ".join(unknown))
        return found

    def _check_host(self, request: web.BaseRequest, path: str) -> None:
        host = request.headers.get("Host", "")
        if path in OPEN_TO_ANY_HOST or is_known_host(host, self.access.hosts):
            return
        name = f"{_host_name(host)[:QUOTED_MAX]!r} is not a name of this daemon"
        raise _Refusal(
            HTTPStatus.FORBIDDEN, f"{name}; if it should be, add it to allowed_hosts under [server]"
        )

    def _check_key(self, request: web.BaseRequest, path: str) -> None:
        keys = self.access.keys
        if not keys or path in OPEN_WITHOUT_KEY:
            return
        given = _key_in(request.headers.get("Authorization", ""))
        both = given, unquoted(given.decode("latin-1")).encode("latin-1")
        # Every key is compared, so that the time tells nothing of how many there are.
        if not sum(hmac.compare_digest(one, secret.encode()) for secret in keys.values() for one in both):
            challenges = CIMultiDict(("WWW-Authenticate", challenge) for challenge in CHALLENGES)
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "this address wants a key of [auth]", challenges)

    def _check_origin(self, request: web.BaseRequest) -> None:
        origin = request.headers.get("Origin")
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        own = origin is None or origin.split("://", 1)[-1] == request.headers.get("Host")
        if not own or site not in ("same-origin", "none"):
            raise _Refusal(HTTPStatus.FORBIDDEN, "a page from elsewhere may not change anything here")

    _GET: Mapping[str, Callable[["Admin", web.BaseRequest], Awaitable[web.StreamResponse]]] = {
        "/api/status": _status,
        "/api/history": _history,
        "/api/requests": _requests,
        "/api/events": _events,
        "/api/targets": _targets,
        "/metrics": _metrics,
        "/livez": _livez,
        "/readyz": _readyz,
    }


class _Connection(web.RequestHandler):
    """aiohttp's, but for the page about a malformed request, which would quote it."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        super().handle_error(request, status, exc, "")  # logs it
        response = _json({"error": HTTPStatus(status).phrase.lower()}, HTTPStatus(status))
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


def server(admin: Admin) -> web.ServerRunner:
    """aiohttp's low-level server: no router, whose own answers would bypass ours."""
    return web.ServerRunner(
        _Server(
            admin.handle,
            handler_cancellation=True,  # whoever leaves gives up the place among those who watch
            keepalive_timeout=IDLE_TIMEOUT,
            lingering_time=1.0,
            max_line_size=65_536,
            max_field_size=65_536,
            access_log=None,
        ),
        shutdown_timeout=1.0,
    )


def _path(request: web.BaseRequest) -> str:
    return request.raw_path.partition("?")[0]


def _unknown_model(key: str, known: Collection[str] = ()) -> _Refusal:
    near = " or ".join(difflib.get_close_matches(key, known) or list(known)[:NAMED_MAX])
    advice = f"; write {near}" if near else ""
    return _Refusal(HTTPStatus.NOT_FOUND, f"no such model here: {key[:QUOTED_MAX]}{advice}")


def is_known_host(host: str, names: Collection[str]) -> bool:
    """Whether a `Host` header names this machine: an IP literal, localhost, or one of `names`."""
    name = _host_name(host)
    if name == "localhost" or name.endswith(".localhost") or name in {n.lower() for n in names}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _key_in(authorization: str) -> bytes:
    """What somebody gave as a key: a token, or a password as a browser sends it."""
    scheme, _, sent = authorization.partition(" ")
    match scheme.lower():
        case "bearer":
            return sent.strip().encode(errors="surrogateescape")
        case "basic":
            try:
                return base64.b64decode(sent.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return b""
    return b""


def _json(
    body: Mapping[str, Any] | Sequence[Any],
    status: HTTPStatus = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    text = json.dumps(body, indent=1) + "\n"
    response = web.Response(text=text, status=status, content_type="application/json", headers=HEADERS)
    response.headers.extend(headers or {})
    return response


def _packed(request: web.BaseRequest, response: web.Response) -> web.Response:
    """The same, compressed where that helps and the other side can read it."""
    response.headers["Vary"] = "Accept-Encoding"
    if isinstance(response.body, bytes) and len(response.body) >= GZIP_FROM and _reads_gzip(request):
        response.body = gzip.compress(response.body, GZIP_LEVEL)
        response.headers["Content-Encoding"] = "gzip"
    return response


def _reads_gzip(request: web.BaseRequest) -> bool:
    for coding in request.headers.get("Accept-Encoding", "").lower().split(","):
        name, _, weight = coding.partition(";")
        if name.strip() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
