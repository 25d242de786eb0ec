"""One upstream with its models, and what stays of them when the config changes."""

from collections.abc import Collection, Sequence
from math import inf

from keepalive.core.apply import apply
from keepalive.core.changed import replace
from keepalive.core.facts import (
    LoadRemembered,
    ModelId,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    fold_key,
)
from keepalive.core.primes import chosen
from keepalive.core.records import Model, Priming, Upstream, UpstreamState
from keepalive.core.states import State
from keepalive.keeper.given import Keep, Server


class _Count:
    """Requests for one warm model that its record does not hold yet."""

    __slots__ = ("answered_at", "at", "ended", "ended_at", "started")

    def __init__(self) -> None:
        self.at = 0.0
        self.started = 0
        self.ended = 0
        self.ended_at: float | None = None
        self.answered_at: float | None = None


class Shelf:
    """One upstream with its models, in the order of the config."""

    __slots__ = ("_counts", "models", "server", "upstream")

    def __init__(self, server: Server, now: float) -> None:
        self.server = server
        self.models: dict[str, Model] = {}
        self.upstream = Upstream(name=server.name, since=now)
        self._counts: dict[str, _Count] = {}

    # --- what is kept -------------------------------------------------------------------------------

    def serve(self, server: Server) -> None:
        """From now on it is kept like this."""
        self.server = server
        self.upstream = replace(
            self.upstream,
            refresh_interval=server.refresh_interval,
            max_loading=server.max_loading,
            auto_evict=server.auto_evict,
            memory=server.memory,
            # Whoever reads the config anew may have mended the token where it is made.
            due_at=-inf if self.upstream.state is UpstreamState.UNAUTHORIZED else self.upstream.due_at,
        )

    def empty(self, now: float) -> None:
        """It is asked through another client: nothing is known of it."""
        self.models = {key: _forgotten(model, now) for key, model in self.models.items()}
        self.upstream = Upstream(name=self.server.name, since=now)

    def place(self, keeps: Sequence[Keep], kept: Collection[ModelId], now: float) -> None:
        """Its models from now on. Those that are not `kept` are let go, and forgotten once nothing of ours is there."""
        for keep in keeps:
            self._respell(keep.model, kept)
        gone = {key: m for key, m in self.models.items() if m.id not in kept}
        models: dict[str, Model] = {}
        for rank, keep in enumerate(keeps):
            new = Model(id=keep.model, since=now, window_open=keep.window_open, kind=keep.kind or "llm")
            model = self.models.get(keep.model.key, new)
            if model.state is State.BACKOFF:
                # Whoever reads the config anew may have mended what holds it off.
                due = None if model.ping_at is None else -inf
                model = replace(model, retry_at=None, ping_at=due)
            models[keep.model.key] = replace(
                model,
                rank=rank,
                policy=keep.policy,
                retired=False,
                windowed=keep.windowed,
                window_open=keep.window_open,
                asked_for=None if model.retired else model.asked_for,
                refused=model.refused if keep.policy.pinged else None,
                priming=chosen(model.priming, keep.openings, learns=keep.learns),
            )
        for key, model in gone.items():
            models[key] = replace(model, retired=True, rank=len(models))
        self.models = models

    def _respell(self, model: ModelId, kept: Collection[ModelId]) -> None:
        """Where the config now writes a key in other letters, what is known of it goes on, and whose copies are ours.

        Unless a load may be under way, which is written down by the old letters, or a call, whose end is told by them.
        """
        if model.key in self.models:
            return
        for key, known in list(self.models.items()):
            busy = known.calling or known.pending or known.in_flight or known.waiting
            if fold_key(key) == fold_key(model.key) and known.id not in kept and not busy:
                del self.models[key]
                self.models[model.key] = replace(known, id=model)

    # --- requests -----------------------------------------------------------------------------------

    def count(self, fact: RequestStarted | RequestEnded) -> bool:
        """Whether a fact can wait, which comes twice for each request: of a warm model it leads to no other state.

        Whoever reads a record, or changes it, first has what was `counted` folded, so that nobody can tell.
        Nothing has to be planned because of it before the next tick.
        """
        model = self.models.get(fact.model.key)
        if model is None or model.state is not State.WARM or model.retired:
            return False
        count = self._counts.get(fact.model.key)
        if count is None:
            count = self._counts[fact.model.key] = _Count()
        if isinstance(fact, RequestStarted):
            count.started += 1
        elif model.in_flight + count.started > count.ended:
            count.ended += 1
            count.ended_at = fact.at
            if fact.answered:
                count.answered_at = fact.at
        else:
            return False  # its beginning was not seen: a reload has put this model here meanwhile
        count.at = fact.at
        return True

    def counts(self, key: str) -> bool:
        """Whether there are such requests for a model."""
        return key in self._counts

    def counted(self) -> Sequence[RequestsCounted]:
        """These requests, to be folded now."""
        if not self._counts:
            return ()
        counts, self._counts = self._counts, {}
        name = self.server.name
        return [
            RequestsCounted(c.at, ModelId(name, key), c.started, c.ended, c.ended_at, c.answered_at)
            for key, c in counts.items()
        ]


def _forgotten(model: Model, now: float) -> Model:
    """What still holds for a model when its upstream is asked through another client.

    That may be the same server, asked with another token: then our load is still under way over there.
    """
    fresh = Model(
        id=model.id,
        since=now,
        kind=model.kind,
        asked_for=model.asked_for,
        retired=model.retired,
        recent_loads=model.recent_loads,
        loads=model.loads,
        evictions=model.evictions,
        made_way=model.made_way,
        last_eviction=model.last_eviction,
        waiting=model.waiting,
        waiting_since=model.waiting_since,
        callers_elsewhere=model.callers_elsewhere,
        in_flight=model.in_flight,
        used_elsewhere=model.used_elsewhere,
        use_at=model.use_at,
        elsewhere_at=model.elsewhere_at,
        asks=model.asks,
        asks_at=model.asks_at,
        priming=Priming(learned=model.priming.learned),
    )
    since, pending = model.loading_since, model.pending
    if pending is not None and pending.loaded:
        # It has ended well over there, and only the listing lags.
        return replace(fresh, pending=replace(pending, proved=False, doubted=True), reason=model.reason)
    if since is None or (pending is not None and not pending.ours):
        return fresh
    expected, tells_loading = model.expected_load, model.tells_loading
    return apply(fresh, LoadRemembered(now, model.id, since, expected, tells_loading))
