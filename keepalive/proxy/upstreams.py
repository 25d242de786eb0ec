"""The upstreams by their names: the connections to each, and what of a caller's request it is sent."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Final

from keepalive.core.errors import Cut, TimedOut, Unexpected, Unreachable
from keepalive.http1 import Caller, Headers, Pool, Reply, ReplyHead, end_to_end
from keepalive.proxy.access import SHOWN_IN
from keepalive.proxy.reading import Reading
from keepalive.proxy.settings import Settings

#: What both ends of a tunnel say to each other.
UPGRADE: Headers = [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]

#: What of a caller's head is said to us, or anew.
_OURS: Final = frozenset([b"host", b"content-length", b"expect", b"x-keepalive-heartbeat"])
_READABLE: Final = _OURS | {b"accept-encoding"}
_SHOWN: Final = frozenset(SHOWN_IN)

#: What is not up is looked at more often than this, so it is known for as long as it is so.
BELIEVED: Final = 120.0
_LEADS_BACK: Final = "the url of upstream {} leads back to keepalive itself; write where LM Studio listens"

#: A listing of a thousand models is about 1 MB. More than this is not a listing.
LOOKED_BYTES: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Looked:
    """A whole answer that we asked for ourselves."""

    head: ReplyHead
    body: bytes


class Upstreams:
    def __init__(self, settings: Settings) -> None:
        self.pools: dict[str, Pool] = {}
        self._settings = settings
        self._retired: list[Pool] = []
        self._avoided: dict[str, float] = {}  # those that are ourselves, and until when that is believed
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        before, self._settings = self._settings, settings
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
        self._retired += (pool for pool in self.pools.values() if pool not in pools.values())
        self._retired = [pool for pool in self._retired if pool.links]
        self.pools = pools
        self._avoided.clear()

    def avoid(self, name: str) -> str:
        """Ask nothing there for a while: its address leads back here. In words."""
        self._avoided[name] = asyncio.get_running_loop().time() + BELIEVED
        return _LEADS_BACK.format(name)

    def _refuse_ourselves(self, name: str) -> None:
        until = self._avoided.get(name)
        if until is not None and asyncio.get_running_loop().time() < until:
            raise Unreachable(_LEADS_BACK.format(name))

    @property
    def default(self) -> str:
        """The one that serves what is for no model that we keep."""
        return next(iter(self.pools))

    def send(
        self,
        name: str,
        caller: Caller,
        reading: Reading,
        body: bytes,
        *,
        readable: bool,
        upgrade: bool,
        once: bool,
    ) -> Coroutine[object, object, Reply]:
        """Asks what the caller asks; `body` is what has been read of its body. Raises UpstreamError.

        `readable`: its answer must not be compressed. `once`: it must not be sent a second time.
        """
        if self._avoided:
            self._refuse_ourselves(name)
        head, pool = caller.head, self.pools[name]
        as_read = reading.settings is self._settings and not upgrade
        as_read = as_read and head.headers is reading.headers and head.target is reading.target
        begin = reading.begins.get((name, readable)) if as_read else None
        if begin is None:
            headers = self._headers(name, head.headers, readable=readable)
            begin = pool.begin(head.method, head.target, headers + UPGRADE if upgrade else headers)
            if as_read:
                reading.begins[name, readable] = begin
        framing = None
        if body and not caller.body_ended:
            framing = head.body
        elif not body and head.method in (b"POST", b"PUT", b"PATCH"):
            framing = 0
        return pool.send_on(
            head.method,
            begin,
            body,
            more=None if caller.body_ended else caller.read,
            framing=framing,
            upgrade=upgrade,
            once=once,
        )

    async def look(self, name: str, target: bytes, headers: Headers, within: float) -> Looked:
        """Asks one upstream what a caller with these headers would read there. Raises UpstreamError."""
        self._refuse_ourselves(name)
        pool = self.pools[name]
        asked = [
            pair
            for pair in self._headers(name, headers, readable=True)
            if not pair[0].lower().startswith((b"if-", b"range", b"content-"))
        ]
        try:
            async with asyncio.timeout(within):
                reply = await pool.send(b"GET", target, asked)
                try:
                    body = await reply.read(LOOKED_BYTES)
                    if reply.cut:
                        raise Cut(f"{pool.name} broke off its answer")
                    if not reply.complete:
                        raise Unexpected(f"{pool.name} answered with more than {LOOKED_BYTES >> 20} MiB")
                finally:
                    reply.close()
        except TimeoutError:
            raise TimedOut(f"{pool.name} did not answer within {within:g} s") from None
        return Looked(reply.head, body)

    def _headers(self, name: str, headers: Headers, *, readable: bool) -> Headers:
        token = self._settings.upstreams[name].token
        without = _READABLE if readable else _OURS
        if self._settings.keys or token is not None:
            without |= _SHOWN
        kept = end_to_end(headers, without=without)
        if token is not None:
            kept.append((b"Authorization", b"Bearer " + token.encode("latin-1")))
        return kept

    async def close(self) -> None:
        for pool in [*self.pools.values(), *self._retired]:
            await pool.close()
