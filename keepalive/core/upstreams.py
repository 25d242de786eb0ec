"""What happened, folded into the record of an upstream."""

from math import inf

from keepalive.core.changed import replace
from keepalive.core.facts import (
    ClockJumped,
    DrainEnded,
    Fact,
    HandLost,
    HandTaken,
    HolderTold,
    InstanceLost,
    Listed,
    ListingFailed,
    ListingStarted,
    LoadEnded,
    LoadForgone,
    LoadOutcome,
    LoadRemembered,
    LoadResolved,
    LoadStarted,
    ModelsChanged,
    PingEnded,
    PingOutcome,
    Sdk,
    Tier,
    Trouble,
    UnloadEnded,
    UsedElsewhere,
    WaitStarted,
    WarmAsked,
)
from keepalive.core.moves import TOKEN_RETRY
from keepalive.core.records import Upstream, UpstreamState

DOWN_AFTER_TIMEOUTS = 3
# The longest from one try to the next at a server that cannot be asked, whatever its pace is otherwise. A refused
# connection costs neither side anything, and the sooner its return is seen, the sooner its models load; one that
# runs into a time-out holds a socket for seconds, and one that answers oddly may write each try into its log.
TRIED_AGAIN = {
    Trouble.REFUSED: 1.5,  # planned each second, that makes every two
    Trouble.LOADING: 1.5,
    Trouble.UNREACHABLE: 15.0,
    Trouble.TIMEOUT: 15.0,
    Trouble.BAD_ANSWER: 15.0,
    Trouble.UNAUTHORIZED: TOKEN_RETRY,
}
# A time-out may be a question, too: `plan` knows what LM Studio's socket says of that model.
UNQUESTIONED = (PingOutcome.OK, PingOutcome.REFUSED, PingOutcome.SKIPPED, PingOutcome.TIMEOUT)
# Whoever starts to wait has it tried at once; a thousand of them are no thousand tries.
TRIED_LEAST = 2.0


def apply_upstream(upstream: Upstream, fact: Fact) -> Upstream:
    """The record of `upstream` after `fact`, be it about the upstream or about one of its models."""
    match fact:
        case ListingStarted():
            return replace(upstream, listing=True, tried_at=fact.at)
        case Listed():
            return _upstream_listed(upstream, fact)
        case ListingFailed():
            return _upstream_failed(upstream, fact)
        case ClockJumped():
            # Whatever we knew is as old as the machine slept: look before anything else is decided.
            return replace(upstream, answered_at=-inf, due_at=-inf, silent_since=None)
        case HandTaken():
            return replace(upstream, acts=True, answered_at=-inf, due_at=-inf)
        case HandLost():
            # What nobody here may ping any more is warm by being listed, and somebody may be waiting for that.
            return replace(upstream, acts=False, due_at=min(upstream.due_at, fact.at))
        case LoadForgone() | LoadResolved() | HolderTold() | LoadRemembered():
            return replace(upstream, due_at=min(upstream.due_at, fact.at))
        case UsedElsewhere() if fact.ours:
            return replace(upstream, due_at=min(upstream.due_at, fact.at))
        case DrainEnded() if fact.unsure:
            return replace(upstream, due_at=min(upstream.due_at, fact.at))
        case LoadEnded():
            trial = upstream.on_trial if fact.outcome is LoadOutcome.OK else frozenset[str]()
            return replace(upstream, due_at=-inf, on_trial=trial, trial_over_at=fact.at)
        case LoadStarted():
            on_demand = upstream.tier is Tier.V0 and upstream.auto_evict is None
            trial = upstream.resident if on_demand else frozenset[str]()
            return replace(upstream, on_trial=trial, trial_over_at=None)
        case PingEnded(outcome=outcome) if outcome not in UNQUESTIONED:
            return replace(upstream, due_at=min(upstream.due_at, fact.at))
        case UnloadEnded() | InstanceLost() | ModelsChanged():
            return replace(upstream, due_at=min(upstream.due_at, fact.at))
        case WarmAsked():
            return replace(upstream, due_at=-inf)
        case WaitStarted() if upstream.failures:
            soon = max(fact.at, upstream.tried_at + TRIED_LEAST)
            return replace(upstream, due_at=min(upstream.due_at, soon))
        case _:
            return upstream


def _upstream_listed(upstream: Upstream, fact: Listed) -> Upstream:
    if fact.asked <= upstream.asked:
        return replace(upstream, listing=False)
    evicts, trial = upstream.evicts, upstream.on_trial
    if trial and upstream.trial_over_at is not None and fact.asked > upstream.trial_over_at:
        # We loaded one on demand beside others: either they are still there, or it pushed them out.
        evicts, trial = not trial <= fact.resident, frozenset()
    return replace(
        upstream,
        listing=False,
        state=UpstreamState.UP,
        since=fact.at if upstream.state is not UpstreamState.UP else upstream.since,
        tier=fact.tier,
        error=fact.odd.why if fact.odd is not None else None,
        failures=0,
        silent_since=None,
        asked=fact.asked,
        answered_at=fact.at,
        due_at=fact.at + upstream.refresh_interval,
        resident=fact.resident,
        arriving=fact.arriving,
        occupants=fact.occupants,
        places=fact.places,
        unread=frozenset(fact.odd.keys if fact.odd is not None else ()),
        sees_loading=fact.loading,
        sight=fact.sight,
        evicts=evicts if fact.tier is Tier.V0 else None,
        on_trial=trial,
    )


def _upstream_failed(upstream: Upstream, fact: ListingFailed) -> Upstream:
    failures = upstream.failures + 1
    state, wait = UpstreamState.DOWN, _tried_again(fact.trouble, failures)
    if fact.trouble is Trouble.UNAUTHORIZED:
        state = UpstreamState.UNAUTHORIZED
    elif fact.trouble is Trouble.LOADING:
        state = UpstreamState.UP  # it answers; what it says is that its models do not yet
    elif fact.trouble is Trouble.TIMEOUT and upstream.state is UpstreamState.UP:
        # A busy server answers late. One late answer is no outage.
        state = UpstreamState.DOWN if failures >= DOWN_AFTER_TIMEOUTS else UpstreamState.UP
    silent_since = None
    if fact.trouble in (Trouble.TIMEOUT, Trouble.UNREACHABLE):
        silent_since = fact.asked if upstream.silent_since is None else upstream.silent_since
    sdk = upstream.sight.sdk
    if fact.trouble in (Trouble.REFUSED, Trouble.UNREACHABLE) and sdk is Sdk.UP:
        sdk = Sdk.ABSENT
    return replace(
        upstream,
        listing=False,
        state=state,
        since=fact.at if state is not upstream.state else upstream.since,
        error=fact.message,
        failures=failures,
        silent_since=silent_since,
        sight=replace(upstream.sight, sdk=sdk),
        answered_at=-inf,
        # From try to try: a time-out of its own does not make them rarer.
        due_at=max(fact.asked + wait, fact.at + min(wait, TRIED_LEAST)),
        evicts=None if fact.trouble is Trouble.REFUSED else upstream.evicts,
        on_trial=frozenset(),
    )


def _tried_again(trouble: Trouble, failures: int) -> float:
    """Seconds from one try to the next, after so many failures in a row.

    One answer is lost now and then, to a cable or a busy moment, and nothing is loaded or pinged before the next: so
    that one is asked for soon. A token does not become right so soon.
    """
    most = TRIED_AGAIN[trouble]
    return most if trouble is Trouble.UNAUTHORIZED else min(most, TRIED_LEAST * 2.0 ** min(failures - 1, 16))
