"""What chats begin with, and the smallest request that makes a model read it."""

from typing import Any

import pytest

from keepalive.protocols.openings import replay

SYSTEM = {"role": "system", "content": "You are a nurse."}
USER = {"role": "user", "content": "hi"}
DOT = {"role": "user", "content": "."}
TOOLS = [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize(
    ("body", "path", "sent"),
    [
        (
            {"messages": [SYSTEM], "tools": TOOLS},
            "/v1/chat/completions",
            {"messages": [SYSTEM, DOT], "tools": TOOLS, "max_tokens": 1, "stream": False},
        ),
        (
            {"messages": [SYSTEM, USER], "temperature": 0.7},
            "/v1/chat/completions",
            {"messages": [SYSTEM, USER], "temperature": 0.7, "max_tokens": 1, "stream": False},
        ),
        (
            {"system": "You are a nurse.", "tools": TOOLS},
            "/v1/messages",
            {
                "system": "You are a nurse.",
                "tools": TOOLS,
                "messages": [DOT],
                "max_tokens": 1,
                "stream": False,
            },
        ),
        (
            {"instructions": "You are a nurse."},
            "/v1/responses",
            {
                "instructions": "You are a nurse.",
                "input": ".",
                "max_output_tokens": 1,
                "stream": False,
                "store": False,
            },
        ),
        (
            {"system_prompt": "You are a nurse."},
            "/api/v1/chat",
            {
                "system_prompt": "You are a nurse.",
                "input": ".",
                "max_output_tokens": 1,
                "stream": False,
                "store": False,
            },
        ),
    ],
)
def test_an_opening_is_replayed_where_its_callers_ask_and_says_one_token(
    body: dict[str, Any], path: str, sent: dict[str, Any]
) -> None:
    assert replay(body) == (path, sent)


def test_what_a_recorded_request_says_of_its_answer_is_left_out() -> None:
    recorded = {
        "model": "gemma",
        "messages": [USER],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 4096,
        "n": 4,
        "ttl": 60,
        "store": True,
    }

    assert replay(recorded) == (
        "/v1/chat/completions",
        {"messages": [USER], "max_tokens": 1, "stream": False},
    )
