"""Windows."""

import asyncio
import errno
import fcntl
import os
import select
import selectors
import signal
import socket
import ssl
import sys
import time
from types import ModuleType
from typing import Any

from tests.kit.elsewhere import without, without_modules

SELECTABLE = 512
LK_NBLCK = 2


class Selector(selectors.SelectSelector):
    def select(self, timeout: float | None = None) -> Any:
        if max(len(self._readers), len(self._writers)) > SELECTABLE:
            raise ValueError("too many file descriptors in select()")
        return super().select(timeout)


def refuse(*_: object, **__: object) -> Any:
    raise NotImplementedError


class SelectorEventLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__(Selector())

    add_signal_handler = remove_signal_handler = refuse
    subprocess_exec = subprocess_shell = refuse
    create_unix_connection = create_unix_server = refuse


class ProactorEventLoop(SelectorEventLoop):
    """The default there, as far as it differs."""

    add_reader = add_writer = refuse


def locking(file: int, mode: int, count: int) -> None:
    assert (mode, count) == (LK_NBLCK, 1)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


class Socket(socket.socket):
    """`SO_REUSEADDR` lets anybody listen where somebody else does; without it nobody is kept waiting after an end."""

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_REUSEADDR):
            option = REUSE
        elif (level, option) == (socket.SOL_SOCKET, EXCLUSIVE):
            option = socket.SO_REUSEADDR
        super().setsockopt(level, option, *value)


def socketpair(*_: object) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        return listening.accept()[0], one


REUSE, EXCLUSIVE = socket.SO_REUSEPORT, -5
socket.SO_EXCLUSIVEADDRUSE = EXCLUSIVE  # type: ignore[attr-defined]
msvcrt: Any = ModuleType("msvcrt")
msvcrt.LK_NBLCK, msvcrt.locking = LK_NBLCK, locking
sys.modules["msvcrt"] = msvcrt
asyncio.SelectorEventLoop = SelectorEventLoop  # type: ignore[misc]
asyncio.new_event_loop = asyncio.events.new_event_loop = ProactorEventLoop
socket.socket, socket.socketpair = Socket, socketpair  # type: ignore[misc]
ssl.enum_certificates = lambda store: []  # type: ignore[attr-defined]
signal.SIGBREAK = signal.SIGTTIN  # type: ignore[attr-defined]  # its real number, 21
without_modules("fcntl resource pty tty termios pwd grp syslog uvloop")
without(
    signal,
    "SIGHUP SIGQUIT SIGKILL SIGPIPE SIGALRM SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGUSR1",
)
without(signal, "SIGUSR2 pthread_sigmask set_wakeup_fd setitimer siginterrupt sigwait")
without(
    os,
    "O_NONBLOCK O_CLOEXEC O_NOFOLLOW O_DIRECTORY chown fchown fchmod fork forkpty geteuid getuid getegid getgid",
)
without(
    os,
    "getgroups getloadavg killpg mkfifo nice setsid register_at_fork sched_getaffinity sysconf uname wait pread",
)
without(os, "getgid pread pwrite sendfile")
without(socket, "AF_UNIX SO_REUSEPORT TCP_USER_TIMEOUT TCP_QUICKACK send_fds recv_fds")
without(select, "epoll poll EPOLLIN EPOLLRDHUP EPOLLHUP EPOLLERR EPOLLONESHOT POLLIN POLLOUT POLLHUP")
without(time, "tzset")
sys.platform = "win32"
