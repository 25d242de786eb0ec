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
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing

from keepalive.cluster import rows
from keepalive.cluster.etcd import EngineError, Etcd, Standing, created
from keepalive.cluster.given import Keeping, Self, Tell
from keepalive.cluster.grounds import Grounds
from keepalive.cluster.hold import Hold
from keepalive.cluster.place import Place
from keepalive.cluster.rows import Member, Picture, Row, Use, folded
from keepalive.cluster.seeing import Seeing, differences
from keepalive.cluster.writing import Writing
from keepalive.core.facts import Fact, ModelId
from keepalive.core.records import Model, Upstream

# What changes in bursts is told once.
GATHER = 0.05
# A watch whose connection died without a word is missed for no longer than this.
WATCH_AGAIN = 60.0
# A last word to etcd at the end.
LAST_WORD = 2.0


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
        self._grounds = Grounds(engine, me, ttl, keeping, clock, awake, tell, self)
        self._writing = Writing(self._grounds, self)
        self._seeing = Seeing(self._grounds, self._writing, self)
        self._place = Place(self._grounds, self._writing, self)
        self._wake = asyncio.Event()
        self._stale = False
        self._stand_of = Standing()  # of etcd, at the picture
        self._said_replaced = False
        self.addresses = ("", "")  # of the admin and the client listener
        self.config: Mapping[str, str] = {}
        self.places: Mapping[str, str] = {}
        self.renewal = 0.0  # what the last one took
        self.leaving = False
        self.changed: Callable[[], None] = lambda: None  # called when what others ask may have changed

    # --- what the keeper asks -----------------------------------------------------------------------

    def acts(self, upstream: str, /) -> bool:
        return self._grounds.acts(upstream)

    async def begin(self, model: Model, /) -> bool:
        grounds = self._grounds
        upstream = model.id.upstream
        holder = grounds.seen.holders.get(upstream)
        if holder is None or not self.acts(upstream):
            return False
        why, done = "another one holds it", False
        row = self._writing.begins(model)
        try:
            done = await grounds.commit(
                [created(grounds.key(rows.holder_key(upstream)), holder.created)],
                {rows.load_key(model.id): row},
            )
        except EngineError as error:
            why = str(error)
        if not done:
            grounds.put_off(upstream)
            grounds.tell(
                "cluster.load_put_off", well=False, model=model.id.key, upstream=upstream, reason=why
            )
            self.look_again()
        return done and self.acts(upstream)

    async def clear(self, model: Model, /) -> bool:
        grounds = self._grounds
        upstream, key = model.id.upstream, folded(model.id)
        holder = grounds.seen.holders.get(upstream)
        if holder is None or not self.acts(upstream):
            return False
        guard = created(grounds.key(rows.holder_key(upstream)), holder.created)
        asked = grounds.seen.yields.get(key)
        try:
            row = rows.holder_row(grounds.me.instance, grounds.life)
            if not await grounds.commit([guard], {rows.yield_key(key): row}):
                self.look_again()
                return False
            async with asyncio.timeout(grounds.hold.interval):
                # What stands there of an earlier time that we asked is no answer to this one.
                while not (yielded := grounds.seen.yields.get(key) != asked and self._seeing.is_yielded(key)):
                    self.look_again()
                    await self._seeing.pictured.wait()
                    if not self.acts(upstream):
                        return False
        except (EngineError, TimeoutError):
            return False
        use = grounds.seen.uses_elsewhere(grounds.name).get(key, Use())
        return yielded and not use.used and not use.waiting and self.acts(upstream)

    def hopeless(self, upstream: str, /) -> tuple[str, float | None] | None:
        """Why nobody acts there and nobody soon will, with the seconds after which to ask again."""
        if self._grounds.hopeless and not self.acts(upstream):
            return self.why_nobody_acts, self._grounds.hold.ttl
        return None

    def knows(self, upstream: str, /) -> bool:
        grounds = self._grounds
        if self.acts(upstream):
            return True
        # What came into a listing since, or just comes, whoever acts there may have loaded.
        there = next((u for u in grounds.keeping().snapshot().upstreams if u.name == upstream), None)
        late = there is not None and there.answered_at >= grounds.looked_at
        known = grounds.informed and grounds.is_heard(upstream, grounds.seen)
        return known and not late and all(m.upstream != upstream for m in grounds.seen.loads)

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        self._writing.observe(fact, before, after)

    def kept(self, models: Iterable[ModelId]) -> None:
        """A config was read: what it no longer names is told anew when a later one does."""
        self._seeing.kept(models)

    # --- what others ask ----------------------------------------------------------------------------

    @property
    def engine_up(self) -> bool:
        return self._grounds.trouble is None

    @property
    def trouble(self) -> str | None:
        """What is wrong with etcd."""
        return self._grounds.trouble

    @property
    def why_nobody_acts(self) -> str:
        """Of an etcd that is away."""
        return f"nothing is loaded or unloaded, because {self._grounds.trouble}"

    @property
    def doubled(self) -> bool:
        """Another daemon goes by our name."""
        return self._place.doubled

    @property
    def instance(self) -> str:
        return self._grounds.name if self.doubled else self._grounds.me.instance

    @property
    def name(self) -> str:
        return self._grounds.me.cluster

    @property
    def instances(self) -> Mapping[str, bool]:
        return self._seeing.instances

    @property
    def members(self) -> Mapping[str, Member]:
        return self._seeing.members

    @property
    def holders(self) -> Mapping[str, str]:
        return self._seeing.holders

    @property
    def handovers(self) -> Mapping[str, int]:
        return self._seeing.handovers

    @property
    def differences(self) -> list[str]:
        """What is not as it should be between members, in sentences."""
        grounds = self._grounds
        return differences(grounds.me, self.instance, grounds.seen.members, self.config, self.places)

    @property
    def picture(self) -> Picture:
        """As of the last look, which may be long ago while etcd is away."""
        return self._grounds.seen

    @property
    def held(self) -> frozenset[str]:
        return frozenset(u for u in self._grounds.held if self.acts(u))

    # --- its life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Be a member until cancelled; `close` then lets go."""
        async with asyncio.TaskGroup() as tasks:
            for part in (self._renewing(), self._watching(), self._looking()):
                tasks.create_task(part)

    async def close(self) -> None:
        """To be called when nothing is under way any more: from then on another one may act."""
        grounds = self._grounds
        grounds.held = frozenset()
        if grounds.lease is not None:
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(LAST_WORD):
                    await grounds.engine.revoke(grounds.lease)
        await grounds.engine.close()

    async def _renewing(self) -> None:
        grounds = self._grounds
        while True:
            asked = grounds.awake()
            try:
                if grounds.lease is not None and not grounds.hold.good(asked):
                    # Renewals that arrive and of which we hear nothing would keep others from acting for ever.
                    await grounds.engine.rows(grounds.key(rows.member_key(grounds.me.instance)))
                    asked = grounds.awake()
                if grounds.lease is None:
                    lease = await grounds.engine.grant(grounds.hold.ttl)
                    grounds.begin_life(lease)
                    await self._writing.tell_loads()
                    grounds.may_act(Hold(grounds.hold.ttl, asked))
                elif await grounds.engine.renew(grounds.lease):
                    await self._writing.tell_loads()
                    grounds.may_act(grounds.hold.renewed(asked))
                else:
                    grounds.end_life()  # while we were stopped, cut off or late
                    grounds.keeping().tick()
                    continue
            except EngineError as error:
                grounds.is_away(str(error))
            else:
                self.renewal = grounds.awake() - asked
                grounds.is_answered()
                self.look_again()
            await asyncio.sleep(
                max(grounds.hold.interval - (grounds.awake() - asked), grounds.hold.interval / 10)
            )

    async def _watching(self) -> None:
        grounds = self._grounds
        while True:
            with contextlib.suppress(
                EngineError, TimeoutError
            ):  # whoever renews the lease says what is wrong
                async with (
                    asyncio.timeout(WATCH_AGAIN),
                    aclosing(grounds.engine.watch(grounds.prefix)) as changes,  # type: ignore[type-var]
                ):
                    async for _ in changes:
                        self.look_again()
            await asyncio.sleep(grounds.hold.interval / 3)

    async def _looking(self) -> None:
        grounds = self._grounds
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER)
            stale, self._stale = self._stale, False
            self._wake.clear()
            try:
                if stale or not grounds.saw:
                    looked = grounds.clock()
                    self._seeing.see(rows.picture(await self._rows()), looked)
                    await self._place.stand()
                await self._writing.publish()
            except EngineError:
                # The next renewal finds out whether it is down; until then nothing is lost. What was asked may be done.
                self._stale = True
                grounds.keeping().tick()
                await asyncio.sleep(grounds.hold.interval)

    async def _rows(self) -> Iterable[Row]:
        grounds = self._grounds
        with grounds.asks("rows"):
            found = await grounds.engine.rows(grounds.prefix)
        if why := grounds.engine.standing.replaces(self._stand_of):
            # What all of us know is in none of it, so that each writes what it knows.
            grounds.wait_for_others()
            if not self._said_replaced:
                self._said_replaced = True
                grounds.tell("cluster.engine_replaced", well=False, reason=why)
            await self._writing.remind()
            found = await grounds.engine.rows(grounds.prefix)
        self._stand_of, self._said_replaced = grounds.engine.standing, False
        return found

    # --- what its parts ask --------------------------------------------------------------------------

    def look_again(self) -> None:
        self._stale = True
        self._wake.set()

    def say(self) -> None:
        self._wake.set()
