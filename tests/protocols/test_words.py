import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols.answers import error_message
from keepalive.protocols.meter import Meter
from keepalive.protocols.routes import route_of
from keepalive.protocols.sse import Comment, Decoder, Event
from keepalive.protocols.words import (
    Heartbeat,
    error_body,
    error_event,
    heartbeat_comment,
    heartbeat_reasoning,
    read_heartbeat,
)
from tests.kit import DATA
from tests.kit.official import Official, no_issuers, on_one_worker
from tests.kit.raw import Close, RawServer, answer, chunked

pytestmark = no_issuers

# --- how it says no --------------------------------------------------------------------------------

ROUTES = {
    "chat": route_of(b"POST", b"/v1/chat/completions"),
    "completions": route_of(b"POST", b"/v1/completions"),
    "responses": route_of(b"POST", b"/v1/responses"),
    "messages": route_of(b"POST", b"/v1/messages"),
    "native": route_of(b"POST", b"/api/v1/chat"),
    "embeddings": route_of(b"POST", b"/v1/embeddings"),
    "plain": route_of(b"GET", b"/nothing"),
}


def test_errors_have_the_layout_of_their_route():
    assert error_body(ROUTES["chat"], 503, "not ready", "model_not_ready") == (
        b'{"error":{"message":"not ready","type":"server_error","param":null,"code":"model_not_ready"}}'
    )
    assert error_body(ROUTES["embeddings"], 400, "no", "bad_request") == (
        b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":"bad_request"}}'
    )
    assert error_body(ROUTES["messages"], 503, "not ready", "model_not_ready") == (
        b'{"type":"error","error":{"type":"overloaded_error","message":"not ready"}}'
    )
    assert error_body(ROUTES["messages"], 401, "no", "invalid_api_key") == (
        b'{"type":"error","error":{"type":"authentication_error","message":"no"}}'
    )
    assert error_body(ROUTES["messages"], 502, "no", "x").startswith(
        b'{"type":"error","error":{"type":"api_error"'
    )
    assert error_body(ROUTES["native"], 503, "not ready", "model_not_ready") == (
        b'{"error":{"type":"internal_error","message":"not ready","code":"model_not_ready"}}'
    )
    assert error_body(ROUTES["native"], 401, "no", "invalid_api_key") == (
        b'{"error":{"type":"invalid_request","message":"no","code":"invalid_api_key"}}'
    )
    assert error_body(ROUTES["plain"], 404, 'no "such"\n', "x") == b'{"error":"no \\"such\\"\\n"}'


@pytest.mark.parametrize("name", ROUTES)
def test_every_error_is_read_back_and_never_looks_like_an_end(name):
    route = ROUTES[name]
    words = "it broke: \u2028 [DONE] \ud800\n\ndata: [DONE]\n\n"
    event = error_event(route, words, "upstream_cut")
    items = Decoder().feed(event)

    assert len(items) == (2 if name == "responses" else 1)
    for item in items:
        assert isinstance(item, Event)
        assert error_message(item.data.encode()) == words
    assert error_message(error_body(route, 502, words, "upstream_cut")) == words
    meter = Meter(route.protocol, 0)
    meter.feed(1, event)
    assert meter.error is not None or not route.streams
    assert meter.ended is not route.streams


def test_error_events_are_those_of_the_protocol():
    assert error_event(ROUTES["chat"], "cut", "upstream_cut") == (
        b'data: {"error":{"message":"cut","type":"server_error","param":null,"code":"upstream_cut"}}\n\n'
    )
    assert error_event(ROUTES["responses"], "cut", "upstream_cut").endswith(
        b'event: error\ndata: {"type":"error","code":"upstream_cut","message":"cut","param":null,'
        b'"sequence_number":1,"error":{"message":"cut","type":"server_error","param":null,'
        b'"code":"upstream_cut"}}\n\n'
    )
    assert error_event(ROUTES["messages"], "cut", "upstream_cut") == (
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"cut"}}\n\n'
    )
    assert error_event(ROUTES["native"], "cut", "upstream_cut") == (
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"cut",'
        b'"code":"upstream_cut"}}\n\n'
    )


WHOLE = {
    "message": "request (5000 tokens) exceeds the available context size (4096 tokens)",
    "type": "exceed_context_size_error",
    "param": "messages",
    "code": 400,
    "n_prompt_tokens": 5000,
    "n_ctx": 4096,
}


def told(name, error, status=400):
    event = error_event(ROUTES[name], error["message"], "upstream_400", status=status, error=error)
    return [json.loads(item.data) for item in Decoder().feed(event)]


@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages", "native"])
def test_what_an_upstream_said_is_told_with_every_field_that_it_had(name):
    event = told(name, WHOLE)[-1]

    assert event["error"] == WHOLE
    assert event.get("type") == (None if name in ("chat", "completions") else "error")


def test_an_error_without_a_type_gets_one_where_anthropics_clients_need_it():
    assert told("messages", {"message": "no", "param": "x"}, 404)[0]["error"] == {
        "type": "not_found_error",
        "message": "no",
        "param": "x",
    }
    assert told("messages", {"message": "no", "type": None}, 529)[0]["error"]["type"] == "overloaded_error"
    assert told("messages", {"message": "no"}, 529)[0]["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("name", ["chat", "responses", "messages", "native"])
def test_an_error_whose_words_are_not_where_they_belong_is_told_with_words(name):
    odd = {"message": "", "code": 400, "details": "no"}
    event = error_event(ROUTES[name], "the upstream answered 400", "upstream_400", status=400, error=odd)
    error = json.loads(Decoder().feed(event)[-1].data)["error"]

    assert error["message"] == "the upstream answered 400"
    assert error["details"] == "no"


def test_both_events_by_which_a_response_fails_know_a_prompt_that_is_too_long():
    failed, flat = told("responses", WHOLE)

    assert failed["response"]["error"]["code"] == flat["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WHOLE, "context_length_exceeded"),
        ({"message": "no", "code": "context_length_exceeded"}, "context_length_exceeded"),
        ({"message": "The prompt is longer than the Context Length."}, "context_length_exceeded"),
        ({"message": "no", "type": "exceed_context_size_error"}, "context_length_exceeded"),
        ({"message": "Cannot truncate prompt with n_keep (9000) >= n_ctx (8192)"}, "context_length_exceeded"),
        ({"message": "prompt is too long: 9000 tokens > 8192 maximum"}, "context_length_exceeded"),
        (
            {"message": "Input length (9000 tokens) exceeds the maximum allowed length"},
            "context_length_exceeded",
        ),
        ({"message": "Input is too long for requested model."}, "context_length_exceeded"),
        (
            {"message": "The decoder prompt (length 9000) is longer than the maximum model length of 8192."},
            "context_length_exceeded",
        ),
        (
            {"message": "`inputs` tokens + `max_new_tokens` must be <= 8192. Given: 9000 `inputs` tokens"},
            "context_length_exceeded",
        ),
        ({"message": "`inputs` must have less than 8191 tokens. Given: 9000"}, "context_length_exceeded"),
        ({"message": "Prompt length 9000 is greater than max_seq_len 8192"}, "context_length_exceeded"),
        (
            {"message": "prompt length (9000) exceeds maximum input length (8192)"},
            "context_length_exceeded",
        ),
        ({"message": "prompt token count of 9000 exceeds the limit of 8192"}, "context_length_exceeded"),
        ({"message": "Please reduce the length of the messages."}, "context_length_exceeded"),
        ({"message": "Too many tokens, please wait before trying again."}, "upstream_400"),
        ({"message": "number of input tokens has exceeded your per-minute rate limit"}, "upstream_400"),
        ({"message": "litellm.ContextWindowExceededError: no"}, "context_length_exceeded"),
        ({"message": "no", "code": "model_not_found"}, "model_not_found"),
        ({"message": "no", "code": None}, "upstream_400"),
        ({"message": "Failed to load model: context length 9 is too much"}, "upstream_400"),
    ],
)
def test_a_response_fails_with_its_reason_and_one_word_for_a_prompt_that_is_too_long(error, code):
    failed, raised = told("responses", error)

    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": code, "message": error["message"]}
    assert (failed["sequence_number"], raised["sequence_number"]) == (0, 1)


def test_a_sentence_alone_is_told_in_our_fields():
    assert told("chat", {"message": "the context size is too small"}) == [
        {
            "error": {
                "message": "the context size is too small",
                "type": "invalid_request_error",
                "param": None,
                "code": "context_length_exceeded",
            }
        }
    ]


# --- how it asks for patience ----------------------------------------------------------------------


def test_heartbeats_are_comments_with_what_is_known():
    assert heartbeat_comment("acme/tiny", "loading", 12.04, 96.4) == (
        b": keepalive model=acme/tiny state=loading elapsed=12.0 eta=96.4\n\n"
    )
    assert heartbeat_comment("tiny", "warm", 60, None, 12.04) == (
        b": keepalive model=tiny state=warm elapsed=60.0 silent=12.0\n\n"
    )
    assert heartbeat_comment("tiny", "cold", 0, None) == b": keepalive model=tiny state=cold elapsed=0.0\n\n"


@given(st.text())
def test_no_name_breaks_out_of_a_heartbeat(name):
    assert [type(item) for item in Decoder().feed(heartbeat_comment(name, "loading", 1, 2))] == [Comment]
    assert heartbeat_comment(name, "loading", 1, 2).count(b"\n") == 2
    assert [
        type(item) for item in Decoder().feed(heartbeat_reasoning(ROUTES["chat"], name, "loading", 1, 2))
    ] == [Event]


@given(st.text(), st.floats(0, 1e6), st.none() | st.floats(0, 1e6))
def test_what_a_heartbeat_says_can_be_read_again(name, elapsed, eta):
    (comment,) = Decoder().feed(heartbeat_comment(f"a{name}", "loading", elapsed, eta))
    found = read_heartbeat(comment.text)

    assert found is not None
    assert found.state == "loading"
    assert found.elapsed == float(f"{elapsed:.1f}")
    assert found.eta == (None if eta is None else float(f"{eta:.1f}"))


def test_the_model_of_a_heartbeat_is_read_and_other_comments_are_nobodys():
    (comment,) = Decoder().feed(heartbeat_comment("acme/x", "cold", 1.25, None))

    assert read_heartbeat(comment.text) == Heartbeat("acme/x", "cold", 1.2, None)
    assert read_heartbeat("keepalive model=m state=warm elapsed=60.0 silent=12.0") == Heartbeat(
        "m", "warm", 60.0, None, 12.0
    )
    assert read_heartbeat("keep-alive") is None
    assert read_heartbeat("keepalive model=a state=loading elapsed=1.0 eta=2.0 more") is None


def test_visible_heartbeats_are_reasoning_where_the_route_has_it_and_no_token_of_the_answer():
    (event,) = Decoder().feed(heartbeat_reasoning(ROUTES["chat"], "tiny", "loading", 12.04, 96.4))

    assert isinstance(event, Event)
    assert json.loads(event.data)["choices"] == [
        {
            "index": 0,
            "delta": {"reasoning_content": "tiny is loading: 12 s so far, about 96 s to go.\n"},
            "finish_reason": None,
        }
    ]
    for name in ("completions", "responses", "messages", "native"):
        assert heartbeat_reasoning(ROUTES[name], "tiny", "loading", 1, None) == (
            heartbeat_comment("tiny", "loading", 1, None)
        )


# --- the official clients ----------------------------------------------------------------------------

openai, anthropic = Official("openai"), Official("anthropic")

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BEGUN = {
    "chat": b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{"role":"assistant","content":"Hel"},"finish_reason":null}]}\n\n',
    "completions": b'data: {"id":"1","object":"text_completion","created":1,"model":"m","choices":[{'
    b'"index":0,"text":"Hel","finish_reason":null,"logprobs":null}]}\n\n',
    "responses": b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":{'
    b'"id":"r","object":"response","status":"in_progress","output":[],"error":null}}\n\n',
    "messages": b'event: message_start\ndata: {"type":"message_start","message":{"id":"1","type":"message",'
    b'"role":"assistant","content":[],"model":"m","stop_reason":null,"stop_sequence":null,'
    b'"usage":{"input_tokens":1,"output_tokens":1}}}\n\n',
}


async def streamed(name: str, port: int) -> list[object]:
    """All items that the official client of a route makes of the stream which stands at `port`."""
    if name == "messages":
        async with anthropic.AsyncAnthropic(
            base_url=f"http://127.0.0.1:{port}", api_key="k", max_retries=0, timeout=5
        ) as client:
            stream = await client.messages.create(
                model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}], stream=True
            )
            return [item async for item in stream]
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0, timeout=5
    ) as client:
        if name == "chat":
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hi"}], stream=True
            )
        elif name == "completions":
            stream = await client.completions.create(model="m", prompt="hi", stream=True)
        else:
            stream = await client.responses.create(model="m", input="hi", stream=True)
        return [item async for item in stream]


def api_error(name: str) -> type[Exception]:
    error: type[Exception] = (anthropic if name == "messages" else openai).APIError
    return error


@on_one_worker
@pytest.mark.parametrize("begun", [False, True], ids=["while_waiting", "in_the_answer"])
@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
async def test_the_official_client_raises_on_a_stream_that_failed(name, begun):
    parts = [heartbeat_comment("m", "loading", 1, 2), error_event(ROUTES[name], "it is gone", "upstream_cut")]
    if begun:
        parts.insert(1, BEGUN[name])
    async with RawServer([HEAD + chunked(*parts), Close()]) as server:
        with pytest.raises(api_error(name), match="it is gone"):
            await streamed(name, server.port)


@on_one_worker
@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
async def test_the_official_client_skips_heartbeats(name):
    beat = heartbeat_comment("m", "loading", 1, 2)
    body = (DATA / f"{name}.sse").read_bytes()
    async with RawServer(
        [HEAD + chunked(beat, beat, body), Close()], [HEAD + chunked(body), Close()]
    ) as server:
        held = await streamed(name, server.port)
        plain = await streamed(name, server.port)

    assert held == plain
    assert len(held) >= 4


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("unknown", "tiny is being looked for: 5 s so far.\n"),
        ("cold", "tiny is waiting to be loaded: 5 s so far.\n"),
        ("loading", "tiny is loading: 5 s so far.\n"),
        ("warm", "tiny is at work: 5 s so far.\n"),
        ("backoff", "tiny is waiting to be tried again: 5 s so far.\n"),
    ],
)
def test_visible_heartbeats_say_in_peoples_words_what_is_waited_for(state: str, told: str):
    (event,) = Decoder().feed(heartbeat_reasoning(ROUTES["chat"], "tiny", state, 5, None))

    assert json.loads(event.data)["choices"][0]["delta"] == {"reasoning_content": told}


@on_one_worker
async def test_the_official_client_reads_visible_heartbeats_as_reasoning():
    beat = heartbeat_reasoning(ROUTES["chat"], "m", "loading", 1, 2)
    body = (DATA / "chat.sse").read_bytes()
    async with RawServer([HEAD + chunked(beat, beat, body), Close()]) as server:
        chunks = await streamed("chat", server.port)

    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert (
        deltas[0].reasoning_content
        == deltas[1].reasoning_content
        == "m is loading: 1 s so far, about 2 s to go.\n"
    )
    assert "".join(delta.content or "" for delta in deltas).startswith(" mamo garala")


@on_one_worker
@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
async def test_the_official_client_raises_on_a_refusal_and_shows_its_message(name):
    body = error_body(ROUTES[name], 503, "it is loading", "model_not_ready")
    refusal = answer(body, status=b"503 Service Unavailable")
    async with RawServer([refusal, Close()]) as server:
        with pytest.raises(api_error(name), match="it is loading") as raised:
            await streamed(name, server.port)

    assert raised.value.status_code == 503
