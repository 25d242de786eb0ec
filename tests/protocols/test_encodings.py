import gzip
import random
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols.encodings import PIECE_BYTES, BadEncoding, Unpacker, codings, readable, unpacked

TEXT = b'{"model":"m","input":"' + random.Random(7).randbytes(300).hex().encode() + b'"}'


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([], []),
        ([b"identity"], []),
        ([b"GZip "], ["gzip"]),
        ([b"deflate, gzip"], ["gzip", "deflate"]),
        ([b"deflate", b"identity, x-gzip"], ["x-gzip", "deflate"]),
        ([b"br"], None),
        ([b"gzip, br"], None),
        ([b"gzip," * 9], None),
        ([b"\xff"], None),
    ],
)
def test_codings_are_taken_off_in_the_order_against_which_they_were_put_on(values, found):
    assert codings(values) == found


@pytest.mark.parametrize(
    ("names", "body"),
    [
        ([], TEXT),
        (["gzip"], gzip.compress(TEXT)),
        (["deflate"], zlib.compress(TEXT)),
        (["gzip", "deflate"], gzip.compress(zlib.compress(TEXT))),
        (["gzip"], gzip.compress(TEXT[:9]) + gzip.compress(TEXT[9:])),
        (["gzip"], gzip.compress(TEXT) + b"\0" * 9),
        (["deflate"], zlib.compress(TEXT) + b"more"),
        (["gzip"], gzip.compress(TEXT) + b"\x1f more \x1f\x8b"),
    ],
    ids=range(8),
)
def test_a_body_is_the_same_however_it_was_cut(names, body):
    for size in (1, 7, len(body)):
        unpacker = Unpacker(names)
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        got = b"".join(b"".join(unpacker.feed(piece)) for piece in pieces)
        unpacker.finish()
        assert got == TEXT
    assert unpacked(body, names) == TEXT


@given(st.binary(), st.sampled_from(["gzip", "deflate"]))
def test_what_is_not_what_it_says_is_said_in_one_way(body, name):
    unpacker = Unpacker([name])
    with pytest.raises(BadEncoding, match=f"{name}"):
        _ = list(unpacker.feed(body)), unpacker.finish()


def test_a_bomb_is_unpacked_a_piece_at_a_time():
    bomb = gzip.compress(gzip.compress(b" " * 50_000_000))
    tracemalloc.start()
    sizes = [len(piece) for piece in Unpacker(["gzip", "gzip"]).feed(bomb)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert sum(sizes) == 50_000_000
    assert max(sizes) <= PIECE_BYTES
    assert peak < 4_000_000


def test_an_answer_is_read_as_far_as_it_can_be_and_no_bomb_goes_off():
    bomb = gzip.compress(b" " * 10_000_000)

    assert readable(gzip.compress(TEXT), [b"gzip"]) == TEXT
    assert readable(gzip.compress(TEXT)[:-9], [b"gzip"])
    assert readable(TEXT, [b"gzip"]) == TEXT
    assert readable(TEXT, [b"br"]) == readable(TEXT, []) == TEXT
    assert len(readable(bomb, [b"gzip"])) == PIECE_BYTES
    assert readable(b"", [b"gzip"]) == b""
