"""What is known: of a model, of an upstream, and of everything at once. All immutable.

Times are seconds of one strictly increasing clock.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from statistics import median

from keepalive.core.facts import (
    NO_SIGHT,
    Instance,
    ModelId,
    Need,
    Occupant,
    PingOutcome,
    Sight,
    Tier,
    UnloadCause,
)
from keepalive.core.states import State

# LM Studio has been seen to list a model only some time after it said that it had loaded it.
LISTING_LAG = 45.0
LOADS_REMEMBERED = 5
# An idle timer is reset this long before it strikes, and two looks more; and no sooner than this after a call of ours.
TIMER_MARGIN, TIMER_LEAST = 10.0, 5.0
# A load that nobody has ever seen succeed, and whose end is not seen, is believed in for as long as its file takes
# to read at the pace of a slow disk, twice, within these bounds. Longer than that a caller waits in vain more often
# than a second copy is begun beside a living load.
SLOW_DISK = 50e6  # bytes a second
GUESS_LEAST, GUESS_MOST = 120.0, 240.0
UNSEEN = "an earlier load may still be under way"


class Cause(StrEnum):
    """Why a loaded model went missing without us, as far as what was seen decides it."""

    TIMER = "timer"  # it idled for longer than its lease
    DISPLACED = "displaced"  # a load on demand pushed it out
    CRASH = "crash"
    RESTART = "restart"  # LM Studio itself was gone meanwhile
    BY_HAND = "by_hand"  # a person or another program unloaded it: nothing else explains it
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Policy:
    """How one model is kept; all in seconds."""

    refresh_interval: float = 15.0
    ping_interval: float = 300.0
    ping_timeout: float = 60.0
    load_timeout: float = 900.0
    lease: float = 86400.0  # of what we load on demand
    pinged: bool = True  # False: its being listed is all that proves it
    auto: bool = False  # loaded when asked for, and let go for others
    idle: float | None = None  # auto: let go after this long without use
    patience: float = 120.0  # for how long its callers wait in line before another model is drained for them
    memory: int | None = None  # bytes that it takes, as the config says


@dataclass(frozen=True, slots=True)
class Pending:
    """A load whose end we have not seen: unanswered, cut off, an earlier life's, or somebody else's."""

    since: float
    until: float  # believed to go on until then, unless a listing resolves it
    alive_at: float  # when it was last under way, for all we know
    expected: float | None = None  # seconds that it is known to take; None: `until` is a guess
    why: str | None = None  # why its end was not seen
    loaded: bool = False  # it did end, well; only the listing lags
    proved: bool = False  # and the model has answered
    seen: bool = False  # a listing showed it in progress
    ours: bool = True
    doubted: bool = False  # nothing listened there since: LM Studio may have ended, or only the way to it


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
class Primed:
    """An opening that the instance has in its prompt cache since `at`, for all we know."""

    opening: str
    at: float
    seconds: float
    tokens: int | None = None
    ours: bool = True  # we replayed it; else a user's request began with it


@dataclass(frozen=True, slots=True)
class Priming:
    """What is to be replayed to a model that was loaded, and what came of it. Openings are names, never words."""

    openings: tuple[str, ...] = ()  # from files, in the order of the config
    learned: tuple[str, ...] = ()
    under_way: str | None = None
    done: tuple[Primed, ...] = ()  # in the instance that is there now
    unfit: tuple[tuple[str, str], ...] = ()  # openings that are not tried again, each with why
    failed: frozenset[str] = frozenset()  # once, and nobody knows why
    longest: tuple[tuple[str, float], ...] = ()  # seconds that each took to read when it was not in the cache
    answers: tuple[float, ...] = ()  # first tokens of late, in parts of those seconds
    useless: str | None = None  # why nothing is primed any more
    again_at: float = -inf

    @property
    def wished(self) -> tuple[str, ...]:
        return self.openings + self.learned

    @property
    def next(self) -> str | None:
        """The first opening that is neither done nor unfit."""
        wished = self.wished
        if not wished:
            return None
        known = {primed.opening for primed in self.done} | {opening for opening, _ in self.unfit}
        return next((opening for opening in wished if opening not in known), None)


@dataclass(frozen=True, slots=True)
class Claim:
    """All that models were to take, in bytes, when a load was answered; `since` which that holds."""

    bytes: int
    since: float


# No slots: it is copied for each fact; `changed.replace` says why.
@dataclass(frozen=True)
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
    need: Need | None = None
    instances: tuple[Instance, ...] = ()
    ours: frozenset[str] = frozenset()  # ids of instances that we loaded
    lost: frozenset[str] = frozenset()  # and that may be another's since: nothing listened there for a while
    recalled: tuple[frozenset[str], float] | None = None  # and in an earlier life, good until then
    beside: frozenset[str] = frozenset()  # folded keys of all that the newest listing showed as loaded
    used_at: float = -inf  # when it was last known to be used, or appeared
    there_since: float = -inf  # when it came into memory, as far as that was seen
    survived: float = 0.0  # the longest idleness that what is listed now has outlived
    idle_since: float | None = None  # since when each look of the socket has shown it without work
    seen_by: Sight = NO_SIGHT  # the socket, as of the newest listing that counted
    # What would explain its loss, should the next listing show it missing; UNKNOWN: nobody could reach the server.
    suspected: Cause | None = None

    # what we are doing
    claim: int | None = None  # what its load makes of the memory that models take, in bytes
    ahead: bool = False  # it was loaded ahead of demand, and nobody has asked for it since
    draining: bool = False  # it is given to nobody, to make room
    letting_go: UnloadCause | None = None  # why the unload under way, or the last one
    load_started: float | None = None
    progress: float | None = None  # of our load, where LM Studio tells it
    progress_at: float = -inf
    giving_up: bool = False  # LM Studio has been asked to end it
    pending: Pending | None = None
    pinging: bool = False
    unloading: bool = False
    priming: Priming = Priming()
    touched_at: float = -inf  # when our last call for this model ended
    tells_loading: bool = False  # a listing has shown a load of this model in progress

    # what other daemons of ours tell of it
    callers_elsewhere: int = 0  # who wait there
    used_elsewhere: bool = False
    elsewhere_at: float = -inf  # when somebody there last used it
    # ids of instances that one of us loaded, whether or not they are there
    told: frozenset[str] = frozenset()
    told_at: float = -inf
    disowned: frozenset[str] = frozenset()  # of ours, what its last word leaves out; as of the next look
    # while we act: ids of which others of us know that one of us loaded them
    vouched: frozenset[str] = frozenset()
    # by then it may have gone: it is given to nobody before it was looked for
    unsure_since: float | None = None
    proved_elsewhere: bool = False  # whoever acts here has it warm, by its last word
    alone: bool = False  # to be loaded by us whoever acts: a person has decided so
    ill: str | None = None  # why it is not trusted though it is listed

    # what came of it
    refused_claim: Claim | None = None  # its last load, when LM Studio said that there was no room
    granted_claim: Claim | None = None  # and when it went well
    crowd: tuple[frozenset[str], float] | None = None  # folded keys of what it crashed beside, and when
    warm_since: float | None = None
    failures: int = 0
    taken: int = 0  # of these, the last so many times that it was taken from us
    # It was taken from us, and no call of ours has ended since: what holds it off is no failure of its own.
    contested: bool = False
    failure: str | None = None  # what went wrong last
    retry_at: float | None = None
    ping_at: float | None = None  # when the next ping is due
    last_ping: Ping | None = None
    pinged_at: float = -inf  # when it last answered a ping
    crashed: bool = False  # the instance that is listed has crashed
    refused: str | None = None  # why its pings are refused as requests, which says nothing of its health
    busy: bool = False  # it did not answer a ping in time, and is listed all the same
    doubled_at: float | None = None  # when a copy of somebody else's last came while ours was being loaded
    loads: int = 0
    evictions: int = 0
    last_eviction: Eviction | None = None
    made_way: int = 0  # how often a load of ours on demand pushed it out, as it was to
    recent_loads: tuple[float, ...] = ()

    # what users do
    waiting: int = 0
    in_flight: int = 0
    active_at: float = -inf  # when a user's request was last answered
    vouched_at: float = -inf  # the last such answer that stood in for a ping
    waiting_since: float | None = None  # when the first of those came who wait now
    use_at: float = -inf  # when a caller last came for it, or was answered; no ping counts
    asks: float = 0.0  # how much it was asked for of late, as it was at `asks_at`
    asks_at: float = -inf

    @property
    def wanted(self) -> bool:
        if self.retired:
            return False
        if self.policy.auto:
            return self.asked_for is True
        return self.window_open if self.asked_for is None else self.asked_for

    @property
    def held(self) -> bool:
        """Whether a copy in memory may stay; it is pinged, then."""
        stays = not self.retired and self.asked_for is not False and self.window_open
        return stays or self.needed

    @property
    def engaged(self) -> bool:
        """Whether LM Studio says that it works for somebody, whoever that is."""
        for instance in self.instances:  # noqa: SIM110  a generator takes three times as long, each second
            if instance.busy or instance.queued:
                return True
        return False

    @property
    def given(self) -> bool:
        """Whether a request may be passed on to it: warm, and not about to go."""
        going = self.draining or self.unloading or self.unsure_since is not None
        return self.state is State.WARM and not going

    @property
    def present(self) -> bool:
        """Whether it is in memory: listed there, or, where that cannot be seen, by its having answered."""
        return bool(self.instances) or (self.blind and self.state is State.WARM)

    @property
    def in_line_since(self) -> float:
        """Since when it has its place among those who wait for room."""
        return self.since if self.waiting_since is None else self.waiting_since

    @property
    def unused_since(self) -> float:
        """When it was last used, or came into memory."""
        return max(self.last_use, self.there_since)

    @property
    def last_use(self) -> float:
        """When a caller last came for it, to whichever daemon."""
        return max(self.use_at, self.elsewhere_at)

    @property
    def callers(self) -> int:
        """Who wait for it, at whichever daemon."""
        return self.waiting + self.callers_elsewhere

    @property
    def unknown_there(self) -> frozenset[str]:
        """Copies that one of us loaded, for all that we have seen, and of which whoever acts here does not know."""
        return self.ours - self.told if self.asked > self.told_at else frozenset()

    @property
    def in_use(self) -> bool:
        """Whether it answers a caller of ours, at whichever daemon."""
        return self.in_flight > 0 or self.used_elsewhere

    @property
    def needed(self) -> bool:
        return self.wanted or (not self.retired and (self.callers > 0 or self.in_flight > 0))

    @property
    def calling(self) -> bool:
        """Whether a call of ours for this model is under way."""
        primes = self.priming.under_way is not None
        return self.load_started is not None or self.pinging or self.unloading or primes

    @property
    def queued(self) -> int | None:
        """Requests on it, whoever's, those that it works on too; None where nobody tells."""
        told = [instance.queued for instance in self.instances if instance.queued is not None]
        return sum(told) if told else None

    @property
    def ttl(self) -> float | None:
        """The shortest idle timer of its copies; inf: all stay. None where nobody tells."""
        told = [instance.ttl for instance in self.instances if instance.ttl is not None]
        return min(told) if told else None

    @property
    def last_used(self) -> float | None:
        """In Unix seconds, by LM Studio's own clock."""
        return max((i.last_used for i in self.instances if i.last_used is not None), default=None)

    @property
    def goes_at(self) -> float | None:
        """When its idle timer lets it go, if nobody uses it; None where none runs, or nobody knows."""
        ttl = self.ttl
        if ttl is None or ttl == inf or self.engaged or self.in_use:
            return None
        return self.used_at + ttl

    @property
    def ping_due_at(self) -> float | None:
        """When the next ping is due: by its interval, or before an idle timer lets go what is to be kept."""
        ttl = self.ttl
        if self.ping_at is None or self.state is not State.WARM or ttl is None:
            return self.ping_at
        goes_at = self.goes_at
        if goes_at is None:
            return self.ping_at
        margin = min(ttl / 2, 2 * self.policy.refresh_interval + TIMER_MARGIN)
        return min(self.ping_at, max(goes_at - margin, self.touched_at + TIMER_LEAST))

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

    def longest_load(self, expected: float | None) -> float:
        """Seconds from its start after which an unseen load is given up, the lag of the listing included."""
        if expected is not None:
            return expected * 2 + LISTING_LAG
        guess = GUESS_MOST if self.size_bytes is None else 2 * self.size_bytes / SLOW_DISK
        return min(max(guess, GUESS_LEAST), GUESS_MOST, self.policy.load_timeout) + LISTING_LAG

    @property
    def proof_expires(self) -> float:
        """Until when `warm` may be claimed though nothing is heard."""
        policy = self.policy
        return self.seen_at + policy.refresh_interval + policy.ping_interval


def is_loading(model: Model) -> bool:
    return model.load_started is not None or (model.pending is not None and model.pending.ours)


class UpstreamState(StrEnum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"
    UNAUTHORIZED = "unauthorized"


@dataclass(frozen=True)
class Upstream:
    """All we know of one LM Studio server."""

    name: str
    refresh_interval: float = 15.0
    max_loading: int = 1
    auto_evict: bool | None = None  # as configured: whether a load on demand pushes out another
    memory: int | None = None  # as configured: bytes for models
    state: UpstreamState = UpstreamState.UNKNOWN
    since: float = 0.0
    tier: Tier | None = None
    error: str | None = None
    failures: int = 0
    silent_since: float | None = None  # from then on it has answered nothing, and not said that it is gone
    listing: bool = False  # one is under way
    tried_at: float = -inf  # when the newest one began
    asked: float = -inf
    answered_at: float = -inf
    due_at: float = -inf
    resident: frozenset[str] = frozenset()  # folded keys of what is loaded, managed or not
    arriving: frozenset[str] = frozenset()  # and of what is being loaded
    occupants: tuple[Occupant, ...] = ()  # and with what they take
    places: int | None = None  # it keeps no more models than this at a time, by its own word
    unread: frozenset[str] = frozenset()  # folded keys of which it said nothing that could be read
    sees_loading: bool = False  # the newest listing was asked for that, too
    sight: Sight = NO_SIGHT  # what LM Studio's socket was good for then
    acts: bool = True  # it is we who load, ping and unload there, and no other daemon
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
