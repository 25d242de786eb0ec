"""What is worth a message, and when. Pure: time is an argument.

Trouble is told once it has lasted (`after`): what mends itself sooner is nobody's business at three in the morning.
That it is over is told once that has lasted as long, and only to who was told of the trouble. The same kind of news
of the same model or upstream comes again after a `pause` at the earliest; what happened meanwhile is in it. What is
due at the same time is one message of each kind.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from keepalive.core.facts import Fact, Listed, ModelId
from keepalive.core.records import Cause, Model, Upstream, UpstreamState
from keepalive.core.states import State

# An LM Studio that goes takes all its models along, seen one after the other: that is one message.
GATHER = 5.0
NAMED = 10  # as many in one message by name


class Event(StrEnum):
    """The kinds of news, as the config names them."""

    FAILING = "failing"
    RECOVERED = "recovered"
    EVICTED = "evicted"
    UPSTREAM_DOWN = "upstream_down"


@dataclass(frozen=True, slots=True)
class Message:
    event: Event
    title: str
    body: str


@dataclass(slots=True)
class _Watch:
    """One model or upstream: what is wrong with it, since when it is as it is, and what was told of it."""

    name: str
    event: Event  # of its trouble
    wrong: str | None = None
    since: float = inf
    told: bool = False  # of trouble, and not yet of its end
    told_at: float = -inf

    def look(self, wrong: str | None, now: float) -> None:
        if (wrong is None) is not (self.wrong is None) or self.since == inf:
            self.since = now
        self.wrong = wrong


@dataclass(slots=True)
class _Evictions:
    """Those of one model that nobody was told of."""

    count: int = 0
    why: str = ""
    since: float = inf
    told_at: float = -inf


@dataclass(slots=True)
class News:
    """Of all that is configured: `observe` each fact, then ask what is `due`."""

    events: Collection[Event] = ()
    after: float = 60.0
    pause: float = 900.0
    _urls: Mapping[str, str] = field(default_factory=dict)
    _models: Collection[ModelId] = ()
    _watches: dict[ModelId | str, _Watch] = field(default_factory=dict)
    _evictions: dict[ModelId, _Evictions] = field(default_factory=dict)

    def configure(
        self,
        events: Collection[Event],
        models: Collection[ModelId],
        urls: Mapping[str, str],
        *,
        after: float,
        pause: float,
    ) -> None:
        """From now on; what is no longer configured is forgotten."""
        self.events, self.after, self.pause = events, after, pause
        self._urls, self._models = urls, frozenset(models)
        for known in [known for known in self._watches if known not in self._models and known not in urls]:
            del self._watches[known]
        for model in self._evictions.keys() - self._models:
            del self._evictions[model]

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(after, Upstream):
            self._see_upstream(fact.at, after)
        elif isinstance(before, Model):
            self._see_model(fact.at, after)
            if after.evictions > before.evictions and after.last_eviction is not None:
                self._see_eviction(fact, before, after, after.last_eviction.cause)

    def _see_upstream(self, now: float, upstream: Upstream) -> None:
        if upstream.state is UpstreamState.UNKNOWN or upstream.name not in self._urls:
            return
        watch = self._watches.setdefault(
            upstream.name, _Watch(f"LM Studio {upstream.name!r}", Event.UPSTREAM_DOWN)
        )
        well = upstream.state is UpstreamState.UP
        watch.look(None if well else upstream.error or f"it is {upstream.state}", now)

    def _see_model(self, now: float, model: Model) -> None:
        if model.id not in self._models:
            return
        watch = self._watches.get(model.id)
        if watch is None:
            watch = self._watches[model.id] = _Watch(self._called(model.id), Event.FAILING)
        auto = model.policy.auto  # kept on demand: nobody minds that it is cold
        if not (model.wanted or auto):
            watch.look(None, now)
            watch.told = False  # who released it knows
        elif model.state is State.WARM or (auto and model.state is State.COLD):
            watch.look(None, now)
        elif model.state is State.BACKOFF:
            watch.look(model.reason or model.failure or "it cannot be loaded", now)
        # Loading is neither yet, and whoever cannot ask knows nothing: the upstream's own trouble tells that.

    def _see_eviction(self, fact: Fact, before: Model, after: Model, cause: Cause) -> None:
        if after.id not in self._models or not after.wanted:
            return
        lost = self._evictions.setdefault(after.id, _Evictions())
        lost.since = fact.at if lost.count == 0 else lost.since
        lost.count += 1
        lost.why = _why(cause, fact, before)

    def _called(self, model: ModelId) -> str:
        return f"{model.key} on {model.upstream}" if len(self._urls) > 1 else model.key

    # --- what is due ----------------------------------------------------------------------------------

    def due(self, now: float) -> list[Message]:
        """What is to be told now; told once."""
        found: dict[Event, list[str]] = {event: [] for event in Event}
        names: dict[Event, list[str]] = {event: [] for event in Event}
        for event, name, line in [*self._trouble(now), *self._thrown_out(now)]:
            if event in self.events:
                names[event].append(name)
                found[event].append(line)
        return [_message(event, names[event], found[event]) for event in Event if found[event]]

    def _trouble(self, now: float) -> Iterator[tuple[Event, str, str]]:
        for watch in self._watches.values():
            if now - watch.since < self.after or watch.event not in self.events:
                continue
            if watch.wrong is not None and not watch.told and now - watch.told_at >= self.pause:
                watch.told, watch.told_at = True, now
                yield watch.event, watch.name, f"{watch.name}: {watch.wrong}."
            elif watch.wrong is None and watch.told:
                watch.told = False
                yield Event.RECOVERED, watch.name, f"{watch.name} is well again."

    def _thrown_out(self, now: float) -> Iterator[tuple[Event, str, str]]:
        for model, lost in self._evictions.items():
            if not lost.count or now - lost.since < GATHER or now - lost.told_at < self.pause:
                continue
            name, times = self._called(model), f", {lost.count} times" if lost.count > 1 else ""
            yield Event.EVICTED, name, f"{name} was thrown out{times}: {lost.why}."
            lost.count, lost.told_at = 0, now


def _message(event: Event, names: list[str], lines: list[str]) -> Message:
    who = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    titles = {
        Event.FAILING: f"{who}: cannot be kept loaded",
        Event.RECOVERED: f"{who}: well again",
        Event.EVICTED: f"{who}: thrown out of memory",
        Event.UPSTREAM_DOWN: f"{who}: does not serve models",
    }
    advice = {
        Event.FAILING: "keepalive tries again by itself. What to do: keepalive doctor; why: keepalive status.",
        Event.RECOVERED: "",
        Event.EVICTED: "keepalive loads it again by itself. Whether it is back: keepalive status.",
        Event.UPSTREAM_DOWN: "keepalive goes on asking. Start its server (lms server start), or: keepalive doctor.",
    }
    more = [f"… and {len(lines) - NAMED} more."] if len(lines) > NAMED else []
    body = "\n".join([*lines[:NAMED], *more, advice[event]]).strip()
    return Message(event, titles[event], body)


def _why(cause: Cause, fact: Fact, before: Model) -> str:
    """By whom, and what against it."""
    if cause is Cause.DISPLACED and isinstance(fact, Listed):
        newcomers = sorted((fact.resident | fact.arriving) - before.beside)
        who = ", ".join(newcomers[:3]) or "another model"
        return f"{who} was loaded in its place; keep that one here, too, or have nobody ask LM Studio past keepalive"
    return {
        Cause.TIMER: "LM Studio's idle timer ran out; ping_interval has to be shorter than that",
        Cause.DISPLACED: "another model was loaded in its place",
        Cause.CRASH: "it crashed; LM Studio says why (lms log stream)",
        Cause.RESTART: "LM Studio was restarted",
        Cause.BY_HAND: "somebody unloaded it, by hand or by another program",
        Cause.UNKNOWN: "nothing was seen that explains it",
    }[cause]
