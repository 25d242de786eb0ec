"""What an answer says: its errors, in any of LM Studio's layouts, and the events of a chat."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keepalive.protocols import sse
from keepalive.protocols.json_text import text


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
    error = error_object(body)
    return Delta(error=message, code=error_code(error), field=_text_of(error, "field") or None)


def _text_of(value: object, name: str) -> str:
    found = value.get(name) if isinstance(value, Mapping) else None
    return found if isinstance(found, str) else ""


def error_message(body: bytes) -> str | None:
    """What an error of any of LM Studio's layouts says; None when `body` is no error."""
    return _message_of(_error_of(body))


def error_object(body: bytes) -> dict[str, object]:
    """Every field of such an error, `message` always among them; empty when `body` is no error."""
    error = _error_of(body)
    message = _message_of(error)
    if message is None:
        return {}
    return (error if isinstance(error, dict) else {}) | {"message": message}


def bare_error(body: bytes) -> dict[str, object]:
    """The same of a refusal that is the error itself, with nothing around it, as gateways write it.

    Only a status tells these from an answer that has such fields.
    """
    try:
        answer = json.loads(text(body), parse_constant=str)
    except (ValueError, RecursionError):
        return {}
    known = isinstance(answer, dict) and _text_of(answer, "message") and "error" not in answer
    return answer if known and (_text_of(answer, "code") or _text_of(answer, "type")) else {}


def _error_of(body: bytes) -> object:
    try:
        answer = json.loads(text(body), parse_constant=str)
    except (ValueError, RecursionError):
        return None
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]  # Google's, where a stream was asked for
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if error is None and isinstance(answer.get("response"), dict):
        error = answer["response"].get("error")  # OpenAI's response.failed
    if not isinstance(error, dict | str) and answer.get("type") == "error":
        told = {name: value for name, value in answer.items() if name not in ("type", "error")}
        return told if isinstance(answer.get("message"), str) else None  # OpenAI's flat event
    if error is None and answer.get("object") == "error" and isinstance(answer.get("message"), str):
        return {name: value for name, value in answer.items() if name != "object"}  # vLLM's, until 2025
    if answer.keys() == {"detail"}:
        return _detail(answer["detail"])  # of whatever is made with FastAPI
    return error


def _detail(detail: object) -> str | None:
    if isinstance(detail, list):
        told = [part for part in detail if isinstance(part, dict) and isinstance(part.get("msg"), str)]
        detail = "; ".join(_place(part.get("loc")) + part["msg"] for part in told) or None
    return detail if isinstance(detail, str) else None


def _place(where: object) -> str:
    return "/".join(map(str, where)) + ": " if isinstance(where, list) else ""


def _message_of(error: object) -> str | None:
    if isinstance(error, dict):
        error = error.get("message") or error.get("type") or ""
    return error if isinstance(error, str) else None


def event_error(stream: bytes) -> bytes:
    """The data of the first event of a stream, where that is an error; nothing where it is none."""
    try:
        events = sse.Decoder().feed(stream)
    except sse.EventTooLong:
        return b""
    first = next((event.data for event in events if isinstance(event, sse.Event)), "")
    data = first.encode("utf-8", "replace")
    return data if error_message(data) is not None else b""


# LM Studio and llama.cpp speak of the context in many words, MLX and vLLM of the prompt or of the model's length,
# SGLang and TensorRT of the input, TGI of its own fields, and gateways in one word. (Of "too many tokens" speaks who
# counts those of a minute, too.)
_NO_CONTEXT: Final = re.compile(
    r"context[ _]?(?:length|size|window|limit|overflow)|\bn_ctx\b|\bmax_(?:seq|model)_len\b|"
    r"\b(?:prompt|input) (?:is )?too long\b|\bmax(?:imum)? (?:model|sequence|prompt|input) length\b|"
    r"\b(?:prompt|input) (?:length|tokens?|token count)\b.{0,40}\bexceeds?\b|"
    r"`inputs` (?:tokens \+|must have less)|\breduce the length of\b",
    re.IGNORECASE,
)

#: What OpenAI calls a prompt that is too long. Agents shorten theirs when they read it, and at no other word.
CONTEXT_LENGTH_EXCEEDED: Final = "context_length_exceeded"


def error_code(error: Mapping[str, object]) -> str | None:
    """The `code` of an error, if it has one that is a word, and OpenAI's where a prompt was too long."""
    code, message = _text_of(error, "code"), _text_of(error, "message")
    told = (code, _text_of(error, "type"), message)
    # A load that is refused may speak of the context it was to have: no shorter prompt would help.
    if any(_NO_CONTEXT.search(said) for said in told) and not message.casefold().startswith("failed to load"):
        return CONTEXT_LENGTH_EXCEEDED
    return code or None


def _told_in(value: object) -> str | None:
    match value:
        case str():
            return value
        case [first, *_]:
            return _told_in(first)
        case dict():
            return next((told for name in _TOLD_IN if (told := _told_in(value.get(name)))), None)
    return None


_TITLE: Final = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)
_LINE: Final = 200


_TOLD_IN: Final = ("message", "msg", "detail", "title", "error", "errors")


def plain_words(body: bytes) -> str | None:
    """What an answer says in no layout of ours: its first line, the title of its page, or what a JSON object tells.

    Servers in between (nginx, a tunnel, a gateway) answer like that. None where it has no such words.
    """
    said = text(body[:4096])
    if said.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            said = _told_in(json.loads(text(body), parse_constant=str)) or said
    title = _TITLE.search(said)
    if title is not None:
        said = title[1]
    line = next((line for line in said.splitlines() if line.strip()), "")
    words = "".join(c for c in " ".join(line.split()) if c.isprintable())
    return words[:_LINE] if words and not words.startswith(("<", "{", "[", "data:", "event:")) else None
