import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.core.errors import Reason
from keepalive.protocols import routes
from keepalive.protocols.meter import Meter
from keepalive.protocols.routes import (
    Asked,
    Delta,
    Heartbeat,
    ModelFinder,
    Protocol,
    chat_delta,
    chat_error,
    error_body,
    error_event,
    error_message,
    heartbeat_comment,
    heartbeat_reasoning,
    looks_lost,
    read_body,
    read_heartbeat,
    route_of,
)
from keepalive.protocols.sse import Comment, Decoder, Event
from tests.kit import DATA
from tests.kit.raw import Close, RawServer, answer, chunked

# --- which route -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "name", "protocol"),
    [
        (b"POST", b"/v1/chat/completions", "chat", Protocol.CHAT),
        (b"POST", b"/v1/completions", "completions", Protocol.COMPLETIONS),
        (b"POST", b"/v1/responses", "responses", Protocol.RESPONSES),
        (b"POST", b"/v1/messages", "messages", Protocol.MESSAGES),
        (b"POST", b"/v1/embeddings", "embeddings", Protocol.OPENAI),
        (b"POST", b"/api/v1/chat", "native_chat", Protocol.NATIVE),
        (b"POST", b"/api/v0/chat/completions", "v0_chat", Protocol.CHAT),
        (b"POST", b"/api/v0/completions", "v0_completions", Protocol.COMPLETIONS),
        (b"POST", b"/api/v0/embeddings", "v0_embeddings", Protocol.OPENAI),
        (b"POST", b"/v1/chat/completions?x=1", "chat", Protocol.CHAT),
        # Other spellings that LM Studio's router takes for the same.
        (b"POST", b"/V1/Chat/Completions", "chat", Protocol.CHAT),
        (b"POST", b"/v1/chat/completions/", "chat", Protocol.CHAT),
        (b"POST", b"//v1//chat/completions/?", "chat", Protocol.CHAT),
        (b"POST", b"/v1/%63hat/completions", "chat", Protocol.CHAT),
    ],
)
def test_routes_that_need_a_model_are_known_in_every_spelling(method, path, name, protocol):
    route = route_of(method, path)

    assert (route.name, route.protocol, route.inference) == (name, protocol, True)
    assert route.streams == (name not in ("embeddings", "v0_embeddings"))


@pytest.mark.parametrize(
    ("method", "path", "name", "protocol"),
    [
        (b"GET", b"/v1/models", "models", Protocol.OPENAI),
        (b"GET", b"/api/v0/models", "models", Protocol.OPENAI),
        (b"GET", b"/api/v0/models/acme%2Ftiny", "models", Protocol.OPENAI),
        (b"GET", b"/api/v1/models", "models", Protocol.NATIVE),
        (b"GET", b"/lmstudio-greeting", "greeting", Protocol.PLAIN),
        (b"GET", b"/v1/chat/completions", "other", Protocol.OPENAI),
        (b"OPTIONS", b"/v1/chat/completions", "other", Protocol.OPENAI),
        (b"HEAD", b"/api/v1/chat", "other", Protocol.NATIVE),
        (b"GET", b"/v1/responses/resp_1", "other", Protocol.OPENAI),
        (b"post", b"/v1/chat/completions", "other", Protocol.OPENAI),
        (b"GET", b"/favicon.ico", "other", Protocol.PLAIN),
        (b"OPTIONS", b"*", "other", Protocol.PLAIN),
        (b"GET", b"", "other", Protocol.PLAIN),
        (b"GET", b"/%zz\xff?%", "other", Protocol.PLAIN),
    ],
)
def test_other_routes_need_no_model(method, path, name, protocol):
    route = route_of(method, path)

    assert (route.name, route.protocol) == (name, protocol)
    assert (route.inference, route.streams, route.websocket, route.changes) == (False,) * 4


def test_loads_and_sdk_connections_are_told_apart():
    assert [
        route_of(b"POST", b"/api/v1/models/" + what).changes for what in (b"load", b"unload", b"download")
    ] == [True] * 3
    assert route_of(b"GET", b"/llm").websocket
    assert route_of(b"GET", b"/embedding").websocket
    assert not route_of(b"POST", b"/llm").websocket


@given(st.binary(), st.binary())
def test_any_request_has_one_of_few_route_names(method, path):
    names = {route.name for route in routes._ROUTES.values()} | {"other"}

    assert route_of(method, path).name in names
    assert route_of(b"POST", b"/v1/" + path).name in names


# --- which model -----------------------------------------------------------------------------------

PAD = '"pad":"%s",' % ("x" * routes.SMALL_BODY)  # makes any body a large one


def found(chunks: list[bytes]) -> Asked:
    finder = ModelFinder()
    for chunk in chunks:
        finder.feed(chunk)
    return finder.finish()


def small_and_large(text: str) -> list[Asked]:
    """The answers for a body, for the same one behind 64 KiB of another field, and for that in pieces."""
    large = text.replace("{", "{" + PAD, 1).encode()
    return [
        read_body(text.encode()),
        read_body(large),
        found([large[i : i + 7] for i in range(0, len(large), 7)]),
        found([large[i : i + 60_000] for i in range(0, len(large), 60_000)]),
    ]


@pytest.mark.parametrize(
    ("body", "model", "stream"),
    [
        ('{"model":"a","stream":true}', "a", True),
        ('{"stream":true,"model":"a"}', "a", True),
        (' \n\t{ "model" : "a" , "stream" : false } \r\n', "a", False),
        ('{"model":"acme/ti\\u006ey","stream":null}', "acme/tiny", False),
        ('{"mod\\u0065l":"a"}', "a", False),
        ('{"model":"ä 😀 \\ud83d\\ude00 \\" \\\\"}', 'ä 😀 😀 " \\', False),
        ('{"model":""}', "", False),
        ('{"model":"a","model":"b"}', "b", False),
        ('{"model":"a","model":null}', None, False),
        ('{"model":"a","model":{"model":"c"}}', None, False),
        ('{"stream":true,"stream":1,"model":"a"}', "a", False),
        ('{"metadata":{"model":"x","stream":true},"model":"a"}', "a", False),
        ('{"messages":[{"model":"x"}],"model":"a","tools":[[[{"model":"y"}]]]}', "a", False),
        ('{"messages":[{"content":"\\",\\"model\\":\\"x\\""}],"model":"a"}', "a", False),
        ('{"messages":[{"content":"}]}{[\\\\"}],"model":"a"}', "a", False),
        ('{"MODEL":"x","model ":"y","\\u0000model":"z"}', None, False),
        ('{"model":"a","seed":' + "1" * 5000 + "}", "a", False),
        ('{"model":"a","n":-1.5e+3,"b":[true,false,null,{}],"c":[]}', "a", False),
        ('{"n":1,"t":true,"model":"a"}', "a", False),
        ('{"deep":' + "[" * 20_000 + "]" * 20_000 + ',"model":"a"}', "a", False),
        ('{"model":"' + "m" * 4096 + '"}', "m" * 4096, False),
        ('{"model":"' + "m" * 4097 + '"}', None, False),
    ],
)
def test_the_model_is_read_as_a_parser_would_read_it(body, model, stream):
    for asked in small_and_large(body):
        assert (asked.model, asked.stream) == (model, stream)


@pytest.mark.parametrize(
    "body",
    [
        "{}", '{"messages":[]}', '{"a":1}',
        '{"model":"a"', '{"model":"a"}}', '{"model":"a",}', '{"model":"a" "b":1}', '{"model" "a"}',
        '{"model":}',
        '{,"model":"a"}', '{"model":"a"}{', '{"model":"a"};', '{model:"a"}', '{"x":"model":"a"}',
        '{"model":"a\\"}',
        '{"x":[1,2,"model":"a"}', '{"model":"a]}', "{'model':'a'}", '{"model":a}', '{"x":@,"model":"a"}',
    ],
)  # fmt: skip
def test_a_body_without_a_model_or_without_sense_asks_for_nothing(body):
    for asked in small_and_large(body):
        assert asked == Asked()


@pytest.mark.parametrize(
    "body", ["", "x", '"model"', "[]", '[{"model":"a"}]', "null", "12", "model=a", "\0\0\0\0"]
)
def test_a_body_that_is_no_object_asks_for_nothing(body):
    assert read_body(body.encode()) == Asked()
    assert read_body(body.encode() + b" " * routes.SMALL_BODY) == Asked()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_read_like_a_parser_reads_them(encoding):
    body = '{%s"model":"tiny ä😀","stream":true}'

    for pad in ("", PAD):
        raw = (body % pad).encode(encoding)
        assert json.loads(raw)["model"] == "tiny ä😀"
        for size in (len(raw), 7):
            asked = found([raw[i : i + size] for i in range(0, len(raw), size)])
            assert (asked.model, asked.stream) == ("tiny ä😀", True)


def test_bytes_that_are_no_characters_do_not_hide_the_model():
    for pad in (b"", PAD.encode()):
        assert read_body(b'{%s"x":"\xff\xfe","model":"a"}' % pad).model == "a"
        assert read_body(b'{%s"model":"a\xff"}' % pad).model == "a\ufffd"


keys = st.sampled_from(["model", "stream", "messages", "x", "mod\\el", 'mo"del', "é", ""]) | st.text(
    max_size=4
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text() | st.text(alphabet='\\"{}[]:,model', max_size=12)
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """The text of a JSON object, with equal keys, spaces and either kind of escape."""
    fields = draw(st.lists(st.tuples(keys, values), max_size=6))
    ascii_only = draw(st.booleans())
    space = draw(st.sampled_from(["", " ", "\n\t"]))

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    inner = f"{space},{space}".join(f"{dump(k)}{space}:{space}{dump(v)}" for k, v in fields)
    return f"{space}{{{space}{inner}{space}}}{space}".encode("utf-8", "surrogatepass")


def expected(body: bytes) -> tuple[str | None, bool]:
    whole = json.loads(body.decode("utf-8", "replace"))
    model = whole.get("model")
    return model if isinstance(model, str) else None, whole.get("stream") is True


@st.composite
def cuts(draw: st.DrawFn, body: bytes) -> list[bytes]:
    edges = sorted(draw(st.sets(st.integers(0, len(body)), max_size=10)))
    return [body[a:b] for a, b in pairwise([0, *edges, len(body)])]


@settings(deadline=None)
@given(st.data())
def test_every_body_is_read_as_json_loads_reads_it_however_large_and_however_cut(data):
    body = data.draw(objects())
    first = body.index(b"{") + 1
    pad = PAD.encode() if body[first:].strip() != b"}" else PAD.encode()[:-1]
    large = body[:first] + pad + body[first:]

    asked = found(data.draw(cuts(body)))
    assert (asked.model, asked.stream) == expected(body)
    asked_large = found(data.draw(cuts(large)))
    assert (asked_large.model, asked_large.stream) == expected(large)
    assert asked_large.conversation == asked.conversation


@settings(deadline=None)
@given(st.data())
def test_a_broken_body_never_raises_and_a_small_one_is_never_believed(data):
    body = bytearray(data.draw(objects()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(body) - 1, 0)))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"}", b"]", b",", b"\xff"])
        )
    raw = bytes(body)
    try:
        believed = expected(raw)
    except (ValueError, AttributeError):
        believed = (None, False)

    asked = found(data.draw(cuts(raw)))
    assert (asked.model, asked.stream) == believed
    large = found(data.draw(cuts(raw.replace(b"{", b"{" + PAD.encode(), 1))))
    assert large.model is None or isinstance(large.model, str)


def test_a_large_body_costs_little_more_than_looking_at_it():
    picture = b"A" * 20_000_000
    bodies = {
        "picture first": b'{"messages":[{"role":"user","content":"' + picture + b'"}],"model":"a"}',
        "picture last": b'{"model":"a","messages":[{"role":"user","content":"' + picture + b'"}]}',
        "numbers": b'{"input":[' + b"1," * 3_000_000 + b'1],"model":"a"}',
        "escapes": b'{"input":"' + b'\\"' * 2_000_000 + b'","model":"a"}',
        "messages": b'{"messages":['
        + b'{"role":"user","content":"hello \\n there"},' * 50_000
        + b'{}],"model":"a"}',
    }
    for name, body in bodies.items():
        began = time.process_time()
        asked = found([body[i : i + 65_536] for i in range(0, len(body), 65_536)])
        assert asked.model == "a", name
        assert time.process_time() - began < 2, name


def test_a_body_of_single_bytes_is_no_trouble():
    body = b'{"messages":"' + b"x" * 200_000 + b'","model":"a"}'
    finder = ModelFinder()
    for at in range(len(body)):
        finder.feed(body[at : at + 1])

    assert finder.finish().model == "a"


# --- which conversation ----------------------------------------------------------------------------


def conversation(**body: object) -> bytes | None:
    small = json.dumps({"model": "a"} | body).encode()
    large = json.dumps({"model": "a", "pad": "x" * routes.SMALL_BODY} | body).encode()
    assert read_body(small).conversation == read_body(large).conversation
    return read_body(small).conversation


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def test_the_turns_of_a_conversation_are_known_for_one():
    first = [message("system", "Be kind."), message("user", "hello")]
    second = [*first, message("assistant", "hi"), message("user", "more")]

    assert conversation(messages=first) == conversation(messages=second)
    assert conversation(messages=first) == conversation(messages=second, temperature=0.5, stream=True)
    assert conversation(messages=first, model="A") == conversation(messages=second, model="a")
    assert len(conversation(messages=first) or b"") == 8


def test_other_conversations_are_others():
    base = [message("system", "Be kind."), message("user", "hello")]
    different = {
        conversation(messages=base),
        conversation(messages=base, model="b"),
        conversation(messages=base, system="Be brief."),
        conversation(messages=[base[0], message("user", "bye")]),
        conversation(messages=[message("system", "Be rude."), base[1]]),
        conversation(input="hello"),
        conversation(prompt="hello"),
        conversation(messages=[message("user", [{"type": "text", "text": "hello"}])]),
    }

    assert len(different) == 8
    assert None not in different


def test_a_conversation_that_outgrows_a_small_body_stays_the_same():
    first = [message("system", "Be kind. \u00e4\U0001f600"), message("user", "hello")]
    turns = [*first, message("assistant", "x" * 100_000), message("user", "and then?")]

    assert (
        conversation(messages=first)
        == read_body(json.dumps({"model": "a", "messages": turns}).encode()).conversation
    )
    raw = json.dumps({"model": "a", "messages": turns}, ensure_ascii=False).encode()
    assert conversation(messages=first) == read_body(raw).conversation


def test_a_conversation_that_begins_with_a_picture_is_told_by_its_beginning():
    def turn(picture: str, *more: object) -> bytes | None:
        messages = [message("user", picture + "A" * 200_000), *more]
        return read_body(json.dumps({"messages": messages, "model": "a"}).encode()).conversation

    assert turn("cat", message("assistant", "a cat")) == turn("cat")
    assert turn("cat") != turn("dog")


def test_a_long_prompt_is_told_by_its_beginning():
    long = "\U0001f600 once upon a time " * 10_000

    assert conversation(prompt=long[:400]) == conversation(prompt=long)
    assert conversation(prompt="x" + long) != conversation(prompt=long)


def test_nothing_to_tell_it_by_is_no_conversation():
    assert conversation() is None
    assert conversation(messages=[]) is None
    assert conversation(messages=True, input=1, prompt={"a": "b"}, system="") is None
    assert read_body(b'{"messages":[{"role":"user","content":"a"}]}').conversation is None


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
    (item,) = Decoder().feed(event)

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
    assert error_event(ROUTES["responses"], "cut", "upstream_cut") == (
        b'event: error\ndata: {"type":"error","code":"upstream_cut","message":"cut","param":null,'
        b'"sequence_number":0,"error":{"message":"cut","type":"server_error","param":null,'
        b'"code":"upstream_cut"}}\n\n'
    )
    assert error_event(ROUTES["messages"], "cut", "upstream_cut") == (
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"cut"}}\n\n'
    )
    assert error_event(ROUTES["native"], "cut", "upstream_cut") == (
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"cut",'
        b'"code":"upstream_cut"}}\n\n'
    )


# --- how it asks for patience ----------------------------------------------------------------------


def test_heartbeats_are_comments_with_what_is_known():
    assert heartbeat_comment("acme/tiny", "loading", 12.04, 96.4) == (
        b": keepalive model=acme/tiny state=loading elapsed=12.0 eta=96.4\n\n"
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


# --- what an answer says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "reason", "retryable"),
    [
        (
            400,
            b'{"error":"The model has crashed without additional information. (Exit code: null)"}',
            "crashed",
            False,
        ),
        (500, b'{"error":{"message":"THE MODEL HAS CRASHED"}}', "crashed", False),
        (200, b'{"error":"The model has crashed"}', "crashed", False),
        (400, b'{"error":"Model was unloaded while the request was still in queue.."}', "unloaded", True),
        (400, b'{"error":{"message":"Model unloaded."}}', "unloaded", False),
        (400, b"Model is unloaded.", "unloaded", False),
        (400, b'{"error":"Model reloaded."}', "unloaded", True),
        (
            404,
            b'{"error":{"message":"No models loaded. Please load a model in the developer page or use the '
            b"'lms load' command.\"}}",
            "unloaded",
            True,
        ),
        (
            200,
            b'{"type":"error","error":{"type":"internal_error","message":"Model unloaded."}}',
            "unloaded",
            False,
        ),
    ],
)
def test_answers_that_say_the_model_went_away_are_understood(status, body, reason, retryable):
    lost = looks_lost(status, body)

    assert lost is not None
    assert (lost.reason, lost.retryable) == (Reason(reason), retryable)
    assert looks_lost(status, body.upper()) == lost or b'"ERROR"' in body.upper()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b'{"choices":[{"message":{"content":"The model has crashed"}}]}'),
        (200, b"The model has crashed"),
        (200, b'{"error":null,"output":"Model unloaded."}'),
        (400, b'{"error":{"message":"Invalid model identifier \\"x\\"."}}'),
        (400, b'{"error":{"message":"Failed to load model \\"x\\". Error: insufficient system resources"}}'),
        (400, b'{"error":{"message":"the prompt exceeds the context length"}}'),
        (500, b"<html>Internal Server Error</html>"),
        (500, b"\xff\xfe"),
        (500, b""),
        (500, b"[" * 100_000),
    ],
)
def test_other_answers_say_nothing_about_the_model(status, body):
    assert looks_lost(status, body) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":"flat"}', "flat"),
        (b'{"error":{"message":"nested","code":null}}', "nested"),
        (b'{"error":{"type":"model_load_failed"}}', "model_load_failed"),
        (b'{"error":{}}', ""),
        (b'{"type":"error","message":"responses"}', "responses"),
        (b'{"type":"response.failed","response":{"error":{"message":"failed"}}}', "failed"),
        (b'{"type":"response.created","response":{"error":null}}', None),
        (b'{"message":"hello"}', None),
        (b'{"error":null}', None),
        (b'{"error":[1]}', None),
        (b"[]", None),
        (b"", None),
        (b"proxy error: Failed to read connection", None),
    ],
)
def test_the_message_of_an_error_is_found_in_every_layout(body, message):
    assert error_message(body) == message


# --- the official clients ----------------------------------------------------------------------------

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
        anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
        async with anthropic.AsyncAnthropic(
            base_url=f"http://127.0.0.1:{port}", api_key="k", max_retries=0, timeout=5
        ) as client:
            stream = await client.messages.create(
                model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}], stream=True
            )
            return [item async for item in stream]
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
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
    package = "anthropic" if name == "messages" else "openai"
    module = pytest.importorskip(package, reason=f"the {package} package is not installed")
    error: type[Exception] = module.APIError
    return error


@pytest.mark.parametrize("begun", [False, True], ids=["while_waiting", "in_the_answer"])
@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
async def test_the_official_client_raises_on_a_stream_that_failed(name, begun):
    parts = [heartbeat_comment("m", "loading", 1, 2), error_event(ROUTES[name], "it is gone", "upstream_cut")]
    if begun:
        parts.insert(1, BEGUN[name])
    async with RawServer([HEAD + chunked(*parts), Close()]) as server:
        with pytest.raises(api_error(name), match="it is gone"):
            await streamed(name, server.port)


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


@pytest.mark.parametrize("name", ["chat", "completions", "responses", "messages"])
async def test_the_official_client_raises_on_a_refusal_and_shows_its_message(name):
    body = error_body(ROUTES[name], 503, "it is loading", "model_not_ready")
    refusal = answer(body, status=b"503 Service Unavailable")
    async with RawServer([refusal, Close()]) as server:
        with pytest.raises(api_error(name), match="it is loading") as raised:
            await streamed(name, server.port)

    assert raised.value.status_code == 503


# --- what an event of a chat says -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "delta"),
    [
        ('{"choices":[{"delta":{"content":"a"},"finish_reason":null}]}', Delta(text="a")),
        ('{"choices":[{"delta":{"reasoning_content":"a"}}]}', Delta(reasoning="a")),
        ('{"choices":[{"delta":{"reasoning":"a","content":null}}]}', Delta(reasoning="a")),
        ('{"choices":[{"delta":{},"finish_reason":"length"}]}', Delta(finished=True)),
        ("[DONE]", Delta(finished=True, last=True)),
        ('{"choices":[],"usage":{}}', Delta()),
        ('{"choices":[{"delta":{"content":[1]}}],"error":null}', Delta()),
        ('{"choices":{"delta":1}}', Delta()),
        ('{"choices":[7]}', Delta()),
        ('{"error":"flat"}', Delta(error="flat")),
        ('{"error":{"message":"m","code":"c"}}', Delta(error="m", code="c")),
        ('{"error":{"message":"m","code":7}}', Delta(error="m")),
        ('{"type":"error","message":"m"}', Delta(error="m")),
    ],
)
def test_an_event_of_a_chat_is_read_for_what_it_says(data, delta):
    assert chat_delta(data) == delta


@pytest.mark.parametrize("data", ["", "{", "7", "null", "[]", '"[DONE]"', "[" * 100_000])
def test_what_is_no_event_of_a_chat_is_an_error_of_one_kind(data):
    with pytest.raises(ValueError):
        chat_delta(data)


@given(
    st.text()
    | st.recursive(
        st.none() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["choices", "delta", "content", "error", "message", "type", "code"]), x
            )
        ),
    ).map(json.dumps)
)
def test_no_event_of_a_chat_raises_anything_else(data):
    try:
        found = chat_delta(data)
    except ValueError:
        return
    assert all(isinstance(text, str) for text in (found.text, found.reasoning))


def test_an_error_is_read_in_our_layout_too():
    body = b'{"success":false,"error":{"message":"m","code":"c","field":"f"}}'

    assert chat_error(body) == Delta(error="m", code="c", field="f")
    assert chat_error(b"<html>") == Delta()
