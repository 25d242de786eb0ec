"""What others have written: one picture compared with the one before, and the facts that come of it.

And whoever asks for it is told who is there, and what is not as it should be between us.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace as changed
from math import inf

from keepalive.cluster import rows
from keepalive.cluster.given import Owner, Self
from keepalive.cluster.grounds import Grounds
from keepalive.cluster.rows import Intent, Member, Picture, Told, Use, folded
from keepalive.cluster.writing import Writing
from keepalive.core.facts import (
    DrainEnded,
    DrainStarted,
    HolderTold,
    LoadProgressed,
    LoadRemembered,
    LoadResolved,
    ModelId,
    ReleaseAsked,
    UsedElsewhere,
    WarmAsked,
    WishSpent,
)

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


class Seeing:
    """All that pictures have shown."""

    def __init__(self, grounds: Grounds, writing: Writing, owner: Owner) -> None:
        self._grounds = grounds
        self._writing = writing
        self._owner = owner
        self.pictured = asyncio.Event()  # another one each time
        self._known: frozenset[ModelId] = frozenset()  # what was kept here when the picture was seen
        self._passed_over: frozenset[ModelId] = frozenset()  # what others load, while a load of ours goes on
        self._own_word: set[str] = set()  # upstreams of which nobody has told us anything since we held them
        self._heard: set[str] = set()  # upstreams of which whoever acts has said what was seen last
        self._used_told: Mapping[ModelId, UsedElsewhere] = {}
        self._newer: set[str] = set()  # members whose format is newer than ours, as was said
        self._last_there: dict[str, float] = {}  # when each was last seen, of those who are not forgotten
        self._last_holders: dict[str, str] = {}
        self.handovers: dict[str, int] = {}

    def see(self, new: Picture, looked: float = -inf) -> None:
        """Tell the keeper what the others have written. No await: loads are known before an upstream is held."""
        grounds = self._grounds
        keeping = grounds.keeping()
        snapshot = keeping.snapshot()
        ids = {folded(model.id): model.id for model in snapshot.models}
        # What is kept only since a reload has not been told anything yet; the others are told what is news.
        old, known = grounds.seen, self._known
        # Nor has what is asked through another client since then: it has forgotten what it had been told.
        knows = {folded(m.id): m.told for m in snapshot.models if m.told_at > -inf and folded(m.id) in known}
        for key in new.unreadable:
            if new.values[key] != old.values.get(key):
                counts = UNREADABLE.get(key.partition("/")[0], "it is passed over")
                why = f"none of these daemons has written that; {counts}"
                grounds.tell(
                    "cluster.row_unreadable", well=False, key=(grounds.prefix + key)[:200], reason=why
                )
        self._tell_newer(new)
        held = frozenset(
            u for u, h in new.holders.items() if grounds.lease is not None and h.life == grounds.life
        )
        recalled = {folded(m.id) for m in snapshot.models if m.pending is not None and m.pending.ours}
        busy = {folded(m.id) for m in snapshot.models if m.load_started is not None}
        passed_over: set[ModelId] = set()
        for model, intent in new.loads.items():
            stood = old.loads.get(model) if model in known and model not in self._passed_over else None
            ours = intent.life in (grounds.life, self._writing.unsent.get(model))
            # Of what our last life began we know better when that was.
            ours |= stood is None and intent.instance == grounds.me.instance and model in recalled
            if model in ids and not ours:
                self._see_load(ids[model], intent, stood, held)
                # While a load of ours is under way that is passed over: it is told again when ours is over.
                news = stood is None or _which(stood) != _which(intent)
                if news and model in busy and intent.instance != grounds.me.instance:
                    passed_over.add(model)
        self._passed_over = frozenset(passed_over)
        # What is gone is told by what was seen, though what is kept here has changed since.
        for model in old.loads.keys() - new.loads.keys():
            if model in ids and (model.upstream not in held or old.loads[model].life != grounds.life):
                keeping.record(LoadResolved(grounds.clock(), ids[model]))
        for upstream, states in new.states.items():
            if upstream in held:
                continue
            heard = grounds.is_heard(upstream, new)
            row = rows.states_key(upstream)
            # It may be believed only now, though it says what it said before.
            again = new.modified[row] != old.modified.get(row) or upstream not in self._heard
            # What we had there ourselves to say may just be what its next holder says.
            before = {} if upstream in self._own_word else old.states.get(upstream, {})
            for model, told in states.items():
                if model not in ids:
                    continue
                # What was not known, or seen to go since, it may be sure of by now.
                missed = model not in knows or (again and heard and not told.ours <= knows[model])
                if missed or told != before.get(model):
                    keeping.record(self._told(ids[model], told, heard=heard))
        self._own_word = {*held, *(self._own_word - new.states.keys())}
        self._heard = {upstream for upstream in new.states if grounds.is_heard(upstream, new)}
        self._see_uses(new, ids, held)
        for one in snapshot.models:
            model = folded(one.id)
            if model.upstream not in held and one.draining is not (model in new.yields):
                at = grounds.clock()
                keeping.record(DrainEnded(at, one.id, True) if one.draining else DrainStarted(at, one.id))
        for model, wish in new.wishes.items():
            key = rows.wish_key(model)
            news = model not in known or new.values[key] != old.values.get(key)
            self._writing.forget_reminder(ids.get(model))
            # What was asked for here since then will stand there next.
            if model in ids and wish.life != grounds.life and news and ids[model] not in self._writing.wishes:
                asked = WarmAsked if wish.warm else ReleaseAsked
                self._writing.by_another = True
                keeping.record(asked(grounds.clock(), ids[model]))
                self._writing.by_another = False
        for model in (old.wishes.keys() | self._writing.wished(ids)) - new.wishes.keys():
            # Of two that came soon after each other only the first may have been seen here, or none but written.
            if model in ids and model.upstream not in held and ids[model] not in self._writing.wishes:
                keeping.record(WishSpent(grounds.clock(), ids[model]))
        for upstream, holder in new.holders.items():
            if self._last_holders.get(upstream, holder.life) != holder.life:
                self.handovers[upstream] = self.handovers.get(upstream, 0) + 1
            self._last_holders[upstream] = holder.life
        self._known = frozenset(ids)
        now = grounds.show(new)
        self._writing.forget_written()
        left = {name: at for name, at in self._last_there.items() if now - at < FORGOTTEN_AFTER}
        self._last_there = left | dict.fromkeys(self.members, now)
        self.pictured.set()
        self.pictured = asyncio.Event()
        self._owner.changed()
        news = not grounds.informed or any(u.answered_at >= grounds.looked_at for u in snapshot.upstreams)
        grounds.inform(looked)
        if news:
            keeping.reconsider()  # whoever was not sent away, since we did not know
        if held != grounds.held:
            grounds.held = held
            self._writing.forget_states()
            keeping.tick()

    def _tell_newer(self, new: Picture) -> None:
        """Once of each: members are upgraded one by one, and until the last one is it must not be forgotten."""
        newer = {name for name, member in new.members.items() if member.format > rows.VERSION}
        for name in newer - self._newer:
            reason = f"it writes format {new.members[name].format}, and this one knows {rows.VERSION}"
            self._grounds.tell("cluster.member_newer", well=False, instance=name, reason=reason)
        self._newer = newer

    def _see_load(self, model: ModelId, intent: Intent, before: Intent | None, held: frozenset[str]) -> None:
        keeping, now = self._grounds.keeping(), self._grounds.clock()
        # One that comes to nothing and the next may be one row, since nobody waits to take the first one away.
        if before is None or _which(before) != _which(intent):
            # When it began nobody can tell whose clock is another: not before we heard of it, to be safe.
            keeping.record(
                LoadRemembered(
                    now, model, now, intent.expected, intent.tells_loading, by=intent.instance or "somebody"
                )
            )
        if intent.progress is not None and model.upstream not in held:
            keeping.record(LoadProgressed(now, model, intent.progress))

    def _told(self, model: ModelId, told: Told, *, heard: bool) -> HolderTold:
        """`heard`: by who acts there. Of what is left of another one nobody tells when it was said, nor what became of
        those copies since; nor where etcd was away when we came, and all that stands there may be of before.
        """
        now = self._grounds.clock()
        return HolderTold(
            now,
            model,
            told.ours if heard else frozenset(),
            warm=told.warm,
            ill=told.ill,
            failure=told.failure,
            failures=told.failures,
            retry_at=None if told.retry_in is None else now + told.retry_in,
            contested=told.contested,
            loads=told.loads,
            lost=told.lost if heard else told.lost | told.ours,
            heard=heard,
        )

    def _see_uses(self, new: Picture, ids: Mapping[ModelId, ModelId], held: frozenset[str]) -> None:
        grounds = self._grounds
        uses, told = new.uses_elsewhere(grounds.name), {}
        for key, model in ids.items():
            use, before = uses.get(key, Use()), self._used_told.get(key)
            ours = use.ours if key.upstream in held else frozenset[str]()
            fact = UsedElsewhere(grounds.clock(), model, use.waiting, use.used, ours)
            is_any = bool(use.waiting or use.used or ours)
            if is_any or before is not None:
                if before is None or changed(fact, at=before.at) != before:
                    grounds.keeping().record(fact)
                if is_any:
                    told[key] = fact
        self._used_told = told

    def kept(self, models: Iterable[ModelId]) -> None:
        """A config was read: what it no longer names is told anew when a later one does."""
        self._known &= frozenset(map(folded, models))

    # --- what it showed ------------------------------------------------------------------------------

    def is_yielded(self, key: ModelId) -> bool:
        """Whether all others have said so. Who has just come has seen it before it has served anybody."""
        grounds = self._grounds
        others = grounds.seen.members.keys() - {grounds.name}
        said = [grounds.seen.uses.get(other, {}).get(key, Use()) for other in others]
        asked = grounds.seen.yields.get(key)
        return asked is not None and all(use.yielded and use.asked in (None, asked) for use in said)

    @property
    def instances(self) -> Mapping[str, bool]:
        members = self.members
        return dict.fromkeys(members, True) | {
            name: False for name in self._last_there if name not in members
        }

    @property
    def members(self) -> Mapping[str, Member]:
        return there(self._grounds.seen.members)

    @property
    def holders(self) -> Mapping[str, str]:
        """Who acts where, by name, as of the last look; not we once our lease has run out by our own clock."""
        grounds = self._grounds
        names = {member.life: name for name, member in self.members.items()}
        good = grounds.hold.good(grounds.awake())
        found = sorted(grounds.seen.holders.items())
        return {u: names.get(h.life, h.instance) for u, h in found if good or h.life != grounds.life}


def _which(intent: Intent) -> tuple[int, str, int]:
    return intent.created, intent.life, intent.number


def there(members: Mapping[str, Member]) -> Mapping[str, Member]:
    """Those who are there. Whoever only waits for its own last life to be forgotten is not another one."""
    return {name: m for name, m in sorted(members.items()) if m.doubled or rows.named(name) == name}


def differences(
    us: Self, me: str, members: Mapping[str, Member], config: Mapping[str, str], places: Mapping[str, str]
) -> list[str]:
    """What is not as it should be between members, in sentences. `me` is what others know us by."""
    found = []
    for name, member in sorted(members.items()):
        other = members.get(rows.named(name))
        if member.doubled and other is not None:
            where = f"on {member.host or 'some host'} and on {other.host or 'some host'}"
            found.append(f"two daemons go by the name {rows.named(name)!r}, {where}")
        if member.format > rows.VERSION:
            found.append(
                f"{name} ({member.version}) writes format {member.format} of what daemons tell each other, "
                f"{us.instance} ({us.version}) knows {rows.VERSION}: upgrade {us.instance}, too"
            )
    for instance, member in there(members).items():
        if instance == me:
            continue
        found += [
            f"{instance} reaches {upstream} at {member.places[upstream]}, {me} at {place}"
            for upstream, place in sorted(places.items())
            if member.places.get(upstream, place) != place
        ]
        mine, theirs = config, member.config
        found += [f"only {me} keeps {m}" for m in sorted(mine.keys() - theirs.keys())]
        found += [f"only {instance} keeps {m}" for m in sorted(theirs.keys() - mine.keys())]
        found += [
            f"{instance} loads {m} with {theirs[m]}, {me} with {mine[m]}"
            for m in sorted(mine.keys() & theirs.keys())
            if mine[m] != theirs[m]
        ]
    return found[:DIFFERENCES_TOLD]
