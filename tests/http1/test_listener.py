"""Callers who come all at once, and those who are there when the listener stops."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Coroutine

import pytest

from keepalive.http1 import Limits, Listener, bind, serve
from keepalive.http1.exchange import Exchange
from tests.kit.live import PATIENCE

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


def last_request(body: bytes) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


async def say_no(exchange: Exchange) -> None:
    exchange.answer(404, [(b"Content-Length", b"0")], b"")


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = await serve(say_no, sockets=bind("127.0.0.1", 0), limits=Limits())
    yield listener
    await listener.close()


async def connect(listener: Listener) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    known = len(listener.connections)
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    async with asyncio.timeout(PATIENCE):
        while len(listener.connections) == known:
            await asyncio.sleep(0.01)
    return reader, writer


@pytest.mark.parametrize("said", [b"", REQUEST[:20]], ids=["nothing", "half a head"])
async def test_a_caller_who_was_just_accepted_is_still_answered(listener: Listener, said: bytes) -> None:
    reader, writer = await connect(listener)
    writer.write(said)
    await asyncio.sleep(0.05)

    await listener.stop_accepting()
    writer.write(REQUEST[len(said) :])
    answer = await reader.read()

    assert answer.startswith(b"HTTP/1.1 ")
    async with asyncio.timeout(PATIENCE):
        await listener.emptied()
    writer.close()


async def test_a_caller_who_says_nothing_does_not_delay_the_end(listener: Listener) -> None:
    _, writer = await connect(listener)

    await listener.stop_accepting()
    async with asyncio.timeout(PATIENCE):
        await listener.emptied()

    assert not listener.connections
    writer.close()


async def test_a_caller_between_two_requests_is_let_go_at_once(listener: Listener) -> None:
    reader, writer = await connect(listener)
    writer.write(REQUEST)
    assert (await reader.readline()).startswith(b"HTTP/1.1 ")
    await asyncio.sleep(0.05)

    await listener.stop_accepting()

    async with asyncio.timeout(PATIENCE):
        await listener.emptied()
    writer.close()


async def test_who_waits_to_be_accepted_when_the_listener_stops_is_answered_and_not_reset() -> None:
    listener = await serve(say_no, sockets=bind("127.0.0.1", 0), limits=Limits())
    with contextlib.ExitStack() as stack:
        callers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port))) for _ in range(9)
        ]
        for caller in callers:  # nothing of ours has run since they came
            caller.sendall(REQUEST)

        await listener.stop_accepting()
        async with asyncio.timeout(PATIENCE):
            await listener.emptied()

        assert {caller.recv(9) for caller in callers} == {b"HTTP/1.1 "}


async def test_whoever_connects_while_the_listener_stops_is_answered_or_was_never_accepted() -> None:
    """Whom nobody accepted waits in the queue of the socket, which another process may go on serving."""
    sockets = bind("127.0.0.1", 0)
    kept = [one.dup() for one in sockets]
    first = await serve(say_no, sockets=sockets, limits=Limits(), shared=True)
    port = first.port

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        answer = await reader.readline()
        writer.close()
        return answer

    callers = [asyncio.create_task(ask()) for _ in range(200)]
    for _ in range(5):
        await asyncio.sleep(0)
    await first.stop_accepting()
    second = await serve(say_no, sockets=kept, limits=Limits())
    async with asyncio.timeout(PATIENCE):
        answers = await asyncio.gather(*callers)

    assert {answer[:9] for answer in answers} == {b"HTTP/1.1 "}
    await first.close()
    await second.close()


async def test_newcomers_do_not_wait_for_a_turn_of_the_loop_each(listener: Listener) -> None:
    """Under overload a turn is long, and whoever comes last would wait for all of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port)))
        turns = 0
        while len(listener.connections) < 50 and turns < 200:
            await asyncio.sleep(0)
            turns += 1

        assert turns < 20


async def test_where_there_is_room_for_few_the_others_wait_until_one_leaves() -> None:
    limits = Limits(connections=2)
    listener = await serve(say_no, sockets=bind("127.0.0.1", 0), limits=limits)
    with contextlib.ExitStack() as stack:
        callers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port))) for _ in range(5)
        ]
        for _ in range(200):
            await asyncio.sleep(0)
        most = len(listener.connections)
        for caller in callers:
            caller.close()
        async with asyncio.timeout(30):
            while listener.connections:
                await asyncio.sleep(0.01)

    await listener.close()
    assert most == 2


class WithoutIPv6(socket.socket):
    """As on a kernel that was started with `ipv6.disable=1`."""

    def __init__(self, family: int = -1, *how: int, **more: int | None) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *how, **more)


def test_every_interface_of_a_machine_without_ipv6_is_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM) + socket.getaddrinfo(
        "::1", 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "socket", WithoutIPv6)

    (sock,) = bind("", 0)
    with sock:
        assert sock.family is socket.AF_INET
    del found[0]
    with pytest.raises(OSError, match=os.strerror(errno.EAFNOSUPPORT)):
        bind("", 0)


async def test_who_leaves_in_the_turn_in_which_the_answer_ends_has_all_of_it() -> None:
    async def handler(exchange: Exchange) -> None:
        (connection,) = listener.connections
        listener.outbox.begin()  # somebody else has written in this turn, so what follows leaves when it is over
        exchange.answer(200, [], b"all of it")
        if not connection.eof_received():
            connection.transport.close()  # as the loop does behind it

    listener = await serve(handler, sockets=bind("127.0.0.1", 0))
    reader, writer = await connect(listener)
    writer.write(REQUEST)
    answer = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    await listener.close()

    assert answer.endswith(b"all of it")


async def test_a_handler_that_fails_before_it_begins_costs_this_request_alone() -> None:
    def handler(exchange: Exchange) -> Coroutine[object, object, None]:
        if exchange.head.target == b"/fails":
            raise ValueError
        return say_no(exchange)

    listener = await serve(handler, sockets=bind("127.0.0.1", 0))
    answers = []
    for request in (REQUEST.replace(b"/ ", b"/fails "), REQUEST):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(request)
        answers.append(await asyncio.wait_for(reader.readuntil(b"\r\n"), PATIENCE))
        writer.close()
    await listener.close()

    assert [answer[9:12] for answer in answers] == [b"500", b"404"]


async def test_what_one_request_forgets_of_its_head_is_there_for_the_next() -> None:
    hosts = []

    async def handler(exchange: Exchange) -> None:
        hosts.append(exchange.head.get(b"host"))
        exchange.forget_head()
        exchange.forget_head()
        exchange.answer(200, [], b"ok")

    listener = await serve(handler, sockets=bind("127.0.0.1", 0))
    reader, writer = await connect(listener)
    for _ in range(3):
        writer.write(REQUEST)
        await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)
    writer.close()
    await listener.close()

    assert hosts == [b"here"] * 3


@pytest.mark.parametrize("body", [b"", b"{}"], ids=["no body", "a body"])
async def test_who_asks_but_once_is_let_go_with_the_answer(body: bytes) -> None:
    listener = await serve(say_no, sockets=bind("127.0.0.1", 0), limits=Limits(linger=10 * PATIENCE))
    reader, writer = await connect(listener)
    writer.write(last_request(body))
    await asyncio.wait_for(reader.read(), PATIENCE)

    async with asyncio.timeout(PATIENCE):
        await listener.emptied()
    writer.close()
    await listener.close()


@pytest.mark.parametrize("body", [b"", b"{}"], ids=["no body", "a body"])
async def test_who_asks_but_once_and_reads_slowly_has_all_of_the_answer(body: bytes) -> None:
    whole = bytes(32 * 1024 * 1024)

    async def handler(exchange: Exchange) -> None:
        exchange.answer(200, [], whole)

    limits = Limits(linger=0.0, tick=0.01)
    listener = await serve(handler, sockets=bind("127.0.0.1", 0), limits=limits)
    reader, writer = await connect(listener)
    writer.write(last_request(body))
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
    await asyncio.sleep(0.2)
    answer = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    await listener.close()

    assert len(answer) == len(whole)


async def test_what_stands_behind_a_body_that_came_with_its_head_is_the_next_request() -> None:
    bodies: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        bodies.append(await exchange.read())
        exchange.answer(200, [], b"")

    listener = await serve(handler, sockets=bind("127.0.0.1", 0))
    reader, writer = await connect(listener)
    asked = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 1\r\n\r\n%b"
    writer.write(asked % b"a" + asked % b"b" + last_request(b"c"))
    await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    await listener.close()

    assert bodies == [b"a", b"b", b"c"]
