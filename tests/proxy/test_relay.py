import asyncio
import itertools

import pytest

from keepalive.http1 import Limits, Ticker
from keepalive.http1.link import Link
from keepalive.http1.outbox import Outbox
from keepalive.protocols.meter import Meter
from keepalive.protocols.routes import Protocol
from keepalive.proxy.relay import FIRST_BYTES, HELD_BACK_BYTES, Events, Whole, first_error

ROLE = b'data: {"choices":[{"delta":{"role":"assistant"},"finish_reason":null}]}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
STREAM = ROLE + TEXT + STOP
ENDS = {0, len(ROLE), len(ROLE + TEXT), len(STREAM)}


def events(out: list[bytes]) -> Events:
    return Events(out.append, lambda: 1.0, Meter(Protocol.CHAT, 0.0))


def test_wherever_a_stream_is_cut_what_the_caller_has_ends_where_an_event_does():
    for first in range(len(STREAM) + 1):
        for second in range(first, len(STREAM) + 1, 7):
            out: list[bytes] = []
            relay = events(out)
            for piece in (STREAM[:first], STREAM[first:second], STREAM[second:]):
                if piece:
                    relay.take(piece)

                assert len(b"".join(out)) in ENDS
                assert not relay.torn

            assert b"".join(out) == STREAM
            assert relay.bytes == len(STREAM)
            assert relay.meter is not None
            assert relay.meter.ended


def test_whole_events_are_handed_on_as_the_same_object():
    out: list[bytes] = []
    events(out).take(TEXT)

    assert out[0] is TEXT


def test_an_event_too_large_to_be_held_back_passes_and_is_told_until_it_ends():
    out: list[bytes] = []
    relay = events(out)
    large = b"data: " + b"x" * HELD_BACK_BYTES

    relay.take(ROLE + large[:-10])
    assert b"".join(out) == ROLE
    assert not relay.torn

    relay.take(large[-10:])
    assert b"".join(out) == ROLE + large
    assert relay.torn

    relay.take(b"\n\n")
    assert b"".join(out) == ROLE + large + b"\n\n"
    assert not relay.torn


def test_what_an_upstream_did_not_end_as_an_event_passes_in_the_end():
    out: list[bytes] = []
    relay = events(out)
    relay.take(ROLE + b"data: [DO")
    relay.finish()

    assert b"".join(out) == ROLE + b"data: [DO"


@pytest.mark.parametrize("size", [0, 1, FIRST_BYTES, 3 * FIRST_BYTES])
def test_of_a_body_only_the_beginning_is_kept(size):
    out: list[bytes] = []
    relay = Whole(out.append)
    body = bytes(i % 251 for i in range(size))
    for at in range(0, size, 1000):
        relay.take(body[at : at + 1000])

    assert b"".join(out) == body
    assert relay.bytes == size
    assert body.startswith(relay.first)
    assert min(size, FIRST_BYTES) <= len(relay.first) < 2 * FIRST_BYTES


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"id":"x","choices":[]}', b'{"i'),
        (b'{ "type" : "message" }', b'{ "type" : "m'),
        (b"[1]", b"["),
        (b"\n{}", b"\n{}"),
        (b"", b""),
    ],
)
async def test_no_more_of_a_good_body_is_read_ahead_than_tells_it_from_an_error(body, told):
    assert await first_error(Bytewise(body)) == told


@pytest.mark.parametrize(
    "body", [b'{"error":"no"}', b' {"error" : {"message":"no"}}', b'{ "type" : "error", "error":{}}']
)
async def test_an_error_is_read_whole(body):
    assert await first_error(Bytewise(body)) == body


class Bytewise:
    """An answer whose body comes a byte at a time, or as much of it as is waited for."""

    def __init__(self, body):
        self.body = body

    async def read(self, limit):
        taken, self.body = self.body[:limit], self.body[limit:]
        return taken


# --- chunks as they stand on the wire ---------------------------------------------------------------


class Pool:
    """As much of one as a connection asks for before its answer is over."""

    name = "local"
    limits = Limits()

    def __init__(self, loop):
        self.loop = loop
        self.ticker = Ticker(1.0)
        self.outbox = Outbox(loop)
        self.links = set()


class Sink:
    """What is left of a transport where nobody looks at the sockets."""

    def abort(self):
        raise AssertionError("the framing was taken for broken")

    def get_extra_info(self, name):
        return None


class Caller:
    """Who has what is written as it stands on the wire."""

    def __init__(self, out: list[bytes]) -> None:
        self.write = out.append


def chunk(data: bytes, size: bytes = b"%x") -> bytes:
    return size % len(data) + b"\r\n" + data + b"\r\n"


async def relayed(pieces: list[bytes], *, quick: bool) -> tuple[Events, list[bytes]]:
    """What a caller has of an answer whose body comes in these pieces, as it stands on the wire."""
    link = Link(Pool(asyncio.get_running_loop()))
    link.transport = Sink()
    answered = link.ask(b"POST", upgrade=False)
    link.data_received(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    reply = await answered
    clock = itertools.count()
    out: list[bytes] = []
    relay = Events(lambda data: out.append(chunk(data)), lambda: next(clock), Meter(Protocol.CHAT, 0.0))
    reply.pour(relay.take)
    if quick:
        relay.writer = Caller(out)
        reply.pour_chunks(relay)
    for piece in pieces:
        link.data_received(piece)
    assert reply.complete
    return relay, out


def body(out: list[bytes]) -> bytes:
    """What the caller reads, who is owed the simplest of framings."""
    wire, read = b"".join(out), b""
    while wire:
        size, _, rest = wire.partition(b"\r\n")
        length = int(size, 16)
        assert size == b"%x" % length
        assert rest[length : length + 2] == b"\r\n"
        read, wire = read + rest[:length], rest[length + 2 :]
    return read


SAID = [TEXT.replace(b"Hi", word) for word in (b"a", b"", rb"\"", b"Ha" * 40, rb".\n", b"b", b"x" * 5000)]
LATE = [
    ROLE,
    *[TEXT] * 3,
    *SAID,
    b": a comment\n\n",
    TEXT,
    TEXT + TEXT,
    TEXT,
    b"data: {}\r\n\r\n",
    TEXT,
    STOP,
    TEXT,
]
LAST = b"0\r\n\r\n"


@pytest.mark.parametrize("size", [b"%x", b"%X", b"%04x", b"%x;extension"])
@pytest.mark.parametrize("together", [1, 2, 5, 99])
async def test_a_chunk_that_is_passed_as_it_came_is_counted_as_one_that_was_taken_apart(size, together):
    pieces = [chunk(event, size) for event in LATE] + [LAST]
    pieces = [b"".join(pieces[at : at + together]) for at in range(0, len(pieces), together)]

    (quick, out), (slow, expected) = [await relayed(pieces, quick=quick) for quick in (True, False)]

    assert body(out) == body(expected) == b"".join(LATE)
    assert quick.bytes == slow.bytes == len(b"".join(LATE))
    for seen in ("events", "first_token_seconds", "ended", "error", "said"):
        assert getattr(quick.meter, seen) == getattr(slow.meter, seen), seen
    assert sum(quick.meter.gaps) == sum(slow.meter.gaps)


async def test_wherever_the_wire_is_cut_all_of_it_arrives_and_ends_where_an_event_does():
    events = [ROLE, *[TEXT] * 3, SAID[3], TEXT, STOP]
    wire = b"".join(map(chunk, events)) + LAST
    learnt = len(b"".join(map(chunk, events[:3])))
    for first in range(learnt, len(wire)):
        relay, out = await relayed([wire[:learnt], wire[learnt:first], wire[first:]], quick=True)

        assert body(out) == b"".join(events)
        assert relay.meter.events == len(events)
        assert relay.meter.ended


async def test_what_was_learnt_to_be_plain_leaves_as_the_object_that_came():
    plain = chunk(TEXT.replace(b"Hi", b"there"))
    _, out = await relayed([*map(chunk, [ROLE, TEXT, TEXT]), plain, LAST], quick=True)

    assert out[-1] is plain


async def test_nothing_is_passed_as_it_came_behind_a_part_that_is_held_back():
    half = TEXT[:20]
    pieces = [*map(chunk, [ROLE, TEXT, TEXT, half]), chunk(TEXT[20:] + TEXT), chunk(half), chunk(TEXT), LAST]
    _, out = await relayed(pieces, quick=True)

    assert body(out) == ROLE + TEXT * 4 + half + TEXT


@pytest.mark.parametrize("of_size", ["all", "a digit"])
async def test_a_body_that_looks_like_a_chunk_is_a_body(of_size):
    if of_size == "all":
        looks = chunk(TEXT)
        pieces = [b"%x\r\n" % len(looks), looks + b"\r\n"]
    else:
        size = 0x100 + len(TEXT)
        looks = (TEXT + b"\r\n").ljust(size, b":")
        pieces = [b"1", b"%x\r\n" % len(TEXT) + looks + b"\r\n"]
    relay, out = await relayed([*map(chunk, [ROLE, TEXT, TEXT]), *pieces, LAST], quick=True)
    relay.finish()

    assert len(TEXT) < 0x100
    assert body(out) == ROLE + TEXT * 2 + looks


async def test_an_upstream_may_think_behind_an_interim_head_that_came_in_pieces():
    pool = Pool(asyncio.get_running_loop())
    link = Link(pool)
    link.transport = Sink()
    answered = link.ask(b"POST", upgrade=False)
    for piece in (b"HTTP/1.1 102 Pro", b"cessing\r\n\r\n"):
        link.data_received(piece)

    link.tick(pool.loop.time() + 2 * pool.limits.header_timeout)
    link.data_received(b"HTTP/1.1 204 No Content\r\n\r\n")

    assert (await answered).head.status == 204


async def test_bytes_that_nobody_asked_for_end_the_connection():
    link = Link(Pool(asyncio.get_running_loop()))
    link.transport = Sink()

    with pytest.raises(AssertionError, match="taken for broken"):
        link.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
