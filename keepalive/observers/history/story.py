"""What is remembered of one model: its last loads and losses, and a day of states, pings and waits.

Pure, and bounded however long the daemon runs and however often the model fails. Times are Unix seconds as the
wall clock told them. Somebody may have set it back meanwhile, so the order of the entries is what counts: none
is believed to be later than the one that came after it.
"""

from collections import Counter, deque
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from keepalive.core.facts import Fact, LoadEnded, LoadOutcome, PingEnded, PingOutcome, WaitEnded
from keepalive.core.records import Cause, Model
from keepalive.core.states import State

HOUR = 3600.0
DAY = 24 * HOUR
LAST = 20
# A model that flaps every few seconds all day leaves a coarser picture, not a longer one.
CHANGES_MAX = 300
HOURS_MAX = 48
# The state of what nobody watches, because the daemon does not run.
OFF = "off"


class Loaded(NamedTuple):
    at: float
    outcome: LoadOutcome
    seconds: float


class Evicted(NamedTuple):
    at: float
    cause: Cause
    idle_seconds: float


class Changed(NamedTuple):
    at: float
    state: State | str


class Pinged(NamedTuple):
    at: float
    outcome: PingOutcome
    seconds: float


class Waited(NamedTuple):
    at: float
    seconds: float
    served: bool


class Asked(NamedTuple):
    """Requests that came at `at`, and were answered for so long once their model was there."""

    at: float
    seconds: float
    times: int = 1


Entry = Loaded | Evicted | Changed | Pinged | Waited | Asked


def entries(fact: Fact, before: Model, after: Model, at: float) -> Iterator[Entry]:
    """What is worth remembering of a fact that was known at `at`."""
    match fact:
        case LoadEnded(outcome=LoadOutcome.OK):
            yield Loaded(at, fact.outcome, after.recent_loads[-1])
        case LoadEnded():
            yield Loaded(at, fact.outcome, fact.elapsed)
        case PingEnded():
            yield Pinged(at, fact.outcome, fact.seconds)
        case WaitEnded():
            yield Waited(at, fact.seconds, fact.served)
    if after.evictions > before.evictions and after.last_eviction is not None:
        yield Evicted(at, after.last_eviction.cause, after.last_eviction.idle_seconds)
    if after.state is not before.state:
        yield Changed(at, after.state)


def hour_of(at: float) -> int:
    return int(at // HOUR)


class Story:
    """One model's. `changes` are in the order in which they came."""

    __slots__ = ("changes", "evictions", "loads", "pings", "waits")

    def __init__(self) -> None:
        self.loads: deque[Loaded] = deque(maxlen=LAST)
        self.evictions: deque[Evicted] = deque(maxlen=LAST)
        self.changes: list[Changed] = []
        self.pings: dict[int, Counter[PingOutcome]] = {}  # by the hour
        self.waits: dict[int, tuple[int, float]] = {}  # how many and how long in all, by the hour

    def add(self, entry: Entry) -> None:
        match entry:
            case Loaded():
                self.loads.append(entry)
            case Evicted():
                self.evictions.append(entry)
            case Changed():
                self._add_change(entry)
            case Pinged():
                self.add_pings(hour_of(entry.at), entry.outcome, 1)
            case Waited():
                self.add_waits(hour_of(entry.at), 1, entry.seconds)

    def add_pings(self, hour: int, outcome: PingOutcome, count: int) -> None:
        self.pings.setdefault(hour, Counter())[outcome] += count
        _drop_oldest(self.pings)

    def add_waits(self, hour: int, requests: int, seconds: float) -> None:
        had, waited = self.waits.get(hour, (0, 0.0))
        self.waits[hour] = had + requests, waited + seconds
        _drop_oldest(self.waits)

    def _add_change(self, change: Changed) -> None:
        changes = self.changes
        if changes and changes[-1].state == change.state:
            return
        changes.append(change)
        while len(changes) > 2 and changes[1].at <= change.at - DAY:
            del changes[0]
        while len(changes) > CHANGES_MAX:
            spans = [later.at - earlier.at for earlier, later in pairwise(changes)]
            shortest = spans.index(min(spans))
            # What came before it lasts on through it.
            del changes[shortest]
            if shortest > 0 and changes[shortest - 1].state == changes[shortest].state:
                del changes[shortest]

    def begin_with(self, past: "Story") -> None:
        """Put what an earlier life of the daemon left behind before what this one has seen."""
        self.loads = deque([*past.loads, *self.loads], LAST)
        self.evictions = deque([*past.evictions, *self.evictions], LAST)
        own, self.changes = self.changes, past.changes
        for change in own:
            self._add_change(change)
        for hour, counts in past.pings.items():
            for outcome, count in counts.items():
                self.add_pings(hour, outcome, count)
        for hour, (requests, seconds) in past.waits.items():
            self.add_waits(hour, requests, seconds)

    def timeline(self, now: float) -> list[Changed]:
        """The last 24 hours, oldest first; begins with the state at their beginning, if it is known."""
        line: list[Changed] = []
        end = now
        for at, state in reversed(self.changes):
            at = min(at, end)
            if line and at == line[-1].at:
                continue  # it did not last
            if line and line[-1].state == state:
                line.pop()
            line.append(Changed(max(at, now - DAY), state))
            if at <= now - DAY:
                break
            end = at
        return line[::-1]

    def pings_lately(self, now: float) -> dict[PingOutcome, int]:
        counts = dict.fromkeys(PingOutcome, 0)
        for hour in _day_before(now):
            for outcome, count in self.pings.get(hour, {}).items():
                counts[outcome] += count
        return counts

    def waits_lately(self, now: float) -> tuple[int, float]:
        found = [self.waits[hour] for hour in _day_before(now) if hour in self.waits]
        return sum(requests for requests, _ in found), sum(seconds for _, seconds in found)


def _day_before(now: float) -> range:
    return range(hour_of(now) - 23, hour_of(now) + 1)


def _drop_oldest(hours: dict[int, Counter[PingOutcome]] | dict[int, tuple[int, float]]) -> None:
    while len(hours) > HOURS_MAX:
        del hours[min(hours)]
