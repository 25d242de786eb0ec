"""Which model a body names, whether it wants a stream, and which conversation it goes on with."""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from keepalive.protocols.json_text import JSON, parsed, read, text
from keepalive.protocols.toplevel import TopLevel

#: Up to here a body is kept and parsed as a whole: exact, and quicker than looking for its keys.
SMALL_BODY: Final = 64 * 1024

# What a conversation is told by, beside its model. It is cut at this many bytes of each of them.
_OPENING: Final = ("system", "system_prompt", "instructions", "messages", "input", "prompt")
_OPENING_BYTES: Final = 64 * 1024
_PREVIOUS: Final = "previous_response_id"
_KEYS: Final = frozenset(("model", "stream", "instance_id", _PREVIOUS, *_OPENING))
NAME_BYTES: Final = 4096  # nobody's model has a longer name


# Not frozen, though nobody changes one: it is made for each request, and a frozen one takes four times as long.
@dataclass(slots=True)
class Asked:
    """What a request body asks for.

    `model` None: no string under that name, or a body that is not a JSON object. `conversation` is equal for
    the turns of one conversation (same model, same messages up to the first of the user), a digest that
    cannot be read back; None without a model or messages.
    """

    model: str | None = None
    stream: bool = False
    conversation: bytes | None = None
    #: The answer that this one goes on from.
    previous: str | None = None
    #: The instance that is to be unloaded.
    instance: str | None = None
    #: It is a JSON object.
    readable: bool = False
    #: What stands under `model` can be nobody's name.
    misnamed: bool = False


NOTHING_ASKED: Final = Asked()
#: LM Studio's parser takes it for an empty object, so whatever is loaded may answer.
NO_BODY: Final = Asked(readable=True)


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
        self._scan: TopLevel | None = None
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
                return _asked_whole(body)
            except RecursionError:
                # LM Studio's parser knows no such limit, so neither may we.
                self._begin(body)
                self._look(body)
        if self._decoder is not None:
            self._look(b"", last=True)
        if self._scan is None or not self._scan.complete:
            return NOTHING_ASKED
        return _asked_by_parts(self._scan.values)

    def _begin(self, body: bytes) -> None:
        self._scan = TopLevel(_KEYS, _OPENING_BYTES)
        encoding = json.detect_encoding(body)
        if encoding != "utf-8":
            self._decoder = codecs.getincrementaldecoder(encoding)("replace")

    def _look(self, chunk: bytes, *, last: bool = False) -> None:
        if self._decoder is not None:
            chunk = self._decoder.decode(chunk, last).encode("utf-8", "replace")
        if self._scan is not None:
            self._scan.feed(chunk)


def read_body(body: bytes, *, conversation: bool = True) -> Asked:
    """`ModelFinder` for a body that is there as a whole; without the `conversation` where nobody needs it."""
    if len(body) <= SMALL_BODY:
        try:
            return _asked_whole(body, conversation=conversation)
        except RecursionError:
            pass
    finder = ModelFinder()
    finder.feed(body)
    return finder.finish()


def _asked_whole(body: bytes, *, conversation: bool = True) -> Asked:
    try:
        found = read(text(body))
    except ValueError:
        return NOTHING_ASKED
    if not isinstance(found, dict):
        return NOTHING_ASKED
    model = found.get("model")
    misnamed = model is not None and not _is_name(model)
    return _asked(model, found.get("stream") is True, found, misnamed=misnamed, conversation=conversation)


def _asked(
    model: object, stream: bool, body: dict[str, object], *, misnamed: bool, conversation: bool = True
) -> Asked:
    named = model if isinstance(model, str) and not misnamed else None
    previous, instance = body.get(_PREVIOUS), body.get("instance_id")
    return Asked(
        named,
        stream,
        _conversation(named, body) if conversation and named is not None else None,
        None if previous is None else _name(previous),
        None if instance is None else _name(instance),
        readable=True,
        misnamed=misnamed,
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= NAME_BYTES


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and len(value) <= NAME_BYTES else None


def _asked_by_parts(values: Mapping[str, bytes]) -> Asked:
    """The same, by the raw values of `_KEYS`, of which the beginning is there."""
    raw = values.get("model", b"null")
    model = parsed(raw)
    body = {name: _leading(part) for name in _OPENING if (part := values.get(name)) is not None}
    body |= {name: parsed(values[name]) for name in (_PREVIOUS, "instance_id") if name in values}
    return _asked(
        model, values.get("stream") == b"true", body, misnamed=raw != b"null" and not _is_name(model)
    )


def _conversation(model: str, body: dict[str, object]) -> bytes | None:
    opening = [(name, part) for name in _OPENING if (part := _opening(body.get(name)))]
    if not opening:
        return None
    # Half a surrogate pair is written as an escape, so that no text can fail to be encoded.
    return blake2b(repr((model.casefold(), opening)).encode(), digest_size=8).digest()


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


_STRING_BEGIN: Final = re.compile(rb'"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*')
_ITEM_BEGIN: Final = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")


def _leading(raw: bytes) -> object:
    """What `_opening` needs of a value of which only the beginning may be there."""
    if raw.startswith(b"["):
        return _until_user(_leading_items(raw.decode("utf-8", "replace")))
    if raw.startswith(b'"') and (begin := _STRING_BEGIN.match(raw[:4096])):
        return parsed(begin[0] + b'"')
    return None


def _leading_items(raw: str) -> Iterator[object]:
    at = 1
    while True:
        begin = _ITEM_BEGIN.match(raw, at)
        at = begin.end() if begin else at
        if raw[at : at + 1] in ("]", ""):
            return
        try:
            item, at = JSON.raw_decode(raw, at)
        except (ValueError, RecursionError):
            # It goes on beyond what was kept, and so it will in the next turn.
            yield raw[at : at + 4096]
            return
        yield item
