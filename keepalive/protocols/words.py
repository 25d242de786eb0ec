"""What is ours to say to a caller, in the words of its route: how it says no, and how it asks for patience."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from keepalive.protocols import sse
from keepalive.protocols.answers import error_code
from keepalive.protocols.begun import Begun
from keepalive.protocols.routes import Heartbeat as HeartbeatMode
from keepalive.protocols.routes import Protocol, Route

NO_ERROR: Final[Mapping[str, object]] = MappingProxyType({})

# --- how it says no --------------------------------------------------------------------------------


def error_body(route: Route, status: int, message: str, code: str) -> bytes:
    """A JSON body in the layout of `route`: send it as `application/json`."""
    if route.protocol is Protocol.PLAIN:
        return _json({"error": message})
    return _json(_error(route.protocol, status, message, code))


def error_event(
    route: Route,
    message: str,
    code: str,
    *,
    status: int = 500,
    error: Mapping[str, object] = NO_ERROR,
    begun: Begun | None = None,
) -> bytes:
    """The end of a stream that failed, so that the official client of `route` raises.

    It has to stand at an event boundary, and nothing follows it but the proper end of the body: no `[DONE]`,
    no `message_stop`, no `chat.end`, because a client that waits only for those would think the answer whole.

    `error` is what the upstream said where it did: its fields are told as they are, since programs decide by
    them, and ours fill in for those of an upstream that had only a sentence. `begun` is what the caller has of
    the answer.
    """
    body = _error(route.protocol, status, message, code, error)
    match route.protocol:
        case Protocol.RESPONSES:
            begun = begun or Begun()
            number = begun.next_number
            # The documented event is flat, and what makes OpenAI's own client raise is `error`: both, then.
            flat = {
                "type": "error",
                "code": _text(error, "code") or error_code(error) or code,
                "message": message,
                "param": error.get("param"),
                "sequence_number": number + 1,
            } | body
            return response_failed(message, error_code(error) or code, begun) + sse.encode(
                _json(flat).decode(), event="error"
            )
        case Protocol.MESSAGES:
            return sse.encode(_json(body).decode(), event="error")
        case Protocol.NATIVE:
            return sse.encode(_json({"type": "error"} | body).decode(), event="error")
        case _:
            return sse.encode(_json(body).decode())


def response_failed(message: str, code: str, begun: Begun) -> bytes:
    """The event by which OpenAI's responses fail: Codex reads the reason here and nowhere else."""
    response = {
        "id": "resp_keepalive",
        "object": "response",
        "created_at": 0,
        "model": "",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        **begun.response(),
        "status": "failed",
        "error": {"code": code, "message": message},
        "incomplete_details": None,
    }
    event = {"type": "response.failed", "sequence_number": begun.next_number, "response": response}
    return sse.encode(_json(event).decode(), event="response.failed")


_REFUSALS: Final = {
    408: "too_slow",
    413: "too_large",
    414: "too_large",
    431: "too_large",
    500: "failed",
    503: "shutting_down",
}


def refusal_code(status: int) -> str:
    """The code of what ends a connection before there was a request."""
    return _REFUSALS.get(status, "bad_request")


_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _error(
    protocol: Protocol, status: int, message: str, code: str, error: Mapping[str, object] = NO_ERROR
) -> dict[str, object]:
    if len(error) > 1:
        # More than a sentence: an error of a layout, and whoever reads that route knows it.
        told = dict(error) | {"message": _text(error, "message") or message}
        if protocol is Protocol.MESSAGES:
            told = {"type": None} | told  # LiteLLM's may be null
            return {"type": "error", "error": told | {"type": told["type"] or _anthropic_type(status)}}
        return {"error": told}
    code = error_code(error) or code
    if protocol is Protocol.MESSAGES:
        return {"type": "error", "error": {"type": _anthropic_type(status), "message": message}}
    if protocol is Protocol.NATIVE:
        kind = "internal_error" if status >= 500 else "invalid_request"
        return {"error": {"type": kind, "message": message, "code": code}}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _anthropic_type(status: int) -> str:
    return _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def _text(error: Mapping[str, object], name: str) -> str:
    found = error.get(name)
    return found if isinstance(found, str) else ""


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# --- how it asks for patience ----------------------------------------------------------------------

_SPACE_OR_CONTROL: Final = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029]+")


def heartbeat_comment(
    model: str,
    state: str,
    elapsed: float,
    eta: float | None,
    silent: float | None = None,
    progress: float | None = None,
) -> bytes:
    """A comment that every SSE reader skips; seconds, `eta` those still to go.

    `silent`: an answer has begun, and nothing has come of it for so long. `progress`: of the load, from 0 to 1.
    """
    # The model's name is the client's own words here: it must not be able to end the line.
    name = _SPACE_OR_CONTROL.sub("_", model)
    to_go = "" if eta is None else f" eta={eta:.1f}"
    said = "" if silent is None else f" silent={silent:.1f}"
    done = "" if progress is None else f" progress={progress:.2f}"
    return sse.encode_comment(
        f"keepalive model={name} state={state} elapsed={elapsed:.1f}{to_go}{said}{done}"
    )


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What such a comment says."""

    model: str
    state: str
    elapsed: float
    eta: float | None
    silent: float | None = None
    progress: float | None = None


_HEARTBEAT: Final = re.compile(
    r"keepalive model=(\S+) state=(\w+) elapsed=(\d+\.\d)(?: eta=(\d+\.\d))?(?: silent=(\d+\.\d))?"
    r"(?: progress=(\d\.\d\d))?"
)


def read_heartbeat(comment: str) -> Heartbeat | None:
    """The same, from the text of a comment; None for somebody else's."""
    found = _HEARTBEAT.fullmatch(comment)
    if found is None:
        return None
    model, state, elapsed, *optional = found.groups()
    return Heartbeat(model, state, float(elapsed), *(None if one is None else float(one) for one in optional))


def no_heartbeat(mode: str) -> str:
    """What is said to a caller whose base URL names a mode that does not exist."""
    modes = ", ".join(f"/heartbeat/{known}" for known in HeartbeatMode)
    shown = mode if mode.isprintable() and len(mode) <= 40 else "that name"
    return (
        f"there is no heartbeat mode {shown!r}; a base URL begins its path with one of {modes}, or with none"
    )


# Whoever sits in front of a chat program knows none of our states, and "unknown" sounds like the end of it.
_TO_PEOPLE: Final = {
    "unknown": "being looked for",
    "cold": "waiting to be loaded",
    "backoff": "waiting to be tried again",
    "warm": "at work",
}


def told_people(state: str) -> str:
    """A model's state, in a sentence: it `is` that."""
    return _TO_PEOPLE.get(state, state)


def heartbeat_reasoning(
    route: Route, model: str, state: str, elapsed: float, eta: float | None, progress: float | None = None
) -> bytes:
    """The same as text that chat programs show as reasoning; a comment where the route knows no such thing.

    Only chat completions take a chunk that belongs to nothing: the others open every stream with an event
    that may come once, and LM Studio will send it.
    """
    if route.protocol is not Protocol.CHAT:
        return heartbeat_comment(model, state, elapsed, eta, progress=progress)
    to_go = "" if eta is None else f", about {eta:.0f} s to go"
    done = "" if progress is None else f", {progress:.0%} done"
    text = f"{model} is {told_people(state)}: {elapsed:.0f} s so far{done}{to_go}.\n"
    chunk = {
        "id": "chatcmpl-keepalive",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": model,
        # No role: the first chunk of the answer brings it, and some clients join what comes twice.
        "choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}],
    }
    return sse.encode(_json(chunk).decode())
