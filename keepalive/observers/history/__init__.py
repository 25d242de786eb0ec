"""What happened, remembered: an observer of the keeper, and a file for the next life of the daemon.

The observer keeps a bounded story of each model in memory; where there is a path, a thread keeps the same rows in
a file. At the start the file gives back what earlier lives have left, as soon as it can be read; nobody waits
for it longer than `READ_WAIT`. Rows hold times, states, outcomes and the keys and addresses of the config.

    story      what is remembered of one model
    store      the file
    writer     the thread that owns it
    past       what a file of an earlier life tells, read once

May import: core.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from keepalive.core.facts import ClockJumped, Fact, ModelId
from keepalive.core.records import Model, Upstream
from keepalive.core.states import State
from keepalive.observers.history.store import Past, Place
from keepalive.observers.history.story import OFF, Asked, Changed, Entry, Story, entries
from keepalive.observers.history.writer import Writer

__all__ = ["History", "Past", "Story"]

# What earlier loads took is worth this much patience at the start.
READ_WAIT = 0.5


class History:
    """That of all configured models.

    `wall` gives Unix seconds; `path` None: in memory only, because of `why_not`; `report` is given what is wrong
    with the file, from another thread.
    """

    def __init__(
        self,
        wall: Callable[[], float],
        path: Path | None = None,
        why_not: str = "no file is configured",
        report: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._wall = wall
        self._why_not = why_not
        self._places: dict[ModelId, Place] = {}
        self._stories: dict[ModelId, Story] = {}
        self._awaited: set[ModelId] = set()
        self._writer = Writer(path, wall, report) if path is not None else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recalled: Callable[[ModelId, Past], None] = lambda model, past: None

    def configure(self, urls: Mapping[ModelId, str]) -> None:
        """Remember these models, each on the server at its address; what was known of others is forgotten."""
        before, self._places = self._places, {m: Place(url, m.key) for m, url in urls.items()}
        for model, place in before.items():
            if self._places.get(model) != place:
                del self._stories[model]
                self._awaited.discard(model)
                self._keep(place, Changed(self._wall(), OFF))
        fresh = [model for model in self._places if model not in self._stories]
        if self._writer is not None and fresh:
            # Before this life writes its own.
            self._awaited.update(fresh)
            self._writer.ask([self._places[model] for model in fresh], self._told)
        for model in fresh:
            self._stories[model] = Story()
            self._add(model, Changed(self._wall(), State.UNKNOWN))

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(fact, ClockJumped) and self._writer is not None:
            self._writer.clock_jumped()
        if isinstance(before, Model) and isinstance(after, Model) and after.id in self._stories:
            for entry in entries(fact, before, after, self._wall()):
                self._add(after.id, entry)

    def asked(self, model: ModelId, seconds: float, answered: float) -> None:
        """A request that came `seconds` ago is over; for `answered` of them its model answered it."""
        place = self._places.get(model)
        if place is not None and self._writer is not None:
            self._writer.put(place, Asked(self._wall() - seconds, answered))

    def _add(self, model: ModelId, entry: Entry) -> None:
        self._stories[model].add(entry)
        self._keep(self._places[model], entry)

    def _keep(self, place: Place, entry: Entry) -> None:
        if self._writer is not None:
            self._writer.put(place, entry)

    # --- its life -------------------------------------------------------------------------------------

    def start(self, recalled: Callable[[ModelId, Past], None]) -> None:
        """Begin to read and write the file. `recalled` is told what it says of each model."""
        self._loop, self._recalled = asyncio.get_running_loop(), recalled
        if self._writer is not None:
            self._writer.start()

    async def read(self) -> None:
        """Wait until earlier lives are known, but not for long: they may as well come later."""
        if self._writer is not None:
            await asyncio.to_thread(self._writer.tried.wait, READ_WAIT)

    async def close(self) -> None:
        if self._writer is not None:
            await asyncio.to_thread(self._writer.end)

    def _told(self, pasts: Mapping[Place, Past]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the daemon has ended meanwhile
            self._loop.call_soon_threadsafe(self._remember, pasts)

    def _remember(self, pasts: Mapping[Place, Past]) -> None:
        for model in list(self._awaited):
            past = pasts.get(self._places[model])
            if past is not None:
                self._awaited.discard(model)
                self._stories[model].begin_with(past.story)
                self._recalled(model, past)

    # --- what it tells --------------------------------------------------------------------------------

    def story(self, model: ModelId) -> Story | None:
        return self._stories.get(model)

    @property
    def trouble(self) -> str | None:
        """Why nothing of it outlives this process; None when it does."""
        return self._why_not if self._writer is None else self._writer.trouble
