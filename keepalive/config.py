"""The configuration: TOML and environment in, frozen models out, every mistake at once.

Rules of this file:

- `find` looks for the file and `read` opens it; from there on it is text in, value out.
- A mistake never stops the search for more. What is wrong is reported and left out, and the rest is read on.
- A message says what stands there and what to write instead. It never holds a secret: values of unknown keys
  and whatever looks like a secret are not repeated.
- What a KEEPALIVE_… variable says comes before the file, and the file comes before the defaults below.

`python -m keepalive.config` prints the JSON schema for editors, which is kept in docs/config.schema.json.
"""

import difflib
import ipaddress
import json
import os
import re
import sys
import tomllib
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import tzinfo
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import tzlocal
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from keepalive import window as windows
from keepalive.errors import KeepaliveError
from keepalive.window import Window

NO_FILE = "environment"
"""What mistakes are attributed to when there is no file."""

SEARCHED = (Path("config.toml"), Path("/etc/keepalive/config.toml"))

Key = tuple[str | int, ...]
"""Where a value stands: ("models", 1, "ping_interval")."""

_LARGEST_FILE = 1024 * 1024


# --- Mistakes -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing to correct. For a variable of the environment, `file` is its name and `line` is None."""

    file: str
    line: int | None
    key: str
    value: str
    """As it stands there, shortened; empty where it is absent or must not be repeated."""
    message: str
    column: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return ": ".join(part for part in (place, self.key, self.message) if part)


class ConfigError(KeepaliveError):
    """A config that cannot be used, with everything that is wrong with it: one line per mistake."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(map(str, self.mistakes)))


# --- What stands in a value -----------------------------------------------------------------------

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(
    rf"(?=\d)(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m(?!s))?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?", re.ASCII
)
# Looser on the order of units, because the engines of some editors know no lookahead.
_DURATION_FOR_EDITORS = r"(\d+(\.\d+)?(ms|[smhd]))+"
_UNIT_WORDS = {
    "days": "d", "day": "d", "hours": "h", "hour": "h", "hrs": "h", "hr": "h", "minutes": "m", "minute": "m",
    "mins": "m", "min": "m", "seconds": "s", "second": "s", "secs": "s", "sec": "s", "milliseconds": "ms",
    "millis": "ms", "msecs": "ms", "msec": "ms",
}  # fmt: skip

_SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d+)(B|kB|MB|GB|KiB|MiB|GiB)", re.ASCII)

# Shapes that only secrets have. LM Studio's own tokens start with "sk-lm-"; long runs of letters and digits
# are keys of other programs, and no model, host or window is written like that.
_SECRET_LOOKS = re.compile(
    r"sk-lm-|(?<![a-zA-Z])(?:sk|pk|hf|ghp|pat)[-_]\w|(?i:bearer\s)"
    r"|(?=[a-zA-Z]{0,99}\d)(?=\d{0,99}[a-zA-Z])[a-zA-Z0-9]{32}",
    re.ASCII,
)
_SECRET_NAMES = re.compile(r"token|secret|passw|api_?key|authorization|credential|bearer", re.IGNORECASE)
_CREDENTIALS = re.compile(r"//[^\s/]{0,99}@|[^\s/]{0,99}:[^\s/]{0,99}@")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. An empty host is every interface, port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def seconds(text: str) -> float:
    """ "1h30m" is 5400.0. ValueError where it is no duration."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError("no duration")
    return sum(
        float(number) * unit for number, unit in zip(found.groups(), _UNITS.values(), strict=True) if number
    )


def written(duration: float) -> str:
    """5400.0 is "1h30m": how a duration stands in a config."""
    rest, parts = round(duration * 1000), []
    for unit, length in _UNITS.items():
        count, rest = divmod(rest, round(length * 1000))
        parts += [f"{count}{unit}"] if count else []
    return "".join(parts) or "0s"


def _read_duration(value: object, *, low: str, high: str) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'{_shown(value)} is no duration; write one such as "30s" or "5m"')  # noqa: TRY004
    text = str(value)
    if re.fullmatch(r"\d{1,12}(\.\d+)?", text.strip(), re.ASCII):
        raise ValueError(f'{_shown(value)} has no unit; write "{text.strip()}s" or "{text.strip()}m"')
    if isinstance(value, str) and _DURATION.fullmatch(value):
        length = seconds(value)
        if length < seconds(low):
            raise ValueError(f'{_shown(value)} is too short; write "{low}" or more')
        if length > seconds(high):
            raise ValueError(f'{_shown(value)} is too long; write "{high}" or less')
        return length
    plain = "".join(text.lower().split())[:40]
    plain = re.sub(r"[a-z]+", lambda word: _UNIT_WORDS.get(word[0], word[0]), plain)
    advice = (
        f'write "{plain}"'
        if _DURATION.fullmatch(plain)
        else 'write one such as "500ms", "30s", "5m" or "1h30m"'
    )
    raise ValueError(f"{_shown(value)} is no duration; {advice}")


def _read_size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'{_shown(value)} is no size; write one such as "64MiB"')  # noqa: TRY004
    text = str(value).strip()
    found = _SIZE.fullmatch(text)
    if found is None or not isinstance(value, str):
        if re.fullmatch(r"\d{1,18}", text, re.ASCII):
            raise ValueError(f'{_shown(value)} has no unit; write "{text}B" or "{text}MiB"')
        number, unit = re.match(r"(\d{0,18})\s*(\w{0,8})", text, re.ASCII).groups()  # type: ignore[union-attr]  # matches ""
        near = {name.lower(): name for name in _SIZES}.get(
            {"k": "kib", "m": "mib", "g": "gib"}.get(unit.lower(), unit.lower())
        )
        advice = f'write "{number}{near}"' if number and near else 'write one such as "64MiB"'
        raise ValueError(f"{_shown(value)} is no size; {advice}")
    size = int(found[1][:20]) * _SIZES[found[2]]
    if not 2**10 <= size <= 2**34:
        raise ValueError(f'{_shown(value)} is out of range; write a size from "1KiB" to "16GiB"')
    return size


def _read_address(value: object) -> Address:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'{_shown(value)} is no address; write one such as "127.0.0.1:1235"')  # noqa: TRY004
    shown = _shown(value)
    if value.startswith(("unix:", "/", "./")):
        raise ValueError(
            f'{shown} is a Unix socket, which is not supported; write one such as "127.0.0.1:1235"'
        )
    _, slashes, rest = value.partition("://")
    if slashes:
        raise ValueError(f'{shown} is a URL; write "{_short(rest.split("/")[0])}"')
    if value.isdecimal():
        raise ValueError(f'{shown} has no host; write "127.0.0.1:{value}", or ":{value}" for every interface')
    host, colon, port = value.rpartition(":")
    if value.count(":") > 1 and not re.fullmatch(r"\[[^\[\]]+\]:\d*", value):
        example = f"[{host}]:{port}" if _is_ip(host) else f"[{value}]:1235" if _is_ip(value) else "[::1]:1235"
        raise ValueError(f'{shown} is no address; write an IPv6 address in brackets, such as "{example}"')
    if not colon:
        raise ValueError(f'{shown} has no port; write "{_short(value)}:1235"')
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII) or int(port) > 65535:
        raise ValueError(
            f'{shown} has no port that exists; write one from 0 to 65535, such as "{_short(host)}:1235"'
        )
    if host == "*":
        raise ValueError(f'{shown} is no address; write ":{port}" for every interface')
    bare = host[1:-1] if host.startswith("[") else host
    if bare and not _is_host(bare):
        raise ValueError(f'{shown} has no host that can exist; write one such as "127.0.0.1:{port}"')
    return Address(bare, int(port))


def _read_url(value: object) -> str:
    """An upstream, as scheme://host[:port] in lower case and without a slash at its end."""
    if not isinstance(value, str):
        raise ValueError(f'{_shown(value)} is no URL; write one such as "http://127.0.0.1:1234"')  # noqa: TRY004
    shown = _shown(value)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        host = value.split("/")[0]
        advice = f"http://{host}" if _is_origin(f"http://{host}") else "http://127.0.0.1:1234"
        raise ValueError(f'{shown} has no scheme; write "{_short(advice)}"')
    if not value.isprintable() or " " in value:
        raise ValueError(
            f'{shown} holds a space or an invisible character; write one such as "http://127.0.0.1:1234"'
        )
    scheme, _, rest = value.partition("://")
    host = re.split(r"[/?#]", rest)[0]
    if "@" in host:
        plain = f"{scheme}://{host.rpartition('@')[2]}"
        raise ValueError(
            f'holds credentials, which do not stand here; write "{_short(plain)}", and api_token_env or '
            "api_token_file for the token"
        )
    if scheme.lower() not in ("http", "https"):
        raise ValueError(f'{shown} is neither http nor https; write "{_short(f"http://{host}")}"')
    plain = f"{scheme}://{host}".lower()
    if not _is_origin(plain):
        raise ValueError(
            f'{shown} has no host and port that can exist; write one such as "http://127.0.0.1:1234"'
        )
    if rest[len(host) :] not in ("", "/"):
        extra = _short(rest[len(host) :])
        raise ValueError(f'{shown} has more than host and port; write "{_short(plain)}", without "{extra}"')
    return plain


def _read_window(value: object) -> Window:
    if not isinstance(value, str):
        raise ValueError(f'{_shown(value)} is no window; write one such as "Mon-Fri 08:00-19:00"')  # noqa: TRY004
    return windows.parse(value)


def _read_zone_name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f'{_shown(value)} is no time zone; write one such as "Europe/Lisbon"')  # noqa: TRY004
    try:
        zoneinfo.ZoneInfo(value)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        names = sorted(zoneinfo.available_timezones())
        # People write the city alone, or in another case; both lead to the name.
        known = {name.rpartition("/")[2].lower(): name for name in names} | {
            name.lower(): name for name in names
        }
        near = difflib.get_close_matches(value.lower().replace(" ", "_")[:40], known, n=1)
        advice = f'write "{known[near[0]]}"' if near else 'write an IANA name such as "Europe/Lisbon"'
        raise ValueError(f"{_shown(value)} is no known time zone; {advice}") from None
    return value


def _read_state_dir(value: object) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f'{_shown(value)} is no path; write one such as "/var/lib/keepalive"')
    if not Path(value).is_absolute():
        raise ValueError(
            f'{_shown(value)} depends on where the daemon starts; write a path that begins with "/"'
        )
    return Path(value)


def _read_host_name(value: str) -> str:
    if "://" in value or value.count(":") == 1 or "/" in value:
        plain = value.rpartition("://")[2].split("/")[0].split(":")[0]
        raise ValueError(f'{_shown(value)} is more than a name; write "{_short(plain)}"')
    if not _is_host(value):
        raise ValueError(f'{_shown(value)} is no host name; write one such as "keepalive.example.org"')
    return value.lower()


def _read_origin(value: str) -> str:
    if value == "*":
        raise ValueError(
            '"*" would let every web page make LM Studio load models; name each origin by itself'
        )
    plain = value.lower().removesuffix("/")
    if _is_origin(plain):
        return plain
    found = re.match(r"https?://[^/?#@]+", plain)
    advice = (
        found[0]
        if found and _is_origin(found[0])
        else f"https://{plain}"
        if _is_origin(f"https://{plain}")
        else ""
    )
    raise ValueError(f'{_shown(value)} is no origin; write "{_short(advice or "https://chat.example.org")}"')


def _read_name(value: str) -> str:
    # It becomes a label in metrics and part of the file name of a systemd credential.
    if not _NAME.fullmatch(value):
        raise ValueError(
            f'{_shown(value)} is no name; write letters, digits, ".", "-" or "_", such as "local"'
        )
    return value


def _read_text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; write some text")
    return value


def _read_line(value: str) -> str:
    # It stands in logs, labels, URLs and on a terminal: nothing in it may move a cursor or end a line.
    if not value.strip() or value != value.strip() or not value.isprintable() or len(value) > 256:
        raise ValueError(
            f"{_shown(value)} is not one line; write 1 to 256 characters, without space around them"
        )
    return value


def _read_prompt_id(value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{_shown(value)} is no prompt id; write a number such as 28, or text")  # noqa: TRY004
    return _read_line(value) if isinstance(value, str) else value


def _read_template(value: str) -> str:
    torn = re.search(r"\{\{\s*(\w+)\s*\}(?!\})", _read_text(value))
    if torn:
        raise ValueError(f'a variable is not closed; write "{{{{{_short(torn[1])}}}}}"')
    return value


# What is wrong here is told by the name of the key alone: the usual mistake is to write the secret itself.
_SECRET_HOLDERS = {
    "api_token_env": "a variable",
    "api_token_file": "a file",
    "env": "a variable",
    "file": "a file",
    "credential": "a credential",
}


def _read_variable_name(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError
    return value


def _read_secret_file(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError
    return value


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    # 127.0.0.300 looks like a name to a resolver and then costs a lookup that nobody understands.
    if re.fullmatch(r"[0-9.]+", host) or ":" in host:
        return _is_ip(host)
    return _HOST.fullmatch(host) is not None and ".." not in host


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    around = f"[{host}]" if ":" in host else host
    # Written back and compared, because urlsplit accepts and drops much that a person did not mean.
    return parts.scheme in ("http", "https") and _is_host(host) and port != 0 and text.lower() in (
        f"{parts.scheme}://{around}",
        f"{parts.scheme}://{around}:{port}",
    )  # fmt: skip


def _looks_secret(text: str) -> bool:
    # No message shows what stands further behind, and a file may hold a megabyte in one value.
    return _SECRET_LOOKS.search(text[:1000]) is not None


def _short(text: str) -> str:
    """As it may stand on one line of a terminal."""
    if _looks_secret(text):
        return "…"
    text = _CREDENTIALS.sub("…@", text[:1000])
    return _printable(text if len(text) <= 60 else f"{text[:59]}…")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shown(value: object) -> str:
    """A value as it stands in the file, short and on one line. Tables and lists only by what they are."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{_short(value)}"'
        case int() if abs(value) >= 10**30:
            return "a huge number"
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case _:
            return _short(str(value))


# --- The models -----------------------------------------------------------------------------------


def _text(read: Callable[[str], object]) -> BeforeValidator:
    """`read` for text; anything else goes on to pydantic, which says that it is no text."""
    return BeforeValidator(lambda value: read(value) if isinstance(value, str) else value)


def _duration(low: str, high: str) -> PlainValidator:
    return PlainValidator(partial(_read_duration, low=low, high=high))


def _written_as(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$"})


# Bounds keep out what cannot be meant; tests and demos live at the lower ends.
Interval = Annotated[float, _duration("10ms", "7d"), _written_as(_DURATION_FOR_EDITORS)]
Timeout = Annotated[float, _duration("10ms", "1d"), _written_as(_DURATION_FOR_EDITORS)]
Patience = Annotated[float, _duration("0s", "1d"), _written_as(_DURATION_FOR_EDITORS)]
# A listing is cheap for LM Studio and not free: ten in a second is where looking becomes load.
Refresh = Annotated[float, _duration("100ms", "1h"), _written_as(_DURATION_FOR_EDITORS)]
Lease = Annotated[float, _duration("1s", "365d"), _written_as(_DURATION_FOR_EDITORS)]
Size = Annotated[int, PlainValidator(_read_size), _written_as(_SIZE.pattern)]
Listen = Annotated[
    Address,
    PlainValidator(_read_address),
    _written_as(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*):\d{1,5}"),
]
Url = Annotated[str, PlainValidator(_read_url), _written_as(r"https?://[^/?#@\s]+/?")]
Zone = Annotated[str, PlainValidator(_read_zone_name), WithJsonSchema({"type": "string"})]
Span = Annotated[Window, PlainValidator(_read_window), WithJsonSchema({"type": "string"})]
Directory = Annotated[Path, PlainValidator(_read_state_dir), WithJsonSchema({"type": "string"})]
HostName = Annotated[str, _text(_read_host_name)]
WebOrigin = Annotated[str, _text(_read_origin)]
Name = Annotated[str, _text(_read_name)]
Line = Annotated[str, _text(_read_line)]
Text = Annotated[str, _text(_read_text)]
Template = Annotated[str, _text(_read_template)]
Variable = Annotated[str, _text(_read_variable_name)]
SecretFile = Annotated[str, _text(_read_secret_file)]
PromptId = Annotated[
    int | str, PlainValidator(_read_prompt_id), WithJsonSchema({"type": ["integer", "string"]})
]
Names = Annotated[
    tuple[str, ...],
    Field(strict=False),
    BeforeValidator(_one_or_many),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        hide_input_in_errors=True,
        # The docstring below a key is the help that an editor shows for it.
        use_attribute_docstrings=True,
    )


class Server(_Table):
    """How keepalive itself listens, waits and writes its log."""

    listen: Listen = Address("127.0.0.1", 1235)
    """Where clients connect: host:port, or :port for every interface. They set base_url to http://this/v1."""
    admin_listen: Listen = Address("127.0.0.1", 9235)
    """Where the status page, metrics and probes are served."""
    heartbeat: Timeout = seconds("5s")
    """How long a streaming caller waits in silence before it is sent a sign of life."""
    heartbeat_mode: Literal["comment", "reasoning", "off"] = "comment"
    """The sign of life: an SSE comment, which parsers skip; visible reasoning text, for chat programs; or
    nothing until LM Studio answers, which keeps its true status."""
    drain_timeout: Patience = seconds("30s")
    """How long open streams may go on after SIGTERM."""
    header_timeout: Timeout = seconds("75s")
    """How long a connection may stay idle or take to send the head of a request."""
    max_body: Size = 64 * 2**20
    """The largest request body that is accepted."""
    timezone: Zone | None = Field(None, examples=["Europe/Lisbon"])
    """The IANA time zone in which windows are read. Default: the one of this machine."""
    allowed_hosts: Annotated[tuple[HostName, ...], Field(strict=False, examples=[["llm.example.org"]])] = ()
    """Names under which callers reach this daemon, besides IP addresses and localhost."""
    allowed_origins: Annotated[
        tuple[WebOrigin, ...], Field(strict=False, examples=[["https://chat.example.org"]])
    ] = ()
    """Web pages of other sites that may send requests, by origin."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe line that is written to the log."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """How log lines are written; auto is console on a terminal and json elsewhere."""
    state_dir: Directory | None = Field(None, examples=["/var/lib/keepalive"])
    """Where loads under way are noted, so that a restart does not repeat them.
    Default: $STATE_DIRECTORY, else $XDG_STATE_HOME/keepalive."""


class Upstream(_Table):
    """One LM Studio server."""

    name: Name = "local"
    """What models, metrics and logs call this server."""
    url: Url = Field(examples=["http://127.0.0.1:1234"])
    """Where it listens, without "/v1"."""
    api_token_env: Variable | None = Field(None, examples=["LM_API_TOKEN"])
    """The environment variable that holds its API token."""
    api_token_file: SecretFile | None = Field(None, examples=["/etc/keepalive/lm_token"])
    """The file that holds its API token."""
    max_loading: Annotated[int, Field(ge=1, le=64)] = 1
    """How many models may load at the same time."""
    auto_evict: bool | None = Field(None, examples=[True])
    """LM Studio 0.3: whether "Only keep last JIT loaded model" is on. Default: found out by watching."""
    connect_timeout: Timeout = seconds("5s")
    """How long a connection may take to open."""
    list_timeout: Timeout = seconds("10s")
    """How long the list of loaded models may take."""


class Defaults(_Table):
    """What holds for every model that does not say otherwise."""

    refresh_interval: Refresh = seconds("15s")
    """How often LM Studio is asked what is loaded."""
    ping_interval: Interval = seconds("5m")
    """How often a quiet model is made to answer one token."""
    ping_timeout: Timeout = seconds("60s")
    """How long that answer may take."""
    load_timeout: Timeout = seconds("15m")
    """After this the outcome of a load is unknown, not failed."""
    max_wait: Patience = seconds("10m")
    """How long a request is held for a model that is not ready."""
    lease: Lease = seconds("24h")
    """LM Studio 0.3: how long a model that we load may idle before LM Studio drops it."""


class Model(_Table):
    """A model that is kept loaded. The first is the most important one, where not all can be."""

    key: Line = Field(examples=["qwen/qwen3-4b-2507"])
    """The key that LM Studio lists for the model."""
    upstream: Names | None = Field(None, examples=["local"])
    """The upstream that keeps it, or a list of them. Default: the only one."""
    window: Span | None = Field(None, examples=["Mon-Fri 08:00-19:00"])
    """When it is wanted. Default: always."""
    kind: Literal["llm", "embedding"] | None = Field(None, examples=["llm"])
    """What it is. Default: what LM Studio says."""
    context_length: Count | None = Field(None, examples=[8192])
    """Given to LM Studio when it loads: how many tokens the context holds."""
    eval_batch_size: Count | None = Field(None, examples=[512])
    """Given to LM Studio when it loads: how many tokens are evaluated in one batch."""
    flash_attention: bool | None = Field(None, examples=[True])
    """Given to LM Studio when it loads: whether to use flash attention."""
    num_experts: Count | None = Field(None, examples=[8])
    """Given to LM Studio when it loads: how many experts a mixture uses for a token."""
    offload_kv_cache_to_gpu: bool | None = Field(None, examples=[True])
    """Given to LM Studio when it loads: whether the KV cache lives in GPU memory."""
    refresh_interval: Refresh | None = Field(None, examples=["15s"])
    """For this model, instead of [defaults]."""
    ping_interval: Interval | None = Field(None, examples=["5m"])
    """For this model, instead of [defaults]."""
    ping_timeout: Timeout | None = Field(None, examples=["60s"])
    """For this model, instead of [defaults]."""
    load_timeout: Timeout | None = Field(None, examples=["15m"])
    """For this model, instead of [defaults]."""
    max_wait: Patience | None = Field(None, examples=["10m"])
    """For this model, instead of [defaults]."""
    lease: Lease | None = Field(None, examples=["24h"])
    """For this model, instead of [defaults]."""


class Prompt(_Table):
    """A prompt for POST /api/prompts/execute/stream."""

    id: PromptId = Field(examples=[28])
    """What a request names it by: a number or text."""
    title: Text = Field(examples=["Simple test"])
    """What people call it."""
    model: Line = Field(examples=["qwen/qwen3-4b-2507"])
    """The key of the configured model that answers it."""
    content: Template = Field(examples=["Explain {{topic}} to a nurse."])
    """Its text; {{name}} stands for a variable of the request."""
    max_tokens: Count | None = Field(None, examples=[1024])
    """The longest answer. Default: LM Studio decides."""


class AccessKey(_Table):
    """A key that a caller must send: who uses it, and where it is read from."""

    name: Name = Field(examples=["ward-3"])
    """Who uses it; this is what logs show."""
    file: SecretFile | None = Field(None, examples=["/etc/keepalive/ward-3.key"])
    """The file that holds it."""
    env: Variable | None = Field(None, examples=["WARD_3_KEY"])
    """The environment variable that holds it."""
    credential: Name | None = Field(None, examples=["ward-3"])
    """The systemd credential that holds it."""


class Auth(_Table):
    """Who may connect. An empty list lets everybody in."""

    client_keys: Annotated[tuple[AccessKey, ...], Field(strict=False)] = ()
    """Keys for server.listen."""
    admin_keys: Annotated[tuple[AccessKey, ...], Field(strict=False)] = ()
    """Keys for server.admin_listen."""


LOAD_FIELDS = (
    "context_length",
    "eval_batch_size",
    "flash_attention",
    "num_experts",
    "offload_kv_cache_to_gpu",
)
"""LM Studio refuses a load that carries any other field."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One model on one upstream, with every override applied. Durations are in seconds."""

    upstream: str
    key: str
    kind: str | None
    window: Window | None
    load_fields: Mapping[str, int | bool] = field(hash=False)
    refresh_interval: float
    ping_interval: float
    ping_timeout: float
    load_timeout: float
    max_wait: float
    lease: float


class Config(_Table):
    """keepalive: which models to keep loaded, where, and how to serve them."""

    server: Server = Server()
    upstreams: Annotated[tuple[Upstream, ...], Field(strict=False)] = (
        Upstream(name="local", url="http://127.0.0.1:1234"),
    )
    defaults: Defaults = Defaults()
    models: Annotated[tuple[Model, ...], Field(strict=False)] = ()
    prompts: Annotated[tuple[Prompt, ...], Field(strict=False)] = ()
    auth: Auth = Auth()

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """Every model on every upstream that keeps it, in the order of the file."""
        only = (self.upstreams[0].name,)
        return tuple(self._kept(model, name) for model in self.models for name in model.upstream or only)

    def _kept(self, model: Model, upstream: str) -> Kept:
        fields = {name: getattr(model, name) for name in LOAD_FIELDS}
        timing = {name: _effective(self.defaults, model, name) for name in Defaults.model_fields}
        return Kept(
            upstream=upstream,
            key=model.key,
            kind=model.kind,
            window=model.window,
            load_fields=MappingProxyType(
                {name: value for name, value in fields.items() if value is not None}
            ),
            **timing,
        )

    @cached_property
    def zone(self) -> tzinfo:
        """The zone in which windows are read: `server.timezone`, else the one of this machine."""
        return zoneinfo.ZoneInfo(self.server.timezone) if self.server.timezone else tzlocal.get_localzone()


def _effective(defaults: Defaults, table: Defaults | Model, name: str) -> float:
    own: float | None = getattr(table, name)
    inherited: float = getattr(defaults, name)
    return inherited if own is None else own


# --- Reading --------------------------------------------------------------------------------------


def find(explicit: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file: `-c FILE`, $KEEPALIVE_CONFIG, ./config.toml or /etc/keepalive/config.toml, if there is one.

    A file that was named is returned whether it exists or not, and so is one that exists and cannot be read:
    to pass over it in silence would run the daemon with somebody else's settings.
    """
    if explicit is not None:
        return explicit
    if environ.get("KEEPALIVE_CONFIG"):
        return Path(environ["KEEPALIVE_CONFIG"])
    return next((path for path in SEARCHED if os.path.lexists(path)), None)


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """The config in `path` and `environ`; no path: in `environ` alone. ConfigError holds every mistake."""
    source = NO_FILE if path is None else str(path)
    config = parse("" if path is None else read(path), source, environ)
    if any(kept.window for kept in config.kept):
        try:
            _ = config.zone
        except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError) as error:
            message = 'the zone of this machine cannot be told; write one such as "Europe/Lisbon"'
            raise ConfigError([Mistake(_printable(source), None, "server.timezone", "", message)]) from error
    return config


def read(path: Path) -> str:
    """The text of the file. ConfigError says in one sentence why it cannot be had."""
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells that there is more, also of a device that never ends.
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise _unreadable(path, "does not exist; write it, or name another file by -c FILE") from error
    except IsADirectoryError as error:
        inside = _printable(str(path / "config.toml"))
        raise _unreadable(path, f'is a directory; name the file in it, such as "{inside}"') from error
    except PermissionError as error:
        raise _unreadable(path, "may not be read by this user; change its owner or its mode") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise _unreadable(path, f"cannot be read: {reason}; name another file by -c FILE") from error
    if len(content) > _LARGEST_FILE:
        raise _unreadable(path, "is larger than 1 MiB, so it is no config of ours; name another file")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _unreadable(path, "is UTF-16 text; save it as UTF-8")
    try:
        # Editors on Windows put a byte order mark first, which TOML does not know.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _unreadable(path, "is not UTF-8 text; save it as UTF-8", line) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _unreadable(path, "is binary, not TOML; name another file", line)
    return text


def _unreadable(path: Path, message: str, line: int | None = None) -> ConfigError:
    return ConfigError([Mistake(_printable(str(path)), line, "", "", message)])


def parse(text: str, source: str, environ: Mapping[str, str]) -> Config:
    """The config in `text` and `environ`. ConfigError holds every mistake; they call the text `source`."""
    source = _printable(source)
    reading = _Reading(source, _parse_toml(text, source), _lines(text))
    reading.overlay(environ)
    config = reading.config(environ)
    if config is None:
        in_order = sorted(reading.mistakes, key=lambda found: (found.line is None, found.line or 0))
        raise ConfigError(dict.fromkeys(in_order))
    return config


_SYNTAX = (
    ("Invalid value", "a value is missing or not readable; text and durations stand in quotes"),
    (
        "Expected newline or end of document",
        "one value is followed by more; text and durations stand in quotes",
    ),
    ("Expected '=' after a key", 'there is no "=" after the key; write key = value'),
    ("Invalid initial character for a key part", "a key is missing; write key = value"),
    (
        "Unescaped '\\' in a string",
        "a backslash stands alone in double quotes; write the text in single quotes",
    ),
    ("Illegal character '\\n'", "text does not end on its line; close the quotes"),
    ("Unterminated string", "text does not end; close the quotes"),
    ("Unclosed array", "a list does not end; close it with ]"),
    ("Cannot overwrite a value", "this key stands twice in its table; leave one of them out"),
    ("Cannot declare", "this table stands twice; put both together, or write [[…]] for a list of tables"),
    ("Cannot mutate immutable namespace", "this table stands twice; put both together"),
    ("Duplicate inline table key", "this key stands twice in its table; leave one of them out"),
)
"""What tomllib says, and what helps a person who does not know TOML."""


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = str(error)
        place = re.search(r"\(at line (\d+), column (\d+)\)$", said)
        line = int(place[1]) if place else text.rstrip("\n").count("\n") + 1
        sentence = next((ours for theirs, ours in _SYNTAX if said.startswith(theirs)), None)
        message = f"not TOML: {sentence or _short(re.sub(r' .at [^)]*.$', '', said))}"
        raise ConfigError(
            [Mistake(source, line, "", "", message, int(place[2]) if place else None)]
        ) from None
    except (ValueError, RecursionError):
        # Python's own limits on nesting and on the digits of a number, far from any config that is meant.
        message = "not TOML that can be read: lists too deep in each other, or a number too long"
        raise ConfigError([Mistake(source, None, "", "", message)]) from None


_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY_PART = re.compile(r"""[ \t]*("(?:\\.|[^"\\])*"|'[^']*'|[A-Za-z0-9_-]+)[ \t]*""")
_PIECE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|#[^\n]*"
    r"|[\[{\]}\n]"
    r"|[^\"'#\[{\]}\n]+",
    re.DOTALL,
)


def _lines(text: str) -> dict[Key, int]:
    """The line of every key and table of a valid TOML text, which tomllib does not tell.

    What stands in an inline table or a list is found by the line of its outer key.
    """
    lines: dict[Key, int] = {}
    counts: dict[Key, int] = {}
    table: Key = ()
    at, counted, line = 0, 0, 1
    while True:
        blank = _BLANK.match(text, at)
        at = blank.end() if blank else at
        line, counted = line + text.count("\n", counted, at), at
        brackets = 2 if text.startswith("[[", at) else 1 if text.startswith("[", at) else 0
        parts, at = _read_key(text, at + brackets)
        if not parts:
            return lines
        if not brackets:
            for end in range(1, len(parts) + 1):
                lines.setdefault(table + parts[:end], line)
            at = _end_of_value(text, at + 1)
            continue
        table = ()
        for number, part in enumerate(parts, start=1):
            table += (part,)
            if brackets == 2 and number == len(parts):
                counts[table] = counts.get(table, -1) + 1
                lines.setdefault(table, line)
            if table in counts:
                table += (counts[table],)
        lines.setdefault(table, line)
        at += brackets


def _read_key(text: str, at: int) -> tuple[tuple[str, ...], int]:
    parts: list[str] = []
    while found := _KEY_PART.match(text, at):
        quoted = found[1][0] in "\"'"
        parts.append(str(tomllib.loads(f"it = {found[1]}")["it"]) if quoted else found[1])
        at = found.end()
        if not text.startswith(".", at):
            break
        at += 1
    return tuple(parts), at


def _end_of_value(text: str, at: int) -> int:
    depth = 0
    while found := _PIECE.match(text, at):
        if found[0] == "\n" and depth == 0:
            break
        depth += (found[0] in "[{") - (found[0] in "]}")
        at = found.end()
    return at


# --- From tables to models ------------------------------------------------------------------------

T = TypeVar("T", bound=_Table)

_READ_ELSEWHERE = ("KEEPALIVE_ADMIN_URL", "KEEPALIVE_CONFIG")

# Kubernetes and Docker describe a service called "keepalive" to its neighbours by variables like ours.
_SERVICE_LINK = re.compile(r"KEEPALIVE_(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_(TCP|UDP)\w*)", re.ASCII)

_ALSO_CALLED: Mapping[type[_Table], Mapping[str, str]] = {
    Model: {
        "name": "key",
        "model": "key",
        "id": "key",
        "ttl": "lease",
        "type": "kind",
        "upstreams": "upstream",
    },
    Upstream: {"key": "name", "base_url": "url", "host": "url", "address": "url"},
    Prompt: {"key": "model", "text": "content", "template": "content", "prompt": "content", "name": "title"},
    Server: {"host": "listen", "port": "listen", "address": "listen", "tz": "timezone"},
    Defaults: {"ttl": "lease"},
}
"""What other programs call it."""


@dataclass(slots=True)
class _Reading:
    """One pass over one config, and what was found wrong on the way."""

    source: str
    data: dict[str, Any]
    lines: Mapping[Key, int]
    variables: dict[Key, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    wrong: set[Key] = field(default_factory=set)

    def report(self, key: Key, message: str, value: object = None) -> None:
        """Notes a mistake at `key`. A value that looks like a secret is not shown; it is the mistake then."""
        if isinstance(value, str) and _looks_secret(value):
            value, message = None, "looks like a secret; write the variable or the file that holds it"
        file, line = self._place(key)
        self.wrong.add(key)
        self.mistakes.append(
            Mistake(file, line, _dotted(key), "" if value is None else _shown(value), message)
        )

    def _place(self, key: Key) -> tuple[str, int | None]:
        """The nearest thing that a person can go to: the variable, the line, else the table around it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.variables:
                return self.variables[key[:end]], None
            if key[:end] in self.lines:
                return self.source, self.lines[key[:end]]
            inside = [name for place, name in self.variables.items() if place[:end] == key[:end]]
            if inside:
                return inside[0], None
        return self.source, None

    # The environment

    def overlay(self, environ: Mapping[str, str]) -> None:
        """Puts what the KEEPALIVE_… variables say into the tables, as if it stood in the file."""
        unknown = []
        for name in sorted(environ, key=_in_number_order):
            if not name.startswith("KEEPALIVE_") or name in _READ_ELSEWHERE or _SERVICE_LINK.fullmatch(name):
                continue
            found = _field_of(Config, name.removeprefix("KEEPALIVE_").lower().split("__"))
            if found is None:
                unknown.append(name)
            elif environ[name]:
                # Compose files pass on every variable they mention, empty where nobody set it.
                self._set(name, *found, environ[name])
        holders = set(_holders_of_secrets(self.data))
        for name in unknown:
            if name not in holders:
                self._report_variable(name, _unknown_variable(name))

    def _report_variable(self, name: str, message: str) -> None:
        self.mistakes.append(Mistake(_short(name), None, "", "", message))

    def _set(self, name: str, key: Key, info: FieldInfo, text: str) -> None:
        here: Any = self.data
        for part, following in pairwise(key):
            if isinstance(part, int):
                if part > len(here):
                    return self._report_variable(name, f"skips one; the next is number {len(here)}")
                if part == len(here):
                    here.append({})
            else:
                here.setdefault(part, [] if isinstance(following, int) else {})
            here = here[part]
            if not isinstance(here, list if isinstance(following, int) else dict):
                return None  # the file has something else there, which is reported by itself
        here[key[-1]] = _from_variable(text, info)
        self.variables[key] = name
        return None

    # The tables

    def config(self, environ: Mapping[str, str]) -> Config | None:
        """The config, or None after a mistake."""
        for name, value in self.data.items():
            if name not in Config.model_fields:
                self.report((name,), _unknown_section(name, value))
        if not self.data.get("models", []) and not self.mistakes:
            self.report((), _nothing_to_keep(self.source))

        server = self._table(Server, ("server",), self.data.get("server", {})) or Server()
        upstreams = self._tables(Upstream, "upstreams")
        if not self.data.get("upstreams"):
            upstreams = dict(enumerate(Config().upstreams))
        defaults = self._table(Defaults, ("defaults",), self.data.get("defaults", {})) or Defaults()
        models = self._tables(Model, "models")
        prompts = self._tables(Prompt, "prompts")
        auth = self._table(Auth, ("auth",), self.data.get("auth", {})) or Auth()

        self._check_addresses(server, upstreams)
        self._check_upstreams(upstreams)
        self._check_models(models, upstreams)
        self._check_leases(defaults, models)
        self._check_prompts(prompts)
        self._check_auth(auth)
        if self.mistakes:
            return None
        return Config(
            server=server.model_copy(update={"state_dir": server.state_dir or _state_dir(environ)}),
            upstreams=tuple(upstreams.values()),
            defaults=defaults,
            models=tuple(models.values()),
            prompts=tuple(prompts.values()),
            auth=auth,
        )

    def _tables(self, kind: type[T], name: str) -> dict[int, T]:
        """The tables that could be read, by their place in the list."""
        data = self.data.get(name, [])
        if not isinstance(data, list):
            what = "is one table" if isinstance(data, dict) else "is no list of tables"
            self.report((name,), f"{what}; write [[{name}]] above each")
            return {}
        found = {number: self._table(kind, (name, number), item) for number, item in enumerate(data)}
        return {number: table for number, table in found.items() if table is not None}

    def _table(self, kind: type[T], key: Key, data: object) -> T | None:
        """The table, with something sound in place of what is `wrong`, so that the rest can be compared."""
        if not isinstance(data, dict):
            header = f"[[{key[0]}]]" if len(key) > 1 else f"[{key[0]}]"
            self.report(key, f"{_shown(data)} is no table; write {header} and the keys below it", data)
            return None
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
        for detail in details:
            self._explain(kind, key, detail)
        unsound = {detail["loc"][0] for detail in details}
        sound = {name: value for name, value in data.items() if name not in unsound}
        required = {name: info for name, info in kind.model_fields.items() if info.is_required()}
        stand_ins = {name: (info.examples or [""])[0] for name, info in required.items() if name in unsound}
        return kind.model_validate(sound | stand_ins)

    def _explain(self, kind: type[_Table], table: Key, detail: ErrorDetails) -> None:
        """Says in our words what pydantic found."""
        value, key = detail["input"], table + detail["loc"]
        owner, info = _owner(kind, detail["loc"])
        shown, example = _shown(value), _example(info)
        context = detail.get("ctx", {})
        match detail["type"]:
            case "extra_forbidden":
                return self.report(key, _unknown_key(owner, str(key[-1])))
            case "missing":
                return self.report(key, f"is missing; write {key[-1]} = {example}")
            case "value_error":
                message = str(context["error"])
            case "literal_error":
                allowed = [str(word) for word in _literals(info.annotation if info else None)]
                near = _nearest(str(value), allowed)
                message = (
                    f"{shown} is not known; write {_one_of(allowed)}"
                    if near is None
                    else (f'{shown} is not known; write "{near}"')
                )
            case "string_type":
                plain = isinstance(value, int | float)
                message = (
                    f"{shown} is no text; write it in quotes, such as {_toml(shown) if plain else example}"
                )
            case "int_type" | "int_from_float" | "bool_type":
                message = _not_plain(value, info)
            case "greater_than_equal":
                message = f"{shown} is too small; write {context['ge']} or more"
            case "less_than_equal":
                message = f"{shown} is too large; write {context['le']} or less"
            case "tuple_type":
                message = f"{shown} is no list; write one such as {example}"
                if info is not None and _table_in(info):
                    message = f"{shown} is no list; write [[{_dotted(key)}]] above each"
            case "model_type":
                message = f"{shown} is no table; write one in braces"
            case _:
                message = f"{shown} cannot stand here: {_short(detail['msg'])}"
        if owner in (Upstream, AccessKey) and key[-1] in _SECRET_HOLDERS:
            what = _SECRET_HOLDERS[str(key[-1])]
            message = f"is not the name of {what}; write one such as {example}, and never the secret itself"
            value = None
        return self.report(key, message, value)

    # What no table can see by itself

    def _check_addresses(self, server: Server, upstreams: Mapping[int, Upstream]) -> None:
        own = {("server", name): getattr(server, name) for name in ("listen", "admin_listen")}
        own = {key: address for key, address in own.items() if key not in self.wrong}
        if len(own) == 2 and _collide(server.listen, server.admin_listen):
            # At the one that was written down, where the other is a default.
            written_down = "admin_listen" if "admin_listen" in server.model_fields_set else "listen"
            other = "listen" if written_down == "admin_listen" else "admin_listen"
            value = str(getattr(server, written_down))
            message = f'"{value}" is taken by server.{other}; write another port'
            self.report(("server", written_down), message, value)
        for number, upstream in upstreams.items():
            key: Key = ("upstreams", number, "url")
            for place, address in own.items():
                if key not in self.wrong and _reaches(address, upstream.url):
                    message = f'"{upstream.url}" is {_dotted(place)}, so keepalive would ask itself'
                    self.report(key, f"{message}; write where LM Studio listens", upstream.url)

    def _check_upstreams(self, upstreams: Mapping[int, Upstream]) -> None:
        for number, first, upstream in self._repeated("upstreams", "name", upstreams, lambda one: one.name):
            message = f'"{upstream.name}" is also the name of upstreams[{first}]; write another one'
            self.report(("upstreams", number, "name"), message, upstream.name)
        # Two names for one server would load everything twice on it.
        for number, first, upstream in self._repeated("upstreams", "url", upstreams, _server_of):
            message = f'"{upstream.url}" is also the server of upstreams[{first}]; leave one of them out'
            self.report(("upstreams", number, "url"), message, upstream.url)
        for number, upstream in upstreams.items():
            if upstream.api_token_env and upstream.api_token_file:
                message = "stands beside api_token_env, and a token has one place; leave one of them out"
                self.report(("upstreams", number, "api_token_file"), message)

    def _repeated(
        self, section: str, name: str, tables: Mapping[int, T], identity: Callable[[T], object]
    ) -> Iterator[tuple[int, int, T]]:
        """Tables that are what an earlier one is already; a value that is wrong by itself equals nothing."""
        seen: dict[object, int] = {}
        for number, table in tables.items():
            if (section, number, name) not in self.wrong:
                first = seen.setdefault(identity(table), number)
                if first != number:
                    yield number, first, table

    def _check_models(self, models: Mapping[int, Model], upstreams: Mapping[int, Upstream]) -> None:
        names = list(dict.fromkeys(upstream.name for upstream in upstreams.values()))
        taken: dict[tuple[str, str], int] = {}
        for number, model in models.items():
            key: Key = ("models", number, "upstream")
            if key in self.wrong:
                continue
            if model.upstream is None and len(names) > 1:
                several = f"{_one_of(names)}, or a list of them"
                self.report(key, f"is missing, and there are several; write {several}")
                continue
            chosen = names if model.upstream is None else model.upstream
            if not chosen:
                self.report(key, f"names no upstream; write {_one_of(names)}, or a list of them")
            for name in dict.fromkeys(chosen):
                if name not in names:
                    near = _nearest(name, names)
                    advice = _shown(near) if near else _one_of(names)
                    self.report(key, f"{_shown(name)} is no upstream; write {advice}", name)
                if chosen.count(name) > 1:
                    self.report(key, f"{_shown(name)} stands twice; leave one of them out", name)
                if ("models", number, "key") in self.wrong:
                    continue
                # LM Studio finds a model by its key in any letter case.
                first = taken.setdefault((name, model.key.lower()), number)
                if first != number:
                    message = f"{_shown(model.key)} is already kept on {_shown(name)} by models[{first}]"
                    self.report(("models", number, "key"), f"{message}; leave one of them out", model.key)

    def _check_leases(self, defaults: Defaults, models: Mapping[int, Model]) -> None:
        """A lease that ends before the next ping lets go of the very model it was meant to hold."""
        names = ("lease", "ping_interval", "ping_timeout")
        tables: list[tuple[Key, Defaults | Model]] = [(("defaults",), defaults)]
        tables += [(("models", number), model) for number, model in models.items()]
        for key, table in tables:
            said = [name for name in names if name in table.model_fields_set]
            if not said or any(
                (*key, name) in self.wrong or ("defaults", name) in self.wrong for name in names
            ):
                continue
            lease, interval, timeout = (_effective(defaults, table, name) for name in names)
            if lease <= interval + timeout:
                due = f"ping_interval {written(interval)} and ping_timeout {written(timeout)}"
                enough = written(2 * (interval + timeout))
                message = f'a lease of {written(lease)} ends within {due}; write lease = "{enough}"'
                self.report((*key, said[0]), message, written(_effective(defaults, table, said[0])))

    def _check_prompts(self, prompts: Mapping[int, Prompt]) -> None:
        # 28 and "28" look the same in an address and in a log.
        for number, first, prompt in self._repeated("prompts", "id", prompts, lambda one: str(one.id)):
            message = f"{_shown(prompt.id)} is also the id of prompts[{first}]; write another one"
            self.report(("prompts", number, "id"), message, prompt.id)
        # From the raw tables, because a model with a mistake elsewhere is configured nevertheless.
        raw = self.data.get("models")
        found = (
            (table.get("key") for table in raw if isinstance(table, dict)) if isinstance(raw, list) else ()
        )
        keys = [key for key in found if isinstance(key, str)]
        for number, prompt in prompts.items():
            place: Key = ("prompts", number, "model")
            if keys and prompt.model not in keys and place not in self.wrong:
                near = _nearest(prompt.model, keys)
                advice = (
                    f"write {_shown(near)}" if near else f"add [[models]] with key = {_shown(prompt.model)}"
                )
                self.report(place, f"{_shown(prompt.model)} is no configured model; {advice}", prompt.model)

    def _check_auth(self, auth: Auth) -> None:
        for side, keys in (("client_keys", auth.client_keys), ("admin_keys", auth.admin_keys)):
            taken: dict[str, int] = {}
            for number, access in enumerate(keys):
                key: Key = ("auth", side, number)
                places = [name for name in ("file", "env", "credential") if getattr(access, name) is not None]
                if len(places) != 1:
                    has = f"has {' and '.join(places)}" if places else "does not say where the key is"
                    self.report(key, f"{has}; write one of file, env or credential")
                first = taken.setdefault(access.name, number)
                if first != number:
                    message = f'"{access.name}" is also the name of {side}[{first}]; write another one'
                    self.report((*key, "name"), message, access.name)


# --- What to write instead ------------------------------------------------------------------------


def _nearest(word: str, known: Iterable[str]) -> str | None:
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower()[:100], lower, n=1)
    return lower[near[0]] if near else None


def _unknown_key(kind: type[_Table], name: str) -> str:
    near = _nearest(name, kind.model_fields)
    if (
        kind is AccessKey
        and (_SECRET_NAMES.search(name) or name in ("key", "value"))
        and near != "credential"
    ):
        return "does not stand in this file; write file, env or credential: the place that holds the key"
    if _SECRET_NAMES.search(name) and (
        name == "api_token" or near not in ("api_token_env", "api_token_file")
    ):
        return f"does not stand in this file; {_TOKEN_ADVICE}"
    if name in _ALSO_CALLED.get(kind, {}):
        return f"is unknown; write {_ALSO_CALLED[kind][name]}"
    if kind is Model and name in ("gpu", "parallel", "identifier"):
        return "is unknown, because LM Studio takes no such field with a load; set it in LM Studio"
    elsewhere = [header for header, other in _headers() if name in other.model_fields]
    if elsewhere:
        return f"is unknown here; write it below {' or '.join(elsewhere)}"
    return (
        f"is unknown; write {near}" if near else f"is unknown; known here are {', '.join(kind.model_fields)}"
    )


def _unknown_section(name: str, value: object) -> str:
    headers = {header.strip("[]"): header for header, _ in _headers()}
    elsewhere = [header for header, kind in _headers() if name in kind.model_fields]
    tables = isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(it, dict) for it in value)
    )
    if elsewhere and not tables:
        return f"stands above every table; write it below {' or '.join(elsewhere)}"
    if _SECRET_NAMES.search(name):
        return f"does not stand in this file; {_TOKEN_ADVICE}"
    near = _nearest(name, headers)
    return f"is unknown; write {headers[near] if near else 'one of ' + ', '.join(headers.values())}"


_TOKEN_ADVICE = "write api_token_env or api_token_file below [[upstreams]]: the place that holds it"  # noqa: S105  # not one


def _unknown_variable(name: str) -> str:
    numbers = re.findall(r"__(\d{1,4})(?=__)", name, re.ASCII)
    near = _nearest(re.sub(r"__\d{1,4}(?=__)", "__0", name), _variable_names(Config, "KEEPALIVE_"))
    for number in numbers if near else ():
        near = re.sub(r"__0__", f"__{number}__", near or "", count=1)
    return f"is no setting; write {near or 'one such as KEEPALIVE_SERVER__LISTEN'}"


def _nothing_to_keep(source: str) -> str:
    if source == NO_FILE:
        missing = f"there is no {SEARCHED[0]} and no {SEARCHED[1]}"
        return f"nothing to keep warm, because {missing}; write one, or set KEEPALIVE_MODELS__0__KEY"
    return 'nothing to keep warm; add [[models]] and key = "…", a key that LM Studio lists'


def _not_plain(value: object, info: FieldInfo | None) -> str:
    truth = bool in _leaves(info.annotation if info else None)
    what, advice = (
        ("neither true nor false", "true or false") if truth else ("no whole number", _example(info))
    )
    if isinstance(value, str) and re.fullmatch(
        "true|false" if truth else r"\d{1,12}", value.lower(), re.ASCII
    ):
        advice = f"{value.lower()}, without quotes"
    return f"{_shown(value)} is {what}; write {advice}"


def _one_of(words: Iterable[str]) -> str:
    return " or ".join(_shown(word) for word in words)


def _example(info: FieldInfo | None) -> str:
    return _toml(info.examples[0]) if info and info.examples else "1" if info else '"…"'


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _headers() -> Iterator[tuple[str, type[_Table]]]:
    for name, info in Config.model_fields.items():
        inner = _table_in(info)
        if inner:
            yield (f"[[{name}]]" if inner[1] else f"[{name}]"), inner[0]


def _variable_names(kind: type[_Table], prefix: str) -> Iterator[str]:
    for name, info in kind.model_fields.items():
        inner = _table_in(info)
        here = f"{prefix}{name.upper()}"
        if inner:
            yield from _variable_names(inner[0], f"{here}__0__" if inner[1] else f"{here}__")
        else:
            yield here


# --- What the models say about themselves ---------------------------------------------------------


def _table_in(info: FieldInfo) -> tuple[type[_Table], bool] | None:
    """The table that a field holds, and whether it holds a list of them."""
    many = get_origin(info.annotation) is tuple
    held = get_args(info.annotation)[0] if many else info.annotation
    return (held, many) if isinstance(held, type) and issubclass(held, _Table) else None


def _field_of(kind: type[_Table], parts: list[str]) -> tuple[Key, FieldInfo] | None:
    """The setting that ["models", "0", "key"] names."""
    name, *rest = parts
    info = kind.model_fields.get(name)
    inner = _table_in(info) if info else None
    if info is None or inner is None:
        return None if info is None or rest else ((name,), info)
    key: Key = (name,)
    if inner[1]:
        if not rest or not re.fullmatch(r"\d{1,4}", rest[0], re.ASCII):
            return None
        key, rest = (name, int(rest[0])), rest[1:]
    found = _field_of(inner[0], rest) if rest else None
    return (key + found[0], found[1]) if found else None


def _owner(kind: type[_Table], place: Key) -> tuple[type[_Table], FieldInfo | None]:
    """The table in which the last name of `place` stands, and its field if it has one."""
    info: FieldInfo | None = None
    for part in place:
        if isinstance(part, str):
            inner = _table_in(info) if info else None
            kind = inner[0] if inner else kind
            info = kind.model_fields.get(part)
    return kind, info


def _leaves(annotation: object) -> Iterator[object]:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(inside[0])
    elif origin is tuple or not inside:
        yield origin or annotation
    else:
        for part in inside:
            yield from _leaves(part)


def _literals(annotation: object) -> tuple[object, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in _literals(part))


def _from_variable(text: str, info: FieldInfo) -> object:
    """The value that the text would have in the file. What does not fit stays text, and the table says so."""
    leaves = set(_leaves(info.annotation))
    if tuple in leaves and not text.startswith("["):
        return [part.strip() for part in text.split(",")]
    if leaves & {tuple, int, bool}:
        try:
            return tomllib.loads(f"it = {text}")["it"]
        except (ValueError, RecursionError):
            return text
    return text


def _holders_of_secrets(data: Any) -> Iterator[str]:
    """The variables that the config itself names, which may begin like ours."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        if isinstance(value, dict | list):
            yield from _holders_of_secrets(value)
        elif isinstance(value, str) and key in ("api_token_env", "env"):
            yield value


def _in_number_order(name: str) -> list[tuple[int, str]]:
    """KEEPALIVE_MODELS__2__KEY comes before KEEPALIVE_MODELS__10__KEY."""
    parts = name.split("__")
    return [(int(part) if re.fullmatch(r"\d{1,4}", part, re.ASCII) else -1, part) for part in parts]


def _dotted(key: Key) -> str:
    """models[1].ping_interval"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_key_name(part)}" for part in key)[1:]


def _key_name(name: str) -> str:
    # A key is also a place where a secret or a terminal's control codes can stand.
    plain = re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name) and not _looks_secret(name)
    return name if plain else _shown(name)


def _server_of(upstream: Upstream) -> tuple[str, int]:
    host, port = _host_and_port(upstream.url)
    return _plain_host(host), port


def _host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _collide(one: Address, other: Address) -> bool:
    """Whether two listeners would want the same socket. Port 0 is any free one, so it never does."""
    if one.port != other.port or one.port == 0:
        return False
    hosts = {_plain_host(one.host), _plain_host(other.host)}
    return len(hosts) == 1 or "" in hosts


def _reaches(address: Address, url: str) -> bool:
    """Whether a request to `url` would arrive at our own `address`, as far as the two texts tell."""
    host, port = _host_and_port(url)
    ours, theirs = _plain_host(address.host), _plain_host(host)
    return address.port == port and (ours == theirs or (not ours and theirs in ("127.0.0.1", "::1")))


def _plain_host(host: str) -> str:
    """One spelling for each; "" is every interface."""
    host = host.lower()
    return {"localhost": "127.0.0.1", "0.0.0.0": "", "::": ""}.get(host, host)  # noqa: S104  # compared, not bound


def _state_dir(environ: Mapping[str, str]) -> Path | None:
    if environ.get("STATE_DIRECTORY"):
        # systemd lists several, with colons between, when a unit asks for several; the first one is ours.
        return Path(environ["STATE_DIRECTORY"].split(":")[0])
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]) / "keepalive"
    return Path(environ["HOME"]) / ".local/state/keepalive" if environ.get("HOME") else None


# --- The schema for editors -----------------------------------------------------------------------


class _AsWritten(GenerateJsonSchema):
    """Defaults as they stand in the file."""

    def encode_default(self, dft: Any) -> Any:
        match dft:
            case Address():
                return str(dft)
            case float():
                return written(dft)
            case BaseModel() | (BaseModel(), *_):
                return None  # said key by key in its own table
        return super().encode_default(dft)


def schema() -> dict[str, Any]:
    """A JSON schema of the file, made from the models above."""
    found = Config.model_json_schema(schema_generator=_AsWritten)
    found["$defs"]["Server"]["properties"]["max_body"]["default"] = f"{Server().max_body // 2**20}MiB"
    _tidy(found)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **found, "title": "keepalive config.toml"}


def _tidy(node: Any) -> None:
    """Takes out null, which TOML does not have, and the titles that only repeat a key."""
    if isinstance(node, list):
        for item in node:
            _tidy(item)
    if not isinstance(node, dict):
        return
    if {"type": "null"} in node.get("anyOf", ()):
        first, *others = (choice for choice in node.pop("anyOf") if choice != {"type": "null"})
        node |= {"anyOf": [first, *others]} if others else first
    if node.get("default", ...) is None:
        del node["default"]
    for name, item in node.items():
        if name in ("properties", "$defs"):
            for inner in item.values():
                inner.pop("title", None)
        _tidy(item)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
