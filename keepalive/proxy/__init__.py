"""The way of a caller's request: who may ask, which model it waits for, and its answer, byte for byte.

    proxy      one request's way, on one screen
    reading    what a head says, found out once for all that say the same
    access     who may ask: keys, Host, Origin
    body       what was asked, kept while it waits
    sdk        WebSockets of LM Studio's own SDKs: what waits there, and what counts as use
    homes      where each conversation was last
    stored     where answers are kept that others go on from
    listings   the models of all upstreams as one list
    patience   heartbeats, while it waits
    call       the request to the upstream, and its answer back
    upstreams  the connections to each, and what is sent on them
    relay      the hot path: an answer's bytes
    silence    how long that has been silent
    answer     what is ours to say to the caller
    account    what is measured
    settings   what the proxy is told to do

May import: protocols, http1, core.
"""

from keepalive.protocols.routes import Heartbeat
from keepalive.proxy.proxy import Proxy
from keepalive.proxy.settings import Address, Settings

__all__ = ["Address", "Heartbeat", "Proxy", "Settings"]
