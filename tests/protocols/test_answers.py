import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols.answers import (
    Delta,
    bare_error,
    chat_delta,
    chat_error,
    error_message,
    error_object,
    event_error,
)


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
        (b'{"object":"error","message":"vllm","code":400}', "vllm"),
        (b'{"detail":"fastapi"}', "fastapi"),
        (
            b'{"detail":[{"loc":["body","n",0],"msg":"required"},{"msg":"and"},{"msg":7},8]}',
            "body/n/0: required; and",
        ),
        (b'{"detail":[]}', None),
        (b'{"detail":{"a":1}}', None),
        (b'{"detail":"x","choices":[]}', None),
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


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (
            b'{"error":{"message":"m","n_ctx":4096,"code":null}}',
            {"message": "m", "n_ctx": 4096, "code": None},
        ),
        (b'{"error":{"type":"t"}}', {"type": "t", "message": "t"}),
        (b'{"error":"flat"}', {"message": "flat"}),
        (b'{"type":"error","code":"c","message":"m"}', {"code": "c", "message": "m"}),
        (b'{"error":{"message":"m","n":NaN}}', {"message": "m", "n": "NaN"}),
        (
            b'{"object":"error","message":"m","type":"t","code":400}',
            {"message": "m", "type": "t", "code": 400},
        ),
        (
            b'[{"error":{"message":"m","status":"INVALID_ARGUMENT"}}]',
            {"message": "m", "status": "INVALID_ARGUMENT"},
        ),
        (b'[{"error":"m"},{}]', {}),
        (b"[7]", {}),
        (b"[]", {}),
        (b'{"choices":[]}', {}),
        (b"<html>", {}),
    ],
)
def test_every_field_of_an_error_is_kept(body, error):
    assert error_object(body) == error


@pytest.mark.parametrize(
    ("body", "known"),
    [
        (b'{"message":"m","code":"c","n":1}', True),
        (b'{"message":"m","type":"t"}', True),
        (b'{"message":"m","code":400}', False),
        (b'{"message":"","code":"c"}', False),
        (b'{"message":{"content":"m"},"type":"t"}', False),
        (b'{"error":true,"message":"m","type":"t"}', False),
        (b"[]", False),
        (b"<html>", False),
    ],
)
def test_a_refusal_may_be_the_error_itself(body, known):
    assert bare_error(body) == (json.loads(body) if known else {})


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b': a\n\nevent: error\ndata: {"error":"m"}\n\n', b'{"error":"m"}'),
        (b'data: {"choices":[]}\n\ndata: {"error":"m"}\n\n', b""),
        (b'data: {"error":"m"}\n', b""),
        (b"data: " + b"x" * 9_000_000 + b"\n\n", b""),
        (b"", b""),
    ],
    ids=range(5),
)
def test_a_stream_that_begins_with_an_error_is_told_from_one_that_has_one_later(stream, error):
    assert event_error(stream) == error


def test_an_error_is_read_in_our_layout_too():
    body = b'{"success":false,"error":{"message":"m","code":"c","field":"f"}}'

    assert chat_error(body) == Delta(error="m", code="c", field="f")
    assert chat_error(b"<html>") == Delta()
