"""A model that was there is missing, and we did not unload it: why, and what it costs."""

from dataclasses import replace

from keepalive.core.facts import Listed, Tier
from keepalive.core.moves import STABLE, backoff
from keepalive.core.records import Cause, Eviction, Model
from keepalive.core.states import State

# LM Studio's idle timers are set in minutes: what went sooner after its last use was not on one.
IDLE_MIN = 60.0


def why_missing(model: Model, fact: Listed, *, told: bool) -> Cause:
    """Why `model`, which was there, is missing in this listing.

    What we load by a call has no idle timer, and no load on demand pushes it out.
    """
    if not model.instances:
        return Cause.UNKNOWN
    if model.suspected is not None:
        return model.suspected
    explicit = fact.tier is Tier.V1 and all(i.id in model.ours for i in model.instances)
    if explicit:
        # Of several none is left: LM Studio may have been restarted between two listings.
        emptied = len(model.beside) > 1 and not model.beside & fact.resident
        return Cause.UNKNOWN if emptied else Cause.BY_HAND
    if (fact.resident | fact.arriving) - model.beside:
        return Cause.DISPLACED
    idle, ours = _idle(model, fact.at), bool(model.ours)
    if idle > model.survived and idle >= (model.policy.lease if ours else IDLE_MIN):
        return Cause.TIMER
    # Whatever lease it got, that was too short for a timer; and what might have displaced it would show.
    too_short = idle <= max(model.survived, IDLE_MIN if ours else 0.0)
    return Cause.BY_HAND if too_short and told else Cause.UNKNOWN


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
