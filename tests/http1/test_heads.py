"""The grammar of heads and chunks: what is refused, and that segments never matter."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.http1.bodies import Chunks
from keepalive.http1.heads import (
    CHUNKED,
    UNTIL_CLOSE,
    BadHead,
    Familiar,
    RequestHead,
    end_to_end,
    host_of,
    preferred_wait,
    reply_head,
    reply_reader,
    request_head,
    request_reader,
    write_head,
)

GOOD = (
    b"POST /v1/chat?x=%20 HTTP/1.1\r\nHost: localhost:1235\r\nX-A:  b c \t\r\n"
    b"Empty:\r\nContent-Length: 3\r\n\r\n"
)


def read(pieces, *, limit=65_536):
    """Method, target, headers, body and what stands behind; or the status of the refusal."""
    reader = request_reader(limit)
    rest = b""
    try:
        pieces = iter(pieces)
        for piece in pieces:
            after = reader.feed(piece)
            if after is not None:
                head = request_head(reader)
                rest = after + b"".join(pieces)
                return head.method, head.target, head.headers, head.body, rest
    except BadHead as bad:
        return bad.status
    return None


def at_every_split(data):
    """The same whole, byte by byte and at every split."""
    whole = read([data])
    assert read([data[i : i + 1] for i in range(len(data))]) == whole
    for at in range(1, len(data)):
        assert read([data[:at], data[at:]]) == whole, at
    return whole


def test_a_good_head_is_read_the_same_at_every_split():
    assert at_every_split(GOOD + b"abcGET") == (
        b"POST",
        b"/v1/chat?x=%20",
        [(b"Host", b"localhost:1235"), (b"X-A", b"b c"), (b"Empty", b""), (b"Content-Length", b"3")],
        3,
        b"abcGET",
    )


REFUSED = {
    "no version": (b"GET /a\r\n\r\n", 400),
    "HTTP/0.9 without an end": (b"GET /a\r\n", 400),
    "HTTP/2.0": (b"GET /a HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "h2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/1.2": (b"GET /a HTTP/1.2\r\nHost: x\r\n\r\n", 505),
    "http in small letters": (b"GET /a http/1.1\r\nHost: x\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "SMTP": (b"EHLO example.org\r\n", 400),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
    "empty line first": (b"\r\nGET /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "space first": (b" GET /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "two spaces": (b"GET  /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "tab for space": (b"GET\t/a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "space behind": (b"GET /a HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
    "bare LF": (b"GET /a HTTP/1.1\nHost: x\n\n", 400),
    "bare LF in headers": (b"GET /a HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400),
    "bare CR in a value": (b"GET /a HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n", 400),
    "CR CR LF": (b"GET /a HTTP/1.1\r\nHost: x\r\r\n\r\n", 400),
    "NUL in a value": (b"GET /a HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400),
    "DEL in a value": (b"GET /a HTTP/1.1\r\nHost: x\r\nA: b\x7fc\r\n\r\n", 400),
    "obs-fold": (b"GET /a HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
    "fold first": (b"GET /a HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "space before colon": (b"GET /a HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
    "empty name": (b"GET /a HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n", 400),
    "no colon": (b"GET /a HTTP/1.1\r\nHost: x\r\nAb\r\n\r\n", 400),
    "0x85 before a name": (b"GET /a HTTP/1.1\r\nHost: x\r\n\x85A: b\r\n\r\n", 400),
    "0xA0 behind a name": (b"GET /a HTTP/1.1\r\nHost: x\r\nA\xa0: b\r\n\r\n", 400),
    "raw byte in target": (b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "absolute URI": (b"GET http://evil/x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "authority": (b"CONNECT evil:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "userinfo": (b"GET @evil/x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "query only": (b"GET ?a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "star for GET": (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "fragment": (b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no Host": (b"GET /a HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /a HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "two Hosts in 1.0": (b"GET /a HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "Host with a path": (b"GET /a HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
    "Host with user": (b"GET /a HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "two lengths": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n", 400),
    "length list": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 3\r\n\r\n", 400),
    "+3": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\n", 400),
    "-3": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\n", 400),
    "0x3": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 0x3\r\n\r\n", 400),
    "1_0": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1_0\r\n\r\n", 400),
    "empty length": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n", 400),
    "twenty digits": (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 18446744073709551617\r\n\r\n", 400),
    "TE and CL": (
        b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        400,
    ),
    "CL and TE": (
        b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
    ),
    "TE in 1.0": (b"POST /a HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "gzip, chunked": (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "identity": (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n", 501),
    "xchunked": (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
    "two TEs": (
        b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        501,
    ),
    "unknown expectation": (b"POST /a HTTP/1.1\r\nHost: x\r\nExpect: x\r\nContent-Length: 3\r\n\r\n", 417),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_could_be_read_in_two_ways_is_refused_at_every_split(data):
    assert at_every_split(data[0]) == data[1]


@pytest.mark.parametrize("method", [b"PROPFIND", b"PATCH", b"get", b"M-SEARCH", b"X"])
def test_any_method_that_is_a_token_is_one(method):
    assert read([method + b" /a HTTP/1.1\r\nHost: x\r\n\r\n"])[0] == method


def test_a_byte_that_is_not_ascii_stays_as_it_is_in_a_value():
    assert read([b"GET / HTTP/1.1\r\nHost: x\r\nA: caf\xe9\r\n\r\n"])[2][1] == (b"A", b"caf\xe9")


@pytest.mark.parametrize(
    "host", [b"[::1]:1235", b"[fe80::1%25eth0]:1", b"[fe80::1%en0]", b"127.0.0.1", b"a_b.example", b"", b"x:"]
)
def test_these_hosts_are_hosts(host):
    assert not isinstance(read([b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host]), int)


def test_the_host_of_a_header_has_no_port_brackets_or_last_dot():
    assert host_of(b"[::1]:1235") == "::1"
    assert host_of(b"LocalHost.:1") == "localhost"


def test_a_head_may_be_as_large_as_the_limit_and_no_larger():
    def head(size):
        start = b"GET / HTTP/1.1\r\nHost: x\r\nA: "
        return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"

    assert not isinstance(read([head(4096)], limit=4096), int)
    assert read([head(4097)], limit=4096) == 431
    assert read([head(4097)[i : i + 1] for i in range(4097)], limit=4096) == 431
    assert read([b"GET /" + b"a" * 5000], limit=4096) == 414
    assert read([b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n"], limit=4096) == 414


def test_a_head_in_single_bytes_costs_linear_time():
    reader = request_reader(65_536)
    for byte in b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10_000 + b"B: " + b"c" * 5000:
        assert reader.feed(bytes([byte])) is None


def test_headers_between_neighbours_are_dropped_and_those_they_name():
    headers = [
        (b"Connection", b"close, X-Secret"),
        (b"x-secret", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Proxy-Connection", b"a"),
        (b"TE", b"trailers"),
        (b"Trailer", b"X"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"h2c"),
        (b"X-Stays", b"2"),
        (b"Proxy-Authenticate", b"stays: it is meant for the other end here"),
        (b"Proxy-Authorization", b"Basic eA=="),
    ]

    assert end_to_end(headers) == [headers[8], headers[9]]
    assert end_to_end(headers, without=[b"x-stays"]) == [headers[9]]


def answer(data, method=b"GET"):
    reader = reply_reader(65_536)
    try:
        rest = reader.feed(data)
        if rest is None:
            return None
        head = reply_head(reader, method)
    except BadHead:
        return "bad"
    return head.status, head.reason, head.body, rest


@pytest.mark.parametrize(
    ("data", "means"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", (200, b"OK", 3, b"abc")),
        (b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\n", (200, b"", 3, b"")),
        (b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n", (200, b"", 3, b"")),
        (b"HTTP/1.1 404 Not  Found\xe9\r\n\r\n", (404, b"Not  Found\xe9", UNTIL_CLOSE, b"")),
        (b"HTTP/1.0 200 OK\r\n\r\nx", (200, b"OK", UNTIL_CLOSE, b"x")),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", (200, b"OK", CHUNKED, b"")),
        (b"HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\n", (204, b"No", 0, b"")),
        (b"HTTP/1.1 304 No\r\nContent-Length: 3\r\n\r\n", (304, b"No", 0, b"")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n", "bad"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "bad"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "bad"),
        (b"HTTP/1.1 200 OK\nContent-Length: 3\r\n\r\n", "bad"),
        (b"HTTP/2 200\r\n\r\n", "bad"),
        (b"HTTP/1.1 20 OK\r\n\r\n", "bad"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "bad"),
        (b"HTTP/1.1 200 O\x00K\r\n\r\n", "bad"),
        (b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", "bad"),
        (b"HTTP/1.1 200 OK\r\nA: b\x00\r\n\r\n", "bad"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "bad"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "bad"),
    ],
)
def test_heads_of_answers(data, means):
    assert answer(data) == means


def test_the_answer_to_head_has_no_body():
    assert answer(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", b"HEAD") == (200, b"OK", 0, b"")


# --- chunks ----------------------------------------------------------------------------------------


def unchunk(pieces):
    """The body, whether it ended, whether something followed; or "bad" with what came before."""
    chunks = Chunks()
    body = b""
    try:
        for piece in pieces:
            if chunks.done:
                return body, True, True
            body += chunks.feed(piece)
    except BadHead:
        return "bad"
    return body, chunks.done, chunks.followed


def unchunk_at_every_split(data):
    whole = unchunk([data])
    assert unchunk([data[i : i + 1] for i in range(len(data))]) == whole
    for at in range(1, len(data)):
        assert unchunk([data[:at], data[at:]]) == whole, at
    return whole


@pytest.mark.parametrize(
    ("data", "means"),
    [
        (b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", (b"abcde", True, False)),
        (b'3;x=y;z="q"\r\nabc\r\n0\r\n\r\n', (b"abc", True, False)),
        (b"3\r\nabc\r\n0\r\nX-Trailer: y\r\n\r\n", (b"abc", True, False)),
        (b"003\r\nabc\r\n0\r\n\r\n", (b"abc", True, False)),
        (b"3\r\nabc\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n", (b"abc", True, True)),
        (b"3\r\nabc\r\n0\r\n\r\nx", (b"abc", True, True)),
        (b"3\r\nabc\r\n0\r\n\r\n\r\n", (b"abc", True, True)),
        (b"3\r\nabc\r\n0\r\nX:\r\n\r\n\n", (b"abc", True, True)),
        (b"3\r\nab", (b"ab", False, False)),
        (b"0x3\r\nabc\r\n0\r\n\r\n", "bad"),
        (b"+3\r\nabc\r\n0\r\n\r\n", "bad"),
        (b"-3\r\nabc\r\n0\r\n\r\n", "bad"),
        (b" 3\r\nabc\r\n0\r\n\r\n", "bad"),
        (b"3 \r\nabc\r\n0\r\n\r\n", "bad"),
        (b"3_0\r\nabc", "bad"),
        (b"\r\n3\r\nabc\r\n0\r\n\r\n", "bad"),
        (b"3\nabc\n0\n\n", "bad"),
        (b"3\r\nabcd\r\n0\r\n\r\n", "bad"),
        (b"3\r\nabc0\r\n\r\n", "bad"),
        (b"3;a\nb\r\nabc\r\n0\r\n\r\n", "bad"),
        (b"fffffffffffffffff\r\nabc", "bad"),
        (b"3\r\nabc\r\n0\r\nX : y\r\n\r\n", "bad"),
        (b"3\r\nabc\r\n0\r\nX: y\r\n z\r\n\r\n", "bad"),
    ],
)
def test_chunks_are_read_strictly_and_the_same_at_every_split(data, means):
    assert unchunk_at_every_split(data) == means


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_any_chunks_in_any_segments_give_the_body(parts, data):
    wire = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    pieces = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True) if a < b]

    assert unchunk(pieces) == (b"".join(parts), True, False)


_NAME = st.from_regex(rb"[A-Za-z-]{1,12}", fullmatch=True)
_VALUE = st.from_regex(rb"[!-~\x80-\xff]([\t -~\x80-\xff]{0,20}[!-~\x80-\xff])?", fullmatch=True)


@given(st.lists(st.tuples(_NAME, _VALUE), max_size=6))
@settings(max_examples=100, deadline=None)
def test_what_was_written_is_read_again(pairs):
    pairs = [pair for pair in pairs if pair[0].lower() not in (b"host", b"expect", b"te", b"upgrade")]
    wire = write_head(b"GET /x HTTP/1.1", [(b"Host", b"x"), *pairs])

    got = at_every_split(wire)

    assert got[2] == [(b"Host", b"x"), *pairs]


@given(st.binary(max_size=200), st.data())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_the_same_in_any_segments(noise, data):
    at = data.draw(st.integers(0, len(GOOD)))
    wire = GOOD[:at] + noise + GOOD[at:]
    cut = data.draw(st.integers(0, len(wire)))

    assert read([wire[:cut], wire[cut:]]) == read([wire])


def test_a_head_that_comes_whole_is_read_as_one_that_comes_byte_by_byte():
    whole = b"POST /v1 HTTP/1.1\r\nHost: a \t\r\nX:\t1\r\nx: \r\n\r\nbody"
    at_once, by_byte = request_reader(1000), request_reader(1000)
    rest = at_once.feed(whole)
    for at in range(len(whole) - 4):
        last = by_byte.feed(whole[at : at + 1])

    assert (rest, last) == (b"body", b"")
    assert at_once.start == by_byte.start == (b"POST", b"/v1", b"1.1")
    assert at_once.headers == by_byte.headers == [(b"Host", b"a"), (b"X", b"1"), (b"x", b"")]


def test_headers_that_were_changed_are_asked_for_anew():
    head = RequestHead(b"GET", b"/", [(b"Accept", b"a"), (b"ACCEPT", b"b, C")])
    before = head.values(b"accept"), head.get(b"accept"), head.listed(b"accept")
    head.say([(b"accept", b"c")])

    assert before == ([b"a", b"b, C"], None, {b"a", b"b", b"c"})
    assert (head.get(b"accept"), head.values(b"host")) == (b"c", [])


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (b"wait=7", 7.0),
        (b"respond-async, Wait = 7", 7.0),
        (b'wait="7"', 7.0),
        (b"wait=7; why=tired", 7.0),
        (b"wait=0.5", 0.5),
        (b"wait=soon", None),
        (b"wait=-1", None),
        (b"await=7", None),
        (b"wait=", None),
    ],
)
def test_how_long_a_caller_would_wait(said, seconds):
    assert preferred_wait(RequestHead(b"GET", b"/", [(b"Prefer", said)])) == seconds


def remembered(data, familiar=None):
    familiar = familiar or Familiar()
    reader = request_reader(10_000)
    reader.feed(data)
    familiar.remember(data, request_head(reader))
    return familiar


ASKED = b"POST /v1 HTTP/1.1\r\nHost: a\r\nX-Strength: 7\r\ncontent-length: 3\r\nAuthorization: Bearer k\r\n\r\nabc"


def test_a_head_that_came_before_is_known_whatever_the_length_of_its_body():
    familiar = remembered(ASKED.replace(b"X-Strength: 7\r\n", b""))
    again = familiar.find(ASKED.replace(b"X-Strength: 7\r\n", b"").replace(b": 3", b": 12"))

    assert again is not None
    head, rest = again
    assert (head.method, head.target, head.body, rest) == (b"POST", b"/v1", 12, b"abc")
    assert head.headers == [(b"Host", b"a"), (b"Authorization", b"Bearer k")]
    assert head.values(b"content-length") == []


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        (b"k\r\n", b"l\r\n"),
        (b"POST /v1", b"POST /v2"),
        (b"Strength: 7", b"Strength: 8"),
        (b"-length: 3", b"-length: +3"),
        (b"-length: 3", b"-length: "),
        (b"-length: 3", b"-length: 1234567890123456789"),
        (b"-length: 3", b"-length: 3\r\ncontent-length: 3"),
        (b"\r\ncontent-length", b" content-length"),
        (b"Authorization: Bearer k\r\n\r\n", b"Authorization: Bearer k\r\n"),
    ],
)
def test_a_head_that_says_anything_else_is_read_anew(said, instead):
    assert said in ASKED
    assert remembered(ASKED).find(ASKED.replace(said, instead)) is None


@pytest.mark.parametrize(
    "length", [b"", b"+3", b"3 ", b"3,3", b"1234567890123456789", b"3\r\ncontent-length: 3"]
)
def test_a_length_that_is_none_is_not_that_of_a_head_that_came_before(length):
    plain = ASKED.replace(b"X-Strength: 7\r\n", b"")  # in which the digits are found
    changed = plain.replace(b"content-length: 3", b"content-length: " + length)

    assert remembered(plain).find(plain) is not None
    assert remembered(plain).find(changed) is None


def test_what_is_made_of_one_head_does_not_show_in_the_next():
    familiar = remembered(ASKED)
    first, _ = familiar.find(ASKED)
    first.headers, first.target = [], b"/elsewhere"
    second, _ = familiar.find(ASKED)

    assert second.get(b"authorization") == b"Bearer k"
    assert (second.target, second.like) == (b"/v1", first.like)


def test_only_so_many_heads_are_remembered_and_no_long_ones():
    familiar = remembered(ASKED)
    for number in range(128):
        remembered(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number, familiar)
    long = b"GET / HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n" % (b"x" * 4096)
    remembered(long, familiar)

    assert familiar.find(ASKED) is None
    assert familiar.find(long) is None
    assert familiar.find(b"GET /127 HTTP/1.1\r\nHost: a\r\n\r\n") is not None
