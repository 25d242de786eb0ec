"""What a caller, and an upstream, may cost."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    head_bytes: int = 65_536
    #: From the connection, or the answer before, to the end of a head.
    header_timeout: float = 75.0
    #: On the wire: with a body in chunks their framing counts too.
    body_bytes: int = 64 * 1024 * 1024
    #: A request body has to bring `body_rate` bytes per second, looked at over each `body_window` seconds.
    body_rate: float = 1024.0
    body_window: float = 30.0
    #: Of a request body that nobody reads yet, and of requests sent ahead: then the socket is left unread.
    ahead_bytes: int = 65_536
    #: After a refusal the caller may go on sending for so long, or the reset would swallow what it was told.
    linger: float = 2.0
    connections: int = 16_384
    tick: float = 0.5
