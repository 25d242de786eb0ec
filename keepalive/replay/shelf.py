"""One upstream on a virtual clock: requests come, the policy decides, and loads and answers take their time.

The records are those of the daemon, and facts change them as they do there. What the core asks of the world (a fresh
listing, a ping) is granted at once, because here nothing goes wrong: a load takes its seconds, an unload none.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from keepalive.core.actions import Action, Drain, EndDrain, GiveUpLoad, Load, Unload
from keepalive.core.apply import apply
from keepalive.core.facts import (
    DrainEnded,
    DrainStarted,
    Entry,
    Instance,
    Listed,
    LoadEnded,
    LoadOutcome,
    LoadProgressed,
    LoadStarted,
    ModelFact,
    ModelId,
    RequestEnded,
    RequestStarted,
    Tier,
    UnloadEnded,
    UnloadStarted,
    WaitEnded,
    WaitStarted,
)
from keepalive.core.records import Model, Upstream, UpstreamState
from keepalive.replay.trace import Request

NAME = "replay"
# A policy that has not come to rest after so many rounds at one instant never will.
ROUNDS = 1000
Decide = Callable[[Upstream, Sequence[Model], float], Iterable[Action]]


@dataclass(frozen=True, slots=True)
class Stay:
    """A model in memory: from the begin of its load until it went."""

    model: str
    began: float
    loaded: float
    ended: float


@dataclass(slots=True)
class Outcome:
    """What it came to. `waits`: (second, model, seconds) of each request that waited."""

    requests: int = 0
    waits: list[tuple[float, str, float]] = field(default_factory=list)
    loads: int = 0
    evictions: int = 0
    ahead_used: int = 0
    ahead_unused: int = 0
    unserved: int = 0
    stays: list[Stay] = field(default_factory=list)


class Shelf:
    """`next_look` says when something may be due that no event announces."""

    def __init__(
        self,
        models: Iterable[Model],
        load_seconds: Mapping[str, float],
        memory: int | None,
        decide: Decide,
        next_look: Callable[[Sequence[Model], float], float],
    ) -> None:
        self._models = {m.id.key: m for m in models}
        self._load_seconds = load_seconds
        self._decide = decide
        self._next_look = next_look
        self.upstream = Upstream(NAME, state=UpstreamState.UP, tier=Tier.V1, memory=memory, sees_loading=True)
        self._queues: dict[str, deque[Request]] = {key: deque() for key in self._models}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._now = 0.0
        self._looks_at = inf
        self._began: dict[str, tuple[float, float]] = {}
        self.outcome = Outcome()
        self._waiting = 0
        self._changed = True
        self._idles = any(m.policy.idle is not None for m in self._models.values())

    def run(self, requests: Iterable[Request]) -> Outcome:
        coming = iter(requests)
        self._list(*self._models)
        request = next(coming, None)
        self._now = request.second if request else 0.0
        while True:
            if request is not None and (not self._events or request.second <= self._events[0][0]):
                self._now = max(self._now, request.second)
                self._arrive(request)
                request = next(coming, None)
            elif self._events:
                at, _, happen = heapq.heappop(self._events)
                self._now = max(self._now, at)
                happen()
            else:
                break
            # As in the daemon: where nobody waits, requests to what is there lead to nothing but later idleness.
            if self._waiting or self._changed or self._idles:
                self._act()
        for key in list(self._began):
            self._went(key)
        self.outcome.unserved = sum(map(len, self._queues.values()))
        return self.outcome

    def _at(self, moment: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (moment, self._count, happen))

    # --- what happens ---------------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        key = request.model
        self.outcome.requests += 1
        model = self._models[key]
        if model.given:
            self._start(request)
        else:
            self._queues[key].append(request)
            self._waiting += 1
            self._see(WaitStarted(self._now, model.id))

    def _start(self, request: Request) -> None:
        self._see(RequestStarted(self._now, self._models[request.model].id))
        self._at(self._now + request.answer_seconds, lambda: self._end(request))

    def _end(self, request: Request) -> None:
        self._see(RequestEnded(self._now, self._models[request.model].id, True))

    def _loaded(self, key: str, began: float) -> None:
        if self._began.get(key, (None,))[0] != began:
            return  # it was given up
        model = self._models[key]
        seconds = self._load_seconds[key]
        self._began[key] = (self._began[key][0], self._now)
        self._changed = True
        self._see(LoadEnded(self._now, model.id, LoadOutcome.OK, seconds, instance_id=key))
        self._list(key)
        self._serve(key)

    def _serve(self, key: str) -> None:
        queue = self._queues[key]
        while queue:
            request = queue.popleft()
            self._waiting -= 1
            waited = self._now - request.second
            self.outcome.waits.append((request.second, key, waited))
            self._see(WaitEnded(self._now, self._models[key].id, waited, served=True))
            self._start(request)

    def _see(self, fact: ModelFact) -> None:
        key = fact.model.key
        before = self._models[key]
        after = self._models[key] = apply(before, fact)
        if before.ahead and not after.ahead:
            used = isinstance(fact, (WaitStarted, RequestStarted))
            self.outcome.ahead_used += used
            self.outcome.ahead_unused += not used

    def _list(self, *keys: str) -> None:
        """LM Studio is asked what it has; it matters only to these models."""
        entries = {
            key: Entry(
                key,
                size_bytes=m.size_bytes,
                instances=(Instance(key),) if key in self._began and self._began[key][1] < inf else (),
                loading=False,
            )
            for key, m in ((key, self._models[key]) for key in keys)
        }
        listed = Listed(self._now + 1e-6, NAME, self._now + 1e-7, Tier.V1, entries)
        for key in keys:
            self._models[key] = apply(self._models[key], listed)

    # --- what is done about it ------------------------------------------------------------------------

    def _act(self) -> None:
        self._changed = False
        for _ in range(ROUNDS):
            now = self._now
            upstream = replace(self.upstream, asked=inf, answered_at=now, due_at=inf)
            models = list(self._models.values())
            actions = [a for a in self._decide(upstream, models, now) if self._do(a)]
            if not actions:
                break
        else:
            raise AssertionError("the policy goes round in circles")
        look = self._next_look(list(self._models.values()), self._now)
        if look < self._looks_at or self._looks_at <= self._now:
            self._looks_at = look
            if look < inf:
                self._at(look, self._look)

    def _look(self) -> None:
        self._changed = True

    def _do(self, action: Action) -> bool:
        match action:
            case Load(model=ModelId(key=key) as model, ahead=ahead, claim=claim):
                self._see(LoadStarted(self._now, model, ahead, claim))
                # LM Studio tells how far it is, and so can be told to end it.
                self._see(LoadProgressed(self._now, model, 0.0))
                began = self._now
                self._began[key] = (began, inf)
                self.outcome.loads += 1
                self._at(began + self._load_seconds[key], lambda: self._loaded(key, began))
            case GiveUpLoad(model=ModelId(key=key) as model):
                began = self._began[key][0]
                self._see(LoadEnded(self._now, model, LoadOutcome.GIVEN_UP, self._now - began))
                self._went(key)
            case Unload(model=ModelId(key=key) as model, instance_id=target, cause=cause):
                self._see(UnloadStarted(self._now, model, target, cause))
                self._see(UnloadEnded(self._now, model, target))
                self._went(key)
                self.outcome.evictions += 1
            case Drain(model=model):
                self._see(DrainStarted(self._now, model))
            case EndDrain(model=model):
                self._see(DrainEnded(self._now, model))
                self._serve(model.key)
            case _:
                return False
        return True

    def _went(self, key: str) -> None:
        began, loaded = self._began.pop(key)
        self.outcome.stays.append(Stay(key, began, min(loaded, self._now), self._now))
