"""Ours, and the policies that it is compared with; and what each came to.

ours          the daemon's
lru           the same without loading ahead
auto-evict    as LM Studio does it by itself: one model at a time, loaded on demand (but no answer is cut off)
clairvoyant   as ours, but it knows who will be asked for: what is wanted last goes first, what is wanted first is
              loaded ahead. Nobody can be that good; it says how much there is to gain
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from keepalive.core.actions import Action, Load
from keepalive.core.facts import ModelId
from keepalive.core.plan import plan
from keepalive.core.records import Model, Policy, Upstream
from keepalive.core.room import SETTLE
from keepalive.replay.shelf import NAME, Decide, Outcome, Shelf
from keepalive.replay.trace import Card, Request

POLICIES = ("ours", "lru", "auto-evict", "clairvoyant")


@dataclass(frozen=True, slots=True)
class Report:
    """What a policy came to; `left_out` are models of the trace that do not fit at all, or that nobody described."""

    policy: str
    hours_waited: float
    waited_share: float
    p95_seconds: float
    p99_seconds: float
    worst_seconds: float
    loads: int
    evictions: int
    ahead_used: int
    ahead_unused: int
    left_out: tuple[str, ...] = ()
    outcome: Outcome = field(default_factory=Outcome, repr=False)


def replay(
    policy: str,
    requests: Sequence[Request],
    cards: Iterable[Card],
    memory: int | None,
    kept: Mapping[str, Policy] | None = None,
) -> Report:
    """`memory` in bytes; None: one model at a time. `kept` says how a model is kept, where not by the defaults."""
    known = {card.model: card for card in cards}
    fits = {key for key, card in known.items() if memory is None or card.bytes <= memory}
    models = [
        Model(
            ModelId(NAME, key),
            rank=rank,
            policy=replace((kept or {}).get(key, Policy(auto=True)), memory=known[key].bytes, pinged=False),
        )
        for rank, key in enumerate(key for key in known if key in fits)
    ]
    told = sorted((r for r in requests if r.model in fits), key=lambda r: r.second)
    decide: Decide = plan
    if policy == "lru":
        decide = _not_ahead
    elif policy == "auto-evict":
        decide, memory = _not_ahead, None
        models = [replace(m, policy=replace(m.policy, auto=True, idle=None)) for m in models]
    elif policy == "clairvoyant":
        decide = _Clairvoyant(told)
    loads = {key: known[key].load_seconds for key in fits}
    outcome = Shelf(models, loads, memory, decide, next_look).run(told)
    left_out = tuple(sorted({r.model for r in requests} - fits))
    return _report(policy, outcome, left_out)


def _report(policy: str, outcome: Outcome, left_out: tuple[str, ...]) -> Report:
    waits = sorted(seconds for _, _, seconds in outcome.waits)
    count = max(1, outcome.requests)

    def percentile(share: float) -> float:
        """Of all requests, those that did not wait included."""
        place = int(share * count) - (count - len(waits))
        return waits[min(place, len(waits) - 1)] if place >= 0 and waits else 0.0

    return Report(
        policy,
        sum(waits) / 3600,
        len(waits) / count,
        percentile(0.95),
        percentile(0.99),
        waits[-1] if waits else 0.0,
        outcome.loads,
        outcome.evictions,
        outcome.ahead_used,
        outcome.ahead_unused,
        left_out,
        outcome,
    )


def next_look(models: Sequence[Model], now: float) -> float:
    """When time alone may change what is to be done."""
    waiting = [m for m in models if m.waiting and not m.given]
    times = [m.use_at + SETTLE for m in models if waiting and m.instances and not m.in_flight]
    times += [m.waiting_since + m.policy.patience for m in waiting if m.waiting_since is not None]
    times += [
        max(m.unused_since + m.policy.idle, m.use_at + SETTLE)
        for m in models
        if m.policy.idle is not None and m.instances and not m.in_flight
    ]
    return min((at for at in times if at > now), default=inf)


def _not_ahead(upstream: Upstream, models: Sequence[Model], now: float) -> list[Action]:
    return [a for a in plan(upstream, models, now) if not (isinstance(a, Load) and a.ahead)]


class _Clairvoyant:
    """The core is told of the future as if it had been the past: what is wanted last was used longest ago."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._times: dict[str, list[float]] = {}
        for request in requests:
            self._times.setdefault(request.model, []).append(request.second)

    def __call__(self, upstream: Upstream, models: Sequence[Model], now: float) -> Iterable[Action]:
        return plan(upstream, [self._foreseen(m, now) for m in models], now)

    def _foreseen(self, model: Model, now: float) -> Model:
        times = self._times.get(model.id.key, [])
        place = bisect_right(times, now)
        ahead = times[place] - now if place < len(times) else inf
        wish = 0.0 if ahead == inf else 1e9 / max(ahead, 1.0)
        return replace(model, use_at=-ahead, asks=wish, asks_at=now)
