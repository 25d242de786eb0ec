"""Those who wait for a model: they share its load, and are told when it is there, or when waiting is of no use."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from keepalive.core.errors import NotWarm
from keepalive.core.explain import next_try
from keepalive.core.facts import ModelFact, ModelId, WaitEnded, WaitStarted
from keepalive.core.moves import BACKOFF_FIRST
from keepalive.core.plan import arranged, blocked_by
from keepalive.core.records import Model, Upstream, UpstreamState
from keepalive.core.states import State
from keepalive.keeper.given import Hand


class Owner(Protocol):
    """Who knows the models: a `Keeper`."""

    def model(self, model: ModelId, /) -> Model | None: ...
    def glance(self, model: ModelId, /) -> Model | None: ...
    def siblings(self, model: ModelId, /) -> tuple[Model, ...]: ...
    def upstream(self, name: str, /) -> Upstream: ...
    def up(self) -> set[str]: ...
    def record(self, fact: ModelFact, /) -> None: ...


class Waiting:
    """All who wait."""

    def __init__(self, owner: Owner, clock: Callable[[], float], hand: Hand) -> None:
        self._owner = owner
        self._clock = clock
        self._hand = hand
        self._news: dict[ModelId, asyncio.Future[None]] = {}

    async def ensure_warm(self, models: Sequence[ModelId]) -> ModelId:
        """Wait until one of `models` is warm, and return it: the least busy, where several are.

        All who wait share one load, and are woken in the order in which they came. Has no time limit. Raises
        NotWarm when waiting is of no use. Cancelling it is leaving; the load goes on while it is wanted.
        """
        warm = self.ready(models)
        if warm is not None:
            return warm
        left = list(models)
        while True:
            chosen = self._nearest(left)
            try:
                return await self._ensure_warm(chosen, others=len(left) > len(chosen))
            except NotWarm:
                left = [model for model in left if model not in chosen]
                if not left:
                    raise

    def _nearest(self, models: Sequence[ModelId]) -> Sequence[ModelId]:
        """Of what is loaded on demand one copy is enough, on whichever upstream: where it will be warm soonest."""
        owner = self._owner
        known = [m for m in map(owner.model, models) if m is not None and m.policy.auto]
        if len(known) < 2 or len(known) < len(models):
            return models

        def distance(model: Model) -> tuple[bool, bool, bool, int, float]:
            upstream = owner.upstream(model.id.upstream)
            room = arranged(upstream, owner.siblings(model.id), self._clock())
            waits = room is not None and model.id not in {m.id for m in room.loads}
            up = upstream.state is UpstreamState.UP
            return not up, model.loading_since is None, waits, model.waiting, -model.use_at

        return [min(known, key=distance).id]

    async def _ensure_warm(self, models: Sequence[ModelId], *, others: bool) -> ModelId:
        """The same. Where there are `others`, nobody waits for an upstream that is away."""
        warm = self.ready(models)
        if warm is not None:
            return warm
        owner, began = self._owner, self._clock()
        for model in models:
            owner.record(WaitStarted(self._clock(), model))
        try:
            while warm is None:
                self._check_hope(models)
                if others and not owner.up() & {model.upstream for model in models}:
                    raise NotWarm(f"{models[0].upstream} cannot be asked")
                loop = asyncio.get_running_loop()
                # One future for all who wait: `wait` does not cancel it when one of them leaves.
                await asyncio.wait(
                    [self._news.setdefault(model, loop.create_future()) for model in models],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                warm = self.ready(models)
        finally:
            now = self._clock()
            for model in models:
                owner.record(WaitEnded(self._clock(), model, now - began, served=warm is not None))
        return warm

    def ready(self, models: Sequence[ModelId]) -> ModelId | None:
        """The least busy of those of `models` that a request may be passed on to now."""
        if len(models) == 1:
            known = self._owner.glance(models[0])
            return known.id if known is not None and known.given else None
        warm = [m.id for m in map(self._owner.glance, models) if m is not None and m.given]
        if len(warm) < 2:
            return warm[0] if warm else None
        return min(filter(None, map(self._owner.model, warm)), key=lambda m: m.in_flight).id

    def _check_hope(self, models: Sequence[ModelId]) -> None:
        """Raise NotWarm when none of `models` will be warm soon, with the reason of the first."""
        reasons: list[tuple[str, float | None]] = []
        for model in models:
            why = self._hopeless(model)
            if why is None:
                return
            reasons.append(why)
        message, retry_after = reasons[0] if reasons else ("no such model is kept here", None)
        raise NotWarm(message, retry_after=retry_after)

    def _hopeless(self, wanted: ModelId) -> tuple[str, float | None] | None:
        """Why waiting is of no use, and in how many seconds it may be; None while there is hope."""
        owner = self._owner
        model, now = owner.model(wanted), self._clock()
        if model is None:
            return f"{wanted.key} is no longer kept here", None
        upstream, siblings = owner.upstream(wanted.upstream), owner.siblings(wanted)
        again = next_try(upstream, model, now)
        left = None if again is None else again - now
        # A first failure is tried again soon enough to wait for it, and what was taken from us at once.
        if model.state is State.BACKOFF and left is not None and left > BACKOFF_FIRST and not model.contested:
            return f"{wanted.key} cannot be had now: {model.reason}", left
        if upstream.state is UpstreamState.UNAUTHORIZED:
            return f"{wanted.key} cannot be had: {upstream.error}", left
        if (nobody := self._hand.hopeless(wanted.upstream)) is not None:
            return f"{wanted.key} cannot be had: {nobody[0]}", nobody[1]
        if model.state is State.COLD:
            blocked = blocked_by(upstream, siblings, model) if model.listed else model.reason
            if blocked is not None:
                return f"{wanted.key} cannot be had: {blocked}", None
            room = arranged(upstream, siblings, now)
            if room is not None and wanted in room.never and self._hand.knows(wanted.upstream):
                return f"{wanted.key} cannot be had: {room.never[wanted]}", None
        return None

    # --- who wakes them -----------------------------------------------------------------------------

    def announce(self, model: ModelId) -> None:
        """There is something new of it: those who wait for it look again."""
        news = self._news.pop(model, None)
        if news is not None and not news.done():
            news.set_result(None)

    def reconsider(self) -> None:
        """There may be something new of any of them: all look again."""
        for model in list(self._news):
            self.announce(model)

    def room_changed(self, upstream: Upstream, models: tuple[Model, ...]) -> None:
        """Whoever waits for room that can never come any more is to be told so, and not to wait to his end."""
        if any(m.waiting and m.state is State.COLD for m in models):
            room = arranged(upstream, models, self._clock())
            for model in room.never if room is not None else ():
                self.announce(model)
