"""A whole world in one thread: a virtual clock, LM Studio servers, the daemon's core, and all that goes wrong.

`VirtualLoop` is a stock event loop whose selector advances a counter instead of waiting: an hour takes as long
as its work. `World` puts the real keeper with its real client in front of simulated servers, lets an adversary
drawn from a seed loose on them, and `Judge` looks at what the servers saw and at what the keeper believed. Same
seed, same trace.
"""

import asyncio
import contextvars
import errno
import hashlib
import json
import random
import selectors
import traceback
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import httpx

from keepalive.core import errors
from keepalive.core.apply import apply
from keepalive.core.errors import Unreachable
from keepalive.core.facts import (
    ClockJumped,
    Fact,
    InstanceLost,
    Listed,
    ListingFailed,
    LoadRemembered,
    ModelId,
    OursRecalled,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
)
from keepalive.core.moves import BACKOFF_MAX
from keepalive.core.plan import arranged, blocked_by
from keepalive.core.records import LISTING_LAG, Model, Policy, Upstream
from keepalive.core.states import State
from keepalive.keeper.given import Keep, Replay, Server
from keepalive.keeper.keeper import Keeper
from keepalive.keeper.ledger import UNSEEN_LEAST
from keepalive.lmstudio.client import Client
from keepalive.simulator.exchange import Cut, Refusal, Request
from keepalive.simulator.models import Instance, Load, SimModel
from keepalive.simulator.sdk import SdkSession
from keepalive.simulator.studio import Studio

HOUR = 3600.0
# A keeper that looks at its clock this often within one instant plans in circles.
LOOKS_AT_ONCE = 3000
T = TypeVar("T")


class Broken(AssertionError):
    """An invariant does not hold."""


# --- a clock that nobody waits for ------------------------------------------------------------------


class VirtualSelector(selectors.SelectSelector):
    """Nothing is ever ready; waiting moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Broken("deadlock: nothing will ever happen again\n" + all_stacks())
        if timeout > 0:
            self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)
        self.steps = 0
        self.on_step: Callable[[int], None] | None = None

    def time(self) -> float:
        return self._virtual.now

    def _run_once(self) -> None:
        self.steps += 1
        if self.on_step is not None:
            self.on_step(self.steps)
        super()._run_once()  # type: ignore[misc]


def all_stacks() -> str:
    lines = []
    for task in asyncio.all_tasks(asyncio.get_running_loop()):
        lines.append(f"{task.get_name()}: {task.get_coro()}")
        lines += [f"    {frame.f_code.co_qualname}:{frame.f_lineno}" for frame in task.get_stack()]
    return "\n".join(lines)


def run_virtually(
    make: Callable[[], Coroutine[Any, Any, T]], make_loop: Callable[[], VirtualLoop] = VirtualLoop
) -> T:
    """Run to the end on a virtual clock; exceptions that nobody awaited are failures, too."""
    loop = make_loop()
    lost: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: lost.append(context))
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(make())
    if lost:
        raise Broken(f"exceptions that nobody awaited: {lost}")
    return result


# --- the way to a server ------------------------------------------------------------------------------

# Which life of the daemon a request comes from; None for everybody else. Timers inherit it, so that what a
# request of ours sets in motion is known as ours.
LIFE: contextvars.ContextVar[int | None] = contextvars.ContextVar("life", default=None)
LISTINGS = ("/api/v1/models", "/api/v0/models", "/v1/models")
PINGS = ("/v1/chat/completions", "/v1/embeddings")


class InProcess(httpx.AsyncBaseTransport):
    """Hands requests to a simulated server without sockets; `network` is what lies between."""

    def __init__(self, site: "Site", life: int) -> None:
        self.site = site
        self.life = life

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        site, path = self.site, request.url.raw_path.decode()
        match site.network:
            case "closed":
                raise httpx.ConnectError("refused") from ConnectionRefusedError(errno.ECONNREFUSED, "refused")
            case "unreachable":
                raise httpx.ConnectError("no route") from OSError(errno.EHOSTUNREACH, "no route to host")
            case "hangs":
                await asyncio.sleep(request.extensions["timeout"]["connect"])
                raise httpx.ConnectTimeout("timed out")
        body = await request.aread()
        headers = {name.lower(): value for name, value in request.headers.items()}
        token = LIFE.set(self.life)
        judge = site.judge
        judge.request_begins(site, self.life, path, body)
        answer: bytes | None = None
        try:
            try:
                reply = await site.studio.handle(Request(request.method, path, "", headers, body))
            except Refusal as refusal:  # unloaded while it hung
                reply = refusal.reply
            answer = await reply.read()
        except Cut as cut:
            if cut.how == "refused":
                error = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
                raise httpx.ConnectError("refused") from error
            raise httpx.ReadError("the connection was reset") from None
        finally:
            judge.request_ends(site, self.life, path, body, answer)
            LIFE.reset(token)
        headers = {**reply.headers, "date": site.studio.date()}
        return httpx.Response(reply.status, headers=headers, stream=httpx.ByteStream(answer))


class InProcessSocket:
    """The same for the socket of LM Studio's SDKs."""

    def __init__(self, site: "Site", life: int, path: str) -> None:
        self.site = site
        self.life = life
        self.inbox: asyncio.Queue[str | None] = asyncio.Queue()
        self.open = True
        self.session = SdkSession(site.studio, path, self._hear, self._hang_up)
        site.studio.on_power.append(self._power)
        site.sockets.append(self)

    @classmethod
    async def dial(cls, site: "Site", life: int, path: str) -> "InProcessSocket":
        if site.network == "hangs" or site.studio.vanished:
            await asyncio.sleep(HOUR)
        if site.network != "open" or not site.studio.up:
            raise Unreachable("nothing listens", refused=True)
        return cls(site, life, path)

    async def send(self, text: str) -> None:
        if not self.open:
            raise errors.Cut("it is gone")
        if self.site.network in ("hangs", "unreachable"):
            return  # it is lost on the way
        token = LIFE.set(self.life)
        try:
            await self.session.hear(text)
        except Cut:
            self._hang_up()
        finally:
            LIFE.reset(token)

    async def receive(self) -> str | None:
        return await self.inbox.get()

    async def close(self) -> None:
        self._hang_up()
        await self.session.close()

    async def _hear(self, frame: str | bytes) -> None:
        assert isinstance(frame, str)
        if self.open and self.site.network == "open":
            self.inbox.put_nowait(frame)

    def _hang_up(self) -> None:
        if self.open:
            self.open = False
            self.site.studio.on_power.remove(self._power)
            self.site.sockets.remove(self)
            self.inbox.put_nowait(None)

    def _power(self, up: bool) -> None:
        if not up:
            self._hang_up()


class SeenClient(Client):
    """The daemon's own, whose loads the judge sees whichever way they go."""

    def __init__(
        self,
        site: "Site",
        life: int,
        transport: httpx.AsyncBaseTransport,
        dial: Any,
        acts: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(
            site.name,
            f"http://{site.name}:1234",
            token=site.token,
            transport=transport,
            list_timeout=10.0,
            sdk=site.sdk,
            dial=dial,
            acts=acts,
        )
        self.site, self.life = site, life
        self.loads_under_way: Counter[str] = Counter()

    async def load(self, key: str, fields: Any, **more: Any) -> Any:
        with self._counted(key):
            return await super().load(key, fields, **more)

    async def ping(self, target: str, *rest: Any, **more: Any) -> Any:
        """A load, too, where it has a lease."""
        with self._counted(target) if more.get("lease") is not None else nullcontext():
            return await super().ping(target, *rest, **more)

    @contextmanager
    def _counted(self, key: str) -> Iterator[None]:
        self.site.judge.load_begins(self.site, self.life, key)
        self.loads_under_way[key] += 1
        try:
            yield
        finally:
            self._load_ends(key)

    def is_replaced(self) -> None:
        """By another one, as of another server: nobody waits for what this one has asked."""
        for key in list(self.loads_under_way.elements()):
            self._load_ends(key)

    def _load_ends(self, key: str) -> None:
        if self.loads_under_way[key]:
            self.loads_under_way[key] -= 1
            self.site.judge.load_ends(self.site, self.life, key)


@dataclass
class Site:
    """One LM Studio and the way to it."""

    name: str
    studio: Studio
    judge: "Judge"
    models: list[SimModel]
    token: str | None = None
    network: str = "open"
    auto_evict: bool | None = None
    refresh: float = 30.0
    max_loading: int = 1
    memory: int | None = None
    sdk: bool = False
    sockets: list[InProcessSocket] = field(default_factory=list)  # that are open


# --- the judge ------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the newest listing showed of a model."""

    asked: float
    ids: tuple[str, ...]
    blind: bool


class Judge:
    """Looks at what the servers saw, and at every fact. Raises `Broken` when an invariant does not hold."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.trace = hashlib.sha256()
        self.lately: deque[str] = deque(maxlen=4000)
        self.counted: Counter[str] = Counter()
        self.broken: list[str] = []
        self.listing: dict[tuple[str, int], list[float]] = {}
        self.seen: dict[tuple[str, str], Seen] = {}
        self.loading: Counter[tuple[str, int, str]] = Counter()
        self.load_over: dict[tuple[str, str], float] = {}
        self.loads_sent: dict[tuple[str, str], deque[float]] = {}
        self.pings_sent: dict[tuple[str, str], deque[float]] = {}
        self.timers: dict[tuple[str, str], float] = {}
        self.disturbed: deque[float] = deque()
        self.ours: set[tuple[str, str]] = set()  # (site, instance id) loaded or being loaded by us
        self.born: dict[tuple[str, str], float] = {}  # when that load began
        self.visible: dict[tuple[str, str], frozenset[str]] = {}  # what could be known then
        self.load_timeouts: dict[tuple[str, str], float] = {}
        self.ping_intervals: dict[tuple[str, str], float] = {}
        self.in_use: Counter[tuple[str, str]] = Counter()
        # Ids that we loaded, and whether a listing has shown them since: who has not seen one missing cannot
        # know that somebody else has loaded it anew under the same id.
        self.presumed: dict[tuple[str, str], bool] = {}
        self.up_at: dict[str, float] = {}  # when a site was last started
        # Whose open load has no known length.
        self.guessed: set[tuple[str, str]] = set()
        # Sites that are back: since when, until when we have to look at them, or to load there, and from what.
        self.owed_looks: dict[str, tuple[float, float, str]] = {}
        self.owed_loads: dict[str, tuple[float, float, str]] = {}

    def say(self, line: str) -> None:
        line = f"{self.now():.6f} {line}"
        self.trace.update(line.encode())
        self.lately.append(line)

    def fail(self, invariant: str, text: str) -> None:
        self.say(f"BROKEN {invariant}: {text}")
        self.broken.append(f"{invariant} at {self.now():.3f}: {text}")

    def watch(self, site: Site) -> None:
        site.studio.journal.watchers.append(lambda event: self.happened(site, event))

    def disturb(self) -> None:
        """Something happened that allows a load or a ping outside of the usual pace."""
        self.disturbed.append(self.now())
        while self.disturbed and self.disturbed[0] < self.now() - HOUR:
            self.disturbed.popleft()

    def owe_nothing(self, site: str | None = None) -> None:
        """Something else goes wrong (there), so that being late proves nothing any more."""
        for owed in (self.owed_looks, self.owed_loads):
            for name in [site] if site else list(owed):
                owed.pop(name, None)

    def looked_at(self, site: str) -> None:
        self.settle_up(self.owed_looks, site, "nobody asked it")

    def settle_up(self, owed: dict[str, tuple[float, float, str]], site: str, text: str) -> None:
        since, until, kind = owed.pop(site, (0.0, self.now(), ""))
        if self.now() > until:
            self.fail("I17", f"{site} is back since {self.now() - since:.0f} s from {kind}, and {text}")

    # what requests of ours show

    def request_begins(self, site: Site, life: int, path: str, body: bytes) -> None:
        now = self.now()
        if path in LISTINGS:
            open_now = self.listing.setdefault((site.name, life), [])
            if open_now:
                self.lists_twice(site)
            open_now.append(now)
            self.looked_at(site.name)
        elif path in PINGS:
            asked = json.loads(body)
            if "ttl" not in asked and site.studio.tier != "openai":
                self.ping_begins(site, self.key_of(site, asked["model"]))

    def lists_twice(self, site: Site) -> None:
        self.fail("I10", f"two listings of {site.name} at once")

    def request_ends(self, site: Site, life: int, path: str, body: bytes, answer: bytes | None) -> None:
        if path in LISTINGS:
            asked = self.listing[site.name, life].pop(0)
            if answer is not None:
                self.listed(site, asked, answer)

    def load_ends(self, site: Site, life: int, key: str) -> None:
        self.loading[site.name, life, key] -= 1
        self.load_over[site.name, key] = self.now()

    def key_of(self, site: Site, name: str) -> str:
        keys = [m.key for m in site.models]
        return name if name in keys else name.rsplit(":", 1)[0]

    def listed(self, site: Site, asked: float, answer: bytes) -> None:
        try:
            rows = json.loads(answer)
            if "models" in rows:
                shown = {r["key"]: tuple(i["id"] for i in r["loaded_instances"]) for r in rows["models"]}
                blind = False
            else:
                loaded = [r["id"] for r in rows["data"] if r.get("state") == "loaded"]
                blind = not any("state" in r for r in rows["data"])
                shown = {
                    m.key: tuple(i for i in loaded if self.key_of(site, i) == m.key) for m in site.models
                }
        except (ValueError, KeyError, TypeError):
            return
        for key, ids in shown.items():
            old = self.seen.get((site.name, key))
            if old is None or asked >= old.asked:
                self.seen[site.name, key] = Seen(asked, ids, blind)
                self.presume(site, key, ids)

    def presume(self, site: Site, key: str, ids: tuple[str, ...]) -> None:
        for (name, ident), shown in list(self.presumed.items()):
            if name == site.name and self.key_of(site, ident) == key:
                if ident in ids:
                    self.presumed[name, ident] = True
                elif shown:
                    del self.presumed[name, ident]

    def load_begins(self, site: Site, life: int, key: str) -> None:
        place = site.name, key
        self.loading[site.name, life, key] += 1
        self.settle_up(self.owed_loads, site.name, "nothing was loaded there")
        if self.loading[site.name, life, key] > 1:
            self.fail("I1", f"two loads of {key} at once")
        seen = self.seen.get(place)
        if seen is None or seen.asked < self.load_over.get(place, -1.0):
            self.fail("I2", f"{key} is loaded without a listing asked since its last load ended")
        elif seen.ids:
            self.fail("I2", f"{key} is loaded though {seen.ids} was listed")
        self.count(self.loads_sent, place, 40, "loads")

    def ping_begins(self, site: Site, key: str) -> None:
        seen = self.seen.get((site.name, key))
        if seen is None or (not seen.ids and not seen.blind):
            self.fail("I4", f"{key} is pinged though the newest listing does not show it")
        limit = 60 + int(HOUR / self.ping_intervals[site.name, key])
        model = next(m for m in site.models if m.key == key)
        timers = [i.ttl_seconds for i in site.studio.memory.copies(model) if i.ttl_seconds]
        self.timers[site.name, key] = min([*timers, self.timers.get((site.name, key), HOUR)])
        # What has a timer is used before it strikes.
        limit += int(2 * HOUR / self.timers[site.name, key]) if site.sdk else 0
        self.count(self.pings_sent, (site.name, key), limit, "pings")

    def count(
        self, sent: dict[tuple[str, str], deque[float]], place: tuple[str, str], limit: int, what: str
    ) -> None:
        times = sent.setdefault(place, deque())
        times.append(self.now())
        while times[0] < self.now() - HOUR:
            times.popleft()
        lately = [t for t in self.disturbed if t >= self.now() - HOUR]
        if len(times) > limit + 8 * len(lately):
            self.fail("I10", f"{len(times)} {what} of {place[1]} within an hour")

    # what the server did

    def happened(self, site: Site, event: dict[str, Any]) -> None:
        kind, life = event["kind"], LIFE.get()
        rest = {k: v for k, v in event.items() if k not in ("n", "t")}
        self.say(f"{site.name} {life} {rest}")
        if kind == "load.started":
            self.load_started(site, event, life)
        elif kind == "unloaded" and event["by"] == "rest" and life is not None:
            self.check_ours(site, event["instance_id"], "was unloaded, and is not ours")
            if self.in_use[site.name, event["model"]]:
                self.fail("I5", f"{event['instance_id']} was unloaded while a user's request was on it")
        elif kind == "evicted" and life is not None and event["by"] != "control":
            self.displaced(site, event)
        if kind in ("unloaded", "evicted", "expired", "load.failed", "load.cancelled") or (
            kind == "crashed" and not event["stays_listed"]
        ):
            self.ours.discard((site.name, event["instance_id"]))
            self.born.pop((site.name, event["instance_id"]), None)
        if kind == "restart.up":
            self.up_at[site.name] = self.now()
        if kind in ("restart.down", "vanished"):
            self.owe_nothing(site.name)
            self.ours = {o for o in self.ours if o[0] != site.name}
            self.born = {o: t for o, t in self.born.items() if o[0] != site.name}
        if kind in (
            "restart.down",
            "restart.up",
            "vanished",
            "evicted",
            "expired",
            "crashed",
            "unloaded",
            "tier.changed",
        ):
            self.disturb()

    def load_started(self, site: Site, event: dict[str, Any], life: int | None) -> None:
        key, place = event["model"], (site.name, event["instance_id"])
        others = [
            i
            for i in [*site.studio.memory.instances.values(), *site.studio.memory.loads.values()]
            if i.model.key == key and not (isinstance(i, Load) and i.instance_id == event["instance_id"])
        ]
        if life is not None:
            seen = self.seen.get((site.name, key))
            if event["owner"] == "jit" and site.studio.tier == "v1":
                if seen is None or not seen.ids:
                    self.fail("I4", f"a ping loaded {key} on demand")
                self.counted["raced: gone between listing and ping"] += 1
            for other in others:
                self.second_copy(site, key, other, seen)
            self.ours.add(place)
            self.presumed[place] = False
            self.visible[place] = self.visible_now(site)
        self.born[place] = self.now()

    def second_copy(self, site: Site, key: str, other: Instance | Load, seen: Seen | None) -> None:
        ident = other.instance_id if isinstance(other, Load) else other.id
        age = self.now() - self.born.get((site.name, ident), -1e9)
        stuck = isinstance(other, Load) and other.result == "stuck"
        hidden = not site.studio.faults.flag("v0_shows_loading") or site.studio.tier == "openai"
        if (site.name, ident) not in self.ours:
            self.counted["raced: somebody else loaded it meanwhile"] += 1
        elif stuck and hidden and age >= LISTING_LAG:
            self.counted["given up: a load that never ends, unseen"] += 1
        elif hidden and (site.name, key) in self.guessed and age >= believed_in(site, key):
            self.counted["given up: unseen for longer than anybody could know that it takes"] += 1
        else:
            self.fail(
                "I3", f"a second copy of {key} beside {ident}, which is ours and {age:.1f} s old; {seen}"
            )

    def displaced(self, site: Site, event: dict[str, Any]) -> None:
        ident, by = event["instance_id"], event["by"]
        was_there = self.born.get((site.name, ident), 0.0) < self.born.get((site.name, by), 0.0)
        if was_there and ident in self.visible.get((site.name, by), frozenset()):
            self.check_ours(site, ident, f"not ours, was displaced by {by}")
        else:
            self.counted["raced: displaced what came meanwhile"] += 1

    def visible_now(self, site: Site) -> frozenset[str]:
        """What we could know to be there, or on its way."""
        listed = {i for (name, _), seen in self.seen.items() if name == site.name for i in seen.ids}
        shows = site.studio.faults.flag("v0_shows_loading")
        return frozenset(listed | (set(site.studio.memory.loads) if shows else set()))

    def check_ours(self, site: Site, ident: str, text: str) -> None:
        if (site.name, ident) in self.ours:
            return
        if (site.name, ident) in self.presumed:
            self.counted["raced: loaded anew by somebody else under the same id"] += 1
            return
        self.fail("I5", f"{ident} {text}")

    # what the keeper believed

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(before, Model) and after != before:
            stale = isinstance(fact, Listed) and fact.asked <= max(before.asked, before.touched_at)
            stale = stale or (isinstance(fact, ListingFailed) and fact.asked <= before.asked)
            if stale:
                self.fail("I9", f"a stale answer changed {before.id}")
        if not isinstance(after, Model):
            return
        if after.pending is not None and after.pending.ours:
            (self.guessed.add if after.pending.expected is None else self.guessed.discard)(after.id)
        if after.state in (State.UNKNOWN, State.BACKOFF) and not after.reason:
            self.fail("I8", f"{after.id} is {after.state} without a reason, after {type(fact).__name__}")
        if isinstance(before, Model) and after.evictions > before.evictions and after.last_eviction:
            late = isinstance(fact, Listed) and fact.sight.late
            watched = before.seen_by.session and before.ttl is not None and not late
            seen = "seen by the socket" if watched else "not seen by a socket"
            self.counted[f"evicted: {after.last_eviction.cause}, {seen}"] += 1
        if isinstance(before, Model) and before.state is not after.state:
            self.say(f"{after.id} {before.state} -> {after.state} by {type(fact).__name__}: {after.reason}")


def believed_in(site: Site, key: str) -> float:
    """Seconds for which a load is believed in that nobody has ever seen succeed, as the manual says it."""
    size = next(m.size_bytes for m in site.models if m.key == key)
    by_size = 240.0 if site.studio.tier != "v1" else min(max(2 * size / 50e6, 120.0), 240.0)
    return by_size + LISTING_LAG


def virtually(scenario: Callable[[Judge], Coroutine[Any, Any, T]]) -> T:
    """Run a scenario; afterwards no invariant may have been broken on the way."""

    async def go() -> T:
        judge = Judge(asyncio.get_running_loop().time)
        result = await scenario(judge)
        if judge.broken:
            raise Broken("; ".join(judge.broken))
        return result

    return run_virtually(go)


# --- the daemon -------------------------------------------------------------------------------------------


@dataclass
class Note:
    """What the ledger remembers of an open load, by the wall clock."""

    started: float
    expected: float | None
    tells_loading: bool


class Memory:
    """The ledger on disk: it outlives the daemon."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self.open: dict[ModelId, Note] = {}
        self.ours: dict[ModelId, tuple[frozenset[str], float, float]] = {}  # when seen, and the shortest load
        self.wall = wall

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if not isinstance(before, Model) or not isinstance(after, Model):
            return
        if is_open(after) and not is_open(before):
            started = self.wall() - (fact.at - (after.loading_since or fact.at))
            self.open[after.id] = Note(started, after.expected_load, after.tells_loading)
        elif is_open(before) and not is_open(after):
            self.open.pop(after.id, None)
        elif is_open(after) and after.id in self.open:
            self.open[after.id].tells_loading = after.tells_loading
        if after.ours and after.policy.auto:
            if after.ours != before.ours or (isinstance(fact, Listed) and after.asked > before.asked):
                self.ours[after.id] = after.ours, self.wall(), min(after.recent_loads, default=0.0)
        elif after.recalled is None:
            self.ours.pop(after.id, None)

    def forget_times(self) -> None:
        """As if every open load were the first one ever of its model."""
        self.open = {model: replace(note, expected=None) for model, note in self.open.items()}

    def recall(self, model: ModelId, at: float) -> LoadRemembered | None:
        note = self.open.get(model)
        if note is None:
            return None
        ago = max(0.0, self.wall() - note.started)
        return LoadRemembered(at, model, at - ago, note.expected, note.tells_loading)

    def recall_ours(self, model: ModelId, at: float) -> OursRecalled | None:
        ids, seen, shortest = self.ours.get(model, (frozenset[str](), -1e9, 0.0))
        left = max(UNSEEN_LEAST, shortest) - (self.wall() - seen)
        return OursRecalled(at, model, ids, at + left) if ids and left > 0 else None


def is_open(model: Model) -> bool:
    return model.load_started is not None or (model.pending is not None and model.pending.ours)


class Life:
    """One process of the daemon, from its start to its end by kill -9."""

    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.number = number
        self.dead = False
        self.replayable = True  # until the config changes, which is no fact
        self.facts: list[tuple[Fact, ModelId | str]] = []
        self.start: dict[ModelId, Model] = {}
        self.last = 0.0
        self.looked_at, self.looks = 0.0, 0
        self.keeper = Keeper(
            self.clock,
            [self, *world.observers],
            world.reported.append,
            lambda _, opening: world.openings.get(opening),
        )
        self.clients = [
            SeenClient(site, number, InProcess(site, number), partial(InProcessSocket.dial, site, number))
            for site in world.sites
        ]
        self.tasks: list[asyncio.Task[Any]] = []

    def clock(self) -> float:
        now = asyncio.get_running_loop().time()
        self.looks = self.looks + 1 if now == self.looked_at else 0
        self.looked_at = now
        if self.looks > LOOKS_AT_ONCE:
            raise Broken(f"I10: the keeper never rests\n{self.world.story()}")
        self.last = max(now, self.last + 1e-7)
        return self.last

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if self.dead:
            return
        if isinstance(after, Model) and isinstance(before, Model):
            self.start.setdefault(before.id, before)
            self.facts.append((fact, after.id))
        self.world.memory.observe(fact, before, after)
        self.world.judge.observe(fact, before, after)

    def begin(self) -> None:
        world = self.world
        servers = [
            Server(site.name, client, site.refresh, site.max_loading, site.auto_evict, site.memory)
            for site, client in zip(world.sites, self.clients, strict=True)
        ]
        self.keeper.configure(servers, world.keeps)
        for keep in world.keeps:
            remembered = world.memory.recall(keep.model, self.clock()) if world.remembers else None
            if remembered is not None:
                self.keeper.record(remembered)
        self.tasks = [
            asyncio.ensure_future(self.keeper.run()),
            asyncio.ensure_future(self.tick()),
        ]

    async def tick(self) -> None:
        while True:
            await asyncio.sleep(self.world.tick)
            self.keeper.tick()

    def kill(self) -> None:
        """kill -9: nothing is recorded any more. Its sockets close, which is what LM Studio sees of it."""
        self.dead = True
        for task in self.tasks:
            task.cancel()

    def failure(self) -> BaseException | None:
        for task in self.tasks:
            if task.done() and not task.cancelled():
                return task.exception()
        return None

    def replay(self) -> None:
        """I8: the records are a function of the facts."""
        if not self.replayable:
            return
        models = dict(self.start)
        for fact, model in self.facts:
            models[model] = apply(models[model], fact)
        for shelf in self.keeper._shelves.values():
            for key, model in shelf.models.items():
                if model.id in models and models[model.id] != model:
                    self.world.judge.fail("I8", f"{key}: replayed facts give another record")


# --- the world ----------------------------------------------------------------------------------------------


@dataclass
class World:
    seed: int
    sites: list[Site]
    keeps: list[Keep]
    judge: Judge
    chance: random.Random
    tick: float = 5.0
    pace: float = 300.0  # mean seconds between two faults
    kinds: tuple[str, ...] = ()
    remembers: bool = True  # the ledger works
    observers: list[Any] = field(default_factory=list)
    reported: list[BaseException] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    openings: dict[str, Replay] = field(default_factory=dict)
    lives: int = 0
    wall_offset: float = 1_790_000_000.0
    # In the order in which they came: a set's is that of addresses, and another one in each process.
    users: dict[asyncio.Task[Any], None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = Memory(lambda: self.judge.now() + self.wall_offset)
        for site in self.sites:
            self.judge.watch(site)
        for keep in self.keeps:
            self.judge.load_timeouts[keep.model] = keep.policy.load_timeout
            self.judge.ping_intervals[keep.model] = keep.policy.ping_interval
        self.life = None

    life: Life | None = field(default=None, init=False)

    def start(self) -> Life:
        self.lives += 1
        self.judge.disturb()
        self.judge.say(f"life {self.lives}")
        self.life = Life(self, self.lives)
        self.life.begin()
        return self.life

    async def kill(self) -> None:
        assert self.life is not None
        self.judge.owe_nothing()
        self.life.replay()
        self.life.kill()
        await asyncio.gather(*self.life.tasks, return_exceptions=True)
        for client in self.life.clients:
            await client.close()
        await self.end_users()

    async def end_users(self) -> None:
        for task in list(self.users):
            task.cancel()
        await asyncio.gather(*self.users, return_exceptions=True)

    def check(self) -> None:
        life = self.life
        assert life is not None
        failure = None if life.dead else life.failure()
        if failure is not None:
            story = "".join(traceback.format_exception(failure))
            raise Broken(f"seed {self.seed}: I0: the daemon died:\n{story}") from failure
        now = asyncio.get_running_loop().time()
        for model in life.keeper.snapshot().models:
            # While a user is answered the claim stands; after him the next listing decides.
            late = now - max(model.proof_expires, model.used_at + model.policy.refresh_interval)
            if (
                model.state is State.WARM
                and not model.in_flight
                and not model.calling
                and late > 120 + self.tick
            ):
                self.judge.fail("I8", f"{model.id} claims to be warm {late:.0f} s after its proof ran out")
        for name, (_, until, _) in list(self.judge.owed_looks.items()):
            if now > until:
                self.judge.looked_at(name)
        for name, (_, until, _) in list(self.judge.owed_loads.items()):
            if now > until and any(m.wanted and not m.instances for m in life.keeper.snapshot().of(name)):
                self.judge.settle_up(self.judge.owed_loads, name, "nothing was loaded there")
        tasks = len(asyncio.all_tasks())
        if tasks > 20 + 12 * (len(self.keeps) + len(self.sites)) + 2 * len(self.users):
            self.judge.fail("I16", f"{tasks} tasks")
        if self.judge.broken:
            raise Broken(self.story())

    def story(self) -> str:
        lines = "\n".join(list(self.judge.lately)[-60:])
        first = {line.split()[0]: line for line in reversed(self.judge.broken)}
        return f"seed {self.seed}: " + "; ".join(first.values()) + f"\n{lines}"

    # people

    def record(self, make: Callable[..., Fact], model: ModelId, *rest: Any) -> None:
        if self.life is not None and not self.life.dead:
            self.life.keeper.record(make(self.life.clock(), model, *rest))  # type: ignore[arg-type]

    def use(self, keep: Keep, site: Site, seconds: float, **more: Any) -> None:
        """A user's request through the proxy: it waits until the model is warm, then goes on."""
        task = asyncio.ensure_future(self._use(keep, site, seconds, **more))
        self.begun(task)

    def begun(self, task: asyncio.Task[Any]) -> None:
        self.users[task] = None
        task.add_done_callback(self.users.pop)

    async def _use(self, keep: Keep, site: Site, seconds: float, **more: Any) -> None:
        life, began = self.life, asyncio.get_running_loop().time()
        assert life is not None
        self.record(WaitStarted, keep.model)
        served = False
        try:
            while not served and asyncio.get_running_loop().time() < began + 600:
                model = next((m for m in life.keeper.snapshot().models if m.id == keep.model), None)
                served = model is not None and model.given
                if not served:
                    await asyncio.sleep(2.0)
        finally:
            if self.life is life:
                self.record(WaitEnded, keep.model, asyncio.get_running_loop().time() - began, served)
        if served and self.life is life and site.network == "open":
            await self._ask(life, keep, site, seconds, **more)

    async def _ask(self, life: Life, keep: Keep, site: Site, seconds: float, **more: Any) -> None:
        self.record(RequestStarted, keep.model)
        self.judge.in_use[keep.model] += 1
        answered = False
        try:
            async with asyncio.timeout(seconds):
                status, text = await self.chat(site, keep.model.key, **more)
            answered = status == 200
            if status == 400 and ("unloaded" in text or "crashed" in text):
                self.record(InstanceLost, keep.model, text[:80])
        except (Cut, Refusal, TimeoutError):
            pass
        finally:
            self.judge.in_use[keep.model] -= 1
            if self.life is life:
                self.record(RequestEnded, keep.model, answered)

    async def chat(self, site: Site, key: str, **more: Any) -> tuple[int, str]:
        """Somebody's request, past the daemon."""
        embeds = "embed" in key
        path = "/v1/embeddings" if embeds else "/v1/chat/completions"
        what: dict[str, Any] = {"input": "x"} if embeds else {"messages": [{"role": "user", "content": "x"}]}
        body = json.dumps({"model": key, "max_tokens": 3, **what, **more}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {site.token or ''}"}
        reply = await site.studio.handle(Request("POST", path, "", headers, body))
        return reply.status, (await reply.read()).decode()

    # the adversary

    async def go_wrong(self, until: float) -> None:
        """Inject faults until then, and put everything right at the end."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / self.pace))
            if loop.time() >= until:
                break
            kind = self.chance.choice(self.kinds)
            self.judge.say(f"fault {kind}")
            self.judge.owe_nothing()
            self.injected[kind] += 1
            await self.inject(kind)
        self.put_right()

    def put_right(self) -> None:
        for site in self.sites:
            site.network = "open"
            faults = site.studio.faults
            site.studio.set_faults({name: None for name in list(faults._rules) if name not in LASTING})
            stuck = any(load.result == "stuck" for load in site.studio.memory.loads.values())
            if not site.studio.up:
                site.studio.restart(1.0)
                continue
            if stuck:
                site.studio.restart(0.0)  # seen in reality: nothing else ends such a load
            for instance in [i for i in site.studio.memory.instances.values() if i.crashed]:
                if site.studio.tier != "v1" or not self.is_kept_as_ours(site, instance.id):
                    site.studio.memory.unload(instance, by="hand")  # we may not, so somebody has to
        for keep in self.keeps:
            self.record(WindowOpened, keep.model)

    def is_kept_as_ours(self, site: Site, instance_id: str) -> bool:
        assert self.life is not None
        return any(instance_id in m.ours for m in self.life.keeper.snapshot().of(site.name))

    def switch(self, site: Site, seconds: float, **faults: Any) -> None:
        site.studio.set_faults(faults)
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, lambda: site.studio.set_faults(dict.fromkeys(faults)))

    def cut_off(self, site: Site, how: str, seconds: float) -> None:
        site.network = how
        asyncio.get_running_loop().call_later(seconds, lambda: setattr(site, "network", "open"))

    def is_missed(self, site: Site) -> bool:
        """Whether the daemon knows that this one is in trouble."""
        known = self.life.keeper.snapshot().upstreams if self.life is not None else ()
        return any(upstream.failures for upstream in known if upstream.name == site.name)

    def comes_back(self, site: Site, kind: str, after: float) -> None:
        """Where nothing else is wrong by then, it has to be noticed soon."""

        faults_before = self.injected.total()

        def back() -> None:
            now = self.judge.now()
            odd = site.studio.faults.shown().keys() - LASTING
            if site.network != "open" or not site.studio.up or odd:
                return
            if kind == "away for long":
                if self.judge.up_at.get(site.name, 0.0) < now - 0.01:
                    return  # another outage, within this one, has ended it sooner
            elif self.injected.total() != faults_before:
                return
            if kind in LOOKED_AT and not self.is_missed(site):
                return  # it was over before anybody looked
            until = now + BACK_WITHIN[kind] + self.tick
            owed = self.judge.owed_looks if kind in LOOKED_AT else self.judge.owed_loads
            if owed is self.judge.owed_looks or site.studio.tier == "v1":
                owed[site.name] = now, until, kind

        asyncio.get_running_loop().call_later(after + 0.001, back)

    async def inject(self, kind: str) -> None:
        chance = self.chance
        site = chance.choice(self.sites)
        studio = site.studio
        keep = chance.choice([k for k in self.keeps if k.model.upstream == site.name])
        key, seconds = keep.model.key, chance.choice([5.0, 30.0, 90.0, 300.0])
        times = chance.randint(1, 4)
        known = next(m for m in site.models if m.key == key)
        match kind:
            case "load slow":
                slow = known.load_seconds * chance.uniform(1.0, 1.9)
                self.switch(site, 600, load_seconds={"value": slow, "model": key, "times": times})
            case "load fails":
                self.switch(site, 600, load_result={"value": "fail", "times": times})
                self.lose(site, key)
            case "load refused":
                self.switch(site, seconds, load_result="guardrail")
                self.lose(site, key)
            case "load stuck":
                self.switch(site, 600, load_result={"value": "stuck", "times": 1})
                self.lose(site, key)
                asyncio.get_running_loop().call_later(chance.uniform(100, 2000), lambda: studio.restart(5.0))
            case "load cut" | "load unanswered" | "load garbled" | "load 500" | "load 200 with error":
                how = {
                    "load cut": chance.choice(["fin", "rst"]),
                    "load unanswered": "hang",
                    "load garbled": chance.choice(["html_500", "empty_body", "truncated_json"]),
                    "load 500": "error_500",
                    "load 200 with error": "error_200",
                }[kind]
                after = chance.choice([-1.0, 0.0, chance.uniform(0, known.load_seconds)])
                self.switch(
                    site,
                    600,
                    load_reply={"value": how, "times": times},
                    load_reply_after_seconds=after,
                )
                self.lose(site, key)
            case "socket odd":
                how = chance.choice(["refused", "garbled", "silent", "errors", "drops"])
                self.switch(site, seconds, sdk_answers={"value": how, "chance": chance.choice([0.3, 1.0])})
                if chance.random() < 0.5:
                    self.lose(site, key)
            case "load's socket dies":
                self.switch(site, 600, load_cuts_socket=chance.choice([0, 1, 2, 50]))
                self.lose(site, key)
            case "load late":
                self.switch(site, 900, load_reply_delay_seconds={"value": seconds, "times": times})
                self.lose(site, key)
            case "listing lags":
                self.switch(site, 900, listing_lag_seconds=chance.uniform(1, 30))
                self.lose(site, key)
            case "listing slow":
                slow = chance.choice([chance.uniform(0.5, 4.5), chance.uniform(5, 15)])
                self.switch(site, seconds, list_delay_seconds=slow)
                if chance.random() < 0.5:
                    self.lose(site, key)
            case "listing garbled":
                how = chance.choice([*GARBLED, "other_shape", "hang"])
                self.switch(site, seconds, list_reply={"value": how, "chance": chance.choice([0.3, 1.0])})
            case "load start 500":
                self.switch(site, 600, html_500_at_load_start="listing")
                self.lose(site, key)
            case "evicted" | "crashed" | "crashed, listed":
                if kind == "evicted":
                    self.lose(site, key)
                else:
                    with suppress(ValueError):
                        studio.crash(key, stays_listed=kind == "crashed, listed")
            case "restart":
                studio.restart(chance.choice([0.0, 0.5, 20.0, 200.0]))
            case "port closed":
                # `lms server stop`, or the end of a tunnel: what is loaded stays, and what is being loaded goes on.
                self.cut_off(site, "closed", seconds)
                for socket in list(site.sockets):
                    socket._hang_up()
            case "unreachable":
                self.cut_off(site, "unreachable", seconds)
            case "connect hangs":
                self.cut_off(site, "hangs", seconds)
            case "stalled":
                self.switch(site, seconds, stalled=True)
            case "another loads it":
                with suppress(ValueError):
                    studio.load(key, seconds=chance.uniform(0, 20))
            case "another loads by request":
                other = chance.choice(site.models).key
                ttl = chance.choice([30, 120, 3600])
                task = asyncio.ensure_future(self.someone(site, other, ttl))
                self.begun(task)
            case "another unloads it":
                for instance in list(studio.memory.copies(studio.memory.find(key))):
                    studio.memory.unload(instance, by="hand")
            case "wants a token":
                where = chance.choice([{}, {"auth_on_chat_only": True}])
                self.switch(site, seconds, auth_token="sk-lm-other:token", **where)
            case "upgraded or downgraded":
                studio.set_tier(chance.choice(["v1", "v0", "openai"]))
                studio.set_faults(auto_evict=studio.tier != "openai")
                studio.restart(200.0)
            case "another model answers":
                self.switch(site, seconds, answer_model={"value": "somebody-else", "route": "inference"})
            case "ping garbled":
                how = chance.choice([*GARBLED, "unloaded"])
                self.switch(site, seconds, answer={"value": how, "times": times})
            case "takes no ping":
                refusing = chance.choice([{"needs_image": True}, {"content_refused": "plain"}])
                self.switch(site, seconds, **refusing)
                self.lose(site, key)
            case "ping unanswered":
                self.switch(site, seconds, answer={"value": "hang", "times": times})
            case "ping slow":
                self.switch(site, 600, prompt_seconds=chance.choice([30.0, 100.0]))
            case "users":
                for _ in range(times):
                    self.use(keep, site, chance.choice([1.0, 60.0, 900.0]))
            case "by hand":
                self.judge.disturb()
                self.record(chance.choice([WarmAsked, ReleaseAsked]), keep.model)
            case "window":
                self.record(chance.choice([WindowOpened, WindowClosed]), keep.model)
            case "clock jumps":
                self.judge.disturb()
                if self.life is not None:
                    self.life.keeper.record(ClockJumped(self.life.clock(), site.name, 3600.0))
            case "away for long":
                away = chance.uniform(40, 3600)
                studio.restart(away)
                self.comes_back(site, kind, away)
            case "vanishes":
                self.cut_off(site, "hangs", seconds)
                studio.vanish(seconds)
                self.comes_back(site, kind, seconds)
            case "401 for a moment":
                moment = chance.uniform(0.5, 20)
                studio.set_faults(unauthorized={"value": True, "seconds": moment})
                self.comes_back(site, kind, moment)
            case "says that it loads":
                after = chance.choice([0, 3])
                studio.set_faults(
                    loading_503={"value": "always", "seconds": seconds}, loading_retry_after=after
                )
                self.comes_back(site, kind, seconds)
            case "answer stalls":
                self.switch(
                    site, 900, stream_breaks={"value": "stall", "times": times}, stream_breaks_after=1
                )
                self.use(keep, site, chance.choice([60.0, 900.0, 3600.0]), stream=True)
            case "power cut while loading":
                self.lose(site, key)
                await asyncio.sleep(chance.uniform(0, 120))
                await self.kill()
                self.memory.forget_times()
                studio.restart(1.0)
                await asyncio.sleep(chance.choice([0.0, 5.0, 30.0]))
                self.start()
                self.comes_back(site, kind, 5.0)
            case "killed":
                await self.kill()
                await asyncio.sleep(chance.choice([0.0, 1.0, 30.0]))
                self.start()
            case "killed while loading":
                self.lose(site, key)
                await asyncio.sleep(chance.uniform(0, 120))
                await self.kill()
                self.start()
            case _:
                raise AssertionError(kind)

    def lose(self, site: Site, key: str) -> None:
        with suppress(ValueError):
            site.studio.evict(key)

    async def someone(self, site: Site, key: str, ttl: int) -> None:
        with suppress(Cut, Refusal):
            await self.chat(site, key, ttl=ttl)

    # the end

    async def settle(self, within: float) -> None:
        """I15: the world lets them, so everything wanted becomes warm."""
        loop = asyncio.get_running_loop()
        end = loop.time() + within
        while loop.time() < end:
            await asyncio.sleep(20.0)
            self.check()
            if not self.unsettled():
                return
        raise Broken(f"seed {self.seed}: I15: {self.unsettled()}\n{self.story()}")

    def unsettled(self) -> list[str]:
        assert self.life is not None
        snapshot, odd = self.life.keeper.snapshot(), []
        for site in self.sites:
            upstream = next(u for u in snapshot.upstreams if u.name == site.name)
            models = snapshot.of(site.name)
            wanted = [m for m in models if m.wanted]
            blocked = {m.id: blocked_by(upstream, models, m) for m in wanted}
            room = arranged(upstream, models, snapshot.now)
            for model in wanted:
                if room is not None and model.id in room.never and model.state is State.COLD:
                    continue  # there is no room for it, nor could there be
                if model.state is not State.WARM and not (
                    blocked[model.id] and self.rightly_blocked(site, wanted)
                ):
                    odd.append(f"{model.id} is {model.state}: {model.reason} {blocked[model.id]}")
                if model.state is State.WARM and not self.is_loaded(site, model):
                    odd.append(f"{model.id} is said to be warm")
            odd += [f"{m.id}: ours, and unwanted" for m in models if not m.held and m.ours]
            odd += [f"{m.id}: a call is under way" for m in models if m.calling]
        return odd

    def rightly_blocked(self, site: Site, wanted: list[Model]) -> bool:
        """On 0.3.x one model may have to wait for another, or for what somebody else loaded."""
        foreign = [i for i in site.studio.memory.instances if not self.is_kept_as_ours(site, i)]
        first_is_warm = min(wanted, key=lambda m: m.rank).state is State.WARM
        return site.studio.tier == "v0" and bool(foreign or first_is_warm)

    def is_loaded(self, site: Site, model: Model) -> bool:
        return any(i.model.key == model.id.key for i in site.studio.memory.instances.values()) or model.blind

    async def live(self, hours: float) -> str:
        """Everything goes wrong for `hours`, then nothing does; returns the hash of the trace."""
        self.start()
        adversary = asyncio.ensure_future(self.go_wrong(hours * HOUR))
        while not adversary.done():
            await asyncio.sleep(60.0)
            self.check()
        await adversary
        longest = max(k.policy.load_timeout for k in self.keeps)
        await self.settle(2 * longest + 2 * BACKOFF_MAX + 1500.0)
        await self.kill()
        self.check_reports()
        if self.judge.broken:
            raise Broken(self.story())
        for site in self.sites:
            site.studio.close()
        return self.judge.trace.hexdigest()

    def check_reports(self) -> None:
        if self.reported and not self.observers:
            raise Broken(f"an observer raised: {self.reported[0]!r}")


# What is a property of a server, not something that is wrong with it.
LASTING = {"auto_evict", "v0_shows_loading", "loads_in_parallel", "jit_stampede"}
# I17: how soon a server that is back from this is looked at, or has a load, in seconds.
BACK_WITHIN = {
    "away for long": 3.0,  # a refused connection costs nothing to try
    "vanishes": 20.0,  # one that times out is tried less often
    "says that it loads": 3.0,
    "401 for a moment": 60.0,
    "power cut while loading": 300.0,  # nobody is left who could say that the load is dead
}
LOOKED_AT = BACK_WITHIN.keys() - {"power cut while loading"}
GARBLED = ("error_200", "error_500", "html_500", "empty_body", "truncated_json", "fin", "rst")
KINDS = (
    "load slow",
    "load fails",
    "load refused",
    "load stuck",
    "load cut",
    "load unanswered",
    "load garbled",
    "load 500",
    "load 200 with error",
    "socket odd",
    "load's socket dies",
    "load late",
    "load start 500",
    "listing lags",
    "listing slow",
    "listing garbled",
    "evicted",
    "crashed",
    "crashed, listed",
    "restart",
    "port closed",
    "unreachable",
    "connect hangs",
    "stalled",
    "another loads it",
    "another loads by request",
    "another unloads it",
    "wants a token",
    "upgraded or downgraded",
    "another model answers",
    "ping garbled",
    "takes no ping",
    "ping unanswered",
    "ping slow",
    "users",
    "by hand",
    "window",
    "clock jumps",
    "away for long",
    "vanishes",
    "401 for a moment",
    "says that it loads",
    "answer stalls",
    "power cut while loading",
    "killed",
    "killed while loading",
)


# What models read ahead: two, so that one may be given up and the other not.
OPENINGS: dict[str, Replay] = {
    name: (
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": name}, {"role": "user", "content": "."}],
            "max_tokens": 1,
        },
    )
    for name in ("agent", "ward")
}


def drawn(seed: int, *, calm: bool = False, short: bool = False) -> World:
    """A world whose servers, models, policies, faults and their rates come from the seed.

    A calm one has few faults and long intervals, so that a hundred hours of it cost little. In one that is short of
    memory models are let go for each other.
    """
    # What that takes is not of the same chance, or every other world would be another one.
    chance, needs = random.Random(seed), random.Random(seed + 2)
    loop = asyncio.get_running_loop()
    judge = Judge(loop.time)
    sites, keeps = [], []
    for name in ("alpha", "beta")[: 1 if calm else chance.choice([1, 1, 2])]:
        models = []
        for n in range(chance.randint(2, 3 if calm else 4)):
            load_seconds = float(chance.choice([1, 3, 12, 40, 90, 200]))
            models.append(
                SimModel(
                    f"acme/{'embed' if n == 2 else 'model'}-{n}",
                    kind="embedding" if n == 2 else "llm",
                    # From disks of all kinds.
                    size_bytes=int(load_seconds * chance.uniform(100e6, 1e9)),
                    load_seconds=load_seconds,
                )
            )
        hidden = chance.random() < 0.3
        tier = chance.choices(["v1", "v0", "openai"], [8, 2, 1])[0]
        evicts = tier != "openai" and chance.random() < 0.7
        faults = {"v0_shows_loading": not hidden, "auto_evict": evicts}
        studio = Studio(models, tier=tier, faults=faults, rng=random.Random(seed + 1))
        refresh = chance.choice([60.0, 120.0]) if calm else float(chance.choice([15, 20, 30, 45, 60]))
        loading = chance.choice([1, 1, 2])
        sees = chance.random() < 0.6
        site = Site(name, studio, judge, models, refresh=refresh, max_loading=loading, sdk=sees)
        sites.append(site)
        policy = Policy(
            refresh_interval=refresh,
            ping_interval=600.0 if calm else float(chance.choice([60, 120, 300, 600])),
            ping_timeout=60.0,
            load_timeout=float(chance.choice([450, 900])),
        )
        kept = models if chance.random() < 0.5 else models[:-1]
        for m in kept:
            openings = dict.fromkeys(OPENINGS) if m.kind == "llm" else {}
            own = policy
            if short and needs.random() < 0.8:
                own = replace(policy, auto=True, idle=needs.choice([None, None, 1800.0]))
            keeps.append(Keep(ModelId(name, m.key), own, kind=m.kind, windowed=True, openings=openings))
        if short and needs.random() < 0.7:
            site.memory = int(sum(m.size_bytes for m in models) * 1.2 * needs.choice([0.5, 0.7, 1.0]))
    return World(
        seed,
        sites,
        keeps,
        judge,
        chance,
        tick=30.0 if calm else chance.choice([1.0, 5.0, 5.0, 5.0]),
        pace=3600.0 if calm else float(chance.choice([120, 300, 600])),
        kinds=tuple(chance.sample(KINDS, k=chance.randint(6, len(KINDS)))),
        openings=OPENINGS,
    )


def live(
    seed: int, hours: float, *, calm: bool = False, short: bool = False, **changes: Any
) -> tuple[str, World]:
    """One run from its seed; the hash of its trace, and the world as it was at the end."""

    async def go() -> tuple[str, World]:
        world = drawn(seed, calm=calm, short=short)
        for name, value in changes.items():
            setattr(world, name, value)
        return await world.live(hours), world

    return run_virtually(go)
