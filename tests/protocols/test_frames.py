"""Messages are found in the bytes of a WebSocket, and the bytes stay what they were."""

import json
import struct

import pytest

from keepalive.protocols.frames import GOING_AWAY, FrameReader, Kind, Piece, close_frame, text_frame

TEXT, BINARY, CONTINUED, CLOSE, PING, PONG = 0x1, 0x2, 0x0, 0x8, 0x9, 0xA
MASK = b"\x11\xfe\x80\x07"
LIMIT = 1000


def frame(opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True) -> bytes:
    """A frame as RFC 6455 section 5.2 draws it, byte after byte."""
    bit = 0x80 if masked else 0
    head = bytes([opcode | (0x80 if final else 0)])
    if len(payload) <= 125:
        head += bytes([bit | len(payload)])
    elif len(payload) < 65_536:
        head += bytes([bit | 126]) + struct.pack("!H", len(payload))
    else:
        head += bytes([bit | 127]) + struct.pack("!Q", len(payload))
    if masked:
        head += MASK
        payload = bytes(byte ^ MASK[n % 4] for n, byte in enumerate(payload))
    return head + payload


def read(*parts: bytes, masked: bool = True, limit: int = LIMIT) -> list[tuple[Kind, bytes, bytes]]:
    """What is handed out, with neighbours that are unread made one."""
    reader = FrameReader(masked=masked, limit=limit)
    found: list[tuple[Kind, bytes, bytes]] = []
    for part in parts:
        for piece in reader.feed(part):
            if found and piece.kind is Kind.UNREAD is found[-1][0]:
                found[-1] = (Kind.UNREAD, found[-1][1] + piece.data, b"")
            else:
                found.append((piece.kind, piece.data, piece.text))
    return [*found, (Kind.UNREAD, rest, b"rest")] if (rest := reader.rest()) else found


def split_everywhere(data: bytes, **how: bool) -> list[tuple[Kind, bytes, bytes]]:
    """The same at every split point, in single bytes, and in one piece."""
    whole = read(data, **how)
    assert read(*(data[n : n + 1] for n in range(len(data))), **how) == whole
    for n in range(1, len(data)):
        assert read(data[:n], data[n:], **how) == whole
    return whole


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 125, 126, 400])
def test_a_message_is_read_and_its_bytes_stay(size, masked):
    said = bytes(range(256)) * 2
    data = frame(TEXT, said[:size], masked=masked)

    assert split_everywhere(data, masked=masked) == [(Kind.MESSAGE, data, said[:size])]


def test_a_length_of_64_bits_is_read():
    data = frame(BINARY, b"x" * 70_000)

    assert read(data[:9], data[9:], limit=100_000) == [(Kind.MESSAGE, data, b"x" * 70_000)]


def test_messages_that_follow_each_other_are_told_apart():
    one, two = frame(TEXT, b'{"type":"keepAlive"}'), frame(TEXT, json.dumps({"é": "🙂"}).encode())

    assert split_everywhere(one + two) == [
        (Kind.MESSAGE, one, b'{"type":"keepAlive"}'),
        (Kind.MESSAGE, two, b'{"\\u00e9": "\\ud83d\\ude42"}'),
    ]


def test_the_fragments_of_a_message_are_put_together_and_control_frames_between_them_go_first():
    fragments = [
        frame(TEXT, b"al", final=False),
        frame(CONTINUED, b"", final=False),
        frame(CONTINUED, b"l"),
    ]
    ping, pong = frame(PING, b"?"), frame(PONG)

    found = split_everywhere(fragments[0] + ping + fragments[1] + pong + fragments[2])

    assert found == [
        (Kind.CONTROL, ping, b""),
        (Kind.CONTROL, pong, b""),
        (Kind.MESSAGE, b"".join(fragments), b"all"),
    ]


def test_a_close_is_told_from_other_control_frames():
    close = frame(CLOSE, struct.pack("!H", 1000))

    assert split_everywhere(close) == [(Kind.CLOSE, close, b"")]


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_message_larger_than_the_limit_passes_unread_and_the_next_is_read(pieces):
    said = b"x" * 300
    last = pieces - 1
    large = [
        frame(TEXT if n == 0 else CONTINUED, said * (4 if pieces == 1 else 1), final=n == last)
        for n in range(pieces)
    ]
    ping, after = frame(PING), frame(TEXT, b"after")

    found = split_everywhere(ping + b"".join(large) + ping + after)

    assert found == [
        (Kind.CONTROL, ping, b""),
        (Kind.UNREAD, b"".join(large), b""),
        (Kind.CONTROL, ping, b""),
        (Kind.MESSAGE, after, b"after"),
    ]


def test_of_a_large_message_nothing_is_kept():
    reader = FrameReader(masked=True, limit=LIMIT)
    data = frame(TEXT, b"x" * 2000)

    assert b"".join(piece.data for piece in reader.feed(data[:20])) == data[:20]
    assert b"".join(piece.data for piece in reader.feed(data[20:1500])) == data[20:1500]
    assert reader.rest() == b""


def test_a_control_frame_in_the_middle_of_a_large_message_is_told():
    begun, ping, ended = frame(TEXT, b"x" * 2000, final=False), frame(PING), frame(CONTINUED, b"y")

    assert split_everywhere(begun + ping + ended) == [
        (Kind.UNREAD, begun, b""),
        (Kind.CONTROL, ping, b""),
        (Kind.UNREAD, ended, b""),
    ]


@pytest.mark.parametrize(
    "strange",
    [
        b"\xc1\x80" + MASK,  # an extension's bit: permessage-deflate
        frame(0x3, b"x"),  # an opcode of the future
        frame(TEXT, b"x", masked=False),
        frame(CONTINUED, b"x"),  # of nothing
        frame(TEXT, b"x", final=False) + frame(TEXT, b"y"),  # a message in a message
        frame(PING, b"", final=False),
        frame(PING, b"x" * 126),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_understood_passes_at_once_with_all_that_follows(strange):
    before, after = frame(TEXT, b"before"), frame(TEXT, b"after")

    assert split_everywhere(before + strange + after) == [
        (Kind.MESSAGE, before, b"before"),
        (Kind.UNREAD, strange + after, b""),
    ]


def test_what_is_cut_off_in_a_message_is_not_lost():
    begun = frame(TEXT, b"x", final=False) + frame(CONTINUED, b"yz")[:-1]

    assert split_everywhere(begun) == [(Kind.UNREAD, begun, b"rest")]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536])
def test_a_message_of_ours_is_read_as_one(size):
    sent = text_frame(b"x" * size)
    reader = FrameReader(masked=False, limit=100_000)

    assert reader.feed(sent) == [Piece(sent, Kind.MESSAGE, b"x" * size)]


@pytest.mark.parametrize("masked", [True, False])
def test_the_frame_that_closes_is_a_server_s_or_a_callers(masked):
    sent = close_frame(GOING_AWAY, masked=masked)

    assert FrameReader(masked=masked, limit=100).feed(sent) == [Piece(sent, Kind.CLOSE)]
    assert sent[-2:] == b"\x03\xe9"


def test_a_frame_of_ours_has_its_place_between_messages_alone():
    whole, part = frame(TEXT, b"x"), frame(TEXT, b"x", final=False)
    cases = {
        b"": True,
        whole: True,
        whole[:-1]: False,
        part: False,
        part + frame(PING, b"?"): False,
        part + frame(CONTINUED, b"y"): True,
        frame(TEXT, b"x" * 200)[:150]: False,
        frame(TEXT, b"x" * 200): True,
        b"not understood": False,
    }
    for sent, between in cases.items():
        reader = FrameReader(masked=True, limit=100)
        reader.feed(sent)

        assert reader.between is between
