"""A body with another name for its model: what a parser reads of it changes in that alone, and no other byte does."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols.renamed import renamed

NAME = "acme/tiny-4b"
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"model":"a"}', '{"model":"acme/tiny-4b"}'),
        (' \n{ "x": [1, {"model":"no"}], "model" : "a\\"b" , "y":1e400}\n', None),
        ('{"mod\\u0065l":"a"}', '{"mod\\u0065l":"acme/tiny-4b"}'),
        ('{"model":"a","x":1,"model":"b"}', '{"model":"a","x":1,"model":"acme/tiny-4b"}'),
        ('{"model":null}', '{"model":"acme/tiny-4b"}'),
        ('{"model":"","x":1}', '{"model":"acme/tiny-4b","x":1}'),
        ("{}", '{"model":"acme/tiny-4b"}'),
        (" { } ", ' {"model":"acme/tiny-4b" } '),
        ('{ "x":1}', '{"model":"acme/tiny-4b", "x":1}'),
        ('{"x":{"model":"deep"}}', '{"model":"acme/tiny-4b","x":{"model":"deep"}}'),
    ],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_last_value_of_model_is_changed_or_put_in_front(body, expected, encoding):
    expected = expected or body.replace('"a\\"b"', f'"{NAME}"')

    assert renamed(body.encode(encoding), NAME) == expected.encode(encoding)


@pytest.mark.parametrize("body", [b"", b"[]", b"12", b'{"model":"a"', b'{"model":"a"}}', b'"model"'])
def test_what_is_no_object_has_no_name(body):
    assert renamed(body, NAME) is None


def test_bytes_that_are_no_characters_stay():
    assert (
        renamed(b'{"x":"\xff\xfe","model":"a","y":"\x80"}', "b") == b'{"x":"\xff\xfe","model":"b","y":"\x80"}'
    )
    lone = '{"x":"\ud800","model":"a","y":"\udc00"}'.encode("utf-16-le", "surrogatepass")
    expected = '{"x":"\ud800","model":"b","y":"\udc00"}'.encode("utf-16-le", "surrogatepass")
    assert renamed(lone, "b") == expected


def test_a_name_is_written_so_that_any_parser_reads_it():
    name = 'ä "quoted" \\ 😀'

    for encoding in ENCODINGS:
        assert json.loads(renamed('{"model":"a"}'.encode(encoding), name) or b"")["model"] == name


# Small ones: what is long takes seconds to make up, and has nothing in it that is new to a parser.
TEXT = st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda c: st.lists(c, max_size=4) | st.dictionaries(TEXT, c, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(TEXT | st.just("model"), JSON, max_size=5), st.sampled_from(ENCODINGS), st.booleans())
def test_nothing_else_that_a_parser_reads_changes(body, encoding, ascii_only):
    raw = json.dumps(body, ensure_ascii=ascii_only).encode(encoding, "replace")
    before = json.loads(raw)

    assert json.loads(renamed(raw, NAME) or b"") == {**before, "model": NAME}


def test_a_picture_of_twenty_megabytes_costs_one_copy_of_it():
    body = b'{"model":"a","messages":[{"content":"' + b"x" * 20_000_000 + b'"}]}'
    tracemalloc.start()
    try:
        changed = renamed(body, NAME)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert changed == body.replace(b'"a"', b'"acme/tiny-4b"', 1)
    assert peak < 45_000_000  # what stands behind the name, and the whole
