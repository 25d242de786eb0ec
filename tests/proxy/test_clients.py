"""Official clients raise when something failed, and read when nothing did."""

import asyncio
import json

import pytest

from keepalive.core.errors import NotWarm
from keepalive.protocols import sse
from tests.kit.fronted import (
    CHAT_STREAM,
    SSE_HEAD,
    Keep,
    ask,
    chunk,
    delta,
    fronted,
    post,
    says,
    stream,
)
from tests.kit.official import Official, no_issuers, on_one_worker

pytestmark = [on_one_worker, no_issuers]

openai, anthropic = Official("openai"), Official("anthropic")


@pytest.fixture
def error(request):
    package, name = request.param
    return getattr(pytest.importorskip(package), name)


status_error = connection_error = error


def event(kind, **data):
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n".encode()


MESSAGES = [
    event(
        "message_start",
        message={
            "id": "m1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "m",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 0},
        },
    ),
    event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello"}),
    event("content_block_stop", index=0),
    event(
        "message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 1}
    ),
    event("message_stop"),
]
RESPONSE = {
    "id": "r1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "output": [],
    "parallel_tool_calls": False,
    "tool_choice": "auto",
    "tools": [],
}
RESPONSES = [
    event("response.created", response=RESPONSE | {"status": "in_progress"}, sequence_number=0),
    event(
        "response.output_text.delta",
        item_id="i",
        output_index=0,
        content_index=0,
        delta="Hello",
        sequence_number=1,
        logprobs=[],
    ),
    event("response.completed", response=RESPONSE | {"status": "completed"}, sequence_number=2),
]
COMPLETIONS = [
    b'data: {"id":"c","object":"text_completion","created":1,"model":"m","choices":'
    b'[{"index":0,"text":"Hello","finish_reason":"stop","logprobs":null}]}\n\n',
    b"data: [DONE]\n\n",
]


async def read_chat(port):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0
    ) as client:
        parts = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        return "".join([(part.choices[0].delta.content or "") async for part in parts if part.choices])


async def read_completions(port):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0
    ) as client:
        parts = await client.completions.create(model="m", prompt="hi", stream=True)
        return "".join([part.choices[0].text async for part in parts])


async def read_responses(port):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0
    ) as client:
        parts = await client.responses.create(model="m", input="hi", stream=True)
        return "".join([part.delta async for part in parts if part.type == "response.output_text.delta"])


async def read_messages(port):
    async with anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{port}", api_key="x", max_retries=0
    ) as client:
        parts = await client.messages.create(
            model="m", max_tokens=10, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        return "".join([part.delta.text async for part in parts if part.type == "content_block_delta"])


ROUTES = {
    "chat": (read_chat, [delta("Hello"), b"data: [DONE]\n\n"], ("openai", "APIError")),
    "completions": (read_completions, COMPLETIONS, ("openai", "APIError")),
    "responses": (read_responses, RESPONSES, ("openai", "APIError")),
    "messages": (read_messages, MESSAGES, ("anthropic", "APIError")),
}
routes = pytest.mark.parametrize(("read", "events", "error"), ROUTES.values(), ids=ROUTES, indirect=["error"])


def model(**how):
    keep = Keep()
    keep.add("m", **how)
    return keep


@routes
async def test_a_held_stream_is_read(read, events, error):
    keep = model(state="cold", load_seconds=0.3)
    async with fronted(says(stream(*events)), keep=keep, heartbeat=0.1) as (front, _):
        assert await read(front.port) == "Hello"
        assert (await front.last()).outcome == "ok"


@routes
async def test_a_load_that_failed_raises(read, events, error):
    keep = model(state="cold", load_seconds=0.1, fails=NotWarm("not enough memory"))
    async with fronted(keep=keep, heartbeat=0.05) as (front, _):
        with pytest.raises(error, match="not enough memory"):
            await read(front.port)


@routes
@pytest.mark.parametrize("state", ["warm", "cold"])
async def test_a_stream_that_was_cut_raises(read, events, error, state):
    cut = SSE_HEAD + chunk(events[0]) + chunk(events[1][:8])
    keep = model(state=state, load_seconds=0.1)
    async with fronted(says(cut, then="cut"), keep=keep, heartbeat=0.05) as (front, _):
        with pytest.raises(error, match="cut"):
            await read(front.port)


@routes
@pytest.mark.parametrize("state", ["warm", "cold"])
async def test_an_upstream_that_dies_before_it_answers_raises(read, events, error, state):
    keep = model(state=state, load_seconds=0.1)
    async with fronted(says(b"", then="reset"), keep=keep, heartbeat=0.05) as (front, _):
        with pytest.raises(error, match="closed the connection before it answered"):
            await read(front.port)


@routes
async def test_a_refusal_after_the_wait_raises_with_its_words(read, events, error):
    refusal = b'HTTP/1.1 400 Bad Request\r\nContent-Length: 36\r\n\r\n{"error":{"message":"context size"}}\n'
    keep = model(state="cold", load_seconds=0.1)
    async with fronted(says(refusal), keep=keep, heartbeat=0.05) as (front, _):
        with pytest.raises(error, match="context size"):
            await read(front.port)


CODEX = {"code": "context_length_exceeded", "type": "exceed_context_size_error", "n_ctx": 4096}


@routes
async def test_a_refusal_after_the_wait_has_every_field_that_it_came_with(read, events, error):
    whole = {"message": "the prompt is too long", "param": None, **CODEX}
    body = json.dumps({"error": whole}).encode()
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    keep = model(state="cold", load_seconds=0.1)
    async with fronted(says(refusal), keep=keep, heartbeat=0.05) as (front, _):
        with pytest.raises(error, match="too long") as raised:
            await read(front.port)

    told = raised.value.body
    assert (told.get("error", told) if isinstance(told, dict) else told) == whole


async def failed_response(port):
    """What a client that waits for the response itself to fail, as Codex does, is told."""
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0
    ) as client:
        parts = await client.responses.create(model="m", input="hi", stream=True)
        failed = None
        raised = ""
        try:
            async for part in parts:
                failed = part if part.type == "response.failed" else failed
        except openai.APIError as error:
            raised = str(error)
        assert failed is not None
        assert failed.response.status == "failed"
        return failed, raised


async def test_a_response_that_cannot_be_had_has_failed_for_our_reason():
    keep = model(state="cold", load_seconds=0.1, fails=NotWarm("not enough memory"))
    async with fronted(keep=keep, heartbeat=0.05) as (front, _):
        failed, raised = await failed_response(front.port)

    assert failed.response.error.message == raised == "not enough memory"
    assert failed.response.error.code == "model_not_ready"
    assert failed.sequence_number == 0


async def test_a_response_that_was_cut_has_failed_under_its_own_name_and_count():
    cut = SSE_HEAD + chunk(RESPONSES[0]) + chunk(RESPONSES[1]) + chunk(b"event: half")
    async with fronted(says(cut, then="cut"), keep=model()) as (front, _):
        failed, raised = await failed_response(front.port)

    assert "cut" in raised
    assert failed.response.id == "r1"
    assert failed.sequence_number == 2


@pytest.mark.parametrize("words", [{"error": {"message": "Model unloaded."}}, {"message": "Model unloaded."}])
async def test_a_response_whose_model_was_lost_in_the_stream_has_failed(words):
    lost = b"event: error\ndata: %b\n\n" % json.dumps({"type": "error", **words}).encode()
    async with fronted(says(stream(RESPONSES[0], lost)), keep=model()) as (front, _):
        _, _, body = await ask(front.port, post("/v1/responses", b'{"model":"m","stream":true}'))

    assert body.startswith(RESPONSES[0] + lost + b"event: response.failed\n")
    (failed,) = sse.Decoder().feed(body.removeprefix(RESPONSES[0] + lost))
    told = json.loads(failed.data)
    assert told["response"]["error"] == {"code": "upstream_error", "message": "Model unloaded."}
    assert (told["response"]["id"], told["sequence_number"]) == ("r1", 1)


async def test_a_response_that_says_itself_that_it_failed_is_left_as_it_is():
    own = event(
        "response.failed",
        response=RESPONSE | {"status": "failed", "error": {"code": "server_error", "message": "no"}},
        sequence_number=1,
    )
    async with fronted(says(stream(RESPONSES[0], own)), keep=model()) as (front, _):
        _, _, body = await ask(front.port, post("/v1/responses", b'{"model":"m","stream":true}'))

    assert body == RESPONSES[0] + own


async def ask_chat(port):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0
    ) as client:
        return await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])


async def ask_responses(port):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0
    ) as client:
        return await client.responses.create(model="m", input="hi")


async def ask_messages(port):
    async with anthropic.AsyncAnthropic(
        base_url=f"http://127.0.0.1:{port}", api_key="x", max_retries=0
    ) as client:
        return await client.messages.create(
            model="m", max_tokens=1, messages=[{"role": "user", "content": "hi"}]
        )


ASKING = [
    (ask_chat, ("openai", "APIStatusError"), ("openai", "APIConnectionError")),
    (ask_responses, ("openai", "APIStatusError"), ("openai", "APIConnectionError")),
    (ask_messages, ("anthropic", "APIStatusError"), ("anthropic", "APIConnectionError")),
]
asking = pytest.mark.parametrize(
    ("call", "status_error", "connection_error"), ASKING, indirect=["status_error", "connection_error"]
)


@asking
async def test_without_a_stream_failures_raise_with_their_status(call, status_error, connection_error):
    keep = model(state="cold", load_seconds=0.05, fails=NotWarm("not enough memory", retry_after=7))
    async with fronted(keep=keep) as (front, _):
        with pytest.raises(status_error, match="not enough memory") as raised:
            await call(front.port)

        assert raised.value.status_code == 503
        assert raised.value.response.headers["retry-after"] == "7"


@asking
async def test_without_a_stream_a_cut_answer_raises(call, status_error, connection_error):
    cut = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"

    async def script(asking):
        await asking.send(cut)
        await asyncio.sleep(0.05)
        asking.cut()

    async with fronted(script, keep=model()) as (front, _):
        with pytest.raises((connection_error, openai.APIError, anthropic.APIError, Exception)) as raised:
            await call(front.port)

        assert not isinstance(raised.value, status_error)


async def test_the_native_route_ends_with_its_error_event_and_no_chat_end():
    start = event("chat.start", model_instance_id="m")
    body = b'{"model":"m","stream":true,"input":"hi"}'
    async with fronted(says(SSE_HEAD + chunk(start), then="cut"), keep=model()) as (front, _):
        _, _, got = await ask(front.port, post("/api/v1/chat", body))

        kind, data = got.removeprefix(start).split(b"\n")[:2]
        assert kind == b"event: error"
        assert json.loads(data.removeprefix(b"data: "))["error"]["type"] == "internal_error"
        assert b"chat.end" not in got


async def test_reasoning_heartbeats_are_read_as_reasoning():
    from keepalive.proxy import Heartbeat

    keep = model(state="cold", load_seconds=0.2)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=0.1, heartbeat_mode=Heartbeat.REASONING) as (
        front,
        _,
    ):
        assert await read_chat(front.port) == "Hello"
