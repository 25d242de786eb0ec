"""However many ask at the same time, a turn of the loop stays short, and whoever came first is first."""

import asyncio
import socket

from keepalive.http1 import serve
from keepalive.http1.turns import BEGUN_AT_ONCE, Turns

BOTH_LOOPS = True


async def by_turns(begun):
    """How many there were in each turn, until three have passed without one."""
    counts = []
    while counts[-3:] != [0] * 3:
        before = len(begun)
        await asyncio.sleep(0)
        counts.append(len(begun) - before)
    return counts


async def test_a_turn_begins_only_so_many_and_the_next_ones_the_others_in_their_order():
    begun, turns = [], Turns(asyncio.get_running_loop())
    asked = range(BEGUN_AT_ONCE * 3 + 5)
    for number in asked:
        turns.begin(lambda number=number: begun.append(number))
    at_once = len(begun)
    counts = await by_turns(begun)

    assert at_once == BEGUN_AT_ONCE
    assert max(counts) == BEGUN_AT_ONCE
    assert begun == list(asked)


async def test_callers_who_ask_at_once_are_all_answered_and_never_many_in_one_turn():
    count = BEGUN_AT_ONCE * 4
    begun, most = [], []

    async def handler(exchange):
        begun.append(exchange)
        exchange.answer(200, [], b"ok")

    listening = socket.create_server(("127.0.0.1", 0), backlog=count)
    listening.setblocking(False)
    listener = await serve(handler, sockets=[listening])
    try:
        callers = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(count)]
        while len(listener.connections) < count:
            await asyncio.sleep(0)
        for _, writer in callers:
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while len(begun) < count:
            before = len(begun)
            await asyncio.sleep(0)
            most.append(len(begun) - before)
        answers = [await reader.readuntil(b"ok") for reader, _ in callers]
    finally:
        for _, writer in callers:
            writer.close()
        await listener.close()

    assert all(answer.startswith(b"HTTP/1.1 200 OK\r\n") for answer in answers)
    assert max(most) <= BEGUN_AT_ONCE


async def test_a_caller_who_leaves_while_others_are_before_him_costs_nothing():
    handled = []

    async def handler(exchange):
        handled.append(exchange.head.target)
        exchange.answer(200, [], b"ok")

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    listener = await serve(handler, sockets=[listening])
    try:
        for number in range(BEGUN_AT_ONCE):
            listener.turns.begin(lambda number=number: None)
        leaving = socket.create_connection(("127.0.0.1", listener.port))
        leaving.sendall(b"GET /left HTTP/1.1\r\nHost: x\r\n\r\n")
        leaving.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"GET /stays HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"ok")
        writer.close()
    finally:
        await listener.close()

    assert b"/stays" in handled
    assert not listener.connections
