"""The opening of a chat, which is all before the first word of a user, tools included; and how it is replayed.

A model that has read it once keeps it in its prompt cache: what begins with the same is read from there on.
"""

from collections.abc import Mapping
from typing import Any, Final

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
    # Only Anthropic's API has it beside the messages.
    path = "/v1/messages" if "system" in read else "/v1/chat/completions"
    return path, {**read, "messages": messages, "max_tokens": 1, "stream": False}
