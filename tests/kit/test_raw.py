"""The tools that make faults must not lie about them."""

import asyncio
import socket

import pytest

from tests.kit.raw import (
    Close,
    Fault,
    Fin,
    Hang,
    Middleman,
    RawClient,
    RawServer,
    Read,
    Rst,
    Sleep,
    answer,
    chunked,
    epilogue,
    never_accepting,
    request_length,
    stream_of,
)

# A moment of sleep here means: until nothing is on its way any more.
pytestmark = pytest.mark.clock_jumps

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_a_script_is_played_after_a_request_and_what_was_sent_is_kept():
    async with (
        epilogue(),
        RawServer([b"one", Sleep(0.01), b"two", Close()]) as server,
        RawClient(server.port) as client,
    ):
        await client.send(GET, bytewise=True)

        assert await client.read_all() == b"onetwo"
        assert server.requests == [GET]
        assert not client.was_reset


async def test_a_reset_is_one_and_a_close_is_none():
    async with epilogue(), RawServer([b"x", Sleep(0.05), Rst()], [b"y", Close()]) as server:
        async with RawClient(server.port) as client:
            await client.send(GET)
            assert (await client.read_all(), client.was_reset) == (b"x", True)
        async with RawClient(server.port) as client:
            await client.send(GET)
            assert (await client.read_all(), client.was_reset) == (b"y", False)

        assert len(server.connections) == 2


async def test_it_is_known_how_a_client_left():
    async with epilogue(), RawServer([Hang()]) as server:
        for how in ("fin", "rst"):
            async with RawClient(server.port) as client:
                await client.send(b"half a requ")
                await asyncio.sleep(0.02)
                if how == "rst":
                    client.reset()
            await asyncio.sleep(0.02)

        assert [connection.ended for connection in server.connections] == ["fin", "rst"]
        assert server.requests == []


async def test_several_requests_on_one_connection_are_told_apart():
    post = b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    many = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"abc", b"defg")
    script = [answer(b"1"), Read(), answer(b"2"), Read(), Fin()]
    async with RawServer(script) as server, RawClient(server.port) as client:
        await client.send(GET + post + many)

        assert await client.read_all() == answer(b"1") + answer(b"2")
        assert server.requests == [GET, post, many]


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (GET, 27),
        (GET[:-1], None),
        (b"A / B\r\nContent-Length: 2\r\n\r\nab", 30),
        (b"A / B\r\nContent-Length: 2\r\n\r\na", None),
        (b"A / B\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 48),
        (b"A / B\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", None),
    ],
)
def test_a_message_is_as_long_as_its_head_says(data, length):
    assert request_length(data) == length
    assert request_length(b"xx" + data, 2) == length


def test_answers_are_framed():
    assert stream_of(b"data: a\n\n") == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"9\r\ndata: a\n\n\r\n0\r\n\r\n"
    )
    assert chunked(b"a", end=False) == b"1\r\na\r\n"


async def test_a_server_that_never_reads_lets_the_client_fill_the_pipe():
    deaf = RawServer([Hang()], reads=False, buffer=4096)
    async with epilogue(), deaf, RawClient(deaf.port) as client:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.send(b"x" * 50_000_000), 0.2)


@pytest.mark.parametrize("then", ["cut", "rst"])
async def test_a_middleman_ends_both_sides_at_the_byte(then):
    async with (
        epilogue(),
        RawServer([b"0123456789"]) as server,
        Middleman(server.port, down=Fault(at=4, then=then)) as middle,
        RawClient(middle.port) as client,
    ):
        await client.send(GET)

        assert (await client.read_all())[:4] == (b"0123" if then == "cut" else bytes(client.received))
        assert client.was_reset == (then == "rst")
        assert middle.passed_down == 4
        await asyncio.wait_for(server.connections[0].ended_event.wait(), 1)


async def test_a_middleman_can_stall_and_cut_what_goes_up():
    async with epilogue(), RawServer([b"ok"]) as server:
        async with (
            Middleman(server.port, down=Fault(at=1, then="stall")) as middle,
            RawClient(middle.port) as client,
        ):
            await client.send(GET)
            assert await client.read() == b"o"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.read(), 0.1)
        async with Middleman(server.port, up=Fault(at=5)) as middle, RawClient(middle.port) as client:
            await client.send(GET)
            assert await client.read_all() == b""
        await asyncio.sleep(0.02)

        assert [bytes(c.received) for c in server.connections] == [GET, GET[:5]]


async def test_a_middleman_drips():
    async with (
        RawServer([b"x" * 50, Close()]) as server,
        Middleman(server.port, down=Fault(bytes_per_second=200)) as middle,
        RawClient(middle.port) as client,
    ):
        await client.send(GET)
        began = asyncio.get_running_loop().time()

        assert await client.read_all() == b"x" * 50
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.25, abs=0.05)


async def test_a_middleman_passes_half_closes_and_all_bytes():
    async with (
        epilogue(),
        RawServer([b"y" * 300_000, Close()]) as server,
        Middleman(server.port) as middle,
        RawClient(middle.port) as client,
    ):
        await client.send(GET)
        client.half_close()

        assert await client.read_all() == b"y" * 300_000
        assert server.connections[0].ended == "fin"
        assert middle.connections == 1


async def test_a_connection_to_a_full_queue_hangs():
    with never_accepting() as port, pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 0.3)


async def test_the_epilogue_finds_what_is_left():
    with pytest.raises(AssertionError, match=r"left behind.*socket:"):
        async with epilogue(within=0.05):
            forgotten = socket.socket()
    forgotten.close()
    with pytest.raises(AssertionError, match=r"left behind.*Event.wait"):
        async with epilogue(within=0.05):
            task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()
    with pytest.raises(AssertionError, match="failed"):
        async with epilogue(lambda: False):
            pass
