import pytest

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
