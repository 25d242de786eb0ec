"""HTTP/1.1 over sockets, both sides: callers' exchanges in, upstreams' replies out.

    heads      the grammar of heads, and what is refused        pure
    bodies     bodies in chunks (llhttp)                         pure
    listener   callers: connections, exchanges, limits, leaving
    upstream   upstreams: connections, replies, complete or cut
    ticker     one coarse clock for all of them
    watch      callers that leave while their socket is not read

Decisions about models are made in `proxy`; here it is decided what may go over the wire.

May import: core.
"""

from keepalive.http1.heads import (
    CHUNKED,
    BadHead,
    Headers,
    ReplyHead,
    RequestHead,
    end_to_end,
    host_of,
    listed,
    preferred_wait,
    values,
)
from keepalive.http1.limits import Limits
from keepalive.http1.listener import Exchange, Listener, bind, serve
from keepalive.http1.ticker import Ticker
from keepalive.http1.upstream import Pool, Reply

__all__ = [
    "CHUNKED",
    "BadHead",
    "Exchange",
    "Headers",
    "Limits",
    "Listener",
    "Pool",
    "Reply",
    "ReplyHead",
    "RequestHead",
    "Ticker",
    "bind",
    "end_to_end",
    "host_of",
    "listed",
    "preferred_wait",
    "serve",
    "values",
]
