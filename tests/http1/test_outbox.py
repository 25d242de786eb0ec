"""What is written in one turn of the loop leaves together, in order, and nothing stays behind."""

import asyncio
import contextlib
import socket
from types import SimpleNamespace

from keepalive.http1.outbox import TOGETHER_BYTES, Outbox, Sender

BOTH_LOOPS = True


@contextlib.asynccontextmanager
async def senders(count):
    """Connections that share an outbox, and the other end of each."""
    loop = asyncio.get_running_loop()
    outbox = Outbox(loop)
    pairs = [socket.socketpair() for _ in range(count)]
    made = []
    for near, far in pairs:
        far.setblocking(False)
        made.append((await loop.create_connection(lambda: Sender(outbox), sock=near))[1])
    try:
        yield made, [far for _, far in pairs]
    finally:
        for sender in made:
            sender.transport.abort()
        for _, far in pairs:
            far.close()
        await asyncio.sleep(0)


def came(far):
    """What has come, without waiting."""
    with contextlib.suppress(BlockingIOError):
        return far.recv(TOGETHER_BYTES * 4)
    return None


async def turns_over():
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_the_first_write_of_a_turn_leaves_at_once_and_the_others_when_it_is_over():
    async with senders(3) as (made, far):
        for number, sender in enumerate(made):
            sender.write(b"%d" % number)
        at_once = [came(one) for one in far]
        await turns_over()

        assert at_once == [b"0", None, None]
        assert [came(one) for one in far] == [None, b"1", b"2"]


async def test_each_turn_has_a_first_write():
    async with senders(2) as (made, far):
        made[0].write(b"a")
        await turns_over()
        came(far[0])
        made[1].write(b"b")

        assert came(far[1]) == b"b"


async def test_what_one_writes_in_a_turn_comes_in_order_and_leaves_as_one():
    async with senders(2) as (made, far):
        made[0].write(b"first")
        made[1].write(b"a")
        made[0].write(b" second")
        made[1].write(b"b")
        made[0].write(b" third")
        assert came(far[0]) == b"first"
        await turns_over()

        assert came(far[0]) == b" second third"
        assert came(far[1]) == b"ab"


async def test_much_does_not_wait_and_overtakes_nothing():
    much = b"x" * (TOGETHER_BYTES + 1)
    async with senders(3) as (made, far):
        made[0].write(b"first")
        made[1].write(much)
        made[2].write(b"little")
        made[2].write(much)
        at_once = [came(far[1]), came(far[2])]

        assert at_once == [much, b"little" + much]


async def test_one_that_cannot_be_written_to_keeps_nobody_else_waiting():
    async with senders(3) as (made, far):
        made[1].transport.write_eof()
        for sender in made:
            sender.write(b"x")
        await turns_over()

        assert [came(one) for one in far] == [b"x", b"", b"x"]


async def test_much_behind_a_little_is_not_copied():
    async with senders(2) as (made, _):
        written = []
        made[1].transport, own = (
            SimpleNamespace(write=written.append, is_closing=lambda: False),
            made[1].transport,
        )
        much = b"x" * (TOGETHER_BYTES * 16)
        made[0].write(b"first")
        made[1].write(b"head")
        made[1].write(much)
        made[1].transport = own

        assert written[0] == b"head"
        assert written[1] is much


async def test_who_ends_a_connection_flushes_it_before():
    async with senders(2) as (made, far):
        made[0].write(b"first")
        made[1].write(b"last words")
        made[1].flush()
        made[1].transport.close()
        await turns_over()

        assert came(far[1]) == b"last words"
        assert came(far[1]) == b""


async def test_what_is_left_for_a_connection_that_has_ended_troubles_nobody():
    async with senders(3) as (made, far):
        for sender in made:
            sender.write(b"x")
        made[1].transport.abort()
        await turns_over()

        assert came(far[2]) == b"x"
