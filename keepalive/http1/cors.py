"""What a browser lets a page of another origin send here and read: CORS, also into private networks. Pure.

One rule for every answer, whoever gives it: a page that may ask may read what it is told, errors most of all.
"""

import re
from collections.abc import Container
from typing import Final

from keepalive.http1.heads import Headers, RequestHead, listed, values

# Beside the few that every page may read.
_EXPOSED: Final = b"Retry-After, Server-Timing, X-Keepalive-Model-State"
_METHODS: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_ASKED_WITH: Final = b"authorization, content-type, prefer, x-api-key"
_NAMES: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z, \t]*")

Origins = Container[str]


def granted(head: RequestHead, origins: Origins) -> Headers:
    """What an answer to `head` carries; nothing where no page asks, or one that is not among `origins`."""
    origin = head.get(b"origin")
    if origin is None or origin.decode("latin-1").lower() not in origins:
        return []
    return [
        (b"Access-Control-Allow-Origin", origin),
        (b"Access-Control-Expose-Headers", _EXPOSED),
        (b"Vary", b"Origin"),
    ]


def joined(headers: Headers, grant: Headers) -> Headers:
    """An answer's own `headers` with a `grant`: nothing twice, and where both say whose page may read, ours."""
    if not grant:
        return headers
    origin = grant[0][1]
    theirs = values(headers, b"access-control-allow-origin")
    if theirs in ([b"*"], [origin]):
        grant = grant[1:]
    elif theirs:
        headers = [pair for pair in headers if pair[0].lower() != b"access-control-allow-origin"]
    if b"origin" in listed(headers, b"vary"):
        grant = grant[:-1]
    return headers + grant


def preflight(head: RequestHead, origins: Origins, methods: bytes = _METHODS) -> Headers | None:
    """The answer to what a browser asks before a request of a page; None where that is not what is asked.

    It is given here and not upstream: LM Studio may know nothing of pages, or be away, and shows no key.
    """
    if head.method != b"OPTIONS":
        return None
    grant = granted(head, origins)
    if not grant or head.get(b"access-control-request-method") is None:
        return None
    answer = [
        grant[0],
        (b"Access-Control-Allow-Methods", methods),
        (b"Access-Control-Max-Age", b"600"),
        grant[-1],
    ]
    names = head.get(b"access-control-request-headers") or _ASKED_WITH
    if _NAMES.fullmatch(names):
        answer.append((b"Access-Control-Allow-Headers", names))
    if head.get(b"access-control-request-private-network") == b"true":
        answer.append((b"Access-Control-Allow-Private-Network", b"true"))
    return answer
