"""macOS."""

import resource
import select
import selectors
import socket
import sys

from tests.kit.elsewhere import without

INFINITY = 2**63 - 1
OPEN_MAX = 10_240

soft, (_, hard) = 256, resource.getrlimit(resource.RLIMIT_NOFILE)
really = resource.setrlimit
really(resource.RLIMIT_NOFILE, (soft, hard))


def getrlimit(which: int) -> tuple[int, int]:
    assert which == resource.RLIMIT_NOFILE
    return soft, INFINITY


def setrlimit(which: int, limits: tuple[int, int]) -> None:
    global soft
    assert (which, limits[1]) == (resource.RLIMIT_NOFILE, INFINITY)
    if not 0 <= limits[0] <= min(OPEN_MAX, hard):
        raise ValueError("current limit exceeds maximum limit")
    really(which, (limits[0], hard))
    soft = limits[0]


resource.getrlimit, resource.setrlimit, resource.RLIM_INFINITY = getrlimit, setrlimit, INFINITY
socket.TCP_KEEPALIVE = 0x10
without(socket, "TCP_KEEPIDLE TCP_USER_TIMEOUT TCP_QUICKACK SOCK_NONBLOCK SOCK_CLOEXEC")
selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc]
without(select, "epoll EPOLLIN EPOLLRDHUP EPOLLHUP EPOLLERR EPOLLONESHOT")
sys.platform = "darwin"
