import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols.meter import GAP_BOUNDS, Meter, Words
from keepalive.protocols.routes import Protocol
from tests.kit import DATA


def chat(**delta: object) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":%s,"finish_reason":null}]}\n\n' % json.dumps(delta).encode()


FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def metered(protocol: Protocol, *chunks: bytes, sent_at: float = 0) -> Meter:
    """A meter that was fed one chunk per second."""
    meter = Meter(protocol, sent_at)
    for now, chunk in enumerate(chunks, 1):
        meter.feed(sent_at + now, chunk)
    return meter


# --- the first token -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "before", "first"),
    [
        (Protocol.CHAT, chat(role="assistant", content=None), chat(content="Hi")),
        (Protocol.CHAT, chat(role="assistant", content=""), chat(content=" ")),
        (Protocol.CHAT, chat(role="assistant"), chat(reasoning_content="Hm")),
        (Protocol.CHAT, chat(reasoning_content="", reasoning=""), chat(reasoning="Hm")),
        (Protocol.CHAT, chat(tool_calls=[]), chat(tool_calls=[{"index": 0, "function": {"name": "f"}}])),
        (Protocol.CHAT, USAGE, chat(content='"')),
        (Protocol.CHAT, b": keep-alive\n\n", b'data: {"choices":[{"delta": {"content" : "x"}}]}\n\n'),
        (
            Protocol.COMPLETIONS,
            b'data: {"choices":[{"text":"","index":0,"finish_reason":null}]}\n\n',
            b'data: {"choices":[{"text":"\\n","index":0,"finish_reason":null}]}\n\n',
        ),
        (
            Protocol.RESPONSES,
            b'event: response.content_part.added\ndata: {"type":"response.content_part.added",'
            b'"part":{"type":"output_text","text":""}}\n\n',
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n',
        ),
        (
            Protocol.RESPONSES,
            b'data: {"type":"response.created","response":{"error":null,"instructions":"text"}}\n\n',
            b'data: {"type":"response.reasoning_text.delta","delta":"a"}\n\n',
        ),
        (
            Protocol.MESSAGES,
            b'event: message_start\ndata: {"type":"message_start","message":{"content":[],"model":"m"}}\n\n'
            b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
            b'"content_block":{"type":"text","text":""}}\n\nevent: ping\ndata: {"type":"ping"}\n\n',
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":"thinking_delta","thinking":"a"}}\n\n',
        ),
        (
            Protocol.NATIVE,
            b'event: model_load.progress\ndata: {"type":"model_load.progress","progress":0.4}\n\n'
            b'event: reasoning.delta\ndata: {"type":"reasoning.delta","content":""}\n\n',
            b'event: message.delta\ndata: {"type":"message.delta","content":"Hel"}\n\n',
        ),
    ],
)
def test_the_first_token_is_the_first_delta_that_is_not_empty(protocol, before, first):
    meter = metered(protocol, before, before, first, first, sent_at=100)

    assert meter.first_token_seconds == 3
    assert not meter.ended
    assert meter.error is None


@pytest.mark.parametrize(
    ("name", "protocol", "events", "first"),
    [
        ("chat", Protocol.CHAT, 16, "mamo"),
        ("chat_reasoning", Protocol.CHAT, 18, "reasoning_content"),
        ("chat_tool", Protocol.CHAT, 8, None),
        ("completions", Protocol.COMPLETIONS, 5, "pava"),
        ("responses", Protocol.RESPONSES, 11, "tatara"),
        ("messages", Protocol.MESSAGES, 8, "nunafu"),
    ],
)
def test_recorded_streams_are_whole_and_their_first_token_is_found(name, protocol, events, first):
    stream = (DATA / f"{name}.sse").read_bytes()
    lines = stream.splitlines(keepends=True)
    meter = metered(protocol, *lines)

    assert meter.ended
    assert meter.error is None
    assert meter.events == stream.count(b"data: ") == events
    assert meter.first_token_seconds is not None
    if first:
        assert first.encode() in lines[int(meter.first_token_seconds) - 1]


# --- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "last"),
    [
        (Protocol.CHAT, FINISH),
        (Protocol.CHAT, b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'),
        (Protocol.CHAT, DONE),
        (Protocol.CHAT, b"data:[DONE]\r\n\r\n"),
        (Protocol.COMPLETIONS, b'data: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n'),
        (Protocol.RESPONSES, b'event: response.completed\ndata: {"type":"response.completed"}\n\n'),
        (Protocol.RESPONSES, b'data: {"response":{"error":null},"type":"response.incomplete"}\n\n'),
        (Protocol.MESSAGES, b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
        (Protocol.NATIVE, b'event: chat.end\ndata: {"type":"chat.end","result":{"output":[]}}\n\n'),
    ],
)
def test_an_answer_is_whole_when_its_route_says_so(protocol, last):
    assert not metered(protocol, chat(content="a")).ended
    assert metered(protocol, chat(content="a"), last).ended
    assert metered(protocol, chat(content="a") + last + last, last).ended
    assert metered(protocol, chat(content="a"), *(last[i : i + 1] for i in range(len(last)))).ended


def test_what_a_model_writes_never_ends_its_answer():
    said = 'data: [DONE]\n\n{"finish_reason":"stop","type":"message_stop","error":"x"}'
    said += '{"type":"response.completed"}'
    chunks = {
        Protocol.CHAT: chat(content=said),
        Protocol.MESSAGES: b'data: {"type":"content_block_delta","delta":%s}\n\n' % json.dumps(said).encode(),
        Protocol.RESPONSES: b'data: {"type":"response.x.delta","delta":%s}\n\n' % json.dumps(said).encode(),
        Protocol.NATIVE: b'data: {"type":"tool_call.success","output":{"type":"chat.end","error":"x"}}\n\n',
    }

    for protocol, chunk in chunks.items():
        meter = metered(protocol, chunk, chunk)
        assert (meter.ended, meter.error) == (False, None)


def test_the_bare_text_of_a_router_and_a_missing_end_are_cuts():
    recorded = (DATA / "chat_proxy_error.sse").read_bytes()
    meter = metered(Protocol.CHAT, recorded)

    assert recorded.endswith(b"\n\nproxy error: Failed to read connection")
    assert not meter.ended
    assert meter.first_token_seconds == 1
    assert not metered(Protocol.CHAT, b"proxy error: Failed to read connection").ended


def test_a_route_without_streams_is_never_cut():
    assert metered(Protocol.OPENAI, b'{"data":[]}').ended
    assert metered(Protocol.PLAIN).ended


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "event", "data"),
    [
        (
            Protocol.CHAT,
            b'data: {"error":{"code":500,"message":"m"}}\n\n',
            b'{"error":{"code":500,"message":"m"}}',
        ),
        (Protocol.CHAT, b'event: error\ndata: {"error": {"message":"m"}}\n\n', b'{"error": {"message":"m"}}'),
        (Protocol.CHAT, b'data: {"error":"m"}\r\n\r\n', b'{"error":"m"}'),
        (
            Protocol.CHAT,
            b'data: {"object":"error","message":"m","code":400}\n\n',
            b'{"object":"error","message":"m","code":400}',
        ),
        (
            Protocol.RESPONSES,
            b'event: error\ndata: {"type":"error","code":null,"message":"m","sequence_number":1}\n\n',
            b'{"type":"error","code":null,"message":"m","sequence_number":1}',
        ),
        (
            Protocol.RESPONSES,
            b'data: {"type":"response.failed","response":{"error":{"message":"m"}}}\n\n',
            b'{"type":"response.failed","response":{"error":{"message":"m"}}}',
        ),
        (
            Protocol.MESSAGES,
            b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"m"}}\n\n',
            b'{"type":"error","error":{"type":"api_error","message":"m"}}',
        ),
        (
            Protocol.NATIVE,
            b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"m"}}\n\n',
            b'{"type":"error","error":{"type":"internal_error","message":"m"}}',
        ),
    ],
)
def test_an_error_in_the_stream_is_seen(protocol, event, data):
    meter = metered(protocol, chat(content="a"), event)

    assert meter.error == data
    assert not meter.ended
    assert metered(protocol, *(event[i : i + 1] for i in range(len(event)))).error == data


def test_a_recorded_error_is_seen():
    meter = metered(Protocol.CHAT, (DATA / "chat_error.sse").read_bytes())

    assert (
        meter.error
        == b'{"error":{"code":500,"message":"Context size has been exceeded.","type":"server_error"}}'
    )
    assert not meter.ended


# --- gaps ------------------------------------------------------------------------------------------


def test_gaps_are_counted_from_the_first_token_to_the_end():
    meter = Meter(Protocol.CHAT, 10)
    meter.feed(11, chat(role="assistant", content=None))
    meter.feed(12, chat(content="a"))
    meter.feed(12.02, chat(content="b"))  # 20 ms
    meter.feed(12.32, chat(content="c") + chat(content="d") + chat(content="e"))  # 300 ms, and twice nothing
    meter.feed(72.32, chat(content="f"))  # a minute
    meter.feed(99, FINISH + USAGE + DONE)

    expected = dict.fromkeys([*GAP_BOUNDS, "more"], 0) | {0.001: 2, 0.025: 1, 0.5: 1, "more": 1}
    assert meter.gaps == list(expected.values())
    assert meter.gap_seconds == pytest.approx(60.32)
    assert meter.first_token_seconds == 2
    assert meter.events == 10


def test_what_comes_with_the_first_token_has_no_gap_before_it():
    meter = metered(
        Protocol.CHAT, chat(role="assistant") + chat(content="a") + chat(content="b") + FINISH + DONE
    )

    assert meter.gaps == [1] + [0] * len(GAP_BOUNDS)
    assert meter.gap_seconds == 0


def test_a_whole_answer_in_one_chunk_has_no_gaps_behind_its_end():
    meter = metered(Protocol.CHAT, chat(content="a") + FINISH + DONE, chat(content="b"))

    assert sum(meter.gaps) == 0


def test_events_alike_are_seen_for_what_they_are():
    alike = [
        chat(content=text)
        for text in ("a", "b", "", "\\", '"', "c", "finish_reason", "\n\ndata: [DONE]", "d")
    ]
    ends = [alike[0] + alike[1], alike[0][:-2], b"\n\n", alike[0].replace(b"null", b'"stop"')]
    meter = metered(Protocol.CHAT, *alike, *ends)

    assert meter.events == 13
    assert meter.first_token_seconds == 1
    assert sum(meter.gaps) == 11  # none before the first, none for the last
    assert meter.gap_seconds == 11
    assert meter.ended


def test_events_alike_that_come_together_are_counted_one_by_one():
    a, b = chat(content="a"), chat(content="b")
    meter = metered(Protocol.CHAT, a, b, a + b, b + a + b, a + chat(content='"') + b, a + b[:-1])

    assert meter.events == 12
    assert meter.gaps[0] == 1 + 2 + 2 + 1
    assert sum(meter.gaps) == 11
    assert meter.gap_seconds == 5
    assert not meter.ended
    meter.feed(7, b"\n" + FINISH + a)
    assert meter.ended


@pytest.mark.parametrize(
    ("name", "protocol"), [("messages", Protocol.MESSAGES), ("responses", Protocol.RESPONSES)]
)
def test_a_quick_look_sees_what_a_long_one_sees(name, protocol):
    events = [event + b"\n\n" for event in (DATA / f"{name}.sse").read_bytes().split(b"\n\n")[:-1]]
    delta = next(event for event in events if b"delta" in event)
    events[events.index(delta) : events.index(delta)] = [delta] * 50
    quick, long = metered(protocol, *events), Meter(protocol, 0)
    for now, event in enumerate(events, 1):
        long._looks = 0
        long.feed(now, event)

    assert quick.prefix == b"" == long.prefix
    for seen in ("events", "gaps", "gap_seconds", "first_token_seconds", "ended", "error"):
        assert getattr(quick, seen) == getattr(long, seen), seen


# --- any cut, any bytes ----------------------------------------------------------------------------

CHAT_EVENTS = [
    chat(role="assistant", content=None),
    chat(content="a"),
    chat(content="b"),
    chat(content="ä 😀"),
    chat(content='"'),
    chat(content="\\"),
    chat(content=""),
    b": comment\n\n",
    b'event: error\ndata: {"error":{"message":"m"}}\n\n',
    FINISH,
    USAGE,
    DONE,
    b"proxy error: x",
]


@given(st.data())
def test_what_is_seen_does_not_depend_on_where_the_stream_is_cut(data):
    line_end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    events = data.draw(st.lists(st.sampled_from(CHAT_EVENTS), max_size=12))
    stream = b"".join(events).replace(b"\n", line_end)
    ends = [stream.find(event) + len(event) for event in events if event in stream]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)) | st.sampled_from(ends or [0]), max_size=12)))
    chunks = [stream[a:b] for a, b in pairwise([0, *cuts, len(stream)])]
    whole, cut = metered(Protocol.CHAT, stream), metered(Protocol.CHAT, *chunks)
    for meter in (whole, cut):
        meter.feed(100, line_end)  # ends a line that the stream left open

    def seen(meter: Meter) -> tuple[object, ...]:
        return (
            meter.events,
            meter.ended,
            meter.error,
            meter.first_token_seconds is None,
        )

    assert seen(cut) == seen(whole)


@given(st.sampled_from(Protocol), st.lists(st.binary() | st.sampled_from(CHAT_EVENTS)))
def test_no_bytes_make_it_raise(protocol, chunks):
    meter = metered(protocol, *chunks)

    assert len(meter._carry) <= 16 * 1024


def test_a_line_without_end_is_looked_at_in_pieces_and_not_kept():
    meter = Meter(Protocol.CHAT, 0)
    meter.feed(1, b'data: {"choices":[{"delta":{"content":"')
    for _ in range(100):
        meter.feed(2, b"x" * 10_000)
        assert len(meter._carry) <= 16 * 1024
    meter.feed(3, b'"},"finish_rea')
    meter.feed(4, b'son":"stop"}]}\n\n')

    assert meter.ended
    assert meter.events == 1
    assert meter.first_token_seconds == 2


def answer(protocol: Protocol, said: object) -> bytes:
    """A whole one, of whose layout only the place of its words counts."""
    return json.dumps({"text" if protocol in TEXTS else "content": said}).encode()


TEXTS = (Protocol.RESPONSES, Protocol.MESSAGES)


@pytest.mark.parametrize("protocol", [Protocol.CHAT, Protocol.NATIVE, *TEXTS])
@pytest.mark.parametrize("said", ["", " ", "\n", "\n\n \t\r\n", "\n" * 1000])
@pytest.mark.parametrize("word", ["", "x", "\\", '"', "\u00e9"])
def test_blanks_alone_are_no_word_and_may_stand_before_one(protocol: Protocol, said: str, word: str):
    body = answer(protocol, said + word)
    for size in (1, 7, len(body)):
        words = Words(protocol)
        for at in range(0, len(body), size):
            words.feed(body[at : at + size])

        assert words.said is bool(word)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"content": [{"type": "text", "text": ""}]}, False),
        ({"content": [{"type": "text", "text": "x"}]}, True),
        ({"content": [{"type": "thinking", "thinking": "x"}]}, True),
        ({"content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, True),
        ({"content": [{"type": "output_audio"}]}, True),
        ({"content": "", "logprobs": {"content": [{"token": "<|im_end|>"}]}}, False),
    ],
)
def test_a_list_is_a_word_where_one_stands_in_it(part: dict[str, object], said: bool):
    words = Words(Protocol.CHAT)
    words.feed(json.dumps({"choices": [{"message": part}]}).encode())

    assert words.said is said


@pytest.mark.parametrize(("last", "said"), [("\n", False), ("x", True)])
def test_a_stream_of_blanks_has_a_first_token_and_no_word(last: str, said: bool):
    blanks = [chat(content="\n") for _ in range(40)]

    meter = metered(Protocol.CHAT, *blanks, chat(content=last), chat())

    assert (meter.first_token_seconds, meter.said) == (1.0, said)
