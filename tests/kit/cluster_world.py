"""The world of `world.py` with several daemons as one in it, and an etcd of its own.

Each member is the real keeper with its real client and the real code of `keepalive/cluster`, which asks the simulated
etcd through the same seam as a real one. A member is a process that may be stopped, suspended, killed and started
again, cut off from etcd, from a server, or from both; what it sends may come late, or come and its answer be lost.

Judged by the log of each LM Studio, whoever did it: no load beside another one of ours or beside an instance; no
unload of what a member's callers use; nothing begun by one while another holds that upstream. Where nothing is wrong
with LM Studio itself (`sound`), besides: every caller of what is warm there is answered soon, by every member that
reaches it, whatever etcd does; nobody is sent away but for want of etcd; and after each trouble all is warm everywhere
within `ttl`, the loads and 15 s. Where models take turns for want of room, what was loaded goes no sooner than whoever
waited for it has had it, and nobody waits longer than `a_turn`.

Not judged, because nobody could know better:
- what callers use through a member whose lease in etcd has run out: the holder does not know of it, unless LM Studio's
  socket shows it;
- a load that is begun beside one that was believed in for as long as it could take (`given up` in `second_copy`);
- a load whose first byte was under way, or about to go, while its sender was stopped or cut off until another holder
  had given it up: messages arrive here within the margin of a lease, or never.
"""

import asyncio
import json
import random
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import httpx

from keepalive.cluster.etcd import Access, Answer, Etcd
from keepalive.cluster.given import Self
from keepalive.cluster.hold import Hold
from keepalive.cluster.member import Cluster
from keepalive.core import errors
from keepalive.core.errors import NotWarm, Unreachable
from keepalive.core.facts import (
    ClockJumped,
    InstanceLost,
    LoadEnded,
    LoadOutcome,
    ModelId,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
)
from keepalive.core.moves import BACKOFF_MAX
from keepalive.core.records import LISTING_LAG, Model, Policy
from keepalive.core.room import SETTLE
from keepalive.http1.vanished import ASKED_SECONDS
from keepalive.keeper.given import Keep, Server
from keepalive.keeper.keeper import Keeper
from keepalive.simulator.exchange import Cut, Refusal, Request
from keepalive.simulator.models import Load, SimModel
from keepalive.simulator.sdk import SdkSession
from keepalive.simulator.studio import Studio
from tests.kit.processes import Process, ProcessLoop, outside
from tests.kit.simulated_etcd import BY, Kv, SimulatedEtcd, Watch
from tests.kit.world import (
    HOUR,
    KINDS,
    LIFE,
    LISTINGS,
    Broken,
    Judge,
    Life,
    Memory,
    Seen,
    SeenClient,
    Site,
    World,
    believed_in,
    drawn,
    run_virtually,
)

ADDRESSES = tuple(f"http://etcd-{n}:2379" for n in range(3))
PREFIX = "/keepalive/ward/"
# A message takes no longer; far less than the margin of the shortest lease.
LATENCY = 0.15
# Ways on which everything is lost, and for how long the kernel sends it again (`vanished.socket_options`).
LOSING = ("hangs", "unreachable")
GIVEN_UP_AFTER = float(ASKED_SECONDS)
# Whoever asks a member for what is warm is answered within so long.
ANSWERED_WITHIN = 5.0


# --- the ways between -------------------------------------------------------------------------------


class EtcdLink:
    """The way of one machine to etcd. `how`: open, cut, refused; `loses`: of so many messages one goes wrong."""

    def __init__(self, etcd: SimulatedEtcd, chance: random.Random) -> None:
        self.etcd = etcd
        self.chance = chance
        self.how = "open"
        self.loses = 0.0
        self.watches: dict[Watch, asyncio.Queue[bytes | None]] = {}

    def end_watches(self, *, told: bool) -> None:
        """The connections of its watches are gone, which is told, or is not."""
        for watch, stream in self.watches.items():
            self.etcd.watches.pop(watch, None)
            if told:
                stream.put_nowait(None)

    def reaches(self, address: str) -> bool:
        return self.how == "open" and self.etcd.members[address] == "up" and self.etcd.there

    def delay(self) -> float:
        return self.chance.uniform(0.0005, LATENCY if self.chance.random() < 0.1 else 0.01)


class Way:
    """The same, as one process has it: what `Etcd` sends goes through here."""

    def __init__(self, link: EtcdLink, process: Process, life: int) -> None:
        self.link, self.process, self.life = link, process, life

    @asynccontextmanager
    async def post(
        self, url: str, body: Any, headers: Mapping[str, str], connect: float, /
    ) -> AsyncIterator[Answer]:
        if self.process.dead:
            raise asyncio.CancelledError
        address, path = url[: url.index("/v3/")], url[url.index("/v3/") :]
        # Whoever stops to wait does not call back what is under way.
        token = BY.set(self.life)
        carried = outside(self._carry(address, path, body))
        BY.reset(token)
        answer = await asyncio.shield(carried)
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(answer, asyncio.Queue):
            try:
                yield Answer(200, _lines(answer))
            finally:
                for watch in [w for w, stream in self.link.watches.items() if stream is answer]:
                    del self.link.watches[watch]
                    self.link.etcd.watches.pop(watch, None)
        else:
            yield Answer(answer[0], _once(json.dumps(answer[1]).encode()))

    async def close(self) -> None: ...

    async def _carry(self, address: str, path: str, body: Any) -> Any:
        """What comes back; None: nothing ever does."""
        link, chance = self.link, self.link.chance
        if link.how == "refused" or link.etcd.members[address] == "refuses":
            return ConnectionRefusedError("refused")
        await asyncio.sleep(link.delay())
        fate = "well"
        if chance.random() < link.loses:
            fate = chance.choice(("lost", "answer lost", "late", "answer late"))
        if fate == "late":
            await asyncio.sleep(chance.uniform(0, 12))
        if fate == "lost" or not link.reaches(address):
            return None
        if path == "/v3/watch":
            return self._stream(address, body)
        answer = link.etcd.answer(path, body)
        await asyncio.sleep(chance.uniform(0, 6) if fate == "answer late" else link.delay())
        return None if fate == "answer lost" or not link.reaches(address) else answer

    def _stream(self, address: str, body: Any) -> asyncio.Queue[bytes | None]:
        stream: asyncio.Queue[bytes | None] = asyncio.Queue()
        link, loop = self.link, asyncio.get_running_loop()
        delay = link.delay()

        def send(line: bytes | None) -> None:
            if line is None:
                stream.put_nowait(None)
            elif link.reaches(address):
                for _ in range(2 if link.chance.random() < link.loses else 1):
                    loop.call_later(delay, stream.put_nowait, line)

        link.watches[link.etcd.watch(address, body, send)] = stream
        return stream


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _lines(stream: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (line := await stream.get()) is not None:
        yield line


class Wire(httpx.AsyncBaseTransport):
    """The way of one process to a server."""

    def __init__(self, site: Site, member: "Member") -> None:
        self.site, self.member = site, member
        self.listings = 0  # that are waited for

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path not in LISTINGS:
            return await self._ask(request)
        self.listings += 1
        if self.listings > 1:
            self.site.judge.fail("I10", f"{self.member.machine.name} lists {self.site.name} twice at once")
        try:
            return await self._ask(request)
        finally:
            self.listings -= 1

    async def _ask(self, request: httpx.Request) -> httpx.Response:
        member = self.member
        if member.dead:
            raise asyncio.CancelledError
        match member.way_to(self.site):
            case "closed":
                raise httpx.ConnectError("refused") from ConnectionRefusedError(111, "refused")
            case "unreachable":
                raise httpx.ConnectError("no route") from OSError(113, "no route to host")
            case "hangs":
                await asyncio.sleep(request.extensions["timeout"]["connect"])
                raise httpx.ConnectTimeout("timed out")
        await asyncio.sleep(member.machine.delay())
        body = await request.aread()
        if (trace := request.extensions.get("trace")) is not None:
            await trace("http11.send_request_headers.started", {})
        if member.dead:
            raise asyncio.CancelledError
        carried = outside(self._carry(request, body))
        try:
            answer = await asyncio.shield(carried)
        except asyncio.CancelledError:
            # Its connection ends. What was sent before arrives all the same.
            outside(self._hang_up(carried))
            raise
        if isinstance(answer, Exception):
            raise answer
        status, headers, content = answer
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(content))

    async def _hang_up(self, carried: asyncio.Task[Any]) -> None:
        while self.member.way_to(self.site) in LOSING and not carried.done():
            await asyncio.sleep(0.5)
        await asyncio.sleep(LATENCY)
        carried.cancel()

    async def _carry(self, request: httpx.Request, body: bytes) -> Any:
        site, member, judge = self.site, self.member, self.site.judge
        path = request.url.raw_path.decode()
        await asyncio.sleep(member.machine.delay())
        if not await member.arrives(site):
            return httpx.ReadError("nothing was acknowledged")
        headers = {name.lower(): value for name, value in request.headers.items()}
        judge.request_begins(site, member.number, path, body)
        answer: bytes | None = None
        try:
            try:
                reply = await site.studio.handle(Request(request.method, path, "", headers, body))
            except Refusal as refusal:
                reply = refusal.reply
            answer = await reply.read()
        except Cut as cut:
            if cut.how == "refused":
                return httpx.ConnectError("refused")
            return httpx.ReadError("the connection was reset")
        finally:
            judge.request_ends(site, member.number, path, body, answer)
        await asyncio.sleep(member.machine.delay())
        if not await member.arrives(site):
            return httpx.ReadError("the connection was reset")
        return reply.status, {**reply.headers, "date": site.studio.date()}, answer


class Socket:
    """The way to the socket of LM Studio's SDKs. What is said there is heard in order, outside of the process."""

    def __init__(self, site: Site, member: "Member", path: str) -> None:
        self.site, self.member = site, member
        self.inbox: asyncio.Queue[str | None] = asyncio.Queue()
        self.outbox: asyncio.Queue[str | None] = asyncio.Queue()
        self.open = True
        self.serving = outside(self._serve(path))
        site.studio.on_power.append(self._power)

    @classmethod
    async def dial(cls, site: Site, member: "Member", path: str) -> "Socket":
        if member.way_to(site) == "hangs" or site.studio.vanished or member.dead:
            await asyncio.sleep(HOUR)
        if member.way_to(site) != "open" or not site.studio.up:
            raise Unreachable("nothing listens", refused=True)
        return cls(site, member, path)

    async def send(self, text: str) -> None:
        if not self.open:
            raise errors.Cut("it is gone")
        if not self.member.dead:
            self.outbox.put_nowait(text)

    async def receive(self) -> str | None:
        return await self.inbox.get()

    async def close(self) -> None:
        self._hang_up()
        await asyncio.wait([self.serving])

    async def _serve(self, path: str) -> None:
        session = SdkSession(self.site.studio, path, self._hear, self._hang_up)
        try:
            while (text := await self.outbox.get()) is not None:
                await asyncio.sleep(self.member.machine.delay() / 10)
                if not await self.member.arrives(self.site):
                    self._hang_up()
                    break
                await session.hear(text)
        except Cut:
            self._hang_up()
        finally:
            await session.close()

    async def _hear(self, frame: str | bytes) -> None:
        assert isinstance(frame, str)
        if not await self.member.arrives(self.site):
            self._hang_up()
        elif self.open:
            self.inbox.put_nowait(frame)

    def _hang_up(self) -> None:
        if self.open:
            self.open = False
            self.site.studio.on_power.remove(self._power)
            self.inbox.put_nowait(None)
            self.outbox.put_nowait(None)

    def _power(self, up: bool) -> None:
        if not up:
            self._hang_up()


# --- the members --------------------------------------------------------------------------------------


class Well:
    """Since when nothing is wrong with something."""

    def __init__(self) -> None:
        self.troubles = 0
        self.since = 0.0

    @contextmanager
    def ill(self) -> Iterator[None]:
        self.troubles += 1
        try:
            yield
        finally:
            self.troubles -= 1
            self.since = asyncio.get_running_loop().time()

    def was(self, since: float) -> bool:
        return not self.troubles and self.since <= since


@dataclass
class Machine:
    """Where a member lives: what outlives it, and what lies between it and the others."""

    name: str
    instance: str
    link: EtcdLink
    memory: Memory
    chance: random.Random
    booted: float  # what its clock shows that goes on while it sleeps, at the beginning
    wall: float
    member: "Member | None" = None
    ways: dict[str, str] = field(default_factory=dict)
    # Since when nothing is wrong with it for its callers, and with its way to etcd.
    well: "Well" = field(default_factory=lambda: Well())
    reaches_etcd: "Well" = field(default_factory=lambda: Well())

    def delay(self) -> float:
        return self.chance.uniform(0.0005, 0.02)


class Member(Process):
    """One process of the daemon."""

    clock = Life.clock
    failure = Life.failure
    replay = Life.replay

    def __init__(self, world: "ClusterWorld", machine: Machine, number: int) -> None:
        super().__init__()
        self.world, self.machine, self.number = world, machine, number
        self.began = world.judge.now()
        self.replayable = True
        self.facts: list[Any] = []
        self.start: dict[ModelId, Any] = {}
        self.last, self.looked_at, self.looks = 0.0, 0.0, 0
        self.told: Counter[str] = Counter()
        engine = Etcd(ADDRESSES, Access(), Hold(world.ttl).interval, Way(machine.link, self, number))
        me = Self("ward", machine.instance, machine.name, "1")
        self.cluster = Cluster(engine, me, world.ttl, lambda: self.keeper, self.clock, self.awake, self.tell)
        self.keeper = Keeper(
            self.clock,
            [self, self.cluster],
            world.reported.append,
            lambda _, opening: world.openings.get(opening),
            self.cluster,
        )
        self.clients = self.make_clients()
        self.closing: list[Any] = []  # of before the config was read anew; what they do goes on
        self.tasks: list[asyncio.Task[Any]] = []
        self.users: dict[asyncio.Task[Any], None] = {}
        self.using: Counter[tuple[str, str]] = Counter()
        self.held: dict[asyncio.Task[Any], tuple[ModelId, float]] = {}  # callers that wait, and since when

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() - self.slept

    def awake(self) -> float:
        return asyncio.get_running_loop().time() + self.machine.booted

    def wall(self) -> float:
        return asyncio.get_running_loop().time() + self.machine.wall

    def way_to(self, site: Site) -> str:
        return self.machine.ways.get(site.name, site.network) if site.network == "open" else site.network

    async def arrives(self, site: Site) -> bool:
        """Whether what is under way between them does: it is sent again and again, but not for ever."""
        until = self.world.judge.now() + GIVEN_UP_AFTER
        while self.way_to(site) in LOSING and self.world.judge.now() < until:
            await asyncio.sleep(0.5)
        return self.way_to(site) == "open"

    def may_act(self, upstream: str) -> bool:
        return self.cluster.acts(upstream) or self.keeper.alone(upstream)

    def tell(self, event: str, *, well: bool, **fields: object) -> None:
        self.told[event] += 1
        self.world.judge.counted[event] += 1
        self.world.judge.say(f"{self.machine.name} {event} {fields}")

    def observe(self, fact: Any, before: Any, after: Any) -> None:
        if not self.dead:
            if isinstance(after, type(before)) and hasattr(before, "id"):
                self.start.setdefault(before.id, before)
                self.facts.append((fact, after.id))
            self.machine.memory.observe(fact, before, after)
            self.world.judge.observe(fact, before, after)

    def servers(self) -> list[Server]:
        return [
            Server(site.name, client, site.refresh, site.max_loading, site.auto_evict, site.memory)
            for site, client in zip(self.world.sites, self.clients, strict=True)
        ]

    def make_clients(self) -> list[SeenClient]:
        return [
            SeenClient(
                site,
                self.number,
                Wire(site, self),
                partial(Socket.dial, site, self),
                partial(self.may_act, site.name),
            )
            for site in self.world.sites
        ]

    def reload(self) -> None:
        self.replayable = False
        if not any(keep.policy.auto for keep in self.world.keeps):
            # As if its servers were elsewhere from now on. What is loaded is anybody's then, and would not be let go.
            for client in self.clients:
                client.is_replaced()
            self.clients = self.make_clients()
        self.cluster.kept(keep.model for keep in self.world.keeps)
        self.closing += self.keeper.configure(self.servers(), self.keeps())

    def keeps(self) -> list[Keep]:
        windows = self.world.windows
        return [replace(keep, window_open=windows.get(keep.model, True)) for keep in self.world.keeps]

    def begin(self) -> None:
        world = self.world
        LIFE.set(self.number)
        self.keeper.configure(self.servers(), self.keeps())
        for keep in world.keeps:
            remembered = self.machine.memory.recall(keep.model, self.clock()) if world.remembers else None
            if remembered is not None:
                self.keeper.record(remembered)
            ours = self.machine.memory.recall_ours(keep.model, self.clock())
            if ours is not None:
                self.keeper.record(ours)
        self.tasks = [
            asyncio.ensure_future(part) for part in (self.keeper.run(), self.cluster.run(), self.tick())
        ]

    async def tick(self) -> None:
        """As the schedule does: it notices what the wall clock does, and plans again."""
        offset = self.wall() - self.monotonic()
        while True:
            await asyncio.sleep(self.world.tick)
            step, offset = self.wall() - self.monotonic() - offset, self.wall() - self.monotonic()
            if abs(step) >= 2.0:
                for site in self.world.sites:
                    self.keeper.record(ClockJumped(self.clock(), site.name, step))
            self.keeper.tick()

    async def end(self, *, killed: bool) -> None:
        self.replay()
        if killed:
            self.kill()
        else:
            self.cluster.leaving = True
        for task in [*self.tasks, *self.users]:
            task.cancel()
        await asyncio.gather(*self.tasks, *self.users, return_exceptions=True)
        for client in [*self.closing, *self.clients]:
            await client.close()
        if not killed:
            await asyncio.gather(self.run(lambda: asyncio.ensure_future(self.cluster.close())))
            self.dead = True


# --- the judge ------------------------------------------------------------------------------------------


class ClusterJudge(Judge):
    """What the members' knowledge is, each has its own: of a listing, of a load's end, of what is guessed."""

    world: "ClusterWorld"

    def __init__(self, now: Callable[[], float]) -> None:
        self.sights: dict[int | None, dict[tuple[str, str], Seen]] = {}
        self.overs: dict[int | None, dict[tuple[str, str], float]] = {}
        self.guesses: dict[int | None, set[tuple[str, str]]] = {}
        self.assumed: dict[int | None, dict[tuple[str, str], bool]] = {}
        self.ended: set[int | None] = set()
        # Copies whose load one of the members has seen end, and who was there then to know of it.
        self.seen_to_end: dict[tuple[str, str], set[int]] = {}
        # When copies of others went last, by their model: a listing of before still shows them.
        self.strangers_went: dict[tuple[str, str], float] = {}
        super().__init__(now)

    def observe(self, fact: Any, before: Any, after: Any) -> None:
        super().observe(fact, before, after)
        if isinstance(fact, LoadEnded) and fact.outcome is LoadOutcome.OK and fact.instance_id:
            here = next(member for member in self.world.living() if member.number == LIFE.get())
            tells = here.machine.reaches_etcd.was(self.now()) and here.machine.well.was(
                self.now() - self.world.ttl
            )
            told = self.world.living() if tells else [here]
            self.seen_to_end[fact.model.upstream, fact.instance_id] = {member.number for member in told}

    # The properties stand for plain attributes of a judge of one daemon.
    seen = property(lambda self: self.sights.setdefault(LIFE.get(), {}), lambda self, _: None)
    load_over = property(lambda self: self.overs.setdefault(LIFE.get(), {}), lambda self, _: None)
    guessed = property(lambda self: self.guesses.setdefault(LIFE.get(), set()), lambda self, _: None)
    presumed = property(lambda self: self.assumed.setdefault(LIFE.get(), {}), lambda self, _: None)

    def begun(self, life: int) -> None:
        known: dict[tuple[str, str], bool] = {}
        for other in self.assumed.values():
            known |= other
        self.assumed[life] = known

    def over(self, life: int) -> None:
        self.ended.add(life)
        for found in (self.sights, self.overs, self.guesses, self.assumed):
            found.pop(life, None)

    def ping_begins(self, site: Site, key: str) -> None:
        if LIFE.get() not in self.ended:  # else it was on its way
            super().ping_begins(site, key)

    def lists_twice(self, site: Site) -> None:
        """One may have given up the first of them, which LM Studio hears later. `Wire` sees what is waited for."""

    def holds(self, site: Site, life: int, what: str) -> None:
        """One hand: by etcd's own row."""
        kv = self.world.etcd.kvs.get(f"{PREFIX}holders/{site.name}")
        if kv is not None and kv.by != life and not self.world.is_excused(site, life):
            self.fail("C1", f"{what} at {site.name} by life {life}, while life {kv.by} holds it")

    def request_begins(self, site: Site, life: int, path: str, body: bytes) -> None:
        super().request_begins(site, life, path, body)
        if path not in LISTINGS and body:
            self.holds(site, life, path)

    def load_started(self, site: Site, event: dict[str, Any], life: int | None) -> None:
        if life is not None:
            self.holds(site, life, f"a load of {event['model']}")
        super().load_started(site, event, life)
        if life is not None:
            for known in self.assumed.values():
                known[site.name, event["instance_id"]] = False

    def second_copy(self, site: Site, key: str, other: Any, seen: Seen | None) -> None:
        ident = other.instance_id if isinstance(other, Load) else other.id
        age = self.now() - self.born.get((site.name, ident), -1e9)
        hidden = not site.studio.faults.flag("v0_shows_loading") or site.studio.tier == "openai"
        # Known to nobody who lives: how long it takes.
        guessed = (site.name, key) in self.guessed
        if guessed and hidden and age >= believed_in(site, key):
            self.counted["given up: unseen for longer than anybody could know that it takes"] += 1
        else:
            super().second_copy(site, key, other, seen)

    def check_ours(self, site: Site, ident: str, text: str) -> None:
        if any((site.name, ident) in known for known in self.assumed.values()):
            if (site.name, ident) not in self.ours:
                self.counted["raced: loaded anew by somebody else under the same id"] += 1
            return
        super().check_ours(site, ident, text)

    def happened(self, site: Site, event: dict[str, Any]) -> None:
        life = LIFE.get()
        if event["kind"] in ("load.started", "unloaded", "evicted", "expired", "crashed"):
            known = self.seen_to_end.pop((site.name, event["instance_id"]), None)
            if known is None and event["kind"] != "load.started":
                self.strangers_went[site.name, event["model"]] = self.now()
        if event["kind"] == "unloaded" and event["by"] == "rest" and life is not None:
            self.holds(site, life, f"an unload of {event['model']}")
            place = site.name, event["model"]
            unknown = sum(
                member.using[place] for member in self.world.living() if not self.world.is_member(member)
            )
            if unknown:
                self.counted["raced: unloaded under callers of one whose lease has run out"] += 1
                used, self.in_use[place] = self.in_use[place], self.in_use[place] - unknown
                super().happened(site, event)
                self.in_use[place] = used
                return
            self.world.has_answered(
                ModelId(site.name, event["model"]),
                event["instance_id"],
                self.born.get((site.name, event["instance_id"]), 0.0),
            )
        super().happened(site, event)


# --- the world ----------------------------------------------------------------------------------------


@dataclass
class ClusterWorld(World):
    """`sound`: nothing is wrong with LM Studio itself, but that models are lost there."""

    judge: ClusterJudge
    etcd: SimulatedEtcd = field(default_factory=lambda: SimulatedEtcd(ADDRESSES))
    names: tuple[str, ...] = ("a", "b")
    ttl: float = 10.0
    sound: bool = False
    callers: float = 30.0  # seconds from one to the next
    token_seconds: float | None = None  # else as it was drawn
    machines: list[Machine] = field(default_factory=list)
    windows: dict[ModelId, bool] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    etcd_well: Well = field(default_factory=Well)
    emptied_at: float = -1e9
    released: Counter[ModelId] = field(default_factory=Counter)  # by troubles that go on

    def __post_init__(self) -> None:
        super().__post_init__()
        self.judge.world = self
        for name in self.names:
            self.machines.append(self.machine(name, name))
        self.etcd.on_created.append(self.created)

    def machine(self, name: str, instance: str) -> Machine:
        chance = random.Random(f"{self.seed} {name}")
        wall = self.wall_offset + chance.uniform(-3600, 3600)
        machine = Machine(
            name, instance, EtcdLink(self.etcd, chance), None, chance, chance.uniform(0, 1e6), wall
        )  # type: ignore[arg-type]
        machine.memory = Memory(lambda: self.judge.now() + machine.wall)
        return machine

    # who is there

    def living(self) -> list[Member]:
        return [m.member for m in self.machines if m.member is not None and not m.member.dead]

    def is_member(self, member: Member) -> bool:
        """Whether etcd has it among them, under whatever name."""
        there = (kv for key, kv in self.etcd.kvs.items() if key.startswith(f"{PREFIX}members/"))
        return any(kv.by == member.number for kv in there)

    def is_excused(self, site: Site, life: int) -> bool:
        """Whether it may act though another one has taken that upstream: by a person's word, or unknowing.

        Another etcd in the place of the first shows with the next renewal; nothing is loaded or unloaded until then.
        """
        member = next((m for m in self.living() if m.number == life), None)
        alone = member is not None and member.keeper.alone(site.name)
        return alone or self.judge.now() < self.emptied_at + self.ttl

    def holder(self, site: Site) -> Machine:
        """Who acts there, or might."""
        kv = self.etcd.kvs.get(f"{PREFIX}holders/{site.name}")
        found = [m for m in self.machines if m.member is not None and kv and m.member.number == kv.by]
        return found[0] if found else self.chance.choice(self.machines)

    def created(self, key: str, kv: Kv) -> None:
        """Whoever takes an upstream is the only one who may act there from now on."""
        kind, _, upstream = key.removeprefix(PREFIX).partition("/")
        if kind != "holders":
            return
        self.judge.say(f"life {kv.by} holds {upstream}")
        for member in self.living():
            if (
                member.number != kv.by
                and member.cluster.acts(upstream)
                and self.judge.now() >= self.emptied_at + self.ttl
            ):
                self.judge.fail("C2", f"life {kv.by} holds {upstream}, and life {member.number} acts there")

    def begin(self, machine: Machine) -> None:
        if machine.member is not None and not machine.member.dead:
            return
        self.lives += 1
        self.judge.disturb()
        self.judge.begun(self.lives)
        self.judge.say(f"life {self.lives} on {machine.name}")
        member = machine.member = Member(self, machine, self.lives)
        machine.well.since = self.judge.now()
        member.run(member.begin)

    async def end(self, machine: Machine, *, killed: bool) -> None:
        if (member := machine.member) is None or member.dead:
            return
        self.judge.say(f"{machine.name} ends, {'killed' if killed else 'in order'}")
        if not killed:
            self.wake(machine)
        await member.end(killed=killed)
        self.judge.over(member.number)

    def wake(self, machine: Machine, *, suspended: bool = False) -> None:
        if machine.member is not None and machine.member.stopped:
            self.judge.say(f"{machine.name} wakes")
            machine.member.wake(suspended=suspended)

    # what people do

    def record(self, make: Callable[..., Any], model: ModelId, *rest: Any) -> None:
        awake = [member for member in self.living() if not member.stopped]
        if make in (WindowOpened, WindowClosed):
            self.windows[model] = make is WindowOpened
            told = self.living()  # each by its own clock
        else:
            told = [self.chance.choice(awake)] if awake else []
        for member in told:
            member.keeper.record(make(member.clock(), model, *rest))

    def use(self, keep: Keep, site: Site, seconds: float, **more: Any) -> None:
        awake = [member for member in self.living() if not member.stopped]
        if awake:
            member = self.chance.choice(awake)
            task = member.run(
                lambda: asyncio.ensure_future(self._called(member, keep, site, seconds, **more))
            )
            member.users[task] = None
            task.add_done_callback(member.users.pop)

    async def _called(self, member: Member, keep: Keep, site: Site, seconds: float, **more: Any) -> None:
        """A request through a member's proxy."""
        LIFE.set(None)
        model, began = keep.model, self.judge.now()
        task = asyncio.current_task()
        assert task is not None
        member.held[task] = model, began
        try:
            async with asyncio.timeout(HOUR):
                await member.keeper.waiting.ensure_warm([model])
        except NotWarm as error:
            self.answers["sent away"] += 1
            if self.sound:
                self.check_hopeless(member, site, str(error))
            return
        except TimeoutError:
            if site.studio.tier == "v0":
                # That its models push each other out, so that only the first one is loaded, whoever acts knows alone.
                self.judge.counted["held for as long as may be"] += 1
                return
            self.judge.fail("C5", f"a caller of {model.key} at {member.machine.name} has waited for an hour")
            return
        finally:
            del member.held[task]
        waited = self.judge.now() - began
        self.answers["at once" if waited < 0.1 else "held"] += 1
        # What is let go for others may just be about to go, and stay.
        going = keep.policy.auto or self.released[model] > 0
        # Where messages to etcd are lost its end is heard late, and the holder may ask for it again meanwhile.
        times = 2 if self.etcd_well.was(began) else 4
        soon = times * self.ttl + ANSWERED_WITHIN if going else ANSWERED_WITHIN
        if self.sound and waited > soon and self.was_there(member, site, model, began):
            self.judge.fail(
                "C4", f"{model.key} was there, and {member.machine.name} had its caller wait {waited:.1f} s"
            )
        place = site.name, model.key
        member.keeper.record(RequestStarted(member.clock(), model))
        member.using[place] += 1
        self.judge.in_use[place] += 1
        answered = False
        try:
            async with asyncio.timeout(seconds):
                status, text = await outside(self.chat(site, model.key, **more))
            answered = status == 200
            if status == 400 and ("unloaded" in text or "crashed" in text):
                member.keeper.record(InstanceLost(member.clock(), model, text[:80]))
        except (Cut, Refusal, TimeoutError):
            pass
        finally:
            member.using[place] -= 1
            self.judge.in_use[place] -= 1
            if not member.dead:
                member.keeper.record(RequestEnded(member.clock(), model, answered))

    def was_there(self, member: Member, site: Site, model: ModelId, since: float) -> bool:
        """Whether it was in memory all the time, and the member in a position to know."""
        copies = [i for i in site.studio.memory.instances.values() if i.model.key == model.key]
        known = since - KNOWN_WITHIN
        return member.machine.well.was(known) and any(i.listed_at < known and not i.crashed for i in copies)

    def has_answered(self, model: ModelId, copy: str, since: float) -> None:
        """What was loaded goes no sooner than those have it who waited for that, but at whom there was trouble."""
        if not self.sound or not self.etcd_well.was(since) or self.released[model]:
            return
        site = next(s for s in self.sites if s.name == model.upstream)
        copies = site.studio.memory.instances.items()
        if any(one.model.key == model.key for ident, one in copies if ident != copy):
            return  # somebody else's, which answers them as well
        for member in self.living():
            well = member.machine.well.was(since) and member.machine.reaches_etcd.was(since)
            early = [began for held, began in member.held.values() if held == model and began < since]
            if early and well:
                self.judge.fail(
                    "C6",
                    f"{model} is unloaded, and {len(early)} at {member.machine.name} who waited for it have not had it",
                )

    def are_strangers(self, site: Site, why: str) -> bool:
        """Whether what was said to be somebody else's is: nobody saw its load end, or a caller's request was it.

        Nor does anybody know of whom none is left who was there then, or who could tell the others.
        """
        said, _, tail = why.rpartition("; ")
        names = tail.removesuffix(STRANGERS[0]).removesuffix(STRANGERS[1]).split(", ")
        told = self.judge.now() - self.ttl
        still = {
            member.number
            for member in self.living()
            if member.machine.reaches_etcd.was(told) and member.machine.well.was(told)
        }
        theirs = {
            i.model.key
            for i in site.studio.memory.instances.values()
            if self.judge.seen_to_end.get((site.name, i.id), set()).isdisjoint(still)
        }
        shown = self.judge.now() - site.refresh
        theirs |= {
            key for (name, key), at in self.judge.strangers_went.items() if name == site.name and at > shown
        }
        return bool(said) and tail.endswith(STRANGERS) and theirs.issuperset(names)

    def check_hopeless(self, member: Member, site: Site, why: str) -> None:
        if self.are_strangers(site, why):
            self.judge.counted["sent away: there is no room beside what nobody knows to be ours"] += 1
            return
        long_ago = self.judge.now() - 2 * self.ttl
        well = member.machine.reaches_etcd.was(long_ago) and self.etcd_well.was(long_ago)
        if well or "nothing is loaded or unloaded, because" not in why:
            self.judge.fail("C5", f"a caller was sent away from {member.machine.name}: {why}")

    # what goes wrong

    async def inject(self, kind: str) -> None:
        if kind not in CLUSTER_KINDS + MORE_KINDS:
            await super().inject(kind)
            return
        task = asyncio.ensure_future(self.go_through(kind))
        self.begun(task)

    async def go_through(self, kind: str) -> None:
        """One trouble between members, from its beginning until nothing is left of it."""
        chance, ttl = self.chance, self.ttl
        site = chance.choice(self.sites)
        machine = self.holder(site) if chance.random() < 0.6 else chance.choice(self.machines)
        key = chance.choice([k.model.key for k in self.keeps if k.model.upstream == site.name])
        long = chance.choice((0.1, 0.5, 0.9, 1.1, 2.0, 4.0)) * ttl
        kind, _, loading = kind.partition(" while ")
        if loading:
            # It may be before the intent is written, after, or long under way.
            self.lose(site, key)
            longest = next(m for m in site.models if m.key == key).load_seconds
            await asyncio.sleep(
                chance.choice((chance.uniform(0, site.refresh), chance.uniform(0, 2.0 * longest)))
            )
        with ExitStack() as stack:
            match kind:
                case "killed" | "ended":
                    stack.enter_context(machine.well.ill())
                    await self.end(machine, killed=kind == "killed")
                    await asyncio.sleep(chance.choice((0.0, long)))
                    self.begin(machine)
                case "stopped" | "suspended":
                    if machine.member is None or machine.member.stopped:
                        return
                    stack.enter_context(machine.well.ill())
                    stack.enter_context(machine.reaches_etcd.ill())
                    machine.member.stop()
                    if chance.random() < 0.5:
                        await asyncio.sleep(chance.uniform(0, long))
                        self.lose(site, key)
                    await asyncio.sleep(long)
                    self.wake(machine, suspended=kind == "suspended")
                case "cut from etcd" | "cut from a server" | "cut from all":
                    if kind != "cut from a server":
                        stack.enter_context(machine.reaches_etcd.ill())
                        machine.link.how = chance.choice(("cut", "refused"))
                    if kind != "cut from etcd":
                        stack.enter_context(machine.well.ill())
                        machine.ways[site.name] = chance.choice(("hangs", "unreachable", "closed"))
                    if chance.random() < 0.5:
                        await asyncio.sleep(chance.uniform(0, long))
                        self.lose(site, key)
                    await asyncio.sleep(max(long, chance.choice((0.0, 40.0))))
                    machine.link.how = "open"
                    machine.ways.pop(site.name, None)
                    machine.link.end_watches(told=chance.random() < 0.5)
                case "etcd away" | "a member of etcd away":
                    gone = ADDRESSES if kind == "etcd away" else (chance.choice(ADDRESSES),)
                    stack.enter_context(self.etcd_well.ill())
                    how = chance.choice(("refuses", "hangs"))
                    for address in gone:
                        self.etcd.set(address, how)
                    if chance.random() < 0.5:
                        await asyncio.sleep(chance.uniform(0, long))
                        self.lose(site, key)
                    await asyncio.sleep(max(long, chance.choice((0.0, 40.0, 300.0))))
                    for address in gone:
                        self.etcd.set(address, "up")
                case "etcd loses messages":
                    stack.enter_context(self.etcd_well.ill())
                    for one in self.machines:
                        one.link.loses = chance.choice((0.1, 0.3, 0.6))
                    if chance.random() < 0.5:
                        self.lose(site, key)
                    await asyncio.sleep(chance.uniform(10, 120))
                    for one in self.machines:
                        one.link.loses = 0.0
                case "watches die" | "watches break":
                    for one in self.machines:
                        one.link.end_watches(told=kind == "watches break")
                case "etcd compacts":
                    self.etcd.compact()
                case "a clock is set":
                    machine.wall += chance.uniform(-7200, 7200)
                case "a model is lost":
                    self.lose(site, key)
                case "etcd is emptied":
                    stack.enter_context(self.etcd_well.ill())
                    self.emptied_at = self.judge.now()
                    self.etcd.empty()
                    if chance.random() < 0.5:
                        self.lose(site, key)
                    await asyncio.sleep(ttl)
                case "a config is read anew":
                    self.reload(machine)
                    if chance.random() < 0.5:
                        self.lose(site, key)
                case "a person asks":
                    await self.ask(ModelId(site.name, key), long)
                case "without the engine":
                    stack.enter_context(self.etcd_well.ill())
                    how = chance.choice(("refuses", "hangs"))
                    for address in ADDRESSES:
                        self.etcd.set(address, how)
                    self.lose(site, key)
                    await asyncio.sleep(ttl + long)  # as the manual has it
                    await self.load_alone(site, key)
                    for address in ADDRESSES:
                        self.etcd.set(address, "up")
                case "twins":
                    twin = self.machine("twin", machine.instance)
                    self.machines.append(twin)
                    self.begin(twin)
                    await asyncio.sleep(max(long, chance.choice((0.0, 40.0))))
                    await self.end(twin, killed=chance.random() < 0.5)
                    self.machines.remove(twin)
                case _:
                    raise AssertionError(kind)

    async def ask(self, model: ModelId, seconds: float) -> None:
        """Somebody releases it by one member, and wants it back by another."""
        self.judge.disturb()
        self.released[model] += 1
        began, ways = self.judge.now(), [self.etcd_well, *(m.reaches_etcd for m in self.machines)]
        try:
            self.record(ReleaseAsked, model)
            await asyncio.sleep(seconds)
            self.record(WarmAsked, model)
            if not all(way.was(began) for way in ways):
                # Of two words of which no other could be told at once the one counts that etcd has last. So: once more.
                while any(way.troubles for way in ways):
                    await asyncio.sleep(1.0)
                await asyncio.sleep(2 * self.ttl)
                self.record(WarmAsked, model)
            await asyncio.sleep(self.ttl)
        finally:
            self.released[model] -= 1

    def reload(self, machine: Machine) -> None:
        member = machine.member
        if member is not None and not member.dead and not member.stopped:
            member.run(member.reload)

    async def load_alone(self, site: Site, key: str) -> None:
        """A person has one member load it, whoever acts, and all the others cannot be told."""
        awake = [m for m in self.living() if not m.stopped and m.way_to(site) == "open"]
        if awake and not any(m.keeper.alone(site.name) for m in self.living()):
            member, model = self.chance.choice(awake), ModelId(site.name, key)
            self.judge.disturb()
            self.judge.say(f"{member.machine.name} is to load {key} alone")
            member.keeper.record(WarmAsked(member.clock(), model, alone=True))
            await asyncio.sleep(self.chance.uniform(0, 60))

    def lose(self, site: Site, key: str) -> None:
        """Where nothing else is to go wrong, no sooner than the last loss is forgotten: it is held off otherwise."""
        known = [m for one in self.living() for m in one.keeper.snapshot().of(site.name) if m.id.key == key]
        if not self.sound or not any(m.failures for m in known):
            super().lose(site, key)

    def put_right(self) -> None:
        for address in ADDRESSES:
            self.etcd.set(address, "up")
        for machine in self.machines:
            machine.link.how, machine.link.loses = "open", 0.0
            machine.ways.clear()
            self.wake(machine)
            if machine.instance == machine.name:
                self.begin(machine)
        super().put_right()

    def is_kept_as_ours(self, site: Site, instance_id: str) -> bool:
        """By whoever acts: what came of a load that only another one saw end is anybody's, as after a crash."""
        holder = self.etcd.kvs.get(f"{PREFIX}holders/{site.name}")
        acting = [m for m in self.living() if holder is not None and m.number == holder.by]
        return any(instance_id in m.ours for one in acting for m in one.keeper.snapshot().of(site.name))

    def comes_back(self, site: Site, kind: str, after: float) -> None:
        """How soon a server's return is seen is judged where one daemon is alone."""

    def is_missed(self, site: Site) -> bool:
        return False

    # what is looked at

    def check(self) -> None:
        for member in self.living():
            failure = member.failure()
            if failure is not None:
                story = "".join(traceback.format_exception(failure))
                raise Broken(f"seed {self.seed}: I0: {member.machine.name} died:\n{story}") from failure
        tasks = len(asyncio.all_tasks())
        users = sum(len(member.users) for member in self.living())
        if tasks > 100 + 40 * (len(self.keeps) + len(self.sites)) * len(self.machines) + 4 * users:
            self.judge.fail("I16", f"{tasks} tasks")
        if self.judge.broken:
            raise Broken(self.story())

    def unsettled(self) -> list[str]:
        odd = []
        for site in self.sites:
            holder = self.etcd.kvs.get(f"{PREFIX}holders/{site.name}")
            if holder is None:
                odd.append(f"nobody holds {site.name}")
            for member in self.living():
                told = [f"{member.machine.name}: {text}" for text in self.odd_at(member, site)]
                # What is in the way of a load only its holder has to know; of the others what is there is.
                odd += (
                    told
                    if holder and holder.by == member.number
                    else [t for t in told if NOT_LOADED not in t]
                )
        left = ("loads/", "yields/")
        odd += [key for key in self.etcd.kvs if key.removeprefix(PREFIX).startswith(left)]
        return odd

    def odd_at(self, member: Member, site: Site) -> list[str]:
        self.life, sites = member, self.sites  # type: ignore[assignment]
        self.sites = [site]
        try:
            found = super().unsettled()
        finally:
            self.sites = sites
        there = {i.model.key for i in site.studio.memory.instances.values()}
        marks = {str(m): "" if m.key in there else NOT_LOADED for m in (k.model for k in self.keeps)}
        return [
            text + next((mark for m, mark in marks.items() if text.startswith(f"{m} is ")), "")
            for text in found
        ]

    # the whole of it

    async def live(self, hours: float) -> str:
        for site in self.sites if self.token_seconds is not None else ():
            site.studio.set_faults(token_seconds=self.token_seconds)
        for machine in self.machines:
            self.begin(machine)
        if self.sound:
            await self.sound_life(hours)
        else:
            adversary = asyncio.ensure_future(self.go_wrong(hours * HOUR))
            while not adversary.done():
                await asyncio.sleep(60.0)
                self.check()
            await adversary
            longest = max(k.policy.load_timeout for k in self.keeps)
            await self.settle(2 * longest + 2 * BACKOFF_MAX + 1500.0)
        for machine in list(self.machines):
            await self.end(machine, killed=True)
        await self.end_users()
        self.etcd.stop()
        self.check_reports()
        if self.judge.broken:
            raise Broken(self.story())
        for site in self.sites:
            site.studio.close()
        return self.judge.trace.hexdigest()

    async def sound_life(self, hours: float) -> None:
        """Trouble upon trouble, each until all is well again, which is to be soon."""
        traffic = asyncio.ensure_future(self.traffic())
        await self.well_again("the beginning", self.first_time())
        end = self.judge.now() + hours * HOUR
        while self.judge.now() < end:
            await asyncio.sleep(self.chance.expovariate(1 / self.pace))
            kinds = [self.chance.choice(self.kinds) for _ in range(self.chance.choice((1, 1, 2, 3)))]
            self.judge.disturb()
            if ALONE_KIND in kinds:
                kinds = [
                    ALONE_KIND
                ]  # nothing can be made sure where whoever was told so is in trouble itself
            self.judge.say(f"faults {kinds}")
            self.injected.update(kinds)
            troubles = []
            for kind in kinds:
                troubles.append(asyncio.ensure_future(self.go_through(kind)))
                await asyncio.sleep(self.chance.uniform(0, self.ttl))
            while not all(one.done() for one in troubles):
                await asyncio.wait(troubles, timeout=5.0)
                self.check()
            for one in troubles:
                one.result()
            self.judge.say("all is right again")
            await self.well_again(", ".join(kinds), self.within(kinds))
        traffic.cancel()

    async def traffic(self) -> None:
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / self.callers))
            keep = self.chance.choice(self.keeps)
            site = next(s for s in self.sites if s.name == keep.model.upstream)
            self.use(keep, site, self.chance.choice((1.0, 30.0)))

    def loads(self) -> float:
        return max(sum(m.load_seconds for m in site.models) for site in self.sites)

    def first_time(self) -> float:
        return 2 * self.ttl + self.loads() + 15.0

    def within(self, kinds: list[str]) -> float:
        """A lease, the loads and 15 s; longer after what the manual says it takes longer."""
        within = self.ttl + self.loads() + 15.0
        if not UNTOLD.isdisjoint(kinds):
            within += 2 * self.ttl  # until each address was tried, and for one more `ttl` nobody acts
        waited_for = {
            (model.id.upstream, model.id.key)
            for member in self.living()
            for model in member.keeper.snapshot().models
            if model.pending is not None
        }
        for site in self.sites:
            for model in site.models:
                at_work = any(load.model is model for load in site.studio.memory.loads.values())
                written = f"{PREFIX}loads/{site.name}/{model.key}" in self.etcd.kvs
                if (written or (site.name, model.key) in waited_for) and not at_work:
                    # Nothing tells it from a load that does not show yet.
                    self.judge.counted["an intent without a load"] += 1
                    within = max(
                        within, self.ttl + 2 * model.load_seconds + LISTING_LAG + self.loads() + 15.0
                    )
        return within

    async def well_again(self, after: str, within: float) -> None:
        began = self.judge.now()
        while missing := self.missing():
            await asyncio.sleep(1.0)
            self.check()
            if self.judge.now() > began + within:
                self.judge.fail("C3", f"{within:.0f} s after {after}: {missing}")
                self.check()
        self.check()
        self.judge.counted["well again"] += 1

    def a_turn(self, model: ModelId) -> float:
        """How long a caller may wait: where not all have room at once, until all others had theirs."""
        site = next(s for s in self.sites if s.name == model.upstream)
        policies = [k.policy for k in self.keeps if k.model.upstream == site.name]
        # Without a limit that is known there is one place for all that are let go for each other.
        if sum(policy.auto for policy in policies) < 2:
            return 0.0
        return self.loads() + len(policies) * (self.ttl + SETTLE) + max(p.patience for p in policies)

    def is_taken(self, model: Model) -> bool:
        """Whether strangers have the place that it waits for: theirs nobody unloads, and may stay for an hour."""
        site = next(s for s in self.sites if s.name == model.id.upstream)
        theirs = any(one.owner == "jit" for one in site.studio.memory.instances.values())
        return model.policy.auto and not model.instances and theirs

    def missing(self) -> list[str]:
        found, now = [], self.judge.now()
        for member in self.living():
            late = {model for model, began in member.held.values() if now > began + self.a_turn(model)}
            for model in member.keeper.snapshot().models:
                if self.is_taken(model):
                    continue
                if model.wanted and not model.given:
                    found.append(f"{model.id.key} at {member.machine.name} is {model.state}: {model.reason}")
                if model.asked_for is False:
                    found.append(f"{model.id.key} is released at {member.machine.name} still")
                if model.waiting and (model.wanted or model.id in late):
                    found.append(f"{model.waiting} wait for {model.id.key} at {member.machine.name}")
        left = (f"{PREFIX}loads/", f"{PREFIX}yields/")
        under_way = any(m.calling for one in self.living() for m in one.keeper.snapshot().models)
        return found + [key for key in self.etcd.kvs if key.startswith(left) and not under_way]


KNOWN_WITHIN = 60.0
NOT_LOADED = " (not loaded)"
STRANGERS = (" was loaded by somebody else", " were loaded by somebody else")
CLUSTER_KINDS = (
    "killed",
    "killed while loading",
    "ended",
    "ended while loading",
    "stopped",
    "stopped while loading",
    "suspended",
    "suspended while loading",
    "cut from etcd",
    "cut from etcd while loading",
    "cut from a server",
    "cut from a server while loading",
    "cut from all",
    "cut from all while loading",
    "etcd away",
    "etcd away while loading",
    "a member of etcd away",
    "etcd loses messages",
    "watches die",
    "watches break",
    "etcd compacts",
    "a clock is set",
    "a model is lost",
    "twins",
)
# Drawn apart from those, so that each seed goes on meaning the world that it meant.
ALONE_KIND = "without the engine"
MORE_KINDS = ("etcd is emptied", "a config is read anew", "a person asks", ALONE_KIND)
# After these nobody may have acted for so long that a person may have had to.
UNTOLD = {
    "etcd away",
    "etcd away while loading",
    "etcd loses messages",
    "a member of etcd away",
    "etcd is emptied",
    ALONE_KIND,
}
# Of a lone daemon; here each has its like.
ALONE = ("killed", "killed while loading", "power cut while loading", "clock jumps")


def drawn_cluster(seed: int, *, sound: bool, calm: bool = False, short: bool = False) -> ClusterWorld:
    base = drawn(seed, calm=calm, short=short)
    chance, judge = random.Random(seed + 3), ClusterJudge(asyncio.get_running_loop().time)
    sites, keeps = base.sites, base.keeps
    if sound:
        sites, keeps = sound_sites(chance, judge, short=short)
    for site in sites:
        site.judge = judge
        site.studio.journal.watchers.clear()
    ttl = 60.0 if calm else chance.choice((5.0, 10.0, 10.0, 20.0))
    others = [kind for kind in KINDS if kind not in ALONE]
    kinds = tuple(chance.sample(CLUSTER_KINDS, k=chance.randint(4, len(CLUSTER_KINDS))))
    if not sound:
        kinds += tuple(chance.sample(others, k=chance.randint(4, len(others))))
    more = random.Random(seed + 4)
    kinds += tuple(
        k for k in more.sample(MORE_KINDS, k=more.randint(0, len(MORE_KINDS))) if sound or k != ALONE_KIND
    )
    return ClusterWorld(
        seed,
        sites,
        keeps,
        judge,
        chance,
        tick=15.0 if calm else chance.choice((1.0, 2.0)),
        pace=1800.0 if calm else float(chance.choice((60, 120, 300))),
        kinds=kinds,
        openings=base.openings,
        etcd=SimulatedEtcd(ADDRESSES, chance.choice((0.95, 1.0, 1.05))),
        names=("a", "b", "c")[: chance.choice((2, 2, 3))],
        ttl=ttl,
        sound=sound,
    )


def sound_sites(chance: random.Random, judge: Judge, *, short: bool) -> tuple[list[Site], list[Keep]]:
    sites, keeps = [], []
    for name in ("alpha", "beta")[: chance.choice((1, 1, 2))]:
        seconds = [float(chance.choice((1, 3, 12, 40))) for _ in range(chance.randint(1, 3))]
        models = [
            SimModel(f"acme/model-{n}", load_seconds=s, size_bytes=10**9) for n, s in enumerate(seconds)
        ]
        faults = {"v0_shows_loading": chance.random() < 0.5, "token_seconds": chance.choice((0.01, 1.0))}
        studio = Studio(models, faults=faults)
        memory = 3 * 10**9 if short and len(models) > 2 else None  # two of them fit
        site = Site(name, studio, judge, models, refresh=15.0, sdk=chance.random() < 0.5, memory=memory)
        sites.append(site)
        for model in models:
            auto = short and (memory is not None or chance.random() < 0.7)
            policy = Policy(
                ping_interval=120.0, auto=auto, idle=chance.choice((60.0, 600.0)) if auto else None
            )
            keeps.append(Keep(ModelId(name, model.key), policy, windowed=True))
    return sites, keeps


def live_together(
    seed: int, hours: float, *, sound: bool, calm: bool = False, short: bool = False, **changes: Any
) -> tuple[str, ClusterWorld]:
    """One run from its seed; the hash of its trace, and the world as it was at the end."""

    async def go() -> tuple[str, ClusterWorld]:
        world = drawn_cluster(seed, sound=sound, calm=calm, short=short)
        for name, value in changes.items():
            setattr(world, name, value)
        return await world.live(hours), world

    return run_virtually(go, ProcessLoop)
