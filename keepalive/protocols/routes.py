"""What LM Studio serves: which route a request is for, which model it names, and how that route says no."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Final
from urllib.parse import unquote_to_bytes

from keepalive.core.errors import Reason
from keepalive.protocols import sse

# --- which route -----------------------------------------------------------------------------------


class Protocol(StrEnum):
    """How a route streams and words its errors."""

    CHAT = "chat"  # OpenAI chat completions
    COMPLETIONS = "completions"  # OpenAI completions
    RESPONSES = "responses"  # OpenAI responses
    MESSAGES = "messages"  # Anthropic messages
    NATIVE = "native"  # LM Studio /api/v1
    OPENAI = "openai"  # OpenAI's errors, never streamed: embeddings, listings
    PLAIN = "plain"  # anything else


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of request. `name` is a metric label: one of a fixed few, never from the request."""

    name: str
    protocol: Protocol
    inference: bool = False  # its body names a model that has to be loaded
    streams: bool = False  # may answer with server-sent events
    websocket: bool = False  # one of the namespaces of LM Studio's own SDKs
    changes: bool = False  # loads, unloads or downloads a model: what was listed before is stale


OTHER: Final = Route("other", Protocol.PLAIN)
_OTHER_OPENAI: Final = Route("other", Protocol.OPENAI)
_OTHER_NATIVE: Final = Route("other", Protocol.NATIVE)
_MODELS: Final = Route("models", Protocol.OPENAI)
_SDK: Final = Route("sdk", Protocol.PLAIN, websocket=True)

_ROUTES: Final = {
    (b"POST", b"/v1/chat/completions"): Route("chat", Protocol.CHAT, inference=True, streams=True),
    (b"POST", b"/v1/completions"): Route("completions", Protocol.COMPLETIONS, inference=True, streams=True),
    (b"POST", b"/v1/responses"): Route("responses", Protocol.RESPONSES, inference=True, streams=True),
    (b"POST", b"/v1/messages"): Route("messages", Protocol.MESSAGES, inference=True, streams=True),
    (b"POST", b"/v1/embeddings"): Route("embeddings", Protocol.OPENAI, inference=True),
    (b"GET", b"/v1/models"): _MODELS,
    (b"POST", b"/api/v0/chat/completions"): Route("v0_chat", Protocol.CHAT, inference=True, streams=True),
    (b"POST", b"/api/v0/completions"): Route(
        "v0_completions", Protocol.COMPLETIONS, inference=True, streams=True
    ),
    (b"POST", b"/api/v0/embeddings"): Route("v0_embeddings", Protocol.OPENAI, inference=True),
    (b"GET", b"/api/v0/models"): _MODELS,
    (b"POST", b"/api/v1/chat"): Route("native_chat", Protocol.NATIVE, inference=True, streams=True),
    (b"GET", b"/api/v1/models"): Route("models", Protocol.NATIVE),
    (b"POST", b"/api/v1/models/load"): Route("load", Protocol.NATIVE, changes=True),
    (b"POST", b"/api/v1/models/unload"): Route("unload", Protocol.NATIVE, changes=True),
    (b"POST", b"/api/v1/models/download"): Route("download", Protocol.NATIVE, changes=True),
    (b"GET", b"/lmstudio-greeting"): Route("greeting", Protocol.PLAIN),
} | {
    (b"GET", b"/" + namespace): _SDK
    for namespace in (b"llm", b"embedding", b"system", b"files", b"repository", b"diagnostics", b"plugins")
}


#: A request that the daemon itself asks in the name of a caller of its streaming prompt API.
PROMPTS: Final = Route("prompts", Protocol.CHAT, inference=True, streams=True)


def route_of(method: bytes, path: bytes) -> Route:
    """The route of a request; `path` is the raw target, with or without its query.

    Generous where LM Studio's router (Express) is: letter case, a trailing slash, escapes. A spelling that it
    serves and that we did not know would be a way past the keeper.
    """
    route = _ROUTES.get((method, path))
    if route is not None:
        return route
    path = re.sub(b"//+", b"/", unquote_to_bytes(path.partition(b"?")[0])).lower()
    route = _ROUTES.get((method, path.rstrip(b"/")))
    if route is not None:
        return route
    if path.startswith((b"/v1/", b"/api/v0/")):
        return _MODELS if method == b"GET" and path.startswith(b"/api/v0/models/") else _OTHER_OPENAI
    return _OTHER_NATIVE if path.startswith(b"/api/v1/") else OTHER


# --- which model -----------------------------------------------------------------------------------

#: Up to here a body is kept and parsed as a whole: exact, and quicker than looking for its keys.
SMALL_BODY: Final = 64 * 1024

# What a conversation is told by, beside its model. It is cut at this many bytes of each of them.
_OPENING: Final = ("system", "system_prompt", "instructions", "messages", "input", "prompt")
_OPENING_BYTES: Final = 64 * 1024
_KEYS: Final = frozenset(("model", "stream", *_OPENING))
_NAME_BYTES: Final = 4096  # nobody's model has a longer name


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request body asks for.

    `model` None: no string under that name, or a body that is not a JSON object. `conversation` is equal for
    the turns of one conversation (same model, same messages up to the first of the user), a digest that
    cannot be read back; None without a model or messages.
    """

    model: str | None = None
    stream: bool = False
    conversation: bytes | None = None


NOTHING_ASKED: Final = Asked()


class ModelFinder:
    """Reads what a JSON body asks for while it comes in, at the cost of looking at each byte about once.

    The last of several equal keys counts, as in `JSON.parse`, so the answer is there at the end and not
    before. Holds at most SMALL_BODY bytes, and then as many of each field that tells a conversation.

    Up to SMALL_BODY the answer is exactly that of a JSON parser. A larger body is only checked at its top
    level: one that is broken deeper inside may get an answer where a parser has none; LM Studio refuses it.
    """

    __slots__ = ("_decoder", "_parts", "_scan", "_size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._scan: _TopLevel | None = None
        self._decoder: codecs.IncrementalDecoder | None = None  # only where the body is not UTF-8

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body."""
        self._size += len(chunk)
        if self._scan is None:
            self._parts.append(chunk)
            if self._size <= SMALL_BODY:
                if len(self._parts) > 1024:  # a body of single bytes must not cost an object each
                    self._parts = [b"".join(self._parts)]
                return
            chunk = b"".join(self._parts)
            self._parts.clear()
            self._begin(chunk)
        self._look(chunk)

    def finish(self) -> Asked:
        """What the whole body asks for."""
        if self._scan is None:
            body = b"".join(self._parts)
            try:
                return _asked_by(_JSON.decode(_text(body)))
            except ValueError:
                return NOTHING_ASKED
            except RecursionError:
                # LM Studio's parser knows no such limit, so neither may we.
                self._begin(body)
                self._look(body)
        if self._decoder is not None:
            self._look(b"", last=True)
        return self._scan.asked() if self._scan is not None else NOTHING_ASKED

    def _begin(self, body: bytes) -> None:
        self._scan = _TopLevel()
        encoding = json.detect_encoding(body)
        if encoding != "utf-8":
            self._decoder = codecs.getincrementaldecoder(encoding)("replace")

    def _look(self, chunk: bytes, *, last: bool = False) -> None:
        if self._decoder is not None:
            chunk = self._decoder.decode(chunk, last).encode("utf-8", "replace")
        if self._scan is not None:
            self._scan.feed(chunk)


def read_body(body: bytes) -> Asked:
    """`ModelFinder` for a body that is there as a whole."""
    finder = ModelFinder()
    finder.feed(body)
    return finder.finish()


def _text(body: bytes) -> str:
    # Bytes that are no characters are replaced, as LM Studio's runtime does: they do not make a body invalid.
    return body.decode(json.detect_encoding(body), "replace")


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


# Python reads no integer of thousands of digits, JavaScript does; so every number is a float here.
_JSON: Final = json.JSONDecoder(parse_int=float, parse_constant=_refuse)


def _asked_by(body: object) -> Asked:
    if not isinstance(body, dict):
        return NOTHING_ASKED
    model = body.get("model")
    if not isinstance(model, str) or len(model) > _NAME_BYTES:
        return Asked(stream=body.get("stream") is True)
    return Asked(model, body.get("stream") is True, _conversation(model, body))


def _conversation(model: str, body: dict[str, object]) -> bytes | None:
    opening = [(name, part) for name in _OPENING if (part := _opening(body.get(name)))]
    if not opening:
        return None
    # ASCII by default, so that no text, not even half a surrogate pair, can fail to be encoded.
    text = json.dumps([model.casefold(), opening], separators=(",", ":"))
    return blake2b(text.encode(), digest_size=8).digest()


def _opening(value: object) -> object:
    """The part of a field that later turns repeat."""
    if isinstance(value, str):
        return value[:256]
    if isinstance(value, list):
        return _until_user(value)
    return None


def _until_user(messages: list[object] | Iterator[object]) -> list[object]:
    opening = []
    for message in messages:
        opening.append(message)
        if not isinstance(message, dict) or message.get("role") == "user":
            break
    return opening


class _TopLevel:
    """Walks through a JSON object, sees its own keys, and passes over everything deeper at the speed of C."""

    __slots__ = (
        "_depth",
        "_escaped",
        "_expect",
        "_keeps",
        "_key",
        "_limit",
        "_raw",
        "_string",
        "_taken",
        "_values",
    )

    # What has to come next at the top level.
    START, KEY_OR_END, KEY, COLON, VALUE, SCALAR, COMMA, END, BROKEN = range(9)

    # Possessive throughout: what was passed over is never tried again, so the cost is linear.
    SPACE: Final = re.compile(rb"[ \t\n\r]*+")
    SCALAR_BYTES: Final = re.compile(rb"[-+.0-9A-Za-z]*+")
    # To the end of a string, of the chunk, or to a backslash that is the chunk's last byte.
    STRING_REST: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
    # To the next bracket, or to a string that does not end in this chunk.
    NESTED: Final = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)

    def __init__(self) -> None:
        self._expect = self.START
        self._depth = 0  # of brackets inside the top-level object
        self._string = False  # inside a string that an earlier chunk began
        self._escaped = False  # and behind its backslash
        self._key = ""
        self._keeps = False  # the bytes of this key or value are wanted
        self._limit = 0
        self._raw = bytearray()
        self._taken = 0
        self._values: dict[str, bytes] = {}

    def feed(self, chunk: bytes) -> None:
        at = 0
        end = len(chunk)
        self._taken = 0  # from here on, bytes of this chunk belong to what is kept
        while at < end and self._expect != self.BROKEN:
            if self._string:
                at = self._pass_string(chunk, at)
            elif self._depth:
                at = self._pass_nested(chunk, at)
            else:
                at = self._step(chunk, at)
        if self._keeps:
            self._keep(chunk, end)

    def asked(self) -> Asked:
        if self._expect != self.END:
            return NOTHING_ASKED
        model = _parsed(self._values.get("model", b""))
        stream = self._values.get("stream") == b"true"
        if not isinstance(model, str) or len(model) > _NAME_BYTES:
            return Asked(stream=stream)
        body = {name: _leading(raw) for name in _OPENING if (raw := self._values.get(name)) is not None}
        return Asked(model, stream, _conversation(model, body))

    def _step(self, chunk: bytes, at: int) -> int:
        """One token of the top level; `at` stands outside of strings and brackets."""
        expect = self._expect
        if expect == self.SCALAR:
            at = _past(self.SCALAR_BYTES, chunk, at)
            if at < len(chunk):
                self._value_ended(chunk, at)
            return at
        at = _past(self.SPACE, chunk, at)
        if at == len(chunk):
            return at
        byte = chunk[at]
        if expect == self.VALUE:
            self._begin_to_keep(at, self._key in _KEYS, _OPENING_BYTES)
            if byte == 0x22:
                self._string = True
            elif byte in b"{[":
                self._depth = 1
            elif byte in b"-0123456789tfn":
                self._expect = self.SCALAR
            else:
                self._expect = self.BROKEN
        elif byte == 0x22 and expect in (self.KEY, self.KEY_OR_END):
            self._begin_to_keep(at, True, 256)  # enough for our own keys with every letter escaped
            self._string = True
        elif byte == 0x3A and expect == self.COLON:
            self._expect = self.VALUE
        elif byte == 0x2C and expect == self.COMMA:
            self._expect = self.KEY
        elif byte == 0x7D and expect in (self.COMMA, self.KEY_OR_END):
            self._expect = self.END
        elif byte == 0x7B and expect == self.START:
            self._expect = self.KEY_OR_END
        else:
            self._expect = self.BROKEN
        return at + 1

    def _pass_string(self, chunk: bytes, at: int) -> int:
        if self._escaped:
            self._escaped = False
            at += 1
        # A picture has no backslash: its end is found fastest by its quote alone.
        quote = chunk.find(b'"', at)
        if chunk.find(b"\\", at, quote if quote >= 0 else len(chunk)) >= 0:
            quote = _past(self.STRING_REST, chunk, at)
            if chunk[quote : quote + 1] == b"\\":
                self._escaped = True
                return quote + 1
        if not 0 <= quote < len(chunk):
            return len(chunk)
        self._string = False
        if not self._depth:
            if self._expect == self.VALUE:
                self._value_ended(chunk, quote + 1)
            else:
                self._key_ended(chunk, quote + 1)
        return quote + 1

    def _pass_nested(self, chunk: bytes, at: int) -> int:
        at = _past(self.NESTED, chunk, at)
        if at == len(chunk):
            return at
        byte = chunk[at]
        at += 1
        if byte == 0x22:
            self._string = True
        elif byte in b"{[":
            self._depth += 1
        else:
            self._depth -= 1
            if not self._depth:
                self._value_ended(chunk, at)
        return at

    def _begin_to_keep(self, at: int, keeps: bool, limit: int) -> None:
        self._keeps = keeps
        self._limit = limit
        self._taken = at
        self._raw.clear()

    def _keep(self, chunk: bytes, end: int) -> None:
        # One byte over the limit tells that something is missing.
        room = self._limit + 1 - len(self._raw)
        if room > 0:
            self._raw += chunk[self._taken : min(end, self._taken + room)]

    def _key_ended(self, chunk: bytes, end: int) -> None:
        self._keep(chunk, end)
        self._keeps = False
        self._expect = self.COLON
        key = _parsed(bytes(self._raw)) if len(self._raw) <= self._limit else None
        self._key = key if isinstance(key, str) else ""

    def _value_ended(self, chunk: bytes, end: int) -> None:
        self._expect = self.COMMA
        if self._keeps:
            self._keep(chunk, end)
            self._keeps = False
            self._values[self._key] = bytes(self._raw)


def _past(pattern: re.Pattern[bytes], chunk: bytes, at: int) -> int:
    match = pattern.match(chunk, at)
    return match.end() if match else at


def _parsed(raw: bytes) -> object:
    try:
        return _JSON.decode(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


_STRING_BEGIN: Final = re.compile(rb'"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*')
_ITEM_BEGIN: Final = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")


def _leading(raw: bytes) -> object:
    """What `_opening` needs of a value of which only the beginning may be there."""
    if raw.startswith(b"["):
        return _until_user(_leading_items(raw.decode("utf-8", "replace")))
    if raw.startswith(b'"') and (begin := _STRING_BEGIN.match(raw[:4096])):
        return _parsed(begin[0] + b'"')
    return None


def _leading_items(text: str) -> Iterator[object]:
    at = 1
    while True:
        begin = _ITEM_BEGIN.match(text, at)
        at = begin.end() if begin else at
        if text[at : at + 1] in ("]", ""):
            return
        try:
            item, at = _JSON.raw_decode(text, at)
        except (ValueError, RecursionError):
            # It goes on beyond what was kept, and so it will in the next turn.
            yield text[at : at + 4096]
            return
        yield item


# --- how it says no --------------------------------------------------------------------------------


def error_body(route: Route, status: int, message: str, code: str) -> bytes:
    """A JSON body in the layout of `route`: send it as `application/json`."""
    if route.protocol is Protocol.PLAIN:
        return _json({"error": message})
    return _json(_error(route.protocol, status, message, code))


def error_event(route: Route, message: str, code: str) -> bytes:
    """The end of a stream that failed, so that the official client of `route` raises.

    It has to stand at an event boundary, and nothing follows it but the proper end of the body: no `[DONE]`,
    no `message_stop`, no `chat.end`, because a client that waits only for those would think the answer whole.
    """
    body = _error(route.protocol, 500, message, code)
    match route.protocol:
        case Protocol.RESPONSES:
            # The documented event is flat, and what makes OpenAI's own client raise is `error`: both, then.
            body = {
                "type": "error",
                "code": code,
                "message": message,
                "param": None,
                "sequence_number": 0,
            } | body
            return sse.encode(_json(body).decode(), event="error")
        case Protocol.MESSAGES:
            return sse.encode(_json(body).decode(), event="error")
        case Protocol.NATIVE:
            return sse.encode(_json({"type": "error"} | body).decode(), event="error")
        case _:
            return sse.encode(_json(body).decode())


_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _error(protocol: Protocol, status: int, message: str, code: str) -> dict[str, object]:
    if protocol is Protocol.MESSAGES:
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    if protocol is Protocol.NATIVE:
        kind = "internal_error" if status >= 500 else "invalid_request"
        return {"error": {"type": kind, "message": message, "code": code}}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# --- how it asks for patience ----------------------------------------------------------------------

_SPACE_OR_CONTROL: Final = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029]+")


def heartbeat_comment(model: str, state: str, elapsed: float, eta: float | None) -> bytes:
    """A comment that every SSE reader skips; seconds, `eta` those still to go."""
    # The model's name is the client's own words here: it must not be able to end the line.
    name = _SPACE_OR_CONTROL.sub("_", model)
    to_go = "" if eta is None else f" eta={eta:.1f}"
    return sse.encode_comment(f"keepalive model={name} state={state} elapsed={elapsed:.1f}{to_go}")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What such a comment says."""

    model: str
    state: str
    elapsed: float
    eta: float | None


_HEARTBEAT: Final = re.compile(r"keepalive model=(\S+) state=(\w+) elapsed=(\d+\.\d)(?: eta=(\d+\.\d))?")


def read_heartbeat(comment: str) -> Heartbeat | None:
    """The same, from the text of a comment; None for somebody else's."""
    found = _HEARTBEAT.fullmatch(comment)
    if found is None:
        return None
    model, state, elapsed, to_go = found.groups()
    return Heartbeat(model, state, float(elapsed), None if to_go is None else float(to_go))


def heartbeat_reasoning(route: Route, model: str, state: str, elapsed: float, eta: float | None) -> bytes:
    """The same as text that chat programs show as reasoning; a comment where the route knows no such thing.

    Only chat completions take a chunk that belongs to nothing: the others open every stream with an event
    that may come once, and LM Studio will send it.
    """
    if route.protocol is not Protocol.CHAT:
        return heartbeat_comment(model, state, elapsed, eta)
    to_go = "" if eta is None else f", about {eta:.0f} s to go"
    text = f"{model} is {state}: {elapsed:.0f} s so far{to_go}.\n"
    chunk = {
        "id": "chatcmpl-keepalive",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": model,
        # No role: the first chunk of the answer brings it, and some clients join what comes twice.
        "choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}],
    }
    return sse.encode(_json(chunk).decode())


# --- what an answer says ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lost:
    """An answer that says the model is not there any more.

    `message` is ours, not the answer's. `retryable`: refused before anything was generated.
    """

    reason: Reason
    message: str
    retryable: bool


# LM Studio's status codes do not tell these apart, its words do; the first that occurs counts.
_LOST: Final = (
    ("the model has crashed", Lost(Reason.CRASHED, "the model has crashed", retryable=False)),
    (
        "model was unloaded while the request was still in queue",
        Lost(Reason.UNLOADED, "the model was unloaded while requests were waiting for it", retryable=True),
    ),
    (
        "model unloaded",
        Lost(Reason.UNLOADED, "the model was unloaded in the middle of an answer", retryable=False),
    ),
    (
        "model is unloaded",
        Lost(Reason.UNLOADED, "the model was unloaded in the middle of an answer", retryable=False),
    ),
    ("model reloaded", Lost(Reason.UNLOADED, "the model was reloaded under a request", retryable=True)),
    ("no models loaded", Lost(Reason.UNLOADED, "no model is loaded", retryable=True)),
)


def looks_lost(status: int, body: bytes) -> Lost | None:
    """Whether an error says that the model went away. `body` is that of an answer, or an error event's data.

    A 200 counts only with an `error` in it: an answer may well speak about crashes.
    """
    message = error_message(body)
    if message is None and status >= 400:
        message = body[:4096].decode("utf-8", "replace")
    if message is None:
        return None
    message = message.casefold()
    return next((lost for words, lost in _LOST if words in message), None)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event of a streamed chat completion says.

    `finished`: the answer is whole; `last`: and nothing comes after this event.
    """

    text: str = ""
    reasoning: str = ""
    finished: bool = False
    last: bool = False
    error: str | None = None
    code: str | None = None
    field: str | None = None


def chat_delta(data: str) -> Delta:
    """The data of an event of `POST /v1/chat/completions`. Raises ValueError when it is none."""
    if data.strip() == "[DONE]":
        return Delta(finished=True, last=True)
    try:
        event = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(event, dict):
        raise ValueError("no object")  # noqa: TRY004  one kind of error for all that is unreadable
    if "error" in event or event.get("type") == "error":
        told = chat_error(data.encode("utf-8", "replace"))
        if told.error is not None:
            return told
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    delta = choice.get("delta") if isinstance(choice, dict) else None
    return Delta(
        text=_text_of(delta, "content"),
        reasoning=_text_of(delta, "reasoning_content") or _text_of(delta, "reasoning"),
        finished=bool(_text_of(choice, "finish_reason")),
    )


def chat_error(body: bytes) -> Delta:
    """What an error says, be it an answer or the data of an event; nothing where `body` is no error."""
    message = error_message(body)
    if message is None:
        return Delta()
    error = json.loads(_text(body)).get("error")
    return Delta(error=message, code=_text_of(error, "code") or None, field=_text_of(error, "field") or None)


def _text_of(value: object, name: str) -> str:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def error_message(body: bytes) -> str | None:
    """What an error of any of LM Studio's layouts says; None when `body` is no error."""
    try:
        answer = json.loads(_text(body))
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if error is None and isinstance(answer.get("response"), dict):
        error = answer["response"].get("error")  # OpenAI's response.failed
    if isinstance(error, dict):
        error = error.get("message") or error.get("type") or ""
    if isinstance(error, str):
        return error
    message = answer.get("message")
    return message if answer.get("type") == "error" and isinstance(message, str) else None
