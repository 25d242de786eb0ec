"""What chats begin with, and the smallest request that makes a model read it."""

from typing import Any

import pytest

from keepalive.protocols.openings import PROTOCOLS, opening, replay, written
from keepalive.protocols.routes import Protocol, route_of

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


CHAT = Protocol.CHAT
SCHEMA = [{"name": "look", "input_schema": {"type": "object"}}]


@pytest.mark.parametrize(
    ("protocol", "body", "found"),
    [
        (CHAT, {"messages": [SYSTEM, USER, SYSTEM], "temperature": 1, "model": "m"}, {"messages": [SYSTEM]}),
        (CHAT, {"messages": [USER], "tools": TOOLS}, {"tools": TOOLS}),
        (
            CHAT,
            {"messages": [SYSTEM, USER], "chat_template_kwargs": {"thinking": False}},
            {"chat_template_kwargs": {"thinking": False}, "messages": [SYSTEM]},
        ),
        (Protocol.MESSAGES, {"system": "x", "messages": [USER], "max_tokens": 9}, {"system": "x"}),
        (
            Protocol.RESPONSES,
            {"instructions": "x", "input": "hi", "tools": TOOLS},
            {"tools": TOOLS, "instructions": "x"},
        ),
        (Protocol.NATIVE, {"system_prompt": "x", "input": "hi", "tools": []}, {"system_prompt": "x"}),
        (CHAT, {"messages": [USER]}, None),
        (CHAT, {"messages": [USER], "reasoning_effort": "low"}, None),
        (CHAT, {"messages": ["hi", SYSTEM]}, None),
        (CHAT, {"messages": {}}, None),
        (CHAT, [SYSTEM], None),
        (CHAT, {}, None),
        (Protocol.RESPONSES, {"input": "hi"}, None),
        (Protocol.RESPONSES, {"instructions": "x", "previous_response_id": "resp_1"}, None),
        (Protocol.COMPLETIONS, {"prompt": "x"}, None),
        (Protocol.OPENAI, {"input": "x"}, None),
    ],
)
def test_an_opening_is_all_before_the_first_word_of_a_user(protocol: Protocol, body: Any, found: Any) -> None:
    assert opening(protocol, body) == found


@pytest.mark.parametrize(
    ("protocol", "body"),
    [
        (CHAT, {"messages": [SYSTEM, USER], "tools": TOOLS}),
        (Protocol.MESSAGES, {"system": "x", "messages": [USER], "tools": SCHEMA}),
        (Protocol.MESSAGES, {"messages": [USER], "tools": SCHEMA}),
        (Protocol.RESPONSES, {"instructions": "x", "input": "hi", "tools": TOOLS}),
        (Protocol.NATIVE, {"system_prompt": "x", "input": "hi"}),
    ],
)
def test_the_replay_of_an_opening_goes_where_it_came_from_and_begins_with_it(
    protocol: Protocol, body: Any
) -> None:
    begun = opening(protocol, body)
    assert begun is not None

    path, sent = replay(begun)

    assert PROTOCOLS[path] is route_of(b"POST", path.encode()).protocol is protocol
    assert opening(protocol, sent) == begun


def test_equal_openings_are_equal_bytes_and_what_cannot_be_sent_is_none() -> None:
    assert written({"messages": [SYSTEM]}) == written({"messages": [dict(SYSTEM)]})
    assert written({"a": 1, "b": 2}) != written({"b": 2, "a": 1})  # as the template would have it
    assert written({"messages": "\ud83d"}) is None
    assert written({"messages": float("nan")}) is None
