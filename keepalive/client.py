"""The daemon from an application in Python: prompts and chats as asynchronous streams.

    async with Client("http://127.0.0.1:1235") as client:
        async for event in client.stream_prompt(28, {"topic": "SSE"}):
            match event:
                case ModelLoading():
                    print(event.message, f"{event.elapsed_seconds:.0f} s so far")
                case Chunk():
                    print(event.text, end="")

Rules:
- A stream ends with `Done`, or it raises: half an answer is never taken for a whole one.
- The daemon hears at once when a stream is left: by `break`, `aclose()` or a cancelled task. Whoever keeps the
  generator in a variable says so with `contextlib.aclosing`, as with any asynchronous generator.
- Nothing has a total time limit, since a model may take its time; `idle_timeout` bounds silence, where wanted.

ClientError
├── ConnectionFailed   nobody answered
├── RequestRefused     an error instead of a stream: `status`, `code`, `field`, `retry_after`
├── AnswerFailed       an error within the stream: `code`
└── StreamBroken       the stream ended before its end, or cannot be read
"""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import aiohttp

from keepalive.core.errors import KeepaliveError
from keepalive.protocols import answers, sse, words

#: Of an answer that is no stream.
ANSWER_BYTES: Final = 4 * 1024 * 1024

Value = str | int | float | bool


class ClientError(KeepaliveError):
    """A request to the daemon came to nothing."""


class ConnectionFailed(ClientError):
    """Nobody answered: no connection, or none that lasted until an answer began."""


class RequestRefused(ClientError):
    """The daemon, or what stands before it, said no. `field` is what to mend in the request."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.retry_after = retry_after  # seconds


class AnswerFailed(ClientError):
    """The answer ended in an error: what came before it is not the whole."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class StreamBroken(ClientError):
    """The connection ended before the answer did, or brought what is no stream of the daemon."""


@dataclass(frozen=True, slots=True)
class Start:
    """The daemon has accepted the prompt. A prompt that came with its text has no id and no title."""

    prompt_id: int | str | None
    prompt_title: str | None
    model: str
    model_name: str
    instance_id: str


@dataclass(frozen=True, slots=True)
class ModelLoading:
    """The model is not ready yet; told about once a second. `expected_seconds`: the whole wait, where known."""

    message: str
    elapsed_seconds: float
    expected_seconds: float | None
    progress: float | None = None  # from 0 to 1, where LM Studio tells it


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers; no part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of the answer, counted from 1."""

    text: str
    number: int


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is whole."""

    chunks: int
    seconds: float
    characters: int


Event = Start | ModelLoading | Reasoning | Chunk | Done


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the daemon's config."""

    id: int | str
    title: str
    model: str
    variables: tuple[str, ...]
    max_tokens: int | None


class Client:
    """A daemon at `url`, which may end in `/v1`. `key` is one of its client keys, where it has any."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:1235",
        *,
        key: str | None = None,
        connect_timeout: float = 10.0,
        idle_timeout: float | None = None,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Accept-Encoding": "identity"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=connect_timeout, sock_read=idle_timeout
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends every stream that is still open."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def stream_prompt(
        self,
        prompt_id: int | str | None = None,
        variables: Mapping[str, Value] | None = None,
        *,
        prompt: str | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        first_chunk_timeout: float | None = None,
    ) -> AsyncGenerator[Event]:
        """A prompt of the config, or one that brings its text and its model: `Start` to `Done`.

        `model` is asked instead of the prompt's own. `first_chunk_timeout` is in seconds.
        """
        body = {
            "promptId": prompt_id,
            "prompt": prompt,
            "modelId": model,
            "variables": variables,
            "maxTokens": max_tokens,
            "timeout": None if first_chunk_timeout is None else first_chunk_timeout * 1000,
        }
        async with contextlib.aclosing(self._stream("/api/prompts/execute/stream", body)) as items:
            async for item in items:
                if not isinstance(item, sse.Event):
                    continue
                event = _event(item.data)
                if event is not None:
                    yield event
                if isinstance(event, Done):
                    return
        raise StreamBroken("the stream ended before the answer was whole")

    async def stream_chat(
        self, model: str, messages: Iterable[Mapping[str, Any]], **options: Any
    ) -> AsyncGenerator[ModelLoading | Reasoning | Chunk | Done]:
        """A chat completion, told in the events of a prompt. `options` are the route's, such as `max_tokens`.

        What the daemon says in comments while the model loads becomes `ModelLoading`, too.
        """
        body = {**options, "model": model, "messages": list(messages), "stream": True}
        began = asyncio.get_running_loop().time()
        chunks = characters = 0
        whole = last = False
        async with contextlib.aclosing(self._stream("/v1/chat/completions", body)) as items:
            try:
                async for item in items:
                    if isinstance(item, sse.Comment):
                        heartbeat = words.read_heartbeat(item.text)
                        if heartbeat is not None and heartbeat.state != "warm":
                            yield _loading(heartbeat)
                        continue
                    if last:
                        continue  # up to the end of the body, or the daemon would think that we left
                    delta = _delta(item.data)
                    if delta.reasoning:
                        yield Reasoning(delta.reasoning)
                    if delta.text:
                        chunks += 1
                        characters += len(delta.text)
                        yield Chunk(delta.text, chunks)
                    whole, last = whole or delta.finished, delta.last
            except StreamBroken:
                if not last:
                    raise
        if not whole:
            raise StreamBroken("the stream ended before the answer was whole")
        yield Done(chunks, asyncio.get_running_loop().time() - began, characters)

    async def prompts(self) -> list[Prompt]:
        """The prompts of the daemon's config."""
        found = await self._ask("GET", "/api/prompts")
        with _readable():
            return [
                Prompt(p["id"], p["title"], p["model"], tuple(p["variables"]), p["maxTokens"]) for p in found
            ]

    async def warmup(self, model: str, *, wait: float | None = None) -> float:
        """Waits until a model is loaded and has answered: for `wait` seconds, or as long as the daemon would.

        Returns how many seconds it took. Raises RequestRefused, whose `retry_after` says when to ask again.
        """
        prefer = {} if wait is None else {"Prefer": f"wait={math.ceil(wait)}"}
        data = await self._ask("POST", "/api/models/warmup", {"modelId": model}, prefer)
        with _readable():
            return float(data["warmupDuration"] / 1000)

    # --- over the wire ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        if self._session is None:
            # As many connections as streams, and none is kept: it may be closed already when it is needed, and
            # what loads a model must not be sent twice.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=self._timeout,
            )
        data = None if body is None else json.dumps(body).encode()
        sent = {**self._headers, **headers} | ({} if data is None else {"Content-Type": "application/json"})
        try:
            answer = await self._session.request(
                method, self._url + path, data=data, headers=sent, allow_redirects=False
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ConnectionFailed(f"{self._url} does not answer: {_why(error)}") from error
        try:
            yield answer
        except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:
            # A RuntimeError is aiohttp's word for a connection that was closed on this side, by `aclose`.
            raise StreamBroken(f"the connection ended before the answer did: {_why(error)}") from error
        finally:
            # At once, whatever is still to come.
            answer.close()

    async def _stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[sse.Event | sse.Comment]:
        body = {name: value for name, value in body.items() if value is not None}
        # Patience is asked for in comments: as text it could not be told from the answer.
        headers = {"X-Keepalive-Heartbeat": "comment", "Accept": "text/event-stream"}
        async with self._answer("POST", path, body, headers) as answer:
            if answer.status != 200 or answer.content_type != "text/event-stream":
                raise _refusal(answer, await _read(answer))
            decoder = sse.Decoder()
            async for piece in answer.content.iter_any():
                try:
                    items = decoder.feed(piece)
                except sse.EventTooLong as error:
                    raise StreamBroken(str(error)) from error
                for item in items:
                    yield item

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        async with self._answer(method, path, body, headers or {}) as answer:
            read = await _read(answer)
            if answer.status != 200 or answers.chat_error(read).error is not None:
                raise _refusal(answer, read)
        with _readable():
            return json.loads(read)["data"]


def _event(data: str) -> Event | None:
    """None for a kind of event that came into the world later than this client."""
    with _readable():
        told = json.loads(data)
        match told["type"]:
            case "start":
                return Start(
                    told["promptId"],
                    told["promptTitle"],
                    told["modelId"],
                    told["modelName"],
                    told["lmStudioModelId"],
                )
            case "model_loading":
                expected = told["estimatedTime"]
                return ModelLoading(
                    told["message"],
                    told["elapsed"] / 1000,
                    None if expected is None else expected / 1000,
                    told.get("progress"),
                )
            case "reasoning":
                return Reasoning(told["content"])
            case "chunk":
                return Chunk(told["content"], told["chunkNumber"])
            case "done":
                return Done(told["totalChunks"], told["duration"] / 1000, told["outputLength"])
            case "error":
                raise AnswerFailed(told["message"], told.get("code"))
            case _:
                return None


def _delta(data: str) -> answers.Delta:
    with _readable():
        delta = answers.chat_delta(data)
    if delta.error is not None:
        raise AnswerFailed(delta.error, delta.code)
    return delta


def _loading(heartbeat: words.Heartbeat) -> ModelLoading:
    to_go, elapsed = heartbeat.eta, heartbeat.elapsed
    return ModelLoading(
        f"{heartbeat.model} is {heartbeat.state}",
        elapsed,
        None if to_go is None else elapsed + to_go,
        heartbeat.progress,
    )


def _refusal(answer: aiohttp.ClientResponse, body: bytes) -> RequestRefused:
    """What an answer says that is not the one asked for: in the layout of the daemon, of OpenAI, or of neither."""
    told = answers.chat_error(body)
    after = answer.headers.get("Retry-After", "")
    return RequestRefused(
        told.error or f"the answer is {answer.status} {answer.reason or ''}".rstrip(),
        status=answer.status,
        code=told.code,
        field=told.field,
        retry_after=float(after) if after.isdecimal() else None,
    )


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > ANSWER_BYTES:
            raise StreamBroken(f"the answer is larger than {ANSWER_BYTES} bytes")
    return bytes(body)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Around what takes apart what came: all that can be wrong with it is one kind of error."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StreamBroken("what came is not what a daemon sends") from error


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
