"""By which name we are there, and which upstreams we stand for: what is taken, and what is let go."""

from math import inf

from keepalive.cluster import rows
from keepalive.cluster.etcd import created
from keepalive.cluster.given import Owner
from keepalive.cluster.grounds import Grounds
from keepalive.cluster.rows import Member
from keepalive.cluster.writing import Writing
from keepalive.core.records import Upstream, UpstreamState

# Who holds an upstream that it cannot reach, and another member can, lets go after this.
BLIND_AFTER = 15.0


class Place:
    """Our place among the members."""

    def __init__(self, grounds: Grounds, writing: Writing, owner: Owner) -> None:
        self._grounds = grounds
        self._writing = writing
        self._owner = owner
        self._others_since: float | None = None  # since when another one goes by our name
        self._blind_since: dict[str, float] = {}

    @property
    def doubled(self) -> bool:
        return self._others_since == inf

    async def stand(self) -> None:
        """Be there, hold what nobody holds, and let go of what another one can serve and we cannot."""
        grounds = self._grounds
        if grounds.lease is None:
            return
        name = grounds.me.instance
        other = grounds.seen.members.get(name)
        if other is None and rows.member_key(name) in grounds.seen.values:
            other = Member(name, "")  # whatever it was to say
        if other is not None and other.life != grounds.life:
            name = rows.stand_in(name, grounds.life)
            self._is_doubled(other, name)
        else:
            self._others_since = None
        there = grounds.seen.members.get(name)
        if there is None:
            await self._join(name)
        elif there.life == grounds.life:
            grounds.name = name
            await self._leave(rows.stand_in(grounds.me.instance, grounds.life))
            for upstream in grounds.keeping().snapshot().upstreams:
                await self._stand_for(upstream)

    async def _join(self, name: str) -> None:
        """Be there under that name, and no longer under the one that stood in for it."""
        grounds = self._grounds
        key = rows.member_key(name)
        changes: dict[str, bytes | None] = {key: self._writing.row()}
        if name == grounds.me.instance and grounds.name != name:
            changes |= {rows.member_key(grounds.name): None, rows.uses_key(grounds.name): None}
        if await grounds.commit([created(grounds.key(key), 0)], changes):
            # From now on, and not from the next picture: what is written by the old name would stay with our lease.
            grounds.name = name
            self._writing.forget_uses()
        self._owner.look_again()

    async def _leave(self, name: str) -> None:
        """A write that came late may have brought back who stood in for us, whom nobody else would take away."""
        grounds = self._grounds
        keys = (rows.member_key(name), rows.uses_key(name))
        if name != grounds.name and any(key in grounds.seen.values for key in keys):
            await grounds.commit([], dict.fromkeys(keys))
            self._owner.look_again()

    def _is_doubled(self, other: Member, name: str) -> None:
        """Our last life is found there until its lease runs out. What stays longer is another daemon."""
        grounds, now = self._grounds, self._grounds.awake()
        if self._others_since is None:
            self._others_since = now
        elif now - self._others_since > 1.5 * grounds.hold.ttl:
            self._others_since = inf  # said once
            grounds.tell(
                "cluster.name_taken",
                well=False,
                instance=grounds.me.instance,
                reason=f"another daemon of cluster {grounds.me.cluster!r}, on {other.host or 'some host'}, goes by "
                f"that name, too; give one of them another cluster.instance. Until then this one goes by {name!r}",
            )

    async def _stand_for(self, upstream: Upstream) -> None:
        grounds = self._grounds
        name, now = upstream.name, grounds.awake()
        holder = grounds.seen.holders.get(name)
        up = upstream.state is UpstreamState.UP
        seen = any(name in m.sees for m in grounds.seen.members.values() if m.life != grounds.life)
        if up or name not in grounds.held:
            self._blind_since.pop(name, None)
        if holder is None:
            if (up or not seen) and not self._owner.leaving:
                key = rows.holder_key(name)
                row = rows.holder_row(grounds.me.instance, grounds.life)
                await grounds.commit([created(grounds.key(key), 0)], {key: row})
                self._owner.look_again()  # whoever it was that came first
        elif (
            name in grounds.held
            and not up
            and seen
            and now - self._blind_since.setdefault(name, now) > BLIND_AFTER
        ):
            grounds.held -= {name}
            self._blind_since.pop(name)
            grounds.keeping().tick()
            why = "another member reaches it, and this one does not"
            grounds.tell("cluster.let_go", well=False, upstream=name, reason=why)
            key = rows.holder_key(name)
            await grounds.commit([created(grounds.key(key), holder.created)], {key: None})
            self._owner.look_again()
