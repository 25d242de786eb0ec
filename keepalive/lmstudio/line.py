"""One connection to one namespace of LM Studio's SDK socket: greeted, then calls and channels told apart by number.

What comes is bounded before it is looked at: a message by its size, messages by their number in a second, a call by
its time. What is not known is ignored, as the protocol asks of both ends. Once it has ended, every call and channel
of it ends with `Cut`; nothing is asked anew.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from socket import socket
from typing import Any, Final, Protocol, Self

import aiohttp

from keepalive import __version__
from keepalive.core.errors import (
    Cut,
    GivenUp,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
)
from keepalive.lmstudio import sdk, wire

#: A listing of a thousand instances is about 1 MB.
MESSAGE_MAX: Final = 4 * 1024 * 1024
#: A load tells its progress some 16 times a second. Whoever says more waits for the next second, unread.
MESSAGES_A_SECOND: Final = 500
#: How long the first frame and its answer may take.
GREETING: Final = 5.0
#: What cannot be sent within this is not read any more.
SENDING: Final = 5.0


class Socket(Protocol):
    """A WebSocket that is open."""

    async def send(self, text: str) -> None: ...

    async def receive(self) -> str | None:
        """The next message, empty where it is not of text; None where LM Studio has ended it. Raises Cut."""

    async def close(self) -> None: ...


Dial = Callable[[str], Awaitable[Socket]]


class Channel:
    """A load under way: what it says of itself, until it is over."""

    def __init__(self, key: str, told: Callable[[float], None]) -> None:
        self.key = key
        self.given_up = False
        self._told = told
        self._progress = -1.0
        self.spoke = False
        self.begun = asyncio.Event()
        self.over: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    def heard(self, message: Mapping[str, Any]) -> None:
        self.spoke = True
        self.begun.set()
        if message.get("type") == "success":
            self.end(message)
        elif message.get("type") == "progress":
            progress = sdk.progress(message)
            # Back it never goes, and a hundred steps are as many as anybody can see.
            if progress is not None and progress >= self._progress + 0.01:
                self._progress = progress
                self._told(progress)

    def end(self, result: Mapping[str, Any] | Exception) -> None:
        if self.over.done():
            return
        if isinstance(result, Exception):
            self.over.set_exception(result)
            self.over.exception()  # whoever asked may have left
        else:
            self.over.set_result(result)
        self.begun.set()


class Line:
    """`await Line.open(…)`, then `run` it until it ends, which `ended` says in words."""

    def __init__(self, socket: Socket, secrets: tuple[str, ...]) -> None:
        self._socket = socket
        self._secrets = secrets
        self._numbers = count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._channels: dict[int, Channel] = {}
        self.ended: str | None = None
        self.hung_up = False  # it was LM Studio that ended it

    @classmethod
    async def open(cls, dial: Dial, namespace: str, token: str | None) -> Self:
        """Raises Unreachable, Unauthorized, Unexpected or TimedOut."""
        where = f"the SDK socket /{namespace}"
        try:
            async with asyncio.timeout(GREETING):
                socket = await dial(f"/{namespace}")
                try:
                    await socket.send(sdk.text(sdk.handshake(token)))
                    answer = await socket.receive()
                except BaseException:
                    await socket.close()
                    raise
        except TimeoutError:
            raise TimedOut(f"{where} did not answer within {GREETING:g} s") from None
        said = sdk.read(answer or "")
        if said.get("success") is True:
            return cls(socket, sdk.secrets(token))
        await socket.close()
        if said.get("success") is False:
            # Its words may quote the token.
            wants = "does not accept the API token" if token else "wants an API token"
            raise Unauthorized(f"{where} {wants}")
        raise Unexpected(f"{where} did not answer the greeting as LM Studio does")

    async def run(self) -> None:
        """Hear what comes, to the end. Cancelling it ends the connection."""
        loop = asyncio.get_running_loop()
        second, heard = loop.time(), 0
        why = "it was closed here"
        try:
            while (said := await self._socket.receive()) is not None:
                now = loop.time()
                if now >= second + 1.0:
                    second, heard = now, 0
                heard += 1
                if heard > MESSAGES_A_SECOND:
                    await asyncio.sleep(second + 1.0 - now)
                await self._hear(sdk.read(said))
            self.hung_up, why = True, "LM Studio ended it"
        except (Cut, TimedOut) as error:
            why = str(error)
        finally:
            self._end(why)
            await self._socket.close()

    async def call(self, endpoint: str, parameter: Mapping[str, Any] | None = None) -> Any:
        """The result; raises Refused or Cut. Whoever calls bounds it."""
        (answer,) = await self.calls([(endpoint, parameter)])
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def calls(self, asked: Sequence[tuple[str, Mapping[str, Any] | None]]) -> list[Any]:
        """The results of several, all asked at once; a Refused stands in the place of what was refused.

        No task for each of them: of a thousand models there are a thousand, every few seconds.
        """
        loop = asyncio.get_running_loop()
        waiting: dict[int, asyncio.Future[Any]] = {next(self._numbers): loop.create_future() for _ in asked}
        messages = []
        for number, (endpoint, parameter) in zip(waiting, asked, strict=True):
            message: dict[str, Any] = {"type": "rpcCall", "endpoint": endpoint, "callId": number}
            messages.append(message if parameter is None else {**message, "parameter": parameter})
        self._calls.update(waiting)
        try:
            await self._say(*messages)
            for future in waiting.values():
                await future
        finally:
            for number in waiting:
                self._calls.pop(number, None)
        return [future.result() for future in waiting.values()]

    async def load(
        self, parameter: Mapping[str, Any], told: Callable[[float], None], *, first_word: float
    ) -> wire.Loaded | None:
        """One more copy. None: it is refused before it begins, and not because of the model.

        Raises Refused, Cut, GivenUp, Unexpected, or TimedOut where nothing comes within `first_word`. Whoever stops
        to wait for it leaves it be: `give_up` ends it.
        """
        number = next(self._numbers)
        channel = self._channels[number] = Channel(str(parameter.get("modelKey")), told)
        try:
            await self._say(
                {
                    "type": "channelCreate",
                    "endpoint": "loadModel",
                    "channelId": number,
                    "creationParameter": parameter,
                }
            )
            try:
                async with asyncio.timeout(first_word):
                    await channel.begun.wait()
            except TimeoutError:
                raise TimedOut(f"the SDK socket said nothing of the load within {first_word:g} s") from None
            return sdk.loaded(await channel.over)
        except Refused as error:
            if channel.given_up and error.reason is Reason.OTHER:
                raise GivenUp(f"it was given up: {error}") from None
            if channel.spoke or error.reason is not Reason.OTHER:
                raise
            return None
        finally:
            self._channels.pop(number, None)

    async def give_up(self, key: str) -> None:
        """Ask for the end of the load of that model which goes on here. It may end well all the same."""
        for number, channel in list(self._channels.items()):
            if channel.key == key and not channel.over.done():
                channel.given_up = True
                await self._say({"type": "channelSend", "channelId": number, "message": {"type": "cancel"}})

    async def _hear(self, message: Mapping[str, Any]) -> None:
        call = self._calls.get(_number(message, "callId"))
        channel = self._channels.get(_number(message, "channelId"))
        match message.get("type"):
            case "rpcResult" if call is not None and not call.done():
                call.set_result(message.get("result"))
            case "rpcError" if call is not None and not call.done():
                call.set_result(sdk.refused(message.get("error"), self._secrets))
            case "channelSend":
                content = message.get("message")
                if channel is None:
                    return
                if isinstance(content, Mapping):
                    channel.heard(content)
                if (ident := message.get("ackId")) is not None:
                    number = message.get("channelId")
                    await self._say({"type": "channelAck", "channelId": number, "ackId": ident})
            case "channelError" if channel is not None:
                channel.end(sdk.refused(message.get("error"), self._secrets))
            case "channelClose" if channel is not None and channel.given_up:
                channel.end(GivenUp("it was given up"))
            case "channelClose" if channel is not None:
                channel.end(Cut("the SDK socket ended the load without a word of how"))

    async def _say(self, *messages: Mapping[str, Any]) -> None:
        if self.ended is not None:
            raise Cut(f"the SDK socket is closed: {self.ended}")
        try:
            async with asyncio.timeout(SENDING):
                for message in messages:
                    await self._socket.send(sdk.text(message))
        except TimeoutError:
            raise TimedOut(f"the SDK socket took nothing for {SENDING:g} s") from None

    def _end(self, why: str) -> None:
        self.ended = why
        error = Cut(f"the SDK socket was closed: {why}")
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
                call.exception()  # of several only the first is waited for
        for channel in self._channels.values():
            channel.end(error)


def _number(message: Mapping[str, Any], name: str) -> int:
    number = message.get(name)
    return number if type(number) is int else 0  # `true` is no 1


# --- over the network -------------------------------------------------------------------------------


def trusting(url: str) -> ssl.SSLContext:
    """Whom to believe that it is the server of `url`: whom this system believes; without TLS, nobody.

    Reading all issuers of the world takes a twentieth of a second, and most servers are asked without TLS.
    """
    if url.startswith(("https:", "wss:")):
        return ssl.create_default_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Web:
    """WebSockets of the server at `url`, by aiohttp. `close` it in the end."""

    def __init__(self, url: str, socket_options: Sequence[tuple[int, int, int]] = ()) -> None:
        self._url = url
        self._options = socket_options
        self._session: aiohttp.ClientSession | None = None
        self.token: str | None = None

    async def dial(self, path: str) -> Socket:
        headers = {"user-agent": f"keepalive/{__version__}"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"  # for whatever stands in front of LM Studio
        if self._session is None:
            connector = aiohttp.TCPConnector(
                ssl=trusting(self._url), force_close=True, socket_factory=self._socket
            )
            elsewhere = aiohttp.TraceConfig()
            elsewhere.on_request_redirect.append(_redirected)
            self._session = aiohttp.ClientSession(
                connector=connector, trace_configs=[elsewhere], cookie_jar=aiohttp.DummyCookieJar()
            )
        try:
            opened = await self._session.ws_connect(
                self._url + path,
                headers=headers,
                max_msg_size=MESSAGE_MAX,
                autoping=False,
                timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise Unauthorized(f"the upgrade to the SDK socket is refused: HTTP {error.status}") from None
            raise Unexpected(f"there is no SDK socket at {path}: HTTP {error.status}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # None of its words: a header that cannot be sent is quoted in them.
            raise Unreachable(f"the SDK socket cannot be reached ({type(error).__name__})") from None
        return _Opened(opened)

    def _socket(self, address: Any) -> socket:
        family, kind, protocol, _, _ = address
        made = socket(family, kind, protocol)
        for option in self._options:
            made.setsockopt(*option)
        return made

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def _redirected(*_: object) -> None:
    raise aiohttp.ClientError("it is elsewhere")  # to whoever that is no token is shown


class _Opened:
    def __init__(self, opened: aiohttp.ClientWebSocketResponse) -> None:
        self._opened = opened

    async def send(self, text: str) -> None:
        try:
            await self._opened.send_str(text)
        except (aiohttp.ClientError, OSError) as error:
            raise Cut(f"the SDK socket is gone ({type(error).__name__})") from None

    async def receive(self) -> str | None:
        message = await self._opened.receive()
        match message.type:
            case aiohttp.WSMsgType.PING:
                # Not left to the library, which would answer any number of them in a breath.
                await self._pong(message.data)
                return ""
            case aiohttp.WSMsgType.PONG:
                return ""
            case aiohttp.WSMsgType.TEXT:
                return str(message.data)
            case aiohttp.WSMsgType.BINARY:
                return ""
            case aiohttp.WSMsgType.ERROR:
                raise Cut(f"what it sent is too large, or no WebSocket ({type(message.data).__name__})")
        return None

    async def _pong(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(SENDING):
                await self._opened.pong(data)
        except (aiohttp.ClientError, OSError) as error:
            raise Cut(f"the SDK socket is gone ({type(error).__name__})") from None

    async def close(self) -> None:
        await self._opened.close()
