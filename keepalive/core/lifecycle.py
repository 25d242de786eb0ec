"""States, their table, `apply` and `plan`: everything that is decided, and nothing else.

    apply(model, fact) -> model              what happened, folded into an immutable record
    plan(upstream, models, now) -> actions   what to do about it, now

Rules of this file: no I/O, no clock, no task. The world may surprise us and never raises; a move of our own
that the table does not know is a bug and does. Times are seconds of one strictly increasing clock.

What keeps LM Studio safe stands in three places:

- An observation counts from when it was *asked*. One asked before our last call for a model had ended says
  nothing about that model (`apply` returns it unchanged).
- A load, a ping or an unload needs knowledge no older than `FRESH`: each is preceded by a listing (`plan`).
- A load whose end we did not see is `pending`, not failed: until the listing resolves it, no other may begin.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from itertools import islice
from math import inf
from statistics import median

from keepalive.core.errors import Reason
from keepalive.core.facts import (
    ClockJumped,
    Entry,
    Fact,
    Instance,
    InstanceLost,
    Listed,
    ListingFailed,
    ListingStarted,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    LoadsRecalled,
    LoadStarted,
    ModelId,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    Tier,
    Trouble,
    UnloadEnded,
    UnloadStarted,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
    fold_key,
)

# A listing this old may still lead to a load or a ping: it is the race with other clients that we accept,
# and in practice the plan runs in the same breath as the listing that it rests on.
FRESH = 1.0
# LM Studio has been seen to list a model only some time after it said that it had loaded it.
LISTING_LAG = 45.0
# How often an unresolved load is looked at.
PENDING_POLL = 2.0
BACKOFF_FIRST = 5.0
BACKOFF_MAX = 300.0
# A model that held this long is stable: losing it afterwards is a new story, not a repetition.
STABLE = 300.0
# A released model that served a user this recently is not unloaded under his feet.
LINGER = 60.0
# LM Studio answers four requests for a model at once by default; more pings than that would queue.
PINGS_AT_ONCE = 4
DOWN_AFTER_TIMEOUTS = 3
# LM Studio's idle timers are set in minutes: what went sooner after its last use was not on one.
IDLE_MIN = 60.0
REFRESH_MAX = 60.0
LOADS_REMEMBERED = 5
# Comparing a key with each of a hundred thousand listed ones would hold up everything else for seconds.
SUGGESTED_FROM = 1000


class State(StrEnum):
    UNKNOWN = "unknown"
    COLD = "cold"
    LOADING = "loading"
    WARM = "warm"
    BACKOFF = "backoff"


class Sign(StrEnum):
    """What a fact means to one model: the column heads of the table."""

    UNREACHABLE = "upstream cannot be asked"
    ABSENT = "listed without an instance"
    HELD_OFF = "absent, to be tried again later"
    SEEN_LOADING = "being loaded"
    PRESENT = "listed with an instance"
    UNASKED = "an instance that nobody wants"
    LOAD_STARTED = "we load it"
    LOAD_FAILED = "the load failed"
    PROVED = "it answered"
    DISPROVED = "it answered wrongly"


class Cause(StrEnum):
    """Why a loaded model went missing without us, as far as what was seen decides it."""

    TIMER = "timer"  # it idled for longer than its lease
    DISPLACED = "displaced"  # a load on demand pushed it out
    CRASH = "crash"
    RESTART = "restart"  # LM Studio itself was gone meanwhile
    BY_HAND = "by_hand"  # a person or another program unloaded it: nothing else explains it
    UNKNOWN = "unknown"


U, C, L, W, B = State.UNKNOWN, State.COLD, State.LOADING, State.WARM, State.BACKOFF

# Where a sign leads. A gap is a move that only we could make and never may.
TABLE: Mapping[State, Mapping[Sign, State | None]] = {
    state: dict(zip(Sign, row, strict=True))
    for state, row in {
        #   unreach absent held_off seen_l present unasked started failed proved disproved
        U: (U, C, B, L, U, U, None, B, W, B),
        C: (U, C, B, L, U, U, L, B, C, B),
        L: (U, C, B, L, L, U, None, B, W, B),
        W: (U, C, B, L, W, W, None, B, W, B),
        B: (U, C, B, L, B, U, L, B, W, B),
    }.items()
}


class IllegalMove(AssertionError):
    """We were about to do what must never be done; the process had better end here."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How one model is kept; all in seconds."""

    refresh_interval: float = 15.0
    ping_interval: float = 300.0
    ping_timeout: float = 60.0
    load_timeout: float = 900.0
    lease: float = 86400.0  # of what we load on demand


@dataclass(frozen=True, slots=True)
class Pending:
    """A load whose end we have not seen: unanswered, cut off, an earlier life's, or somebody else's."""

    since: float
    until: float  # believed to go on until then, unless a listing resolves it
    alive_at: float  # when it was last under way, for all we know
    loaded: bool = False  # it did end, well; only the listing lags
    proved: bool = False  # and the model has answered
    seen: bool = False  # a listing showed it in progress
    ours: bool = True


@dataclass(frozen=True, slots=True)
class Ping:
    at: float
    outcome: PingOutcome
    seconds: float


@dataclass(frozen=True, slots=True)
class Eviction:
    at: float
    cause: Cause
    idle_seconds: float  # since it was last known to be used; as a cause, `timer`: its lease is no longer


@dataclass(frozen=True, slots=True)
class Model:
    """All we know of one model on one upstream."""

    id: ModelId
    rank: int = 0  # place in the config: the first is the most important
    policy: Policy = Policy()
    state: State = State.UNKNOWN
    since: float = 0.0
    reason: str | None = "LM Studio has not been asked yet"

    # what is wanted
    windowed: bool = False
    window_open: bool = True
    asked_for: bool | None = None  # by hand: True warm, False released
    retired: bool = False  # no longer in the config; only still here to be let go

    # what is listed
    asked: float = -inf  # when the newest listing that counted was asked
    seen_at: float = -inf  # when an instance was last seen, or last answered
    listed: bool = True
    nearest: tuple[str, ...] = ()
    blind: bool = False  # this upstream cannot say what is loaded
    kind: str = "llm"
    size_bytes: int | None = None
    instances: tuple[Instance, ...] = ()
    ours: frozenset[str] = frozenset()  # ids of instances that we loaded
    beside: frozenset[str] = frozenset()  # folded keys of all that the newest listing showed as loaded
    used_at: float = -inf  # when it was last known to be used, or appeared
    survived: float = 0.0  # the longest idleness that what is listed now has outlived
    suspected: Cause | None = None  # what would explain its loss, should the next listing show it missing

    # what we are doing
    load_started: float | None = None
    pending: Pending | None = None
    pinging: bool = False
    unloading: bool = False
    touched_at: float = -inf  # when our last call for this model ended
    tells_loading: bool = False  # a listing has shown a load of this model in progress

    # what came of it
    warm_since: float | None = None
    failures: int = 0
    failure: str | None = None  # what went wrong last
    retry_at: float | None = None
    ping_at: float | None = None  # when the next ping is due
    last_ping: Ping | None = None
    pinged_at: float = -inf  # when it last answered a ping
    crashed: bool = False  # the instance that is listed has crashed
    busy: bool = False  # it did not answer a ping in time, and is listed all the same
    loads: int = 0
    evictions: int = 0
    last_eviction: Eviction | None = None
    recent_loads: tuple[float, ...] = ()

    # what users do
    waiting: int = 0
    in_flight: int = 0
    active_at: float = -inf  # when a user's request was last answered
    vouched_at: float = -inf  # the last such answer that stood in for a ping

    @property
    def wanted(self) -> bool:
        if self.retired:
            return False
        return self.window_open if self.asked_for is None else self.asked_for

    @property
    def needed(self) -> bool:
        return self.wanted or (not self.retired and (self.waiting > 0 or self.in_flight > 0))

    @property
    def calling(self) -> bool:
        """Whether a call of ours for this model is under way."""
        return self.load_started is not None or self.pinging or self.unloading

    @property
    def contested(self) -> bool:
        """It was taken from us, and no call of ours has ended since: what holds it off is no failure of its own."""
        lost = self.last_eviction
        return lost is not None and lost.cause is not Cause.CRASH and self.touched_at <= lost.at

    @property
    def instance_id(self) -> str | None:
        """The instance that we address: ours before another's, the oldest first."""
        ids = [instance.id for instance in self.instances]
        return next((i for i in ids if i in self.ours), ids[0] if ids else None)

    @property
    def loading_since(self) -> float | None:
        if self.load_started is not None:
            return self.load_started
        return self.pending.since if self.pending and not self.pending.loaded else None

    @property
    def expected_load(self) -> float | None:
        """Seconds that its past loads took; None before the first."""
        return median(self.recent_loads) if self.recent_loads else None

    @property
    def proof_expires(self) -> float:
        """Until when `warm` may be claimed though nothing is heard."""
        policy = self.policy
        return self.seen_at + policy.refresh_interval + policy.ping_interval


class UpstreamState(StrEnum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"
    UNAUTHORIZED = "unauthorized"


@dataclass(frozen=True, slots=True)
class Upstream:
    """All we know of one LM Studio server."""

    name: str
    refresh_interval: float = 15.0
    max_loading: int = 1
    auto_evict: bool | None = None  # as configured: whether a load on demand pushes out another
    state: UpstreamState = UpstreamState.UNKNOWN
    since: float = 0.0
    tier: Tier | None = None
    error: str | None = None
    failures: int = 0
    listing: bool = False  # one is under way
    asked: float = -inf
    answered_at: float = -inf
    due_at: float = -inf
    resident: frozenset[str] = frozenset()  # folded keys of what is loaded, managed or not
    arriving: frozenset[str] = frozenset()  # and of what is being loaded
    sees_loading: bool = False  # the newest listing was asked for that, too
    evicts: bool | None = None  # as seen, where it is not configured
    on_trial: frozenset[str] = frozenset()  # resident before our load on demand: do they survive it?
    trial_over_at: float | None = None  # when that load ended; a listing asked later is the verdict

    @property
    def displaces(self) -> bool | None:
        return self.evicts if self.auto_evict is None else self.auto_evict


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is known, at one instant of the keeper's clock."""

    now: float
    upstreams: tuple[Upstream, ...]
    models: tuple[Model, ...]

    def of(self, upstream: str) -> tuple[Model, ...]:
        return tuple(m for m in self.models if m.id.upstream == upstream)


# --- what happened ----------------------------------------------------------------------------------


def apply(model: Model, fact: Fact) -> Model:
    """The record of `model` after `fact`. Total: every state meets every fact."""
    change = _CHANGES.get(type(fact))
    return change(model, fact) if change else model


def _move(model: Model, sign: Sign, at: float, reason: str | None) -> Model:
    state = TABLE[model.state][sign]
    if state is None:
        raise IllegalMove(f"{model.id}: {sign} in state {model.state}")
    return replace(model, state=state, since=at if state != model.state else model.since, reason=reason)


def _backoff(failures: int) -> float:
    return min(BACKOFF_FIRST * 2.0 ** min(failures - 1, 16), BACKOFF_MAX)


def _listed(model: Model, fact: Listed) -> Model:
    if fact.asked <= max(model.asked, model.touched_at):
        return model  # older than what we know, or asked while our own call was changing it
    before = model
    model = replace(model, asked=fact.asked, blind=fact.tier is Tier.OPENAI, beside=fact.resident)
    entry = fact.entries.get(fold_key(model.id.key))
    if model.blind:
        return _listed_blind(model, fact)
    if entry is None:
        keys = {e.key: None for e in islice(fact.entries.values(), SUGGESTED_FROM)}
        near = get_close_matches(model.id.key, keys, n=3, cutoff=0.4)
        model = replace(model, listed=False, nearest=tuple(near))
        return _absent(model, fact.at, _cause(before, fact, told=True), told=True)
    model = replace(
        model,
        listed=True,
        nearest=(),
        kind=entry.kind,
        size_bytes=entry.size_bytes,
        tells_loading=model.tells_loading or entry.loading is True,
    )
    if entry.instances:
        return _present(model, fact.at, entry)
    told = entry.loading is not None
    cause = _cause(before, fact, told=told)
    if entry.loading:
        return _seen_loading(model, fact.at, cause)
    return _absent(model, fact.at, cause, told=told)


def _listed_blind(model: Model, fact: Listed) -> Model:
    """Here a listing says no more than that somebody answers: only pings show what is loaded."""
    model = replace(model, listed=True, nearest=(), instances=(), ours=frozenset())
    if model.calling:
        return model
    if model.pending is not None:
        return _absent(model, fact.at, Cause.UNKNOWN, told=False)
    if model.state in (State.COLD, State.BACKOFF):
        return model
    if model.state is State.WARM and (model.in_flight or fact.at <= model.proof_expires):
        return model
    reason = "this server does not show what is loaded; only a request can tell"
    return _absent_now(model, fact.at, reason)


def _present(model: Model, at: float, entry: Entry) -> Model:
    known = {instance.id for instance in entry.instances}
    appeared, pending = not model.instances, model.pending
    model = replace(model, instances=entry.instances, ours=model.ours & known, pending=None, seen_at=at)
    if appeared:
        # Whoever loaded it has mended what held us off; it has yet to answer.
        model = replace(
            model,
            retry_at=None,
            crashed=False,
            busy=False,
            ping_at=at,
            used_at=at,
            survived=0.0,
            suspected=None,
        )
    else:
        # What has crashed may stay listed; a server that was gone came back with its models.
        suspected = model.suspected if model.suspected is Cause.CRASH else None
        idle = 0.0 if model.in_flight or model.calling else model.asked - model.used_at
        model = replace(model, suspected=suspected, survived=max(model.survived, idle))
    if pending and pending.proved:
        return _proved(model, at)
    if model.load_started is not None:
        return model  # somebody else's copy came first; ours is still on its way
    if not model.needed:
        reason = None if model.state is State.WARM else "loaded, but not wanted now"
        return _move(model, Sign.UNASKED, at, reason)
    reason = "loaded; has not answered a ping yet" if appeared else model.reason
    if appeared and model.state is State.BACKOFF:
        return _move(model, Sign.UNASKED, at, reason)
    return _move(model, Sign.PRESENT, at, reason)


def _seen_loading(model: Model, at: float, cause: Cause) -> Model:
    if model.load_started is not None:
        return model
    pending = model.pending or Pending(since=at, until=at, alive_at=at, ours=False)
    pending = replace(pending, seen=True, alive_at=at, until=max(pending.until, at + LISTING_LAG))
    reason = "LM Studio is still loading it" if pending.ours else "somebody else is loading it"
    return _move(replace(_lost(model, at, cause), pending=pending), Sign.SEEN_LOADING, at, reason)


def _absent(model: Model, at: float, cause: Cause, *, told: bool) -> Model:
    """The listing shows no instance. `told`: it would have shown a load in progress as such."""
    if model.load_started is not None or model.pending is not None:
        # What is gone now is another's copy, which was there beside our load.
        model = replace(model, instances=())
    if model.load_started is not None:
        return model
    if model.pending is not None:
        resolved = _resolve(model, model.pending, at, told=told)
        reason = model.reason if model.state is State.LOADING else "an earlier load may still be under way"
        return resolved or _move(model, Sign.SEEN_LOADING, at, reason)
    evicted = bool(model.instances)
    model = _lost(model, at, cause)
    return _absent_now(model, at, "LM Studio no longer has it in memory" if evicted else None)


def _resolve(model: Model, pending: Pending, at: float, *, told: bool) -> Model | None:
    """What became of a load that is not listed; None while it is too early to say."""
    if pending.loaded:
        if at < pending.until:
            return None
        return _failed(
            replace(model, pending=None),
            at,
            f"LM Studio said that it had loaded it, but did not list it for {LISTING_LAG:.0f} s",
        )
    # It is no longer seen loading, and not yet listed: failed, or loaded a moment ago.
    over = told and (pending.seen or model.tells_loading) and at >= pending.alive_at + LISTING_LAG
    if not over and at < pending.until:
        return None
    model = replace(model, pending=None)
    if not pending.ours:
        return _absent_now(model, at, None)
    return _absent_now(model, at, "its last load came to nothing")


def _absent_now(model: Model, at: float, reason: str | None) -> Model:
    model = replace(model, instances=(), ours=frozenset(), busy=False, crashed=False, ping_at=None)
    if not model.listed:
        near = f"; listed are {', '.join(model.nearest)}" if model.nearest else ""
        return _move(model, Sign.ABSENT, at, f"LM Studio does not list this key{near}")
    if model.retry_at is not None and model.retry_at > at:
        return _move(model, Sign.HELD_OFF, at, model.failure or reason)
    return _move(model, Sign.ABSENT, at, reason)


def _cause(model: Model, fact: Listed, *, told: bool) -> Cause:
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


def _idle(model: Model, at: float) -> float:
    return 0.0 if model.in_flight or model.pinging else max(0.0, at - model.used_at)


def _lost(model: Model, at: float, cause: Cause) -> Model:
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
    retry_at = at + _backoff(failures - 1) if failures > 1 else None
    failure = f"it went missing {failures} times in a row without holding {STABLE:.0f} s"
    return replace(model, failures=failures, failure=failure, retry_at=retry_at, warm_since=None)


def _listing_failed(model: Model, fact: ListingFailed) -> Model:
    if fact.asked <= model.asked:
        return model
    if fact.trouble in (Trouble.TIMEOUT, Trouble.BAD_ANSWER):
        # It may be busy, or lie: no verdict, until a claim would be older than we allow.
        if model.state is State.UNKNOWN:
            return replace(model, reason=fact.message)
        if model.state is not State.WARM or model.in_flight or fact.at <= model.proof_expires:
            return model
    if fact.trouble in (Trouble.REFUSED, Trouble.UNREACHABLE):
        # Behind a broken network anything may happen to what has an idle timer.
        gone = fact.trouble is Trouble.REFUSED or model.ours
        model = replace(model, suspected=model.suspected or (Cause.RESTART if gone else Cause.UNKNOWN))
    if fact.trouble is Trouble.REFUSED:
        # The program is gone, and with it its loads; what is found later is not ours, though named alike.
        # (`lms server stop` closes the port too, and goes on loading: then the next listing shows it.)
        model = replace(model, pending=None, ours=frozenset())
    model = replace(model, busy=False, ping_at=-inf)  # to be proved again as soon as it is seen
    return _move(model, Sign.UNREACHABLE, fact.at, fact.message)


def _load_started(model: Model, fact: LoadStarted) -> Model:
    if model.calling or model.pending or model.instances:
        raise IllegalMove(f"{model.id}: a load though one is under way, or an instance is there")
    model = _move(model, Sign.LOAD_STARTED, fact.at, None)
    return replace(model, load_started=fact.at, retry_at=None)


def _load_remembered(model: Model, fact: LoadRemembered) -> Model:
    until = fact.started + _longest_load(model, fact.expected)
    pending = Pending(since=fact.started, until=until, alive_at=fact.at)
    return replace(
        model,
        pending=pending,
        tells_loading=fact.tells_loading,
        reason="an earlier life of the daemon had begun to load it",
    )


def _load_ended(model: Model, fact: LoadEnded) -> Model:
    started = model.load_started if model.load_started is not None else fact.at
    model = replace(model, load_started=None, touched_at=fact.at)
    if fact.outcome is LoadOutcome.OK:
        took = fact.seconds if fact.seconds is not None else fact.elapsed
        model = replace(
            model,
            loads=model.loads + 1,
            recent_loads=(*model.recent_loads, took)[-LOADS_REMEMBERED:],
            ours=model.ours | {fact.instance_id} if fact.instance_id else model.ours,
        )
        if model.blind:
            return _proved(model, fact.at)
        until = fact.at + LISTING_LAG
        pending = Pending(started, until, alive_at=fact.at, loaded=True, proved=fact.proved)
        model = replace(model, pending=pending)
        reason = f"loaded in {took:.1f} s; waiting for LM Studio to list it"
        return _move(model, Sign.SEEN_LOADING, fact.at, reason)
    if fact.outcome is LoadOutcome.UNKNOWN:
        message = fact.message or "no answer to the load"
        span = _longest_load(model, max(model.recent_loads, default=None))
        if fact.at - started >= span:
            span = 2 * (fact.at - started)
        pending = Pending(since=started, until=started + span, alive_at=fact.at)
        failures = model.failures + 1
        model = replace(
            model,
            pending=pending,
            failures=failures,
            failure=message,
            retry_at=fact.at + _backoff(failures),
        )
        return _move(model, Sign.SEEN_LOADING, fact.at, f"{message}; it may still be loading")
    model = _failed(model, fact.at, fact.message or "the load failed")
    if fact.outcome is LoadOutcome.REFUSED:
        # Memory does not come back by asking: bug reports show guardrails refusing in a tight loop.
        model = replace(model, retry_at=fact.at + BACKOFF_MAX)
    return model


def _longest_load(model: Model, expected: float | None) -> float:
    """Seconds from its start after which an unseen load is given up, the lag of the listing included."""
    return (expected * 2 if expected is not None else model.policy.load_timeout) + LISTING_LAG


def _failed(model: Model, at: float, message: str) -> Model:
    failures = model.failures + 1
    retry_at = at + _backoff(failures)
    model = replace(model, failures=failures, failure=message, retry_at=retry_at, warm_since=None)
    return _move(model, Sign.LOAD_FAILED, at, message)


def _ping_started(model: Model, fact: PingStarted) -> Model:
    if model.calling or not (model.instances or (model.blind and model.state is State.WARM)):
        raise IllegalMove(f"{model.id}: a ping though nothing is loaded, or a call is under way")
    return replace(model, pinging=True)


def _ping_ended(model: Model, fact: PingEnded) -> Model:
    policy, at = model.policy, fact.at
    if fact.outcome is PingOutcome.SKIPPED:
        last = at if model.in_flight else model.active_at
        return replace(model, ping_at=last + policy.ping_interval, vouched_at=model.active_at)
    ping = Ping(at, fact.outcome, fact.seconds)
    model = replace(model, pinging=False, touched_at=at, used_at=at, last_ping=ping, busy=False)
    if fact.outcome is PingOutcome.OK:
        return _proved(replace(model, pinged_at=at), at)
    message = fact.message or "it did not answer the ping as it should"
    if fact.outcome is PingOutcome.TIMEOUT:
        # A question for the listing, not a verdict: it may be generating for somebody else.
        again = at + min(policy.ping_interval, max(policy.ping_timeout, policy.refresh_interval))
        return replace(model, ping_at=again, busy=True, reason=message)
    if fact.outcome is PingOutcome.ERROR and fact.why is None:
        # The connection failed, not the model: the listing tells more.
        return replace(model, ping_at=at + policy.refresh_interval, reason=message)
    failures = model.failures + 1
    # A token does not become right by asking again.
    retry_at = at + (BACKOFF_MAX if fact.why is Reason.UNAUTHORIZED else _backoff(failures))
    model = replace(
        model,
        failures=failures,
        failure=message,
        retry_at=retry_at,
        ping_at=retry_at,
        crashed=fact.why is Reason.CRASHED,
        suspected=Cause.CRASH if fact.why is Reason.CRASHED else model.suspected,
    )
    return _move(model, Sign.DISPROVED, at, message)


def _proved(model: Model, at: float) -> Model:
    """The model itself answered, to a ping or to a user."""
    if not model.instances and not model.blind:
        return model  # an answer of something no longer listed: the listing decides
    warm_since = model.warm_since if model.state is State.WARM else None
    stable = warm_since is not None and at - warm_since >= STABLE
    model = replace(
        model,
        pending=None,
        seen_at=at,
        used_at=at,
        suspected=None,
        warm_since=at if warm_since is None else warm_since,
        failures=0 if stable else model.failures,
        retry_at=None,
        ping_at=at + model.policy.ping_interval,
        crashed=False,
        busy=False,
    )
    return _move(model, Sign.PROVED, at, None)


def _unload_started(model: Model, fact: UnloadStarted) -> Model:
    if model.calling or fact.instance_id not in model.ours:
        raise IllegalMove(f"{model.id}: unloading {fact.instance_id}, which is not ours")
    return replace(model, unloading=True)


def _unload_ended(model: Model, fact: UnloadEnded) -> Model:
    model = replace(model, unloading=False, touched_at=fact.at)
    if fact.message is not None:
        failures = model.failures + 1
        retry_at = fact.at + _backoff(failures)
        failure = f"could not unload it: {fact.message}"
        return replace(model, failures=failures, failure=failure, retry_at=retry_at, reason=failure)
    left = tuple(i for i in model.instances if i.id != fact.instance_id)
    model = replace(model, instances=left, ours=model.ours - {fact.instance_id}, warm_since=None)
    return model if left else _absent_now(model, fact.at, None)


def _window(model: Model, *, is_open: bool) -> Model:
    return replace(model, windowed=True, window_open=is_open, asked_for=None)


def _warm_asked(model: Model) -> Model:
    # A person asks: he may know that what held us off is mended.
    due = None if model.ping_at is None else -inf
    return replace(model, asked_for=True, retry_at=None, failures=0, ping_at=due)


def _request_ended(model: Model, fact: RequestEnded) -> Model:
    model = replace(model, in_flight=max(0, model.in_flight - 1), used_at=fact.at)
    if not fact.answered:
        return model
    model = replace(model, active_at=fact.at)
    return model if model.calling else _served(model, fact.at)


def _served(model: Model, at: float) -> Model:
    if not model.instances and not model.blind:
        return model
    due = model.ping_at
    # The due time stays, so that the ping that this request makes needless is seen and counted as skipped.
    return replace(_proved(model, at), ping_at=due)


def _instance_lost(model: Model, fact: InstanceLost) -> Model:
    # It was a call as well as one of ours: no listing from before it may lead to a ping, which would load it.
    model = replace(model, touched_at=fact.at)
    if fact.why is Reason.CRASHED:
        model = replace(model, suspected=Cause.CRASH)
    if model.state is not State.WARM:
        return model
    return _move(replace(model, ping_at=fact.at), Sign.DISPROVED, fact.at, fact.message)


_CHANGES: Mapping[type[Fact], Callable[..., Model]] = {
    Listed: _listed,
    ListingFailed: _listing_failed,
    # An answer to a question from before the jump may be as old as the machine slept.
    # LM Studio's idle timers go by the wall clock.
    ClockJumped: lambda model, fact: replace(
        model, touched_at=fact.at, used_at=model.used_at - max(0.0, fact.seconds)
    ),
    LoadStarted: _load_started,
    LoadEnded: _load_ended,
    LoadRemembered: _load_remembered,
    LoadsRecalled: lambda model, fact: replace(
        model, recent_loads=(*fact.seconds, *model.recent_loads)[-LOADS_REMEMBERED:]
    ),
    PingStarted: _ping_started,
    PingEnded: _ping_ended,
    UnloadStarted: _unload_started,
    UnloadEnded: _unload_ended,
    WindowOpened: lambda model, _: _window(model, is_open=True),
    WindowClosed: lambda model, _: _window(model, is_open=False),
    WarmAsked: lambda model, _: _warm_asked(model),
    ReleaseAsked: lambda model, _: replace(model, asked_for=False),
    WaitStarted: lambda model, _: replace(model, waiting=model.waiting + 1),
    WaitEnded: lambda model, _: replace(model, waiting=max(0, model.waiting - 1)),
    RequestStarted: lambda model, _: replace(model, in_flight=model.in_flight + 1),
    RequestEnded: _request_ended,
    InstanceLost: _instance_lost,
}


def apply_upstream(upstream: Upstream, fact: Fact) -> Upstream:
    """The record of `upstream` after `fact`, be it about the upstream or about one of its models."""
    match fact:
        case ListingStarted():
            return replace(upstream, listing=True)
        case Listed():
            return _upstream_listed(upstream, fact)
        case ListingFailed():
            return _upstream_failed(upstream, fact)
        case ClockJumped():
            # Whatever we knew is as old as the machine slept: look before anything else is decided.
            return replace(upstream, answered_at=-inf, due_at=-inf)
        case LoadEnded():
            trial = upstream.on_trial if fact.outcome is LoadOutcome.OK else frozenset[str]()
            return replace(upstream, due_at=-inf, on_trial=trial, trial_over_at=fact.at)
        case LoadStarted():
            on_demand = upstream.tier is Tier.V0 and upstream.auto_evict is None
            trial = upstream.resident if on_demand else frozenset[str]()
            return replace(upstream, on_trial=trial, trial_over_at=None)
        case PingEnded(outcome=outcome) if outcome not in (PingOutcome.OK, PingOutcome.SKIPPED):
            return replace(upstream, due_at=min(upstream.due_at, fact.at))
        case UnloadEnded() | InstanceLost():
            return replace(upstream, due_at=min(upstream.due_at, fact.at))
        case WarmAsked():
            return replace(upstream, due_at=-inf)
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
        error=None,
        failures=0,
        asked=fact.asked,
        answered_at=fact.at,
        due_at=fact.at + upstream.refresh_interval,
        resident=fact.resident,
        arriving=fact.arriving,
        sees_loading=fact.loading,
        evicts=evicts if fact.tier is Tier.V0 else None,
        on_trial=trial,
    )


def _upstream_failed(upstream: Upstream, fact: ListingFailed) -> Upstream:
    failures = upstream.failures + 1
    state, wait = UpstreamState.DOWN, upstream.refresh_interval
    if fact.trouble is Trouble.UNAUTHORIZED:
        state, wait = UpstreamState.UNAUTHORIZED, BACKOFF_MAX
    else:
        wait = min(wait * 2.0 ** min(failures - 1, 16), max(wait, REFRESH_MAX))
        if fact.trouble is Trouble.TIMEOUT and upstream.state is UpstreamState.UP:
            # A busy server answers late. One late answer is no outage.
            state = UpstreamState.DOWN if failures >= DOWN_AFTER_TIMEOUTS else UpstreamState.UP
    return replace(
        upstream,
        listing=False,
        state=state,
        since=fact.at if state is not upstream.state else upstream.since,
        error=fact.message,
        failures=failures,
        answered_at=-inf,
        due_at=fact.at + wait,
        evicts=None if fact.trouble is Trouble.REFUSED else upstream.evicts,
        on_trial=frozenset(),
    )


# --- what to do about it ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refresh:
    """List what the upstream has. `loading`: somebody needs to know what is being loaded, too."""

    upstream: str
    loading: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    model: ModelId


@dataclass(frozen=True, slots=True)
class SendPing:
    model: ModelId
    instance_id: str


@dataclass(frozen=True, slots=True)
class SkipPing:
    model: ModelId


@dataclass(frozen=True, slots=True)
class Unload:
    model: ModelId
    instance_id: str


Action = Refresh | Load | SendPing | SkipPing | Unload


def plan(upstream: Upstream, models: Sequence[Model], now: float) -> list[Action]:
    """What to do now on one upstream, given all of its models.

    Carried out and reported as facts, a plan leaves nothing of itself in the next plan.
    """
    actions: list[Action] = [SkipPing(m.id) for m in models if _ping_is_due(m, now) and _is_in_use(m)]
    stale = False
    calls = _unloads(upstream, models, now) + _loads(upstream, models, now) + _pings(models, now)
    for model, action in calls:
        # What has just gone may be coming back already, by somebody else's request.
        seen = upstream.sees_loading or not isinstance(action, Load)
        if seen and _is_fresh(upstream, model, now):
            actions.append(action)
        else:
            stale = True
    if not upstream.listing and _refresh_is_due(upstream, models, now, stale=stale):
        actions.append(Refresh(upstream.name, loading=any(_may_be_loading(m) for m in models)))
    return actions


def _is_fresh(upstream: Upstream, model: Model, now: float) -> bool:
    return (
        upstream.state is UpstreamState.UP
        and now - upstream.answered_at <= FRESH
        and upstream.asked > model.touched_at
    )


def _refresh_is_due(upstream: Upstream, models: Sequence[Model], now: float, *, stale: bool) -> bool:
    if now >= upstream.due_at:
        return True
    if upstream.failures:
        return False  # it is down or refuses us: its own pace
    if stale:
        return True
    pending = any(m.pending is not None and m.load_started is None for m in models)
    return pending and now >= upstream.answered_at + PENDING_POLL


def _may_be_loading(model: Model) -> bool:
    return (
        model.pending is not None or model.load_started is not None or (model.needed and not model.instances)
    )


def _is_loading(model: Model) -> bool:
    return model.load_started is not None or (model.pending is not None and model.pending.ours)


def _loads(upstream: Upstream, models: Sequence[Model], now: float) -> list[tuple[Model, Action]]:
    slots = upstream.max_loading - sum(map(_is_loading, models))
    if slots <= 0:
        return []
    ready = [m for m in models if _is_loadable(m, now) and blocked_by(upstream, models, m) is None]
    # Somebody waits for the first of these; then the order of the config.
    ready.sort(key=lambda m: (m.waiting == 0, m.rank))
    if upstream.tier is Tier.V0 and upstream.displaces is not False:
        # Each load on demand may push out the one before: see what it does.
        slots = min(slots, 1 - sum(map(_is_loading, models)))
    return [(m, Load(m.id)) for m in ready[: max(slots, 0)]]


def _is_loadable(model: Model, now: float) -> bool:
    return (
        model.needed
        and model.listed
        and model.state in (State.COLD, State.BACKOFF)
        and not model.instances
        and not model.calling
        and model.pending is None
        # Nobody fights over memory for nothing. But whoever waits gets the model, however often it was taken.
        and (model.retry_at is None or now >= model.retry_at or (model.waiting > 0 and model.contested))
    )


def blocked_by(upstream: Upstream, models: Sequence[Model], model: Model) -> str | None:
    """Why loading this model on demand would push out what must stay; None when nothing does.

    LM Studio 0.3.x loads over HTTP only on demand, and by default keeps one such model: loading another
    evicts it, even while it generates. Newer versions load explicitly and leave the others alone.
    """
    if upstream.tier is not Tier.V0 or upstream.displaces is False:
        return None
    ours = {
        fold_key(m.id.key)
        for m in models
        if (m.ours or _is_loading(m)) and all(i.id in m.ours for i in m.instances)
    }
    foreign = sorted((upstream.resident | upstream.arriving) - ours - {fold_key(model.id.key)})
    if foreign:
        return f"loading it on LM Studio 0.3.x could push out {foreign[0]}, which we did not load"
    if upstream.displaces is None:
        return None
    first = min((m for m in models if m.needed and m.listed), key=lambda m: m.rank, default=model)
    if first is model:
        return None
    return f"LM Studio 0.3.x keeps one model at a time here, and {first.id.key} comes first in the config"


def _pings(models: Sequence[Model], now: float) -> list[tuple[Model, Action]]:
    free = PINGS_AT_ONCE - sum(m.pinging for m in models)
    due = [m for m in models if _ping_is_due(m, now) and not _is_in_use(m)]
    due.sort(key=lambda m: (m.waiting == 0, m.state is State.WARM, m.rank))
    return [(m, SendPing(m.id, m.instance_id or m.id.key)) for m in due[: max(free, 0)]]


def _ping_is_due(model: Model, now: float) -> bool:
    return (
        model.needed
        and bool(model.instances or (model.blind and model.state is State.WARM))
        and not model.calling
        and not _must_unload_crashed(model)
        and (model.ping_at is None or now >= model.ping_at)
    )


def _is_in_use(model: Model) -> bool:
    """Users' requests prove a warm model better than a ping, and a ping would get in their way."""
    if model.state is not State.WARM:
        return False
    last_ping = model.last_ping.at if model.last_ping else -inf
    return model.in_flight > 0 or model.active_at > max(last_ping, model.vouched_at)


def _must_unload_crashed(model: Model) -> bool:
    return model.crashed and model.instance_id in model.ours and not model.blind


def _unloads(upstream: Upstream, models: Sequence[Model], now: float) -> list[tuple[Model, Action]]:
    if upstream.tier is not Tier.V1:
        return []  # nothing before 0.4 can unload over HTTP: the lease runs out by itself
    return [
        (m, Unload(m.id, instance.id))
        for m in models
        for instance in [i for i in m.instances if i.id in m.ours][:1]
        if _is_unloadable(m, now)
    ]


def _is_unloadable(model: Model, now: float) -> bool:
    if model.calling or model.in_flight or (model.retry_at is not None and now < model.retry_at):
        return False
    if model.needed:
        return _must_unload_crashed(model)
    return now >= model.active_at + LINGER


# --- what to say about it ---------------------------------------------------------------------------


def eta(model: Model, siblings: Iterable[Model], now: float) -> float | None:
    """Seconds until the load under way should be done; 0 when it is overdue, None when nothing is known.

    From this model's own past loads; before the first, from its size and how fast its siblings on the same
    upstream came into memory.
    """
    since = model.loading_since
    if since is None:
        return None
    expected = model.expected_load
    if expected is None and model.size_bytes:
        rates = [s.size_bytes / took for s in siblings if s.size_bytes and (took := s.expected_load)]
        expected = model.size_bytes / median(rates) if rates else None
    return None if expected is None else max(0.0, expected - (now - since))


def explain(upstream: Upstream, models: Sequence[Model], model: Model, now: float) -> str | None:
    """Why this model is not warm, in a sentence; for a warm one what is odd about it, or None."""
    if model.state is State.WARM:
        if len(model.instances) > 1:
            return f"{len(model.instances)} copies are in memory"
        return model.reason
    if model.state is State.COLD and not model.needed:
        return "released by hand" if model.asked_for is False else "outside its window"
    if model.state is State.COLD and model.listed:
        blocked = blocked_by(upstream, models, model)
        if blocked:
            return blocked
        other = next((m for m in models if _is_loading(m)), None)
        if other and other is not model:
            return f"waits for its turn: {other.id.key} is loading"
    return model.reason


def diagram() -> str:
    """The table as a Mermaid state diagram, for the README."""
    lines = ["stateDiagram-v2", "    [*] --> unknown"]
    for state, row in TABLE.items():
        leads: dict[State, list[str]] = {}
        for sign, target in row.items():
            if target is not None and target is not state:
                leads.setdefault(target, []).append(sign.value)
        lines += [f"    {state} --> {target}: {' / '.join(signs)}" for target, signs in leads.items()]
    return "\n".join(lines)
