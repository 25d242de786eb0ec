"""On what grounds we act: the picture that was seen last, a lease, and an etcd that answers as it should."""

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf

from keepalive.cluster import rows
from keepalive.cluster.etcd import EngineError, Etcd, Json, delete, put
from keepalive.cluster.given import Keeping, Owner, Self, Tell
from keepalive.cluster.hold import Hold
from keepalive.cluster.rows import Picture
from keepalive.core.facts import DrainEnded, OthersHeard

# Whoever was told that we give a model to nobody has unloaded it within so many, or never will.
YIELDED = 2.0
# Callers are told that there is no hope when etcd has been away for so many lifetimes of a lease.
PATIENCE = 3.0


class Grounds:
    """What the other parts of a member stand on: whatever they decide rests on it, and what they write goes through it.

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
        owner: Owner,
    ) -> None:
        self.engine = engine
        self.me = me
        self.prefix = f"/keepalive/{me.cluster}/"
        self.keeping = keeping
        self.clock = clock
        self.awake = awake
        self.tell = tell
        self._owner = owner
        self.hold = Hold(ttl)
        self.lease: int | None = None
        self.life = ""  # of this lease
        self.late = False  # etcd was away until it began
        self.name = me.instance  # under which we are there
        self.held: frozenset[str] = frozenset()
        self.seen = Picture()
        self.saw = False  # any picture yet
        self._seen_at = awake()  # when it was
        self.informed = False  # a picture is of since etcd was last away
        self.looked_at = -inf  # when it was asked for, by the keeper's clock
        self._shy: dict[str, float] = {}  # when we act again where an intent could not be written
        self.quiet_until = -inf  # until then others may still have to say what they have begun alone
        # Since when etcd renews our lease and shows us nothing, or takes nothing from us, and why.
        self.refused: dict[str, tuple[float, str]] = {}
        self._said_refused = False
        self._useless = False  # that has lasted
        self._down_since: float | None = awake()
        self._missed_at = awake()  # when it last was
        self._said_down = False
        self.hopeless = False
        self.trouble: str | None = "etcd has not been asked yet"

    def acts(self, upstream: str) -> bool:
        """Whether it is this one that acts there, at this moment."""
        now = self.awake()
        quiet_until = max(self.quiet_until, self._shy.get(upstream, -inf))
        return upstream in self.held and self.hold.good(now) and now >= quiet_until and not self._useless

    # --- what becomes of the lease -------------------------------------------------------------------

    def begin_life(self, lease: int) -> None:
        self.lease, self.life, self.late = lease, secrets.token_hex(8), self._said_down

    def end_life(self) -> None:
        """The lease ran out: whatever we held is another's to take."""
        self.lease, self.held, self.hold = None, frozenset(), Hold(self.hold.ttl)

    def may_act(self, hold: Hold) -> None:
        now = self.awake()
        if self._said_down and not self.hold.good(now):
            # Nobody could act for a while, so that a person may have had to. Whoever was told so is back as soon as we
            # are, give or take its next renewal and an address or two that hangs.
            self.quiet_until = now + hold.ttl
        self.hold = hold

    def put_off(self, upstream: str) -> None:
        """At once again would be as fast as etcd says no."""
        self._shy[upstream] = self.awake() + self.hold.interval

    def wait_for_others(self) -> None:
        """Whoever knows more than etcd has time to write it before anybody acts."""
        self.held, self.quiet_until = frozenset(), self.awake() + self.hold.ttl

    # --- what is seen -------------------------------------------------------------------------------

    def show(self, new: Picture) -> float:
        """From now on all rests on this one. Returns when it was seen."""
        self.seen, self.saw, self._seen_at = new, True, self.awake()
        return self._seen_at

    def inform(self, looked: float) -> None:
        """The keeper was told of what was asked for at that time."""
        self.informed, self.looked_at = True, looked

    def is_heard(self, upstream: str, picture: Picture) -> bool:
        """Whether whoever acts there has said what it knows, and is sure to do so still."""
        us = picture.members.get(self.name)
        came = us.created if us is not None and us.life == self.life else inf
        return picture.is_said(upstream, came if self.late else 0)

    # --- what is asked of etcd -----------------------------------------------------------------------

    async def commit(self, compare: Iterable[Json], changes: Mapping[str, bytes | None]) -> bool:
        """Writes all of `changes`, None takes away, if `compare` holds. What is to go with us goes with our lease."""
        lease = self.lease or 0
        if not lease and any(
            value is not None and key.startswith(rows.LEASED) for key, value in changes.items()
        ):
            return False  # it ran out meanwhile: without one they would stay for ever
        writes = [
            delete(self.key(key))
            if value is None
            else put(self.key(key), value, lease if key.startswith(rows.LEASED) else 0)
            for key, value in changes.items()
        ]
        if all(value is None for value in changes.values()):  # which a full one takes, too
            return await self.engine.commit(list(compare), writes)
        with self.asks("writes"):
            return await self.engine.commit(list(compare), writes)

    def key(self, key: str) -> str:
        return self.prefix + key

    @contextlib.contextmanager
    def asks(self, what: str) -> Iterator[None]:
        """`what` is refused while this fails."""
        try:
            yield
        except EngineError as error:
            since, _ = self.refused.get(what, (self.awake(), ""))
            self.refused[what] = since, str(error)
            raise
        self.refused.pop(what, None)

    # --- whether etcd is there ------------------------------------------------------------------------

    def is_away(self, why: str) -> None:
        """Our lease could not be renewed."""
        self.refused.clear()  # who is away refuses nothing
        self.is_down(why)

    def is_answered(self) -> None:
        """Our lease was renewed. An etcd that does that and no more, for want of rights or of room, is of no use."""
        since, why = min(self.refused.values(), default=(inf, ""))
        if self.refused and not self._said_refused and self._down_since is None:
            # Not sooner: of an etcd that is away altogether one line is enough.
            self.tell("cluster.row_failed", well=False, reason=why)
        self._said_refused = bool(self.refused)
        self._useless = self.awake() - since > self.hold.ttl
        if self._useless:
            self.is_down(why)
        else:
            self.is_up()
        self._give_again()

    def is_up(self) -> None:
        if self._down_since is not None and self._said_down:
            self.tell("cluster.engine_up", well=True, seconds=round(self.awake() - self._down_since, 1))
            keeping = self.keeping()
            for upstream in keeping.snapshot().upstreams:
                keeping.record(OthersHeard(self.clock(), upstream.name))
            keeping.tick()
        if self.trouble is not None:
            self.trouble = None
            self._owner.changed()
        self._down_since, self._said_down = None, False
        if self.hopeless:
            self.hopeless = False
            self.keeping().reconsider()

    def is_down(self, why: str) -> None:
        now = self.awake()
        self.trouble, self.informed = why, False
        self._owner.changed()
        if self._down_since is None:
            self._down_since = now
        else:
            # While we slept, or were stopped, nobody looked whether it was there.
            self._down_since += max(now - self._missed_at - self.hold.ttl, 0.0)
        self._missed_at = now
        if not self._said_down:
            self._said_down = True
            self.tell("cluster.engine_down", well=False, reason=why)
        if not self.hopeless and now - self._down_since > PATIENCE * self.hold.ttl:
            self.hopeless = True
            self.keeping().reconsider()
        self._give_again()
        self.keeping().tick()

    def _give_again(self) -> None:
        """What was about to be unloaded is gone by now, or stays: our word, that it is given to nobody, has run out.

        For whoever asks for it anew, which we have not seen, it is no answer.
        """
        keeping = self.keeping()
        if self.awake() <= self._seen_at + YIELDED * self.hold.ttl:
            return
        for model in keeping.snapshot().models:
            if model.draining and model.id.upstream not in self.held:
                keeping.record(DrainEnded(self.clock(), model.id, unsure=True))
