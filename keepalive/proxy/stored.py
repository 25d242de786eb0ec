"""Where answers are stored that others may go on from: by id, on the upstream that gave them."""

import asyncio
import json
import re
from collections import OrderedDict
from typing import Final
from urllib.parse import quote

from keepalive.core.errors import UpstreamError
from keepalive.http1 import Headers
from keepalive.proxy.upstreams import Upstreams

#: Answers whose home is remembered.
ANSWERS: Final = 16_384

# Safe without parsing: a quote inside a JSON string is always escaped.
_ID: Final = re.compile(rb'"(?:id|response_id)"\s*:\s*"(resp_[0-9A-Za-z_-]{1,200})"')
_OVERLAP: Final = 256


class Stored:
    """Ids alone are kept, never what was said."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, str] = OrderedDict()

    def remember(self, ident: str, upstream: str) -> None:
        self._homes[ident] = upstream
        self._homes.move_to_end(ident)
        if len(self._homes) > ANSWERS:
            self._homes.popitem(last=False)

    async def home(self, ident: str, upstreams: Upstreams, headers: Headers, within: float) -> str | None:
        """The upstream that has it; those that were there before us are asked for it, all at once."""
        known = self._homes.get(ident)
        if known in upstreams.pools or len(upstreams.pools) == 1:
            return known
        target = b"/v1/responses/" + quote(ident, safe="").encode()

        async def has(name: str) -> str | None:
            try:
                reply = await upstreams.look(name, target, headers, within)
            except UpstreamError:
                return None
            # LM Studio answers what it does not know with 200, too.
            return name if reply.head.status == 200 and _id_of(reply.body) == ident else None

        asking = [asyncio.create_task(has(name)) for name in upstreams.pools]
        try:
            for answer in asyncio.as_completed(asking):
                home = await answer
                if home is not None:  # nobody waits for one that hangs
                    self.remember(ident, home)
                    return home
            return None
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


def _id_of(body: bytes) -> object:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer.get("id") if isinstance(answer, dict) else None


class Watch:
    """Looks at an answer beside its way to the caller, for the id under which it is stored."""

    __slots__ = ("_stored", "_tail", "_upstream")

    def __init__(self, stored: Stored, upstream: str) -> None:
        self._stored: Stored | None = stored
        self._upstream = upstream
        self._tail = b""

    def look(self, data: bytes) -> None:
        if self._stored is None:
            return
        seen = self._tail + data
        found = _ID.search(seen)
        if found is None:
            self._tail = seen[-_OVERLAP:]
            return
        self._stored.remember(found[1].decode("ascii"), self._upstream)
        self._stored = None
        self._tail = b""
