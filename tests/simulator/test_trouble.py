"""A server that refuses for a while, vanishes, or answers strangely."""

import asyncio
import json
from typing import Any

import pytest

from keepalive.simulator.exchange import Cut
from keepalive.simulator.faults import FaultError
from keepalive.simulator.studio import Studio
from tests.kit.simulated import (
    CHAT,
    SMALL,
    chat,
    collect,
    data_lines,
    error,
    event_names,
    events,
    get,
    kinds,
    listed,
    load,
    now,
    post,
    simulated,
    v0_states,
    world,
)

HELLO = [{"role": "user", "content": "hello"}]
CHATS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO}),
    ("/v1/completions", {"prompt": "hello"}),
    ("/v1/responses", {"input": "hello"}),
    ("/v1/messages", {"messages": HELLO, "max_tokens": 9}),
    ("/api/v0/chat/completions", {"messages": HELLO}),
    ("/api/v1/chat", {"input": "hello"}),
]


def warm(**faults: Any) -> Studio:
    studio = world(**faults)
    studio.load(CHAT.key, seconds=0)
    return studio


# a fault for a while


@simulated
async def test_a_fault_can_be_limited_in_seconds() -> None:
    studio = world()
    studio.set_faults(unauthorized={"value": True, "seconds": 5})
    first = await get(studio, "/api/v1/models")
    await asyncio.sleep(4.9)
    last = await get(studio, "/api/v1/models")
    await asyncio.sleep(0.2)

    assert (first.status, last.status) == (401, 401)
    assert (await get(studio, "/api/v1/models")).status == 200
    assert studio.state()["faults"] == {}
    assert [event["names"] for event in events(studio, "faults.changed")] == [["unauthorized"]] * 2


@simulated
async def test_whoever_waits_for_a_fault_to_end_is_woken_when_its_time_is_up() -> None:
    studio = warm()
    studio.set_faults(stalled={"value": True, "seconds": 30})
    await get(studio, "/api/v1/models")

    assert now() == 30.0


@pytest.mark.parametrize("seconds", [0, -1, "5", True])
def test_seconds_must_be_a_number_above_zero(seconds: Any) -> None:
    with pytest.raises(FaultError, match="write a number above 0"):
        world(unauthorized={"value": True, "seconds": seconds})


@simulated
async def test_a_401_of_a_moment_meets_a_right_token_too() -> None:
    studio = world(auth_token="sk-right", unauthorized={"value": True, "times": 2})
    statuses = [
        (await get(studio, "/api/v1/models", authorization="Bearer sk-right")).status for _ in range(3)
    ]

    assert statuses == [401, 401, 200]
    assert (await get(studio, "/lmstudio-greeting")).status == 200


# a server that loads


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/api/v1/models", "/v1/chat/completions"])
@pytest.mark.parametrize("after", [0, 7])
@simulated
async def test_every_path_says_that_the_model_loads(path: str, after: int) -> None:
    studio = Studio([CHAT], tier="openai", faults={"loading_503": "always", "loading_retry_after": after})

    reply = await (post if path.endswith("completions") else get)(studio, path)

    assert reply.status == 503
    assert await error(reply) == {"message": "Loading model", "type": "unavailable_error", "code": 503}
    assert reply.headers.get("Retry-After") == ("7" if after else None)


@simulated
async def test_a_server_can_say_so_during_its_loads_alone() -> None:
    studio = Studio([CHAT], tier="openai", faults={"loading_503": "during_loads"})
    before = await get(studio, "/v1/models")
    studio.load(CHAT.key)
    meanwhile = await get(studio, "/v1/models")
    await asyncio.sleep(CHAT.load_seconds)

    assert (before.status, meanwhile.status) == (200, 503)
    assert (await get(studio, "/v1/models")).status == 200


# gone without a word


@simulated
async def test_what_vanishes_leaves_every_exchange_silent_and_begins_anew() -> None:
    studio = warm()
    got: list[bytes] = []
    stream = asyncio.ensure_future(collect(await chat(studio, stream=True, max_tokens=60), got))
    loading = asyncio.ensure_future(load(studio, SMALL.key))
    await asyncio.sleep(0.3)
    studio.vanish(60)
    newcomer = asyncio.ensure_future(get(studio, "/api/v1/models"))
    await asyncio.sleep(59)
    so_far = len(got)
    await asyncio.sleep(3600)

    assert [task.done() for task in (stream, loading, newcomer)] == [False] * 3
    assert len(got) == so_far
    assert (await listed(studio), studio.in_flight) == ([], 0)
    assert kinds(studio).count("vanished") == kinds(studio).count("restart.up") == 1
    assert (await load(studio, SMALL.key)).status == 200

    for task in (stream, loading, newcomer):
        task.cancel()
    await asyncio.gather(stream, loading, newcomer, return_exceptions=True)
    assert studio.in_flight == 0


@simulated
async def test_a_load_that_a_restart_ended_is_not_heard_of_again() -> None:
    studio = world()
    loading = asyncio.ensure_future(load(studio))
    await asyncio.sleep(5)
    under_way = await v0_states(studio)
    studio.restart(1.0)
    with pytest.raises(Cut):
        await loading
    await asyncio.sleep(CHAT.load_seconds + 60)

    assert under_way[CHAT.key] == "loading"
    assert (await v0_states(studio))[CHAT.key] == "not-loaded"
    assert not {"load.ended", "load.failed", "load.cancelled"} & set(kinds(studio))


# strange answers


@pytest.mark.parametrize(("path", "body"), CHATS)
@pytest.mark.parametrize("stream", [False, True])
@simulated
async def test_an_answer_can_be_well_formed_without_one_word(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    studio = warm(answer_tokens={"value": 0, "route": "inference"}, answer_text="CANARY")

    reply = await post(studio, path, {"model": CHAT.key, "stream": stream, **body})
    said = (await reply.read()).decode()

    assert reply.status == 200
    assert "CANARY" not in said
    assert "error" not in said.replace('"error":null', "")
    assert CHAT.key in said
    assert events(studio, "generation.ended")[0]["outcome"] == "ok"


@pytest.mark.parametrize(("path", "body"), CHATS)
@pytest.mark.parametrize("stream", [False, True])
@simulated
async def test_a_prompt_too_long_is_told_with_numbers_on_every_chat_protocol(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    studio = world(answer="context_length")

    reply = await post(studio, path, {"model": CHAT.key, "stream": stream, **body})
    told = {
        "code": "context_length_exceeded",
        "type": "exceed_context_size_error",
        "n_ctx": 4096,
        "n_prompt_tokens": 4097,
        "message": "request (4097 tokens) exceeds the available context size (4096 tokens), try increasing it",
    }

    if path == "/api/v1/chat" and stream:
        body_read = await reply.read()
        names, lines = event_names(body_read), data_lines(body_read)
        assert json.loads(lines[names.index("error")])["error"] == told
        assert names[-1] == "chat.end"
    else:
        assert (reply.status, await error(reply)) == (400, told)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
@simulated
async def test_a_model_can_be_unloaded_as_a_request_comes_to_it(fields: dict[str, Any]) -> None:
    studio = warm(answer={"value": "is_unloaded", "times": 1}, prompt_seconds=5.0)

    reply = await chat(studio, **fields)

    assert (now(), reply.status, await error(reply)) == (0.0, 400, "Model is unloaded.")
    assert (await chat(studio, **fields)).status == 200


@simulated
async def test_an_unload_in_mid_answer_of_a_request_without_stream_is_an_error_and_no_half_answer() -> None:
    studio = warm()
    asked = asyncio.ensure_future(chat(studio, max_tokens=60))
    await asyncio.sleep(0.5)
    studio.evict(CHAT.key)
    reply = await asked

    assert (reply.status, await error(reply)) == (400, "Model unloaded.")


@simulated
async def test_half_of_an_answer_can_be_followed_by_silence() -> None:
    studio = warm(answer="half_hang", answer_text="word")
    reply = await chat(studio, max_tokens=4)
    got: list[bytes] = []
    reading = asyncio.ensure_future(collect(reply, got))
    await asyncio.sleep(3600)

    assert not reading.done()
    assert len(got) == 1
    assert got[0].startswith(b'{"id":"chatcmpl-')
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert studio.in_flight == 0


@pytest.mark.parametrize("early", [False, True])
@simulated
async def test_a_stream_can_begin_with_a_byte_order_mark(early: bool) -> None:
    studio = warm(stream_bom=True, headers_before_first_token=early)

    streamed = await (await chat(studio, stream=True, max_tokens=1)).read()
    whole = await (await chat(studio, max_tokens=1)).read()

    assert streamed.startswith(b"\xef\xbb\xbfdata: {")
    assert streamed.count(b"\xef\xbb\xbf") == 1
    assert whole.startswith(b"{")
