"""Sees callers leave whose sockets are not being read."""

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable


class Watch:
    """Calls back when the other end of a socket hangs up or shuts down its side, also behind unread bytes.

    A socket that back-pressure leaves unread shows its FIN to nobody. Where there is no epoll such a caller
    is noticed when its bytes are read.
    """

    def __init__(self) -> None:
        self._called: dict[int, Callable[[], None]] = {}
        self._epoll: select.epoll | None = None

    def add(self, sock: socket.socket, gone: Callable[[], None]) -> None:
        fd = sock.fileno()
        if not hasattr(select, "epoll") or fd < 0:
            return
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ready)
        with contextlib.suppress(OSError):
            self._epoll.register(
                fd, select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLONESHOT
            )
            self._called[fd] = gone

    def discard(self, sock: socket.socket) -> None:
        fd = sock.fileno()
        if self._epoll is not None and self._called.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def close(self) -> None:
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        self._called.clear()

    def _ready(self) -> None:
        if self._epoll is None:
            return
        for fd, _ in self._epoll.poll(0):
            gone = self._called.pop(fd, None)
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)
            if gone is not None:
                gone()
