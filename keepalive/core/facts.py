"""What can happen.

A fact says what was seen or done, in the past tense, with the monotonic time `at` which it was known.
Whoever sees something reports a fact; only `apply` decides what follows from it. No fact carries
a prompt, an answer or a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple
from unicodedata import normalize

from keepalive.core.errors import Reason


class ModelId(NamedTuple):
    """One model on one upstream, by the names that the config gives them."""

    upstream: str
    key: str

    def __str__(self) -> str:
        return f"{self.key} on {self.upstream}"


class Tier(StrEnum):
    """How much of LM Studio an upstream speaks: it decides how a model is listed and loaded."""

    V1 = "v1"  # 0.4 and later: residency is listed, loading is a call
    V0 = "v0"  # 0.3.6 and later: residency is listed, only a request loads
    LLAMA = "llama"  # no LM Studio, but llama-server as a router: residency is listed, loading is a call
    OPENAI = "openai"  # any other server: residency cannot be seen

    @property
    def calls(self) -> bool:
        """Whether there are calls that load and unload. Elsewhere a request loads, and nothing unloads."""
        return self in (Tier.V1, Tier.LLAMA)

    @property
    def lm_studio(self) -> bool:
        return self in (Tier.V1, Tier.V0)


class Trouble(StrEnum):
    """Why a listing failed."""

    REFUSED = "refused"  # nothing listens: what ran there is gone, and its loads with it
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"  # it may be busy: says nothing about the models
    UNAUTHORIZED = "unauthorized"
    BAD_ANSWER = "bad_answer"
    LOADING = "loading"  # it says that it is loading, and answers nothing else until it has


class Sdk(StrEnum):
    """What became of the socket by which LM Studio's own SDKs see more than a listing shows."""

    OFF = "off"  # not to be used
    ABSENT = "absent"  # none there, or not yet, or of no use
    REFUSED = "refused"  # it wants another token
    UP = "up"


@dataclass(frozen=True, slots=True)
class Instance:
    """One loaded copy of a model, as listed; `context_length` in tokens.

    The rest is the socket's, and None where nothing is known of it.
    """

    id: str
    context_length: int | None = None
    busy: bool | None = None  # it works on a request, whoever's
    queued: int | None = None  # requests on it, those that it works on too
    ttl: float | None = None  # seconds of idleness after which it goes; inf: it stays
    last_used: float | None = None  # in Unix seconds, by LM Studio's own clock


@dataclass(frozen=True, slots=True)
class Need:
    """What LM Studio says that a load would take, as the model is configured."""

    memory_bytes: int
    passes_guardrails: bool | None = None  # as of what was loaded when it was asked
    sure: bool = False  # LM Studio's own confidence is high


@dataclass(frozen=True, slots=True)
class Entry:
    """One model in a listing. `loading` is None where the upstream does not tell."""

    key: str
    kind: str = "llm"  # "llm" or "embedding"
    size_bytes: int | None = None
    instances: tuple[Instance, ...] = ()
    loading: bool | None = None
    # `key@quantization`: those on its disk, as far as it names them, and the one that the bare key means.
    variants: tuple[str, ...] = ()
    selected: str | None = None
    need: Need | None = None
    context_max: int | None = None  # tokens; what it was made for
    # llama-server's: its process is there and has let go of the memory; or ended by itself, with this.
    asleep: bool = False
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Sight:
    """What the socket is good for, as of one listing; what it shows of the instances stands with them."""

    sdk: Sdk = Sdk.OFF
    why: str | None = None  # it is absent or refused
    session: int = 0  # changes with each connection; 0: none is up
    hung_up: int = 0  # how often LM Studio has ended one
    late: bool = False  # it is up, and did not answer in time
    clock: float | None = None  # LM Studio's own, in Unix seconds


NO_SIGHT = Sight()


class Odd(NamedTuple):
    """Rows of a listing that could not be read: of the models of these folded keys it says nothing, and why."""

    why: str
    keys: Mapping[str, str]


class Occupant(NamedTuple):
    """What a listing shows in memory, whoever loaded it; `key` folded."""

    key: str
    copies: int
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class Fact:
    at: float


# --- about an upstream --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpstreamFact(Fact):
    upstream: str


@dataclass(frozen=True, slots=True)
class ListingStarted(UpstreamFact):
    pass


@dataclass(frozen=True, slots=True)
class Listed(UpstreamFact):
    """The upstream said what it has. `at` is when it was answered, `asked` when it was asked."""

    asked: float
    tier: Tier
    entries: Mapping[str, Entry] = field(repr=False)  # by `fold_key` of the key and of each variant
    loading: bool = True  # it was asked what is being loaded, too
    sight: Sight = field(default=NO_SIGHT, repr=False)
    # It keeps no more models than this at a time, and lets others go for a load.
    places: int | None = field(default=None, repr=False)
    # Another daemon proves what is loaded: here it is warm because it is listed.
    trusted: bool = field(default=False, repr=False)
    odd: Odd | None = field(default=None, repr=False)
    # Folded keys of what is loaded, and of what is being loaded, managed or not.
    resident: frozenset[str] = field(init=False, repr=False)
    arriving: frozenset[str] = field(init=False, repr=False)
    occupants: tuple[Occupant, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Once, for all models of the upstream.
        entries = self.entries.values()
        object.__setattr__(self, "resident", frozenset(fold_key(e.key) for e in entries if e.instances))
        object.__setattr__(self, "arriving", frozenset(fold_key(e.key) for e in entries if e.loading))
        # A variant stands there a second time.
        there = {fold_key(e.key): e for e in entries if e.instances}
        occupants = tuple(Occupant(key, len(e.instances), e.size_bytes) for key, e in there.items())
        object.__setattr__(self, "occupants", occupants)


@dataclass(frozen=True, slots=True)
class ListingFailed(UpstreamFact):
    asked: float
    trouble: Trouble
    message: str


@dataclass(frozen=True, slots=True)
class ClockJumped(UpstreamFact):
    """The machine slept, or somebody set the clock: what we know of this upstream may be old."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ModelsChanged(UpstreamFact):
    """A caller loaded, unloaded or downloaded a model there: what was listed may be old."""


@dataclass(frozen=True, slots=True)
class HandTaken(UpstreamFact):
    """Of several daemons at this upstream we are from now on the one that acts."""


@dataclass(frozen=True, slots=True)
class OthersHeard(UpstreamFact):
    """Our other daemons can be told again what we do: a person's word stands in the place of theirs no longer."""


@dataclass(frozen=True, slots=True)
class HandLost(UpstreamFact):
    """Of several daemons at this upstream another one acts from now on, or none."""


# --- about a model: what we did -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelFact(Fact):
    model: ModelId


class LoadOutcome(StrEnum):
    OK = "ok"
    FAILED = "failed"  # it said no
    REFUSED = "refused"  # it said no for want of memory: asking again soon is of no use
    UNKNOWN = "unknown"  # no answer in time, or cut: it may still be loading
    GIVEN_UP = "given_up"  # nobody waited for it, and somebody behind it: LM Studio ended it for us


@dataclass(frozen=True, slots=True)
class LoadStarted(ModelFact):
    """`ahead`: nobody had asked for it yet. `claim`: the bytes that models take with it, all together."""

    ahead: bool = False
    claim: int | None = None


@dataclass(frozen=True, slots=True)
class LoadProgressed(ModelFact):
    """How far our load is, from 0 to 1, as LM Studio says it."""

    progress: float


@dataclass(frozen=True, slots=True)
class LoadGivenUp(ModelFact):
    """LM Studio is being asked to end our load. Whether it does, the end of the load tells."""


@dataclass(frozen=True, slots=True)
class LoadEnded(ModelFact):
    """`elapsed` is our clock, `seconds` what LM Studio measured itself, where it said so."""

    outcome: LoadOutcome
    elapsed: float
    seconds: float | None = None
    instance_id: str | None = None
    proved: bool = False  # the load was a ping, so the model has answered already
    message: str | None = None  # with OK: the load was a ping, and was refused as a request
    why: Reason | None = None  # what kind of no


@dataclass(frozen=True, slots=True)
class LoadRemembered(ModelFact):
    """An earlier life of this daemon began a load at `started` and did not see it end."""

    started: float
    expected: float | None  # seconds this model is known to take
    tells_loading: bool = False  # its listing is known to show a load in progress
    by: str | None = None  # another daemon of ours began it


@dataclass(frozen=True, slots=True)
class LoadForgone(ModelFact):
    """A load was not begun after all: it was no longer ours to do, and LM Studio has not heard of it."""

    message: str


@dataclass(frozen=True, slots=True)
class LoadResolved(ModelFact):
    """The daemon that acts here knows what came of the load under way."""


@dataclass(frozen=True, slots=True)
class HolderTold(ModelFact):
    """What the daemon that acts here knows of a model, and a listing does not show; times of our own clock."""

    instance_ids: frozenset[str] = frozenset()  # copies that one of us loaded
    warm: bool = False
    ill: str | None = None  # why what is listed does not answer
    failure: str | None = None
    failures: int = 0
    retry_at: float | None = None
    loads: tuple[float, ...] = ()  # seconds that its last ones took
    contested: bool = False  # it was taken: that holds off nobody who waits for it
    lost: frozenset[str] = frozenset()  # copies of which it no longer knows whether one of us loaded them
    heard: bool = False  # from itself; else this is what is left of the word of another one


@dataclass(frozen=True, slots=True)
class UsedElsewhere(ModelFact):
    """What callers of all other daemons of ours do with a model."""

    waiting: int
    used: bool
    # Copies that one of us loaded, as they know it and whoever acts there does not: told to him alone.
    ours: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class OursRecalled(ModelFact):
    """An earlier life of this daemon loaded these copies; a listing answered by `until` shows the same ones."""

    instance_ids: frozenset[str]
    until: float


@dataclass(frozen=True, slots=True)
class LoadsRecalled(ModelFact):
    """How many seconds its last loads took that succeeded in earlier lives of this daemon, oldest first."""

    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DemandRecalled(ModelFact):
    """How often it was asked for in earlier lives of this daemon: pairs of how many seconds ago, and how many times."""

    asked: tuple[tuple[float, int], ...]


class PingOutcome(StrEnum):
    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    WRONG_MODEL = "wrong_model"
    REFUSED = "refused"  # as a request that this model does not take: no illness
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class PingStarted(ModelFact):
    pass


@dataclass(frozen=True, slots=True)
class PingEnded(ModelFact):
    """A SKIPPED ping was due but never sent, because users' own requests had proved the model."""

    outcome: PingOutcome
    seconds: float = 0.0
    message: str | None = None
    why: Reason | None = None  # what kind of ERROR


class PrimeOutcome(StrEnum):
    OK = "ok"
    GIVEN_UP = "given_up"  # somebody came; it is gone on with later
    REFUSED = "refused"  # it does not take this opening
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class OpeningsLearned(ModelFact):
    """What most requests of late begin with, by names that tell nothing of it; the most important first."""

    openings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PrimeStarted(ModelFact):
    """An opening is replayed, known here by its name alone."""

    opening: str


@dataclass(frozen=True, slots=True)
class PrimeEnded(ModelFact):
    opening: str
    outcome: PrimeOutcome
    seconds: float = 0.0
    tokens: int | None = None  # of the opening, where it was told
    message: str | None = None
    why: Reason | None = None  # what kind of ERROR


class UnloadCause(StrEnum):
    """Why we let go of a copy of ours."""

    ROOM = "room"  # another one needs its memory
    IDLE = "idle"
    WINDOW = "window"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class OpeningRead(ModelFact):
    """A user's request begins with an opening, and is being answered: the model has it in its cache."""

    opening: str


@dataclass(frozen=True, slots=True)
class PrimedAnswered(ModelFact):
    """A request that began with little more than an opening that had been read got its first token after `seconds`.

    Nobody else was being answered by that model.
    """

    opening: str
    seconds: float


@dataclass(frozen=True, slots=True)
class UnloadStarted(ModelFact):
    """Without a cause the model is wanted still: the copy is to be loaded anew."""

    instance_id: str
    cause: UnloadCause | None = None


@dataclass(frozen=True, slots=True)
class UnloadEnded(ModelFact):
    instance_id: str
    message: str | None = None  # None: it is unloaded
    in_use: bool = False  # it is not, because it answers somebody


# --- about a model: what is wanted ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WindowOpened(ModelFact):
    pass


@dataclass(frozen=True, slots=True)
class WindowClosed(ModelFact):
    pass


@dataclass(frozen=True, slots=True)
class WarmAsked(ModelFact):
    """Somebody wants it warm now; holds until its window next opens or closes, and for `auto` until it is warm.

    `alone`: he takes it upon him that no other daemon loads it, where nobody else can tell.
    """

    alone: bool = False


@dataclass(frozen=True, slots=True)
class ReleaseAsked(ModelFact):
    """Somebody wants it kept no longer; holds until its window next opens."""


@dataclass(frozen=True, slots=True)
class WishSpent(ModelFact):
    """What a person had asked for counts no longer, by the word of the daemon that acts here."""


@dataclass(frozen=True, slots=True)
class DrainStarted(ModelFact):
    """It makes room for others who have waited long: what it answers goes on, and who comes now waits."""


@dataclass(frozen=True, slots=True)
class DrainEnded(ModelFact):
    """Nobody waits for its room any more. `unsure`: whether another one has let it go meanwhile the next look shows."""

    unsure: bool = False


# --- about a model: what users' requests show ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WaitStarted(ModelFact):
    """A request is held until the model is warm."""


@dataclass(frozen=True, slots=True)
class WaitEnded(ModelFact):
    seconds: float
    served: bool  # False: it gave up, was refused, or left


@dataclass(frozen=True, slots=True)
class RequestStarted(ModelFact):
    """A request was passed on to the upstream."""


@dataclass(frozen=True, slots=True)
class RequestEnded(ModelFact):
    """A request that was passed on is over. `answered`: the model itself answered, which proves it."""

    answered: bool


@dataclass(frozen=True, slots=True)
class RequestsCounted(ModelFact):
    """Both of these, of many requests at once: a record is not made anew for each of them.

    `ended_at` and `answered_at` are of the last that ended, and of the last that the model itself answered.
    """

    started: int
    ended: int
    ended_at: float | None = None
    answered_at: float | None = None


@dataclass(frozen=True, slots=True)
class InstanceLost(ModelFact):
    """A user's request was told that the model crashed or was unloaded; the listing decides."""

    message: str
    why: Reason | None = None  # what it was told, where it was told anything


def fold_key(key: str) -> str:
    """LM Studio compares keys without regard to case (but instance ids exactly).

    An accent may be a character of its own, as macOS has it in names of files, or part of its letter.
    """
    return key.casefold() if key.isascii() else normalize("NFC", key.casefold())
