"""The opening of a chat, which is all before the first word of a user, tools included; and how it is replayed.

A model that has read it once keeps it in its prompt cache: what begins with the same is read from there on.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from keepalive.protocols.routes import Protocol

Body = Mapping[str, Any]

# What a user says in a replay. Most templates want a user; an opening that goes on with him shares all before him.
_SAID: Final = "."
_USER: Final = {"role": "user", "content": _SAID}
# Of a recorded request: how long and in which way it was to be answered, which changes nothing of what is read.
_NOT_READ: Final = frozenset(
    (
        "max_tokens", "max_completion_tokens", "max_output_tokens", "stream", "stream_options", "model", "n", "ttl",
        "store", "previous_response_id", "background",
    )
)  # fmt: skip


def replay(body: Body) -> tuple[str, Body]:
    """Path and body of the request that makes a model read this, and say as little as can be; its model is left out."""
    read = {name: value for name, value in body.items() if name not in _NOT_READ}
    if "system_prompt" in read:
        return "/api/v1/chat", {
            **read,
            "input": _SAID,
            "max_output_tokens": 1,
            "stream": False,
            "store": False,
        }
    if "messages" not in read and "instructions" in read:
        said = read.get("input", _SAID)
        return "/v1/responses", {
            **read,
            "input": said,
            "max_output_tokens": 1,
            "stream": False,
            "store": False,
        }
    messages = [*read.get("messages", ())]
    if not any(isinstance(message, Mapping) and message.get("role") == "user" for message in messages):
        messages.append(_USER)
    path = "/v1/messages" if _is_anthropic(read) else "/v1/chat/completions"
    return path, {**read, "messages": messages, "max_tokens": 1, "stream": False}


#: How the routes speak that openings are replayed on.
PROTOCOLS: Final = {
    "/v1/chat/completions": Protocol.CHAT,
    "/v1/messages": Protocol.MESSAGES,
    "/v1/responses": Protocol.RESPONSES,
    "/api/v1/chat": Protocol.NATIVE,
}


def _is_anthropic(body: Body) -> bool:
    """Its instructions stand beside the messages, and its tools say what they take in another word."""
    tools = body.get("tools")
    tools = tools if isinstance(tools, list) else ()
    return "system" in body or any(isinstance(tool, Mapping) and "input_schema" in tool for tool in tools)


# What a template may make words of, beside what is said.
_TOLD: Final = (
    "tools", "functions", "documents", "system", "chat_template_kwargs", "reasoning_effort", "reasoning", "thinking",
)  # fmt: skip
_INSTRUCTIONS: Final = {Protocol.RESPONSES: "instructions", Protocol.NATIVE: "system_prompt"}
_WORDS: Final = frozenset(("tools", "functions", "documents", "system", "messages"))


def opening(protocol: Protocol, body: object) -> Body | None:
    """What a request begins with, before the first word of a user; None where that is nothing."""
    if not isinstance(body, dict) or body.get("previous_response_id") is not None:
        return None
    told = {name: body[name] for name in _TOLD if name in body}
    if protocol in _INSTRUCTIONS:
        name = _INSTRUCTIONS[protocol]
        if not isinstance(body.get(name), str):
            return None
        if protocol is Protocol.NATIVE:
            return {name: body[name]}  # a closed schema, and its tools are another matter
        return {**told, name: body[name]}
    messages = body.get("messages")
    if protocol not in (Protocol.CHAT, Protocol.MESSAGES) or not isinstance(messages, list):
        return None
    before = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") == "user":
            break
        before.append(message)
    if before:
        told["messages"] = before
    return told if told.keys() & _WORDS else None


def written(body: Body) -> bytes | None:
    """An opening in bytes that are equal for equal ones, and can be sent; None where they cannot."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return None
