"""Readers of addresses: where we listen, where LM Studio is, which hosts and web pages may ask."""

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote

from keepalive.config.mistakes import looks_secret, nearest, short, shown

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*):(\d{1,5})", re.ASCII)
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]{0,62})://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?", re.ASCII)
_URL = re.compile(r"(https?://[^/?#\\\s]+)((?:/[^?#]*)?)([?#].*)?", re.ASCII | re.IGNORECASE | re.DOTALL)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?", re.ASCII)

# What people copy together with the address, and what every client of LM Studio adds by itself.
_API = re.compile(
    r"(/(v1|api/v[01])(/(models(/(load|unload|download))?|chat|chat/completions|completions|embeddings|responses|messages))?)+$",
    re.IGNORECASE,
)

_OF_A_LINK = re.compile(r"https?://\[fe[89ab][0-9a-f]:[^\]]*\]", re.IGNORECASE)

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Pages of these have no origin of their own, whatever stands behind the scheme.
_NAMELESS = re.compile(r"null|(file|data|blob|about|javascript):.*", re.DOTALL)

# Looser than the readers, because the engines of some editors know no lookahead.
ADDRESS_PATTERN = _ADDRESS.pattern
URL_PATTERN = r"https?://[^/?#@\s]+(/[^?#@\s]*)?"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. An empty host is every interface, port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def read_address(value: object) -> Address:
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if found and (not found[1] or _is_host(found[1])) and int(found[2]) < 2**16:
        return Address(found[1].strip("[]"), int(found[2]))
    text = shown(value).strip('"')
    if text.isdecimal() and int(text) < 2**16:
        advice = f'write "127.0.0.1:{text}", or ":{text}" for every interface'
    elif _is_host(text):
        advice = f'write "{text}:1235"'
    else:
        advice = 'write one such as "127.0.0.1:1235", "[::1]:1235", or ":1235" for every interface'
    raise ValueError(f"{shown(value)} is not host and port; {advice}")


def read_host_name(value: str) -> str:
    if not _is_host(value):
        raise ValueError(f"{shown(value)} is no host name; write {_host_meant(value)}")
    return value.lower().rstrip(".")  # as it is compared


def _host_meant(value: str) -> str:
    """People write more than the name, stars for names that they would have to list, and letters of their language."""
    found = re.fullmatch(r"(?:[a-z]+://)?([^/:]+)(?::\d+)?(?:/.*)?", value.strip().lower())
    meant = _plain(found[1]) if found else ""
    if meant.startswith("*."):
        return (
            f'each name by itself, such as "llm{meant[1:]}"' if _is_host(meant[2:]) else "each name by itself"
        )
    advice = _fit(meant) if _is_host(meant) else ""
    return f'"{advice}"' if advice else 'one such as "llm.example.org"'


def read_url(value: str) -> str:
    """An upstream: scheme://host[:port] in lower case, its path as it stands there, no slash at the end."""
    if "@" in value:
        raise ValueError("holds credentials, which do not stand here; write api_token_env or api_token_file")
    example = "http://127.0.0.1:1234"
    if _OF_A_LINK.match(value):
        why = "is an address of one link alone, which is none without its interface"
        raise ValueError(
            f'{shown(value)} {why}; write the name of that machine, such as "http://studio.local:1234"'
        )
    found = _URL.fullmatch(value)
    server = found[1].lower() if found else ""
    if found is None or _origin(server) is None:
        raise ValueError(_no_origin(value, "http", example))
    path = found[2].rstrip("/")
    # Each step mends one thing, so what is advised in the end is right in every way.
    dotless = _without_dots(path)
    own = _API.sub("", dotless)
    plain = quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", own), safe="/%!$&'()*+,;=:~", errors="replace")
    if found[3]:
        wrong = f"has a {'query' if found[3].startswith('?') else 'fragment'}"
    elif dotless != path:
        wrong = "has empty or dot segments"
    elif own != dotless:
        wrong = "ends in a path of LM Studio itself, which keepalive adds"
    elif plain != own:
        wrong = "has characters that stand in no path"
    else:
        return server + path
    raise ValueError(f'{shown(value)} {wrong}; write "{_fit(server + plain) or example}"')


def read_engine_url(value: str) -> str:
    """Where etcd listens: scheme, host and port, no slash at the end."""
    if "@" in value:
        raise ValueError("holds credentials, which do not stand here; write user and password_file")
    plain, example = value.lower().rstrip("/"), "http://10.0.0.1:2379"
    scheme, _, place = plain.partition("://")
    origin = _origin(plain)
    if origin is None or scheme not in _DEFAULT_PORTS:
        meant = f"http://{place or plain}"
        advice = _fit(meant) if _origin(meant) else ""
        raise ValueError(f'{shown(value)} is not scheme, host and port; write "{advice or example}"')
    return origin


def read_origin(value: str) -> str:
    """A web page as its browser names it: scheme and host in lower case, the port where it is no default."""
    plain = value.lower().removesuffix("/")
    if _NAMELESS.fullmatch(plain):
        why = 'would let any page in, because every sandboxed page and every file sends "null"'
        advice = 'serve the page and write its address, such as "http://localhost:8000"'
        raise ValueError(f"{shown(value)} {why}; {advice}")
    if "*" in plain:
        wrong = "would let every web page load models" if plain == "*" else "is what no browser sends"
        raise ValueError(f"{shown(value)} {wrong}; name each origin by itself")
    scheme = plain.partition("://")[0]
    origin = _origin(plain)
    if origin is None or _meant(scheme) != scheme:
        raise ValueError(_no_origin(value, "https", "https://chat.example.org"))
    return origin


def _origin(text: str) -> str | None:
    """In the one spelling that browsers use; None where it is no origin."""
    found = _ORIGIN.fullmatch(text)
    if found is None or not 0 < int(found[3] or 80) < 2**16:
        return None
    scheme, host, port = found.groups()
    # Programs with a browser inside call themselves what they like: `app://-`, `app://.`.
    if not _is_host(host) and (scheme in _DEFAULT_PORTS or host.startswith("[")):
        return None
    if host.startswith("["):
        host = f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
    return f"{scheme}://{host}" + (
        f":{int(port)}" if port and int(port) != _DEFAULT_PORTS.get(scheme) else ""
    )


def _meant(scheme: str) -> str:
    """Any scheme may be that of a program with a browser inside, but not one that is nearly http."""
    sockets = {"ws": "http", "wss": "https"}
    return sockets.get(scheme) or nearest(scheme, _DEFAULT_PORTS) or scheme


def _no_origin(value: str, scheme: str, example: str) -> str:
    # People leave the scheme or a part of it out, write it twice, or more behind the port.
    found = re.match(r"(?:(https?)[:/]+)*(?:([a-z][a-z0-9+.-]*)://)?([^/?#\s]+)", value.strip().lower())
    given = found and (found[2] or found[1])
    meant = f"{_meant(given or _usual(found[3], scheme))}://{_plain(found[3])}" if found else ""
    # An upstream speaks http; a page may be of any program.
    sound = _origin(meant) and (scheme == "https" or meant.startswith("http"))
    advice = (_fit(meant) if sound else "") or example
    return f'{shown(value)} is not scheme, host and port; write "{advice}"'


def _plain(host: str) -> str:
    """As browsers and resolvers say a name that has letters of its language."""
    name, colon, port = host.partition(":")
    if not name.isascii() and len(name) < 256:
        with suppress(UnicodeError):
            name = name.encode("idna").decode("ascii")
    return name + colon + port


def _usual(host: str, scheme: str) -> str:
    """What is developed on this machine has no certificate."""
    return "http" if re.match(r"(localhost|127\.[\d.]+|\[.*\])(:|$)", host) else scheme


def _without_dots(path: str) -> str:
    kept: list[str] = []
    for segment in path.split("/"):
        match re.sub("%2e", ".", segment, flags=re.IGNORECASE):
            case "..":
                kept = kept[:-1]
            case "" | ".":
                pass
            case _:
                kept.append(segment)
    return "".join(f"/{segment}" for segment in kept)


def _fit(advice: str) -> str:
    """An advice as it may be printed; none rather than half of one."""
    return "" if looks_secret(advice) or short(advice) != advice else advice


def _is_host(host: str) -> bool:
    """A name, an IPv4 address or an IPv6 address in brackets."""
    # 127.0.0.300 looks like a name to a resolver and then costs a lookup that nobody understands.
    if host.startswith("[") or re.fullmatch(r"[0-9.]+", host):
        inside = re.fullmatch(r"\[([^%]+)\]", host)  # a zone would swallow whatever stands behind it
        try:
            version = ipaddress.ip_address(inside[1] if inside else host).version
        except ValueError:
            return False
        return version == (6 if inside else 4)
    return _HOST.fullmatch(host) is not None and ".." not in host
