"""Who may ask: a caller with a key, or any program of this machine, but no page of somebody else's in its browser."""

import functools
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence

from keepalive.core.callers import Key
from keepalive.http1 import RequestHead, host_of, values
from keepalive.proxy.settings import Settings

Refused = tuple[int, str, str]  # status, message and code


def admit(head: RequestHead, settings: Settings) -> tuple[Key | None, Refused | None]:
    """The caller's key, where it showed one; what a caller is told that may not ask."""
    origin = (head.get(b"origin") or b"").decode("latin-1")
    if settings.loopback and not settings.keys:
        host = host_of(head.get(b"host") or b"")
        if host and not (host == "localhost" or host in settings.allowed_hosts or _is_address(host)):
            why = "this Host is not expected here; if it is yours, add it to server.allowed_hosts"
            return None, (403, why, "host")
        if _is_foreign(head, origin) and origin not in settings.allowed_origins:
            why = "a page of another origin may not do this; if it is yours: server.allowed_origins"
            return None, (403, why, "origin")
    if settings.keys and not (head.method == b"OPTIONS" and origin in settings.allowed_origins):
        # Browsers send no key with a preflight.
        key = _key_of(head, settings.keys)
        if key is None:
            why = "a key is required: send it as Authorization: Bearer"
            return None, (401, why, "invalid_api_key")
        return key, None
    return None, None


@functools.lru_cache(
    64
)  # callers say the same few names, and telling what they are costs more than all the rest
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_foreign(head: RequestHead, origin: str) -> bool:
    """A browser says that a page of another origin asks; or does not say, and the origin is another one."""
    site = head.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    return bool(origin) and origin.partition("://")[2] != (head.get(b"host") or b"").decode("latin-1")


def _key_of(head: RequestHead, keys: Sequence[Key]) -> Key | None:
    """Which of `keys` the caller showed. Takes the same time however much of it was right."""
    shown = [value[7:] for value in values(head.headers, b"authorization") if value[:7].lower() == b"bearer "]
    shown += values(head.headers, b"x-api-key")
    found = None
    for given in shown:
        digest = hashlib.sha256(given.strip()).digest()
        for key in keys:
            if hmac.compare_digest(digest, hashlib.sha256(key.secret.encode()).digest()):
                found = key
    return found
