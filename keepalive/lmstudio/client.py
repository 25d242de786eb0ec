"""The client of one LM Studio server: what it has, loading, unloading, pinging. All of it over HTTP; what the socket
of LM Studio's SDKs adds, `Eyes` see.

The only importer of httpx, and of nothing that decides. Each call has a bound in seconds and either returns
or raises one of `errors`. Nothing is retried here, no redirect followed, no proxy taken from the environment: a
listing that failed is asked again by whoever plans, and a load must not be sent twice.

Where llama-server stands in LM Studio's place as a router, `Router` knows how that is told to load and unload.
"""

import asyncio
import json
import re
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import lru_cache
from types import TracebackType
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import httpx

from keepalive import __version__
from keepalive.core.errors import (
    Cut,
    Forgone,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
    says_loading,
)
from keepalive.core.facts import NO_SIGHT, Entry, Odd, Sight, Tier
from keepalive.lmstudio import llama, wire
from keepalive.lmstudio.eyes import Eyes
from keepalive.lmstudio.line import Dial, Web, trusting
from keepalive.lmstudio.router import Router

# A listing of a thousand models is about 1 MB. More than this is not a listing.
ANSWER_MAX = 8 * 1024 * 1024
# What stands in front of a server says these of its own accord, in a page: of the route they say nothing.
NOT_NOW = (408, 425, 429)


@dataclass(frozen=True, slots=True)
class Listing:
    """What an upstream has; `entries` by folded key and variant. It keeps no more than `places` models at a time."""

    tier: Tier
    entries: Mapping[str, Entry]
    sight: Sight = NO_SIGHT
    places: int | None = None
    odd: Odd | None = None


class Client:
    """Talks to the server at `url` (scheme, host, port). The token is sent, and never appears in an error.

    Where several daemons talk to it, `acts` tells whether it is ours to change anything there: it is asked once more
    when a connection is open and the first byte is about to go, since a process may be stopped for any time before.

    `mark` goes with every request: whoever sent it knows it by that, where an address leads back to him.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        token: str | None = None,
        connect_timeout: float = 5.0,
        list_timeout: float = 10.0,
        socket_options: Sequence[tuple[int, int, int]] = (),
        transport: httpx.AsyncBaseTransport | None = None,
        sdk: bool = False,
        mark: str = "",
        dial: Dial | None = None,
        acts: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name = name
        self._acts = acts
        self.url = url
        self._web = Web(re.sub("^http", "ws", url), socket_options)
        self._eyes = Eyes(dial or self._web.dial)
        self._router = Router(self._call, self._events, url)
        self._clock: float | None = None
        self._odd: Odd | None = None
        self._tier: Tier | None = None
        self._listed: Collection[str] = ()
        self._shows_loading = True
        # The same few addresses, again and again: reading one costs as much as what is done with it.
        self._at = lru_cache(maxsize=64)(lambda path: httpx.URL(url.rstrip("/") + path))
        self._http = httpx.AsyncClient(
            # Bodies are counted as they come, so that a small one cannot unfold into a huge one.
            headers={
                "user-agent": f"keepalive/{__version__}",
                "accept-encoding": "identity",
                "connection": "close",
                **({"x-keepalive-asks": f"{mark} {name}"} if mark else {}),
            },
            trust_env=False,
            follow_redirects=False,
            transport=transport or _transport(url, socket_options),
        )
        self.configure(token=token, connect_timeout=connect_timeout, list_timeout=list_timeout, sdk=sdk)

    def configure(
        self, *, token: str | None, connect_timeout: float, list_timeout: float, sdk: bool = False
    ) -> None:
        """Use these from the next call on; with `sdk` the socket of LM Studio's SDKs, too."""
        self._token = self._web.token = token
        self._eyes.configure(token)
        self._sees = sdk
        if not sdk:
            self._eyes.shut()
        self._connect_timeout = connect_timeout
        self._list_timeout = list_timeout
        self._http.timeout = httpx.Timeout(None, connect=connect_timeout)
        if token:
            self._http.headers["authorization"] = f"Bearer {token}"
        else:
            self._http.headers.pop("authorization", None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._eyes.close()
        await self._web.close()
        await self._http.aclose()

    def expect(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """See what loads of these models will take, by key, with the fields that their loads have."""
        self._eyes.expect(wanted)

    async def listing(self, *, loading: bool = False) -> Listing:
        """What is there and what is loaded; with `loading` also what is being loaded, where that shows."""
        try:
            late = f"{self.url} did not answer the listing within {self._list_timeout:g} s"
            async with _bound(self._list_timeout, late):
                self._odd = None
                if self._tier is None:
                    self._tier = await self._detect()
                tier, entries = self._tier, await self._entries(self._tier, loading=loading)
        except (Unreachable, Cut, Unexpected, Refused, Unauthorized):
            # Something else may answer next time: another version, or another program. After a refused token
            # that is minutes later, and a newer version still serves the older one's listing.
            self._tier = None
            self._shows_loading = True
            raise
        sight = NO_SIGHT
        if self._sees and tier.lm_studio:
            sight, entries = await self._eyes.look(entries)
            sight = replace(sight, clock=self._clock)
        places = self._router.places if tier is Tier.LLAMA else None
        index = wire.by_key(entries)
        self._listed = index.keys()
        return Listing(tier, index, sight, places, self._odd)

    def _left_out(self, odd: Odd) -> None:
        self._odd = odd

    async def estimated(self) -> None:
        """Wait until what is being estimated is; the next listing has it."""
        await self._eyes.estimated()

    async def load(
        self,
        key: str,
        fields: Mapping[str, Any],
        *,
        timeout: float,
        kind: str = "llm",
        tier: Tier = Tier.V1,
        told: Callable[[float], None] = lambda progress: None,
    ) -> wire.Loaded:
        """Load one more copy, explicitly (0.4 and later, or a router). The answer comes when the load is over.

        Where the socket is up it tells how far it is, from 0 to 1; a router always does. `kind` as listed.
        """
        body = {**{name: value for name, value in fields.items() if name not in wire.SDK_ALONE}, "model": key}
        async with _bound(timeout, f"no answer to the load within {timeout:.0f} s"):
            self._check_hand()
            if tier is Tier.LLAMA:
                return await self._router.load(key, told)
            if self._sees and (loaded := await self._eyes.load(kind, key, fields, told)) is not None:
                return loaded
            return wire.loaded(await self._call("POST", "/api/v1/models/load", body))

    async def give_up(self, key: str, *, tier: Tier = Tier.V1) -> None:
        """Ask for the end of our load of it, where there is a way to: `load` then raises GivenUp. Never raises."""
        if tier is Tier.LLAMA:
            await self._router.give_up(key)
        else:
            await self._eyes.give_up(key)

    async def unload(self, instance_id: str, *, tier: Tier = Tier.V1, timeout: float) -> None:
        async with _bound(timeout, f"no answer to the unload within {timeout:.0f} s"):
            if tier is Tier.LLAMA:
                await self._router.unload(instance_id)
            else:
                await self._call("POST", "/api/v1/models/unload", {"instance_id": instance_id})

    async def ping(
        self,
        target: str,
        accepted: Collection[str],
        *,
        kind: str,
        tier: Tier,
        timeout: float,
        lease: float | None = None,
        own: tuple[str, Mapping[str, Any]] | None = None,
    ) -> str | None:
        """Make a model answer one token, and return who answered instead, or None when all is well.

        `lease` (seconds) makes it a load on demand on 0.3.x. `own`: path and body to be sent instead. An answer that
        comes before `timeout` and is no error proves the model, if its author is among `accepted`; a reranker's, and
        that to an `own` ping, need not be signed.
        """
        path, body = wire.ping(kind, target, tier, lease) if own is None else wire.own_ping(own, target)
        if tier is Tier.LLAMA:
            path = llama.as_it_is(path)
        async with _bound(timeout, f"no answer to the ping within {timeout:.0f} s"):
            try:
                answer = await self._call("POST", path, body)
            except Unexpected as error:
                if own is None or error.status is None or not 200 <= error.status < 300:
                    raise
                return None  # what its owner asks for may be answered with sound, say
        author = wire.answered_by(answer)
        if author is None and (own is not None or kind == "reranker"):
            return None  # not every kind of answer is signed
        if wire.is_answer_of(author, accepted, tier, self._listed):
            return None
        return wire.clean(author or "") or "a model without a name"

    async def prime(
        self,
        replay: tuple[str, Mapping[str, Any]],
        target: str,
        accepted: Collection[str],
        *,
        tier: Tier,
        timeout: float,
    ) -> int | None:
        """Replay an opening, a path and a body; how many tokens it has, where that is told.

        Cancelling it closes its connection, which ends the work over there.
        """
        path, body = wire.own_ping(replay, target)
        if tier is Tier.LLAMA:
            path = llama.as_it_is(path)
        async with _bound(timeout, f"no answer to the opening within {timeout:.0f} s"):
            try:
                answer = await self._call("POST", path, body)
            except Refused as error:
                if not wire.quotes(str(error), body):
                    raise
                why = f"HTTP {error.status}, in words of the opening"
                raise Refused(why, reason=error.reason, status=error.status) from None
        author = wire.answered_by(answer)
        if not wire.is_answer_of(author, accepted, tier, self._listed):
            raise Unexpected(f"{wire.clean(author or '') or 'a model without a name'} answered in its place")
        return wire.tokens(answer)

    async def _entries(self, tier: Tier, *, loading: bool) -> list[Entry]:
        if tier is Tier.V0:
            return wire.v0_entries(await self._call("GET", "/api/v0/models"), self._left_out)
        if tier is Tier.LLAMA:
            return await self._router.entries(self._left_out)
        if tier is Tier.OPENAI:
            return wire.openai_entries(await self._call("GET", "/v1/models"), self._left_out)
        # The newer listing does not show a load in progress; the older one, still served, does. It is asked
        # first: a load that ends between the two is then seen twice, and otherwise not at all.
        older = await self._loading() if loading and self._shows_loading else None
        entries = wire.v1_entries(await self._call("GET", "/api/v1/models"), self._left_out)
        return entries if older is None else wire.with_loading(entries, older)

    async def _loading(self) -> list[Entry] | None:
        try:
            return wire.v0_entries(await self._call("GET", "/api/v0/models"))
        except Refused as error:
            if error.reason is Reason.UNKNOWN_ROUTE:
                self._shows_loading = False  # each try writes an error into its user's log
        except Unexpected:
            pass  # an HTML 500, seen once, in the moment in which a load began
        return None

    async def _detect(self) -> Tier:
        """The tier, by a field that only the right answer has.

        Only an unknown route leads on to the next guess. Taking a server in trouble for an older one would
        mean loading on demand where explicit loading is served. Each wrong guess costs a line in its log.
        """
        greeting = await self._probe("/lmstudio-greeting")
        if isinstance(greeting, Mapping) and greeting.get("lmstudio") is True:
            for tier, path in ((Tier.V1, "/api/v1/models"), (Tier.V0, "/api/v0/models")):
                answer = await self._probe(path)
                if answer is not None:
                    _ = wire.v1_entries(answer) if tier is Tier.V1 else wire.v0_entries(answer)
                    return tier
        answer = await self._probe("/v1/models")
        try:
            wire.openai_entries(answer)
        except Unexpected as error:
            raise Unexpected(f"what answers at {self.url} is no model server that we know: {error}") from None
        return Tier.LLAMA if await self._is_router(answer) else Tier.OPENAI

    async def _is_router(self, listed: wire.Json) -> bool:
        """Whether it is llama-server's router that listed this."""
        if not llama.may_list(listed):
            return False
        try:
            return llama.is_router(await self._probe("/props"))
        except (Refused, Unauthorized, Unexpected):
            if not listed["data"]:
                return False  # with nothing to list it may be anybody, and answer what it likes
            raise

    async def _probe(self, path: str) -> wire.Json | None:
        """The answer of a route, or None where it is not served."""
        try:
            answer = await self._call("GET", path)
        except Refused as error:
            if error.reason is not Reason.UNKNOWN_ROUTE:
                raise
        except Unexpected as error:
            if error.status is None or not 400 <= error.status < 500 or error.status in NOT_NOW:
                raise  # a broken answer is an answer: the route is there, and in trouble
        else:
            if answer is None:
                raise Unexpected(f"GET {path} was answered with null")
            return answer
        return None

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> wire.Json:
        while True:
            token = self._token
            try:
                return await self._call_once(method, path, body)
            except Unauthorized:
                # Another was given meanwhile: what was refused was never done, and the new one may be right.
                if token == self._token:
                    raise

    async def _call_once(self, method: str, path: str, body: Mapping[str, Any] | None) -> wire.Json:
        what = f"{method} {path}"
        try:
            # What is only read is anybody's to ask.
            last_look = {"trace": self._about_to} if method == "POST" else {}
            async with self._http.stream(method, self._at(path), json=body, extensions=last_look) as response:
                if response.status_code in (401, 403):
                    # Its own words may quote the token.
                    raise Unauthorized(self._unauthorized())
                if response.has_redirect_location:
                    # Not followed: a token goes to nobody but whom the config names.
                    where = _place(response.headers["location"], str(self._at(path)), path)
                    why = f"{what} is sent on to {where}; if LM Studio is there, write that as url"
                    raise Unexpected(why, status=response.status_code)
                content = bytearray()
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > ANSWER_MAX:
                        raise Unexpected(f"{what} was answered with more than {ANSWER_MAX >> 20} MiB")
                status, retry_after = response.status_code, "retry-after" in response.headers
                self._clock = _date(response.headers.get("date"))
        except httpx.ConnectTimeout:
            raise Unreachable(f"no connection to {self.url} within {self._connect_timeout:g} s") from None
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise Cut(f"{self.url} broke off {what}: {_words(error)}") from error
        except httpx.HTTPError as error:
            # Neither its words nor it as a cause: h11 quotes a header that cannot be sent, token included.
            raise Unexpected(f"{what} could not be sent ({type(error).__name__})") from None
        return self._answer(status, self._without_token(bytes(content)), what, retry_after=retry_after)

    async def _events(self, path: str) -> AsyncGenerator[wire.Json]:
        """What a stream of events says, until it ends. An addition: whatever goes wrong with it ends it."""
        with suppress(httpx.HTTPError):
            async with self._http.stream("GET", self._at(path)) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        with suppress(ValueError, RecursionError):
                            yield json.loads(line[5:])

    async def _about_to(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "http11.send_request_headers.started":
            self._check_hand()

    def _check_hand(self) -> None:
        if not self._acts():
            raise Forgone(f"it is no longer ours to act at {self.name}")

    def _without_token(self, content: bytes) -> bytes:
        """LM Studio quotes a token that it does not like, and anything may quote a header."""
        if not self._token:
            return content
        return re.sub(re.escape(self._token.encode()), b"(token)", content, flags=re.IGNORECASE)

    def _answer(self, status: int, content: bytes, what: str, *, retry_after: bool) -> wire.Json:
        try:
            answer = wire.decode(content, what)
        except Unexpected as error:
            if status == 503 and retry_after:
                raise Refused("HTTP 503 with Retry-After", reason=Reason.LOADING, status=status) from None
            if status == 503 and says_loading(content.decode("utf-8", "replace")):
                raise Refused("HTTP 503, in words", reason=Reason.LOADING, status=status) from None
            if status == 400 and b"HTTPS" in content and self.url.startswith("http:"):
                https = self.url.replace("http:", "https:", 1)
                why = f'{self.url} takes TLS alone; if LM Studio is there, write "{https}" as url'
                raise Unexpected(why) from None
            raise Unexpected(f"{error}, with status {status}", status=status) from None
        refused = wire.refusal(status, answer, retry_after=retry_after)
        if refused:
            if refused.reason is Reason.UNAUTHORIZED:
                raise Unauthorized(self._unauthorized())
            raise refused
        if status >= 300:
            raise Unexpected(f"{what} was answered with status {status}")
        return answer

    def _unauthorized(self) -> str:
        if self._token:
            return f"{self.url} does not accept the API token of upstream {self.name!r}"
        return f"{self.url} wants an API token: name one with api_token_env or api_token_file"

    def _unreachable(self, error: httpx.ConnectError) -> Unreachable:
        causes = list(_leaves(error))
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return Unreachable(f"the host name in {self.url} cannot be resolved")
        refused = bool(causes) and all(isinstance(cause, ConnectionRefusedError) for cause in causes)
        if refused:
            return Unreachable(f"nothing listens at {self.url}", refused=True)
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Unreachable(
                    f"{self.url} shows a certificate that is not trusted ({cause.verify_message.rstrip('.')}); "
                    "if it is yours, name its issuer's file in SSL_CERT_FILE",
                    tls=True,
                )
            if isinstance(cause, ssl.SSLError):
                plain = self.url.replace("https", "http", 1)
                why = f"does not speak TLS as expected ({cause.reason}); where it speaks none, write"
                return Unreachable(f'{self.url} {why} "{plain}" as url', tls=True)
        return Unreachable(f"no connection to {self.url}: {wire.clean(str(causes[0] if causes else error))}")


def _transport(url: str, socket_options: Sequence[tuple[int, int, int]]) -> httpx.AsyncBaseTransport:
    return httpx.AsyncHTTPTransport(
        # A connection for each call. Servers close theirs unannounced, after an error or a stream, and a
        # call on such a one is cut: a listing that fails, or a load of which nobody knows the end.
        limits=httpx.Limits(max_keepalive_connections=0),
        trust_env=False,
        # Not httpx's own list of issuers: what the proxy trusts, the listings have to trust too.
        verify=trusting(url),
        socket_options=socket_options,
    )


def _date(text: str | None) -> float | None:
    """A header's, in Unix seconds: in the middle of the second that it names."""
    try:
        return parsedate_to_datetime(text or "").timestamp() + 0.5
    except (ValueError, TypeError, OverflowError):
        return None


def _place(location: str, asked: str, path: str) -> str:
    """The URL to write for a server that sends on to `location`: of that, what no secret stands in."""
    try:
        found = urlsplit(urljoin(asked, location))
        host, port = found.hostname or "", "" if found.port is None else f":{found.port}"
    except ValueError:
        return "another place"
    host = f"[{host}]" if ":" in host else host
    prefix = found.path.removesuffix(path) if found.path.endswith(path) else ""
    return wire.clean(f"{found.scheme}://{host}{port}{prefix}")


def _words(error: Exception) -> str:
    # A reset has no words: it is said as what it is like, so that a tunnel that does now this, now that is told once.
    return wire.clean(str(error)) or "Server disconnected without sending a response."


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of the system behind a library's error: several, when a name has several addresses."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    elif isinstance(error, OSError) and error.errno is not None:
        yield error
    elif (cause := error.__cause__ or error.__context__) is not None:
        yield from _leaves(cause)


@asynccontextmanager
async def _bound(seconds: float, message: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TimedOut(message) from None
