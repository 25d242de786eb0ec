"""The owner of all models: the only writer of state.

`record` takes a fact, lets the pure core fold it, tells the observers, and has no `await`: it is the critical
section. `tick` asks the core what to do and starts it. What is started runs as a task of one TaskGroup, ends
by recording facts, and never raises for anything that the world does.
"""

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, Protocol

from keepalive.core.actions import (
    Action,
    Drain,
    EndDrain,
    GiveUpLoad,
    GiveUpPrime,
    Load,
    Prime,
    Refresh,
    SendPing,
    SkipPing,
    Unload,
)
from keepalive.core.apply import apply
from keepalive.core.changed import replace
from keepalive.core.errors import (
    Cut,
    Forgone,
    GivenUp,
    NotWarm,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
    UpstreamError,
)
from keepalive.core.explain import next_try, ready_in
from keepalive.core.facts import (
    DrainEnded,
    DrainStarted,
    Entry,
    Fact,
    HandLost,
    HandTaken,
    Listed,
    ListingFailed,
    ListingStarted,
    LoadEnded,
    LoadForgone,
    LoadGivenUp,
    LoadOutcome,
    LoadProgressed,
    LoadRemembered,
    LoadStarted,
    ModelFact,
    ModelId,
    PingEnded,
    PingOutcome,
    PingStarted,
    PrimeEnded,
    PrimeOutcome,
    PrimeStarted,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    Sight,
    Tier,
    Trouble,
    UnloadEnded,
    UnloadStarted,
    UpstreamFact,
    WaitEnded,
    WaitStarted,
    fold_key,
)
from keepalive.core.moves import BACKOFF_FIRST
from keepalive.core.names import Meaning, Names
from keepalive.core.plan import arranged, blocked_by, plan
from keepalive.core.primes import chosen
from keepalive.core.records import Model, Policy, Priming, Snapshot, Upstream, UpstreamState
from keepalive.core.states import State
from keepalive.core.upstreams import apply_upstream

# An unload is answered at once, or the server is in trouble.
UNLOAD_TIMEOUT = 60.0
# Names are the callers', who may make up any number of them.
MEANINGS_REMEMBERED = 256
# What stands in front of a server says these when that is too busy, or does not answer in time: no verdict on a model.
_TOO_BUSY = (408, 425, 429, 504)
# llama.cpp says of a template with 500 what LM Studio says of it with 400.
_TEMPLATE = re.compile(r"jinja|raise_exception", re.IGNORECASE)
# What is kept of its own accord once it is asked for, where the config says so.
ADOPTED = ("llm", "embedding")
FORGONE = "which daemon acts here was not sure at the moment when its load was to begin"
USED_ELSEWHERE = "another daemon may just be giving it to a caller"
ADOPTED_REASON = "it has just been asked for the first time"


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


class _Count:
    """Requests for one warm model that its record does not hold yet."""

    __slots__ = ("answered_at", "at", "ended", "ended_at", "started")

    def __init__(self) -> None:
        self.at = 0.0
        self.started = 0
        self.ended = 0
        self.ended_at: float | None = None
        self.answered_at: float | None = None


class _Shelf:
    """One upstream with its models, in the order of the config."""

    __slots__ = ("counts", "models", "server", "upstream")

    def __init__(self, server: Server, now: float) -> None:
        self.server = server
        self.models: dict[str, Model] = {}
        self.counts: dict[str, _Count] = {}
        self.upstream = Upstream(name=server.name, since=now)


class Keeper:
    """Keeps models warm.

    `clock` gives seconds and never the same twice; `report` is given what an observer raises; `look_up` knows what an
    opening says, by its name, while it is known; `hand` who acts.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        observers: Sequence[Observer] = (),
        report: Callable[[BaseException], None] = lambda error: None,
        look_up: Callable[[ModelId, str], Replay | None] = lambda model, opening: None,
        hand: Hand = Alone(),  # noqa: B008  # it has no state
    ) -> None:
        self._clock = clock
        self._observers = observers
        self._report = report
        self._look_up = look_up
        self._hand = hand
        self._primes: dict[ModelId, asyncio.Task[None]] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._keeps: dict[ModelId, Keep] = {}
        self._wake = asyncio.Event()
        self._due: set[str] = set()
        self._names = Names()
        # What names were found to mean, until anything is heard of an upstream: callers say the same few.
        self._meanings: dict[tuple[str | None, bool], Meaning] = {}
        self._unheard: dict[str, asyncio.Event] = {}
        self._news: dict[ModelId, asyncio.Future[None]] = {}
        self._default: str | None = None
        self._adopt: Callable[[ModelId], Keep] | None = None

    # --- what is kept -------------------------------------------------------------------------------

    def configure(
        self,
        servers: Iterable[Server],
        keeps: Iterable[Keep],
        default: str | None = None,
        adopt: Callable[[ModelId], Keep] | None = None,
    ) -> list[Client]:
        """Keep these from now on, and leave alone what has not changed; returns the clients now unused.

        `default` is the model that a request means that names nobody. `adopt` says how a model is kept that an
        upstream lists, that a request names and that is not among `keeps`; without it nobody keeps it.
        A model that is gone from the config is let go: unloaded if we loaded it, then forgotten.
        """
        now = self._clock()
        servers, keeps = list(servers), list(keeps)
        for known in self._shelves.values():
            self._settle(known)
        gone = self._shelves.keys() - {server.name for server in servers}
        for model in [m for m in self._primes if m.upstream in gone]:
            self._abandon(model)
        unused = [self._shelves.pop(name).server.client for name in gone]
        for server in servers:
            shelf = self._shelves.get(server.name)
            if shelf is None:
                shelf = self._shelves[server.name] = _Shelf(server, now)
                self._unheard[server.name] = asyncio.Event()
            elif shelf.server.client is not server.client:
                unused.append(shelf.server.client)
                for kept in shelf.models.values():
                    self._abandon(kept.id)
                shelf.models = {key: _forgotten(model, now) for key, model in shelf.models.items()}
                shelf.upstream = Upstream(name=server.name, since=now)
                self._names.forget(server.name)
                self._unheard.setdefault(server.name, asyncio.Event())
            shelf.server = server
            shelf.upstream = replace(
                shelf.upstream,
                refresh_interval=server.refresh_interval,
                max_loading=server.max_loading,
                auto_evict=server.auto_evict,
                memory=server.memory,
                # Whoever reads the config anew may have mended the token where it is made.
                due_at=-inf if shelf.upstream.state is UpstreamState.UNAUTHORIZED else shelf.upstream.due_at,
            )
        self._shelves = {server.name: self._shelves[server.name] for server in servers}
        self._keeps = {keep.model: keep for keep in keeps}
        self._meanings.clear()
        self._default, self._adopt = default, adopt
        self._name_all()
        for name in gone:
            self._hear(name)
        for model in list(self._news):
            self._announce(model)
        for shelf in self._shelves.values():
            self._place(shelf, [k for k in keeps if k.model.upstream == shelf.server.name], now)
        self.tick()
        return unused

    def _abandon(self, model: ModelId) -> None:
        if task := self._primes.pop(model, None):
            task.cancel()

    def _name_all(self) -> None:
        aliases = {keep.model: keep.aliases for keep in self._keeps.values()}
        self._names.configure(self._shelves, aliases, self._default)

    def _place(self, shelf: _Shelf, keeps: Sequence[Keep], now: float) -> None:
        gone = {key: m for key, m in shelf.models.items() if m.id not in self._keeps}
        models: dict[str, Model] = {}
        for rank, keep in enumerate(keeps):
            new = Model(id=keep.model, since=now, window_open=keep.window_open, kind=keep.kind or "llm")
            model = shelf.models.get(keep.model.key, new)
            if model.state is State.BACKOFF:
                # Whoever reads the config anew may have mended what holds it off.
                due = None if model.ping_at is None else -inf
                model = replace(model, retry_at=None, ping_at=due)
            models[keep.model.key] = replace(
                model,
                rank=rank,
                policy=keep.policy,
                retired=False,
                windowed=keep.windowed,
                window_open=keep.window_open,
                asked_for=None if model.retired else model.asked_for,
                refused=model.refused if keep.policy.pinged else None,
                priming=chosen(model.priming, keep.openings, learns=keep.learns),
            )
        for key, model in gone.items():
            models[key] = replace(model, retired=True, rank=len(models))
        shelf.models = models

    # --- what others need to know -------------------------------------------------------------------

    def find(self, name: str) -> tuple[ModelId, ...]:
        """The models that a request for `name` means, in the config's order; none when nobody keeps it."""
        return self._names.find(name)

    async def meaning(self, name: str | None, within: float, *, default: bool = True) -> Meaning:
        """What a request means that names `name`, or nobody; see `Names.meaning`.

        Where an upstream's first listing decides, it is waited for, until it comes or fails or for `within` seconds.
        """
        known = self._meanings.get((name, default))
        if known is not None:
            return known
        meaning = self._meaning(name, default=default)
        if not meaning.open:
            if len(self._meanings) >= MEANINGS_REMEMBERED:
                self._meanings.clear()
            self._meanings[name, default] = meaning
            return meaning
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                for unheard in [self._unheard[name] for name in meaning.open if name in self._unheard]:
                    await unheard.wait()
        return self._meaning(name, default=default)

    async def meant(self, name: str, within: float) -> tuple[ModelId, ...]:
        """The same as `find`, for whoever asks for one: what is only listed is kept from now on, where that is wanted.

        A first listing is waited for as by `meaning`.
        """
        if not (found := self.find(name)) and self._adopt is not None:
            await self.meaning(name, within)
            found = self.find(name)
        return found

    def take_up(self, name: str) -> None:
        """Keeps what is listed under that name from now on, where that is wanted of what is asked for."""
        if self._adopt is not None and not self.find(name):
            self._meaning(name, default=True)

    def offered(self) -> list[str]:
        """The keys of all that is kept, and, where that is wanted, of all that would be if it were asked for."""
        keys = {model.key: None for model in self._keeps}
        if self._adopt is not None:
            keys |= {entry.key: None for entry in self._names.entries() if entry.kind in ADOPTED}
        return list(keys)

    def loaded(self) -> list[ModelId]:
        """All that the upstreams list as loaded, kept or not."""
        return self._names.loaded()

    def listed_as(self, upstream: str, name: str) -> str | None:
        """The key under which that upstream lists what a name means there."""
        entry = self._names.row(upstream, name)
        return None if entry is None else entry.key

    def _meaning(self, name: str | None, *, default: bool) -> Meaning:
        meaning = self._names.meaning(name, self._up(), default=default)
        if any(self._is_misspelt(name, model) for model in meaning.models):
            meaning = replace(meaning, renamed=True)
        if meaning.models or not meaning.known or self._adopt is None or not default:
            return meaning
        entry = self._names.row(meaning.upstream, meaning.written() or name or "")
        shelf = self._shelves[meaning.upstream]
        if entry is None or entry.kind not in ADOPTED or shelf.upstream.tier is Tier.OPENAI:
            return meaning
        self.adopt(ModelId(meaning.upstream, entry.key), entry.kind)
        return self._names.meaning(name, self._up(), default=default)

    def _is_misspelt(self, name: str | None, model: ModelId) -> bool:
        """Whether it is the key of a model but for its letter case, where that counts: everywhere but in LM Studio."""
        same = name is not None and name != model.key and fold_key(name) == fold_key(model.key)
        return same and not self.is_lm_studio(model.upstream)

    def adopt(self, model: ModelId, kind: str = "llm") -> None:
        """Keep a model from now on that is not in the config, where that is wanted of such models."""
        shelf = self._shelves.get(model.upstream)
        if shelf is None or self._adopt is None or model in self._keeps:
            return
        keep = self._keeps[model] = self._adopt(model)
        self._name_all()
        there = shelf.models.get(model.key)
        if there is None:
            there = Model(id=model, since=self._clock(), kind=keep.kind or kind, reason=ADOPTED_REASON)
        shelf.models[model.key] = replace(
            there, rank=len(shelf.models), policy=keep.policy, retired=False, asked_for=None
        )
        shelf.upstream = replace(shelf.upstream, due_at=-inf)  # nothing is known of it yet
        self._meanings.clear()
        self._due.add(shelf.server.name)
        self._wake.set()

    def rows(self, upstream: str) -> Mapping[str, Sequence[str]]:
        """The aliases that belong to each row of a listing of `upstream`, by the row's folded key."""
        return self._names.rows(upstream)

    def is_lm_studio(self, upstream: str) -> bool:
        """Whether it is known to be LM Studio, and no other server."""
        shelf = self._shelves.get(upstream)
        return shelf is not None and shelf.upstream.tier is not None and shelf.upstream.tier.lm_studio

    def present(self, upstream: str, kind: str) -> tuple[ModelId, ...]:
        """Models of a kind that may answer there when LM Studio chooses: those with an instance."""
        shelf = self._shelves.get(upstream)
        found = []
        for model in shelf.models.values() if shelf else ():
            keep = self._keeps.get(model.id)
            if model.present and kind == (model.kind if keep is None else self._kind(keep)):
                found.append(model.id)
        return tuple(found)

    def _up(self) -> set[str]:
        return {name for name, shelf in self._shelves.items() if shelf.upstream.state is UpstreamState.UP}

    def _hear(self, upstream: str) -> None:
        unheard = self._unheard.pop(upstream, None)
        if unheard is not None:
            unheard.set()

    def model(self, model: ModelId) -> Model | None:
        """What is known of one model; None when it is no longer in the config."""
        shelf = self._shelves.get(model.upstream)
        if shelf is not None and model.key in shelf.counts:
            self._settle(shelf)
        return self.glance(model)

    def glance(self, model: ModelId) -> Model | None:
        """The same for whoever asks at every request; the last requests may not have been counted in it yet."""
        shelf = self._shelves.get(model.upstream)
        known = shelf.models.get(model.key) if shelf is not None else None
        return None if known is None or known.retired else known

    def siblings(self, model: ModelId) -> tuple[Model, ...]:
        """All models of the same upstream."""
        shelf = self._shelves.get(model.upstream)
        if shelf is None:
            return ()
        self._settle(shelf)
        return tuple(shelf.models.values())

    def ready_in(self, model: ModelId) -> float | None:
        """Seconds until it should be there, the loads that come before its own included; None when nobody can tell."""
        known, shelf = self.model(model), self._shelves.get(model.upstream)
        if known is None or shelf is None:
            return None
        return ready_in(shelf.upstream, self.siblings(model), known, self._clock())

    async def ensure_warm(self, models: Sequence[ModelId]) -> ModelId:
        """Wait until one of `models` is warm, and return it: the least busy, where several are.

        All who wait share one load, and are woken in the order in which they came. Has no time limit. Raises
        NotWarm when waiting is of no use. Cancelling it is leaving; the load goes on while it is wanted.
        """
        warm = self.ready(models)
        if warm is not None:
            return warm
        left = list(models)
        while True:
            chosen = self._nearest(left)
            try:
                return await self._ensure_warm(chosen, others=len(left) > len(chosen))
            except NotWarm:
                left = [model for model in left if model not in chosen]
                if not left:
                    raise

    def _nearest(self, models: Sequence[ModelId]) -> Sequence[ModelId]:
        """Of what is loaded on demand one copy is enough, on whichever upstream: where it will be warm soonest."""
        known = [m for m in map(self.model, models) if m is not None and m.policy.auto]
        if len(known) < 2 or len(known) < len(models):
            return models

        def distance(model: Model) -> tuple[bool, bool, bool, int, float]:
            upstream, now = self._shelves[model.id.upstream].upstream, self._clock()
            room = arranged(upstream, self.siblings(model.id), now)
            waits = room is not None and model.id not in {m.id for m in room.loads}
            up = upstream.state is UpstreamState.UP
            return not up, model.loading_since is None, waits, model.waiting, -model.use_at

        return [min(known, key=distance).id]

    async def _ensure_warm(self, models: Sequence[ModelId], *, others: bool) -> ModelId:
        """The same. Where there are `others`, nobody waits for an upstream that is away."""
        warm = self.ready(models)
        if warm is not None:
            return warm
        began = self._clock()
        for model in models:
            self.record(WaitStarted(self._clock(), model))
        try:
            while warm is None:
                self._check_hope(models)
                if others and not self._up() & {model.upstream for model in models}:
                    raise NotWarm(f"{models[0].upstream} cannot be asked")
                loop = asyncio.get_running_loop()
                # One future for all who wait: `wait` does not cancel it when one of them leaves.
                await asyncio.wait(
                    [self._news.setdefault(model, loop.create_future()) for model in models],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                warm = self.ready(models)
        finally:
            now = self._clock()
            for model in models:
                self.record(WaitEnded(self._clock(), model, now - began, served=warm is not None))
        return warm

    def ready(self, models: Sequence[ModelId]) -> ModelId | None:
        """The least busy of those of `models` that a request may be passed on to now."""
        if len(models) == 1:
            known = self.glance(models[0])
            return known.id if known is not None and known.given else None
        warm = [m.id for m in map(self.glance, models) if m is not None and m.given]
        if len(warm) < 2:
            return warm[0] if warm else None
        return min(filter(None, map(self.model, warm)), key=lambda m: m.in_flight).id

    def _check_hope(self, models: Sequence[ModelId]) -> None:
        """Raise NotWarm when none of `models` will be warm soon, with the reason of the first."""
        reasons: list[tuple[str, float | None]] = []
        for model in models:
            why = self._hopeless(model)
            if why is None:
                return
            reasons.append(why)
        message, retry_after = reasons[0] if reasons else ("no such model is kept here", None)
        raise NotWarm(message, retry_after=retry_after)

    def _hopeless(self, wanted: ModelId) -> tuple[str, float | None] | None:
        """Why waiting is of no use, and in how many seconds it may be; None while there is hope."""
        model, now = self.model(wanted), self._clock()
        if model is None:
            return f"{wanted.key} is no longer kept here", None
        upstream, siblings = self._shelves[wanted.upstream].upstream, self.siblings(wanted)
        again = next_try(upstream, model, now)
        left = None if again is None else again - now
        # A first failure is tried again soon enough to wait for it, and what was taken from us at once.
        if model.state is State.BACKOFF and left is not None and left > BACKOFF_FIRST and not model.contested:
            return f"{wanted.key} cannot be had now: {model.reason}", left
        if upstream.state is UpstreamState.UNAUTHORIZED:
            return f"{wanted.key} cannot be had: {upstream.error}", left
        if (nobody := self._hand.hopeless(wanted.upstream)) is not None:
            return f"{wanted.key} cannot be had: {nobody[0]}", nobody[1]
        if model.state is State.COLD:
            blocked = blocked_by(upstream, siblings, model) if model.listed else model.reason
            if blocked is not None:
                return f"{wanted.key} cannot be had: {blocked}", None
            room = arranged(upstream, siblings, now)
            if room is not None and wanted in room.never and self._hand.knows(wanted.upstream):
                return f"{wanted.key} cannot be had: {room.never[wanted]}", None
        return None

    def alone(self, upstream: str) -> bool:
        """Whether a load goes on there that a person has decided on, whoever acts."""
        shelf = self._shelves.get(upstream)
        return shelf is not None and any(
            m.alone and m.load_started is not None for m in shelf.models.values()
        )

    def reconsider(self) -> None:
        """Whether there is hope has changed, for a reason that no record shows: those who wait look again."""
        for model in list(self._news):
            self._announce(model)

    def _announce(self, model: ModelId) -> None:
        news = self._news.pop(model, None)
        if news is not None and not news.done():
            news.set_result(None)

    # --- what happened ------------------------------------------------------------------------------

    def record(self, fact: ModelFact | UpstreamFact) -> None:
        """Fold a fact into the records, and plan again soon. Never waits; raises only for a bug of ours."""
        shelf = self._shelves.get(fact.model.upstream if isinstance(fact, ModelFact) else fact.upstream)
        if shelf is None:
            return  # a reload has just removed this upstream
        if isinstance(fact, RequestStarted | RequestEnded) and self._count(shelf, fact):
            return
        self._settle(shelf)
        self._fold(shelf, fact)
        self._due.add(shelf.server.name)
        self._wake.set()

    def _fold(self, shelf: _Shelf, fact: ModelFact | UpstreamFact) -> None:
        before = shelf.upstream
        shelf.upstream = apply_upstream(before, fact)
        if isinstance(fact, Listed) and fact.asked > before.asked:
            self._names.listed(fact.upstream, fact.entries)
            self._hear(fact.upstream)
        elif isinstance(fact, ListingFailed):
            self._names.unheard(fact.upstream)
            self._hear(fact.upstream)
        if shelf.upstream is not before:
            self._meanings.clear()
        if shelf.upstream is not before or not isinstance(fact, ModelFact):
            self._tell(fact, before, shelf.upstream)
        keys = [fact.model.key] if isinstance(fact, ModelFact) else list(shelf.models)
        for model in [shelf.models[key] for key in keys if key in shelf.models]:
            after = shelf.models[model.id.key] = apply(model, fact)
            self._tell(fact, model, after)
            if (
                after.state is not model.state
                or after.reason != model.reason
                or after.given is not model.given
            ):
                self._announce(after.id)
            if after.retired and not after.calling and not after.ours:
                del shelf.models[model.id.key]

    def _count(self, shelf: _Shelf, fact: RequestStarted | RequestEnded) -> bool:
        """Whether a fact can wait, which comes twice for each request: of a warm model it leads to no other state.

        Whoever reads a record, or changes it, first has `_settle` fold what was counted, so that nobody can tell.
        Nothing has to be planned because of it before the next tick; but a prime is given up the moment a user comes.
        """
        model = shelf.models.get(fact.model.key)
        if model is None or model.state is not State.WARM or model.retired or self._primes:
            return False
        count = shelf.counts.get(fact.model.key)
        if count is None:
            count = shelf.counts[fact.model.key] = _Count()
        if isinstance(fact, RequestStarted):
            count.started += 1
        elif model.in_flight + count.started > count.ended:
            count.ended += 1
            count.ended_at = fact.at
            if fact.answered:
                count.answered_at = fact.at
        else:
            return False  # its beginning was not seen: a reload has put this model here meanwhile
        count.at = fact.at
        return True

    def _settle(self, shelf: _Shelf) -> None:
        """Fold what was counted of requests into the records."""
        if not shelf.counts:
            return
        counts, shelf.counts = shelf.counts, {}
        for key, c in counts.items():
            model = ModelId(shelf.server.name, key)
            self._fold(shelf, RequestsCounted(c.at, model, c.started, c.ended, c.ended_at, c.answered_at))

    def _record_of(self, client: Client, fact: ModelFact | UpstreamFact) -> None:
        """Record what `client` saw, unless a reload has meanwhile put another server behind that name."""
        name = fact.model.upstream if isinstance(fact, ModelFact) else fact.upstream
        if name in self._shelves and self._shelves[name].server.client is client:
            self.record(fact)

    def _tell(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        for observer in self._observers:
            try:
                observer.observe(fact, before, after)
            except Exception as error:  # noqa: BLE001  # bookkeeping must never touch what it describes
                self._report(error)

    # --- what to do about it ------------------------------------------------------------------------

    def tick(self) -> None:
        """Time has passed: plan again, for every upstream."""
        self._due.update(self._shelves)
        self._wake.set()

    async def run(self) -> None:
        """Keep until cancelled. What is under way then is dropped; models stay as they are."""
        async with asyncio.TaskGroup() as tasks:
            self.tick()
            while True:
                await self._wake.wait()
                self._wake.clear()
                due, self._due = self._due, set()
                for shelf in [self._shelves[name] for name in self._shelves if name in due]:
                    self._settle(shelf)
                    self._see_hand(shelf)
                    for action in plan(shelf.upstream, tuple(shelf.models.values()), self._clock()):
                        self._do(tasks, shelf, action)
                    self._wake_for_nothing(shelf)

    def _wake_for_nothing(self, shelf: _Shelf) -> None:
        """Whoever waits for room that can never come any more is to be told so, and not to wait to his end."""
        models = tuple(shelf.models.values())
        if any(m.waiting and m.state is State.COLD for m in models):
            room = arranged(shelf.upstream, models, self._clock())
            for model in room.never if room is not None else ():
                self._announce(model)

    def _see_hand(self, shelf: _Shelf) -> None:
        acts, name = self._hand.acts(shelf.server.name), shelf.server.name
        if acts is not shelf.upstream.acts:
            if not acts:
                for model in [m for m in self._primes if m.upstream == name]:
                    self._abandon(model)
                    opening = shelf.models[model.key].priming.under_way
                    if opening is not None:
                        self._fold(shelf, PrimeEnded(self._clock(), model, opening, PrimeOutcome.GIVEN_UP))
            self._fold(shelf, (HandTaken if acts else HandLost)(self._clock(), name))

    def snapshot(self) -> Snapshot:
        shelves = self._shelves.values()
        for shelf in shelves:
            self._settle(shelf)
        return Snapshot(
            now=self._clock(),
            upstreams=tuple(shelf.upstream for shelf in shelves),
            models=tuple(m for shelf in shelves for m in shelf.models.values() if not m.retired),
        )

    def _do(self, tasks: asyncio.TaskGroup, shelf: _Shelf, action: Action) -> None:
        now, client = self._clock(), shelf.server.client
        match action:
            case Refresh(upstream=name, loading=loading):
                self.record(ListingStarted(now, name))
                tasks.create_task(self._refresh(client, name, now, loading=loading))
            case Load(model=model, ahead=ahead, claim=claim):
                tier = shelf.upstream.tier or Tier.V1
                # Recorded first: an observer writes it down before LM Studio hears of it.
                self.record(LoadStarted(now, model, ahead, claim))
                tasks.create_task(self._load(client, self._keeps[model], tier, now))
            case GiveUpLoad(model=model):
                self.record(LoadGivenUp(now, model))
                tasks.create_task(client.give_up(model.key, tier=shelf.upstream.tier or Tier.V1))
            case SendPing(model=model, instance_id=target):
                tier, before = shelf.upstream.tier or Tier.V1, shelf.models[model.key]
                self.record(PingStarted(now, model))
                tasks.create_task(self._ping(client, self._keeps[model], before, target, tier, now))
            case SkipPing(model=model):
                self.record(PingEnded(now, model, PingOutcome.SKIPPED))
            case Prime(model=model, instance_id=target, opening=opening):
                tier, before = shelf.upstream.tier or Tier.V1, shelf.models[model.key]
                self.record(PrimeStarted(now, model, opening))
                work = self._prime(client, before, target, opening, tier, now)
                self._primes[model] = tasks.create_task(work)
            case GiveUpPrime(model=model, opening=opening):
                self._abandon(model)  # its connection closes, which is how LM Studio is told
                self.record(PrimeEnded(now, model, opening, PrimeOutcome.GIVEN_UP))
            case Drain(model=model):
                self.record(DrainStarted(now, model))
            case EndDrain(model=model):
                self.record(DrainEnded(now, model))
            case Unload(model=model, instance_id=target, cause=cause):
                tier = shelf.upstream.tier or Tier.V1
                self.record(UnloadStarted(now, model, target, cause))
                tasks.create_task(self._unload(client, model, target, tier))

    async def _refresh(self, client: Client, name: str, asked: float, *, loading: bool) -> None:
        try:
            listing = await client.listing(loading=loading)
            if not loading and self._misses(name, listing.entries):
                # Somebody else's load may have pushed it out, which only this would show.
                asked = self._clock()
                loading, listing = True, await client.listing(loading=True)
        except UpstreamError as error:
            self._record_of(client, ListingFailed(self._clock(), name, asked, _trouble(error), str(error)))
        else:
            at, tier, entries, sight = self._clock(), listing.tier, listing.entries, listing.sight
            trusted = not self._hand.acts(name)
            listed = Listed(at, name, asked, tier, entries, loading, sight, listing.places, trusted)
            self._record_of(client, listed)

    def _misses(self, name: str, entries: Mapping[str, Entry]) -> bool:
        """Whether something that is kept there was in memory, and is not any more."""
        shelf = self._shelves.get(name)
        models = shelf.models.values() if shelf else ()
        there = (entries.get(fold_key(m.id.key)) for m in models if m.instances)
        return any(entry is None or not entry.instances for entry in there)

    async def _load(self, client: Client, keep: Keep, tier: Tier, began: float) -> None:
        model, timeout = keep.model, keep.policy.load_timeout
        outcome, message, why, loaded = LoadOutcome.OK, None, None, None
        known = self._known(model)
        if known is not None and not known.alone and not await self._hand.begin(known):
            self._record_of(client, LoadForgone(self._clock(), model, FORGONE))
            return
        try:
            if tier.calls:
                loaded = await client.load(
                    model.key,
                    keep.load_fields or {},
                    timeout=timeout,
                    kind=known.kind if known else "llm",
                    tier=tier,
                    told=lambda done: self._record_of(client, LoadProgressed(self._clock(), model, done)),
                )
            else:
                # Without an explicit load, the first request is the load; its lease counts from now on.
                kind = self._kind(keep)
                lease = keep.policy.lease if tier is Tier.V0 else None
                other = await client.ping(
                    model.key, (model.key,), kind=kind, tier=tier, timeout=timeout, lease=lease, own=keep.ping
                )
                if other is not None:
                    outcome, message = LoadOutcome.FAILED, f"{other} answered in its place"
        except Forgone as error:
            self._record_of(client, LoadForgone(self._clock(), model, str(error)))
            return
        except GivenUp as error:
            outcome, message = LoadOutcome.GIVEN_UP, str(error)
        except (TimedOut, Cut) as error:
            outcome, message = LoadOutcome.UNKNOWN, str(error)
        except Unauthorized as error:
            outcome, message, why = LoadOutcome.REFUSED, str(error), Reason.UNAUTHORIZED
        except (Refused, Unexpected) as error:
            outcome, message = _load_outcome(error, tier), str(error)
            why = error.reason if isinstance(error, Refused) else None
            if not tier.calls and isinstance(error, Refused) and _refuses_the_request(error, tier):
                # The model was there to refuse it. Where residency shows, the listing has the last word.
                outcome, why = LoadOutcome.OK, None
        except UpstreamError as error:
            outcome, message = LoadOutcome.FAILED, str(error)
        now = self._clock()
        # On demand the instance carries the key as its id.
        instance_id = loaded.instance_id if loaded else model.key
        self._record_of(
            client,
            LoadEnded(
                now,
                model,
                outcome,
                elapsed=now - began,
                seconds=loaded.seconds if loaded else None,
                instance_id=instance_id if outcome is LoadOutcome.OK else None,
                proved=not tier.calls and outcome is LoadOutcome.OK,
                message=message,
                why=why,
            ),
        )

    async def _ping(
        self, client: Client, keep: Keep, model: Model, target: str, tier: Tier, began: float
    ) -> None:
        accepted = [model.id.key, *(instance.id for instance in model.instances)]
        outcome, message, why = PingOutcome.OK, None, None
        try:
            other = await client.ping(
                target,
                accepted,
                kind=self._kind(keep),
                tier=tier,
                timeout=keep.policy.ping_timeout,
                own=keep.ping,
            )
            if other is not None:
                outcome, message = PingOutcome.WRONG_MODEL, f"{other} answered the ping in its place"
        except UpstreamError as error:
            (name, why), message = _what_came_of_it(error, tier), str(error)
            outcome = PingOutcome(name)
        now = self._clock()
        self._record_of(client, PingEnded(now, model.id, outcome, now - began, message, why))

    async def _prime(
        self, client: Client, model: Model, target: str, opening: str, tier: Tier, began: float
    ) -> None:
        accepted = [model.id.key, *(instance.id for instance in model.instances)]
        outcome, tokens, message, why = PrimeOutcome.OK, None, None, None
        try:
            replay = self._look_up(model.id, opening)
            if replay is None:
                outcome, message = PrimeOutcome.REFUSED, "it is no longer known"
            else:
                # What it had in its cache it answers as soon as a ping.
                held = any(primed.opening == opening for primed in model.priming.done)
                timeout = model.policy.ping_timeout if held else model.policy.load_timeout
                tokens = await client.prime(replay, target, accepted, tier=tier, timeout=timeout)
        except RecursionError:
            # It was read, on another stack; to write it takes a little more. Callers send what they like.
            outcome, message = PrimeOutcome.REFUSED, "its lists stand too deep in each other"
        except UpstreamError as error:
            (name, why), message = _what_came_of_it(error, tier), str(error)
            outcome = PrimeOutcome(name)
        now = self._clock()
        self._primes.pop(model.id, None)
        ended = PrimeEnded(now, model.id, opening, outcome, now - began, tokens, message, why)
        self._record_of(client, ended)

    async def _unload(self, client: Client, model: ModelId, target: str, tier: Tier) -> None:
        message, in_use, known = None, False, self._known(model)
        if known is not None and not await self._hand.clear(known):
            self._record_of(client, UnloadEnded(self._clock(), model, target, USED_ELSEWHERE, in_use=True))
            return
        try:
            await client.unload(target, tier=tier, timeout=UNLOAD_TIMEOUT)
        except UpstreamError as error:
            message = str(error)
            in_use = isinstance(error, Forgone) or (
                isinstance(error, Refused) and error.reason is Reason.IN_USE
            )
        self._record_of(client, UnloadEnded(self._clock(), model, target, message, in_use))

    def _kind(self, keep: Keep) -> str:
        """What the config says, else what the listing said."""
        if keep.kind is not None:
            return keep.kind
        model = self._known(keep.model)
        return model.kind if model else "llm"

    def _known(self, model: ModelId) -> Model | None:
        shelf = self._shelves.get(model.upstream)
        return shelf.models.get(model.key) if shelf else None


def _forgotten(model: Model, now: float) -> Model:
    """What still holds for a model when its upstream is asked through another client.

    That may be the same server, asked with another token: then our load is still under way over there.
    """
    fresh = Model(
        id=model.id,
        since=now,
        kind=model.kind,
        asked_for=model.asked_for,
        retired=model.retired,
        recent_loads=model.recent_loads,
        loads=model.loads,
        evictions=model.evictions,
        made_way=model.made_way,
        last_eviction=model.last_eviction,
        waiting=model.waiting,
        waiting_since=model.waiting_since,
        in_flight=model.in_flight,
        use_at=model.use_at,
        asks=model.asks,
        asks_at=model.asks_at,
        priming=Priming(learned=model.priming.learned),
    )
    since = model.loading_since
    if since is None or (model.pending is not None and not model.pending.ours):
        return fresh
    expected, tells_loading = model.expected_load, model.tells_loading
    return apply(fresh, LoadRemembered(now, model.id, since, expected, tells_loading))


def _load_outcome(error: Refused | Unexpected, tier: Tier) -> LoadOutcome:
    if isinstance(error, Refused) and error.reason is Reason.RESOURCES:
        return LoadOutcome.REFUSED
    if isinstance(error, Refused) and error.reason is Reason.LOADING:
        return LoadOutcome.UNKNOWN
    if isinstance(error, Refused) and error.reason is Reason.OTHER and error.status in (408, 409):
        return LoadOutcome.UNKNOWN  # somebody on the way lost patience, or it stands in the way of itself
    if tier is Tier.OPENAI and error.status is not None and 400 <= error.status <= 500:
        # There the load is part of the request, and a whole answer of the server's own ends both. (502 to 504
        # may be a gateway's, and say nothing about what goes on behind it.)
        return LoadOutcome.FAILED
    if isinstance(error, Unexpected):
        return LoadOutcome.UNKNOWN  # whatever garbled the answer need not have stopped the load
    if error.reason is Reason.OTHER and not 400 <= error.status < 500:
        return LoadOutcome.UNKNOWN  # an error that does not say that the load is over
    return LoadOutcome.FAILED


def _what_came_of_it(
    error: UpstreamError, tier: Tier
) -> tuple[Literal["timeout", "refused", "error"], Reason | None]:
    """The outcome of a ping, or of an opening, that was not answered as it should be, and what kind of error it is."""
    match error:
        case TimedOut():
            return "timeout", None
        case Refused(reason=Reason.OTHER) | Unexpected() if error.status in _TOO_BUSY:
            return "timeout", None
        case Refused():
            return ("refused", None) if _refuses_the_request(error, tier) else ("error", error.reason)
        case Unauthorized():
            return "error", Reason.UNAUTHORIZED
        case Unexpected():
            return "error", Reason.OTHER
        case _:
            return "error", None


def _refuses_the_request(error: Refused, tier: Tier) -> bool:
    """Whether the model answered, and only does not take this request: a template, an image that is missing."""
    if error.reason is Reason.UNKNOWN_ROUTE:
        # Elsewhere a 404 may as well mean that there is no such model.
        return tier is not Tier.OPENAI or error.status == 405
    template = error.status == 500 and _TEMPLATE.search(str(error)) is not None
    return error.reason is Reason.OTHER and (template or error.status in (400, 405, 413, 415, 422, 501))


def _trouble(error: UpstreamError) -> Trouble:
    match error:
        case Unauthorized():
            return Trouble.UNAUTHORIZED
        case Unreachable(refused=True):
            return Trouble.REFUSED
        case Unreachable():
            return Trouble.UNREACHABLE
        case TimedOut():
            return Trouble.TIMEOUT
        case Refused(reason=Reason.LOADING):
            return Trouble.LOADING
        case _:
            return Trouble.BAD_ANSWER
