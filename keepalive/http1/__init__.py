"""HTTP/1.1 over sockets, both sides: callers' exchanges in, upstreams' replies out.

    heads       the grammar of heads, and what is refused       pure
    cors        what pages of other origins may send and read    pure
    bodies      bodies in chunks (llhttp)                        pure
    limits      what a caller, and an upstream, may cost

    listener    callers: who is accepted, and how that ends
    connection  one caller's connection: its requests, one at a time
    exchange    one request and the answer to it
    turns       how many requests begin at once
    watch       callers that leave while their socket is not read
    vanished    whoever is gone without a word

    pool        upstreams: a request goes out on a connection, kept or new
    dial        reaching an upstream, and why it cannot be reached
    link        one connection to it
    reply       its answer, complete or cut
    tunnel      two connections that have become one

    outbox      what is written in one turn of the loop leaves together
    ticker      one coarse clock for all of them

Decisions about models are made in `proxy`; here it is decided what may go over the wire.

May import: core.
"""

from keepalive.http1 import cors
from keepalive.http1.bodies import CHUNK_SIZES
from keepalive.http1.exchange import Caller, Exchange, Passing, Writer
from keepalive.http1.heads import (
    CHUNKED,
    NO_STORE,
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
from keepalive.http1.listener import Listener, bind, plain_refusal, serve
from keepalive.http1.pool import Pool
from keepalive.http1.reply import Reply
from keepalive.http1.ticker import Ticker
from keepalive.http1.tunnel import Between, Tunnel

__all__ = [
    "CHUNKED",
    "CHUNK_SIZES",
    "NO_STORE",
    "BadHead",
    "Between",
    "Caller",
    "Exchange",
    "Headers",
    "Limits",
    "Listener",
    "Passing",
    "Pool",
    "Reply",
    "ReplyHead",
    "RequestHead",
    "Ticker",
    "Tunnel",
    "Writer",
    "bind",
    "cors",
    "end_to_end",
    "host_of",
    "listed",
    "plain_refusal",
    "preferred_wait",
    "serve",
    "values",
]
