"""What the proxy is told to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from keepalive.core.callers import Key
from keepalive.http1 import Limits
from keepalive.protocols.routes import Heartbeat


@dataclass(frozen=True, slots=True)
class Address:
    url: str
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Settings:
    upstreams: Mapping[str, Address]  # the first one serves what is for no model that we keep
    heartbeat: float = 5.0
    heartbeat_mode: Heartbeat = Heartbeat.COMMENT
    limits: Limits = field(default_factory=Limits)
    connect_timeout: float = 5.0
    list_timeout: float = 10.0
    join_loads: bool = True  # a caller's load of a model that we keep is our load
    #: How long an answer of a model that nobody keeps may be silent once it has begun; None: for ever.
    stall_timeout: float | None = None
    #: Of the bodies of all requests that wait, together.
    kept_bytes: int = 512 * 1024 * 1024
    loopback: bool = True  # nobody but this machine can reach the listener
    allowed_hosts: frozenset[str] = frozenset()
    allowed_origins: frozenset[str] = frozenset()
    keys: tuple[Key, ...] = ()
    mark: str = ""  # what this daemon asks by itself says so; "" where nobody does
