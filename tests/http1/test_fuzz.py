"""Valid bytes, damaged: however they are cut into segments they mean the same, or are refused the same.

Between us and an upstream there must be one reading of a request. So what is accepted here is also written
anew, as it would be sent on, and a strict parser of somebody else has to read the same in it.
"""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.http1.bodies import Chunks
from keepalive.http1.heads import (
    CHUNKED,
    BadHead,
    Familiar,
    end_to_end,
    reply_head,
    reply_reader,
    request_head,
    request_reader,
    write_head,
)

LIMIT = 400
NOT_SAID = ("like", "reading", "shared")

REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/chat/completions?x=%20 HTTP/1.1\r\nHost: [::1]:1235\r\nContent-Length: 3\r\nX-A:  b c \t\r\n\r\nabc",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"GET /llm HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade, X-B\r\nUpgrade: websocket\r\nX-B: 1\r\n\r\n",
    b"OPTIONS * HTTP/1.0\r\nConnection: close\r\nEmpty:\r\nAuthorization: Bearer caf\xe9\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n",
]
REPLIES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.0 404 Not Found\xe9\r\nServer: a\r\n\r\n",
    b"HTTP/1.1 100\r\n\r\nHTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00",
]
CHUNKS = [
    b"3\r\nabc\r\n0\r\n\r\n",
    b'3;x=y;z="q"\r\nabc\r\n00A\r\n0123456789\r\n0\r\nX-Trailer: y\r\n\r\n',
    b"1\r\n\r\r\n2\r\n\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"ff\r\n" + bytes(range(255)) + b"\r\n0\r\n\r\n",
]
# What heads and chunks are made of, and what is known to be read in two ways.
FRAGMENTS = [
    *(bytes([byte]) for byte in b'\r\n\t :;,0\x00\x0b\x0c\x7f\x85\xa0\xff"#*/\\aG'),
    *(b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\n ", b"\r\r\n", b"\n\r\n", b"0\r\n\r\n", b"HTTP/1.1", b"HTTP/1.0"),
    *(b"Content-Length: 3\r\n", b"Content-Length:\x0b3\r\n", b"content-length: 0x3\r\n", b"Host: b\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: \tchunked, identity\r\n", b"Expect: x\r\n"),
    *(b"Connection: host, content-length\r\n", b"fffffffffffffffff", b"-1", b"+1", b"1_0", b"a" * 300),
]


@st.composite
def damaged(draw, seeds):
    """One of `seeds` after a few accidents, and an offset in it."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 12)))
        piece = draw(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=4)))
        match draw(st.sampled_from(("insert", "replace", "delete", "repeat", "case", "cut", "other"))):
            case "insert":
                data[at:at] = piece
            case "replace":
                data[at:to] = piece
            case "delete":
                del data[at:to]
            case "repeat":
                data[at:at] = data[at:to]
            case "case":
                data[at:to] = data[at:to].swapcase()
            case "cut":
                del data[at:]
            case "other":
                data[at:] = draw(st.sampled_from(seeds))[to:]
    return bytes(data)


@st.composite
def cuts(draw, data):
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]


def single(data):
    return [data[at : at + 1] for at in range(len(data))]


def said(head):
    return {name: getattr(head, name) for name in (*head.__slots__, "headers") if name not in NOT_SAID}


def read_head(pieces, reader, finish):
    """What `finish` makes of the head, and the bytes behind it; or the refusal; or that more is wanted."""
    pieces = iter(pieces)
    try:
        for piece in pieces:
            rest = reader.feed(piece)
            if rest is not None:
                head = finish(reader)
                return said(head), rest + b"".join(pieces)
    except BadHead as bad:
        return bad.status, bad.text
    return reader.begun


def read_request(pieces):
    return read_head(pieces, request_reader(LIMIT), request_head)


def read_reply(pieces):
    return read_head(pieces, reply_reader(LIMIT), lambda reader: reply_head(reader, b"GET"))


def read_chunks(pieces):
    """The body, how it ended, and whether it was refused."""
    chunks = Chunks()
    body = b""
    try:
        for piece in pieces:
            if chunks.done:
                return body, True, True, None
            body += chunks.feed(piece)
    except BadHead as bad:
        return body + chunks.rescued(), chunks.done, chunks.followed, bad.status
    return body, chunks.done, chunks.followed, None


def alike(read, data, pieces):
    whole = read([data])

    assert read(single(data)) == whole
    assert read(pieces) == whole
    return whole


@given(damaged(REQUESTS), st.data())
@settings(max_examples=350, deadline=None)
def test_a_damaged_request_means_the_same_in_any_segments(data, drawn):
    alike(read_request, data, drawn.draw(cuts(data)))


@given(damaged(REQUESTS), damaged(REQUESTS), st.integers(0, 10**19))
@settings(max_examples=350, deadline=None)
def test_a_head_that_is_known_is_read_as_one_that_is_new(before, data, length):
    familiar = Familiar()
    for known in (*REQUESTS, before):
        reader = request_reader(LIMIT)
        with contextlib.suppress(BadHead):
            if reader.feed(known) is not None:
                familiar.remember(known, request_head(reader))

    for asked in (*REQUESTS, before, data, re.sub(rb"(?i)(ength: )[0-9]+", rb"\g<1>%d" % length, data)):
        found = familiar.find(asked)
        if found is not None:
            new, rest = read_request([asked])
            new["headers"] = [pair for pair in new["headers"] if pair[0].lower() != b"content-length"]
            known = said(found[0])
            known["headers"] = [pair for pair in known["headers"] if pair[0].lower() != b"content-length"]
            assert (known, found[1]) == (new, rest)
    assert familiar.find(REQUESTS[1]) is not None


@given(damaged(REPLIES), st.data())
@settings(max_examples=250, deadline=None)
def test_a_damaged_answer_means_the_same_in_any_segments(data, drawn):
    alike(read_reply, data, drawn.draw(cuts(data)))


@given(damaged(CHUNKS), st.data())
@settings(max_examples=350, deadline=None)
def test_damaged_chunks_mean_the_same_in_any_segments(data, drawn):
    alike(read_chunks, data, drawn.draw(cuts(data)))


class Theirs:
    """What llhttp reads."""

    def __init__(self):
        self.target = b""
        self.headers = []
        self.heads = 0

    def on_url(self, url):
        self.target += url

    def on_header(self, name, value):
        self.headers.append((name, value))

    def on_headers_complete(self):
        self.heads += 1


@given(damaged(REQUESTS))
@settings(max_examples=350, deadline=None)
def test_what_is_accepted_is_passed_on_in_a_form_that_others_read_alike(data):
    got = read_request([data])
    if isinstance(got, bool) or isinstance(got[0], int):
        return
    said = got[0]
    headers = [
        (b"Host", b"upstream"),
        *end_to_end(said["headers"], without=(b"host", b"content-length", b"expect")),
    ]
    if said["body"] == CHUNKED:
        headers.append((b"Transfer-Encoding", b"chunked"))
    elif said["body"]:
        headers.append((b"Content-Length", b"%d" % said["body"]))
    wire = write_head(b"%b %b HTTP/1.1" % (said["method"], said["target"]), headers)

    ours = read_head([wire], request_reader(4 * LIMIT), request_head)
    assert ours[0]["headers"] == headers
    assert ours[1] == b""
    theirs = Theirs()
    parser = httptools.HttpRequestParser(theirs)
    try:
        parser.feed_data(wire)
    except httptools.HttpParserInvalidMethodError:
        return  # it knows a list of methods, we know none
    assert (parser.get_method(), theirs.target) == (said["method"], said["target"])
    assert theirs.headers == headers
    assert theirs.heads == 1


def test_a_fuzzer_that_follows_the_branches_finds_nothing_else(tmp_path):
    pytest.importorskip("atheris", reason="the package atheris is not installed")
    script = Path(__file__).with_name("fuzz_http1.py")
    done = subprocess.run(
        [sys.executable, str(script), "-runs=3000", "-max_total_time=60", "-seed=1"],
        cwd=tmp_path,  # where it would leave the input that broke something
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"Done [1-9]\d* runs", done.stderr)
