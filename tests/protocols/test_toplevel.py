import pytest

from keepalive.protocols.toplevel import TopLevel

BODY = (
    rb'{"a": "x\"}", "deep": {"a": [1, "]"], "b": 2}, "b": [true, {"a": 3}], "a": -1.5e3, "\u0062" : "last"}'
)


def walk(body: bytes, cut: int = 0, most: int = 100) -> TopLevel:
    top = TopLevel({"a", "b"}, most)
    for piece in (body[:cut], body[cut:]):
        top.feed(piece)
    return top


def test_the_last_value_of_each_key_is_found_wherever_the_body_is_cut():
    for cut in range(len(BODY) + 1):
        top = walk(BODY, cut)

        assert top.values == {"a": b"-1.5e3", "b": b'"last"'}
        assert top.complete


def test_a_value_is_kept_up_to_one_byte_more_than_wanted():
    for cut in range(30):
        top = walk(b'{"a": "%b", "b": "%b"}' % (b"x" * 8, b"x" * 9), cut, most=10)

        assert top.values == {"a": b'"xxxxxxxx"', "b": b'"xxxxxxxxx"'}
        assert walk(b'{"a": "%b"}' % (b"x" * 50), cut, most=10).values == {"a": b'"' + b"x" * 10}


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1}}', b"[]", b"1", b"{,}"]
)
def test_what_is_no_whole_object_is_not_complete(body):
    for cut in range(len(body) + 1):
        assert not walk(body, cut).complete
