import re
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols.sse import (
    BOM,
    Comment,
    Decoder,
    Event,
    EventTooLong,
    Splitter,
    encode,
    encode_comment,
)
from tests.kit import DATA

# Made of what matters to the format, so that random bytes meet every rule often.
PIECES = [
    b"\n", b"\r", b"\r\n", b"\n\n", b":", b": hi", b"data", b"data:", b"data: ", b"data:  two",
    b"event: e", b"id: 7", b"id: \0", b"id", b"retry: 12",
    b"retry: x", b"x", BOM, BOM[:1], BOM[:2], "ä€😀".encode(), b"\xff",
]  # fmt: skip
streams = st.lists(st.sampled_from(PIECES), max_size=24).map(b"".join)


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    stream = draw(streams)
    cuts = sorted(draw(st.sets(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    return stream, [stream[a:b] for a, b in pairwise(edges)]


def slow_boundaries(stream: bytes) -> list[int]:
    """Every offset at which an event may begin, byte by byte, as the format's grammar has it."""
    found = [0]
    at = 0
    if stream.startswith(BOM):
        at = 3
        found.append(3)
    line_is_empty = True
    while at < len(stream):
        if stream[at : at + 2] == b"\r\n":
            # Between the two halves an event may already begin: the CR has ended the line.
            ends, at = [at + 1, at + 2], at + 2
        elif stream[at : at + 1] in (b"\r", b"\n"):
            ends, at = [at + 1], at + 1
        else:
            line_is_empty = False
            at += 1
            continue
        if line_is_empty:
            found += ends
        line_is_empty = True
    return found


def split_all(chunks: list[bytes]) -> list[int]:
    """What a Splitter says after each chunk, as offsets in the whole stream."""
    splitter = Splitter()
    found = []
    begin = 0
    for chunk in chunks:
        end = splitter.feed(chunk)
        if end:
            found.append(begin + end)
        begin += len(chunk)
        assert splitter.at_boundary == (begin in slow_boundaries(b"".join(chunks)[:begin]))
    return found


@given(cut_streams())
def test_the_last_boundary_of_every_chunk_is_found_wherever_the_stream_is_cut(cut):
    stream, chunks = cut
    boundaries = slow_boundaries(stream)
    expected = []
    begin = 0
    for chunk in chunks:
        inside = [b for b in boundaries if begin < b <= begin + len(chunk)]
        expected += inside[-1:]
        begin += len(chunk)

    assert split_all(chunks) == expected


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_boundary_is_found_at_every_split_and_with_every_line_end(line_end):
    stream = b"data: a" + line_end + line_end + b"data: b" + line_end + line_end
    first = len(stream) // 2

    for cut in range(len(stream) + 1):
        found = split_all([stream[:cut], stream[cut:]])
        assert found[-1] == len(stream)
        if first <= cut < len(stream) - 1:
            assert found[0] in (first, first - 1)  # between the halves of a CR LF when it is cut there


def test_a_chunk_that_ends_inside_an_event_is_split_before_it():
    splitter = Splitter()

    assert splitter.feed(b"data: one\n\ndata: tw") == 11
    assert not splitter.at_boundary
    assert splitter.feed(b"o\n") == 0
    assert splitter.feed(b"\ndata: three") == 1
    assert not splitter.at_boundary


def test_nothing_may_be_put_before_or_into_a_byte_order_mark():
    splitter = Splitter()

    assert splitter.at_boundary
    assert splitter.feed(b"\xef") == 0
    assert not splitter.at_boundary
    assert splitter.feed(b"\xbb") == 0
    assert not splitter.at_boundary
    assert splitter.feed(b"\xbfdata: a\n\n") == 10
    assert splitter.at_boundary


def test_a_large_event_costs_its_length_once():
    splitter, decoder = Splitter(), Decoder(max_event_bytes=64 * 1024 * 1024)
    chunk = b"x" * 65536
    began = time.process_time()
    splitter.feed(b"data: ")
    decoder.feed(b"data: ")
    for _ in range(512):
        splitter.feed(chunk)
        decoder.feed(chunk)
    assert splitter.feed(b"\n\n") == 2
    (event,) = decoder.feed(b"\n\n")

    assert len(event.data) == 32 * 1024 * 1024
    assert time.process_time() - began < 2


# --- Decoder ---------------------------------------------------------------------------------------


def slow_decode(stream: bytes) -> tuple[list[Event | Comment], int | None]:
    """The standard's own steps, line by line over the whole stream."""
    stream = stream.removeprefix(BOM)
    lines = re.split(rb"\r\n|\r|\n", stream)[:-1]  # the last one never ended
    items: list[Event | Comment] = []
    held: list[Event | Comment] = []  # nothing comes out before its blank line
    data: list[str] | None = None
    kind, held_id, retry, held_retry = "", "", None, None
    for line in (line.decode("utf-8", "replace") for line in lines):
        if line == "":
            items += held
            if data is not None:
                items.append(Event("\n".join(data), kind or "message", held_id))
            held, data, kind = [], None, ""
            retry = held_retry
        elif line[0] == ":":
            held.append(Comment(line[2:] if line[1:2] == " " else line[1:]))
        else:
            name, _, value = line.partition(":")
            value = value[1:] if value[:1] == " " else value
            if name == "data":
                data = [*(data or []), value]
            elif name == "event":
                kind = value
            elif name == "id" and "\0" not in value:
                held_id = value
            elif name == "retry" and re.fullmatch("[0-9]+", value):
                held_retry = int(value)
    return items, retry


@given(cut_streams())
def test_a_stream_decodes_the_same_however_it_is_cut(cut):
    stream, chunks = cut
    expected, retry = slow_decode(stream)
    whole, cut_decoder = Decoder(), Decoder()

    assert whole.feed(stream) == expected
    assert [item for chunk in chunks for item in cut_decoder.feed(chunk)] == expected
    assert (whole.retry, cut_decoder.retry) == (retry, retry)


def test_fields_are_read_as_browsers_read_them():
    stream = (
        "\ufeff: hello\nid: 1\nevent: greet\ndata: one\ndata:two\ndata\ndata:  x\n\n"
        "data: ä€\n\nevent: lost\n\nretry: 250\nid\ndata:\n\n: bye\n\ndata: never ends\n"
    ).encode()

    decoder = Decoder()

    assert decoder.feed(stream) == [
        Comment("hello"),
        Event("one\ntwo\n\n x", "greet", "1"),
        Event("ä€", "message", "1"),
        Event("", "message", ""),
        Comment("bye"),
    ]
    assert decoder.retry == 250


def test_a_character_cut_in_two_is_put_together():
    stream = "data: naïve 😀 数\n\n".encode()

    for cut in range(len(stream)):
        decoder = Decoder()
        assert decoder.feed(stream[:cut]) + decoder.feed(stream[cut:]) == [Event("naïve 😀 数")]


def test_an_event_beyond_the_bound_is_refused_and_one_at_the_bound_is_not():
    at_bound = b"data: 4567890\n\n"  # 13 bytes and its end

    assert Decoder(max_event_bytes=13).feed(at_bound) == [Event("4567890")]
    bytewise = Decoder(max_event_bytes=13)
    assert [bytewise.feed(at_bound[i : i + 1]) for i in range(15)][-1] == [Event("4567890")]
    with pytest.raises(EventTooLong):
        Decoder(max_event_bytes=12).feed(at_bound)
    endless = Decoder(max_event_bytes=1000)
    assert [endless.feed(b"x") for _ in range(1001)] == [[]] * 1001
    with pytest.raises(EventTooLong, match="larger than 1000 bytes"):
        endless.feed(b"x")


def test_a_retry_of_a_thousand_digits_is_no_trouble():
    decoder = Decoder()

    assert decoder.feed(b"retry: " + b"9" * 5000 + b"\ndata: a\n\n") == [Event("a")]


@pytest.mark.parametrize("name", ["chat", "chat_reasoning", "messages", "responses", "completions"])
def test_recorded_streams_decode_the_same_at_every_split(name):
    stream = (DATA / f"{name}.sse").read_bytes()
    whole = Decoder().feed(stream)

    assert len(whole) == stream.count(b"data: ")
    for cut in range(len(stream)):
        decoder = Decoder()
        assert decoder.feed(stream[:cut]) + decoder.feed(stream[cut:]) == whole


# --- writing ---------------------------------------------------------------------------------------


def test_what_is_written_reads_back():
    assert encode("a\r\nb\rc\nd", event="e\nvil", id="7") == (
        b"event: e vil\nid: 7\ndata: a\ndata: b\ndata: c\ndata: d\n\n"
    )
    assert encode("") == b"data: \n\n"
    assert encode_comment("one\r\ndata: two") == b": one data: two\n\n"


@given(st.text(), st.text())
def test_no_text_can_break_out_of_what_is_written(data, comment):
    items = Decoder().feed(encode_comment(comment) + encode(data))
    plain = re.sub("[\ud800-\udfff]", "?", data)

    assert [type(item) for item in items] == [Comment, Event]
    assert items[1] == Event(re.sub("\r\n|\r", "\n", plain))
