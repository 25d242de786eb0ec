"""etcd 3.4 and later, through its JSON gateway.

The asyncio client there is (aetcd 1.0, over grpcio) was looked at first. It knows one address; when its one stream
breaks every watch on it is over and has to be noticed, begun anew and brought up to date by whoever uses it, which is
most of the work; calls have no deadline unless each is given one; and it brings grpcio and protobuf, larger than
everything else here together. The gateway serves the six calls that are needed to any HTTP client, and aiohttp is here
already, with TLS. So these are they.

Every call has a deadline, and whatever goes wrong is an `EngineError` with a sentence. Who is asked is whoever
answered last; the next one is tried when that one fails, or hangs. A watch tells no more than *that* something has
changed: whoever is told reads all of it, so that a watch that broke, was compacted away or lost a change costs a moment
and never the truth.
"""

import asyncio
import base64
import contextlib
import errno
import json
import math
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from ssl import SSLCertVerificationError, SSLContext, SSLError
from typing import Any, Protocol

import aiohttp

from keepalive.cluster.rows import Row
from keepalive.core.errors import KeepaliveError

ANSWER_MAX = 32 * 2**20
UNAUTHENTICATED = 16
# What to do about what etcd says in few words.
REMEDIES = {
    "user name is empty": "it wants to know who asks: see cluster.user",
    "authentication is not enabled": "leave cluster.user out, or enable it there",
    "permission denied": "cluster.user is to read and write all keys below /keepalive/",
}

Json = Mapping[str, Any]


class EngineError(KeepaliveError):
    """etcd did not do what it was asked; `str()` says why."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who we are to etcd; the password is sent to nobody else."""

    user: str | None = None
    password: str | None = None
    tls: SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Standing:
    """What tells one etcd, or an older copy of it, from another: none of it falls while it is the same."""

    cluster: int = 0
    term: int = 0
    revision: int = 0

    def replaces(self, before: "Standing") -> str | None:
        """Why this is another one, if that shows. 0: it was not said."""
        if self.cluster and before.cluster and self.cluster != before.cluster:
            return "it is another etcd than before"
        if self.revision < before.revision or 0 < self.term < before.term:
            return "etcd knows less than it did before"
        return None


class Transport(Protocol):
    """How a request gets to an address of etcd, and what comes back. OSError, ValueError: it did not."""

    def post(
        self, url: str, body: Json, headers: Mapping[str, str], connect: float, /
    ) -> AbstractAsyncContextManager[Answer]:
        """`connect`: the seconds that a connection may take."""

    async def close(self) -> None: ...


class Http:
    """By aiohttp, whose session may be made only where a loop runs."""

    def __init__(self, tls: SSLContext | None, timeout: float) -> None:
        self._tls: SSLContext | bool = tls or True
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def post(
        self, url: str, body: Json, headers: Mapping[str, str], connect: float, /
    ) -> AsyncIterator[Answer]:
        if self._session is None:
            connector = aiohttp.TCPConnector(socket_factory=self._socket)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect)
        try:
            async with self._session.post(
                url, json=body, headers=headers, timeout=timeout, ssl=self._tls, allow_redirects=False
            ) as answer:
                yield Answer(answer.status, answer.content.iter_any())
        except aiohttp.ClientError as error:
            raise OSError(_why(error, url)) from error

    def _socket(self, address: Any) -> socket.socket:
        """What is not received in the time of a call is not to come a minute later, when the system sends it again."""
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(self._timeout * 1000))
        return made

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def put(key: str, value: bytes, lease: int = 0) -> Json:
    return {"request_put": {"key": _coded(key.encode()), "value": _coded(value), "lease": str(lease)}}


def delete(key: str) -> Json:
    return {"request_delete_range": {"key": _coded(key.encode())}}


def created(key: str, revision: int) -> Json:
    """That the key was created at that revision; 0: that there is none."""
    return {
        "key": _coded(key.encode()),
        "target": "CREATE",
        "result": "EQUAL",
        "create_revision": str(revision),
    }


def unchanged(key: str, revision: int) -> Json:
    """That the key was last written at that revision."""
    return {
        "key": _coded(key.encode()),
        "target": "MOD",
        "result": "EQUAL",
        "mod_revision": str(revision),
    }


class Etcd:
    """`addresses` of one etcd cluster. `timeout` bounds each call."""

    def __init__(
        self, addresses: Sequence[str], access: Access, timeout: float, transport: Transport | None = None
    ) -> None:
        self._addresses = tuple(address.rstrip("/") for address in addresses)
        self._access = access
        self._timeout = timeout
        self._place = 0
        self.standing = Standing()  # as of the last `rows`
        self._token: str | None = None
        self._transport = transport or Http(access.tls, timeout)

    async def close(self) -> None:
        await self._transport.close()

    # --- the calls ----------------------------------------------------------------------------------

    async def grant(self, ttl: float) -> int:
        """A new lease."""
        return _number((await self._call("/v3/lease/grant", {"TTL": str(math.ceil(ttl))})).get("ID"))

    async def renew(self, lease: int) -> bool:
        """False: there is no such lease any more."""
        answer = await self._call("/v3/lease/keepalive", {"ID": str(lease)})
        result = answer.get("result")
        return isinstance(result, dict) and _number(result.get("TTL") or 0) > 0

    async def revoke(self, lease: int) -> None:
        await self._call("/v3/lease/revoke", {"ID": str(lease)})

    async def rows(self, prefix: str) -> list[Row]:
        """All keys below `prefix`, without it, as the majority has them now."""
        answer = await self._call("/v3/kv/range", _below(prefix))
        header = answer.get("header")
        names = ("cluster_id", "raft_term", "revision")
        said = [_number(header.get(name) or 0) for name in names] if isinstance(header, dict) else []
        self.standing = Standing(*said)
        found = []
        for kv in _list(answer.get("kvs") or []):
            key = _decoded(kv.get("key")).decode(errors="replace").removeprefix(prefix)
            value = _decoded(kv.get("value") or "")
            made, written = _number(kv.get("create_revision")), _number(kv.get("mod_revision"))
            found.append(Row(key, value, made, written))
        return found

    async def commit(self, compare: Sequence[Json], changes: Sequence[Json]) -> bool:
        """Make all `changes` at once if all of `compare` holds; whether it did."""
        answer = await self._call("/v3/kv/txn", {"compare": list(compare), "success": list(changes)})
        return answer.get("succeeded") is True

    async def watch(self, prefix: str) -> AsyncIterator[None]:
        """Something has changed below `prefix`, or may have: once at the start, when nothing can be missed any more."""
        address = self._addresses[self._place]
        body = {"create_request": _below(prefix)}
        try:
            headers = await self._headers(address)
            async with self._transport.post(address + "/v3/watch", body, headers, self._timeout) as answer:
                if answer.status != 200:
                    raise _refused(await _read(answer, address), address)
                async for _ in answer.chunks:
                    yield
        except (OSError, ValueError) as error:
            raise EngineError(f"etcd at {address}: {_words(error)}") from error

    # --- how they go --------------------------------------------------------------------------------

    async def _call(self, path: str, body: Json) -> Json:
        """One address after the other; an address of which nothing comes for its share of the time goes on being waited
        for while the next is asked, since one that is cut off does not even refuse a connection."""
        end = asyncio.get_running_loop().time() + self._timeout
        asked: dict[asyncio.Task[Json], int] = {}
        left = [(self._place + n) % len(self._addresses) for n in range(len(self._addresses))]
        first: EngineError | None = None
        try:
            while left or asked:
                if left:
                    place = left.pop(0)
                    asked[asyncio.create_task(self._ask(self._addresses[place], path, body, end))] = place
                share = self._timeout / len(self._addresses) if left else None
                done, _ = await asyncio.wait(asked, timeout=share, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in asked if task in done]:
                    place = asked.pop(task)
                    try:
                        answer = task.result()
                    except EngineError as error:
                        first = first or error
                    else:
                        self._place = place
                        return answer
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise first or EngineError("no address of etcd is known")

    async def _ask(self, address: str, path: str, body: Json, end: float) -> Json:
        try:
            async with asyncio.timeout_at(end):
                status, answer = await self._post(address, path, body, await self._headers(address))
                if self._access.user is not None and _is_stale(answer):
                    # A token lives for minutes, and not longer than the member that gave it.
                    self._token = None
                    status, answer = await self._post(address, path, body, await self._headers(address))
        except TimeoutError:
            raise EngineError(f"etcd at {address} did not answer within {self._timeout:.3g} s") from None
        except (OSError, ValueError) as error:
            raise EngineError(f"etcd at {address}: {_words(error)}") from error
        if status != 200:
            raise _refused(answer, address)
        return answer

    async def _headers(self, address: str) -> Mapping[str, str]:
        if self._access.user is None:
            return {}
        if self._token is None:
            said = {"name": self._access.user, "password": self._access.password or ""}
            status, answer = await self._post(address, "/v3/auth/authenticate", said, {})
            token = answer.get("token")
            if status != 200 or not isinstance(token, str):
                raise _refused(answer, address)
            self._token = token
        return {"Authorization": self._token}

    async def _post(
        self, address: str, path: str, body: Json, headers: Mapping[str, str]
    ) -> tuple[int, Json]:
        async with self._transport.post(address + path, body, headers, self._timeout) as answer:
            return answer.status, await _read(answer, address)


async def _read(answer: Answer, address: str) -> Json:
    content = bytearray()
    async for chunk in answer.chunks:
        content += chunk
        if len(content) > ANSWER_MAX:
            raise EngineError(f"etcd at {address} answered with more than {ANSWER_MAX >> 20} MiB")
    try:
        said = json.loads(bytes(content).split(b"\n", 1)[0] or b"{}")
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        # Without a config file etcd has it on.
        off = (
            "; if it is etcd, set enable-grpc-gateway: true in its config file"
            if answer.status == 404
            else ""
        )
        raise EngineError(f"what listens at {address} does not answer as etcd 3.4 or newer does{off}")
    return said


def _is_stale(answer: Json) -> bool:
    # The last when somebody's rights were changed since, where tokens are signed ones.
    said = str(answer.get("error"))
    return answer.get("code") == UNAUTHENTICATED or "invalid auth token" in said or "revision" in said


def _refused(answer: Json, address: str) -> EngineError:
    said = answer.get("error") or answer.get("message")
    if isinstance(said, dict):
        said = said.get("message")
    words = str(said).removeprefix("etcdserver: ") if said else "no"
    words = "".join(c for c in words if c.isprintable())[:200]
    remedy = f" ({REMEDIES[words]})" if words in REMEDIES else ""
    return EngineError(f"etcd at {address} says: {words}{remedy}")


def _why(error: aiohttp.ClientError, url: str) -> str:
    """What is wrong, with TLS as a rule."""
    if isinstance(error, aiohttp.ServerDisconnectedError) and url.startswith("http:"):
        return "it hung up without an answer; that may be because it wants https://"
    cause: BaseException | None = error.__cause__
    unmet = isinstance(error, aiohttp.ClientConnectorError)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
    match cause:
        case SSLCertVerificationError():
            return f"its certificate is not accepted: {cause.verify_message} (cluster.ca names who has signed it)"
        case SSLError() if "ALERT_" in (cause.reason or ""):
            alert = (cause.reason or "").partition("ALERT_")[2].replace("_", " ").lower()
            return (
                f"it wants a certificate of ours that it accepts ({alert}): see cluster.cert and cluster.key"
            )
        case SSLError():
            return "no TLS is spoken there that we know"
        case ConnectionError(errno=None | errno.ECONNRESET) if url.startswith("https:") and unmet:
            return "it hung up before TLS was spoken; that may be because it wants http://"
        case ConnectionError(errno=None) if url.startswith("https:"):
            # The want of a certificate is told once the handshake is over, and not always heard before what we ask.
            return (
                "it hung up once TLS was spoken; that may be because it wants a certificate of ours that it accepts: "
                "see cluster.cert and cluster.key"
            )
        case OSError(errno=int() as number) if unmet:
            # Those of names and of Windows have words of their own, and numbers that mean something else elsewhere.
            named = isinstance(cause, socket.gaierror) or sys.platform == "win32" or number <= 0
            return f"Cannot connect: {cause.strerror if named else os.strerror(number)}"
        case OSError(errno=int() as number) if number > 0 and sys.platform != "win32":
            return f"the connection broke: {os.strerror(number)}"
    return _words(error)


def _words(error: BaseException) -> str:
    words = str(error) or type(error).__name__
    return "".join(c for c in words if c.isprintable())[:200]


def _below(prefix: str) -> dict[str, Any]:
    key = prefix.encode()
    end = key[:-1] + bytes([key[-1] + 1])
    return {"key": _coded(key), "range_end": _coded(end)}


def _coded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(text)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise EngineError("etcd sent what is not base64") from error


def _list(value: object) -> list[Json]:
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return value
    raise EngineError("etcd sent no keys where they belong")


def _number(value: object) -> int:
    """64-bit numbers stand as text in it."""
    if isinstance(value, str | int):
        with contextlib.suppress(ValueError):
            return int(value)
    raise EngineError("etcd sent no number where one belongs")
