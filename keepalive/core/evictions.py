"""A model that was there is missing, and we did not unload it: why, and what it costs."""

from math import inf

from keepalive.core.changed import replace
from keepalive.core.facts import Listed, Sdk, Tier, UnloadCause, fold_key
from keepalive.core.moves import STABLE, backoff, crashes_beside, fails_again
from keepalive.core.records import Cause, Eviction, Model
from keepalive.core.states import State

# LM Studio's idle timers are set in minutes: what went sooner after its last use was not on one.
IDLE_MIN = 60.0
# LM Studio's clock is known to the second.
TIMER_LATE = 2.0


def why_missing(model: Model, fact: Listed, *, told: bool) -> Cause | None:
    """Why `model`, which was there, is missing in this listing; None where a load of ours was to push it out.

    What we load by a call has no idle timer, and no load on demand pushes it out.
    """
    if not model.instances:
        return Cause.UNKNOWN
    cut_off = model.suspected is Cause.UNKNOWN
    if model.suspected is not None and not cut_off:
        return model.suspected
    if model.draining and fact.tier is Tier.V0:
        return None  # there nothing else is drained for
    emptied, idle = not model.beside & fact.resident, _idle(model, fact.at)
    otherwise = _otherwise(model, fact, emptied=emptied, cut_off=cut_off)
    if otherwise is Cause.RESTART and not cut_off:
        return otherwise  # the socket went with them
    if fact.tier is Tier.LLAMA:
        return _by_the_router(model, fact, otherwise)
    came = (fact.resident | fact.arriving) - model.beside
    if model.ttl is not None:
        # LM Studio tells what its idle timer is; without one no load on demand pushes it out.
        if idle >= model.ttl - TIMER_LATE:
            return Cause.TIMER
        return Cause.DISPLACED if came and model.ttl != inf else otherwise
    if fact.tier is Tier.V1 and all(i.id in model.ours for i in model.instances):
        return otherwise
    if came:
        return Cause.DISPLACED
    ours = bool(model.ours)
    if idle > model.survived and idle >= (model.policy.lease if ours else IDLE_MIN):
        # Whatever was cut off from us may as well have been restarted.
        return Cause.UNKNOWN if otherwise is Cause.RESTART else Cause.TIMER
    # Whatever lease it got, that was too short for a timer; and what might have displaced it would show.
    too_short = idle <= max(model.survived, IDLE_MIN if ours else 0.0)
    if otherwise is Cause.RESTART:
        return otherwise if too_short or idle < IDLE_MIN else Cause.UNKNOWN
    return Cause.BY_HAND if too_short and told else Cause.UNKNOWN


def _otherwise(model: Model, fact: Listed, *, emptied: bool, cut_off: bool) -> Cause:
    """Why it is missing, where neither an idle timer nor another model took it."""
    if not emptied:
        return Cause.BY_HAND  # a restart would have taken the others, too
    watched = model.seen_by.session != 0 and fact.sight.sdk is not Sdk.OFF
    lost = watched and model.seen_by.session != fact.sight.session
    several = len(model.beside) > 1
    if cut_off:
        outlived = watched and not lost and not fact.sight.late
        return Cause.BY_HAND if outlived else Cause.RESTART
    if fact.sight.hung_up > model.seen_by.hung_up or (several and lost):
        return Cause.RESTART
    # Of several none is left: LM Studio may have been restarted between two listings. Not where the socket outlived it.
    return Cause.UNKNOWN if several and (not watched or fact.sight.late) else Cause.BY_HAND


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


def count_eviction(model: Model, at: float, cause: Cause | None) -> Model:
    """Count an eviction, when it had an instance and we did not unload it; None: we did, by another's load."""
    if not model.instances:
        return model
    if cause is None:
        return replace(
            model,
            made_way=model.made_way + 1,
            letting_go=UnloadCause.ROOM,
            instances=(),
            ours=frozenset(),
            busy=False,
            draining=False,
            warm_since=None,
        )
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
    if stable:
        model = replace(model, failures=0, taken=0)
    elif cause is Cause.CRASH:
        model = crashes_beside(fails_again(model), at)
    else:
        model = replace(model, failures=model.failures + 1, taken=model.taken + 1)
    failures = model.failures
    # The first loss is mended at once; when it does not hold, somebody is fighting us for the memory.
    retry_at = at + backoff(failures - 1) if failures > 1 else None
    failure = f"it went missing {failures} times in a row without holding {STABLE:.0f} s"
    contested = cause is not Cause.CRASH
    return replace(model, failure=failure, retry_at=retry_at, warm_since=None, contested=contested)


def _idle(model: Model, at: float) -> float:
    return 0.0 if model.in_flight or model.pinging else max(0.0, at - model.used_at)
