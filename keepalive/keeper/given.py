"""What the keeper is given: upstreams to ask, models to keep, who acts, and who is told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from keepalive.core.facts import Entry, Fact, ModelId, Odd, Sight, Tier
from keepalive.core.records import Model, Policy, Upstream


class Loaded(Protocol):
    @property
    def instance_id(self) -> str | None: ...
    @property
    def seconds(self) -> float | None: ...


class Listing(Protocol):
    @property
    def tier(self) -> Tier: ...
    @property
    def entries(self) -> Mapping[str, Entry]: ...
    @property
    def sight(self) -> Sight: ...
    @property
    def places(self) -> int | None: ...
    @property
    def odd(self) -> Odd | None: ...


OwnPing = tuple[str, Mapping[str, Any]]  # path and body
Replay = tuple[str, Mapping[str, Any]]  # the same, of an opening


class Client(Protocol):
    """What the keeper asks of an upstream; `upstream.Client` is the one there is."""

    async def listing(self, *, loading: bool = False) -> Listing: ...

    async def load(
        self,
        key: str,
        fields: Mapping[str, Any],
        *,
        timeout: float,
        kind: str,
        tier: Tier,
        told: Callable[[float], None],
    ) -> Loaded: ...

    async def give_up(self, key: str, *, tier: Tier) -> None: ...

    async def unload(self, instance_id: str, *, tier: Tier, timeout: float) -> None: ...

    async def ping(
        self,
        target: str,
        accepted: Sequence[str],
        *,
        kind: str,
        tier: Tier,
        timeout: float,
        lease: float | None = None,
        own: OwnPing | None = None,
    ) -> str | None: ...

    async def prime(
        self, replay: Replay, target: str, accepted: Sequence[str], *, tier: Tier, timeout: float
    ) -> int | None: ...

    async def close(self) -> None: ...


class Hand(Protocol):
    """Which daemon acts, where several keep the models of one upstream. Of them all, one loads, pings and unloads."""

    def acts(self, upstream: str, /) -> bool:
        """Whether it is this one, at this moment."""

    async def begin(self, model: Model, /) -> bool:
        """Let the others know of a load before LM Studio does; False: it must not begin."""

    async def clear(self, model: Model, /) -> bool:
        """See that nobody else gives it to a caller any more; False: somebody uses it, or may."""

    def hopeless(self, upstream: str, /) -> tuple[str, float | None] | None:
        """Why nobody acts there, where that will last, and in how many seconds to ask again."""

    def knows(self, upstream: str, /) -> bool:
        """Whether we know what is ours there: a listing does not show it."""


class Alone:
    """There is no other."""

    def acts(self, upstream: str, /) -> bool:
        return True

    async def begin(self, model: Model, /) -> bool:
        return True

    async def clear(self, model: Model, /) -> bool:
        return True

    def hopeless(self, upstream: str, /) -> tuple[str, float | None] | None:
        return None

    def knows(self, upstream: str, /) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Server:
    """One upstream to keep models on."""

    name: str
    client: Client
    refresh_interval: float = 15.0
    max_loading: int = 1
    auto_evict: bool | None = None
    memory: int | None = None  # bytes for models


@dataclass(frozen=True, slots=True)
class Keep:
    """One model to keep: the fields that its load takes, and how it is kept."""

    model: ModelId
    policy: Policy
    kind: str | None = None
    load_fields: Mapping[str, Any] | None = None
    ping: OwnPing | None = None  # instead of what its kind answers
    windowed: bool = False
    window_open: bool = True
    aliases: tuple[str, ...] = ()
    # To be replayed after a load, by the names by which they are looked up; each with why it cannot be, or None.
    openings: Mapping[str, str | None] = field(default_factory=dict)
    learns: bool = False  # and what most requests begin with


class Observer(Protocol):
    """Told of each fact, once for the upstream or model that it changed."""

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None: ...
