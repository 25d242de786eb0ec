"""Has the kernel find out that the other end is gone without a word: its power failed, its cable was pulled.

Nobody closes such a connection, so a read on it would last for ever, and what is written would be sent again
for a quarter of an hour. Each system has other names for the same wish, and not all know all of them.
"""

import socket
import sys
from contextlib import suppress

# A connection on which nothing came for so long is probed; so often; given up after so many in vain: in all 60 s.
IDLE_SECONDS = 20
INTERVAL_SECONDS = 10
PROBES = 4
# What was written must be acknowledged within so long. Windows gives up sooner than that by itself.
UNACKNOWLEDGED_SECONDS = 60

# macOS's TCP_RXT_CONNDROPTIME, which Python has no name for.
_MACOS_DROP = 0x80


def notice_vanished(sock: socket.socket) -> None:
    """Have reads and writes on a connected `sock` fail about a minute after the other end was last there.

    What this system does not know is left out, and so is everything on a socket that is not TCP.
    """
    wishes = (
        ("TCP_KEEPIDLE", IDLE_SECONDS),
        ("TCP_KEEPALIVE", IDLE_SECONDS),  # the same on macOS
        ("TCP_KEEPINTVL", INTERVAL_SECONDS),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_SECONDS * 1000),
    )
    options = [(getattr(socket, name), value) for name, value in wishes if hasattr(socket, name)]
    if sys.platform == "darwin":
        options.append((_MACOS_DROP, UNACKNOWLEDGED_SECONDS))
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in options:
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    if sys.platform == "win32" and not hasattr(socket, "TCP_KEEPIDLE"):
        # Before Windows 10, version 1709: in milliseconds, and it always sends ten probes.
        interval = INTERVAL_SECONDS * PROBES * 1000 // 10
        with suppress(OSError):
            sock.ioctl(socket.SIO_KEEPALIVE_VALS, (1, IDLE_SECONDS * 1000, interval))
