"""What happened, folded into the record of a model: which change each kind of fact makes.

The world may surprise us and never raises; a move of our own that the table does not know is a bug and does.
"""

from collections.abc import Callable, Mapping
from math import inf

from keepalive.core import calls, listings, primes
from keepalive.core.changed import replace
from keepalive.core.demand import demand, faded
from keepalive.core.errors import Reason
from keepalive.core.facts import (
    ClockJumped,
    DemandRecalled,
    DrainEnded,
    DrainStarted,
    Fact,
    HandLost,
    HandTaken,
    HolderTold,
    InstanceLost,
    Listed,
    ListingFailed,
    LoadEnded,
    LoadForgone,
    LoadGivenUp,
    LoadProgressed,
    LoadRemembered,
    LoadResolved,
    LoadsRecalled,
    LoadStarted,
    OpeningRead,
    OpeningsLearned,
    OthersHeard,
    OursRecalled,
    PingEnded,
    PingStarted,
    PrimedAnswered,
    PrimeEnded,
    PrimeStarted,
    ReleaseAsked,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    UnloadEnded,
    UnloadStarted,
    UsedElsewhere,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
    WishSpent,
)
from keepalive.core.moves import move, proved
from keepalive.core.records import LOADS_REMEMBERED, Cause, Model
from keepalive.core.states import Sign, State


def apply(model: Model, fact: Fact) -> Model:
    """The record of `model` after `fact`. Total: every state meets every fact."""
    change = CHANGES.get(type(fact))
    return change(model, fact) if change else model


def _window(model: Model, at: float, *, is_open: bool) -> Model:
    if is_open and not model.window_open and model.policy.auto:
        # A window says when it will be asked for: that counts as if somebody had just done so.
        model = replace(model, use_at=at, asks=demand(model, at) + 1.0, asks_at=at)
    return replace(model, windowed=True, window_open=is_open, asked_for=None)


def _warm_asked(model: Model, at: float) -> Model:
    # A person asks: he may know that what held us off is mended.
    due = None if model.ping_at is None else -inf
    model = replace(model, asked_for=True, retry_at=None, failures=0, taken=0, ping_at=due)
    if not model.policy.auto:
        return model
    # Once it is here it stays as long as there is room.
    return replace(model, asked_for=None if model.state is State.WARM else True, use_at=at)


def _wait_started(model: Model, fact: WaitStarted) -> Model:
    since = fact.at if model.waiting_since is None else model.waiting_since
    return replace(model, waiting=model.waiting + 1, waiting_since=since, use_at=fact.at, ahead=False)


def _wait_ended(model: Model, fact: WaitEnded) -> Model:
    waiting = max(0, model.waiting - 1)
    return replace(
        model,
        waiting=waiting,
        waiting_since=model.waiting_since if waiting or model.callers_elsewhere else None,
        use_at=fact.at if fact.served else model.use_at,
    )


def _used_elsewhere(model: Model, fact: UsedElsewhere) -> Model:
    since = fact.at if model.waiting_since is None else model.waiting_since
    busy = fact.used or fact.waiting > 0 or model.used_elsewhere or model.callers_elsewhere > 0
    return replace(
        model,
        vouched=fact.ours,
        callers_elsewhere=fact.waiting,
        used_elsewhere=fact.used,
        waiting_since=since if fact.waiting or model.waiting else None,
        elsewhere_at=fact.at if busy else model.elsewhere_at,
        ahead=model.ahead and not busy,
    )


def _request_started(model: Model, fact: RequestStarted) -> Model:
    return replace(
        model,
        in_flight=model.in_flight + 1,
        use_at=fact.at,
        ahead=False,
        asks=demand(model, fact.at) + 1.0,
        asks_at=fact.at,
    )


def _demand_recalled(model: Model, fact: DemandRecalled) -> Model:
    last = min((ago for ago, _ in fact.asked), default=inf)
    asks = demand(model, fact.at) + faded(fact.asked)
    return replace(model, asks=asks, asks_at=fact.at, use_at=max(model.use_at, fact.at - last))


def _request_ended(model: Model, fact: RequestEnded) -> Model:
    model = replace(model, in_flight=max(0, model.in_flight - 1), used_at=fact.at, use_at=fact.at)
    return _answered(model, fact.at) if fact.answered else model


def _requests_counted(model: Model, fact: RequestsCounted) -> Model:
    if fact.answered_at is not None:
        model = _answered(model, fact.answered_at)
    if fact.started:
        model = replace(model, ahead=False, asks=demand(model, fact.at) + fact.started, asks_at=fact.at)
    return replace(
        model,
        in_flight=max(0, model.in_flight + fact.started - fact.ended),
        used_at=model.used_at if fact.ended_at is None else fact.ended_at,
        use_at=fact.at,
    )


def _answered(model: Model, at: float) -> Model:
    model = replace(model, active_at=at)
    if model.calling:
        return model
    # The due time stays, so that the ping that this request makes needless is seen and counted as skipped.
    return replace(proved(model, at), ping_at=model.ping_at)


def _instance_lost(model: Model, fact: InstanceLost) -> Model:
    # It was a call as well as one of ours: no listing from before it may lead to a ping, which would load it.
    model = replace(model, touched_at=fact.at, contested=False)
    if fact.why is Reason.CRASHED:
        # Where no ping will find it out, the user's word has to do.
        model = replace(model, suspected=Cause.CRASH, crashed=model.crashed or not model.policy.pinged)
    if model.state is not State.WARM:
        return model
    return move(replace(model, ping_at=fact.at), Sign.DISPROVED, fact.at, fact.message)


CHANGES: Mapping[type[Fact], Callable[..., Model]] = {
    Listed: listings.listed,
    ListingFailed: listings.listing_failed,
    # An answer to a question from before the jump may be as old as the machine slept.
    # LM Studio's idle timers go by the wall clock.
    ClockJumped: lambda model, fact: replace(
        model, touched_at=fact.at, used_at=model.used_at - max(0.0, fact.seconds)
    ),
    LoadStarted: calls.load_started,
    LoadProgressed: calls.load_progressed,
    LoadGivenUp: lambda model, _: replace(model, giving_up=model.load_started is not None),
    LoadEnded: calls.load_ended,
    LoadRemembered: calls.load_remembered,
    LoadForgone: calls.load_forgone,
    LoadResolved: calls.load_resolved,
    HolderTold: calls.holder_told,
    UsedElsewhere: _used_elsewhere,
    # Another may have acted here until now: no listing from before counts for what we do.
    HandTaken: lambda model, fact: replace(
        model, touched_at=fact.at, ill=None, alone=False, proved_elsewhere=False
    ),
    # We meant to let it go: whether the other one does, only he can say.
    HandLost: lambda model, _: replace(model, draining=False),
    OthersHeard: lambda model, _: replace(model, alone=model.alone and model.load_started is not None),
    OursRecalled: lambda model, fact: replace(model, recalled=(fact.instance_ids, fact.until)),
    LoadsRecalled: lambda model, fact: replace(
        model, recent_loads=(*fact.seconds, *model.recent_loads)[-LOADS_REMEMBERED:]
    ),
    DemandRecalled: _demand_recalled,
    PingStarted: calls.ping_started,
    PingEnded: calls.ping_ended,
    OpeningsLearned: primes.learned,
    OpeningRead: primes.read,
    PrimeStarted: primes.started,
    PrimeEnded: primes.ended,
    PrimedAnswered: primes.answered,
    UnloadStarted: calls.unload_started,
    UnloadEnded: calls.unload_ended,
    WindowOpened: lambda model, fact: _window(model, fact.at, is_open=True),
    WindowClosed: lambda model, fact: _window(model, fact.at, is_open=False),
    WarmAsked: lambda model, fact: replace(_warm_asked(model, fact.at), alone=model.alone or fact.alone),
    ReleaseAsked: lambda model, _: replace(model, asked_for=False, alone=False),
    WishSpent: lambda model, _: replace(model, asked_for=None),
    DrainStarted: lambda model, _: replace(model, draining=True),
    DrainEnded: lambda model, fact: replace(
        model, draining=False, unsure_since=fact.at if fact.unsure else model.unsure_since
    ),
    WaitStarted: _wait_started,
    WaitEnded: _wait_ended,
    RequestStarted: _request_started,
    RequestEnded: _request_ended,
    RequestsCounted: _requests_counted,
    InstanceLost: _instance_lost,
}
