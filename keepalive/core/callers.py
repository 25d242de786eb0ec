"""Those who ask, and what became of what they asked."""

from dataclasses import dataclass, field
from enum import StrEnum

from keepalive.core.facts import ModelId


class Outcome(StrEnum):
    OK = "ok"
    EMPTY = "empty"  # a whole answer without one word
    CLIENT_GONE = "client_gone"
    UPSTREAM_ERROR = "upstream_error"  # it could not be reached, or said no
    TIMEOUT = "timeout"  # the model did not get warm in time, or the upstream stopped in a head
    CUT = "cut"  # the upstream's answer ended before its end
    STALLED = "stalled"  # the upstream's answer had begun and fell silent
    REJECTED = "rejected"  # by us: key, origin, size


@dataclass(frozen=True, slots=True)
class Key:
    """A caller's key: `name` may be shown, `secret` never."""

    name: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Begun:
    """How a request begins: by the name of an opening. `mostly`: what comes behind it is less than half as long."""

    opening: str
    mostly: bool = False


# Not frozen, though nobody changes one: it is made for each request, and a frozen one takes four times as long.
@dataclass(slots=True)
class Seen:
    """One request, when it is over: for metrics and the log. Holds nothing that was said."""

    model: ModelId | None
    route: str
    key: str | None  # name of the caller's key
    outcome: Outcome
    status: int
    start: str | None = None  # "warm", "cold", "primed"; None for a model that nobody keeps
    begun: Begun | None = None  # with what, where the model had read that before
    wait_seconds: float = 0.0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    events: int = 0
    gaps: tuple[int, ...] = ()
    gap_seconds: float = 0.0
    error: str | None = None  # the code of what it was told by us instead of an answer, or at its end
