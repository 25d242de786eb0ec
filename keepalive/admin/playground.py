"""Prompts from the status page: routes of the admin address that lead on to the client address.

What is asked here goes the way of any caller, over a connection of its own: the same waiting, the same limits,
the same numbers. Who may ask has been decided by the admin address. Status, kind and bytes of the answer pass
unchanged; a page that leaves is gone over there at once, and one that reads slowly is waited for.
"""

import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web

CONNECT_TIMEOUT: Final = 5.0
# The other headers of a page say who it is, which has been asked already.
_THERE: Final = ("Content-Type", "Prefer")
_BACK: Final = ("Content-Type", "Retry-After", "Allow", "X-Accel-Buffering")


class Playground:
    """Asks the client address, once that is `open`. `key` lets it in where that demands one."""

    def __init__(self) -> None:
        self.key: str | None = None
        self._url = ""
        self._session: ClientSession | None = None

    def open(self, url: str) -> None:
        """That is where the client address listens."""
        place = urlsplit(url)
        host = ipaddress.ip_address(place.hostname or "")
        if host.is_unspecified:  # every interface: then this machine is one of them
            name = "127.0.0.1" if host.version == 4 else "[::1]"
            url = f"http://{name}:{place.port}"
        self._url = url
        self._session = ClientSession(
            connector=TCPConnector(limit=0, force_close=True),
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            auto_decompress=False,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def forward(self, request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
        """The answer from over there, with `headers` of this address. Raises ClientError before it begins."""
        asked = {name: request.headers[name] for name in _THERE if name in request.headers}
        asked["Accept-Encoding"] = "identity"
        if self.key is not None:
            asked["Authorization"] = f"Bearer {self.key}"
        body = await request.read()
        assert self._session is not None
        async with self._session.request(
            request.method, self._url + request.path, data=body or None, headers=asked, allow_redirects=False
        ) as answer:
            kept = {name: answer.headers[name] for name in _BACK if name in answer.headers}
            response = web.StreamResponse(status=answer.status, headers={**headers, **kept})
            response.content_length = answer.content_length
            await response.prepare(request)
            try:
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
            except (ClientError, ConnectionError):
                # Half an answer must not look like a whole one.
                if request.transport is not None:
                    request.transport.abort()
            return response
