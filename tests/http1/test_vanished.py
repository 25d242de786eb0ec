"""A peer that is gone without a word is found: what each system is asked for, and Linux in earnest."""

import ctypes
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from keepalive.core.records import LISTING_LAG
from keepalive.http1 import vanished
from keepalive.http1.vanished import has_vanished, notice_vanished, socket_options
from tests.kit.live import wait_until

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux is asked")
SO_ATTACH_FILTER = 26


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname(), timeout=30)
        with one, listening.accept()[0] as other:
            yield one, other


def vanish(sock: socket.socket) -> None:
    """From now on its kernel throws away what comes, and so acknowledges nothing: as good as a pulled cable."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(drop_all)))


@linux
def test_linux_probes_a_silent_connection_and_gives_up_within_a_minute() -> None:
    with pair() as (one, other):
        for sock in (one, other):
            notice_vanished(sock)
            tcp = {
                name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            }

            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert tcp == {
                "TCP_KEEPIDLE": 20,
                "TCP_KEEPINTVL": 10,
                "TCP_KEEPCNT": 4,
                "TCP_USER_TIMEOUT": 0,  # or a reader that pauses would be cut off
            }


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vanished, "IDLE_SECONDS", 1)
    monkeypatch.setattr(vanished, "INTERVAL_SECONDS", 1)
    monkeypatch.setattr(vanished, "PROBES", 1)
    monkeypatch.setattr(vanished, "UNACKNOWLEDGED_SECONDS", 2)


@linux
@pytest.mark.usefixtures("hasty")
def test_who_waits_for_a_peer_that_has_vanished_is_told() -> None:
    with pair() as (one, other):
        notice_vanished(one)
        one.settimeout(None)
        vanish(other)
        with pytest.raises(TimeoutError):
            one.recv(1)


@linux
@pytest.mark.usefixtures("hasty")
def test_who_has_written_to_a_peer_that_has_vanished_finds_it_out() -> None:
    with pair() as (one, other):
        vanish(other)
        one.sendall(b"data: {}\n\n")

        assert not has_vanished(one)
        wait_until(lambda: has_vanished(one))


def fill(sock: socket.socket) -> None:
    """Writes until the other end has room for no more."""
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(65_536))


def since_answered(sock: socket.socket) -> int:
    """Milliseconds."""
    return int(struct.unpack("=8B13I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60))[20])


@linux
@pytest.mark.usefixtures("hasty")
def test_who_fills_a_peer_that_then_vanishes_finds_it_out() -> None:
    with pair() as (one, other):
        fill(one)
        vanish(other)
        wait_until(lambda: has_vanished(one))


@linux
@pytest.mark.usefixtures("hasty")
def test_a_reader_that_reads_nothing_for_longer_than_the_bound_is_welcome_to_its_pause() -> None:
    with pair() as (one, other):
        notice_vanished(one)
        fill(one)
        # It is asked less and less often: let the time between two answers be longer than the bound.
        longest = 0
        while longest < 3_000:
            time.sleep(0.02)
            longest = max(longest, since_answered(one))
            assert not has_vanished(one)

        other.setblocking(False)
        assert other.recv(1)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


@linux
@pytest.mark.usefixtures("hasty")
def test_a_peer_that_is_silent_but_there_is_left_alone() -> None:
    with pair() as (one, other):
        notice_vanished(one)
        one.settimeout(4.0)
        with pytest.raises(TimeoutError, match=r"^timed out$"):
            one.recv(1)
        other.sendall(b"x")

        assert one.recv(1) == b"x"


# --- others, by imitation -----------------------------------------------------------------------------

NAMES = (
    "TCP_KEEPIDLE",
    "TCP_KEEPALIVE",
    "TCP_KEEPINTVL",
    "TCP_KEEPCNT",
    "TCP_USER_TIMEOUT",
    "SIO_KEEPALIVE_VALS",
)
ON = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
TCP = socket.IPPROTO_TCP


class Told:
    """A socket of another system: notes what it is told, and refuses the options in `refused`."""

    def __init__(self, refused: tuple[int, ...] = ()) -> None:
        self.refused = refused
        self.options: list[tuple[int, int, int]] = []
        self.vals: list[tuple[int, tuple[int, int, int]]] = []

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if option in self.refused:
            raise OSError(92, "Protocol not available")
        self.options.append((level, option, value))

    def ioctl(self, control: int, option: tuple[int, int, int]) -> None:
        self.vals.append((control, option))


def told(monkeypatch: pytest.MonkeyPatch, platform: str, *refused: int, **constants: int) -> Told:
    """What a socket is told on a system whose Python knows these names alone."""
    monkeypatch.setattr(sys, "platform", platform)
    for name in NAMES:
        monkeypatch.delattr(socket, name, raising=False)
    for name, number in constants.items():
        monkeypatch.setattr(socket, name, number, raising=False)
    sock = Told(refused)
    notice_vanished(sock)  # type: ignore[arg-type]
    return sock


def test_macos_has_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sock = told(monkeypatch, "darwin", TCP_KEEPALIVE=0x10, TCP_KEEPINTVL=0x101, TCP_KEEPCNT=0x102)

    assert sock.options == [ON, (TCP, 0x10, 20), (TCP, 0x101, 10), (TCP, 0x102, 4), (TCP, 0x80, 60)]
    assert sock.vals == []


def test_windows_has_the_names_of_linux_and_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 17, "TCP_KEEPCNT": 16, "SIO_KEEPALIVE_VALS": 0x98000004}
    sock = told(monkeypatch, "win32", **names)

    assert sock.options == [ON, (TCP, 3, 20), (TCP, 17, 10), (TCP, 16, 4)]
    assert sock.vals == []


def test_an_older_windows_which_sends_ten_probes_is_told_in_milliseconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sock = told(monkeypatch, "win32", SIO_KEEPALIVE_VALS=0x98000004)

    assert sock.options == [ON]
    assert sock.vals == [(0x98000004, (1, 20_000, 4_000))]


def test_a_system_that_knows_none_of_it_is_asked_for_its_own_idea_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sock = told(monkeypatch, "openbsd7")

    assert sock.options == [ON]


def test_what_a_system_refuses_does_not_keep_the_rest_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 18}
    sock = told(monkeypatch, "linux", 4, 6, **names)

    assert sock.options == [ON, (TCP, 5, 10)]


@linux
def test_who_opens_sockets_himself_is_told_what_this_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "TCP_KEEPINTVL", 9999)  # a name that it does not know

    assert socket_options() == [ON, (TCP, 4, 20), (TCP, 6, 4), (TCP, 18, 30_000)]


def test_what_a_cable_holds_up_does_not_arrive_when_a_load_that_does_not_show_has_been_given_up() -> None:
    assert vanished.ASKED_SECONDS < LISTING_LAG


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no such sockets")
def test_a_socket_that_is_not_tcp_is_left_as_it_is() -> None:
    one, other = socket.socketpair()
    with one, other:
        notice_vanished(one)
        one.sendall(b"x")

        assert other.recv(1) == b"x"


def test_a_socket_that_is_closed_already_is_no_error() -> None:
    with pair() as (one, _):
        one.close()

        notice_vanished(one)
        assert not has_vanished(one)
