import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from keepalive.core.errors import Unreachable
from keepalive.http1 import dial
from keepalive.http1.dial import explained, in_turn, literal, race

V4, V6 = socket.AF_INET, socket.AF_INET6


def test_an_address_is_told_from_a_name():
    assert literal("127.0.0.1", 80) == (V4, ("127.0.0.1", 80))
    assert literal("::1", 80) == (V6, ("::1", 80, 0, 0))
    assert literal("localhost", 80) is None


def test_the_families_take_turns_each_in_its_own_order():
    six = [(V6, ("::1",)), (V6, ("::2",)), (V6, ("::3",))]
    four = [(V4, ("1",))]

    assert list(in_turn([*six, *four])) == [six[0], four[0], six[1], six[2]]
    assert list(in_turn([])) == []


@contextlib.contextmanager
def listening(host: str, port: int = 0, *, backlog: int = 8) -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind((host, port))
        sock.listen(backlog)
        yield sock.getsockname()[1]


@contextlib.contextmanager
def closed() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def named(monkeypatch):
    """Makes the names of this machine those of the test; what is behind them are real sockets."""

    def name(*addresses: tuple[str, int]) -> None:
        async def found(*_: object, **__: object) -> list[object]:
            return [(V4, socket.SOCK_STREAM, 6, "", address) for address in addresses]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found, raising=False)

    return name


async def test_the_next_address_is_tried_when_one_refuses(named):
    with closed() as nobody, listening("127.0.0.1") as port:
        named(("127.0.0.1", nobody), ("127.0.0.1", port))

        with await race("name", 0) as sock:
            assert sock.getpeername() == ("127.0.0.1", port)


async def test_the_next_address_is_tried_while_one_is_silent(named, monkeypatch):
    monkeypatch.setattr(dial, "NEXT_ADDRESS_SECONDS", 0.01)
    with listening("127.0.0.2", backlog=0) as full, listening("127.0.0.1") as port:
        # A queue that is full drops what knocks, and the one who knocked waits.
        async with asyncio.TaskGroup() as group:
            knocking = [group.create_task(dial.dial(V4, ("127.0.0.2", full))) for _ in range(3)]
            await asyncio.wait(knocking, return_when=asyncio.FIRST_COMPLETED)
            named(("127.0.0.2", full), ("127.0.0.1", port))

            with await race("name", 0) as sock:
                assert sock.getpeername() == ("127.0.0.1", port)
            for knock in knocking:
                knock.cancel()
        for knock in knocking:
            if not knock.cancelled():
                knock.result().close()


async def test_of_several_problems_a_refusal_is_told(named):
    with closed() as nobody:
        named(("127.0.0.1", nobody), ("255.255.255.255", 9))

        with pytest.raises(Unreachable, match=r"^lm refused the connection$") as raised, explained("lm", 5):
            await race("name", 0)

        assert raised.value.refused


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "lm did not accept a connection in 5 s"),
        (socket.gaierror(-2, "Name or service not known"), "lm: its host name is not known"),
        (OSError(113, "No route to host"), "lm cannot be reached (No route to host)"),
        (OSError("no address"), "lm cannot be reached (no answer)"),
    ],
)
def test_why_nobody_was_reached_is_told_in_words(error, words):
    with pytest.raises(Unreachable) as raised, explained("lm", 5):
        raise error

    assert str(raised.value) == words
    assert not raised.value.refused
