"""Ports for servers that end and come again at the same address."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved(count: int = 1) -> Iterator[list[int]]:
    """Free ports that stay free: a socket is bound to each and never listens, so that the system gives it to nobody
    who asks for any port, and a server that names it can bind beside."""
    with contextlib.ExitStack() as held:
        ports = []
        for _ in range(count):
            place = held.enter_context(socket.socket())
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("127.0.0.1", 0))
            ports.append(place.getsockname()[1])
        yield ports


def at_ports(text: str, ports: list[int]) -> str:
    """A config whose addresses have these ports, in their order."""
    for port in ports:
        text = text.replace('127.0.0.1:0"', f'127.0.0.1:{port}"', 1)
    return text
