"""What systemd is told (sd_notify) and what it hands over (listening sockets, a watchdog).

Both are a few variables of the environment; without them nothing here does anything. Telling never raises and
never waits: a service manager that does not listen is no reason to disturb a stream.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from keepalive.core.errors import KeepaliveError

FIRST_SOCKET = 3
# Where a listener is handed over, connections must be able to queue for as long as a restart takes.
BACKLOG = 4096
TICK = 1.0
# Until we are ready: somebody waits for it, and so do the connections that queue during a restart.
FIRST_TICK = 0.1
# LM Studio may hang when it is asked for the first time. We are as ready as we can be then.
FIRST_ANSWER = 30.0
# Asked for again each second while streams end, so it is also how long a daemon that hangs then is spared.
EXTENSION = 10.0
STATUS_MAX = 500


class SocketError(KeepaliveError):
    """The sockets that systemd passed are not what the daemon listens on."""


class Daemon(Protocol):
    @property
    def stopping(self) -> bool: ...
    def alive(self) -> str | None: ...
    def status(self) -> Mapping[str, Any]: ...


def notify(environ: Mapping[str, str], **fields: object) -> bool:
    """Tell the service manager, as in `notify(environ, READY=1)`; whether there is one and it took it."""
    address = environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@") or not hasattr(socket, "AF_UNIX"):
        return False
    lines = [f"{name}={' '.join(str(value).split())}" for name, value in fields.items()]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto("\n".join(lines).encode(errors="replace"), address.replace("@", "\0", 1))
    except OSError:
        return False
    return True


def listen_sockets(environ: Mapping[str, str]) -> dict[str, list[socket.socket]]:
    """The sockets that systemd opened for this process: those of `client` and those of `admin`."""
    found: dict[str, list[socket.socket]] = {"client": [], "admin": []}
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return found
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for number in range(int(environ.get("LISTEN_FDS", "0"))):
        name = names[number] if number < len(names) else ""
        if name not in found:
            raise SocketError(
                f'systemd passed a socket with the name "{name}"; write FileDescriptorName=client or '
                "FileDescriptorName=admin in its .socket unit"
            )
        opened = socket.socket(fileno=FIRST_SOCKET + number)
        opened.setblocking(False)
        opened.set_inheritable(False)
        found[name].append(opened)
    return found


def address(opened: socket.socket) -> tuple[str, int]:
    """Host and port of a listener; a host of "" is every interface."""
    host, port = opened.getsockname()[:2]
    return "" if host in ("0.0.0.0", "::") else host, port  # noqa: S104


class Service:
    """The daemon as systemd sees it: ready, reloading, alive, stopping, and in one line how it is.

    `summary` turns the daemon's status into that line.
    """

    def __init__(
        self,
        daemon: Daemon,
        summary: Callable[[Mapping[str, Any]], str],
        environ: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._daemon = daemon
        self._summary = summary
        self._environ = environ
        self._clock = clock
        self._watchdog = _watchdog(environ)
        self._fed = float("-inf")
        self._ready = False
        self._said = ""

    async def run(self) -> None:
        """Tell until cancelled. Starts when the listeners answer, and goes on while streams end."""
        if not self._environ.get("NOTIFY_SOCKET"):
            return
        patience = self._clock() + FIRST_ANSWER
        pace = TICK if self._watchdog is None else min(TICK, self._watchdog)
        try:
            while True:
                self._tell(patience)
                await asyncio.sleep(pace if self._ready else FIRST_TICK)
        finally:
            self._notify(STOPPING=1, STATUS="stopping")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Around reading the config again, well or not."""
        if self._ready:
            # systemd 253 wants the time, to tell this reload from one before; 252 ignores it.
            self._notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
        try:
            yield
        finally:
            if self._ready:
                self._notify(READY=1)

    def _tell(self, patience: float) -> None:
        now, status = self._clock(), self._daemon.status()
        if not self._ready and (_was_asked(status) or now >= patience):
            self._ready = self._notify(READY=1)
        is_alive = self._daemon.alive() is None
        if self._daemon.stopping and is_alive:
            self._notify(STOPPING=1, EXTEND_TIMEOUT_USEC=int(EXTENSION * 1e6))
        if self._watchdog is not None and is_alive and now - self._fed >= self._watchdog:
            # What was not taken is sent again a second later.
            self._fed = now if self._notify(WATCHDOG=1) else self._fed
        line = self._summary(status)[:STATUS_MAX]
        if line != self._said and self._notify(STATUS=line):
            self._said = line

    def _notify(self, **fields: object) -> bool:
        return notify(self._environ, **fields)


def _was_asked(status: Mapping[str, Any]) -> bool:
    """Whether each upstream was asked once, with whatever result."""
    return all(upstream["state"] != "unknown" or upstream["error"] for upstream in status["upstreams"])


def _watchdog(environ: Mapping[str, str]) -> float | None:
    """Half the time, in seconds, after which systemd takes silence for death."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    period = environ.get("WATCHDOG_USEC", "")
    return int(period) / 2e6 if period.isdecimal() and int(period) else None
