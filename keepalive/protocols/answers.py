"""What an answer says: its errors, in any of LM Studio's layouts, and the events of a chat."""

import json
from dataclasses import dataclass

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
    error = json.loads(text(body)).get("error")
    return Delta(error=message, code=_text_of(error, "code") or None, field=_text_of(error, "field") or None)


def _text_of(value: object, name: str) -> str:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def error_message(body: bytes) -> str | None:
    """What an error of any of LM Studio's layouts says; None when `body` is no error."""
    try:
        answer = json.loads(text(body))
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
