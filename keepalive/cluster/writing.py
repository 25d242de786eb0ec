"""What others have to know of us, and have not read yet: what callers, people and loads do here, row by row.

What is there already is not written again; what somebody else may have written meanwhile, only as it was seen.
"""

import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace as changed
from math import inf

from keepalive.cluster import rows
from keepalive.cluster.etcd import EngineError, Json, created, unchanged
from keepalive.cluster.given import Owner
from keepalive.cluster.grounds import Grounds
from keepalive.cluster.rows import Intent, Member, Told, Use, folded
from keepalive.core.facts import (
    Fact,
    LoadForgone,
    LoadProgressed,
    LoadStarted,
    ModelId,
    ReleaseAsked,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    WaitStarted,
    WarmAsked,
)
from keepalive.core.records import Model, Snapshot, Upstream, UpstreamState, is_loading
from keepalive.core.states import State

# How far a load is is told this often, which is often enough for whoever waits for it.
PROGRESS_EVERY = 2.0


class Writing:
    """All that we write of what is known here."""

    def __init__(self, grounds: Grounds, owner: Owner) -> None:
        self._grounds = grounds
        self._owner = owner
        self._written: dict[str, bytes | None] = {}  # since the picture
        self._came: dict[ModelId, float] = {}  # when a caller of ours last came for it, or was answered
        self._uses_said: Mapping[ModelId, Use] = {}
        self._uses_at = -inf
        # With the row, since a late write or a restored etcd may have put another one in its place.
        self._states_said: dict[str, tuple[Mapping[ModelId, tuple[Told, float | None]], bytes]] = {}
        self._progress_at: dict[ModelId, float] = {}
        self.wishes: dict[ModelId, tuple[bool, str]] = {}  # not yet written, each with a number of its own
        # Of these, what was written already, to an etcd that is gone: whatever stands there now is newer.
        self._reminders: set[ModelId] = set()
        self._begun: dict[ModelId, str] = {}  # in which life an intent was last written, if it was
        self.unsent: dict[ModelId, str] = {}  # the same of loads that never went out
        self._loads: Counter[ModelId] = Counter()  # begun in this life
        self._alone: set[ModelId] = set()  # loads begun by a person's word while nobody could be told
        self.by_another = False  # while `Seeing` records a wish: it was another's word

    # --- what happens here ---------------------------------------------------------------------------

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(fact, WaitStarted | RequestStarted | RequestEnded | RequestsCounted):
            self._came[folded(fact.model)] = fact.at
        if not isinstance(before, Model) or not isinstance(after, Model):
            if isinstance(before, Upstream) and isinstance(after, Upstream) and before.state != after.state:
                self._owner.say()
            return
        if isinstance(fact, LoadStarted):
            self._loads[folded(after.id)] += 1
        if isinstance(fact, WarmAsked | ReleaseAsked):
            # A person has asked for it: all members are to know, and to go on knowing when this one ends.
            if not self.by_another:
                self.wishes[after.id] = isinstance(fact, WarmAsked), secrets.token_hex(4)
                self._reminders.discard(after.id)
                self._owner.say()
        elif isinstance(fact, LoadStarted) and after.alone:
            self._alone.add(after.id)
            self.unsent.pop(folded(after.id), None)
        elif isinstance(fact, LoadForgone):
            # What was written of it, if it was, is for nobody to wait for.
            if life := self._begun.pop(folded(after.id), None):
                self.unsent[folded(after.id)] = life
            self._owner.say()
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
            self._owner.say()

    def begins(self, model: Model) -> bytes:
        """What is to be written of a load before it begins."""
        self._begun[folded(model.id)] = self._grounds.life
        self.unsent.pop(folded(model.id), None)
        return rows.load_row(self._intent(model))

    def _intent(self, model: Model) -> Intent:
        return Intent(
            self._grounds.me.instance,
            self._grounds.life,
            0,
            model.expected_load,
            model.tells_loading,
            number=self._loads[folded(model.id)],
        )

    # --- what stands there now -----------------------------------------------------------------------

    def forget_written(self) -> None:
        """Another picture: what counts is what it shows, and not what we remember: a late write may have undone it."""
        self._written = {}
        self._uses_said = self._grounds.seen.uses.get(self._grounds.name, {})

    def wished(self, models: Iterable[ModelId]) -> set[ModelId]:
        """For which of these a person's wish was written since the picture."""
        return {model for model in models if self._written.get(rows.wish_key(model)) is not None}

    def forget_reminder(self, model: ModelId | None) -> None:
        """Whatever stands there now of that model is newer."""
        if model in self._reminders:
            self._reminders.discard(model)
            del self.wishes[model]

    def forget_states(self) -> None:
        """What we hold is not what it was: what others have written there meanwhile is not ours."""
        self._states_said = {u: said for u, said in self._states_said.items() if u in self._grounds.held}

    def forget_uses(self) -> None:
        """Nothing stands there yet by the name that we go by from now on."""
        self._uses_said, self._uses_at = {}, -inf

    # --- what etcd has to be told ---------------------------------------------------------------------

    async def tell_loads(self) -> None:
        """Before anything else is done with an etcd that is back: whoever acts is to know what goes on already."""
        while self._alone:
            told = self._alone.pop()  # before it is written: another one may begin meanwhile
            model = next((m for m in self._grounds.keeping().snapshot().models if m.id == told), None)
            if model is None or not is_loading(model):
                continue
            self.unsent.pop(folded(told), None)
            try:
                # It may stand in the place of one of earlier, whose end could not be written.
                await self._grounds.commit([], {rows.load_key(told): rows.load_row(self._intent(model))})
            except EngineError:
                self._alone.add(told)
                raise

    async def remind(self) -> None:
        """Write what we know of to an etcd that knows less."""
        grounds = self._grounds
        models = grounds.keeping().snapshot().models
        known = {m.id: m.asked_for for m in models if m.asked_for is not None and m.id not in self.wishes}
        self._reminders |= known.keys()
        self.wishes |= {m: (warm, secrets.token_hex(4)) for m, warm in known.items()}
        for model in models:
            if is_loading(model):
                self.unsent.pop(folded(model.id), None)
                intent = grounds.seen.loads.get(folded(model.id), self._intent(model))
                key = rows.load_key(model.id)
                await grounds.commit([created(grounds.key(key), 0)], {key: rows.load_row(intent)})

    async def publish(self) -> None:
        """Write what is not yet there of what others have to know."""
        grounds = self._grounds
        there = grounds.seen.members.get(grounds.name)
        if grounds.lease is None or there is None or there.life != grounds.life:
            return
        snapshot = grounds.keeping().snapshot()
        mine = rows.uses_key(grounds.name)
        own = {rows.member_key(grounds.name): self.row(snapshot)}
        if "writes" in grounds.refused:
            await self._take_away(snapshot)
            await grounds.commit([], own)  # what was to be written may no longer be
        if self.wishes:
            await self._publish_wishes(own)
        uses = self._uses(snapshot)
        if self._is_news(uses):
            own[mine] = rows.uses_row(uses)
        if await self._write([], own) and mine in own:
            self._uses_said, self._uses_at = uses, grounds.awake()
        await self._forget_unsent()
        for upstream in snapshot.upstreams:
            holder = grounds.seen.holders.get(upstream.name)
            if holder is not None and upstream.name in grounds.held:
                await self._publish_state(upstream.name, holder.created, snapshot)

    async def _publish_wishes(self, own: Mapping[str, bytes]) -> None:
        """Once each: a copy of it that comes late, when all of it is spent, would be news to everybody.

        So our own row, which nobody else writes, is written anew with it, and has to be as it was seen.
        """
        grounds = self._grounds
        for model in [m for m in self._reminders if rows.wish_key(m) in grounds.seen.values]:
            # Somebody has asked since. Of a model that is kept no longer nobody else would take it back.
            self._reminders.discard(model)
            self.wishes.pop(model, None)
        asked = dict(self.wishes)
        wishes = {
            rows.wish_key(m): rows.wish_row(grounds.life, number, warm=warm)
            for m, (warm, number) in asked.items()
        }
        changes = {key: row for key, row in wishes.items() if grounds.seen.values.get(key) != row}
        if changes:
            guards = [unchanged(grounds.key(key), grounds.seen.modified.get(key, 0)) for key in own]
            guards += [created(grounds.key(rows.wish_key(m)), 0) for m in self._reminders & asked.keys()]
            if not await grounds.commit(guards, {**changes, **own}):
                self._owner.look_again()
                return
            self._written |= {**changes, **own}
        self.wishes = {m: wish for m, wish in self.wishes.items() if asked.get(m) != wish}
        self._reminders &= self.wishes.keys()

    async def _forget_unsent(self) -> None:
        """Take away what was written of loads that never went out."""
        grounds = self._grounds
        for model, life in list(self.unsent.items()):  # a load may begin, or be given up, meanwhile
            key, intent = rows.load_key(model), grounds.seen.loads.get(model)
            if intent is not None and intent.life == life:
                seen = unchanged(grounds.key(key), grounds.seen.modified.get(key, 0))
                await self._write([seen], {key: None})

    async def _take_away(self, snapshot: Snapshot) -> None:
        """What is spent, alone: a full etcd takes that, and nothing that writes anything besides."""
        grounds = self._grounds
        await self._forget_unsent()
        for name in grounds.held & grounds.seen.holders.keys():
            models = {folded(model.id): model for model in snapshot.of(name)}
            gone = [key for key, value in self._spent(name, models) if value is None]
            guards = [created(grounds.key(rows.holder_key(name)), grounds.seen.holders[name].created)]
            guards += [unchanged(grounds.key(key), grounds.seen.modified.get(key, 0)) for key in gone]
            await self._write(guards, dict.fromkeys(gone))

    async def _publish_state(self, upstream: str, since: int, snapshot: Snapshot) -> None:
        grounds = self._grounds
        now = snapshot.now
        models = {folded(model.id): model for model in snapshot.of(upstream)}
        changes: dict[str, bytes | None] = {}
        states = {key: _state(model, now) for key, model in models.items()}
        row = rows.states_key(upstream)
        there = {**grounds.seen.values, **self._written}.get(row)
        # Whoever has come since may have found etcd away, and take what stands there for a word of before.
        last = max((member.created for member in grounds.seen.members.values()), default=0)
        anew = row not in self._written and not grounds.seen.is_said(upstream, last)
        if anew or (states, there) != self._states_said.get(upstream):
            told = {
                key: one if again is None else changed(one, retry_in=max(0.0, round(again - now, 3)))
                for key, (one, again) in states.items()
            }
            there = changes[row] = rows.states_row(told)
        guards = [created(grounds.key(rows.holder_key(upstream)), since)]
        for name, value in self._spent(upstream, models):
            # Each only as it was seen there: another load may have begun meanwhile, or a person asked anew.
            # What we have written ourselves since waits for the next picture.
            if name not in self._written:
                changes[name] = value
                guards.append(unchanged(grounds.key(name), grounds.seen.modified.get(name, 0)))
        done = bool(changes) and await self._write(guards, changes, anew={row} if anew else ())
        if done and there is not None:
            self._states_said[upstream] = states, there

    def _spent(self, upstream: str, models: Mapping[ModelId, Model]) -> Iterable[tuple[str, bytes | None]]:
        """What has come of loads, unloads and wishes there, by its key."""
        grounds = self._grounds
        for key, intent in grounds.seen.loads.items():
            model = models.get(key)
            if key.upstream != upstream or model is None:
                continue
            if not is_loading(model):
                yield rows.load_key(key), None
            elif model.progress is not None and self._is_due(key):
                yield rows.load_key(key), rows.load_row(changed(intent, progress=round(model.progress, 3)))
        for key in grounds.seen.yields:
            model = models.get(key)
            if key.upstream == upstream and (model is None or not model.unloading):
                yield rows.yield_key(key), None
        for key in grounds.seen.wishes:
            model = models.get(key)
            if model is not None and model.asked_for is None:
                yield rows.wish_key(key), None

    def _is_due(self, model: ModelId) -> bool:
        now = self._grounds.awake()
        if now - self._progress_at.get(model, -inf) < PROGRESS_EVERY:
            return False
        self._progress_at[model] = now
        return True

    def _uses(self, snapshot: Snapshot) -> Mapping[ModelId, Use]:
        grounds = self._grounds
        since = snapshot.now - 2 * grounds.hold.interval
        yields, up = grounds.seen.yields, {u.name for u in snapshot.upstreams if u.state is UpstreamState.UP}
        knows = up - grounds.held  # better than whoever acts there, perhaps
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
        return uses != said and self._grounds.awake() >= self._uses_at + 0.9 * self._grounds.hold.interval

    def row(self, snapshot: Snapshot | None = None) -> bytes:
        grounds = self._grounds
        snapshot = snapshot or grounds.keeping().snapshot()
        admin, client = self._owner.addresses
        return rows.member_row(
            Member(
                grounds.me.instance,
                grounds.life,
                host=grounds.me.host,
                version=grounds.me.version,
                admin=admin,
                client=client,
                sees=frozenset(u.name for u in snapshot.upstreams if u.state is UpstreamState.UP),
                ready=all(m.state is State.WARM for m in snapshot.models if m.wanted),
                config=self._owner.config,
                places=self._owner.places,
                doubled=self._owner.doubled,
            )
        )

    async def _write(
        self, compare: Iterable[Json], changes: Mapping[str, bytes | None], anew: Collection[str] = ()
    ) -> bool:
        """Like `Grounds.commit`, of what is not there already, or is to be said `anew`."""
        known = {**self._grounds.seen.values, **self._written}
        new = {key: value for key, value in changes.items() if key in anew or known.get(key) != value}
        if not new:
            return True
        done = await self._grounds.commit(compare, new)
        if done:
            self._written |= new
        return done


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
