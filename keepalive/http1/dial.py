"""Reaching an upstream: an address, or every address of a name; and why nobody was reached."""

import asyncio
import contextlib
import errno
import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from keepalive.core.errors import Unreachable
from keepalive.http1.vanished import notice_vanished

#: RFC 8305: so long the next address waits for the one before.
NEXT_ADDRESS_SECONDS = 0.25

Address = tuple[int, tuple[Any, ...]]  # of which family, and as the socket wants it


def literal(host: str, port: int) -> Address | None:
    """The one address that `host` is; None when it is a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (socket.AF_INET, (host, port)) if address.version == 4 else (socket.AF_INET6, (host, port, 0, 0))


async def dial(family: int, address: tuple[Any, ...]) -> socket.socket:
    """A connected socket. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        notice_vanished(sock)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


async def race(host: str, port: int) -> socket.socket:
    """The first to be reached of the addresses of a name, each tried a moment after the one before."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = in_turn((family, address) for family, _, _, _, address in found)
    dialling: set[asyncio.Task[socket.socket]] = set()
    problem: OSError | None = None
    try:
        while addresses or dialling:
            if addresses:
                dialling.add(loop.create_task(dial(*addresses.popleft())))
            done, dialling = await asyncio.wait(
                dialling,
                timeout=NEXT_ADDRESS_SECONDS if addresses else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            won, problem = _sift(done, problem)
            if won is not None:
                return won
    finally:
        await _call_off(dialling)
    raise problem or OSError("no address")


def in_turn(addresses: Iterable[Address]) -> deque[Address]:
    """The families in turn, each in its own order: one that leads nowhere costs a moment, not all of them."""
    families: dict[int, deque[Address]] = {}
    for address in addresses:
        families.setdefault(address[0], deque()).append(address)
    turns: deque[Address] = deque()
    while any(families.values()):
        turns.extend(queue.popleft() for queue in families.values() if queue)
    return turns


def _sift(
    done: Iterable[asyncio.Task[socket.socket]], problem: OSError | None
) -> tuple[socket.socket | None, OSError | None]:
    """One socket of those that were reached, and the problem so far that says most."""
    won: socket.socket | None = None
    for task in done:
        error = task.exception()
        if error is None and won is None:
            won = task.result()
        elif error is None:
            task.result().close()
        elif not isinstance(error, OSError):
            raise error
        elif problem is None or problem.errno != errno.ECONNREFUSED:
            # A refusal says more than a silence: somebody is there.
            problem = error
    return won, problem


async def _call_off(dialling: Iterable[asyncio.Task[socket.socket]]) -> None:
    for task in dialling:
        task.cancel()
    for late in await asyncio.gather(*dialling, return_exceptions=True):
        if isinstance(late, socket.socket):
            late.close()


@contextlib.contextmanager
def explained(name: str, seconds: float) -> Iterator[None]:
    """Around what connects to `name` within `seconds`: all that can go wrong is Unreachable, and says why."""
    try:
        yield
    except TimeoutError:
        raise Unreachable(f"{name} did not accept a connection in {seconds:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(
            f"{name} shows a certificate that is not trusted ({error.verify_message.rstrip('.')}); "
            "if it is yours, name its issuer's file in SSL_CERT_FILE"
        ) from error
    except ssl.SSLError as error:
        raise Unreachable(f"{name} does not speak TLS as expected: {error.reason}") from error
    except socket.gaierror as error:
        raise Unreachable(f"{name}: its host name is not known") from error
    except OSError as error:
        refused = error.errno == errno.ECONNREFUSED
        why = "refused the connection" if refused else f"cannot be reached ({error.strerror or 'no answer'})"
        raise Unreachable(f"{name} {why}", refused=refused) from error
