"""However many ask at the same time, a turn of the loop stays short, and whoever came first is first."""

import asyncio
import socket
from collections import deque
from types import SimpleNamespace

import pytest

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


async def test_whoever_waits_for_his_turn_when_all_ends_is_told_so_and_when_nobody_new_is_let_in_is_answered():
    count = BEGUN_AT_ONCE * 10

    async def handler(exchange):
        exchange.answer(200, [], b"ok")

    async def all_ask(end):
        listening = socket.create_server(("127.0.0.1", 0), backlog=count)
        listening.setblocking(False)
        listener = await serve(handler, sockets=[listening])
        callers = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(count)]
        while len(listener.connections) < count:
            await asyncio.sleep(0)
        for _, writer in callers:
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while not any(connection._exchange for connection in listener.connections):
            await asyncio.sleep(0)
        await end(listener)
        answers = [await reader.read() for reader, _ in callers]
        for _, writer in callers:
            writer.close()
        await listener.close()
        return answers

    told = await all_ask(lambda listener: listener.close())
    served = await all_ask(lambda listener: listener.stop_accepting())

    assert {answer[:13] for answer in told} == {b"HTTP/1.1 200 ", b"HTTP/1.1 503 "}
    away = [answer for answer in told if answer.startswith(b"HTTP/1.1 503 ")]
    assert all(b"\r\nRetry-After: 5\r\n" in answer for answer in away)
    assert all(answer.endswith(b"the proxy is shutting down\n") for answer in away)
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in served)


@pytest.mark.parametrize("how", ["leaves", "sends nonsense"])
async def test_whoever_is_gone_or_refused_before_his_turn_costs_no_handler(how):
    handled = []

    async def handler(exchange):
        handled.append(exchange.head.target)
        exchange.answer(200, [], b"ok")

    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    listener = await serve(handler, sockets=[listening])
    body = b"Transfer-Encoding: chunked\r\n\r\n"
    try:
        gone_reader, gone = await asyncio.open_connection("127.0.0.1", listener.port)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        while len(listener.connections) < 2:
            await asyncio.sleep(0)
        turns, held = listener.turns, deque()
        listener.turns = SimpleNamespace(begin=held.append)  # full until the test says otherwise
        gone.write(b"POST /gone HTTP/1.1\r\nHost: x\r\n" + body)
        while not held:
            await asyncio.sleep(0)
        if how == "leaves":
            gone.close()
            while not any(
                connection._exchange.gone for connection in listener.connections if connection._exchange
            ):
                await asyncio.sleep(0)
        else:
            gone.write(b"no size\r\n")
            while not any(
                connection._exchange.refused for connection in listener.connections if connection._exchange
            ):
                await asyncio.sleep(0)
        writer.write(b"GET /stays HTTP/1.1\r\nHost: x\r\n\r\n")
        while len(held) < 2:
            await asyncio.sleep(0)
        listener.turns = turns
        while held:
            turns.begin(held.popleft())
        stays = await reader.readuntil(b"ok")
        told = b"" if how == "leaves" else await gone_reader.read()
    finally:
        gone.close()
        writer.close()
        await listener.close()

    assert handled == [b"/stays"]
    assert stays.startswith(b"HTTP/1.1 200")
    assert how == "leaves" or told.startswith(b"HTTP/1.1 400")
