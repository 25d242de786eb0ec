import json
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.protocols.asked import SMALL_BODY, Asked, ModelFinder, read_body

# --- which model -----------------------------------------------------------------------------------

PAD = '"pad":"%s",' % ("x" * SMALL_BODY)  # makes any body a large one


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
        ('{"temperature":NaN,"model":"a","top_p":-Infinity}', "a", False),
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
        assert (asked.model, asked.stream, asked.conversation, asked.misnamed) == (None, False, None, False)


@pytest.mark.parametrize(
    ("body", "readable", "misnamed"),
    [
        ('{"x":1}', True, False),
        ('{"model":null}', True, False),
        ('{"model":""}', True, False),
        ('{"model":7}', True, True),
        ('{"model":"a","model":7}', True, True),
        ('{"model":7,"model":null}', True, False),
        ('{"model":["a"]}', True, True),
        ('{"model":{"id":"a"}}', True, True),
        ('{"model":false}', True, True),
        ('{"model":"%s"}' % ("m" * 4097), True, True),
        ('{"model":"%s"}' % ("m" * 1_000_000), True, True),
        ('{"model":}', False, False),
        ('{"model":7', False, False),
    ],
)
def test_what_is_no_name_is_told_from_no_name(body, readable, misnamed):
    for asked in small_and_large(body):
        assert (asked.readable, asked.misnamed) == (readable, misnamed)


def test_the_answer_that_is_gone_on_from_and_the_instance_to_unload_are_read():
    body = '{"previous_response_id":"resp_1","instance_id":"a:2","input":"x"}'

    for asked in small_and_large(body):
        assert (asked.previous, asked.instance) == ("resp_1", "a:2")
    for asked in small_and_large('{"previous_response_id":7,"instance_id":null}'):
        assert (asked.previous, asked.instance) == (None, None)


@pytest.mark.parametrize(
    "body", ["", "x", '"model"', "[]", '[{"model":"a"}]', "null", "12", "model=a", "\0\0\0\0"]
)
def test_a_body_that_is_no_object_asks_for_nothing(body):
    assert read_body(body.encode()) == Asked()
    assert read_body(body.encode() + b" " * SMALL_BODY) == Asked()


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
    large = json.dumps({"model": "a", "pad": "x" * SMALL_BODY} | body).encode()
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
