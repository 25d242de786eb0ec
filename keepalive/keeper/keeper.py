"""The owner of all models: the only writer of state.

`record` takes a fact, lets the pure core fold it, tells the observers, and has no `await`: it is the critical
section. `tick` asks the core what to do and starts it. What is started runs as a task of one TaskGroup, ends
by recording facts, and never raises for anything that the world does.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from math import inf

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
from keepalive.core.explain import ready_in
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
    LoadForgone,
    LoadGivenUp,
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
    RequestStarted,
    Tier,
    UnloadEnded,
    UnloadStarted,
    UpstreamFact,
    fold_key,
)
from keepalive.core.plan import plan
from keepalive.core.records import Model, Snapshot, Upstream, UpstreamState
from keepalive.core.upstreams import apply_upstream
from keepalive.keeper import errands
from keepalive.keeper.given import Alone, Client, Hand, Keep, Observer, Replay, Server
from keepalive.keeper.meanings import Meanings
from keepalive.keeper.shelf import Shelf
from keepalive.keeper.waiting import Waiting

FORGONE = "which daemon acts here was not sure at the moment when its load was to begin"
USED_ELSEWHERE = "another daemon may just be giving it to a caller"
ADOPTED_REASON = "it has just been asked for the first time"


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
        #: Who waits for a model, and what names mean: for those who ask.
        self.waiting = Waiting(self, clock, hand)
        self.meanings = Meanings(self)
        self._primes: dict[ModelId, asyncio.Task[None]] = {}
        self._shelves: dict[str, Shelf] = {}
        self._keeps: dict[ModelId, Keep] = {}
        self._wake = asyncio.Event()
        self._due: set[str] = set()
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
                shelf = self._shelves[server.name] = Shelf(server, now)
                self.meanings.begin(server.name)
            elif shelf.server.client is not server.client:
                unused.append(shelf.server.client)
                for kept in shelf.models.values():
                    self._abandon(kept.id)
                shelf.empty(now)
                self.meanings.forget(server.name)
            shelf.serve(server)
        self._shelves = {server.name: self._shelves[server.name] for server in servers}
        self._keeps = {keep.model: keep for keep in keeps}
        self._default, self._adopt = default, adopt
        self._name_all()
        for name in gone:
            self.meanings.hear(name)
        self.waiting.reconsider()
        for shelf in self._shelves.values():
            shelf.place([k for k in keeps if k.model.upstream == shelf.server.name], self._keeps, now)
        self.tick()
        return unused

    def adopt(self, model: ModelId, kind: str = "llm") -> None:
        """Keep a model from now on that is not in the config, where that is wanted of such models."""
        shelf = self._shelves.get(model.upstream)
        if shelf is None or self._adopt is None:
            return
        if any(k.upstream == model.upstream and fold_key(k.key) == fold_key(model.key) for k in self._keeps):
            return  # in these letters or in others, as an earlier life may have written them
        keep = self._keeps[model] = self._adopt(model)
        self._name_all()
        there = shelf.models.get(model.key)
        if there is None:
            there = Model(id=model, since=self._clock(), kind=keep.kind or kind, reason=ADOPTED_REASON)
        shelf.models[model.key] = replace(
            there, rank=len(shelf.models), policy=keep.policy, retired=False, asked_for=None
        )
        shelf.upstream = replace(shelf.upstream, due_at=-inf)  # nothing is known of it yet
        self._due.add(shelf.server.name)
        self._wake.set()

    def _name_all(self) -> None:
        aliases = {keep.model: keep.aliases for keep in self._keeps.values()}
        self.meanings.configure(self._shelves, aliases, self._default)

    def _abandon(self, model: ModelId) -> None:
        if task := self._primes.pop(model, None):
            task.cancel()

    # --- what others need to know -------------------------------------------------------------------

    @property
    def kept(self) -> Collection[ModelId]:
        return self._keeps

    @property
    def adopts(self) -> bool:
        """A model that is only listed is kept from when it is asked for."""
        return self._adopt is not None

    def up(self) -> set[str]:
        """The upstreams that answer."""
        return {name for name, shelf in self._shelves.items() if shelf.upstream.state is UpstreamState.UP}

    def is_away(self, name: str) -> bool:
        """Whether it is known not to answer."""
        shelf = self._shelves.get(name)
        return shelf is not None and shelf.upstream.state is UpstreamState.DOWN

    def upstream(self, name: str) -> Upstream:
        return self._shelves[name].upstream

    def tier(self, upstream: str) -> Tier | None:
        """How an upstream is talked to; None where that is not known, or nothing is kept there."""
        shelf = self._shelves.get(upstream)
        return None if shelf is None else shelf.upstream.tier

    def is_lm_studio(self, upstream: str) -> bool:
        """Whether it is known to be LM Studio, and no other server."""
        tier = self.tier(upstream)
        return tier is not None and tier.lm_studio

    def present(self, upstream: str, kind: str) -> tuple[ModelId, ...]:
        """Models of a kind that may answer there when LM Studio chooses: those with an instance."""
        shelf = self._shelves.get(upstream)
        found = []
        for model in shelf.models.values() if shelf else ():
            keep = self._keeps.get(model.id)
            if model.present and kind == (model.kind if keep is None else errands.kind_of(keep, model)):
                found.append(model.id)
        return tuple(found)

    def model(self, model: ModelId) -> Model | None:
        """What is known of one model; None when it is no longer in the config."""
        shelf = self._shelves.get(model.upstream)
        if shelf is not None and shelf.counts(model.key):
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

    def alone(self, upstream: str) -> bool:
        """Whether a load goes on there that a person has decided on, whoever acts."""
        shelf = self._shelves.get(upstream)
        return shelf is not None and any(
            m.alone and m.load_started is not None for m in shelf.models.values()
        )

    def snapshot(self) -> Snapshot:
        shelves = self._shelves.values()
        for shelf in shelves:
            self._settle(shelf)
        return Snapshot(
            now=self._clock(),
            upstreams=tuple(shelf.upstream for shelf in shelves),
            models=tuple(m for shelf in shelves for m in shelf.models.values() if not m.retired),
        )

    # --- what happened ------------------------------------------------------------------------------

    def record(self, fact: ModelFact | UpstreamFact) -> None:
        """Fold a fact into the records, and plan again soon. Never waits; raises only for a bug of ours."""
        shelf = self._shelves.get(fact.model.upstream if isinstance(fact, ModelFact) else fact.upstream)
        if shelf is None:
            return  # a reload has just removed this upstream
        # A prime is given up the moment a user comes: then nothing waits.
        if isinstance(fact, (RequestStarted, RequestEnded)) and not self._primes and shelf.count(fact):
            return
        self._settle(shelf)
        self._fold(shelf, fact)
        self._due.add(shelf.server.name)
        self._wake.set()

    def _settle(self, shelf: Shelf) -> None:
        """Fold what was counted of requests into the records."""
        for fact in shelf.counted():
            self._fold(shelf, fact)

    def _fold(self, shelf: Shelf, fact: ModelFact | UpstreamFact) -> None:
        before = shelf.upstream
        shelf.upstream = apply_upstream(before, fact)
        if isinstance(fact, Listed) and fact.asked > before.asked:
            self.meanings.listed(fact.upstream, fact.entries)
        elif isinstance(fact, ListingFailed):
            self.meanings.unheard(fact.upstream)
        if shelf.upstream is not before:
            self.meanings.changed()
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
                self.waiting.announce(after.id)
            if after.retired and not after.calling and not after.ours:
                del shelf.models[model.id.key]

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

    def reconsider(self) -> None:
        """Whether there is hope has changed, for a reason that no record shows: those who wait look again."""
        self.waiting.reconsider()

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
                    self.waiting.room_changed(shelf.upstream, tuple(shelf.models.values()))

    def _see_hand(self, shelf: Shelf) -> None:
        acts, name = self._hand.acts(shelf.server.name), shelf.server.name
        if acts is not shelf.upstream.acts:
            if not acts:
                for model in [m for m in self._primes if m.upstream == name]:
                    self._abandon(model)
                    opening = shelf.models[model.key].priming.under_way
                    if opening is not None:
                        self._fold(shelf, PrimeEnded(self._clock(), model, opening, PrimeOutcome.GIVEN_UP))
            self._fold(shelf, (HandTaken if acts else HandLost)(self._clock(), name))

    def _do(self, tasks: asyncio.TaskGroup, shelf: Shelf, action: Action) -> None:
        now, clock, client = self._clock(), self._clock, shelf.server.client
        tier = shelf.upstream.tier or Tier.V1
        match action:
            case Refresh(upstream=name, loading=loading):
                self.record(ListingStarted(now, name))
                tasks.create_task(self._refresh(client, name, now, loading=loading))
            case Load(model=model, ahead=ahead, claim=claim):
                # Recorded first: an observer writes it down before LM Studio hears of it.
                self.record(LoadStarted(now, model, ahead, claim))
                tasks.create_task(self._load(client, self._keeps[model], tier, now))
            case GiveUpLoad(model=model):
                self.record(LoadGivenUp(now, model))
                tasks.create_task(client.give_up(model.key, tier=tier))
            case SendPing(model=model, instance_id=target):
                before, keep = shelf.models[model.key], self._keeps[model]
                self.record(PingStarted(now, model))
                kind = errands.kind_of(keep, before)
                ping = errands.ping(client, keep, before, kind, target, tier, now, clock)
                tasks.create_task(self._carry_out(client, ping))
            case SkipPing(model=model):
                self.record(PingEnded(now, model, PingOutcome.SKIPPED))
            case Prime(model=model, instance_id=target, opening=opening):
                before = shelf.models[model.key]
                self.record(PrimeStarted(now, model, opening))
                self._primes[model] = tasks.create_task(
                    self._prime(client, before, target, opening, tier, now)
                )
            case GiveUpPrime(model=model, opening=opening):
                self._abandon(model)  # its connection closes, which is how LM Studio is told
                self.record(PrimeEnded(now, model, opening, PrimeOutcome.GIVEN_UP))
            case Drain(model=model):
                self.record(DrainStarted(now, model))
            case EndDrain(model=model):
                self.record(DrainEnded(now, model))
            case Unload(model=model, instance_id=target, cause=cause):
                self.record(UnloadStarted(now, model, target, cause))
                tasks.create_task(self._unload(client, model, target, tier))

    async def _carry_out(
        self, client: Client, errand: Coroutine[object, object, ModelFact | UpstreamFact]
    ) -> None:
        self._record_of(client, await errand)

    async def _refresh(self, client: Client, name: str, asked: float, *, loading: bool) -> None:
        def misses(entries: Mapping[str, Entry]) -> bool:
            """Something that is kept there was in memory, and is not any more."""
            shelf = self._shelves.get(name)
            models = shelf.models.values() if shelf else ()
            there = (entries.get(fold_key(m.id.key)) for m in models if m.instances)
            return any(entry is None or not entry.instances for entry in there)

        def trusted() -> bool:
            return not self._hand.acts(name)

        fact = await errands.refresh(
            client, name, asked, self._clock, loading=loading, misses=misses, trusted=trusted
        )
        self._record_of(client, fact)

    async def _load(self, client: Client, keep: Keep, tier: Tier, began: float) -> None:
        known = self._known(keep.model)
        if known is not None and not known.alone and not await self._hand.begin(known):
            self._record_of(client, LoadForgone(self._clock(), keep.model, FORGONE))
            return

        def told(fact: ModelFact) -> None:
            self._record_of(client, fact)

        known = self._known(keep.model)
        self._record_of(client, await errands.load(client, keep, known, tier, began, self._clock, told))

    async def _prime(
        self, client: Client, model: Model, target: str, opening: str, tier: Tier, began: float
    ) -> None:
        def replay() -> Replay | None:
            return self._look_up(model.id, opening)

        ended = await errands.prime(client, model, target, opening, replay, tier, began, self._clock)
        self._primes.pop(model.id, None)
        self._record_of(client, ended)

    async def _unload(self, client: Client, model: ModelId, target: str, tier: Tier) -> None:
        known = self._known(model)
        if known is not None and not await self._hand.clear(known):
            self._record_of(client, UnloadEnded(self._clock(), model, target, USED_ELSEWHERE, in_use=True))
            return
        self._record_of(client, await errands.unload(client, model, target, tier, self._clock))

    def _known(self, model: ModelId) -> Model | None:
        shelf = self._shelves.get(model.upstream)
        return shelf.models.get(model.key) if shelf else None
