"""One HTTP exchange as the simulator sees it, without sockets: a request, a reply, and the ways to get none.

`body` of a reply is bytes, or an async iterator that may raise `Cut` part way through. Whoever reads such an
iterator must `aclose()` it when the client has gone: that is how the simulator learns of it.
"""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

JSON_TYPE = "application/json; charset=utf-8"
SSE_TYPE = "text/event-stream; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # as it was sent, percent-encoding included: model keys hold slashes
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)  # names in lower case
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes | AsyncIterator[bytes] = b""
    close: bool = False  # the connection ends after this reply, although no header says so

    async def read(self) -> bytes:
        """The whole body. Raises `Cut` when the simulated connection breaks before its end."""
        if isinstance(self.body, bytes):
            return self.body
        return b"".join([piece async for piece in self.body])

    async def json(self) -> Any:
        return json.loads(await self.read())


class Cut(Exception):
    """The connection breaks: `fin` (ends without the closing chunk), `rst`, or `refused` (nobody listens)."""

    def __init__(self, how: Literal["fin", "rst", "refused"]) -> None:
        super().__init__(how)
        self.how = how


class Hang(Exception):
    """This request gets no answer, ever. `Studio.handle` then waits until it is cancelled or restarted."""


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_reply(payload: Any, status: int = 200) -> Reply:
    return Reply(status, {"Content-Type": JSON_TYPE}, compact(payload).encode())


def text_reply(text: str, status: int = 200, content_type: str = "text/plain; charset=utf-8") -> Reply:
    return Reply(status, {"Content-Type": content_type}, text.encode())


class Refusal(Exception):
    """Another answer than the one asked for: `reply` when nothing was sent yet, `message` and the further `fields`
    of its error inside a running stream."""

    def __init__(self, reply: Reply, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message
        self.fields = fields


# The three layouts in which LM Studio reports errors; which one comes depends on the route and the error.


def flat(status: int, message: str) -> Refusal:
    return Refusal(json_reply({"error": message}, status), message)


def openai_error(
    status: int,
    message: str,
    *,
    code: str | None,
    param: str | None = None,
    kind: str = "invalid_request_error",
) -> Refusal:
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Refusal(json_reply({"error": error}, status), message)


def context_exceeded(n_ctx: int, n_prompt_tokens: int) -> Refusal:
    """As llama.cpp tells it, with what agents read to know how much to leave out; the same on every route."""
    message = (
        f"request ({n_prompt_tokens} tokens) exceeds the available context size ({n_ctx} tokens), "
        f"try increasing it"
    )
    error = {
        "code": "context_length_exceeded",
        "type": "exceed_context_size_error",
        "n_ctx": n_ctx,
        "n_prompt_tokens": n_prompt_tokens,
    }
    return Refusal(json_reply({"error": {**error, "message": message}}, 400), message, **error)


def native_error(
    status: int, kind: str, message: str, *, code: str | None = None, param: str | None = None
) -> Refusal:
    error: dict[str, Any] = {"type": kind, "message": message}
    if code is not None:
        error["code"] = code
    if param is not None:
        error["param"] = param
    return Refusal(json_reply({"error": error}, status), message)


def loading_model(retry_after: int) -> Reply:
    """What llama-server says on every path until its model is loaded."""
    error = {"message": "Loading model", "type": "unavailable_error", "code": 503}
    reply = json_reply({"error": error}, 503)
    return (
        replace(reply, headers={**reply.headers, "Retry-After": str(retry_after)}) if retry_after else reply
    )


HTML_500 = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Error</title>\n</head>\n'
    "<body>\n<pre>Internal Server Error</pre>\n</body>\n</html>\n"
)


def html_500() -> Reply:
    return text_reply(HTML_500, 500, "text/html; charset=utf-8")


def spoiled(how: str, true_reply: Reply) -> Reply:
    """What becomes of a reply under the faults that several routes share."""
    match how:
        case "error_200":
            return json_reply({"error": "Something went wrong inside, and the status does not say so."})
        case "error_500":
            return json_reply({"error": {"message": "Internal error.", "type": "internal_error"}}, 500)
        case "html_500":
            return html_500()
        case "empty_body":
            return Reply(true_reply.status, true_reply.headers, b"")
        case "truncated_json" if isinstance(true_reply.body, bytes):
            half = true_reply.body[: len(true_reply.body) // 2]
            return Reply(true_reply.status, true_reply.headers, half)
        case "hang":
            raise Hang
        case "fin":
            raise Cut("fin")
        case "rst":
            raise Cut("rst")
    return true_reply
