"""A model that was there is missing, and we did not unload it: why, and what it costs."""

from math import inf

from keepalive.core.changed import replace
from keepalive.core.facts import Listed, Sdk, Tier, fold_key
from keepalive.core.moves import STABLE, backoff
from keepalive.core.records import Cause, Eviction, Model
from keepalive.core.states import State

# LM Studio's idle timers are set in minutes: what went sooner after its last use was not on one.
IDLE_MIN = 60.0
# LM Studio's clock is known to the second.
TIMER_LATE = 2.0


def why_missing(model: Model, fact: Listed, *, told: bool) -> Cause:
    """Why `model`, which was there, is missing in this listing.

    What we load by a call has no idle timer, and no load on demand pushes it out.
    """
    if not model.instances:
        return Cause.UNKNOWN
    if model.suspected is not None:
        return model.suspected
    emptied, several = not model.beside & fact.resident, len(model.beside) > 1
    watched = model.seen_by.session != 0 and fact.sight.sdk is not Sdk.OFF
    lost = watched and model.seen_by.session != fact.sight.session
    if emptied and (fact.sight.hung_up > model.seen_by.hung_up or (several and lost)):
        return Cause.RESTART  # the socket went with them
    # Of several none is left: LM Studio may have been restarted between two listings. Not where the socket outlived it.
    otherwise = Cause.UNKNOWN if emptied and several and not watched else Cause.BY_HAND
    if fact.tier is Tier.LLAMA:
        return _by_the_router(model, fact, otherwise)
    if model.ttl is not None:
        return _by_its_timer(model, fact, model.ttl, otherwise)
    if fact.tier is Tier.V1 and all(i.id in model.ours for i in model.instances):
        return otherwise
    if (fact.resident | fact.arriving) - model.beside:
        return Cause.DISPLACED
    idle, ours = _idle(model, fact.at), bool(model.ours)
    if idle > model.survived and idle >= (model.policy.lease if ours else IDLE_MIN):
        return Cause.TIMER
    # Whatever lease it got, that was too short for a timer; and what might have displaced it would show.
    too_short = idle <= max(model.survived, IDLE_MIN if ours else 0.0)
    return Cause.BY_HAND if too_short and told else Cause.UNKNOWN


def _by_its_timer(model: Model, fact: Listed, ttl: float, otherwise: Cause) -> Cause:
    """Where LM Studio tells what its idle timer is; without one no load on demand pushes it out."""
    if _idle(model, fact.at) >= ttl - TIMER_LATE:
        return Cause.TIMER
    came = (fact.resident | fact.arriving) - model.beside
    return Cause.DISPLACED if came and ttl != inf else otherwise


def _by_the_router(model: Model, fact: Listed, otherwise: Cause) -> Cause:
    """llama-server says what sleeps and what ended by itself; beyond its number a load pushes out the idlest."""
    entry = fact.entries.get(fold_key(model.id.key))
    if entry is not None and entry.asleep:
        return Cause.TIMER
    if entry is not None and entry.exit_code:
        return Cause.CRASH
    there = fact.resident | fact.arriving
    full = fact.places is not None and len(there) >= fact.places
    return Cause.DISPLACED if full and there - model.beside else otherwise


def count_eviction(model: Model, at: float, cause: Cause) -> Model:
    """Count an eviction, when it had an instance and we did not unload it."""
    if not model.instances:
        return model
    model = replace(
        model,
        evictions=model.evictions + 1,
        last_eviction=Eviction(at, cause, _idle(model, at)),
        instances=(),
        ours=frozenset(),
        busy=False,
        suspected=None,
    )
    # Held until now, or until a request was told that it is gone.
    held_until = at if model.state is State.WARM else model.since
    stable = model.warm_since is not None and held_until - model.warm_since >= STABLE
    failures = 0 if stable else model.failures + 1
    # The first loss is mended at once; when it does not hold, somebody is fighting us for the memory.
    retry_at = at + backoff(failures - 1) if failures > 1 else None
    failure = f"it went missing {failures} times in a row without holding {STABLE:.0f} s"
    return replace(model, failures=failures, failure=failure, retry_at=retry_at, warm_since=None)


def _idle(model: Model, at: float) -> float:
    return 0.0 if model.in_flight or model.pinging else max(0.0, at - model.used_at)
