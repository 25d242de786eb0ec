"""What LM Studio's own SDKs say on their WebSockets, as far as it is about models: what is to be loaded, what is used,
and when that is over.

Messages are JSON objects; calls and channels are told apart by numbers that the caller chooses. What is not known here
means nothing, as the protocol asks of both its ends.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from keepalive.protocols.json_text import parsed

#: A call or channel of one connection: which of both, and its number.
Id = tuple[str, float]

# Callers' numbers are JavaScript's, here and there; above this they are not to the unit.
_EXACT: Final = 2**53
_USES: Final = frozenset(("predict", "completeRawText", "embedString"))
# Only a message with one of these words is worth parsing; most are fragments of an answer.
_SAID: Final = (
    b"channelCreate",
    b"rpcCall",
    b"keepAlive",
    b"cancel",
)
_ANSWERED: Final = (
    b"channelClose",
    b"channelError",
    b"rpcResult",
    b"rpcError",
    b"success",
    b"instanceReference",
)


class Wish(StrEnum):
    OTHER = "other"
    KEEP_ALIVE = "keep_alive"
    GET_OR_LOAD = "get_or_load"  # the model, loaded where it is not
    LOAD = "load"  # one more copy
    UNLOAD = "unload"
    USE = "use"  # an answer of a model
    CANCEL = "cancel"  # of a channel


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a caller. A model goes by a `name` (key or identifier), or by the `reference` of an instance.

    Whatever has an `id` is under way until an answer ends it.
    """

    wish: Wish = Wish.OTHER
    id: Id | None = None
    name: str | None = None
    reference: str | None = None
    #: Asks for nothing but the model, as far as it is about a load.
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """An instance, as LM Studio shows it."""

    reference: str
    identifier: str
    key: str | None


@dataclass(frozen=True, slots=True)
class Answered:
    """One message of LM Studio. `ended` is what it ends, well or not."""

    ended: Id | None = None
    well: bool = False
    instances: tuple[Shown, ...] = ()


_NOTHING_SAID: Final = Said()
_NOTHING_ANSWERED: Final = Answered()


def said(text: bytes) -> Said:
    if not any(word in text for word in _SAID):
        return _NOTHING_SAID
    message = _object(parsed(text))
    match message.get("type"):
        case "keepAlive":
            return Said(Wish.KEEP_ALIVE)
        case "channelCreate":
            return _asked(
                _id(message, "channelId"), message.get("endpoint"), message.get("creationParameter")
            )
        case "rpcCall":
            return _asked(_id(message, "callId"), message.get("endpoint"), message.get("parameter"))
        case "channelSend" if _object(message.get("message")).get("type") == "cancel":
            return Said(Wish.CANCEL, _id(message, "channelId"))
    return _NOTHING_SAID


def _asked(ident: Id | None, endpoint: object, parameter: object) -> Said:
    wanted = _object(parameter)
    if endpoint == "getOrLoad":
        plain = not any(_fields(wanted.get("loadConfigStack")))
        return Said(Wish.GET_OR_LOAD, ident, _text(wanted.get("identifier")), plain=plain)
    if endpoint == "loadModel":
        return Said(Wish.LOAD, ident, _text(wanted.get("modelKey")))
    if endpoint == "unloadModel":
        return Said(Wish.UNLOAD, ident, _text(wanted.get("identifier")))
    if endpoint not in _USES:
        return Said(id=ident)
    specifier = _object(wanted.get("modelSpecifier"))
    query = _object(specifier.get("query"))
    # By a `path` it may be any: what LM Studio lists has keys, and tells of no paths.
    return Said(Wish.USE, ident, _text(query.get("identifier")), _text(specifier.get("instanceReference")))


def _fields(stack: object) -> Iterator[object]:
    """What a load is to be made with."""
    layers = _object(stack).get("layers")
    for layer in layers if isinstance(layers, list) else ():
        yield _object(_object(layer).get("config")).get("fields")


def load_progress(ident: Id, progress: float) -> bytes | None:
    """What LM Studio says meanwhile to whoever waits for `getOrLoad`; None where his number cannot be said again."""
    number = int(ident[1])
    if number != ident[1] or abs(number) > _EXACT:
        return None
    told = {"type": "loadProgress", "progress": round(progress, 3)}
    message = {"type": "channelSend", "channelId": number, "message": told}
    return json.dumps(message, separators=(",", ":")).encode()


def answered(text: bytes) -> Answered:
    if not any(word in text for word in _ANSWERED):
        return _NOTHING_ANSWERED
    message = _object(parsed(text))
    match message.get("type"):
        case "channelSend":
            content = _object(message.get("message"))
            ended = _id(message, "channelId") if content.get("type") == "success" else None
            return Answered(ended, ended is not None, tuple(_instances(content)))
        case "channelClose" | "channelError":
            return Answered(_id(message, "channelId"))
        case "rpcResult":
            result = message.get("result")
            return Answered(_id(message, "callId"), True, tuple(_instances(result)))
        case "rpcError":
            return Answered(_id(message, "callId"))
    return _NOTHING_ANSWERED


def _instances(value: object) -> Iterator[Shown]:
    """Those in a listing, and in what tells of one load."""
    rows = (
        value
        if isinstance(value, list)
        else [value, _object(value).get("info"), _object(value).get("modelInfo")]
    )
    for row in map(_object, rows):
        reference, identifier = _text(row.get("instanceReference")), _text(row.get("identifier"))
        if reference and identifier:
            yield Shown(reference, identifier, _text(row.get("modelKey")))


def _id(message: dict[str, Any], field: str) -> Id | None:
    number = message.get(field)
    return (field, number) if isinstance(number, float) else None


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
