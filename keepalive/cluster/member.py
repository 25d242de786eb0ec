"""One daemon as a member: it holds a lease, sees what the others write, and writes what they have to know.

- All that is decided rests on a picture: everything below our prefix, read at once (`rows`). A watch only says when to
  look again, and each renewal of the lease looks as well.
- We act on an upstream while a picture has shown our row as its holder's and our lease is good by our own clock.
- A load's intent is written before the load, on the condition that we still hold the upstream, and stays until the
  holder, whoever that is then, has seen what came of it. Whoever sees the intent of another takes its load for one of
  ours that is under way, as after a restart: so a successor knows of it before it holds anything.
- Before an unload all others say that they give that model to nobody any more. Whoever does not say so in time, or has
  somebody there, is reason to leave it.
- What goes wrong here costs nobody a warm model: requests never wait for anything of this.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from dataclasses import replace as changed
from math import inf
from typing import Protocol

from keepalive.cluster import rows
from keepalive.cluster.etcd import EngineError, Etcd, Json, Standing, created, delete, put, unchanged
from keepalive.cluster.hold import Hold
from keepalive.cluster.rows import Intent, Member, Picture, Row, Told, Use, folded
from keepalive.core.facts import (
    DrainEnded,
    DrainStarted,
    Fact,
    HolderTold,
    LoadForgone,
    LoadProgressed,
    LoadRemembered,
    LoadResolved,
    LoadStarted,
    ModelFact,
    ModelId,
    OthersHeard,
    ReleaseAsked,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    UpstreamFact,
    UsedElsewhere,
    WaitStarted,
    WarmAsked,
    WishSpent,
)
from keepalive.core.records import Model, Snapshot, Upstream, UpstreamState, is_loading
from keepalive.core.states import State

# What changes in bursts is told once.
GATHER = 0.05
# A watch whose connection died without a word is missed for no longer than this.
WATCH_AGAIN = 60.0
# How far a load is is told this often, which is often enough for whoever waits for it.
PROGRESS_EVERY = 2.0
# Who holds an upstream that it cannot reach, and another member can, lets go after this.
BLIND_AFTER = 15.0
# Whoever was told that we give a model to nobody has unloaded it within so many, or never will.
YIELDED = 2.0
# Callers are told that there is no hope when etcd has been away for so many lifetimes of a lease.
PATIENCE = 3.0
# Whoever has another config altogether is told enough by so many.
DIFFERENCES_TOLD = 20
# Who has left is shown as such for so long: names may be those of hosts that come and go.
FORGOTTEN_AFTER = 3600.0
# What a row that cannot be read counts as, where that is something.
UNREADABLE = {
    "holders": "nobody acts there while it stands: delete it (etcdctl del KEY)",
    "loads": "it counts as a load under way, and goes when that has been waited for",
    "members": "who has that name goes by another one while it stands",
}
# A last word to etcd at the end.
LAST_WORD = 2.0


class Tell(Protocol):
    """A line of the log."""

    def __call__(self, event: str, *, well: bool, **fields: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Self:
    """Who we are, as others are to see it."""

    cluster: str
    instance: str
    host: str
    version: str


class Keeping(Protocol):
    """The keeper, as far as this needs it."""

    def record(self, fact: ModelFact | UpstreamFact, /) -> None: ...
    def snapshot(self) -> Snapshot: ...
    def tick(self) -> None: ...
    def reconsider(self) -> None: ...


class Cluster:
    """The hand of the keeper, and one of its observers.

    `keeping` gives the keeper, whose clock is `clock`; `awake` is a clock that goes on while the machine sleeps.
    """

    def __init__(
        self,
        engine: Etcd,
        me: Self,
        ttl: float,
        keeping: Callable[[], Keeping],
        clock: Callable[[], float],
        awake: Callable[[], float],
        tell: Tell,
    ) -> None:
        self._engine = engine
        self._me = me
        self._prefix = f"/keepalive/{me.cluster}/"
        self._keeping = keeping
        self._clock = clock
        self._awake = awake
        self._tell = tell
        self._hold = Hold(ttl)
        self._lease: int | None = None
        self._life = ""  # of this lease
        self._held: frozenset[str] = frozenset()
        self._shy: dict[str, float] = {}  # when we act again where an intent could not be written
        self._seen = Picture()
        self._saw = False  # any picture yet
        self._seen_at = awake()  # when it was
        self._stand_of = Standing()  # of etcd, at the picture
        self._said_replaced = False
        self._seeing = False  # what is recorded now was another's word
        self._known: frozenset[ModelId] = frozenset()  # what was kept here when the picture was seen
        self._written: dict[str, bytes | None] = {}  # since the picture
        self._wake = asyncio.Event()
        self._pictured = asyncio.Event()  # another one each time
        self._stale = False
        # Since when etcd renews our lease and shows us nothing, or takes nothing from us, and why.
        self._refused: dict[str, tuple[float, str]] = {}
        self._said_refused = False
        self._useless = False  # that has lasted
        self._used_told: Mapping[ModelId, UsedElsewhere] = {}
        self._came: dict[ModelId, float] = {}  # when a caller of ours last came for it, or was answered
        self._uses_said: Mapping[ModelId, Use] = {}
        self._uses_at = -inf
        # With the row, since a late write or a restored etcd may have put another one in its place.
        self._states_said: dict[str, tuple[Mapping[ModelId, tuple[Told, float | None]], bytes]] = {}
        self._progress_at: dict[ModelId, float] = {}
        self._wishes: dict[ModelId, tuple[bool, str]] = {}  # not yet written, each with a number of its own
        # Of these, what was written already, to an etcd that is gone: whatever stands there now is newer.
        self._reminders: set[ModelId] = set()
        self._begun: dict[ModelId, str] = {}  # in which life an intent was last written, if it was
        self._unsent: dict[ModelId, str] = {}  # the same of loads that never went out
        self._alone: set[ModelId] = set()  # loads begun by a person's word while nobody could be told
        self._quiet_until = -inf  # until then others may still have to say what they have so begun
        self._blind_since: dict[str, float] = {}
        self._others_since: float | None = None  # since when another one goes by our name
        self._down_since: float | None = awake()
        self._said_down = False
        self._hopeless = False
        self._informed = False  # a picture is of since etcd was last away
        self._looked_at = -inf  # when it was asked for, by the keeper's clock
        self.trouble: str | None = "etcd has not been asked yet"
        self.addresses = ("", "")  # of the admin and the client listener
        self.config: Mapping[str, str] = {}
        self.places: Mapping[str, str] = {}
        self.renewal = 0.0  # what the last one took
        self.handovers: dict[str, int] = {}
        self._name = me.instance  # under which we are there
        self._last_there: dict[str, float] = {}  # when each was last seen, of those who are not forgotten
        self._newer: set[str] = set()  # members whose format is newer than ours, as was said
        self._last_holders: dict[str, str] = {}
        self._own_word: set[str] = set()  # upstreams of which nobody has told us anything since we held them
        self.leaving = False
        self.changed: Callable[[], None] = lambda: None  # called when what others ask may have changed

    # --- what the keeper asks -----------------------------------------------------------------------

    def acts(self, upstream: str, /) -> bool:
        now = self._awake()
        quiet_until = max(self._quiet_until, self._shy.get(upstream, -inf))
        return upstream in self._held and self._hold.good(now) and now >= quiet_until and not self._useless

    async def begin(self, model: Model, /) -> bool:
        upstream = model.id.upstream
        holder = self._seen.holders.get(upstream)
        if holder is None or not self.acts(upstream):
            return False
        why, done = "another one holds it", False
        self._begun[folded(model.id)] = self._life
        self._unsent.pop(folded(model.id), None)
        try:
            done = await self._commit(
                [created(self._key(rows.holder_key(upstream)), holder.created)],
                {rows.load_key(model.id): rows.load_row(self._intent(model))},
            )
        except EngineError as error:
            why = str(error)
        if not done:
            # At once again would be as fast as etcd says no.
            self._shy[upstream] = self._awake() + self._hold.interval
            self._tell("cluster.load_put_off", well=False, model=model.id.key, upstream=upstream, reason=why)
            self._look_again()
        return done and self.acts(upstream)

    async def clear(self, model: Model, /) -> bool:
        upstream, key = model.id.upstream, folded(model.id)
        holder = self._seen.holders.get(upstream)
        if holder is None or not self.acts(upstream):
            return False
        guard = created(self._key(rows.holder_key(upstream)), holder.created)
        asked = self._seen.yields.get(key)
        try:
            row = rows.holder_row(self._me.instance, self._life)
            if not await self._commit([guard], {rows.yield_key(key): row}):
                self._look_again()
                return False
            async with asyncio.timeout(self._hold.interval):
                # What stands there of an earlier time that we asked is no answer to this one.
                while not (yielded := self._seen.yields.get(key) != asked and self._is_yielded(key)):
                    self._look_again()
                    await self._pictured.wait()
                    if not self.acts(upstream):
                        return False
        except (EngineError, TimeoutError):
            return False
        use = self._seen.uses_elsewhere(self._name).get(key, Use())
        return yielded and not use.used and not use.waiting and self.acts(upstream)

    def _is_yielded(self, key: ModelId) -> bool:
        """Whether all others have said so. Who has just come has seen it before it has served anybody."""
        others = self._seen.members.keys() - {self._name}
        said = [self._seen.uses.get(other, {}).get(key, Use()) for other in others]
        asked = self._seen.yields.get(key)
        return asked is not None and all(use.yielded and use.asked in (None, asked) for use in said)

    def hopeless(self, upstream: str, /) -> tuple[str, float | None] | None:
        """Why nobody acts there and nobody soon will, with the seconds after which to ask again."""
        if self._hopeless and not self.acts(upstream):
            return self.why_nobody_acts, self._hold.ttl
        return None

    def knows(self, upstream: str, /) -> bool:
        if self.acts(upstream):
            return True
        # What came into a listing since, or just comes, whoever acts there may have loaded.
        there = next((u for u in self._keeping().snapshot().upstreams if u.name == upstream), None)
        late = there is not None and there.answered_at >= self._looked_at
        return self._informed and not late and all(m.upstream != upstream for m in self._seen.loads)

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(fact, WaitStarted | RequestStarted | RequestEnded | RequestsCounted):
            self._came[folded(fact.model)] = fact.at
        if not isinstance(before, Model) or not isinstance(after, Model):
            if isinstance(before, Upstream) and isinstance(after, Upstream) and before.state != after.state:
                self._say()
            return
        if isinstance(fact, WarmAsked | ReleaseAsked):
            # A person has asked for it: all members are to know, and to go on knowing when this one ends.
            if not self._seeing:
                self._wishes[after.id] = isinstance(fact, WarmAsked), secrets.token_hex(4)
                self._reminders.discard(after.id)
                self._say()
        elif isinstance(fact, LoadStarted) and after.alone:
            self._alone.add(after.id)
            self._unsent.pop(folded(after.id), None)
        elif isinstance(fact, LoadForgone):
            # What was written of it, if it was, is for nobody to wait for.
            if life := self._begun.pop(folded(after.id), None):
                self._unsent[folded(after.id)] = life
            self._say()
        elif (
            before.state is not after.state
            or before.ours != after.ours
            or (before.waiting > 0) is not (after.waiting > 0)
            or is_loading(before) is not is_loading(after)
            or (before.failures, before.contested) != (after.failures, after.contested)
            or before.asked_for is not after.asked_for
            or before.draining is not after.draining
            or before.unloading is not after.unloading
            or isinstance(fact, LoadProgressed)
        ):
            self._say()

    # --- what others ask ----------------------------------------------------------------------------

    @property
    def engine_up(self) -> bool:
        return self.trouble is None

    @property
    def why_nobody_acts(self) -> str:
        """Of an etcd that is away."""
        return f"nothing is loaded or unloaded, because {self.trouble}"

    @property
    def doubled(self) -> bool:
        """Another daemon goes by our name."""
        return self._others_since == inf

    @property
    def instance(self) -> str:
        return self._name if self.doubled else self._me.instance

    @property
    def name(self) -> str:
        return self._me.cluster

    @property
    def instances(self) -> Mapping[str, bool]:
        there = self.members
        return dict.fromkeys(there, True) | {name: False for name in self._last_there if name not in there}

    @property
    def members(self) -> Mapping[str, Member]:
        """Those who are there. Whoever only waits for its own last life to be forgotten is not another one."""
        found = sorted(self._seen.members.items())
        return {name: m for name, m in found if m.doubled or rows.named(name) == name}

    @property
    def differences(self) -> list[str]:
        """What is not as it should be between members, in sentences."""
        found = []
        members = self._seen.members
        for name, member in sorted(members.items()):
            other = members.get(rows.named(name))
            if member.doubled and other is not None:
                where = f"on {member.host or 'some host'} and on {other.host or 'some host'}"
                found.append(f"two daemons go by the name {rows.named(name)!r}, {where}")
            if member.format > rows.VERSION:
                found.append(
                    f"{name} ({member.version}) writes format {member.format} of what daemons tell each other, "
                    f"{self._me.instance} ({self._me.version}) knows {rows.VERSION}: upgrade {self._me.instance}, too"
                )
        me = self.instance
        for instance, member in self.members.items():
            if instance == me:
                continue
            found += [
                f"{instance} reaches {upstream} at {member.places[upstream]}, {me} at {place}"
                for upstream, place in sorted(self.places.items())
                if member.places.get(upstream, place) != place
            ]
            mine, theirs = self.config, member.config
            found += [f"only {me} keeps {m}" for m in sorted(mine.keys() - theirs.keys())]
            found += [f"only {instance} keeps {m}" for m in sorted(theirs.keys() - mine.keys())]
            found += [
                f"{instance} loads {m} with {theirs[m]}, {me} with {mine[m]}"
                for m in sorted(mine.keys() & theirs.keys())
                if mine[m] != theirs[m]
            ]
        return found[:DIFFERENCES_TOLD]

    def kept(self, models: Iterable[ModelId]) -> None:
        """A config was read: what it no longer names is told anew when a later one does."""
        self._known &= frozenset(map(folded, models))

    @property
    def holders(self) -> Mapping[str, str]:
        """Who acts where, by name, as of the last look; not we once our lease has run out by our own clock."""
        names = {member.life: name for name, member in self.members.items()}
        good = self._hold.good(self._awake())
        found = sorted(self._seen.holders.items())
        return {u: names.get(h.life, h.instance) for u, h in found if good or h.life != self._life}

    @property
    def picture(self) -> Picture:
        """As of the last look, which may be long ago while etcd is away."""
        return self._seen

    @property
    def held(self) -> frozenset[str]:
        return frozenset(u for u in self._held if self.acts(u))

    # --- its life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Be a member until cancelled; `close` then lets go."""
        async with asyncio.TaskGroup() as tasks:
            for part in (self._renewing(), self._watching(), self._looking()):
                tasks.create_task(part)

    async def close(self) -> None:
        """To be called when nothing is under way any more: from then on another one may act."""
        self._held = frozenset()
        if self._lease is not None:
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(LAST_WORD):
                    await self._engine.revoke(self._lease)
        await self._engine.close()

    async def _renewing(self) -> None:
        while True:
            asked = self._awake()
            try:
                if self._lease is not None and not self._hold.good(asked):
                    # Renewals that arrive and of which we hear nothing would keep others from acting for ever.
                    await self._engine.rows(self._key(rows.member_key(self._me.instance)))
                    asked = self._awake()
                if self._lease is None:
                    lease = await self._engine.grant(self._hold.ttl)
                    self._lease, self._life = lease, secrets.token_hex(8)
                    await self._tell_loads()
                    self._may_act(Hold(self._hold.ttl, asked))
                elif await self._engine.renew(self._lease):
                    await self._tell_loads()
                    self._may_act(self._hold.renewed(asked))
                else:
                    # It ran out while we were stopped, cut off or late: whatever we held is another's to take.
                    self._lease, self._held, self._hold = None, frozenset(), Hold(self._hold.ttl)
                    self._keeping().tick()
                    continue
            except EngineError as error:
                self._refused.clear()  # who is away refuses nothing
                self._is_down(str(error))
            else:
                self.renewal = self._awake() - asked
                self._is_answered()
                self._look_again()
            await asyncio.sleep(max(self._hold.interval - (self._awake() - asked), self._hold.interval / 10))

    def _may_act(self, hold: Hold) -> None:
        now = self._awake()
        if self._said_down and not self._hold.good(now):
            # Nobody could act for a while, so that a person may have had to. Whoever was told so is back as soon as we
            # are, give or take its next renewal and an address or two that hangs.
            self._quiet_until = now + hold.ttl
        self._hold = hold

    async def _tell_loads(self) -> None:
        """Before anything else is done with an etcd that is back: whoever acts is to know what goes on already."""
        while self._alone:
            told = self._alone.pop()  # before it is written: another one may begin meanwhile
            model = next((m for m in self._keeping().snapshot().models if m.id == told), None)
            if model is None or not is_loading(model):
                continue
            self._unsent.pop(folded(told), None)
            try:
                # It may stand in the place of one of earlier, whose end could not be written.
                await self._commit([], {rows.load_key(told): rows.load_row(self._intent(model))})
            except EngineError:
                self._alone.add(told)
                raise

    async def _remind(self) -> None:
        """Write what we know of to an etcd that knows less."""
        models = self._keeping().snapshot().models
        known = {m.id: m.asked_for for m in models if m.asked_for is not None and m.id not in self._wishes}
        self._reminders |= known.keys()
        self._wishes |= {m: (warm, secrets.token_hex(4)) for m, warm in known.items()}
        for model in models:
            if is_loading(model):
                self._unsent.pop(folded(model.id), None)
                intent = self._seen.loads.get(folded(model.id), self._intent(model))
                key = rows.load_key(model.id)
                await self._commit([created(self._key(key), 0)], {key: rows.load_row(intent)})

    def _intent(self, model: Model) -> Intent:
        return Intent(self._me.instance, self._life, 0, model.expected_load, model.tells_loading)

    async def _watching(self) -> None:
        while True:
            with contextlib.suppress(
                EngineError, TimeoutError
            ):  # whoever renews the lease says what is wrong
                async with (
                    asyncio.timeout(WATCH_AGAIN),
                    aclosing(self._engine.watch(self._prefix)) as changes,  # type: ignore[type-var]
                ):
                    async for _ in changes:
                        self._look_again()
            await asyncio.sleep(self._hold.interval / 3)

    async def _looking(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER)
            stale, self._stale = self._stale, False
            self._wake.clear()
            try:
                if stale or not self._saw:
                    looked = self._clock()
                    self._see(rows.picture(await self._rows()), looked)
                    await self._stand()
                await self._publish()
            except EngineError:
                # The next renewal finds out whether it is down; until then nothing is lost. What was asked may be done.
                self._stale = True
                self._keeping().tick()
                await asyncio.sleep(self._hold.interval)

    async def _rows(self) -> Iterable[Row]:
        with self._asks("rows"):
            found = await self._engine.rows(self._prefix)
        if why := self._engine.standing.replaces(self._stand_of):
            # What all of us know is in none of it, so that each writes what it knows, and has time to, before anybody
            # acts.
            self._held, self._quiet_until = frozenset(), self._awake() + self._hold.ttl
            if not self._said_replaced:
                self._said_replaced = True
                self._tell("cluster.engine_replaced", well=False, reason=why)
            await self._remind()
            found = await self._engine.rows(self._prefix)
        self._stand_of, self._said_replaced = self._engine.standing, False
        return found

    @contextlib.contextmanager
    def _asks(self, what: str) -> Iterator[None]:
        try:
            yield
        except EngineError as error:
            since, _ = self._refused.get(what, (self._awake(), ""))
            self._refused[what] = since, str(error)
            raise
        self._refused.pop(what, None)

    def _look_again(self) -> None:
        self._stale = True
        self._wake.set()

    def _say(self) -> None:
        self._wake.set()

    def _is_answered(self) -> None:
        """Our lease was renewed. An etcd that does that and no more, for want of rights or of room, is of no use."""
        since, why = min(self._refused.values(), default=(inf, ""))
        if self._refused and not self._said_refused and self._down_since is None:
            # Not sooner: of an etcd that is away altogether one line is enough.
            self._tell("cluster.row_failed", well=False, reason=why)
        self._said_refused = bool(self._refused)
        self._useless = self._awake() - since > self._hold.ttl
        if self._useless:
            self._is_down(why)
        else:
            self._is_up()
        self._give_again()

    def _is_up(self) -> None:
        if self._down_since is not None and self._said_down:
            self._tell("cluster.engine_up", well=True, seconds=round(self._awake() - self._down_since, 1))
            keeping = self._keeping()
            for upstream in keeping.snapshot().upstreams:
                keeping.record(OthersHeard(self._clock(), upstream.name))
            keeping.tick()
        if self.trouble is not None:
            self.trouble = None
            self.changed()
        self._down_since, self._said_down = None, False
        if self._hopeless:
            self._hopeless = False
            self._keeping().reconsider()

    def _is_down(self, why: str) -> None:
        now = self._awake()
        self.trouble, self._informed = why, False
        self.changed()
        if self._down_since is None:
            self._down_since = now
        if not self._said_down:
            self._said_down = True
            self._tell("cluster.engine_down", well=False, reason=why)
        if not self._hopeless and now - self._down_since > PATIENCE * self._hold.ttl:
            self._hopeless = True
            self._keeping().reconsider()
        self._give_again()
        self._keeping().tick()

    def _give_again(self) -> None:
        """What was about to be unloaded is gone by now, or stays: our word, that it is given to nobody, has run out.

        For whoever asks for it anew, which we have not seen, it is no answer.
        """
        keeping = self._keeping()
        if self._awake() <= self._seen_at + YIELDED * self._hold.ttl:
            return
        for model in keeping.snapshot().models:
            if model.draining and model.id.upstream not in self._held:
                keeping.record(DrainEnded(self._clock(), model.id, unsure=True))

    # --- what is seen -------------------------------------------------------------------------------

    def _see(self, new: Picture, looked: float = -inf) -> None:
        """Tell the keeper what the others have written. No await: loads are known before an upstream is held."""
        keeping = self._keeping()
        snapshot = keeping.snapshot()
        ids = {folded(model.id): model.id for model in snapshot.models}
        # What is kept only since a reload has not been told anything yet; the others are told what is news.
        old, known = self._seen, self._known
        # Nor has what is asked through another client since then: it has forgotten what it had been told.
        told_once = {folded(m.id) for m in snapshot.models if m.told_at > -inf} & known
        for key in new.unreadable:
            if new.values[key] != old.values.get(key):
                counts = UNREADABLE.get(key.partition("/")[0], "it is passed over")
                why = f"none of these daemons has written that; {counts}"
                self._tell("cluster.row_unreadable", well=False, key=(self._prefix + key)[:200], reason=why)
        self._tell_newer(new)
        held = frozenset(
            u for u, h in new.holders.items() if self._lease is not None and h.life == self._life
        )
        for model, intent in new.loads.items():
            if model in ids and intent.life not in (self._life, self._unsent.get(model)):
                self._see_load(ids[model], intent, old.loads.get(model) if model in known else None, held)
        # What is gone is told by what was seen, though what is kept here has changed since.
        for model in old.loads.keys() - new.loads.keys():
            if model in ids and (model.upstream not in held or old.loads[model].life != self._life):
                keeping.record(LoadResolved(self._clock(), ids[model]))
        for upstream, states in new.states.items():
            if upstream in held:
                continue
            # What we had there ourselves to say may just be what its next holder says.
            before = {} if upstream in self._own_word else old.states.get(upstream, {})
            for model, told in states.items():
                if model in ids and (model not in told_once or told != before.get(model)):
                    keeping.record(self._told(ids[model], told))
        self._own_word = {*held, *(self._own_word - new.states.keys())}
        self._see_uses(new, ids, held)
        for one in snapshot.models:
            model = folded(one.id)
            if model.upstream not in held and one.draining is not (model in new.yields):
                at = self._clock()
                keeping.record(DrainEnded(at, one.id, True) if one.draining else DrainStarted(at, one.id))
        for model, wish in new.wishes.items():
            key = rows.wish_key(model)
            news = model not in known or new.values[key] != old.values.get(key)
            if ids.get(model) in self._reminders:
                self._reminders.discard(ids[model])
                del self._wishes[ids[model]]
            # What was asked for here since then will stand there next.
            if model in ids and wish.life != self._life and news and ids[model] not in self._wishes:
                asked = WarmAsked if wish.warm else ReleaseAsked
                self._seeing = True
                keeping.record(asked(self._clock(), ids[model]))
                self._seeing = False
        for model in old.wishes.keys() - new.wishes.keys():
            # Of two that came soon after each other only the first may have been seen here.
            if model in ids and model.upstream not in held and ids[model] not in self._wishes:
                keeping.record(WishSpent(self._clock(), ids[model]))
        for upstream, holder in new.holders.items():
            if self._last_holders.get(upstream, holder.life) != holder.life:
                self.handovers[upstream] = self.handovers.get(upstream, 0) + 1
            self._last_holders[upstream] = holder.life
        self._seen, self._saw, self._known, self._written = new, True, frozenset(ids), {}
        # And not what we remember: a late write may have undone it.
        self._uses_said = new.uses.get(self._name, {})
        now = self._awake()
        there = dict.fromkeys(self.members, now)
        left = {name: at for name, at in self._last_there.items() if now - at < FORGOTTEN_AFTER}
        self._last_there = left | there
        self._seen_at = now
        self._pictured.set()
        self._pictured = asyncio.Event()
        self.changed()
        news = not self._informed or any(u.answered_at >= self._looked_at for u in snapshot.upstreams)
        self._informed, self._looked_at = True, looked
        if news:
            keeping.reconsider()  # whoever was not sent away, since we did not know
        if held != self._held:
            self._held = held
            # What others have written there meanwhile is not ours.
            self._states_said = {u: said for u, said in self._states_said.items() if u in held}
            keeping.tick()

    def _tell_newer(self, new: Picture) -> None:
        """Once of each: members are upgraded one by one, and until the last one is it must not be forgotten."""
        newer = {name for name, member in new.members.items() if member.format > rows.VERSION}
        for name in newer - self._newer:
            reason = f"it writes format {new.members[name].format}, and this one knows {rows.VERSION}"
            self._tell("cluster.member_newer", well=False, instance=name, reason=reason)
        self._newer = newer

    def _see_load(self, model: ModelId, intent: Intent, before: Intent | None, held: frozenset[str]) -> None:
        keeping, now = self._keeping(), self._clock()
        if before is None or (before.created, before.life) != (intent.created, intent.life):
            # When it began nobody can tell whose clock is another: not before we heard of it, to be safe.
            keeping.record(
                LoadRemembered(
                    now, model, now, intent.expected, intent.tells_loading, by=intent.instance or "somebody"
                )
            )
        if intent.progress is not None and model.upstream not in held:
            keeping.record(LoadProgressed(now, model, intent.progress))

    def _told(self, model: ModelId, told: Told) -> HolderTold:
        now = self._clock()
        return HolderTold(
            now,
            model,
            told.ours,
            warm=told.warm,
            ill=told.ill,
            failure=told.failure,
            failures=told.failures,
            retry_at=None if told.retry_in is None else now + told.retry_in,
            contested=told.contested,
            loads=told.loads,
            lost=told.lost,
        )

    def _see_uses(self, new: Picture, ids: Mapping[ModelId, ModelId], held: frozenset[str]) -> None:
        uses, told = new.uses_elsewhere(self._name), {}
        for key, model in ids.items():
            use, before = uses.get(key, Use()), self._used_told.get(key)
            ours = use.ours if key.upstream in held else frozenset[str]()
            fact = UsedElsewhere(self._clock(), model, use.waiting, use.used, ours)
            is_any = bool(use.waiting or use.used or ours)
            if is_any or before is not None:
                if before is None or changed(fact, at=before.at) != before:
                    self._keeping().record(fact)
                if is_any:
                    told[key] = fact
        self._used_told = told

    # --- who stands for what ------------------------------------------------------------------------

    async def _stand(self) -> None:
        """Be there, hold what nobody holds, and let go of what another one can serve and we cannot."""
        if self._lease is None:
            return
        name = self._me.instance
        other = self._seen.members.get(name)
        if other is None and rows.member_key(name) in self._seen.values:
            other = Member(name, "")  # whatever it was to say
        if other is not None and other.life != self._life:
            name = rows.stand_in(name, self._life)
            self._is_doubled(other, name)
        else:
            self._others_since = None
        there = self._seen.members.get(name)
        if there is None:
            await self._join(name)
        elif there.life == self._life:
            self._name = name
            await self._leave(rows.stand_in(self._me.instance, self._life))
            for upstream in self._keeping().snapshot().upstreams:
                await self._stand_for(upstream)

    async def _join(self, name: str) -> None:
        """Be there under that name, and no longer under the one that stood in for it."""
        key = rows.member_key(name)
        changes: dict[str, bytes | None] = {key: self._row()}
        if name == self._me.instance and self._name != name:
            changes |= {rows.member_key(self._name): None, rows.uses_key(self._name): None}
        if await self._commit([created(self._key(key), 0)], changes):
            # From now on, and not from the next picture: what is written by the old name would stay with our lease.
            self._name, self._uses_said, self._uses_at = name, {}, -inf
        self._look_again()

    async def _leave(self, name: str) -> None:
        """A write that came late may have brought back who stood in for us, whom nobody else would take away."""
        keys = (rows.member_key(name), rows.uses_key(name))
        if name != self._name and any(key in self._seen.values for key in keys):
            await self._commit([], dict.fromkeys(keys))
            self._look_again()

    def _is_doubled(self, other: Member, name: str) -> None:
        """Our last life is found there until its lease runs out. What stays longer is another daemon."""
        now = self._awake()
        if self._others_since is None:
            self._others_since = now
        elif now - self._others_since > 1.5 * self._hold.ttl:
            self._others_since = inf  # said once
            self._tell(
                "cluster.name_taken",
                well=False,
                instance=self._me.instance,
                reason=f"another daemon of cluster {self._me.cluster!r}, on {other.host or 'some host'}, goes by that "
                f"name, too; give one of them another cluster.instance. Until then this one goes by {name!r}",
            )

    async def _stand_for(self, upstream: Upstream) -> None:
        name, now = upstream.name, self._awake()
        holder = self._seen.holders.get(name)
        up = upstream.state is UpstreamState.UP
        seen = any(name in m.sees for m in self._seen.members.values() if m.life != self._life)
        if up or name not in self._held:
            self._blind_since.pop(name, None)
        if holder is None:
            if (up or not seen) and not self.leaving:
                key = rows.holder_key(name)
                row = rows.holder_row(self._me.instance, self._life)
                await self._commit([created(self._key(key), 0)], {key: row})
                self._look_again()  # whoever it was that came first
        elif (
            name in self._held
            and not up
            and seen
            and now - self._blind_since.setdefault(name, now) > BLIND_AFTER
        ):
            self._held -= {name}
            self._blind_since.pop(name)
            self._keeping().tick()
            why = "another member reaches it, and this one does not"
            self._tell("cluster.let_go", well=False, upstream=name, reason=why)
            key = rows.holder_key(name)
            await self._commit([created(self._key(key), holder.created)], {key: None})
            self._look_again()

    # --- what is written ----------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Write what is not yet there of what others have to know."""
        there = self._seen.members.get(self._name)
        if self._lease is None or there is None or there.life != self._life:
            return
        snapshot = self._keeping().snapshot()
        mine = rows.uses_key(self._name)
        own = {rows.member_key(self._name): self._row(snapshot)}
        if "writes" in self._refused:
            await self._take_away(snapshot)
            await self._commit([], own)  # what was to be written may no longer be
        if self._wishes:
            await self._publish_wishes(own)
        uses = self._uses(snapshot)
        if self._is_news(uses):
            own[mine] = rows.uses_row(uses)
        if await self._write([], own) and mine in own:
            self._uses_said, self._uses_at = uses, self._awake()
        await self._forget_unsent()
        for upstream in snapshot.upstreams:
            holder = self._seen.holders.get(upstream.name)
            if holder is not None and upstream.name in self._held:
                await self._publish_state(upstream.name, holder.created, snapshot)

    async def _publish_wishes(self, own: Mapping[str, bytes]) -> None:
        """Once each: a copy of it that comes late, when all of it is spent, would be news to everybody.

        So our own row, which nobody else writes, is written anew with it, and has to be as it was seen.
        """
        for model in [m for m in self._reminders if rows.wish_key(m) in self._seen.values]:
            # Somebody has asked since. Of a model that is kept no longer nobody else would take it back.
            self._reminders.discard(model)
            self._wishes.pop(model, None)
        asked = dict(self._wishes)
        wishes = {
            rows.wish_key(m): rows.wish_row(self._life, number, warm=warm)
            for m, (warm, number) in asked.items()
        }
        changes = {key: row for key, row in wishes.items() if self._seen.values.get(key) != row}
        if changes:
            guards = [unchanged(self._key(key), self._seen.modified.get(key, 0)) for key in own]
            guards += [created(self._key(rows.wish_key(m)), 0) for m in self._reminders & asked.keys()]
            if not await self._commit(guards, {**changes, **own}):
                self._look_again()
                return
            self._written |= {**changes, **own}
        self._wishes = {m: wish for m, wish in self._wishes.items() if asked.get(m) != wish}
        self._reminders &= self._wishes.keys()

    async def _forget_unsent(self) -> None:
        """Take away what was written of loads that never went out."""
        for model, life in list(self._unsent.items()):  # a load may begin, or be given up, meanwhile
            key, intent = rows.load_key(model), self._seen.loads.get(model)
            if intent is not None and intent.life == life:
                seen = unchanged(self._key(key), self._seen.modified.get(key, 0))
                await self._write([seen], {key: None})

    async def _take_away(self, snapshot: Snapshot) -> None:
        """What is spent, alone: a full etcd takes that, and nothing that writes anything besides."""
        await self._forget_unsent()
        for name in self._held & self._seen.holders.keys():
            models = {folded(model.id): model for model in snapshot.of(name)}
            gone = [key for key, value in self._spent(name, models) if value is None]
            guards = [created(self._key(rows.holder_key(name)), self._seen.holders[name].created)]
            guards += [unchanged(self._key(key), self._seen.modified.get(key, 0)) for key in gone]
            await self._write(guards, dict.fromkeys(gone))

    async def _publish_state(self, upstream: str, since: int, snapshot: Snapshot) -> None:
        now = snapshot.now
        models = {folded(model.id): model for model in snapshot.of(upstream)}
        changes: dict[str, bytes | None] = {}
        states = {key: self._state(model, now) for key, model in models.items()}
        there = {**self._seen.values, **self._written}.get(rows.states_key(upstream))
        if (states, there) != self._states_said.get(upstream):
            told = {
                key: one if again is None else changed(one, retry_in=max(0.0, round(again - now, 3)))
                for key, (one, again) in states.items()
            }
            there = changes[rows.states_key(upstream)] = rows.states_row(told)
        guards = [created(self._key(rows.holder_key(upstream)), since)]
        for name, value in self._spent(upstream, models):
            # Each only as it was seen there: another load may have begun meanwhile, or a person asked anew.
            # What we have written ourselves since waits for the next picture.
            if name not in self._written:
                changes[name] = value
                guards.append(unchanged(self._key(name), self._seen.modified.get(name, 0)))
        if changes and await self._write(guards, changes) and there is not None:
            self._states_said[upstream] = states, there

    def _spent(self, upstream: str, models: Mapping[ModelId, Model]) -> Iterable[tuple[str, bytes | None]]:
        """What has come of loads, unloads and wishes there, by its key."""
        for key, intent in self._seen.loads.items():
            model = models.get(key)
            if key.upstream != upstream or model is None:
                continue
            if not is_loading(model):
                yield rows.load_key(key), None
            elif model.progress is not None and self._is_due(key):
                yield rows.load_key(key), rows.load_row(changed(intent, progress=round(model.progress, 3)))
        for key in self._seen.yields:
            model = models.get(key)
            if key.upstream == upstream and (model is None or not model.unloading):
                yield rows.yield_key(key), None
        for key in self._seen.wishes:
            model = models.get(key)
            if model is not None and model.asked_for is None:
                yield rows.wish_key(key), None

    def _is_due(self, model: ModelId) -> bool:
        now = self._awake()
        if now - self._progress_at.get(model, -inf) < PROGRESS_EVERY:
            return False
        self._progress_at[model] = now
        return True

    @staticmethod
    def _state(model: Model, now: float) -> tuple[Told, float | None]:
        ill = model.reason if model.instances and model.state is State.BACKOFF else None
        again = model.retry_at if model.retry_at is not None and model.retry_at > now else None
        return (
            Told(
                warm=model.state is State.WARM,
                ours=model.ours,
                lost=model.lost,
                ill=ill,
                failure=model.failure,
                failures=model.failures,
                contested=model.contested,
                loads=tuple(round(s, 3) for s in model.recent_loads),
            ),
            again,
        )

    def _uses(self, snapshot: Snapshot) -> Mapping[ModelId, Use]:
        since = snapshot.now - 2 * self._hold.interval
        yields, up = self._seen.yields, {u.name for u in snapshot.upstreams if u.state is UpstreamState.UP}
        knows = up - self._held  # better than whoever acts there, perhaps
        uses = {}
        for m in snapshot.models:
            key = folded(m.id)
            yielded = m.draining and key in yields
            uses[key] = Use(
                m.waiting,
                # By callers of ours. Who else uses it whoever acts sees as well as we do, a ping of its own among that.
                used=m.in_flight > 0 or self._came.get(key, -inf) > since,
                yielded=yielded,
                asked=yields[key] if yielded else None,
                ours=m.unknown_there if m.id.upstream in knows else frozenset(),
            )
        return {key: use for key, use in uses.items() if use != Use()}

    def _is_news(self, uses: Mapping[ModelId, Use]) -> bool:
        """Whether it cannot wait for a renewal: that somebody waits, or our word that a model is given to nobody.

        Use of what is warm can, or each request would be a write; nothing is unloaded before we have given our word.
        While it stands there, or once it is withdrawn, it can not: whoever asks anew would unload by the old one.
        """
        said = self._uses_said
        for key in uses.keys() | said.keys():
            use, before = uses.get(key, Use()), said.get(key, Use())
            if use.waiting > 0 and before.waiting == 0:
                return True
            if (use.yielded, use.asked) != (before.yielded, before.asked):
                return True
            if before.yielded and use.used and not before.used:
                return True
        # Renewals are not to the instant: by a whole interval every other one would come too soon.
        return uses != said and self._awake() >= self._uses_at + 0.9 * self._hold.interval

    def _row(self, snapshot: Snapshot | None = None) -> bytes:
        snapshot = snapshot or self._keeping().snapshot()
        admin, client = self.addresses
        return rows.member_row(
            Member(
                self._me.instance,
                self._life,
                host=self._me.host,
                version=self._me.version,
                admin=admin,
                client=client,
                sees=frozenset(u.name for u in snapshot.upstreams if u.state is UpstreamState.UP),
                ready=all(m.state is State.WARM for m in snapshot.models if m.wanted),
                config=self.config,
                places=self.places,
                doubled=self.doubled,
            )
        )

    async def _write(self, compare: Iterable[Json], changes: Mapping[str, bytes | None]) -> bool:
        """The same, of what is not there already."""
        known = {**self._seen.values, **self._written}
        new = {key: value for key, value in changes.items() if known.get(key) != value}
        if not new:
            return True
        done = await self._commit(compare, new)
        if done:
            self._written |= new
        return done

    async def _commit(self, compare: Iterable[Json], changes: Mapping[str, bytes | None]) -> bool:
        lease = self._lease or 0
        if not lease and any(
            value is not None and key.startswith(rows.LEASED) for key, value in changes.items()
        ):
            return False  # it ran out meanwhile: without one they would stay for ever
        writes = [
            delete(self._key(key))
            if value is None
            else put(self._key(key), value, lease if key.startswith(rows.LEASED) else 0)
            for key, value in changes.items()
        ]
        if all(value is None for value in changes.values()):  # which a full one takes, too
            return await self._engine.commit(list(compare), writes)
        with self._asks("writes"):
            return await self._engine.commit(list(compare), writes)

    def _key(self, key: str) -> str:
        return self._prefix + key
