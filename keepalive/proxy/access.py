"""Who may ask: a caller with a key, or any program of this machine, but no page of somebody else's in its browser."""

import base64
import binascii
import functools
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Final

from keepalive.core.callers import Key
from keepalive.core.quotes import unquoted
from keepalive.http1 import RequestHead, host_of
from keepalive.proxy.settings import Settings

# What containers and virtual machines call the machine that they run on. Each program has its own name for it.
_OUTSIDE: Final = re.compile(
    r"host\.(?:docker|containers?|lima|orb|minikube|k3d|rancher-desktop)\.internal|(?:gateway|kubernetes)\.docker\.internal"
)

# What distributions write into /etc/hosts for this machine's own loopback.
_HERE: Final = frozenset(
    [
        "localhost",
        "localhost.localdomain",
        "localhost4",
        "localhost4.localdomain4",
        "localhost6",
        "localhost6.localdomain6",
        "ip6-localhost",
        "ip6-loopback",
    ]
)

# An IPv4 address as programs may write it: with fewer numbers, or as hexadecimal ones.
_SHORTENED: Final = re.compile(r"(?:0x[0-9a-f]{1,8}|[0-9]{1,10})(?:\.(?:0x[0-9a-f]{1,8}|[0-9]{1,10})){0,3}")

# A name longer than this is nobody's, and is not said back whole.
_QUOTED: Final = 100

Refused = tuple[int, str, str]  # status, message and code

#: Where callers show their key: what an upstream is not to see of them.
SHOWN_IN: Final = (b"authorization", b"x-api-key", b"api-key")


def admit(head: RequestHead, settings: Settings) -> tuple[Key | None, Refused | None]:
    """The caller's key, where it showed one; what a caller is told that may not ask."""
    # Safari names its extensions in capital letters; no other browser tells two origins apart by them.
    origin = (head.get(b"origin") or b"").decode("latin-1").lower()
    if not settings.keys:
        # Wherever we listen, and most of all where more than this machine can reach us.
        host = _host_of(head.get(b"host") or b"")
        if host and not _is_expected(host, settings):
            why = f"the Host {_quoted(host)} is not expected here; if it is yours, add it to server.allowed_hosts"
            return None, (403, why, "host")
        if _is_foreign(head, origin) and origin not in settings.allowed_origins:
            page = f"a page of {_quoted(origin)}" if origin else "a page of another origin"
            yours = "add its origin to server.allowed_origins"
            if origin in ("null", "file://"):
                # The config takes none of these: every file and every sandbox calls itself so.
                yours = "serve it by HTTP, and add that address to server.allowed_origins"
            why = f"{page} may not do this; if it is yours, {yours}"
            return None, (403, why, "origin")
    if settings.keys and not (head.method == b"OPTIONS" and origin in settings.allowed_origins):
        # Browsers send no key with a preflight.
        key = _key_of(head, settings.keys)
        if key is None:
            why = "a key is required: send it as Authorization: Bearer"
            return None, (401, why, "invalid_api_key")
        return key, None
    return None, None


def _quoted(name: str) -> str:
    """A name that is the caller's own word, as it is said back."""
    return f'"{name[:_QUOTED]}"'


def _is_expected(host: str, settings: Settings) -> bool:
    """A name that no stranger can have pointed at this listener."""
    # Names below `localhost` are this machine by definition: nobody can own one.
    if host in _HERE or host.endswith(".localhost"):
        return True
    # Nor can anybody register one below `.internal`, and a network that makes up its own does not make up these.
    if host.endswith(".internal") and _OUTSIDE.fullmatch(host):
        return True
    if host in settings.allowed_hosts or _is_address(host):
        return True
    return not settings.loopback and host in _own_names()


@functools.cache
def _own_names() -> frozenset[str]:
    """What the network calls this machine without asking anybody's name server: its host name, and that of mDNS."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return frozenset((name, short, f"{short}.local"))


# Callers say the same few names, and telling what they are costs more than all the rest.
_host_of = functools.lru_cache(64)(host_of)


@functools.lru_cache(64)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # No name ends in a number: browsers and resolvers take these for addresses, too (`127.1`).
        return _SHORTENED.fullmatch(host) is not None
    return True


def _is_foreign(head: RequestHead, origin: str) -> bool:
    """A browser says that a page of another origin asks; or does not say, and the origin is another one."""
    site = head.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    return bool(origin) and origin.partition("://")[2] != (head.get(b"host") or b"").decode("latin-1").lower()


def _key_of(head: RequestHead, keys: Sequence[Key]) -> Key | None:
    """Which of `keys` the caller showed. Takes the same time however much of it was right."""
    found = None
    for given in _shown(head):
        digest = hashlib.sha256(given.strip()).digest()
        for key in keys:
            if hmac.compare_digest(digest, hashlib.sha256(key.secret.encode()).digest()):
                found = key
    return found


def _shown(head: RequestHead) -> list[bytes]:
    """What might be a key: OpenAI's clients send it as Bearer, Anthropic's in x-api-key, Azure's in api-key.

    A key is one word, and programs put others in front of it, or none, as people fill in their fields. What knows of
    names and passwords alone (`https://user:KEY@host`) sends Basic: either of the two may be it.
    """
    shown: list[bytes] = []
    for value in (value for name in SHOWN_IN for value in head.values(name)):
        *scheme, given = value.split() or [b""]
        if [word.lower() for word in scheme] != [b"basic"]:
            shown += (given, unquoted(given.decode("latin-1")).encode("latin-1"))
        else:
            try:
                both = base64.b64decode(given, validate=True)
            except binascii.Error:
                continue
            # A key may hold a colon, as LM Studio's own tokens do.
            name, _, password = both.partition(b":")
            shown += (name, password, both, both.removesuffix(b":"))
    return shown
