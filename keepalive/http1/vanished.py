"""Finds out that the other end is gone without a word: its power failed, its cable was pulled.

Nobody closes such a connection, so a read on it would last for ever, and what is written would be sent again for
a quarter of an hour. While nothing is on its way, the kernel probes the other end (`notice_vanished`). While
something is, we look ourselves what has become of it (`has_vanished`): Linux has a bound for that, too, but it
also ends a connection whose other end answers and merely reads nothing for so long, and a paused reader is welcome
to its pause.

Each system has other names for the same wish, and not all know all of them.
"""

import asyncio
import socket
import struct
import sys
from contextlib import suppress

# A connection on which nothing came for so long is probed; so often; given up after so many in vain: in all 60 s.
IDLE_SECONDS = 20
INTERVAL_SECONDS = 10
PROBES = 4
# What was written must be acknowledged, or refused for want of room, within so long.
UNACKNOWLEDGED_SECONDS = 60
# The same of what we ask for ourselves. A load that a cable holds up must not arrive when it has been given up and
# begun anew, by us or by another daemon: nobody gives up one that does not show in less than 45 s.
ASKED_SECONDS = 30
# How often somebody who writes looks whether that is so.
LOOK_SECONDS = 5.0

# macOS's TCP_RXT_CONNDROPTIME, which Python has no name for. It does not mind a reader that pauses. Windows gives up
# sooner than that by itself.
_MACOS_DROP = 0x80

# The beginning of Linux's `struct tcp_info`.
_INFO = struct.Struct("=8B13I")
_RETRANSMITS, _PROBES, _RTO, _SINCE_ACK = 2, 3, 8, 20


def notice_vanished(sock: socket.socket) -> None:
    """Have reads on a connected `sock` fail about a minute after the other end was last there.

    What this system does not know is left out, and so is everything on a socket that is not TCP.
    """
    for option in _wishes(UNACKNOWLEDGED_SECONDS):
        with suppress(OSError):
            sock.setsockopt(*option)
    if sys.platform == "win32" and not hasattr(socket, "TCP_KEEPIDLE"):
        # Before Windows 10, version 1709: in milliseconds, and it always sends ten probes.
        interval = INTERVAL_SECONDS * PROBES * 1000 // 10
        with suppress(OSError):
            sock.ioctl(socket.SIO_KEEPALIVE_VALS, (1, IDLE_SECONDS * 1000, interval))


def has_vanished(sock: socket.socket) -> bool:
    """Whether the other end of `sock` has left unanswered for too long what was written to it.

    Only Linux lets itself be asked; elsewhere the kernel's own bounds hold.
    """
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        info: tuple[int, ...] = _INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
    except (OSError, struct.error):
        return False
    silent = info[_SINCE_ACK] / 1000
    if silent < UNACKNOWLEDGED_SECONDS:
        return False
    # One that has no room is asked less and less often, at last every two minutes, and each of its answers sets the
    # count of probes back to nothing: one in vain may just be under way.
    return info[_PROBES] > 1 or (info[_RETRANSMITS] > 1 and silent > info[_RTO] / 1_000_000)


def next_look(now: float) -> float:
    """When a connection is worth the next look."""
    return now + LOOK_SECONDS


def sees_vanished(transport: asyncio.BaseTransport) -> bool:
    """Whether the other end of a connection has vanished."""
    sock = transport.get_extra_info("socket")
    return sock is not None and has_vanished(sock)


def socket_options() -> list[tuple[int, int, int]]:
    """The same for somebody who opens sockets out of our sight, and writes no more than any reader has room for."""
    seconds = min(ASKED_SECONDS, UNACKNOWLEDGED_SECONDS)
    options = _wishes(seconds)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        options.append((socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000))
    return [option for option in options if _is_known(option)]


def _wishes(unacknowledged: int) -> list[tuple[int, int, int]]:
    wishes = (
        ("TCP_KEEPIDLE", IDLE_SECONDS),
        ("TCP_KEEPALIVE", IDLE_SECONDS),  # the same on macOS
        ("TCP_KEEPINTVL", INTERVAL_SECONDS),
        ("TCP_KEEPCNT", PROBES),
    )
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    options += [
        (socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in wishes if hasattr(socket, name)
    ]
    if sys.platform == "darwin":
        options.append((socket.IPPROTO_TCP, _MACOS_DROP, unacknowledged))
    return options


def _is_known(option: tuple[int, int, int]) -> bool:
    """Whether this kernel takes it: who is handed it may not expect a no."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(*option)
        except OSError:
            return False
    return True
